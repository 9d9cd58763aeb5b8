"""Rows of text in local files: lines of text, objects of JSON, rows of parquet; compressed or not.

The file that is named is opened. Libraries of data sets take names for patterns, in which brackets, stars, question
marks and double colons mean something.
"""

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..common.errors import UserError
from .json_rows import read_json_rows

_KINDS = {
    **dict.fromkeys((".txt", ".text", ".tokens", ".raw", ".md"), "text"),
    **dict.fromkeys((".json", ".jsonl"), "JSON"),
    ".parquet": "parquet",
}
_OPENERS: dict[str, Callable[[str], Any]] = {  # each to a file of bytes
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _open_zstd(path),
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(path: Path) -> str:
    """Tell by its suffix what a file holds: "text", "JSON" or "parquet".

    Raises:
        UserError: An unknown suffix.
    """
    *_, suffix, packing = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if packing not in _OPENERS:
        suffix, packing = packing, ""
    kind = _KINDS.get(suffix)
    if kind is None or (kind == "parquet" and packing):
        raise UserError(
            f"{path}: unknown kind of file {suffix + packing!r}; known are {', '.join(sorted(_KINDS))}; all but "
            f".parquet may be compressed: {', '.join(_OPENERS)}."
        )
    return kind


def read_rows(path: str, column: str) -> Iterator[dict[str, str | None]]:
    """Read a file row by row.

    Args:
        path: The file, of a kind that `kind_of` knows.
        column: Where JSON and parquet have the text.

    Yields:
        The text of each row under "text", as `datasets` takes it: a line with its end, or what an object or a row of a
        table holds; `None` where it holds nothing.

    Raises:
        UserError: The file holds something else.
        OSError, UnicodeDecodeError, ArrowException, EOFError: It cannot be read.
    """
    kind = kind_of(Path(path))
    rows = _parquet_rows(path, column) if kind == "parquet" else _text_rows(path, column if kind == "JSON" else None)
    for text in rows:
        yield {"text": text}


def _text_rows(path: str, column: str | None) -> Iterator[str | None]:
    with _open_bytes(path) as file:
        if file.read(2) in _UTF_16:
            raise UserError(f"{path} cannot be read: it is UTF-16; save it as UTF-8.")
    with _open_text(path) as file:
        yield from file if column is None else read_json_rows(file, path, column)


def _parquet_rows(path: str, column: str) -> Iterator[str | None]:
    from pyarrow import parquet, types

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(schema.names)}.")
        kind = schema.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise UserError(f"{path}: the column {column!r} does not hold text but {kind}.")
        for batch in file.iter_batches(batch_size=1000, columns=[column]):
            yield from batch.column(column).to_pylist()


def _open_text(path: str) -> TextIO:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig")  # a byte order mark is no text


def _open_bytes(path: str) -> BinaryIO:
    opener = _OPENERS.get(Path(path).suffix.lower())
    return open(path, "rb") if opener is None else opener(path)


def _open_zstd(path: str) -> BinaryIO:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise UserError(f"{path} cannot be read: the installed pyarrow does not support zstd: uncompress the file.")
    return pyarrow.input_stream(path, compression="zstd")
