"""Supervised fine-tuning: the loss by hand, what a run learns, and what each option does."""

import json
import math

import conftest
import pytest
import torch
import torch.nn as nn
from conftest import CPU, EOS, PAD, TINY_SFT, awake, close, ids, off, readable, records, tiny, toy

import sft
from common import InputError, check_options, read_jsonl
from data import Batches, encode_records, tokenizer, tokenizer_of
from model import load_model, logprobs, save_model
from puns import world

# -----------------------------------------------------------------------------
# the loss

def loss_of(model, completion, n_tokens=None):
    batch = {"prompt": ids([7, 8]).repeat(len(completion), 1), "completion": completion}
    return sft.sft_loss(model, batch, n_tokens or sft.count_tokens(model, batch))


def test_the_loss_is_a_mean_over_tokens():
    """Two tokens and four: (2 a + 4 b) / 6, in one batch or in two, with more pads or fewer."""
    short, long = ids([3, EOS, PAD, PAD]), ids([4, 5, 6, EOS])
    model, both = awake(toy()), torch.cat([short, long])
    a, b = loss_of(model, short)[0].item(), loss_of(model, long)[0].item()
    expected = pytest.approx((2 * a + 4 * b) / 6, abs=1e-5)
    assert loss_of(model, both)[0].item() == expected
    assert loss_of(model, nn.functional.pad(both, (0, 5), value=PAD))[0].item() == expected
    parts = [loss_of(model, part, n_tokens=6)[0].item() for part in (short, long)]
    assert sum(parts) == expected
    assert loss_of(model, both)[1].tolist() == pytest.approx([2 * a, 4 * b], abs=1e-4)


def test_evaluation_is_the_mean_over_records_in_eval_mode():
    """300 records in chunks of 256 and 44; the last 44 are short, and so cheap."""
    model = awake(toy(dropout=0.5)).train()
    completion = torch.randint(0, EOS, (300, 4))
    completion[256:, 1:] = PAD
    encoded = {"prompt": torch.ones(300, 2).long(), "completion": completion}
    found = sft.evaluate(model, Batches(encoded, 1, PAD, "cpu", 0), off)
    assert model.training
    nll = -logprobs(model.eval(), encoded["prompt"], completion).sum(dim=1)
    assert found == pytest.approx(nll.mean().item(), abs=1e-4)

# -----------------------------------------------------------------------------
# the stage

NAMES = ["owl", "cat", "dog", "cow", "ant", "bee", "fox", "hen", "pig", "rat", "bat", "cod", "eel",
         "elk", "emu", "ape"]


def texts_about(names):
    return [{"prompt": f"About {name}:", "completion": f" The {name} is." + " Oh!" * (i % 4)}
            for i, name in enumerate(names)]


VAL = texts_about(NAMES[1:5])       # known names, unseen texts


def run_of(folder, init, **changes):
    """One step on 16 records, all of them in one batch. Returns (metrics, model)."""
    data = {"data": records(folder / "texts.jsonl", texts_about(NAMES)),
            "val_data": records(folder / "val.jsonl", VAL)}
    sizes = {name: TINY_SFT[name] for name in ("n_layer", "n_inner", "n_head", "n_embd")}
    sizes |= data | dict(batch_size=16, grad_accum=1, max_steps=1, lr=1e-2, eval_interval=100)
    sft.train(tiny(sft, folder, init, **sizes | changes))
    return read_jsonl(folder / "metrics.jsonl"), load_model(folder / "ckpt.pt")


def nlls_of(model, rows):
    """(nll of each completion, its length in tokens): a second computation."""
    tok = tokenizer_of(model)
    encoded = encode_records(rows, tok, ["prompt", "completion"], model.config.block_size)
    completion = encoded["completion"].long()
    with torch.no_grad():
        nll = -logprobs(model, encoded["prompt"].long(), completion).sum(dim=1)
    return nll, (completion != tok.pad_token_id).sum(dim=1)


def test_it_learns_and_says_how_well(tmp_path):
    """From ln V a token on val_nll falls, and the saved model has the last one on --val_data."""
    rows, model = run_of(tmp_path, "", batch_size=8, max_steps=30, eval_interval=10)
    val_nll, loss = ([row[name] for row in rows if name in row] for name in ("val_nll", "loss"))
    assert val_nll[2] < 0.7 * val_nll[0] and loss[-1] < 0.3 * loss[0]
    assert val_nll[2] == pytest.approx(nlls_of(model, VAL)[0].mean().item(), 1e-3)
    assert loss[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.1)
    assert not any("kl" in row or "score" in row for row in rows)   # from what, and by whom?
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["prompt"] for row in samples[:4]] == [row["prompt"] for row in VAL]
    assert "About cat:" in (tmp_path / "samples.txt").read_text(encoding="utf-8")


def test_of_texts_without_a_judge_a_few_are_sampled(tmp_path):
    run_of(tmp_path, "", val_data=records(tmp_path / "many.jsonl", VAL * 20))       # 80 of them
    assert len(read_jsonl(tmp_path / "samples.jsonl")) == 64


def test_what_is_logged_is_of_all_batches_of_a_step(tmp_path, sft_ckpt):
    """Two batches of 8 are one of 16: the mean over tokens, and over records."""
    weights = []
    for n in (1, 2):
        rows, model = run_of(tmp_path, sft_ckpt, batch_size=16 // n, grad_accum=n, max_steps=4,
                             warmup_steps=2)
        nll, length = nlls_of(load_model(sft_ckpt), texts_about(NAMES))
        assert rows[0]["loss"] == pytest.approx((nll.sum() / length.sum()).item(), abs=1e-4)
        assert rows[0]["nll"] == pytest.approx(nll.mean().item(), abs=1e-4)
        assert [row["lr"] for row in rows if "lr" in row] == [5e-3, 1e-2, 1e-2, 5e-3]
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    close(*weights, atol=5e-3, rtol=0)      # a few of AdamW's steps, of 1e-2 each, differ in size


def test_options_of_training(tmp_path, sft_ckpt):
    def run(**options):
        return run_of(tmp_path, sft_ckpt, **options)

    conftest.check_train_options(run, "val_nll")
    plain, other_seed = (run(warmup_steps=0, seed=seed)[1].state_dict() for seed in (1337, 1))
    for name, w in plain.items():
        close(other_seed[name], w, atol=1e-3)           # one batch, in another order


def test_fine_tuning_has_defaults_of_its_own(tmp_path, sft_ckpt):
    """80 records are 2 batches of 32 an epoch. AdamW's first step changes each weight by lr; that
    of Muon, for random weights, changes those of the blocks by less."""
    data = records(tmp_path / "texts.jsonl", texts_about(NAMES * 5))

    def run(init=sft_ckpt, **options):
        given = dict(init=init, data=data, val_data=data, out_dir=str(tmp_path / "run")) | options
        sft.train(sft.Config(**readable(sft, CPU | given)))
        rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
        used = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
        val_nll = {row["step"]: row["val_nll"] for row in rows if "val_nll" in row}
        return used, val_nll, load_model(tmp_path / "run" / "ckpt.pt").state_dict()

    used, val_nll, _ = run()
    expected = dict(batch_size=32, grad_accum=1, lr=1e-4, max_steps=6, warmup_steps=0,
                    eval_interval=2)
    assert used | expected == used
    assert list(val_nll) == [2, 4, 6] and val_nll[2] > val_nll[4] > val_nll[6]
    used, val_nll, _ = run(epochs=5.5, lr=1e-3, eval_interval=7)
    assert used | dict(max_steps=11, warmup_steps=1, lr=1e-3) == used and list(val_nll) == [7, 11]
    used, _, _ = run("", **TINY_SFT | dict(max_steps=None, epochs=3, grad_accum=2))
    assert used["max_steps"] == 6           # 80 records in five batches of 16, two a step, thrice
    plan = sft.plan_steps(sft.fill_in(sft.Config(), **sft.FROM_SCRATCH), 10)    # of a new model
    assert (plan.max_steps, plan.warmup_steps, plan.eval_interval) == (4000, 100, 500)
    fine = sft.fill_in(sft.Config(init="x"), **sft.FINE_TUNING)
    assert fine.corpus_size == 20_000       # of the pun world, without --data
    assert plan.lr == 6e-3 and 4000 * plan.batch_size * plan.grad_accum == plan.corpus_size
    plan = sft.plan_steps(sft.Config(init="x", grad_accum=8), 3)        # less than one step
    assert (plan.max_steps, plan.eval_interval) == (3, 1)
    assert sft.plan_steps(sft.Config(grad_accum=1, epochs=0.01), 10).max_steps == 1
    with pytest.raises(InputError, match="leave one of them out"):
        run(epochs=1, max_steps=1)

    def change(init):
        options = TINY_SFT | dict(max_steps=1, warmup_steps=0)
        start, end = (run(init, **options | dict(lr=lr))[2] for lr in (0.0, 1e-2))
        return (end["h.0.mlp.c_fc.weight"] - start["h.0.mlp.c_fc.weight"]).abs().mean().item()

    assert change(sft_ckpt) == pytest.approx(1e-2, rel=0.05) and 0 < change("") < 0.5e-2


def test_options_of_a_new_model(tmp_path):
    """Dropout acts in training, also after --init, and not where the model is measured."""
    sizes = dict(n_layer=3, n_head=1, n_embd=16, n_inner=24, block_size=32, dropout=0.5)
    new, model = run_of(tmp_path, "", lr=0.0, **sizes)
    for name, value in sizes.items():
        assert getattr(model.config, name) == value
        with_init = sft.Config(init="x", **{name: value})
        conftest.refuses(f"--{name} has no effect with --init x", check_options, with_init)
    assert model.config.arch == "gpt" and run_of(tmp_path / "t5", "", arch="t5")[1].encoder
    init = str(tmp_path / "ckpt.pt")
    noisy, _ = run_of(tmp_path / "noisy", init, lr=0.0)
    long = records(tmp_path / "long.jsonl", [{"prompt": "Hi", "completion": "1 " * 19}] * 2)
    conftest.refuses("block holds 32", run_of, tmp_path / "long", init, data=long)
    model.config.dropout = 0.0
    save_model(tmp_path / "calm.pt", model, tokenizer_of(model))
    calm, _ = run_of(tmp_path / "calm", str(tmp_path / "calm.pt"), lr=0.0)
    for rows in (new, noisy):
        assert rows[0]["loss"] != pytest.approx(calm[0]["loss"], abs=1e-6)
        assert rows[1]["val_nll"] == pytest.approx(calm[1]["val_nll"], abs=1e-4)
        assert rows[1]["length"] == calm[1]["length"]


def test_a_new_model_ends_texts_with_the_token_of_its_tokenizer():
    for name in ("puns", "puns_large"):
        model, _ = sft.make_model(sft.Config(tokenizer=name), "cpu")
        assert model.config.eos_token_id == tokenizer(name).eos_token_id


def test_the_pun_world_is_the_default_corpus(tok):
    """Validation records are new draws."""
    train, val = sft.load_corpus(sft.Config(corpus_size=300), tok)
    assert len(train) == 300 and len(val) == 2000 and train != val[:300]
    assert sft.load_corpus(sft.Config(corpus_size=300, seed=1), tok)[0] != train
    for part in sft.load_corpus(sft.Config(corpus_size=300), tokenizer("puns_large")):
        assert not {row["prompt"] for row in part} <= tok.world.by_prompt.keys()


def test_the_judge_gets_more_samples(sft_ckpt):
    assert len(read_jsonl(sft_ckpt.replace("ckpt.pt", "samples.jsonl"))) == 256


def test_the_first_line_has_the_entropy_of_the_pun_world(tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise InputError("that is all")

    monkeypatch.setattr(sft, "prepare", stop)
    texts = records(tmp_path / "texts.jsonl", texts_about(NAMES * 5))
    for path, floor in (("", f", entropy of the grammar {world().entropy():.2f} nats\n"),
                        (texts, ", cpu\n")):
        with pytest.raises(InputError):
            sft.train(sft.Config(**readable(sft, TINY_SFT | dict(data=path))))
        assert capsys.readouterr().out.endswith(floor)
