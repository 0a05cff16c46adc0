"""
A reward model of people's taste, from scratch: split -> pretrain -> train -> report, on SemEval-2017 task 7 and ExPUNations.

    1. part the texts into training and held-out groups: near-duplicates stay together (corpora.split)
    2. sft.py: a language model reads the training texts, mixed with the pun world's
    3. reward_model.py: comparisons of the training texts only (realpuns.preferences): which of two the same five raters found
       funnier, with the share of raters as a soft label; puns over non-puns of their length; puns over their twins
    4. all of it on held-out texts, for three seeds, each with a split of its own; beside it what is to be beaten: linear models
       over word and character n-grams, and "the longer one", in words or letters; and both together

    python data.py fetch semeval; python data.py fetch expun
    python people.py                                             runs/people/report.md, report.json, calibration.png

Both data sets are for non-commercial use, and so is what was trained on them.
"""

import collections
import dataclasses
import json
import math
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

import metrics
import reward_model
import sft
from common import InputError, bar, replacing, run, setup
from corpora import load, split
from data import tokenizer
from model import load_model
from puns import world
from realpuns import PROMPT, depun, detection_pairs, preferences, rated_pairs
from reward_model import score_texts, spearman


@dataclass(slots=True)
class Config:
    semeval: str = "downloads/semeval"
    expun: str = "downloads/expun"
    out_dir: str = "runs/people"
    seeds: tuple[int, ...] = (1, 2, 3)      # each has a split of its own
    held_out: float = 0.2                   # share of the texts
    members: int = 1                        # reward models a seed, whose scores are averaged
    world_texts: int = 10_000               # texts of the pun world to pretrain on, beside the real ones
    copies: int = 4                         # how often the real ones are read for each time that the pun world's are
    sft_steps: int = 400
    comparisons: int = 20_000
    steps: int = 250                        # of the reward model; more of them learn the training texts by heart
    batch_size: int = 64                    # texts, and comparisons
    n_embd: int = 128
    dropout: float = 0.1
    lr: float = 5e-3
    reward_lr: float = 4e-4
    likelihood: float = 0.0                 # see reward_model.py
    device: str = ""


def write_jsonl(path, records):
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def train(stage, **options):
    """Trains a stage, unless it is done already with the same options. Returns its checkpoint."""
    config = stage.Config(**options)
    folder = Path(config.out_dir)
    done = folder / "config.json"
    if not (folder / "ckpt.pt").exists() or json.loads(done.read_text()) != json.loads(json.dumps(dataclasses.asdict(config))):
        stage.train(config)
    return str(folder / "ckpt.pt")


def scores_of(config, folder, seed, puns, texts):
    """Pretrains and trains on the puns; -> the scores of the texts (N,), whose differences are log odds, the language model's path,
    and the comparisons."""
    rng = random.Random(seed)
    read = [{"prompt": PROMPT, "completion": " " + pun.text} for pun in puns]
    corpus = read * config.copies + world().corpus(config.world_texts, seed) * bool(config.world_texts)
    rng.shuffle(corpus)
    total = 0.0
    texts_file = write_jsonl(folder / "texts.jsonl", corpus)
    for member in range(config.members):
        own = dict(seed=10 * seed + member, device=config.device, eval_interval=10**6, batch_size=config.batch_size)
        lm = train(sft, data=texts_file, out_dir=str(folder / f"sft{member}"), n_embd=config.n_embd, n_head=config.n_embd // 32,
                   n_inner=3 * config.n_embd, block_size=160, dropout=config.dropout, lr=config.lr, max_steps=config.sft_steps, grad_accum=1, **own)
        pairs = preferences(puns, config.comparisons, own["seed"])
        pairs_file = write_jsonl(folder / f"pairs{member}.jsonl", pairs)
        scorer = load_model(train(reward_model, data=pairs_file, init=lm, out_dir=str(folder / f"reward_model{member}"),
                                  max_steps=config.steps, lr=config.reward_lr, likelihood=config.likelihood, **own))
        device, autocast = setup(reward_model.Config(seed, config.device))
        answers = [" " + text for text in texts]
        scores = score_texts(scorer.to(device), tokenizer(scorer.tokenizer), [PROMPT] * len(texts), answers, autocast)
        total = total + (scores - scorer.shift.cpu()) / scorer.gain.cpu()       # as before normalize(): differences are log odds
    return total / config.members, lm, pairs

# -----------------------------------------------------------------------------
# what is to be beaten

def grams(text, size=2**18):
    """The hashed 1- and 2-grams of words and 2- to 5-grams of characters of a text, as a set."""
    words, chars = text.lower().split(), f" {text} "
    found = [" ".join(words[i:i + n]) + "|" for n in (1, 2) for i in range(len(words) - n + 1)]
    found += [chars[i:i + n] for n in range(2, 6) for i in range(len(chars) - n + 1)]
    return {zlib.crc32(gram.encode()) % size for gram in found}


def words(text):
    return set(re.findall(r"[a-z']+", text.lower()))


def rarity(puns):
    """A function: how rare a text's words are, - sum of log(1 + in how many of the puns a word stands). Those that a text comes from,
    be it a pun or its twin, are not counted: else all texts that a model learns from would seem to have commoner words than new ones."""
    count = collections.Counter(word for pun in puns for word in words(pun.text))
    own = {text: words(pun.text) for pun in puns for text in (pun.text, depun(pun))}
    return lambda text: -sum(math.log(1 + count[word] - (word in own.get(text, ()))) for word in words(text))


def linear(texts, others, loss_of, l2, extra=(), size=2**18):
    """Scores of other texts by a linear model over tf-idf of n-grams, of those that two texts have at least. loss_of(scores (N,)) is
    its loss on the texts, summed, beside l2 / 2 |weights|^2: logistic or ridge regression, or Bradley-Terry. extra: functions of a text
    whose values count beside the n-grams, with weights that are free."""
    sets = [sorted(grams(text, size)) for text in texts]
    count = torch.bincount(torch.tensor([gram for found in sets for gram in found]), minlength=size)
    idf = torch.where(count > 1, torch.log((len(sets) + 1) / (count + 1)) + 1, 0.0)

    def matrix(sets):        # (N, size), rows of length 1
        rows, columns = torch.tensor([(i, gram) for i, found in enumerate(sets) for gram in found]).T
        norm = torch.zeros(len(sets)).index_add_(0, rows, idf[columns] ** 2).sqrt().clamp(min=1e-9)
        values = idf[columns] / norm[rows]
        return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (len(sets), size), check_invariants=True).coalesce()

    def numbers(texts):      # (N, how many extra)
        return torch.tensor([[value(text) for value in extra] for text in texts])

    x, more, weights = matrix(sets), numbers(texts), torch.zeros(size + 1 + len(extra), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = loss_of((x @ weights[:size, None])[:, 0] + weights[size] + more @ weights[size + 1:]) + l2 / 2 * weights[:size].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    weights = weights.detach()
    return (matrix([sorted(grams(text, size)) for text in others]) @ weights[:size, None])[:, 0] + numbers(others) @ weights[size + 1:]


def yardsticks(known, others, z, pairs):
    """{name: scores of the other texts (N,)} by what is to be beaten: a specialist for each task, and one linear model that learned
    the same comparisons as the reward model."""
    texts, full = [pun.text for pun in known], [pun for pun in known if pun.part == "full"]
    is_pun, ratings = torch.tensor([float(pun.is_pun) for pun in known]), torch.tensor([z[pun.id] for pun in full])
    both = list(dict.fromkeys(pair[side] for pair in pairs for side in ("chosen", "rejected")))
    row = {text: i for i, text in enumerate(both)}
    chosen, rejected = (torch.tensor([row[pair[side]] for pair in pairs]) for side in ("chosen", "rejected"))
    share = torch.tensor([pair["share"] for pair in pairs])
    twins = [text for pun in known if depun(pun) not in ("", pun.text) for text in (pun.text, depun(pun))]     # pun, twin, pun, twin ...
    return {
        "linear, pun or not": linear(texts, others, lambda s: F.binary_cross_entropy_with_logits(s, is_pun, reduction="sum"), 0.3),
        "linear, ratings": linear([pun.text for pun in full], others, lambda s: F.mse_loss(s, ratings, reduction="sum") / 2, 1.0),
        "linear, comparisons": linear([text[1:] for text in both], others, lambda s: len(both) * reward_model.ranking_loss(
            torch.stack([s[chosen], s[rejected]], 1), share=share), 0.3),
        "linear, twins": linear(twins, others, lambda s: len(twins) / 2 * reward_model.ranking_loss(s.view(-1, 2)), 0.3,
                                [lambda text: float(len(text)), rarity(known)]),
        "the longer one": torch.tensor([float(len(text.split())) for text in others]),
        "more letters": torch.tensor([float(len(text)) for text in others])}

# -----------------------------------------------------------------------------
# what is measured

def standardised(puns):
    """{id: mean rating, each rater standardised}: raters use the scale in very different ways."""
    by_rater = {}
    for pun in puns:
        for rater, rating in zip(pun.raters, pun.ratings, strict=True):
            by_rater.setdefault(rater, []).append(rating)
    scale = {rater: torch.std_mean(torch.tensor(ratings, dtype=torch.float), correction=0) for rater, ratings in by_rater.items()}
    return {pun.id: sum(float((rating - scale[rater][1]) / scale[rater][0].clamp(min=1e-6))
                        for rater, rating in zip(pun.raters, pun.ratings, strict=True)) / len(pun.ratings) for pun in puns}


def together(specialist, ours):
    """An ensemble of the scores (N,) of a linear specialist and of the reward model, each standardized; the specialist counts thrice."""
    return sum(weight * (scores - scores.mean()) / scores.std() for weight, scores in ((3, specialist), (1, ours)))


def measures(puns, score, z):
    """All numbers of the report, from held-out puns, {text: score} and {id: standardised rating}."""
    def n_words(pun):
        return len(pun.text.split())

    def partial(a, b, c):        # rank correlation of a and b with c held fixed
        ab, ac, bc = spearman(a, b), spearman(a, c), spearman(b, c)
        return (ab - ac * bc) / ((1 - ac * ac) * (1 - bc * bc)) ** 0.5

    def right(pairs):
        pairs = list(pairs)
        return sum((score[a] > score[b]) + (score[a] == score[b]) / 2 for a, b in pairs) / max(len(pairs), 1)

    row = {"AUC, pun or not": metrics.auc(*([score[pun.text] for pun in puns if pun.is_pun == wanted] for wanted in (True, False))),
           "AUC, as many words": right((a.text, b.text) for a, b in detection_pairs(puns, 0)),
           "pun over twin": right((pun.text, depun(pun)) for pun in puns if depun(pun) not in ("", pun.text))}
    rated = [pun for pun in puns if pun.part == "full"]
    for margin in (0.4, 1.0):
        pairs = list(rated_pairs(rated, margin))
        for name, keep in (("", lambda a, b: True), (", two puns", lambda a, b: a.is_pun and b.is_pun),
                           (", two puns within a word", lambda a, b: a.is_pun and b.is_pun and abs(n_words(a) - n_words(b)) < 2)):
            row[f"raters, margin {margin}{name}"] = right((a.text, b.text) for a, b, *_ in pairs if keep(a, b))
    columns = [torch.tensor([float(value(pun)) for pun in rated]) for value in (
        lambda pun: score[pun.text], lambda pun: pun.funniness, lambda pun: z[pun.id], n_words)]
    row["Spearman, mean rating"], row["Spearman, standardised raters"] = spearman(*columns[:2]), spearman(columns[0], columns[2])
    by_length = bool((columns[0] == columns[3]).all())       # the longer one's score
    row["Spearman, mean rating, length fixed"] = 0.0 if by_length else partial(columns[0], columns[1], columns[3])
    return row


def draw_calibration(points, path):
    """How often a pair's order is right against how sure the model was, ten bins; points: [(probability of its verdict, right)]."""
    points = sorted(points, key=lambda point: point[0])
    bins = [points[len(points) * i // 10:len(points) * (i + 1) // 10] for i in range(10)]
    x, y = ([sum(point[k] for point in part) / len(part) for part in bins if part] for k in (0, 1))
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0.5, 1], [0.5, 1], "--", color="gray", linewidth=1, label="calibrated")
    axis.plot(x, y, marker="o", label="rated pairs, held out")
    axis.set(xlabel="how sure the reward model is", ylabel="how often it is right", title="pairs of the same raters, margin 0.4 on")
    axis.legend()
    axis.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return sum(abs(a - b) for a, b in zip(x, y, strict=True)) / len(x)


def main(config):
    folder = Path(config.out_dir)
    rated = {pun.id: pun for pun in load(config.expun, "expun", semeval=config.semeval).records}
    puns = [rated.get(pun.id, pun) for pun in load(config.semeval, "semeval").records]
    if not any(depun(pun) for pun in puns):
        raise InputError(f"--semeval {config.semeval}: no heterographic pun whose other word is known (subtask1-heterographic-test.xml and "
                         "its .gold files of all three subtasks); a part of the report is about these")
    z, tables, points, pun_metrics = standardised([pun for pun in puns if pun.part == "full"]), {}, [], []
    for seed in bar(config.seeds, "people", len(config.seeds)):
        known, test = split(puns, config.held_out, seed)
        texts = list(dict.fromkeys(text for pun in test for text in (pun.text, depun(pun)) if text))
        ours, lm, pairs = scores_of(config, folder / str(seed), seed, known, texts)
        found = {"reward model": ours} | yardsticks(known, texts, z, pairs)
        found |= {f"both, {task}": together(found[f"linear, {task}"], ours) for task in ("pun or not", "ratings", "twins")}
        for name, scores in found.items():
            tables.setdefault(name, []).append(measures(test, dict(zip(texts, scores.tolist(), strict=True)), z))
        score = dict(zip(texts, ours.tolist(), strict=True))
        gaps = [score[a.text] - score[b.text] for a, b, *_ in rated_pairs([pun for pun in test if pun.part == "full"], 0.4)]
        points += [(float(torch.tensor(abs(gap)).sigmoid()), float(gap > 0)) for gap in gaps]
        pun_metrics.append(metrics.evaluate(puns, known, test, lm, config.device))
    ece = draw_calibration(points, folder / "calibration.png")
    write_report(config, tables, ece, pun_metrics, folder)


def write_report(config, tables, ece, pun_metrics, folder):
    def cell(rows, name):
        values = torch.tensor([float(row[name]) for row in rows])
        return f"{values.mean():.3f} ± {values.std(correction=1 if len(values) > 1 else 0):.3f}"
    names = list(next(iter(tables.values()))[0])
    lines = [f"Held-out groups, mean ± standard deviation over {len(config.seeds)} seeds, each with a split of its own "
             f"({config.held_out:.0%} of the texts). `python people.py`, {dataclasses.asdict(config)}", "",
             "| | " + " | ".join(tables) + " |", "|---" * (len(tables) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(rows, name) for rows in tables.values()) + " |" for name in names]
    lines += ["", f"Calibration on rated pairs, ten bins of equal size: expected error {ece:.3f} (calibration.png).", "",
              "Pun metrics without a judge, AUC of puns against non-puns (heterographic):", ""]
    lines += [f"- {name}: {cell(pun_metrics, name)}" for name in pun_metrics[0]]
    with replacing(folder / "report.json") as path:
        report = {"config": dataclasses.asdict(config), "tables": tables, "ece": ece, "metrics": pun_metrics}
        path.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(folder / "report.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[2:]) + f"\n\n{folder}/report.md")


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Config)))
