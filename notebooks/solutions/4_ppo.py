"""Solutions of the exercises in 4_ppo.ipynb."""

import torch


def my_best_of_n(scores, n):
    groups = scores.view(-1, n)                                 # (B / n, n)
    return groups.argmax(dim=1) + n * torch.arange(len(groups))


def my_token_rewards(score, logp, ref_logp, mask, kl_coef):
    is_last = torch.arange(mask.size(1)) == mask.sum(dim=1, keepdim=True) - 1
    return -kl_coef * (logp - ref_logp) * mask + score[:, None] * is_last


def my_reward(prompts, texts):
    rewards = []
    for prompt, text in zip(prompts, texts, strict=True):
        thing = prompt.removeprefix("About ").split(" ", 1)[1].rstrip(":")
        rewards.append(float(thing in text and len(text.split()) <= 8))
    return torch.tensor(rewards)


def my_min_kl(percent, p0):
    p = percent / 100
    puns = torch.xlogy(p, p / p0)
    others = torch.xlogy(1 - p, (1 - p) / (1 - p0))
    return puns + others
