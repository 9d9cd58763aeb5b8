"""The flags of a run: read from JSON configs and the command line, and checked without importing torch."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..common.errors import UserError
from ..settings.flags import as_flags, grouped, setting_name, value_of, warn_of_new_name, with_new_names, without_flags
from ..settings.parsing import ManualParser, load_config
from ..settings.setting_values import Limit, limits_of
from ..settings.text_arguments import DataArguments
from .checks import check_together
from .fields import AdapterArguments, DistillationArguments, ModelArguments, TrainingFields
from .training_fields import ELSEWHERE, refused
from .training_outline import training_outline

PRINT_CONFIG = "--print_config"
PARTS = (ModelArguments, AdapterArguments, DistillationArguments, DataArguments)  # and the training's

_TOKEN = "hub_token"
_NEW_NAMES = {"overwrite_output_dir": "overwrite", "hub_private_repo": "private"}
_REPOSITORY, _SWITCH = "hub_model_id", "push_to_hub"
_ON, _OFF = ("", "true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0", "null")
# Names that other commands have for settings that are called here as in the protocol or in `Trainer`.
_ALSO = {"eval_file": "validation_file", "eval_batch_size": "per_device_eval_batch_size"}


def read_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags of a run: those of its configs, then those of the command line, which override them.

    Args:
        argv: The command-line arguments, without the program's name.

    Raises:
        UserError: A config is missing, unreadable or has an unknown key, or an access token is given.
    """
    selector = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    selector.add_argument("--config", action="append", default=[])
    selected, flags = selector.parse_known_args(list(argv))
    config: dict[str, Any] = {}
    for name in selected.config:
        config |= load_config(name)
    if config:
        parser_of(outlined()).refuse_unknown((name for name in config if name not in _OLD), "config key")
    return with_current_names(as_flags(config) + flags)


def with_current_names(flags: Sequence[str]) -> list[str]:
    """Replace the names that settings had before or have in other commands.

    Raises:
        UserError: An access token is given, or publishing is asked for without the name of a repository.
    """
    if any(argument.startswith("--") and setting_name(argument) == _TOKEN for argument in flags):
        raise UserError(
            f"{_TOKEN} is not accepted: process lists, shell histories and files would show it. Log in with "
            "`hf auth login`, or set HF_TOKEN."
        )
    flags = _with_repository(with_new_names(flags, _NEW_NAMES))
    return [
        f"--{_ALSO[name]}{argument[len(argument.partition('=')[0]) :]}" if place == 0 and name in _ALSO else argument
        for name, group in grouped(flags)
        for place, argument in enumerate(group)
    ]


_OLD = {*_NEW_NAMES, _REPOSITORY, *_ALSO}


def _with_repository(flags: Sequence[str]) -> list[str]:
    """Convert the old form, a switch `push_to_hub` with `hub_model_id`, to `push_to_hub` with the repository."""
    given = {name: value_of(group) for name, group in grouped(flags) if name in (_REPOSITORY, _SWITCH)}
    switch, repository = given.get(_SWITCH), given.get(_REPOSITORY)
    is_switch = switch is not None and switch.lower() in (*_ON, *_OFF)
    if not is_switch and repository is None:
        return list(flags)
    if not is_switch:
        warn_of_new_name(f"--{_REPOSITORY} with --{_SWITCH} True", f"--{_SWITCH} USER/NAME")
        return list(without_flags(flags, {_REPOSITORY}))
    others = list(without_flags(flags, {_REPOSITORY, _SWITCH}))
    if switch.lower() in _OFF:
        return others
    if not repository:
        raise UserError(f"{_SWITCH} needs the name of a repository: --{_SWITCH} USER/NAME.")
    warn_of_new_name(f"--{_SWITCH} True --{_REPOSITORY} {repository}", f"--{_SWITCH} {repository}")
    return [*others, f"--{_SWITCH}={repository}"]


@cache
def outlined() -> type:
    """Make a dataclass with the options of `RunArguments` but without its behaviour."""
    return dataclass(type("RunOptions", (TrainingFields, training_outline()), {"__post_init__": lambda self: None}))


@cache
def limits() -> dict[str, Limit]:
    """Return the limits of all settings of a run, by name."""
    return limits_of(*PARTS, TrainingFields)


def parser_of(training: type) -> ManualParser:
    """Make the parser of a run.

    Args:
        training: `RunArguments`, or the class of `outlined`.
    """
    parser = ManualParser(
        (*PARTS, training),
        prog="train_hf.py",
        description="Train a GPT-2 with a full or factorized vocabulary, or heal a compressed\n"
        "GPT-2 or other decoder with LoRA or full fine-tuning.",
        usage="%(prog)s --config NAME [option ...]",
        examples=(
            "train_hf.py --config baseline.json",
            "train_hf.py --config pca_lora_k64.json --train_file train.txt --validation_file held_out.txt",
            "train_hf.py --config pca_lora_k64.json --learning_rate 1e-3 --print_config",
        ),
        remark="All options can be set in a JSON config under the same names. Options\n"
        "on the command line override the config; the value null unsets an option.\n"
        "To resume an interrupted run, give the same command again. A finished run is\n"
        "not repeated.",
        refused=refused(),
        elsewhere=ELSEWHERE,
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="JSON config: a path, or a name under configs/. May be given several times; the last one wins.",
    )
    parser.add_argument(
        PRINT_CONFIG, action="store_true", help="Print all settings of this run as a JSON config, without running it."
    )
    return parser


def validate_flags(flags: Iterable[str]) -> None:
    """Check the flags of a run, as far as that is possible without torch. `--help` prints the page and exits.

    Raises:
        UserError: A setting is unknown, mistyped or refused, or contradicts or lacks another.
    """
    *parts, _ = parser_of(outlined()).parse(list(flags))
    check_together(*parts)


def check_flags(flags: Sequence[str]) -> list[str]:
    """Check each flag by itself.

    Returns:
        The names of the settings.

    Raises:
        UserError: A flag is unknown, mistyped or refused, or an access token is given.
    """
    flags = with_current_names(flags)
    parser_of(outlined()).check_each(flags)
    return [setting_name(argument) for argument in flags if argument.startswith("--")]
