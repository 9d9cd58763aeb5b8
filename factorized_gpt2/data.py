"""Text to packed blocks of token ids, through `datasets`: cached on disk and flat in memory, or streamed."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets import config as datasets_config
from datasets import logging as datasets_logging
from datasets.fingerprint import Hasher
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from .errors import UserError, blaming, first_line, silenced
from .fingerprints import files_fingerprint
from .json_rows import is_json_array, parse_json_lines, read_json_array

IGNORED_LABEL = -100

_FORMAT = 1  # of what is cached on disk; to be raised with every change to what this module makes of a text

_TEXT_TYPES = (Value("string"), Value("large_string"))
_TEXT_SUFFIXES = {".txt", ".text", ".tokens", ".raw", ".md"}
_JSON_SUFFIXES = {".json", ".jsonl"}
_TEXT = Features({"text": Value("large_string")})
_SUFFIXES = sorted(_TEXT_SUFFIXES | _JSON_SUFFIXES | {".parquet"})


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a dataset of the Hub, or local files.

    Attributes:
        files: Local text (.txt, .tokens, .raw, .text, .md), JSON lines (.json, .jsonl) or .parquet files; when there
            are none, `dataset_name` is read.
        dataset_name: Hub id.
        dataset_config_name: Configuration of that dataset.
        split: Split of that dataset.
        text_column: Column that holds the text.
        document_start: Regular expression: a row that it matches at its beginning starts a document. `None`: every
            row is a document, except that a text file is one document.
    """

    files: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    document_start: str | None = field(default=None)

    @property
    def name(self) -> str:
        """What to call it in a record."""
        if self.files:
            return ", ".join(self.files)
        return " ".join(filter(None, (self.dataset_name, self.dataset_config_name, self.split)))

    def load(self, streaming: bool = False) -> list[tuple[Dataset | IterableDataset, re.Pattern | None]]:
        """Load the text.

        Args:
            streaming: Read it as it is needed, from where it lies, instead of from a copy on disk.

        Returns:
            Datasets with one column `text`, a line or a row each, with the pattern that starts a document, or `None`
            where the whole dataset is one.

        Raises:
            UserError: A file or dataset that cannot be read, or has no such column; a cache that cannot be written.
        """
        _require_cache()
        pattern = re.compile(self.document_start) if self.document_start else None
        every_row = pattern or re.compile("")
        load = partial(self._load, streaming=streaming)
        if not self.files:
            if self.dataset_name is None:
                raise UserError("No text given: name files or a dataset.")
            return [(load("", self.dataset_name, self.dataset_config_name, split=self.split), every_row)]
        loaded = []
        for name in self.files:
            path = Path(name)
            if not path.is_file():
                raise UserError(f"The file {name} does not exist.")
            if path.suffix in _TEXT_SUFFIXES:
                dataset = load(name, "text", data_files=str(path), keep_linebreaks=True, split="train")
                loaded.append((dataset, pattern))
            elif path.suffix in _JSON_SUFFIXES:
                loaded.append((self._load_json(path, streaming), every_row))
            elif path.suffix == ".parquet":
                loaded.append((load(name, "parquet", data_files=str(path), split="train"), every_row))
            else:
                raise UserError(f"{name}: unknown kind of file {path.suffix!r}; known are {', '.join(_SUFFIXES)}.")
        return loaded

    def documents(self) -> Iterator[str]:
        """Read the text document by document.

        Raises:
            UserError: As `load`.
        """
        for dataset, document_start in self.load():
            parts: list[str] = []
            for rows in dataset.iter(batch_size=1000):
                for text, starts in zip(*_parts_of_documents(rows["text"], document_start), strict=True):
                    if starts and parts:
                        yield "".join(parts)
                        parts = []
                    parts.append(text)
            if parts:
                yield "".join(parts)

    def _load(self, name: str, *args, **kwargs) -> Dataset | IterableDataset:
        column = "text" if args[0] == "text" else self.text_column
        with _reading(name or args[0]):
            if name and not kwargs["streaming"]:  # datasets itself would know the file by its time stamp alone
                kwargs["name"] = files_fingerprint([name])
            dataset = load_dataset(*args, **kwargs)
            # A stream may know its columns from its rows alone.
            columns = dataset.column_names or list(next(iter(dataset), {}))
        if column not in columns:
            raise UserError(f"{name or args[0]} has no column {column!r}; its columns are {', '.join(columns)}.")
        kind = (dataset.features or {}).get(column, _TEXT_TYPES[0])
        if kind not in _TEXT_TYPES:
            raise UserError(f"{name or args[0]}: the column {column!r} does not hold text.")
        dataset = dataset.select_columns([column])
        return dataset if column == "text" else dataset.rename_column(column, "text")

    def _load_json(self, path: Path, streaming: bool) -> Dataset | IterableDataset:
        with _reading(str(path)):
            rows = (self._load_array if is_json_array(path) else self._load_lines)(path, streaming)
            next(iter(rows), None)  # what a stream cannot read is better known before a run begins
        return rows

    def _load_array(self, path: Path, streaming: bool) -> Dataset | IterableDataset:
        settings = {"path": str(path), "column": self.text_column}
        making = {"generator": _json_elements, "gen_kwargs": settings, "features": _TEXT}
        if streaming:
            return IterableDataset.from_generator(**making)
        identity = (_FORMAT, files_fingerprint([path]), self.text_column)
        return Dataset.from_generator(**making, fingerprint=Hasher.hash(identity))

    def _load_lines(self, path: Path, streaming: bool) -> Dataset | IterableDataset:
        lines = self._load(str(path), "text", data_files=str(path), split="train", streaming=streaming)
        settings = {"path": str(path), "column": self.text_column}
        parsing = {"function": _json_lines, "fn_kwargs": settings, "features": _TEXT}
        parsing |= {"with_indices": True, "batched": True}
        if streaming:
            return lines.map(**parsing)
        fingerprint = Hasher.hash((_FORMAT, lines._fingerprint, self.text_column))
        return lines.map(**parsing, new_fingerprint=fingerprint, desc=f"Reading {path.name}")


def _require_cache() -> None:
    """See that the folder can be written that texts and tokens are cached in."""
    folder = Path(datasets_config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"{folder}, where texts are cached, cannot be written ({error.strerror}): set HF_DATASETS_CACHE, or "
            "HF_HOME, to a folder that can."
        ) from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of datasets, and of every reader of files below it, into one that names the text."""
    try:
        with silenced(datasets_logging):
            yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # datasets wraps what a builder or a generator raises
        message = str(cause) if isinstance(cause, UserError) else f"{name} cannot be read: {first_line(cause)}"
        raise UserError(message) from error


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a Hub id or a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`.

    Raises:
        UserError: There is none, it has no token that ends a text, or a chat template that would be saved elsewhere.
    """
    folder = Path(name_or_path)
    with blaming(f"No tokenizer can be loaded from {name_or_path!r}"):
        if (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
            tokenizer = GPT2Tokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer {name_or_path!r} has no eos_token, which marks where a document ends.")
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    tokenizer.init_kwargs.pop("auto_map", None)  # names code, and what is saved must not pass a stranger's on
    for name in templates:  # each becomes a file wherever the tokenizer is saved
        if Path(name).name != name:
            raise UserError(
                f"The tokenizer {name_or_path!r} has a chat template {name!r}, which is no name of a file."
            )
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the rows that a model needs for a tokenizer: up to its largest token id, gaps included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def load_blocks(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    keep_tail: bool,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenize text and pack it into blocks, in order, without overlap or padding.

    Documents follow each other with the tokenizer's end-of-text token after each. Both steps are cached on disk, keyed
    by the text, the tokenizer and the arguments.

    Args:
        source: The text.
        tokenizer: Its `eos_token` marks the end of a document.
        block_size: Tokens a block, at least 2.
        keep_tail: Whether the rest that fills no block becomes a shorter one (evaluation) or is dropped (training).
        num_proc: Processes that tokenize; `None` for one.

    Returns:
        Dataset with the column `input_ids`, int32 arrays of `block_size`.

    Raises:
        UserError: The text cannot be read or gives no block.
    """
    tokenizer_hash = Hasher.hash((tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id))
    tokenized = []
    for text, document_start in source.load():
        text_hash = text._fingerprint
        tokenized.append(
            text.map(
                **_tokenizing(tokenizer, document_start),
                num_proc=num_proc if num_proc and len(text) > 10_000 else None,
                new_fingerprint=Hasher.hash(
                    (_FORMAT, text_hash, tokenizer_hash, document_start and document_start.pattern)
                ),
                desc="Tokenizing",
            )
        )
    settings = {"block_size": block_size, "eos_token_id": tokenizer.eos_token_id, "keep_tail": keep_tail}
    is_empty = not any(len(row) for dataset in tokenized for row in dataset["input_ids"])
    if is_empty or not any(_pack(tokenized, **settings)):
        tokens = sum(len(row) for dataset in tokenized for row in dataset["input_ids"])
        raise UserError(
            f"{source.name} has {tokens} tokens of text, too few for one block of {block_size}: give more text, or a "
            "smaller block_size."
        )
    # A list among the arguments would be split into shards, each packed for itself; a tuple stays whole.
    blocks = Dataset.from_generator(
        _pack,
        features=Features({"input_ids": List(Value("int32"))}),
        gen_kwargs={"tokenized": tuple(tokenized), **settings},
        fingerprint=Hasher.hash((_FORMAT, [dataset._fingerprint for dataset in tokenized], sorted(settings.items()))),
    )
    return blocks.with_format("numpy")  # as Python lists, tokens would load four times slower


def stream_blocks(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_size: int, shuffle_buffer: int, seed: int
) -> IterableDataset:
    """Pack training text into the blocks of `load_blocks` while it is read: nothing is prepared or kept on disk.

    Args:
        source: The text.
        tokenizer: Its `eos_token` marks the end of a document.
        block_size: Tokens a block, at least 2; the rest that fills none is dropped.
        shuffle_buffer: Blocks in memory among which the next is drawn; 1 keeps their order.
        seed: Of the draw.

    Returns:
        Stream with the column `input_ids`.

    Raises:
        UserError: The text cannot be read.
    """
    loaded = source.load(streaming=True)
    tokenized = tuple(text.map(**_tokenizing(tokenizer, document_start)) for text, document_start in loaded)
    settings = {"block_size": block_size, "eos_token_id": tokenizer.eos_token_id, "keep_tail": False}
    blocks = IterableDataset.from_generator(
        _pack, features=Features({"input_ids": List(Value("int32"))}), gen_kwargs={"tokenized": tokenized, **settings}
    )
    return blocks.shuffle(seed=seed, buffer_size=shuffle_buffer)


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack blocks into `input_ids` and `labels`, (B, T) int64; a shorter block is padded and its padding ignored.

    There is no attention mask: padding stands on the right, where a causal model never looks back from.
    """
    blocks = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
    return {
        "input_ids": pad_sequence(blocks, batch_first=True, padding_value=0),
        "labels": pad_sequence(blocks, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _json_lines(rows: dict[str, list[str]], indices: list[int], path: str, column: str) -> dict[str, list[str | None]]:
    return {"text": parse_json_lines(rows["text"], indices, path, column)}


def _json_elements(path: str, column: str) -> Iterator[dict[str, str | None]]:
    for text in read_json_array(Path(path), column):
        yield {"text": text}


_TOKENIZED = Features({"input_ids": List(Value("int32")), "starts_document": Value("bool")})


def _tokenizing(tokenizer: PreTrainedTokenizerBase, document_start: re.Pattern | None) -> dict[str, Any]:
    """What `map` is told to tokenize rows."""
    return {
        "function": _tokenize,
        "fn_kwargs": {"tokenizer": tokenizer, "document_start": document_start},
        "batched": True,
        "remove_columns": ["text"],
        "features": _TOKENIZED,
    }


def _tokenize(
    rows: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase, document_start: re.Pattern | None
) -> dict[str, list]:
    texts, starts = _parts_of_documents(rows["text"], document_start)
    # Rows are tokenized whole and packed afterwards: that one is longer than a block is nothing to warn of.
    with blaming("The text cannot be tokenized"):
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    # As arrays they keep their type where a stream joins rows without a token to others.
    return {"input_ids": [np.array(ids, np.int32) for ids in encoded["input_ids"]], "starts_document": starts}


def _parts_of_documents(rows: Sequence[str | None], document_start: re.Pattern | None) -> tuple[list[str], list[bool]]:
    """Return the text of rows, and which of them start a document."""
    texts = [text or "" for text in rows]
    if not all(isinstance(text, str) for text in texts):  # a stream does not know before
        raise UserError("The column of text does not hold text alone.")
    starts = [document_start is not None and bool(document_start.match(text)) for text in texts]
    if document_start is not None and document_start.pattern:
        texts = [text if text.endswith("\n") else text + "\n" for text in texts]  # rows are parts of one text
    return texts, starts


def _pack(
    tokenized: Sequence[Dataset | IterableDataset], block_size: int, eos_token_id: int, keep_tail: bool
) -> Iterator[dict]:
    rest = np.empty(0, np.int32)
    with blaming("The text cannot be read to its end"):  # which a stream finds out while it trains
        for stream in _token_stream(tokenized, eos_token_id):
            tokens = np.concatenate([rest, stream])
            whole = len(tokens) - len(tokens) % block_size
            for start in range(0, whole, block_size):
                yield {"input_ids": tokens[start : start + block_size]}
            rest = tokens[whole:]
    if keep_tail and len(rest) >= 2:
        yield {"input_ids": rest}


def _token_stream(tokenized: Sequence[Dataset | IterableDataset], eos_token_id: int) -> Iterator[np.ndarray]:
    """Yield the tokens of all documents, with the end-of-text token after each document."""
    end = np.array([eos_token_id], np.int32)
    for dataset in tokenized:
        is_first = True
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            rows = batch.column("input_ids").combine_chunks()
            offsets = rows.offsets.to_numpy()
            starts = batch.column("starts_document").to_numpy(zero_copy_only=False).copy()
            if is_first:
                starts[0] = False
                is_first = False
            tokens = rows.values.to_numpy()[offsets[0] : offsets[-1]]
            yield np.insert(tokens, (offsets[:-1] - offsets[0])[starts], eos_token_id)
        yield end
