"""
Puns that people wrote and judged: from the files of SemEval-2017 task 7 and ExPUNations to a
table of what each stage makes of a pretrained model. real/Makefile has the whole pipeline.

    python -m real.people data                  texts -> training, validation, test, prompts
    python -m real.people pairs                 comparisons for the reward model, and for the judge
    python -m real.people report                judges and policies on held-out words

A judge stands in for the parser of the pun world. It is a second reward model, `gold`, which is
trained on people's judgements that nothing else sees: a random half of the rated texts and of the
texts that are not puns. A policy can then be good only by what the two reward models agree on.

Four parts of the texts, with all near-duplicates of a text in the same part:

    train       policies, reward model, and discriminator learn from it
    gold        only the judge learns from it
    val, test   nobody learns from them

Both data sets are for non-commercial use only, and so is whatever was trained on them.
"""

import collections
import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure

from common import (
    Options,
    atomic_write,
    command_line,
    make_rng,
    read_jsonl,
    setup,
    write_jsonl,
)
from data import complete, measure, tokenizer_of
from evaluate import best_of, interval, markdown_table, self_bleu, write_text
from model import load_model, load_reward_model
from real.corpora import load
from real.duplicates import group_records, words_of
from real.semeval import (
    PROMPT,
    asked_word,
    depun,
    detection_pairs,
    put_word,
    rated_pairs,
    word_prompt,
)
from reward_model import score_texts
from sample import find_policies

WORDS = Path(__file__).with_name("words.txt")
MAX_NEW_TOKENS = 64         # of a sample; nearly all puns of people are shorter


@dataclass(slots=True)
class Config(Options):
    semeval: str = "downloads/semeval"          # the folder of SemEval-2017 task 7
    expun: str = "downloads/expun"              # the folder of ExPUNations
    out_dir: str = "runs/real"                  # the folder of the stages' folders
    split_seed: int = 1                         # which texts are in which part
    comparisons: int = 5000                     # of the reward model, and as many of the judge
    words: int = 200                            # of each kind in the report, 200 at most
    samples: int = 4                            # of each policy to each of these words
    best_of: int = 16                           # how many the reward model picks from

# -----------------------------------------------------------------------------
# the texts and their parts

def load_puns(config):
    """All texts of SemEval, with the ratings of ExPUNations where there are any."""
    rated = {pun.id: pun for pun in load(config.expun, "expun", semeval=config.semeval).records}
    return [rated.get(pun.id, pun) for pun in load(config.semeval, "semeval").records]


def parts_of(puns, seed):
    """{"train", "gold", "val", "test": puns}. Near-duplicates are in one part, see the top."""
    parts = {"train": [], "gold": [], "val": [], "test": []}
    groups = group_records(puns)
    random.Random(seed).shuffle(groups)
    to_gold = False
    for rows in groups:
        group = [puns[i] for i in rows]
        is_judged = any(pun.ratings or not pun.is_pun for pun in group)
        if len(parts["test"]) < 0.15 * len(puns):
            part = "test"
        elif len(parts["val"]) < 0.04 * len(puns):
            part = "val"
        elif is_judged and to_gold:
            part, to_gold = "gold", False
        else:
            part, to_gold = "train", to_gold or is_judged   # every second judged group is gold
        parts[part] += group
    return parts


def inoffensive(puns):
    """The texts that at most one rater found offensive: no stage learns from the others."""
    return [pun for pun in puns if pun.n_offensive < 2]


def completions(puns):
    """What a policy learns: each inoffensive pun, asked for by its pun word."""
    return [{"prompt": word_prompt(pun.pun_word), "completion": " " + pun.text}
            for pun in inoffensive(puns) if pun.is_pun]


def everyday_words(puns):
    """Words with two senses, or that sound like another, which occur in no pun of the data: nobody
    can have memorized a pun on them."""
    seen = {word for pun in puns if pun.is_pun for word in re.findall(r"[a-z]+", pun.text.lower())}
    return [word for word in WORDS.read_text(encoding="utf-8").split() if word not in seen]


def write_data(config):
    """Writes out_dir/data: records of every part, prompts for RL, and prompts to evaluate on."""
    puns = load_puns(config)
    parts = parts_of(puns, config.split_seed)
    folder = Path(config.out_dir, "data")
    words = everyday_words(puns)
    random.Random(config.split_seed).shuffle(words)
    unseen, for_training = words[:200], words[200:]
    trained = list(dict.fromkeys(record["prompt"] for record in completions(parts["train"])))
    files = {part: completions(parts[part]) for part in ("train", "val", "test")}
    files["rl_prompts"] = [{"prompt": p} for p in trained + [word_prompt(w) for w in for_training]]
    files["unseen_prompts"] = [{"prompt": word_prompt(word)} for word in unseen]
    random.Random(config.split_seed).shuffle(trained)
    files["trained_prompts"] = [{"prompt": p} for p in trained[:200]]
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
        print(f"{folder}/{name}.jsonl: {len(records)} records")
    for part, texts in parts.items():
        n_puns = sum(pun.is_pun for pun in texts)
        n_rated = sum(bool(pun.ratings) for pun in texts)
        print(f"{part}: {len(texts)} texts, {n_puns} puns, {n_rated} rated")

# -----------------------------------------------------------------------------
# comparisons

# Which fraction of the comparisons comes from where.
SOURCES = {"rated": 0.2, "detected": 0.22, "minimal": 0.08, "sampled": 0.2, "other": 0.08,
           "swapped": 0.14, "used": 0.08}


def partners(puns, seed):
    """Yields (pun, another one): of those that do not have its word and whose own word ends
    alike, one at random."""
    rng, alike = random.Random(seed), collections.defaultdict(list)
    for pun in puns:
        if pun.is_pun:
            ending = re.search(r"(s|ed|ing)?$", pun.pun_word.lower())[0]
            alike[ending].append((pun, words_of(pun.pun_word), words_of(pun.text)))
    for group in alike.values():
        for pun, word, _ in group:
            others = [other for other, _, words in group if word.isdisjoint(words)]
            if others:
                yield pun, rng.choice(others)


def uses_word(prompt, text):
    """Whether the text has the word of the prompt, as it stands there."""
    return re.search(rf"\b{re.escape(asked_word(prompt))}\b", text.lower()) is not None


def comparisons(puns, samples, n, seed):
    """About n comparisons of texts, from seven sources:

    rated       two texts that the same raters judged, the funnier one first
    detected    a pun, and a text of its length that is not a pun
    minimal     a pun, and the same text without its pun
    sampled     a person's pun, and what the SFT model wrote to the same prompt; without these, RL
                finds at once what a model writes and no person does
    other       a pun on the word of the prompt, and a pun on another word: the word must be used
    swapped     a pun on the word, and a pun on another word with this one in its place: some
                forms ("Old bricks never die, they just drive people up the wall") are in puns
                alone, and without these the form would be enough, whatever the word
    used        two texts of the SFT model to the same prompt, the one that uses the word as it
                stands first; without these, "sealed" is as good as "seal"

    samples: {prompt: completions}. If a source has too few, all of it is taken."""
    puns = inoffensive(puns)
    pairs = {source: [] for source in SOURCES}
    for a, b, margin, share in rated_pairs(puns, 0.4):
        pairs["rated"].append((PROMPT, a.text, b.text, margin, max(share, 0.5)))
    for a, b in detection_pairs(puns):
        pairs["detected"].append((PROMPT, a.text, b.text, 1.0, 1.0))
    for pun in puns:
        prompt = word_prompt(pun.pun_word)
        if depun(pun) not in ("", pun.text):
            pairs["minimal"].append((prompt, pun.text, depun(pun), 1.0, 1.0))
        written = [text.strip() for text in samples.get(prompt, ())]
        if written and written[0] not in ("", pun.text):
            pairs["sampled"].append((prompt, pun.text, written[0], 1.0, 1.0))
    for prompt, written in samples.items():
        written = [text.strip() for text in written if text.strip()]
        using = [text for text in written if uses_word(prompt, text)]
        others = [text for text in written if not uses_word(prompt, text)]
        pairs["used"] += [(prompt, a, b, 1.0, 1.0) for a in using for b in others]
    for pun, other in partners(puns, seed):
        swapped = put_word(other, pun.pun_word.lower())
        for source, text in (("other", other.text), ("swapped", swapped)):
            pairs[source].append((word_prompt(pun.pun_word), pun.text, text, 1.0, 1.0))
    rng, records = random.Random(seed), []
    for source, fraction in SOURCES.items():
        size = min(len(pairs[source]), round(fraction * n))
        for prompt, chosen, rejected, margin, share in rng.sample(pairs[source], size):
            records.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected,
                            "margin": margin, "share": share, "source": source})
    rng.shuffle(records)
    return records


def sample_sft(config, puns, seed):
    """{prompt: two completions of the SFT model} for the pun word of every pun."""
    device, autocast = setup(config)
    model = load_model(Path(config.out_dir, "sft", "ckpt.pt"), device)
    prompts = list(dict.fromkeys(record["prompt"] for record in completions(puns)))
    texts = complete(model, tokenizer_of(model), prompts * 2, make_rng(device, seed), autocast,
                     max_new_tokens=MAX_NEW_TOKENS)
    first, second = texts[:len(prompts)], texts[len(prompts):]
    return dict(zip(prompts, zip(first, second, strict=True), strict=True))


def write_pairs(config):
    """Writes comparisons of each part: pairs_train.jsonl for the reward model, pairs_gold.jsonl
    for the judge, and pairs_val.jsonl and pairs_test.jsonl to measure both."""
    parts = parts_of(load_puns(config), config.split_seed)
    folder = Path(config.out_dir, "data")
    sizes = {"train": config.comparisons, "gold": config.comparisons, "val": 400, "test": 2000}
    for seed, (part, n) in enumerate(sizes.items()):
        samples = sample_sft(config, parts[part], config.seed + seed)
        records = comparisons(parts[part], samples, n, config.split_seed)
        write_jsonl(folder / f"pairs_{part}.jsonl", records)
        counts = {s: sum(record["source"] == s for record in records) for s in SOURCES}
        print(f"{folder}/pairs_{part}.jsonl: {len(records)} comparisons, {counts}")


# -----------------------------------------------------------------------------
# the report: are the two reward models any good?

def auc(positives, negatives):
    """The fraction of (positive, negative) pairs with the positive above; a tie is half.

    positives (N,), negatives (M,): scores."""
    above = (positives[:, None] > negatives).float().mean()
    ties = (positives[:, None] == negatives).float().mean()
    return (above + ties / 2).item()


# {source: column of the table}: how often a reward model orders its comparisons right.
OF_SOURCES = {"minimal": "pun over minimal pair", "sampled": "pun over a sample",
              "other": "pun over another word's", "swapped": "pun over word put in",
              "used": "word used over not"}


def measure_judge(reward_model, puns, pairs, autocast):
    """{measure: value} of a reward model on texts and comparisons that it has not seen."""
    tok = tokenizer_of(reward_model.model)
    texts = [" " + pun.text for pun in puns]
    scores = score_texts(reward_model, tok, [PROMPT] * len(texts), texts, autocast)     # (N,)
    is_pun = torch.tensor([pun.is_pun for pun in puns])
    row = {"pun or not, AUC": auc(scores[is_pun], scores[~is_pun])}
    score = {pun.text: value for pun, value in zip(puns, scores.tolist(), strict=True)}
    for margin in (0.4, 1.0):
        right = [score[a.text] > score[b.text] for a, b, *_ in rated_pairs(puns, margin)]
        row[f"raters, margin {margin}"] = sum(right) / max(len(right), 1)
    for source, name in OF_SOURCES.items():
        of_source = [pair for pair in pairs if pair["source"] == source]
        if not of_source:
            continue
        prompts = [pair["prompt"] for pair in of_source]
        chosen = [pair["chosen"] for pair in of_source]
        rejected = [pair["rejected"] for pair in of_source]
        gap = (score_texts(reward_model, tok, prompts, chosen, autocast)
               - score_texts(reward_model, tok, prompts, rejected, autocast))           # (pairs,)
        row[name] = (gap > 0).float().mean().item()
    return row

# -----------------------------------------------------------------------------
# the report: policies

COPIED = 0.45       # of two texts, the overlap from which they are near-duplicates (duplicates.py)


def overlap_with(training):
    """A function of a text: its largest overlap with a training text, from 0 to 1.

    The overlap of two texts is the weight of the words that they share, over that of all their
    words. A word that n of the N training texts have weighs log((N + 1) / n)."""
    sets = [words_of(text) for text in training]
    texts_with = collections.defaultdict(list)              # {word: numbers of the texts}
    for i, words in enumerate(sets):
        for word in words:
            texts_with[word].append(i)

    def weight(words):
        return sum(math.log((len(sets) + 1) / max(len(texts_with.get(word, ())), 1))
                   for word in words)

    weights = [weight(words) for words in sets]

    def overlap(text):
        words = words_of(text)
        shared = collections.Counter()      # {training text: the weight of the words it shares}
        for word in words:
            word_weight = weight([word])
            for i in texts_with.get(word, ()):
                shared[i] += word_weight
        own = weight(words)
        return max((both / (own + weights[i] - both) for i, both in shared.items()), default=0.0)

    return overlap


def draw_samples(path, prompts, judges, config, autocast):
    """Samples of a policy to the prompts, with kl, the proxy's score, and gold, the judge's.

    judges: (SFT model, reward model, gold)."""
    reference, proxy, gold = judges
    device = next(reference.parameters()).device
    policy = load_model(path, device)
    tok = tokenizer_of(policy)
    rows = measure(policy, reference, tok, prompts, make_rng(device, config.seed), autocast, proxy,
                   max_new_tokens=MAX_NEW_TOKENS)
    texts = [row["text"] for row in rows]
    scores = score_texts(gold, tok, prompts, texts, autocast)
    return [row | {"gold": score} for row, score in zip(rows, scores.tolist(), strict=True)]


def by_prompt(rows, values):
    """The mean value of each prompt: samples to one prompt are alike, so they count as one."""
    of_prompt = collections.defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        of_prompt[row["prompt"]].append(value)
    return [sum(values) / len(values) for values in of_prompt.values()]


def describe_policy(rows, baseline, overlap):
    """One row of the table: a policy's samples, each beside all of the SFT model's to its prompt,
    since against one draw alone the noise of that draw is in every win rate."""
    others = collections.defaultdict(list)                  # {prompt: gold of the SFT model's}
    for other in baseline:
        others[other["prompt"]].append(other["gold"])
    wins = []
    for row in rows:
        theirs = others[row["prompt"]]
        won = sum((row["gold"] > gold) + (row["gold"] == gold) / 2 for gold in theirs)
        wins.append(won / len(theirs))
    win_rates = by_prompt(rows, wins)
    gold = by_prompt(rows, [row["gold"] for row in rows])
    texts = [row["text"] for row in rows]

    def mean(values):
        return sum(values) / len(rows)

    return {"win rate": sum(win_rates) / len(win_rates), "win rate ±": interval(win_rates),
            "gold": sum(gold) / len(gold), "gold ±": interval(gold),
            "proxy": mean(row["score"] for row in rows), "kl": mean(row["kl"] for row in rows),
            "uses the word": mean(uses_word(row["prompt"], row["text"]) for row in rows),
            "distinct": len(set(texts)) / len(texts), "self-BLEU": self_bleu(texts),
            "copied": mean(overlap(text) >= COPIED for text in texts),
            "words": mean(len(text.split()) for text in texts)}


def evaluate_policies(config, judges, overlap, autocast):
    """({prompts: {policy: a row of the table}}, all samples)"""
    folder = Path(config.out_dir)
    policies = [path for path in find_policies(folder) if path.parent.name != "pretrained"]
    sft = policies[0]
    tables, samples = {}, []

    def draw(path, prompts, n, seed):
        repeated = [prompt for prompt in prompts for _ in range(n)]
        return draw_samples(path, repeated, judges, replace(config, seed=seed), autocast)

    for name in ("unseen", "trained"):
        records = read_jsonl(folder / "data" / f"{name}_prompts.jsonl")[:config.words]
        prompts = [record["prompt"] for record in records]
        # What all policies are compared with; the row "sft" is another draw.
        many = draw(sft, prompts, config.best_of, config.seed + 1)
        groups = [many[i:i + config.best_of] for i in range(0, len(many), config.best_of)]
        drawn = {path.parent.name: draw(path, prompts, config.samples, config.seed)
                 for path in policies}
        tables[name] = {policy: describe_policy(rows, many, overlap)
                        for policy, rows in drawn.items()}
        drawn["best"] = best_of(groups, config.best_of)
        # Not with the draws that it was picked from.
        tables[name][f"best of {config.best_of}"] = describe_policy(
            drawn["best"], drawn[sft.parent.name], overlap)
        samples += [{"policy": policy, "words": name} | row
                    for policy, rows in drawn.items() for row in rows]
        print(table(f"{name} words", tables[name]), flush=True)
    return tables, samples


def training_curve(path, judges, autocast):
    """[(kl, proxy, gold)] at each step whose samples a run has kept, if they have a score."""
    _, _, gold = judges
    of_step = collections.defaultdict(list)
    for row in read_jsonl(path):
        if "score" in row:
            of_step[row["step"]].append(row)
    points = []
    for rows in of_step.values():
        scores = score_texts(gold, tokenizer_of(gold.model), [row["prompt"] for row in rows],
                             [row["text"] for row in rows], autocast)
        points.append((sum(row["kl"] for row in rows) / len(rows),
                       sum(row["score"] for row in rows) / len(rows), scores.mean().item()))
    return points

# -----------------------------------------------------------------------------
# the report: the page

def table(name, rows):
    """A Markdown table of {name of the row: {column: value}}; a column "x ±" joins column x."""
    columns = [column for column in next(iter(rows.values())) if not column.endswith("±")]
    lines = []
    for row_name, row in rows.items():
        cells = [row_name]
        for column in columns:
            cell = f"{row[column]:.3f}"
            if f"{column} ±" in row:
                cell += f" ± {row[f'{column} ±']:.3f}"
            cells.append(cell)
        lines.append(cells)
    return markdown_table([name, *columns], lines)


def page(judges, tables, samples, config):
    """The report as Markdown: both tables, and thirty samples of each policy, not picked."""
    lines = ["`python -m real.people report`. Intervals: 95 %, over prompts. Win rate: how often "
             "the judge (gold) prefers the policy's text to the SFT model's.", "",
             table("held-out texts", judges)]
    lines += [table(f"{name} words", rows) for name, rows in tables.items()]
    for policy in dict.fromkeys(row["policy"] for row in samples):
        lines += [f"**{policy}**, words that no training has seen, not picked:", ""]
        of_policy = [row for row in samples if row["policy"] == policy and row["words"] == "unseen"]
        every = max(1, len(of_policy) // 30)
        lines += [f"- {row['prompt']}{row['text']}" for row in of_policy[::every][:30]]
        lines.append("")
    return "\n".join(lines)


def draw_curves(curves, path):
    """The proxy's score and the judge's against KL, along the training of each policy."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, (name, points) in enumerate(curves.items()):
        kl = [point[0] for point in points]
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(kl, [point[column] for point in points], "o-", markersize=3, color=f"C{i}",
                      label=name)
    for axis, name in zip(axes, ("reward model (proxy)", "judge (gold)"), strict=True):
        axis.set_xlabel("KL to the SFT policy, nats a response")
        axis.set_ylabel(f"score of the {name}")
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def write_report(config):
    """Writes out_dir/report.md, report.json, report.png, and report_samples.jsonl."""
    device, autocast = setup(config)
    folder = Path(config.out_dir)
    parts = parts_of(load_puns(config), config.split_seed)
    proxy = load_reward_model(folder / "reward_model" / "ckpt.pt", device)
    gold = load_reward_model(folder / "gold" / "ckpt.pt", device)
    pairs = read_jsonl(folder / "data" / "pairs_test.jsonl")
    quality = {"reward model (proxy)": measure_judge(proxy, parts["test"], pairs, autocast),
               "judge (gold)": measure_judge(gold, parts["test"], pairs, autocast)}
    print(table("held-out texts", quality), flush=True)
    judges = (load_model(folder / "sft" / "ckpt.pt", device), proxy, gold)
    overlap = overlap_with([pun.text for pun in parts["train"]])
    tables, samples = evaluate_policies(config, judges, overlap, autocast)
    # Of PPO alone: what the GAN has kept are verdicts of its discriminator.
    curves = {path.parent.name: training_curve(path, judges, autocast)
              for path in sorted(folder.glob("ppo*/samples.jsonl"))}
    write_jsonl(folder / "report_samples.jsonl", samples)
    write_text(folder / "report.md", page(quality, tables, samples, config))
    report = {"judges": quality, "policies": tables, "curves": curves}
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    draw_curves(curves, folder / "report.png")
    print(f"{folder}/report.md  {folder}/report.json  {folder}/report.png")


STEPS = {"data": write_data, "pairs": write_pairs, "report": write_report}


def main(step: tyro.conf.Positional[Literal["data", "pairs", "report"]],
         config: tyro.conf.OmitArgPrefixes[Config]):
    """One step of the pipeline; see the top of real/people.py."""
    STEPS[step](config)


if __name__ == "__main__":
    command_line(lambda: tyro.cli(main))
