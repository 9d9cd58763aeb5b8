"""Rows of text to documents, and long documents to pieces, which are tokenized one by one."""

import re
from collections.abc import Iterable, Iterator, Sequence

from ..common.errors import UserError

PIECE = 2**14  # characters, after which a document is cut where that changes no token
LONGEST_PIECE = 2**16  # characters, after which it is cut anyway

# Tokenizers split text into words before they look at its vocabulary, and a space belongs to the word after it. After
# the end of a line, the next begins a word of its own, unless the tokenizer marks where a text begins.
_CUTS = (re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])"), re.compile(r"(?<=\S\n)(?=[^\W\d_])"))


def parts_of_documents(rows: Sequence[str | None], document_start: re.Pattern | None) -> tuple[list[str], list[bool]]:
    """Return the text of rows, and which of them start a document.

    Args:
        rows: Text, or `None` where there is none.
        document_start: What the beginning of such a row matches, as `TextSource.load` returns it.

    Raises:
        UserError: A row is no text, which a stream does not know before.
    """
    texts = [text or "" for text in rows]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("The text column contains something other than text.")
    starts = [document_start is not None and bool(document_start.match(text)) for text in texts]
    if document_start is not None and document_start.pattern:
        texts = [text if text.endswith("\n") else text + "\n" for text in texts]  # rows are parts of one text
    return texts, starts


def pieces_of_documents(parts: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Join parts of documents, and cut what is longer than a tokenizer should hold in memory.

    Where a document is cut depends on its text alone, not on how it came in parts.

    Args:
        parts: Text, and whether it starts a document.

    Yields:
        The same text in pieces of `LONGEST_PIECE` characters at most, and whether each starts a document. There is
        one piece at least for each document.
    """
    held: list[str] = []
    size, starts = 0, False
    for text, starts_document in parts:
        if starts_document:
            if held:
                yield from _cut("".join(held), starts, at_most=PIECE)
            held, size, starts = [], 0, True
        held.append(text)
        size += len(text)
        if size > LONGEST_PIECE:
            *whole, (rest, starts) = _cut("".join(held), starts, at_most=LONGEST_PIECE)
            yield from whole
            held, size = [rest], len(rest)
    if held:
        yield from _cut("".join(held), starts, at_most=PIECE)


def _cut(text: str, starts: bool, at_most: int) -> Iterator[tuple[str, bool]]:
    """Cut pieces off until no more than `at_most` characters are left, or no place to cut."""
    begin = 0
    while len(text) - begin > at_most:
        found = (cut.search(text, begin + PIECE, begin + LONGEST_PIECE) for cut in _CUTS)
        end = next((match.start() for match in found if match), begin + LONGEST_PIECE)
        yield text[begin:end], starts
        begin, starts = end, False
    if begin < len(text) or begin == 0:
        yield text[begin:], starts
