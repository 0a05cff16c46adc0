"""
Label your own preferences: two puns, which is funnier?

    python -m real.label                                        two samples of runs/sft per prompt
    python -m real.label runs/sft/ckpt.pt runs/ppo/ckpt.pt      one sample of each of two policies
    python -m real.label a.jsonl b.txt                          texts in files (real/corpora.py)
    python reward_model.py --data mine.jsonl                    then a reward model of your taste

Each answer is written at once, so you can stop at any time; the same command continues. A tie is
a record with a share of 0.5: the reward model learns that both texts are worth the same.

Every tenth question is an old one with its texts swapped, which shows how consistent you are. A
reward model can agree with you more often than that. If each answer matches your taste with
probability a, two answers agree with probability a^2 + (1 - a)^2. Where that is 73 %, a is 84 %,
and a model that has learned your taste agrees with 84 % of your answers.

In a notebook, from the root of the repository (needs ipywidgets):

    from real.label import widget
    widget("runs/sft/ckpt.pt", "runs/ppo/ckpt.pt")
"""

import collections
import html
import itertools
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import InputError, Options, atomic_write, command_line, make_rng, setup
from data import complete, read_records, tokenizer_of
from model import load_model
from puns import world
from real.corpora import load

ANSWERS = ("completion", "chosen", "rejected")

# -----------------------------------------------------------------------------
# pairs to label

def pairs(a, b="", data="", seed=0):
    """Yields (prompt, text of a, text of b). Two equal texts are no pair.

    a, b: two checkpoints (.pt), which never run out, or two files of texts. Without b both texts
    are of a. data: JSONL of prompts for checkpoints; '' takes those of the pun world.
    Raises InputError if there is nothing to compare."""
    are_checkpoints = {str(source).endswith(".pt") for source in (a, b or a)}
    if are_checkpoints == {True}:
        found = sampled_pairs(a, b or a, data, seed)
    elif are_checkpoints == {False}:
        found = written_pairs(a, b, seed)
    else:
        raise InputError(f"{a} and {b}: compare two checkpoints (.pt), or two files of texts")
    n_useless = 0               # in a row
    for prompt, x, y in found:
        if x.strip() and y.strip() and x.strip() != y.strip():
            n_useless = 0
            yield prompt, x, y
        else:
            n_useless += 1
        if n_useless == 1000:
            raise InputError(f"{a} and {b or a}: 1,000 pairs in a row were two equal or empty "
                             "texts, so there is nothing to compare")


def sampled_pairs(a, b, data, seed):
    if data:
        prompts = [record["prompt"] for record in read_records(data, ["prompt"])]
    else:
        prompts = list(world().by_prompt)
    random.Random(seed).shuffle(prompts)
    first = completions(a, itertools.cycle(prompts), 2 * seed)
    second = completions(b, itertools.cycle(prompts), 2 * seed + 1)
    for (prompt, x), (_, y) in zip(first, second, strict=True):
        yield prompt, x, y


def completions(path, prompts, seed):
    """Yields (prompt, text) for each prompt, sampled from a checkpoint in small batches, so that
    the first one comes soon."""
    device, autocast = setup(Options(seed))
    model = load_model(path, device)
    tok, rng = tokenizer_of(model), make_rng(device, seed)
    while batch := list(itertools.islice(prompts, 32)):
        yield from zip(batch, complete(model, tok, batch, rng, autocast), strict=True)


def written_pairs(a, b, seed):
    """The texts of two files, or of one, in pairs that answer the same prompt."""
    rng = random.Random(seed)
    first = texts_of(a, rng)
    second = texts_of(b, rng) if b else {}
    found = []
    for prompt, texts in first.items():
        others = second.get(prompt, [])
        if not b:
            texts, others = texts[::2], texts[1::2]
        found += [(prompt, x, y) for x, y in zip(texts, others, strict=False)]
    if not found:
        names = f"{a} and {b}" if b else a
        raise InputError(f"{names}: no two texts have the same prompt, so there is nothing to "
                         "compare")
    rng.shuffle(found)
    return found


def texts_of(path, rng):
    """{prompt: its texts, shuffled} of a file of any format that real.corpora reads."""
    corpus = load(path)
    if corpus.format in ("semeval", "expun"):
        raise InputError(f"{path}: convert these puns first: python -m real.corpora")
    texts = collections.defaultdict(list)
    for record in corpus.records:
        answers = [record[field] for field in ANSWERS if field in record]
        texts[record["prompt"]] += answers + record.get("ranked", [])
    return {prompt: rng.sample(answers, len(answers)) for prompt, answers in texts.items()}

# -----------------------------------------------------------------------------
# questions and answers

def key_of(prompt, x, y):
    """The same for both orders of a pair."""
    return prompt, min(x, y), max(x, y)


def count(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class Labeling:
    """What is asked next, and the answers so far.

    Everything follows from the file of answers, so labeling can stop at any time.

        labeling = Labeling(pairs(...), "mine.jsonl")
        labeling.question           (prompt, first text, second text); None at the end
        labeling.answer("1")        or "2", "=" for a tie, "s" to skip, and "u" to undo
    """

    def __init__(self, pairs, path, n=150, repeat=10):
        """n: answers to ask for. repeat: one question in so many is an old one.

        Raises InputError if the file of answers holds anything but preferences."""
        self.pairs, self.path = iter(pairs), Path(path)
        self.n, self.repeat = n, repeat
        self.rows = []              # the answers
        self.waiting = []           # pairs whose question was taken back
        self.skipped = set()        # their keys
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if text.strip():
            self.rows = read_records(path, ["prompt", "chosen", "rejected"])
            if not text.endswith("\n"):         # an editor may leave it so
                self.append("\n")
        self.ask_next()

    def append(self, text):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def asked(self):
        """{key of a pair: who won each time it was asked, '' is a tie}"""
        asked = collections.defaultdict(list)
        for row in self.rows:
            winner = "" if row.get("share") == 0.5 else row["chosen"]
            asked[key_of(row["prompt"], row["chosen"], row["rejected"])].append(winner)
        return asked

    def ask_next(self):
        """Sets the question, or None if there is no pair left or n answers are there."""
        self.question = None
        if len(self.rows) < self.n:
            pair = self.old_pair() or self.new_pair()
            if pair is not None:
                self.ask(pair)

    def old_pair(self):
        """At every tenth question: a pair that was asked once, and not just now."""
        if len(self.rows) % self.repeat != self.repeat - 1:
            return None
        asked = self.asked()
        old = list(asked)[:-(self.repeat // 2)]
        old = [key for key in old if len(asked[key]) == 1 and key not in self.skipped]
        return random.Random(len(self.rows)).choice(old) if old else None

    def new_pair(self):
        known = self.asked().keys() | self.skipped
        # A policy that writes few different texts repeats itself forever.
        for _ in range(len(known) + 1000):
            pair = self.waiting.pop() if self.waiting else next(self.pairs, None)
            if pair is None or key_of(*pair) not in known:
                return pair
        return None

    def ask(self, pair):
        """Sets the question. A checksum decides which text comes first; a repeat swaps them."""
        prompt, x, y = key = key_of(*pair)
        is_repeat = key in self.asked()
        is_swapped = zlib.crc32(repr(key).encode()) % 2 == 1
        self.question = (prompt, y, x) if is_swapped != is_repeat else (prompt, x, y)

    def answer(self, what):
        """1, 2, =, s, or u; anything else leaves the question as it is."""
        if what == "u" and self.rows:
            self.undo()
        elif what == "s" and self.question is not None:
            self.skipped.add(key_of(*self.question))
            self.ask_next()
        elif what in ("1", "2", "=") and self.question is not None:
            prompt, first, second = self.question
            row = {"prompt": prompt, "chosen": first, "rejected": second}
            if what == "2":
                row = {"prompt": prompt, "chosen": second, "rejected": first}
            if what == "=":
                row["share"] = 0.5
            self.rows.append(row)
            self.append(json.dumps(row, ensure_ascii=False) + "\n")
            self.ask_next()

    def undo(self):
        """Takes the last answer back and asks its question again."""
        if self.question is not None:
            self.waiting.append(self.question)
        row = self.rows.pop()
        lines = self.path.read_text(encoding="utf-8").rstrip().split("\n")
        with atomic_write(self.path) as path:
            path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
        self.ask((row["prompt"], row["chosen"], row["rejected"]))

    def agreement(self):
        """(the number of pairs asked twice, the number of these with the same answer)"""
        twice = [winners for winners in self.asked().values() if len(winners) > 1]
        return len(twice), sum(winners[0] == winners[1] for winners in twice)

    def status(self):
        n_twice, n_same = self.agreement()
        n_ties = sum(row.get("share") == 0.5 for row in self.rows)
        text = f"{count(len(self.rows), 'answer')} in {self.path}, {count(n_ties, 'tie')}"
        if n_twice:
            text += (f"; {count(n_twice, 'pair')} asked twice, {n_same} with the same answer "
                     f"({n_same / n_twice:.0%})")
        return text

# -----------------------------------------------------------------------------
# terminal and notebook

@dataclass(slots=True)
class Config:
    sources: tyro.conf.Positional[tuple[str, ...]] = ("runs/sft/ckpt.pt",)
    """one or two checkpoints, or one or two files of texts"""
    out: str = "mine.jsonl"     # the file of answers; an old one is continued
    n: int = 150                # answers to ask for
    data: str = ""              # JSONL of prompts for the checkpoints; '' is the pun world's
    seed: int = 0               # of the samples, and of the order of pairs


def label(config):
    """Asks in the terminal. Raises InputError for unusable input."""
    if len(config.sources) not in (1, 2):
        raise InputError("name one or two checkpoints, or one or two files of texts")
    found = pairs(*config.sources, data=config.data, seed=config.seed)
    labeling = Labeling(found, config.out, config.n)
    print("Which is funnier?   1   2   = neither   s skip   u undo   q quit")
    print(labeling.status())
    what = ""
    while labeling.question is not None and what != "q":
        prompt, first, second = labeling.question
        done = len(labeling.rows)
        print(f"\n[{'#' * (20 * done // config.n):20}] {done}/{config.n}  {prompt.strip()}")
        print(f"  1  {first.strip()}\n  2  {second.strip()}")
        try:
            what = input("> ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            what = "q"
        labeling.answer(what)
    print(f"\n{labeling.status()}")
    print(f"train on them: python reward_model.py --data {config.out}")


def widget(a="runs/sft/ckpt.pt", b="", out="mine.jsonl", n=150, data="", seed=0):
    """The same in a cell of a notebook, with buttons. Shows an error in one sentence."""
    try:
        import ipywidgets
    except ImportError:
        raise InputError("the widget needs ipywidgets: pip install ipywidgets") from None
    text = ipywidgets.HTML()
    try:
        labeling = Labeling(pairs(a, b, data, seed), out, n)
    except InputError as error:
        text.value = f"<b>error:</b> {html.escape(str(error))}"
        return text
    progress = ipywidgets.IntProgress(max=n)
    names = {"1": "1 is funnier", "2": "2 is funnier", "=": "neither", "s": "skip", "u": "undo"}
    buttons = {what: ipywidgets.Button(description=name) for what, name in names.items()}

    def show():
        lines = ["<b>That is all.</b>"]
        if labeling.question is not None:
            prompt, first, second = map(html.escape, labeling.question)
            lines = [f"<b>{prompt}</b>", f"1 &nbsp; {first}", f"2 &nbsp; {second}"]
        lines.append(f"<small>{html.escape(labeling.status())}</small>")
        text.value = "".join(f"<p>{line}</p>" for line in lines)
        progress.value = len(labeling.rows)
        for what, button in buttons.items():
            button.disabled = labeling.question is None and what != "u"

    def connect(what):
        def click(_):
            labeling.answer(what)
            show()

        buttons[what].on_click(click)

    for what in buttons:
        connect(what)
    show()
    return ipywidgets.VBox([progress, text, ipywidgets.HBox(list(buttons.values()))])


if __name__ == "__main__":
    command_line(lambda: label(tyro.cli(Config)))
