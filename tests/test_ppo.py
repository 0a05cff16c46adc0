"""PPO: its arithmetic against hand-computed numbers and loops, KL estimators against the exact KL, and that it learns."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import CPU, END, PAD, awake, ids, off, toy

import ppo
from common import InputError, read_jsonl
from model import logprobs
from optim import adamw

ALL = torch.ones(1, 3, dtype=torch.bool)


def t(*values):
    return torch.tensor(values)


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(torch.as_tensor(actual).float(), torch.as_tensor(expected).float(), atol=atol, rtol=0)


def config(**changes):
    return ppo.Config(**(dict(batch_size=8, minibatch_size=4, max_new_tokens=6, warmup_steps=0, **CPU) | changes))


def head(size=32):
    linear = nn.Linear(size, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def rollout_of(policy, cfg, reference=None, score_fn=None, value_head=None, seed=0):
    """A rollout of a toy policy: prompts of mixed length, a score that depends on the text."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, END, (cfg.batch_size, 4), generator=generator)
    prompt[::3, :2] = PAD
    score_fn = score_fn or (lambda prompt, response: (response == 3).sum(1).float())
    return ppo.make_rollout(policy, value_head or head(), reference or toy(seed=1), score_fn, prompt, cfg, generator)

# -----------------------------------------------------------------------------
# whitening, rewards, GAE

def test_whiten():
    """The numbers of "The N Implementation Details of RLHF with PPO": mean 1.6, biased variance 1/15, so (1.2 - 1.6) / .2582 = -1.5492."""
    x = t([1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0])
    mask = torch.ones(3, 3, dtype=torch.bool)
    expected = t([.0508, .4381, .8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492])
    close(ppo.whiten(x, mask, shift_mean=False), expected)
    close(ppo.whiten(x, mask), expected - 1.6)
    white = ppo.whiten(x, mask)
    close(white.mean(), 0.0)
    close(white.var(correction=0), 1.0)


def test_whiten_sees_real_tokens_only():
    x, mask = torch.randn(3, 4), t([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]).bool()
    white = ppo.whiten(x, mask)
    close(white[mask].mean(), 0.0)
    close((white[mask] ** 2).mean(), 1.0)
    assert (white[~mask] == 0).all()
    assert torch.equal(white, ppo.whiten(x.masked_fill(~mask, 1e6), mask))
    with pytest.raises(AssertionError):
        ppo.whiten(torch.randn(1, 1), torch.ones(1, 1, dtype=torch.bool))


def test_masked_mean_with_pads_full_of_rubbish():
    """20 real tokens of log-prob -2 and 33 pads that hold 1.0: the sum of -logp is 40 nats, not 40 - 33 = 7."""
    logp, mask = torch.full((1, 53), 1.0), torch.arange(53)[None] < 20
    logp[mask] = -2
    assert ppo.masked_mean(-logp, mask).item() * 20 == pytest.approx(40)


def test_gae_by_hand():
    """deltas: 1 - .3 = .7, .02 + .3 - .4 = -.08, -.05 + .4 - .5 = -.15; A_2 = .7, A_1 = -.08 + .95 * .7 = .585, A_0 = -.15 + .95 * .585."""
    advantages, returns = ppo.gae(t([-.05, .02, 1.0]), t([.5, .4, .3]), ALL, 1.0, 0.95)
    close(advantages, [[.40575, .585, .7]])
    close(returns, [[.90575, .985, 1.0]])


def test_score_on_the_end_token():
    """All values .5, score 1 on the end token: A = .5, 0 + .95 * .5 = .475, .45125. On the first pad it would be .48, .456, .4332."""
    rewards = ppo.token_rewards(t(1.0), torch.zeros(1, 3), torch.zeros(1, 3), ALL, 0.1)
    close(rewards, [[0.0, 0.0, 1.0]])
    close(ppo.gae(rewards, torch.full((1, 3), .5), ALL, 1.0, 0.95)[0], [[.45125, .475, .5]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_its_definition(gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, row by row, over the real tokens alone; pads give 0 and take part in nothing."""
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    lengths = [6, 4, 2, 1]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards * mask, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        v = values[i, :n].tolist() + [0.0]
        delta = [rewards[i, j].item() + gamma * v[j + 1] - v[j] for j in range(n)]
        expected = [sum((gamma * lam) ** k * delta[j + k] for k in range(n - j)) for j in range(n)]
        close(advantages[i, :n], expected)
        close(returns[i, :n], [a + b for a, b in zip(expected, v, strict=False)])
    assert (advantages[~mask] == 0).all()
    if lam == 1:      # Monte Carlo: the return is the sum of what is still to come
        close(returns[0, 0], sum(gamma ** k * rewards[0, k].item() for k in range(6)))


def test_the_score_reaches_exactly_one_token():
    """Mixed lengths: two scores make rewards that differ at one token a row, the last real one, by exactly the difference."""
    mask = t([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]).bool()
    logp, ref = torch.randn(3, 4) * mask, torch.randn(3, 4) * mask
    low, high = (ppo.token_rewards(score, logp, ref, mask, 0.3) for score in (torch.zeros(3), t(1.0, 2.0, 3.0)))
    close(high - low, [[0, 0, 0, 1], [0, 2, 0, 0], [3, 0, 0, 0]], atol=1e-6)
    close(low, -0.3 * (logp - ref), atol=1e-6)          # and every token pays for its distance
    assert (high[~mask] == 0).all()


def test_a_score_for_each_token():
    mask, score = t([1, 1, 1], [1, 1, 0]).bool(), t([.1, .2, .3], [.4, .5, 9.0])
    close(ppo.token_rewards(score, torch.zeros(2, 3), torch.zeros(2, 3), mask, 0.1), [[.1, .2, .3], [.4, .5, 0]])
    for wrong in (torch.zeros(2, 2), torch.zeros(2, 1)):
        with pytest.raises(AssertionError, match="one number a response"):
            ppo.token_rewards(wrong, torch.zeros(2, 3), torch.zeros(2, 3), mask, 0.1)


def test_shapes_never_broadcast():
    """(4,) - (4, 1) is (4, 4): the functions refuse, rather than compute an average of the wrong things."""
    with pytest.raises(AssertionError):
        ppo.gae(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), 1, 1)
    with pytest.raises(AssertionError):
        ppo.policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), .2)
    with pytest.raises(AssertionError):
        ppo.value_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), torch.ones(3, dtype=torch.bool), .2)

# -----------------------------------------------------------------------------
# the losses

def test_policy_loss_by_hand():
    """A = 1 -1 1 -1 at ratios 1.5 1.5 .5 .5: max(-1.5, -1.2) = -1.2; max(1.5, 1.2) = 1.5; max(-.5, -.8) = -.5; max(.5, .8) = .8."""
    ratio, advantages = t([1.5, 1.5, .5, .5]), t([1.0, -1.0, 1.0, -1.0])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for i, expected in enumerate([-1.2, 1.5, -.5, .8]):
        one = torch.arange(4)[None] == i
        close(ppo.policy_loss(ratio.log(), torch.zeros(1, 4), advantages, one, 0.2)[0], expected)
    loss, info = ppo.policy_loss(ratio.log(), torch.zeros(1, 4), advantages, mask, 0.2)
    close(loss, .15)
    close(info["ratio"], 1.0)
    close(info["clipfrac"], 1.0)
    close(info["approx_kl"], 0.5 * sum(math.log(x) ** 2 for x in (1.5, 1.5, .5, .5)) / 4)


def test_value_loss_by_hand():
    """V = 1, 0 with V_old = .5, R = 1: clipped to .7 and .3; .5 max(0, .09) = .045 and .5 max(1, .49) = .5; mean .2725."""
    values, old, returns = t([1.0, 0.0]), t([.5, .5]), t([1.0, 1.0])
    for i, expected in enumerate([.045, .5]):
        close(ppo.value_loss(values, old, returns, torch.arange(2)[None] == i, 0.2), expected)
    close(ppo.value_loss(values, old, returns, torch.ones(1, 2, dtype=torch.bool), 0.2), .2725)


def test_what_stands_in_pads_changes_nothing_and_the_mask_counts():
    torch.manual_seed(1)
    mask = t([1, 1, 1, 1], [1, 1, 0, 0]).bool()
    more = t([1, 1, 1, 1], [1, 1, 1, 0]).bool()
    a, b, c = (torch.randn(2, 4) for _ in range(3))
    rubbish = [x.masked_fill(~mask, value) for x, value in ((a, 2.0), (b, -1.0), (c, 5.0))]
    for loss in (lambda x, y, z, m: ppo.policy_loss(x, y, z, m, 0.2)[0], lambda x, y, z, m: ppo.value_loss(x, y, z, m, 0.2),
                 lambda x, y, z, m: ppo.policy_loss(x, y, z, m, 0.2)[1]["clipfrac"],
                 lambda x, y, z, m: ppo.policy_loss(x, y, z, m, 0.2)[1]["approx_kl"]):
        close(loss(*rubbish, mask), loss(a, b, c, mask), atol=1e-6)
    for loss in (lambda x, y, z, m: ppo.policy_loss(x, y, z, m, 0.2)[0], lambda x, y, z, m: ppo.value_loss(x, y, z, m, 0.2)):
        assert abs(loss(a, b, c, more) - loss(a, b, c, mask)) > 1e-3


def test_adaptive_kl_coef():
    """beta .15, target 6, horizon 10,000, 64 responses: KL 3 -> error -.5, cut to -.2 -> .15 (1 - .2 * .0064) = .149808; 12 -> +.2."""
    for kl, expected in ((3, .149808), (6, .15), (12, .150192), (6.6, .15 * (1 + .1 * .0064))):
        assert ppo.adapt_kl_coef(.15, kl, 6, 10_000, 64) == pytest.approx(expected, abs=1e-9)


def test_group_advantages():
    """R = 1 2 3 6. rloo: 1 - 11/3 = -2.6667, 2 - 10/3, 3 - 9/3 = 0, 6 - 6/3 = 4. grpo: mean 3, unbiased std sqrt(14/3) = 2.1602."""
    r = t(1.0, 2.0, 3.0, 6.0)
    close(ppo.group_advantages(r, 4, "rloo"), [-2.6667, -1.3333, 0, 4])
    close(ppo.group_advantages(r, 4, "grpo"), [-.92578, -.46289, 0, 1.38867])
    two = ppo.group_advantages(t(1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0), 4, "rloo")
    close(two, [-2.6667, -1.3333, 0, 4, 0, 0, 0, 0])          # groups are neighbors, one does not see another
    for kind in ("rloo", "grpo"):                             # answers that are all alike teach nothing, and are no NaN
        close(ppo.group_advantages(torch.full((6,), 2.0), 3, kind), [0.0] * 6)


def test_group_baselines_charge_for_the_kl_of_the_sequence():
    """R <- score - beta sum_t k1_t, then the advantage of the group, the same on all real tokens."""
    mask = t([1, 1, 1], [1, 1, 0]).bool()
    logp, ref = t([-1.0, -1.0, -1.0], [-1.0, -2.0, 0.0]), t([-1.5, -1.0, -2.0], [-1.0, -1.0, 0.0])
    rollout = SimpleNamespace(score=t(1.0, 2.0), logp=logp, ref_logp=ref, mask=mask)
    advantages, _ = ppo.advantages_of(rollout, config(baseline="rloo", group_size=2), 0.1)
    a, b = 1 - .1 * (.5 + 0 + 1.0), 2 - .1 * (0 - 1.0)
    close(advantages, [[a - b, a - b, a - b], [b - a, b - a, 0]])

# -----------------------------------------------------------------------------
# KL: estimators in their expectation, and what gradient each place of the penalty has

def two_softmaxes(n=20, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, dtype=torch.float64, requires_grad=True), torch.randn(n, dtype=torch.float64).log_softmax(0)


def test_kl_estimators_in_expectation():
    """sum_x pi(x) k(x) over all x: k1 and k3 are exactly KL(pi || ref), k2 is near it only while the two are close; k3 is never negative."""
    logits, ref = two_softmaxes(50)
    logp = logits.detach().log_softmax(0)
    k1, k2, k3 = ppo.kl_estimates(logp, ref)
    exact = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logp), torch.distributions.Categorical(logits=ref))
    assert exact > 0.3
    close((logp.exp() * k1).sum(), exact, atol=1e-6)
    close((logp.exp() * k3).sum(), exact, atol=1e-6)
    assert (k3 >= 0).all() and (k1 < 0).any()
    assert abs((logp.exp() * k2).sum() - exact) > 0.01        # biased
    wrong = (logp - ref).expm1() - (logp - ref)               # with the ratio upside down: not the KL
    assert (logp.exp() * wrong).sum() > 1.2 * exact
    for k in ppo.kl_estimates(logp, logp):
        assert (k == 0).all()


def expected_gradient(logits, per_token):
    """Gradient of sum_x sg(pi(x)) f(x): what sampling x ~ pi and differentiating f(x) gives on average."""
    logp = logits.log_softmax(0)
    return torch.autograd.grad((logp.detach().exp() * per_token(logp)).sum(), logits)[0]


def test_the_penalty_in_the_reward_has_the_gradient_of_the_kl():
    """k1 in the reward (REINFORCE: grad log pi times the reward, here negated) and k2 as a loss: grad KL(pi || ref). k1 as a loss: nothing at
    all. k3 as a loss: grad KL(ref || pi)."""
    logits, ref = two_softmaxes()
    logp = logits.log_softmax(0)
    reverse = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)[0]
    in_reward = expected_gradient(logits, lambda logp: -logp * ppo.token_rewards(
        torch.zeros(20).double(), logp.detach()[:, None], ref[:, None], torch.ones(20, 1, dtype=torch.bool), 1.0)[:, 0])
    close(in_reward, reverse, atol=1e-6)
    close(expected_gradient(logits, lambda logp: ppo.kl_estimates(logp, ref)[1]), reverse, atol=1e-6)
    close(expected_gradient(logits, lambda logp: ppo.kl_estimates(logp, ref)[0]), torch.zeros(20), atol=1e-6)
    close(expected_gradient(logits, lambda logp: ppo.kl_estimates(logp, ref)[2]), forward, atol=1e-6)
    assert (forward - reverse).abs().max() > 0.01


def test_reinforce_gradient_is_the_exact_one():
    """Three tokens, rewards 1 0 -2, the loss at ratio 1: its expected gradient is minus that of sum_x pi(x) r(x)."""
    logits, rewards = torch.randn(3, dtype=torch.float64, requires_grad=True), t(1.0, 0.0, -2.0).double()
    exact = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)[0]
    one = torch.ones(1, 1, dtype=torch.bool)
    sampled = expected_gradient(logits, lambda logp: torch.stack([
        ppo.policy_loss(logp[i].view(1, 1), logp[i].detach().view(1, 1), rewards[i].view(1, 1), one, 0.2)[0] for i in range(3)]))
    close(sampled, -exact, atol=1e-6)

# -----------------------------------------------------------------------------
# rollout and update

def test_a_rollout_is_consistent():
    """Mixed lengths. Everything is (B, R); log-probs are those that generate() drew from, and those of logprobs(); pads hold nothing."""
    policy, reference, cfg = awake(toy()), awake(toy(seed=1)), config(batch_size=32, minibatch_size=8)
    rollout = rollout_of(policy, cfg, reference)
    B, R = rollout.response.shape
    assert B == 32 and R <= 6
    for field in ("mask", "logp", "ref_logp", "values"):
        assert getattr(rollout, field).shape == (B, R), field
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max(), "this test needs responses of different lengths"
    for i in range(B):      # the mask ends at the end token, which it includes
        row = rollout.response[i, :lengths[i]].tolist()
        assert PAD not in row and END not in row[:-1] and (row[-1] == END or lengths[i] == 6)
        assert (rollout.response[i, lengths[i]:] == PAD).all()
    close(rollout.logp, logprobs(policy, rollout.prompt, rollout.response), atol=1e-5)
    close(rollout.ref_logp, logprobs(reference, rollout.prompt, rollout.response), atol=1e-5)
    assert (rollout.logp[~rollout.mask] == 0).all() and (rollout.ref_logp[~rollout.mask] == 0).all()
    assert not any(x.requires_grad for x in (rollout.logp, rollout.ref_logp, rollout.values))
    _, drawn = policy.generate(rollout.prompt, 6, generator=torch.Generator().manual_seed(5))
    again, _ = policy.generate(rollout.prompt, 6, generator=torch.Generator().manual_seed(5))
    close(drawn, logprobs(policy, rollout.prompt, again), atol=1e-4)


def test_temperature_is_in_every_log_prob():
    policy, reference = awake(toy()), awake(toy(seed=1))
    rollout = rollout_of(policy, config(temperature=0.5), reference)
    close(rollout.logp, logprobs(policy, rollout.prompt, rollout.response, 0.5), atol=1e-5)
    close(rollout.ref_logp, logprobs(reference, rollout.prompt, rollout.response, 0.5), atol=1e-5)
    assert (rollout.logp - logprobs(policy, rollout.prompt, rollout.response)).abs().max() > 0.1
    assert rollout.entropy == pytest.approx(-ppo.masked_mean(rollout.logp, rollout.mask).item(), abs=1e-4)     # generate() had it too


def test_a_response_without_an_end_pays():
    policy = awake(toy())
    free, paid = (rollout_of(policy, config(end_penalty=p, batch_size=32, minibatch_size=8)) for p in (0.0, 2.5))
    ended = (free.response == END).any(1)
    assert 0 < ended.sum() < 32
    close(free.score - paid.score, 2.5 * ~ended)


def test_the_value_of_a_state_does_not_know_the_future():
    """V(s_t) reads the prompt and response[:, :t]: another token at t changes no value up to t, and some value after it."""
    policy, value_head = awake(toy()), awake(head())
    prompt, response = ids([1, 2, 3]), ids([4, 5, 6, 7])
    for t_ in range(3):
        other = response.clone()
        other[0, t_] = 9
        (_, a), (_, b) = (ppo.actor_critic(policy, value_head, prompt, r, 1.0) for r in (response, other))
        close(a[:, :t_ + 1], b[:, :t_ + 1], atol=1e-6)
        assert (a[:, t_ + 1:] - b[:, t_ + 1:]).abs().max() > 1e-4


def test_first_ratio_is_one_and_later_ones_are_not():
    """Before any step the update computes the very numbers of the rollout: ratio exactly 1, approx_kl and clipfrac exactly 0. One epoch
    later the policy has moved."""
    policy, cfg, value_head = awake(toy()), config(batch_size=8, minibatch_size=8), head()
    rollout = rollout_of(policy, cfg)
    logp, _ = ppo.actor_critic(policy, value_head, rollout.prompt, rollout.response, cfg.temperature)
    assert torch.equal((logp - rollout.logp).exp(), torch.ones_like(logp))
    _, info = ppo.policy_loss(logp, rollout.logp, torch.randn_like(logp), rollout.mask, 0.2)
    assert info["ratio"] == 1 and info["approx_kl"] == 0 and info["clipfrac"] == 0

    for epochs, moved in ((1, False), (2, True)):
        model = copy.deepcopy(policy)
        cfg = config(batch_size=8, minibatch_size=8, ppo_epochs=epochs)
        advantages, returns = ppo.advantages_of(rollout, cfg, 0.1)
        optimizer = adamw(nn.ModuleList([model, value_head]), 1e-2, eps=1e-5)
        info = ppo.update(model, value_head, optimizer, rollout, advantages, returns, cfg, off)
        assert info["first_ratio"] < 1e-5
        assert (info["approx_kl"] > 1e-4) == moved, info["approx_kl"]


def test_an_update_moves_the_policy_and_the_critic_and_not_the_reference():
    policy, reference, value_head, cfg = awake(toy()), awake(toy(seed=1)), head(), config()
    before = {name: x.clone() for name, x in reference.state_dict().items()}
    old = copy.deepcopy(policy)
    optimizer = adamw(nn.ModuleList([policy, value_head]), 1e-2)
    for step in range(3):
        rollout = rollout_of(policy, cfg, reference, value_head=value_head, seed=step)
        ppo.update(policy, value_head, optimizer, rollout, *ppo.advantages_of(rollout, cfg, 0.1), cfg, off)
    assert all(torch.equal(x, before[name]) for name, x in reference.state_dict().items())
    assert all(not torch.equal(x, y) for x, y in zip(policy.parameters(), old.parameters(), strict=True))
    assert value_head.weight.abs().max() > 0 and value_head.bias.abs().max() > 0
    assert all(p.grad is None for p in reference.parameters())


def test_kl_coef_reaches_the_gradient():
    """What kl_coef adds to the advantage of the group is a pull back to the reference, and it is not whitened away: with a score of zero
    everywhere, the policy comes nearer to the reference, in exact KL."""
    policy, reference, value_head = awake(toy()), awake(toy(seed=1)), head()

    def distance():
        generator = torch.Generator().manual_seed(9)
        prompt = torch.randint(0, END, (64, 4), generator=generator)
        response, _ = policy.generate(prompt, 6, generator=generator)
        with torch.no_grad():
            logp, ref = (m.logits(prompt, response).log_softmax(-1) for m in (policy, reference))
        return ((logp.exp() * (logp - ref)).sum(-1) * (response != PAD)).sum(1).mean().item()

    before, optimizer = distance(), adamw(nn.ModuleList([policy, value_head]), 3e-3)
    cfg = config(batch_size=64, minibatch_size=64, baseline="rloo", group_size=2, ppo_epochs=1)
    for step in range(15):
        rollout = rollout_of(policy, cfg, reference, lambda p, r: torch.zeros(len(p)), seed=step)
        ppo.update(policy, value_head, optimizer, rollout, *ppo.advantages_of(rollout, cfg, 1.0), cfg, off)
    assert distance() < 0.8 * before


def test_the_critic_stays_out_of_the_trunk_where_ppg_wants_it():
    policy, value_head, rollout = awake(toy()), awake(head()), rollout_of(awake(toy()), config())
    for detach in (False, True):
        policy.zero_grad()
        ppo.actor_critic(policy, value_head, rollout.prompt, rollout.response, 1.0, detach)[1].sum().backward()
        assert all(p.grad is None for p in policy.parameters()) == detach


def test_the_auxiliary_phase_fits_the_values_and_holds_the_policy():
    """PPG: sixty steps of value loss through the trunk: the loss falls a lot, and the policy is nearly where it was."""
    policy, value_head, cfg = awake(toy()), head(), config(batch_size=32, minibatch_size=32, ppg_epochs=60, ppg_interval=1)
    rollout = rollout_of(policy, cfg)
    old, returns = copy.deepcopy(policy), 3 * torch.cos(rollout.response.float())      # depends on a token that V cannot see: some stays
    optimizer = adamw(nn.ModuleList([policy, value_head]), 1e-2)

    def value_error():
        with torch.no_grad():
            values = ppo.actor_critic(policy, value_head, rollout.prompt, rollout.response, 1.0)[1]
        return ppo.masked_mean((values - returns) ** 2, rollout.mask).item()

    before = value_error()
    assert math.isfinite(ppo.auxiliary_phase(policy, value_head, optimizer, [(rollout, returns)], cfg, off))
    with torch.no_grad():
        new_logp, old_logp = (m.logits(rollout.prompt, rollout.response).log_softmax(-1) for m in (policy, old))
    moved = ppo.masked_mean((old_logp.exp() * (old_logp - new_logp)).sum(-1), rollout.mask).item()
    assert value_error() < 0.1 * before and 0 < moved < 0.1     # in nats a token; without the KL term it is 1.26
    assert any(not torch.equal(a, b) for a, b in zip(policy.h.parameters(), old.h.parameters(), strict=True))   # the trunk did learn

# -----------------------------------------------------------------------------
# the whole stage

@pytest.mark.parametrize("changes", [
    dict(baseline="gae"), dict(baseline="rloo"), dict(baseline="grpo", group_size=1), dict(batch_size=10), dict(group_size=3),
    dict(dtype="float16"), dict(batch_size=8192, minibatch_size=8192)])
def test_bad_configs_are_refused(tmp_path, sft_ckpt, changes):
    with pytest.raises(InputError):
        ppo.train(config(out_dir=str(tmp_path), init=sft_ckpt, **changes), reward_fn=lambda prompts, texts: [0.0] * len(texts))


@pytest.mark.parametrize("baseline, group_size", [("critic", 1), ("rloo", 4), ("grpo", 4)])
def test_a_rewarded_token_becomes_likelier(tmp_path, sft_ckpt, tok, baseline, group_size):
    """The reward is a function of the user's own: how many e's. After a few rollouts there are many more, and the score says so."""
    out, seen = tmp_path / baseline, []

    def reward_fn(prompts, texts):
        seen.append((prompts, texts))
        return [text.count("e") / 4 for text in texts]

    ppo.train(config(out_dir=str(out), init=sft_ckpt, batch_size=64, minibatch_size=32, max_steps=12, max_new_tokens=8, lr=3e-3,
                     end_penalty=0.0, kl_coef=0.01, baseline=baseline, group_size=group_size, sample_interval=50), reward_fn)
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "score" in row]
    assert rows[-1]["score"] > 1.4 * rows[0]["score"] and rows[-1]["kl"] > 0.1
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and all(row["first_ratio"] < 1e-4 for row in rows)
    prompts, texts = seen[0]
    assert len(prompts) == len(texts) == 64 and all(prompt.startswith("About a") for prompt in prompts)
    if group_size > 1:      # neighbors answer the same prompt
        assert all(prompts[i] == prompts[i - i % group_size] for i in range(64)) and len(set(prompts)) == 16
        assert "value_loss" not in rows[0] and "dead_groups" in rows[0]


def test_a_reward_that_is_the_same_for_all_is_no_error(tmp_path, sft_ckpt):
    """The first rollout of many a reward of one's own is all zeros: nothing to explain, and no NaN that ends the run."""
    ppo.train(config(out_dir=str(tmp_path), init=sft_ckpt, max_steps=1, end_penalty=0.0), lambda prompts, texts: [0.0] * len(texts))
    assert math.isfinite(read_jsonl(tmp_path / "metrics.jsonl")[0]["explained_var"])


def test_adaptive_kl_and_ppg_run(tmp_path, sft_ckpt):
    ppo.train(config(out_dir=str(tmp_path), init=sft_ckpt, max_steps=4, kl_target=1e-3, kl_coef=0.1, kl_horizon=100, ppg_interval=2,
                     ppg_epochs=1, lr=1e-3), lambda prompts, texts: [len(text) / 9 for text in texts])
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "score" in row]
    assert [("ppg_loss" in row) for row in rows] == [False, True, False, True]
    # kl 0 in the first rollout: beta falls by .2 * 8 / 100; then the policy is too far away, and it rises by as much
    assert [row["kl_coef"] for row in rows[:2]] == pytest.approx([0.1, 0.1 * (1 - .016)], abs=1e-5) and rows[3]["kl_coef"] > rows[2]["kl_coef"]
