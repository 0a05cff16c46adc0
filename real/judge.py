"""
A language model as the judge: which of two puns is better? Over any OpenAI-compatible endpoint.

    1. each policy and the SFT model answer the same prompts
    2. every pair is asked in both orders, since judges prefer a position: a win is 1 point, a tie
       1/2, and a pair counts the mean of both orders
    3. win rate = mean over the pairs, with Wilson's 95 % interval; beside it, how the judge itself
       behaves: ties, how often both orders agree, how often the first text wins (50 % is fair)

    python -m real.judge --url http://localhost:8000/v1 --model NAME        all policies in runs/
    python -m real.judge --url ... --model ... --sources a.pt b.pt          these two
    python -m real.judge --url ... --model ... --sources a.jsonl b.jsonl    two files of texts

The key comes from the environment, WORDPLAY_API_KEY or OPENAI_API_KEY. It is written nowhere and
sent to no other host. Every answer is kept at once in runs/judge.jsonl, so a stopped run loses
nothing and no question is asked twice.
"""

import concurrent.futures
import hashlib
import itertools
import json
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import requests
import tyro
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from common import InputError, command_line, progress_bar, read_jsonl, write_text
from real.label import pairs, wilson
from sample import find_policies

QUESTION = """Here are two texts, each an answer to: {prompt}

Text 1: {first}

Text 2: {second}

Which one is the better pun: a phrase that makes sense twice, in good English, and funny? Answer \
with nothing but 1, 2, or = if you cannot tell them apart."""

# A line that is a verdict and nothing more: `2`, `**Text 1**`, `The final answer is: =`.
VERDICT = re.compile(r"\W*((the )?(final )?(answer|verdict|text|winner)\b( is)?[\s:*]*(text )?)?"
                     r"(?P<verdict>1|2|=|tie)[\s.*\"'`)\]]*", re.IGNORECASE)

# -----------------------------------------------------------------------------
# the endpoint

def connect(key, workers, retries=5, wait=1.0):
    """A session that sends the key and retries what may pass: a busy or broken server, a cut
    connection, a time-out. wait: seconds before the second retry; they double each time."""
    retry = Retry(
        total=retries, backoff_factor=wait / 2, backoff_jitter=wait / 2, backoff_max=60,
        retry_after_max=60, allowed_methods=["POST"], raise_on_status=False,
        status_forcelist=[408, 409, 425, 429, *range(500, 600)])
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=workers))

    def add_key(request):
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    session.auth = add_key      # without it, requests would look for a password in ~/.netrc
    # Otherwise each retry is a line among those of the progress bar.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return session


def verdict_in(text):
    """'1', '2' or '=' in the last line of what the judge wrote; '' if there is none.

    What a model thinks aloud before it answers does not count."""
    text = re.sub(r"(?s)^.*</think>", "", text).strip()
    match = VERDICT.fullmatch(text.splitlines()[-1]) if text else None
    if match is None:
        return ""
    return "=" if match["verdict"].lower() == "tie" else match["verdict"]


class Judge:
    """Asks an endpoint, and remembers its verdicts in a file."""

    def __init__(self, url, model, cache, workers=4, timeout=60.0, **retries):
        """cache: path of the file. retries: see connect(). Raises InputError if url is none."""
        if not re.match(r"https?://[^/@]+(/|$)", url):
            raise InputError("--url is the address of an endpoint, such as "
                             f"http://localhost:8000/v1, not '{url}'")
        self.url, self.model, self.cache = url, model, Path(cache)
        self.workers, self.timeout = workers, timeout
        self.key = os.environ.get("WORDPLAY_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        self.session = connect(self.key, workers, **retries)
        self.n_requests, self.lock = 0, threading.Lock()
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        text = self.cache.read_text(encoding="utf-8") if self.cache.exists() else ""
        if not text.endswith("\n"):
            # Stopped in the middle of a line: that question is asked again.
            self.cache.write_text(text[:text.rfind("\n") + 1], encoding="utf-8")
        self.verdict_of = {row["id"]: row["verdict"] for row in read_jsonl(self.cache)}

    def body(self, question):
        return {"model": self.model, "messages": [{"role": "user", "content": question}],
                "temperature": 0.0}

    def id(self, question):
        content = json.dumps([self.url, self.body(question)])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def ask(self, question):
        """The text that the endpoint answers. Raises InputError if it cannot be had."""
        for _ in range(3):
            try:
                # A redirect would carry the key to another host.
                response = self.session.post(
                    self.url.rstrip("/") + "/chat/completions", timeout=self.timeout,
                    json=self.body(question), allow_redirects=False)
            except requests.exceptions.ChunkedEncodingError as error:   # an answer was cut off
                problem = error
                continue
            except requests.RequestException as error:
                problem = getattr(error.args[0], "reason", error) if error.args else error
                break
            if response.status_code != 200:
                advice = ""
                if response.status_code in (401, 403):
                    advice = ": set WORDPLAY_API_KEY or OPENAI_API_KEY"
                says = response.text.replace(self.key or "\0", "***")
                problem = (f"the server answers {response.status_code} {response.reason}{advice}; "
                           f"it says: {says[:300]!r}")
                break
            try:
                return str(response.json()["choices"][0]["message"]["content"] or "")
            except (ValueError, LookupError, TypeError) as error:
                problem = f"the answer is no chat completion ({error!r})"
        raise InputError(f"{self.url}: gave up: {problem}; the answers so far are kept, and the "
                         "same command continues from them")

    def judge(self, question):
        """Asks one question and keeps the verdict, '' if the answer is other text."""
        text = self.ask(question)
        row = {"id": self.id(question), "verdict": verdict_in(text), "model": self.model,
               "answer": text[-200:]}
        with self.lock, self.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            self.n_requests += 1
        self.verdict_of[row["id"]] = row["verdict"]

    def verdicts(self, questions):
        """'1', '2', '=' or '' (no verdict) of each question."""
        new = [question for question in dict.fromkeys(questions)
               if self.id(question) not in self.verdict_of]
        pool = concurrent.futures.ThreadPoolExecutor(self.workers)
        try:
            running = [pool.submit(self.judge, question) for question in new]
            finished = concurrent.futures.as_completed(running)
            for future in progress_bar(finished, "judge", len(running)):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)      # questions under way are still kept
        return [self.verdict_of[self.id(question)] for question in questions]

# -----------------------------------------------------------------------------
# the table

def summarize(name, verdicts):
    """One row of the table.

    verdicts: for each pair (verdict with a shown first, verdict with b shown first). A pair with
    an empty verdict is left out. Raises InputError if none is left."""
    points = {"1": 1.0, "=": 0.5, "2": 0.0}         # of the text that was shown first
    kept = [(points[a_first], points[b_first]) for a_first, b_first in verdicts
            if a_first and b_first]
    if not kept:
        raise InputError(f"{name}: the judge gave no verdict on any of {len(verdicts)} pairs, "
                         "only other text; see judge.jsonl")
    n = len(kept)
    win = sum((a_first + 1 - b_first) / 2 for a_first, b_first in kept) / n         # of a
    low, high = wilson(win, n)
    first = [point for pair in kept for point in pair]
    return {"policies": name, "pairs": n, "win": win, "low": low, "high": high,
            "ties": first.count(0.5) / len(first),
            "consistent": sum(a_first == 1 - b_first for a_first, b_first in kept) / n,
            "first": sum(first) / len(first), "no_verdict": len(verdicts) - n}


HEADER = ("pairs  no verdict                 win %  ties %  same in both orders %  "
          "first shown wins %  policies")


def format_row(row):
    win = f"{100 * row['win']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return (f"{row['pairs']:>5}  {row['no_verdict']:>10}  {win:>20}  {100 * row['ties']:>6.1f}  "
            f"{100 * row['consistent']:>21.1f}  {100 * row['first']:>18.1f}  {row['policies']}")


@dataclass(slots=True)
class Config:
    url: str                    # of the endpoint, such as http://localhost:8000/v1
    model: str                  # the judge's name there
    sources: tuple[str, ...] = ()   # two checkpoints, or two files; () is every policy in out_dir
    reference: str = "runs/sft/ckpt.pt"     # what these policies are compared with
    out_dir: str = "runs"
    n: int = 100                # pairs of each policy, each asked twice
    data: str = ""              # JSONL of prompts for checkpoints; see real/label.py
    seed: int = 0               # of the samples
    workers: int = 4            # requests at a time
    timeout: float = 60.0       # seconds to wait for an answer


def matches(config):
    """[(source, source)] to compare. Without --sources: every other policy and the reference."""
    if len(config.sources) == 2:
        return [config.sources]
    if config.sources:
        raise InputError("--sources names two checkpoints or two files; without it every policy "
                         "is compared with the reference")
    found = [(str(path), config.reference) for path in find_policies(config.out_dir)
             if path.resolve() != Path(config.reference).resolve()]
    if not found:
        raise InputError(f"{config.out_dir}: there is no policy but the reference; train one")
    return found


def main(config):
    """Writes out_dir/judge.json. Returns its rows. Raises InputError for unusable input."""
    cache = Path(config.out_dir, "judge.jsonl")
    judge = Judge(config.url, config.model, cache, config.workers, config.timeout)
    compared = matches(config)
    print(HEADER)
    rows = []
    for a, b in compared:
        questions = []
        for prompt, x, y in itertools.islice(pairs(a, b, config.data, config.seed), config.n):
            for first, second in ((x, y), (y, x)):
                questions.append(QUESTION.format(
                    prompt=prompt.strip(), first=first.strip(), second=second.strip()))
        verdicts = judge.verdicts(questions)
        both_orders = list(zip(verdicts[::2], verdicts[1::2], strict=True))
        rows.append(summarize(f"{a} : {b}", both_orders))
        print(format_row(rows[-1]), flush=True)
    path = Path(config.out_dir, "judge.json")
    write_text(path, json.dumps(rows, indent=1) + "\n")
    print(f"{judge.n_requests} requests; the table is in {path}, the answers are in {cache}")
    return rows


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Config)))
