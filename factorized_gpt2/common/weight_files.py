"""Files that a model is loaded from."""

from pathlib import Path

from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, CONFIG_NAME, GENERATION_CONFIG_NAME

MODEL_FILES = (
    *("model*.safetensors", "model*.safetensors.index.json", CONFIG_NAME, GENERATION_CONFIG_NAME),
    *(FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE),
    *("vocab.json", "merges.txt", "vocab.txt", CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/"),
)
"""Patterns of the names of what is saved for a model and its tokenizer; the one of a folder ends with a slash."""


def weight_files(folder: Path) -> list[Path]:
    """List the files of weights in a folder, as transformers chooses them: pickles only for want of others.

    Those of an adapter, say, may stand beside the pickles, which are no others of the model.
    """
    others, pickles = (
        sorted(path for path in folder.glob(pattern) if path.is_file())
        for pattern in ("*.safetensors", "pytorch_model*.bin")
    )
    return others if others and (any(folder.glob("model*.safetensors*")) or not pickles) else pickles
