"""Solutions of the exercises in 8_real_puns.ipynb."""

import collections
import math

import torch

from evaluate import interval
from real.duplicates import words_of


def my_auc(positives, negatives):
    higher = (positives[:, None] > negatives).float()           # (N, M)
    equal = (positives[:, None] == negatives).float()
    return (higher + equal / 2).mean().item()


def my_best_of_n_kl(p, n):
    F = torch.cat([torch.zeros(1), p.cumsum(0)])                # (K + 1,)
    q = (F ** n).diff()                                         # (K,)
    return (q * (q / p).log()).sum()


def my_win_rate(rows, baseline):
    wins = collections.defaultdict(list)
    for row, other in zip(rows, baseline, strict=True):
        win = 0.5 if row["gold"] == other["gold"] else float(row["gold"] > other["gold"])
        wins[row["prompt"]].append(win)
    means = [sum(values) / len(values) for values in wins.values()]
    return sum(means) / len(means), interval(means)


def my_overlap(text, training):
    sets = [words_of(other) for other in training]
    count = collections.Counter(word for words in sets for word in words)

    def weight(words):
        return sum(math.log((len(sets) + 1) / max(count[word], 1)) for word in words)

    words = words_of(text)
    return max(weight(words & other) / weight(words | other) for other in sets)
