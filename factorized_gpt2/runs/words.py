"""The words of a run: a JSON config first, flags over it, judged before anything is imported that computes."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..common.errors import UserError
from ..settings.parsing import ManualParser, load_config
from ..settings.setting_values import Limit, limits_of
from ..settings.text_arguments import DataArguments
from ..settings.words import as_flags, grouped, setting_name, tell_new_name, value_of, with_new_names, without_flags
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
# What other commands call what a run knows by the protocol's or the Trainer's names.
_ALSO = {"eval_file": "validation_file", "eval_batch_size": "per_device_eval_batch_size"}


def read_words(argv: Sequence[str]) -> list[str]:
    """Read the words of a run: those of its configs, then the flags, which override them, by their present names.

    Args:
        argv: The words after the program's name.

    Raises:
        UserError: A config that is not there or cannot be read, or with an unknown key; a token.
    """
    selector = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    selector.add_argument("--config", action="append", default=[])
    selected, flags = selector.parse_known_args(list(argv))
    config: dict[str, Any] = {}
    for name in selected.config:
        config |= load_config(name)
    if config:
        parser_of(outlined()).refuse_unknown((name for name in config if name not in _OLD), "config key")
    return with_present_names(as_flags(config) + flags)


def with_present_names(words: Sequence[str]) -> list[str]:
    """Replace the names that settings had before, or that they have in other commands.

    Raises:
        UserError: A token; a switch to publish without the name of a repository.
    """
    if any(word.startswith("--") and setting_name(word) == _TOKEN for word in words):
        raise UserError(
            f"{_TOKEN} is not accepted: process lists, shell histories and files would show it. Log in with "
            "`hf auth login`, or set HF_TOKEN."
        )
    words = _with_repository(with_new_names(words, _NEW_NAMES))
    return [
        f"--{_ALSO[name]}{word[len(word.partition('=')[0]) :]}" if place == 0 and name in _ALSO else word
        for name, group in grouped(words)
        for place, word in enumerate(group)
    ]


_OLD = {*_NEW_NAMES, _REPOSITORY, *_ALSO}


def _with_repository(words: Sequence[str]) -> list[str]:
    """Let `push_to_hub` name the repository, where it is the switch beside `hub_model_id` that it was once."""
    given = {name: value_of(group) for name, group in grouped(words) if name in (_REPOSITORY, _SWITCH)}
    switch, repository = given.get(_SWITCH), given.get(_REPOSITORY)
    is_switch = switch is not None and switch.lower() in (*_ON, *_OFF)
    if not is_switch and repository is None:
        return list(words)
    if not is_switch:
        tell_new_name(f"--{_REPOSITORY} beside --{_SWITCH} True", f"--{_SWITCH} USER/NAME")
        return list(without_flags(words, {_REPOSITORY}))
    others = list(without_flags(words, {_REPOSITORY, _SWITCH}))
    if switch.lower() in _OFF:
        return others
    if not repository:
        raise UserError(f"{_SWITCH} needs the name of a repository: --{_SWITCH} USER/NAME.")
    tell_new_name(f"--{_SWITCH} True --{_REPOSITORY} {repository}", f"--{_SWITCH} {repository}")
    return [*others, f"--{_SWITCH}={repository}"]


@cache
def outlined() -> type:
    """Make a stand-in for `RunArguments`, which knows the same options and does nothing."""
    return dataclass(type("RunOptions", (TrainingFields, training_outline()), {"__post_init__": lambda self: None}))


@cache
def limits() -> dict[str, Limit]:
    """Collect the limits of every setting of a run, by name."""
    return limits_of(*PARTS, TrainingFields)


def parser_of(training: type) -> ManualParser:
    """Make the parser of a run.

    Args:
        training: `RunArguments`, or what stands in for it.
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


def judge(words: Iterable[str]) -> None:
    """Judge the words of a run, as far as that needs nothing that computes; `--help` prints the page and ends.

    Raises:
        UserError: An unknown, mistyped or refused setting, or one that contradicts or lacks another.
    """
    *parts, _ = parser_of(outlined()).parse(list(words))
    check_together(*parts)


def check_words(words: Sequence[str]) -> list[str]:
    """Judge flags, each by itself.

    Returns:
        The names, as settings have them.

    Raises:
        UserError: An unknown, mistyped or refused flag, or a token.
    """
    words = with_present_names(words)
    parser_of(outlined()).judge(words)
    return [setting_name(word) for word in words if word.startswith("--")]
