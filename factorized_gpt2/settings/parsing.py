"""A parser for command lines and JSON configs whose errors are one line."""

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
from .flags import DEBUG, NULL, grouped, setting_name, value_of
from .help_pages import HelpPage, epilog, hide_negations
from .setting_values import check_values, limits_of


def _shipped_configs() -> Path:
    """Find the configs of this package: inside an installed one, next to it in a checkout."""
    package = Path(str(resources.files("factorized_gpt2")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


CONFIG_FOLDERS = (Path("configs"), _shipped_configs())


def find_config(name: str) -> Path | None:
    """Find a config's file by its path, or by its name under `configs/`, here or as it was shipped.

    Args:
        name: The path or name, as in `baseline.json`, `baseline` or `configs/accelerate/two_gpus.yaml`.

    Returns:
        The first file that exists; `None` if there is none.
    """
    folders = [Path(), *CONFIG_FOLDERS]
    if Path(name).parts[:1] == (CONFIG_FOLDERS[0].name,):
        folders.append(CONFIG_FOLDERS[1].parent)
    candidates = [str(folder / (name + suffix)) for suffix in ("", ".json") for folder in folders]
    return next((Path(path) for path in candidates if os.path.isfile(path)), None)


def load_config(name: str, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a config by path, or by name under `configs/`. Its values override those of the config that it `extends`.

    Args:
        name: The path or name.
        extended_by: Files that extend this one, to detect a circle.

    Raises:
        UserError: There is no such config (the message lists the existing ones), or it extends itself.
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
    if found.resolve() in extended_by:
        raise UserError(f"{found} extends itself.")
    return load_config(str(found.parent / parent), (*extended_by, found.resolve())) | config


_DEBUG_HELP = "Print the traceback of an error, for bug reports."


_NOTHING: tuple[Any, ...] = (None, "", False, [], [""])  # values that count as not set


class ManualParser(HfArgumentParser):
    """`HfArgumentParser` without abbreviations, with every error as a `UserError`, and with a readable help page.

    Args:
        dataclass_types: As for `HfArgumentParser`; `_argument_group_name` is the heading of a group.
        usage: The usage line, with the options that most calls need.
        examples: Whole commands, without `python`.
        remark: Text to show after the options.
        refused: Options of the dataclasses that the command does not accept, with the reason. They are not on the help
            page, and must have their default values.
        elsewhere: Options of other programs, with the options that replace them here.
        **kwargs: As for `ArgumentParser`.
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
        """Return the help page, which names commands the way this one was called."""
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` for a wrong argument."""
        raise UserError(message)

    def parse(self, argv: list[str]) -> tuple:
        """Parse command-line arguments into the dataclasses.

        Raises:
            UserError: An argument is unknown, mistyped or refused by a dataclass. The message names it.
        """
        self.check_each(argv)
        with blaming("The settings cannot be used", *REFUSED_SETTINGS):
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)

    def check_each(self, argv: Sequence[str]) -> None:
        """Check each command-line argument by itself.

        Raises:
            UserError: An argument is unknown, mistyped or out of range. The message names it.
        """
        _, rest = self.parse_known_args(list(argv))
        self.refuse_unknown((argument.split("=")[0] for argument in rest), "argument")

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse the known arguments and check every value."""
        argv, nothing = self._without_null(sys.argv[1:] if args is None else list(args))
        namespace, rest = super().parse_known_args(argv, namespace)
        vars(namespace).update(dict.fromkeys(nothing))
        self._refuse(vars(namespace))
        check_values(vars(namespace), self._limits)
        return namespace, rest

    def _without_null(self, argv: Sequence[str]) -> tuple[list[str], set[str]]:
        """Remove the settings that `null` unsets; return the other arguments, and the settings that become `None`."""
        kept: list[tuple[str, list[str]]] = []
        nothing: set[str] = set()
        for name, group in grouped(argv):
            nothing.discard(name)
            if name and value_of(group) == NULL:
                kept = [(other, argv) for other, argv in kept if other != name]
                nothing |= {name} & self._optional
            else:
                kept.append((name, group))
        return [argument for _, group in kept for argument in group], nothing

    def _refuse(self, settings: Mapping[str, Any]) -> None:
        first = {action.dest: action for action in reversed(self._actions)}  # whose default counts
        for name, reason in self._refused.items():
            value, default, kind = settings.get(name), first[name].default, first[name].type
            if isinstance(default, str) and callable(kind):
                default = kind(default)  # as argparse does
            if value != default and (default or value not in _NOTHING):
                raise UserError(f"{name} is not accepted: {reason}")

    def refuse_unknown(self, names: Iterable[str], kind: str) -> None:
        """Raise a `UserError` for unknown names, with the most similar known one."""
        known = {action.dest for action in self._actions} - {"help", "config", "print_config"}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name.lstrip("-"), sorted(known - set(self._refused)), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                successor = self._elsewhere.get(setting_name(name))
                raise UserError(f"Unknown {kind} {name!r}" + (f": {successor}." if successor else f".{hint}"))
