"""Command-line words and JSON configs, and a parser of both that complains in one line."""

import argparse
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import HfArgumentParser

from ..common.errors import REFUSED_SETTINGS, UserError, blaming
from ..common.files import read_json
from .command_names import as_called
from .help_pages import HelpPage, epilog, hide_negations
from .setting_values import check_values


def _shipped_configs() -> Path:
    """Find the configs that come with this package: an installed one holds them, in a checkout they lie beside it."""
    package = Path(str(resources.files("factorized_gpt2")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


CONFIG_FOLDERS = (Path("configs"), _shipped_configs())


def find_config(name: str) -> Path | None:
    """Find a config's file by its path, or by its name under `configs/`, here or as it was shipped.

    Args:
        name: The path or name, as in `baseline.json`, `baseline` or `configs/accelerate/two_gpus.yaml`.

    Returns:
        The first that there is, `None` where there is none.
    """
    folders = [Path(), *CONFIG_FOLDERS]
    if Path(name).parts[:1] == (CONFIG_FOLDERS[0].name,):
        folders.append(CONFIG_FOLDERS[1].parent)
    candidates = [str(folder / (name + suffix)) for suffix in ("", ".json") for folder in folders]
    return next((Path(path) for path in candidates if os.path.isfile(path)), None)


def load_config(name: str, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a config by path, or by name under `configs/`, with what it `extends` below it.

    Args:
        name: The path or name.
        heirs: Files that extend this one.

    Raises:
        UserError: There is no such config (the message lists those there are), or it extends itself.
    """
    found = find_config(name)
    if found is None:
        known = sorted({path.name for folder in CONFIG_FOLDERS for path in folder.glob("*.json")})
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"There is no config {name!r}, neither as a path nor under configs/."
            + (f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}.")
        )
    config = read_json(found)
    parent = config.pop("extends", None)
    if parent is None:
        return config
    if not isinstance(parent, str):
        raise UserError(f"{found}: extends must name a config, got {parent!r}.")
    if found.resolve() in heirs:
        raise UserError(f"{found} extends itself.")
    return load_config(str(found.parent / parent), (*heirs, found.resolve())) | config


DEBUG = "--debug"
_DEBUG_HELP = "Show where an error comes from, with its traceback."


_NOTHING = (None, "", False, [], [""])  # ways to leave an option out


class ManualParser(HfArgumentParser):
    """`HfArgumentParser` without abbreviations, whose every complaint is a `UserError`, and whose help is a page.

    Args:
        dataclass_types: As `HfArgumentParser` has them; `_argument_group_name` is a heading.
        usage: The words that most calls need.
        examples: Whole commands, without `python`.
        remark: What there is to say beside the options.
        refused: Options that the dataclasses have and the command does not take, with the reason; they may have their
            defaults, and are not on the page.
        elsewhere: Options of other programs, with what stands for them here.
        **kwargs: What `ArgumentParser` takes.
    """

    def __init__(
        self,
        dataclass_types: Any,
        usage: str = "%(prog)s [option ...]",
        examples: Sequence[str] = (),
        remark: str = "",
        refused: Mapping[str, str] = MappingProxyType({}),
        elsewhere: Mapping[str, str] = MappingProxyType({}),
        **kwargs: Any,
    ):
        page = {"formatter_class": HelpPage, "usage": usage, "epilog": epilog(examples, remark)}
        super().__init__(dataclass_types, allow_abbrev=False, **page, **kwargs)
        self._refused, self._elsewhere = refused, elsewhere
        hide_negations(self)
        for action in self._actions:
            if action.dest in refused:
                action.help = argparse.SUPPRESS
        taken = next((action for action in self._actions if action.dest == "debug"), None)
        if taken is None:
            self.add_argument(DEBUG, action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
        else:  # Trainer's own debugging, which needs a value
            taken.nargs, taken.type, taken.help = "*", str, _DEBUG_HELP

    def format_help(self) -> str:
        """Write the page, with the commands' names as this one was called."""
        return as_called(super().format_help())

    def error(self, message: str) -> None:
        """Complain of one argument."""
        raise UserError(message)

    def parse(self, words: list[str]) -> tuple:
        """Parse command-line words into the dataclasses.

        Raises:
            UserError: A word that is unknown, mistyped or refused by a dataclass, by name.
        """
        with blaming("The settings cannot be used", *REFUSED_SETTINGS):
            *parts, rest = self.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
        self.refuse_unknown((word.split("=")[0] for word in rest), "argument")
        return tuple(parts)

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse what is known, and judge every value by its setting's name."""
        namespace, rest = super().parse_known_args(args, namespace)
        self._refuse(vars(namespace))
        check_values(vars(namespace))
        return namespace, rest

    def _refuse(self, settings: Mapping[str, Any]) -> None:
        first = {action.dest: action for action in reversed(self._actions)}  # whose default counts
        for name, reason in self._refused.items():
            value, default, kind = settings.get(name), first[name].default, first[name].type
            if isinstance(default, str) and callable(kind):
                default = kind(default)  # as argparse does
            if value != default and (default or value not in _NOTHING):
                raise UserError(f"{name} is not taken: {reason}")

    def refuse_unknown(self, names: Iterable[str], kind: str) -> None:
        """Refuse names that are no argument, and say which known one is nearest."""
        known = {action.dest for action in self._actions} - {"help", "config", "print_config"}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name.lstrip("-"), sorted(known - set(self._refused)), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                successor = self._elsewhere.get(setting_name(name))
                raise UserError(f"Unknown {kind} {name!r}" + (f": {successor}." if successor else f".{hint}"))


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


def as_flags(config: dict[str, Any]) -> list[str]:
    """Spell a config as command-line words, so that one parser types and checks both.

    Raises:
        UserError: A list holds what is no word.
    """
    words = []
    for name, value in config.items():
        if isinstance(value, list):
            for item in value:
                if not isinstance(item, str | int | float) or str(item).startswith("--"):
                    raise UserError(f"{name} holds {item!r}, which is no value of it.")
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def setting_name(flag: str) -> str:
    """Name the setting that a command-line word like `--max-steps=5` sets."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def without_flags(words: Iterable[str], names: set[str]) -> tuple[str, ...]:
    """Leave out the flags that set `names`, each with the values that follow it."""
    kept, is_kept = [], True
    for word in words:
        if word.startswith("--"):
            is_kept = setting_name(word) not in names
        if is_kept:
            kept.append(word)
    return tuple(kept)
