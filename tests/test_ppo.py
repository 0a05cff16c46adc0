"""PPO: its arithmetic by hand and against loops, its KL estimates, and what it learns."""

import dataclasses
import math
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, EOS, PAD, awake, ids, off, pairs, refuses, tiny, toy

import common
import ppo
import reward_model
from common import InputError, read_jsonl
from data import means, measure, prompt_batches, tokenizer_of
from model import RewardModel, load_model, logprobs, save_model
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


def count_3(prompt, response):
    return (response == 3).sum(dim=1).float()


def rollout_of(policy, cfg, reference=None, value_head=None):
    """A rollout of a toy policy: prompts of mixed length, a score that depends on the text."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, EOS, (cfg.batch_size, 4), generator=rng)
    prompt[::3, :2] = PAD
    return ppo.make_rollout(policy, value_head or nn.Linear(32, 1), reference or toy(seed=1),
                            count_3, prompt, cfg, rng)


def updated(policy, rollout, cfg):
    """One update by a rollout. Returns (its metrics, how many steps it took)."""
    value_head = nn.Linear(32, 1)
    optimizer = adamw(nn.ModuleList([policy, value_head]), 1e-2, eps=1e-5)
    advantages, returns = ppo.compute_advantages(rollout, cfg, 0.1)
    learn = ppo.minibatch_step(policy, value_head, optimizer, cfg, off)
    metrics = ppo.update(learn, rollout, advantages, returns, cfg)
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


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, over real tokens alone; it is 0 on pads, and what a
    critic says of pads counts for nothing."""
    torch.manual_seed(0)
    lengths = [6, 4, 2, 1]
    mask = mask_of(*lengths)
    rewards, values = torch.randn(2, 4, 6)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    values = values * mask
    close(returns, advantages + values)
    delta = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
    for i, n in enumerate(lengths):
        for t in range(6):
            expected = sum((gamma * lam) ** k * delta[i, t + k] for k in range(n - t))
            close(advantages[i, t], expected)


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


@pytest.mark.parametrize("options, A, loss, gradient, clipped", [
    (dict(), 1, (-1.2 - 1 - .5) / 3, [0, -1 / 3, -.5 / 3], 2 / 3),
    # s = sqrt(4 * 1) = 2 for both tokens of the first; the mean is over responses.
    (dict(loss="gspo"), 1, (-1.2 - .5) / 2, [0, 0, -.5 / 2], 1),
    (dict(loss="gspo"), -1, (2 + .8) / 2, [2 / 2 / 2, 2 / 2 / 2, 0], 1),
    # -A min(ratio, 1.2) log pi; a token that is clipped keeps a gradient, of minus its weight.
    (dict(loss="cispo"), 1, (1.2 * 1 + 1 * 2 + .5 * 3) / 3, [-1.2 / 3, -1 / 3, -.5 / 3], 1 / 3),
    # Dr. GRPO: the sum of each response, divided by 8, whatever its length.
    (dict(max_length=8), 1, ((-1.2 - 1) / 8 - .5 / 8) / 2, [0, -1 / 16, -.5 / 16], 2 / 3)])
def test_variants_of_the_policy_loss_by_hand(options, A, loss, gradient, clipped):
    """Two tokens of ratios 4 and 1, and one of .5; log pi = -1, -2, -3. The last one is a pad."""
    logp, mask = t([-1.0, -2.0], [-3.0, 5.0]).requires_grad_(), mask_of(2, 1)
    old_logp = logp.detach() - t([4.0, 1.0], [.5, 9.0]).log()
    found, metrics = ppo.policy_loss(logp, old_logp, A * torch.ones(2, 2), mask, 0.2, **options)
    close(found, loss)
    close(torch.autograd.grad(found, logp)[0].flatten(), [*gradient, 0])
    close(metrics["clipfrac"], clipped)
    close(metrics["approx_kl"], .5 * (math.log(4) ** 2 + math.log(.5) ** 2) / 3)    # of tokens


def test_value_loss_by_hand():
    """V = 1 and 0, V_old = .5, R = 1: V is clipped to .7 and .3;
    .5 max(0, .09) = .045 and .5 max(1, .49) = .5; mean .2725."""
    values, old, returns = t([1.0, 0.0]), t([.5, .5]), t([1.0, 1.0])
    for i, expected in enumerate([.045, .5]):
        close(ppo.value_loss(values, old, returns, torch.arange(2)[None] == i, 0.2), expected)
    close(ppo.value_loss(values, old, returns, mask_of(2), 0.2), .2725)


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


def test_kl_estimates_by_hand():
    """pi_ref / pi = 2 and .5: k1 = -log 2 and log 2; k2 = .2402; k3 = 1 - log 2 and log 2 - .5.
    With pi = 1/3, 2/3 the means of k1 and k3 are the KL, .2310; the mean of k2 is not."""
    pi, ref = t([1 / 3, 2 / 3]), t([2 / 3, 1 / 3])
    k1, k2, k3 = ppo.kl_estimates(pi.log(), ref.log())
    close(k1, [[-.6931, .6931]])
    close(k2, [[.2402, .2402]])
    close(k3, [[.3069, .1931]])
    close((pi * k1).sum(), .2310)
    close((pi * k3).sum(), .2310)

# -----------------------------------------------------------------------------
# rollout and update

@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_rollout_is_consistent(temperature):
    """Responses of mixed lengths; log-probs at the temperature of the sampling; 0 on pads. A
    response without an end pays. The numbers drawn are those of the generator alone."""
    policy, reference, value_head = awake(toy()), awake(toy(seed=1)), nn.Linear(32, 1)
    cfg = config(batch_size=32, minibatch_size=8, temperature=temperature, missing_eos_penalty=2.5)
    rollout = rollout_of(policy, cfg, reference, value_head)
    torch.rand(1)
    again = rollout_of(policy, cfg, reference, value_head)
    assert torch.equal(again.response, rollout.response)
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
    values = value_head(policy.hidden(rollout.prompt, rollout.response))[..., 0]
    close(rollout.values, values)
    assert values.abs().max() > 0.1 and not rollout.values.requires_grad
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
    """V(s_t) reads the prompt and response[:, :t]: another token at 1 changes later values only."""
    policy, value_head = awake(toy()), awake(nn.Linear(32, 1))
    (_, a), (_, b) = (ppo.actor_critic(policy, value_head, ids([1, 2]), ids([4, x, 6]), 1.0)
                      for x in (5, 9))
    assert ((a - b).abs() > 1e-4).tolist() == [[False, False, True]]


@pytest.mark.parametrize("target_kl, others, passes", [(1e-9, 0, 1), (1e9, 0, 3), (1e9, 1, 1)])
def test_the_passes_end_when_the_policy_is_too_far(monkeypatch, target_kl, others, passes):
    """In all processes, if it is too far in one of them."""
    monkeypatch.setattr(common, "average_over_processes", lambda x: (x + others) / 2)
    policy, cfg = awake(toy()), config(ppo_epochs=3, target_kl=target_kl)
    assert updated(policy, rollout_of(policy, cfg), cfg)[1] == 2 * passes


def test_a_rollout_of_another_policy_is_noticed():
    policy, cfg = awake(toy()), config()
    rollout = rollout_of(policy, cfg)
    rollout.logp[:, 0] += 0.1           # ratios below 1 count as much as those above, and one
    assert updated(policy, rollout, cfg)[0]["first_ratio"] > 0.05       # among many is enough


def test_an_update_passes_over_the_rollout_in_minibatches():
    """Each pass has each response once, in an order of its own, with all that belongs to it.
    Metrics are means over all steps, but first_ratio is that of the first."""
    cfg, seen = config(ppo_epochs=3), []
    rollout = rollout_of(toy(), cfg)
    rollout.prompt = torch.arange(8)[:, None]
    returns = rollout.values + 1

    def learn(prompt, *others):
        rows = prompt[:, 0]
        for name, found in zip(("response", "mask", "logp", "values"), others, strict=False):
            assert torch.equal(found, getattr(rollout, name)[rows])
        assert torch.equal(others[-1], returns[rows])
        seen.append(rows.tolist())
        n = torch.tensor(float(len(seen)))
        return {"approx_kl": n, "first_ratio": 1 / n}

    metrics = ppo.update(learn, rollout, rollout.logp, returns, cfg)
    assert metrics == {"approx_kl": (1 + 2 + 3 + 4 + 5 + 6) / 6, "first_ratio": 1}
    passes = [tuple(a + b) for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert len(set(passes)) == 3 and all(sorted(x) == [*range(8)] for x in passes)
    seen.clear()
    ppo.update(learn, rollout, rollout.logp, returns, dataclasses.replace(cfg, target_kl=3.0))
    assert len(seen) == 4           # approx_kl is 2 at the end of the first pass, then 4


def test_a_step_follows_the_sum_of_both_losses():
    """Plain gradient descent, at a rate of 1: a second computation. Both losses reach the trunk,
    and one norm clips the whole gradient."""
    policy, value_head, cfg = awake(toy()), awake(nn.Linear(32, 1)), config(vf_coef=0.3)
    rollout, both = rollout_of(policy, cfg), nn.ModuleList([policy, value_head])
    old_logp = rollout.logp - 0.3 * torch.randn_like(rollout.logp)
    advantages, returns = torch.randn(2, *rollout.logp.shape)
    logp = logprobs(policy, rollout.prompt, rollout.response)
    values = value_head(policy.hidden(rollout.prompt, rollout.response))[..., 0]
    loss = (ppo.policy_loss(logp, old_logp, advantages, rollout.mask, 0.2)[0]
            + 0.3 * ppo.value_loss(values, rollout.values, returns, rollout.mask, 0.2))
    gradients = torch.autograd.grad(loss, [*both.parameters()])
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    expected = [p.detach() - g / norm for p, g in zip(both.parameters(), gradients, strict=True)]
    learn = ppo.minibatch_step(policy, value_head, torch.optim.SGD(both.parameters(), 1.0), cfg,
                               off)
    metrics = learn(rollout.prompt, rollout.response, rollout.mask, old_logp, rollout.values,
                    advantages, returns)
    close(metrics["grad_norm"], norm)
    assert norm > 1
    for p, w in zip(both.parameters(), expected, strict=True):
        close(p.detach(), w)


def test_what_reaches_the_policy_loss(monkeypatch):
    """The options; GAE's advantages, whitened over all minibatches, or a group's as they are."""
    seen, policy_loss = [], ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *x: seen.append(x) or policy_loss(*x))
    for baseline in ("critic", "grpo", "dr_grpo"):
        cfg = config(loss="gspo", clip_range=.3, clip_range_high=.4, baseline=baseline, gamma=.9,
                     lam=.5, group_size=2, ppo_epochs=1)
        rollout = rollout_of(toy(), cfg)
        updated(toy(), rollout, cfg)
        rewards = ppo.token_rewards(rollout.score, rollout.logp, rollout.ref_logp, rollout.mask, .1)
        expected = ppo.group_advantages(rewards.sum(dim=1), 2, baseline)[:, None] * rollout.mask
        if baseline == "critic":
            gae, _ = ppo.gae(rewards, rollout.values, rollout.mask, .9, .5)
            expected = ppo.whiten(gae, rollout.mask)
        found = torch.cat([x[2] for x in seen[-2:]])
        close(found.sort(dim=0)[0], expected.sort(dim=0)[0])            # rows are shuffled
    assert [x[4:] for x in seen[::2]] == [(.3, .4, "gspo", n) for n in (0, 0, 6)]

# -----------------------------------------------------------------------------
# the stage

def count_e(prompts, texts):
    return [text.count("e") / 4 for text in texts]


def run_of(folder, sft_ckpt, reward_fn=count_e, **changes):
    """A short run of the stage."""
    sizes = dict(lr=3e-3, sample_interval=50, missing_eos_penalty=0.0) | changes
    ppo.train(tiny(ppo, folder, sft_ckpt, **sizes), reward_fn)
    return folder


@pytest.mark.parametrize("scores, message", [
    ([1.0] * 7, r"one number for each of the 8 texts, and not numbers of shape \(7,\)"),
    ([[1.0]] * 8, r"shape \(8, 1\)"), (1.0, r"shape \(\)"), (["good"] * 8, "a list of numbers"),
    (None, "a list of numbers, and not 'None'"), ([None] * 8, "a list of numbers"),
    ([1.0] * 7 + [float("nan")], "gave nan to '.*': a score must be finite"),
    ([1.0] * 7 + [1e300], "gave inf to")])
def test_a_reward_of_the_wrong_kind_is_one_sentence(tmp_path, sft_ckpt, scores, message):
    refuses(f"^reward_fn .*{message}", run_of, tmp_path, sft_ckpt, lambda prompts, texts: scores)


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
    found = means(measure(policy, start, tokenizer_of(policy), prompts * 4, None, off))
    assert found["kl"] > 0.5 * kl[-1]
    size = changes.get("group_size", 1)
    assert len(prompts) == 64 and all(prompt.startswith("About a") for prompt in prompts)
    assert prompts[::size] == prompts[size - 1::size]       # neighbors answer one prompt
    for name in ("value_loss", "explained_variance"):
        assert bool(column(tmp_path, name)) == ("baseline" not in changes)


def test_what_the_reward_model_prefers_becomes_more_frequent(tmp_path, sft_ckpt):
    """It scores a text by its log-prob under the SFT model alone. The score of the checkpoint,
    measured anew, rises by more than chance."""
    reward = RewardModel(load_model(sft_ckpt), likelihood=0.2)
    nn.init.zeros_(reward.scalar_head.weight)
    save_model(tmp_path / "reward.pt", reward, tokenizer_of(reward.model))
    run_of(tmp_path, sft_ckpt, None, reward=str(tmp_path / "reward.pt"), batch_size=64,
           minibatch_size=32, max_steps=12, max_new_tokens=8, kl_coef=0.0)
    before, after = (
        t(*[row["score"] for row in measure(load_model(path), None, tokenizer_of(reward.model),
                                            ["About a banker:"] * 128, None, off, reward)])
        for path in (sft_ckpt, tmp_path / "ckpt.pt"))
    assert after.mean() > before.mean() + before.std()
    logged = column(tmp_path, "score")
    assert logged[-1] > logged[0] + 1
    other = conftest.with_another_tokenizer(tmp_path / "reward.pt", tmp_path / "other.pt")
    refuses("other.pt has another tokenizer than", run_of, tmp_path, sft_ckpt, None, reward=other)


def test_an_adapter_scores_as_the_merged_reward_model_does(tmp_path, sft_ckpt):
    reward_model.train(tiny(reward_model, tmp_path / "reward_model", sft_ckpt, lora=2, lr=1e-2,
                            data=pairs(tmp_path)))
    reward = str(tmp_path / "reward_model" / "ckpt.pt")
    merged, adapters = (column(run_of(tmp_path / f"{lora}", sft_ckpt, None, reward=reward,
                                      lora=lora), "score")[0] for lora in (0, 2))
    assert adapters == pytest.approx(merged, abs=1e-3) and abs(merged) > 1e-2


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
    sizes = dict(max_steps=12, lr=1e-2, kl_coef=0.0, lam=1.0, clip_range=5.0, ppo_epochs=1)
    run_of(tmp_path, sft_ckpt, lambda *_: [2.0] * 8, sample_interval=5, **sizes)
    loss = column(tmp_path, "value_loss")
    assert loss[0] > 1 and loss[-1] < 0.2
    assert column(tmp_path, "explained_variance") == [0] * 12   # equal returns are no NaN
    samples = (tmp_path / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert [x for x in samples if x.startswith("step ")] == ["step 5", "step 10", "step 12"]
    # Of 2 and 3 a critic that says 0 explains 1 - 6.5 / .25 = -25, and one that says 2.5 nothing.
    run_of(tmp_path, sft_ckpt, lambda *_: [2.0, 3.0] * 4, **sizes)
    explained = column(tmp_path, "explained_variance")
    assert explained[0] < -20 and explained[-1] > -1
    # The first values are 0. With lam = 1 and no KL yet each token returns its response's score,
    # and a pad nothing: there are some, since some responses end early.
    run_of(tmp_path, sft_ckpt, max_steps=1, max_new_tokens=16, lam=1.0, sample_interval=1)
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert len({row["length"] for row in rows}) > 2
    returns = t(*[row["score"] for row in rows for _ in range(row["length"])])
    expected = 1 - (returns ** 2).mean() / returns.var(correction=0)
    assert column(tmp_path, "explained_variance") == pytest.approx([expected.item()], abs=1e-3)


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
    assert set().union(*table) | elsewhere == conftest.options_of(ppo)
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


def test_a_run_stops_where_the_rollout_is_of_another_policy(tmp_path, sft_ckpt, monkeypatch):
    def shifted(*args, make_rollout=ppo.make_rollout):
        rollout = make_rollout(*args)
        rollout.logp = rollout.logp + 0.02
        return rollout

    monkeypatch.setattr(ppo, "make_rollout", shifted)
    with pytest.raises(AssertionError, match="is not that of the update"):
        run_of(tmp_path, sft_ckpt)


def test_by_default_a_response_without_an_end_pays():
    rollout = rollout_of(awake(toy()), config(batch_size=32))
    ended = (rollout.response == EOS).any(dim=1)
    assert not ended.all()
    score = count_3(None, rollout.response) - 1.0 * ~ended
    assert rollout.score.tolist() == pytest.approx(score.tolist())


def test_the_text_with_the_bad_score_is_named():
    refuses("gave nan to 'b':", ppo.check_scores, [0.0, math.nan, 1.0], ["a", "b", "c"])
