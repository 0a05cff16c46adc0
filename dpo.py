"""
Stage 3b, DPO: preferences without reinforcement learning.

    PPO's optimum with reward r and KL penalty beta is
        pi(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x).
    Solved for the reward: r = beta log(pi / pi_ref) + beta log Z(x). In Bradley-Terry, Z(x)
    cancels, because both responses answer one prompt. What is left needs no reward model:

        loss = -logsigmoid(beta h)                                 Eq. 7 of arXiv 2305.18290
        h = log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected)

    1. take a batch of (prompt, chosen, rejected)
    2. summed log-probs of both responses under the policy and under the frozen reference
    3. loss, AdamW step

What to look at: the loss starts at ln 2; rewards/margins grows; rewards/chosen may well fall,
since only the difference is asked for; a loss near 0 means memorization. The policy's own samples
show the result: pun, kl.

    python dpo.py                                    pairs of the pun world
    python dpo.py --loss ipo --data mine.jsonl       another loss, your own pairs
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro

from common import InputError, Run, TrainOptions, command_line, make_rng, setup
from data import (
    Batches,
    encode_records,
    format_samples,
    means,
    measure,
    tokenizer_of,
    train_and_val,
)
from lora import load_policy_and_reference, save_trained
from model import logprobs
from optim import adamw, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/dpo"                                           # the folder of this run
    init: str = "runs/sft/ckpt.pt"  # the policy to start from, and the reference
    data: str = ""              # JSONL of prompt, chosen, rejected; '' is the pun world
    val_data: str = ""          # the same, to validate on; '' holds out a tenth of --data
    corpus_size: int = 30_000   # pairs of the pun world to draw
    noise: float = 0.0          # fraction of the pun world's labels that are flipped
    loss: str = "dpo"           # dpo cdpo robust hinge ipo ipo_mean kto simpo orpo cpo
    beta: float = 0.5           # of the implicit KL penalty; larger stays closer to the reference
    label_smoothing: float = 0.1    # cdpo, robust: the fraction of labels believed to be wrong
    simpo_gamma: float = 0.5    # simpo: the margin that the better text must lead by
    batch_size: int = 64        # pairs
    max_steps: int = 300                                                # optimizer steps
    lr: float = 1e-4                                                    # the highest rate
    warmup_steps: int = 30                                      # steps until the highest rate
    weight_decay: float = 0.0                                   # the reference is the anchor, not 0
    grad_clip: float = 1.0                      # largest norm of a gradient; 0 does not clip
    eval_interval: int = 100                                    # steps between two evaluations
    log_interval: int = 10                              # steps between two rows of metrics.jsonl
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU

# -----------------------------------------------------------------------------
# the losses: all of them map a Pair, whose fields are (B,), to losses (B,)

class Pair(NamedTuple):
    chosen_logps: torch.Tensor      # log pi of the chosen response, summed over its tokens
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor  # the same under the reference
    ref_rejected_logps: torch.Tensor
    chosen_length: torch.Tensor     # in tokens
    rejected_length: torch.Tensor
    kl: torch.Tensor                # kto: log pi - log pi_ref of responses to other prompts

    @property
    def chosen_logratios(self):
        return self.chosen_logps - self.ref_chosen_logps                # log(pi / pi_ref)

    @property
    def rejected_logratios(self):
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def logits(self):
        """h: by how much more than the reference the policy prefers the chosen response."""
        policy_logratios = self.chosen_logps - self.rejected_logps
        ref_logratios = self.ref_chosen_logps - self.ref_rejected_logps
        return policy_logratios - ref_logratios                 # positive: chosen gained more

    @property
    def mean_logits(self):
        """h, with each response's log-ratio divided by its length."""
        chosen = self.chosen_logratios / self.chosen_length
        return chosen - self.rejected_logratios / self.rejected_length

    @property
    def mean_chosen_logps(self):
        return self.chosen_logps / self.chosen_length       # a token

    @property
    def mean_rejected_logps(self):
        return self.rejected_logps / self.rejected_length


def dpo_loss(pair, config):
    """Eq. 7 of https://arxiv.org/abs/2305.18290."""
    return -F.logsigmoid(config.beta * pair.logits)             # -log P(chosen beats rejected)


def cdpo_loss(pair, config):
    """DPO with smoothed labels: each is wrong with probability label_smoothing."""
    wrong = config.label_smoothing                              # probability that a label is wrong
    right_order = -F.logsigmoid(config.beta * pair.logits)
    wrong_order = -F.logsigmoid(-config.beta * pair.logits)
    return (1 - wrong) * right_order + wrong * wrong_order


def robust_loss(pair, config):
    """As cdpo, but unbiased under that noise: Eq. 12 of https://arxiv.org/abs/2403.00409."""
    wrong = config.label_smoothing                              # probability that a label is wrong
    right_order = -F.logsigmoid(config.beta * pair.logits)
    wrong_order = -F.logsigmoid(-config.beta * pair.logits)
    return ((1 - wrong) * right_order - wrong * wrong_order) / (1 - 2 * wrong)


def hinge_loss(pair, config):
    """SLiC, https://arxiv.org/abs/2305.10425: no gradient once the margin is 1."""
    return F.relu(1 - config.beta * pair.logits)                        # (B,)


def ipo_loss(pair, config):
    """Eq. 17 of https://arxiv.org/abs/2310.12036: regresses h on 1 / (2 beta), not on infinity."""
    return (pair.logits - 1 / (2 * config.beta)) ** 2                   # (B,)


def ipo_mean_loss(pair, config):
    """IPO on log-ratios per token, as its authors advise."""
    return (pair.mean_logits - 1 / (2 * config.beta)) ** 2


def kto_loss(pair, config):
    """Eq. 7 of https://arxiv.org/abs/2402.01306: each response by itself, against the mean KL."""
    kl = pair.kl.mean().clamp(min=0).detach()   # a KL is never negative, its estimate may be
    chosen = 1 - torch.sigmoid(config.beta * (pair.chosen_logratios - kl))
    rejected = 1 - torch.sigmoid(config.beta * (kl - pair.rejected_logratios))  # should be below it
    return 0.5 * (chosen + rejected)


def simpo_loss(pair, config):
    """Eq. 6 of https://arxiv.org/abs/2405.14734: no reference, log-probs per token."""
    difference = pair.mean_chosen_logps - pair.mean_rejected_logps  # per token: length does not pay
    return -F.logsigmoid(config.beta * difference - config.simpo_gamma)


def orpo_loss(pair, config):
    """Eq. 6 of https://arxiv.org/abs/2403.07691: SFT on the chosen text, plus log odds; no
    reference."""
    log_odds = log_odds_of(pair.mean_chosen_logps) - log_odds_of(pair.mean_rejected_logps)
    return -pair.mean_chosen_logps - config.beta * F.logsigmoid(log_odds)


def log_odds_of(logp):
    """log(p / (1 - p)) of a log-probability, stable near p = 0."""
    return logp - torch.log(-torch.expm1(logp))                         # log p - log(1 - p)


def cpo_loss(pair, config):
    """https://arxiv.org/abs/2401.08417: DPO without a reference, plus SFT on the chosen text."""
    difference = pair.chosen_logps - pair.rejected_logps                        # summed, as in DPO
    return -F.logsigmoid(config.beta * difference) - pair.mean_chosen_logps     # (B,)


LOSSES = {"dpo": dpo_loss, "cdpo": cdpo_loss, "robust": robust_loss, "hinge": hinge_loss,
          "ipo": ipo_loss, "ipo_mean": ipo_mean_loss, "kto": kto_loss, "simpo": simpo_loss,
          "orpo": orpo_loss, "cpo": cpo_loss}

# -----------------------------------------------------------------------------
# log-probs of a batch

def sum_logprobs(model, prompt, responses):
    """Log-probs of K responses to each prompt, summed over their tokens, in one forward pass.

    prompt (B, P), K tensors (B, R_k) -> K tensors (B,)"""
    pad, width = model.pad_token_id, max(response.size(1) for response in responses)
    # One pass over all of them is faster than one for each.
    padded = [F.pad(response, (0, width - response.size(1)), value=pad) for response in responses]
    prompts = prompt.repeat(len(responses), 1)                          # (K * B, P)
    logp = logprobs(model, prompts, torch.cat(padded))                  # (K * B, width)
    return logp.sum(dim=1).chunk(len(responses))                        # K times (B,)


def dpo_batch(policy, reference, batch, with_kl=False):
    """The Pair of a batch. with_kl: kto alone needs the KL estimate, a third forward pass."""
    chosen, rejected = batch["chosen"], batch["rejected"]
    responses = [chosen, rejected]
    if with_kl:
        responses.append(chosen.roll(1, dims=0))    # the chosen response to another prompt
    logps = sum_logprobs(policy, batch["prompt"], responses)
    with torch.no_grad():                                               # the reference never learns
        ref_logps = sum_logprobs(reference, batch["prompt"], responses)
    chosen_length = (chosen != policy.pad_token_id).sum(dim=1)              # (B,)
    rejected_length = (rejected != policy.pad_token_id).sum(dim=1)
    kl = torch.zeros_like(ref_logps[0])
    if with_kl:
        kl = (logps[2] - ref_logps[2]).detach()                         # (B,)
    return Pair(logps[0], logps[1], ref_logps[0], ref_logps[1], chosen_length, rejected_length, kl)


@torch.no_grad()
def reward_metrics(pair, beta):
    """DPO's implicit rewards, beta log(pi / pi_ref), as means over the batch, and the fraction of
    pairs in which the chosen response has the higher one."""
    margins = beta * pair.logits                                            # (B,)
    return {"rewards/chosen": (beta * pair.chosen_logratios).mean().item(),
            "rewards/rejected": (beta * pair.rejected_logratios).mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).float().mean().item()}


@torch.no_grad()
def evaluate(policy, reference, val, config, autocast):
    """Loss and accuracy over all held-out pairs."""
    losses, correct = [], []
    for batch in val.in_order():
        with autocast():
            pair = dpo_batch(policy, reference, batch, config.loss == "kto")
        losses.append(LOSSES[config.loss](pair, config))        # (B,)
        correct.append((pair.logits > 0).float())               # the implicit reward prefers chosen
    return {"val_loss": torch.cat(losses).mean().item(),
            "val_accuracy": torch.cat(correct).mean().item()}


def load_pairs(config):
    """(training, validation) records of the files in the config, or of the pun world."""
    if not config.data:
        return (world().preferences(config.corpus_size, config.seed, config.noise),
                world().preferences(1000, config.seed + 1, held_out=True))
    records, val_records = train_and_val(config, ["prompt", "chosen", "rejected"])
    # A tie says which of the two is better in neither direction.
    decided = [record for record in records if record.get("share", 1.0) > 0.5]
    val_decided = [record for record in val_records if record.get("share", 1.0) > 0.5]
    n_ties = len(records) + len(val_records) - len(decided) - len(val_decided)
    if n_ties:
        print(f"dpo: left out {n_ties} ties")
    return decided, val_decided


def train(config):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input."""
    if config.loss not in LOSSES:
        raise InputError(f"--loss is one of {', '.join(LOSSES)}, not '{config.loss}'")
    device, autocast = setup(config)
    # In eval mode, like the reference: dropout would add noise to every log-ratio.
    policy, reference = load_policy_and_reference(config, device)
    tok = tokenizer_of(policy)
    records, val_records = load_pairs(config)
    fields, block_size = ["prompt", "chosen", "rejected"], policy.config.block_size
    encoded = encode_records(records, tok, fields, block_size)
    val_encoded = encode_records(val_records, tok, fields, block_size)
    batches = Batches(encoded, config.batch_size, tok.pad_token_id, device, config.seed)
    val = Batches(val_encoded, 1, tok.pad_token_id, device, 0)
    val_prompts = [record["prompt"] for record in val_records[:512]]    # for samples of the policy

    optimizer = adamw(policy, config.lr, config.weight_decay)           # the reference is not in it
    rng = make_rng(device, config.seed)
    make_pair = torch.compile(dpo_batch, dynamic=True) if config.compile else dpo_batch

    run = Run("dpo", config)
    for step in run.steps(config.eval_interval, policy=policy, optimizer=optimizer,
                          batches=batches, rng=rng):
        is_last = step + 1 == config.max_steps
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        with autocast():
            pair = make_pair(policy, reference, batches.next(), config.loss == "kto")
        loss = LOSSES[config.loss](pair, config).mean()                 # over pairs
        grad_norm = optimizer_step(loss, policy, optimizer, config.grad_clip)

        if step % config.log_interval == 0 or is_last:
            run.log(loss=loss.item(), **reward_metrics(pair, config.beta), lr=lr,
                    grad_norm=grad_norm)
        if (step + 1) % config.eval_interval == 0 or is_last:
            held_out = evaluate(policy, reference, val, config, autocast)
            # The loss says how well it ranks; only its samples say how well it writes.
            rows = measure(policy, reference, tok, val_prompts, rng, autocast)
            run.log(**held_out, **means(rows))
            run.write(format_samples(rows))

    save_trained(run.folder / "ckpt.pt", policy, tok, stage="dpo")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
