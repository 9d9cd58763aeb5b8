"""What identifies files, models and tokenizers by their content, whatever they are called."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME

from .weight_files import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json")
_TOKENIZER_PATTERNS = ("*.model", "*.tiktoken")
# Of a tokenizer's config: what changes the tokens that its files make of text.
_TOKENIZING = ("add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "normalizer", "legacy")
# Of a config: what each saving may write anew without changing what the model computes.
_PASSING = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "_name_or_path")


def files_fingerprint(paths: Iterable[str | Path]) -> str | None:
    """Identify files by what they hold, in their order.

    Returns:
        SHA-256 as 64 hexadecimal digits; `None` where there are no files, or one cannot be read.
    """
    try:
        states = [(os.path.abspath(path), os.stat(path)) for path in paths]
        digests = [_digest(path, state.st_ino, state.st_size, state.st_mtime_ns) for path, state in states]
    except OSError:
        return None
    return _joined(*digests) if digests else None


@lru_cache(maxsize=4096)  # a run asks more than once
def _digest(path: str, *state: int) -> str:
    return _sha256([path])


def weights_fingerprint(name_or_path: str | None) -> str | None:
    """Identify the weights in a model's folder.

    Returns:
        SHA-256 over the files they are loaded from, as 64 hexadecimal digits; `None` where there is no such local
        folder.
    """
    files = weight_files(Path(name_or_path)) if name_or_path else []
    if not files:
        return None
    return _sha256(files)


def model_content(name_or_path: str) -> str | None:
    """Identify a model: a local folder by its weights and config, one of the Hub by the commit that was loaded last.

    Returns:
        `None` for one that cannot be told.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        config = {name: value for name, value in _json(folder / CONFIG_NAME).items() if name not in _PASSING}
        weights = files_fingerprint(weight_files(folder))
        return weights and _joined(weights, json.dumps(config, sort_keys=True))
    return _commit(name_or_path, CONFIG_NAME)


def tokenizer_content(name_or_path: str) -> str | None:
    """Identify a tokenizer: in a local folder by its files, on the Hub by the commit that was loaded last.

    Returns:
        `None` for one that cannot be told.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        found = {path.name for pattern in _TOKENIZER_PATTERNS for path in folder.glob(pattern)}
        names = [*_TOKENIZER_FILES, *sorted(found.difference(_TOKENIZER_FILES))]
        files = files_fingerprint(folder / name for name in names if (folder / name).is_file())
        return files and _joined(files, *_said_beside(folder))
    return _commit(name_or_path, "tokenizer.json") or _commit(name_or_path, "vocab.json")


def _said_beside(folder: Path) -> list[str]:
    """List what the other files beside a tokenizer's say of the tokens that it makes, and of the end of a text."""
    config = _json(folder / "tokenizer_config.json")
    end = config.get("eos_token")
    said = [str(end.get("content") if isinstance(end, dict) else end)]
    if end is None:  # then it stands in one of these, if anywhere
        others = {"special_tokens_map.json": "eos_token", CONFIG_NAME: "eos_token_id"}
        named = (_json(folder / file).get(key) for file, key in others.items())
        said += [str(name) for name in named if name is not None]
    # No space is put before a text unless the config says so; the others have defaults of either kind.
    rules = {name: config.get(name) for name in _TOKENIZING if config.get(name) is not None}
    return said + [f"{name}={rule}" for name, rule in rules.items() if rule or name != "add_prefix_space"]


def config_fingerprint(config: "PretrainedConfig") -> str:
    """Identify what a model's config changes of the defaults, apart from where it is, how exact and by whom."""
    kept = config.to_diff_dict()
    for name in _PASSING:
        kept.pop(name, None)
    return _joined(json.dumps(kept, sort_keys=True, default=str))


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase | None") -> str | None:
    """Identify a tokenizer that is loaded, by what it makes of text and by its special tokens; `None` for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return _joined(rules, str(sorted(tokenizer.special_tokens_map.items())))


def tokens_fingerprint(rows: Iterable[Sequence[int]]) -> str:
    """Identify tokenized text by its ids, in their order, wherever its blocks end.

    Returns:
        SHA-256 over the ids as int32, as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.ascontiguousarray(row, dtype=np.int32).data)
    return digest.hexdigest()


def _commit(name: str, file: str) -> str | None:
    """Name the commit of a repository on the Hub whose file is in the cache under the name of its main branch."""
    try:
        path = try_to_load_from_cache(name, file)
    except ValueError:  # no name of a repository
        return None
    return Path(path).parts[-2] if isinstance(path, str) else None


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where it cannot be read, which whoever loads it will say."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _joined(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _sha256(paths: Iterable[str | Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
