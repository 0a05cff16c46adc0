"""
Converts texts that people wrote and judged to records that the stages read.

    python -m real.corpora hh train.jsonl.gz data/hh --block_size 256
    python -m real.corpora auto mine.csv data/mine
    python -m real.corpora expun downloads/expun data/expun --as preference
    python -m real.corpora auto mine.json             only reports, writes nothing

It writes train.jsonl and test.jsonl, and no text of the one has a near-duplicate in the other.

    format    what it is                                            becomes, without --as
    hh        Anthropic HH-RLHF, .jsonl or .jsonl.gz                preference
    shp       Stanford Human Preferences                            preference, with a margin
    openai    OpenAI summarize-from-feedback, comparisons           preference
    semeval   SemEval-2017 task 7, a folder of XML and gold files   completion
    expun     ExPUNations, with the texts of --semeval              rating
    text      plain text, one text a line                           completion
    csv       a header with the names of fields, then records       what its fields say
    json      a JSON array of records, Alpaca's included            what their fields say
    trl       JSONL, one record a line, in TRL's shapes             what their fields say

The last four are files of your own: all records have the same fields, one of the SHAPES below, and
a record that cannot be used is an error with file and line. In public data sets it is dropped.
"""

import collections
import csv
import functools
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

import data
from common import InputError, command_line, write_jsonl
from real.duplicates import ANSWERS, answers_of, group_records, split
from real.reading import (
    NUMBER,
    check_fields,
    names,
    read_array,
    read_lines,
    read_objects,
    read_text,
)
from real.semeval import PROMPT, Pun, load_expun, load_semeval, records_of

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Corpus(NamedTuple):
    format: str
    records: list       # Puns, or dictionaries with "where", their file and line
    dropped: dict       # reason -> the places of the records that were dropped


class Unusable(InputError):
    """A record of a public set cannot be used, as is normal there: it is dropped."""

# -----------------------------------------------------------------------------
# public sets of preferences: a record of a row

def hh_record(row):
    check_fields(row, {"chosen": str, "rejected": str})
    prompt, chosen, rejected = split_prompt(row["chosen"], row["rejected"])
    if not prompt.endswith(ASSISTANT):
        raise Unusable("the dialogues share no turn of the assistant")
    if any(turn in chosen + rejected for turn in (HUMAN, ASSISTANT)):
        raise Unusable("the dialogues differ before the last answer")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def split_prompt(chosen, rejected):
    """(prompt, chosen, rejected) of two texts that begin with the same prompt.

    The prompt ends where the last turn of the assistant begins that both share, else after a whole
    word: `Why? Hello.` and `Why? Hey.` give `Why?`, ` Hello.` and ` Hey.`"""
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT)
    if end >= 0:
        end += len(ASSISTANT)
    else:
        spaces = [match.start() for match in re.finditer(r"\s+", shared)]
        end = spaces[-1] if spaces else 0
    return shared[:end], chosen[end:], rejected[end:]


def shp_record(row, n_pairs):
    """Keeps, as its card advises, pairs with a score ratio of 2 or more, and 5 pairs of a post.

    n_pairs: a Counter of the pairs of each post that were kept."""
    check_fields(row, {"post_id": str, "history": str, "human_ref_A": str, "human_ref_B": str,
                       "labels": int, "score_ratio": NUMBER})
    if row["labels"] not in (0, 1) or row["score_ratio"] < 1:
        raise InputError("'labels' must be 1 (A is better) or 0 (B is better), and 'score_ratio' "
                         "1 or more")
    if row["score_ratio"] < 2:
        raise Unusable("score_ratio is under 2")
    if n_pairs[row["post_id"]] == 5:
        raise Unusable("more than 5 pairs of one post")
    n_pairs[row["post_id"]] += 1
    answers = [with_space(row["human_ref_B"]), with_space(row["human_ref_A"])]
    return {"prompt": f"{HUMAN} {row['history']}{ASSISTANT}", "chosen": answers[row["labels"]],
            "rejected": answers[1 - row["labels"]], "margin": math.log(row["score_ratio"])}


def openai_record(row, fits):
    """A post that is too long loses lines at its end, as in the paper."""
    check_fields(row, {"info": dict, "summaries": list, "choice": int})
    if row["choice"] not in (0, 1) or len(row["summaries"]) != 2:
        raise InputError("two 'summaries' and a 'choice' of 0 or 1 are needed")
    answers = [with_space(check_fields(summary, {"text": str})["text"])
               for summary in row["summaries"]]
    if "article" in row["info"]:
        head, post = "Article:\n\n", check_fields(row["info"], {"article": str})["article"]
    else:
        info = check_fields(row["info"], {"subreddit": str, "title": str, "post": str})
        head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: "
        post = info["post"]
    while not fits(f"{head}{post}\n\nTL;DR:", *answers) and "\n" in post:
        post = post.rpartition("\n")[0]
    return {"prompt": f"{head}{post}\n\nTL;DR:", "chosen": answers[row["choice"]],
            "rejected": answers[1 - row["choice"]]}


def with_space(text):
    """The text of an answer, with the space that stands between prompt and answer."""
    return " " + text.strip()

# -----------------------------------------------------------------------------
# files of one's own

SHAPES = ("prompt + completion", "prompt + completion + rating", "prompt + completion + label",
          "prompt + chosen + rejected", "chosen + rejected", "prompt + ranked", "prompt", "text",
          "messages", "instruction + output", "instruction + input + output")


def own_record(row):
    """The record {prompt, ...} of a row that has one of the SHAPES."""
    check_fields(row, {})
    optional = {"id", "margin", "share"} if "chosen" in row else {"id"}
    if set(row) - optional not in [set(shape.split(" + ")) for shape in SHAPES]:
        raise InputError(f"this record has {names(row)}, which is none of the known shapes. "
                         f"Rename, add or remove fields: {', or '.join(SHAPES)}")
    if "text" in row or "instruction" in row:
        check_fields(row, {name: str for name in row if name != "id"})
    if "text" in row:
        return {"prompt": PROMPT, "completion": with_space(row["text"])}
    if "instruction" in row:
        request = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
        return {"prompt": f"{HUMAN} {request}{ASSISTANT}", "completion": with_space(row["output"])}
    record = dict(row)
    if record.get("label") in (0, 1):
        record["label"] = bool(record["label"])
    if "messages" in row:
        messages = check_fields(row, {"messages": list})["messages"]
        record = {"prompt": messages[:-1], "completion": messages[-1:]}
    if isinstance(record.get("prompt"), list):
        record["prompt"] = transcript(record["prompt"]) + ASSISTANT
    for name in ANSWERS:
        if isinstance(record.get(name), list):
            record[name] = transcript(record[name])
            if "prompt" in record:      # which ends in ASSISTANT already
                if not record[name].startswith(ASSISTANT):
                    raise InputError(f"'{name}' must begin with a message of the assistant")
                record[name] = record[name].removeprefix(ASSISTANT)
    if "prompt" not in record:
        check_fields(record, {"chosen": str, "rejected": str})
        record["prompt"], record["chosen"], record["rejected"] = split_prompt(
            record["chosen"], record["rejected"])
    return record


def transcript(messages):
    """[{role, content}, ...] as the text of a dialogue, in the form of HH-RLHF."""
    marks = {"system": "", "user": HUMAN + " ", "assistant": ASSISTANT + " "}
    text = ""
    for message in messages:
        check_fields(message, {"role": str, "content": str})
        if message["role"] not in marks:
            raise InputError(f"the role '{message['role']}' is not one of {', '.join(marks)}")
        text += marks[message["role"]] + message["content"]
    return text


def csv_rows(path):
    """Yields ("file:line", object) of each record of a CSV file, whose header names the fields."""
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: its cells do not fit the columns "
                                 f"{', '.join(reader.fieldnames)}")
            if any(cell.strip() for cell in row.values()):
                yield where, {name: csv_value(name, cell) for name, cell in row.items()}
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num + 1}: this is not CSV: {error}") from None


def csv_value(name, cell):
    """The value of a cell. Spreadsheets trim texts, so answers get their space back."""
    if name in ("rating", "margin", "share", "label"):
        try:
            return json.loads(cell.lower())
        except ValueError:
            return cell         # which the check of the record refuses
    return with_space(cell) if name in ANSWERS else cell


def text_rows(path):
    for where, line in read_lines(path):
        if re.match(r'\s*(\{"|\[[{\]])', line):
            raise InputError(f"{where}: this is JSON, not plain text: its format is trl or json")
        yield where, {"text": line}

# -----------------------------------------------------------------------------
# any format

# What a record has that a stage can read, by the name of --as. A record that has the fields of
# several has, by itself, the shape of the first.
FIELDS = {"preference": ("prompt", "chosen", "rejected"), "ranking": ("prompt", "ranked"),
          "rating": ("prompt", "completion", "rating"),
          "label": ("prompt", "completion", "label"),       # true is a thumb up
          "completion": ("prompt", "completion"), "prompt": ("prompt",)}
PUNS, OWN = ("semeval", "expun"), ("text", "csv", "json", "trl")
FORMATS = ("hh", "shp", "openai", *PUNS, *OWN)


def natural_shape(record):
    if isinstance(record, Pun):
        return "rating" if record.ratings else "completion"
    return next(shape for shape, fields in FIELDS.items() if set(fields) <= set(record))


def always(*texts):
    return True


def load(path, format="auto", fits=always, semeval=""):
    """Corpus(format, records, dropped) of a file or folder.

    fits(prompt, *answers): False if these texts are too long; openai's posts are then shortened.
    semeval: the folder with the texts of expun. Raises InputError with file and line."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    format = recognize(path) if format == "auto" else format
    if format not in FORMATS:
        raise InputError(f"the format is auto or one of {', '.join(FORMATS)}, not '{format}'")
    if path.is_dir() and format not in PUNS:
        raise InputError(f"{path}: this is a folder, but the format {format} is a file")
    if semeval and format != "expun":
        raise InputError(f"--semeval is for the format expun, but {path} is {format}")
    if semeval and not Path(semeval).exists():
        raise InputError(f"{semeval}: there is no such file or folder")
    if format == "semeval":
        return Corpus(format, *load_semeval(path))
    if format == "expun":
        return Corpus(format, *load_expun(path, semeval))
    read_rows = {"text": text_rows, "csv": csv_rows, "json": read_array}.get(format, read_objects)
    to_record = {"hh": hh_record,
                 "shp": functools.partial(shp_record, n_pairs=collections.Counter()),
                 "openai": functools.partial(openai_record, fits=fits)}.get(format, own_record)
    records, dropped = [], collections.defaultdict(list)
    for where, row in read_rows(path):
        try:
            record = to_record(row)
            reason = problem_of(record)
        except Unusable as error:
            reason = str(error)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if reason and format in OWN:
            raise InputError(f"{where}: {reason}")
        if reason:
            dropped[reason].append(where)
            continue
        records.append({"where": where} | record)
        shapes = [natural_shape(records[0]), natural_shape(record)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{where}: the file began with {shapes[0]} records, and this is a "
                             f"{shapes[1]} record: split it into files of one kind")
    if not records and not dropped:
        raise InputError(f"{path}: this file has no records")
    return Corpus(format, records, dropped)


def problem_of(record):
    """Why no stage can use a record, or ""."""
    try:
        data.check_record("", record, FIELDS[natural_shape(record)])
    except InputError as error:
        return str(error).removeprefix(": ")
    return ""


def recognize(path):
    """The format of a file or folder. Raises InputError if it cannot be told."""
    if path.is_dir():
        patterns = {"semeval": "subtask1-*graphic-*.xml", "expun": "expunations_annotated_*.json"}
        found = [format for format in PUNS if next(path.rglob(patterns[format]), None)]
        if len(found) == 1:
            return found[0]
        held = "both SemEval and" if found else "neither SemEval nor"
        raise InputError(f"{path}: this folder holds {held} ExPUNations: name the format, semeval "
                         "or expun, or one file")
    if re.match(r"subtask\d-.*\.(xml|gold)$", path.name):
        return "semeval"
    where, line = next(read_lines(path), ("", ""))
    if not where:
        raise InputError(f"{path}: this file is empty")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if line.lstrip().startswith("{"):
        return recognize_object(next(read_objects(path))[1])
    if suffix in (".csv", ".txt"):
        return "csv" if suffix == ".csv" else "text"
    if line.lstrip().startswith("["):
        _, row = next(read_array(path), ("", None))
        return "expun" if isinstance(row, dict) and "Annotator_IDs" in row else "json"
    raise InputError(f"{where}: this is neither JSON nor a .csv or .txt file: name its format, "
                     f"one of {', '.join(FORMATS)}")


def recognize_object(row):
    """The format of a JSONL file, from its first object."""
    if "human_ref_A" in row:
        return "shp"
    if "summaries" in row:
        return "openai"
    is_pair = set(row) == {"chosen", "rejected"}
    return "hh" if is_pair and str(row["chosen"]).startswith(HUMAN) else "trl"

# -----------------------------------------------------------------------------
# the command

def reshape(records, shape):
    """(records in one of the shapes of FIELDS, {reason: places} of those left out).

    completion: of a comparison the better text, of labeled texts those labeled true."""
    if records and isinstance(records[0], Pun):
        return records_of(records, shape)
    wanted = ("where", "id") + FIELDS[shape]
    if shape == "preference":
        wanted += ("margin", "share")
    shaped, left_out = [], collections.defaultdict(list)
    for record in records:
        if shape == "completion" and not record.get("label", True):
            left_out["it is labeled false"].append(record["where"])
            continue
        if shape == "completion" and natural_shape(record) in ("preference", "ranking"):
            best = record["chosen"] if "chosen" in record else record["ranked"][0]
            record = record | {"completion": best}
        if set(FIELDS[shape]) <= set(record):
            shaped.append({field: record[field] for field in wanted if field in record})
        else:
            left_out[f"it has no {names(FIELDS[shape])}"].append(record["where"])
    return shaped, left_out


Shape = Literal["", "preference", "ranking", "rating", "label", "completion", "prompt"]


def convert(format: tyro.conf.Positional[str], path: tyro.conf.Positional[Path],
            out_dir: tyro.conf.Positional[str] = "",
            shape: Annotated[Shape, tyro.conf.arg(name="as")] = "", block_size: int = 0,
            tokenizer: str = "puns", test_fraction: float = 0.1, seed: int = 0, semeval: str = ""):
    """Convert a file to OUT_DIR/train.jsonl and test.jsonl; without OUT_DIR only report.

    format: auto recognizes hh, shp, openai, semeval, expun, text, csv, json and trl. path: a file,
    or the folder of semeval or expun. as: the records to write; '' is what the format has by
    itself. block_size: drop records of more tokens, end token included; 0 keeps all.
    tokenizer: counts the tokens. test_fraction: of the records, for test.jsonl. seed: of the
    split. semeval: the folder with the texts of expun."""
    if not 0 <= test_fraction < 1:
        raise InputError(f"--test_fraction must be from 0 to less than 1, not {test_fraction}")
    encode = data.tokenizer(tokenizer).encode

    def fits(prompt, *answers):
        # A response of at least one token has to fit, and answers get an end token.
        longest = max((len(encode(answer)) + 1 for answer in answers), default=1)
        return not block_size or len(encode(prompt)) + longest <= block_size

    corpus = load(path, format, fits, semeval)
    print(f"{path}: {corpus.format}, {len(corpus.records)} records")
    print_dropped(corpus.dropped)
    if not corpus.records:
        raise InputError(f"{path}: none of its records can be used")
    first = corpus.records[0]
    shape = shape or natural_shape(first)

    def shaped(records):
        records, left_out = reshape(records, shape)
        kept, too_long = [], []
        for record in records:
            if fits(record["prompt"], *answers_of(record)):
                kept.append(record)
            else:
                too_long.append(record.get("where", record.get("id")))
        print_dropped(left_out | {f"longer than {block_size} tokens": too_long})
        return kept

    records = corpus.records if isinstance(first, Pun) else shaped(corpus.records)
    groups = group_records(records)
    print(f"  near-duplicates of another record, on one side with it: {len(records) - len(groups)}")
    parts = split(records, test_fraction, seed, groups)
    if isinstance(first, Pun):
        # Comparisons are drawn after the split, so that both texts are on the same side.
        parts = [shaped(part) for part in parts]
    if not any(parts):
        has = "puns" if isinstance(first, Pun) else names(name for name in first if name != "where")
        raise InputError(f"{path}: no {shape} records are left: they need {names(FIELDS[shape])}, "
                         f"and this file has {has}")
    for name, records in zip(("train", "test"), parts, strict=True):
        report(name, shape, records)
        if out_dir:
            for record in records:
                record.pop("where", None)
            write_jsonl(Path(out_dir) / f"{name}.jsonl", records)
            print(f"  -> {Path(out_dir) / name}.jsonl")


def print_dropped(dropped):
    for reason, places in dropped.items():
        if places:
            print(f"  dropped {len(places)}: {reason} (first: {places[0]})")


def report(name, shape, records):
    """Prints how many records there are, how long their texts are, and the first one."""
    print(f"{name}: {len(records)} {shape} records")
    for field in ("prompt", *ANSWERS):
        texts = [record[field] for record in records if field in record]
        n_words = [len(text.split()) for text in texts]
        if texts:
            print(f"  {field:10} {len(set(texts))} different texts, {max(n_words)} words at most, "
                  f"{sum(n_words) / len(n_words):.1f} on average; the first: {texts[0]!r}")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(convert))
