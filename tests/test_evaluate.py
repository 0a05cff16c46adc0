"""The report: its arithmetic, and that it is written."""

import collections
import json
import math
import random
import re
import shutil

import pytest
import torch
from conftest import CPU, ROOT, toy

import compare
import evaluate
import sft
from common import InputError
from evaluate import best_of, best_of_n_kl, interval, least_kl, markdown, self_bleu, summarize, training_curve
from model import ModelConfig, Scorer, build_model, load_model, save_model


def test_least_kl():
    """95 % from 28 %: .95 ln(.95 / .28) + .05 ln(.05 / .72) = 1.1605 - .1333 = 1.027; no change costs nothing; 100 % costs ln(1 / p0)."""
    assert least_kl(.95, .28) == pytest.approx(1.027, abs=1e-3)
    assert least_kl(.28, .28) == 0
    assert least_kl(1.0, .25) == pytest.approx(math.log(4)) and least_kl(0.0, .25) == pytest.approx(math.log(4 / 3))
    assert math.isnan(least_kl(.5, 0.0)) and math.isnan(least_kl(.5, 1.0))       # it cannot be known, and is no crash


def test_least_kl_is_reached_by_reweighting():
    """Of four texts with p0 = (.1, .2, .3, .4), the first two puns: scale the puns up and the others down. That policy has exactly this KL,
    and a thousand others with the same pun rate have no less."""
    p0, p = torch.tensor([.1, .2, .3, .4], dtype=torch.float64), .9
    best = torch.cat([p0[:2] * p / .3, p0[2:] * (1 - p) / .7])
    assert (best * (best / p0).log()).sum().item() == pytest.approx(least_kl(p, .3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        x, y = torch.rand(2, 2, dtype=torch.float64, generator=generator) + 1e-6
        other = torch.cat([p * x / x.sum(), (1 - p) * y / y.sum()])
        assert (other * (other / p0).log()).sum() >= least_kl(p, .3) - 1e-9


def test_best_of_n_kl():
    """ln 1 - 0 = 0; ln 2 - 1/2 = .19315; ln 16 - 15/16 = 1.83509."""
    assert [best_of_n_kl(n) for n in (1, 2, 16)] == pytest.approx([0, .19315, 1.83509], abs=1e-5)
    # the KL of the best of n texts with n different scores, n very many: the density n x^(n - 1) on [0, 1] against 1
    x = (torch.arange(200_000, dtype=torch.float64) + .5) / 200_000
    density = 4 * x ** 3
    assert (density * density.log()).mean().item() == pytest.approx(best_of_n_kl(4), abs=1e-4)


def test_interval():
    """0 and 1: variance 1/2 (unbiased), standard error sqrt(.5 / 2) = .5, so 1.96 * .5."""
    assert interval([0, 1]) == pytest.approx(.98) and interval([3, 3, 3]) == 0 and interval([5]) == 0


def brute_self_bleu(texts, n=4):
    texts, scores = [text.split() for text in texts], []
    for i in range(len(texts)):
        logs = []
        for order in range(1, n + 1):
            grams = [[tuple(other[k:k + order]) for k in range(len(other) - order + 1)] for other in texts]
            own = collections.Counter(grams[i])
            hits = sum(min(count, max(grams[j].count(gram) for j in range(len(texts)) if j != i)) for gram, count in own.items())
            logs.append(math.log(max(hits, .1) / max(len(grams[i]), 1)))
        scores.append(math.exp(sum(logs) / n))
    return sum(scores) / len(scores)


def test_self_bleu():
    assert self_bleu(["the old banker lost interest"] * 5) == pytest.approx(1)
    rng = random.Random(0)
    for size in (2, 3, 12):
        texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(size)]
        assert self_bleu(texts) == pytest.approx(brute_self_bleu(texts)), texts
    # two texts of four words without a word in common: .1 / 4, .1 / 3, .1 / 2, .1 / 1, fourth root of 1e-4 / 24
    assert self_bleu(["a b c d", "e f g h"]) == pytest.approx((1e-4 / 24) ** .25)
    many = ["a b c d e"] * 200 + [f"x{i} y{i} z{i} u{i}" for i in range(200)]
    assert self_bleu(many) == self_bleu(many)       # the sample of 300 is seeded


def row(text="t", score=0.0, **changes):
    return {"prompt": "p", "text": text, "kl": 0.0, "pun": 0.0, "on_topic": 1.0, "fluent": 1.0, "novel": 0.0, "length": 5, "score": score} | changes


def test_best_of_takes_the_best_of_the_first_n():
    groups = [[row(f"{g}{i}", score=s) for i, s in enumerate(scores)] for g, scores in (("a", [1, 3, 2, 9]), ("b", [5, 1, 1, 6]))]
    assert [r["text"] for r in best_of(groups, 2, .2)] == ["a1", "b0"] and [r["text"] for r in best_of(groups, 4, .2)] == ["a3", "b3"]
    assert all(r["kl"] == .2 for r in best_of(groups, 2, .2)) and groups[0][1]["kl"] == 0       # its own row is not touched


def test_summary_is_the_mean_over_all_rows():
    rows = [row("a", 1.0, pun=1.0, kl=2.0), row("b", 2.0), row("b", 6.0), row("c", 3.0)]
    table = summarize("x", rows, p0=.25)
    assert table["policy"] == "x" and table["pun"] == .25 and table["kl"] == .5 and table["score"] == 3 and table["distinct"] == .75
    assert table["pun_ci"] == pytest.approx(interval([1, 0, 0, 0])) and table["least_kl"] == 0


def test_training_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert training_curve(path) == []
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "pun": 0.5, "kl": 1.0, "score": 2.0}\n')
    assert [point["step"] for point in training_curve(path)] == [2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_ckpt):
    """A runs folder with an SFT model, a reward model and one other policy, evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sft").mkdir()
    shutil.copy(sft_ckpt, folder / "sft" / "ckpt.pt")
    torch.manual_seed(0)
    save_model(folder / "reward_model" / "ckpt.pt", Scorer(load_model(sft_ckpt)), tokenizer="puns")
    save_model(folder / "ppo" / "ckpt.pt", toy(vocab_size=4096, end_id=4095, start_id=4095, block_size=48), tokenizer="puns")
    (folder / "ppo" / "metrics.jsonl").write_text('{"step": 1, "pun": 0.1, "kl": 0.5, "score": 0.2}\n')
    config = evaluate.Config(out_dir=str(folder), reference=str(folder / "sft" / "ckpt.pt"), reward=str(folder / "reward_model" / "ckpt.pt"),
                             samples=12, best_of=(2, 4), **CPU)
    evaluate.main(config)
    return folder, config


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def test_the_report_is_written(runs):
    folder, _ = runs
    report = json.loads((folder / "report.json").read_text(), parse_constant=no_constant)      # NaN is not JSON
    assert [r["policy"] for r in report["rows"]] == ["sft", "best of 2", "best of 4", "ppo"]
    assert all(len(samples) == 10 for samples in report["samples"].values())
    by_name = {r["policy"]: r for r in report["rows"]}
    assert by_name["sft"]["kl"] == 0 and by_name["ppo"]["kl"] > 1 and by_name["best of 4"]["kl"] == pytest.approx(best_of_n_kl(4))
    assert by_name["sft"]["score"] <= by_name["best of 2"]["score"] <= by_name["best of 4"]["score"]
    assert report["curves"] == {"ppo": [{"step": 1, "pun": 0.1, "kl": 0.5, "score": 0.2}]}
    text = (folder / "report.md").read_text()
    assert "| sft |" in text and "**best of 2**" in text and "python evaluate.py" in text
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG") and not list(folder.glob("*.tmp"))


def test_the_same_seed_gives_the_same_report(runs):
    folder, config = runs
    first = json.loads((folder / "report.json").read_text())
    again = json.loads(json.dumps(evaluate.evaluate(config)))
    assert json.dumps(again) == json.dumps(first)
    assert markdown(again, "x") == markdown(first, "x")

# -----------------------------------------------------------------------------
# compare.py

def test_the_table_of_architectures(tmp_path, capsys):
    """Two seeds of gpt with 25 % and 50 % puns: 37.5 (25.0 to 50.0); one of t5, without a judge."""
    for name, pun in (("gpt-1", .25), ("gpt-2", .5), ("t5-1", None)):
        folder = tmp_path / name
        (folder / "sft").mkdir(parents=True)
        save_model(folder / "sft" / "ckpt.pt", toy())
        row = dict(policy="ppo", pun=pun, on_topic=1.0, fluent=1.0, novel=0.0, kl=1.0, least_kl=0.5, score=-.5, distinct=1.0, self_bleu=0.3)
        (folder / "report.json").write_text(json.dumps({"rows": [row]}))
    compare.main(tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[2].startswith("| gpt, 0.01 M | ppo | 2 | 37.5 (25.0 to 50.0) | 100.0 (100.0 to 100.0) |")
    assert lines[3].startswith("| t5, 0.01 M | ppo | 1 | - | 100.0 |") and "| -0.50 |" in lines[3]
    with pytest.raises(InputError, match="make compare"):
        compare.main(tmp_path / "gpt-1")


def test_the_architectures_that_are_compared_are_equally_large(tok):
    """Within 5 % of the default gpt, at the widths that the Makefile gives to make compare."""
    makefile = (ROOT / "Makefile").read_text()

    def parameters(arch, **sizes):
        default = sft.Config()
        sizes = {name: getattr(default, name) for name in ("n_layer", "n_head", "n_embd", "n_inner", "block_size")} | sizes
        return sum(p.numel() for p in build_model(ModelConfig(arch=arch, vocab_size=tok.vocab_size, **sizes)).parameters())
    for arch in ("palm", "t5"):
        found = re.search(rf"^SFT_{arch} *:= *(.*)$", makefile, re.M)
        options = found[1].replace("--", "").split() if found else []
        sizes = {name: int(value) for name, value in zip(options[::2], options[1::2], strict=True) if name != "lr"}
        assert parameters(arch, **sizes) == pytest.approx(parameters("gpt"), rel=0.05), arch
