"""
Reading files that other programs wrote: lines, JSON, typed fields, and which records can be used.

Every error is an InputError with the file and the line.
"""

import collections
import gzip
import json
import re
import zlib
from pathlib import Path

from common import InputError

NUMBER = (int, float)
TYPE_NAMES = {str: "text", int: "a whole number", NUMBER: "a number", bool: "true or false",
              list: "a list", dict: "an object"}


def always(*texts):
    return True


class Sieve:
    """Decides which records of a file can be used, and counts the others by reason.

    strict: a record that cannot be used is an error, as in files of one's own. Public data sets
    have some, so there they are dropped and counted.
    fits(prompt, *answers): False if they are too long, for loaders that can shorten a prompt."""

    def __init__(self, strict=False, fits=always):
        self.strict = strict
        self.fits = fits
        self.dropped = collections.defaultdict(list)        # reason -> places

    def drop(self, where, reason):
        if self.strict:
            raise InputError(f"{where}: {reason}")
        self.dropped[reason].append(where)

    def keep(self, where, prompt, *answers):
        """True if a prompt with these answers can be used. Otherwise drops it, or raises."""
        different = {answer.strip() for answer in answers}
        if not prompt.strip():
            self.drop(where, "the prompt is empty")
        elif "" in different:
            self.drop(where, "an answer is empty")
        elif len(different) < len(answers):
            self.drop(where, "two answers are the same text")
        else:
            return True
        return False


def all_lines(path):
    """Yields each line of a plain or gzipped UTF-8 file as text without its line end."""
    path = Path(path)
    open_file = gzip.open if path.name.endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            for n, line in enumerate(file, 1):
                if n == 1 and line.startswith(b"version https://git-lfs"):
                    raise InputError(f"{path}:1: this is a git-lfs pointer, not the data: "
                                     "run git lfs pull")
                try:
                    text = line.decode("utf-8-sig" if n == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}:{n}: byte {error.start + 1} is not UTF-8: "
                                     "save the file as UTF-8") from None
                yield text.rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}") from None


def read_lines(path):
    """Yields ("file:line", text) of each line that is not blank."""
    for n, text in enumerate(all_lines(path), 1):
        if text.strip():
            yield f"{path}:{n}", text


def read_objects(path, fields):
    """Yields ("file:line", object) of each line of a JSONL file; fields: {name: type}."""
    for where, line in read_lines(path):
        if line.lstrip().startswith("["):
            raise InputError(f"{where}: this is a JSON array, not one JSON object a line: "
                             "its format is json")
        yield where, check_fields(where, parse_json(where, line), fields)


def read_array(path):
    """Yields ("file:line", element) of a file that is one JSON array."""
    text = "\n".join(all_lines(path))
    if not isinstance(parse_json(path, text), list):
        raise InputError(f"{path}: this file is not a JSON array, [...]")
    # The array is sound. Now once more, element by element, for the line that each begins on.
    decoder = json.JSONDecoder()
    separator = re.compile(r"[\s,]*")
    line, counted_to = 1, 0
    start = separator.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        element, end = decoder.raw_decode(text, start)
        line += text.count("\n", counted_to, start)
        counted_to = start
        yield f"{path}:{line}", without_surrogates(element)
        start = separator.match(text, end).end()


def parse_json(where, text):
    """The value of a JSON text that begins at `where`: a file, or file:line."""
    try:
        return without_surrogates(json.loads(text, parse_constant=_no_number))
    except RecursionError:
        raise InputError(f"{where}: this JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = "" if isinstance(where, str) else f":{error.lineno}"
        raise InputError(f"{where}{line}: this is not JSON: {error.msg} "
                         f"at column {error.colno}") from None
    except ValueError as error:
        raise InputError(f"{where}: this is not JSON: {error}") from None


def _no_number(name):
    raise ValueError(f"{name} is not a number")


def without_surrogates(value):
    """A JSON value whose texts can be written as UTF-8: half of a surrogate pair becomes U+FFFD."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return value
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def check_fields(where, row, fields):
    """Returns the row. Raises InputError unless it is an object with these fields: {name: type}."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: this is not a JSON object, {{...}}")
    for name, kind in fields.items():
        if name not in row:
            raise InputError(f"{where}: '{name}' is missing, only {names(row)} is there")
        is_bool = isinstance(row[name], bool)       # which Python also counts as an int
        if not isinstance(row[name], kind) or (is_bool and kind is not bool):
            raise InputError(f"{where}: '{name}' must be {TYPE_NAMES[kind]}")
    return row


def names(fields):
    """`a + b + c`, for messages; of many fields the first ten."""
    fields = list(fields)
    more = f" and {len(fields) - 10} more" if len(fields) > 10 else ""
    return " + ".join(fields[:10]) + more or "no field"
