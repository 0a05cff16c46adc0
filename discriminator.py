"""
Stage 2b, the discriminator: did a person write this completion, or a model?

    1. start from the SFT model's trunk, which knows the language, and put a classifier on top,
       with an LSTM between if you like
    2. real = puns of the corpus; fake = what the SFT model writes to the same prompts. Same
       prompts, same end token, same spacing: whatever else differs is learned first, and the
       generator would learn it next
    3. loss = binary cross-entropy with logits: real 1 (or 1 - label_smoothing), fake 0;
       it starts near ln 2
    4. AdamW step; accuracy on unseen reals and fresh fakes

It reads a response in one of two ways: its tokens, or the hidden states with which the generator
reads it. With states and an LSTM it is a transformer encoder followed by an LSTM, as in TransLSTM
(Riaz et al. 2024, Natural Language Processing Journal 8, 100089). gan.py goes on from this
checkpoint, and there both sides learn, with the verdict as a reward (RLGAF, arXiv 2305.06176).

    python discriminator.py
    python discriminator.py --lstm                  the trunk's states go through an LSTM
    python discriminator.py --reads states --lstm --out_dir runs/discriminator_states
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from common import InputError, Options, Run, command_line, make_rng, setup
from data import Batches, encode_records, longest, pad_right, read_records, respond, tokenizer_of
from lora import freeze
from model import (
    DISCRIMINATOR,
    GPTBlock,
    load_model,
    load_weights,
    mask_bias,
    read_checkpoint,
    rebuild,
    save_checkpoint,
)
from optim import adamw, cuda_graph, optimizer_step, set_lr


@dataclass(slots=True)
class Config(Options):
    out_dir: str = "runs/discriminator"                                 # the folder of this run
    init: str = "runs/sft/ckpt.pt"  # the trunk to start from, and who writes the fakes
    data: str = ""              # JSONL of real prompts and completions; '' is the pun world's puns
    val_data: str = ""          # the same, to validate on; '' holds out up to 1,000 of the data
    corpus_size: int = 8_000    # reals of the pun world, and as many fakes
    reads: str = "tokens"       # tokens, or states: the generator's hidden states
    lstm: bool = False          # an LSTM between trunk, or encoder, and classifier
    label_smoothing: float = 0.0    # one-sided: the target of a real text is 1 - this
    batch_size: int = 64        # reals, and as many fakes
    max_steps: int = 300                                                # optimizer steps
    lr: float = 1e-3                                                    # the highest rate
    warmup_steps: int = 30                                      # steps until the highest rate
    weight_decay: float = 0.01                                          # of the matrices
    grad_clip: float = 1.0                      # largest norm of a gradient; 0 does not clip
    eval_interval: int = 100                                    # steps between two evaluations
    log_interval: int = 10                              # steps between two rows of metrics.jsonl
    READ_IF: ClassVar = [("data", [""], "corpus_size")]


class Discriminator(nn.Module):
    """A transformer, an LSTM if asked for, and a linear classifier: logits (B,), > 0 for real."""

    def __init__(self, model, lstm=False, reads="tokens"):
        """model: the language model whose trunk reads the tokens. With reads="states" it gives
        the sizes alone, and two blocks of our own read the generator's hidden states."""
        super().__init__()
        self.config = model.config
        self.reads = reads                                              # tokens or states
        self.pad_token_id = model.pad_token_id
        width = model.config.n_embd
        self.model = model if reads == "tokens" else None
        n_blocks = 2 if reads == "states" else 0        # enough to compare states with each other
        self.blocks = nn.ModuleList(GPTBlock(model.config) for _ in range(n_blocks))
        self.lstm = nn.LSTM(width, width, batch_first=True) if lstm else None
        self.classifier = nn.Linear(width, 1)
        # Small weights and no bias: it starts undecided, at a loss of ln 2.
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, prompt, response, states=None, embeddings=None):
        """prompt (B, P) and response (B, R) ids -> logits (B,)

        states (B, R, C): what to read, if it reads states; see states_for(). embeddings (B, R, C):
        read in place of those of the response, if given; gan.py sends a gradient through them."""
        mask = response != self.pad_token_id                            # (B, R)
        if self.reads == "states":
            x = self.read_states(states, mask)                          # (B, R, C)
        else:
            x = self.read_tokens(prompt, response, embeddings)          # (B, R, C)
        if self.lstm is not None:
            # The output at each position, not h_n, whose first axis is the layer. In float32 on a
            # CPU, since few of them have an LSTM in bfloat16.
            with torch.autocast("cpu", enabled=False):
                x, _ = self.lstm(x.float())                             # (B, R, C)
        rows = torch.arange(len(x), device=x.device)
        last = x[rows, mask.sum(dim=1) - 1]                             # (B, C): the last token's
        return self.classifier(last).squeeze(-1).float()                # (B,)

    def read_tokens(self, prompt, response, embeddings):
        """States of the trunk: [:, t] has read response[:, :t + 1]. -> (B, R, C)"""
        # hidden()[:, t] has read only response[:, :t]; one more pad adds the state after the last.
        response = F.pad(response, (0, 1), value=self.pad_token_id)     # (B, R + 1)
        if embeddings is not None:
            embeddings = F.pad(embeddings, (0, 0, 0, 1))                # (B, R + 1, C)
        return self.model.hidden(prompt, response, embeddings)[:, 1:]

    def read_states(self, states, mask):
        """The generator's states (B, R, C) through two blocks that see both ways. -> (B, R, C)"""
        # A response has at least one token, so no row of the mask is empty.
        bias = mask_bias(mask)[:, None, None, :]                        # (B, 1, 1, R)
        x = states
        for block in self.blocks:
            x = block(x, bias)
        return x


def states_for(discriminator, generator, prompt, response):
    """What the discriminator reads, if it reads states. (B, P), (B, R) -> (B, R, C), or None

    [:, t] has read response[:, :t + 1], and from it the generator predicts the next token. The last
    one has read the whole response. (The state before the first token knows the prompt alone.)"""
    if discriminator.reads == "tokens":
        return None
    # As in read_tokens(): one more pad adds the state after the last token.
    return generator.hidden(prompt, F.pad(response, (0, 1), value=generator.pad_token_id))[:, 1:]


def save_discriminator(path, discriminator, tok, **about):
    save_checkpoint(path, DISCRIMINATOR, discriminator, tok, reads=discriminator.reads,
                    lstm=discriminator.lstm is not None, **about)


def load_discriminator(path, device="cpu"):
    """The discriminator of a checkpoint, in eval mode. Raises what load_model() raises."""
    checkpoint = read_checkpoint(path, DISCRIMINATOR)
    # The sizes come from the checkpoint, the weights right after.
    discriminator = Discriminator(rebuild(checkpoint, path), checkpoint["lstm"],
                                  checkpoint["reads"])
    load_weights(discriminator, checkpoint["model"], path)
    # gan.py compares it with that of G: ids of another tokenizer would be other words.
    discriminator.tokenizer_fingerprint = checkpoint["tokenizer_fingerprint"]
    return discriminator.to(device).eval()


def discriminator_loss(real, fake, label_smoothing=0.0):
    """Mean of -log D(real) and -log (1 - D(fake)), Eq. 1 of https://arxiv.org/abs/1406.2661.

    real, fake: logits (B,). A coin gets ln 2. One-sided label smoothing (arXiv 1606.03498): the
    target of a real text is 1 - label_smoothing, that of a fake stays 0."""
    assert real.shape == fake.shape
    real_target = torch.full_like(real, 1 - label_smoothing)
    fake_target = torch.zeros_like(fake)
    real_loss = F.binary_cross_entropy_with_logits(real, real_target)   # -log D(real)
    fake_loss = F.binary_cross_entropy_with_logits(fake, fake_target)   # -log (1 - D(fake))
    return 0.5 * (real_loss + fake_loss)


def accuracy_of(real, fake):
    """Mean of the fractions of reals and of fakes that are told right. logits (B,) -> a scalar"""
    # A logit of 0 is undecided: it counts as "fake", so that D must be sure of a real.
    return ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2


def verdicts(discriminator, generator, batch):
    """Logits of the reals and of the fakes of a batch {prompt, real, fake}. -> (B,), (B,)"""
    logits = []
    for response in (batch["real"], batch["fake"]):
        with torch.no_grad():                               # the generator stays as it is
            states = states_for(discriminator, generator, batch["prompt"], response)
        logits.append(discriminator(batch["prompt"], response, states))
    return logits


@torch.no_grad()
def evaluate(discriminator, generator, val, autocast):
    """Accuracy on all held-out reals and fakes, and the mean logit of each."""
    discriminator.eval()                                                # no dropout
    real, fake = [], []
    for batch in val.in_order():
        with autocast():
            real_logit, fake_logit = verdicts(discriminator, generator, batch)
        real.append(real_logit)
        fake.append(fake_logit)
    discriminator.train()
    real, fake = torch.cat(real), torch.cat(fake)                       # (N,)
    return {"accuracy": accuracy_of(real, fake).item(),
            "real_logit": real.mean().item(), "fake_logit": fake.mean().item()}


def load_reals(config, tok):
    """The records of real texts: those of a file, or the puns of the pun world."""
    if config.data:
        return read_records(config.data, ["prompt", "completion"])
    # Puns alone: what is real here is what G shall learn to write.
    return tok.world.corpus(config.corpus_size, config.seed, mix={"pun": 1.0})


def train(config):
    """Runs the stage. Writes config.out_dir/ckpt.pt. Raises InputError for unusable input."""
    if config.reads not in ("tokens", "states"):
        raise InputError(f"--reads is tokens or states, not '{config.reads}'")
    device, autocast = setup(config)
    generator = freeze(load_model(config.init, device), config)     # writes the fakes
    tok, rng = tokenizer_of(generator), make_rng(device, config.seed)
    # Its own copy of the trunk, since it will change.
    discriminator = Discriminator(load_model(config.init), config.lstm, config.reads).to(device)

    # -- the same prompts for reals and fakes
    # Else D could tell them apart by what they are about.
    reals = load_reals(config, tok)
    n_val = min(1000, len(reals) // 5)
    if config.val_data:
        val_reals = read_records(config.val_data, ["prompt", "completion"])
        n_val, reals = len(val_reals), val_reals + reals
    encoded = encode_records(reals, tok, ["prompt", "completion"], generator.config.block_size)
    prompts = [record["prompt"] for record in reals]
    fakes = []
    for _, response in respond(generator, tok, prompts, rng, autocast, longest(encoded)):
        # The ids themselves: decoding and encoding again would leave traces to learn.
        fakes += [row[row != tok.pad_token_id].tolist() for row in response.cpu()]
    encoded["real"] = encoded.pop("completion")                         # (N, R)
    encoded["fake"] = pad_right(fakes, tok.pad_token_id)                # (N, R')
    # The first n_val records, real and fake, are held out.
    train_encoded = {field: ids[n_val:] for field, ids in encoded.items()}
    val_encoded = {field: ids[:n_val] for field, ids in encoded.items()}
    batches = Batches(train_encoded, config.batch_size, tok.pad_token_id, device, config.seed)
    val = Batches(val_encoded, 1, tok.pad_token_id, device, 0)

    discriminator.train()
    # AdamW, as for the reward model: the trunk has learned the language, and moves little.
    optimizer = adamw(discriminator, config.lr, config.weight_decay)

    def learn(batch):
        """One step on {prompt, real, fake}. Returns (loss, norm of the gradient)."""
        with autocast():
            real, fake = verdicts(discriminator, generator, batch)      # (B,) each
        loss = discriminator_loss(real, fake, config.label_smoothing)
        grad_norm = optimizer_step(loss, discriminator, optimizer, config.grad_clip)
        return loss.detach(), grad_norm

    learn = cuda_graph(learn, device)                   # on a CPU it stays what it is
    run = Run("discriminator", config)
    for step in run.steps(config.eval_interval, discriminator=discriminator, optimizer=optimizer,
                          batches=batches):
        is_last = step + 1 == config.max_steps
        set_lr(optimizer, config.lr, step, config.max_steps, config.warmup_steps)
        loss, grad_norm = learn(batches.next())

        if step % config.log_interval == 0 or is_last:
            run.log(loss=loss, grad_norm=grad_norm)
        if (step + 1) % config.eval_interval == 0 or is_last:
            # At 1.0 a generator would get no signal from it, at .5 it has learned nothing.
            run.log(**evaluate(discriminator, generator, val, autocast))

    save_discriminator(run.folder / "ckpt.pt", discriminator, tok, stage="discriminator")
    run.finish()


if __name__ == "__main__":
    command_line(lambda: train(tyro.cli(Config)))
