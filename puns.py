"""
The pun world: a grammar that writes endless puns and near-puns, and the judge that knows them apart.

    pun        I used to be a banker, but then I lost interest.
    mismatch   I used to be a pilot, but then I lost interest.
    literal    I used to be a banker, but then I decided to start over.

A sentence is a frame ("I used to be {a X}, but then I {past my}."), a thing X and a phrase Y. Any X goes with any Y and the
sentence is English, but only X and Y of one topic make a pun. The grammar is unambiguous, so the judge needs no model: it
parses a text back into frame, X and Y and looks. It stands in for human taste: it labels the preferences that the reward
model learns from, and it measures the result. No training ever sees it in another way.

The words live in lexicon/, in plain files that you can read and extend:

    python puns.py check             looks for mistakes in the lexicon (file, line, reason)
    python puns.py sample --n 20     writes some puns
    python puns.py judge "About a banker:" " Old bankers never die, they just lose interest."
"""

import collections
import functools
import math
import random
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from common import InputError, bar, run

LEXICON = Path(__file__).parent / "lexicon"
FORMS = ("base", "third", "past", "participle", "ing")
KINDS = ("person", "animal", "object")
MIX = {"pun": 0.30, "mismatch": 0.35, "literal": 0.35}   # what the SFT corpus is made of
HELD_OUT = 0.15                                          # share of the pun pairs (X, Y) that no training set contains
SELF = dict(my="myself", your="yourself", his="himself", her="herself", its="itself", our="ourselves", their="themselves")
PHRASE_SLOT = re.compile(rf"({'|'.join(FORMS)}) ({'|'.join(SELF)}|X's)")
AN = re.compile(r"(?!uni|use|eu|one\b|once\b|ukulele)[aeiou]|hour|honest|heir|herb|x-ray", re.I)     # a unicorn, an hourglass

# -----------------------------------------------------------------------------
# the words

@dataclass(frozen=True, eq=False)
class Thing:
    topic: str
    kind: str             # person | animal | object
    name: str             # "loan officer"
    plural: str           # "loan officers"

    @functools.cached_property
    def slots(self):
        """{slot of a frame: what this thing puts there}"""
        a, (they, whose) = "an" if AN.match(self.name) else "a", ("they", "their") if self.kind == "person" else ("it", "its")
        return {"X": self.name, "Xs": self.plural, "a X": f"{a} {self.name}", "A X": f"{a.capitalize()} {self.name}",
                "they": they, "They": they.capitalize(), "X's": whose}


@dataclass(frozen=True, eq=False)
class Phrase:
    topic: str            # '' for a literal phrase
    text: str             # "lose interest", verb first and in its base form
    written: str          # the pun word as the text shows it, "interest" ('' for a literal phrase)
    heard: str            # the word that the reader hears: the same, or "soul" for a written "sole"
    topic_sense: str = ""
    everyday_sense: str = ""


@dataclass(frozen=True, eq=False)
class Frame:
    family: str
    takes: str            # person | any
    text: str             # "I used to be {a X}, but then I {past my}."
    slot: str             # the slot of its phrase, "past my"
    form: str             # "past"
    whose: str            # "my"


Parse = collections.namedtuple("Parse", "frame thing phrase")


class Verdict(NamedTuple):
    fluent: bool          # the grammar could have written it
    on_topic: bool        # ... about the thing that the prompt asks for
    pun: bool             # ... and thing and phrase belong to one topic
    novel: bool           # ... and this pair was held out of every training set
    parse: Parse | None


def pluralize(noun):
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def expect(condition, reason):
    """Raises ValueError(reason), which World.read() turns into a mistake with file and line."""
    if not condition:
        raise ValueError(reason)

# -----------------------------------------------------------------------------
# the world

class World:
    """The lexicon with its grammar (write, render) and its judge (parse, judge)."""

    def __init__(self, folder=LEXICON):
        """Reads the lexicon. Raises InputError that lists every mistake as file:line: reason."""
        self.things, self.phrases, self.literals, self.frames, self.verbs, self.topic = [], [], [], [], {}, ""
        self.mistakes, self.defined = [], {}      # ["file:line: reason"], {(what, name): "file:line"}
        files = {"verbs": self.add_verb, "literals": functools.partial(self.add_phrase, ""), "frames": self.add_frame}
        topics = [path for path in sorted(Path(folder).glob("*.txt")) if path.stem not in files]
        for path in (Path(folder) / "verbs.txt", *topics, Path(folder) / "literals.txt", Path(folder) / "frames.txt"):
            self.read(path, files.get(path.stem, self.add_to_topic))
        self.check_topics()
        if self.mistakes:
            raise InputError("the lexicon has mistakes:\n" + "\n".join(self.mistakes))

        self.by_name = {thing.name: thing for thing in self.things}
        self.by_prompt = {self.prompt(thing): thing for thing in self.things}
        self.frames_for = {kind: [f for f in self.frames if f.takes == "any" or kind == "person"] for kind in KINDS}
        self.topic_phrases = {thing.topic: [] for thing in self.things}
        for phrase in self.phrases:
            self.topic_phrases[phrase.topic].append(phrase)
        # The held-out pairs are those with the smallest checksums: fixed, and hardly moved by a new word in the lexicon.
        pairs = [(thing, phrase) for thing in self.things for phrase in self.topic_phrases[thing.topic]]
        pairs.sort(key=lambda pair: zlib.crc32(f"{pair[0].name}|{pair[1].text}".encode()))
        self.train_puns, self.held_out = {thing: list(self.topic_phrases[thing.topic]) for thing in self.things}, []
        for thing, phrase in pairs:
            if len(self.held_out) < round(HELD_OUT * len(pairs)) and len(self.train_puns[thing]) > 1:     # each keeps one to learn
                self.train_puns[thing].remove(phrase)
                self.held_out.append((thing, phrase))
        self.build_parser()

    # -- reading ----------------------------------------------------------------

    def read(self, path, add):
        """Gives add() each line that is neither blank nor a comment, and notes what it does not like."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        for n, line in enumerate(lines, 1):
            self.where = f"{path.name}:{n}"
            if line.strip() and not line.startswith("#"):
                try:
                    add(line.strip())
                except ValueError as error:
                    self.mistakes.append(f"{self.where}: {error}")

    def define(self, what, name):
        """Notes that `name` is defined here; a second definition is a mistake."""
        expect((what, name) not in self.defined, f"{what} '{name}' stands already at {self.defined.get((what, name))}")
        self.defined[what, name] = self.where

    def add_verb(self, line):
        forms = line.split()
        expect(len(forms) == len(FORMS), f"a verb has five forms ({' '.join(FORMS)}), here are {len(forms)}")
        self.define("verb", forms[0])
        self.verbs[forms[0]] = dict(zip(FORMS, forms, strict=True))

    def add_to_topic(self, line):
        field, _, value = line.partition(" ")
        if field == "topic":
            self.topic = value.strip()
            return self.define("topic", self.topic)
        expect(self.topic, "this line stands before the first topic")
        expect(field in (*KINDS, "pun"), f"unknown field '{field}' (known: topic {' '.join(KINDS)} pun)")
        if field == "pun":
            parts = [part.strip() for part in value.split("|")]
            expect(len(parts) == 3 and all(parts), "a pun is: phrase with its *pun word* | sense in the topic | everyday sense")
            return self.add_phrase(self.topic, *parts)
        for item in value.split(","):
            name, _, plural = (part.strip() for part in item.partition("/"))
            self.define("thing", name)
            self.things.append(Thing(self.topic, field, name, plural or pluralize(name)))

    def add_phrase(self, topic, text, *senses):
        marked = re.findall(r"\*(.+?)\*", text)
        expect(len(marked) == bool(topic), f"mark {'one' if topic else 'no'} pun word with asterisks, here are {len(marked)}")
        written, _, heard = "".join(marked).partition("/")
        text = re.sub(r"\*(.+?)(/.+?)?\*", r"\1", text)
        verb = text.split(" ")[0]
        expect(re.fullmatch(r"[a-z'-]+( [a-z'-]+)+", text), f"'{text}' is not two or more lower-case words without punctuation")
        expect(verb in self.verbs, f"the frames need all forms of '{verb}': add it to verbs.txt")
        self.define("phrase", text)
        for word in {written, heard} - {""}:                 # two topics must not claim one pun word
            self.define("pun word", word)
        (self.phrases if topic else self.literals).append(Phrase(topic, text, written, heard or written, *senses))

    def add_frame(self, line):
        parts = [part.strip() for part in line.split("|")]
        expect(len(parts) == 3 and parts[1] in ("person", "any"), "a frame is: family | person or any | text")
        slots = [slot for _, slot, _, _ in string.Formatter().parse(parts[2]) if slot is not None]
        matches = [match for slot in slots if (match := PHRASE_SLOT.fullmatch(slot))]
        for slot in set(slots) - {"X", "Xs", "a X", "A X", "they", "They", *(match[0] for match in matches)}:
            raise ValueError(f"unknown slot {{{slot}}} (lexicon/frames.txt explains them)")
        expect({"X", "Xs", "a X", "A X"} & set(slots) and len(matches) == 1,
               "a frame needs a slot for the thing and exactly one for the phrase")
        self.define("frame", parts[2])
        self.frames.append(Frame(*parts, matches[0][0], *matches[0].groups()))

    def check_topics(self):
        """Every topic has things and puns, and no pun word names a thing of another topic: the phrase would belong to both."""
        topic_of = {noun: thing.topic for thing in self.things for noun in (thing.name, thing.plural)}
        for phrase in self.phrases:
            for word in {phrase.written, phrase.heard}:
                if topic_of.get(word, phrase.topic) != phrase.topic:
                    self.mistakes.append(f"{self.defined['phrase', phrase.text]}: '{word}' of topic {phrase.topic} is also a thing "
                                         f"of topic {topic_of[word]}")
        for (what, name), where in self.defined.items():
            for field, items in (("thing", self.things), ("pun", self.phrases)):
                if what == "topic" and all(item.topic != name for item in items):
                    self.mistakes.append(f"{where}: topic {name} has no {field}")

    # -- writing ----------------------------------------------------------------

    def inflect(self, phrase, form, whose):
        """("lose one's balance", "past", "my") -> "lost my balance"."""
        verb, _, rest = phrase.text.partition(" ")
        return f"{self.verbs[verb][form]} {rest}".replace(" one's", f" {whose}").replace(" oneself", f" {SELF[whose]}")

    def render(self, frame, thing, phrase):
        whose = thing.slots.get(frame.whose, frame.whose)
        return frame.text.format_map(thing.slots | {frame.slot: self.inflect(phrase, frame.form, whose)})

    def prompt(self, thing):
        return f"About {thing.slots['a X']}:"

    def choose_phrase(self, rng, thing, kind):
        """A phrase that makes `thing` a pun | mismatch | literal; never a pair that is held out."""
        if kind == "pun":
            return rng.choice(self.train_puns[thing])
        if kind == "literal":
            return rng.choice(self.literals)
        while (phrase := rng.choice(self.phrases)).topic == thing.topic:
            pass
        return phrase

    def write(self, rng, thing, kind, phrase=None):
        """A random sentence of one kind about `thing`, with this phrase if one is given."""
        return self.render(rng.choice(self.frames_for[thing.kind]), thing, phrase or self.choose_phrase(rng, thing, kind))

    def corpus(self, n, seed, mix=MIX):
        """n records {prompt, completion}: things uniformly, kinds by `mix`."""
        rng = random.Random(seed)
        draws = zip(rng.choices(self.things, k=n), rng.choices(list(mix), weights=mix.values(), k=n), strict=True)
        return [{"prompt": self.prompt(thing), "completion": " " + self.write(rng, thing, kind)}
                for thing, kind in bar(draws, "corpus", n, least=50_000)]

    def entropy(self):
        """Mean entropy of a completion given its prompt, in nats: what no language model's loss on the corpus can go below.

        A completion has exactly one parse, so H = H(frame) + H(kind) + sum_kind p(kind) H(phrase | kind, thing)."""
        total = 0.0
        for thing in self.things:
            choices = {"pun": len(self.train_puns[thing]), "literal": len(self.literals),
                       "mismatch": len(self.phrases) - len(self.topic_phrases[thing.topic])}
            total += math.log(len(self.frames_for[thing.kind]))
            total += sum(p * (math.log(choices[kind]) - math.log(p)) for kind, p in MIX.items())
        return total / len(self.things)

    def preferences(self, n, seed, noise=0.0, held_out=False):
        """n records {prompt, chosen, rejected}: mostly a pun over a mismatch or a literal, sometimes a fluent text over a
        broken one or one about another thing. A share `noise` of the labels is flipped, as tired people would. With held_out the
        puns are of pairs that no training set contains."""
        rng, records = random.Random(seed), []
        for _ in range(n):
            thing = rng.choice(self.things)
            better = rng.choices(["pun", "mismatch", "literal"], [0.85, 0.075, 0.075])[0]
            worse = rng.choices(["mismatch", "literal", "broken", "off topic"],
                                [0.35, 0.35, 0.15, 0.15] if better == "pun" else [0, 0, 0.85, 0.15])[0]
            phrase = None
            if held_out and better == "pun":
                thing, phrase = rng.choice(self.held_out)
            chosen, rejected = self.write(rng, thing, better, phrase), self.worsen(rng, thing, better, worse)
            if rng.random() < noise:
                chosen, rejected = rejected, chosen
            records.append({"prompt": self.prompt(thing), "chosen": " " + chosen, "rejected": " " + rejected})
        return records

    def rankings(self, n, seed):
        """n records {prompt, ranked: [a pun, a fluent text that is none, a broken one or one about another thing]}."""
        rng, records = random.Random(seed), []
        for _ in range(n):
            thing, fluent = rng.choice(self.things), rng.choice(["mismatch", "literal"])
            texts = [self.write(rng, thing, "pun"), self.write(rng, thing, fluent),
                     self.worsen(rng, thing, rng.choice(["pun", fluent]), rng.choice(["broken", "off topic"]))]
            records.append({"prompt": self.prompt(thing), "ranked": [" " + text for text in texts]})
        return records

    def worsen(self, rng, thing, kind, how):
        """A text that people like less: of kind `how`, or a text of `kind` that is broken or about another thing."""
        if how == "off topic":
            return self.write(rng, rng.choice([other for other in self.things if other != thing]), kind)
        return self.damage(rng, self.write(rng, thing, kind)) if how == "broken" else self.write(rng, thing, how)

    def damage(self, rng, text):
        """The text with a word dropped, doubled or moved, or its end cut off, so that it no longer parses."""
        while True:
            words = text.split()
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            swapped = [words[{i: j, j: i}.get(k, k)] for k in range(len(words))]
            damaged = " ".join(rng.choice([words[:i] + words[i + 1:], words[:i + 1] + words[i:], words[:i + 1], swapped]))
            if self.parse(damaged) is None:
                return damaged

    # -- judging ----------------------------------------------------------------

    def build_parser(self):
        """The tables that parse() looks up, from what render() would write: every frame with every thing, and every phrase."""
        # {before: {after: [(frame, thing, key)]}} and {key: {inflected: phrase}}, key = (form, whose)
        self.shells, self.phrase_of = {}, {}
        for thing in self.things:
            for frame in self.frames_for[thing.kind]:
                key = frame.form, thing.slots.get(frame.whose, frame.whose)
                before, _, after = frame.text.format_map(thing.slots | {frame.slot: "\0"}).partition("\0")
                self.shells.setdefault(before, {}).setdefault(after, []).append((frame, thing, key))
                if key not in self.phrase_of:
                    self.phrase_of[key] = {self.inflect(phrase, *key): phrase for phrase in self.phrases + self.literals}

    def parse(self, text):
        """The (frame, thing, phrase) that the text was written from, or None."""
        cuts = [match.start() for match in re.finditer(r"\b", text)]      # a phrase starts at one of them and ends at another
        for start in cuts:
            if afters := self.shells.get(text[:start]):
                for end in cuts:
                    for frame, thing, key in afters.get(text[end:], ()):
                        if phrase := self.phrase_of[key].get(text[start:end]):
                            return Parse(frame, thing, phrase)
        return None

    def judge(self, prompt, text):
        """The gold verdict on a completion of a prompt. One space before the text is part of the format, not of the text."""
        parse = self.parse(text.removeprefix(" "))
        if parse is None:
            return Verdict(False, False, False, False, None)
        pun = parse.thing.topic == parse.phrase.topic
        return Verdict(True, self.prompt(parse.thing) == prompt, pun, pun and (parse.thing, parse.phrase) in self.held_out, parse)


@functools.lru_cache(maxsize=1)
def world():
    """The world of lexicon/, read once."""
    return World()

# -----------------------------------------------------------------------------
# the command line

def check():
    """Check the lexicon: fields, duplicates, verb forms, claims of two topics, and that every sentence parses back."""
    w, rng = World(), random.Random(0)
    for frame in bar(w.frames, "frames"):
        things = [thing for thing in w.things if frame in w.frames_for[thing.kind]]
        pairs = [(thing, rng.choice(some)) for thing in things for some in (w.phrases, w.literals)]
        pairs += [(rng.choice(things), phrase) for phrase in w.phrases + w.literals if things]
        for thing, phrase in pairs:
            if (parse := w.parse(text := w.render(frame, thing, phrase))) != (frame, thing, phrase):
                raise InputError(f"ambiguous: '{text}' also reads as {parse}")
    two = sum(phrase.written != phrase.heard for phrase in w.phrases)
    print(f"{len(w.topic_phrases)} topics, {len(w.things)} things, {len(w.phrases)} pun phrases ({two} of them heterographic), "
          f"{len(w.literals)} literal phrases, {len(w.frames)} frames in {len({f.family for f in w.frames})} families")
    print(f"{sum(map(len, w.train_puns.values())) + len(w.held_out)} pairs make a pun, {len(w.held_out)} of them are held out "
          f"of training; entropy of a completion {w.entropy():.3f} nats")


def sample(n: int = 20, kind: str = "pun", seed: int = 0):
    """Write random sentences of one kind: pun, mismatch or literal."""
    if kind not in MIX:
        raise InputError(f"--kind is one of {', '.join(MIX)}, not '{kind}'")
    w, rng = world(), random.Random(seed)
    for _ in range(n):
        thing = rng.choice(w.things)
        text = w.write(rng, thing, kind)
        phrase = w.parse(text).phrase
        word = phrase.written if phrase.heard == phrase.written else f"{phrase.written}/{phrase.heard}"
        print(f"{text}" + (f"   [{word}: {phrase.topic_sense}; {phrase.everyday_sense}]" if kind == "pun" else ""))


def judge(prompt: tyro.conf.Positional[str], text: tyro.conf.Positional[str]):
    """Judge one completion of one prompt."""
    v = world().judge(prompt, text)
    print(f"fluent {v.fluent}, on topic {v.on_topic}, pun {v.pun}, novel {v.novel}")
    if v.parse:
        print(f"frame  {v.parse.frame.text}\nthing  {v.parse.thing.name} ({v.parse.thing.topic})\n"
              f"phrase {v.parse.phrase.text} ({v.parse.phrase.topic or 'literal'})")


if __name__ == "__main__":
    run(lambda: tyro.extras.subcommand_cli_from_dict({"check": check, "sample": sample, "judge": judge}))
