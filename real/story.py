"""
What notebook 8 tells of a finished run on real puns: numbers, and what the policies wrote.

    python -m real.story            runs/real -> runs/real/story.json

Of people's texts it holds numbers alone, and of the policies' texts those that are no near-copies
of a training text. So the file may be passed on, as the data may not: notebooks/real_run.json is
such a file. If people have compared two policies, their answers (blind*.jsonl) are in it, too:

    python -m real.label --blind runs/real/sft runs/real/ppo --out runs/real/blind.jsonl \\
        --data runs/real/data/unseen_prompts.jsonl
"""

import collections
import itertools
import json
import re
from pathlib import Path

import tyro

from common import command_line, read_jsonl, setup
from data import tokenizer_of
from evaluate import self_bleu, write_text
from model import load_reward_model
from real.label import key_of
from real.people import COPIED, Config, load_puns, overlap_with, parts_of, uses_word
from real.semeval import PROMPT, asked_word
from reward_model import score_texts

OPTIONS = ("max_steps", "batch_size", "lr", "kl_coef")          # of a stage, worth telling

# What people have written again and again, each time with other words: "Old bricks never die, they
# just drive people up the wall", and Tom Swifties, "The rope has come undone, said Tom loosely".
TEMPLATES = {"Old X never die": r"\bnever die\b", "said Tom": r"\btom\b"}


def has(template, text):
    return re.search(TEMPLATES[template], text.lower()) is not None


def traits(row):
    """{trait: number} of a text and its prompt: the number of words, and 1 or 0 for the others."""
    word = re.escape(asked_word(row["prompt"]))
    at_end = re.search(rf"\b{word}\W*$", row["text"].lower()) is not None
    found = {"words": len(row["text"].split()),
             "uses the word": int(uses_word(row["prompt"], row["text"])),
             "ends with the word": int(at_end)}
    return found | {template: int(has(template, row["text"])) for template in TEMPLATES}


def mean(values):
    """The mean; 0 of nothing."""
    values = list(values)
    return sum(values) / max(len(values), 1)


def mean_traits(rows):
    found = [traits(row) for row in rows]
    return {name: mean(row[name] for row in found) for name in found[0]}


def tell_templates(puns):
    """Of people's texts: which share of the puns, and of the other texts, has a template, and how
    funny raters found the puns that have it and those that have none, from 0 to 5."""
    rated = [pun for pun in puns if pun.is_pun and pun.ratings and pun.part == "full"]
    plain = mean(pun.funniness for pun in rated
                 if not any(has(template, pun.text) for template in TEMPLATES))
    return {template: {
        "puns": mean(has(template, pun.text) for pun in puns if pun.is_pun),
        "others": mean(has(template, pun.text) for pun in puns if not pun.is_pun),
        "rating": mean(pun.funniness for pun in rated if has(template, pun.text)),
        "rating of other puns": plain} for template in TEMPLATES}


def tell_run(path, curve, overlap):
    """One row for each step of a training run whose samples were kept: [{"step", "kl", "proxy",
    "gold", "self-BLEU", "texts": the first three that are no near-copies, and the mean of each
    trait}]. curve: (kl, proxy, gold) at these steps."""
    of_step = collections.defaultdict(list)
    for row in read_jsonl(path):
        if "score" in row:
            of_step[row["step"]].append(row)
    told = []
    for (step, rows), (kl, proxy, gold) in zip(of_step.items(), curve, strict=True):
        own = (row["text"].strip() for row in rows if overlap(row["text"]) < COPIED)
        told.append({"step": step, "kl": kl, "proxy": proxy, "gold": gold,
                     "self-BLEU": self_bleu([row["text"] for row in rows]),
                     "texts": list(itertools.islice(own, 3))} | mean_traits(rows))
    return told


def tell_samples(rows, overlap):
    """{policy: its samples}, of the rows of report_samples.jsonl. The text of a near-copy is left
    out."""
    told = collections.defaultdict(list)
    for row in rows:
        copied = overlap(row["text"])
        told[row["policy"]].append({
            "prompt": row["prompt"], "text": row["text"].strip() if copied < COPIED else "",
            "kl": row["kl"], "proxy": row["score"], "gold": row["gold"], "overlap": copied})
    return told


def tell_blind(path, gold, overlap, autocast):
    """The pairs that somebody compared without knowing which policy wrote which, with the judge's
    scores. "win" is 1 where the second policy won, and 0.5 for a tie. Of a pair that was asked
    twice it is the mean of both answers, as in label.win_rate().

    path: of the answers; the key is beside it."""
    key = read_jsonl(path.with_suffix(".key.jsonl"))
    _, a, b = key[0]
    writers = {key_of(*row.values()): row for row in key}
    wins = collections.defaultdict(list)                    # {pair: of each of its answers}
    for answer in read_jsonl(path):
        pair = key_of(answer["prompt"], answer["chosen"], answer["rejected"])
        is_tie = answer.get("share") == 0.5
        wins[pair].append(0.5 if is_tie else float(answer["chosen"] == writers[pair][b]))
    told = []
    for pair, of_pair in wins.items():
        texts = [writers[pair][policy].strip() for policy in (a, b)]
        if max(map(overlap, texts)) < COPIED:
            told.append({"prompt": pair[0], "texts": texts, "win": sum(of_pair) / len(of_pair),
                         "policies": [Path(a).name, Path(b).name]})
    scores = score_texts(gold, tokenizer_of(gold.model),
                         [row["prompt"] for row in told for _ in row["texts"]],
                         [f" {text}" for row in told for text in row["texts"]], autocast)
    for row, pair in zip(told, scores.view(-1, 2).tolist(), strict=True):
        row["gold"] = pair
    return told


def write_story(config):
    """Writes out_dir/story.json."""
    device, autocast = setup(config)
    folder = Path(config.out_dir)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    puns = load_puns(config)
    parts = parts_of(puns, config.split_seed)
    overlap = overlap_with([pun.text for pun in parts["train"]])
    judges = {name: load_reward_model(folder / stage / "ckpt.pt", device)
              for name, stage in (("proxy", "reward_model"), ("gold", "gold"))}
    texts = [f" {pun.text}" for pun in parts["test"]]
    held_out = {name: score_texts(judge, tokenizer_of(judge.model), [PROMPT] * len(texts), texts,
                                  autocast).tolist() for name, judge in judges.items()}
    written = [{"prompt": row["prompt"], "text": row["completion"]}
               for row in read_jsonl(folder / "data" / "train.jsonl")]
    stages = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
              for path in sorted(folder.glob("*/config.json"))}
    samples = [row for row in read_jsonl(folder / "report_samples.jsonl")
               if row["words"] == "unseen"]
    story = {
        **report,
        "options": {stage: {name: options[name] for name in OPTIONS if name in options}
                    for stage, options in stages.items()},
        "held_out": {"is_pun": [int(pun.is_pun) for pun in parts["test"]]} | held_out,
        "people": mean_traits(written),
        "lengths": [traits(row)["words"] for row in written],
        "templates": tell_templates(puns),
        "runs": {name: tell_run(folder / name / "samples.jsonl", curve, overlap)
                 for name, curve in report["curves"].items()},
        "samples": tell_samples(samples, overlap),
        "blind": {path.stem: tell_blind(path, judges["gold"], overlap, autocast)
                  for path in sorted(folder.glob("blind*.jsonl")) if path.suffixes == [".jsonl"]}}
    # Four digits of each number are enough, and make half the size.
    story = json.loads(json.dumps(story), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    write_text(folder / "story.json", json.dumps(story) + "\n")
    print(folder / "story.json")


if __name__ == "__main__":
    command_line(lambda: write_story(tyro.cli(Config)))
