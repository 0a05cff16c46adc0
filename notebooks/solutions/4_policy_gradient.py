"""Solutions of the exercises in 4_policy_gradient.ipynb."""

import torch


def my_rloo(rewards, group_size):
    groups = rewards.view(-1, group_size)                       # (B / G, G)
    others = groups.sum(dim=1, keepdim=True) - groups
    return (groups - others / (group_size - 1)).flatten()


def my_reward_to_go(rewards):
    return rewards.flip(1).cumsum(1).flip(1)


def my_gae(rewards, values, mask, gamma, lam):
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.size(1))):
        value = values[:, t] * mask[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = value
        advantages.insert(0, next_advantage)
    advantages = torch.stack(advantages, dim=1)
    return advantages, advantages + values * mask


def my_whiten(x, mask):
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) / (variance + 1e-8).sqrt() * mask


def my_policy_loss(logp, old_logp, advantages, mask, clip_range):
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.max(-ratio * advantages, -clipped * advantages)
    return (losses * mask).sum() / mask.sum()


def my_k3(logp, ref_logp):
    log_r = ref_logp - logp
    return torch.expm1(log_r) - log_r


def my_optimum(ref_logp, rewards, beta):
    return (ref_logp + rewards / beta).log_softmax(0)
