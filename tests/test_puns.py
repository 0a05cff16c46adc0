"""The pun world: what the grammar writes, what the judge says of it, what the records contain, what check finds."""

import math
import random
from collections import Counter

import pytest

import puns
from common import InputError
from puns import HELD_OUT, MIX, Thing, World, pluralize, world

# A lexicon of two topics, small enough to count by hand: 3 things, 2 + 2 phrases, 2 literals, 2 frames.
TINY = {
    "topics.txt": "topic banks\nperson banker, teller\npun lose *interest* | what money earns | curiosity\n"
                  "pun cash in one's *chips* | coins | to die\n"
                  "topic bread\nobject oven\npun *knead/need* a hug | to work dough | to want\npun rise to the *loaf* | a bread | nothing\n",
    "literals.txt": "# plain\nmove to another town\npaint the fence\n",
    "frames.txt": "first | person | I was {a X} until I {past my}.\nnever | any | Old {Xs} never die, they just {base their}.\n",
    "verbs.txt": "lose loses lost lost losing\ncash cashes cashed cashed cashing\nknead kneads kneaded kneaded kneading\n"
                 "rise rises rose risen rising\nmove moves moved moved moving\npaint paints painted painted painting\n",
}


def write_lexicon(folder, **changes):
    """TINY in a folder; changes: {file without .txt: (old, new)}."""
    for name, text in TINY.items():
        if name.removesuffix(".txt") in changes:
            old, new = changes[name.removesuffix(".txt")]
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)
    return folder


def kind_of(parse):
    return "literal" if not parse.phrase.topic else "pun" if parse.phrase.topic == parse.thing.topic else "mismatch"

# -----------------------------------------------------------------------------
# writing and judging

def test_what_is_written_parses_back():
    """The property that all rests on: every thing, phrase and frame, in random company, parses to exactly what it was written from, and
    is judged as what it is."""
    w, rng = world(), random.Random(1)
    triples = [(rng.choice(w.frames), thing, rng.choice(w.phrases + w.literals)) for thing in w.things * 2]
    triples += [(rng.choice(w.frames), rng.choice(w.things), phrase) for phrase in (w.phrases + w.literals) * 2]
    triples += [(frame, rng.choice(w.things), rng.choice(w.phrases + w.literals)) for frame in w.frames * 20]
    for frame, thing, phrase in triples:
        if frame in w.frames_for[thing.kind]:
            verdict = w.judge(w.prompt(thing), " " + w.render(frame, thing, phrase))
            pun = phrase.topic == thing.topic
            assert verdict.parse == (frame, thing, phrase)
            assert verdict[:4] == (True, True, pun, pun and (thing, phrase) in w.held_out)
        else:
            assert w.parse(w.render(frame, thing, phrase)) is None


def test_a_change_of_one_word_that_breaks_the_pun_is_seen():
    """Another thing in the same sentence: still English, no pun. A word misspelled, doubled or cut off: no sentence at all."""
    w, rng = world(), random.Random(3)
    for _ in range(300):
        thing = rng.choice(w.things)
        frame, phrase = rng.choice(w.frames_for[thing.kind]), rng.choice(w.topic_phrases[thing.topic])
        text = w.render(frame, thing, phrase)
        other = rng.choice([t for t in w.things if t.topic != thing.topic and t.kind == thing.kind])
        verdict = w.judge(w.prompt(other), " " + w.render(frame, other, phrase))
        assert verdict.fluent and verdict.on_topic and not verdict.pun
        i, words = rng.randrange(len(text)), text.split()
        k = rng.randrange(len(words))
        for broken in (text[:i] + "zz" + text[i:], " ".join(words[:k] + [words[k]] + words[k:]), " ".join(words[:-1])):
            assert not w.judge(w.prompt(thing), " " + broken).fluent


def test_judge_fields(tmp_path):
    w = World(write_lexicon(tmp_path))
    lose = " I was a banker until I lost interest."
    assert w.judge("About a banker:", lose)[:3] == (True, True, True)
    assert w.judge("About a teller:", lose)[:3] == (True, False, True)             # a pun, but not what was asked for
    assert w.judge("About a banker:", lose[1:])[:3] == (True, True, True)          # the space is format
    assert w.judge("About a banker:", " " + lose)[0] is False                      # a second one is not
    assert w.judge("About a banker:", " I was a banker until I kneaded a hug.")[:3] == (True, True, False)
    assert w.judge("About an oven:", " I was an oven until I kneaded a hug.") == (False, False, False, False, None)   # no person
    for text in ("", " ", lose[:-1], lose + " ", lose.lower(), lose + lose, lose.replace("a banker", "an banker"), "\x00", "😀"):
        assert w.judge("About a banker:", text) == (False, False, False, False, None), text


# -----------------------------------------------------------------------------
# words

@pytest.mark.parametrize("name, expected", [
    ("banker", "a banker"), ("actor", "an actor"), ("unicorn", "a unicorn"), ("used car", "a used car"), ("ukulele", "a ukulele"),
    ("one-man band", "a one-man band"), ("European", "a European"), ("hourglass", "an hourglass"), ("heir", "an heir"), ("herb grower", "an herb grower"),
    ("honest man", "an honest man"), ("x-ray", "an x-ray"), ("umpire", "an umpire"), ("undertaker", "an undertaker"), ("owl", "an owl")])
def test_articles(name, expected):
    slots = Thing("t", "person", name, name + "s").slots
    assert slots["a X"] == expected and slots["A X"] == expected[0].upper() + expected[1:]


@pytest.mark.parametrize("name, expected", [("banker", "bankers"), ("box", "boxes"), ("coach", "coaches"), ("brush", "brushes"),
                                            ("boss", "bosses"), ("baby", "babies"), ("monkey", "monkeys"), ("quiz", "quizes")])
def test_plurals(name, expected):
    assert pluralize(name) == expected      # an irregular one ("quizzes") is written in the lexicon: name/plural


def test_pronouns_and_reflexives(tmp_path):
    w = World(write_lexicon(tmp_path, literals=("paint the fence", "paint one's hat\npaint oneself in everyone's way"),
                            topics=("object oven", "animal owl"), frames=("Old {Xs}", "{A X}? {They} {past X's}, did {they}.\na | any | Old {Xs}")))
    frame, (_, hat, me), (banker, _, owl) = w.frames[1], w.literals, w.things
    for whose, self in dict(my="myself", your="yourself", his="himself", her="herself", its="itself", our="ourselves",
                            their="themselves").items():
        assert w.inflect(hat, "past", whose) == f"painted {whose} hat"
        assert w.inflect(me, "past", whose) == f"painted {self} in everyone's way"
    assert w.render(frame, banker, hat) == "A banker? They painted their hat, did they."
    assert w.render(frame, owl, hat) == "An owl? It painted its hat, did it."
    assert w.render(frame, owl, me) == "An owl? It painted itself in everyone's way, did it."
    assert w.parse("An owl? It painted its hat, did it.") and not w.parse("An owl? It painted their hat, did it.")

# -----------------------------------------------------------------------------
# records

def pairs_of(texts):
    """The (thing, phrase) of every text that parses to a pun."""
    parses = [parse for text in texts if (parse := world().parse(text.removeprefix(" ")))]
    return {parse[1:] for parse in parses if kind_of(parse) == "pun"}


def test_held_out_pairs_are_in_no_training_set():
    w = world()
    puns = sum(len(w.topic_phrases[thing.topic]) for thing in w.things)
    assert len(set(w.held_out)) == round(HELD_OUT * puns) and HELD_OUT == 0.15
    # enough records to meet nearly every pair that may be met, so that a held-out one would be met too
    seen = pairs_of(record["completion"] for record in w.corpus(20_000, seed=5, mix={"pun": 1.0}))
    seen |= pairs_of(text for record in w.preferences(8_000, seed=5) for text in (record["chosen"], record["rejected"]))
    seen |= pairs_of(text for record in w.rankings(4_000, seed=5) for text in record["ranked"])
    assert len(seen) > 0.95 * (puns - len(w.held_out))
    assert not seen & set(w.held_out)
    # and the held-out preferences are about nothing else
    chosen = pairs_of(record["chosen"] for record in w.preferences(500, seed=6, held_out=True))
    assert chosen and chosen <= set(w.held_out)


def test_each_thing_keeps_a_pun_to_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(puns, "HELD_OUT", 1.0)
    w = World(write_lexicon(tmp_path))
    assert [len(phrases) for phrases in w.train_puns.values()] == [1, 1, 1] and len(w.held_out) == 3     # of 3 x 2


def test_corpus_mix():
    """30 % puns, 35 % mismatches, 35 % literal: 10,000 records, standard error at most .5 %."""
    w, n = world(), 10_000
    counts = Counter(kind_of(w.parse(record["completion"][1:])) for record in w.corpus(n, seed=7))
    assert sum(MIX.values()) == pytest.approx(1)
    for kind, share in MIX.items():
        assert counts[kind] / n == pytest.approx(share, abs=0.02)


def test_records_ask_for_what_they_tell():
    """0 broken or off topic, 1 fluent, 2 a pun."""
    def level(record, text):
        verdict = w.judge(record["prompt"], text)
        return verdict.on_topic * (1 + verdict.pun)

    w = world()
    assert all(level(record, record["completion"]) >= 1 for record in w.corpus(300, seed=8))
    assert all(level(record, record["chosen"]) > level(record, record["rejected"]) for record in w.preferences(300, seed=8))
    assert all([level(record, text) for text in record["ranked"]] == [2, 1, 0] for record in w.rankings(300, seed=8))


def test_label_noise_flips_the_given_share():
    """The same pairs with and without noise: 4000 of them, a quarter of them the other way round (standard error .7 %)."""
    w = world()
    clean, noisy = w.preferences(4000, seed=9), w.preferences(4000, seed=9, noise=0.25)
    flips = [a | {"chosen": a["rejected"], "rejected": a["chosen"]} for a in clean]
    assert all(b in (a, flip) for a, b, flip in zip(clean, noisy, flips, strict=True))
    assert sum(b == flip for b, flip in zip(noisy, flips, strict=True)) / 4000 == pytest.approx(0.25, abs=0.03)


def test_seeds_reproduce_and_differ():
    w = world()
    for make in (w.corpus, w.preferences, w.rankings):
        assert make(50, 1) == make(50, 1) != make(50, 2)
    names = [[(thing.name, phrase.text) for thing, phrase in some.held_out] for some in (w, World())]
    assert names[0] == names[1]

# -----------------------------------------------------------------------------
# entropy

def test_entropy_by_writing_everything_down(tmp_path):
    """In a tiny world all completions of a prompt can be listed with their probabilities: they sum to 1, and H = -sum p log p."""
    w, entropies = World(write_lexicon(tmp_path)), []
    for thing in w.things:
        p = Counter()
        for frame in w.frames_for[thing.kind]:
            by_kind = {"pun": w.train_puns[thing], "literal": w.literals, "mismatch": [f for f in w.phrases if f.topic != thing.topic]}
            for kind, phrases in by_kind.items():
                for phrase in phrases:
                    p[w.render(frame, thing, phrase)] += MIX[kind] / len(phrases) / len(w.frames_for[thing.kind])
        assert sum(p.values()) == pytest.approx(1)
        entropies.append(-sum(x * math.log(x) for x in p.values()))
    assert w.entropy() == pytest.approx(sum(entropies) / len(entropies), abs=1e-9)

# -----------------------------------------------------------------------------
# the checker

@pytest.mark.parametrize("file, old, new, where, reason", [
    ("topics", "person banker", "people banker", "topics.txt:2", "unknown field 'people'"),
    ("topics", "topic banks\n", "", "topics.txt:1", "before the first topic"),
    ("topics", "topic bread", "topic banks", "topics.txt:5", "topic 'banks' stands already at topics.txt:1"),
    ("topics", "teller", "banker", "topics.txt:2", "thing 'banker' stands already at topics.txt:2"),
    ("topics", "cash in one's *chips*", "lose *interest*", "topics.txt:4", "phrase 'lose interest' stands already at topics.txt:3"),
    ("topics", "the *loaf*", "the *interest*", "topics.txt:8", "pun word 'interest' stands already at topics.txt:3"),
    ("topics", "*knead/need*", "*knead/interest*", "topics.txt:7", "pun word 'interest' stands already at topics.txt:3"),
    ("topics", "the *loaf*", "the *banker*", "topics.txt:8", "'banker' of topic bread is also a thing of topic banks"),
    ("topics", "*interest*", "interest", "topics.txt:3", "mark one pun word with asterisks, here are 0"),
    ("topics", "lose *interest*", "*lose* *interest*", "topics.txt:3", "mark one pun word with asterisks, here are 2"),
    ("topics", " | curiosity", "", "topics.txt:3", "a pun is: phrase with its *pun word*"),
    ("topics", "lose *interest*", "Lose *interest*!", "topics.txt:3", "two or more lower-case words without punctuation"),
    ("topics", "object oven\n", "", "topics.txt:5", "topic bread has no thing"),
    ("verbs", "rise rises rose risen rising\n", "", "topics.txt:8", "all forms of 'rise'"),
    ("verbs", "rose risen", "rose", "verbs.txt:4", "five forms"),
    ("verbs", "move moves moved moved moving", "lose loses lost lost losing", "verbs.txt:5", "verb 'lose' stands already at verbs.txt:1"),
    ("literals", "paint the fence", "move to another town", "literals.txt:3", "phrase 'move to another town' stands already"),
    ("frames", "{past my}", "{passed my}", "frames.txt:1", "unknown slot {passed my}"),
    ("frames", "{past my}", "left", "frames.txt:1", "exactly one for the phrase"),
    ("frames", "{a X}", "someone", "frames.txt:1", "a slot for the thing"),
    ("frames", "Old {Xs}", "Old {Xs} }", "frames.txt:2", "Single '}' encountered"),
    ("literals", "paint the fence", "paint the *fence*", "literals.txt:3", "mark no pun word"),
    ("frames", "| person |", "| people |", "frames.txt:1", "a frame is: family | person or any | text"),
])
def test_mistakes_are_found_with_file_and_line(tmp_path, file, old, new, where, reason):
    with pytest.raises(InputError) as error:
        World(write_lexicon(tmp_path, **{file: (old, new)}))
    assert any(line.startswith(where + ": ") and reason in line for line in str(error.value).splitlines()), str(error.value)


def test_a_missing_lexicon_file_is_named(tmp_path):
    write_lexicon(tmp_path)
    (tmp_path / "verbs.txt").unlink()
    with pytest.raises(InputError, match="verbs.txt: cannot be read"):
        World(tmp_path)


def test_the_check_command(tmp_path, monkeypatch, capsys):
    """It counts what is there, and names a sentence that does not parse back."""
    w = World(write_lexicon(tmp_path))
    assert w.phrases[2].text == "knead a hug" and (w.phrases[2].written, w.phrases[2].heard) == ("knead", "need")
    monkeypatch.setattr(puns, "World", lambda: w)
    puns.check()
    out = capsys.readouterr().out
    assert "2 topics, 3 things, 4 pun phrases (1 of them heterographic), 2 literal phrases, 2 frames in 2 families" in out
    assert "6 pairs make a pun, 1 of them are held out" in out        # 2 x 2 + 1 x 2; .15 * 6 = .9
    monkeypatch.setattr(w, "parse", lambda text: None)
    with pytest.raises(InputError, match="ambiguous: 'I was a"):
        puns.check()
