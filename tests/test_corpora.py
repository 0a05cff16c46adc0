import gzip
import hashlib
import http.server
import io
import itertools
import json
import tarfile

import pytest
from conftest import serving

import corpora
import fetch
import realpuns
from common import InputError
from corpora import load, read_records
from data import tokenizer
from realpuns import Pun, depun, detokenise, inflect

# Texts of our own, in the formats of the originals. (id, tokens, pun word's index or None, two meanings or None)
HET = [
    ("het_9001", "Bakers knead dough .", 1, "knead%2:35:00:: need%2:42:00::"),
    (
        "het_9002",
        "The stairs said , ' ' It isn ' t polite to keep stairing . ' '",
        13,
        "stair%1:06:00:: stare%2:39:00::;stare%2:39:01::",
    ),
    ("het_9003", "A watched kettle rarely hurries .", None, None),
]
HOM = [
    ("hom_9001", "The tailor had to press on .", 4, "press%2:35:00:: press_on%2:38:00::"),
    ("hom_9002", "My clock stopped , so I lost 1 , 000 hours .", 6, None),
]


def write_semeval(folder):
    folder.mkdir(parents=True)
    for kind, items in (("heterographic", HET), ("homographic", HOM)):
        xml = '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE corpus SYSTEM \'puns.dtd\'>\n<corpus lang="en" id="x">\n'
        gold = {1: "", 2: "", 3: ""}
        for name, text, i, senses in items:
            words = "".join(f'<word id="{name}_{n}">{word}</word>\n' for n, word in enumerate(text.split(), 1))
            xml += f'<text id="{name}">{words}</text>\n'
            gold[1] += f"{name}\t{int(i is not None)}\n"
            gold[2] += f"{name} {name}_{i + 1}\n" if i is not None else ""
            gold[3] += f"{name}_{i + 1}\t{senses}\n" if senses else ""
        for n in (1, 2, 3):
            (folder / f"subtask{n}-{kind}-test.gold").write_text(gold[n])
        (folder / f"subtask1-{kind}-test.xml").write_text(xml + "</corpus>\n")
    return folder


def rating(name, funniness, raters=(4, 3, 10, 1, 0), **more):
    n = len(raters)
    return {
        "ID": name,
        "Understand the text?": [1] * n,
        "Offensive/Inappropriate?": [0, 1, ""] + [0] * (n - 3),
        "Is a Joke?": [int(f > 0) for f in funniness],
        "Funniness (1-5)": funniness,
        "Natural language explanation": ["knead sounds like need", ""] + [""] * (n - 2),
        "Joke keywords": [["knead", "dough"], ["Knead "], [""]] + [[""]] * (n - 3),
        "Annotator_IDs": list(raters),
    } | more


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refuses(text, path, *args, **options):
    with pytest.raises(InputError) as error:
        load(path, *args, **options)
    assert text in str(error.value) and "\n" not in str(error.value), str(error.value)


# -----------------------------------------------------------------------------
# SemEval and ExPUNations


@pytest.mark.parametrize(
    "text",
    [
        "It isn't Wal-Mart, is it?",
        '"I\'m up," said Tom. "So am I!"',
        "The boys' room costs $1,000.50 or 5%.",
        "O'Brien came at 3:30... late.",
        "A sign (in U.S. shops) said 'Keep off'.",
        "Old bakers never die -- they just rise.",
        "Get 'em while they're hot; we'll wait.",
        "It was a close call - he was on the phone.",
    ],
)
def test_detokenise(text):
    tokens, run = [], ""
    for char in text.replace("--", "- -").replace('"', "' '") + " ":
        if char.isalnum():
            run += char
            continue
        tokens += [run] * bool(run) + [char] * (not char.isspace())
        run = ""
    made, spans = detokenise(tokens)
    assert made == text
    assert all(made[start:end] == token for token, (start, end) in zip(tokens, spans, strict=True) if token.isalnum())


def test_semeval(tmp_path):
    corpus = load(write_semeval(tmp_path / "data" / "test"))
    assert corpus.format == "semeval" and not corpus.dropped
    puns = {pun.id: pun for pun in corpus.records}
    assert len(puns) == 5 and sum(pun.is_pun for pun in corpus.records) == 4
    assert puns["het_9002"].text == 'The stairs said, "It isn\'t polite to keep stairing."'
    assert puns["het_9002"][2:7] == ("heterographic", True, "stairing", "stare", "stair")
    assert puns["het_9003"].pun_word == "" and not puns["het_9003"].is_pun
    assert (puns["hom_9001"].pun_lemma, puns["hom_9001"].alt_word) == ("press", "press on")
    assert (puns["hom_9002"].text, puns["hom_9002"].alt_word) == ("My clock stopped, so I lost 1,000 hours.", "")
    for pun in corpus.records:
        assert pun.text[slice(*pun.span)] == pun.pun_word
    assert load(tmp_path).records == load(tmp_path / "data" / "test" / "subtask1-homographic-test.xml").records == corpus.records
    assert realpuns.completion(puns["het_9001"]) == {"prompt": "A pun on knead (need):", "completion": " Bakers knead dough."}


def test_semeval_prefers_test_to_trial_and_refuses_copies(tmp_path):
    write_semeval(tmp_path / "test")
    trial = write_semeval(tmp_path / "trial")
    for file in trial.iterdir():
        file.rename(file.with_name(file.name.replace("-test", "-trial")))
    assert len(load(tmp_path).records) == 5
    write_semeval(tmp_path / "copy")
    refuses("more than once", tmp_path)


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("subtask1-heterographic-test.xml", "</corpus>", "", ".xml:"),
        ("subtask1-heterographic-test.gold", "het_9001\t1", "het_9001\tyes", "no line with 0 or 1"),
        ("subtask1-homographic-test.gold", "hom_9001\t1", "hom_9001", "subtask1-homographic-test.gold:1: not a gold line"),
        ("subtask2-heterographic-test.gold", "het_9001_2", "het_9001_99", "is no word of this text"),
        ("subtask3-heterographic-test.gold", "knead%2:35:00::", "knead", "subtask3-heterographic-test.gold:1: not a gold line"),
    ],
)
def test_semeval_says_what_is_wrong(tmp_path, name, old, new, message):
    path = write_semeval(tmp_path / "test") / name
    path.write_text(path.read_text().replace(old, new))
    refuses(message, tmp_path)
    path.unlink()
    with pytest.raises(InputError):
        load(tmp_path, "semeval") if name.endswith(".gold") else load(path, "semeval")


def test_expun(tmp_path):
    semeval = write_semeval(tmp_path / "semeval")
    path = tmp_path / "expunations_annotated_full.json"
    path.write_text(json.dumps([rating("het_9001", [2, 1, 0, 3, 2]), rating("het_1", [1] * 5)], indent=1))
    corpus = load(path, semeval=semeval)
    assert corpus == load(tmp_path, "expun", semeval=semeval) and corpus.format == "expun"
    assert [len(places) for places in corpus.dropped.values()] == [1] and "(het_1)" in corpus.dropped.popitem()[1][0]
    (pun,) = corpus.records
    assert (pun.raters, pun.ratings, pun.part) == ((0, 1, 3, 4, 10), (2, 3, 1, 2, 0), "full")  # in the raters' order
    assert pun.funniness == 8 / 5 and pun.is_joke_rate == 4 / 5 and pun.offensive_rate == 1 / 4  # "" is no vote
    assert pun.keywords == ("knead",) and pun.explanations == ("knead sounds like need",) and pun.alt_word == "need"


def test_expun_pilot_has_other_fields(tmp_path):
    row = rating("het_9001", [1, 3, 5], (7, 8, 9)) | {
        "Offensive/Inappropriate?": ["0", "1", ""],
        "Joke keywords": ["dough", ["Dough"], [""]],
    }
    row["Understand the Joke?"] = row.pop("Understand the text?")
    del row["Is a Joke?"]
    path = tmp_path / "pilot.json"
    path.write_text(json.dumps([row]))
    (pun,) = load(path, semeval=write_semeval(tmp_path / "semeval")).records
    assert (pun.part, pun.is_joke_rate, pun.offensive_rate, pun.keywords) == ("pilot", None, 0.5, ("dough",))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Funniness (1-5)": [1, 2]}, "record 1 (het_9001): 'Funniness (1-5)' has 2 entries for 5 raters"),
        ({"Funniness (1-5)": [1, 2, 3, 4, 6]}, "from 0 to 5"),
        ({"Joke keywords": 3}, "'Joke keywords' is not a list"),
        ({"ID": 7}, "'ID' is not text"),
    ],
)
def test_expun_says_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "full.json"
    path.write_text(json.dumps([rating("het_9001", [0] * 5) | change]))
    refuses(message, path, semeval=write_semeval(tmp_path / "semeval"))


def pun(name="p", text="Bakers knead dough.", kind="heterographic", word="knead", alt="need", lemma="knead", **more):
    start = text.index(word)
    return Pun(name, text, kind, bool(word), word, alt, lemma, (start, start + len(word)), **more)


def test_rated_pairs_by_hand():
    a = pun("a", raters=(0, 1, 2), ratings=(3, 2, 0), part="full")
    b = pun("b", raters=(0, 1, 2), ratings=(1, 2, 1), part="full")  # a - b = 1/3; a wins 1, ties 1, loses 1: share 1/2
    c = pun("c", raters=(0, 1, 2), ratings=(5, 3, 1), part="full")  # c - a = 4/3, share 1; c - b = 5/3: wins 2, ties 1, 2.5/3
    d = pun("d", raters=(0, 1, 3), ratings=(0, 0, 0), part="full")  # other raters
    e = pun("e", raters=(0, 1, 2), ratings=(0, 0, 0), part="pilot")  # the other scale
    found = {(x.id, y.id): (margin, share) for x, y, margin, share in realpuns.rated_pairs([a, b, c, d, e, pun("f")], 0.3)}
    assert found == {
        ("a", "b"): (pytest.approx(1 / 3), 0.5),
        ("c", "a"): (pytest.approx(4 / 3), 1),
        ("c", "b"): (pytest.approx(5 / 3), pytest.approx(2.5 / 3)),
    }
    assert len(list(realpuns.rated_pairs([a, b, c], 4 / 3))) == 2  # the bound itself is in
    assert not list(realpuns.rated_pairs([a, a], 0))  # no winner, no pair


def test_detection_pairs():
    plain = [
        Pun("1", "Bakers bake bread.", "heterographic", False),
        Pun("2", "Bakers bake.", "homographic", False),
        Pun("3", "Bakers bake bread all night long.", "heterographic", False),
    ]
    assert [(a.id, b.id) for a, b in realpuns.detection_pairs([*plain, pun()])] == [("p", "1")]


@pytest.mark.parametrize(
    "lemma, like, own, expected",
    [
        ("stare", "stairing", "stair", "staring"),
        ("die", "dyed", "dye", "died"),
        ("sin", "singed", "singe", "sinned"),
        ("peace", "peas", "pea", "peace"),
        ("guest", "guessed", "guess", "guest"),
        ("price", "prizes", "prize", "prices"),
        ("wait", "weighted", "weight", "waited"),
        ("sell", "celled", "cell", "sold"),
        ("office", "orifice", "orifice", "office"),
        ("hold up", "folded", "fold", "holded up"),
        ("carry", "cherries", "cherry", "carries"),
        ("see", "seaing", "sea", "seeing"),
        ("die", "dyeing", "dye", "dying"),
    ],
)
def test_inflect(lemma, like, own, expected):
    assert inflect(lemma, like, own) == expected


def test_depun():
    assert depun(pun()) == "Bakers need dough."
    assert depun(pun(text="Stairing is rude.", word="Stairing", alt="stare", lemma="stair")) == "Staring is rude."
    assert depun(pun(text="He had an ewe to feed.", word="ewe", alt="you", lemma="ewe")) == "He had a you to feed."
    assert depun(pun(text="It is a HARE piece.", word="HARE", alt="hair", lemma="hare")) == "It is a HAIR piece."
    assert depun(pun(alt="")) == "" and depun(pun(kind="homographic")) == ""


# -----------------------------------------------------------------------------
# preferences


def dialogue(*turns):
    return "".join(
        f"\n\n{who}: {text}" if text else f"\n\n{who}:"
        for who, text in zip(itertools.cycle(["Human", "Assistant"]), turns, strict=False)
    )


def test_hh(tmp_path):
    rows = [
        {"chosen": dialogue("hi", "Hello."), "rejected": dialogue("hi", "Hey.")},
        {"chosen": dialogue("a", "b", "c", "Good day"), "rejected": dialogue("a", "b", "c", "Go away")},
        {"chosen": dialogue("hi", "Hello."), "rejected": dialogue("hi", "")},
        {"chosen": dialogue("hi", "Yes."), "rejected": dialogue("hi", "Yes.")},
        {"chosen": dialogue("hi", "No", "why", "So."), "rejected": dialogue("hi", "Nope", "why", "So.")},
        {"chosen": dialogue("one", "A"), "rejected": dialogue("two", "B")},
    ]
    plain = jsonl(tmp_path / "train.jsonl", *rows)
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        corpus = load(path)
        assert corpus.format == "hh"
        assert corpus.records == [
            {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " Hello.", "rejected": " Hey."},
            {"prompt": dialogue("a", "b", "c", ""), "chosen": " Good day", "rejected": " Go away"},
        ]
        assert {why: [int(place.rpartition(":")[2]) for place in places] for why, places in corpus.dropped.items()} == {
            "an answer is empty": [3],
            "chosen and rejected are the same text": [4],
            "the dialogues part before the last answer": [5],
            "the two dialogues share no turn of the assistant": [6],
        }
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-20])
    refuses("cannot be read", packed)


def shp(**more):
    return {
        "post_id": "p1",
        "history": "How do I rise early?",
        "human_ref_A": "Ask a baker.",
        "human_ref_B": "Use yeast.",
        "labels": 0,
        "score_ratio": 4.0,
        "domain": "x",
        "score_A": 1,
        "score_B": 4,
    } | more


def test_shp(tmp_path):
    path = jsonl(
        tmp_path / "train.json",
        shp(),
        shp(labels=1),
        shp(score_ratio=1.5),
        *[shp(human_ref_A=str(i)) for i in range(5)],
        shp(human_ref_A=" ", post_id="2"),
    )
    corpus = load(path)
    assert corpus.format == "shp" and len(corpus.records) == 5
    assert corpus.records[0] == {
        "prompt": "\n\nHuman: How do I rise early?\n\nAssistant:",
        "chosen": " Use yeast.",
        "rejected": " Ask a baker.",
        "margin": pytest.approx(1.386294),
    }  # log 4
    assert corpus.records[1]["chosen"] == " Ask a baker."
    assert {why: len(places) for why, places in corpus.dropped.items()} == {
        "score_ratio is under 2": 1,
        "more than 5 pairs of one post": 2,
        "an answer is empty": 1,
    }
    refuses("train.json:1: 'labels' is 1", jsonl(path, shp(labels=2)))
    refuses("'score_ratio' is not a number", jsonl(path, shp(score_ratio="4")))


def test_openai(tmp_path):
    info = {"id": "t", "post": "First {line}.\nSecond line.\nThird line.", "title": "On {puns}", "subreddit": "bread"}
    row = {
        "info": info,
        "summaries": [{"text": " Loaf is hard.", "policy": "a", "note": None}, {"text": "Rise.", "policy": "b"}],
        "choice": 1,
        "worker": "w",
        "split": "train",
        "extra": {"confidence": 3},
    }
    article = row | {"info": {"id": "c", "site": "cnn", "article": "News {of} bread."}, "choice": 0, "split": "valid1"}
    path = jsonl(tmp_path / "batch3.json", row, article, row | {"summaries": [{"text": "Same."}, {"text": "Same. "}]})
    corpus = load(path)
    assert corpus.format == "openai" and list(corpus.dropped) == ["chosen and rejected are the same text"]
    assert corpus.records[0] == {
        "prompt": "SUBREDDIT: r/bread\n\nTITLE: On {puns}\n\nPOST: First {line}.\nSecond line.\nThird line.\n\nTL;DR:",
        "chosen": " Rise.",
        "rejected": " Loaf is hard.",
    }
    assert corpus.records[1] == {
        "prompt": "Article:\n\nNews {of} bread.\n\nTL;DR:",
        "chosen": " Loaf is hard.",
        "rejected": " Rise.",
    }
    # 12 words around and in the post, 3 words and an end in the longer answer: two lines do not fit 14, one does
    assert (
        load(path, block_size=14).records[0]["prompt"] == "SUBREDDIT: r/bread\n\nTITLE: On {puns}\n\nPOST: First {line}.\n\nTL;DR:"
    )
    refuses("batch3.json:1: 'choice' is missing", jsonl(path, {k: v for k, v in row.items() if k != "choice"}), "openai")
    refuses("'text' is missing", jsonl(path, row | {"summaries": [{"text": "a"}, {}]}))


def message(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    "row, record",
    [
        ({"prompt": "About bread:", "completion": " I loaf you."}, None),
        ({"prompt": "About bread:"}, None),
        ({"prompt": "a", "completion": " b", "label": False}, None),
        ({"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1.5, "share": 0.8, "id": "x"}, None),
        ({"text": "I loaf you."}, {"prompt": "A pun:", "completion": " I loaf you."}),
        ({"chosen": "Why? Hello.", "rejected": "Why? Hey."}, {"prompt": "Why?", "chosen": " Hello.", "rejected": " Hey."}),
        (
            {"messages": message(("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"))},
            {"prompt": "Be short.\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"},
        ),
        (
            {"prompt": message(("user", "Hi")), "chosen": message(("assistant", "Yo")), "rejected": message(("assistant", "No"))},
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " No"},
        ),
        (
            {"chosen": message(("user", "Hi"), ("assistant", "Yo")), "rejected": message(("user", "Hi"), ("assistant", "You"))},
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " You"},
        ),
    ],
)
def test_trl(tmp_path, row, record):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n"
    )  # a byte-order mark, Windows' line ends, a blank line
    corpus = load(path)
    assert corpus.format == "trl" and corpus.records == [record or row]


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"prompt": "a", "completion": " b"}\n{"prompt": "a", "completion": ""}', ":2: an answer is empty"),
        ('{"prompt": " ", "completion": " b"}', ":1: the prompt is empty"),
        ('{"prompt": "a", "chosen": " b", "rejected": " b"}', ":1: chosen and rejected are the same text"),
        ('{"prompt": "a", "answer": " b"}', ":1: answer + prompt is no shape"),
        ("{}", "no field at all"),
        ("[1]\n", "full"),
        ("3", ""),
        ('{"prompt": "a", "completion": 3}', ":1: 'completion' is not text"),
        ('{"prompt": "a", "completion": null}', "'completion' is not text"),
        ('{"prompt": "a", "completion": " b", "label": 1}', ":1: 'label' is not true or false"),
        ('{"prompt": "a", "chosen": " b", "rejected": " c", "margin": "1"}', ":1: 'margin' is not a number"),
        ('{"prompt": "a", "chosen": " b", "rejected": " c", "margin": NaN}', ":1: not JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}', ":3: this line has text, the file began with prompt"),
        ('{"prompt": "a"\n', ":1: not JSON"),
        ('{"prompt": "a"}\n["b"]', ":2: not a JSON object"),
        ("[" * 100_000, ""),
        ('{"messages": [{"role": "user", "content": "a"}]}', ":1: 'completion' does not begin with a message of the assistant"),
        ('{"messages": []}', ":1: 'completion' does not begin"),
        ('{"messages": "a"}', ":1: 'messages' is not a list"),
        ('{"messages": [{"role": "poet", "content": "a"}]}', "the role 'poet'"),
        ('{"prompt": ["a"], "completion": "b"}', ":1: not a JSON object"),
        ('{"chosen": "Yes", "rejected": "No"}', ":1: the prompt is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        ("", "empty"),
        ("\n\n", "empty"),
    ],
)
def test_trl_says_what_is_wrong(tmp_path, lines, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(lines)
    if lines.startswith("[") or lines == "3":
        refuses(message if message != "full" else "", path, "trl")
    else:
        refuses(message, path)


def test_bad_utf8_and_missing_files(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    refuses("mine.jsonl:2: this line is not UTF-8 (byte 11)", path)
    refuses("no such file", tmp_path / "none.jsonl")
    refuses("--format is one of", path, "csv")
    refuses("name one file", tmp_path)
    refuses("is a folder", tmp_path, "trl")


def test_own_files_are_strict_and_public_ones_are_not(tmp_path):
    path = jsonl(tmp_path / "mine.jsonl", {"prompt": "a", "completion": " b c d"}, {"prompt": "a", "completion": " b"})
    refuses("mine.jsonl:1: longer than the block of 4 tokens", path, block_size=4)  # 1 + 3 + the end
    assert len(load(path, block_size=5).records) == 2
    corpus = load(path, block_size=4, strict=False)
    assert len(corpus.records) == 1 and corpus.dropped == {"longer than the block of 4 tokens": [f"{path}:1"]}


def test_text(tmp_path):
    path = tmp_path / "puns.txt"
    path.write_text("I loaf you.\n\n  Rise and shine.\n", encoding="utf-8")
    assert load(path) == (
        "text",
        [{"prompt": "A pun:", "completion": " I loaf you."}, {"prompt": "A pun:", "completion": " Rise and shine."}],
        {},
    )


# -----------------------------------------------------------------------------
# splits


def test_group_finds_twins_and_no_template():
    texts = [
        "A proverb says that a watched kettle never boils.",
        "A watched kettle never boils, the proverb says.",
        "Old lanterns never die, they just lose their glow.",
        "Old kettles never die, they just change their whistle.",
        "OLD LANTERNS NEVER DIE -- they just lose their glow!",
        "Something else entirely.",
    ]
    assert corpora.group([[text] for text in texts]) == [0, 0, 2, 3, 2, 5]
    assert corpora.group([]) == [] and corpora.group([[""], ["a"]]) == [0, 1]
    assert corpora.group([["a b"], ["c d"], ["a b"], ["e f", "c d"]]) == [0, 1, 0, 1]  # the same text in two records


def test_prefix_filter_misses_nothing():
    import math
    import random

    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", [30, 20, 10, 9, 8, 7, 3, 2, 1, 1], k=rng.randint(1, 6))) for _ in range(60)]
    sets = [set(text.split()) for text in texts]
    weight = {w: math.log(61 / sum(w in s for s in sets)) for w in "abcdefghij" if any(w in s for s in sets)}

    def near(a, b):
        return sum(map(weight.get, a & b)) >= 0.7 * sum(map(weight.get, a | b)) - 1e-9

    numbers = list(range(60))  # brute force: all pairs, relabel until nothing changes
    for i, j in itertools.combinations(range(60), 2):
        if near(sets[i], sets[j]):
            a, b = sorted((numbers[i], numbers[j]))
            numbers = [a if n == b else n for n in numbers]
    assert corpora.group([[text] for text in texts], 0.7) == numbers


def test_split_keeps_twins_together():
    records = [
        {"prompt": "About bread:", "completion": f" Pun number{i} of baker{i}{', again' * twin}."}
        for i in range(200)
        for twin in (0, 1)
    ]
    train, test = corpora.split(records)
    assert len(train) + len(test) == 400 and len(test) == 40
    assert not {r["completion"].split()[1] for r in train} & {r["completion"].split()[1] for r in test}
    assert corpora.split(records) == (train, test) and corpora.split(records, seed=1)[1] != test
    assert {r["completion"] for r in corpora.split(records[::-1])[1]} == {r["completion"] for r in test}  # whatever the order


def test_split_by_long_prompts():
    post = "\n\nHuman: My sourdough starter has been sulking since Tuesday, what now?\n\nAssistant:"
    pair = {
        "prompt": post,
        "chosen": " Feed flour twice daily somewhere warm until bubbles appear again reliably.",
        "rejected": " Ask somebody wiser.",
    }
    other = {
        "prompt": post,
        "chosen": " Throw everything away; buy fresh yeast from any supermarket instead, honestly.",
        "rejected": " Never mind.",
    }
    assert corpora.group([corpora.texts_of(record) for record in (pair, other)]) == [0, 0]


# -----------------------------------------------------------------------------
# the one door


def write_expun(folder, n=40):
    """SemEval's and ExPUNations' files of n puns and n / 2 others of our own, the latter beside the former."""
    HET[3:] = [(f"het_{i}", f"My {w} number{i} thing{i} likes to knead dough{i} .", 6, "knead%2:35:00:: need%2:42:00::")
               for i, w in enumerate(["cat", "dog"] * (n // 2))]
    HET.extend((f"het_{n + i}", f"My plain sentence{i} about nothing{i} has no need of word{i} .", None, None) for i in range(n // 2))
    semeval = write_semeval(folder / "semeval")
    del HET[3:]
    rows = [rating(f"het_{i}", [i % 5, (i + 1) % 5, 1, 0, i % 3]) for i in range(n)]
    (folder / "expun").mkdir()
    (folder / "expun" / "expunations_annotated_full.json").write_text(json.dumps(rows))
    return semeval, folder / "expun"


def test_puns_become_what_a_stage_takes(tmp_path, capsys):
    semeval, expun = write_expun(tmp_path)
    sft_records = read_records(semeval, "completion")
    assert {"prompt": "A pun on knead (need):", "completion": " Bakers knead dough."} in sft_records and len(sft_records) == 44
    assert read_records(expun, "rating")[0] == {"prompt": "A pun:", "completion": " My cat number0 thing0 likes to knead dough0.", "rating": 0.4}
    for path, kinds in ((expun, {"rated", "twin"}), (semeval, {"twin"})):        # expun finds semeval beside it
        pairs = read_records(path, "preference")
        found = {"twin" if "need" in pair["rejected"] and pair["rejected"].replace("need", "knead") == pair["chosen"] else "rated" for pair in pairs}
        assert {pair["prompt"] for pair in pairs} == {"A pun:"} and found >= kinds
    known, test = read_records(expun, "preference", held_out=0.2)
    assert not {pair["chosen"] for pair in known} & {pair[side] for pair in test for side in ("chosen", "rejected")} and len(test) > 9
    shape = "completion", tokenizer("puns"), 20
    assert len(read_records(semeval, *shape)) < 44                               # what does not fit is left out and counted ...
    assert "records: with their prompt longer than the block of 20 tokens" in capsys.readouterr().out
    jsonl(tmp_path / "hh.jsonl", *[{"chosen": dialogue("hi", "Hello" + " there" * i), "rejected": dialogue("hi", "Hey")} for i in range(60)])
    assert len(read_records(tmp_path / "hh.jsonl", *shape)) < 40                 # ... for all public formats
    assert "records: longer than the block of 20 tokens" in capsys.readouterr().out


def test_other_shapes_by_hand(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "chosen": " a", "rejected": " b", "margin": 1})
    assert read_records(path, "completion") == [{"prompt": "p", "completion": " a"}] and read_records(path, "prompt") == [{"prompt": "p"}]
    jsonl(path, *({"prompt": p, "completion": text, "label": good} for p, text, good in (
        ("p", " a", True), ("p", " b", False), ("p", " c", False), ("q", " d", True), ("p", " e", True), ("p", " f", True))))
    assert read_records(path, "preference") == [{"prompt": "p", "chosen": " a", "rejected": " b"}, {"prompt": "p", "chosen": " e", "rejected": " c"}]
    assert [record["completion"] for record in read_records(path, "completion")] == [" a", " d", " e", " f"]
    for shape in ("rating", "ranking"):
        with pytest.raises(InputError, match="a.jsonl: no records of prompt .*; it has prompt . completion . label"):
            read_records(path, shape)
    with pytest.raises(InputError, match="a.jsonl:1: longer than the block"):
        read_records(path, "completion", tokenizer("puns"), 2)


def test_what_is_held_out_has_no_twin_in_training(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"Pun number{i} of baker{i}{', again' * twin}.\n" for i in range(50) for twin in (0, 1)))
    known, test = read_records(path, "completion", held_out=0.1)
    assert (len(known), len(test)) == (90, 10)
    assert not {record["completion"].split()[1] for record in known} & {record["completion"].split()[1] for record in test}
    path.write_text("the same line again\n" * 20)                               # no two groups: the last ones
    assert [len(part) for part in read_records(path, "completion", held_out=0.1)] == [18, 2]
    many = [{"prompt": "p", "completion": f" text {i // 2}"} for i in range(20_010)]      # too many to compare: equal texts stay together
    known, test = corpora.split(many)
    assert not {record["completion"] for record in known} & {record["completion"] for record in test} and abs(len(test) - 2001) < 3


# -----------------------------------------------------------------------------
# show and fetch


def test_show(tmp_path, capsys):
    path = jsonl(
        tmp_path / "mine.jsonl",
        {"prompt": "a b", "completion": "c"},
        {"prompt": "a b", "completion": "c"},
        {"prompt": "a", "completion": ""},
    )
    corpora.show(path)
    out = capsys.readouterr().out
    assert "mine.jsonl: trl, 2 records, 1 dropped" in out and f"an answer is empty, the first at {path}:3" in out
    assert "2 answers touch their prompt" in out and "1 exact duplicates" in out and "completion     c" in out
    corpora.show(write_semeval(tmp_path / "semeval"))
    assert "2 heterographic puns" in capsys.readouterr().out


class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.content; cuts the connection after server.cut bytes of each answer, as long as server.cuts > 0."""

    def do_GET(self):
        server, start = self.server, 0
        server.requests.append(self.headers.get("Range"))
        if server.status != 200:
            return self.send_error(server.status)
        if (wanted := self.headers.get("Range")) and server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(server.content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            body = body[: server.cut]
        self.wfile.write(body)


@pytest.fixture
def server():
    with serving(Server, content=bytes(range(256)) * 2000, cut=200_000, cuts=0, ranges=True, status=200, requests=[]) as server:
        server.url += "/data.bin"
        yield server


def pin(server):
    return hashlib.sha256(server.content).hexdigest()


def test_download_goes_on_where_it_was_cut(server, tmp_path):
    server.cuts = 2
    assert fetch.download(server.url, tmp_path / "data.bin", pin(server), wait=0) == pin(server)
    assert (tmp_path / "data.bin").read_bytes() == server.content
    assert server.requests == [None, "bytes=200000-", "bytes=400000-"] and not (tmp_path / "data.bin.part").exists()


def test_download_goes_on_in_a_later_call(server, tmp_path):
    server.cuts = 1
    with pytest.raises(InputError, match="goes on from"):
        fetch.download(server.url, tmp_path / "data.bin", pin(server), retries=0, wait=0)
    assert (tmp_path / "data.bin.part").stat().st_size == 200_000 and not (tmp_path / "data.bin").exists()
    fetch.download(server.url, tmp_path / "data.bin", pin(server), wait=0)
    assert (tmp_path / "data.bin").read_bytes() == server.content


def test_download_from_a_server_without_ranges(server, tmp_path):
    server.cuts, server.ranges = 1, False
    fetch.download(server.url, tmp_path / "data.bin", pin(server), wait=0)
    assert (tmp_path / "data.bin").read_bytes() == server.content and server.requests[1] == "bytes=200000-"


def test_download_that_was_complete_already(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(server.content)
    fetch.download(server.url, tmp_path / "data.bin", pin(server), wait=0)
    assert (tmp_path / "data.bin").read_bytes() == server.content


def test_download_with_another_hash_is_not_kept(server, tmp_path):
    with pytest.raises(InputError, match="has the SHA-256"):
        fetch.download(server.url, tmp_path / "data.bin", "0" * 64, wait=0)
    assert not list(tmp_path.iterdir())


def test_download_errors(server, tmp_path):
    server.status = 404
    with pytest.raises(InputError, match="404"):
        fetch.download(server.url, tmp_path / "data.bin", wait=0)
    server.status = 503
    with pytest.raises(InputError, match="gave up after 2"):
        fetch.download(server.url, tmp_path / "data.bin", retries=2, wait=0)
    assert len(server.requests) == 4
    with pytest.raises(InputError, match="gave up"):
        fetch.download("http://127.0.0.1:1/data.bin", tmp_path / "data.bin", retries=1, wait=0)


def test_fetch(server, tmp_path, monkeypatch, capsys):
    write_semeval(tmp_path / "semeval2017_task7" / "data" / "test")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        tar.add(tmp_path / "semeval2017_task7", "semeval2017_task7")
        evil = tarfile.TarInfo("../../evil.xml")
        tar.addfile(evil)
    server.content, url = packed.getvalue(), server.url.replace("data.bin", "archive.tar.xz")
    server.cut, server.cuts = len(server.content) // 2, 1
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(
        fetch, "SOURCES", {"semeval": fetch.Source({url: pin(server)}, "Licence of it."), "expun": fetch.Source({url: ""}, "NC.")}
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--accept_licence"):
        fetch.fetch("semeval", out)
    assert not server.requests and "Licence of it." in capsys.readouterr().out  # seen before anything is fetched
    fetch.fetch("semeval", out, accept_licence=True)
    assert len(server.requests) == 2 and len(load(out / "semeval").records) == 5 and (out / "semeval" / "LICENCE.txt").exists()
    assert not (tmp_path / "evil.xml").exists() and not (tmp_path.parent / "evil.xml").exists()
    fetch.fetch("semeval", out, accept_licence=True)
    assert len(server.requests) == 2 and "is there already" in capsys.readouterr().out
    with pytest.raises(InputError, match="no checksum of expun is pinned"):
        fetch.fetch("expun", out, accept_licence=True)
    fetch.fetch("expun", out, accept_licence=True, verify=False)
    assert f"SHA-256 {pin(server)}, NOT checked" in capsys.readouterr().out
    fetch.fetch("expun", out, accept_licence=True, sha256=(pin(server),))
    with pytest.raises(InputError, match="names 2 checksums"):
        fetch.fetch("expun", out, accept_licence=True, sha256=("a", "b"))
