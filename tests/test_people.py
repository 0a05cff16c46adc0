"""The reward model of people's taste: its yardsticks by hand, and the whole road on puns of our own."""

import json
import math
import random

import pytest
import torch
from test_corpora import write_expun

import people
from common import InputError
from realpuns import Pun


def test_the_linear_model_finds_what_matters():
    rng = random.Random(0)
    texts = [" ".join(rng.sample("bread rose while bakers sang loudly about dough and flour".split(), 6)) for _ in range(120)]
    known = [Pun(str(i), text, "heterographic", "dough" in text, "dough" * ("dough" in text), "doe" * ("dough" in text), "dough",
                 (text.find("dough"), text.find("dough") + 5), part="full") for i, text in enumerate(texts[:80])]
    others = texts[80:] + ["a bigger cat", "a big cat"]        # words that are in no known text
    pairs = [{"chosen": " " + a.text, "rejected": " " + b.text, "share": 0.9} for a, b in rng.sample(
        [(a, b) for a in known for b in known if a.is_pun and not b.is_pun], 200)]
    found = people.yardsticks(known, others, {pun.id: float(pun.is_pun) for pun in known}, pairs)
    for name in ("linear, pun or not", "linear, ratings", "linear, comparisons"):
        score = dict(zip(others, found[name].tolist(), strict=True))
        assert people.metrics.auc([score[text] for text in others if "dough" in text],
                                  [score[text] for text in others[:40] if "dough" not in text]) > 0.95
    assert found["the longer one"].tolist() == [6.0] * 40 + [3.0] * 2 and found["more letters"][-2:].tolist() == [12.0, 9.0]
    assert found["linear, twins"][-2] > found["linear, twins"][-1]                      # each twin was two letters shorter


def test_rarity_by_hand():
    """"the" stands in both puns, "sole" and "mate" in one, "soul" in none. A text's own pun does not count, be it the pun or its twin."""
    rarity = people.rarity([Pun("a", "The sole.", "heterographic", True, "sole", "soul", "sole", (4, 8)), Pun("b", "the mate", "", True)])
    assert rarity("the mate sole the") == pytest.approx(-math.log(3) - 2 * math.log(2)) and rarity("cod") == 0
    assert rarity("The sole.") == rarity("The soul.") == pytest.approx(-math.log(2))


def test_standardised_by_hand():
    """Rater 0 says 0, 2 (mean 1, deviation 1), rater 1 says 3, 4 (3.5, .5)."""
    puns = [Pun("a", "x", "", True, ratings=(0, 3), raters=(0, 1)), Pun("b", "y", "", True, ratings=(2, 4), raters=(0, 1))]
    assert people.standardised(puns) == pytest.approx({"a": -1, "b": 1})


def rated(name, text, ratings, is_pun=True):
    return Pun(name, text, "homographic", is_pun, part="full", raters=(0, 1), ratings=ratings)


def test_measures_by_hand():
    puns = [rated("a", "one two three", (2, 2)), rated("b", "one two", (1, 1)), rated("c", "one two four five", (0, 0)), rated("d", "six two five", (0, 1), False)]
    z = {"a": 3, "b": 2, "c": 0, "d": 1}
    row = people.measures(puns, {"one two three": 3.0, "one two": 1.0, "one two four five": 2.0, "six two five": 0.0}, z)
    assert row["AUC, pun or not"] == 1 and row["AUC, as many words"] == 1                  # a above d, both of three words
    # margins: a b 1, a c 2, a d 1.5, b c 1, b d .5, d c .5; the wrong ones are b c and d c
    assert row["raters, margin 0.4"] == 4 / 6 and row["raters, margin 1.0"] == 3 / 4
    assert row["raters, margin 1.0, two puns"] == 2 / 3 and row["raters, margin 0.4, two puns within a word"] == 1       # a b, a c: b c are two words apart
    # ranks of the scores 4 2 3 1, of the ratings 4 3 1 2: 1 - 6 (0 + 1 + 4 + 1) / (4 * 15)
    assert row["Spearman, mean rating"] == pytest.approx(0.4) == row["Spearman, standardised raters"]


def test_what_length_explains_is_taken_out():
    """Scores and ratings that only follow length have no correlation left; ones that follow each other beside it keep theirs."""
    rng = random.Random(0)
    n = [rng.randint(1, 30) for _ in range(300)]
    texts = [f"{i} " + "w " * (k - 1) for i, k in enumerate(n)]
    for both in (False, True):
        noise = [rng.gauss(0, 3) for _ in n]
        puns = [rated(str(i), texts[i], (n[i] + noise[i] * both + rng.gauss(0, 1),) * 2, i % 2 == 0) for i in range(300)]
        scores = {texts[i]: n[i] + noise[i] * both + rng.gauss(0, 1) for i in range(300)}
        row = people.measures(puns, scores, {str(i): 0 for i in range(300)})
        assert row["Spearman, mean rating"] > 0.9
        assert (row["Spearman, mean rating, length fixed"] > 0.5) if both else abs(row["Spearman, mean rating, length fixed"]) < 0.2


def test_together_by_hand():
    """Standardized, 1 2 3 is -1 0 1 and 20 10 30 is 0 -1 1: three times the first and once the second is -3 -1 4, whatever the units."""
    assert people.together(torch.tensor([1., 2, 3]), torch.tensor([20., 10, 30])).tolist() == pytest.approx([-3, -1, 4])


def test_calibration(tmp_path):
    torch.manual_seed(0)
    sure = torch.rand(4000) / 2 + 0.5
    honest = [(p, float(hit)) for p, hit in zip(sure.tolist(), torch.rand(4000) < sure, strict=True)]
    assert people.draw_calibration(honest, tmp_path / "a.png") < 0.04 and (tmp_path / "a.png").exists()
    assert people.draw_calibration([(0.99, float(i % 2)) for i in range(100)], tmp_path / "a.png") == pytest.approx(0.49)


def test_without_heterographic_puns_it_says_so(tmp_path):
    semeval, expun = write_expun(tmp_path)
    for file in semeval.rglob("*heterographic*"):
        file.unlink()
    with pytest.raises(InputError, match="no heterographic pun whose other word is known"):
        people.main(people.Config(str(semeval), str(expun), str(tmp_path / "people"), device="cpu"))


def test_the_whole_road(tmp_path, capsys, monkeypatch):
    semeval, expun = write_expun(tmp_path)
    config = people.Config(str(semeval), str(expun), str(tmp_path / "people"), seeds=(1, 2), world_texts=50, copies=1, sft_steps=3, steps=3,
                           comparisons=200, batch_size=8, n_embd=32, held_out=0.3, device="cpu")
    people.main(config)
    report = json.loads((tmp_path / "people" / "report.json").read_text())
    assert set(report["tables"]) == {"reward model", "linear, pun or not", "linear, ratings", "linear, comparisons",
                                     "linear, twins", "both, pun or not", "both, ratings", "both, twins", "the longer one",
                                     "more letters"} and (tmp_path / "people" / "calibration.png").exists()
    assert "± " in (tmp_path / "people" / "report.md").read_text()
    for seed in (1, 2):       # no held-out text was read
        folder = tmp_path / "people" / str(seed)
        read = (folder / "texts.jsonl").read_text() + (folder / "pairs0.jsonl").read_text()
        seen = [i for i in range(40) if f"thing{i} " in read]
        assert 20 <= len(seen) <= 32
    before = (tmp_path / "people" / "1" / "sft0" / "ckpt.pt").stat().st_mtime_ns
    capsys.readouterr()
    people.main(config)       # again: nothing is trained again
    assert (tmp_path / "people" / "1" / "sft0" / "ckpt.pt").stat().st_mtime_ns == before and "sft:" not in capsys.readouterr().out
