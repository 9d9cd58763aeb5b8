"""Command-line words: taken apart, put together from a config, and old names among them replaced by new ones."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..common.errors import UserError

logger = logging.getLogger(__name__)

DEBUG = "--debug"
NULL = "null"
"""Takes a setting back, as in JSON: to none where it may be none, else to its default."""


def setting_name(flag: str) -> str:
    """Name the setting that a command-line word like `--max-steps=5` sets."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def grouped(words: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Group every flag with the values that follow it.

    Yields:
        The setting's name, empty for words before the first flag, and the words.
    """
    name = ""
    group: list[str] = []
    for word in words:
        if word.startswith("--"):
            if group:
                yield name, group
            name, group = setting_name(word), []
        group.append(word)
    if group:
        yield name, group


def value_of(group: Sequence[str]) -> str:
    """Return the one value of a flag, as in `--seed=3` and `--seed 3`; empty where there is none, or several."""
    flag, *values = group
    if "=" in flag:
        return flag.partition("=")[2]
    return values[0] if len(values) == 1 else ""


def without_flags(words: Iterable[str], names: set[str]) -> tuple[str, ...]:
    """Leave out the flags that set `names`, each with the values that follow it."""
    return tuple(word for name, group in grouped(words) if name not in names for word in group)


def with_new_names(words: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    """Replace old names of settings by new ones, and say so once for each."""
    told, replaced = set(), []
    for word in words:
        old = setting_name(word) if word.startswith("--") else ""
        if old in new_names:
            if old not in told:
                told.add(old)
                tell_new_name(f"--{old}", f"--{new_names[old]}")
            word = f"--{new_names[old]}" + word[len(word.partition("=")[0]) :]
        replaced.append(word)
    return replaced


def tell_new_name(old: str, new: str) -> None:
    """Say what stands for an old way of asking, which is still understood."""
    logger.warning("%s is now called %s; the old name works until the next release.", old, new)


def as_flags(config: Mapping[str, Any]) -> list[str]:
    """Spell a config as command-line words, so that one parser types and checks both.

    Raises:
        UserError: A list holds what is no word.
    """
    words = []
    for name, value in config.items():
        if isinstance(value, list):
            for item in value:
                if not isinstance(item, str | int | float) or str(item).startswith("--"):
                    raise UserError(f"{name} holds {item!r}, which is not a valid value for it.")
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        else:
            words.append(f"--{name}={NULL if value is None else value}")
    return words


def take_debug(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Take `--debug` out of a command's own words, those before a `--`; with a value it is Trainer's, and stays.

    Returns:
        Whether it was there, and the other words.
    """
    end = words.index("--") if "--" in words else len(words)
    places = {
        place
        for place, word in enumerate(words[:end])
        if word == DEBUG and (place + 1 == len(words) or words[place + 1].startswith("-"))
    }
    return bool(places), [word for place, word in enumerate(words) if place not in places]
