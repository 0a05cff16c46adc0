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
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

import data
from common import InputError, command_line, write_jsonl
from real.duplicates import MOST_COMPARED, TEXTS, group_records, split, texts_of
from real.reading import (
    NUMBER,
    Sieve,
    all_lines,
    always,
    check_fields,
    names,
    parse_json,
    read_array,
    read_lines,
    read_objects,
)
from real.semeval import PROMPT, Pun, load_expun, load_semeval, records_of

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Corpus(NamedTuple):
    format: str
    records: list       # Puns, or dictionaries with "where", their file and line
    dropped: dict       # reason -> the places of the records that were dropped

# -----------------------------------------------------------------------------
# public sets of preferences. Each loader yields records and drops what cannot be used.

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


def load_hh(path, sieve):
    for where, row in read_objects(path, {"chosen": str, "rejected": str}):
        prompt, chosen, rejected = split_prompt(row["chosen"], row["rejected"])
        if not prompt.endswith(ASSISTANT):
            sieve.drop(where, "the dialogues share no turn of the assistant")
        elif any(turn in chosen + rejected for turn in (HUMAN, ASSISTANT)):
            sieve.drop(where, "the dialogues differ before the last answer")
        elif sieve.keep(where, prompt, chosen, rejected):
            yield {"where": where, "prompt": prompt, "chosen": chosen, "rejected": rejected}


SHP_FIELDS = {"post_id": str, "history": str, "human_ref_A": str, "human_ref_B": str,
              "labels": int, "score_ratio": NUMBER}


def load_shp(path, sieve):
    """Keeps, as its card advises, pairs with a score ratio of 2 or more, and 5 pairs of a post."""
    n_pairs = collections.Counter()
    for where, row in read_objects(path, SHP_FIELDS):
        if row["labels"] not in (0, 1):
            raise InputError(f"{where}: 'labels' must be 1 (A is better) or 0 (B is better)")
        if row["score_ratio"] < 1:
            raise InputError(f"{where}: 'score_ratio' must be 1 or more")
        prompt = f"{HUMAN} {row['history']}{ASSISTANT}"
        chosen, rejected = with_space(row["human_ref_A"]), with_space(row["human_ref_B"])
        if row["labels"] == 0:
            chosen, rejected = rejected, chosen
        if row["score_ratio"] < 2:
            sieve.drop(where, "score_ratio is under 2")
        elif n_pairs[row["post_id"]] == 5:
            sieve.drop(where, "more than 5 pairs of one post")
        elif sieve.keep(where, prompt, chosen, rejected):
            n_pairs[row["post_id"]] += 1
            yield {"where": where, "prompt": prompt, "chosen": chosen, "rejected": rejected,
                   "margin": math.log(row["score_ratio"])}


def load_openai(path, sieve):
    """A post that is too long loses lines at its end, as in the paper."""
    for where, row in read_objects(path, {"info": dict, "summaries": list, "choice": int}):
        if row["choice"] not in (0, 1) or len(row["summaries"]) != 2:
            raise InputError(f"{where}: two 'summaries' and a 'choice' of 0 or 1 are needed")
        answers = [with_space(check_fields(where, summary, {"text": str})["text"])
                   for summary in row["summaries"]]
        if "article" in row["info"]:
            head, field = "Article:\n\n", "article"
            info = check_fields(where, row["info"], {field: str})
        else:
            field = "post"
            info = check_fields(where, row["info"], {"subreddit": str, "title": str, field: str})
            head = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: "
        post = info[field]
        while not sieve.fits(f"{head}{post}\n\nTL;DR:", *answers) and "\n" in post:
            post = post.rpartition("\n")[0]
        prompt = f"{head}{post}\n\nTL;DR:"
        if sieve.keep(where, prompt, *answers):
            yield {"where": where, "prompt": prompt, "chosen": answers[row["choice"]],
                   "rejected": answers[1 - row["choice"]]}


def with_space(text):
    """The text of an answer, with the space that stands between prompt and answer."""
    return " " + text.strip()

# -----------------------------------------------------------------------------
# files of one's own

SHAPES = [shape.split() for shape in (
    "prompt completion", "prompt completion rating", "prompt completion label",
    "prompt chosen rejected", "chosen rejected", "prompt ranked", "prompt", "text", "messages",
    "instruction output", "instruction input output")]
FIELD_TYPES = dict(text=str, messages=list, instruction=str, input=str, output=str, ranked=list,
                   label=bool, rating=NUMBER, margin=NUMBER, share=NUMBER)


def load_trl(path, sieve):
    return standard_records(read_objects(path, {}), sieve)


def load_json(path, sieve):
    return standard_records(read_array(path), sieve)


def load_csv(path, sieve):
    return standard_records(csv_rows(path), sieve)


def load_text(path, sieve):
    rows = ((where, {"text": line}) for where, line in read_lines(path))
    return standard_records(rows, sieve)


def standard_records(rows, sieve):
    """Turns ("file:line", object) rows of one shape into records."""
    first = None
    for where, row in rows:
        shape = shape_of(where, row)
        first = first or shape
        if shape != first:
            raise InputError(f"{where}: this record has {names(shape)}, but the file began "
                             f"with {names(first)}: split it into files of one kind")
        present = {name: kind for name, kind in FIELD_TYPES.items() if name in row}
        check_fields(where, row, present)
        if not 0.5 <= row.get("share", 1) <= 1:
            raise InputError(f"{where}: 'share' must be from 0.5 (a tie) to 1")
        record = {"where": where} | standard_record(where, row)
        ranked = record.get("ranked", [])
        answers = [record[name] for name in TEXTS[1:] if name in record] + ranked
        if sieve.keep(where, record["prompt"], *answers):
            yield record


def shape_of(where, row):
    """The one of SHAPES that a row has. Raises InputError if it has none."""
    check_fields(where, row, {})
    optional = {"id", "margin", "share"} if "chosen" in row else {"id"}
    fields = set(row) - optional
    for shape in SHAPES:
        if fields == set(shape):
            return shape
    known = ", or ".join(names(shape) for shape in SHAPES)
    raise InputError(f"{where}: this record has {names(row)}, which is none of the known shapes. "
                     f"Rename, add or remove fields: {known}")


def standard_record(where, row):
    """The record {prompt, ...} of a row that has one of the SHAPES."""
    if "text" in row:
        return {"prompt": PROMPT, "completion": with_space(row["text"])}
    if "instruction" in row:
        request = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
        return {"prompt": f"{HUMAN} {request}{ASSISTANT}", "completion": with_space(row["output"])}
    record = dict(row)
    if "messages" in row:
        record = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if isinstance(record.get("prompt"), list):
        record["prompt"] = transcript(where, record["prompt"]) + ASSISTANT
    for name in TEXTS[1:]:
        if isinstance(record.get(name), list):
            record[name] = transcript(where, record[name])
            if "prompt" in record:      # which ends in ASSISTANT already
                if not record[name].startswith(ASSISTANT):
                    raise InputError(f"{where}: '{name}' must begin with a message of the "
                                     "assistant")
                record[name] = record[name].removeprefix(ASSISTANT)
    check_fields(where, record, {name: str for name in TEXTS if name in record})
    if "ranked" in record:
        texts = record["ranked"]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: 'ranked' must be a list of two texts or more, best first")
    if "prompt" not in record:
        prompt, record["chosen"], record["rejected"] = split_prompt(record["chosen"],
                                                                    record["rejected"])
        record["prompt"] = prompt
    return record


def transcript(where, messages):
    """[{role, content}, ...] as the text of a dialogue, in the form of HH-RLHF."""
    marks = {"system": "", "user": HUMAN + " ", "assistant": ASSISTANT + " "}
    text = ""
    for message in messages:
        check_fields(where, message, {"role": str, "content": str})
        if message["role"] not in marks:
            raise InputError(f"{where}: the role '{message['role']}' is not one of system, user "
                             "and assistant")
        text += marks[message["role"]] + message["content"]
    return text


def csv_rows(path):
    """Yields ("file:line", object) of each record of a CSV file, whose header names the fields."""
    reader = csv.reader((line + "\n" for line in all_lines(path)), strict=True)
    header = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}: this is not CSV: {error}") from None
        if cells is None:
            return
        if header is None:
            header = [cell.strip().lower() for cell in cells]
        elif any(cell.strip() for cell in cells):
            row = {name: csv_value(where, name, cell)
                   for name, cell in zip(header, cells, strict=False)}
            if len(cells) != len(header) or len(cells) != len(row):
                raise InputError(f"{where}: {len(cells)} cells do not fit the columns "
                                 f"{', '.join(header)}")
            yield where, row


def csv_value(where, name, cell):
    """The value of a cell. Spreadsheets trim texts, so answers get their space back."""
    if FIELD_TYPES.get(name) == NUMBER:
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{where}: '{name}' must be a number, not {cell!r}")
        return number
    if name == "label":
        values = {"true": True, "1": True, "false": False, "0": False}
        if cell.strip().lower() not in values:
            raise InputError(f"{where}: 'label' must be true or false, not {cell!r}")
        return values[cell.strip().lower()]
    return with_space(cell) if name in TEXTS[1:] else cell

# -----------------------------------------------------------------------------
# any format

LOADERS = {"hh": load_hh, "shp": load_shp, "openai": load_openai, "semeval": load_semeval,
           "expun": load_expun, "text": load_text, "csv": load_csv, "json": load_json,
           "trl": load_trl}
OWN = ("text", "csv", "json", "trl")


def recognize(path):
    """The format of a file or folder. Raises InputError if it cannot be told."""
    path = Path(path)
    if path.is_dir():
        is_semeval = next(path.rglob("subtask1-*graphic-*.xml"), None)
        is_expun = next(path.rglob("expunations_annotated_full.json"), None)
        if is_semeval and is_expun:
            raise InputError(f"{path}: this folder holds both SemEval and ExPUNations: name the "
                             "format, semeval or expun")
        if is_semeval or is_expun:
            return "semeval" if is_semeval else "expun"
        raise InputError(f"{path}: this folder holds neither SemEval nor ExPUNations: name one "
                         "file (training and test files stay apart)")
    if re.match(r"subtask\d-.*\.(xml|gold)$", path.name):
        return "semeval"
    where, line = next(read_lines(path), (None, ""))
    if where is None:
        raise InputError(f"{path}: this file is empty")
    line = line.strip()
    if line.startswith("{"):
        return recognize_object(check_fields(where, parse_json(where, line), {}))
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if line.startswith("[") and suffix != ".txt":
        _, row = next(read_array(path), ("", {}))
        return "expun" if isinstance(row, dict) and "Annotator_IDs" in row else "json"
    columns = [column.strip().strip('"').lower() for column in line.split(",")]
    if suffix == ".csv" or set(columns) in [set(shape) for shape in SHAPES if len(shape) > 1]:
        return "csv"
    if suffix == ".txt":
        return "text"
    raise InputError(f"{where}: this is neither JSON nor a .csv or .txt file: name its format, "
                     f"one of {', '.join(LOADERS)}")


def recognize_object(row):
    """The format of a JSONL file, from its first object."""
    if "human_ref_A" in row:
        return "shp"
    if "summaries" in row:
        return "openai"
    is_pair = set(row) == {"chosen", "rejected"}
    if is_pair and all(str(text).startswith(HUMAN) for text in row.values()):
        return "hh"
    return "trl"


def load(path, format="auto", fits=always, semeval=""):
    """Corpus(format, records, dropped) of a file or folder.

    fits(prompt, *answers): False if these texts are too long; openai's posts are then shortened.
    semeval: the folder with the texts of expun. Raises InputError with file and line."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: cannot be read: no such file or folder")
    if format == "auto":
        format = recognize(path)
    if format not in LOADERS:
        raise InputError(f"the format is auto or one of {', '.join(LOADERS)}, not '{format}'")
    if path.is_dir() and format not in ("semeval", "expun"):
        raise InputError(f"{path}: this is a folder, but the format {format} is a file")
    if semeval and format != "expun":
        raise InputError(f"--semeval is for the format expun, but {path} is {format}")
    options = {"semeval": semeval} if format == "expun" else {}
    sieve = Sieve(strict=format in OWN, fits=fits)
    records = list(LOADERS[format](path, sieve, **options))
    if not records and not sieve.dropped:
        raise InputError(f"{path}: this file has no records")
    return Corpus(format, records, dict(sieve.dropped))

# -----------------------------------------------------------------------------
# shapes

FIELDS = {"completion": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected"),
          "ranking": ("prompt", "ranked"), "rating": ("prompt", "completion", "rating"),
          "prompt": ("prompt",)}


def natural_shape(records):
    """The shape that a corpus has by itself."""
    record = records[0]
    if isinstance(record, Pun):
        return "rating" if record.ratings else "completion"
    for field, shape in (("chosen", "preference"), ("ranked", "ranking"), ("rating", "rating"),
                         ("completion", "completion")):
        if field in record:
            return shape
    return "prompt"


def reshape(records, shape, n_pairs=20_000, seed=0):
    """(records in one of the shapes of FIELDS, {reason: places} of those left out).

    completion: of a comparison the better text, of labeled texts those labeled true.
    preference: of labeled texts, each good one with a bad one of its prompt.
    n_pairs, seed: for the comparisons that puns are drawn for."""
    if records and isinstance(records[0], Pun):
        return records_of(records, shape, n_pairs, seed)
    left_out = collections.defaultdict(list)
    if records and shape == "preference" and "label" in records[0]:
        return pair_labels(records)
    shaped = []
    for record in records:
        if shape == "completion":
            if not record.get("label", True):
                left_out["it is labeled false"].append(record["where"])
                continue
            record = record | {"completion": best_answer(record)}
        if any(record.get(field) is None for field in FIELDS[shape]):
            left_out[f"it has no {' + '.join(FIELDS[shape])}"].append(record["where"])
            continue
        wanted = ("where", "id") + FIELDS[shape]
        if shape == "preference":
            wanted += ("margin", "share")
        shaped.append({field: record[field] for field in wanted if field in record})
    return shaped, left_out


def best_answer(record):
    if "ranked" in record:
        return record["ranked"][0]
    return record.get("completion") or record.get("chosen")


def pair_labels(records):
    """Preference records of labeled texts: each good one with a bad one of the same prompt."""
    by_prompt = collections.defaultdict(lambda: ([], []))
    for record in records:
        good, bad = by_prompt[record["prompt"]]
        side = good if record["label"] else bad
        side.append(record)
    pairs, left_out = [], collections.defaultdict(list)
    for prompt, (good, bad) in by_prompt.items():
        for chosen, rejected in zip(good, bad, strict=False):
            pairs.append({"where": chosen["where"], "prompt": prompt,
                          "chosen": chosen["completion"], "rejected": rejected["completion"]})
        n = min(len(good), len(bad))
        for record in good[n:] + bad[n:]:
            left_out["no text of the other label is left for its prompt"].append(record["where"])
    return pairs, left_out

# -----------------------------------------------------------------------------
# the command

Shape = Literal["", "completion", "preference", "ranking", "rating", "prompt"]


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
    shape = shape or natural_shape(corpus.records)
    dropped = collections.defaultdict(list)

    def shaped(records):
        n_pairs = round(20_000 * len(records) / len(corpus.records))
        records, left_out = reshape(records, shape, n_pairs, seed)
        records, too_long = drop_long(records, fits)
        for reason, places in left_out.items():
            dropped[reason] += places
        if too_long:
            dropped[f"longer than {block_size} tokens"] += too_long
        return records

    if isinstance(corpus.records[0], Pun):
        # Split first, since the two texts of a comparison have to be on the same side.
        parts = [shaped(part) for part in split_and_tell(corpus.records, test_fraction, seed)]
    else:
        parts = split_and_tell(shaped(corpus.records), test_fraction, seed)
    print_dropped(dropped)
    if not any(parts):
        first = corpus.records[0]
        has = "puns" if isinstance(first, Pun) else names(name for name in first if name != "where")
        raise InputError(f"{path}: no {shape} records are left: they need {names(FIELDS[shape])}, "
                         f"and this file has {has}")
    for name, records in zip(("train", "test"), parts, strict=True):
        report(name, shape, records)
        if out_dir:
            rows = [{field: value for field, value in record.items() if field != "where"}
                    for record in records]
            write_jsonl(Path(out_dir) / f"{name}.jsonl", rows)
            print(f"  -> {Path(out_dir) / name}.jsonl")


def drop_long(records, fits):
    """(records that fit, places of the others)"""
    kept, too_long = [], []
    for record in records:
        answers = [record[name] for name in TEXTS[1:] if name in record]
        if fits(record["prompt"], *answers, *record.get("ranked", [])):
            kept.append(record)
        else:
            too_long.append(record.get("where") or record["id"])
    return kept, too_long


def print_dropped(dropped):
    for reason, places in dropped.items():
        print(f"  dropped {len(places)}: {reason} (first: {places[0]})")


def split_and_tell(records, test_fraction, seed):
    """split(), and prints how many duplicates it keeps on one side."""
    if not records:
        return [], []
    groups = group_records(records)
    sizes = [len(rows) for rows in groups if len(rows) > 1]
    n_duplicates = len(records) - len({tuple(texts_of(record)) for record in records})
    what = "near-duplicates" if len(records) <= MOST_COMPARED else "the same prompt or text"
    print(f"  exact duplicates: {n_duplicates}; groups with {what}, which are not split: "
          f"{len(sizes)}, the largest of {max(sizes, default=0)} records")
    train, test = split(records, test_fraction, seed, groups)
    if test_fraction > 0 and not test:
        print("  note: all records are near-duplicates of one another, so there is no test set")
    return train, test


def report(name, shape, records):
    """Prints how many records there are, how long their texts are, and the first one."""
    print(f"{name}: {len(records)} {shape} records")
    if not records:
        return
    for field in TEXTS:
        texts = [record[field] for record in records if field in record]
        if texts:
            n_words = [len(text.split()) for text in texts]
            print(f"  {field:10} {len(set(texts))} different texts, {max(n_words)} words at most, "
                  f"{sum(n_words) / len(n_words):.1f} on average")
    touching = [record for record in records for field in TEXTS[1:]
                if record["prompt"][-1:] > " " and record.get(field, " ")[:1] > " "]
    if touching:
        print(f"  note: {len(touching)} answers touch their prompt: the space between them "
              "belongs to the beginning of the answer")
    for field, value in records[0].items():
        if field not in ("where", "id"):
            print(f"  first {field:10} {value!r}")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(convert))
