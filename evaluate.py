"""
Stage 4, evaluation: all policies side by side, on the same prompts, at the same temperature.

Rows: the SFT policy; best of n by the reward model (the baseline for all training, since it trains
no policy); every policy with a checkpoint in runs/. Columns, with 95 % intervals over completions:

    pun, on topic, fluent   the judge's verdicts, in % (gold: no training has seen the judge)
    kl          nats a response: mean of log pi - log pi_sft on samples of pi
    min kl      the smallest KL of any policy with this pun rate: KL of two coins,
                p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0))
    score       of the reward model (the proxy)
    distinct    different sentences among all, in %
    self-BLEU   how much the sentences share, n-grams up to 4; lower is more diverse

    python evaluate.py                          table, figure, and samples: runs/report*
    python evaluate.py --temperature 0.7
    python evaluate.py --compare runs/compare   one table of several runs, <arch>-<seed> each
"""

import collections
import json
import math
import random
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from common import (
    InputError,
    Options,
    atomic_write,
    command_line,
    make_rng,
    read_jsonl,
    setup,
    write_jsonl,
    write_text,
)
from data import load_prompts, measure, tokenizer_of, verdict_of
from model import LANGUAGE_MODEL, load_model, load_reward_model, read_checkpoint


@dataclass(slots=True)
class Config(Options):
    out_dir: str = "runs"       # the folder of the stages' folders, and of the report
    reference: str = "runs/sft/ckpt.pt"                                 # what kl is measured to
    reward: str = "runs/reward_model/ckpt.pt"                           # the proxy
    data: str = ""              # JSONL of prompts; '' is the pun world
    # 2,000 give a pun rate within 2 points.
    samples: int = 2000         # completions a policy
    best_of: tuple[int, ...] = (2, 4, 8, 16)            # how many the reward model picks from
    temperature: float = 1.0                            # of the sampling, and of every log-prob
    top_k: int = 0              # sample among that many most likely tokens; 0 is all
    top_p: float = 1.0          # sample among the most likely tokens that have this mass
    max_new_tokens: int = 32                            # longest completion
    compare: str = ""           # a folder of runs: only combines their reports into one table

# -----------------------------------------------------------------------------
# arithmetic

def min_kl(p, p0):
    """The smallest KL(pi || pi_0), in nats, of a policy whose samples are puns with probability p,
    where those of pi_0 are with p0: the data-processing inequality. NaN unless 0 < p0 < 1."""
    if not 0 < p0 < 1:
        return math.nan
    kl = 0.0                                                # nats
    for a, b in ((p, p0), (1 - p, 1 - p0)):
        if a > 0:                                   # a ln(a / b) goes to 0 with a
            kl += a * math.log(a / b)
    return kl


def best_of_n_kl(n):
    """An upper bound of the KL of best of n to the policy that it picks from, in nats:
    ln n - (n - 1) / n (https://arxiv.org/abs/2401.01879)."""
    return math.log(n) - (n - 1) / n


def interval(values):
    """Half the width of the 95 % interval of the mean: 1.96 standard errors."""
    n, mean = len(values), sum(values) / len(values)        # rows, and their mean
    variance = sum((x - mean) ** 2 for x in values) / max(n - 1, 1)     # unbiased
    return 1.96 * math.sqrt(variance / n)


def ngrams(words, n):
    """How often each n-gram occurs in a list of words."""
    return collections.Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def self_bleu(texts, max_n=4, size=300, seed=0):
    """The mean BLEU of each text against all others, https://arxiv.org/abs/1802.01886: from 0 to
    1, where all texts are the same. Measured on `size` of the texts.

    BLEU is the geometric mean of the clipped precisions of 1- to max_n-grams; 0.1 is added to a
    count of zero. No brevity penalty: among so many references, one has about the right length."""
    # Every text is compared with all others, so a sample keeps the time bounded.
    picked = random.Random(seed).sample(texts, min(size, len(texts)))
    word_lists = [text.split() for text in picked]
    log_bleu = [0.0] * len(word_lists)  # log of the geometric mean, of each text
    for n in range(1, max_n + 1):
        counts = [ngrams(words, n) for words in word_lists]             # of each text
        largest = two_largest_counts(counts)                # over all texts
        for i, count in enumerate(counts):
            hits = 0
            for gram, k in count.items():
                owner, first, second = largest[gram]        # who has it most often, and how often
                in_other_texts = second if owner == i else first
                hits += min(k, in_other_texts)  # clipped: a repeated word counts as often as there
            precision = max(hits, 0.1) / max(sum(count.values()), 1)
            log_bleu[i] += math.log(precision) / max_n                  # geometric mean
    return sum(math.exp(x) for x in log_bleu) / len(log_bleu)


def two_largest_counts(counts):
    """{n-gram: (the text that has it most often, how often, the next largest count)}."""
    largest = {}
    for i, count in enumerate(counts):
        for gram, k in count.items():
            owner, first, second = largest.get(gram, (-1, 0, 0))        # -1: no text has it yet
            if k > first:
                largest[gram] = (i, k, first)
            elif k > second:
                largest[gram] = (owner, first, k)
    return largest

# -----------------------------------------------------------------------------
# the rows of the table

def summarize(name, rows, p0):
    """One row of the table from the completions of a policy; None where a number is unknown.

    p0: the pun rate of the reference, NaN if there is no judge."""
    def column(key):
        return [row.get(key, math.nan) for row in rows]

    texts = [row["text"] for row in rows]                   # the completions alone
    result = {}
    for key in ("pun", "on_topic", "fluent", "kl", "score", "length"):
        result[key] = sum(column(key)) / len(rows)
    for key in ("pun", "kl", "score"):
        result[f"{key}_ci"] = interval(column(key))         # half the width, at 95 %
    result["min_kl"] = min_kl(result["pun"], p0)            # NaN without a judge
    result["distinct"] = len(set(texts)) / len(texts)                   # 1: no two are the same
    result["self_bleu"] = self_bleu(texts)
    # Without a judge or a reward model a column is unknown, which is not the same as 0.
    known = {key: None if math.isnan(value) else value for key, value in result.items()}
    return {"policy": name} | known                     # NaN is not JSON


def best_of(groups, n):
    """The completion with the best score among the first n of each group. Its kl is a bound."""
    # The proxy picks; the judge's columns then say what that is worth.
    best = [max(group[:n], key=lambda row: row["score"]) for group in groups]
    # A draw itself has a kl if it was filtered (top-k, top-p).
    return [row | {"kl": row["kl"] + best_of_n_kl(n)} for row in best]


def training_curve(path):
    """The rows of a run's metrics.jsonl that have a pun rate and a kl."""
    if not path.exists():
        return []
    return [row for row in read_jsonl(path) if "pun" in row and "kl" in row]


def find_policies(config, reference):
    """The folders in out_dir that hold a policy to compare with the reference.

    Prints which others were left out, and why."""
    folders = []                                            # of the policies
    for path in sorted(Path(config.out_dir).glob("*/ckpt.pt")):
        # The reference has its own row, the first.
        if path.resolve() == Path(config.reference).resolve():
            continue
        checkpoint = read_checkpoint(path)                  # says what it is
        if checkpoint["kind"] != LANGUAGE_MODEL:
            print(f"{path}: left out, a {checkpoint['kind']} is no policy")
        elif checkpoint["tokenizer_fingerprint"] != reference.tokenizer_fingerprint:
            print(f"{path}: left out, its tokenizer is not the one of {config.reference}")
        else:
            folders.append(path.parent)
    return folders


def evaluate(config):
    """Samples every policy. Returns (report, samples): {"p0", "rows", "curves", "sampling"}, and
    the completions of each policy, {policy: rows}."""
    device, autocast = setup(config)
    reference = load_model(config.reference, device)
    reward_model = load_reward_model(config.reward, device, reference)
    tok = tokenizer_of(reference)
    prompts = [record["prompt"] for record in load_prompts(config, tok)]
    random.Random(0).shuffle(prompts)               # so that the first few are of many topics
    prompts = list(islice(cycle(prompts), config.samples))              # every policy gets these
    folders = find_policies(config, reference)

    # The same prompts and the same seed for every policy: what differs is the policy.
    def draw(model, prompts):
        return measure(model, reference, tok, prompts, make_rng(device, config.seed), autocast,
                       reward_model, config.temperature, config.top_k, config.top_p,
                       config.max_new_tokens)

    # -- the SFT policy and best of n share their draws: `most` completions for each of a few
    # prompts, so that best of n can pick from every group of n.
    most = max(config.best_of, default=1)
    few = prompts[:max(1, config.samples * 4 // most)]  # 4 samples in all for each of `samples`
    drawn = draw(reference, [prompt for prompt in few for _ in range(most)])
    p0 = sum(row.get("pun", math.nan) for row in drawn) / len(drawn)
    is_filtered = config.top_k > 0 or config.top_p < 1 or config.temperature == 0
    p0 = math.nan if is_filtered else p0                # kl is measured to the unfiltered policy
    rows, samples, curves = [], {}, {}                      # of the table, the page, the figure

    def add(name, completions):
        rows.append(summarize(name, completions, p0))       # a row of the table
        samples[name] = completions                         # kept whole, for report_samples.jsonl
        print(format_row(rows[-1]), flush=True)

    print(HEADER)
    # Spread over all prompts, not the first few.
    every = max(1, len(drawn) // config.samples)
    add("sft", drawn[::every])
    for n in config.best_of:
        # `most` neighbors answer the same prompt. No group of n has answers to two prompts.
        groups = [drawn[i:i + n] for start in range(0, len(drawn), most)
                  for i in range(start, start + most - n + 1, n)]
        add(f"best of {n}", best_of(groups, n))

    # -- every other policy
    for folder in folders:
        # One policy is in memory at a time.
        add(folder.name, draw(load_model(folder / "ckpt.pt", device), prompts))
        if config.temperature == 1 and not is_filtered:     # as in training, or kl is another
            curves[folder.name] = training_curve(folder / "metrics.jsonl")
    how = f"temperature {config.temperature:g}, top_k {config.top_k}, top_p {config.top_p:g}"
    p0 = None if math.isnan(p0) else p0
    return {"p0": p0, "rows": rows, "curves": curves, "sampling": how}, samples

# -----------------------------------------------------------------------------
# the report

# column of the table: (its key in a row, scale, format, whether there is an interval)
COLUMNS = {"pun %": ("pun", 100, ".1f", True), "on topic %": ("on_topic", 100, ".1f", False),
           "fluent %": ("fluent", 100, ".1f", False), "kl": ("kl", 1, ".2f", True),
           "min kl": ("min_kl", 1, ".2f", False), "score": ("score", 1, "+.2f", True),
           "distinct %": ("distinct", 100, ".1f", False),
           "self-BLEU": ("self_bleu", 1, ".3f", False)}


def format_cells(row):
    """The cells of a row of the table; - where a number is unknown, as without a judge."""
    cells = [row["policy"]]                                 # the first column
    for key, scale, form, has_interval in COLUMNS.values():
        if row[key] is None:
            cells.append("-")
        elif has_interval:
            half_width = scale * row[f"{key}_ci"]           # of the interval
            cells.append(f"{scale * row[key]:{form}} ± {half_width:{form.lstrip('+')}}")
        else:
            cells.append(f"{scale * row[key]:{form}}")
    return cells


def format_line(cells):
    return f"{cells[0]:>13}" + "".join(f"  {cell:>12}" for cell in cells[1:])


def format_row(row):
    return format_line(format_cells(row))


HEADER = format_line(["policy", *COLUMNS])


def markdown_table(header, lines):
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def markdown(report, samples):
    """The report as a page: the table, and ten completions of each policy."""
    table = markdown_table(["policy", *COLUMNS], [format_cells(row) for row in report["rows"]])
    lines = [f"Made by `python evaluate.py` at {report['sampling']}; intervals are 95 % over "
             "completions.", "", table,
             "For best of n, kl is the bound ln n - (n - 1)/n, plus the kl of a filtered draw.",
             "The first completions of each policy, not picked; * is a pun:", ""]
    for name, rows in samples.items():
        lines += [f"**{name}**", ""]
        for row in rows[:10]:
            mark = "*" if row.get("pun") else " "           # the judge's verdict
            lines.append(f"- {mark} {row['prompt']}{row['text']}")
        lines.append("")
    return "\n".join(lines) + "\n"


def draw_report(report, path):
    """Gold (pun rate) and proxy (score) against KL, for every policy and along its training."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")    # pyplot would change the backend
    gold_axis, proxy_axis = figure.subplots(1, 2)           # side by side
    # No policy can be above this line: with this KL it is the highest pun rate.
    if report["p0"]:
        rates = [p / 200 for p in range(round(200 * report["p0"]), 200)]    # from p0 to 1
        gold_axis.plot([min_kl(p, report["p0"]) for p in rates], [100 * p for p in rates], "--",
                       color="black", linewidth=1, label="smallest KL for a pun rate")
    draw_policies(gold_axis, report, "pun", 100)
    draw_policies(proxy_axis, report, "score", 1)
    gold_axis.set_ylabel("puns, % (judge: gold)")
    proxy_axis.set_ylabel("reward-model score (proxy)")
    gold_axis.legend(fontsize=8, loc="lower right")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_policies(axis, report, column, scale):
    """One panel: best of n as a line, every policy as a dot, its training as small dots."""
    best = [row for row in report["rows"] if row["policy"].startswith("best of")]
    policies = [row for row in report["rows"] if row not in best]
    line = [row for row in [policies[0], *best] if row[column] is not None]
    axis.plot([row["kl"] for row in line], [scale * row[column] for row in line], marker="s",
              markersize=4, color="gray", label="best of n")
    largest = max([1.0] + [row["kl"] for row in report["rows"]])        # nats, for the axis
    for i, row in enumerate(policies):
        color = "black" if i == 0 else f"C{i - 1}"                      # the SFT policy is black
        curve = report["curves"].get(row["policy"], [])     # of metrics.jsonl
        curve = [point for point in curve if column in point]           # not every log has a score
        axis.plot([point["kl"] for point in curve], [scale * point[column] for point in curve],
                  ".", markersize=3, alpha=0.4, color=color)
        largest = max([largest] + [point["kl"] for point in curve])
        if row[column] is not None:
            axis.plot(row["kl"], scale * row[column], "o", markersize=8, color=color,
                      label=row["policy"])
    axis.set_xlabel("KL to the SFT policy, nats a response")
    axis.set_xlim(-0.05 * largest, 1.05 * largest)          # the dots at 0 stay whole
    axis.grid(alpha=0.25)

# -----------------------------------------------------------------------------
# several runs in one table

def compare(folder):
    """The reports of folder/<arch>-<seed>/, as one Markdown table: mean (smallest to largest) over
    the seeds. Raises InputError if there is none."""
    rows, parameters = collections.defaultdict(list), {}    # {(arch, policy): its rows}, {arch: n}
    for path in sorted(folder.glob("*-*/report.json")):
        arch = path.parent.name.rpartition("-")[0]                      # <arch>-<seed>
        weights = read_checkpoint(path.parent / "sft" / "ckpt.pt")["model"].values()
        parameters[arch] = sum(weight.numel() for weight in weights)    # of the language model
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            rows[arch, row["policy"]].append(row)
    if not rows:
        raise InputError(f"{folder} holds no <arch>-<seed>/report.json; run: make compare")
    lines = []
    for (arch, policy), same in rows.items():               # the same policy with other seeds
        cells = [f"{arch}, {parameters[arch] / 1e6:.2f} M", policy, str(len(same))]
        for key, scale, form, _ in COLUMNS.values():
            cells.append(format_range([row[key] for row in same], scale, form))
        lines.append(cells)
    return markdown_table(["model", "policy", "seeds", *COLUMNS], lines)


def format_range(values, scale, form):
    """mean (smallest to largest); - where one of the values is unknown."""
    if None in values:
        return "-"
    mean = f"{scale * sum(values) / len(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ({scale * min(values):{form}} to {scale * max(values):{form}})"

# -----------------------------------------------------------------------------

def main(config):
    """Runs the stage. Writes the report. Raises InputError for unusable input."""
    if config.compare:
        table = compare(Path(config.compare))
        write_text(Path(config.compare) / "report.md", table)
        print(f"{table}\n{config.compare}/report.md")
        return
    report, samples = evaluate(config)
    folder = Path(config.out_dir)
    for name, rows in samples.items():
        print(f"\n{name}")
        for row in rows[:10]:
            print(f"  {verdict_of(row):>3} | {row['prompt']}{row['text']}")
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "report.md", markdown(report, samples))
    # The report can be recomputed from the samples, and read beyond the first ten.
    all_samples = [{"policy": name} | row for name, rows in samples.items() for row in rows]
    write_jsonl(folder / "report_samples.jsonl", all_samples)
    draw_report(report, folder / "report.png")
    print(f"\n{folder}/report.md  {folder}/report.json  {folder}/report.png")


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Config)))
