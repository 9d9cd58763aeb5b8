"""Which values settings may have: stated in their types, as in `Annotated[int, COUNT]`, and checked here."""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from ..common.errors import UserError

_LARGEST_FLOAT, _LARGEST_INT = 3.4e38, 2**63 - 1  # of float32, in which models compute, and of int64


class Range(NamedTuple):
    """Numbers from `low` to `high`, the ends included unless they are open."""

    low: float
    high: float = math.inf
    is_open_below: bool = False
    is_open_above: bool = False

    def has(self, number: float) -> bool:
        """Whether a number is among them."""
        above = number > self.low if self.is_open_below else number >= self.low
        return above and (number < self.high if self.is_open_above else number <= self.high)

    def __str__(self) -> str:
        """Say what a number must do to be among them."""
        if self.high < math.inf:
            left, right = "(" if self.is_open_below else "[", ")" if self.is_open_above else "]"
            return f"lie in {left}{self.low:g}, {self.high:.10g}{right}"
        if self.low == 0:
            return "be positive" if self.is_open_below else "not be negative"
        return f"be at least {self.low:g}"


POSITIVE, NOT_NEGATIVE, COUNT, SHARE = Range(0, is_open_below=True), Range(0), Range(1), Range(0, 1)
SEED = Range(0, 2**32 - 1)


class Place(NamedTuple):
    """A path: of what is read (or a Hub id), of a folder to write into, or of a file to write."""

    writes: str = ""


READ, OUTPUT_FOLDER, OUTPUT_FILE = Place(), Place("folder"), Place("file")

Limit = Range | Place


def limits_of(*dataclasses: type) -> dict[str, Limit]:
    """Collect the limits of fields by their names, from their types and from the class attribute `_limits`."""
    found: dict[str, Limit] = {}
    for dataclass in dataclasses:
        found |= getattr(dataclass, "_limits", {})
        for name, hint in get_type_hints(dataclass, include_extras=True).items():
            found.update((name, limit) for limit in _limits_in(hint))
    return found


def _limits_in(hint: Any) -> Iterator[Limit]:
    yield from (note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range | Place))
    for inner in get_args(hint):
        yield from _limits_in(inner)


def check_values(settings: Mapping[str, Any], limits: Mapping[str, Limit]) -> None:
    """Judge values, each by itself.

    Args:
        settings: Values by the settings' names; lists and mappings are judged by what they hold. `None` is not judged.
        limits: By the same names. A number without one must be finite.

    Raises:
        UserError: A number out of its range, NaN or infinite; text that no file or terminal can hold; a path that the
            system refuses, a folder to write to that is a file, or a file to write that is a folder. By name.
    """
    for name, value in settings.items():
        limit = limits.get(name)
        if isinstance(value, Mapping):
            check_values(value, limits)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool):
                _check_number(name, item, limit)
            elif isinstance(item, str):
                _check_text(name, item)
                if isinstance(limit, Place):
                    _check_path(name, item, limit.writes)


def _check_number(name: str, number: float, limit: Limit | None) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"{name} must be finite, got {number}.")
    if isinstance(limit, Range) and not limit.has(number):
        raise UserError(f"{name} must {limit}, got {number}.")
    if abs(number) > (_LARGEST_INT if isinstance(number, int) else _LARGEST_FLOAT):
        raise UserError(f"{name} is too large to compute with: {number}.")


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise UserError(f"{name} contains a NUL character: {text!r}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid Unicode: {text!r}.") from error


def _check_path(name: str, path: str, writes: str) -> None:
    if not path:
        raise UserError(f"{name} is empty.")
    if writes and not Path(path).absolute().name:
        raise UserError(f"{name}={path} is the root folder: name a folder inside it.")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if writes == "folder" and os.path.islink(path):
            raise UserError(f"{name}={path} is a link to a folder that does not exist: name another.") from None
        return
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not writes:
            return  # as good as not there, which whoever reads it will say
        raise UserError(f"{name}={path} cannot be used: {error.strerror}.") from error
    if writes == "folder" and not stat.S_ISDIR(mode):
        raise UserError(f"{name}={path} is a file, not a folder: name a folder.")
    if writes == "file" and not stat.S_ISREG(mode):  # a terminal or a pipe would be replaced
        raise UserError(f"{name}={path} is not a regular file: name another.")
