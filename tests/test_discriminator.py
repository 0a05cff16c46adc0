"""The discriminator: what it reads, its loss by hand, and that it tells real texts from fakes."""

import math

import conftest
import pytest
import torch
import torch.nn as nn
from conftest import PAD, PROMPT, RESPONSE, awake, close, disc_of, off, owls, records, tiny, toy

import discriminator
from common import read_jsonl
from data import Batches, complete, encode_records, tokenizer_of
from discriminator import Discriminator, discriminator_loss, load_discriminator, states_for
from model import load_model, save_model
from optim import set_lr
from puns import world

MASK = RESPONSE != PAD
KINDS = [(lstm, reads) for lstm in (False, True) for reads in ("tokens", "states")]

# -----------------------------------------------------------------------------
# what it reads

@pytest.mark.parametrize("lstm, reads", KINDS)
def test_padding_changes_no_verdict(lstm, reads):
    """Nor does what else is in the batch. One logit a response, (B,), for any B."""
    disc = disc_of(lstm, reads)
    states = torch.randn(3, 4, 32)
    logits = disc(PROMPT, RESPONSE, states)
    assert logits.shape == (3,) and logits.dtype == torch.float32
    wide = torch.cat([RESPONSE, torch.full((3, 4), PAD)], dim=1)
    left = torch.cat([torch.full((3, 2), PAD), PROMPT], dim=1)
    garbage = states.masked_fill(~MASK[..., None], 7.0)
    garbage = torch.cat([garbage, torch.full((3, 4, 32), -3.0)], dim=1)
    close(disc(left, wide, garbage), logits)
    close(disc(PROMPT[:1, 2:], RESPONSE[:1, :3], states[:1, :3]), logits[:1])
    other = disc(PROMPT.flip(0), RESPONSE, states)          # the prompt matters, not by itself
    assert ((other - logits).abs() > 1e-4).tolist() == [reads == "tokens", False, reads == "tokens"]


def test_states_have_read_the_token():
    """[:, t] is the state that has read response[:, :t + 1], and predicts what comes next."""
    disc, generator = disc_of(reads="states"), awake(toy(seed=3))
    states = states_for(disc, generator, PROMPT, RESPONSE)
    close(states[:, :-1], generator.hidden(PROMPT, RESPONSE)[:, 1:])
    again = torch.cat([PROMPT[1:2], RESPONSE[1:2]], dim=1)          # no pads: all is prompt
    close(states[1, -1], generator.hidden(again, torch.tensor([[0]]))[0, 0])
    assert states_for(disc_of(), generator, PROMPT, RESPONSE) is None


def test_two_blocks_read_states_both_ways():
    """The verdict at the first token changes with the last one; pads are at the end."""
    disc, states = disc_of(reads="states"), torch.randn(3, 4, 32)
    other = states.clone()
    other[1, 3] = torch.randn(32)               # the last token of the second response
    first = [disc.read_states(x, MASK)[1, 0] for x in (states, other)]
    assert (first[0] - first[1]).abs().max() > 1e-4
    assert len(disc.blocks) == 2 and not disc_of().blocks


@pytest.mark.parametrize("lstm, reads", KINDS)
def test_a_gradient_reaches_what_it_reads(lstm, reads):
    """The embeddings in place of the tokens, or the states: all real ones, no pad."""
    disc = disc_of(lstm, reads)
    x = torch.randn(3, 4, 32) if reads == "states" else disc.model.embed(RESPONSE).detach()
    x.requires_grad_()
    logits = disc(PROMPT, RESPONSE, **{"states" if reads == "states" else "embeddings": x})
    if reads == "tokens":
        close(logits, disc(PROMPT, RESPONSE))
    logits.sum().backward()
    size = x.grad.abs().sum(-1)
    assert (size[MASK] > 1e-6).all() and (size[~MASK] == 0).all()


@pytest.mark.parametrize("lstm, reads", KINDS)
def test_a_discriminator_starts_as_a_coin_and_comes_back_from_its_file(tmp_path, tok, lstm, reads):
    disc, states = Discriminator(toy(), lstm, reads).eval(), torch.randn(3, 4, 32)
    logits = disc(PROMPT, RESPONSE, states)
    assert discriminator_loss(logits, logits.roll(1)).item() == pytest.approx(.693, abs=0.05)
    discriminator.save_discriminator(tmp_path / "ckpt.pt", disc, tok)
    again = load_discriminator(tmp_path / "ckpt.pt")
    assert torch.equal(again(PROMPT, RESPONSE, states), logits)
    assert not again.training and again.reads == reads and (again.lstm is None) == (not lstm)
    new = Discriminator(toy())
    assert new.lstm is None and new.classifier.weight.std() < 0.04 and not new.classifier.bias.any()

# -----------------------------------------------------------------------------
# loss and accuracy

def test_the_loss_by_hand():
    """Half of: mean of log(1 + e^-2) and log(1 + e^1) on reals; log(1 + e^0), log(1 + e^-3)."""
    def cost(x):
        return math.log1p(math.exp(-x))

    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.0, -3.0])
    on_fakes = (cost(0) + cost(3)) / 2
    expected = ((cost(2) + cost(-1)) / 2 + on_fakes) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    # Smoothing of .1: a real of logit x costs .9 cost(x) + .1 cost(-x); a fake what it always does.
    smooth = .9 * (cost(2) + cost(-1)) / 2 + .1 * (cost(-2) + cost(1)) / 2
    found = discriminator_loss(real, fake, 0.1).item()
    assert found == pytest.approx((smooth + on_fakes) / 2)
    far = torch.tensor([300.0])                 # no logarithm of a sigmoid that is rounded to 1
    assert discriminator_loss(far, far).item() == pytest.approx(150)
    with pytest.raises(AssertionError):
        discriminator_loss(torch.zeros(3), torch.zeros(3, 1))


def test_evaluation_by_hand():
    """300 records, more than a batch of 256: 290 reals are right, and 270 of the fakes; a logit of
    0 is no real."""
    class Fixed(nn.Module):
        reads = "tokens"

        def forward(self, prompt, response, states):
            assert torch.equal(response % 1000, prompt)     # each text with its own prompt
            fake = torch.where(prompt[:, 0] < 270, 0.0, 4.0)
            real = torch.where(prompt[:, 0] < 290, 1.0, 0.0)
            return torch.where(response[:, 0] >= 1000, fake, real)

    numbers = torch.arange(300)[:, None]
    encoded = {"prompt": numbers, "real": numbers, "fake": 1000 + numbers}
    disc = Fixed()
    metrics = discriminator.evaluate(disc, None, Batches(encoded, 1, 999, "cpu", 0), off)
    expected = {"accuracy": (29 / 30 + 27 / 30) / 2, "real_logit": 29 / 30, "fake_logit": .4}
    assert metrics == pytest.approx(expected) and disc.training

# -----------------------------------------------------------------------------
# the stage

def run_of(folder, sft_ckpt, rows=None, **changes):
    """A short run. Returns (metrics, the discriminator)."""
    data = records(folder / "reals.jsonl", rows or owls(40))
    sizes = dict(data=data, batch_size=16, max_steps=25, lr=5e-3, eval_interval=25)
    discriminator.train(tiny(discriminator, folder, sft_ckpt, **sizes | changes))
    return read_jsonl(folder / "metrics.jsonl"), load_discriminator(folder / "ckpt.pt")


@pytest.mark.parametrize("lstm, reads", KINDS)
def test_it_tells_real_texts_from_fakes(tmp_path, sft_ckpt, tok, lstm, reads):
    """On held-out texts, and, loaded again, on new ones."""
    metrics, disc = run_of(tmp_path, sft_ckpt, lstm=lstm, reads=reads)
    assert disc.reads == reads and (disc.lstm is None) == (not lstm)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert metrics[-2]["loss"] < 0.4 and metrics[-1]["accuracy"] > 0.8
    assert metrics[-1]["real_logit"] > 0.5 and metrics[-1]["fake_logit"] < -0.5
    rows, generator = owls(30, first=50), load_model(sft_ckpt)
    prompts = [row["prompt"] for row in rows]
    fakes = complete(generator, tok, prompts, torch.Generator().manual_seed(7), off)
    for row, fake in zip(rows, fakes, strict=True):
        row |= {"real": row["completion"], "fake": fake + " "}      # an empty text is no record
    encoded = encode_records(rows, tok, ["prompt", "real", "fake"], 48)
    batch = {field: encoded[field].long() for field in encoded}
    assert discriminator.accuracy_of(*discriminator.verdicts(disc, generator, batch)) > 0.8


def test_fakes_answer_the_prompts_of_the_reals(tmp_path, sft_ckpt, tok, monkeypatch):
    """Same prompts, same end token, the first fifth held out, no record twice."""
    seen = []

    class Noted(Batches):
        def __init__(self, encoded, *args):
            seen.append(encoded)
            super().__init__(encoded, *args)

    monkeypatch.setattr(discriminator, "Batches", Noted)
    rows = owls(40)
    run_of(tmp_path, sft_ckpt, rows, max_steps=1)
    train, val = seen
    prompts, reals, fakes = ([*val[field], *train[field]] for field in ("prompt", "real", "fake"))
    assert len(val["prompt"]) == 8 and len(prompts) == 40
    assert [tok.decode(ids) for ids in prompts] == [row["prompt"] for row in rows]
    assert [tok.decode(ids) for ids in reals] == [row["completion"] for row in rows]
    rng = torch.Generator().manual_seed(1337)
    assert [tok.decode(ids) for ids in fakes] == complete(
        load_model(sft_ckpt), tok, [row["prompt"] for row in rows], rng, off)
    assert all(tok.eos_token_id in ids for ids in reals)
    assert sum(tok.eos_token_id in ids for ids in fakes) > 20


def test_val_data_is_what_is_held_out(tmp_path, sft_ckpt):
    """Held-out "reals" that look like no training text are taken for fakes."""
    texts = complete(load_model(sft_ckpt), tokenizer_of(load_model(sft_ckpt)),
                     [row["prompt"] for row in owls(20)], None, off)
    rows = [row | {"completion": text + " "} for row, text in zip(owls(20), texts, strict=True)]
    val_data = records(tmp_path / "val.jsonl", rows)
    metrics, _ = run_of(tmp_path, sft_ckpt, val_data=val_data)
    assert metrics[-1]["accuracy"] < 0.7 and metrics[-1]["real_logit"] < -0.5


def test_all_of_val_data_is_held_out(tmp_path, sft_ckpt, monkeypatch):
    seen = []
    monkeypatch.setattr(discriminator, "Batches", lambda encoded, *args: seen.append(
        len(encoded["prompt"])) or Batches(encoded, *args))
    val_data = records(tmp_path / "val.jsonl", (owls(400) * 5)[:1001])
    run_of(tmp_path, sft_ckpt, max_steps=1, val_data=val_data)
    assert seen == [40, 1001]


def test_the_rate_rises_and_falls(tmp_path, sft_ckpt, monkeypatch):
    rates = []
    monkeypatch.setattr(discriminator, "set_lr", lambda *args: rates.append(set_lr(*args)))
    run_of(tmp_path, sft_ckpt, max_steps=4, warmup_steps=2, lr=1e-3)
    assert rates == pytest.approx([.5e-3, 1e-3, 1e-3, .5e-3])


def test_every_option_changes_what_it_should(tmp_path, sft_ckpt):
    """The weights after one step from the same start."""
    def run(**changes):
        return run_of(tmp_path, sft_ckpt, **dict(max_steps=1, lr=1e-2, warmup_steps=0) | changes)

    conftest.check_train_options(run, "accuracy", logged="loss")
    run(reads="states", dtype="bfloat16")           # both sides of it in the same numbers
    # With targets of .1 and 0, the bias falls; with 1 and 0 it stays about where it was.
    assert run(label_smoothing=0.9)[1].classifier.bias < -0.9e-2
    plain = run()[1].classifier.weight
    table = [dict(batch_size=8), dict(seed=1), dict(max_steps=2)]
    for changes in table:
        assert not torch.equal(run(**changes)[1].classifier.weight, plain)
    elsewhere = {"data", "val_data", "lstm", "reads", "init", "out_dir", "corpus_size",
                 "label_smoothing", "device", "dtype"}      # here, above, below, test_stages.py
    tested = set().union(*table, conftest.TRAIN_OPTIONS, elsewhere)
    assert tested == conftest.options_of(discriminator)


def test_dropout_acts_in_training_alone(tmp_path, sft_ckpt, tok):
    model = load_model(sft_ckpt)
    model.config.dropout = 0.5
    save_model(tmp_path / "sft.pt", model, tok)
    calm, noisy = (run_of(tmp_path, init, max_steps=1, lr=0.0)[0]
                   for init in (sft_ckpt, str(tmp_path / "sft.pt")))
    assert noisy[0]["loss"] != pytest.approx(calm[0]["loss"], abs=1e-6)
    assert noisy[1]["real_logit"] == pytest.approx(calm[1]["real_logit"], abs=1e-5)


def test_reals_of_the_pun_world_are_puns(tok):
    rows = discriminator.load_reals(discriminator.Config(corpus_size=50), tok)
    assert len(rows) == 50
    assert all(world().judge(row["prompt"], row["completion"]).pun for row in rows)
    others = discriminator.load_reals(discriminator.Config(corpus_size=50, seed=1), tok)
    assert others != rows


@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_fakes_that_fill_the_block_fit(tmp_path, sft_ckpt, reads):
    """Prompts of 40 tokens leave 8 for a fake, and many a fake has no end token then."""
    rows = [{"prompt": "1 " * 20, "completion": " no"}] * 20
    run_of(tmp_path, sft_ckpt, rows, max_steps=1, reads=reads)
