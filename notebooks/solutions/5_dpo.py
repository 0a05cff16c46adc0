"""Solutions of the exercises in 5_dpo.ipynb."""

import torch
import torch.nn.functional as F


def my_sum_logprobs(logits, response):
    mask = response != logits.size(-1)                                  # (B, R)
    index = response.masked_fill(~mask, 0)[:, :, None]                  # (B, R, 1)
    logp = logits.log_softmax(-1).gather(-1, index).squeeze(-1)         # (B, R)
    return (logp * mask).sum(dim=1)


def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    h = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(beta * h)


def my_slope(h, w, beta):
    return -beta * (w - torch.sigmoid(beta * h))


def my_ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    h = (chosen - rejected) - (ref_chosen - ref_rejected)
    return (h - 1 / (2 * beta)) ** 2
