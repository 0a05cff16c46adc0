"""Solutions of the exercises in 2_sft.ipynb."""

import torch.nn.functional as F


def my_logprobs(logits, response):
    is_pad = response == logits.size(-1)                                # (B, R)
    targets = response.masked_fill(is_pad, 0)                           # any id that exists
    logp = logits.log_softmax(dim=-1).gather(2, targets[:, :, None])    # (B, R, 1)
    return logp.squeeze(2).masked_fill(is_pad, 0.0)


def my_gradient_of_cost(logits, target):
    return logits.softmax(dim=-1) - F.one_hot(target, logits.size(-1))  # (B, V)


def my_rate(step, max_steps, warmup):
    return min((step + 1) / warmup, (max_steps - step) / (max_steps - warmup))
