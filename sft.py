"""
Stage 1, supervised fine-tuning: a language model learns to complete prompts as the corpus does.

    1. take a batch of (prompt, completion) records
    2. log-probs of every completion token, given the prompt and the tokens before it
    3. loss = minus their mean: cross-entropy on the completion alone, its end token included;
       the prompt is given, so it is not learned
    4. optimizer step (Muon and AdamW, optim.py)
    5. now and then: the loss on unseen records, and a few samples

No model can beat the entropy of the grammar that wrote the corpus (puns.py computes it), so the
first number to look at is how far val_nll is above it. Left out on purpose: packing several texts
into one row.

    python sft.py                                   the pun world, from random weights
    python sft.py --data mine.jsonl                 your own {"prompt": ..., "completion": ...}
    python sft.py --init runs/sft/ckpt.pt --data mine.jsonl --out_dir runs/mine
                                                    fine-tunes a checkpoint on them
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import tyro

from common import InputError, Run, TrainOptions, command_line, make_rng, setup
from data import (
    Batches,
    encode_records,
    format_samples,
    longest,
    means,
    measure,
    tokenizer,
    tokenizer_of,
    train_and_val,
)
from lora import prepare, save_trained
from model import ModelConfig, build_model, load_model, logprobs
from optim import Muon, adamw, compile_step, cuda_graph, optimizer_step, set_lr


@dataclass(slots=True)
class Config(TrainOptions):
    out_dir: str = "runs/sft"   # the folder of this run
    data: str = ""              # JSONL of prompt and completion; '' is the pun world
    val_data: str = ""          # the same, to validate on; '' holds out a tenth of --data
    corpus_size: int | None = None  # records of the pun world; None: 512,000, --init 20,000
    init: str = ""              # checkpoint to start from; '' starts from random weights
    tokenizer: str = "puns"     # puns (of the small world), puns_large (of the large one) or gpt2
    # the architecture, if it starts from random weights
    arch: str = "gpt"           # gpt, palm, llama or t5
    n_layer: int = 2            # blocks
    n_head: int = 6             # attention heads
    n_embd: int = 192           # width of the embeddings
    n_inner: int = 256          # width of the feed-forward layers; 0 is 4 n_embd
    block_size: int = 48        # longest prompt + completion, in tokens
    dropout: float = 0.0        # while training
    # None is a number that suits random weights, or with --init one that suits trained ones.
    batch_size: int | None = None       # texts, of about one length each; None: 64, --init 32
    grad_accum: int | None = None       # batches a step; None: 2, --init 1
    max_steps: int | None = None        # optimizer steps; None: 4,000, --init as --epochs says
    epochs: float | None = None         # passes over the data, in place of --max_steps; --init 3
    # Linear warm-up to the highest rate, then linear decay to zero.
    lr: float | None = None             # highest rate; None: 6e-3 (Muon), --init 1e-4 (AdamW)
    warmup_steps: int | None = None     # steps until the highest rate; None: 100, --init a tenth
    weight_decay: float = 0.0   # one pass over an endless corpus cannot overfit
    grad_clip: float = 1.0      # largest norm of a gradient; 0 does not clip
    eval_interval: int | None = None    # steps between two evaluations; None: 500, --init an epoch
    log_interval: int = 25      # steps between two rows of metrics.jsonl
    compile: bool = False       # torch.compile the training step: slow to start, pays on a GPU
    READ_IF: ClassVar = [("data", [""], "corpus_size"), ("data", [], "val_data"), ("init", [""],
                         "tokenizer arch n_layer n_head n_embd n_inner block_size dropout")]


# 4,000 steps of 128 records read each record of the pun world once. The texts of a batch have about
# one length, so two batches of 64 are a wider sample than one of 128, which is an eighth faster.
FROM_SCRATCH = dict(corpus_size=512_000, batch_size=64, grad_accum=2, lr=6e-3)
# Trained weights need few, small steps: more training would destroy what they know.
FINE_TUNING = dict(corpus_size=20_000, batch_size=32, grad_accum=1, lr=1e-4)


def fill_in(config, **defaults):
    """The config with these values for options that are None."""
    unset = {name: x for name, x in defaults.items() if getattr(config, name) is None}
    return replace(config, **unset)


def plan_steps(config, n_batches):
    """The config with numbers of steps where it has None. n_batches: of one epoch."""
    epoch = max(1, n_batches // config.grad_accum)                      # in steps
    epochs = config.epochs
    if epochs is None and config.init:
        epochs = 3
    if epochs is not None:
        config = fill_in(config, max_steps=max(1, round(epochs * epoch)))
    if config.init:
        config = fill_in(config, warmup_steps=config.max_steps // 10, eval_interval=epoch)
    return fill_in(config, max_steps=4000, warmup_steps=100, eval_interval=500)

# -----------------------------------------------------------------------------

def sft_loss(model, batch, n_tokens):
    """Cross-entropy of the completions, end tokens included, divided by n_tokens.

    n_tokens: completion tokens of all batches of a step, so that the sum of their losses is one
    mean over tokens, not a mean of means. Returns (loss, nll of each completion (B,), in nats)."""
    logp = logprobs(model, batch["prompt"], batch["completion"])    # (B, R), 0 on pads
    return -logp.sum() / n_tokens, -logp.sum(dim=1)


def count_tokens(model, batch):
    """The number of completion tokens in a batch, end tokens included."""
    return (batch["completion"] != model.pad_token_id).sum()


@torch.no_grad()
def evaluate(model, val, autocast, batch_size=256):
    """Mean nll of a completion, in nats, over all validation records."""
    model.eval()                                                        # no dropout
    nlls = []
    for batch in val.in_order(batch_size):
        with autocast():
            _, nll = sft_loss(model, batch, n_tokens=1)             # (B,)
        nlls.append(nll)
    model.train()
    return torch.cat(nlls).mean().item()                        # over records, not over batches


def make_model(config, device):
    """The language model to train and its tokenizer: of a checkpoint, or with random weights."""
    if config.init:
        model = load_model(config.init, device)
        return model, tokenizer_of(model)
    # From random weights: the options say how large.
    tok = tokenizer(config.tokenizer)
    model_config = ModelConfig(
        arch=config.arch, vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id,
        decoder_start_token_id=tok.eos_token_id, block_size=config.block_size,
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        n_inner=config.n_inner, dropout=config.dropout)
    return build_model(model_config).to(device), tok


def load_corpus(config, tok):
    """(training, validation) records of the files in the config, or of the pun world."""
    if config.data:
        return train_and_val(config, ["prompt", "completion"])
    # Another seed, so the validation records are new draws from the same grammar.
    return (tok.world.corpus(config.corpus_size, config.seed),
            tok.world.corpus(2000, config.seed + 1))


def train(config):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input."""
    if config.epochs is not None and config.max_steps is not None:
        raise InputError("--epochs and --max_steps both say how long: leave one of them out")
    device, autocast = setup(config)
    config = fill_in(config, **(FINE_TUNING if config.init else FROM_SCRATCH))
    model, tok = make_model(config, device)
    records, val_records = load_corpus(config, tok)
    fields, block_size = ["prompt", "completion"], model.config.block_size
    encoded = encode_records(records, tok, fields, block_size)          # {field: (N, longest)}
    val_encoded = encode_records(val_records, tok, fields, block_size)
    # The order of the batches depends on the seed alone, so a run can be repeated.
    batches = Batches(encoded, config.batch_size, tok.pad_token_id, device, config.seed,
                      few_shapes=config.compile)
    val = Batches(val_encoded, 1, tok.pad_token_id, device, 0)
    # The judge's verdicts need many samples; of other texts a few are read.
    n_samples = 64 if config.data else 256
    val_prompts = [record["prompt"] for record in val_records[:n_samples]]
    config = plan_steps(config, batches.n_batches)
    n_parameters = sum(p.numel() for p in model.parameters())
    floor = "" if config.data else f", entropy of the grammar {tok.world.entropy():.2f} nats"
    print(f"sft: {n_parameters / 1e6:.2f} M parameters, {len(records)} records, "
          f"{config.max_steps} steps, {device}{floor}")

    prepare(model, config, "sft")
    model.train()
    # Muon: rare facts, such as the topic of one word, learn as fast as common ones (optim.py).
    # Published weights were trained by AdamW, and a few steps should not turn them around.
    optimizer_of = adamw if config.init else Muon
    optimizer = optimizer_of(model, config.lr, config.weight_decay)
    rng = make_rng(device, config.seed)                 # for samples alone; batches have their own
    loss_function = compile_step(sft_loss) if config.compile else sft_loss

    def learn(micro_batches):
        """One step on several batches. Returns (loss, mean nll, norm of the gradient)."""
        n_tokens = sum(count_tokens(model, batch) for batch in micro_batches)
        loss, nlls = 0.0, []
        for batch in micro_batches:
            with autocast():
                part, nll = loss_function(model, batch, n_tokens)
            loss = loss + part                          # their sum is the mean over all tokens
            nlls.append(nll)                            # (B,)
        grad_norm = optimizer_step(loss, model, optimizer, config.grad_clip)
        return loss.detach(), torch.cat(nlls).mean().detach(), grad_norm

    learn = cuda_graph(learn, device)                   # on a CPU it stays what it is
    run = Run("sft", config)
    for step in run.steps(config.eval_interval, model=model, optimizer=optimizer, batches=batches,
                          rng=rng):
        is_last = step + 1 == config.max_steps
        lr = set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        loss, nll, grad_norm = learn([batches.next() for _ in range(config.grad_accum)])

        if step % config.log_interval == 0 or is_last:
            run.log(loss=loss, nll=nll, lr=lr, grad_norm=grad_norm)
        if (step + 1) % config.eval_interval == 0 or is_last:
            # What the loss cannot show: are the samples English, on topic, and funny?
            rows = measure(model, None, tok, val_prompts, rng, autocast,
                           max_new_tokens=longest(encoded))
            val_nll = evaluate(model, val, autocast, config.batch_size)
            run.log(val_nll=val_nll, **means(rows))
            run.write(format_samples(rows), rows)

    # The checkpoint holds the tokenizer's name, too: the later stages ask for nothing else.
    save_trained(run.folder / "ckpt.pt", model, tok, stage="sft")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
