"""PPO: its arithmetic by hand and against loops, its KL estimates, and what it learns."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import CPU, EOS, PAD, awake, ids, off, pairs, tiny, toy

import common
import ppo
import reward_model
from common import InputError, read_jsonl
from data import measure, prompt_batches, tokenizer_of
from model import RewardModel, load_model, load_reward_model, logprobs, save_model
from optim import adamw


def t(*values):
    return torch.tensor(values)


def mask_of(*lengths):
    """True on the first tokens of each row."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def close(actual, expected, atol=1e-4):
    actual, expected = torch.as_tensor(actual).float(), torch.as_tensor(expected).float()
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def config(**changes):
    sizes = dict(batch_size=8, minibatch_size=4, max_new_tokens=6, warmup_steps=0, **CPU)
    return ppo.Config(**(sizes | changes))


def head():
    linear = nn.Linear(32, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def count_3(prompt, response):
    return (response == 3).sum(dim=1).float()


def rollout_of(policy, cfg, reference=None, value_head=None):
    """A rollout of a toy policy: prompts of mixed length, a score that depends on the text."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, EOS, (cfg.batch_size, 4), generator=rng)
    prompt[::3, :2] = PAD
    return ppo.make_rollout(policy, value_head or head(), reference or toy(seed=1), count_3,
                            prompt, cfg, rng)


def updated(policy, value_head, rollout, cfg):
    """One update by a rollout. Returns (its metrics, how many steps it took)."""
    optimizer = adamw(nn.ModuleList([policy, value_head]), 1e-2, eps=1e-5)
    advantages, returns = ppo.compute_advantages(rollout, cfg, 0.1)
    metrics = ppo.update(policy, value_head, optimizer, rollout, advantages, returns, cfg, off)
    return metrics, optimizer.state[policy.wte.weight]["step"].item()


def column(folder, name):
    return [row[name] for row in read_jsonl(folder / "metrics.jsonl") if name in row]

# -----------------------------------------------------------------------------
# whitening, rewards, GAE

def test_whiten_by_hand():
    """Mean 1.6, biased variance 1/15, so (1.2 - 1.6) / .2582 = -1.5492; pads count for nothing."""
    x = t([1.2, 1.3, 1.4, 7], [1.5, 1.6, 1.7, 8], [1.8, 1.9, 2.0, 9])
    mask = torch.arange(4).expand(3, 4) < 3
    white = [[-1.5492, -1.1619, -.7746, 0], [-.3873, 0, .3873, 0], [.7746, 1.1619, 1.5492, 0]]
    close(ppo.whiten(x, mask), white)
    with pytest.raises(AssertionError):
        ppo.whiten(torch.randn(1, 1), torch.ones(1, 1, dtype=torch.bool))


def test_masked_mean_is_over_tokens_and_sees_no_pads():
    """(1 + 1 + 1 + 5) / 4 = 2; the mean of row means would be 3."""
    close(ppo.masked_mean(t([1.0, 1.0, 1.0], [5.0, 9.0, 9.0]), mask_of(3, 1)), 2.0)


def test_gae_by_hand():
    """deltas: 1 - .3 = .7, .02 + .3 - .4 = -.08, -.05 + .4 - .5 = -.15;
    A_2 = .7, A_1 = -.08 + .95 * .7 = .585, A_0 = -.15 + .95 * .585 = .40575."""
    advantages, returns = ppo.gae(t([-.05, .02, 1.0]), t([.5, .4, .3]), mask_of(3), 1.0, 0.95)
    close(advantages, [[.40575, .585, .7]])
    close(returns, [[.90575, .985, 1.0]])


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, over real tokens alone; it is 0 on pads."""
    torch.manual_seed(0)
    rewards, values, lengths = torch.randn(4, 6), torch.randn(4, 6), [6, 4, 2, 1]
    mask = mask_of(*lengths)
    advantages, returns = ppo.gae(rewards * mask, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        v = values[i, :n].tolist() + [0.0]
        delta = [rewards[i, j].item() + gamma * v[j + 1] - v[j] for j in range(n)]
        expected = [sum((gamma * lam) ** k * delta[j + k] for k in range(n - j)) for j in range(n)]
        close(advantages[i, :n], expected)
        close(returns[i, :n], torch.tensor(expected) + values[i, :n])
    assert (advantages[~mask] == 0).all()


def test_the_score_reaches_the_end_token_and_every_token_pays_for_its_kl():
    mask = mask_of(4, 2, 1)
    logp, ref_logp = torch.randn(3, 4) * mask, torch.randn(3, 4) * mask
    low = ppo.token_rewards(torch.zeros(3), logp, ref_logp, mask, 0.3)
    high = ppo.token_rewards(t(1.0, 2.0, 3.0), logp, ref_logp, mask, 0.3)
    close(high - low, [[0, 0, 0, 1], [0, 2, 0, 0], [3, 0, 0, 0]], atol=1e-6)
    close(low, -0.3 * (logp - ref_logp), atol=1e-6)


def test_shapes_never_broadcast():
    """(4,) - (4, 1) is (4, 4): the functions refuse to average the wrong things."""
    a, b, mask = torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool)
    for function, arguments in (
            (ppo.gae, (a, b, mask, 1, 1)), (ppo.token_rewards, (b, a, a, mask, 0.1)),
            (ppo.policy_loss, (a, a, b, mask, .2)), (ppo.value_loss, (a, a, b, mask, .2))):
        with pytest.raises(AssertionError):
            function(*arguments)

# -----------------------------------------------------------------------------
# the losses

def test_policy_loss_by_hand():
    """A = 1, -1, 1, -1 at ratios 1.5, 1.5, .5, .5:
    max(-1.5, -1.2) = -1.2; max(1.5, 1.2) = 1.5; max(-.5, -.8) = -.5; max(.5, .8) = .8.
    With an upper clip of .28 the first is -1.28."""
    ratio, advantages, zeros = t([1.5, 1.5, .5, .5]), t([1.0, -1.0, 1.0, -1.0]), torch.zeros(1, 4)
    for high, costs in ((0.0, [-1.2, 1.5, -.5, .8]), (.28, [-1.28, 1.5, -.5, .8])):
        for i, expected in enumerate(costs):
            one = torch.arange(4)[None] == i
            close(ppo.policy_loss(ratio.log(), zeros, advantages, one, 0.2, high)[0], expected)
    loss, metrics = ppo.policy_loss(ratio.log(), zeros, advantages, mask_of(4), 0.2)
    close(loss, .15)
    close(metrics["ratio"], 1.0)
    close(metrics["clipfrac"], 1.0)
    close(metrics["approx_kl"], 0.5 * sum(math.log(x) ** 2 for x in (1.5, 1.5, .5, .5)) / 4)
    for high, expected in ((0.0, .5), (.6, .25)):
        clipped = ppo.policy_loss(t([1.1, 1.5, .9, .7]).log(), zeros, advantages, mask_of(4), 0.2,
                                  high)[1]["clipfrac"]
        close(clipped, expected)


def test_gspo_by_hand():
    """Two tokens of ratios 4 and 1, so s = 2, and one of .5, all with A = 1: (-1.2 - .5) / 2. (The
    mean over tokens would be -.967.) With A = -1 the first costs 2; each of its two tokens has a
    gradient of s / 2, divided by two responses."""
    logp, mask = t([4.0, 1.0], [.5, 9.0]).log().requires_grad_(), mask_of(2, 1)
    ones, zeros = torch.ones(2, 2), torch.zeros(2, 2)
    loss, metrics = ppo.policy_loss(logp, zeros, ones, mask, 0.2, 0.0, "gspo")
    close(loss, -.85)
    close(metrics["ratio"], 1.5)                                # over tokens: (2 + 2 + .5) / 3
    loss, _ = ppo.policy_loss(logp, zeros, -ones, mask, 0.2, 0.0, "gspo")
    close(loss, (2 + .8) / 2)
    close(torch.autograd.grad(loss, logp)[0], [[.5, .5], [0, 0]])


def test_cispo_by_hand():
    """log pi = -1, -2 at ratios 1.5, .5 and A = 1: 1.2 * 1 and .5 * 2; mean 1.1. Both tokens keep a
    gradient, of minus their clipped weight; PPO would have none for the first."""
    logp = t([-1.0, -2.0]).requires_grad_()
    old_logp = logp.detach() - t([1.5, .5]).log()
    loss, metrics = ppo.policy_loss(logp, old_logp, torch.ones(1, 2), mask_of(2), .2, 0.0, "cispo")
    close(loss, 1.1)
    close(torch.autograd.grad(loss, logp)[0], [[-.6, -.25]])
    close(metrics["clipfrac"], .5)


def test_dr_grpo_by_hand():
    """Three tokens with A = 1, one with A = -1, divided by a length of 8 each: (-3 + 1) / 2 / 8."""
    zeros, advantages = torch.zeros(2, 3), t([1.0, 1, 1], [-1.0, -1, -1])
    loss, _ = ppo.policy_loss(zeros, zeros, advantages, mask_of(3, 1), 0.2, max_length=8)
    close(loss, -.125)


def test_value_loss_by_hand():
    """V = 1 and 0, V_old = .5, R = 1: V is clipped to .7 and .3;
    .5 max(0, .09) = .045 and .5 max(1, .49) = .5; mean .2725."""
    values, old, returns = t([1.0, 0.0]), t([.5, .5]), t([1.0, 1.0])
    for i, expected in enumerate([.045, .5]):
        close(ppo.value_loss(values, old, returns, torch.arange(2)[None] == i, 0.2), expected)
    close(ppo.value_loss(values, old, returns, mask_of(2), 0.2), .2725)


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("max_length", [0, 9])
def test_pads_change_no_loss(loss, max_length):
    mask, tensors = mask_of(4, 2), torch.randn(3, 2, 4)
    garbage = tensors.masked_fill(~mask, 2.0)

    def numbers(x):
        value, metrics = ppo.policy_loss(*x, mask, 0.2, 0.0, loss, max_length)
        return t(value, ppo.value_loss(*x, mask, 0.2), *metrics.values())

    close(numbers(garbage), numbers(tensors), atol=1e-6)


def test_group_advantages_by_hand():
    """R = 1, 2, 3, 6. rloo: 1 - 11/3 = -2.6667, 2 - 10/3 = -1.3333, 3 - 9/3 = 0, 6 - 6/3 = 4.
    grpo: mean 3, unbiased std sqrt(14/3) = 2.1602."""
    rewards = torch.cat([t(1.0, 2.0, 3.0, 6.0), torch.full((4,), 5.0)])     # two groups
    for kind, expected in (("rloo", [-2.6667, -1.3333, 0, 4]), ("dr_grpo", [-2.0, -1, 0, 3]),
                           ("grpo", [-.92578, -.46289, 0, 1.38867])):
        close(ppo.group_advantages(rewards, 4, kind), expected + [0] * 4)


def test_group_baselines_charge_for_the_kl_of_the_response():
    """R = score - beta sum_t k1_t; all tokens of a response share its advantage."""
    logp, ref_logp = t([-1.0, -1.0, -1.0], [-1.0, -2.0, 0.0]), t([-1.5, -1, -2], [-1.0, -1, 0])
    rollout = SimpleNamespace(score=t(1.0, 2.0), logp=logp, ref_logp=ref_logp, mask=mask_of(3, 2))
    advantages, _ = ppo.compute_advantages(rollout, config(baseline="rloo", group_size=2), 0.1)
    a, b = 1 - .1 * (.5 + 0 + 1.0), 2 - .1 * (0 - 1.0)
    close(advantages, [[a - b, a - b, a - b], [b - a, b - a, 0]])


def test_explained_variance_by_hand():
    """Returns 1, 3: variance 1. Values 1, 2: mean squared error .5. So 1 - .5 / 1 = .5."""
    returns, mask = t([1.0, 3.0, 99.0]), t([True, True, False])
    assert ppo.explained_variance(t([1.0, 2.0, 0.0]), returns, mask) == pytest.approx(.5)
    assert ppo.explained_variance(returns, returns, mask) == 1
    assert ppo.explained_variance(returns, torch.ones(1, 3), mask) == 0         # and no NaN

# -----------------------------------------------------------------------------
# KL: estimators in their expectation, and the gradient of each place for the penalty

def two_softmaxes():
    torch.manual_seed(0)
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(20, dtype=torch.float64).log_softmax(0)


def test_kl_estimators_in_expectation():
    """sum_x pi(x) k(x): k1 and k3 give KL(pi || ref) exactly, k2 does not; k3 is never negative."""
    logits, ref_logp = two_softmaxes()
    logp = logits.detach().log_softmax(0)
    k1, k2, k3 = ppo.kl_estimates(logp, ref_logp)
    pi, ref = (torch.distributions.Categorical(logits=x) for x in (logp, ref_logp))
    exact = torch.distributions.kl_divergence(pi, ref)
    close((logp.exp() * k1).sum(), exact, atol=1e-6)
    close((logp.exp() * k3).sum(), exact, atol=1e-6)
    assert exact > 0.3 and (k3 >= 0).all() and (k1 < 0).any()
    close(k2, 0.5 * (logp - ref_logp) ** 2)


def expected_gradient(logits, per_token):
    """Gradient of sum_x sg(pi(x)) f(x): what sampling x ~ pi and differentiating f gives."""
    logp = logits.log_softmax(0)
    return torch.autograd.grad((logp.detach().exp() * per_token(logp)).sum(), logits)[0]


def test_the_penalty_in_the_reward_has_the_gradient_of_the_kl():
    """So has k2 as a loss. k1 as a loss has none, and k3 has that of KL(ref || pi)."""
    logits, ref_logp = two_softmaxes()
    logp = logits.log_softmax(0)
    reverse = (logp.exp() * (logp - ref_logp)).sum()
    reverse = torch.autograd.grad(reverse, logits, retain_graph=True)[0]
    forward = torch.autograd.grad((ref_logp.exp() * (ref_logp - logp)).sum(), logits)[0]

    def reinforce(logp):
        one = torch.ones(20, 1, dtype=torch.bool)
        rewards = ppo.token_rewards(torch.zeros(20).double(), logp.detach()[:, None],
                                    ref_logp[:, None], one, 1.0)
        return -logp * rewards[:, 0]

    close(expected_gradient(logits, reinforce), reverse, atol=1e-6)
    for k, expected in enumerate([torch.zeros(20), reverse, forward]):
        gradient = expected_gradient(logits, lambda x, k=k: ppo.kl_estimates(x, ref_logp)[k])
        close(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_the_policy_gradient_is_the_exact_one(loss):
    """Three tokens with rewards 1, 0, -2. At ratio 1 the loss has, in expectation, minus the
    gradient of sum_x pi(x) r(x)."""
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    rewards, one = t(1.0, 0.0, -2.0).double()[:, None], torch.ones(1, 1, dtype=torch.bool)
    exact = torch.autograd.grad((logits.softmax(0) * rewards[:, 0]).sum(), logits)[0]

    def losses(logp):
        logp = logp[:, None, None]
        return torch.stack([ppo.policy_loss(logp[i], logp[i].detach(), rewards[i][None], one, .2,
                                            loss=loss)[0] for i in range(3)])

    close(expected_gradient(logits, losses), -exact, atol=1e-6)

# -----------------------------------------------------------------------------
# rollout and update

@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_rollout_is_consistent(temperature):
    """Responses of mixed lengths; log-probs at the temperature of the sampling; 0 on pads. A
    response without an end pays."""
    policy, reference = awake(toy()), awake(toy(seed=1))
    cfg = config(batch_size=32, minibatch_size=8, temperature=temperature, missing_eos_penalty=2.5)
    rollout = rollout_of(policy, cfg, reference)
    B, R = rollout.response.shape
    lengths, ended = rollout.mask.sum(dim=1), (rollout.response == EOS).any(dim=1)
    assert B == 32 and lengths.min() < lengths.max() <= 6 and 0 < ended.sum() < 32
    assert torch.equal(rollout.mask, rollout.response != PAD)
    for i in range(B):          # the mask ends at the end token, which it includes
        row = rollout.response[i, :lengths[i]].tolist()
        assert PAD not in row and EOS not in row[:-1] and (row[-1] == EOS or lengths[i] == 6)
    for field, model in (("logp", policy), ("ref_logp", reference)):
        expected = logprobs(model, rollout.prompt, rollout.response, temperature)
        close(getattr(rollout, field), expected, atol=1e-5)
        assert not getattr(rollout, field).requires_grad
    assert rollout.values.shape == (B, R) and not rollout.values.requires_grad
    entropy = -ppo.masked_mean(rollout.logp, rollout.mask).item()   # generate() drew from it, too
    assert rollout.entropy == pytest.approx(entropy, abs=1e-4)
    close(rollout.score, count_3(None, rollout.response) - 2.5 * ~ended)


def test_what_is_logged_of_a_rollout_by_hand(tok):
    """k1 of two responses: .5 - .25 = .25 and 1, mean .625; pads count for nothing."""
    logp, ref_logp = t([-1.0, -1.0], [-1.0, 7.0]), t([-1.5, -.75], [-2.0, 9.0])
    response = t([5, tok.eos_token_id], [5, tok.pad_token_id])
    rollout = ppo.Rollout(t([1], [2]), response, mask_of(2, 1), logp, ref_logp, logp, t(1.0, 4.0),
                          1.5)
    metrics, rows = ppo.describe_rollout(rollout, tok)
    k3 = [math.exp(-x) - 1 + x for x in (.5, -.25, 1.0)]
    expected = dict(kl=.625, k3=sum(k3) / 2, score=2.5, entropy=1.5, length=1.5, distinct=.5)
    assert metrics == pytest.approx(expected | dict(ended=.5), abs=1e-5)
    assert [row["kl"] for row in rows] == pytest.approx([.25, 1.0])


def test_the_value_of_a_state_does_not_know_the_future():
    """V(s_t) reads the prompt and response[:, :t]: what stands at t changes later values alone."""
    policy, value_head = awake(toy()), awake(head())
    prompt, response = ids([1, 2, 3]), ids([4, 5, 6, 7])
    _, values = ppo.actor_critic(policy, value_head, prompt, response, 1.0)
    for i in range(3):
        other = response.clone()
        other[0, i] = 9
        _, changed = ppo.actor_critic(policy, value_head, prompt, other, 1.0)
        close(changed[:, :i + 1], values[:, :i + 1], atol=1e-6)
        assert (changed[:, i + 1:] - values[:, i + 1:]).abs().max() > 1e-4


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_ratio_is_one_and_later_ones_are_not(epochs):
    """Before any step the update computes the very numbers of the rollout."""
    policy, cfg = awake(toy()), config(minibatch_size=8, ppo_epochs=epochs)
    rollout = rollout_of(policy, cfg)
    metrics, _ = updated(policy, head(), rollout, cfg)
    assert metrics["first_ratio"] < 1e-5 and (metrics["approx_kl"] > 1e-4) == (epochs > 1)
    rollout.logp -= 0.1         # as if another policy had written the responses
    assert updated(policy, head(), rollout, cfg)[0]["first_ratio"] > 0.05


@pytest.mark.parametrize("target_kl, others, passes", [(1e-9, 0, 1), (1e9, 0, 3), (1e9, 1, 1)])
def test_the_passes_end_when_the_policy_is_too_far(monkeypatch, target_kl, others, passes):
    """In all processes, if it is too far in one of them."""
    monkeypatch.setattr(common, "average_over_processes", lambda x: (x + others) / 2)
    policy, cfg = awake(toy()), config(ppo_epochs=3, target_kl=target_kl)
    monkeypatch.setattr("optim.average_gradients", lambda model: None)
    assert updated(policy, head(), rollout_of(policy, cfg), cfg)[1] == 2 * passes


def test_the_options_of_the_loss_reach_it(monkeypatch):
    seen, policy_loss = [], ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *x: seen.append(x[4:]) or policy_loss(*x))
    policy = awake(toy())
    for baseline in ("grpo", "dr_grpo"):
        cfg = config(loss="gspo", clip_range=.3, clip_range_high=.4, baseline=baseline,
                     group_size=2, ppo_epochs=1)
        updated(policy, head(), rollout_of(policy, cfg), cfg)
    assert seen == [(.3, .4, "gspo", 0)] * 2 + [(.3, .4, "gspo", 6)] * 2

# -----------------------------------------------------------------------------
# the stage

def count_e(prompts, texts):
    return [text.count("e") / 4 for text in texts]


def run_of(folder, sft_ckpt, reward_fn=count_e, **changes):
    """A short run of the stage."""
    sizes = dict(lr=3e-3, sample_interval=50, missing_eos_penalty=0.0) | changes
    ppo.train(tiny(ppo, folder, sft_ckpt, **sizes), reward_fn)
    return folder


@pytest.mark.parametrize("changes, message", [
    (dict(baseline="gae"), "--baseline is critic, rloo, grpo or dr_grpo"),
    (dict(loss="dpo"), "--loss is ppo, gspo or cispo"),
    (dict(baseline="rloo"), "needs --group_size of at least 2"),
    (dict(batch_size=10), "must be a multiple"), (dict(group_size=3), "must be a multiple")])
def test_options_that_contradict_each_other(tmp_path, sft_ckpt, changes, message):
    with pytest.raises(InputError, match=message):
        run_of(tmp_path, sft_ckpt, **changes)


@pytest.mark.parametrize("scores, message", [
    ([1.0] * 7, r"one number for each of the 8 texts, and not numbers of shape \(7,\)"),
    ([[1.0]] * 8, r"shape \(8, 1\)"), (1.0, r"shape \(\)"), (["good"] * 8, "a list of numbers"),
    (None, "a list of numbers, and not 'None'"), ([None] * 8, "a list of numbers"),
    ([1.0] * 7 + [float("nan")], "gave nan to '.*': a score must be finite"),
    ([1.0] * 7 + [1e300], "gave inf to")])
def test_a_reward_of_the_wrong_kind_is_one_sentence(tmp_path, sft_ckpt, scores, message):
    with pytest.raises(InputError, match=f"^reward_fn .*{message}"):
        run_of(tmp_path, sft_ckpt, lambda prompts, texts: scores)


@pytest.mark.parametrize("changes", [
    dict(), dict(baseline="rloo", group_size=4, loss="cispo"),
    dict(baseline="dr_grpo", group_size=4, loss="gspo"), dict(lora=4, lr=3e-2)])
def test_a_rewarded_letter_becomes_more_frequent(tmp_path, sft_ckpt, changes):
    """A reward of the user's own: how many e's. Score and KL rise, and the KL is that of the
    trained policy to the start."""
    seen = []

    def reward_fn(prompts, texts):
        seen.append((prompts, texts))
        return count_e(prompts, texts)

    sizes = dict(batch_size=64, minibatch_size=32, max_steps=12, max_new_tokens=8, kl_coef=0.01)
    run_of(tmp_path, sft_ckpt, reward_fn, **sizes | changes)
    score, kl = column(tmp_path, "score"), column(tmp_path, "kl")
    (prompts, first), (_, last) = seen[0], seen[-1]
    assert [score[0], score[-1]] == pytest.approx([sum(count_e(0, x)) / 64 for x in (first, last)])
    assert score[-1] > 1.25 * score[0] and kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 0.1
    assert all(ratio < 1e-4 for ratio in column(tmp_path, "first_ratio"))
    policy, start = load_model(tmp_path / "ckpt.pt"), load_model(sft_ckpt)
    rows = measure(policy, start, tokenizer_of(policy), prompts * 4, None, off)
    assert sum(row["kl"] for row in rows) / len(rows) > 0.5 * kl[-1]
    assert sum(count_e(0, [row["text"] for row in rows])) / len(rows) > score[0]
    size = changes.get("group_size", 1)
    assert len(prompts) == 64 and all(prompt.startswith("About a") for prompt in prompts)
    assert prompts[::size] == prompts[size - 1::size]       # neighbors answer one prompt
    for name in ("value_loss", "explained_variance"):
        assert bool(column(tmp_path, name)) == ("baseline" not in changes)


@pytest.fixture(scope="module")
def likes_likely(tmp_path_factory, sft_ckpt):
    """A reward model that scores a text by its log-prob under the SFT model alone."""
    reward = RewardModel(load_model(sft_ckpt), likelihood=0.2)
    nn.init.zeros_(reward.scalar_head.weight)
    path = tmp_path_factory.mktemp("reward") / "ckpt.pt"
    save_model(path, reward, tokenizer_of(reward.model))
    return str(path)


def test_what_the_reward_model_prefers_becomes_more_frequent(tmp_path, sft_ckpt, likes_likely):
    """The score of a checkpoint, measured anew: it rises by more than chance."""
    run_of(tmp_path, sft_ckpt, None, reward=likes_likely, batch_size=64, minibatch_size=32,
           max_steps=12, max_new_tokens=8, kl_coef=0.0)
    reward, scores = load_reward_model(likes_likely), []
    for path in (sft_ckpt, tmp_path / "ckpt.pt"):
        policy, rng = load_model(path), torch.Generator().manual_seed(0)
        rows = measure(policy, None, tokenizer_of(policy), ["About a banker:"] * 128, rng, off,
                       reward)
        scores.append(t(*[row["score"] for row in rows]))
    assert scores[1].mean() > scores[0].mean() + scores[0].std()
    logged = column(tmp_path, "score")
    assert logged[-1] > logged[0] + 1


def test_an_adapter_scores_as_the_merged_reward_model_does(tmp_path, sft_ckpt):
    """With --lora, policy, reference and reward model share one trunk. Nothing else changes."""
    reward_model.train(tiny(reward_model, tmp_path / "reward_model", sft_ckpt, lora=2, lr=1e-2,
                            data=pairs(tmp_path)))
    reward = str(tmp_path / "reward_model" / "ckpt.pt")
    for lora in (0, 2):
        run_of(tmp_path / f"{lora}", sft_ckpt, None, reward=reward, lora=lora, max_steps=3, lr=1e-2)
    full, adapters = (column(tmp_path / f"{lora}", "score") for lora in (0, 2))
    assert full[0] == pytest.approx(adapters[0], abs=1e-3) and abs(full[0]) > 1e-2
    kl = column(tmp_path / "2", "kl")
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 1e-3


def weights(folder):
    return load_model(folder / "ckpt.pt").state_dict()


def test_groups_that_score_alike_teach_nothing(tmp_path, sft_ckpt):
    """Of four pairs of responses, one gets two different scores. If none does, and KL is free, no
    weight moves, not even by decay."""
    fixed = dict(max_steps=1, baseline="rloo", group_size=2, kl_coef=0.0)
    run_of(tmp_path / "a", sft_ckpt, lambda *_: [0.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0], **fixed)
    assert column(tmp_path / "a", "dead_groups") == [.75]
    assert column(tmp_path / "a", "score") == [2.375]
    run_of(tmp_path / "b", sft_ckpt, lambda *_: [1.0] * 8, **fixed)
    start = load_model(sft_ckpt).state_dict()
    assert all(torch.equal(w, start[name]) for name, w in weights(tmp_path / "b").items())
    assert not torch.equal(weights(tmp_path / "a")["wte.weight"], start["wte.weight"])


def test_the_critic_learns(tmp_path, sft_ckpt):
    """The reward is always 2: values go from 0 to 2, the value loss from .5 * 2^2 to near 0."""
    run_of(tmp_path, sft_ckpt, lambda prompts, texts: [2.0] * len(texts), max_steps=12, lr=1e-2,
           kl_coef=0.0, lam=1.0, clip_range=5.0, ppo_epochs=1)
    loss = column(tmp_path, "value_loss")
    assert loss[0] > 1 and loss[-1] < 0.2
    assert column(tmp_path, "explained_variance") == [0] * 12   # equal returns are no NaN


def test_every_option_changes_what_it_should(tmp_path, sft_ckpt):
    """Two rollouts each from the same start lead to other weights. How the rest is observed, or
    by which test, stands in the second set."""
    groups = dict(baseline="rloo", group_size=2)
    table = [dict(kl_coef=2.0), dict(gamma=0.5), dict(lam=0.5), dict(vf_coef=5.0), groups,
             dict(clip_range=0.01), dict(clip_range_high=0.01), dict(ppo_epochs=1), dict(lr=1e-3),
             dict(minibatch_size=8), dict(batch_size=16), dict(temperature=0.7), dict(seed=1),
             dict(missing_eos_penalty=3.0), dict(max_new_tokens=4), dict(grad_clip=1e-6),
             dict(warmup_steps=2), dict(target_kl=1e-9), dict(loss="gspo"), dict(loss="cispo"),
             dict(max_steps=1), dict(trainable="last:1"), dict(lora=2)]
    elsewhere = {"out_dir", "init", "reward", "data", "sample_interval",    # below, and above
                 "device", "dtype", "checkpointing"}            # test_stages.py and test_lora.py
    fields = {field.name for field in dataclasses.fields(ppo.Config)}
    assert set().union(*table) | elsewhere == fields
    base = weights(run_of(tmp_path, sft_ckpt, kl_coef=0.2))["h.0.mlp.c_fc.weight"]
    for changes in [{}, *table]:
        other = weights(run_of(tmp_path, sft_ckpt, **dict(kl_coef=0.2) | changes))
        assert torch.equal(other["h.0.mlp.c_fc.weight"], base) == (not changes), changes
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why an owl?"}\n', encoding="utf-8")
    run_of(tmp_path, sft_ckpt, data=str(prompts), sample_interval=1)
    samples = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("step ") == 2 and samples.count("Why an owl?") == 6


def test_a_batch_may_need_more_prompts_than_there_are(tok):
    """Twelve of five prompts: they repeat. The pun world has 503, and a GPU takes 1,024 at once."""
    texts = [f"About {n} owls:" for n in range(5)]
    cfg = ppo.Config(batch_size=12, max_new_tokens=6)
    rows = [{"prompt": text} for text in texts]
    prompt = prompt_batches(rows, cfg, tok, 24, "cpu", seed=0).next()["prompt"]
    assert len(prompt) == 12 and {tok.decode(row) for row in prompt} <= set(texts)
    with pytest.raises(InputError, match="tokens, 20 of them for a response"):
        prompt_batches(rows, dataclasses.replace(cfg, max_new_tokens=20), tok, 24, "cpu", 0)
