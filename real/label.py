"""
Label your own preferences: two puns, which is funnier?

    python -m real.label                            two samples of runs/sft to each prompt
    python -m real.label runs/sft runs/ppo          one sample of each of two policies
    python -m real.label a.jsonl b.txt              texts in files (real/corpora.py)
    python reward_model.py --data mine.jsonl        then a reward model of your taste

    python -m real.label --blind runs/sft runs/ppo  be the judge: how often does ppo win?

Each answer is written at once, so you can stop at any time; the same command continues. A tie is
a record with a share of 0.5: the reward model learns that both texts are worth the same.

Every tenth question is an old one with its texts swapped, which shows how consistent you are. A
reward model can agree with you more often than that. If each answer matches your taste with
probability a, two answers agree with probability a^2 + (1 - a)^2. Where that is 73 %, a is 84 %,
and a model that has learned your taste agrees with 84 % of your answers.

In a notebook (needs ipywidgets; %cd goes to the folder of this project, from wherever you are):

    %cd -q ~/wordplay
    from real.label import widget
    widget("runs/sft", "runs/ppo")
"""

import collections
import html
import itertools
import json
import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import (
    InputError,
    Options,
    command_line,
    make_rng,
    progress_bar,
    read_jsonl,
    setup,
    write_jsonl,
)
from data import complete, read_records, tokenizer_of
from model import load_model
from puns import world
from real.corpora import load
from real.duplicates import answers_of

# -----------------------------------------------------------------------------
# pairs to label

def pairs(a, b="", data="", seed=0):
    """Yields (prompt, text of a, text of b). Two equal texts are no pair.

    a, b: two checkpoints, or folders of runs, which never run out; or two files of texts. Without
    b both texts are of a. data: JSONL of prompts for checkpoints; '' is what prompts_of() finds.
    Raises InputError if there is nothing to compare."""
    paths = [Path(source, "ckpt.pt") if is_folder(source) else Path(source)
             for source in (a, b or a)]
    are_checkpoints = {path.suffix == ".pt" for path in paths}
    if are_checkpoints == {True}:
        found = sampled_pairs(paths, prompts_of(paths[0], data), seed)
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


def is_folder(source):
    return Path(source).is_dir() or not Path(source).suffix


def prompts_of(ckpt, data=""):
    """The different prompts of a JSONL file; '' is the file that the run of the checkpoint
    validated on, else the one it trained on, else the pun world."""
    config = ckpt.with_name("config.json")
    if not data and config.exists():
        options = json.loads(config.read_text(encoding="utf-8"))
        data = options.get("val_data") or options.get("data")
    if not data:
        return list(world().by_prompt)
    return list(dict.fromkeys(record["prompt"] for record in read_records(data, ["prompt"])))


def sampled_pairs(ckpts, prompts, seed):
    """Both checkpoints answer the prompts, again and again."""
    random.Random(seed).shuffle(prompts)
    device, autocast = setup(Options(seed))
    writers = []
    for i, ckpt in enumerate(ckpts):
        model = load_model(ckpt, device)
        writers.append((model, tokenizer_of(model), make_rng(device, 2 * seed + i)))
    prompts = itertools.cycle(prompts)
    while True:
        batch = list(itertools.islice(prompts, 32))     # few, so that the first one comes soon
        texts = [complete(model, tok, batch, rng, autocast, max_new_tokens=64)
                 for model, tok, rng in writers]
        yield from zip(batch, *texts, strict=True)


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
        raise InputError(f"{a}{f' and {b}' if b else ''}: no two texts have the same prompt, so "
                         "there is nothing to compare")
    rng.shuffle(found)
    return found


def texts_of(path, rng):
    """{prompt: its texts, shuffled} of a file of any format that real.corpora reads."""
    corpus = load(path)
    if corpus.format in ("semeval", "expun"):
        raise InputError(f"{path}: convert these puns first: python -m real.corpora")
    texts = collections.defaultdict(list)
    for record in corpus.records:
        texts[record["prompt"]] += answers_of(record)
    return {prompt: rng.sample(answers, len(answers)) for prompt, answers in texts.items()}

# -----------------------------------------------------------------------------
# questions and answers

def key_of(prompt, x, y):
    """The same for both orders of a pair."""
    return prompt, min(x, y), max(x, y)


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
        self.skipped = set()        # keys of pairs
        if self.path.exists() and self.path.stat().st_size > 0:
            self.rows = read_records(path, ["prompt", "chosen", "rejected"])
            for row in self.rows:
                del row["where"]
        self.ask_next()

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
        old = [key for key in list(asked)[:-(self.repeat // 2)]
               if len(asked[key]) == 1 and key not in self.skipped]
        return random.Random(len(self.rows)).choice(old) if old else None

    def new_pair(self):
        known = self.asked().keys() | self.skipped
        # A policy that writes few different texts repeats itself forever.
        for pair in itertools.islice(self.pairs, len(known) + 1000):
            if key_of(*pair) not in known:
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
            if self.question is not None:
                self.pairs = itertools.chain([self.question], self.pairs)
            *rest, last = self.rows
            self.keep(rest)
            self.ask((last["prompt"], last["chosen"], last["rejected"]))
        elif what == "s" and self.question is not None:
            self.skipped.add(key_of(*self.question))
            self.ask_next()
        elif what in ("1", "2", "=") and self.question is not None:
            prompt, first, second = self.question
            chosen, rejected = (second, first) if what == "2" else (first, second)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            if what == "=":
                row["share"] = 0.5
            self.keep([*self.rows, row])
            self.ask_next()

    def keep(self, rows):
        write_jsonl(self.path, rows)        # first: it may fail, as on a full disk
        self.rows = rows

    def agreement(self):
        """(the number of pairs asked twice, the number of these with the same answer)"""
        twice = [winners for winners in self.asked().values() if len(winners) > 1]
        return len(twice), sum(winners[0] == winners[1] for winners in twice)

    def status(self):
        n_twice, n_same = self.agreement()
        n_ties = sum(row.get("share") == 0.5 for row in self.rows)
        text = f"answers in {self.path}: {len(self.rows)}, of these ties: {n_ties}"
        if n_twice:
            text += f"; asked twice: {n_twice}, answered alike: {n_same} ({n_same / n_twice:.0%})"
        return text

# -----------------------------------------------------------------------------
# blind: which of two policies wins?

def read_key(path, a, b, n, data="", seed=0):
    """[{"prompt": ..., a: text, b: text}, ...]: who wrote what. The file is written first if there
    is none, with n pairs. Raises InputError if it is of other policies."""
    if not path.exists():
        drawn = itertools.islice(pairs(a, b, data, seed), n)
        drawn = progress_bar(drawn, "pairs", n)
        write_jsonl(path, [{"prompt": prompt, a: x, b: y} for prompt, x, y in drawn])
    key = read_jsonl(path)
    if not all(row.keys() == {"prompt", a, b} for row in key):
        raise InputError(f"{path} is not of {a} and {b}: choose another --out")
    return key


def wilson(p, n, z=1.96):
    """(low, high) of Wilson's 95 % interval for a rate p in n trials.

    With ties, which count half, it is a little too wide, never too narrow."""
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) * z / (1 + z * z / n)
    return center - half, center + half


def win_rate(asked, key, a, b):
    """(rate, low, high, number of pairs): how often b wins, with a 95 % interval. A tie is half a
    win, and a pair that was asked twice counts once, with the mean of both answers."""
    text_of_b = {key_of(row["prompt"], row[a], row[b]): row[b] for row in key}
    points = []
    for pair, winners in asked.items():
        if pair not in text_of_b:
            raise InputError(f"there are answers to other pairs, such as {pair[1]!r}: choose "
                             "another --out")
        wins = [0.5 if winner == "" else float(winner == text_of_b[pair]) for winner in winners]
        points.append(sum(wins) / len(wins))
    rate = sum(points) / len(points)
    return rate, *wilson(rate, len(points)), len(points)


def print_win_rate(labeling, key, a, b):
    if labeling.rows:
        rate, low, high, n = win_rate(labeling.asked(), key, a, b)
        print(f"{b} wins against {a} in {rate:.1%} of {n} (95 % interval: {low:.1%} to {high:.1%})")

# -----------------------------------------------------------------------------
# terminal and notebook

@dataclass(slots=True)
class Config:
    """Which of two puns is funnier? Your answers are training data for reward_model.py.

    With --blind: which of two policies writes the funnier ones? Both answer the same prompts, and
    their texts come without names. OUT.key.jsonl says who wrote what. The win rate of the second
    policy, with a 95 % interval, is printed at the end, and whenever you come back."""
    sources: tyro.conf.Positional[tuple[str, ...]] = ("runs/sft",)
    """one or two checkpoints or folders of runs, or one or two files of texts"""
    blind: bool = False         # two policies, judged blindly
    out: str = ""               # the answers, continued; '' is mine.jsonl, with --blind blind.jsonl
    n: int = 150                # answers to ask for
    data: str = ""              # JSONL of prompts; '' is what the first run validated on
    seed: int = 0               # of the samples, and of the order of pairs


def label(config):
    """Asks in the terminal. Raises InputError for unusable input."""
    if len(config.sources) not in (1, 2):
        raise InputError("name one or two checkpoints, or one or two files of texts")
    out = Path(config.out or ("blind.jsonl" if config.blind else "mine.jsonl"))
    key = []
    if config.blind:
        if len(set(config.sources)) != 2:
            raise InputError("--blind compares two policies: name two different ones")
        key = read_key(out.with_suffix(".key.jsonl"), *config.sources, config.n, config.data,
                       config.seed)
        found = [(row["prompt"], *(row[source] for source in config.sources)) for row in key]
    else:
        found = pairs(*config.sources, data=config.data, seed=config.seed)
    labeling = Labeling(found, out, config.n)
    if config.blind:
        print_win_rate(labeling, key, *config.sources)
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
    if config.blind:
        print_win_rate(labeling, key, *config.sources)
    else:
        print(f"train on them: python reward_model.py --data {out}")


def widget(a="runs/sft", b="", out="mine.jsonl", n=150, data="", seed=0):
    """The same in a cell of a notebook, with buttons and keys. Shows an error in one sentence."""
    try:
        import ipywidgets
    except ImportError:
        print("error: the widget needs ipywidgets: pip install ipywidgets")
        return None
    text, progress = ipywidgets.HTML(), ipywidgets.IntProgress(max=n)
    names = {"1": "1 is funnier", "2": "2 is funnier", "=": "neither", "s": "skip", "u": "undo"}
    buttons = {what: ipywidgets.Button(description=name) for what, name in names.items()}
    keys = ipywidgets.Text(placeholder="or click here and type 1, 2, =, s, u")
    box = ipywidgets.VBox([progress, text, ipywidgets.HBox(list(buttons.values())), keys])

    def show_error(error):
        text.value = f"<b>error:</b> {html.escape(str(error))}"

    def show():
        lines = ["<b>That is all.</b>"]
        if labeling.question is not None:
            prompt, first, second = map(html.escape, labeling.question)
            lines = [f"<b>{prompt}</b>", f"1 &nbsp; {first}", f"2 &nbsp; {second}"]
        lines.append(f"<small>{html.escape(labeling.status())}</small>")
        text.value = "".join(f"<p>{line}</p>" for line in lines)
        progress.value = len(labeling.rows)
        for what, button in buttons.items():
            is_useful = labeling.question is not None or what == "u"
            button.layout.display = "" if is_useful else "none"

    def answer(what):
        try:
            labeling.answer(what)
            show()
        except (InputError, OSError) as error:
            show_error(error)

    def type_key(change):
        if change.new:
            keys.value = ""         # ready for the next one
            answer(change.new[-1].lower())

    try:
        labeling = Labeling(pairs(a, b, data, seed), out, n)
    except (InputError, OSError) as error:
        show_error(error)
        return text
    for what, button in buttons.items():
        button.on_click(lambda _, what=what: answer(what))
    keys.observe(type_key, "value")
    show()
    return box


if __name__ == "__main__":
    command_line(lambda: label(tyro.cli(Config)))
