"""
Reading files that other programs wrote: text, lines, JSON, typed fields.

Every error is an InputError that names the file and the line.
"""

import gzip
import json
import re
import zlib
from pathlib import Path

from common import InputError
from data import not_a_number

NUMBER = (int, float)
TYPE_NAMES = {str: "text", int: "a whole number", NUMBER: "a number", list: "a list",
              dict: "an object"}


def read_text(path):
    """The text of a UTF-8 file, plain or gzipped, with \\n as its line end and without a BOM."""
    content = Path(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):         # gzip
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: this gzip file is damaged: {error}") from None
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}:1: this is a git-lfs pointer, not the data: run git lfs pull")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: this is not UTF-8: save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path):
    """Yields ("file:line", text) of each line that is not blank."""
    # Not splitlines(): that also splits at characters that JSON allows inside a text.
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{n}", line


def read_objects(path):
    """Yields ("file:line", value) of each line of a JSONL file."""
    for where, line in read_lines(path):
        if line.lstrip().startswith("["):
            raise InputError(f"{where}: this is a JSON array, not one JSON object a line: "
                             "its format is json")
        try:
            value = json.loads(line, parse_constant=not_a_number)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: this line is not JSON: {error}") from None
        yield where, without_surrogates(value)


def read_array(path):
    """Yields ("file:line", element) of a file that is one JSON array."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        raise InputError(f"{path}:1: this file is not a JSON array, [...]")
    decoder = json.JSONDecoder(parse_constant=not_a_number)
    separator = re.compile(r"[\s,]*")
    line, counted_to = 1, 0
    start = separator.match(text, text.index("[") + 1).end()
    while text[start:start + 1] != "]":
        line += text.count("\n", counted_to, start)
        counted_to = start
        try:
            element, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise InputError(f"{path}:{line}: this is not a JSON array: {error}") from None
        yield f"{path}:{line}", without_surrogates(element)
        start = separator.match(text, end).end()


def without_surrogates(value):
    """A JSON value whose texts can be written as UTF-8: half of a surrogate pair becomes U+FFFD."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def check_fields(row, fields):
    """Returns the row. Raises InputError unless it is an object with these fields: {name: type}.

    Where it stands is for the caller to add."""
    if not isinstance(row, dict):
        raise InputError("this is not a JSON object, {...}")
    for name, kind in fields.items():
        if name not in row:
            raise InputError(f"'{name}' is missing, only {names(row)} is there")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise InputError(f"'{name}' must be {TYPE_NAMES[kind]}")
    return row


def names(fields):
    """`a + b + c`, for messages; of many fields the first ten."""
    fields = list(fields)
    more = f" and {len(fields) - 10} more" if len(fields) > 10 else ""
    return " + ".join(fields[:10]) + more or "no field"
