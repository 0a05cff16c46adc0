"""
Stage 1, supervised fine-tuning: a language model learns to complete prompts as the corpus does.

    1. take a batch of (prompt, completion) records
    2. log-probs of every completion token given the prompt and the tokens before it
    3. loss = their mean, negated: cross-entropy on the completion alone, its end token included (the prompt is given, not learned)
    4. optimizer step (Muon and AdamW, optim.py); sometimes measure the loss on unseen records, and let the model write

What it cannot beat: the entropy of the grammar that wrote the corpus (puns.py computes it). The first number to look at is how
far the validation loss still is above that floor. Left out on purpose: packing of several texts into one row.

    python sft.py                                   the pun world, from scratch
    python sft.py --data mine.jsonl                 your own records {"prompt": ..., "completion": ...}
    python sft.py --init runs/sft/ckpt.pt --data mine.jsonl --lr 1e-4     goes on from a checkpoint
"""

from dataclasses import dataclass

import torch
import tyro

from common import Run, TrainOptions, all_mean, run, sampler, setup, shard
from data import Batches, encode_records, measure, rates, read_records, show, tokenizer
from lora import prepare, save
from model import ModelConfig, build_model, load_model, logprobs
from optim import Muon, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/sft"
    data: str = ""              # a file of texts (formats: corpora.py); '' is the pun world
    corpus_size: int = 564_000  # how many records of the pun world to write
    init: str = ""              # checkpoint to start from; '' starts from random weights
    tokenizer: str = "puns"     # puns or gpt2; a checkpoint has its own
    arch: str = "gpt"           # gpt, palm or t5, and the size below, if it starts from random weights
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 256
    n_inner: int = 256          # width of the feed-forward layers; 0 is 4 n_embd (here wide embeddings are worth more)
    block_size: int = 48        # longest prompt + completion, in tokens
    dropout: float = 0.0
    batch_size: int = 64
    grad_accum: int = 2         # batches a step; the texts of each are of about one length
    max_steps: int = 4400
    lr: float = 6e-3            # the highest rate; linear warm-up, then linearly down to zero
    warmup_steps: int = 100
    weight_decay: float = 0.0   # one pass over an endless corpus cannot overfit
    grad_clip: float = 1.0
    eval_interval: int = 500
    log_interval: int = 25
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU


def loss_of(model, batch, tokens=None):
    """Mean cross-entropy of the completion's tokens: their sum over `tokens`, how many all batches of a step have (default: this batch's).
    Returns (loss, nats of each completion (B,))."""
    logp = logprobs(model, batch["prompt"], batch["completion"])               # (B, R), 0 on pads
    return -logp.sum() / (count_tokens(model, [batch]) if tokens is None else tokens), -logp.sum(dim=1)


def count_tokens(model, batches):
    """How many completion tokens some batches have, end tokens included: a step's loss is the mean over all of them, not a mean of means."""
    return all_mean(sum((batch["completion"] != model.pad_id).sum() for batch in batches))


@torch.no_grad()
def evaluate(model, batches, autocast):
    """Mean nats of a completion over all validation records (not the last batch, not a mean of means)."""
    model.eval()
    with autocast():
        nats = torch.cat([loss_of(model, batches.take(rows))[1] for rows in torch.arange(len(batches.lengths)).split(256)])
    model.train()
    return nats.mean().item()


def train(config):
    device, autocast = setup(config)
    # -- model and records
    if config.init:
        model, name = load_model(config.init, device), load_model(config.init).tokenizer
    else:
        name, tok = config.tokenizer, tokenizer(config.tokenizer)
        model = build_model(ModelConfig(
            arch=config.arch, vocab_size=tok.vocab_size, end_id=tok.end_id, start_id=tok.end_id, block_size=config.block_size,
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_inner=config.n_inner,
            dropout=config.dropout)).to(device)
    tok = tokenizer(name)
    if config.data:
        records, val_records = read_records(config.data, "completion", tok, model.config.block_size, held_out=0.1)
    else:
        records, val_records = (world().corpus(n, seed) for n, seed in ((config.corpus_size, config.seed), (2000, config.seed + 1)))
    where = config.data or "the pun world"
    encoded = encode_records(records, name, ["prompt", "completion"], model.config.block_size, where)
    val = Batches(encode_records(val_records, name, ["prompt", "completion"], model.config.block_size, where), 1, tok.pad_id, device, 0)
    batches = Batches(encoded, config.batch_size, tok.pad_id, device, config.seed)
    floor = "" if config.data else f", entropy of the grammar {world().entropy():.2f}"
    print(f"sft: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(records)} records, {device}{floor}")

    # -- training
    prepare(model, config, "sft")
    model.train()
    optimizer, generator = Muon(model, config.lr, config.weight_decay), sampler(device, config.seed)
    forward = torch.compile(loss_of, dynamic=True) if config.compile else loss_of
    progress = Run("sft", config, config.max_steps)
    for step in progress.steps(config.eval_interval, model=model, optimizer=optimizer, batches=batches, generator=generator):
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        parts = [shard(batches.next()) for _ in range(config.grad_accum)]
        with autocast():
            tokens = count_tokens(model, parts)
            losses, nats = zip(*(forward(model, part, tokens) for part in parts), strict=True)
        loss, nats = sum(losses), torch.cat(nats)
        norm = optimizer_step(loss, model, optimizer, config.grad_clip)
        last = step + 1 == config.max_steps
        if step % config.log_interval == 0 or last:
            progress.log(loss=loss.item(), nats=nats.mean().item(), lr=lr, grad_norm=norm)
        if (step + 1) % config.eval_interval == 0 or last:
            rows = measure(model, None, tok, [record["prompt"] for record in val_records[:256]], generator, autocast)
            progress.log(val_nats=evaluate(model, val, autocast), **rates(rows))
            progress.write(show(rows))

    save(progress.dir / "ckpt.pt", model, tokenizer=name, stage="sft")
    progress.finish()


if __name__ == "__main__":
    run(lambda: train(tyro.cli(Config)))
