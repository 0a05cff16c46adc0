"""
The pun world: a grammar that writes endless puns and near-puns, and a judge that tells them apart.

    pun        I used to be a banker, but then I lost interest.
    mismatch   I used to be a pilot, but then I lost interest.
    literal    I used to be a banker, but then I decided to start over.

A sentence has three parts: a frame ("I used to be {a X}, but then I {past my}."), a thing X, and
a phrase. Any thing and any phrase make an English sentence, but only those of one topic make a
pun. The grammar is unambiguous, so the judge needs no model: it parses a text back into its three
parts and compares the topics. The judge stands in for human taste: it labels the preferences that
the reward model learns from, and it measures the result. Training sees nothing else of it.

The words are in lexicon/, in plain files that you can read and extend: 64 topics, which a small
model learns in minutes on a CPU, and in lexicon/more/ another 61. The large world has them all.

    python puns.py check             lists mistakes in the lexicon (file, line, reason)
    python puns.py sample --n 20     writes some puns
    python puns.py judge "About a banker:" " I used to be a banker, but then I lost interest."
"""

import base64
import codecs
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

from common import InputError, command_line, progress_bar

LEXICON = Path(__file__).parent / "lexicon"
# The worlds, and the folders of their words. Each has a tokenizer of its name, see data.py.
WORLDS = {"puns": [LEXICON], "puns_large": [LEXICON, LEXICON / "more"]}
MIX = {"pun": 0.30, "mismatch": 0.35, "literal": 0.35}      # kinds of sentences in the SFT corpus
HELD_OUT = 0.15     # fraction of the pun pairs (thing, phrase) that no training set contains

# Kinds of the chosen texts in preferences(), and of the rejected ones.
CHOSEN_MIX = {"pun": 0.85, "mismatch": 0.075, "literal": 0.075}
WORSE_THAN_PUN = {"mismatch": 0.35, "literal": 0.35, "broken": 0.15, "off topic": 0.15}
WORSE_THAN_FLUENT = {"broken": 0.85, "off topic": 0.15}

# -----------------------------------------------------------------------------
# the parts of a sentence

THING_KINDS = ("person", "animal", "object")
VERB_FORMS = ("base", "third", "past", "participle", "ing")
REFLEXIVES = {"my": "myself", "your": "yourself", "his": "himself", "her": "herself",
              "its": "itself", "our": "ourselves", "their": "themselves"}

# The slots that a frame may have. "{past my}" holds a phrase: its verb is in the past tense, and
# "one's" becomes "my". With "{past X's}", "one's" becomes "their" or "its", as the thing requires.
THING_SLOTS = {"X", "Xs", "a X", "A X"}
PHRASE_SLOTS = {f"{form} {whose}" for form in VERB_FORMS for whose in [*REFLEXIVES, "X's"]}
KNOWN_SLOTS = THING_SLOTS | PHRASE_SLOTS | {"they", "They"}

# "an" goes by sound, not by spelling: "an hourglass", but "a unicorn".
VOWEL_SOUND = re.compile(r"(?!uni|use|eu|one\b|once\b|ukulele)[aeiou]|hour|honest|heir|herb|x-ray",
                         re.IGNORECASE)


# The parts are compared by identity (eq=False): it is fast, and each exists only once.
@dataclass(frozen=True, eq=False)
class Thing:
    topic: str            # "banking"
    kind: str             # person, animal, or object
    name: str             # "loan officer"
    plural: str           # "loan officers"

    @functools.cached_property
    def slots(self):
        """{slot of a frame: what this thing puts there}"""
        article = "an" if VOWEL_SOUND.match(self.name) else "a"
        they, whose = ("they", "their") if self.kind == "person" else ("it", "its")
        return {"X": self.name, "Xs": self.plural,
                "a X": f"{article} {self.name}", "A X": f"{article.capitalize()} {self.name}",
                "they": they, "They": they.capitalize(), "X's": whose}

    def inflection(self, frame):
        """The inflection of the phrase when this thing is in the frame, such as "past their"."""
        return frame.slot.replace("X's", self.slots["X's"])


@dataclass(frozen=True, eq=False)
class Phrase:
    topic: str            # "banking"; "" for a literal phrase, which has no pun word
    text: str             # "lose interest": the verb comes first, in its base form
    written: str          # the pun word as it is spelled: "interest", or "sole"
    heard: str            # the word that the reader hears: "interest" again, or "soul"
    topic_sense: str      # "what money earns"
    everyday_sense: str   # "curiosity"


@dataclass(frozen=True, eq=False)
class Frame:
    family: str           # "first", a group of similar frames
    takes: str            # person, or any
    text: str             # "I used to be {a X}, but then I {past my}."
    slot: str             # "past my", the slot of the phrase


class Parse(NamedTuple):
    """What a sentence was written from."""
    frame: Frame
    thing: Thing
    phrase: Phrase


class Verdict(NamedTuple):
    fluent: bool          # the grammar could have written the text
    on_topic: bool        # it is fluent, and about the thing in the prompt
    pun: bool             # it is fluent, and its thing and its phrase belong to one topic
    parse: Parse | None   # None if it is not fluent


def pluralize(noun):
    """The regular plural of an English noun. The lexicon spells out irregular ones."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"

# -----------------------------------------------------------------------------
# the world

class World:
    """A lexicon with the grammar that writes sentences and the judge that reads them.

    Randomness comes from a seed, or from `rng`, a random.Random."""

    def __init__(self, *folders):
        """folders: of topic files; the first has frames, verbs, and literal phrases, too.

        Raises InputError, which lists every mistake in the lexicon with file and line."""
        lexicon = Lexicon(folders)
        self.things, self.frames = lexicon.things, lexicon.frames
        self.phrases, self.literals = lexicon.phrases, lexicon.literals     # with and without a pun
        self.verbs = lexicon.verbs          # {"lose": {"base": "lose", "past": "lost", ...}}
        self.by_name = {thing.name: thing for thing in self.things}
        self.by_prompt = {self.prompt(thing): thing for thing in self.things}
        frames_for_any = [frame for frame in self.frames if frame.takes == "any"]
        self.frames_for = dict.fromkeys(THING_KINDS, frames_for_any) | {"person": self.frames}
        self.topic_phrases = {thing.topic: [] for thing in self.things}
        for phrase in self.phrases:
            self.topic_phrases[phrase.topic].append(phrase)
        self.hold_out_pairs()
        self.build_parser()

    def hold_out_pairs(self):
        """Splits the pairs (thing, phrase) that make a pun into train_puns and held_out.

        Checksums decide, not random numbers: a new word in the lexicon hardly moves the others."""
        def checksum(pair):
            thing, phrase = pair
            return zlib.crc32(f"{thing.name}|{phrase.text}".encode())

        pairs = [(thing, phrase) for thing in self.things
                 for phrase in self.topic_phrases[thing.topic]]
        pairs.sort(key=checksum)
        n_held_out = round(HELD_OUT * len(pairs))
        self.train_puns = {thing: list(self.topic_phrases[thing.topic]) for thing in self.things}
        self.held_out = []
        for thing, phrase in pairs:
            # Every thing keeps at least one pun to learn from.
            if len(self.held_out) < n_held_out and len(self.train_puns[thing]) > 1:
                self.train_puns[thing].remove(phrase)
                self.held_out.append((thing, phrase))

    # -- the grammar ------------------------------------------------------------

    def prompt(self, thing):
        return f"About {thing.slots['a X']}:"

    def inflect(self, phrase, inflection):
        """Fits a phrase to a sentence: ("lose one's balance", "past my") -> "lost my balance"."""
        verb, _, rest = phrase.text.partition(" ")
        form, whose = inflection.split(" ")
        text = f"{self.verbs[verb][form]} {rest}"
        # With the space in front, "everyone's" stays as it is.
        text = text.replace(" one's", f" {whose}")
        return text.replace(" oneself", f" {REFLEXIVES[whose]}")

    def render(self, frame, thing, phrase):
        """The sentence that these three parts make."""
        inflected = self.inflect(phrase, thing.inflection(frame))
        return frame.text.format_map(thing.slots | {frame.slot: inflected})

    def choose_phrase(self, rng, thing, kind):
        """A phrase that makes a pun, mismatch, or literal of `thing`; never of a held-out pair."""
        if kind == "pun":
            return rng.choice(self.train_puns[thing])
        if kind == "literal":
            return rng.choice(self.literals)
        while True:     # few phrases share a topic, so the first draw is nearly always good
            phrase = rng.choice(self.phrases)
            if phrase.topic != thing.topic:
                return phrase

    def write(self, rng, thing, kind, phrase=None):
        """A random sentence about `thing`: a pun, mismatch, or literal, or one with `phrase`."""
        frame = rng.choice(self.frames_for[thing.kind])
        if phrase is None:
            phrase = self.choose_phrase(rng, thing, kind)
        return self.render(frame, thing, phrase)

    def worsen(self, rng, thing, kind, how):
        """A text that loses against a better one about `thing`.

        how: mismatch, literal, or what is wrong with a text of `kind`: broken, or off topic."""
        if how == "off topic":
            other = rng.choice([other for other in self.things if other != thing])
            return self.write(rng, other, kind)
        if how == "broken":
            return self.damage(rng, self.write(rng, thing, kind))
        return self.write(rng, thing, how)

    def damage(self, rng, text):
        """The text with a word dropped, doubled, or swapped, or cut short. It does not parse."""
        words = text.split()
        while True:
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            dropped = words[:i] + words[i + 1:]
            doubled = words[:i + 1] + words[i:]
            cut = words[:i + 1]
            swapped = list(words)
            swapped[i], swapped[j] = words[j], words[i]
            damaged = " ".join(rng.choice([dropped, doubled, cut, swapped]))
            if self.parse(damaged) is None:     # swapping equal words does no damage, for example
                return damaged

    # -- records for training ---------------------------------------------------

    def corpus(self, n, seed, mix=MIX):
        """n records {prompt, completion}. Things are drawn uniformly, kinds as in `mix`."""
        rng = random.Random(seed)
        things = rng.choices(self.things, k=n)
        kinds = rng.choices(list(mix), mix.values(), k=n)
        records = []
        draws = zip(things, kinds, strict=True)
        for thing, kind in progress_bar(draws, "corpus", n):
            text = self.write(rng, thing, kind)
            records.append({"prompt": self.prompt(thing), "completion": " " + text})
        return records

    def preferences(self, n, seed, noise=0.0, held_out=False):
        """n records {prompt, chosen, rejected}.

        Mostly a pun is chosen over a mismatch or a literal, sometimes a fluent text over a broken
        or an off-topic one.
        noise: fraction of the labels that are flipped, as if people made mistakes.
        held_out: the chosen puns come from pairs that no training set contains."""
        rng = random.Random(seed)
        records = []
        for _ in range(n):
            thing = rng.choice(self.things)
            better = rng.choices(list(CHOSEN_MIX), CHOSEN_MIX.values())[0]
            worse_mix = WORSE_THAN_PUN if better == "pun" else WORSE_THAN_FLUENT
            worse = rng.choices(list(worse_mix), worse_mix.values())[0]
            phrase = None
            if held_out and better == "pun":
                thing, phrase = rng.choice(self.held_out)
            chosen = self.write(rng, thing, better, phrase)
            rejected = self.worsen(rng, thing, better, worse)
            if rng.random() < noise:
                chosen, rejected = rejected, chosen
            records.append({"prompt": self.prompt(thing),
                            "chosen": " " + chosen, "rejected": " " + rejected})
        return records

    def rankings(self, n, seed):
        """n records {prompt, ranked}: a pun, a mismatch or literal, a broken or off-topic text."""
        rng = random.Random(seed)
        records = []
        for _ in range(n):
            thing = rng.choice(self.things)
            fluent = rng.choice(["mismatch", "literal"])
            best = self.write(rng, thing, "pun")
            middle = self.write(rng, thing, fluent)
            # The worst may be a pun, too, but on the wrong topic or in a broken sentence.
            kind, how = rng.choice(["pun", fluent]), rng.choice(["broken", "off topic"])
            worst = self.worsen(rng, thing, kind, how)
            ranked = [" " + text for text in (best, middle, worst)]
            records.append({"prompt": self.prompt(thing), "ranked": ranked})
        return records

    def entropy(self):
        """Mean entropy of a completion given its prompt, in nats: no model's loss can be lower.

        A completion has exactly one parse, so the entropies of the choices add up:
        H(completion) = H(frame) + H(kind) + sum over kinds of p(kind) H(phrase | kind)"""
        total = 0.0
        for thing in self.things:
            n_mismatches = len(self.phrases) - len(self.topic_phrases[thing.topic])
            n_phrases = {"pun": len(self.train_puns[thing]), "mismatch": n_mismatches,
                         "literal": len(self.literals)}
            total += math.log(len(self.frames_for[thing.kind]))
            total += sum(p * (math.log(n_phrases[kind]) - math.log(p)) for kind, p in MIX.items())
        return total / len(self.things)

    # -- the judge --------------------------------------------------------------

    def build_parser(self):
        """Builds the tables that parse() looks up. A sentence is before + phrase + after:

        shells       {before: {after: [(frame, thing), ...]}}
        phrase_of    {inflection: {inflected text: phrase}}"""
        self.shells, self.phrase_of = {}, {}
        for thing in self.things:
            for frame in self.frames_for[thing.kind]:
                shell = frame.text.format_map(thing.slots | {frame.slot: "\0"})
                before, _, after = shell.partition("\0")
                self.shells.setdefault(before, {}).setdefault(after, []).append((frame, thing))
                inflection = thing.inflection(frame)
                if inflection not in self.phrase_of:
                    self.phrase_of[inflection] = {self.inflect(phrase, inflection): phrase
                                                  for phrase in self.phrases + self.literals}

    def parse(self, text):
        """The Parse of what the text was written from, or None if the grammar cannot write it."""
        boundaries = [match.start() for match in re.finditer(r"\b", text)]     # of words
        for start in [i for i in boundaries if text[:i] in self.shells]:
            afters = self.shells[text[:start]]
            for end in boundaries:
                for frame, thing in afters.get(text[end:], []):
                    phrases = self.phrase_of[thing.inflection(frame)]
                    if phrase := phrases.get(text[start:end]):
                        return Parse(frame, thing, phrase)
        return None

    def judge(self, prompt, text):
        """The Verdict on a completion of a prompt.

        One space before the text belongs to the format of the records, not to the sentence."""
        parse = self.parse(text.removeprefix(" "))
        if parse is None:
            return Verdict(False, False, False, None)
        on_topic = self.prompt(parse.thing) == prompt
        pun = parse.thing.topic == parse.phrase.topic
        return Verdict(True, on_topic, pun, parse)


@functools.cache
def read_world(name):
    return World(*WORLDS[name])


def world(name="puns"):
    """The world of that name, read once: puns, which is small, or puns_large."""
    return read_world(name)

# -----------------------------------------------------------------------------
# reading the lexicon

def expect(condition, reason):
    """Raises ValueError(reason), which Lexicon.read() turns into a mistake with file and line."""
    if not condition:
        raise ValueError(reason)


class Lexicon:
    """The words of some folders. After a mistake it reads on, so that one error lists them all."""

    def __init__(self, folders):
        self.things, self.phrases, self.literals, self.frames, self.verbs = [], [], [], [], {}
        self.topic = ""         # of the line that is being read
        self.mistakes = []      # ["file:line: reason"]
        self.defined = {}       # {("thing", "banker"): "file:line"}
        self.topic_of = {}      # {"banker": "banking", "bankers": "banking", "interest": "banking"}
        first = Path(folders[0])
        self.read(first / "verbs.txt", self.add_verb)       # first: phrases need their verbs
        for path in [path for folder in folders for path in sorted(Path(folder).glob("*.txt"))]:
            if path.stem not in ("verbs", "literals", "frames"):
                self.read(path, self.add_to_topic)
        self.read(first / "literals.txt", self.add_literal)
        self.read(first / "frames.txt", self.add_frame)
        self.check_topics()
        if self.mistakes:
            raise InputError("the lexicon has mistakes:\n" + "\n".join(self.mistakes))

    def read(self, path, add):
        """Calls add() for each line that is neither blank nor a comment. Notes its mistakes."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()       # editors may add a BOM
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
        """Notes where `name` is defined. A second definition is a mistake."""
        earlier = self.defined.get((what, name))
        expect(earlier is None, f"{what} '{name}' is already defined at {earlier}")
        self.defined[what, name] = self.where

    def claim(self, word):
        """Notes the topic of a thing or a pun word. In two topics, it would make puns in both."""
        topic = self.topic_of.setdefault(word, self.topic)
        expect(topic == self.topic, f"'{word}' belongs to topic {topic} already")

    def add_verb(self, line):
        forms = line.split()
        expect(len(forms) == len(VERB_FORMS),
               f"a verb has five forms ({' '.join(VERB_FORMS)}), not {len(forms)}")
        self.define("verb", forms[0])
        self.verbs[forms[0]] = dict(zip(VERB_FORMS, forms, strict=True))

    def add_to_topic(self, line):
        """Line of a topic file: topic NAME, person NAME/PLURAL, NAME, ..., or pun PHRASE."""
        field, _, value = line.partition(" ")
        if field == "topic":
            self.topic = value.strip()
            self.define("topic", self.topic)
            return
        expect(self.topic, "this line comes before the first topic: start with 'topic NAME'")
        expect(field in (*THING_KINDS, "pun"),
               f"unknown field '{field}' (known: topic {' '.join(THING_KINDS)} pun)")
        if field == "pun":
            self.add_pun(value)
            return
        for item in value.split(","):
            name, _, plural = (part.strip() for part in item.partition("/"))
            thing = Thing(self.topic, field, name, plural or pluralize(name))
            self.define("thing", name)
            self.claim(name)
            self.claim(thing.plural)
            self.things.append(thing)

    def add_pun(self, value):
        """Line of a topic file: wear out one's *sole/soul* | bottom of a shoe | spirit"""
        parts = [part.strip() for part in value.split("|")]
        expect(len(parts) == 3 and all(parts),
               "a pun is: phrase with its *pun word* | sense in the topic | everyday sense")
        phrase, topic_sense, everyday_sense = parts
        marked = re.findall(r"\*(.+?)\*", phrase)
        expect(len(marked) == 1, f"mark one pun word with asterisks, not {len(marked)}")
        written, _, heard = marked[0].partition("/")
        heard = heard or written
        text = phrase.replace(f"*{marked[0]}*", written)
        self.define_phrase(text)
        for word in dict.fromkeys((written, heard)):        # once if they are the same
            self.define("pun word", word)
            self.claim(word)
        self.phrases.append(Phrase(self.topic, text, written, heard, topic_sense, everyday_sense))

    def add_literal(self, text):
        self.define_phrase(text)
        self.literals.append(Phrase("", text, "", "", "", ""))

    def define_phrase(self, text):
        expect(re.fullmatch(r"[a-z'-]+( [a-z'-]+)+", text),
               f"'{text}' is not two or more lower-case words without punctuation")
        verb = text.split(" ")[0]
        expect(verb in self.verbs, f"'{verb}' has no forms yet: add the verb to verbs.txt")
        self.define("phrase", text)

    def add_frame(self, line):
        parts = [part.strip() for part in line.split("|")]
        expect(len(parts) == 3 and parts[1] in ("person", "any"),
               "a frame is: family | person or any | text")
        family, takes, text = parts
        fields = string.Formatter().parse(text)     # raises ValueError if braces do not match
        slots = [slot for _, slot, _, _ in fields if slot is not None]
        for slot in slots:
            expect(slot in KNOWN_SLOTS, f"unknown slot {{{slot}}} (frames.txt explains the slots)")
        phrase_slots = [slot for slot in slots if slot in PHRASE_SLOTS]
        expect(THING_SLOTS & set(slots) and len(phrase_slots) == 1,
               "a frame needs a slot for the thing and exactly one for the phrase")
        self.define("frame", text)
        self.frames.append(Frame(family, takes, text, phrase_slots[0]))

    def check_topics(self):
        """Notes the topics without a thing or without a pun."""
        for part, items in (("thing", self.things), ("pun", self.phrases)):
            topics = {item.topic for item in items}
            for (what, name), where in self.defined.items():
                if what == "topic" and name not in topics:
                    self.mistakes.append(f"{where}: topic {name} has no {part}")

# -----------------------------------------------------------------------------
# the command line

# In rot13, so that nobody has to read them.
SLURS = codecs.decode("avttre avttn snttbg snt xvxr fcvp tbbx puvax genaal ergneq phag jrgonpx "
                      "pbba qlxr fyhg juber", "rot13").split()


def check_tokens(tokens):
    """Raises InputError if one of the tokens (bytes) is a slur.

    An untrained model prints tokens at random, so none may join letters into one."""
    for i, token in enumerate(tokens):
        word = token.decode("utf-8", "replace").strip().lower()
        if word.removesuffix("s") in SLURS:
            raise InputError(f"token {i} of the tokenizer is a slur: train it with another number "
                             "of tokens, python -m real.tokenizer --words 2300")


def check():
    """Check the lexicon: fields, duplicates, verb forms, and that sentences parse back; and that
    no token is a slur."""
    for folders in WORLDS.values():
        lines = (folders[-1] / "puns.tiktoken").read_bytes().splitlines()
        check_tokens(base64.b64decode(line.split()[0]) for line in lines)
    w, rng = world("puns_large"), random.Random(0)          # it has all the words
    for frame in progress_bar(w.frames, "frames"):
        things = [thing for thing in w.things if frame in w.frames_for[thing.kind]]
        # Each thing and each phrase in random company: all triples would be millions.
        pairs = [(thing, rng.choice(some)) for thing in things for some in (w.phrases, w.literals)]
        pairs += [(rng.choice(things), phrase) for phrase in w.phrases + w.literals if things]
        for thing, phrase in pairs:
            text = w.render(frame, thing, phrase)
            parse = w.parse(text)
            if parse != (frame, thing, phrase):
                raise InputError(f"ambiguous: '{text}' also reads as {parse}")
    n_families = len({frame.family for frame in w.frames})
    print(f"{len(w.literals)} literal phrases, {len(w.frames)} frames in {n_families} families")
    for name in WORLDS:
        w = world(name)
        n_pairs = sum(len(w.topic_phrases[thing.topic]) for thing in w.things)
        n_heterographic = sum(phrase.written != phrase.heard for phrase in w.phrases)
        print(f"{name}: {len(w.topic_phrases)} topics, {len(w.things)} things, {len(w.phrases)} "
              f"pun phrases ({n_heterographic} of them heterographic); {n_pairs} pairs make a pun, "
              f"{len(w.held_out)} of them are held out of training; entropy of a completion "
              f"{w.entropy():.3f} nats")


def sample(n: int = 20, kind: str = "pun", seed: int = 0):
    """Write n random sentences of one kind: pun, mismatch, or literal."""
    if kind not in MIX:
        raise InputError(f"--kind is one of {', '.join(MIX)}, not '{kind}'")
    w, rng = world("puns_large"), random.Random(seed)
    for _ in range(n):
        thing = rng.choice(w.things)
        text = w.write(rng, thing, kind)
        if kind == "pun":
            phrase = w.parse(text).phrase
            sound = "" if phrase.heard == phrase.written else f"/{phrase.heard}"
            text += f"   [{phrase.written}{sound}: {phrase.topic_sense}; {phrase.everyday_sense}]"
        print(text)


def judge(prompt: tyro.conf.Positional[str], text: tyro.conf.Positional[str]):
    """Judge one completion of one prompt."""
    verdict = world("puns_large").judge(prompt, text)
    print(f"fluent {verdict.fluent}, on topic {verdict.on_topic}, pun {verdict.pun}")
    if verdict.parse:
        frame, thing, phrase = verdict.parse
        print(f"frame  {frame.text}\nthing  {thing.name} ({thing.topic})\n"
              f"phrase {phrase.text} ({phrase.topic or 'literal'})")


if __name__ == "__main__":
    commands = {"check": check, "sample": sample, "judge": judge}
    command_line(lambda: tyro.extras.subcommand_cli_from_dict(commands))
