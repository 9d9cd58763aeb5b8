"""Tokenizers on disk, as other tools and other versions of transformers can read them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from ..common.files import read_json, write_json

# transformers 5 renamed its base class, and knows the old name too; transformers 4, and whatever builds on it, knows
# the old one alone.
_CLASS_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path | str, positions: int | None = None) -> None:
    """Write a tokenizer into a folder. It is not changed.

    Args:
        tokenizer: Of transformers.
        folder: Of the model, say.
        positions: Of the model, to which the saved tokenizer truncates when asked to; `None` keeps its own limit.
    """
    tokenizer.save_pretrained(folder)
    make_portable(Path(folder), positions)


def make_portable(folder: Path, positions: int | None = None) -> None:
    """Have a saved tokenizer's configuration say what `save_tokenizer` has it say."""
    path = folder / TOKENIZER_CONFIG_FILE
    config = portable_config(read_json(path))
    if positions is not None:
        config["model_max_length"] = positions
    write_json(path, config)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Write a tokenizer's configuration, which transformers 5 saved, so that version 4 reads it too."""
    config = dict(config)
    if config.get("tokenizer_class") in _CLASS_NAMES:
        config["tokenizer_class"] = _CLASS_NAMES[config["tokenizer_class"]]
    if isinstance(config.get("extra_special_tokens"), list):  # a mapping in version 4, which ends in a traceback
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
