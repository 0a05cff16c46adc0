"""
Stage 3c, the GAN: the policy is a generator G that learns to write what a discriminator D takes for real, while D keeps learning.

    repeat: G answers prompts; d_steps of D on reals and these fakes; one step of G against D's verdict

Words are discrete: sampling has no gradient. Three ways around that, and the path that G's gradient takes in each:

    reinforce   score of a response = D's verdict; policy gradient (PPO's loss) on log pi(sampled tokens). D is never differentiated
                for G: its number is all that G gets. Unbiased, noisy.
    gumbel      D reads one-hot vectors that carry the gradient of softmax((logits + Gumbel noise) / tau), "straight-through"
                (arXiv 1611.01144): D's loss -> D's input -> those logits -> G. The earlier tokens of G's input are held fixed. Biased.
    hidden      D reads the hidden states with which G predicts a text, its own or a real one ("professor forcing", arXiv 1610.09038):
                D's loss -> states -> G. The choice of the tokens gets no gradient at all: G can win by moving its states.

Each is on a leash to the SFT policy, with kl_coef. In gumbel and hidden the leash is the exact KL of each token's distribution.

    python gan.py
    python gan.py --estimator gumbel --out_dir runs/gan_gumbel
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import ppo
from common import InputError, Options, Run, run, sampler, setup, shard, world_size
from data import Batches, encode_records, show, tokenizer
from discriminator import Discriminator, discriminator_loss, load_discriminator, load_reals, save_discriminator
from model import load_model, save_model
from optim import adamw, optimizer_step, set_lr


@dataclass(slots=True)
class Config(Options):
    out_dir: str = "runs/gan"
    init: str = "runs/sft/ckpt.pt"              # G starts from here, and is leashed to it
    disc: str = "runs/discriminator/ckpt.pt"    # D starts from here ('' with --estimator hidden: its own)
    data: str = ""              # JSONL of real prompts and completions; '' is the puns of the pun world
    corpus_size: int = 20_000   # how many reals of the pun world
    estimator: str = "reinforce"    # reinforce, gumbel or hidden
    objective: str = "nonsaturating"    # G maximizes log D (nonsaturating) or minimizes log (1 - D) (original)
    max_steps: int = 30         # rounds
    batch_size: int = 256       # responses a round
    minibatch_size: int = 128
    d_steps: int = 2            # steps of D a round
    d_batch_size: int = 64
    d_lr: float = 2e-4
    label_smoothing: float = 0.1    # one-sided, for D's reals
    lr: float = 2e-4            # of G
    kl_coef: float = 0.1
    tau: float = 1.0            # gumbel: temperature of the relaxation
    warmup_steps: int = 5
    grad_clip: float = 1.0
    max_new_tokens: int = 32
    temperature: float = 1.0
    # reinforce: the options of ppo.py, with one meaning
    ppo_epochs: int = 2
    baseline: str = "critic"
    group_size: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    vf_coef: float = 0.1
    end_penalty: float = 1.0
    sample_interval: int = 20

# -----------------------------------------------------------------------------
# what G wants of D, and how a gradient gets there

def generator_objective(fake, objective):
    """What G maximizes, from D's logits (B,): log D(fake), or -log(1 - D(fake)), whose slope vanishes where D is sure of a fake."""
    return F.logsigmoid(fake) if objective == "nonsaturating" else -F.logsigmoid(-fake)


def gumbel_given_sample(logp, token, generator=None):
    """Perturbed log-probs whose argmax is `token`: the Gumbel noise that would have led to this sample (arXiv 2010.04838, Eq. 4).

    logp (..., V), token (...) -> (..., V)"""
    u = shard(torch.rand(len(logp) * world_size(), *logp.shape[1:], generator=generator, device=logp.device))
    e = -torch.log(u.clamp(min=1e-20))                                                                        # Exp(1)
    top = -torch.log(e.gather(-1, token[..., None]))                     # the largest of all is Gumbel(0), since exp(logp) sums to 1
    others = -torch.log(e / logp.exp().clamp(min=1e-20) + torch.exp(-top))                                    # all below it
    return others.scatter(-1, token[..., None], top)


def straight_through(logits, response, pad_id, tau, generator=None):
    """One-hot vectors of the response (zeros on pads) that carry the gradient of softmax((logp + noise) / tau).

    logits (B, R, V), response (B, R) -> (B, R, V)"""
    mask = (response != pad_id)[..., None]                               # (B, R, 1)
    token = response.masked_fill(response == pad_id, 0)
    logp = logits.float().log_softmax(dim=-1)
    noise = gumbel_given_sample(logp.detach(), token, generator) - logp.detach()
    soft = ((logp + noise) / tau).softmax(dim=-1)
    hard = F.one_hot(token, logits.size(-1)).to(soft.dtype)
    return (hard + soft - soft.detach()) * mask


def exact_kl(logits, ref_logits, mask):
    """KL(pi || pi_ref) of each token's whole distribution, summed over the response. (B, R, V) twice, (B, R) -> (B,)"""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return ((logp.exp() * (logp - ref_logp)).sum(-1) * mask).sum(dim=1)


def differentiable_loss(policy, reference, disc, prompt, response, config, generator=None):
    """G's loss by `gumbel` or `hidden`, for sampled responses: mean of -objective + kl_coef KL. A scalar."""
    mask, hidden = response != policy.pad_id, policy.hidden(prompt, response)                                 # (B, R), (B, R, C)
    logits = policy.head(hidden)                                                                              # (B, R, V)
    if config.estimator == "gumbel":
        verdict = disc(prompt, straight_through(logits, response, policy.pad_id, config.tau, generator))
    else:
        verdict = disc(prompt, response, states=hidden)
    with torch.no_grad():
        ref_logits = reference.logits(prompt, response)
    return (config.kl_coef * exact_kl(logits, ref_logits, mask) - generator_objective(verdict, config.objective)).mean()


def discriminator_step(disc, policy, optimizer, real, fake, config, autocast):
    """One step of D on reals {prompt, completion} and fakes (prompt, response); G gets nothing of it. Returns metrics."""
    states = {}
    with autocast():
        if disc.reads == "states":
            with torch.no_grad():
                states = {"real": policy.hidden(real["prompt"], real["completion"]), "fake": policy.hidden(*fake)}
        real_logit = disc(real["prompt"], real["completion"], states.get("real"))
        fake_logit = disc(*fake, states.get("fake"))
    loss = discriminator_loss(real_logit, fake_logit, config.label_smoothing)
    optimizer_step(loss, disc, optimizer, config.grad_clip)              # its zero_grad drops what G's step left in D
    accuracy = ((real_logit > 0).float().mean() + (fake_logit <= 0).float().mean()) / 2
    return {"d_loss": loss.item(), "d_accuracy": accuracy.item(), "d_real": real_logit.mean().item(), "d_fake": fake_logit.mean().item()}


def train(config):
    ppo.check_config(config)
    if config.estimator not in ("reinforce", "gumbel", "hidden") or config.objective not in ("nonsaturating", "original"):
        raise InputError("--estimator is reinforce, gumbel or hidden; --objective is nonsaturating or original")
    device, autocast = setup(config)
    policy, reference = load_model(config.init, device), load_model(config.init, device)
    reference.requires_grad_(False)
    tok = tokenizer(policy.tokenizer)
    disc = Discriminator(policy, reads="states").to(device) if config.estimator == "hidden" else load_discriminator(config.disc, device)
    disc.train()
    value_head = nn.Linear(policy.config.n_embd, 1, device=device)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    encoded = encode_records(load_reals(config), tok.name, ["prompt", "completion"], policy.config.block_size - 1, config.data or "the pun world")
    reals = Batches(encoded, config.d_batch_size, tok.pad_id, device, config.seed)
    prompts = Batches({"prompt": encoded["prompt"]}, config.batch_size // config.group_size, tok.pad_id, device, config.seed + 1)

    def score_fn(prompt, response):
        states = policy.hidden(prompt, response) if disc.reads == "states" else None
        return generator_objective(disc(prompt, response, states), config.objective)

    optimizer, d_optimizer = adamw(nn.ModuleList([policy, value_head]), config.lr, eps=1e-5), adamw(disc, config.d_lr, 0.01, betas=(0.5, 0.99))
    generator = sampler(device, config.seed)
    progress = Run("gan", config, config.max_steps)
    parts = dict(policy=policy, value_head=value_head, disc=disc, optimizer=optimizer, d_optimizer=d_optimizer, reals=reals,
                 prompts=prompts, generator=generator)
    for step in progress.steps(config.sample_interval, **parts):
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        prompt = prompts.next()["prompt"].repeat_interleave(config.group_size, dim=0)
        with autocast():
            rollout = ppo.make_rollout(policy, value_head, reference, score_fn, prompt, config, generator)
        metrics, completions = ppo.describe_rollout(rollout, tok)
        metrics["objective"] = metrics.pop("score")      # D's verdict, not the reward model's score

        # -- D: on reals and on what G writes now
        for k in range(config.d_steps):
            rows = shard(torch.arange(k * config.d_batch_size, (k + 1) * config.d_batch_size, device=device)) % config.batch_size
            fake = rollout.prompt[rows], rollout.response[rows]
            metrics |= discriminator_step(disc, policy, d_optimizer, shard(reals.next()), fake, config, autocast)

        # -- G: by the estimator
        if config.estimator == "reinforce":
            advantages, returns = ppo.advantages_of(rollout, config, config.kl_coef)
            metrics |= ppo.update(policy, value_head, optimizer, rollout, advantages, returns, config, autocast)
        else:
            for rows in map(shard, torch.arange(config.batch_size).split(config.minibatch_size)):
                with autocast():
                    loss = differentiable_loss(policy, reference, disc, rollout.prompt[rows], rollout.response[rows], config, generator)
                metrics["grad_norm"] = optimizer_step(loss, policy, optimizer, config.grad_clip)
        progress.log(**metrics)
        if (step + 1) % config.sample_interval == 0 or step + 1 == config.max_steps:
            progress.write(show(completions))

    save_model(progress.dir / "ckpt.pt", policy, tokenizer=tok.name, stage="gan")
    save_discriminator(progress.dir / "discriminator.pt", disc, tokenizer=tok.name, stage="gan")
    progress.finish()


if __name__ == "__main__":
    run(lambda: train(tyro.cli(Config)))
