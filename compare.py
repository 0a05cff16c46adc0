"""
Architectures side by side: one table from the reports of several runs, mean and range over seeds.

    make compare                    trains gpt, palm and t5 at about one number of parameters, with three seeds each; then
    python compare.py runs/compare  reads runs/compare/<arch>-<seed>/report.json, writes runs/compare/report.md
"""

import collections
import json
from pathlib import Path

import torch
import tyro

from common import InputError, replacing, run

COLUMNS = {"pun": ("pun %", 100, ".1f"), "on_topic": ("on topic %", 100, ".1f"), "fluent": ("fluent %", 100, ".1f"), "novel": ("novel %", 100, ".1f"),
           "kl": ("kl", 1, ".2f"), "least_kl": ("least kl", 1, ".2f"), "score": ("score", 1, "+.2f"), "distinct": ("distinct %", 100, ".1f"),
           "self_bleu": ("self-BLEU", 1, ".3f")}


def cell(values, scale, form):
    """mean (smallest to largest) of the seeds; - where one of them has no such number."""
    if None in values:
        return "-"
    mean = f"{scale * sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({scale * min(values):{form}} to {scale * max(values):{form}})"


def table(folder):
    """Markdown: a line for each architecture and policy."""
    rows, parameters = collections.defaultdict(list), {}
    for path in sorted(folder.glob("*-*/report.json")):
        arch = path.parent.name.rpartition("-")[0]
        weights = torch.load(path.parent / "sft" / "ckpt.pt", map_location="cpu", weights_only=True)["model"].values()
        parameters[arch] = sum(weight.numel() for weight in weights)
        for row in json.loads(path.read_text())["rows"]:
            rows[arch, row["policy"]].append(row)
    if not rows:
        raise InputError(f"{folder} holds no <arch>-<seed>/report.json; make them with: make compare")
    lines = ["| model | policy | seeds | " + " | ".join(name for name, _, _ in COLUMNS.values()) + " |", "|" + "---|" * (3 + len(COLUMNS))]
    for (arch, policy), same in rows.items():
        cells = [cell([row[column] for row in same], scale, form) for column, (_, scale, form) in COLUMNS.items()]
        lines.append("| " + " | ".join([f"{arch}, {parameters[arch] / 1e6:.2f} M", policy, str(len(same)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(folder: tyro.conf.Positional[Path]):
    text = table(folder)
    with replacing(folder / "report.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text + f"\n{folder / 'report.md'}")


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
