"""
Texts that people wrote and judged: one door, read_records(), to files of all these formats, and splits without twins.

    format    what it is                                                         records
    trl       JSONL of your own: prompt + completion (+ label or rating),        as they are; a conversation becomes a transcript
              prompt + chosen + rejected (+ margin, share), chosen + rejected,
              prompt + ranked, prompt, text, messages
    text      plain text, one text a line                                        prompt, completion
    hh        Anthropic HH-RLHF, .jsonl or .jsonl.gz                             prompt, chosen, rejected
    shp       Stanford Human Preferences                                         prompt, chosen, rejected, margin = log(score_ratio)
    openai    OpenAI summarize-from-feedback, comparisons                        prompt, chosen, rejected
    semeval   SemEval-2017 task 7, a folder of XML and gold files                Pun (realpuns.py)
    expun     ExPUNations, joined with SemEval by id                             Pun, with ratings

A broken file (bad JSON, bad UTF-8, a wrong field) is an InputError with file and line. A record that cannot be used (an empty
answer, chosen equal to rejected, too long) is an error in a file of your own; in the public sets, where some are normal, it is
dropped and counted.
"""

import collections
import gzip
import itertools
import json
import math
import os
import re
import sys
import xml.etree.ElementTree
import zlib
from pathlib import Path
from typing import NamedTuple

import tyro

from common import InputError, bar
from realpuns import PROMPT, Pun, completion, detokenise, lemmas, preferences

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Corpus(NamedTuple):
    format: str
    records: list
    dropped: dict                 # {why: [where, ...]}


class Sieve:
    """What all loaders ask of a record. Refuses what does not pass (strict), or drops and counts it."""

    def __init__(self, strict=True, block_size=0, encode=str.split):
        self.strict, self.block_size, self.encode, self.dropped = strict, block_size, encode, collections.defaultdict(list)

    def drop(self, where, why):
        if self.strict:
            raise InputError(f"{where}: {why}")
        self.dropped[why].append(where)

    def fits(self, prompt, *answers):
        """Do prompt and longest answer fit the block, with an end token?"""
        longest = max((len(self.encode(answer)) + 1 for answer in answers), default=0)
        return not self.block_size or len(self.encode(prompt)) + longest <= self.block_size

    def keep(self, where, prompt, *answers):
        """True if the record can be used; otherwise refuses or drops it."""
        if not prompt.strip():
            why = "the prompt is empty"
        elif not all(answer.strip() for answer in answers):
            why = "an answer is empty"
        elif len({answer.strip() for answer in answers}) < len(answers):
            why = "chosen and rejected are the same text" if len(answers) == 2 else "two of the ranked answers are the same text"
        elif not self.fits(prompt, *answers):
            why = f"longer than the block of {self.block_size} tokens"
        else:
            return True
        self.drop(where, why)
        return False

# -----------------------------------------------------------------------------
# reading lines and objects

def read_lines(path):
    """Yields ("file:line", text) for each line that is not blank, of a plain or gzipped file."""
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for n, line in enumerate(file, 1):
                if n == 1 and line.startswith(b"version https://git-lfs"):
                    raise InputError(f"{path}:1: this is a git-lfs pointer, not the data; run: git lfs pull")
                try:
                    text = line.decode("utf-8-sig" if n == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}:{n}: this line is not UTF-8 (byte {error.start + 1})") from None
                if text.strip():
                    yield f"{path}:{n}", text
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_json(where, text):
    try:
        return json.loads(text, parse_constant=lambda name: json.loads(f"no number: {name}"))      # NaN, Infinity
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", 1) > 1 else ""
        raise InputError(f"{where}{line}: not JSON: {getattr(error, 'msg', error)}") from None


NUMBER = (int, float)


def need(where, row, fields):
    """Raises InputError unless `row` is an object that has the fields, each of its type."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object")
    for field, kind in fields.items():
        if not isinstance(row.get(field), kind) or isinstance(row[field], bool) and kind is not bool:
            kinds = {str: "text", int: "a whole number", NUMBER: "a number", bool: "true or false", list: "a list", dict: "an object"}
            raise InputError(f"{where}: '{field}' " + (f"is not {kinds[kind]}" if field in row else "is missing"))
    return row


def read_objects(path, fields):
    for where, line in read_lines(path):
        yield where, need(where, parse_json(where, line), fields)

# -----------------------------------------------------------------------------
# preferences and completions

def transcript(where, messages):
    """A list of {role, content} as the text of a dialogue, in the form of HH-RLHF; a system message has no name."""
    text = ""
    for message in messages:
        need(where, message, {"role": str, "content": str})
        if message["role"] not in ("system", "user", "assistant"):
            raise InputError(f"{where}: the role '{message['role']}' is not system, user or assistant")
        text += {"system": "", "user": HUMAN + " ", "assistant": ASSISTANT + " "}[message["role"]] + message["content"]
    return text


def split_prompt(chosen, rejected):
    """(prompt, chosen, rejected) of two texts that begin alike. The prompt ends where the assistant's turn begins that both share,
    else after a whole word: `Why? Hello.` and `Why? Hey.` give `Why?`, ` Hello.`, ` Hey.`"""
    common = os.path.commonprefix([chosen, rejected])
    cut = common.rfind(ASSISTANT) + len(ASSISTANT)
    if cut < len(ASSISTANT):
        cut = max((match.start() for match in re.finditer(r"\s+", common)), default=0)
    return common[:cut], chosen[cut:], rejected[cut:]


def load_hh(path, sieve):
    for where, row in read_objects(path, {"chosen": str, "rejected": str}):
        prompt, chosen, rejected = split_prompt(row["chosen"], row["rejected"])
        if not prompt.endswith(ASSISTANT):
            sieve.drop(where, "the two dialogues share no turn of the assistant")
        elif any(turn in answer for turn in (HUMAN, ASSISTANT) for answer in (chosen, rejected)):
            sieve.drop(where, "the dialogues part before the last answer")
        elif sieve.keep(where, prompt, chosen, rejected):
            yield where, {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def load_shp(path, sieve):
    """As its card advises: the better comment has at least twice the score of the other, and of a post come at most 5 pairs."""
    posts = collections.Counter()
    for where, row in read_objects(path, {"post_id": str, "history": str, "human_ref_A": str, "human_ref_B": str, "labels": int,
                                          "score_ratio": NUMBER}):
        if row["labels"] not in (0, 1) or row["score_ratio"] < 1:
            raise InputError(f"{where}: 'labels' is 1 (A is better) or 0 (B is), and 'score_ratio' is at least 1")
        a, b = " " + row["human_ref_A"].strip(), " " + row["human_ref_B"].strip()
        chosen, rejected = (a, b) if row["labels"] == 1 else (b, a)
        prompt = f"{HUMAN} {row['history']}{ASSISTANT}"
        if row["score_ratio"] < 2:
            sieve.drop(where, "score_ratio is under 2")
        elif posts[row["post_id"]] == 5:
            sieve.drop(where, "more than 5 pairs of one post")
        elif sieve.keep(where, prompt, chosen, rejected):
            posts[row["post_id"]] += 1
            yield where, {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": math.log(row["score_ratio"])}


def load_openai(path, sieve):
    """A post that is too long loses lines at its end."""
    for where, row in read_objects(path, {"info": dict, "summaries": list, "choice": int}):
        if row["choice"] not in (0, 1) or len(row["summaries"]) != 2:
            raise InputError(f"{where}: a comparison has two 'summaries' and a 'choice' of 0 or 1")
        answers = [" " + need(where, summary, {"text": str})["text"].strip() for summary in row["summaries"]]
        if "article" in row["info"]:
            head, text = "Article:\n\n", need(where, row["info"], {"article": str})["article"]
        else:
            info = need(where, row["info"], {"subreddit": str, "title": str, "post": str})
            head, text = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: ", info["post"]
        while not sieve.fits(f"{head}{text}\n\nTL;DR:", *answers) and "\n" in text:
            text = text.rpartition("\n")[0]
        if sieve.keep(where, f"{head}{text}\n\nTL;DR:", *answers):
            chosen = answers.pop(row["choice"])
            yield where, {"prompt": f"{head}{text}\n\nTL;DR:", "chosen": chosen, "rejected": answers[0]}


TEXTS = ("prompt", "completion", "chosen", "rejected")
SHAPES = [set(shape.split()) for shape in ("prompt completion", "prompt completion label", "prompt completion rating",
                                           "prompt chosen rejected", "chosen rejected", "prompt ranked", "prompt", "text", "messages")]


def load_trl(path, sieve):
    """All lines of a file have one shape. Beside it stand id, and in pairs margin (by how much) and share (of the raters who agree)."""
    first = None
    for where, row in read_objects(path, {}):
        shape = set(row) - {"id"} - ({"margin", "share"} if "chosen" in row else set())
        first = first or shape
        if shape not in SHAPES:
            raise InputError(f"{where}: {' + '.join(sorted(row)) or 'no field at all'} is no shape of a record; known are "
                             + ", ".join(" + ".join(sorted(known)) for known in SHAPES))
        if shape != first:
            raise InputError(f"{where}: this line has {' + '.join(sorted(shape))}, the file began with {' + '.join(sorted(first))}")
        record = dict(need(where, row, {name: kind for name, kind in dict(
            margin=NUMBER, share=NUMBER, rating=NUMBER, label=bool, ranked=list, text=str, messages=list).items() if name in row}))
        if not 0.5 <= record.get("share", 1) <= 1:
            raise InputError(f"{where}: 'share' is from .5 (a tie) to 1")
        if "text" in row:
            record = {"prompt": PROMPT, "completion": " " + row["text"].strip()}
        elif "messages" in row:
            record = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for name in TEXTS:
            if isinstance(record.get(name), list):      # a conversation; "prompt" comes first, the answers go on from it
                record[name] = transcript(where, record[name]) + (ASSISTANT if name == "prompt" else "")
                if name != "prompt" and "prompt" in record:
                    if not record[name].startswith(ASSISTANT):
                        raise InputError(f"{where}: '{name}' does not begin with a message of the assistant")
                    record[name] = record[name].removeprefix(ASSISTANT)
        need(where, record, {name: str for name in TEXTS if name in record})
        if "prompt" not in record:
            record["prompt"], record["chosen"], record["rejected"] = split_prompt(record["chosen"], record["rejected"])
        if "ranked" in record and (len(record["ranked"]) < 2 or not all(isinstance(text, str) for text in record["ranked"])):
            raise InputError(f"{where}: 'ranked' is a list of two texts or more, best first")
        if sieve.keep(where, *(record[name] for name in TEXTS if name in record), *record.get("ranked", [])):
            yield where, record


def load_text(path, sieve):
    for where, line in read_lines(path):
        if sieve.keep(where, PROMPT, line):
            yield where, {"prompt": PROMPT, "completion": " " + line.strip()}

# -----------------------------------------------------------------------------
# SemEval-2017 task 7 and ExPUNations

def load_semeval(path, sieve):
    """path: the folder of the XML and gold files, or one above it, or one of these files. Prefers the test data to the trial."""
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.rglob("subtask1-*graphic-*.xml"))
    found = [file for file in found if file.name.endswith("-test.xml")] or found
    if not found:
        raise InputError(f"{path}: no subtask1-homographic-test.xml or subtask1-heterographic-test.xml in there")
    if len({file.name for file in found}) < len(found):
        raise InputError(f"{path}: holds {found[0].name} more than once: name the folder of one of them")
    for file in found:
        kind = file.name.split("-")[1]
        try:
            texts = {text.get("id"): list(text.iter("word")) for text in xml.etree.ElementTree.parse(file).iter("text")}
        except (OSError, ValueError, LookupError, xml.etree.ElementTree.ParseError) as error:
            raise InputError(f"{file}:{getattr(error, 'position', (1,))[0]}: not XML: {error}") from None
        gold = file.with_suffix(".gold")
        is_pun, pun_words, senses = (
            dict(read_gold(gold.with_name(gold.name.replace("subtask1", f"subtask{n}")), n)) for n in (1, 2, 3))
        for name, words in texts.items():
            where, ids = f"{file} ({name})", [word.get("id") for word in words]
            if name not in is_pun or is_pun[name][0] not in ("0", "1"):
                raise InputError(f"{where}: the gold file of subtask 1 has no line with 0 or 1 for this text")
            text, spans = detokenise([word.text or "" for word in words])
            pun = Pun(name, text, kind, is_pun[name][0] == "1")
            if pun.is_pun and name in pun_words:
                word = pun_words[name][0]
                if word not in ids:
                    raise InputError(f"{where}: the pun word {word} of subtask 2 is no word of this text")
                start, end = spans[ids.index(word)]
                pun = pun._replace(span=(start, end), pun_word=text[start:end])
                if word in senses:
                    lemma, alternative = lemmas(pun.pun_word, *senses[word])
                    pun = pun._replace(pun_lemma=lemma, alt_word=alternative)
            if pun.is_pun and not pun.pun_word:
                sieve.drop(where, "a pun whose word is not known")
            elif sieve.keep(where, PROMPT, text):
                yield where, pun


def read_gold(path, subtask):
    """Yields (first field, the other fields) of each line."""
    for where, line in read_lines(path):
        fields = line.split()
        if len(fields) != max(subtask, 2) or subtask == 3 and not all("%" in key for keys in fields[1:] for key in keys.split(";")):
            raise InputError(f"{where}: not a gold line of subtask {subtask}, such as "
                             + ("hom_1 1", "hom_1 hom_1_7", "hom_1_7 bank%1:14:00:: bank%1:17:01::")[subtask - 1])
        yield fields[0], fields[1:]


def load_expun(path, sieve, semeval=""):
    """path: expunations_annotated_full.json or ..._pilot_100.json, or a folder with the former. semeval: where the texts are;
    '' looks for a folder semeval* beside the file or up to two levels above."""
    if path.is_dir():
        found = sorted(path.rglob("expunations_annotated_full.json"))
        if len(found) != 1:
            raise InputError(f"{path}: holds {len(found)} files expunations_annotated_full.json: name the one to read")
        path = found[0]
    near = [place for folder in path.absolute().parents[:3] for place in sorted(folder.glob("semeval*")) if place.is_dir()]
    semeval = Path(semeval or [*near, "semeval"][0])
    if not semeval.exists():
        raise InputError(f"{path}: has no texts; they are SemEval's, and no {semeval} lies near it (python data.py fetch semeval)")
    puns = {pun.id: pun for pun in load(semeval, "semeval").records}
    rows = parse_json(path, "\n".join(line for _, line in read_lines(path)))
    if not isinstance(rows, list):
        raise InputError(f"{path}: not a JSON list of ExPUNations")
    for i, row in enumerate(rows, 1):
        where = f"{path}: record {i}"
        raters = need(where, row, {"ID": str, "Annotator_IDs": list, "Funniness (1-5)": list})["Annotator_IDs"]
        where, pilot = f"{where} ({row['ID']})", "Is a Joke?" not in row
        votes = {name: need(where, row, {name: list})[name] for name in (
            "Funniness (1-5)", "Offensive/Inappropriate?", "Joke keywords", "Natural language explanation",
            "Annotator_IDs" if pilot else "Is a Joke?")}
        for name, values in votes.items():
            if len(values) != len(raters) or not raters:
                raise InputError(f"{where}: '{name}' has {len(values)} entries for {len(raters)} raters")
        if any(type(rating) is not int or not 0 <= rating <= 5 for rating in votes["Funniness (1-5)"]):
            raise InputError(f"{where}: a funniness is a whole number from 0 to 5")
        named = collections.Counter(word for words in votes["Joke keywords"]             # a plain word now and then, in the pilot
                                    for word in {w.strip().lower() for w in ([words] if isinstance(words, str) else words)} - {""})
        offended = [str(vote) for vote in votes["Offensive/Inappropriate?"] if str(vote) in ("0", "1")]    # "" is no answer
        by_rater = sorted(zip(raters, votes["Funniness (1-5)"], strict=True))
        if row["ID"] not in puns:
            sieve.drop(where, "its text is not in SemEval's files")
        elif sieve.keep(where, PROMPT, puns[row["ID"]].text):
            yield where, puns[row["ID"]]._replace(
                part="pilot" if pilot else "full", raters=tuple(r for r, _ in by_rater), ratings=tuple(f for _, f in by_rater),
                is_joke_rate=None if pilot else votes["Is a Joke?"].count(1) / len(raters),
                offensive_rate=offended.count("1") / max(len(offended), 1),
                keywords=tuple(word for word, n in named.items() if n > 1),
                explanations=tuple(text.strip() for text in votes["Natural language explanation"] if text.strip()))

# -----------------------------------------------------------------------------
# any format

LOADERS = {"trl": load_trl, "text": load_text, "hh": load_hh, "shp": load_shp, "openai": load_openai, "semeval": load_semeval,
           "expun": load_expun}
OWN = ("trl", "text")     # files of one's own, where a record that cannot be used is a mistake


def recognise(path):
    """The format of a file or folder, from names and the first record. Raises InputError if it looks like none."""
    if path.is_dir():
        for format, pattern in (("semeval", "subtask1-*graphic-*.xml"), ("expun", "expunations_annotated_full.json")):
            if next(path.rglob(pattern), None):
                return format
        files = ", ".join(sorted(file.name for file in path.iterdir())[:8])
        raise InputError(f"{path}: neither SemEval nor ExPUNations lies in this folder, but {files or 'nothing'}: name one file "
                         "(training and test files are to stay apart)")
    if re.match(r"subtask\d-.*\.(xml|gold)$", path.name):
        return "semeval"
    where, line = next(read_lines(path), (path, ""))
    if line.startswith("[") and path.name.endswith(".json"):
        return "expun"
    if not line.startswith("{"):
        if ".json" in path.name or not line:
            raise InputError(f"{where}: " + ("not a JSON object" if line else "no records, this file is empty"))
        return "text"
    row = need(where, parse_json(where, line), {})
    if set(row) == {"chosen", "rejected"} and all(isinstance(text, str) and text.startswith(HUMAN) for text in row.values()):
        return "hh"
    return "shp" if "human_ref_A" in row else "openai" if "summaries" in row else "trl"


def load(path, format="", block_size=0, encode=str.split, strict=None, **options):
    """Corpus(format, records, dropped) of a file or folder. Raises InputError with file and line where something is wrong.

    format: '' recognizes it. block_size: no record is longer, counted by `encode`; 0 is no limit. strict: refuse what cannot be
    used instead of dropping it; None is strict with one's own files. options: those of the format's loader."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: cannot be read: no such file or folder")
    if format not in ("", *LOADERS):
        raise InputError(f"--format is one of {', '.join(LOADERS)}, not '{format}'")
    format = format or recognise(path)
    if path.is_dir() and format not in ("semeval", "expun"):
        raise InputError(f"{path}: is a folder; --format {format} reads a file")
    sieve = Sieve(format in OWN if strict is None else strict, block_size, encode)
    records = [record for _, record in LOADERS[format](path, sieve, **options)]
    if not records and not sieve.dropped:
        raise InputError(f"{path}: no records")
    return Corpus(format, records, dict(sieve.dropped))

# -----------------------------------------------------------------------------
# what a stage takes

WANTED = {"completion": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected"), "ranking": ("prompt", "ranked"),
          "rating": ("prompt", "completion", "rating"), "prompt": ("prompt",), "any": ("prompt",)}


def reshape(records, shape):
    """The records as a stage wants them, one of WANTED; those that have not what it takes are left out.

    completion: of a comparison the chosen text, of labelled texts the good ones. preference: of labelled texts each good one with a
    bad one of its prompt. any: as they are. Puns of SemEval and ExPUNations: see realpuns.py."""
    if records and isinstance(records[0], Pun):
        if shape == "preference":
            return preferences(records)
        if shape == "rating":
            return [{"prompt": PROMPT, "completion": " " + pun.text, "rating": pun.funniness} for pun in records if pun.ratings]
        puns = [pun for pun in records if pun.is_pun]
        records = [{"prompt": PROMPT, "completion": " " + pun.text} if shape == "any" else completion(pun) for pun in puns]
    if shape == "any":
        return records
    if shape == "completion":
        best = [(record, record.get("completion") or record.get("chosen") or record.get("ranked", [""])[0]) for record in records]
        return [{"prompt": record["prompt"], "completion": text} for record, text in best if text and record.get("label", True)]
    if shape == "preference" and records and "label" in records[0]:
        sides = collections.defaultdict(lambda: ([], []))
        for record in records:
            sides[record["prompt"]][not record["label"]].append(record["completion"])
        return [{"prompt": prompt, "chosen": good, "rejected": bad}
                for prompt, side in sides.items() for good, bad in zip(*side, strict=False)]
    fields = WANTED[shape] + (("margin", "share") if shape == "preference" else ())
    return [{name: record[name] for name in fields if name in record} for record in records if record.keys() >= set(WANTED[shape])]


def read_records(path, shape, tok=None, block_size=0, held_out=0.0):
    """The records of a file of any format, as one of WANTED; with held_out (train, test), no text of test having a twin in train.

    tok, block_size: what does not fit is refused or dropped, as the format has it. Raises InputError with file, line and reason."""
    corpus = load(path, block_size=block_size, **({"encode": tok.encode} if tok else {}))
    for why, places in corpus.dropped.items():
        print(f"{path}: dropped {len(places)} of {len(places) + len(corpus.records)} records: {why}")
    parts = [reshape(part, shape) for part in (split(corpus.records, held_out) if held_out else [corpus.records])]
    if not any(parts):
        has = " + ".join(corpus.records[0]) if corpus.records and isinstance(corpus.records[0], dict) else "nothing that fits"
        raise InputError(f"{path}: no records of {' + '.join(WANTED[shape])}; it has {has}")
    if block_size and corpus.format in ("semeval", "expun"):      # their prompts are made here
        fits = Sieve(True, block_size, tok.encode).fits
        kept = [[record for record in part if fits(*(record[name] for name in TEXTS if name in record))] for part in parts]
        if too_long := sum(map(len, parts)) - sum(map(len, kept)):
            print(f"{path}: dropped {too_long} of {sum(map(len, parts))} records: with their prompt longer than the block of {block_size} tokens")
        parts = kept
    if shape == "ranking" and len({len(record["ranked"]) for part in parts for record in part}) > 1:
        raise InputError(f"{path}: all records must rank equally many completions")
    if held_out and not all(parts):                               # too few groups of near-duplicates to part them
        records = parts[0] + parts[1]
        cut = len(records) - max(1, round(held_out * len(records)))
        parts = [records[:cut], records[cut:]]
    return (parts[0], parts[1][:1000]) if held_out else parts[0]

# -----------------------------------------------------------------------------
# splits without twins

def words_of(text):
    """The words of a text as a set: lower case, no punctuation."""
    return set(re.findall(r"[^\W_]+", text.lower().replace("'", "")))


def group(texts_of_records, threshold=0.45, rarest=16):
    """A group number for each record, given as the list of its texts: near-duplicates share one, and so do *their* near-duplicates.

    Two texts are near-duplicates if the words they share weigh at least `threshold` of all their words, each weighing log((N+1)/n)
    where n of the N texts have it: so two jokes of one template are no twins, but one joke told twice is. If the words of a text
    are sorted by rarity, the first shared one must come before the rest is too light to reach the threshold (prefix filtering), so
    that only texts with a rare word in common need to be compared. Of long texts only the `rarest` words are looked up: exact up to
    about 30 words, a very good guess beyond. Union-find joins the pairs. Nothing is random."""
    parent, owners, count = list(range(len(texts_of_records))), {}, collections.Counter()

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(i, j):
        a, b = sorted((root(i), root(j)))
        parent[b] = a

    for i, texts in enumerate(texts_of_records):
        for text in set(texts):
            join(i, owners.setdefault(text, i))          # an exact duplicate is looked at once
    sets = [words_of(text) for text in owners]
    count = collections.Counter(itertools.chain.from_iterable(sets))
    weight = {word: math.log((len(sets) + 1) / n) for word, n in count.items()}
    total, owner = [sum(weight[word] for word in words) for words in sets], list(owners.values())
    holders = collections.defaultdict(list)     # word: the texts before this one that have it among their first
    for k, words in enumerate(bar(sets, "twins", len(sets), least=5000)):
        first, rest = [], total[k]
        for word in sorted(words, key=lambda word: (count[word], word)):
            if rest < threshold * total[k] - 1e-9 or len(first) == rarest:
                break
            first.append(word)
            rest -= weight[word]
        for j in {j for word in first for j in holders[word]}:
            if root(owner[j]) != root(owner[k]) and min(total[k], total[j]) >= threshold * max(total[k], total[j]) - 1e-9:
                shared = sum(weight[word] for word in words & sets[j])
                if shared >= threshold * (total[k] + total[j] - shared) - 1e-9:
                    join(owner[j], owner[k])
        for word in first:
            holders[word].append(k)
    return [root(i) for i in range(len(parent))]


def texts_of(record):
    """The texts that make a record a twin of another: prompt with answer, and a long prompt by itself."""
    if isinstance(record, Pun):
        return [record.text]
    prompt = record["prompt"]
    whole = [prompt + text for text in [record[name] for name in TEXTS[1:] if name in record] + record.get("ranked", [])]
    return whole + ([prompt] if len(prompt.split()) >= 8 or not whole else [])


def split(records, share=0.1, seed=0):
    """(train, test) of the records, about `share` of them in test, whole groups of near-duplicates only (of more than
    20,000 records: whole groups of one text or one long prompt). The groups with the smallest checksums go to test: fixed, and hardly moved by
    records that are added."""
    texts = [texts_of(record) for record in records]
    numbers = group(texts) if len(records) <= 20_000 else [text[-1] for text in texts]
    groups = collections.defaultdict(list)
    for i, number in enumerate(numbers):
        groups[number].append(i)
    members = sorted(groups.values(), key=lambda rows: min(
        zlib.crc32(f"{seed}|{text}".encode(errors="replace")) for i in rows for text in texts[i]))
    test = set()
    for rows in members:
        if len(test) + len(rows) / 2 >= share * len(records):
            break
        test.update(rows)
    return [record for i, record in enumerate(records) if i not in test], [records[i] for i in sorted(test)]

# -----------------------------------------------------------------------------
# the command line

def show(path: tyro.conf.Positional[Path], format: str = "", semeval: str = "", n: int = 3, block_size: int = 0,
         tokenizer: str = "puns"):
    """What a loader makes of a file or folder: counts, lengths, duplicates, what it dropped and why, the first n records.
    format: if it is not recognized. semeval: where ExPUNations' texts are. block_size: drop what has more tokens of `tokenizer`."""
    import data  # here, because data.py loads through this file

    sys.stdout.reconfigure(errors="backslashreplace")     # a text may hold what the terminal cannot show
    encode = data.tokenizer(tokenizer).encode if block_size else str.split
    format = format or (recognise(path) if path.exists() else "")
    records, dropped = load(path, format, block_size, encode, False, **({"semeval": semeval} if format == "expun" else {}))[1:]
    print(f"{path}: {format}, {len(records)} records, {sum(map(len, dropped.values()))} dropped")
    for why, places in dropped.items():
        print(f"  dropped {len(places):6}  {why}, the first at {places[0]}")
    if dropped and format in OWN:
        print("  training refuses a file of your own that has such records, and names the line")
    rows = [record._asdict() if isinstance(record, Pun) else record for record in records]
    for name in ("text", *TEXTS):
        texts = [row[name] for row in rows if name in row]
        if texts:
            words, chars = sorted(len(text.split()) for text in texts), list(map(len, texts))
            print(f"  {name:10} {len(texts):6} texts, {len(set(texts))} different; words: mean {sum(words) / len(words):.1f}, "
                  f"95 % at most {words[int(.95 * len(words))]}, all at most {words[-1]}; "
                  f"characters: mean {sum(chars) / len(chars):.0f}, at most {max(chars)}")
    touching = sum(row["prompt"][-1:] > " " and row[name][:1] > " " for row in rows for name in TEXTS[1:] if name in row)
    if touching:
        print(f"  note: {touching} answers touch their prompt: the space between the two belongs to the beginning of the answer")
    print(f"  {len(records) - len({repr(texts_of(record)) for record in records})} exact duplicates; ", end="")
    if len(records) <= 20_000:
        sizes = collections.Counter(group([texts_of(record) for record in records])).values()
        print(f"{len(sizes)} groups of near-duplicates, {sum(size > 1 for size in sizes)} of more than one record, "
              f"the largest of {max(sizes, default=0)}")
    else:
        print("near-duplicates are looked for among 20,000 records at most")
    kinds = collections.Counter((record.kind, record.is_pun) for record in records if isinstance(record, Pun))
    for (kind, is_pun), count in sorted(kinds.items()):
        print(f"  {count} {kind} {'puns' if is_pun else 'non-puns'}")
    for row in rows[:n]:
        print("\n" + "\n".join(
            f"  {name:14} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}".replace("\n", "⏎")
            for name, value in row.items() if value not in ("", (), None)))
