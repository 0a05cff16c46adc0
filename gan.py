"""
Stage 3c, the GAN: the policy is a generator G that learns to write what a discriminator D takes
for real, while D keeps learning.

    repeat:  G answers prompts;  d_steps of D on reals and on these fakes;  one update of G

Words are discrete, and sampling has no gradient. There are three ways around that:

    reinforce   The score of a response is D's verdict, and G follows the policy gradient (PPO's
                loss) on log pi(sampled tokens). D is not differentiated: G sees only the scalar.
                Unbiased, but noisy.
    gumbel      D reads one-hot vectors that carry the gradient of softmax((logits + Gumbel noise)
                / tau), "straight-through" (arXiv 1611.01144):
                D's loss -> D's input -> these logits -> G. The earlier tokens of G's input are
                held fixed. Biased.
    hidden      D reads the hidden states with which G reads a text, its own or a real one, and
                predicts what comes next ("professor forcing", arXiv 1610.09038): D's loss ->
                states -> G. The choice of tokens gets no gradient, so G can win by moving its
                states alone.

Each has a KL penalty to the SFT policy; in gumbel and hidden it is the exact KL of every token's
distribution.

    python gan.py
    python gan.py --estimator gumbel --out_dir runs/gan_gumbel
    make gans           gumbel, and hidden after discriminator.py --reads states --lstm
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import ppo
from common import InputError, Options, Run, command_line, make_rng, setup
from data import Batches, encode_records, format_samples, prompt_batches, tokenizer_of
from discriminator import (
    accuracy_of,
    discriminator_loss,
    load_discriminator,
    load_reals,
    save_discriminator,
    states_for,
)
from lora import freeze
from model import load_model, save_model
from optim import adamw, cuda_graph, optimizer_step, set_lr


@dataclass(slots=True)
class Config(Options):
    out_dir: str = "runs/gan"                                           # the folder of this run
    init: str = "runs/sft/ckpt.pt"              # G starts from here, and its KL is measured to it
    disc: str = "runs/discriminator/ckpt.pt"    # D starts from here; hidden needs --reads states
    data: str = ""              # JSONL of real prompts and completions; '' is the pun world's puns
    corpus_size: int = 20_000   # reals of the pun world
    estimator: str = "reinforce"    # reinforce, gumbel or hidden
    objective: str = "nonsaturating"    # G maximizes log D, or -log (1 - D) with "original"
    max_steps: int = 30         # rounds
    batch_size: int = 256       # responses a round
    minibatch_size: int = 128   # responses a gradient step of G
    d_steps: int = 2            # steps of D a round
    skip_g_every: int = 0       # every so many rounds only D learns (4: G skips a quarter); 0 never
    d_batch_size: int = 64      # reals, and as many fakes, a step of D
    d_lr: float = 2e-4              # of D
    label_smoothing: float = 0.1    # one-sided, for D's reals
    lr: float = 2e-4                # of G
    kl_coef: float = 0.1            # weight of the KL penalty
    tau: float = 1.0                # gumbel: temperature of the relaxation
    warmup_steps: int = 5           # rounds until the highest rate of G
    grad_clip: float = 1.0          # largest norm of a gradient; 0 does not clip
    max_new_tokens: int = 32        # longest response
    temperature: float = 1.0        # of sampling, and of every log-prob
    # reinforce: the options of ppo.py
    ppo_epochs: int = 2
    baseline: str = "critic"
    group_size: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    loss: str = "ppo"
    clip_range: float = 0.2
    clip_range_high: float = 0.0
    target_kl: float = 0.0
    vf_coef: float = 0.1
    missing_eos_penalty: float = 1.0
    sample_interval: int = 20                           # rounds between two samples on screen
    READ_IF: ClassVar = [("data", [""], "corpus_size"), ("estimator", ["gumbel"], "tau"),
                         ("estimator", ["reinforce"], "ppo_epochs baseline gamma lam loss "
                          "clip_range clip_range_high target_kl vf_coef missing_eos_penalty"),
                         ("baseline", ["critic"], "gamma lam vf_coef")]

# -----------------------------------------------------------------------------
# what G wants from D, and how a gradient gets there

def generator_objective(fake, objective):
    """What G maximizes, from D's logits (B,). -> (B,)

    nonsaturating: log D(fake). original: -log(1 - D(fake)), section 3 of arXiv 1406.2661, whose
    slope vanishes where D is sure of a fake."""
    if objective == "nonsaturating":
        return F.logsigmoid(fake)                                       # log D
    return -F.logsigmoid(-fake)                                         # -log(1 - D)


def gumbel_given_sample(logp, token, rng=None):
    """Perturbed log-probs whose argmax is `token`: the noise that would have led to this sample.

    Eq. 4 of https://arxiv.org/abs/2010.04838. logp (.., V), token (..) -> (.., V)"""
    u = torch.rand(logp.shape, generator=rng, device=logp.device)       # may be 0: log(0) = -inf
    e = -torch.log(u.clamp(min=1e-20))                                  # Exp(1)
    # The largest of all perturbed log-probs is Gumbel(0), since the probabilities sum to 1.
    top = -torch.log(e.take_along_dim(token[..., None], -1))                    # (.., 1)
    # The others follow their own Gumbel distributions, cut off at the largest.
    others = -torch.log(e / logp.exp().clamp(min=1e-20) + torch.exp(-top))
    return others.scatter(-1, token[..., None], top)


def straight_through(logits, response, pad_token_id, tau, rng=None):
    """One-hot vectors of the response, with the gradient of softmax((logp + noise) / tau).

    0 on pads. logits (B, R, V), response (B, R) -> (B, R, V)"""
    mask = response != pad_token_id                                     # (B, R)
    token = response.masked_fill(~mask, 0)                  # one_hot() knows no pad
    logp = logits.float().log_softmax(dim=-1)
    noise = gumbel_given_sample(logp.detach(), token, rng) - logp.detach()
    soft = ((logp + noise) / tau).softmax(dim=-1)                       # (B, R, V)
    hard = F.one_hot(token, logits.size(-1)).to(soft.dtype)             # (B, R, V)
    # Forward this is `hard`, backward it is `soft`.
    return (hard + soft - soft.detach()) * mask[..., None]


def soft_embeddings(model, response, one_hot):
    """The embeddings of a response, with the gradient of its one-hot vectors. -> (B, R, C)

    The value is exactly embed(response), so D reads what it would read without a gradient."""
    gradient_only = (one_hot - one_hot.detach()) @ model.wte.weight     # its value is 0
    return model.embed(response) + gradient_only


def exact_kl(logits, ref_logits, mask):
    """KL(pi || pi_ref) of each token's whole distribution, summed over the response.

    logits, ref_logits (B, R, V), mask (B, R) -> (B,), in nats"""
    logp = logits.float().log_softmax(-1)
    ref_logp = ref_logits.float().log_softmax(-1)
    # No sample is needed: with all V probabilities at hand this is the expectation itself.
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)                       # (B, R)
    return (kl * mask).sum(dim=1)


def differentiable_loss(policy, reference, discriminator, prompt, response, config, rng=None):
    """G's loss by gumbel or hidden, for sampled responses: mean of kl_coef KL - objective."""
    logits = policy(prompt, response).float() / config.temperature      # (B, R, V)
    with torch.no_grad():
        ref_logits = reference(prompt, response).float() / config.temperature   # (B, R, V)
    if config.estimator == "gumbel":
        one_hot = straight_through(logits, response, policy.pad_token_id, config.tau, rng)
        embeddings = soft_embeddings(discriminator.model, response, one_hot)
        verdict = discriminator(prompt, response, embeddings=embeddings)    # (B,)
    else:
        states = states_for(discriminator, policy, prompt, response)        # (B, R, C)
        verdict = discriminator(prompt, response, states)                   # (B,)
    kl = exact_kl(logits, ref_logits, response != policy.pad_token_id)  # (B,)
    return (config.kl_coef * kl - generator_objective(verdict, config.objective)).mean()

# -----------------------------------------------------------------------------
# the two players

def discriminator_step(discriminator, policy, optimizer, real, fake_prompt, fake_response, config,
                       autocast):
    """One step of D on reals {prompt, completion} and on fakes. Returns {metric: a scalar}.

    G gets no gradient, and zero_grad() drops what G's own step left in D."""
    real_prompt, real_response = real["prompt"], real["completion"]
    with autocast():
        with torch.no_grad():
            real_states = states_for(discriminator, policy, real_prompt, real_response)
            fake_states = states_for(discriminator, policy, fake_prompt, fake_response)
        real_logit = discriminator(real_prompt, real_response, real_states)     # (B,)
        fake_logit = discriminator(fake_prompt, fake_response, fake_states)     # (B,)
    loss = discriminator_loss(real_logit, fake_logit, config.label_smoothing)
    optimizer_step(loss, discriminator, optimizer, config.grad_clip)    # D's weights alone
    return {"d_loss": loss.detach(), "d_accuracy": accuracy_of(real_logit, fake_logit),
            "d_real": real_logit.mean().detach(), "d_fake": fake_logit.mean().detach()}


def rows_of_step(k, config):
    """Which responses of a round D sees at its k-th step: the next d_batch_size, cyclically."""
    first = k * config.d_batch_size                             # row of the round's responses
    return torch.arange(first, first + config.d_batch_size) % config.batch_size


def check_config(config):
    ppo.check_config(config)
    if config.estimator not in ("reinforce", "gumbel", "hidden"):
        raise InputError(f"--estimator is reinforce, gumbel or hidden, not '{config.estimator}'")
    if config.objective not in ("nonsaturating", "original"):
        raise InputError(f"--objective is nonsaturating or original, not '{config.objective}'")


def load_opponent(config, policy, device):
    """D, ready to go on learning. Raises InputError if it cannot read what this G writes."""
    discriminator = load_discriminator(config.disc, device)
    reads = {"gumbel": "tokens", "hidden": "states"}.get(config.estimator, discriminator.reads)
    if discriminator.reads != reads:
        raise InputError(f"{config.disc} reads {discriminator.reads}, but --estimator "
                         f"{config.estimator} needs a discriminator that reads {reads}; make it "
                         f"with: python discriminator.py --reads {reads}, and name it with --disc")
    # Tokens have no width: D has a trunk of its own to read them.
    same_width = discriminator.config.n_embd == policy.config.n_embd or reads == "tokens"
    if discriminator.tokenizer_fingerprint != policy.tokenizer_fingerprint or not same_width:
        raise InputError(f"{config.disc} was trained on texts of another model than {config.init}: "
                         "its tokens, or its width, are different; train it from the same one")
    return discriminator.train()


def train(config):
    """Runs the stage. Writes G to config.out_dir/ckpt.pt and D to discriminator.pt beside it.
    Raises InputError for unusable input."""
    device, autocast = setup(config)
    check_config(config)
    if config.estimator != "reinforce":     # a penalty has no gradient: the objective is D's alone
        config = replace(config, missing_eos_penalty=0.0)
    policy = load_model(config.init, device)
    reference = freeze(load_model(config.init, device), config)
    tok, rng = tokenizer_of(policy), make_rng(device, config.seed)
    discriminator = load_opponent(config, policy, device)
    value_head = nn.Linear(policy.config.n_embd, 1, device=device)
    nn.init.zeros_(value_head.weight)                           # the first values are 0, not noise
    nn.init.zeros_(value_head.bias)
    optimizer = adamw(nn.ModuleList([policy, value_head]), config.lr, eps=1e-5)
    # beta1 = 0.5: D forgets old fakes sooner, since G moves (DCGAN, arXiv 1511.06434).
    d_optimizer = adamw(discriminator, config.d_lr, weight_decay=0.01, betas=(0.5, 0.99))

    records, block_size = load_reals(config, tok), policy.config.block_size
    encoded = encode_records(records, tok, ["prompt", "completion"], block_size)
    reals = Batches(encoded, config.d_batch_size, tok.pad_token_id, device, config.seed)
    prompts = prompt_batches(records, config, tok, block_size, device, config.seed + 1)

    def score_fn(prompt, response):
        states = states_for(discriminator, policy, prompt, response)    # None if D reads tokens
        return generator_objective(discriminator(prompt, response, states), config.objective)

    def d_learns(real, fake_prompt, fake_response):
        """A step of D, with all that stays the same from round to round filled in."""
        return discriminator_step(discriminator, policy, d_optimizer, real, fake_prompt,
                                  fake_response, config, autocast)

    def g_follows_d(prompt, response):
        """A step of G where D is differentiated. Returns the norm of the gradient.

        A function, so that nothing of its backward pass lasts until D's step is recorded."""
        with autocast():
            loss = differentiable_loss(policy, reference, discriminator, prompt, response, config,
                                       rng)
        return optimizer_step(loss, policy, optimizer, config.grad_clip)

    d_learns = cuda_graph(d_learns, device)                 # on a CPU it stays what it is
    g_learns = ppo.minibatch_step(policy, value_head, optimizer, config, autocast)

    run = Run("gan", config)
    for step in run.steps(config.sample_interval, policy=policy, value_head=value_head,
                          discriminator=discriminator, optimizer=optimizer,
                          d_optimizer=d_optimizer, reals=reals, prompts=prompts, rng=rng):
        is_last = step + 1 == config.max_steps
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)

        # -- G writes
        prompt = prompts.next()["prompt"].repeat_interleave(config.group_size, dim=0)   # (B, P)
        with autocast():
            rollout = ppo.make_rollout(policy, value_head, reference, score_fn, prompt, config,
                                       rng)
        metrics, rows = ppo.describe_rollout(rollout, tok)
        run.sampled_tokens += rollout.mask.sum().item()
        metrics["objective"] = metrics.pop("score")     # D's verdict, not a reward model's score

        # -- D learns, on reals and on what G has just written
        for k in range(config.d_steps):
            fakes = rows_of_step(k, config)
            metrics |= d_learns(reals.next(), rollout.prompt[fakes], rollout.response[fakes])

        # -- G learns
        is_g_turn = not config.skip_g_every or (step + 1) % config.skip_g_every > 0
        if is_g_turn and config.estimator == "reinforce":
            advantages, returns = ppo.compute_advantages(rollout, config, config.kl_coef)
            metrics |= ppo.update(g_learns, rollout, advantages, returns, config)
        elif is_g_turn:
            for start in range(0, config.batch_size, config.minibatch_size):
                part = slice(start, start + config.minibatch_size)
                metrics["grad_norm"] = g_follows_d(rollout.prompt[part], rollout.response[part])
        run.log(**metrics)
        if (step + 1) % config.sample_interval == 0 or is_last:
            run.write(format_samples(rows), rows)

    save_model(run.folder / "ckpt.pt", policy, tok, stage="gan")
    save_discriminator(run.folder / "discriminator.pt", discriminator, tok, stage="gan")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
