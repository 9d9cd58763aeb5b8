"""Which values settings may have, by the setting's name, whatever command it belongs to."""

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import UserError

_LARGEST_FLOAT, _LARGEST_INT = 3.4e38, 2**63 - 1  # of float32, in which models compute, and of int64


class Range(NamedTuple):
    """Numbers from `low` to `high`, the ends included unless they are open."""

    low: float
    high: float = math.inf
    is_open_below: bool = False
    is_open_above: bool = False

    def __contains__(self, number: float) -> bool:
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


_POSITIVE, _NOT_NEGATIVE, _COUNT, _SHARE = Range(0, is_open_below=True), Range(0), Range(1), Range(0, 1)

_RANGES = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "n_embd_wte", "ranks"), _COUNT),
    **{"block_size": Range(2), "dropout": _SHARE, "lora_rank": _NOT_NEGATIVE, "lora_alpha": _POSITIVE},
    **{"lora_dropout": _SHARE, "distillation_weight": _SHARE, "distillation_temperature": _POSITIVE},
    **dict.fromkeys(("max_eval_samples", "shuffle_buffer", "eval_batch_size", "calibration_tokens"), _COUNT),
    **{"preprocessing_num_workers": Range(1, 1024), "effective_batch_size": _COUNT, "refine": _NOT_NEGATIVE},
    **{"target_loss_increase": _POSITIVE, "explained_variance": Range(0, 1, is_open_below=True)},
    **{"seed": Range(0, 2**32 - 1), "data_seed": Range(0, 2**32 - 1)},
    # Of `TrainingArguments`.
    **{"max_steps": Range(-1), "num_train_epochs": Range(0, 1e9), "warmup_steps": _NOT_NEGATIVE},
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "min_lr", "weight_decay", "max_grad_norm", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1, is_open_above=True)),
    **{"adam_epsilon": _POSITIVE, "label_smoothing_factor": _SHARE, "neftune_noise_alpha": _NOT_NEGATIVE},
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), _COUNT),
    **{"dataloader_num_workers": Range(0, 1024), "dataloader_prefetch_factor": _COUNT, "save_total_limit": _COUNT},
    **{"ddp_timeout": _COUNT, "ddp_bucket_cap_mb": _COUNT},
}

_FOLDERS = ("output_dir",)
_PATHS = (
    *(*_FOLDERS, "baseline", "compressed", "teacher", "models", "tokenizer", "results", "checkpoint"),
    *("wte_npy", "scale_npz", "train_file", "validation_file", "calibration_file", "eval_file"),
)


def check_values(settings: Mapping[str, Any]) -> None:
    """Judge values, each by itself.

    Args:
        settings: Values by the settings' names; lists and mappings are judged by what they hold. `None` is not judged.

    Raises:
        UserError: A number out of its range, NaN or infinite; text that no file or terminal can hold; a path that the
            system refuses, or a folder to write to that is a file. By name.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_values(value)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool):
                _check_number(name, item)
            elif isinstance(item, str):
                _check_text(name, item)
                if name in _PATHS:
                    _check_path(name, item)


def _check_number(name: str, number: float) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"{name} must be finite, got {number}.")
    if name in _RANGES and number not in _RANGES[name]:
        raise UserError(f"{name} must {_RANGES[name]}, got {number}.")
    if abs(number) > (_LARGEST_INT if isinstance(number, int) else _LARGEST_FLOAT):
        raise UserError(f"{name} is larger than any number of its kind that can be computed with: {number}.")


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise UserError(f"{name} contains a NUL character: {text!r}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid Unicode: {text!r}.") from error


def _check_path(name: str, path: str) -> None:
    if not path:
        raise UserError(f"{name} is empty.")
    is_folder_to_write = name in _FOLDERS
    if is_folder_to_write and not Path(path).absolute().name:
        raise UserError(f"{name}={path} is the root of all folders; name one in it.")
    try:
        is_file = not stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        if isinstance(error, NotADirectoryError) and not is_folder_to_write:
            return  # as good as not there, which whoever reads it will say
        raise UserError(f"{name}={path} cannot be used: {error.strerror}.") from error
    if is_folder_to_write and is_file:
        raise UserError(f"{name}={path} is a file, not a folder; name another.")
