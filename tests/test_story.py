"""What notebook 8 tells of a run on real puns, by hand."""

from types import SimpleNamespace

import pytest
import torch
from conftest import off

from common import write_jsonl
from real import story
from real.people import word_prompt
from real.semeval import Pun


def row_of(word, text, **numbers):
    return {"prompt": word_prompt(word), "text": text} | numbers


@pytest.mark.parametrize("text, expected", [
    (" OLD skippers never die, they just get a new sole!", [10, 1, 1, 1, 0]),
    ('"The sole is fresh," said Tom.', [6, 1, 0, 0, 1]),
    (" Tomorrow I shall never diet: insoles.", [6, 0, 0, 0, 0])])
def test_traits_by_hand(text, expected):
    assert list(story.traits(row_of("sole", text)).values()) == expected


def test_templates_of_peoples_texts_by_hand():
    full = dict(part="full", raters=(0, 1))
    puns = [Pun("a", "Old men never die.", "homographic", True, "die", ratings=(1, 2), **full),
            Pun("b", "My sole is fresh.", "homographic", True, "sole", ratings=(3, 5), **full),
            Pun("c", "Ask Tom.", "homographic", True, "Ask", ratings=(5, 5), part="pilot"),
            Pun("d", "Never say never.", "homographic", False, ratings=(0, 0), **full)]
    told = story.tell_templates(puns)
    assert told["Old X never die"] == {"puns": pytest.approx(1 / 3), "others": 0, "rating": 1.5,
                                       "rating of other puns": 4}
    assert told["said Tom"]["puns"] == pytest.approx(1 / 3) and told["said Tom"]["rating"] == 0


def test_a_run_is_told_step_by_step(tmp_path):
    rows = [row_of("sole", "Old men never die", step=5, score=1.0),
            row_of("sole", "One sole", step=5, score=0.0),
            row_of("sole", "A fish", step=10, score=1.0)]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    first, second = story.tell_run(tmp_path / "samples.jsonl", [(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)],
                                   {"One sole": 0.45, "Old men never die": 0.4, "A fish": 0}.get)
    assert 0 < first.pop("self-BLEU") < 1
    assert first == {"step": 5, "kl": 1, "proxy": 2, "gold": 3, "texts": ["Old men never die"],
                     "words": 3, "uses the word": 0.5, "ends with the word": 0.5,
                     "Old X never die": 0.5, "said Tom": 0}
    assert second["step"] == 10 and second["gold"] == 6


def test_the_text_of_a_near_copy_is_left_out():
    rows = [row_of("sole", text, policy="ppo", kl=1.0, score=2.0, gold=3.0)
            for text in (" A copy.", " My own.")]
    told = story.tell_samples(rows, {" A copy.": 0.45, " My own.": 0.44}.get)
    assert [row["text"] for row in told["ppo"]] == ["", "My own."]
    assert told["ppo"][1] == row_of("sole", "My own.", kl=1, proxy=2, gold=3, overlap=0.44)


def test_blind_answers_by_hand(tmp_path, monkeypatch):
    """Three pairs: the second policy wins, the first one wins, and one that was asked twice is a
    tie and then won by the second. One more has a near-copy."""
    monkeypatch.setattr(story, "tokenizer_of", lambda model: None)
    monkeypatch.setattr(story, "score_texts", lambda judge, tok, prompts, texts, autocast:
                        torch.tensor([float(len(text) + 10 * prompt.count("sole"))
                                      for prompt, text in zip(prompts, texts, strict=True)]))
    prompt = word_prompt("sole")
    key = [{"prompt": prompt, "runs/sft": f"s{i}", "runs/ppo": f" long p{i}"} for i in range(4)]
    answers = [(key[0]["runs/ppo"], "s0"), ("s1", key[1]["runs/ppo"]), ("s2", key[2]["runs/ppo"]),
               ("s3", key[3]["runs/ppo"])]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in answers]
    rows[2]["share"] = 0.5
    rows.append({"prompt": prompt, "chosen": key[2]["runs/ppo"], "rejected": "s2"})
    write_jsonl(tmp_path / "blind.key.jsonl", key)
    write_jsonl(tmp_path / "blind.jsonl", rows)
    told = story.tell_blind(tmp_path / "blind.jsonl", SimpleNamespace(model=None),
                            lambda text: text == "s3", off)
    assert [row["win"] for row in told] == [1, 0, 0.75]
    assert told[0] == {"prompt": prompt, "texts": ["s0", "long p0"], "policies": ["sft", "ppo"],
                       "win": 1, "gold": [13, 18]}
