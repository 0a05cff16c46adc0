"""
Stage 4, evaluation: all policies side by side, on the same prompts, at the same temperature.

Rows: SFT; best of n by the reward model (the baseline that training must be judged by: it needs no training at all); every policy
that has a checkpoint in runs/. Columns, with 95 % intervals over completions:

    pun, on topic, fluent, novel    the judge's verdict, in % (gold: no training has seen it); novel: a pun held out of all training
    kl          nats a response from the SFT policy, mean of log pi - log pi_sft on samples of pi
    least kl    the least that any policy needs for this pun rate: KL of two coins, p ln(p/p0) + (1 - p) ln((1 - p)/(1 - p0))
    score       of the reward model (proxy)
    distinct    different sentences among all, in %; self-BLEU-4: how much they share (lower is more diverse)

    python evaluate.py                        table, runs/report.md, runs/report.json, runs/report.png
    python evaluate.py --temperature 0.7
    python evaluate.py judge --url http://localhost:8000/v1 --model NAME      win rates by a language model's judgement (judge.py)
"""

import collections
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from common import Options, read_jsonl, replacing, run, sampler, setup
from data import measure, read_records, tokenizer
from judge import judge
from model import load_model
from puns import world


@dataclass(slots=True)
class Config(Options):
    out_dir: str = "runs"       # where the stages lie, and where the report goes
    reference: str = "runs/sft/ckpt.pt"
    reward: str = "runs/reward_model/ckpt.pt"
    data: str = ""              # JSONL of prompts; '' is the pun world
    samples: int = 2000         # completions a policy
    best_of: tuple[int, ...] = (2, 4, 8, 16)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

# -----------------------------------------------------------------------------
# arithmetic

def least_kl(p, p0):
    """The least KL(pi || pi_0), in nats, of any policy whose samples are puns with probability p, where pi_0's are with p0."""
    def term(a, b):
        return a * math.log(a / b) if a else 0.0
    if not 0 < p0 < 1:
        return math.nan
    return term(p, p0) + term(1 - p, 1 - p0)


def best_of_n_kl(n):
    """KL of best-of-n to the policy that it picks from, at most: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def interval(values):
    """Half of the 95 % interval of the mean: 1.96 standard errors."""
    mean = sum(values) / len(values)
    return 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1) / len(values))


def ngrams(words, n):
    return collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))


def self_bleu(texts, n=4, size=300, seed=0):
    """BLEU-n of each text against all others, mean: 1 if they all say the same (arXiv 1802.01886). On `size` of the texts.

    BLEU is the geometric mean of the clipped precisions of 1..n-grams, smoothed by adding 0.1 to a count of zero; no brevity
    penalty, since among so many references one has about the right length."""
    texts = [text.split() for text in random.Random(seed).sample(texts, min(size, len(texts)))]
    logs = [0.0] * len(texts)
    for order in range(1, n + 1):
        counts = [ngrams(words, order) for words in texts]
        best = collections.defaultdict(lambda: [0, 0, -1])      # n-gram -> its largest count, the second largest, and who has the largest
        for i, count in enumerate(counts):
            for gram, k in count.items():
                top = best[gram]
                if k > top[0]:
                    best[gram] = [k, top[0], i]
                elif k > top[1]:
                    top[1] = k
        for i, count in enumerate(counts):
            hits = sum(min(k, best[gram][1] if best[gram][2] == i else best[gram][0]) for gram, k in count.items())
            logs[i] += math.log(max(hits, 0.1) / max(sum(count.values()), 1)) / n
    return sum(math.exp(x) for x in logs) / len(logs)

# -----------------------------------------------------------------------------
# the rows

def summarize(name, rows, p0):
    """One row of the table from the completions of a policy; p0 is the pun rate of the reference."""
    def mean(column):
        return sum(row.get(column, math.nan) for row in rows) / len(rows)
    texts = [row["text"] for row in rows]
    row = {column: mean(column) for column in ("pun", "on_topic", "fluent", "novel", "kl", "score", "length")}
    row |= {f"{column}_ci": interval([r.get(column, math.nan) for r in rows]) for column in ("pun", "kl", "score")}
    row |= {"least_kl": least_kl(row["pun"], p0), "distinct": len(set(texts)) / len(texts), "self_bleu": self_bleu(texts)}
    return {"policy": name} | {column: None if math.isnan(x) else x for column, x in row.items()}          # NaN is not JSON


def best_of(groups, n, kl):
    """Of each prompt's completions the best of the first n by score; kl is known only as a bound."""
    return [max(group[:n], key=lambda row: row["score"]) | {"kl": kl} for group in groups]


def training_curve(path, needed=("pun", "kl")):
    """The points of a run's metrics.jsonl that have pun rate and kl; those of PPO have a score, too."""
    return [row for row in read_jsonl(path) if all(name in row for name in needed)] if path.exists() else []


def evaluate(config):
    """Samples every policy. Returns {"rows": table rows, "samples": {policy: ten completions}, "curves": {policy: points}}."""
    device, autocast = setup(config)
    reference, scorer = load_model(config.reference, device), load_model(config.reward, device)
    tok = tokenizer(reference.tokenizer)
    prompts = ([record["prompt"] for record in read_records(config.data, "prompt")] if config.data
               else [world().prompt(thing) for thing in world().things])
    random.Random(0).shuffle(prompts)       # so that the first few are of many topics
    prompts = (prompts * math.ceil(config.samples / len(prompts)))[:config.samples]
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    folders = [path.parent for path in sorted(Path(config.out_dir).glob("*/ckpt.pt"))
               if path.parent.name not in ("sft", "reward_model", "discriminator")]

    rows, samples, curves = [], {}, {}

    def draw(model, prompts):
        return measure(model, reference, tok, prompts, sampler(device, config.seed), autocast, scorer, **sampling)

    def add(name, completions):
        rows.append(summarize(name, completions, p0))
        samples[name] = completions[:10]
        print(format_row(rows[-1]), flush=True)

    # -- SFT and best of n from one set of draws, `most` for each of some prompts: best of n picks from all groups of n
    most = max(config.best_of, default=1)
    few = prompts[:max(1, config.samples * 4 // most)]
    drawn = draw(reference, [prompt for prompt in few for _ in range(most)])
    p0 = sum(row.get("pun", math.nan) for row in drawn) / len(drawn)
    print(HEADER)
    add("sft", [drawn[i] for i in range(0, len(drawn), max(1, len(drawn) // config.samples))])
    for n in config.best_of:
        groups = [drawn[i:i + n] for i in range(0, len(drawn), n)]
        add(f"best of {n}", best_of(groups, n, best_of_n_kl(n)))
    for folder in folders:
        add(folder.name, draw(load_model(folder / "ckpt.pt", device), prompts))
        curves[folder.name] = training_curve(folder / "metrics.jsonl")
    return {"p0": None if math.isnan(p0) else p0, "rows": rows, "samples": samples, "curves": curves}

# -----------------------------------------------------------------------------
# the report

def number(row, column, form, scale=1, ci=False):
    """A cell of the table; - where there is no such number, as without a judge."""
    if row[column] is None:
        return "-"
    return f"{scale * row[column]:{form}}" + (f" ± {scale * row[column + '_ci']:{form.lstrip('+')}}" if ci else "")


COLUMNS = [("policy", 13, lambda r: r["policy"]), ("pun %", 12, lambda r: number(r, "pun", ".1f", 100, ci=True)),
           ("on topic %", 10, lambda r: number(r, "on_topic", ".1f", 100)), ("fluent %", 8, lambda r: number(r, "fluent", ".1f", 100)),
           ("novel %", 7, lambda r: number(r, "novel", ".1f", 100)), ("kl", 11, lambda r: number(r, "kl", ".2f", ci=True)),
           ("least kl", 8, lambda r: number(r, "least_kl", ".2f")), ("score", 12, lambda r: number(r, "score", "+.2f", ci=True)),
           ("distinct %", 10, lambda r: number(r, "distinct", ".1f", 100)), ("self-BLEU", 9, lambda r: number(r, "self_bleu", ".3f"))]
HEADER = "  ".join(f"{name:>{width}}" for name, width, _ in COLUMNS)


def format_row(row):
    return "  ".join(f"{cell(row):>{width}}" for _, width, cell in COLUMNS)


def markdown(report, command):
    lines = [f"Made by `{command}`; intervals are 95 % over completions.", "",
             "| " + " | ".join(name for name, _, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row) for _, _, cell in COLUMNS) + " |" for row in report["rows"]]
    lines += ["", "For best of n, kl is the bound ln n - (n - 1)/n. The first completions of each policy, not picked; * is a pun:", ""]
    for name, completions in report["samples"].items():
        lines += [f"**{name}**", ""] + [f"- {'*' if row.get('pun') else ' '} {row['prompt']}{row['text']}" for row in completions] + [""]
    return "\n".join(lines) + "\n"


def draw_report(report, path):
    """Gold (pun rate) and proxy (reward-model score) against KL: every policy, and every rollout along its training."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")      # not pyplot's: that would change the backend of a notebook
    axes = figure.subplots(1, 2)
    largest = max([row["kl"] for row in report["rows"]] + [row["kl"] for curve in report["curves"].values() for row in curve] + [1.0])
    if report["p0"]:
        rates = [p / 200 for p in range(round(200 * report["p0"]), 200)]
        axes[0].plot([least_kl(p, report["p0"]) for p in rates], [100 * p for p in rates],
                     color="black", linestyle="--", linewidth=1, label="least KL for a pun rate")
    plain = [row for row in report["rows"] if not row["policy"].startswith("best of")]
    bests = [row for row in report["rows"] if row["policy"].startswith("best of") or row["policy"] == "sft"]
    for axis, column, scale in ((axes[0], "pun", 100), (axes[1], "score", 1)):
        axis.plot([row["kl"] for row in bests], [scale * (row[column] or 0) for row in bests], marker="s", markersize=4, color="gray", label="best of n")
        for i, row in enumerate(plain):
            curve = report["curves"].get(row["policy"], [])
            color = "black" if row["policy"] == "sft" else f"C{i - 1}"
            curve = [point for point in curve if column in point]
            axis.plot([point["kl"] for point in curve], [scale * point[column] for point in curve], ".", markersize=3, alpha=0.4, color=color)
            axis.plot(row["kl"], scale * (row[column] or 0), marker="o", markersize=8, color=color, label=row["policy"], linestyle="")
        axis.set_xlabel("KL to SFT, nats a response")
        axis.set_xlim(-0.05 * largest, 1.05 * largest)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("puns, % (judge: gold)")
    axes[1].set_ylabel("reward-model score (proxy)")
    axes[0].legend(fontsize=8, loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(config):
    report = evaluate(config)
    folder = Path(config.out_dir)
    for name, completions in report["samples"].items():
        print(f"\n{name}")
        for row in completions:
            print(f"  {'pun' if row.get('pun') else 'ok' if row.get('on_topic') else '-':>3} | {row['prompt']}{row['text']}")
    with replacing(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(folder / "report.md") as path:
        path.write_text(markdown(report, "python evaluate.py"))
    draw_report(report, folder / "report.png")
    print(f"\n{folder}/report.md  {folder}/report.json  {folder}/report.png")


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Config)), judge=judge)
