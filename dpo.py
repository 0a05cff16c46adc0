"""
Stage 3b, DPO: preferences without reinforcement learning.

    PPO's optimum with reward r and leash beta is pi(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x). Solve it for the reward:
    r = beta log(pi / pi_ref) + beta log Z(x). Put that into Bradley-Terry: Z cancels, and what is left needs no reward model:

        loss = -logsigmoid(beta h),   h = (log pi(chosen) - log pi(rejected)) - (the same under pi_ref)    Eq. 7 of arXiv 2305.18290

    1. take a batch of (prompt, chosen, rejected)
    2. summed log-probs of both responses under the policy and under the frozen reference
    3. loss, AdamW step

What to look at: the loss starts at ln 2; the margin h grows; the log-prob of the chosen text may well fall (only the difference is
asked for); a loss near 0 is memory, not taste. The policy's own samples tell: pun rate, kl.

    python dpo.py                                    pairs of the pun world
    python dpo.py --loss ipo --data mine.jsonl       another loss, your own pairs
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro

from common import InputError, Run, TrainOptions, all_mean, run, sampler, setup, shard
from data import Batches, encode_records, measure, rates, read_records, show, tokenizer
from lora import Adapted, prepare, save
from model import load_model, logprobs
from optim import adamw, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/dpo"
    init: str = "runs/sft/ckpt.pt"  # the policy to start from, and the reference
    data: str = ""              # JSONL of prompt, chosen, rejected; '' is the pun world
    corpus_size: int = 30_000   # how many pairs of the pun world to draw
    noise: float = 0.0          # share of the pun world's labels that are flipped
    loss: str = "dpo"           # dpo cdpo robust hinge ipo ipo_mean kto simpo orpo cpo
    beta: float = 0.5           # how much a nat of h counts; larger stays closer to the reference
    label_smoothing: float = 0.1    # cdpo, robust: the share of labels believed to be wrong
    simpo_gamma: float = 0.5    # simpo: the margin that the better text must lead by
    batch_size: int = 64        # pairs
    max_steps: int = 300
    lr: float = 1e-4
    warmup_steps: int = 30
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    eval_interval: int = 100
    log_interval: int = 10
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU

# -----------------------------------------------------------------------------
# the losses: chosen c, rejected r; all fields (B,)

class Pair(NamedTuple):
    c: torch.Tensor             # log pi(chosen), summed over its tokens
    r: torch.Tensor
    ref_c: torch.Tensor         # the same under the reference
    ref_r: torch.Tensor
    len_c: torch.Tensor         # tokens of the chosen response
    len_r: torch.Tensor
    z: torch.Tensor             # kto: log pi - log pi_ref of responses to other prompts, an estimate of KL(pi || pi_ref)

    @property
    def h(self):
        return (self.c - self.r) - (self.ref_c - self.ref_r)

    @property
    def h_mean(self):           # per token
        return (self.c - self.ref_c) / self.len_c - (self.r - self.ref_r) / self.len_r


def log_odds(p):
    """log odds of chosen minus log odds of rejected, from log-probs per token."""
    a_c, a_r = p.c / p.len_c, p.r / p.len_r
    return (a_c - a_r) - (torch.log(-torch.expm1(a_c)) - torch.log(-torch.expm1(a_r)))


def kto(p, k):
    """1 - sigmoid of how far the chosen is above z, and the rejected below: https://arxiv.org/abs/2402.01306, Eq. 7."""
    z = all_mean(p.z.mean()).clamp(min=0).detach()
    return 0.5 * (1 - torch.sigmoid(k.beta * (p.c - p.ref_c - z)) + 1 - torch.sigmoid(k.beta * (z - p.r + p.ref_r)))


LOSSES = {   # (pair, config) -> (B,)
    "dpo": lambda p, k: -F.logsigmoid(k.beta * p.h),
    # some labels are wrong: cdpo smooths, robust is unbiased under the noise (arXiv 2403.00409)
    "cdpo": lambda p, k: -(1 - k.label_smoothing) * F.logsigmoid(k.beta * p.h) - k.label_smoothing * F.logsigmoid(-k.beta * p.h),
    "robust": lambda p, k: (-(1 - k.label_smoothing) * F.logsigmoid(k.beta * p.h)
                            + k.label_smoothing * F.logsigmoid(-k.beta * p.h)) / (1 - 2 * k.label_smoothing),
    "hinge": lambda p, k: F.relu(1 - k.beta * p.h),                                  # SLiC, arXiv 2305.10425
    "ipo": lambda p, k: (p.h - 1 / (2 * k.beta)) ** 2,                               # arXiv 2310.12036, Eq. 17
    "ipo_mean": lambda p, k: (p.h_mean - 1 / (2 * k.beta)) ** 2,                     # per token, as its authors advise
    "kto": kto,
    # without a reference
    "simpo": lambda p, k: -F.logsigmoid(k.beta * (p.c / p.len_c - p.r / p.len_r) - k.simpo_gamma),       # arXiv 2405.14734
    "orpo": lambda p, k: -p.c / p.len_c - k.beta * F.logsigmoid(log_odds(p)),                            # arXiv 2403.07691
    "cpo": lambda p, k: -F.logsigmoid(k.beta * (p.c - p.r)) - p.c / p.len_c,                             # arXiv 2401.08417
}


def sum_logprobs(model, prompt, responses):
    """Summed log-probs of K responses to each prompt, in one pass. prompt (B, P), K tensors (B, R_k) -> K tensors (B,)"""
    width = max(response.size(1) for response in responses)
    together = torch.cat([F.pad(response, (0, width - response.size(1)), value=model.pad_id) for response in responses])
    return logprobs(model, prompt.repeat(len(responses), 1), together).sum(dim=1).chunk(len(responses))


def pair_of(policy, reference, batch, with_z=False):
    """The Pair of a batch."""
    responses = [batch["chosen"], batch["rejected"]]
    if with_z:      # each chosen response behind the prompt of its neighbor
        responses.append(batch["chosen"].roll(1, dims=0))
    new = sum_logprobs(policy, batch["prompt"], responses)
    with torch.no_grad():
        ref = sum_logprobs(reference, batch["prompt"], responses)
    lengths = [(response != policy.pad_id).sum(dim=1) for response in responses[:2]]
    z = (new[2] - ref[2]).detach() if with_z else torch.zeros_like(ref[0])
    return Pair(new[0], new[1], ref[0], ref[1], *lengths, z)


@torch.no_grad()
def evaluate(policy, reference, val, config, autocast):
    """Loss and accuracy (share of pairs with h > 0) over all held-out pairs."""
    pairs = []
    with autocast():
        for rows in torch.arange(len(val.lengths)).split(256):
            pairs.append(pair_of(policy, reference, val.take(rows), config.loss == "kto"))
    pair = Pair(*(torch.cat(field) for field in zip(*pairs, strict=True)))
    return {"val_loss": LOSSES[config.loss](pair, config).mean().item(), "accuracy": (pair.h > 0).float().mean().item()}


def train(config):
    if config.loss not in LOSSES:
        raise InputError(f"--loss is one of {', '.join(LOSSES)}, not '{config.loss}'")
    device, autocast = setup(config)
    policy = load_model(config.init, device)                         # in eval mode, like the reference: no dropout
    prepare(policy, config, "policy")
    reference = Adapted(policy, None) if config.lora else load_model(config.init, device).requires_grad_(False)
    tok = tokenizer(policy.tokenizer)
    if config.data:
        records, val_records = read_records(config.data, "preference", tok, policy.config.block_size, held_out=0.1)
        ties = sum(record.get("share", 1) == 0.5 for record in records + val_records)
        records, val_records = ([record for record in part if record.get("share", 1) > 0.5] for part in (records, val_records))
        print(f"dpo: leaves out {ties} ties" if ties else "", end="\n" * bool(ties))
    else:
        records = world().preferences(config.corpus_size, config.seed, config.noise)
        val_records = world().preferences(1000, config.seed + 1, held_out=True)
    fields, block_size, where = ["prompt", "chosen", "rejected"], policy.config.block_size, config.data or "the pun world"
    batches = Batches(encode_records(records, tok.name, fields, block_size, where), config.batch_size, tok.pad_id, device, config.seed)
    val = Batches(encode_records(val_records, tok.name, fields, block_size, where), 1, tok.pad_id, device, 0)
    probe = [record["prompt"] for record in val_records[:512]]      # prompts that the policy is measured on

    optimizer, generator = adamw(policy, config.lr, config.weight_decay), sampler(device, config.seed)
    forward = torch.compile(pair_of, dynamic=True) if config.compile else pair_of
    progress = Run("dpo", config, config.max_steps)
    for step in progress.steps(config.eval_interval, policy=policy, optimizer=optimizer, batches=batches, generator=generator):
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        with autocast():
            pair = forward(policy, reference, shard(batches.next()), config.loss == "kto")
        loss = LOSSES[config.loss](pair, config).mean()
        norm = optimizer_step(loss, policy, optimizer, config.grad_clip)
        last = step + 1 == config.max_steps
        if step % config.log_interval == 0 or last:
            progress.log(loss=loss.item(), margin=pair.h.mean().item(), chosen=(pair.c - pair.ref_c).mean().item(),
                         rejected=(pair.r - pair.ref_r).mean().item(), lr=lr, grad_norm=norm)
        if (step + 1) % config.eval_interval == 0 or last:
            held_out = evaluate(policy, reference, val, config, autocast)
            rows = measure(policy, reference, tok, probe, generator, autocast)
            progress.log(**held_out, **rates(rows))
            progress.write(show(rows))

    save(progress.dir / "ckpt.pt", policy, tokenizer=tok.name, stage="dpo")
    progress.finish()


if __name__ == "__main__":
    run(lambda: train(tyro.cli(Config)))
