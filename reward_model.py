"""
Stage 2a, the reward model: from comparisons by people to one number for each text.

    1. start from the SFT model, which knows the language, and put a scalar head on the state that
       has read the end token; the text's own log-prob may count, too (model.RewardModel says why)
    2. take a batch of prompts, each with K completions ranked by people, best first
       (K = 2: chosen and rejected)
    3. Bradley-Terry: P(a beats b) = sigmoid(r_a - r_b), so
       loss = -logsigmoid(r_a - r_b), mean over all K (K - 1) / 2 pairs
    4. optimizer step; accuracy and calibration on held-out comparisons
    5. at the end: rescale so that samples of the SFT model have mean 0 and standard deviation 1,
       so that one kl_coef fits every reward model

In the pun world the judge stands in for people, and the held-out comparisons are about puns that
no training set contains. Only differences of scores mean something: Bradley-Terry never sees more.

    python reward_model.py                              pairs of the pun world
    python reward_model.py --loss ranking               three texts a prompt
    python reward_model.py --data mine.jsonl            your own prompt, chosen, rejected
"""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import ClassVar

import torch
import torch.nn.functional as F
import tyro

from common import InputError, Run, TrainOptions, command_line, make_rng, setup
from data import Batches, encode_records, longest, respond, tokenizer_of, train_and_val
from lora import prepare, save_trained
from model import RewardModel, load_model
from optim import adamw, compile_step, cuda_graph, optimizer_step, set_lr


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/reward_model"                                  # the folder of this run
    init: str = "runs/sft/ckpt.pt"  # the language model to start from
    data: str = ""              # JSONL of comparisons or ratings (data.py); '' is the pun world
    val_data: str = ""          # the same, to validate on; '' holds out a tenth of --data
    corpus_size: int = 20_000   # comparisons of the pun world to draw
    noise: float = 0.0          # fraction of the pun world's labels that are flipped
    loss: str = "pairwise"      # pairwise, ranking (of K texts) or regression (on ratings)
    margin: float = 0.0         # weight of a record's margin in the loss; 0 ignores it
    centering: float = 0.0      # weight of a pull of each pair's mean score toward zero
    likelihood: float = 0.3     # initial weight of a text's log-prob in its score; 0 leaves it out
    batch_size: int = 64        # records; each has K texts
    max_steps: int = 200                                                # optimizer steps
    lr: float = 4e-4                                                    # the highest rate
    warmup_steps: int = 30                                      # steps until the highest rate
    weight_decay: float = 0.01                                          # of the matrices
    grad_clip: float = 1.0                      # largest norm of a gradient; 0 does not clip
    eval_interval: int = 100                                    # steps between two evaluations
    log_interval: int = 20                              # steps between two rows of metrics.jsonl
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU
    READ_IF: ClassVar = [("data", [""], "corpus_size noise"), ("data", [], "val_data"),
                         ("loss", ["pairwise"], "noise"),
                         ("loss", ["pairwise", "ranking"], "margin centering")]

# -----------------------------------------------------------------------------
# the losses

def ranking_loss(scores, margin=0.0, centering=0.0, share=1.0):
    """Bradley-Terry over all pairs of K ranked texts, Eq. 1 of https://arxiv.org/abs/2203.02155.

    scores (B, K), best first. margin (B,) or a number: the lead that the better text must have
    (Llama 2, https://arxiv.org/abs/2307.09288, Eq. 2). centering: pulls r_a + r_b toward 0
    (https://arxiv.org/abs/2312.09244), since Bradley-Terry does not say where zero is. share (B,)
    or a number: the fraction of raters who agree with the order, a soft label; a tie is 0.5, whose
    loss is least where both scores are equal. Returns a scalar, in nats."""
    K = scores.size(1)                                                  # texts a prompt
    better, worse = torch.triu_indices(K, K, offset=1, device=scores.device)
    a, b = scores[:, better], scores[:, worse]              # (B, K (K - 1) / 2)
    if torch.is_tensor(margin):
        margin = margin[:, None]                            # (B, 1)
    if torch.is_tensor(share):
        share = share[:, None]
    # logsigmoid, never log(sigmoid): that is -inf from a gap of -89 on, with a gradient of NaN.
    agree = -F.logsigmoid(a - b - margin)                       # a rater prefers a
    disagree = -F.logsigmoid(b - a + margin)                    # a rater prefers b
    loss = share * agree + (1 - share) * disagree               # cross-entropy with a soft label
    return (loss + centering * (a + b) ** 2).mean()


def regression_loss(scores, ratings):
    """Mean squared error of scores (B,) against ratings (B,)."""
    assert scores.shape == ratings.shape
    return F.mse_loss(scores, ratings)


def score_all(reward_model, batch, fields):
    """Scores of all K completions of each prompt, in one forward pass. -> (B, K)"""
    pad = reward_model.model.pad_token_id
    width = max(batch[field].size(1) for field in fields)
    responses = [F.pad(batch[field], (0, width - batch[field].size(1)), value=pad)
                 for field in fields]
    # All first texts, then all second ones: view() below takes them apart again.
    responses = torch.cat(responses)                                    # (K * B, width)
    prompts = batch["prompt"].repeat(len(fields), 1)                    # (K * B, P)
    return reward_model(prompts, responses).view(len(fields), -1).T     # (B, K)

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate(reward_model, val, fields, autocast, batch_size=256):
    """Metrics over all held-out records: those of pair_metrics(), or val_mse and spearman."""
    reward_model.eval()                                                 # no dropout
    scores = []
    for batch in val.in_order(batch_size):
        with autocast():
            scores.append(score_all(reward_model, batch, fields))
    reward_model.train()
    scores = torch.cat(scores).float().cpu()                # (N, K)
    if len(fields) == 1:
        ratings = val.encoded["rating"]
        return {"val_mse": regression_loss(scores[:, 0], ratings).item(),
                "spearman": spearman(scores[:, 0], ratings)}
    if "share" in val.encoded:
        decided = val.encoded["share"] > 0.5                # a tie has no right order
        if decided.any():
            scores = scores[decided]
    return pair_metrics(scores)


def pair_metrics(scores):
    """Of scores (N, K), best first, over all pairs:

    accuracy: the fraction in the right order; gap: the mean difference of the two scores; ece:
    the expected calibration error, the mean over ten bins of |confidence - accuracy|, weighted by
    how many pairs are in a bin (https://arxiv.org/abs/1706.04599, Eq. 3)."""
    K = scores.size(1)                                                  # texts a prompt
    better, worse = torch.triu_indices(K, K, offset=1)
    gap = (scores[:, better] - scores[:, worse]).flatten()              # (pairs,)
    correct = (gap > 0).float()
    confidence = gap.abs().sigmoid()                        # of its own verdict: from .5 to 1
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)    # ten, of width .05
    ece = 0.0
    for i in bins.unique():
        in_bin = bins == i
        error = confidence[in_bin].mean() - correct[in_bin].mean()
        ece += error.abs().item() * in_bin.float().mean().item()
    return {"accuracy": correct.mean().item(), "gap": gap.mean().item(), "ece": ece}


def spearman(x, y):
    """Rank correlation of x and y (N,); equal numbers share their mean rank. 0 if all are equal."""
    # Pearson's correlation of the ranks. Only their order counts, since scores have no scale.
    ranks = [mean_ranks(x), mean_ranks(y)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num().item()     # NaN if constant


def mean_ranks(x):
    """The rank of each number (N,), twice over: how many are below it, plus how many up to it."""
    below = (x[:, None] > x).sum(dim=1)                                 # (N,)
    up_to = (x[:, None] >= x).sum(dim=1)
    return (below + up_to).float()


def chance_warning(metrics, n):
    """A sentence if n held-out pairs or ratings cannot tell this model from a coin, else ''.

    A coin is right on .5 of n pairs, with a standard error of .5 / sqrt(n); the correlation of n
    ratings with noise is 0, with one of 1 / sqrt(n - 1)."""
    name, coin, error = "accuracy", 0.5, 0.5 / n ** 0.5
    if "spearman" in metrics:
        name, coin, error = "spearman", 0.0, 1 / max(n - 1, 1) ** 0.5
    if metrics[name] > coin + 1.96 * error:                 # the 95 % interval of a coin
        return ""
    return (f"warning: {name} {metrics[name]:.2f} on {n} held-out records is no better than "
            f"chance, {coin:.2f} ± {1.96 * error:.2f}: a policy would learn noise from this "
            "reward model. It needs more records, or ones on which people agree.")

# -----------------------------------------------------------------------------
# data

def load_comparisons(config, tok):
    """(training records, held-out records, the fields that hold the texts, best first)."""
    if config.loss == "pairwise":
        if config.data:
            records, val_records = train_and_val(config, ["prompt", "chosen", "rejected"])
        else:
            records = tok.world.preferences(config.corpus_size, config.seed, config.noise)
            # Puns that no training set has: memorized pairs do not help here.
            val_records = tok.world.preferences(2000, config.seed + 1, held_out=True)
        return records, val_records, ["chosen", "rejected"]
    if config.loss == "ranking":
        if config.data:
            records, val_records = train_and_val(config, ["prompt", "ranked"])
        else:
            records = tok.world.rankings(config.corpus_size, config.seed)
            val_records = tok.world.rankings(1000, config.seed + 1)
        return unfold_rankings(records, val_records)
    if config.loss == "regression":
        if not config.data:
            raise InputError("--loss regression needs ratings: --data FILE with prompt, "
                             "completion and rating")
        records, val_records = train_and_val(config, ["prompt", "completion", "rating"])
        return records, val_records, ["completion"]
    raise InputError(f"--loss is pairwise, ranking or regression, not '{config.loss}'")


def unfold_rankings(records, val_records):
    """Gives each ranked text a field of its own, rank0 for the best. As load_comparisons()."""
    K = len(records[0]["ranked"])
    fields = [f"rank{k}" for k in range(K)]
    for record in records + val_records:
        if len(record["ranked"]) != K:
            where = record.get("where", "a record")
            raise InputError(f"{where}: ranks {len(record['ranked'])} texts, and another record "
                             f"{K}: all must rank equally many")
        record |= dict(zip(fields, record["ranked"], strict=True))      # in place
    return records, val_records, fields


def encode_comparisons(records, tok, fields, block_size):
    """Token ids of prompt and texts, and the numbers that any record has, as (N,) tensors."""
    encoded = encode_records(records, tok, ["prompt", *fields], block_size)
    # A record without the number gets the value that changes nothing.
    for name, default in (("margin", 0.0), ("share", 1.0), ("rating", 0.0)):
        if any(name in record for record in records):
            values = [float(record.get(name, default)) for record in records]
            encoded[name] = torch.tensor(values)
    return encoded

# -----------------------------------------------------------------------------

def train(config):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input."""
    device, autocast = setup(config)
    model = load_model(config.init, device)
    tok = tokenizer_of(model)
    reward_model = RewardModel(model, config.likelihood).to(device)  # a new head on the SFT model
    records, val_records, fields = load_comparisons(config, tok)
    block_size = model.config.block_size - 1        # the head reads one position more
    encoded = encode_comparisons(records, tok, fields, block_size)
    val_encoded = encode_comparisons(val_records, tok, fields, block_size)
    batches = Batches(encoded, config.batch_size, tok.pad_token_id, device, config.seed,
                      few_shapes=config.compile)
    # The batch size, 1, does not matter: in_order() has a size of its own.
    val = Batches(val_encoded, 1, tok.pad_token_id, device, 0)
    n_parameters = sum(p.numel() for p in reward_model.parameters())
    print(f"reward_model: {n_parameters / 1e6:.2f} M parameters, {len(records)} records of "
          f"{len(fields)} texts, {device}")

    prepare(reward_model, config, "reward")
    reward_model.train()
    # AdamW: the model has learned the language, and now moves little.
    optimizer = adamw(reward_model, config.lr, config.weight_decay)
    score = compile_step(score_all) if config.compile else score_all

    def learn(batch):
        """One step on {field: (B, R), margin: (B,), ...}. Returns (loss, norm of the gradient)."""
        with autocast():
            scores = score(reward_model, batch, fields)                     # (B, K)
        if config.loss == "regression":
            loss = regression_loss(scores[:, 0], batch["rating"])
        else:
            # A record without a margin asks for no lead, and one without a share is certain.
            margin = config.margin * batch.get("margin", 0.0)
            loss = ranking_loss(scores, margin, config.centering, batch.get("share", 1.0))
        grad_norm = optimizer_step(loss, reward_model, optimizer, config.grad_clip)
        return loss.detach(), grad_norm

    learn = cuda_graph(learn, device)                   # on a CPU it stays what it is
    run = Run("reward_model", config)
    for step in run.steps(config.eval_interval, reward_model=reward_model, optimizer=optimizer,
                          batches=batches):
        is_last = step + 1 == config.max_steps
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        loss, grad_norm = learn(batches.next())

        if step % config.log_interval == 0 or is_last:
            run.log(loss=loss, lr=lr, grad_norm=grad_norm)
        if (step + 1) % config.eval_interval == 0 or is_last:
            # accuracy, gap, and ece; in small batches, since a large vocabulary fills the memory
            metrics = evaluate(reward_model, val, fields, autocast, config.batch_size)
            run.log(**metrics)
            warning = chance_warning(metrics, len(val))
            if is_last and warning:
                run.write(warning)

    # -- normalize: samples of the SFT model get mean 0 and standard deviation 1
    reward_model.eval()                                                 # no dropout
    n_samples = 400 if config.data else 2000        # of 400 the standard error is .05
    prompts = [record["prompt"] for record in islice(cycle(records), n_samples)]
    sft_model, rng = load_model(config.init, device), make_rng(device, config.seed)
    scores = []
    with torch.no_grad(), autocast():
        for prompt, response in respond(sft_model, tok, prompts, rng, autocast,
                                        longest(encoded)):
            scores.append(reward_model(prompt, response))                   # (B,)
    # A policy at its start then scores 0 ± 1, whatever the reward model.
    reward_model.normalize(torch.cat(scores).float().cpu())
    save_trained(run.folder / "ckpt.pt", reward_model, tok, stage="reward_model")
    run.finish()


@torch.no_grad()
def score_texts(reward_model, tok, prompts, texts, autocast):
    """Scores of completions of prompts, all given as strings. -> (N,), on the CPU"""
    records = [{"prompt": prompt, "completion": text}
               for prompt, text in zip(prompts, texts, strict=True)]
    encoded = encode_records(records, tok, ["prompt", "completion"], reward_model.config.block_size)
    device = next(reward_model.parameters()).device
    scores = []
    for batch in Batches(encoded, 1, tok.pad_token_id, device, 0).in_order():
        with autocast():
            scores.append(reward_model(batch["prompt"], batch["completion"]))
    return torch.cat(scores).float().cpu()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
