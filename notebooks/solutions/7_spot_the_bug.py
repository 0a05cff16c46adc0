"""The twenty functions of 7_spot_the_bug.ipynb, repaired."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import gan
import ppo
from discriminator import discriminator_loss
from model import logprobs


def bug_1(model, prompt, response):
    tokens = torch.cat([prompt, response], dim=1)
    states = model.trunk(model.embed(tokens), tokens != model.pad_token_id)
    logp = model.head(states).log_softmax(dim=-1)[:, :-1]
    target = tokens[:, 1:].clamp(max=logp.size(2) - 1)
    logp = logp.gather(2, target[:, :, None]).squeeze(2)
    return logp[:, prompt.size(1) - 1:]         # position P - 1 predicts the first token


def bug_2(model, prompt):
    response, sampled = model.generate(prompt, 16)      # the distribution that is scored
    mask = response != model.pad_token_id
    return (logprobs(model, prompt, response) - sampled).exp()[mask]


def bug_3(model, prompt, response):
    model.eval()                                # no dropout; gradients do not need train()
    return logprobs(model, prompt, response)


def bug_4(logp, mask):
    return -(logp * mask).sum(dim=1).mean()


def bug_5(new_logp, old_logp):
    return (new_logp - old_logp).exp()


def bug_6(logp, ref_logp, mask):
    kl = logp - ref_logp
    return (kl * mask).sum() / mask.sum()


def bug_7(logp, ref_logp):
    log_r = ref_logp - logp                     # r = pi_ref / pi, for samples of pi
    return (log_r.exp() - 1) - log_r


def bug_8(score, kl, mask, kl_coef):
    return ppo.whiten(score[:, None] - kl_coef * kl, mask)      # a price for each token


def bug_9(rounds):
    reference = rounds[0]
    for policy in rounds[1:]:                   # and the reference stays what it was
        logp, ref_logp = policy.log_softmax(0), reference.log_softmax(0)
        kl = (logp.exp() * (logp - ref_logp)).sum()
    return kl


def bug_10(scores):
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


def bug_11(scores):
    losses = []
    for i in range(4):
        for j in range(i + 1, 4):
            losses.append(-F.logsigmoid(scores[:, i] - scores[:, j]))
    return torch.stack(losses).mean()


def bug_12(pair, beta):
    chosen = pair.chosen_logps - pair.ref_chosen_logps          # sums, not means
    rejected = pair.rejected_logps - pair.ref_rejected_logps
    return -F.logsigmoid(beta * (chosen - rejected))


def bug_13(parameters, lr, beta1=0.9, beta2=0.999):
    return torch.optim.Adam(parameters, lr=lr, betas=(beta1, beta2))


def bug_14(loss, model, optimizer):
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm


def bug_15(theta, words, advantages, ppo_epochs=4):
    old_logp = theta.log_softmax(0)[words].detach()
    mask, clipfracs = torch.ones_like(words, dtype=torch.bool), []
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for _ in range(ppo_epochs):                 # several passes over the same samples
        logp = theta.log_softmax(0)[words]
        loss, metrics = ppo.policy_loss(logp, old_logp, advantages, mask, clip_range=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clipfracs.append(metrics["clipfrac"])
    return sum(clipfracs) / len(clipfracs)


def bug_16(G, D_of_states, D_of_tokens, prompt, response):
    logits = G.head(G.hidden(prompt, response))
    one_hot = gan.straight_through(logits, response, G.pad_token_id, tau=1.0)
    embeddings = gan.soft_embeddings(D_of_tokens.model, response, one_hot)
    return logits, -D_of_tokens(prompt, response, embeddings=embeddings).mean()


def bug_17(G, D, z, real):
    fake = G(z)
    (-F.logsigmoid(D(fake)).mean()).backward()
    D.zero_grad()                               # away with what G's step has left
    discriminator_loss(D(real)[:, 0], D(fake.detach())[:, 0]).backward()
    return D.bias.grad


def bug_18(rewards, values):
    advantages = rewards - values
    return advantages.detach()


def bug_19(minibatches):
    clipfracs = []
    for logp, old_logp, advantages, mask in minibatches:
        _, metrics = ppo.policy_loss(logp, old_logp, advantages, mask, 0.2)
        clipfracs.append(metrics["clipfrac"])
    return sum(clipfracs) / len(clipfracs)


class bug_20:
    defaults = {"lr": 1e-3, "kl_coef": 0.25}

    def __init__(self, **options):
        self.options = self.defaults | options  # a new dictionary for each trainer
