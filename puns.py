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

import functools
import math
import random
import re
import zlib
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
VOWEL_BUT_A = re.compile(r"(uni|use|eu|one\b|once\b|ukulele)")    # a unicorn
CONSONANT_BUT_AN = re.compile(r"(hour|honest|heir|herb|x-ray)")        # an hourglass

# -----------------------------------------------------------------------------
# the words

class Thing(NamedTuple):
    topic: str
    kind: str             # person | animal | object
    name: str             # "loan officer"
    plural: str           # "loan officers"

    def slots(self):
        """{slot of a frame: what this thing puts there}"""
        article = "an" if self.name[0].lower() in "aeiou" else "a"
        if VOWEL_BUT_A.match(self.name.lower()):
            article = "a"
        if CONSONANT_BUT_AN.match(self.name.lower()):
            article = "an"
        they = "they" if self.kind == "person" else "it"
        return {"X": self.name, "Xs": self.plural, "a X": f"{article} {self.name}", "A X": f"{article.capitalize()} {self.name}",
                "they": they, "They": they.capitalize()}

    def whose(self):
        return "their" if self.kind == "person" else "its"


class Phrase(NamedTuple):
    topic: str            # '' for a literal phrase
    text: str             # "lose interest", verb first and in its base form
    written: str          # the pun word as the text shows it, "interest" ('' for a literal phrase)
    heard: str            # the word that the reader hears: the same, or "soul" for a written "sole"
    topic_sense: str
    everyday_sense: str


class Frame(NamedTuple):
    family: str
    takes: str            # person | any
    text: str


class Parse(NamedTuple):
    frame: Frame
    thing: Thing
    phrase: Phrase


class Verdict(NamedTuple):
    fluent: bool          # the grammar could have written it
    on_topic: bool        # ... about the thing that the prompt asks for
    pun: bool             # ... and thing and phrase belong to one topic
    novel: bool           # ... and this pair was held out of every training set
    parse: Parse | None

    @property
    def level(self):
        """What the preferences go by: 0 not fluent or off topic, 1 fluent and on topic, 2 and a pun."""
        return (1 + self.pun) if self.on_topic else 0


def pluralize(noun):
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def read_lines(path):
    """Yields ("file:line", text) for each line that is neither blank nor a comment."""
    try:
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                yield f"{path.name}:{n}", line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None

# -----------------------------------------------------------------------------
# the world

class World:
    """The lexicon with its grammar (compose, render) and its judge (parse, judge)."""

    def __init__(self, folder=LEXICON):
        """Reads the lexicon. Raises InputError that lists every mistake as file:line: reason."""
        self.mistakes, self.things, self.phrases, self.literals, self.frames = [], [], [], [], []
        self.seen = {}    # what has been defined where, to find it defined twice
        folder = Path(folder)
        self.verbs = self.read_verbs(folder / "verbs.txt")
        for path in sorted(folder.glob("*.txt")):
            if path.name not in ("frames.txt", "verbs.txt", "literals.txt"):
                self.read_topics(path)
        for where, line in read_lines(folder / "literals.txt"):
            self.add_phrase(where, Phrase("", line, "", "", "", ""))
        self.read_frames(folder / "frames.txt")
        self.check_topics()
        if self.mistakes:
            raise InputError("the lexicon has mistakes:\n" + "\n".join(self.mistakes))

        self.topic_phrases = {}
        for phrase in self.phrases:
            self.topic_phrases.setdefault(phrase.topic, []).append(phrase)
        self.by_name = {thing.name: thing for thing in self.things}
        self.by_prompt = {self.prompt(thing): thing for thing in self.things}
        self.frames_for = {kind: [f for f in self.frames if f.takes == "any" or kind == "person"] for kind in KINDS}
        # The held-out pairs are those with the smallest checksums: fixed, and hardly moved by a new word in the lexicon.
        pairs = [(thing.name, phrase.text) for thing in self.things for phrase in self.topic_phrases[thing.topic]]
        pairs.sort(key=lambda pair: zlib.crc32("|".join(pair).encode()))
        self.held_out_list = pairs[:round(HELD_OUT * len(pairs))]
        self.held_out = frozenset(self.held_out_list)
        self.train_puns = {thing: [phrase for phrase in self.topic_phrases[thing.topic]
                                   if (thing.name, phrase.text) not in self.held_out] for thing in self.things}
        self.build_parser()

    # -- reading ----------------------------------------------------------------

    def mistake(self, where, reason):
        self.mistakes.append(f"{where}: {reason}")

    def define(self, where, what, key):
        """Notes that `key` is defined here; a second definition is a mistake."""
        if (what, key) in self.seen:
            self.mistake(where, f"{what} '{key}' stands already at {self.seen[what, key]}")
        self.seen.setdefault((what, key), where)

    def read_verbs(self, path):
        verbs = {}
        for where, line in read_lines(path):
            if len(line.split()) != len(FORMS):
                self.mistake(where, f"a verb has five forms ({' '.join(FORMS)}), here are {len(line.split())}")
                continue
            self.define(where, "verb", line.split()[0])
            verbs[line.split()[0]] = dict(zip(FORMS, line.split(), strict=True))
        return verbs

    def read_topics(self, path):
        topic = ""
        for where, line in read_lines(path):
            field, _, value = line.partition(" ")
            value = value.strip()
            if field == "topic":
                topic = value
                self.define(where, "topic", topic)
            elif not topic:
                self.mistake(where, "this line stands before the first topic")
            elif field in KINDS:
                for item in value.split(","):
                    name, _, plural = (part.strip() for part in item.partition("/"))
                    self.define(where, "thing", name)
                    self.things.append(Thing(topic, field, name, plural or pluralize(name)))
            elif field == "pun":
                parts = [part.strip() for part in value.split("|")]
                marked = re.findall(r"\*(.+?)\*", parts[0])
                if len(parts) != 3 or not all(parts):
                    self.mistake(where, "a pun is: phrase with its *pun word* | sense in the topic | everyday sense")
                elif len(marked) != 1:
                    self.mistake(where, f"mark one pun word with asterisks, here are {len(marked)}")
                else:
                    written, _, heard = marked[0].partition("/")
                    text = parts[0].replace(f"*{marked[0]}*", written)
                    self.add_phrase(where, Phrase(topic, text, written, heard or written, parts[1], parts[2]))
            else:
                self.mistake(where, f"unknown field '{field}' (known: topic {' '.join(KINDS)} pun)")

    def add_phrase(self, where, phrase):
        if not re.fullmatch(r"[a-z'-]+( [a-z'-]+)+", phrase.text):
            self.mistake(where, f"'{phrase.text}' is not a phrase of at least two lower-case words without punctuation")
        elif phrase.text.split()[0] not in self.verbs:
            self.mistake(where, f"the frames need all forms of '{phrase.text.split()[0]}': add it to verbs.txt")
        else:
            self.define(where, "phrase", phrase.text)
            (self.phrases if phrase.topic else self.literals).append(phrase)
            for word in {phrase.written, phrase.heard} - {""}:   # two topics must not claim one pun word
                self.define(where, "pun word", word)

    def read_frames(self, path):
        slots = {"X", "Xs", "a X", "A X", "they", "They"} | {
            f"{form} {whose}" for form in FORMS for whose in [*SELF, "X's"]}
        for where, line in read_lines(path):
            parts = [part.strip() for part in line.split("|")]
            if len(parts) != 3 or parts[1] not in ("person", "any"):
                self.mistake(where, "a frame is: family | person or any | text")
                continue
            found = re.findall(r"\{(.*?)\}", parts[2])
            for slot in set(found) - slots:
                self.mistake(where, f"unknown slot {{{slot}}} (lexicon/frames.txt explains them)")
            if sum(" " in s and s[-1] != "X" for s in found) != 1 or not {"X", "Xs", "a X", "A X"} & set(found):
                self.mistake(where, "a frame needs a slot for the thing and exactly one for the phrase")
            self.define(where, "frame", parts[2])
            self.frames.append(Frame(*parts))

    def check_topics(self):
        """A phrase whose pun word names a thing of another topic could be claimed by both."""
        nouns = {word: thing for thing in self.things for word in (thing.name, thing.plural)}
        for phrase in self.phrases:
            for word in {phrase.written, phrase.heard}:
                if word in nouns and nouns[word].topic != phrase.topic:
                    self.mistake(self.seen["phrase", phrase.text],
                                 f"'{word}' of topic {phrase.topic} is also a thing of topic {nouns[word].topic}")
        topics = {what_key[1]: where for what_key, where in self.seen.items() if what_key[0] == "topic"}
        for topic, where in topics.items():
            for what, items in (("thing", self.things), ("pun", self.phrases)):
                if not any(item.topic == topic for item in items):
                    self.mistake(where, f"topic {topic} has no {what}")

    # -- writing ----------------------------------------------------------------

    def inflect(self, phrase, form, whose):
        verb, _, rest = phrase.text.partition(" ")
        return re.sub(r"\boneself\b", SELF[whose], re.sub(r"\bone's\b", whose, f"{self.verbs[verb][form]} {rest}"))

    def render(self, frame, thing, phrase):
        def fill(match):
            if match[1] in (slots := thing.slots()):
                return slots[match[1]]
            form, whose = match[1].split()
            return self.inflect(phrase, form, thing.whose() if whose == "X's" else whose)
        return re.sub(r"\{(.*?)\}", fill, frame.text)

    def prompt(self, thing):
        return f"About {thing.slots()['a X']}:"

    def choose_phrase(self, rng, thing, kind):
        """A phrase that makes `thing` a pun | mismatch | literal; never a pair that is held out."""
        if kind == "pun":
            return rng.choice(self.train_puns[thing])
        if kind == "literal":
            return rng.choice(self.literals)
        while (phrase := rng.choice(self.phrases)).topic == thing.topic:
            pass
        return phrase

    def write(self, rng, thing, kind):
        """A random sentence of one kind about `thing`."""
        return self.render(rng.choice(self.frames_for[thing.kind]), thing, self.choose_phrase(rng, thing, kind))

    def corpus(self, n, seed, mix=MIX):
        """n records {prompt, completion}: things uniformly, kinds by `mix`."""
        rng = random.Random(seed)
        kinds = rng.choices(list(mix), weights=mix.values(), k=n)
        things = rng.choices(self.things, k=n)
        return [{"prompt": self.prompt(thing), "completion": " " + self.write(rng, thing, kind)}
                for thing, kind in bar(zip(things, kinds, strict=True), "corpus", n, least=50_000)]

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
        rng = random.Random(seed)
        records = []
        for _ in range(n):
            thing = rng.choice(self.things)
            better = "pun" if rng.random() < 0.85 else rng.choice(["mismatch", "literal"])
            worse = rng.choices(["mismatch", "literal", "broken", "off topic"], [0.35, 0.35, 0.15, 0.15])[0]
            if better != "pun" and worse in ("mismatch", "literal"):
                worse = "broken"
            if held_out and better == "pun":
                name, text = rng.choice(self.held_out_list)
                thing = self.by_name[name]
                phrase = next(phrase for phrase in self.topic_phrases[thing.topic] if phrase.text == text)
                chosen = self.render(rng.choice(self.frames_for[thing.kind]), thing, phrase)
            else:
                chosen = self.write(rng, thing, better)
            rejected = self.worsen(rng, thing, better, worse)
            if rng.random() < noise:
                chosen, rejected = rejected, chosen
            records.append({"prompt": self.prompt(thing), "chosen": " " + chosen, "rejected": " " + rejected})
        return records

    def rankings(self, n, seed):
        """n records {prompt, ranked: [a pun, a fluent text that is none, a broken one or one about another thing]}."""
        rng = random.Random(seed)
        records = []
        for _ in range(n):
            thing = rng.choice(self.things)
            fluent = rng.choice(["mismatch", "literal"])
            texts = [self.write(rng, thing, "pun"), self.write(rng, thing, fluent),
                     self.worsen(rng, thing, rng.choice(["pun", fluent]), rng.choice(["broken", "off topic"]))]
            records.append({"prompt": self.prompt(thing), "ranked": [" " + text for text in texts]})
        return records

    def worsen(self, rng, thing, kind, how):
        """A text that people like less: of kind `how`, or a text of `kind` that is broken or about another thing."""
        if how == "broken":
            return self.damage(rng, self.write(rng, thing, kind))
        if how == "off topic":
            while (other := rng.choice(self.things)) == thing:
                pass
            return self.write(rng, other, kind)
        return self.write(rng, thing, how)

    def damage(self, rng, text):
        """The text with a word dropped, doubled or moved, or its end cut off, so that it no longer parses."""
        while True:
            words = text.split()
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            kind = rng.choice(["drop", "double", "swap", "cut"])
            if kind == "drop":
                del words[i]
            elif kind == "double":
                words.insert(i, words[i])
            elif kind == "swap":
                words[i], words[j] = words[j], words[i]
            else:
                del words[i + 1:]
            if self.parse(" ".join(words)) is None:
                return " ".join(words)

    # -- judging ----------------------------------------------------------------

    def build_parser(self):
        """A regular expression a frame, and a table from each inflected phrase back to the phrase."""
        def nouns(slot):   # longest first, so that "loan officer" wins over "loan"
            names = {thing.slots()[slot]: thing for thing in self.things}
            return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))

        self.nouns = {thing.slots()[slot]: thing for thing in self.things for slot in ("X", "Xs", "a X", "A X")}
        alternatives = {slot: nouns(slot) for slot in ("X", "Xs", "a X", "A X")}
        self.surfaces, self.patterns = {}, []
        for frame in self.frames:
            pattern, position, seen_x = "", 0, False
            for slot in re.finditer(r"\{(.*?)\}", frame.text):
                pattern += re.escape(frame.text[position:slot.start()])
                position = slot.end()
                if slot[1] in alternatives:
                    pattern += f"(?:{alternatives[slot[1]]})" if seen_x else f"(?P<x>{alternatives[slot[1]]})"
                    seen_x = True
                elif slot[1] in ("they", "They"):
                    pattern += "(?:[Tt]hey|[Ii]t)"
                else:
                    pattern += "(?P<y>.+)"
                    form, whose = slot[1].split()
                    self.add_surfaces(form, whose)
            start = frame.text[:frame.text.index("{")]      # most texts fail at the first look
            self.patterns.append((frame, form, whose, start, re.compile(pattern + re.escape(frame.text[position:]))))

    def add_surfaces(self, form, whose):
        if (form, whose) not in self.surfaces:
            owners = ("their", "its") if whose == "X's" else (whose,)
            self.surfaces[form, whose] = {self.inflect(phrase, form, owner): phrase
                                          for phrase in self.phrases + self.literals for owner in owners}

    def parse(self, text):
        """The (frame, thing, phrase) that the text was written from, or None."""
        for frame, form, whose, start, pattern in self.patterns:
            if text.startswith(start) and (match := pattern.fullmatch(text)):
                thing, phrase = self.nouns[match["x"]], self.surfaces[form, whose].get(match["y"])
                # Rendering it again checks what the pattern leaves open: pronouns, possessives, what each frame takes.
                if phrase and frame in self.frames_for[thing.kind] and self.render(frame, thing, phrase) == text:
                    return Parse(frame, thing, phrase)
        return None

    def judge(self, prompt, text):
        """The gold verdict on a completion of a prompt. One space before the text is part of the format, not of the text."""
        parse = self.parse(text.removeprefix(" "))
        if parse is None:
            return Verdict(False, False, False, False, None)
        pun = parse.thing.topic == parse.phrase.topic
        return Verdict(True, self.prompt(parse.thing) == prompt, pun,
                       pun and (parse.thing.name, parse.phrase.text) in self.held_out, parse)


@functools.lru_cache(maxsize=1)
def world():
    """The world of lexicon/, read once."""
    return World()

# -----------------------------------------------------------------------------
# the command line

def check():
    """Check the lexicon: fields, duplicates, verb forms, claims of two topics, and that every sentence parses back."""
    w = World()
    rng = random.Random(0)
    for thing in bar(w.things, "things"):
        for frame in w.frames_for[thing.kind]:
            for phrase in (rng.choice(w.phrases), rng.choice(w.literals)):
                text = w.render(frame, thing, phrase)
                if w.parse(text) != (frame, thing, phrase):
                    raise InputError(f"ambiguous: '{text}' also reads as {w.parse(text)}")
    for phrase in bar(w.phrases + w.literals, "phrases"):
        for frame in w.frames:
            thing = rng.choice([t for t in w.things if frame in w.frames_for[t.kind]])
            if w.parse(text := w.render(frame, thing, phrase)) != (frame, thing, phrase):
                raise InputError(f"ambiguous: '{text}' also reads as {w.parse(text)}")
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
        note = f"{phrase.written}/{phrase.heard}" if phrase.heard != phrase.written else phrase.written
        print(f"{text}" + (f"   [{note}: {phrase.topic_sense}; {phrase.everyday_sense}]" if kind == "pun" else ""))


def judge(prompt: tyro.conf.Positional[str], text: tyro.conf.Positional[str]):
    """Judge one completion of one prompt."""
    v = world().judge(prompt, text)
    print(f"fluent {v.fluent}, on topic {v.on_topic}, pun {v.pun}, novel {v.novel}")
    if v.parse:
        print(f"frame  {v.parse.frame.text}\nthing  {v.parse.thing.name} ({v.parse.thing.topic})\n"
              f"phrase {v.parse.phrase.text} ({v.parse.phrase.topic or 'literal'})")


if __name__ == "__main__":
    run(lambda: tyro.extras.subcommand_cli_from_dict({"check": check, "sample": sample, "judge": judge}))
