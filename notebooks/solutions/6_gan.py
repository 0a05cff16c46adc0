"""Solutions of the exercises in 6_gan.ipynb."""

import torch
import torch.nn.functional as F

import gan


def my_discriminator_loss(real, fake, label_smoothing):
    on_real = -(1 - label_smoothing) * F.logsigmoid(real) - label_smoothing * F.logsigmoid(-real)
    on_fake = -F.logsigmoid(-fake)
    return (on_real.mean() + on_fake.mean()) / 2


def my_gumbel_max(logp, u):
    gumbel = -torch.log(-torch.log(u))
    return (logp + gumbel).argmax(dim=-1)


def noise_for(logp, response):
    rng = torch.Generator().manual_seed(0)
    return gan.gumbel_given_sample(logp.detach(), response, rng) - logp.detach()


def my_straight_through(logits, response, tau):
    logp = logits.log_softmax(-1)
    soft = ((logp + noise_for(logp, response)) / tau).softmax(-1)
    hard = F.one_hot(response, logits.size(-1)).float()
    return hard + soft - soft.detach()


def my_exact_kl(logits, ref_logits, mask):
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)               # (B, R)
    return (kl * mask).sum(dim=1)
