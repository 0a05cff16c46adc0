"""The pun world: what the grammar writes, how the judge reads it, the records, the lexicon."""

import math
import random
import re
import runpy
import sys
from collections import Counter

import pytest
from conftest import refuses

import puns
from common import InputError
from data import tokenizer
from puns import HELD_OUT, LEXICON, MIX, Thing, World, pluralize, world

# A lexicon small enough to count by hand: 2 topics, 3 things, 2 + 2 phrases, 2 literals, 2 frames.
TINY = {
    "topics": """\
topic banks
person banker, teller
pun lose *interest* | what money earns | curiosity
pun cash in one's *chips* | coins | to die
topic bread
object oven
pun *knead/need* a hug | to work dough | to want
pun rise to the *loaf* | a bread | nothing
""",
    "literals": "# plain\nmove to another town\npaint the fence\n",
    "frames": "first | person | I was {a X} until I {past my}.\n"
              "never | any | Old {Xs} never die, they just {base their}.\n",
    "verbs": "lose loses lost lost losing\ncash cashes cashed cashed cashing\n"
             "knead kneads kneaded kneaded kneading\nrise rises rose risen rising\n"
             "move moves moved moved moving\npaint paints painted painted painting\n",
}


def write_lexicon(folder, **changes):
    """Writes TINY to a folder. changes: {file: (old, new)}, a replacement in its text."""
    for name, text in TINY.items():
        old, new = changes.get(name, ("", ""))
        assert old in text
        (folder / f"{name}.txt").write_text(text.replace(old, new), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_world(tmp_path):
    return World(write_lexicon(tmp_path))


def kind_of(parse):
    if not parse.phrase.topic:
        return "literal"
    return "pun" if parse.phrase.topic == parse.thing.topic else "mismatch"

# -----------------------------------------------------------------------------
# writing and judging

def test_what_is_written_parses_back():
    """Every thing, phrase, and frame in random company parses to what it was written from.

    All that is measured rests on this property."""
    w, rng = world(), random.Random(1)
    phrases = w.phrases + w.literals
    triples = [(rng.choice(w.frames), thing, rng.choice(phrases)) for thing in w.things * 2]
    triples += [(rng.choice(w.frames), rng.choice(w.things), phrase) for phrase in phrases * 2]
    triples += [(frame, rng.choice(w.things), rng.choice(phrases)) for frame in w.frames * 20]
    for frame, thing, phrase in triples:
        text = w.render(frame, thing, phrase)
        if frame in w.frames_for[thing.kind]:
            is_pun = phrase.topic == thing.topic
            expected = (True, True, is_pun, (frame, thing, phrase))
            assert w.judge(w.prompt(thing), " " + text) == expected
        else:
            assert w.parse(text) is None


def test_one_changed_word_breaks_the_pun():
    """With another thing it is English, but no pun. With a misspelling it is no sentence."""
    w, rng = world(), random.Random(3)
    for _ in range(300):
        thing = rng.choice(w.things)
        frame = rng.choice(w.frames_for[thing.kind])
        phrase = rng.choice(w.topic_phrases[thing.topic])
        text = w.render(frame, thing, phrase)
        others = [t for t in w.things if t.topic != thing.topic and t.kind == thing.kind]
        other = rng.choice(others)
        verdict = w.judge(w.prompt(other), " " + w.render(frame, other, phrase))
        assert verdict[:3] == (True, True, False)
        words, i = text.split(), rng.randrange(len(text))
        k = rng.randrange(len(words))
        doubled, cut = " ".join(words[:k + 1] + words[k:]), " ".join(words[:-1])
        for broken in (text[:i] + "zz" + text[i:], doubled, cut):
            assert not w.judge(w.prompt(thing), " " + broken).fluent


def test_judge_fields(tiny_world):
    def judge(prompt, text):
        return tiny_world.judge(prompt, text)[:3]       # fluent, on topic, pun

    lose, knead = " I was a banker until I lost interest.", " I was a banker until I kneaded a hug."
    assert judge("About a banker:", lose) == (True, True, True)
    assert judge("About a teller:", lose) == (True, False, True)
    assert judge("About a banker:", knead) == (True, True, False)
    assert judge("About a banker:", lose[1:]) == (True, True, True)     # one space is format
    broken = ["", " ", " " + lose, lose[:-1], lose + " ", lose.lower(), lose + lose, "\x00", "😀",
              lose.replace("a banker", "an banker"), " I was an oven until I kneaded a hug."]
    for text in broken:
        verdict = tiny_world.judge("About a banker:", text)
        assert verdict == (False, False, False, None), text

# -----------------------------------------------------------------------------
# words

@pytest.mark.parametrize("article, names", [
    ("a", ["banker", "unicorn", "used car", "ukulele", "one-man band", "European"]),
    ("an", ["actor", "hourglass", "heir", "herb grower", "honest man", "x-ray", "umpire",
            "undertaker", "owl"])])
def test_articles(article, names):
    for name in names:
        slots = Thing("topic", "person", name, name + "s").slots
        assert slots["a X"] == f"{article} {name}"
        assert slots["A X"] == f"{article.capitalize()} {name}"


def test_plurals():
    """Irregular plurals, such as quizzes, are spelled out in the lexicon: name/plural."""
    plurals = {"banker": "bankers", "box": "boxes", "coach": "coaches", "brush": "brushes",
               "boss": "bosses", "baby": "babies", "monkey": "monkeys", "quiz": "quizes"}
    assert {noun: pluralize(noun) for noun in plurals} == plurals


def test_pronouns_and_reflexives(tmp_path):
    w = World(write_lexicon(
        tmp_path, topics=("object oven", "animal owl"),
        literals=("the fence", "one's hat\npaint oneself in everyone's way"),
        frames=("Old {Xs} never die", "{A X}? {They} {past X's}, did {they}.\na | any | Old {Xs}")))
    frame, (_, hat, self_), (banker, _, owl) = w.frames[1], w.literals, w.things
    reflexives = dict(my="myself", your="yourself", his="himself", her="herself", its="itself",
                      our="ourselves", their="themselves")
    for whose, reflexive in reflexives.items():
        assert w.inflect(hat, f"past {whose}") == f"painted {whose} hat"
        assert w.inflect(self_, f"past {whose}") == f"painted {reflexive} in everyone's way"
    assert w.render(frame, banker, hat) == "A banker? They painted their hat, did they."
    assert w.render(frame, owl, hat) == "An owl? It painted its hat, did it."
    assert w.render(frame, owl, self_) == "An owl? It painted itself in everyone's way, did it."
    assert w.parse("An owl? It painted its hat, did it.")
    assert not w.parse("An owl? It painted their hat, did it.")

# -----------------------------------------------------------------------------
# records

def pun_pairs(texts):
    """The (thing, phrase) of every text that parses to a pun."""
    parses = [world().parse(text.removeprefix(" ")) for text in texts]
    return {parse[1:] for parse in parses if parse and kind_of(parse) == "pun"}


def test_held_out_pairs_are_in_no_training_set():
    w = world()
    n_puns = sum(len(w.topic_phrases[thing.topic]) for thing in w.things)
    assert HELD_OUT == 0.15 and len(set(w.held_out)) == round(HELD_OUT * n_puns)
    # These are enough records to see nearly every allowed pair, so a held-out one would be seen.
    texts = [record["completion"] for record in w.corpus(20_000, seed=5, mix={"pun": 1.0})]
    for record in w.preferences(8_000, seed=5):
        texts += [record["chosen"], record["rejected"]]
    for record in w.rankings(4_000, seed=5):
        texts += record["ranked"]
    seen = pun_pairs(texts)
    assert len(seen) > 0.95 * (n_puns - len(w.held_out))
    assert not seen & set(w.held_out)
    # The held-out preferences contain no other puns.
    chosen = pun_pairs(record["chosen"] for record in w.preferences(500, seed=6, held_out=True))
    assert chosen and chosen <= set(w.held_out)


def test_each_thing_keeps_a_pun_to_learn(tmp_path, monkeypatch):
    """The same in each run of Python, so that no stage learns what another holds out."""
    monkeypatch.setattr(puns, "HELD_OUT", 1.0)
    w = World(write_lexicon(tmp_path))
    assert [len(phrases) for phrases in w.train_puns.values()] == [1, 1, 1]
    # Of 3 things with 2 phrases each, in the order of the checksums; hash() would give others.
    assert [(thing.name, phrase.text) for thing, phrase in w.held_out] == [
        ("banker", "cash in one's chips"), ("oven", "rise to the loaf"),
        ("teller", "cash in one's chips")]


def test_corpus_mix():
    """30 % puns, 35 % mismatches, 35 % literals; the standard error is 0.5 %. Persons come in all
    frames."""
    w, n = world(), 10_000
    parses = [w.parse(record["completion"].removeprefix(" ")) for record in w.corpus(n, seed=7)]
    counts = Counter(map(kind_of, parses))
    assert sum(MIX.values()) == pytest.approx(1)
    for kind, share in dict(pun=0.30, mismatch=0.35, literal=0.35).items():
        assert counts[kind] / n == pytest.approx(share, abs=0.02)
    persons = [parse.frame for parse in parses if parse.thing.kind == "person"]
    assert set(persons) == set(w.frames)


@pytest.mark.parametrize("held_out", [False, True])
def test_mix_of_comparisons(held_out):
    """What wins is of the kinds of CHOSEN_MIX. Of what loses 15 % is broken where a pun wins, and
    85 % elsewhere; the standard errors are 1 % and 2 %. Mismatches and literals lose to puns alike,
    and the worst of a ranking is broken as often as it is off topic."""
    w, n, chosen, broken, worse = world(), 1500, Counter(), Counter(), Counter()
    for record in w.preferences(n, seed=7, held_out=held_out):
        kind = kind_of(w.parse(record["chosen"][1:]))
        chosen[kind] += 1
        parse = w.parse(record["rejected"][1:])
        broken[kind == "pun"] += parse is None
        worse[kind, parse and kind_of(parse)] += 1
    for kind, share in puns.CHOSEN_MIX.items():
        assert chosen[kind] / n == pytest.approx(share, abs=0.03)
    assert broken[True] / chosen["pun"] == pytest.approx(.15, abs=0.04)
    assert broken[False] / (n - chosen["pun"]) == pytest.approx(.85, abs=0.08)
    for kind in ("mismatch", "literal"):
        assert worse["pun", kind] / chosen["pun"] == pytest.approx(.35, abs=0.05)
    ranked = [[w.parse(text[1:]) for text in r["ranked"]] for r in w.rankings(300, seed=7)]
    assert {kind_of(middle) for _, middle, _ in ranked} == {"mismatch", "literal"}
    assert {kind_of(worst) for *_, worst in ranked if worst} == set(MIX)
    assert sum(worst is None for *_, worst in ranked) / 300 == pytest.approx(.5, abs=0.1)


@pytest.mark.parametrize("kind", MIX)
def test_a_broken_or_off_topic_text_is_of_the_kind_of_the_better_one(monkeypatch, kind):
    w, rng = world(), random.Random(4)
    monkeypatch.setattr(w, "damage", lambda rng, text: text)    # else it has no parse
    for thing in w.things[:30]:
        parses = [w.parse(w.worsen(rng, thing, kind, how)) for how in ("broken", "off topic")]
        assert [kind_of(parse) for parse in parses] == [kind, kind]
        assert [parse.thing == thing for parse in parses] == [True, False]


def test_better_texts_are_better(tiny_world):
    def level(record, text):
        """0: broken or off topic, 1: fluent and on topic, 2: a pun."""
        verdict = w.judge(record["prompt"], text)
        return 1 + verdict.pun if verdict.on_topic else 0

    for w in (world(), tiny_world):
        for record in w.corpus(300, seed=8):
            assert level(record, record["completion"]) >= 1
        for record in w.preferences(300, seed=8):
            assert level(record, record["chosen"]) > level(record, record["rejected"])
        for record in w.rankings(300, seed=8):
            assert [level(record, text) for text in record["ranked"]] == [2, 1, 0]


def test_damage_is_of_four_kinds():
    """Of "a b": a word dropped, doubled, or swapped with another, or the rest cut off."""
    rng = random.Random(4)
    damaged = {world().damage(rng, "a b") for _ in range(200)}
    assert damaged == {"a", "b", "a a b", "a b b", "b a", "a b"}    # no text of these is a sentence


def test_label_noise_flips_the_given_fraction():
    """The same pairs with and without noise, a quarter of them flipped; standard error 0.7 %."""
    w, n = world(), 4000
    flips = 0
    for clean, noisy in zip(w.preferences(n, 9), w.preferences(n, 9, noise=0.25), strict=True):
        flipped = clean | {"chosen": clean["rejected"], "rejected": clean["chosen"]}
        assert noisy in (clean, flipped)
        flips += noisy == flipped
    assert flips / n == pytest.approx(0.25, abs=0.03)


def test_seeds_reproduce_and_differ():
    def held_out(w):
        return [(thing.name, phrase.text) for thing, phrase in w.held_out]

    w = world()
    for make in (w.corpus, w.preferences, w.rankings):
        assert make(50, 1) == make(50, 1) != make(50, 2)
    assert held_out(w) == held_out(World(LEXICON))


def test_two_worlds():
    """The large one has all that the small one has. A tokenizer knows its world, and its judge."""
    small, large = world(), world("puns_large")
    assert set(small.by_prompt) < set(large.by_prompt) and small.literals[0].text in {
        phrase.text for phrase in large.literals}
    assert (len(small.topic_phrases), len(large.topic_phrases)) == (64, 125)
    assert tokenizer("puns").world is small and tokenizer("puns_large").world is large
    assert tokenizer("puns_large").vocab_size > tokenizer("puns").vocab_size
    prompt = "About a baker:"                           # is in the large world alone
    assert prompt not in small.by_prompt and prompt in large.by_prompt


def test_entropy_by_enumeration(tiny_world):
    """H = -sum p log p over all completions of a prompt, whose probabilities sum to 1."""
    w, entropies = tiny_world, []
    for thing in w.things:
        p = Counter()
        frames = w.frames_for[thing.kind]
        mismatches = [phrase for phrase in w.phrases if phrase.topic != thing.topic]
        choices = {"pun": w.train_puns[thing], "literal": w.literals, "mismatch": mismatches}
        for frame in frames:
            for kind, phrases in choices.items():
                for phrase in phrases:
                    text = w.render(frame, thing, phrase)
                    p[text] += MIX[kind] / len(phrases) / len(frames)
        assert sum(p.values()) == pytest.approx(1)
        entropies.append(-sum(x * math.log(x) for x in p.values()))
    assert w.entropy() == pytest.approx(sum(entropies) / len(entropies), abs=1e-9)

# -----------------------------------------------------------------------------
# the lexicon and the command line

@pytest.mark.parametrize("file, old, new, where, reason", [
    ("topics", "person banker", "people banker", "topics.txt:2", "unknown field 'people'"),
    ("topics", "topic banks\n", "", "topics.txt:1", "before the first topic"),
    ("topics", "topic bread", "topic banks", "topics.txt:5", "already defined at topics.txt:1"),
    ("topics", "teller", "banker", "topics.txt:2", "'banker' is already defined at topics.txt:2"),
    ("topics", "cash in one's *chips*", "lose *interest*", "topics.txt:4", "'lose interest' is"),
    ("topics", "the *loaf*", "the *interest*", "topics.txt:8", "defined at topics.txt:3"),
    ("topics", "*knead/need*", "*knead/interest*", "topics.txt:7", "pun word 'interest' is"),
    ("topics", "the *loaf*", "the *banker*", "topics.txt:8", "'banker' belongs to topic banks"),
    ("topics", "oven", "oven/bankers", "topics.txt:6", "'bankers' belongs to topic banks"),
    ("topics", "*interest*", "interest", "topics.txt:3", "mark one pun word with asterisks, not 0"),
    ("topics", "lose *interest*", "*lose* *interest*", "topics.txt:3", "with asterisks, not 2"),
    ("topics", " | curiosity", "", "topics.txt:3", "a pun is: phrase with its *pun word*"),
    ("topics", "lose *interest*", "Lose *interest*!", "topics.txt:3", "without punctuation"),
    ("topics", "object oven\n", "", "topics.txt:5", "topic bread has no thing"),
    ("topics", TINY["topics"].split("oven\n")[1], "", "topics.txt:5", "topic bread has no pun"),
    ("verbs", "rise rises rose risen rising\n", "", "topics.txt:8", "'rise' has no forms yet"),
    ("verbs", "rose risen", "rose", "verbs.txt:4", "five forms"),
    ("verbs", "move moves", "lose loses", "verbs.txt:5", "verb 'lose' is already defined at verbs"),
    ("literals", "paint the fence", "move to another town", "literals.txt:3", "is already defined"),
    ("literals", "paint the fence", "paint the *fence*", "literals.txt:3", "without punctuation"),
    ("frames", "{past my}", "{passed my}", "frames.txt:1", "unknown slot {passed my}"),
    ("frames", "{past my}", "left", "frames.txt:1", "exactly one for the phrase"),
    ("frames", "they just", "they {past my}, they", "frames.txt:2", "exactly one for the phrase"),
    ("frames", "never |", "a | any | I was {a X} until I {past my}.\nnever |", "frames.txt:2",
     "is already defined at frames.txt:1"),
    ("frames", "{a X}", "someone", "frames.txt:1", "a slot for the thing"),
    ("frames", "Old {Xs}", "Old {Xs} }", "frames.txt:2", "Single '}' encountered"),
    ("frames", "| person |", "| people |", "frames.txt:1", "a frame is: family | person or any"),
])
def test_mistakes_are_found_with_file_and_line(tmp_path, file, old, new, where, reason):
    with pytest.raises(InputError) as error:
        World(write_lexicon(tmp_path, **{file: (old, new)}))
    mistakes = str(error.value).splitlines()
    assert any(re.match(f"{where}: .*{re.escape(reason)}", line) for line in mistakes), mistakes


def test_a_lexicon_file_that_cannot_be_read_is_named(tmp_path):
    """It is missing, or it is not UTF-8."""
    write_lexicon(tmp_path)
    (tmp_path / "verbs.txt").unlink()
    refuses("verbs.txt: cannot be read", World, tmp_path)
    (tmp_path / "verbs.txt").write_bytes(b"\xff")
    refuses("verbs.txt: cannot be read", World, tmp_path)


def test_files_from_windows_are_read_alike(tmp_path, tiny_world):
    """A byte order mark and CRLF, as editors on Windows write them, change nothing."""
    for path in tmp_path.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert World(tmp_path).corpus(50, seed=1) == tiny_world.corpus(50, seed=1)


def test_check_command(tiny_world, monkeypatch, capsys):
    """It counts what is there, and it names a sentence that does not parse back to its parts."""
    w, parse = tiny_world, tiny_world.parse
    assert w.phrases[2].text == "knead a hug"
    assert (w.phrases[2].written, w.phrases[2].heard) == ("knead", "need")
    monkeypatch.setattr(puns, "world", lambda name: w)
    puns.check()
    out = capsys.readouterr().out
    assert "2 literal phrases, 2 frames in 2 families" in out
    assert "puns_large: 2 topics, 3 things, 4 pun phrases (1 of them heterographic)" in out
    assert "6 pairs make a pun, 1 of them are held out" in out      # 2 x 2 + 1 x 2; 0.15 of them
    other = parse("I was a teller until I lost interest.")
    for found in (None, other):
        monkeypatch.setattr(w, "parse", lambda text, found=found: found)
        refuses("ambiguous: 'I was a", puns.check)


def test_no_token_is_a_slur():
    puns.check_tokens([b"banker", b" raccoon", b"\xff"])
    with pytest.raises(InputError, match="token 1 of the tokenizer is a slur"):
        puns.check_tokens([b"banker", f" {puns.SLURS[0].capitalize()}s".encode()])


def test_sample_and_judge_commands(tiny_world, monkeypatch, capsys):
    monkeypatch.setattr(puns, "world", lambda name: tiny_world)
    puns.sample(n=30)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert any(line.endswith("a hug.   [knead/need: to work dough; to want]") for line in lines)
    refuses("--kind is one of pun, mismatch, literal, not 'joke'", puns.sample, kind="joke")
    outputs = []
    for kind, seed in (("literal", 0), ("literal", 1), ("mismatch", 0), ("pun", 0)):
        puns.sample(kind=kind, seed=seed)
        outputs.append(capsys.readouterr().out)
        texts = [line.split("   [")[0] for line in outputs[-1].splitlines()]
        assert {kind_of(tiny_world.parse(text)) for text in texts} == {kind}
    assert outputs[0] != outputs[1]
    puns.judge("About a teller:", "I was a banker until I lost interest.")
    out = capsys.readouterr().out
    assert out.startswith("fluent True, on topic False, pun True\nframe  I was {a X}")
    assert out.endswith("thing  banker (banks)\nphrase lose interest (banks)\n")


def test_a_mistake_on_the_command_line_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["puns.py", "sample", "--kind", "joke"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(puns.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch("error: --kind is one of .*, not 'joke'\n", capsys.readouterr().err)
