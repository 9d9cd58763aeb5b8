"""The one error that commands show as a line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_RUST_PANIC = "PanicException"  # of tokenizers, of a class that no module exports, and no Exception


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message names the culprit and the way out."""


def own_message(error: UserError) -> str:
    """Return an error's message; without the traceback that a worker of a `DataLoader` puts before it."""
    return str(error).rpartition(f"\n{UserError.__module__}.{UserError.__name__}: ")[2]


def one_line(text: object) -> str:
    """Put text on one line, with spaces for what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()


@contextmanager
def blaming(culprit: str) -> Iterator[None]:
    """Turn every error of the block, which hands to a library what a person has given, into one that names it.

    Args:
        culprit: What the message begins with, as in "optim cannot be used".

    Raises:
        UserError: In the place of any other error.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # libraries, and those below them, have too many kinds to list
        if isinstance(error, Exception) or type(error).__name__ == _RUST_PANIC:
            raise UserError(f"{culprit}: {first_line(error)}") from error
        raise


@contextmanager
def silenced(library_logging: ModuleType) -> Iterator[None]:
    """Keep a library from logging what its error, or ours, will say.

    Args:
        library_logging: `datasets.logging` or `transformers.logging`.
    """
    before = library_logging.get_verbosity()
    library_logging.set_verbosity(library_logging.CRITICAL)
    try:
        yield
    finally:
        library_logging.set_verbosity(before)


def first_line(error: BaseException) -> str:
    """Say in one line what an error of a library says in several, or in none.

    That is its first line, with the next where it ends in a colon. A key alone, as a `KeyError` says it, says nothing.
    """
    text = repr(error) if isinstance(error, KeyError) else str(error).strip() or repr(error)
    lines = [line.strip() for line in text.splitlines()]
    last = next((number for number, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])
