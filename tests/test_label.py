"""The reader's own taste: what is asked, what is kept, how it goes on after a stop, and that training takes it."""

import io
import itertools
import json
import os
import subprocess
import sys

import pytest
from conftest import CPU, ROOT

import label
import reward_model
from common import InputError, read_jsonl
from label import Labeling, pairs

MANY = [("p", f" a{i}", f" b{i}") for i in range(40)]


def taste(labeling):
    """Prefers a to b, ties at multiples of five."""
    _, first, second = labeling.question
    return "=" if int(first[2:]) % 5 == 0 else "1" if first[1] == "a" else "2"


def test_answers_are_kept_at_once_in_the_standard_format(tmp_path):
    labeling = Labeling(MANY, tmp_path / "new" / "mine.jsonl")
    for what in ("1", "2", "="):
        prompt, first, second = labeling.question
        labeling.answer(what)
        row = read_jsonl(labeling.path)[-1]
        assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, *((second, first) if what == "2" else (first, second)))
        assert row.get("share") == (0.5 if what == "=" else None)
    for what in ("", "3", "y"):                       # no answer: the question stays
        question = labeling.question
        labeling.answer(what)
        assert labeling.question == question and len(labeling.rows) == 3
    labeling.answer("s")
    assert labeling.question != question and len(read_jsonl(labeling.path)) == 3


def test_the_order_is_random_and_no_pair_comes_twice_but_for_the_repeats(tmp_path):
    labeling, shown = Labeling(MANY, tmp_path / "mine.jsonl", n=44), []
    while labeling.question:
        shown.append(labeling.question)
        labeling.answer("1")
    assert len(shown) == 44 and 10 < sum(first[1] == "a" for _, first, _ in shown) < 34
    times = [[i for i, question in enumerate(shown) if set(question) == set(pair)] for pair in MANY]
    assert [len(numbers) for numbers in times].count(2) == 4 and max(map(len, times)) == 2
    for numbers in times:
        if len(numbers) == 2:
            assert numbers[1] % 10 == 9 and numbers[1] - numbers[0] > 4
            assert shown[numbers[0]][1:] == shown[numbers[1]][:0:-1]       # the other way round
    assert labeling.agreement() == (4, 0)                                  # always the first text: never the same one


def test_agreement_of_one_who_knows_and_of_one_who_does_not(tmp_path):
    labeling = Labeling(MANY, tmp_path / "mine.jsonl", n=30)
    while labeling.question:
        labeling.answer(taste(labeling))
    assert labeling.agreement() == (3, 3) and "3 pairs asked twice, 3 answered alike (100%)" in labeling.status()
    rows = [dict(prompt="p", chosen=" x", rejected=" y"), dict(prompt="p", chosen=" y", rejected=" x"),
            dict(prompt="p", chosen=" v", rejected=" w", share=.5), dict(prompt="p", chosen=" w", rejected=" v", share=.5),
            dict(prompt="p", chosen=" m", rejected=" n"), dict(prompt="p", chosen=" m", rejected=" n", share=.5)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Labeling([], tmp_path / "other.jsonl").agreement() == (3, 1)


def test_it_goes_on_where_it_was_stopped(tmp_path):
    whole, parts = Labeling(MANY, tmp_path / "whole.jsonl", n=25), tmp_path / "parts.jsonl"
    while whole.question:
        whole.answer(taste(whole))
    for _ in range(25):                               # stopped after each answer
        labeling = Labeling(MANY, parts, n=25)
        labeling.answer(taste(labeling))
    assert parts.read_text() == whole.path.read_text() and Labeling(MANY, parts, n=25).question is None
    parts.write_text(parts.read_text().rstrip("\n"))  # as an editor may leave it
    Labeling(MANY, parts, n=26).answer("1")
    assert len(read_jsonl(parts)) == 26


def test_undo_asks_again_and_goes_back_as_far_as_you_like(tmp_path):
    labeling, shown = Labeling(MANY, tmp_path / "mine.jsonl"), []
    for _ in range(11):                               # the tenth is a repeat
        shown.append(labeling.question)
        labeling.answer("1")
    following = labeling.question
    labeling = Labeling(MANY, tmp_path / "mine.jsonl")      # also after a stop
    for question in shown[::-1]:
        labeling.answer("u")
        assert labeling.question == question and len(read_jsonl(labeling.path)) == len(labeling.rows) == shown.index(question)
    labeling.answer("u")                              # nothing left to take back
    assert labeling.question == shown[0]
    for question in shown:
        assert labeling.question == question
        labeling.answer("2")
    assert labeling.question == following


def test_pairs_of_files(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps({"prompt": p, "completion": f" a{i}"}) + "\n" for i, p in enumerate("xxyz")))
    b.write_text("".join(json.dumps({"prompt": p, "chosen": f" b{i}", "rejected": " a2"}) + "\n" for i, p in enumerate("xy")))
    found = list(pairs(str(a), str(b)))
    assert sorted(prompt for prompt, *_ in found)[:2] == ["x", "x"] and all(x[1] == "a" and x != y for _, x, y in found)
    assert [(prompt, {x, y}) for prompt, x, y in pairs(str(a))] == [("x", {" a0", " a1"})]
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"line {i}\n" for i in range(7)))
    assert len(list(pairs(str(lines)))) == 3
    for sources, reason in (((a, lines), "no two texts have the same prompt"), ((a, "x.pt"), "two checkpoints")):
        with pytest.raises(InputError, match=reason):
            next(pairs(*map(str, sources)))


def test_pairs_of_checkpoints(sft_ckpt):
    """The same pairs each time, without end; the two texts answer one prompt."""
    found = list(itertools.islice(pairs(sft_ckpt, sft_ckpt), 40))
    assert found == list(itertools.islice(pairs(sft_ckpt), 40)) and len(set(found)) == 40
    assert all(prompt.startswith("About") and x.strip() != y.strip() for prompt, x, y in found)
    assert len({prompt for prompt, *_ in found}) > 20


def test_in_the_terminal(sft_ckpt, tmp_path):
    """As a reader types it: answers, a slip, an undo, quit; then once more, until n are there; then training on it."""
    def call(*args, text=""):
        return subprocess.run([sys.executable, ROOT / "reward_model.py", *map(str, args)], input=text, capture_output=True, text=True,
                              encoding="utf-8", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    first = call("label", sft_ckpt, "--n", 12, text="1\nwhat?\n2\nu\n2\n=\nq\n")
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "] 2/12  About" in first.stdout and "3 answers in mine.jsonl, 1 of them ties" in first.stdout
    second = call("label", sft_ckpt, "--n", 12, text="1\n" * 20)
    assert "\n3 answers in mine.jsonl" in second.stdout and "12 answers in mine.jsonl, 1 of them ties; 1 pairs asked twice" in second.stdout
    assert len(read_jsonl(tmp_path / "mine.jsonl")) == 12
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"\n')
    for options, reason in (({"out": str(tmp_path / "torn.jsonl")}, "torn.jsonl:1: not JSON"), ({"sources": ("a", "b", "c")}, "one or two")):
        with pytest.raises(InputError, match=reason):
            label.label(**({"sources": (sft_ckpt,)} | options))


def test_the_reward_model_trains_on_it(sft_ckpt, tmp_path):
    labeling = Labeling(pairs(sft_ckpt), tmp_path / "mine.jsonl", n=30)
    while labeling.question:
        labeling.answer("12="[len(labeling.rows) % 3])
    reward_model.train(reward_model.Config(init=sft_ckpt, data=str(labeling.path), out_dir=str(tmp_path / "rm"), batch_size=8, max_steps=4,
                                           eval_interval=2, **CPU))
    assert (tmp_path / "rm" / "ckpt.pt").exists() and 0 <= read_jsonl(tmp_path / "rm" / "metrics.jsonl")[-1]["accuracy"] <= 1


def test_ctrl_c_and_the_end_of_input_are_goodbyes(sft_ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    label.label((sft_ckpt,), str(tmp_path / "mine.jsonl"))
    assert "1 answers" in capsys.readouterr().out.splitlines()[-2]

    def interrupt(prompt):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupt)
    label.label((sft_ckpt,), str(tmp_path / "mine.jsonl"))
    assert "1 answers" in capsys.readouterr().out.splitlines()[-2]


def test_widget(sft_ckpt, tmp_path):
    pytest.importorskip("ipywidgets")
    box = label.widget(sft_ckpt, out=str(tmp_path / "mine.jsonl"), n=2)
    progress, text, buttons = box.children
    one, two, tie, skip, undo = buttons.children
    shown = text.value
    one.click()
    assert progress.value == 1 and text.value != shown and len(read_jsonl(tmp_path / "mine.jsonl")) == 1
    undo.click()
    assert progress.value == 0 and text.value == shown
    skip.click()
    two.click()
    tie.click()
    assert "That is all." in text.value and read_jsonl(tmp_path / "mine.jsonl")[1]["share"] == 0.5
