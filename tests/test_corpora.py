"""The converter: formats, errors with file and line, shapes, splits without near-duplicates."""

import collections
import gzip
import itertools
import json
import math
import random
import re

import pytest
from conftest import program, refuses
from test_semeval import write_expun

from common import read_jsonl, write_jsonl
from data import check_record, tokenizer
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


SAME = "two answers are the same text, so neither is better"

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
            "'rejected' is empty": [3], SAME: [4],
            "the dialogues differ before the last answer": [5],
            "the dialogues share no turn of the assistant": [6]}
    packed.write_bytes(packed.read_bytes()[:-20])
    refuses("train.jsonl.gz: this gzip file is damaged", load, packed)


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
    assert lines_of(corpus.dropped) == {"score_ratio is under 2": [3], "'rejected' is empty": [9],
                                        "more than 5 pairs of one post": [7, 8]}
    for changes in (dict(labels=2), dict(score_ratio="4")):
        refuses(f"train.json:1: '.*{[*changes][0]}", load, jsonl(path, shp(**changes)))


def test_openai(tmp_path):
    info = {"post": "First {line}.\nSecond line.\nThird line.", "title": "On {puns}",
            "subreddit": "bread"}
    row = {"info": info, "summaries": [{"text": " Loaf is hard."}, {"text": "Rise."}], "choice": 1}
    article = row | {"info": {"article": "News {of} bread."}, "choice": 0}
    equal = row | {"summaries": [{"text": "Same."}, {"text": "Same. "}]}
    path = jsonl(tmp_path / "batch3.json", row, article, equal)
    corpus = load(path)
    assert corpus.format == "openai" and lines_of(corpus.dropped) == {SAME: [3]}
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
    refuses("batch3.json:1: 'choice' is missing", load, jsonl(path, row), "openai")

# -----------------------------------------------------------------------------
# files of one's own: what cannot be used is an error

YO, NO = ([{"role": "assistant", "content": text}] for text in ("Yo", "No"))


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
    ({"prompt": chat("Hi"), "chosen": YO, "rejected": NO},
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


JSON = [
    ('{"prompt": "a", "completion": " b"}\n{"prompt": "a", "completion": ""}',
     ":2: 'completion' is empty"),
    ('{"prompt": "a", "answer": "b"}', ":1: this record has prompt + answer, .* prompt + comp"),
    ('{"prompt": "a", "completion": " b", "label": 2}', ":1: 'label' must be true or false"),
    ('{"prompt": "a", "rating": NaN}', ":1: this line is not JSON: NaN"),
    ('{"prompt": "a"}\n\n{"text": "b"}', ":3: the file began with prompt records, and this is a c"),
    ('{"prompt": "a"\n', ":1: this line is not JSON"),
    ('{"prompt": "a"}\n3', ":2: this is not a JSON object"),
    ('{"prompt": "a"}\n["b"]', ":2: this is a JSON array"),
    ('{"a": ' + "[" * 100_000, ":1: this line is not JSON"),
    ('{"messages": [{"role": "user", "content": "a"}]}', ":1: 'completion' must begin with a mes"),
    ('{"messages": "a"}', ":1: 'messages' must be a list"),
    ('{"messages": [{"role": "poet", "content": "a"}]}', ":1: the role 'poet'"),
    ('{"prompt": ["a"], "completion": "b"}', ":1: this is not a JSON object"),
    ('{"chosen": "Yes", "rejected": "No"}', ":1: 'prompt' is empty"),
    ('{"text": 3}', ":1: 'text' must be text"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0", ":1: this is a git-lfs pointer"),
    ("I loaf you.", ":1: this is neither JSON nor"),
    ("\n\n", ": this file is empty")]


@pytest.mark.parametrize("name, text, message", [("a.jsonl", *row) for row in JSON] + [
    ("a.json", '[\n{"prompt": "a"},\n\n{"question": "b"}]', ":4: this record has question, which"),
    ("a.json", '[\n{"prompt": "a"},\n{"prompt": "b"', ":3: this is not a JSON array"),
    ("a.json", '{"data": [\n{"prompt": "a"}]}', ":1: this line is not JSON"),
    ("a.csv", "prompt;completion\na;b\n", ":2: this record has prompt;completion, which is none"),
    ("a.csv", "prompt,completion\na,b\n\na\n", ":4: its cells do not fit the columns prompt, com"),
    ("a.csv", "prompt\na,b\n", ":2: its cells do not fit the columns prompt"),
    ("a.csv", 'prompt,completion\na,"b\n', ":2: this is not CSV"),
    ("a.csv", "prompt,completion,rating\na,b,good\n", ":2: 'rating' must be a number"),
    ("a.csv", "prompt,completion\n", ": this file has no records"),
    ("a.md", "# Puns\n", ":1: this is neither JSON nor a .csv or .txt file"),
    ("a.txt", "\xff", ":1: this is not UTF-8")])
def test_what_is_wrong_with_a_file_of_ones_own(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    refuses("^" + re.escape(str(path)) + message.replace("+", r"\+"), load, path)


def test_csv_and_text(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xef\xbb\xbfPrompt, Completion,rating\r\n"
                     b'About bread:,"I ""loaf"",\r\nyou.",3\r\n,,\r\nAbout tea:, Steep.,4.5\r\n')
    assert load(path) == ("csv", [
        {"where": f"{path}:3", "prompt": "About bread:", "completion": ' I "loaf",\nyou.',
         "rating": 3}, {"where": f"{path}:5", "prompt": "About tea:", "completion": " Steep.",
                        "rating": 4.5}], {})
    path.write_text("completion,label,prompt\nI loaf,TRUE,p\nBread,0,p\n", encoding="utf-8")
    assert [record["label"] for record in load(path).records] == [True, False]
    path = tmp_path / "puns.txt"
    path.write_text("I loaf you.\n\n  [Rise] and shine.\n", encoding="utf-8")
    assert load(path) == ("text", [
        {"where": f"{path}:{line}", "prompt": "A pun:", "completion": text}
        for line, text in ((1, " I loaf you."), (3, " [Rise] and shine."))], {})


def test_a_format_is_not_taken_for_another(tmp_path):
    write_expun(tmp_path / "puns")
    (tmp_path / "empty").mkdir()
    pairs = jsonl(tmp_path / "pairs.jsonl", {"chosen": "a b", "rejected": "a c"})
    assert load(pairs).format == "trl"
    for arguments, message in (
            ([pairs, "xml"], "the format is auto or one of"), ([tmp_path, "trl"], "is a folder"),
            ([tmp_path / "puns"], "holds both SemEval"),
            ([tmp_path / "empty"], "neither SemEval nor ExPUN"),
            ([pairs, "trl", str, "folder"], "--semeval is for the format expun"),
            ([pairs, "text"], "pairs.jsonl:1: this is JSON, not plain text"),
            ([pairs, "shp"], "pairs.jsonl:1: 'post_id' is missing, only chosen"),
            ([pairs, "json"], "pairs.jsonl:1: this file is not a JSON array")):
        refuses(message, load, *arguments)
    assert load(pairs, "hh").dropped == {
        "the dialogues share no turn of the assistant": [f"{pairs}:1"]}

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
    post = "My sourdough starter has been sulking since Tuesday, what now?"     # a long prompt
    records = [{"prompt": post, "chosen": chosen, "rejected": " Never mind."} for chosen in (
        " Feed flour twice daily somewhere warm until bubbles appear.",
        " Throw everything away; buy fresh yeast instead, honestly.")]
    assert group([texts_of(record)[:1] + texts_of(record)[2:] for record in records]) == [0, 0]


def test_group_against_all_pairs(threshold=0.45):
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


def test_split_keeps_near_duplicates_together():
    records = [{"prompt": "About bread:", "completion": f" Pun number{i} of baker{i}{end}."}
               for i in range(200) for end in ("", ", again")]
    train, test = split(records)
    assert len(train) == 360 and len(test) == 40

    def texts(records):
        return {record["completion"].split(",")[0].rstrip(".") for record in records}

    assert not texts(train) & texts(test)
    assert split(records) == (train, test) and split(records, seed=1)[1] != test
    assert texts(split(records[::-1])[1]) == texts(test)        # whatever their order
    more = split(records + [{"prompt": "About tea:", "completion": " Steep."}])[1]
    assert len(texts(more) & texts(test)) >= 19                 # hardly moved by more records


def test_split_of_few_or_large_groups():
    one, two, three = ([{"prompt": f"{word} word", "completion": f" {word}"}] * n
                       for word, n in (("egg", 1), ("tea", 6), ("jam", 30)))
    assert split(three) == (three, []) and split(one) == (one, [])
    assert split(two + three) == (three, two)       # too large, but better than none
    assert split(one + two + three, 0) == (one + two + three, [])
    single = [{"prompt": f"word{i}", "completion": f" text{i}"} for i in range(10)]
    assert {len(split(three + single, seed=seed)[1]) for seed in range(10)} == {4}

# -----------------------------------------------------------------------------
# the command

def test_reshape():
    pair = {"where": "f:1", "prompt": "p", "chosen": " a", "rejected": " b", "margin": 1,
            "share": 0.5}
    assert reshape([pair], "preference")[0] == [pair]
    assert without_where(reshape([pair], "completion")[0]) == [{"prompt": "p", "completion": " a"}]
    assert without_where(reshape([pair], "prompt")[0]) == [{"prompt": "p"}]
    ranked = {"where": "f:1", "prompt": "p", "ranked": [" a", " b", " c"]}
    assert reshape([ranked], "completion")[0][0]["completion"] == " a"
    assert reshape([pair], "rating") == ([], {"it has no prompt + completion + rating": ["f:1"]})
    labeled = [{"where": f"f:{label:d}", "prompt": "p", "completion": " a", "label": label}
               for label in (True, False)]
    assert reshape(labeled, "label")[0] == labeled
    good, left_out = reshape(labeled, "completion")
    assert good[0]["where"] == "f:1" and left_out == {"it is labeled false": ["f:0"]}


def converted(folder):
    """(train, test) of a folder that convert() wrote, where each stage can read each record."""
    parts = [read_jsonl(folder / f"{name}.jsonl") for name in ("train", "test")]
    for record in itertools.chain(*parts):
        check_record("", record, sorted(record.keys() - {"id", "margin", "share"}))
    return parts


def test_convert(tmp_path, capsys):
    rows = [{"chosen": dialogue(f"hi{i}", f"I am{i}" + " so" * i),
             "rejected": dialogue(f"hi{i}", f"Go{i}")} for i in range(40)]
    other = {"chosen": dialogue("hi", "Yes."), "rejected": dialogue("yo", "No.")}
    path = jsonl(tmp_path / "hh.jsonl", other, *rows)
    convert("auto", path, str(tmp_path / "out"), block_size=60, test_fraction=0.2)
    out = capsys.readouterr().out
    assert "hh.jsonl: hh, 40 records" in out
    assert f"dropped 1: the dialogues share no turn of the assistant (first: {path}:1)" in out
    train, test = converted(tmp_path / "out")
    assert 0 < len(test) < len(train)
    encode = tokenizer().encode
    longest = max(len(encode(row["prompt"])) + len(encode(row["chosen"])) for row in train + test)
    assert longest == 59                                        # and the end token
    assert f"dropped {40 - len(train) - len(test)}: longer than 60 tokens (first: {path}:" in out
    n_tokens = len(encode(dialogue("hi0", "")))
    convert("auto", path, shape="prompt", block_size=n_tokens + 1)      # room for a response
    refuses("no prompt records", convert, "auto", path, shape="prompt", block_size=n_tokens)
    refuses("no rating records are left: they need prompt", convert, "auto", path, shape="rating")
    refuses("there is no tokenizer 'none'", convert, "auto", path, tokenizer="none")
    convert("auto", path, str(tmp_path / "again"), block_size=60, test_fraction=0.2, seed=1)
    assert converted(tmp_path / "again")[1] != test
    refuses("--test_fraction must be from 0", convert, "auto", path, test_fraction=1.0)


def test_convert_puns(tmp_path):
    semeval, expun = write_expun(tmp_path)
    out = tmp_path / "out"
    convert("auto", semeval, str(out))
    rows = sum(converted(out), [])
    assert len(rows) == 44 and {"id": "het_9001", "prompt": 'A pun with the word "knead":',
                                "completion": " Bakers knead dough."} in rows
    convert("auto", expun, str(out), test_fraction=0.3)
    rows = sum(converted(out), [])
    assert {"id": "het_0", "prompt": "A pun:", "rating": 0.4,
            "completion": " My cat number0 thing0 likes to knead dough0."} in rows
    rated = {row["completion"]: row["rating"] for row in rows}
    convert("auto", expun, str(out), shape="preference", test_fraction=0.3)
    train, test = ({row[side].split()[2] for row in rows for side in ("chosen", "rejected")}
                   for rows in converted(out))
    assert train and test and not train & test
    for row in sum(converted(out), []):
        assert row["margin"] == pytest.approx(rated[row["chosen"]] - rated[row["rejected"]])
    refuses("none: there is no such", convert, "auto", expun, semeval=str(tmp_path / "none"))
    refuses("not of ranking", convert, "auto", expun, shape="ranking")


def test_half_surrogates_and_an_empty_test_set(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "\\ud83d lone \\ud83c\\udf5e", "completion": " a\\u2028b"}\n' * 2,
                    encoding="utf-8")
    convert("trl", path, str(tmp_path / "out"))
    assert "near-duplicates of another record, on one side with it: 1" in capsys.readouterr().out
    assert converted(tmp_path / "out") == [
        [{"prompt": "\ufffd lone \U0001f35e", "completion": " a\u2028b"}] * 2, []]


def test_the_command(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,completion\n" + "".join(f"a{i}:,b{i}\n" for i in range(20)))
    options = ["csv", path, tmp_path / "out", "--as", "prompt", "--test_fraction", "0.2"]
    done = program("real.corpora", *options)
    assert done.returncode == 0 and "test: 4 prompt records" in done.stdout, done.stderr
    path.unlink()
    done = program("real.corpora", *options)
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: there is no such file or folder\n"
