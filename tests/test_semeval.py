"""SemEval's and ExPUNations' files, detokenization, training pairs, minimal pairs."""

import json

import pytest

from common import InputError
from real import semeval
from real.corpora import load
from real.semeval import Pun, depun, detokenize, inflect, lemmas, span_of

# Texts of our own in SemEval's format: id, tokens, index of the pun word, its two senses.
TEXTS = {
    "heterographic": [
        ("het_9001", "Bakers knead dough .", 1, "knead%2:35:00:: need%2:42:00::"),
        ("het_9002", "The stairs said , ' ' It isn ' t polite to keep stairing . ' '", 13,
         "stair%1:06:00:: stare%2:39:00::;stare%2:39:01::"),
        ("het_9003", "A watched kettle rarely hurries .", None, None)],
    "homographic": [
        ("hom_9001", "The tailor had to press on .", 4, "press%2:35:00:: press_on%2:38:00::"),
        ("hom_9002", "My clock stopped , so I lost 1 , 000 hours .", 6, None)],
}


def write_semeval(folder, more=()):
    """SemEval's XML and gold files of TEXTS and more heterographic texts. Returns the folder."""
    folder.mkdir(parents=True)
    for kind, items in TEXTS.items():
        items = items + list(more) if kind == "heterographic" else items
        xml = ["<?xml version='1.0' encoding='utf-8'?>", "<!DOCTYPE corpus SYSTEM 'puns.dtd'>",
               "<corpus lang='en'>"]
        gold = {1: "", 2: "", 3: ""}
        for text_id, text, i, senses in items:
            words = [f"<word id='{text_id}_{n}'>{word}</word>"
                     for n, word in enumerate(text.split(), 1)]
            xml.append(f"<text id='{text_id}'>{''.join(words)}</text>")
            gold[1] += f"{text_id}\t{int(i is not None)}\n"
            if i is not None:
                gold[2] += f"{text_id} {text_id}_{i + 1}\n"
            if senses:
                gold[3] += f"{text_id}_{i + 1}\t{senses}\n"
        xml.append("</corpus>\n")
        (folder / f"subtask1-{kind}-test.xml").write_text("\n".join(xml), encoding="utf-8")
        for n, lines in gold.items():
            (folder / f"subtask{n}-{kind}-test.gold").write_text(lines, encoding="utf-8")
    return folder


def rating(text_id, funniness, raters=(4, 3, 10, 1, 0)):
    """A record of ExPUNations, as far as it is read."""
    return {"ID": text_id, "Offensive/Inappropriate?": [0, 1, ""] + [0] * (len(raters) - 3),
            "Is a Joke?": [int(rating > 0) for rating in funniness],
            "Funniness (1-5)": funniness, "Annotator_IDs": list(raters)}


def write_expun(folder, n=40):
    """SemEval with n more puns and n / 2 non-puns, and ExPUNations beside it with the ratings of
    these puns. Returns both folders."""
    more = [(f"het_{i}", f"My {word} number{i} thing{i} likes to knead dough{i} .", 6,
             "knead%2:35:00:: need%2:42:00::") for i, word in enumerate(["cat", "dog"] * (n // 2))]
    more += [(f"het_{n + i}", f"My plain sentence{i} has no need of word{i} .",
              None, None) for i in range(n // 2)]
    rows = [rating(f"het_{i}", [i % 5, (i + 1) % 5, 1, 0, i % 3]) for i in range(n)]
    expun = folder / "expun"
    expun.mkdir(parents=True)
    path = expun / "expunations_annotated_full.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return write_semeval(folder / "semeval", more), expun

# -----------------------------------------------------------------------------
# loading

@pytest.mark.parametrize("text", [
    "It isn't Wal-Mart, is it?", '"I\'m up," said Tom. "So am I!"', "O'Brien came at 3:30... late.",
    "The boys' room costs $1,000.50 or 5%.", "A sign (in U.S. shops) said 'Keep off'.",
    "Old bakers never die -- they just rise.", "Get 'em while they're hot; we'll wait.",
    "It was a close call - he was on the phone.", "Use <this> and/or that."])
def test_detokenize_inverts_semevals_tokens(text):
    tokens = [""]
    for char in text.replace("--", "- -").replace('"', "' '"):
        if char.isalnum():
            tokens[-1] += char
        else:
            tokens += [char, ""]
    tokens = [token for token in tokens if token.strip()]
    assert detokenize(tokens) == text
    for i, token in enumerate(tokens):
        if token.isalnum():
            assert text[slice(*span_of(text, tokens, i))] == token


@pytest.mark.parametrize("word, first, second, expected", [
    ("knead", "knead%2:35:00::", "need%2:42:00::", ("knead", "need")),
    ("knead", "need%2:42:00::", "knead%2:35:00::", ("knead", "need")),      # the order is free
    ("chill", "chill_out%2::", "chill%2::", ("chill", "chill out")),
    ("bank", "bank%1:14:00::", "bank%1:17:01::", ("bank", "")),
    ("tied", "tie%2::", "tide_over%2::;tide%1::", ("tie", "tide"))])     # one word before a phrase
def test_lemmas(word, first, second, expected):
    assert lemmas(word, first, second) == expected


def test_semeval(tmp_path):
    corpus = load(write_semeval(tmp_path / "data" / "test"))
    assert corpus.format == "semeval" and not corpus.dropped
    puns = {pun.id: pun for pun in corpus.records}
    assert len(puns) == 5 and sum(pun.is_pun for pun in corpus.records) == 4
    assert puns["het_9002"].text == 'The stairs said, "It isn\'t polite to keep stairing."'
    assert puns["het_9002"][2:7] == ("heterographic", True, "stairing", "stare", "stair")
    assert puns["het_9003"].pun_word == "" and not puns["het_9003"].is_pun
    assert (puns["hom_9001"].pun_lemma, puns["hom_9001"].alt_word) == ("press", "press on")
    assert puns["hom_9002"].text == "My clock stopped, so I lost 1,000 hours."
    assert puns["hom_9002"].alt_word == ""
    for pun in corpus.records:
        assert pun.text[slice(*pun.span)] == pun.pun_word
    file = tmp_path / "data" / "test" / "subtask1-homographic-test.xml"
    assert load(tmp_path).records == load(file).records == corpus.records


def test_semeval_prefers_test_to_trial_and_refuses_two_copies(tmp_path):
    write_semeval(tmp_path / "test")
    for file in write_semeval(tmp_path / "trial").iterdir():
        file.rename(file.with_name(file.name.replace("-test", "-trial")))
    assert len(load(tmp_path).records) == 5
    write_semeval(tmp_path / "copy")
    with pytest.raises(InputError, match="more than one"):
        load(tmp_path)


def test_a_pun_without_a_pun_word_is_dropped(tmp_path):
    path = write_semeval(tmp_path / "test")
    gold = path / "subtask2-homographic-test.gold"
    gold.write_text("hom_9002 hom_9002_7\n", encoding="utf-8")
    corpus = load(tmp_path)
    assert len(corpus.records) == 4
    assert "(hom_9001)" in corpus.dropped["a pun without a known pun word"][0]


@pytest.mark.parametrize("name, old, new, message", [
    ("subtask1-heterographic-test.xml", "</corpus>", "", r"\.xml:\d+: this is not XML"),
    ("subtask1-heterographic-test.gold", "het_9001\t1", "het_9001\tyes", "no line with 0 or 1"),
    ("subtask1-homographic-test.gold", "hom_9001\t1", "hom_9001", r"test\.gold:1: .* hom_1 1"),
    ("subtask2-heterographic-test.gold", "het_9001_2", "het_9001_99", "is not a word of it"),
    ("subtask3-heterographic-test.gold", "knead%2:35:00::", "knead", r"subtask3.*\.gold:1: ")])
def test_damaged_files_of_semeval(tmp_path, name, old, new, message):
    path = write_semeval(tmp_path / "test") / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load(tmp_path)
    path.unlink()
    with pytest.raises((InputError, FileNotFoundError), match=r"there is no such|No such file"):
        load(tmp_path if name.endswith(".gold") else path)


def test_expun(tmp_path):
    folder = write_semeval(tmp_path / "elsewhere")
    path = tmp_path / "expunations_annotated_full.json"
    rows = [rating("het_9001", [2, 1, 0, 3, 2]), rating("het_1", [1] * 5)]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    corpus = load(path, semeval=folder)
    assert corpus == load(tmp_path, "expun", semeval=folder) and corpus.format == "expun"
    line = path.read_text().splitlines().index(" {", 2) + 1         # where the second one begins
    assert corpus.dropped == {"its text is not in SemEval's files": [f"{path}:{line} (het_1)"]}
    (pun,) = corpus.records
    assert (pun.raters, pun.ratings) == ((0, 1, 3, 4, 10), (2, 3, 1, 2, 0))     # by rater
    assert (pun.part, pun.funniness, pun.n_offensive) == ("full", 8 / 5, 1)
    with pytest.raises(InputError, match="name their folder with --semeval"):
        load(path)
    pilot = rating("het_9001", [1, 3, 5], (7, 8, 9)) | {"Offensive/Inappropriate?": ["0", "1", ""]}
    del pilot["Is a Joke?"]
    path.write_text(json.dumps([pilot]), encoding="utf-8")
    write_semeval(tmp_path / "semeval2017")                         # is found beside the file
    (pun,) = load(path).records
    assert (pun.part, pun.ratings, pun.n_offensive) == ("pilot", (1, 3, 5), 1)


@pytest.mark.parametrize("change, message", [
    ({"Funniness (1-5)": [1, 2]}, "must have an entry for each rater"),
    ({"Funniness (1-5)": [1, 2, 3, 4, 6]}, "from 0 to 5"),
    ({"Annotator_IDs": 3}, "'Annotator_IDs' must be a list"),
    ({"Annotator_IDs": ["a", 1, 2, 3, 4]}, "a rater must be a whole number"),
    ({"ID": 7}, "'ID' must be text")])
def test_damaged_records_of_expun(tmp_path, change, message):
    path = tmp_path / "full.json"
    path.write_text(json.dumps([rating("het_9001", [0] * 5) | change]), encoding="utf-8")
    with pytest.raises(InputError, match=rf"full\.json:1.*{message}"):
        load(path, semeval=write_semeval(tmp_path / "semeval"))

# -----------------------------------------------------------------------------
# what to train on

def pun(name="p", text="Bakers knead dough.", kind="heterographic", word="knead", alt="need",
        lemma="knead", **more):
    start = text.index(word)
    return Pun(name, text, kind, bool(word), word, alt, lemma, (start, start + len(word)), **more)


def plain(name, text, kind="heterographic", **more):
    return Pun(name, text, kind, False, **more)


def test_rated_pairs_by_hand():
    raters = (0, 1, 2)
    a = pun("a", raters=raters, ratings=(3, 2, 0), part="full")
    b = pun("b", raters=raters, ratings=(1, 2, 1), part="full")     # a: 1 win, 1 tie, 1 loss
    c = pun("c", raters=raters, ratings=(5, 3, 1), part="full")     # against b: 2 wins, 1 tie
    d = pun("d", raters=(0, 1, 3), ratings=(0, 0, 0), part="full")  # by other raters
    e = pun("e", raters=raters, ratings=(0, 0, 0), part="pilot")    # on another scale
    pairs = semeval.rated_pairs([a, b, c, d, e, pun("f")], 0.3)
    assert {(x.id, y.id): (margin, share) for x, y, margin, share in pairs} == {
        ("a", "b"): (pytest.approx(1 / 3), 0.5),
        ("c", "a"): (pytest.approx(4 / 3), 1),
        ("c", "b"): (pytest.approx(5 / 3), pytest.approx(2.5 / 3))}
    assert len(list(semeval.rated_pairs([a, b, c], 4 / 3))) == 2    # the bound itself is included
    assert not list(semeval.rated_pairs([a, a], 0))                 # without a winner, no pair


def test_detection_pairs_are_of_one_kind_and_length():
    texts = [plain("1", "Bakers bake bread."), plain("2", "Bakers bake bread.", "homographic"),
             plain("3", "Bakers bake bread all night long."), pun()]
    pairs = semeval.detection_pairs(texts)
    assert [(a.id, b.id) for a, b in pairs] == [("p", "1")]


@pytest.mark.parametrize("lemma, like, own, expected", [
    ("stare", "stairing", "stair", "staring"), ("die", "dyed", "dye", "died"),
    ("sin", "singed", "singe", "sinned"), ("peace", "peas", "pea", "peace"),
    ("guest", "guessed", "guess", "guest"), ("price", "prizes", "prize", "prices"),
    ("wait", "weighted", "weight", "waited"), ("sell", "celled", "cell", "sold"),
    ("office", "orifice", "orifice", "office"), ("hold up", "folded", "fold", "holded up"),
    ("carry", "cherries", "cherry", "carries"), ("see", "seaing", "sea", "seeing"),
    ("die", "dyeing", "dye", "dying")])
def test_inflect(lemma, like, own, expected):
    assert inflect(lemma, like, own) == expected


@pytest.mark.parametrize("changes, expected", [
    ({}, "Bakers need dough."),
    (dict(text="Stairing is rude.", word="Stairing", alt="stare", lemma="stair"),
     "Staring is rude."),
    (dict(text="He had an ewe to feed.", word="ewe", alt="you", lemma="ewe"),
     "He had a you to feed."),
    (dict(text="It is a HARE piece.", word="HARE", alt="hair", lemma="hare"),
     "It is a HAIR piece."),
    (dict(alt=""), ""), (dict(kind="homographic"), "")])
def test_depun(changes, expected):
    assert depun(pun(**changes)) == expected
