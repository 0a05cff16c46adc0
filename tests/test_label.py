"""Labeling: what is asked, what is kept, how it continues after a stop, and who wins blindly."""

import io
import itertools
import sys
from pathlib import Path

import pytest
from conftest import copies, program, records, refuses

from common import InputError, read_jsonl
from real import label
from real.label import Config, Labeling, pairs, wilson

MANY = [("p", f" a{i}", f" b{i}") for i in range(40)]


def taste(labeling):
    """Prefers a to b, with ties at multiples of five."""
    _, first, _ = labeling.question
    if int(first[2:]) % 5 == 0:
        return "="
    return "1" if first[1] == "a" else "2"


def test_a_repeat_can_be_skipped(tmp_path):
    labeling, shown = Labeling(MANY, tmp_path / "mine.jsonl"), []
    for _ in range(9):
        shown.append(set(labeling.question))
        labeling.answer("1")
    repeat = labeling.question
    labeling.answer("s")
    assert set(repeat) in shown and labeling.question not in (None, repeat)


def test_prompts_and_seed_are_those_of_the_options(sft_ckpt, tmp_path, monkeypatch, capsys):
    data, shown = records(tmp_path / "data.jsonl", [{"prompt": "On jam:"}]), []
    for seed in (0, 1):
        monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
        label.label(Config((sft_ckpt,), out=str(tmp_path / "mine.jsonl"), data=data, seed=seed))
        shown.append(capsys.readouterr().out)
    assert all("On jam:" in text for text in shown) and shown[0] != shown[1]


def test_blind_answers_have_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (records(f"{name}.jsonl", [{"prompt": "p", "completion": f" {name}"}]) for name in "ab")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    label.label(Config((a, b), blind=True, n=1))
    assert len(read_jsonl("blind.jsonl")) == len(read_jsonl("blind.key.jsonl")) == 1
    assert not Path("mine.jsonl").exists()


def test_answers_are_kept_at_once_as_records(tmp_path):
    labeling = Labeling(MANY, tmp_path / "new" / "mine.jsonl")
    for what in ("1", "2", "="):
        prompt, first, second = labeling.question
        labeling.answer(what)
        row = read_jsonl(labeling.path)[-1]
        order = (second, first) if what == "2" else (first, second)
        assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, *order)
        assert row.get("share") == (0.5 if what == "=" else None)
    for what in ("", "3", "y"):                 # no answer: the question stays
        question = labeling.question
        labeling.answer(what)
        assert labeling.question == question and len(labeling.rows) == 3
    labeling.answer("s")
    assert labeling.question != question and len(read_jsonl(labeling.path)) == 3


def test_the_order_is_random_and_only_repeats_come_twice(tmp_path):
    labeling, shown = Labeling(MANY, tmp_path / "mine.jsonl", n=44), []
    while labeling.question:
        shown.append(labeling.question)
        labeling.answer("1")
    assert len(shown) == 44 and 10 < sum(first[1] == "a" for _, first, _ in shown) < 34
    n_repeats = 0
    for pair in MANY:
        first, *again = [i for i, question in enumerate(shown) if set(question) == set(pair)]
        for i in again:
            n_repeats += 1
            assert i % 10 == 9 and i - first > 4            # every tenth, and not just now
            assert shown[i][1:] == shown[first][:0:-1]      # the other way round
    assert n_repeats == 4 and labeling.agreement() == (4, 0)    # always the first text


def test_agreement(tmp_path):
    tie = {"share": 0.5}
    path = records(tmp_path / "other.jsonl", [
        dict(prompt="p", chosen=" x", rejected=" y"), dict(prompt="p", chosen=" y", rejected=" x"),
        dict(prompt="p", chosen=" v", rejected=" w") | tie,
        dict(prompt="p", chosen=" w", rejected=" v") | tie,
        dict(prompt="p", chosen=" m", rejected=" n"),
        dict(prompt="p", chosen=" m", rejected=" n") | tie])
    labeling = Labeling([], path)
    assert labeling.question is None and labeling.agreement() == (3, 1)
    assert labeling.status() == (f"answers in {path}: 6, of these ties: 3; asked twice: 3, "
                                 "answered alike: 1 (33%)")


def test_it_continues_where_it_was_stopped(tmp_path):
    whole, parts = Labeling(MANY, tmp_path / "whole.jsonl", n=25), tmp_path / "parts.jsonl"
    while whole.question:
        whole.answer(taste(whole))
    for _ in range(25):                         # stopped after each answer
        labeling = Labeling(MANY, parts, n=25)
        labeling.answer(taste(labeling))
    assert parts.read_text() == whole.path.read_text()
    assert Labeling(MANY, parts, n=25).question is None


def test_undo_goes_back_as_far_as_you_like(tmp_path):
    labeling, shown = Labeling(MANY, tmp_path / "mine.jsonl"), []
    for _ in range(11):                         # the tenth is a repeat
        shown.append(labeling.question)
        labeling.answer("1")
    following = labeling.question
    labeling = Labeling(MANY, tmp_path / "mine.jsonl")      # also after a stop
    for n in reversed(range(11)):
        labeling.answer("u")
        assert labeling.question == shown[n]
        assert len(read_jsonl(labeling.path)) == len(labeling.rows) == n
    labeling.answer("u")                        # nothing left to take back
    for question in shown:
        assert labeling.question == question
        labeling.answer("2")
    assert labeling.question == following


def test_a_policy_that_repeats_itself_comes_to_an_end(tmp_path):
    labeling = Labeling(itertools.cycle(MANY[:3]), tmp_path / "mine.jsonl")
    for _ in range(3):
        labeling.answer("1")
    assert labeling.question is None

# -----------------------------------------------------------------------------
# where pairs come from

def test_pairs_of_files(tmp_path):
    a = records(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": f" a{i}"}
                                       for i, prompt in enumerate("xxyz")])
    b = records(tmp_path / "b.jsonl", [{"prompt": prompt, "chosen": f" b{i}", "rejected": " a2"}
                                       for i, prompt in enumerate("xy")])
    found = list(pairs(a, b))
    assert [prompt for prompt, *_ in found].count("x") == 2
    assert all(x[1] == "a" and x != y for _, x, y in found)
    (prompt, x, y), = pairs(a)
    assert prompt == "x" and {x, y} == {" a0", " a1"}
    (tmp_path / "lines.txt").write_text("".join(f"line {i}\n" for i in range(7)))
    assert len(list(pairs(str(tmp_path / "lines.txt")))) == 3
    same = records(tmp_path / "same.jsonl", [{"prompt": "x", "completion": "a"}] * 2000)
    for sources, reason in (((a, tmp_path / "lines.txt"), "no two texts have the same prompt"),
                            ((a, "x.pt"), "two checkpoints"),
                            ((same,), "1,000 pairs in a row")):
        refuses(reason, next, pairs(*map(str, sources)))


def test_pairs_of_checkpoints(sft_ckpt, tmp_path):
    """The same pairs each time, without end; the two texts answer one prompt. A run that was
    trained on a file is asked its prompts."""
    found = list(itertools.islice(pairs(sft_ckpt, sft_ckpt), 40))
    assert found == list(itertools.islice(pairs(sft_ckpt), 40)) and len(set(found)) == 40
    for prompt, x, y in found:
        assert prompt.startswith("About") and x.strip() != y.strip()
    assert len({prompt for prompt, *_ in found}) > 20
    folder = copies(tmp_path, sft_ckpt, "run") / "run"
    data = records(tmp_path / "data.jsonl", [{"prompt": "Hello"}])
    val_data = records(tmp_path / "val.jsonl", [{"prompt": "Hey"}])
    for options, expected in (({"data": data, "val_data": ""}, "Hello"),
                              ({"data": data, "val_data": val_data}, "Hey")):
        records(folder / "config.json", [options])
        assert next(pairs(str(folder)))[0] == expected
    assert next(pairs(str(folder), data=data))[0] == "Hello"

# -----------------------------------------------------------------------------
# blind

def test_wilson_by_hand():
    # p = .5, n = 100: center .5,
    # half = 1.96 / (1 + .038416) sqrt(.0025 + 3.8416 / 40000) = 1.88749 * .0509519 = .0961711
    assert wilson(0.5, 100) == pytest.approx((0.5 - 0.0961711, 0.5 + 0.0961711), abs=1e-6)
    low, high = wilson(1.0, 20)
    assert high == pytest.approx(1) and low == pytest.approx(20 / (20 + 3.8416))


def test_win_rate_by_hand():
    """Of four pairs b wins one, ties one, loses one, and in one wins once and ties once."""
    key = [{"prompt": "p", "run/a": f" a{i}", "run/b": f" b{i}"} for i in range(4)]
    asked = {("p", " a0", " b0"): [" b0"], ("p", " a1", " b1"): [""], ("p", " a2", " b2"): [" a2"],
             ("p", " a3", " b3"): [" b3", ""]}
    assert label.win_rate(asked, key, "run/a", "run/b") == (
        (1 + 0.5 + 0 + 0.75) / 4, *wilson(0.5625, 4), 4)
    assert label.win_rate(asked, key, "run/b", "run/a")[0] == 1 - 0.5625
    with pytest.raises(InputError, match="answers to other pairs, such as ' a'"):
        label.win_rate(asked | {("p", " a", " b"): [" a"]}, key, "run/a", "run/b")


def test_blind(sft_ckpt, tmp_path, monkeypatch, capsys):
    """Someone who likes what the second policy wrote; nothing on the screen says who wrote what."""
    copies(tmp_path, sft_ckpt, "sft", "ppo")
    sources = [str(tmp_path / "sft"), str(tmp_path / "ppo")]
    data = records(tmp_path / "data.jsonl", [{"prompt": f"On {what}:"} for what in ("jam", "tea")])
    config = Config(tuple(sources), blind=True, out=str(tmp_path / "blind.jsonl"), n=12, data=data)

    def judge(prompt):
        # What stands between the question and the prompt is all that a person sees.
        shown = capsys.readouterr().out
        assert not any(source in shown.partition("answers in")[2] for source in sources)
        first, second = (line[5:] for line in shown.splitlines()[-2:])
        liked = {row[sources[1]].strip() for row in read_jsonl(tmp_path / "blind.key.jsonl")}
        assert (first in liked) != (second in liked)
        assert "On jam:" in shown or "On tea:" in shown
        return "1" if first in liked else "2"

    monkeypatch.setattr("builtins.input", judge)
    label.label(config)
    result = f"{sources[1]} wins against {sources[0]} in 100.0% of 11 (95 % interval: 74.1% to"
    assert result in capsys.readouterr().out
    (tmp_path / "sft" / "ckpt.pt").unlink()     # once the pairs are drawn, no model is needed
    label.label(config)
    assert capsys.readouterr().out.count(result) == 2       # at the start and at the end
    with pytest.raises(InputError, match="blind.key.jsonl is not of"):
        label.label(Config((sources[0], "other"), blind=True, out=config.out))
    refuses("two different ones", label.label, Config((sources[0],), blind=True))

# -----------------------------------------------------------------------------
# terminal and notebook

def test_in_the_terminal(sft_ckpt, tmp_path, monkeypatch, capsys):
    """As a person types it: answers, a slip, an undo, quit; then again, until n are there."""
    config = Config((sft_ckpt,), out=str(tmp_path / "mine.jsonl"), n=12)

    def type_in(text):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        label.label(config)
        return capsys.readouterr().out

    first = type_in("1\nwhat?\n2\nu\n2\n=\nq\n")
    assert "] 2/12  About" in first and f"answers in {config.out}: 3, of these ties: 1\n" in first
    assert f"answers in {config.out}: 4" in type_in("1\n")      # the end of the input
    assert "12, of these ties: 1; asked twice: 1" in type_in("1\n" * 20)
    assert len(read_jsonl(config.out)) == 12

    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    config.n = 13
    assert f"train on them: python reward_model.py --data {config.out}" in type_in("")


def test_bad_input_is_one_sentence(sft_ckpt, tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"\n')
    for sources, out, reason in (((sft_ckpt,), "torn.jsonl", "torn.jsonl:1: this line is not JSON"),
                                 (("a", "b", "c"), "mine.jsonl", "one or two")):
        refuses(reason, label.label, Config(sources, out=str(tmp_path / out)))
    missing = program("real.label", "--blind", "runs/none/ckpt.pt", "runs/no.pt")
    assert missing.returncode == 2 and missing.stderr.count("error:") == 1
    assert "runs/none/ckpt.pt does not exist; check the path" in missing.stderr


def test_widget(tmp_path, monkeypatch):
    pytest.importorskip("ipywidgets")
    texts = records(tmp_path / "a.jsonl", [{"prompt": "<p>", "ranked": [f"{i} <", f"{i} >"]}
                                           for i in range(4)])
    box = label.widget(texts, out=str(tmp_path / "mine.jsonl"), n=2)
    progress, text, buttons, keys = box.children
    one, two, tie, skip, undo = buttons.children
    shown = text.value
    assert "<b>&lt;p&gt;</b>" in shown and shown.count(" &lt;<") + shown.count(" &gt;<") == 2
    one.click()
    assert progress.value == 1 and text.value != shown
    keys.value = "U"
    assert progress.value == 0 and text.value == shown and keys.value == ""
    skip.click()
    for key in "2=":
        keys.value = key
    assert "That is all." in text.value and "&nbsp;" not in text.value
    assert [row.get("share") for row in read_jsonl(tmp_path / "mine.jsonl")] == [None, 0.5]
    assert two.layout.display == "none" and undo.layout.display != "none"
    keys.value = "1"                        # nothing is asked any more
    assert len(read_jsonl(tmp_path / "mine.jsonl")) == 2
    undo.click()
    assert two.layout.display != "none" and "That is all." not in text.value
    other = records(tmp_path / "b.jsonl", [{"prompt": "<p>", "completion": "another"}])
    _, text_of_two, *_ = label.widget(texts, other, str(tmp_path / "two.jsonl")).children
    assert text_of_two.value.count("another") == 1
    monkeypatch.setattr(label, "write_jsonl", full_disk)
    one.click()
    assert "<b>error:</b>" in text.value and "No space left" in text.value
    assert "runs/none/ckpt.pt does not exist" in label.widget("runs/none").value
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert label.widget(texts) is None


def full_disk(path, rows):
    raise OSError(28, "No space left on device", str(path))
