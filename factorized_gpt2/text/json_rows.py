"""Text in rows of JSON: an object a line, or one array of objects.

The rows are read as text and parsed here. Arrow's own reader of JSON ends the process, without an exception, at a
first row that is null (https://github.com/apache/arrow/issues/47409) and where one block of a file has text in a
column and another a list (pyarrow 26.0.1).
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any, TextIO

from ..common.errors import UserError


def read_json_rows(file: TextIO, name: str, column: str) -> Iterator[str | None]:
    """Take the text out of every object; lines that are blank are no rows.

    Args:
        file: At its beginning.
        name: What to call it.
        column: Key of the text.

    Yields:
        The text of each row; `None` where it has none.

    Raises:
        UserError: Neither an array of objects nor lines with one each, or an object that has no such key, or something
            else than text there.
    """
    blank = []
    for line in file:
        if line.strip():
            break
        blank.append(line)
    else:
        return
    if line.lstrip().startswith("["):
        rows = _parsed("".join([*blank, line, *file]), name)
        for number, row in enumerate(rows, 1):
            yield _text_of(row, column, f"{name}: element {number}")
        return
    for number, text in enumerate(itertools.chain([line], file), len(blank) + 1):
        if text.strip():
            where = f"{name}: line {number}"
            yield _text_of(_parsed(text, where), column, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _text_of(row: Any, column: str, where: str) -> str | None:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no object with a key {column!r}.")
    if column not in row:
        raise UserError(f"{where} has no column {column!r}; its columns are {', '.join(row)}.")
    text = row[column]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: the column {column!r} does not hold text.")
    return text
