"""
Stage 2b, the discriminator: is this completion real, or did a model write it?

    1. start from the SFT model's trunk: it knows the language; put a classifier on top, with an LSTM between if you like
    2. real = puns of the corpus, fake = what the SFT model writes to the same prompts: same prompts, same end token, same spacing,
       since any artefact that differs is learned first, and the generator would learn it next
    3. loss = binary cross-entropy with logits, real 1 (or 1 - label_smoothing), fake 0; it starts near ln 2
    4. AdamW step; measure accuracy on unseen reals and fresh fakes

It reads a response in one of two ways: its tokens (ids, or one-hot vectors that let a gradient through), or the hidden states with
which the generator wrote it. gan.py goes on from this checkpoint and lets both sides learn.

    python discriminator.py
    python discriminator.py --lstm           the trunk's states go through an LSTM
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.nn.utils.rnn import pad_sequence

from common import InputError, Options, Run, replacing, run, sampler, setup, shard
from data import Batches, encode_records, generate, read_records, tokenizer
from model import GPTBlock, ModelConfig, build_model, load_model
from optim import adamw, optimizer_step, set_lr
from puns import world


@dataclass(slots=True)
class Config(Options):
    out_dir: str = "runs/discriminator"
    init: str = "runs/sft/ckpt.pt"  # whose trunk it starts from, and who writes the fakes
    data: str = ""              # JSONL of real prompts and completions; '' is the puns of the pun world
    corpus_size: int = 8_000    # how many reals of the pun world, and as many fakes
    lstm: bool = False          # an LSTM between trunk and classifier
    label_smoothing: float = 0.0    # one-sided: the target of a real text is 1 - this
    batch_size: int = 64        # reals, and as many fakes
    max_steps: int = 300
    lr: float = 5e-4
    warmup_steps: int = 30
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    eval_interval: int = 100
    log_interval: int = 10


class Discriminator(nn.Module):
    """A transformer encoder, an LSTM if asked for, and a linear classifier. -> logits (B,): above 0 it takes the text for real."""

    def __init__(self, model, lstm=False, reads="tokens"):
        """model: a language model whose trunk reads tokens; with reads="states" two blocks of our own read its hidden states."""
        super().__init__()
        self.config, self.reads, self.pad_id = model.config, reads, model.pad_id
        width = model.config.n_embd
        self.model = model if reads == "tokens" else None
        self.blocks = nn.ModuleList(GPTBlock(model.config) for _ in range(2 if reads == "states" else 0))
        self.lstm = nn.LSTM(width, width, batch_first=True) if lstm else None
        self.classifier = nn.Linear(width, 1)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, prompt, response, states=None):
        """prompt (B, P) ids; response (B, R) ids, or (B, R, V) one-hot vectors with zeros on pads; states (B, R, C), read in their
        place if reads is "states". -> (B,)"""
        if response.dim() == 3:
            mask = response.detach().sum(dim=-1) > 0.5                               # (B, R)
            response = F.pad(response, (0, 0, 0, 1))                                 # one more step, see Scorer
        else:
            mask = response != self.pad_id
            response = F.pad(response, (0, 1), value=self.pad_id)
        if self.reads == "states":
            x, bias = states, torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e4)[:, None, None]   # sees both ways
            for block in self.blocks:
                x = block(x, bias, None, None, None)                                 # (B, R, C)
        else:
            x = self.model.hidden(prompt, response)[:, 1:]                           # (B, R, C): state t has read response[:, :t + 1]
        if self.lstm is not None:
            x = self.lstm(x)[0]         # its output at each position, not h_n, whose first axis is the layer
        last = x[torch.arange(len(x), device=x.device), mask.sum(dim=1) - 1]         # (B, C): at the last real token
        return self.classifier(last).squeeze(-1).float()


def save_discriminator(path, disc, **about):
    with replacing(path) as temporary:
        torch.save({"model": disc.state_dict(), "config": dataclasses.asdict(disc.config), "lstm": disc.lstm is not None,
                    "reads": disc.reads} | about, temporary)


def load_discriminator(path, device="cpu"):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is not there; make it with: python discriminator.py") from None
    disc = Discriminator(build_model(ModelConfig(**saved["config"])), saved["lstm"], saved["reads"])
    disc.load_state_dict(saved["model"])
    return disc.to(device).eval()


def discriminator_loss(real, fake, label_smoothing=0.0):
    """Mean of -log D(real) and -log (1 - D(fake)), Eq. 1 of https://arxiv.org/abs/1406.2661, on logits (B,). ln 2 for a coin.
    One-sided label smoothing (arXiv 1606.03498): the target of a real is 1 - label_smoothing, that of a fake stays 0."""
    assert real.shape == fake.shape
    return 0.5 * (F.binary_cross_entropy_with_logits(real, torch.full_like(real, 1 - label_smoothing))
                  + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)))


@torch.no_grad()
def evaluate(disc, batches, autocast):
    """Accuracy on all held-out reals and fakes, and the mean logit of each."""
    disc.eval()
    real, fake = [], []
    with autocast():
        for rows in torch.arange(len(batches.lengths)).split(256):
            batch = batches.take(rows)
            real.append(disc(batch["prompt"], batch["real"]))
            fake.append(disc(batch["prompt"], batch["fake"]))
    disc.train()
    real, fake = torch.cat(real), torch.cat(fake)
    return {"accuracy": (((real > 0).float().mean() + (fake <= 0).float().mean()) / 2).item(),
            "real_logit": real.mean().item(), "fake_logit": fake.mean().item()}


def load_reals(config):
    """Real records: those of a file, or puns of the pun world."""
    if config.data:
        return read_records(config.data, "completion")
    return world().corpus(config.corpus_size, config.seed, mix={"pun": 1.0})


def train(config):
    device, autocast = setup(config)
    generator_model = load_model(config.init, device)
    tok, generator = tokenizer(generator_model.tokenizer), sampler(device, config.seed)
    disc = Discriminator(load_model(config.init), config.lstm).to(device)
    reals = load_reals(config)
    encoded = encode_records(reals, tok.name, ["prompt", "completion"], disc.config.block_size, config.data or "the pun world")
    fakes = [row for _, response in generate(generator_model, tok, [record["prompt"] for record in reals], generator, autocast)
             for row in response.cpu().int()]
    encoded |= {"real": encoded.pop("completion"), "fake": pad_sequence(fakes, batch_first=True, padding_value=tok.pad_id)}
    held_out = min(1000, len(reals) // 5)
    batches = Batches({field: ids[held_out:] for field, ids in encoded.items()}, config.batch_size, tok.pad_id, device, config.seed)
    val = Batches({field: ids[:held_out] for field, ids in encoded.items()}, 1, tok.pad_id, device, 0)

    disc.train()
    optimizer = adamw(disc, config.lr, config.weight_decay)
    progress = Run("discriminator", config, config.max_steps)
    for step in progress.steps(config.eval_interval, disc=disc, optimizer=optimizer, batches=batches):
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        batch = shard(batches.next())
        with autocast():
            real, fake = disc(batch["prompt"], batch["real"]), disc(batch["prompt"], batch["fake"])
        loss = discriminator_loss(real, fake, config.label_smoothing)
        norm = optimizer_step(loss, disc, optimizer, config.grad_clip)
        last = step + 1 == config.max_steps
        if step % config.log_interval == 0 or last:
            progress.log(loss=loss.item(), grad_norm=norm)
        if (step + 1) % config.eval_interval == 0 or last:
            progress.log(**evaluate(disc, val, autocast))

    save_discriminator(progress.dir / "ckpt.pt", disc, tokenizer=tok.name, stage="discriminator")
    progress.finish()


if __name__ == "__main__":
    run(lambda: train(tyro.cli(Config)))
