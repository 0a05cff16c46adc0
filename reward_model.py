"""
Stage 2a, the reward model: from comparisons by people to one number for each text.

    1. start from the SFT model: it knows the language; put a scalar head on the state that has read the end token, and let the
       text's own log-prob count (model.py's Scorer says why)
    2. take a batch of prompts, each with K completions ranked by people, best first (K = 2: chosen and rejected)
    3. Bradley-Terry: P(a beats b) = sigmoid(r_a - r_b); loss = -logsigmoid(r_a - r_b), mean over all K (K - 1) / 2 pairs
    4. optimizer step; measure accuracy and calibration on held-out comparisons
    5. at the end, rescale so that samples of the SFT model have mean 0 and standard deviation 1: then one kl_coef fits all

In the pun world the judge stands in for people, and the held-out comparisons are about puns that no training set contains.
Only differences of scores mean something; never call them funniness.

    python reward_model.py                              pairs of the pun world
    python reward_model.py --loss ranking               three texts a prompt
    python reward_model.py label                        shows pairs, asks which is funnier, and writes your answers to mine.jsonl
    python reward_model.py --data mine.jsonl            your own records {"prompt": ..., "chosen": ..., "rejected": ...}
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from common import InputError, Run, TrainOptions, run, sampler, setup, shard
from data import Batches, encode_records, generate, read_records, tokenizer
from label import label
from lora import prepare, save
from model import Scorer, load_model
from optim import adamw, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/reward_model"
    init: str = "runs/sft/ckpt.pt"  # the language model to start from
    data: str = ""              # a file of comparisons (formats: corpora.py); '' is the pun world
    corpus_size: int = 20_000   # how many comparisons of the pun world to draw
    noise: float = 0.0          # share of the pun world's labels that are flipped
    loss: str = "pairwise"      # pairwise, ranking (of K) or regression (on ratings)
    margin: float = 0.0         # weight of a record's margin in the loss; 0 ignores it
    centering: float = 0.0      # weight of a pull of each pair's mean score towards zero
    likelihood: float = 0.3     # how much a text's log-prob counts in its score at the start (it is learned); 0: not at all
    batch_size: int = 64        # records; each has K texts
    max_steps: int = 200
    lr: float = 4e-4
    warmup_steps: int = 30
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    eval_interval: int = 100
    log_interval: int = 20
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU

# -----------------------------------------------------------------------------
# the losses

def ranking_loss(scores, margin=0.0, centering=0.0, share=1.0):
    """Bradley-Terry over all pairs of K ranked texts, Eq. 1 of https://arxiv.org/abs/2203.02155. scores (B, K), best first.

    margin (B,) or a number asks for that lead (Llama 2); centering pulls r_a + r_b towards 0 (arXiv 2312.09244), since
    Bradley-Terry itself does not say where zero is. share (B,) or a number: how many of the raters agree with the order, a soft
    label; .5 is a tie, whose loss is least where both scores are equal."""
    better, worse = torch.triu_indices(scores.size(1), scores.size(1), offset=1, device=scores.device)
    a, b = scores[:, better], scores[:, worse]                               # (B, K (K - 1) / 2)
    margin, share = (x[:, None] if torch.is_tensor(x) else x for x in (margin, share))
    # logsigmoid, never log(sigmoid): that is -inf from a gap of -89 on, and its gradient NaN
    lost = -share * F.logsigmoid(a - b - margin) - (1 - share) * F.logsigmoid(b - a + margin)
    return (lost + centering * (a + b) ** 2).mean()


def regression_loss(scores, ratings):
    """Mean squared error of scores (B,) against ratings (B,)."""
    assert scores.shape == ratings.shape
    return F.mse_loss(scores, ratings)


def score_all(scorer, batch, fields):
    """Scores of all completions of each prompt, in one forward pass. -> (B, K)"""
    width = max(batch[field].size(1) for field in fields)
    responses = torch.cat([F.pad(batch[field], (0, width - batch[field].size(1)), value=scorer.model.pad_id)
                           for field in fields])                              # (K B, R)
    return scorer(batch["prompt"].repeat(len(fields), 1), responses).view(len(fields), -1).T


@torch.no_grad()
def evaluate(scorer, batches, fields, autocast):
    """On all held-out records: accuracy = share of pairs in the right order, gap = mean difference of the scores, and ece =
    expected calibration error, mean over ten bins of |how sure the model was - how often it was right|."""
    scorer.eval()
    with autocast():
        scores = torch.cat([score_all(scorer, batches.take(rows), fields)
                            for rows in torch.arange(len(batches.lengths)).split(256)]).float().cpu()          # (N, K)
    scorer.train()
    if len(fields) == 1:
        ratings = batches.encoded["rating"]
        return {"val_mse": regression_loss(scores[:, 0], ratings).item(), "spearman": spearman(scores[:, 0], ratings)}
    if "share" in batches.encoded:                                            # a tie has no right order
        decided = batches.encoded["share"] > 0.5
        scores = scores[decided] if decided.any() else scores
    better, worse = torch.triu_indices(len(fields), len(fields), offset=1)
    gap = (scores[:, better] - scores[:, worse]).flatten()
    right, sure = (gap > 0).float(), gap.abs().sigmoid()                      # sure: the probability of its own verdict, .5 to 1
    bins = ((sure - 0.5) * 20).long().clamp(max=9)
    ece = sum((sure[bins == i].mean() - right[bins == i].mean()).abs() * (bins == i).float().mean() for i in bins.unique())
    return {"accuracy": right.mean().item(), "gap": gap.mean().item(), "ece": float(ece)}


def spearman(x, y):
    """Correlation of ranks; equal numbers share their mean rank. x, y (N,)"""
    ranks = [((z[:, None] > z).sum(1) + (z[:, None] >= z).sum(1)).float() for z in (x, y)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num().item()       # 0 if all are equal


def load_comparisons(config, tok, block_size):
    """Training and held-out records, and which fields of them hold the texts, best first."""
    shape = {"pairwise": "preference", "ranking": "ranking", "regression": "rating"}.get(config.loss)
    if shape is None:
        raise InputError(f"--loss is pairwise, ranking or regression, not '{config.loss}'")
    if config.data:
        train_records, val_records = read_records(config.data, shape, tok, block_size, held_out=0.1)
    elif shape == "preference":
        train_records = world().preferences(config.corpus_size, config.seed, config.noise)
        val_records = world().preferences(2000, config.seed + 1, held_out=True)
    elif shape == "ranking":
        train_records, val_records = world().rankings(config.corpus_size, config.seed), world().rankings(1000, config.seed + 1)
    else:
        raise InputError("--loss regression needs ratings: --data file.jsonl with prompt, completion and rating")
    fields = {"preference": ["chosen", "rejected"], "rating": ["completion"]}.get(shape)
    if shape == "ranking":
        fields = [f"rank{k}" for k in range(len(train_records[0]["ranked"]))]
        for record in train_records + val_records:
            record |= dict(zip(fields, record["ranked"], strict=True))
    return train_records, val_records, fields


def train(config):
    device, autocast = setup(config)
    model = load_model(config.init, device)
    name, tok = model.tokenizer, tokenizer(model.tokenizer)
    scorer = Scorer(model, config.likelihood).to(device)
    sets, fields = [], None
    *records, fields = load_comparisons(config, tok, model.config.block_size - 1)
    for part in records:
        encoded = encode_records(part, name, ["prompt", *fields], model.config.block_size - 1, config.data or "the pun world")
        for number, default in (("margin", 0), ("share", 1), ("rating", 0)):
            if any(number in record for record in part):
                encoded[number] = torch.tensor([float(record.get(number, default)) for record in part])
        sets.append(encoded)
    batches = Batches(sets[0], config.batch_size, tok.pad_id, device, config.seed)
    val = Batches(sets[1], 1, tok.pad_id, device, 0)
    print(f"reward_model: {sum(p.numel() for p in scorer.parameters()) / 1e6:.2f} M parameters, "
          f"{len(records[0])} records of {len(fields)} texts, {device}")

    prepare(scorer, config, "reward")
    scorer.train()
    optimizer = adamw(scorer, config.lr, config.weight_decay)
    forward = torch.compile(score_all, dynamic=True) if config.compile else score_all
    progress = Run("reward_model", config, config.max_steps)
    for step in progress.steps(config.eval_interval, scorer=scorer, optimizer=optimizer, batches=batches):
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        batch = shard(batches.next())
        with autocast():
            scores = forward(scorer, batch, fields)                            # (B, K)
        if config.loss == "regression":
            loss = regression_loss(scores[:, 0], batch["rating"])
        else:
            loss = ranking_loss(scores, config.margin * batch.get("margin", 0.0), config.centering, batch.get("share", 1.0))
        norm = optimizer_step(loss, scorer, optimizer, config.grad_clip)
        last = step + 1 == config.max_steps
        if step % config.log_interval == 0 or last:
            progress.log(loss=loss.item(), lr=lr, grad_norm=norm)
        if (step + 1) % config.eval_interval == 0 or last:
            progress.log(**evaluate(scorer, val, fields, autocast))

    # -- normalize on what the SFT model writes: mean 0, standard deviation 1
    scorer.eval()
    prompts = [record["prompt"] for record in (records[0] * 2)[:2000]]
    with torch.no_grad(), autocast():
        written = generate(load_model(config.init, device), tok, prompts, sampler(device, config.seed), autocast)
        scorer.normalize(torch.cat([scorer(prompt, response) for prompt, response in written]).float().cpu())
    save(progress.dir / "ckpt.pt", scorer, tokenizer=name, stage="reward_model")
    progress.finish()


@torch.no_grad()
def score_texts(scorer, tok, prompts, texts, autocast):
    """Scores of completions given as strings. -> (N,) on the CPU"""
    records = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
    encoded = encode_records(records, tok.name, ["prompt", "completion"], scorer.config.block_size)
    batches = Batches(encoded, 1, tok.pad_id, next(scorer.parameters()).device, 0)
    with autocast():
        return torch.cat([scorer(*batches.take(rows).values()) for rows in torch.arange(len(records)).split(256)]).float().cpu()


if __name__ == "__main__":
    run(lambda: train(tyro.cli(Config)), label=label)
