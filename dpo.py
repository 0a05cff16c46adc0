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

Two variants need other data. KTO (arXiv 2402.01306) also learns from thumbs up and down, one
response a prompt: records of prompt, completion, and label. Online DPO (arXiv 2402.04792) makes its
own pairs: of a few samples of the policy the reward model's best is chosen, its worst rejected.

    python dpo.py                                    pairs of the pun world
    python dpo.py --loss ipo --data mine.jsonl       another loss, your own pairs
    python dpo.py --loss kto --data thumbs.jsonl     your own prompt, completion, label
    python dpo.py --online runs/reward_model/ckpt.pt --out_dir runs/online_dpo
"""

import json
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import tyro

from common import InputError, Run, TrainOptions, command_line, make_rng, setup
from data import (
    Batches,
    encode_records,
    format_samples,
    load_prompts,
    longest,
    means,
    measure,
    read_lines,
    tokenizer_of,
    train_and_val,
)
from lora import load_frozen_reward_model, load_policy_and_reference, save_trained
from model import logprobs
from optim import adamw, compile_step, cuda_graph, optimizer_step, set_lr


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/dpo"                                           # the folder of this run
    init: str = "runs/sft/ckpt.pt"  # the policy to start from, and the reference
    data: str = ""              # JSONL: pairs, labels (kto), prompts (online); '' is the pun world
    val_data: str = ""          # the same, to validate on; '' holds out a tenth of --data
    corpus_size: int = 30_000   # pairs of the pun world to draw
    noise: float = 0.0          # fraction of the pun world's labels that are flipped
    loss: str = "dpo"           # dpo cdpo robust hinge ipo ipo_mean kto simpo orpo cpo
    beta: float = 0.5           # of the implicit KL penalty; larger stays closer to the reference
    label_smoothing: float = 0.1    # cdpo, robust: the fraction of labels believed to be wrong
    simpo_gamma: float = 0.5    # simpo: the margin that the better text must lead by
    online: str = ""            # a reward model: it picks the pairs among samples of the policy
    group_size: int = 4         # with --online: samples a prompt
    max_new_tokens: int = 32    # with --online: tokens of a sample, at most
    batch_size: int = 64        # pairs
    max_steps: int = 200                                                # optimizer steps
    lr: float = 2e-4                                                    # the highest rate
    warmup_steps: int = 30                                      # steps until the highest rate
    weight_decay: float = 0.0   # of the matrices; none here, since the reference is the anchor
    grad_clip: float = 1.0                      # largest norm of a gradient; 0 does not clip
    eval_interval: int = 100                                    # steps between two evaluations
    log_interval: int = 10                              # steps between two rows of metrics.jsonl
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU
    READ_IF: ClassVar = [("data", [""], "corpus_size noise"), ("data", [], "val_data"),
                         ("online", [""], "corpus_size noise"),
                         ("online", [], "group_size max_new_tokens"),
                         ("loss", ["simpo"], "simpo_gamma"),
                         ("loss", ["cdpo", "robust"], "label_smoothing")]

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
        # Otherwise a longer response has a larger log-ratio for its length alone.
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
    return (pair.mean_logits - 1 / (2 * config.beta)) ** 2              # (B,)


def kto_loss(pair, config):
    """Eq. 7 of https://arxiv.org/abs/2402.01306: each response by itself, against the mean KL."""
    chosen, rejected = kto_terms(pair.chosen_logratios, pair.rejected_logratios, pair.kl, config)
    return 0.5 * (chosen + rejected)        # pairs have as many good responses as bad ones


def kto_terms(good, bad, kl, config):
    """What KTO asks of log-ratios: good ones should be above the KL to the reference, bad ones
    below. kl (B,): log-ratios of responses to other prompts, whose mean estimates the KL."""
    kl = kl.mean().clamp(min=0).detach()    # a KL is never negative, its estimate may be
    return (1 - torch.sigmoid(config.beta * (good - kl)),
            1 - torch.sigmoid(config.beta * (kl - bad)))


def simpo_loss(pair, config):
    """Eq. 6 of https://arxiv.org/abs/2405.14734: no reference, log-probs per token."""
    difference = pair.mean_chosen_logps - pair.mean_rejected_logps  # per token: length does not pay
    return -F.logsigmoid(config.beta * difference - config.simpo_gamma)


def orpo_loss(pair, config):
    """Eq. 6 of https://arxiv.org/abs/2403.07691: SFT on the chosen text, plus log odds; no
    reference."""
    log_odds = log_odds_of(pair.mean_chosen_logps) - log_odds_of(pair.mean_rejected_logps)
    # beta is the paper's lambda, the weight of the odds.
    return -pair.mean_chosen_logps - config.beta * F.logsigmoid(log_odds)


def log_odds_of(logp):
    """log(p / (1 - p)) of a log-probability, stable near p = 1."""
    return logp - torch.log(-torch.expm1(logp))                         # log p - log(1 - p)


def cpo_loss(pair, config):
    """https://arxiv.org/abs/2401.08417: DPO without a reference, plus SFT on the chosen text."""
    difference = pair.chosen_logps - pair.rejected_logps                        # summed, as in DPO
    return -F.logsigmoid(config.beta * difference) - pair.mean_chosen_logps     # (B,)


LOSSES = {"dpo": dpo_loss, "cdpo": cdpo_loss, "robust": robust_loss, "hinge": hinge_loss,
          "ipo": ipo_loss, "ipo_mean": ipo_mean_loss, "kto": kto_loss, "simpo": simpo_loss,
          "orpo": orpo_loss, "cpo": cpo_loss}

# -----------------------------------------------------------------------------
# KTO without pairs

class Labeled(NamedTuple):
    """One response to each prompt, and whether people liked it. Fields are (B,)."""
    logratios: torch.Tensor         # log pi - log pi_ref, summed over the response
    is_good: torch.Tensor           # bool: a thumb up
    weight: torch.Tensor            # so that good and bad responses count equally in the data
    kl: torch.Tensor                # log pi - log pi_ref of responses to other prompts

    @property
    def chosen_logratios(self):
        return self.logratios[self.is_good]                             # (number of good ones,)

    @property
    def rejected_logratios(self):
        return self.logratios[~self.is_good]

    @property
    def logits(self):
        """By how much more than the reference the policy prefers each good response to each bad
        one, whatever their prompts."""
        differences = self.chosen_logratios[:, None] - self.rejected_logratios  # (good, bad)
        return differences.flatten()


def labeled_kto_loss(labeled, config):
    """Eq. 7 of https://arxiv.org/abs/2402.01306, with its weights lambda."""
    if_good, if_bad = kto_terms(labeled.logratios, labeled.logratios, labeled.kl, config)
    return labeled.weight * torch.where(labeled.is_good, if_good, if_bad)       # (B,)


def losses_of(batch, config):
    """The loss of each record of a Pair or a Labeled. -> (B,)"""
    if isinstance(batch, Labeled):
        return labeled_kto_loss(batch, config)
    return LOSSES[config.loss](batch, config)

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
    """The Pair of a batch, or the Labeled if it has labels.

    with_kl: kto alone needs the KL estimate, a third forward pass."""
    if "label" in batch:
        return labeled_batch(policy, reference, batch)
    chosen, rejected = batch["chosen"], batch["rejected"]
    responses = [chosen, rejected]
    if with_kl:
        responses.append(chosen.roll(1, dims=0))    # the chosen response to another prompt
    logps = sum_logprobs(policy, batch["prompt"], responses)
    with torch.no_grad():                                               # the reference never learns
        ref_logps = sum_logprobs(reference, batch["prompt"], responses)
    chosen_length = (chosen != policy.pad_token_id).sum(dim=1)              # (B,)
    rejected_length = (rejected != policy.pad_token_id).sum(dim=1)
    kl = torch.zeros_like(ref_logps[0])                                 # no other loss reads it
    if with_kl:
        kl = (logps[2] - ref_logps[2]).detach()                         # (B,)
    return Pair(logps[0], logps[1], ref_logps[0], ref_logps[1], chosen_length, rejected_length, kl)


def labeled_batch(policy, reference, batch):
    """The Labeled of a batch of prompt, completion, label, and weight."""
    completion = batch["completion"]
    # The next record's completion was written for another prompt.
    responses = [completion, completion.roll(1, dims=0)]
    logps, kl_logps = sum_logprobs(policy, batch["prompt"], responses)      # (B,) each
    with torch.no_grad():                                               # the reference never learns
        ref_logps, kl_ref_logps = sum_logprobs(reference, batch["prompt"], responses)
    kl = (kl_logps - kl_ref_logps).detach()
    return Labeled(logps - ref_logps, batch["label"], batch["weight"], kl)


@torch.no_grad()
def sample_pairs(policy, reward_model, prompt, config, rng):
    """Online DPO, Algorithm 1 of https://arxiv.org/abs/2402.04792: of group_size samples to each
    prompt (B, P) the one with the highest score is chosen, the one with the lowest is rejected.

    Returns (batch, scores (B, group_size))."""
    prompts = prompt.repeat_interleave(config.group_size, dim=0)        # (B * G, P)
    response, _ = policy.generate(prompts, config.max_new_tokens, rng=rng)
    scores = reward_model(prompts, response).view(-1, config.group_size)    # (B, G)
    first = torch.arange(len(prompt), device=prompt.device) * config.group_size     # (B,) rows
    # If all scores of a group are equal, both are its first sample, and dpo has no gradient.
    return {"prompt": prompt, "chosen": response[first + scores.argmax(dim=1)],
            "rejected": response[first + scores.argmin(dim=1)]}, scores

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def reward_metrics(pair, beta):
    """DPO's implicit rewards, beta log(pi / pi_ref), as means over the batch, and the fraction of
    pairs in which the chosen response has the higher one. Of a Labeled, pairs are all that a good
    and a bad response make; a mean over none is 0."""
    def mean(x):
        return x.float().sum().item() / max(x.numel(), 1)

    margins = beta * pair.logits                                            # (B,)
    return {"rewards/chosen": mean(beta * pair.chosen_logratios),
            "rewards/rejected": mean(beta * pair.rejected_logratios),
            "rewards/margins": mean(margins), "rewards/accuracies": mean(margins > 0)}


@torch.no_grad()
def evaluate(policy, reference, val, config, autocast):
    """Loss and accuracy over all held-out pairs."""
    parts = []
    for batch in val.in_order(config.batch_size):       # a large vocabulary fills the memory
        with autocast():
            parts.append(dpo_batch(policy, reference, batch, config.loss == "kto"))
    # One Pair (or Labeled) of all records, so that a mean over them is no mean of means.
    columns = [torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._fields]
    pair = type(parts[0])(*columns)
    return {"val_loss": losses_of(pair, config).mean().item(),
            # the implicit reward prefers the chosen response
            "val_accuracy": (pair.logits > 0).float().mean().item()}

# -----------------------------------------------------------------------------
# data

def load_pairs(config, tok):
    """(training, validation) records of the files in the config, or of the pun world."""
    if not config.data:
        return (tok.world.preferences(config.corpus_size, config.seed, config.noise),
                tok.world.preferences(1000, config.seed + 1, held_out=True))
    records, val_records = train_and_val(config, ["prompt", "chosen", "rejected"])
    # A tie says which of the two is better in neither direction.
    decided = [record for record in records if record.get("share", 1.0) > 0.5]
    val_decided = [record for record in val_records if record.get("share", 1.0) > 0.5]
    n_ties = len(records) + len(val_records) - len(decided) - len(val_decided)
    if n_ties:
        print(f"dpo: left out {n_ties} ties")
    return decided, val_decided


def has_labels(path):
    """True if the first record of a file has a label. What is no record is refused elsewhere."""
    for _, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(row, dict) and "label" in row
    return False


def load_records(config, tok):
    """(training records, validation records, the fields that hold their texts)."""
    if config.online:
        # The policy writes the rest.
        if config.data:
            return *train_and_val(config, ["prompt"]), ["prompt"]
        return load_prompts(config, tok), load_prompts(config, tok), ["prompt"]
    if config.loss == "kto" and config.data and has_labels(config.data):
        records, val_records = train_and_val(config, ["prompt", "completion", "label"])
        for path, part in ((config.data, records), (config.val_data or config.data, val_records)):
            if len({record["label"] for record in part}) == 1:
                raise InputError(f"{path}: every label is {part[0]['label']}, of the records to "
                                 "train or to validate on: KTO compares good with bad ones")
        return records, val_records, ["prompt", "completion"]
    return *load_pairs(config, tok), ["prompt", "chosen", "rejected"]


def encode(records, tok, fields, block_size, reserve):
    """encode_records(), and labels and weights (N,) where there are labels."""
    encoded = encode_records(records, tok, fields, block_size, reserve)
    if "completion" in fields:
        label = torch.tensor([record["label"] for record in records])       # (N,), bool
        # N / 2 for all of the good, and as much for all of the bad, however few they are.
        weight = torch.where(label, 0.5 / label.float().mean(), 0.5 / (~label).float().mean())
        encoded |= {"label": label, "weight": weight}
    return encoded

# -----------------------------------------------------------------------------

def train(config):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input."""
    if config.loss not in LOSSES:
        raise InputError(f"--loss is one of {', '.join(LOSSES)}, not '{config.loss}'")
    if config.online and config.group_size < 2:
        raise InputError("--group_size must be 2 or more: a best and a worst of them are picked")
    if config.loss in ("cdpo", "robust") and config.label_smoothing >= 0.5:
        raise InputError("--label_smoothing must be below 0.5: most of the labels must be right")
    device, autocast = setup(config)
    # In eval mode, like the reference: dropout would add noise to every log-ratio.
    policy, reference = load_policy_and_reference(config, device)
    tok = tokenizer_of(policy)
    reward_model = None
    if config.online:
        reward_model = load_frozen_reward_model(config.online, policy, config)
    records, val_records, fields = load_records(config, tok)
    # The judge's verdicts need many samples; of other texts a few are read.
    n_samples = 64 if config.data else 512
    val_prompts = [record["prompt"] for record in val_records[:n_samples]]
    block_size = policy.config.block_size
    reserve = config.max_new_tokens if config.online else 0
    encoded = encode(records, tok, fields, block_size, reserve)
    val_encoded = encode(val_records, tok, fields, block_size, reserve)
    n_new = config.max_new_tokens if config.online else longest(encoded)    # tokens of a sample
    batches = Batches(encoded, config.batch_size, tok.pad_token_id, device, config.seed,
                      few_shapes=config.compile)
    val = Batches(val_encoded, 1, tok.pad_token_id, device, 0)

    optimizer = adamw(policy, config.lr, config.weight_decay)           # the reference is not in it
    rng = make_rng(device, config.seed)
    make_pair = compile_step(dpo_batch) if config.compile else dpo_batch

    def learn(batch):
        """One step. Returns (loss, norm of the gradient, the Pair or Labeled)."""
        with autocast():
            pair = make_pair(policy, reference, batch, config.loss == "kto")
        loss = losses_of(pair, config).mean()                           # over records
        grad_norm = optimizer_step(loss, policy, optimizer, config.grad_clip)
        return loss.detach(), grad_norm, type(pair)(*(x.detach() for x in pair))

    learn = cuda_graph(learn, device)                   # on a CPU it stays what it is
    run = Run("dpo", config)
    for step in run.steps(config.eval_interval, policy=policy, optimizer=optimizer,
                          batches=batches, rng=rng):
        is_last = step + 1 == config.max_steps
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        batch, metrics = batches.next(), {}
        if reward_model is not None:                        # online: the policy writes the pairs
            with autocast():
                batch, scores = sample_pairs(policy, reward_model, batch["prompt"], config, rng)
            metrics["score"] = scores.mean()
            sampled = torch.cat([batch["chosen"], batch["rejected"]])
            run.sampled_tokens += (sampled != policy.pad_token_id).sum().item()
        loss, grad_norm, pair = learn(batch)

        if step % config.log_interval == 0 or is_last:
            metrics |= reward_metrics(pair, config.beta)
            run.log(loss=loss, **metrics, lr=lr, grad_norm=grad_norm)
        if (step + 1) % config.eval_interval == 0 or is_last:
            held_out = {}
            if reward_model is None:
                held_out = evaluate(policy, reference, val, config, autocast)
            # The loss says how well it ranks; only its samples say how well it writes.
            rows = measure(policy, reference, tok, val_prompts, rng, autocast, reward_model,
                           max_new_tokens=n_new)
            run.log(**held_out, **means(rows))
            run.write(format_samples(rows), rows)

    save_trained(run.folder / "ckpt.pt", policy, tok, stage="dpo")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
