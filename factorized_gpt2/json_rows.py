"""Text in rows of JSON: an object a line, or one array of objects.

The rows are read as lines of text and parsed here. Arrow's own reader of JSON ends the process, without an exception,
at a first row that is null (https://github.com/apache/arrow/issues/47409) and where one block of a file has text in a
column and another a list (pyarrow 26.0.1).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

_BYTE_ORDER_MARK = "\ufeff"
_BEGINNING = 100  # bytes, within which a file shows whether it is an array


def is_json_array(path: Path) -> bool:
    """Say whether a file is one array rather than an object a line."""
    with path.open("rb") as file:
        return file.read(_BEGINNING).decode(errors="ignore").removeprefix(_BYTE_ORDER_MARK).lstrip().startswith("[")


def read_json_array(path: Path, column: str) -> list[str | None]:
    """Read the text of every object in an array.

    Raises:
        UserError: The file is no array of objects with text.
    """
    rows = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    return [_text_of(row, column, f"{path}: element {number}") for number, row in enumerate(rows, 1)]


def parse_json_lines(lines: Sequence[str], indices: Sequence[int], name: str, column: str) -> list[str | None]:
    """Take the text out of lines; those that are blank are no rows.

    Args:
        lines: Lines of a file.
        indices: Their numbers, from 0.
        name: The file.
        column: Key of the text.

    Returns:
        The text of each row; `None` where it has none.

    Raises:
        UserError: A line that is no object, has no such key, or something else than text there.
    """
    texts = []
    for line, index in zip(lines, indices, strict=True):
        line = line.removeprefix(_BYTE_ORDER_MARK) if index == 0 else line
        if line.strip():
            where = f"{name}: line {index + 1}"
            texts.append(_text_of(_parsed(line, where), column, where))
    return texts


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
