"""The converter: formats, errors with file and line, shapes, splits without near-duplicates."""

import collections
import gzip
import itertools
import json
import math
import random
import subprocess
import sys

import pytest
from conftest import ROOT
from test_semeval import write_expun

from common import InputError, read_jsonl, write_jsonl
from data import read_records, tokenizer
from real.corpora import convert, load, reshape, split
from real.duplicates import group, texts_of


def jsonl(path, *rows):
    write_jsonl(path, rows)
    return path


def without_where(records):
    return [{name: record[name] for name in record if name != "where"} for record in records]


def lines_of(dropped):
    """{reason: line numbers} of what was dropped."""
    return {reason: [int(place.rpartition(":")[2]) for place in places]
            for reason, places in dropped.items()}


def dialogue(*turns):
    names = itertools.cycle(["Human", "Assistant"])
    return "".join(f"\n\n{name}: {text}".rstrip(" ")
                   for name, text in zip(names, turns, strict=False))


def chat(*texts):
    """A conversation in which user and assistant take turns."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


ANSWER = [{"role": "assistant", "content": "Yo"}]
OTHER = [{"role": "assistant", "content": "No"}]

# -----------------------------------------------------------------------------
# public sets: what cannot be used is dropped and counted

def test_hh(tmp_path):
    rows = [(dialogue("hi", "Hello."), dialogue("hi", "Hey.")),
            (dialogue("a", "b", "c", "Good day"), dialogue("a", "b", "c", "Go away")),
            (dialogue("hi", "Hello."), dialogue("hi", "")),
            (dialogue("hi", "Yes."), dialogue("hi", "Yes.")),
            (dialogue("hi", "No", "why", "So."), dialogue("hi", "Nope", "why", "So.")),
            (dialogue("one", "A"), dialogue("two", "B"))]
    plain = jsonl(tmp_path / "train.jsonl",
                  *[{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows])
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        corpus = load(path)
        assert corpus.format == "hh" and corpus.records[0]["where"] == f"{path}:1"
        assert without_where(corpus.records) == [
            {"prompt": dialogue("hi", ""), "chosen": " Hello.", "rejected": " Hey."},
            {"prompt": dialogue("a", "b", "c", ""), "chosen": " Good day", "rejected": " Go away"}]
        assert lines_of(corpus.dropped) == {
            "an answer is empty": [3], "two answers are the same text": [4],
            "the dialogues differ before the last answer": [5],
            "the dialogues share no turn of the assistant": [6]}
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        load(packed)


def shp(**changes):
    return dict(post_id="1", history="How do I rise early?", human_ref_A="Ask a baker.",
                human_ref_B="Use yeast.", labels=0, score_ratio=4.0, domain="x") | changes


def test_shp(tmp_path):
    path = jsonl(tmp_path / "train.json", shp(), shp(labels=1), shp(score_ratio=1.5),
                 *[shp(human_ref_A=str(i)) for i in range(5)], shp(human_ref_A=" ", post_id="2"))
    corpus = load(path)
    assert corpus.format == "shp" and len(corpus.records) == 5
    assert without_where(corpus.records)[0] == {
        "prompt": "\n\nHuman: How do I rise early?\n\nAssistant:", "chosen": " Use yeast.",
        "rejected": " Ask a baker.", "margin": pytest.approx(math.log(4))}
    assert corpus.records[1]["chosen"] == " Ask a baker."
    assert lines_of(corpus.dropped) == {"score_ratio is under 2": [3], "an answer is empty": [9],
                                        "more than 5 pairs of one post": [7, 8]}
    for changes, message in ((dict(labels=2), "'labels' must be 1"),
                             (dict(score_ratio="4"), "'score_ratio' must be a number"),
                             (dict(score_ratio=0.5), "'score_ratio' must be 1 or more")):
        with pytest.raises(InputError, match=f"train.json:1: {message}"):
            load(jsonl(path, shp(**changes)))


def test_openai(tmp_path):
    info = {"post": "First {line}.\nSecond line.\nThird line.", "title": "On {puns}",
            "subreddit": "bread"}
    row = {"info": info, "summaries": [{"text": " Loaf is hard."}, {"text": "Rise."}], "choice": 1}
    article = row | {"info": {"article": "News {of} bread."}, "choice": 0}
    equal = row | {"summaries": [{"text": "Same."}, {"text": "Same. "}]}
    path = jsonl(tmp_path / "batch3.json", row, article, equal)
    corpus = load(path)
    assert corpus.format == "openai"
    assert lines_of(corpus.dropped) == {"two answers are the same text": [3]}
    head = "SUBREDDIT: r/bread\n\nTITLE: On {puns}\n\nPOST: First {line}."
    assert without_where(corpus.records) == [
        {"prompt": f"{head}\nSecond line.\nThird line.\n\nTL;DR:", "chosen": " Rise.",
         "rejected": " Loaf is hard."},
        {"prompt": "Article:\n\nNews {of} bread.\n\nTL;DR:", "chosen": " Loaf is hard.",
         "rejected": " Rise."}]

    def fits(prompt, *answers):
        return len(prompt.split()) <= 9

    assert load(path, fits=fits).records[0]["prompt"] == f"{head}\n\nTL;DR:"    # cut line by line
    del row["choice"]
    with pytest.raises(InputError, match="batch3.json:1: 'choice' is missing"):
        load(jsonl(path, row), "openai")

# -----------------------------------------------------------------------------
# files of one's own: what cannot be used is an error

@pytest.mark.parametrize("row, expected", [
    ({"prompt": "About bread:", "completion": " I loaf you."}, None),
    ({"prompt": "About bread:"}, None),
    ({"prompt": "a", "completion": " b", "label": False}, None),
    ({"prompt": "a", "completion": " b", "rating": 2}, None),
    ({"prompt": "a", "ranked": [" b", " c"]}, None),
    ({"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1.5, "share": 0.8, "id": "x"},
     None),
    ({"text": "I loaf you."}, {"prompt": "A pun:", "completion": " I loaf you."}),
    ({"chosen": "Why? Hello.", "rejected": "Why? Hey."},
     {"prompt": "Why?", "chosen": " Hello.", "rejected": " Hey."}),
    ({"messages": [{"role": "system", "content": "Be short."}] + chat("Hi", "Yo")},
     {"prompt": "Be short.\n\nHuman: Hi\n\nAssistant:", "completion": " Yo"}),
    ({"prompt": chat("Hi"), "chosen": ANSWER, "rejected": OTHER},
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " No"}),
    ({"chosen": chat("Hi", "Yo"), "rejected": chat("Hi", "You")},
     {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " You"}),
    ({"instruction": "Pun.", "input": "bread", "output": "I loaf you."},
     {"prompt": "\n\nHuman: Pun.\n\nbread\n\nAssistant:", "completion": " I loaf you."}),
    ({"instruction": "Pun.", "input": "", "output": "I loaf you."},
     {"prompt": "\n\nHuman: Pun.\n\nAssistant:", "completion": " I loaf you."})])
def test_shapes_of_trl_and_json(tmp_path, row, expected):
    path = tmp_path / "mine.jsonl"      # with a byte-order mark, \r\n, and a blank line
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n  \r\n")
    corpus = load(path)
    assert corpus.format == "trl" and without_where(corpus.records) == [expected or row]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([row, row], indent=1), encoding="utf-8")
    corpus = load(path)
    assert corpus.format == "json" and without_where(corpus.records) == [expected or row] * 2
    assert corpus.records[0]["where"] == f"{path}:2"


PAIR = '{"prompt": "a", "chosen": " b", "rejected": " c", '


@pytest.mark.parametrize("text, message", [
    ('{"prompt": "a", "completion": " b"}\n{"prompt": "a", "completion": ""}',
     ":2: an answer is empty"),
    ('{"prompt": " ", "completion": " b"}', ":1: the prompt is empty"),
    ('{"prompt": "a", "chosen": " b", "rejected": "b"}', ":1: two answers are the same text"),
    ('{"prompt": "a", "ranked": ["b", "c", "b"]}', ":1: two answers are the same text"),
    ('{"prompt": "a", "ranked": ["b"]}', ":1: 'ranked' must be a list of two texts"),
    ('{"prompt": "a", "ranked": ["b", 3]}', ":1: 'ranked' must be a list of two texts"),
    ('{"prompt": "a", "answer": "b"}', ":1: this record has prompt + answer, .* prompt + comp"),
    ("{}", ":1: this record has no field"),
    ('{"prompt": "a", "completion": 3}', ":1: 'completion' must be text"),
    ('{"prompt": "a", "completion": null}', ":1: 'completion' must be text"),
    ('{"prompt": "a", "completion": " b", "label": 1}', ":1: 'label' must be true or false"),
    (PAIR + '"margin": "1"}', ":1: 'margin' must be a number"),
    (PAIR + '"margin": true}', ":1: 'margin' must be a number"),
    (PAIR + '"margin": NaN}', ":1: this is not JSON: NaN"),
    (PAIR + '"share": 0.4}', ":1: 'share' must be from 0.5"),
    ('{"prompt": "a"}\n\n{"text": "b"}', ":3: this record has text, but the file began with pro"),
    ('{"prompt": "a"\n', ":1: this is not JSON"),
    ('{"prompt": "a"}\n3', ":2: this is not a JSON object"),
    ('{"prompt": "a"}\n["b"]', ":2: this is a JSON array"),
    ('{"a": ' + "[" * 100_000, ":1: this JSON is nested too deeply"),
    ('{"messages": [{"role": "user", "content": "a"}]}', ":1: 'completion' must begin with a mes"),
    ('{"messages": "a"}', ":1: 'messages' must be a list"),
    ('{"messages": [{"role": "poet", "content": "a"}]}', ":1: the role 'poet'"),
    ('{"prompt": ["a"], "completion": "b"}', ":1: this is not a JSON object"),
    ('{"chosen": "Yes", "rejected": "No"}', ":1: the prompt is empty"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0", ":1: this is a git-lfs pointer"),
    ("I loaf you.", ":1: this is neither JSON nor"), ("3", ":1: this is neither JSON nor"),
    ("", ": this file is empty"), ("\n\n", ": this file is empty")])
def test_what_is_wrong_with_a_file_of_ones_own(tmp_path, text, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message.replace("+", r"\+")) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, text, message", [
    ("a.json", '[\n{"prompt": "a"},\n\n{"question": "b"}]', ":4: this record has question, which"),
    ("a.json", '[\n{"prompt": "a"},\n{"prompt": "b"', ":3: this is not JSON"),
    ("a.json", "[]", ": this file has no records"), ("a.json", "[1]", ":1: this is not a JSON obj"),
    ("a.json", '{"data": [\n{"prompt": "a"}]}', ":1: this is not JSON"),
    ("a.csv", "question,answer\na,b\n", ":2: this record has question + answer, which is none"),
    ("a.csv", "prompt;completion\na;b\n", ":2: this record has prompt;completion, which is none"),
    ("a.csv", "prompt,completion\na,b\n\na\n", ":4: 1 cells do not fit the columns prompt, compl"),
    ("a.csv", "prompt,prompt\na,b\n", ":2: 2 cells do not fit the columns prompt, prompt"),
    ("a.csv", 'prompt,completion\na,"b\n', ":2: this is not CSV"),
    ("a.csv", "prompt,completion\na,\n", ":2: an answer is empty"),
    ("a.csv", "prompt,completion,rating\na,b,good\n", ":2: 'rating' must be a number, not 'good'"),
    ("a.csv", "prompt,completion,label\na,b,good\n", ":2: 'label' must be true or false"),
    ("a.csv", "prompt,completion\n", ": this file has no records"),
    ("a.md", "# Puns\n", ":1: this is neither JSON nor a .csv or .txt file"),
    ("a.tsv", "prompt\tcompletion\n", ":1: this is neither JSON nor a .csv or .txt file")])
def test_what_is_wrong_with_arrays_and_tables(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message.replace("+", r"\+")) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:") and "\n" not in str(error.value)


def test_csv(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xef\xbb\xbfPrompt, Completion,rating\r\n"
                     b'About bread:,"I ""loaf"",\r\nyou.",3\r\n,,\r\nAbout tea:, Steep.,4.5\r\n')
    corpus = load(path)
    assert corpus == ("csv", [
        {"where": f"{path}:2", "prompt": "About bread:", "completion": ' I "loaf",\nyou.',
         "rating": 3}, {"where": f"{path}:5", "prompt": "About tea:", "completion": " Steep.",
                        "rating": 4.5}], {})


def test_text(tmp_path):
    path = tmp_path / "puns.txt"
    path.write_text("I loaf you.\n\n  [Rise] and shine.\n", encoding="utf-8")
    assert load(path).format == "text"
    assert load(path).records[1] == {"where": f"{path}:3", "prompt": "A pun:",
                                     "completion": " [Rise] and shine."}


def test_other_files_and_folders(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match="mine.jsonl:2: byte 11 is not UTF-8"):
        load(path)
    write_expun(tmp_path / "puns")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
            ([tmp_path / "none"], "no such file"), ([path, "xml"], "the format is auto or one of"),
            ([tmp_path, "trl"], "this is a folder"), ([tmp_path / "puns"], "holds both SemEval"),
            ([tmp_path / "empty"], "neither SemEval nor ExPUNations")):
        with pytest.raises(InputError, match=message):
            load(*arguments)
    with pytest.raises(InputError, match="--semeval is for the format expun"):
        load(path, "trl", semeval="folder")

# -----------------------------------------------------------------------------
# shapes

def test_reshape_preferences_and_rankings():
    pair = {"where": "f:1", "prompt": "p", "chosen": " a", "rejected": " b", "margin": 1}
    assert reshape([pair], "preference")[0] == [pair]
    assert without_where(reshape([pair], "completion")[0]) == [{"prompt": "p", "completion": " a"}]
    assert without_where(reshape([pair], "prompt")[0]) == [{"prompt": "p"}]
    ranked = {"where": "f:1", "prompt": "p", "ranked": [" a", " b", " c"]}
    assert reshape([ranked], "completion")[0][0]["completion"] == " a"
    assert reshape([pair], "rating") == ([], {"it has no prompt + completion + rating": ["f:1"]})


def test_reshape_labels():
    texts = [("p", " a", True), ("p", " b", False), ("p", " c", False), ("q", " d", True),
             ("p", " e", True), ("p", " f", True)]
    records = [{"where": f"f:{n}", "prompt": prompt, "completion": text, "label": label}
               for n, (prompt, text, label) in enumerate(texts, 1)]
    pairs, left_out = reshape(records, "preference")
    assert without_where(pairs) == [{"prompt": "p", "chosen": " a", "rejected": " b"},
                                    {"prompt": "p", "chosen": " e", "rejected": " c"}]
    assert list(left_out.values()) == [["f:6", "f:4"]]
    good, left_out = reshape(records, "completion")
    assert [record["completion"] for record in good] == [" a", " d", " e", " f"]
    assert left_out == {"it is labeled false": ["f:2", "f:3"]}

# -----------------------------------------------------------------------------
# near-duplicates and splits

def test_group_finds_near_duplicates_but_no_templates():
    texts = ["A proverb says that a watched kettle never boils.",
             "A watched kettle never boils, the proverb says.",
             "Old lanterns never die, they just lose their glow.",
             "Old kettles never die, they just change their whistle.",
             "OLD LANTERNS NEVER DIE -- they just lose their glow!",
             "Something else entirely."]
    assert group([[text] for text in texts]) == [0, 0, 2, 3, 2, 5]
    assert group([]) == [] and group([[""], ["a"]]) == [0, 1]
    assert group([["a b"], ["c d"], ["a b"], ["e f", "c d"]]) == [0, 1, 0, 1]


@pytest.mark.parametrize("threshold", [0.45, 0.7])
def test_group_against_all_pairs(threshold):
    rng = random.Random(0)
    texts = [" ".join(str(int(rng.paretovariate(0.5))) for _ in range(rng.randint(2, 8)))
             for _ in range(100)]
    texts = list(dict.fromkeys(texts))
    n = len(texts)
    sets = [set(text.split()) for text in texts]
    count = collections.Counter(word for words in sets for word in words)

    def weight(words):
        return sum(math.log((n + 1) / count[word]) for word in words)

    numbers = list(range(n))
    for i, j in itertools.combinations(range(n), 2):
        if weight(sets[i] & sets[j]) >= threshold * weight(sets[i] | sets[j]) - 1e-9:
            a, b = sorted((numbers[i], numbers[j]))
            numbers = [a if number == b else number for number in numbers]
    assert len(set(numbers)) < n
    assert group([[text] for text in texts], threshold) == numbers


def told_twice(n):
    return [{"prompt": "About bread:", "completion": f" Pun number{i} of baker{i}{end}."}
            for i in range(n) for end in ("", ", again")]


def test_split_keeps_near_duplicates_together():
    records = told_twice(200)
    train, test = split(records)
    assert len(train) == 360 and len(test) == 40

    def numbers(records):
        return {record["completion"].split()[1] for record in records}

    def texts(records):
        return {record["completion"] for record in records}

    assert not numbers(train) & numbers(test)
    assert split(records) == (train, test) and split(records, seed=1)[1] != test
    assert texts(split(records[::-1])[1]) == texts(test)        # whatever their order
    more = split(records + [{"prompt": "About tea:", "completion": " Steep."}])[1]
    assert len(texts(more) & texts(test)) >= 38                 # hardly moved by more records


def test_split_of_few_large_or_many_groups():
    one, two, three = ([{"prompt": f"{word} word", "completion": f" {word}"}] * n
                       for word, n in (("egg", 1), ("tea", 6), ("jam", 30)))
    assert split(three) == (three, []) and split(one) == (one, [])
    assert split(two + three) == (three, two)       # too large, but better than none
    assert split(one + two + three, 0) == (one + two + three, [])
    single = [{"prompt": f"word{i}", "completion": f" text{i}"} for i in range(10)]
    assert {len(split(three + single, seed=seed)[1]) for seed in range(10)} == {4}
    many = [{"prompt": "p", "completion": f" text {i // 2}"} for i in range(20_010)]
    train, test = split(many)           # too many to compare, but equal texts stay together
    assert abs(len(test) - 2001) < 3
    assert not {r["completion"] for r in train} & {r["completion"] for r in test}


def test_long_prompts_are_compared_too():
    post = "My sourdough starter has been sulking since Tuesday, what now?"
    records = [{"prompt": post, "chosen": chosen, "rejected": rejected} for chosen, rejected in (
        (" Feed flour twice daily somewhere warm until bubbles appear.", " Ask somebody wiser."),
        (" Throw everything away; buy fresh yeast instead, honestly.", " Never mind."))]
    assert group([texts_of(record) for record in records]) == [0, 0]

# -----------------------------------------------------------------------------
# the command

def test_convert(tmp_path, capsys):
    rows = [{"chosen": dialogue(f"hi{i}", f"I am{i}" + " so" * i),
             "rejected": dialogue(f"hi{i}", f"Go{i}")} for i in range(40)]
    other = {"chosen": dialogue("hi", "Yes."), "rejected": dialogue("yo", "No.")}
    path = jsonl(tmp_path / "hh.jsonl", other, *rows)
    convert("auto", path, str(tmp_path / "out"), block_size=60, test_fraction=0.2)
    out = capsys.readouterr().out
    assert "hh.jsonl: hh, 40 records" in out
    assert f"dropped 1: the dialogues share no turn of the assistant (first: {path}:1)" in out
    assert "longer than 60 tokens (first: " in out and "train: " in out
    sizes = []
    for name in ("train", "test"):
        rows = read_jsonl(tmp_path / "out" / f"{name}.jsonl")
        assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
        read_records(tmp_path / "out" / f"{name}.jsonl", ["prompt", "chosen", "rejected"])
        sizes.append(len(rows))
    assert 0 < sizes[1] < sizes[0] and sum(sizes) < 40
    n_tokens = len(tokenizer().encode(dialogue("hi0", "")))
    with pytest.raises(InputError, match="no prompt records"):  # no room for a response
        convert("auto", path, shape="prompt", block_size=n_tokens)
    convert("auto", path, shape="prompt", block_size=n_tokens + 1)
    with pytest.raises(InputError, match="no rating records are left: they need prompt"):
        convert("auto", path, shape="rating")
    with pytest.raises(InputError, match="--test_fraction must be from 0"):
        convert("auto", path, test_fraction=1.0)


def test_convert_puns(tmp_path):
    semeval, expun = write_expun(tmp_path)
    out = tmp_path / "out"
    convert("auto", semeval, str(out))
    rows = read_jsonl(out / "train.jsonl") + read_jsonl(out / "test.jsonl")
    assert len(rows) == 44 and {"id": "het_9001", "prompt": "A pun on knead (need):",
                                "completion": " Bakers knead dough."} in rows
    convert("auto", expun, str(out), test_fraction=0.3)
    rows = read_jsonl(out / "train.jsonl") + read_jsonl(out / "test.jsonl")
    rows.sort(key=lambda row: int(row["id"].removeprefix("het_")))
    assert rows[0] == {"id": "het_0", "prompt": "A pun:", "rating": 0.4,
                       "completion": " My cat number0 thing0 likes to knead dough0."}
    convert("auto", expun, str(out), shape="preference", test_fraction=0.3)
    train, test = ({row[side].split()[2] for row in read_jsonl(out / f"{name}.jsonl")
                    for side in ("chosen", "rejected")} for name in ("train", "test"))
    assert train and test and not train & test
    with pytest.raises(InputError, match="puns are not ranked"):
        convert("auto", expun, shape="ranking")


def test_half_surrogates_and_an_empty_test_set(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "\\ud83d lone \\ud83c\\udf5e", "completion": " a\\u2028b"}\n' * 2,
                    encoding="utf-8")
    convert("trl", path, str(tmp_path / "out"))
    assert "all records are near-duplicates of one another" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert rows == [{"prompt": "\ufffd lone \U0001f35e", "completion": " a\u2028b"}] * 2
    assert (tmp_path / "out" / "test.jsonl").read_text() == ""


def test_the_command(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,completion\n" + "".join(f"a{i}:,b{i}\n" for i in range(20)))

    command = [sys.executable, "-m", "real.corpora", "csv", path, tmp_path / "out", "--as",
               "prompt", "--test_fraction", "0.2"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "test: 4 prompt records" in done.stdout, done.stderr
    assert sorted(read_jsonl(tmp_path / "out" / "test.jsonl")[0]) == ["prompt"]
