"""
The reader's own taste: two puns, which is funnier? The answers are preferences that reward_model.py trains on.

    python reward_model.py label                                            two samples of the SFT model for each prompt
    python reward_model.py label runs/sft/ckpt.pt runs/ppo/ckpt.pt          one of each of two policies
    python reward_model.py label a.txt b.jsonl                              from files, of any format that data.py reads
    python reward_model.py --data mine.jsonl                                and then: the reward model of one's own taste

Every answer is written at once, so one can stop at any time; the same command goes on. A tie is a record with share .5: the
reward model learns that both are worth the same. Every tenth question is an old one with its texts swapped: how often the answer
is the same says how sure one's own taste is, and what accuracy a reward model can reach at most. In a notebook:

    from label import widget; widget("runs/sft/ckpt.pt", "runs/ppo/ckpt.pt")
"""

import collections
import html
import itertools
import json
import random
import zlib
from pathlib import Path

import tyro

from common import InputError, Options, replacing, sampler, setup
from data import read_records, tokenizer, write
from model import load_model
from puns import world

# -----------------------------------------------------------------------------
# pairs to judge

def completions(path, prompts, seed):
    """Yields (prompt, text) for each prompt: what a checkpoint writes, in batches, so that the first comes soon."""
    device, autocast = setup(Options(seed))
    model = load_model(path, device)
    tok, generator = tokenizer(model.tokenizer), sampler(device, seed)
    while some := list(itertools.islice(prompts, 32)):
        yield from zip(some, write(model, tok, some, generator, autocast), strict=True)


def texts_of_file(path, rng):
    """{prompt: its texts, shuffled} of a file of completions, comparisons or plain lines."""
    texts = collections.defaultdict(list)
    for record in read_records(path, "any"):
        texts[record["prompt"]] += record.get("ranked", []) + [record[name] for name in ("completion", "chosen", "rejected") if name in record]
    return {prompt: rng.sample(answers, len(answers)) for prompt, answers in texts.items()}


def pairs(a, b="", seed=0, data=""):
    """Yields (prompt, text of a, text of b), without end for checkpoints. a, b: two checkpoints or two files; b '': both texts are
    of a. data: a file of prompts for checkpoints; '' asks for what the pun world is about. Two equal texts are no pair."""
    rng, checkpoints = random.Random(seed), {str(path).endswith(".pt") for path in (a, b or a)}
    if checkpoints == {True}:
        known = [record["prompt"] for record in read_records(data, "prompt")] if data else list(world().by_prompt)
        rng.shuffle(known)
        first, second = (completions(path, itertools.cycle(known), 2 * seed + i) for i, path in enumerate((a, b or a)))
        found = ((prompt, x, y) for (prompt, x), (_, y) in zip(first, second, strict=True))
    elif checkpoints == {False}:
        first, second = texts_of_file(a, rng), texts_of_file(b, rng) if b else {}
        found = [(prompt, x, y) for prompt, texts in first.items()
                 for x, y in zip(*((texts, second.get(prompt, [])) if b else (texts[::2], texts[1::2])), strict=False)]
        rng.shuffle(found)
        if not found:
            raise InputError(f"{a}{' and ' * bool(b)}{b}: no two texts have the same prompt, so there is nothing to compare")
    else:
        raise InputError(f"{a} and {b}: compare two checkpoints (.pt), or two files of texts")
    yield from ((prompt, x, y) for prompt, x, y in found if x.strip() and y.strip() and x.strip() != y.strip())

# -----------------------------------------------------------------------------
# questions and answers

class Labeling:
    """What is asked next, and the answers so far. All of it follows from the file of answers, so that it can be stopped at any time.

        labeling = Labeling(pairs(...), "mine.jsonl")
        labeling.question             (prompt, first text, second text); None at the end
        labeling.answer("1")          or "2", "=" for a tie, "s" to skip; "u" takes the last answer back and asks it again
    """

    def __init__(self, pairs, path, n=150, repeat=10):
        self.pairs, self.path, self.n, self.repeat, self.waiting, self.skipped = iter(pairs), Path(path), n, repeat, [], set()
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.rows = read_records(path, "preference") if text.strip() else []
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")
        self.ask()

    @staticmethod
    def key(prompt, x, y):
        return prompt, min(x, y), max(x, y)

    def asked(self):
        """{key of a pair: who won each time it was asked, '' is a tie}"""
        asked = collections.defaultdict(list)
        for row in self.rows:
            asked[self.key(row["prompt"], row["chosen"], row["rejected"])].append("" if row.get("share") == 0.5 else row["chosen"])
        return asked

    def ask(self, pair=None):
        """Sets the question. Every tenth is an old pair that was asked once and not just now, in the other order."""
        asked = self.asked()
        if pair is None and len(self.rows) % self.repeat == self.repeat - 1:
            old = [key for key in list(asked)[:-(self.repeat // 2)] if len(asked[key]) == 1 and key not in self.skipped]
            pair = random.Random(len(self.rows)).choice(old) if old else None
        while pair is None and (found := self.waiting.pop() if self.waiting else next(self.pairs, None)):
            pair = self.key(*found) if self.key(*found) not in asked.keys() | self.skipped else None
        if pair is None or len(self.rows) >= self.n:
            self.waiting += [pair] * (pair is not None)
            self.question = None
            return
        prompt, x, y = key = self.key(*pair)
        swap = zlib.crc32(repr(key).encode(errors="replace")) % 2 != len(asked.get(key, ()))      # by chance first, then swapped
        self.question = (prompt, y, x) if swap else (prompt, x, y)

    def answer(self, what):
        if what == "u" and self.rows:
            self.waiting += [self.question] * (self.question is not None)
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            with replacing(self.path) as path:
                path.write_text("".join(lines[:max(i for i, line in enumerate(lines) if line.strip())]), encoding="utf-8")
            row = self.rows.pop()
            return self.ask((row["prompt"], row["chosen"], row["rejected"]))
        if self.question is not None and what in ("1", "2", "=", "s"):
            prompt, first, second = self.question
            if what == "s":
                self.skipped.add(self.key(*self.question))
                return self.ask()
            row = {"prompt": prompt} | (dict(chosen=second, rejected=first) if what == "2" else dict(chosen=first, rejected=second))
            self.rows.append(row | ({"share": 0.5} if what == "=" else {}))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1], ensure_ascii=False) + "\n")
            self.ask()

    def agreement(self):
        """(how many pairs were asked twice, how many of them were answered alike)"""
        twice = [winners for winners in self.asked().values() if len(winners) > 1]
        return len(twice), sum(winners[0] == winners[1] for winners in twice)

    def status(self):
        twice, alike = self.agreement()
        ties = sum(row.get("share") == 0.5 for row in self.rows)
        return f"{len(self.rows)} answers in {self.path}, {ties} of them ties" + (
            f"; {twice} pairs asked twice, {alike} answered alike ({alike / twice:.0%})" if twice else "")

# -----------------------------------------------------------------------------
# terminal and notebook

def label(sources: tyro.conf.Positional[tuple[str, ...]] = ("runs/sft/ckpt.pt",), out: str = "mine.jsonl", n: int = 150,
          data: str = "", seed: int = 0):
    """Asks which of two texts is funnier. sources: one or two checkpoints, or one or two files of texts. out: JSONL of the answers.
    n: how many answers to ask for; 150 take twenty minutes. data: a file of prompts for the checkpoints."""
    if len(sources) > 2:
        raise InputError("name one or two checkpoints, or one or two files")
    labeling = Labeling(pairs(*sources, seed=seed, data=data), out, n)
    print(f"Which is funnier?   1   2   = neither   s skip   u undo   q quit\n{labeling.status()}")
    what = ""
    while labeling.question is not None and what != "q":
        done = len(labeling.rows)
        print(f"\n[{'#' * (20 * done // n):20}] {done}/{n}  {labeling.question[0].strip()}")
        for number, text in enumerate(labeling.question[1:], 1):
            print(f"  {number}  {text.strip()}")
        try:
            what = input("> ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            what = "q"
        labeling.answer(what)
    print(f"\n{labeling.status()}\ntrain on them: python reward_model.py --data {out}")


def widget(a="runs/sft/ckpt.pt", b="", out="mine.jsonl", n=150, **options):
    """The same in a notebook's cell: buttons in place of keys."""
    import ipywidgets

    labeling, text, progress = Labeling(pairs(a, b, **options), out, n), ipywidgets.HTML(), ipywidgets.IntProgress(max=n)

    def show(what=""):
        labeling.answer(what)
        prompt, first, second = map(html.escape, labeling.question or ("That is all.", "", ""))
        text.value = f"<b>{prompt}</b><p>1 &nbsp; {first}<p>2 &nbsp; {second}<p><small>{html.escape(labeling.status())}</small>"
        progress.value = len(labeling.rows)

    buttons = []
    for what, name in (("1", "1 is funnier"), ("2", "2 is funnier"), ("=", "neither"), ("s", "skip"), ("u", "undo")):
        buttons.append(ipywidgets.Button(description=name))
        buttons[-1].on_click(lambda _, what=what: show(what))
    show()
    return ipywidgets.VBox([progress, text, ipywidgets.HBox(buttons)])
