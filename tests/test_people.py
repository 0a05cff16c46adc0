"""The reward model of people's taste: baselines and measures by hand, and all of it on toy puns."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from common import InputError
from real import people
from real.metrics import auc
from real.semeval import Pun


def rated(name, text, ratings, is_pun=True):
    return Pun(name, text, "homographic", is_pun, part="full", raters=(0, 1), ratings=ratings)


def dough(name, text):
    """A text, which is a pun on doe if it has the word dough."""
    if "dough" not in text:
        return Pun(name, text, "heterographic", False, part="full")
    start = text.index("dough")
    return Pun(name, text, "heterographic", True, "dough", "doe", "dough", (start, start + 5),
               part="full")


def test_the_linear_models_find_what_matters():
    rng = random.Random(0)
    words = "bread rose while bakers sang loudly about dough and flour".split()
    texts = [" ".join(rng.sample(words, 6)) for _ in range(120)]
    train = [dough(str(i), text) for i, text in enumerate(texts[:80])]
    others = texts[80:] + ["a bigger cat", "a big cat"]     # words that no training text has
    scores = people.baselines(train, others, {pun.id: float(pun.is_pun) for pun in train})
    for name in ("linear, pun or not", "linear, ratings"):
        score = dict(zip(others, scores[name].tolist(), strict=True))
        assert auc([score[text] for text in texts[80:] if "dough" in text],
                   [score[text] for text in texts[80:] if "dough" not in text]) > 0.95
    assert scores["the longer one"].tolist() == [6.0] * 40 + [3.0] * 2
    assert scores["more letters"][-2:].tolist() == [12.0, 9.0]
    # Each text without its pun was two letters shorter.
    assert scores["linear, minimal pairs"][-2] > scores["linear, minimal pairs"][-1]


def test_rarity_by_hand():
    """"the" stands in both puns, "sole" and "mate" in one, "soul" in none. A pun does not count for
    its own text or for its minimal pair."""
    rarity = people.rarity([
        Pun("a", "The sole.", "heterographic", True, "sole", "soul", "sole", (4, 8)),
        Pun("b", "the mate", "", True)])
    assert rarity("the mate sole the") == pytest.approx(-math.log(3) - 2 * math.log(2))
    assert rarity("cod") == 0
    assert rarity("The sole.") == rarity("The soul.") == pytest.approx(-math.log(2))


def test_standardized_ratings_by_hand():
    """Rater 0 says 0, 2 (mean 1, deviation 1), rater 1 says 3, 4 (3.5, .5)."""
    puns = [rated("a", "x", (0, 3)), rated("b", "y", (2, 4))]
    assert people.standardized_ratings(puns) == pytest.approx({"a": -1, "b": 1})


def test_measures_by_hand():
    puns = [rated("a", "one two three", (2, 2)), rated("b", "one two", (1, 1)),
            rated("c", "one two four five", (0, 0)), rated("d", "six two five", (0, 1), False)]
    score = {"one two three": 3.0, "one two": 1.0, "one two four five": 2.0, "six two five": 0.0}
    row = people.measures(puns, score, {"a": 3, "b": 2, "c": 0, "d": 1})
    assert row["AUC, pun or not"] == 1
    assert row["AUC, as many words"] == 1               # a above d, both of three words
    # Margins: a b 1, a c 2, a d 1.5, b c 1, b d .5, d c .5; the wrong ones are b c and d c.
    assert row["raters, margin 0.4"] == 4 / 6 and row["raters, margin 1.0"] == 3 / 4
    assert row["raters, margin 1.0, two puns"] == 2 / 3
    assert row["raters, margin 0.4, two puns within a word"] == 1   # b c are two words apart
    # Ranks of the scores 4 2 3 1, of the ratings 4 3 1 2: 1 - 6 (0 + 1 + 4 + 1) / (4 * 15)
    assert row["Spearman, mean rating"] == pytest.approx(0.4)
    assert row["Spearman, standardized raters"] == pytest.approx(0.4)


@pytest.mark.parametrize("related", [False, True])
def test_what_length_explains_is_taken_out(related):
    """Of scores and ratings that follow length alone, no correlation is left."""
    rng = random.Random(0)
    puns, score = [], {}
    for i in range(150):
        length = rng.randint(1, 30)
        shared = rng.gauss(0, 3) if related else 0.0
        puns.append(rated(str(i), f"{i} " + "w " * (length - 1),
                          (length + shared + rng.gauss(0, 1),) * 2, i % 2 == 0))
        score[puns[-1].text] = length + shared + rng.gauss(0, 1)
    row = people.measures(puns, score, {pun.id: 0 for pun in puns})
    assert row["Spearman, mean rating"] > 0.9
    left = row["Spearman, mean rating, length fixed"]
    assert left > 0.5 if related else abs(left) < 0.2
    longest = {pun.text: float(people.n_words(pun)) for pun in puns}
    row = people.measures(puns, longest, {pun.id: 0 for pun in puns})
    assert row["Spearman, mean rating, length fixed"] == 0


def test_ensemble_by_hand():
    """Standardized, 1 2 3 is -1 0 1 and 20 10 30 is 0 -1 1; the first one counts three times."""
    total = people.ensemble(torch.tensor([1.0, 2, 3]), torch.tensor([20.0, 10, 30]))
    assert total.tolist() == pytest.approx([-3, -1, 4])


def toy_puns():
    """40 puns on knead (need) and 20 texts that are none, each with five ratings."""
    puns = []
    for i in range(60):
        ratings = (i % 5, (i + 1) % 5, 1, 0, i % 3)
        text = f"My cat number{i} thing{i} likes to knead dough{i}."
        pun = Pun(f"het_{i}", text, "heterographic", True, "knead", "need", "knead",
                  (text.index("knead"), text.index("knead") + 5))
        if i >= 40:
            text = f"My plain sentence{i} about thing{i} has no need of word{i}."
            pun = Pun(f"het_{i}", text, "heterographic", False)
        puns.append(pun._replace(part="full", raters=(0, 1, 3, 4, 10), ratings=ratings))
    return puns


def test_all_of_it(tmp_path, capsys, monkeypatch):
    puns = toy_puns()
    monkeypatch.setattr(people, "load", lambda *_, **__: SimpleNamespace(records=puns))
    config = people.Config(out_dir=str(tmp_path), seeds=(1, 2), world_texts=50, copies=1,
                           sft_steps=3, steps=3, comparisons=200, batch_size=8, n_embd=32,
                           held_out=0.3, device="cpu")
    people.main(config)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(report["tables"]) == {
        "reward model", "linear, pun or not", "linear, ratings", "linear, minimal pairs",
        "both, pun or not", "both, ratings", "both, minimal pairs", "the longer one",
        "more letters"}
    assert report["metrics"][0]["puns"] > 0 and 0 <= report["ece"] <= 1
    assert "± " in (tmp_path / "report.md").read_text(encoding="utf-8")
    for seed in ("1", "2"):
        seen = {}
        for part in ("train", "test"):
            files = [tmp_path / seed / f"{name}_{part}.jsonl" for name in ("sft", "pairs")]
            text = "".join(path.read_text(encoding="utf-8") for path in files)
            seen[part] = {i for i in range(60) if f"thing{i} " in text}
        assert not seen["train"] & seen["test"] and 36 <= len(seen["train"]) <= 48
    ckpt = tmp_path / "1" / "sft" / "ckpt.pt"
    before = ckpt.stat().st_mtime_ns
    capsys.readouterr()
    people.main(config)         # nothing is trained again
    assert ckpt.stat().st_mtime_ns == before and "sft:" not in capsys.readouterr().out


def test_without_minimal_pairs_it_says_so(monkeypatch):
    puns = [pun._replace(alt_word="") for pun in toy_puns()]
    monkeypatch.setattr(people, "load", lambda *_, **__: SimpleNamespace(records=puns))
    with pytest.raises(InputError, match="no heterographic pun whose other word is known"):
        people.main(people.Config())
