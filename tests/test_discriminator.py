"""The discriminator: what it reads, its loss by hand, and that it tells real texts from fakes."""

import math

import pytest
import torch
import torch.nn as nn
from conftest import EOS, PAD, awake, close, ids, off, records, tiny, toy

import discriminator
from common import InputError, read_jsonl
from data import Batches, complete, encode_records, tokenizer_of
from discriminator import (
    Discriminator,
    accuracy_of,
    discriminator_loss,
    load_discriminator,
    save_discriminator,
)
from model import load_model
from puns import world

PROMPT = ids([PAD, 1, 2], [3, 4, 5], [PAD, PAD, 6])
RESPONSE = ids([6, 7, EOS, PAD, PAD], [8, EOS, PAD, PAD, PAD], [9, 9, 9, 9, EOS])
MASK = RESPONSE != PAD

KINDS = [(lstm, reads) for lstm in (False, True) for reads in ("tokens", "states")]


def disc_of(lstm=False, reads="tokens", seed=0):
    """A discriminator whose verdicts differ visibly."""
    torch.manual_seed(seed)
    disc = Discriminator(awake(toy(seed)), lstm, reads).eval()
    nn.init.normal_(disc.classifier.weight)
    return disc

# -----------------------------------------------------------------------------
# what it reads

@pytest.mark.parametrize("lstm, reads", KINDS)
def test_padding_changes_no_verdict(lstm, reads):
    """Nor does what else is in the batch. One logit a response, (B,), for any B."""
    disc = disc_of(lstm, reads)
    states = awake(toy(seed=3)).hidden(PROMPT, RESPONSE)
    logits = disc(PROMPT, RESPONSE, states)
    assert logits.shape == (3,) and logits.dtype == torch.float32
    wide = torch.cat([RESPONSE, torch.full((3, 4), PAD)], dim=1)
    left = torch.cat([torch.full((3, 2), PAD), PROMPT], dim=1)
    garbage = states.masked_fill(~MASK[..., None], 7.0)
    garbage = torch.cat([garbage, torch.full((3, 4, 32), -3.0)], dim=1)
    for prompt, response in ((PROMPT, wide), (left, RESPONSE), (left, wide)):
        close(disc(prompt, response, garbage[:, :response.size(1)]), logits)
    close(disc(ids([1, 2]), ids([6, 7, EOS]), states[:1, :3]), logits[:1])
    close(disc(ids([3, 4, 5]), ids([8, EOS]), states[1:2, :2]), logits[1:2])


@pytest.mark.parametrize("lstm", [False, True])
def test_the_verdict_depends_on_prompt_and_every_token(lstm):
    disc = disc_of(lstm)
    logit = disc(ids([1, 2]), ids([6, 7, EOS]))
    for prompt, response in (([1, 3], [6, 7, EOS]), ([1, 2], [5, 7, EOS]), ([1, 2], [6, 5, EOS]),
                             ([1, 2], [6, 7, 5])):
        assert (disc(ids(prompt), ids(response)) - logit).abs() > 1e-4, (prompt, response)


@pytest.mark.parametrize("lstm", [False, True])
def test_the_verdict_depends_on_every_state(lstm):
    disc, states = disc_of(lstm, "states"), torch.randn(3, 5, 32, requires_grad=True)
    disc(PROMPT, RESPONSE, states).sum().backward()
    size = states.grad.abs().sum(-1)
    assert (size[MASK] > 1e-6).all() and (size[~MASK] == 0).all()


@pytest.mark.parametrize("lstm", [False, True])
def test_embeddings_are_read_as_their_tokens(lstm):
    """The same verdict, and a gradient to those of every real token, the last one included."""
    disc = disc_of(lstm)
    embeddings = disc.model.embed(RESPONSE).detach().requires_grad_()
    logits = disc(PROMPT, RESPONSE, embeddings=embeddings)
    close(logits, disc(PROMPT, RESPONSE))
    logits.sum().backward()
    size = embeddings.grad.abs().sum(-1)
    assert (size[MASK] > 1e-6).all() and (size[~MASK] == 0).all()


@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_a_new_discriminator_is_a_coin(reads):
    """Its classifier starts small, so its loss starts near ln 2 = .693."""
    model = toy()
    disc, states = Discriminator(model, reads=reads), model.hidden(PROMPT, RESPONSE)
    real = disc(PROMPT, RESPONSE, states)
    fake = disc(PROMPT, RESPONSE.roll(1, 0), states.roll(1, 0))
    assert discriminator_loss(real, fake).item() == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize("lstm, reads", KINDS)
def test_a_discriminator_comes_back_from_its_file(tmp_path, tok, lstm, reads):
    disc, states = disc_of(lstm, reads), torch.randn(3, 5, 32)
    save_discriminator(tmp_path / "ckpt.pt", disc, tok)
    again = load_discriminator(tmp_path / "ckpt.pt")
    assert torch.equal(again(PROMPT, RESPONSE, states), disc(PROMPT, RESPONSE, states))
    assert not again.training and again.reads == reads
    with pytest.raises(InputError, match="make it with: python discriminator.py"):
        load_discriminator(tmp_path / "discriminator" / "ckpt.pt")

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


def test_accuracy_by_hand():
    """Two of three reals, one of two fakes: (2/3 + 1/2) / 2. A logit of 0 is no real."""
    found = accuracy_of(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0]))
    assert found.item() == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_evaluation_counts_all_records():
    """300 records, more than a batch of 256: all reals are right, and 270 of the fakes."""
    class Fixed(nn.Module):
        def forward(self, prompt, response):
            fake = torch.where(prompt[:, 0] < 270, -2.0, 4.0)
            return torch.where(response[:, 0] == 2, fake, 1.0)

    encoded = {"prompt": torch.arange(300)[:, None], "real": torch.ones(300, 1),
               "fake": torch.full((300, 1), 2)}
    disc = Fixed()
    metrics = discriminator.evaluate(disc, Batches(encoded, 1, 999, "cpu", 0), off)
    expected = {"accuracy": .95, "real_logit": 1.0, "fake_logit": (-2 * 270 + 4 * 30) / 300}
    assert metrics == pytest.approx(expected) and disc.training

# -----------------------------------------------------------------------------
# the stage

def reals(n, first=0):
    """Real texts that no fake looks like: an owl, a few times."""
    things = world().things[first:first + n]
    return [{"prompt": world().prompt(thing), "completion": " An owl!" + " Oh!" * (i % 3)}
            for i, thing in enumerate(things)]


def run_of(folder, sft_ckpt, rows=None, **changes):
    """A short run. Returns (metrics, the discriminator)."""
    data = records(folder / "reals.jsonl", rows or reals(40))
    sizes = dict(data=data, batch_size=16, max_steps=25, lr=5e-3, eval_interval=25)
    discriminator.train(tiny(discriminator, folder, sft_ckpt, **sizes | changes))
    return read_jsonl(folder / "metrics.jsonl"), load_discriminator(folder / "ckpt.pt")


@pytest.mark.parametrize("lstm", [False, True])
def test_it_tells_real_texts_from_fakes(tmp_path, sft_ckpt, tok, lstm):
    """On held-out texts, and, loaded again, on new ones."""
    metrics, disc = run_of(tmp_path, sft_ckpt, lstm=lstm)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert metrics[-2]["loss"] < 0.4 and metrics[-1]["accuracy"] > 0.8
    assert metrics[-1]["real_logit"] > 0.5 and metrics[-1]["fake_logit"] < -0.5
    rows = reals(30, first=50)
    prompts = [row["prompt"] for row in rows]
    fakes = complete(load_model(sft_ckpt), tok, prompts, torch.Generator().manual_seed(7), off)
    for row, fake in zip(rows, fakes, strict=True):
        row["fake"] = fake + " "                # an empty text is no record
    encoded = encode_records(rows, tok, ["prompt", "completion", "fake"], 48)
    encoded = {field: encoded[field].long() for field in encoded}
    with torch.no_grad():
        real, fake = (disc(encoded["prompt"], encoded[field]) for field in ("completion", "fake"))
    assert accuracy_of(real, fake) > 0.8


def test_fakes_answer_the_prompts_of_the_reals(tmp_path, sft_ckpt, tok, monkeypatch):
    """Same prompts, same end token, no record in training and in validation."""
    seen = []

    class Noted(Batches):
        def __init__(self, encoded, *args):
            seen.append(encoded)
            super().__init__(encoded, *args)

    prompts, respond = [], discriminator.respond

    def respond_and_note(model, tok, texts, *args):
        prompts.extend(texts)
        return respond(model, tok, texts, *args)

    monkeypatch.setattr(discriminator, "Batches", Noted)
    monkeypatch.setattr(discriminator, "respond", respond_and_note)
    rows = reals(40)
    run_of(tmp_path, sft_ckpt, rows, max_steps=1)
    train, val = seen
    assert len(train["prompt"]) == 32 and len(val["prompt"]) == 8       # a fifth is held out
    noted = [dict(zip(encoded, values, strict=True)) for encoded in (val, train)
             for values in zip(*encoded.values(), strict=True)]
    assert [tok.decode(row["prompt"]) for row in noted] == [row["prompt"] for row in rows]
    assert [tok.decode(row["real"]) for row in noted] == [row["completion"] for row in rows]
    assert prompts == [row["prompt"] for row in rows]
    assert len({tok.decode(row["fake"]) for row in noted}) > 20
    pad, eos = tok.pad_token_id, tok.eos_token_id
    for row in noted:
        assert eos in row["real"]
        assert eos in row["fake"] or (row["fake"] != pad).sum() == 32


def test_val_data_is_what_is_held_out(tmp_path, sft_ckpt):
    """Held-out "reals" that look like no training text are taken for fakes."""
    texts = complete(load_model(sft_ckpt), tokenizer_of(load_model(sft_ckpt)),
                     [row["prompt"] for row in reals(20)], None, off)
    rows = [row | {"completion": text + " "} for row, text in zip(reals(20), texts, strict=True)]
    val_data = records(tmp_path / "val.jsonl", rows)
    metrics, _ = run_of(tmp_path, sft_ckpt, val_data=val_data)
    assert metrics[-1]["accuracy"] < 0.7 and metrics[-1]["real_logit"] < -0.5


def test_options_of_the_optimizer(tmp_path, sft_ckpt):
    """What each of them does to the weights after one step from the same start."""
    def weights(**changes):
        sizes = dict(max_steps=1, lr=1e-2, weight_decay=0.0, batch_size=32, lstm=True) | changes
        return dict(run_of(tmp_path, sft_ckpt, **sizes)[1].named_parameters())

    start, plain, decayed = weights(lr=0.0), weights(), weights(weight_decay=0.1)
    clipped, smooth = weights(grad_clip=1e-10), weights(label_smoothing=0.9)
    for name, w in start.items():
        assert not torch.equal(plain[name], w)
        decay = 1e-2 * 0.1 * w if w.dim() == 2 else 0
        close(decayed[name], plain[name] - decay, atol=1e-6)
    head = [x["classifier.weight"] for x in (start, plain, clipped)]
    assert (head[1] - head[0]).abs().max() > 0.9e-2 and (head[2] - head[0]).abs().max() < 1e-3
    # With targets of .1 and 0, the bias falls; with 1 and 0 it stays about where it was.
    assert smooth["classifier.bias"] < -0.9e-2


def test_reals_of_the_pun_world_are_puns():
    rows = discriminator.load_reals(discriminator.Config(corpus_size=50))
    assert len(rows) == 50
    assert all(world().judge(row["prompt"], row["completion"]).pun for row in rows)


def test_fakes_that_fill_the_block_fit(tmp_path, sft_ckpt):
    """Prompts of 40 tokens leave 8 for a fake, and many a fake has no end token then."""
    run_of(tmp_path, sft_ckpt, [{"prompt": "1 " * 20, "completion": " no"}] * 20, max_steps=1)
