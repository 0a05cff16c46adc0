"""The report: every column by hand, and the table, page and figure that are written."""

import collections
import dataclasses
import json
import math
import random
import re

import pytest
import torch
from conftest import CPU, copies, off, records, refuses, toy, with_another_tokenizer
from matplotlib.figure import Figure

import evaluate
from common import read_jsonl
from data import complete, tokenizer_of
from evaluate import best_of_n_kl, format_cells, interval, min_kl, self_bleu, summarize
from model import RewardModel, load_model, save_model

# -----------------------------------------------------------------------------
# arithmetic

def test_min_kl_by_hand():
    """95 % from 28 %: .95 ln(.95 / .28) + .05 ln(.05 / .72) = 1.1605 - .1333 = 1.027."""
    assert min_kl(.95, .28) == pytest.approx(1.027, abs=1e-3)
    assert min_kl(.28, .28) == 0
    assert min_kl(1.0, .25) == pytest.approx(math.log(4))
    assert min_kl(0.0, .25) == pytest.approx(math.log(4 / 3))
    assert math.isnan(min_kl(.5, 0.0)) and math.isnan(min_kl(.5, 1.0))


def test_best_of_n_kl_by_hand():
    """ln 1 - 0 = 0, ln 2 - 1/2 = .19315, ln 16 - 15/16 = 1.83509"""
    assert [best_of_n_kl(n) for n in (1, 2, 16)] == pytest.approx([0, .19315, 1.83509], abs=1e-5)


def test_interval_by_hand():
    """0 and 1: unbiased variance 1/2, standard error sqrt(.5 / 2) = .5, times 1.96."""
    assert interval([0, 1]) == pytest.approx(.98)
    assert interval([3, 3, 3]) == interval([5]) == 0


def bleu_by_brute_force(texts, i, max_n=4):
    """BLEU of text i against all others, by its definition."""
    logs = []
    for n in range(1, max_n + 1):
        grams = [[tuple(words[k:k + n]) for k in range(len(words) - n + 1)]
                 for words in map(str.split, texts)]
        others = grams[:i] + grams[i + 1:]
        hits = sum(min(count, max(other.count(gram) for other in others))
                   for gram, count in collections.Counter(grams[i]).items())
        logs.append(math.log(max(hits, .1) / max(len(grams[i]), 1)))
    return math.exp(sum(logs) / max_n)


def test_self_bleu():
    """Four words without a match: .1 / 4, .1 / 3, .1 / 2, .1 / 1, and the fourth root."""
    assert self_bleu(["the old banker lost interest"] * 5) == pytest.approx(1)
    assert self_bleu(["a b c d", "e f g h"]) == pytest.approx((1e-4 / 24) ** .25)
    rng = random.Random(0)
    for size in (2, 3, 12):
        texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(size)]
        expected = sum(bleu_by_brute_force(texts, i) for i in range(size)) / size
        assert self_bleu(texts) == pytest.approx(expected), texts
    many = ["a b c d e"] * 200 + [f"x{i} y{i} z{i} u{i}" for i in range(200)]
    assert self_bleu(many) == self_bleu(many) < .6  # of 300 at random, the same each time

# -----------------------------------------------------------------------------
# rows of the table

def row(text="t", score=0.0, **changes):
    return dict(prompt="p", text=text, kl=0.0, pun=0.0, on_topic=1.0, fluent=1.0, length=5,
                score=score) | changes


def test_best_of_takes_the_best_of_the_first_n():
    groups = [[row(f"{name}{i}", score) for i, score in enumerate(scores)]
              for name, scores in (("a", [1, 3, 2, 9]), ("b", [5, 1, 1, 6]))]
    for n, texts in ((2, ["a1", "b0"]), (4, ["a3", "b3"])):
        best = evaluate.best_of(groups, n)
        assert [(r["text"], r["kl"]) for r in best] == [(text, best_of_n_kl(n)) for text in texts]
    assert groups[0][1]["kl"] == 0                  # the draw itself is not touched
    filtered = [[row(kl=0.3), row(score=1.0, kl=0.5)]]
    assert evaluate.best_of(filtered, 2)[0]["kl"] == 0.5 + best_of_n_kl(2)


def test_every_column_by_hand():
    rows = [row("a", 1.0, pun=1.0, kl=2.0), row("b", 2.0, fluent=0.0, on_topic=0.0),
            row("b", 6.0, length=9), row("c", 3.0, fluent=0.0)]
    found = summarize("x", rows, p0=.1)
    expected = dict(policy="x", pun=.25, on_topic=.75, fluent=.5, kl=.5, score=3.0, length=6.0,
                    distinct=.75, min_kl=.25 * math.log(2.5) + .75 * math.log(.75 / .9),
                    self_bleu=self_bleu(["a", "b", "b", "c"]), pun_ci=interval([1, 0, 0, 0]),
                    kl_ci=interval([2, 0, 0, 0]), score_ci=interval([1, 2, 6, 3]))
    assert found == pytest.approx(expected)
    assert format_cells(found)[:5] == ["x", "25.0 ± 49.0", "75.0", "50.0", "0.50 ± 0.98"]
    assert format_cells(found)[5:] == ["0.09", "+3.00 ± 2.12", "75.0", "0.139"]


def test_without_a_judge_columns_are_unknown():
    rows = [{name: value for name, value in row(score=s).items()
             if name not in ("pun", "on_topic", "fluent")} for s in (1.0, 2.0)]
    found = summarize("x", rows, p0=math.nan)
    assert [found[name] for name in ("pun", "pun_ci", "on_topic", "min_kl")] == [None] * 4
    assert format_cells(found)[1:4] == ["-"] * 3 and json.dumps(found, allow_nan=False)


def test_training_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert evaluate.training_curve(path) == []
    records(path, [{"step": 1, "loss": 2}, {"step": 2, "kl": 1.0},
                   {"step": 3, "pun": .5, "kl": 1.0}])
    assert [point["step"] for point in evaluate.training_curve(path)] == [3]


def test_the_figure_shows_pun_rates_against_kl(tmp_path, monkeypatch):
    """The dashed line at 50 %: ln(.5 / .25) / 2 + ln(.5 / .75) / 2 = .1438."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure)
                        or savefig(figure, *args, **options))
    rows = [row(policy=name, pun=pun, kl=kl)
            for name, pun, kl in (("sft", .25, 0), ("best of 2", .5, .2), ("ppo", .75, 2))]
    curve = [dict(step=7, pun=.5, kl=1.5)]
    evaluate.draw_report(dict(p0=.25, rows=rows, curves={"ppo": curve}), tmp_path / "x.png")
    bound, *lines = [line.get_xydata().tolist() for line in figures[0].axes[0].lines]
    assert [kl for kl, percent in bound if percent == 50] == pytest.approx([.1438], abs=1e-4)
    assert [line for line in lines if line] == [[[0, 25], [.2, 50]], [[0, 25]], [[1.5, 50]],
                                                [[2, 75]]]


def test_a_star_is_a_pun():
    rows = [row(" A", pun=1.0, on_topic=0.0), row(" B")]
    page = evaluate.markdown(dict(rows=[], sampling=""), {"ppo": rows})
    assert "\n- * p A\n-   p B\n" in page

# -----------------------------------------------------------------------------
# the report

@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_ckpt, tok):
    """A runs folder with an SFT model, a reward model, another policy, and what is no policy."""
    folder = copies(tmp_path_factory.mktemp("runs"), sft_ckpt, "sft", "foreign")
    torch.manual_seed(0)
    save_model(folder / "reward_model" / "ckpt.pt", RewardModel(load_model(sft_ckpt)), tok)
    policy = load_model(sft_ckpt)
    with torch.no_grad():
        policy.h[0].mlp.c_proj.weight += 0.3 * torch.randn_like(policy.h[0].mlp.c_proj.weight)
    save_model(folder / "ppo" / "ckpt.pt", policy, tok)
    with_another_tokenizer(sft_ckpt, folder / "foreign" / "ckpt.pt")
    records(folder / "ppo" / "metrics.jsonl", [{"step": 1, "pun": .1, "kl": .5, "score": .2}])
    config = evaluate.Config(out_dir=str(folder), reference=str(folder / "sft" / "ckpt.pt"),
                             reward=str(folder / "reward_model" / "ckpt.pt"), samples=24,
                             best_of=(2, 4), **CPU)
    evaluate.main(config)
    return folder, config


def test_the_report_is_written(runs):
    folder, _ = runs
    text = (folder / "report.json").read_text(encoding="utf-8")
    report = json.loads(text, parse_constant=pytest.fail)       # NaN is not JSON
    assert [r["policy"] for r in report["rows"]] == ["sft", "best of 2", "best of 4", "ppo"]
    sft_row, best_2, best_4, ppo_row = report["rows"]
    assert sft_row["kl"] == 0 and best_4["kl"] == pytest.approx(best_of_n_kl(4))
    assert ppo_row["kl"] > 0.5                                  # to the reference
    assert sft_row["score"] < best_2["score"] < best_4["score"]
    assert report["curves"] == {"ppo": [{"step": 1, "pun": .1, "kl": .5, "score": .2}]}
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "| sft |" in page and "**best of 2**" in page and "python evaluate.py" in page
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.tmp"))
    samples = read_jsonl(folder / "report_samples.jsonl")
    n = collections.Counter(sample["policy"] for sample in samples)
    prompts = [sample["prompt"] for sample in samples if sample["policy"] == "ppo"]
    assert prompts != sorted(prompts)                           # the first few are of many topics
    assert n["sft"] == n["ppo"] == 24 and n["best of 2"] == 2 * n["best of 4"]
    scores = [sample["score"] for sample in samples if sample["policy"] == "ppo"]
    assert ppo_row["score"] == pytest.approx(sum(scores) / 24)
    texts = [sample["text"] for sample in samples if sample["policy"] == "ppo"]
    policy = load_model(folder / "ppo" / "ckpt.pt")
    rng = torch.Generator().manual_seed(1337)
    assert texts == complete(policy, tokenizer_of(policy), prompts, rng, off)


def test_the_same_seed_gives_the_same_report_and_says_what_is_left_out(runs, capsys, monkeypatch):
    folder, config = runs
    _, alone = evaluate.evaluate(dataclasses.replace(config, best_of=()))
    report, samples = evaluate.evaluate(config)
    assert samples["ppo"] == alone["ppo"]           # whatever else stands in the table
    first = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(report)) == first
    assert evaluate.markdown(report, samples) == (folder / "report.md").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert f"{folder}/reward_model/ckpt.pt: left out, a reward model is no policy" in out
    assert f"{folder}/foreign/ckpt.pt: left out, its tokenizer is not the one of" in out
    assert re.search(r"ppo +0\.0 ± 0\.0 +0\.0 ", out)
    # One of four draws is a pun; the SFT row is every fourth draw: its smallest KL is ln 4.
    monkeypatch.setattr(evaluate, "measure", lambda *args: [row(pun=float(i % 4 == 0))
                                                            for i in range(len(args[3]))])
    report, _ = evaluate.evaluate(config)
    assert report["p0"] == .25 and report["rows"][0]["min_kl"] == pytest.approx(math.log(4))
    other = with_another_tokenizer(config.reward, folder / "foreign" / "reward_model.pt")
    refuses("another tokenizer", evaluate.evaluate, dataclasses.replace(config, reward=other))


def test_options_of_the_sampling(runs, tmp_path):
    """The best token alone: one text a prompt, and no bound on kl. The user's prompts are used."""
    folder, config = runs
    data = records(tmp_path / "prompts.jsonl", [{"prompt": "About a banker:"}, {"prompt": "Hi"}])
    for changes, how in ((dict(temperature=0.0), "temperature 0,"), (dict(top_k=1), "top_k 1,"),
                         (dict(top_p=1e-6), "top_p 1e-06")):
        changes |= dict(data=data, samples=4, best_of=(), max_new_tokens=2)
        report, samples = evaluate.evaluate(dataclasses.replace(config, **changes))
        prompts = sorted(sample["prompt"] for sample in samples["ppo"])
        assert prompts == ["About a banker:"] * 2 + ["Hi"] * 2
        assert len({sample["text"] for sample in samples["ppo"]}) <= 2
        assert all(sample["length"] <= 2 for sample in samples["ppo"])
        assert [r["policy"] for r in report["rows"]] == ["sft", "ppo"]
        assert how in report["sampling"]
        assert report["rows"][1]["min_kl"] is report["p0"] is None and report["curves"] == {}
        assert all(math.isfinite(sample["kl"]) for sample in samples["ppo"])
    changes = dict(data=data, samples=4, best_of=(), max_new_tokens=8)
    found = [evaluate.evaluate(dataclasses.replace(config, temperature=0.9, seed=seed, **changes))
             for seed in (1, 2)]
    assert found[0][1] != found[1][1] and found[0][0]["curves"] == {}


def test_best_of_n_picks_among_answers_to_one_prompt(runs, monkeypatch):
    """Also where n does not divide the largest n: of three answers to each of 24 prompts."""
    found, best_of = {}, evaluate.best_of
    monkeypatch.setattr(evaluate, "best_of", lambda groups, n: found.update({n: groups})
                        or best_of(groups, n))
    evaluate.evaluate(dataclasses.replace(runs[1], best_of=(1, 2, 3)))
    assert {n: len(groups) for n, groups in found.items()} == {1: 72, 2: 24, 3: 24}
    for n, groups in found.items():
        assert all(len(group) == n for group in groups)
        assert all(row["prompt"] == group[0]["prompt"] for group in groups for row in group)

# -----------------------------------------------------------------------------
# --compare

def test_several_runs_in_one_table(tmp_path, tok):
    """Two seeds of gpt with 25 % and 50 % puns: 37.5 (25.0 to 50.0). One of t5, with no judge."""
    for name, pun in (("gpt-1", .25), ("gpt-2", .5), ("t5-1", None)):
        save_model(tmp_path / name / "sft" / "ckpt.pt", toy(), tok)
        row = dict(policy="ppo", pun=pun, on_topic=1.0, fluent=1.0, kl=1.0, min_kl=0.5, score=-.5,
                   distinct=1.0, self_bleu=0.3)
        report = json.dumps({"rows": [row]})
        (tmp_path / name / "report.json").write_text(report, encoding="utf-8")
    evaluate.main(evaluate.Config(compare=str(tmp_path)))
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| model | policy | seeds | pun % | on topic % |")
    assert lines[2].startswith("| gpt, 0.01 M | ppo | 2 | 37.5 (25.0 to 50.0) | 100.0 (100.0 to")
    assert lines[3].startswith("| t5, 0.01 M | ppo | 1 | - | 100.0 |") and "| -0.50 |" in lines[3]
    refuses("make compare", evaluate.compare, tmp_path / "gpt-1")


def test_each_panel_has_its_own_column_and_leaves_out_what_is_unknown(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(evaluate, "Figure", lambda **options: figures.append(
        Figure(**options)) or figures[0])
    rows = [row(policy="sft", pun=.25, score=3.0), row(policy="ppo", pun=None, score=4.0, kl=2.0)]
    curve = [dict(step=7, kl=1.5, pun=.5, score=3.5)]
    evaluate.draw_report(dict(p0=None, rows=rows, curves={"ppo": curve}), tmp_path / "x.png")
    gold, proxy = ({tuple(point) for line in axis.lines for point in line.get_xydata().tolist()}
                   for axis in figures[0].axes)
    assert gold == {(0, 25), (1.5, 50)} and proxy == {(0, 3), (1.5, 3.5), (2, 4)}
    assert ["proxy" in axis.get_ylabel() for axis in figures[0].axes] == [False, True]
