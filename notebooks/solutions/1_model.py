"""Solutions of the exercises in 1_model.ipynb."""

import math

import torch


def my_attend(q, k, v, bias, scale):
    logits = q @ k.transpose(-2, -1) * scale + bias                     # (B, nh, T, T)
    return logits.softmax(dim=-1) @ v                                   # (B, nh, T, hs)


def my_rotate(x, angles):
    a, b = x.chunk(2, dim=-1)                                           # (B, nh, T, hs/2) each
    cos, sin = angles                                                   # (B, 1, T, hs/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def my_rms_norm(x, weight):
    mean_square = x.pow(2).mean(dim=-1, keepdim=True)                   # (B, T, 1)
    return x * torch.rsqrt(mean_square + 1e-6) * weight


def my_lora_forward(x, weight, a, b):
    return x @ weight.T + 8 * (x @ a @ b)                               # (B, 4)


def my_top_p(logits, p):
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities               # of the likelier tokens
    kept = (before < p).gather(-1, order.argsort(dim=-1))               # in the old order
    return logits.masked_fill(~kept, -math.inf).log_softmax(dim=-1)
