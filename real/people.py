"""
A reward model of people's taste, from scratch, on puns that people wrote and rated (SemEval-2017
task 7 and ExPUNations):

    1. split the texts into training and test; near-duplicates stay together (duplicates.py)
    2. sft.py: a language model reads the training texts, mixed with those of the pun world
    3. reward_model.py learns from comparisons of training texts (semeval.preferences): which of two
       the same five raters found funnier, with their share as a soft label; puns over non-puns of
       their length; puns over their minimal pairs (the same text without the pun)
    4. the report, on the test texts: three seeds, each with a split of its own. Beside it the
       baselines: linear models over word and character n-grams, and "the longer one"; and
       ensembles of both

    python -m real.fetch semeval
    python -m real.fetch expun
    python -m real.people               runs/people/report.md and report.json

Both data sets are for non-commercial use only, and so is what was trained on them.
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

import reward_model
import sft
from common import (
    InputError,
    Options,
    atomic_write,
    command_line,
    progress_bar,
    setup,
    write_jsonl,
)
from data import tokenizer_of
from model import load_reward_model
from puns import world
from real import metrics
from real.corpora import load
from real.duplicates import split
from real.semeval import PROMPT, depun, detection_pairs, preferences, rated_pairs
from reward_model import pair_metrics, ranking_loss, score_texts, spearman


@dataclass(slots=True)
class Config:
    semeval: str = "downloads/semeval"
    expun: str = "downloads/expun"
    out_dir: str = "runs/people"
    seeds: tuple[int, ...] = (1, 2, 3)      # each has a split of its own
    held_out: float = 0.2                   # fraction of the texts
    world_texts: int = 10_000               # texts of the pun world to pretrain on
    copies: int = 4                         # of the real texts beside them
    sft_steps: int = 400
    comparisons: int = 20_000
    steps: int = 250                        # of the reward model; more steps overfit
    batch_size: int = 64                    # texts, and comparisons
    n_embd: int = 128
    dropout: float = 0.1
    lr: float = 5e-3
    reward_lr: float = 4e-4
    likelihood: float = 0.0                 # see reward_model.py
    device: str = ""

# -----------------------------------------------------------------------------
# the stages

def train_stage(stage, **options):
    """Trains a stage, unless it is done with the same options. Returns its checkpoint's path."""
    config = stage.Config(**options)
    folder = Path(config.out_dir)
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    done = None
    if (folder / "ckpt.pt").exists():
        done = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if done != wanted:
        stage.train(config)
    return str(folder / "ckpt.pt")


def sft_records(puns):
    return [{"prompt": PROMPT, "completion": " " + pun.text} for pun in puns]


def train_reward_model(config, folder, seed, train, test, texts):
    """Pretrains and trains on the training puns; the test puns are only validated on.

    Returns the scores of the texts (N,), whose differences are log odds, and the path of the
    language model."""
    corpus = sft_records(train) * config.copies
    if config.world_texts:
        corpus += world().corpus(config.world_texts, seed)
    random.Random(seed).shuffle(corpus)
    files = {"sft_train": corpus, "sft_test": sft_records(test),
             "pairs_train": preferences(train, config.comparisons, seed),
             "pairs_test": preferences(test, 1000, seed)}
    path_of = {}
    for name, records in files.items():
        path_of[name] = str(folder / f"{name}.jsonl")
        write_jsonl(path_of[name], records)
    shared = {"seed": seed, "device": config.device, "batch_size": config.batch_size,
              "eval_interval": 10**6}           # only after the last step
    lm = train_stage(
        sft, data=path_of["sft_train"], val_data=path_of["sft_test"],
        out_dir=str(folder / "sft"), n_embd=config.n_embd, n_head=config.n_embd // 32,
        n_inner=3 * config.n_embd, block_size=160, dropout=config.dropout, lr=config.lr,
        max_steps=config.sft_steps, grad_accum=1, **shared)
    ckpt = train_stage(
        reward_model, data=path_of["pairs_train"], val_data=path_of["pairs_test"], init=lm,
        out_dir=str(folder / "reward_model"), max_steps=config.steps, lr=config.reward_lr,
        likelihood=config.likelihood, **shared)
    device, autocast = setup(Options(seed, config.device))
    trained = load_reward_model(ckpt, device)
    answers = [" " + text for text in texts]
    scores = score_texts(trained, tokenizer_of(trained.model), [PROMPT] * len(texts), answers,
                         autocast)
    # Undoes normalize(), so that differences are log odds.
    return (scores - trained.shift.cpu()) / trained.gain.cpu(), lm

# -----------------------------------------------------------------------------
# baselines

SIZE = 2**18                    # of the table that n-grams are hashed into


def ngrams(text):
    """The hashed n-grams of a text, sorted: of 1 and 2 words, and of 2 to 5 characters."""
    tokens, characters = text.lower().split(), f" {text} "
    found = set()
    for n in (1, 2):
        for i in range(len(tokens) - n + 1):
            found.add(" ".join(tokens[i:i + n]) + "|")
    for n in range(2, 6):
        for i in range(len(characters) - n + 1):
            found.add(characters[i:i + n])
    return sorted({zlib.crc32(gram.encode()) % SIZE for gram in found})


class TfIdf:
    """Texts as vectors: tf-idf of the n-grams that at least two of the training texts have."""

    def __init__(self, texts):
        rows = [ngrams(text) for text in texts]
        count = torch.bincount(torch.tensor([gram for row in rows for gram in row]), minlength=SIZE)
        idf = torch.log((len(rows) + 1) / (count + 1)) + 1
        self.idf = torch.where(count > 1, idf, 0.0)                         # (SIZE,)

    def __call__(self, texts):
        """-> (N, SIZE), sparse, each row of length 1"""
        places = [(i, gram) for i, text in enumerate(texts) for gram in ngrams(text)]
        rows, columns = torch.tensor(places).T
        squares = torch.zeros(len(texts)).index_add_(0, rows, self.idf[columns] ** 2)
        values = self.idf[columns] / squares.sqrt().clamp(min=1e-9)[rows]
        matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (len(texts), SIZE),
                                         check_invariants=True)
        return matrix.coalesce()


def fit_linear(texts, others, loss_of, l2, features=()):
    """Trains a linear model of n-grams on some texts. Returns the scores of other texts (N,).

    loss_of(scores (N,)): the summed loss on the training texts; l2 / 2 |weights|^2 is added.
    features: functions of a text whose values count, too, with weights that are not penalized."""
    tfidf = TfIdf(texts)

    def columns(texts):
        return torch.tensor([[1.0, *(feature(text) for feature in features)] for text in texts])

    weights = torch.zeros(SIZE, 1, requires_grad=True)
    free = torch.zeros(1 + len(features), 1, requires_grad=True)    # the first one is the bias
    x, more = tfidf(texts), columns(texts)
    optimizer = torch.optim.LBFGS([weights, free], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        scores = (x @ weights + more @ free).squeeze(1)             # (N,)
        total = loss_of(scores) + l2 / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        return (tfidf(others) @ weights + columns(others) @ free).squeeze(1)


def words_of(text):
    return set(re.findall(r"[a-z']+", text.lower()))


def rarity(puns):
    """A function of a text: -sum of log(1 + the number of puns that have a word), over its words.

    A pun does not count for its own text or for its minimal pair. Otherwise all training texts
    would seem to have more common words than new ones."""
    count = collections.Counter(word for pun in puns for word in words_of(pun.text))
    own = {}
    for pun in puns:
        own[pun.text] = own[depun(pun)] = words_of(pun.text)

    def of(text):
        total = 0.0
        for word in words_of(text):
            total -= math.log(1 + count[word] - (word in own.get(text, ())))
        return total

    return of


def minimal_pairs(puns):
    """[(text of a pun, the same text without the pun)], where the other word is known."""
    return [(pun.text, depun(pun)) for pun in puns if depun(pun) not in ("", pun.text)]


def baselines(train, others, z):
    """{name: scores of the other texts (N,)}: a specialist for each task, and the length.

    z: see standardized_ratings()."""
    texts = [pun.text for pun in train]
    is_pun = torch.tensor([float(pun.is_pun) for pun in train])
    rated = [pun for pun in train if pun.part == "full"]
    ratings = torch.tensor([z[pun.id] for pun in rated])
    minimal = [text for pair in minimal_pairs(train) for text in pair]      # pun, other, pun, ...

    def pun_loss(scores):
        return F.binary_cross_entropy_with_logits(scores, is_pun, reduction="sum")

    def rating_loss(scores):
        return F.mse_loss(scores, ratings, reduction="sum") / 2

    def minimal_loss(scores):
        return len(minimal) / 2 * ranking_loss(scores.view(-1, 2))

    return {
        "linear, pun or not": fit_linear(texts, others, pun_loss, 0.3),
        "linear, ratings": fit_linear([pun.text for pun in rated], others, rating_loss, 1.0),
        "linear, minimal pairs": fit_linear(minimal, others, minimal_loss, 0.3,
                                            [len, rarity(train)]),
        "the longer one": torch.tensor([float(len(text.split())) for text in others]),
        "more letters": torch.tensor([float(len(text)) for text in others]),
    }


def ensemble(specialist, ours):
    """Sum of the standardized scores (N,) of a linear specialist, which counts three times, and of
    the reward model."""
    def standardize(scores):
        return (scores - scores.mean()) / scores.std()

    return 3 * standardize(specialist) + standardize(ours)

# -----------------------------------------------------------------------------
# measures

def standardized_ratings(puns):
    """{id: mean rating}, with each rater's ratings standardized: people use a scale in different
    ways."""
    of_rater = collections.defaultdict(list)
    for pun in puns:
        for rater, rating in zip(pun.raters, pun.ratings, strict=True):
            of_rater[rater].append(float(rating))
    mean, std = {}, {}
    for rater, ratings in of_rater.items():
        mean[rater] = sum(ratings) / len(ratings)
        variance = sum((rating - mean[rater]) ** 2 for rating in ratings) / len(ratings)
        std[rater] = max(math.sqrt(variance), 1e-6)
    result = {}
    for pun in puns:
        standardized = [(rating - mean[rater]) / std[rater]
                        for rater, rating in zip(pun.raters, pun.ratings, strict=True)]
        result[pun.id] = sum(standardized) / len(standardized)
    return result


def partial_spearman(a, b, c):
    """Rank correlation of a and b (N,) with c held fixed; 0 if a has the ranks of c."""
    ab, ac, bc = spearman(a, b), spearman(a, c), spearman(b, c)
    rest = (1 - ac * ac) * (1 - bc * bc)
    return (ab - ac * bc) / math.sqrt(rest) if rest > 1e-6 else 0.0


def accuracy(score, pairs):
    """The fraction of pairs of texts, better first, that the scores order rightly; a tie is half.
    0 without pairs. score: {text: score}"""
    points = [(score[a] > score[b]) + (score[a] == score[b]) / 2 for a, b in pairs]
    return sum(points) / len(points) if points else 0.0


def n_words(pun):
    return len(pun.text.split())


def measures(puns, score, z):
    """The numbers of the report, from test puns, {text: score}, and {id: standardized rating}."""
    row = {"AUC, pun or not": metrics.auc([score[pun.text] for pun in puns if pun.is_pun],
                                          [score[pun.text] for pun in puns if not pun.is_pun])}
    same_length = [(a.text, b.text) for a, b in detection_pairs(puns, 0)]
    row["AUC, as many words"] = accuracy(score, same_length)
    row["pun over minimal pair"] = accuracy(score, minimal_pairs(puns))
    rated = [pun for pun in puns if pun.part == "full"]
    for margin in (0.4, 1.0):
        pairs = [(a, b) for a, b, *_ in rated_pairs(rated, margin)]
        both_puns = [(a, b) for a, b in pairs if a.is_pun and b.is_pun]
        as_long = [(a, b) for a, b in both_puns if abs(n_words(a) - n_words(b)) < 2]
        for name, kept in (("", pairs), (", two puns", both_puns),
                           (", two puns within a word", as_long)):
            texts = [(a.text, b.text) for a, b in kept]
            row[f"raters, margin {margin}{name}"] = accuracy(score, texts)
    scores = torch.tensor([score[pun.text] for pun in rated])
    ratings = torch.tensor([pun.funniness for pun in rated])
    lengths = torch.tensor([float(n_words(pun)) for pun in rated])
    row["Spearman, mean rating"] = spearman(scores, ratings)
    row["Spearman, standardized raters"] = spearman(scores, torch.tensor([z[p.id] for p in rated]))
    row["Spearman, mean rating, length fixed"] = partial_spearman(scores, ratings, lengths)
    return row

# -----------------------------------------------------------------------------
# the report

def main(config):
    """Trains and measures. Writes the report to config.out_dir. Raises InputError."""
    folder = Path(config.out_dir)
    rated = {pun.id: pun for pun in load(config.expun, "expun", semeval=config.semeval).records}
    puns = [rated.get(pun.id, pun) for pun in load(config.semeval, "semeval").records]
    if not minimal_pairs(puns):
        raise InputError(
            f"--semeval {config.semeval}: no heterographic pun whose other word is known, which a "
            "part of the report needs: subtask1-heterographic-test.xml and the .gold files of all "
            "three subtasks")
    z = standardized_ratings([pun for pun in puns if pun.part == "full"])
    tables = collections.defaultdict(list)      # {model: a row of measures() for each seed}
    rated_scores, pun_metrics = [], []
    for seed in progress_bar(config.seeds, "people", len(config.seeds)):
        train, test = split(puns, config.held_out, seed)
        texts = [text for pun in test for text in (pun.text, depun(pun)) if text]
        texts = list(dict.fromkeys(texts))
        ours, lm = train_reward_model(config, folder / str(seed), seed, train, test, texts)
        scores_of = {"reward model": ours} | baselines(train, texts, z)
        for task in ("pun or not", "ratings", "minimal pairs"):
            scores_of[f"both, {task}"] = ensemble(scores_of[f"linear, {task}"], ours)
        for name, scores in scores_of.items():
            score = dict(zip(texts, scores.tolist(), strict=True))
            tables[name].append(measures(test, score, z))
        score = dict(zip(texts, ours.tolist(), strict=True))
        for a, b, *_ in rated_pairs([pun for pun in test if pun.part == "full"], 0.4):
            rated_scores.append([score[a.text], score[b.text]])
        pun_metrics.append(metrics.evaluate(puns, train, test, lm, config.device))
    error = pair_metrics(torch.tensor(rated_scores))["ece"]
    write_report(config, tables, error, pun_metrics)


def cell(rows, name):
    """Mean ± standard deviation over the seeds."""
    values = torch.tensor([float(row[name]) for row in rows])
    std = values.std() if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {std:.3f}"


def write_report(config, tables, error, pun_metrics):
    """Writes report.json and report.md, and prints the latter."""
    folder = Path(config.out_dir)
    lines = [f"Test texts: mean ± standard deviation over {len(config.seeds)} seeds, each with a "
             f"split of its own ({config.held_out:.0%} of the texts). `python -m real.people`, "
             f"{dataclasses.asdict(config)}", "",
             f"| | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    for name in tables["reward model"][0]:
        cells = [cell(rows, name) for rows in tables.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Calibration error on rated pairs, margin 0.4: {error:.3f}.", "",
              "Pun metrics without a judge, AUC of puns against non-puns (heterographic):", ""]
    lines += [f"- {name}: {cell(pun_metrics, name)}" for name in pun_metrics[0]]
    report = {"config": dataclasses.asdict(config), "tables": tables, "ece": error,
              "metrics": pun_metrics}
    with atomic_write(folder / "report.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with atomic_write(folder / "report.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[2:]))
    print(f"\n{folder / 'report.md'}")


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Config)))
