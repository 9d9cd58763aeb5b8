"""Command-line arguments: parse them into flags, make them from a config, and replace old names."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..common.errors import UserError

logger = logging.getLogger(__name__)

DEBUG = "--debug"
NULL = "null"
"""Unsets a setting, as in JSON: it becomes `None` if it may be, else its default."""


def setting_name(flag: str) -> str:
    """Return the name of the setting of a flag: `max_steps` for `--max-steps=5`."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def grouped(argv: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Group each flag with the values that follow it.

    Yields:
        The setting's name (empty before the first flag), and the flag with its values.
    """
    name = ""
    group: list[str] = []
    for argument in argv:
        if argument.startswith("--"):
            if group:
                yield name, group
            name, group = setting_name(argument), []
        group.append(argument)
    if group:
        yield name, group


def value_of(group: Sequence[str]) -> str:
    """Return the value of a flag, as in `--seed=3` and `--seed 3`; empty if it has none or several."""
    flag, *values = group
    if "=" in flag:
        return flag.partition("=")[2]
    return values[0] if len(values) == 1 else ""


def without_flags(argv: Iterable[str], names: set[str]) -> tuple[str, ...]:
    """Remove the flags that set `names`, with their values."""
    return tuple(argument for name, group in grouped(argv) if name not in names for argument in group)


def with_new_names(argv: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    """Replace old names of settings by new ones, with one warning for each."""
    warned, replaced = set(), []
    for argument in argv:
        old = setting_name(argument) if argument.startswith("--") else ""
        if old in new_names:
            if old not in warned:
                warned.add(old)
                warn_of_new_name(f"--{old}", f"--{new_names[old]}")
            argument = f"--{new_names[old]}" + argument[len(argument.partition("=")[0]) :]
        replaced.append(argument)
    return replaced


def warn_of_new_name(old: str, new: str) -> None:
    """Warn that an old flag, which still works, has a new name."""
    logger.warning("%s is now called %s; the old name works until the next release.", old, new)


def as_flags(config: Mapping[str, Any]) -> list[str]:
    """Convert a config to command-line arguments, so that one parser checks both.

    Raises:
        UserError: A list in the config contains something that cannot be a value of a flag.
    """
    argv = []
    for name, value in config.items():
        if isinstance(value, list):
            for item in value:
                if not isinstance(item, str | int | float) or str(item).startswith("--"):
                    raise UserError(f"{name} holds {item!r}, which is not a valid value for it.")
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv.append(f"--{name}={json.dumps(value)}")
        else:
            argv.append(f"--{name}={NULL if value is None else value}")
    return argv


def take_debug(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Remove `--debug` from the arguments before a `--`. With a value it is the option of `Trainer`, and stays.

    Returns:
        Whether it was there, and the other arguments.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    places = {
        place
        for place, argument in enumerate(argv[:end])
        if argument == DEBUG and (place + 1 == len(argv) or argv[place + 1].startswith("-"))
    }
    return bool(places), [argument for place, argument in enumerate(argv) if place not in places]
