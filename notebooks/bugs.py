"""
The measurements of 7_spot_the_bug.ipynb: for each bug, one number that is known beforehand.
Whoever reads on before guessing misses the fun.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import dpo
import gan
import ppo
from discriminator import Discriminator, discriminator_loss
from model import ModelConfig, build_model
from reward_model import ranking_loss


def small_model(dropout=0.0):
    """A language model with random weights, and prompts (B, P) for it."""
    config = ModelConfig(vocab_size=20, eos_token_id=19, block_size=24, n_layer=1, n_head=2,
                         n_embd=16, n_inner=16, dropout=dropout)
    model = build_model(config).eval()
    for weight in model.parameters():
        weight.data *= 3                                # far from uniform
    return model, torch.randint(19, (16, 4))


def batch():
    """Log-probs of two policies and a mask, (B, R) each, with rows of different length."""
    mask = torch.arange(8) < torch.randint(2, 9, (16, 1))
    return -3 * torch.rand(16, 8) * mask, -3 * torch.rand(16, 8) * mask, mask


def off_policy(score_with):
    """Fraction of ratios that PPO would clip, before any training."""
    def measure(function):
        model, prompt = small_model(dropout=0.1)
        response, sampled = model.generate(prompt, 16, rng=torch.Generator().manual_seed(0))
        ratio = score_with(function, model, prompt, response, sampled)
        return ((ratio - 1).abs() > 0.2).float().mean()
    return measure


def ratio_of_response(function, model, prompt, response, sampled):
    logp = function(model, prompt, response)            # (B, R), or too few of them
    mask = response != model.pad_token_id
    return (logp - sampled[:, :logp.size(1)]).exp()[mask[:, :logp.size(1)]]


def ratio_of_own_samples(function, model, prompt, response, sampled):
    return function(model, prompt)


def entropy(function):
    logp, _, mask = batch()
    return function(logp, mask) / -(logp * mask).sum(dim=1).mean()


def ratio(function):
    new, old, _ = batch()
    return (function(new, old) / (new - old).exp()).max()


def kl_of_tokens(function):
    logp, ref_logp, mask = batch()
    return function(logp, ref_logp, mask) / ppo.masked_mean(logp - ref_logp, mask)


def k3_over_kl(function):
    ref = torch.randn(50).log_softmax(0)
    logp = (ref + torch.randn(50)).log_softmax(0)
    exact = (logp.exp() * (logp - ref)).sum()
    return (logp.exp() * function(logp, ref)).sum() / exact     # the exact mean, over the KL


def effect_of_kl_coef(function):
    logp, ref_logp, mask = batch()
    score, kl = torch.randn(16), logp - ref_logp
    change = function(score, kl, mask, 0.5) - function(score, kl, mask, 0.0)
    right = ppo.whiten(score[:, None] - 0.5 * kl, mask)
    right = right - ppo.whiten(score[:, None].expand_as(kl), mask)
    return change.abs().max() / right.abs().max()


def kl_of_rounds(function):
    rounds = torch.randn(6, 20).cumsum(0)               # the SFT model, then five rounds
    first, last = rounds[0].log_softmax(0), rounds[-1].log_softmax(0)
    return function(list(rounds)) / (last.exp() * (last - first)).sum()


def slope_of_hopeless_pair(function):
    scores = torch.tensor([[-100.0, 100.0]], requires_grad=True)
    return torch.autograd.grad(function(scores), scores)[0][0, 0]


def ranking(function):
    scores = torch.randn(32, 4)
    return function(scores) / ranking_loss(scores)


def dpo_of_two_pairs(function):
    pair = dpo.Pair(torch.tensor([-10.0, -9.0]), torch.tensor([-12.0, -7.0]),
                    torch.tensor([-11.0, -9.5]), torch.tensor([-11.5, -8.0]),
                    torch.tensor([10, 9]), torch.tensor([8, 7]), torch.zeros(2))
    return function(pair, 0.5).mean() / dpo.dpo_loss(pair, dpo.Config(beta=0.5)).mean()


def travel(function):
    """How far a weight moves that gets a gradient in one step of 500, over Adam's distance."""
    moved = []
    for make in (function, torch.optim.Adam):
        weight = torch.zeros(1, requires_grad=True)
        optimizer = make([weight], 0.01)
        for step in range(1000):
            weight.grad = torch.full((1,), float(step % 500 == 499))
            optimizer.step()
        moved.append(weight.item())
    return moved[0] / moved[1]


def norm_in_the_log(function):
    layer = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = (1000 * layer(torch.ones(4, 10))).mean()
    return function(loss, layer, optimizer) / (1000 * math.sqrt(11))


def clipped_in_a_run(function):
    theta = torch.zeros(8, requires_grad=True)
    words = torch.randint(8, (64, 1))
    return function(theta, words, torch.randn(64, 1))


def reaches_the_words(function):
    model, prompt = small_model()
    response, _ = model.generate(prompt, 8, rng=torch.Generator().manual_seed(0))
    of_states = Discriminator(model, reads="states")
    of_tokens = Discriminator(build_model(model.config))
    logits, loss = function(model, of_states, of_tokens, prompt, response)
    gradient = torch.autograd.grad(loss, logits, allow_unused=True)[0]
    return 0.0 if gradient is None else gradient.norm()


def gradient_of_d(function):
    D, G = nn.Linear(2, 1), nn.Linear(2, 2)
    z, real = torch.randn(8, 2), torch.randn(8, 2) + 1
    loss = discriminator_loss(D(real)[:, 0], D(G(z).detach())[:, 0])
    right = torch.autograd.grad(loss, D.bias)[0].item()
    return function(G, D, z, real).item() / right


def gradient_in_the_critic(function):
    values = torch.zeros(4, 5, requires_grad=True)
    advantages = function(torch.randn(4, 5), values)
    if not advantages.requires_grad:
        return 0.0
    return torch.autograd.grad((advantages ** 2).sum(), values)[0].norm()


def clipfrac_in_the_log(function):
    parts, fractions = [], []
    for size in (0.1, 0.3, 0.9):
        old = -torch.rand(4, 6)
        parts.append((old + size * torch.randn(4, 6), old, torch.randn(4, 6),
                      torch.ones(4, 6, dtype=torch.bool)))
        fractions.append(ppo.policy_loss(*parts[-1], 0.2)[1]["clipfrac"])
    return function(parts) / (sum(fractions) / 3)


def second_trainer(Trainer):
    Trainer(kl_coef=0.0)
    return Trainer().options["kl_coef"]


BUGS = {    # the number, what it is, and what it should be; None is "above 0"
    1: (off_policy(ratio_of_response), "fraction of ratios that PPO would clip", 0),
    2: (off_policy(ratio_of_own_samples), "fraction of ratios that PPO would clip", 0),
    3: (off_policy(ratio_of_response), "fraction of ratios that PPO would clip", 0),
    4: (entropy, "entropy of a text, over the right one", 1),
    5: (ratio, "ratio of a token, over the right one, at most", 1),
    6: (kl_of_tokens, "KL of a token, over the right one", 1),
    7: (k3_over_kl, "mean of the estimator, over the exact KL", 1),
    8: (effect_of_kl_coef, "effect of kl_coef 0.5, over the right one", 1),
    9: (kl_of_rounds, "KL after five rounds, over the right one", 1),
    10: (slope_of_hopeless_pair, "gradient of the chosen score", -1),
    11: (ranking, "ranking loss, over the right one", 1),
    12: (dpo_of_two_pairs, "DPO's loss, over the right one", 1),
    13: (travel, "how far a rare gradient moves its weight, over Adam", 1),
    14: (norm_in_the_log, "gradient norm in the log, over the right one", 1),
    15: (clipped_in_a_run, "fraction of ratios clipped in a rollout", None),
    16: (reaches_the_words, "gradient that reaches the choice of words", None),
    17: (gradient_of_d, "gradient of D's bias, over the right one", 1),
    18: (gradient_in_the_critic, "gradient of the policy's loss in the critic", 0),
    19: (clipfrac_in_the_log, "clipfrac in the log, over that of the epoch", 1),
    20: (second_trainer, "kl_coef of the second trainer", 0.25),
}
fixed = {}                              # {number of a bug: whether it was fixed}


def submit(function):
    """Measures a function called bug_1 to bug_20, and says whether it is fixed."""
    n = int(function.__name__.removeprefix("bug_"))
    measure, what, right = BUGS[n]
    torch.manual_seed(n)
    number = float(measure(function))
    if right is None:
        fixed[n] = number > 0
    else:
        fixed[n] = abs(number - right) < 1e-3           # False for NaN
    should = "above 0" if right is None else f"{right:g}"
    verdict = "fixed" if fixed[n] else "not fixed yet"
    print(f"bug {n}: {what}: {number:.3f}, should be {should}: {verdict}")


def report():
    """How many of the bugs that were submitted are fixed, and which are not."""
    left = [n for n, is_fixed in fixed.items() if not is_fixed]
    print(f"{len(fixed) - len(left)} of {len(fixed)} bugs fixed; left: {left}")
