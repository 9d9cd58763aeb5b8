"""Tokenizers as people have them: what `tokenizer.json` says, with an end of text or without."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..common.errors import UserError, blaming
from ..common.lfs_pointers import refuse_pointers
from ..common.model_places import refuse_missing

logger = logging.getLogger(__name__)

_GPT2_END_OF_TEXT = "<|endoftext|>"
_POINTED_AT = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a Hub id or a folder.

    A `tokenizer.json` is taken as it stands. The tokenizer classes of single models, GPT-2's among them, would rebuild
    it from its vocabulary and lose how it normalizes and splits text. Where its files name no beginning or end of
    text, the model's `config.json` beside them does, or else the vocabulary, by GPT-2's `<|endoftext|>`.

    Returns:
        The tokenizer; its `eos_token` is `None` where nothing names an end of text.

    Raises:
        UserError: There is none, or one with a chat template that would be saved elsewhere.
    """
    culprit = f"No tokenizer can be loaded from {name_or_path!r}"
    refuse_missing(name_or_path)
    refuse_pointers(Path(name_or_path) / name for name in _POINTED_AT)
    with blaming(culprit, Exception):  # tokenizers has no narrower
        tokenizer_class: type
        if _has_file(name_or_path, "tokenizer.json"):
            tokenizer_class = PreTrainedTokenizerFast
        elif (Path(name_or_path) / "vocab.json").is_file():
            tokenizer_class = GPT2Tokenizer
        else:
            tokenizer_class = AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(name_or_path, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
        if vocabulary.keys() <= set(tokenizer.all_special_tokens):  # what transformers makes of no files at all
            raise UserError(f"{culprit}: it has none of the files of a tokenizer.")
        _name_ends(tokenizer, vocabulary, name_or_path)
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    tokenizer.init_kwargs.pop("auto_map", None)  # names code, and what is saved must not pass a stranger's on
    for name in templates:  # each becomes a file wherever the tokenizer is saved
        if Path(name).name != name:
            raise UserError(
                f"The tokenizer {name_or_path!r} has a chat template {name!r}, which cannot be a file name."
            )
    return tokenizer


def has_tokenizer(name_or_path: str) -> bool:
    """Say whether there may be a tokenizer: not in a local folder with none of the files that make one."""
    folder = Path(name_or_path)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the rows that a model needs for a tokenizer: up to its largest token id, gaps included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that marks where a document ends.

    Raises:
        UserError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} has no eos_token, which marks where a document of the text "
            'ends; name a token of its vocabulary in its tokenizer_config.json, as in "eos_token": "[SEP]".'
        )
    return tokenizer.eos_token_id


def _has_file(name_or_path: str, file: str) -> bool:
    folder = Path(name_or_path)
    if folder.is_dir():
        return (folder / file).is_file()
    try:
        hf_hub_download(name_or_path, file)
    except EntryNotFoundError:  # also where there is no connection and no copy
        return False
    return True


def _name_ends(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], name_or_path: str) -> None:
    """Name the tokens that begin and end a text where the tokenizer's own files do not."""
    unnamed = [role for role in ("bos_token", "eos_token") if getattr(tokenizer, role) is None]
    config: dict[str, Any] = {}
    if unnamed and _has_file(name_or_path, "config.json"):
        config, _ = PretrainedConfig.get_config_dict(name_or_path)
    tokens: dict[Any, str] = {index: token for token, index in vocabulary.items()}
    for role in unnamed:
        named = config.get(f"{role}_id")
        token = tokens.get(named[0] if isinstance(named, list) and named else named)
        if token is not None and token != _GPT2_END_OF_TEXT:
            logger.warning("The tokenizer %s has no %s; its config.json says %r.", name_or_path, role, token)
        elif _GPT2_END_OF_TEXT in vocabulary:
            token = _GPT2_END_OF_TEXT
        if token is not None:
            tokenizer.add_special_tokens({role: token})
