"""
Judged by a language model: which of two puns is better, over any OpenAI-compatible endpoint (vLLM, llama.cpp, ollama, a paid one).

    1. each policy and the SFT model answer the same prompts
    2. every pair is asked in both orders, since judges prefer a place: a policy's point is 1 for a win, 1/2 for a tie, mean of both
    3. win rate = mean over the pairs, with Wilson's 95 % interval; beside it how the judge itself behaves: ties, how often it says
       the same in both orders, how often the text shown first wins (50 % is fair)

    python evaluate.py judge --url http://localhost:8000/v1 --model NAME       every policy in runs/ against runs/sft
    python evaluate.py judge --url ... --model ... --sources A.pt B.pt         these two; or two files of texts

The key comes from the environment, WORDPLAY_API_KEY or OPENAI_API_KEY, and is written nowhere. Every answer is at once kept in
runs/judge.jsonl: a stopped run loses nothing, and what was asked before is not asked again. Only the standard library speaks HTTP
here: one kind of request is not worth a dependency, and the retries have to cover an answer that is no verdict, too.
"""

import concurrent.futures
import email.utils
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common import InputError, bar, read_jsonl, replacing
from label import pairs

QUESTION = """Here are two texts, each an answer to: {prompt}

Text 1: {first}

Text 2: {second}

Which one is the better pun: a phrase that makes sense twice, in good English, and funny? Answer with nothing but 1, 2, or = if
you cannot tell them apart."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args):
        return None


def verdict(text):
    """'1', '2' or '=' from what the judge wrote, '' if that is none. What a model thinks aloud before it answers does not count."""
    lines = re.sub(r"(?s)^.*</think>", "", text).strip().splitlines() or [""]
    found = re.fullmatch(r"(?i)\W*(?:(?:the )?(?:final )?(?:answer|verdict|text|winner)\b(?: is)?[\s:*]*(?:text )?)?(1|2|=|tie)[\s.*\"'`)\]]*",
                         lines[-1])
    return found[1].lower().replace("tie", "=") if found else ""


def wait_of(error, attempt, wait):
    """Seconds to wait before the next attempt: what the server asks for, as seconds or a date, else wait 2^attempt; a minute at most."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    try:
        seconds = float(asked)
    except ValueError:
        date = email.utils.parsedate_tz(asked)
        seconds = email.utils.mktime_tz(date) - time.time() if date else wait * 2 ** attempt * random.uniform(0.5, 1)
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else 60.0


def ask(url, body, key="", timeout=60.0, retries=5, wait=1.0):
    """The text that the endpoint answers. Tries again, with growing waits, after 408, 429, 5xx, a cut connection, a time-out and an
    answer that is none; raises InputError if that does not help, and at once where it cannot (a wrong key, model or address)."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(NoRedirect)
    for attempt in range(retries + 1):
        try:
            with opener.open(request, timeout=timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            if error.code not in (408, 409, 425, 429) and error.code < 500:
                says = error.read(300).decode(errors="replace").replace(key or "\0", "***")
                hint = ": set WORDPLAY_API_KEY or OPENAI_API_KEY" if error.code in (401, 403) else ""
                raise InputError(f"{url}: the server answers {error.code} {error.reason}{hint}; it says: {says!r}") from None
            problem, seconds = f"{error.code} {error.reason}", wait_of(error, attempt, wait)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            problem, seconds = getattr(error, "reason", None) or repr(error), wait_of(error, attempt, wait)
        if attempt < retries:
            tqdm.write(f"{url}: {problem}; again in {seconds:.1f} s", file=sys.stderr)
            time.sleep(seconds)
    raise InputError(f"{url}: gave up after {retries + 1} attempts, the last one: {problem}; the answers so far are kept, "
                     "the same command goes on from them")


class Judge:
    """Asks, and remembers in a file. verdicts(questions) -> a list of '1', '2', '=' or '' (no verdict), one each."""

    def __init__(self, url, model, cache, workers=4, **options):
        if not re.match(r"https?://[^/@]+(/|$)", url):
            raise InputError(f"--url is the address of an endpoint, such as http://localhost:8000/v1, not '{url}'")
        self.url, self.model, self.cache, self.workers, self.options = url, model, Path(cache), workers, options
        self.key = os.environ.get("WORDPLAY_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        self.asked, self.lock = 0, threading.Lock()
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        text = self.cache.read_text(encoding="utf-8") if self.cache.exists() else ""
        if text and not text.endswith("\n"):         # stopped in the middle of a line: that answer is asked for again
            self.cache.write_text(text[:text.rfind("\n") + 1], encoding="utf-8")
        self.known = {row["id"]: row["verdict"] for row in (read_jsonl(self.cache) if text else [])}

    def body(self, question, attempt=0):
        return {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0.0 if not attempt else 0.7}

    def id(self, question):
        return hashlib.sha256(json.dumps([self.url, self.body(question)]).encode()).hexdigest()[:32]

    def judge(self, question):
        """Asks, and keeps the answer. Nonsense is asked again twice, with some chance in it, and then stays without a verdict."""
        for attempt in range(3):
            text = ask(self.url, self.body(question, attempt), self.key, **self.options)
            self.asked += 1
            if found := verdict(text):
                break
        row = {"id": self.id(question), "verdict": found, "model": self.model, "answer": text[-200:]}
        with self.lock, self.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.known[row["id"]] = found

    def verdicts(self, questions):
        missing = [question for question in dict.fromkeys(questions) if self.id(question) not in self.known]
        pool = concurrent.futures.ThreadPoolExecutor(self.workers)
        try:
            running = [pool.submit(self.judge, question) for question in missing]
            for done in bar(concurrent.futures.as_completed(running), "judge", len(running), least=1):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)       # what is under way is still kept
        return [self.known[self.id(question)] for question in questions]

# -----------------------------------------------------------------------------
# the table

def wilson(p, n, z=1.96):
    """(low, high) of Wilson's 95 % interval of a rate p of n trials; with ties, which count half, a little too wide, never too narrow."""
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def summarize(name, verdicts):
    """A row from [(verdict with a shown first, verdict with b shown first)], each '1', '2', '=', or '' which leaves the pair out."""
    both = [pair for pair in verdicts if all(pair)]
    if not both:
        raise InputError(f"{name}: the judge gave no verdict on any of {len(verdicts)} pairs, only other text, see judge.jsonl")
    point = {"1": 1.0, "=": 0.5, "2": 0.0}                     # of the text that was shown first
    wins = [(point[first] + 1 - point[second]) / 2 for first, second in both]
    shown, agreeing = [point[v] for pair in both for v in pair], {("1", "2"), ("2", "1"), ("=", "=")}
    low, high = wilson(sum(wins) / len(wins), len(wins))
    return {"policies": name, "pairs": len(both), "win": sum(wins) / len(wins), "low": low, "high": high,
            "ties": shown.count(0.5) / len(shown), "consistent": sum(pair in agreeing for pair in both) / len(both),
            "first": sum(shown) / len(shown), "no_verdict": len(verdicts) - len(both)}


HEADER = f"{'policies':>24}  pairs  {'win %':>20}  {'ties %':>6}  {'same in both orders %':>21}  {'first shown wins %':>18}"


def format_row(row):
    win = f"{100 * row['win']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return (f"{row['policies']:>24}  {row['pairs']:>5}  {win:>20}  {100 * row['ties']:>6.1f}  {100 * row['consistent']:>21.1f}  "
            f"{100 * row['first']:>18.1f}" + f"   ({row['no_verdict']} pairs without a verdict)" * bool(row["no_verdict"]))


def judge(url: str, model: str, sources: tuple[str, ...] = (), reference: str = "runs/sft/ckpt.pt", out_dir: str = "runs",
          n: int = 100, data: str = "", seed: int = 0, workers: int = 4, timeout: float = 60.0):
    """Win rates by a language model's judgement. sources: two checkpoints or two files; none: every policy in out_dir against the
    reference. n: pairs a policy, each asked twice. data: a file of prompts for the checkpoints. workers: requests at a time."""
    judged = Judge(url, model, Path(out_dir) / "judge.jsonl", workers, timeout=timeout)
    if len(sources) not in (0, 2):
        raise InputError("--sources names two checkpoints or two files, or nothing for all policies against the reference")
    policies = [path for path in sorted(Path(out_dir).glob("*/ckpt.pt")) if path.parent.name not in ("sft", "reward_model", "discriminator")]
    matches = [sources] if sources else [(str(path), reference) for path in policies]
    if not matches:
        raise InputError(f"{out_dir}: no policy's ckpt.pt in there; name two --sources")
    print(HEADER)
    rows = []
    for a, b in matches:
        shown = list(itertools.islice(pairs(a, b, seed, data), n))
        questions = [QUESTION.format(prompt=prompt.strip(), first=x.strip(), second=y.strip())
                     for prompt, *texts in shown for x, y in (texts, texts[::-1])]
        found = judged.verdicts(questions)
        name, against = (Path(path).parent.name if path.endswith(".pt") else Path(path).name for path in (a, b))
        rows.append(summarize(f"{name} : {against}", list(zip(found[::2], found[1::2], strict=True))))
        print(format_row(rows[-1]), flush=True)
    with replacing(Path(out_dir) / "judge.json") as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{judged.asked} requests; {out_dir}/judge.json; the answers are in {judged.cache}")
    return rows
