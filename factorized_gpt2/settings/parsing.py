"""Command-line words and JSON configs, and a parser of both that complains in one line."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from ..common.errors import REFUSED_SETTINGS, UserError, blaming
from ..common.files import read_json
from .command_names import as_called
from .help_pages import HelpPage, epilog, hide_negations
from .setting_values import check_values, limits_of
from .words import DEBUG, NULL, grouped, setting_name, value_of


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


_DEBUG_HELP = "Print the traceback of an error, for bug reports."


_NOTHING: tuple[Any, ...] = (None, "", False, [], [""])  # ways to leave an option out


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
        self._limits = limits_of(*self.dataclass_types)
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self._optional = {name for name, hint in hints.items() if NoneType in get_args(hint)}
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

    def error(self, message: str) -> NoReturn:
        """Complain of one argument."""
        raise UserError(message)

    def parse(self, words: list[str]) -> tuple:
        """Parse command-line words into the dataclasses.

        Raises:
            UserError: A word that is unknown, mistyped or refused by a dataclass, by name.
        """
        self.judge(words)
        with blaming("The settings cannot be used", *REFUSED_SETTINGS):
            return self.parse_args_into_dataclasses(words, look_for_args_file=False)

    def judge(self, words: Sequence[str]) -> None:
        """Judge every command-line word by itself, before anything is made of them.

        Raises:
            UserError: A word that is unknown, mistyped or out of its range, by name.
        """
        _, rest = self.parse_known_args(list(words))
        self.refuse_unknown((word.split("=")[0] for word in rest), "argument")

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse what is known, and judge every value by its setting's name."""
        words, nothing = self._without_null(sys.argv[1:] if args is None else list(args))
        namespace, rest = super().parse_known_args(words, namespace)
        vars(namespace).update(dict.fromkeys(nothing))
        self._refuse(vars(namespace))
        check_values(vars(namespace), self._limits)
        return namespace, rest

    def _without_null(self, words: Sequence[str]) -> tuple[list[str], set[str]]:
        """Leave out settings that are taken back; return the other words, and which settings become `None`."""
        kept: list[tuple[str, list[str]]] = []
        nothing: set[str] = set()
        for name, group in grouped(words):
            nothing.discard(name)
            if name and value_of(group) == NULL:
                kept = [(other, words) for other, words in kept if other != name]
                nothing |= {name} & self._optional
            else:
                kept.append((name, group))
        return [word for _, group in kept for word in group], nothing

    def _refuse(self, settings: Mapping[str, Any]) -> None:
        first = {action.dest: action for action in reversed(self._actions)}  # whose default counts
        for name, reason in self._refused.items():
            value, default, kind = settings.get(name), first[name].default, first[name].type
            if isinstance(default, str) and callable(kind):
                default = kind(default)  # as argparse does
            if value != default and (default or value not in _NOTHING):
                raise UserError(f"{name} is not accepted: {reason}")

    def refuse_unknown(self, names: Iterable[str], kind: str) -> None:
        """Refuse names that are no argument, and say which known one is nearest."""
        known = {action.dest for action in self._actions} - {"help", "config", "print_config"}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name.lstrip("-"), sorted(known - set(self._refused)), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                successor = self._elsewhere.get(setting_name(name))
                raise UserError(f"Unknown {kind} {name!r}" + (f": {successor}." if successor else f".{hint}"))
