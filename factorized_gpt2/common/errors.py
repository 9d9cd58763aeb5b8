"""The one error that commands show as a line, without a traceback."""

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

_LINES = 4  # of a message, at most
_RUST_PANIC = "PanicException"  # of tokenizers, of a class that no module exports, and no Exception


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message names the culprit and the way out."""


def own_message(error: UserError) -> str:
    """Return an error's message; without the traceback that a worker of a `DataLoader` puts before it."""
    return str(error).rpartition(f"\n{UserError.__module__}.{UserError.__name__}: ")[2]


def one_line(text: object) -> str:
    """Put text on one line, with spaces for what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()


UNCHECKED = (AttributeError, LookupError, TypeError)
"""What libraries raise where they do not check what they are given; raised by this package itself, a defect."""

REFUSED_SETTINGS = (argparse.ArgumentError, ImportError, OSError, RuntimeError, ValueError, *UNCHECKED)
"""What libraries raise at settings that they do not take."""

UNREADABLE = (
    EOFError,
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
    *UNCHECKED,
)
"""What libraries raise at files of models that are missing, cut off or of another kind."""


@contextmanager
def blaming(culprit: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn errors of the block, which hands to a library what a person has given, into one that names it.

    Args:
        culprit: What the message begins with, as in "optim cannot be used".
        *kinds: Which errors. Those of `UNCHECKED` are turned only where a library raised them.

    Raises:
        UserError: In the place of such an error. Others pass as they are.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == _RUST_PANIC
        if not is_panic and (not isinstance(error, kinds) or is_defect(error)):
            raise
        raise UserError(f"{culprit}: {first_line(error)}") from error


def is_defect(error: BaseException) -> bool:
    """Tell whether an error is one of `UNCHECKED` that a line of this package raised, and no library."""
    if not isinstance(error, UNCHECKED) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == __package__.partition(".")[0]


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

    That is its first sentence, of four lines at most. A key alone, as a `KeyError` says it, says nothing.
    """
    text = repr(error) if isinstance(error, KeyError) else str(error).strip() or repr(error)
    said: list[str] = []
    for line in text.splitlines()[:_LINES]:
        if not line.strip() or (said and not _goes_on(said[-1], line)):
            break
        said.append(line.strip())
    return " ".join(said)


def _goes_on(line: str, following: str) -> bool:
    """Tell whether a sentence goes on in the line after: a list, an indented line, or one without a capital."""
    if line.endswith((".", "!", "?")):
        return False
    return line.endswith((":", ",")) or following[0] in " \t-*(" or following[0].islower()
