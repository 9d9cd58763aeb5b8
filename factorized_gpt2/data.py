"""Text to packed blocks of token ids, through `datasets`: cached on disk and flat in memory, or streamed.

Files of token ids need neither, and so `datasets` is imported only where text is read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .documents import parts_of_documents, pieces_of_documents
from .errors import UserError, blaming, first_line, is_defect, silenced
from .fingerprints import files_fingerprint
from .lfs_pointers import refuse_pointers
from .text_files import kind_of, read_rows
from .token_file import SUFFIX as TOKEN_SUFFIX
from .token_file import TokenBlocks, is_token_file, load_token_blocks
from .tokenization import end_of_text
from .tokenization import load_tokenizer as load_tokenizer
from .tokenization import vocabulary_size as vocabulary_size

if TYPE_CHECKING:
    import datasets
    from datasets import Dataset, IterableDataset

_FILE_SETTINGS = "train_file, validation_file, eval_file, calibration_file"
IGNORED_LABEL = -100

_FORMAT = 2  # of what is cached on disk; to be raised with every change to what this module makes of a text


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a dataset of the Hub, or local files.

    Attributes:
        files: Local files, of the kinds that `text_files.kind_of` knows, or files of token ids (.bin); when there are
            none, `dataset_name` is read.
        dataset_name: Hub id.
        dataset_config_name: Configuration of that dataset.
        split: Split of that dataset.
        text_column: Column that holds the text.
        document_start: Regular expression: a row that it matches at its beginning starts a document. `None`: every
            row is a document, except that a text file is one document. In files of token ids, documents are joined
            already.
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

    @property
    def is_tokenized(self) -> bool:
        """Whether it is files of token ids, rather than text.

        Raises:
            UserError: It is both.
        """
        names = [name for name in self.files if is_token_file(name)]
        if names and len(names) < len(self.files):
            other = next(name for name in self.files if not is_token_file(name))
            raise UserError(f"{names[0]} holds token ids, {other} text: give files of one kind.")
        return bool(names)

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
        if not self.files:
            if self.dataset_name is None:
                raise UserError("No text given: name files or a dataset.")
            return [(self._load_dataset(streaming), every_row)]
        refuse_pointers(map(Path, self.files))
        loaded = []
        for name in self.files:
            path = Path(name)
            if not path.is_file():
                raise UserError(f"The file {name} does not exist.")
            if is_token_file(name):
                raise UserError(f"{name} holds token ids: this needs text.")
            loaded.append((self._load_file(path, streaming), pattern if kind_of(path) == "text" else every_row))
        return loaded

    def documents(self) -> Iterator[str]:
        """Read the text document by document.

        Raises:
            UserError: As `load`.
        """
        for dataset, document_start in self.load():
            parts: list[str] = []
            for rows in dataset.iter(batch_size=1000):
                for text, starts in zip(*parts_of_documents(rows["text"], document_start), strict=True):
                    if starts and parts:
                        yield "".join(parts)
                        parts = []
                    parts.append(text)
            if parts:
                yield "".join(parts)

    def _load_dataset(self, streaming: bool) -> Dataset | IterableDataset:
        name, column = self.dataset_name, self.text_column
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            raise UserError(
                f"{name} was written by save_to_disk and is no dataset as on the Hub: write it with to_parquet, and "
                f"name that file ({_FILE_SETTINGS})."
            )
        with _reading(name):
            try:
                dataset = _datasets().load_dataset(
                    name, self.dataset_config_name, split=self.split, streaming=streaming
                )
            except ValueError as error:  # among others of a split that is not there
                splits = _datasets().get_dataset_split_names(name, self.dataset_config_name)
                if re.split(r"[\[+]", self.split)[0] in splits:
                    raise
                raise UserError(
                    f"{name} has no split {self.split!r}; its splits are {', '.join(splits)}: name one (split, "
                    f"calibration_split), or local files instead ({_FILE_SETTINGS})."
                ) from error
            # A stream may know its columns from its rows alone.
            columns = dataset.column_names or list(next(iter(dataset), {}))
        if column not in columns:
            raise UserError(f"{name} has no column {column!r}; its columns are {', '.join(columns)}.")
        text_types = [_datasets().Value(kind) for kind in ("string", "large_string", "string_view")]
        kind = (dataset.features or {}).get(column, text_types[0])
        if kind not in text_types:
            raise UserError(f"{name}: the column {column!r} does not hold text but {getattr(kind, 'dtype', kind)}.")
        dataset = dataset.select_columns([column])
        return dataset if column == "text" else dataset.rename_column(column, "text")

    def _load_file(self, path: Path, streaming: bool) -> Dataset | IterableDataset:
        settings = {"path": str(path), "column": self.text_column}
        making = {"generator": read_rows, "gen_kwargs": settings, "features": _text_features()}
        with _reading(str(path)):
            # What cannot be read at its beginning is better known before a run that streams it.
            if not sum(1 for _ in islice(read_rows(**settings), 1000)):
                raise UserError(f"{path} has no text: it is empty.")
            if streaming:
                return _datasets().IterableDataset.from_generator(**making)
            identity = (files_fingerprint([path]), self.text_column)
            return _datasets().Dataset.from_generator(**making, fingerprint=_hash(identity))


def _datasets() -> ModuleType:
    with blaming(
        f"Text is read with the package datasets, which files of token ids ({TOKEN_SUFFIX}) do without", ImportError
    ):
        import datasets
    return datasets


def _hash(value: Any) -> str:
    """Hash for the cache on disk."""
    return _datasets().fingerprint.Hasher.hash((_FORMAT, value))


def _require_cache() -> None:
    """See that the folder can be written that texts and tokens are cached in."""
    folder = Path(_datasets().config.HF_DATASETS_CACHE)
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
        with silenced(_datasets().logging):
            yield
    except UserError:
        raise
    except Exception as error:  # of datasets, and of every reader of files below it
        cause = error.__cause__ or error  # datasets wraps what a builder or a generator raises
        if is_defect(cause):
            raise
        message = str(cause) if isinstance(cause, UserError) else f"{name} cannot be read: {first_line(cause)}"
        raise UserError(message) from error


def load_blocks(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    keep_tail: bool,
    num_proc: int | None = None,
) -> Dataset | TokenBlocks:
    """Tokenize text and pack it into blocks, in order, without overlap or padding.

    Documents follow each other with the tokenizer's end-of-text token after each. Both steps are cached on disk, keyed
    by the text, the tokenizer and the arguments. Of files of token ids, blocks are read where they lie.

    Args:
        source: The text.
        tokenizer: Its `eos_token` marks the end of a document.
        block_size: Tokens a block, at least 2.
        keep_tail: Whether the rest that fills no block becomes a shorter one (evaluation) or is dropped (training).
        num_proc: Processes that tokenize rows which are documents; `None` for one.

    Returns:
        Rows of `input_ids`, int64 arrays of `block_size`.

    Raises:
        UserError: The text cannot be read or gives no block, or the tokenizer has no end of text.
    """
    if source.is_tokenized:
        return load_token_blocks(source.files, vocabulary_size(tokenizer), block_size, keep_tail)
    settings = {"block_size": block_size, "eos_token_id": end_of_text(tokenizer), "keep_tail": keep_tail}
    tokenized = _tokenized(source, tokenizer, num_proc)
    is_empty = not any(len(row) for dataset in tokenized for row in dataset["input_ids"])
    if is_empty or not any(_pack(tokenized, **settings)):
        tokens = sum(len(row) for dataset in tokenized for row in dataset["input_ids"])
        raise UserError(
            f"{source.name} has {tokens} tokens of text, too few for one block of {block_size}: give more text, or a "
            "smaller block_size."
        )
    # A list among the arguments would be split into shards, each packed for itself; a tuple stays whole.
    blocks = _datasets().Dataset.from_generator(
        _pack,
        features=_block_features(),
        gen_kwargs={"tokenized": tuple(tokenized), **settings},
        fingerprint=_hash(([dataset._fingerprint for dataset in tokenized], sorted(settings.items()))),
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
        UserError: The text cannot be read, or the tokenizer has no end of text.
    """
    if source.is_tokenized:
        raise UserError(f"streaming does nothing for {source.name}: token ids are read while training anyway.")
    settings = {"block_size": block_size, "eos_token_id": end_of_text(tokenizer), "keep_tail": False}
    loaded = source.load(streaming=True)
    tokenized = tuple(_tokenize(text, document_start, tokenizer) for text, document_start in loaded)
    blocks = _datasets().IterableDataset.from_generator(
        _pack, features=_block_features(), gen_kwargs={"tokenized": tokenized, **settings}
    )
    return blocks.shuffle(seed=seed, buffer_size=shuffle_buffer)


def token_stream(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Tokenize text and join its documents as `load_blocks` does, in pieces (n,) int32.

    Raises:
        UserError: The text cannot be read.
    """
    return _token_stream(_tokenized(source, tokenizer), end_of_text(tokenizer))


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack blocks into `input_ids` and `labels`, (B, T) int64; a shorter block is padded and its padding ignored.

    There is no attention mask: padding stands on the right, where a causal model never looks back from.
    """
    blocks = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
    return {
        "input_ids": pad_sequence(blocks, batch_first=True, padding_value=0),
        "labels": pad_sequence(blocks, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _text_features() -> datasets.Features:
    return _datasets().Features({"text": _datasets().Value("large_string")})


def _block_features(**more: str) -> datasets.Features:
    """Types of the column `input_ids`, and of more by name."""
    datasets = _datasets()
    types = {name: datasets.Value(kind) for name, kind in more.items()}
    return datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))} | types)


def _tokenized(source: TextSource, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None) -> list[Dataset]:
    """Tokenize what `source.load` returns, cached on disk."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer  # that is all of it, in Python
    tokenizer_hash = _hash((rules, tokenizer.eos_token_id))
    tokenized = []
    for text, document_start in source.load():
        fingerprint = _hash((text._fingerprint, tokenizer_hash, document_start and document_start.pattern))
        processes = num_proc if num_proc and len(text) > 10_000 else None
        tokenized.append(_tokenize(text, document_start, tokenizer, fingerprint=fingerprint, num_proc=processes))
    return tokenized


def _tokenize(
    text: Dataset | IterableDataset,
    document_start: re.Pattern | None,
    tokenizer: PreTrainedTokenizerBase,
    **cached: Any,
) -> Dataset | IterableDataset:
    """Tokenize documents, each whole or in pieces that change no token, whether it came as one row or as many.

    Args:
        text: As `TextSource.load` returns it.
        document_start: As `TextSource.load` returns it.
        tokenizer: Any.
        **cached: `fingerprint` and `num_proc` of what is kept on disk; nothing for a stream.

    Returns:
        Dataset with the columns `input_ids` and `starts_document`, a row a piece.
    """
    features = _block_features(starts_document="bool")
    if document_start is not None and not document_start.pattern:  # every row is a document
        settings = {"fn_kwargs": {"tokenizer": tokenizer}, "batched": True, "remove_columns": ["text"]}
        if cached:
            cached = {"new_fingerprint": cached["fingerprint"], "num_proc": cached["num_proc"], "desc": "Tokenizing"}
        return text.map(_tokenize_rows, **settings, features=features, **cached)
    settings = {"rows": text, "document_start": document_start, "tokenizer": tokenizer}
    making = {"generator": _tokenize_parts, "gen_kwargs": settings, "features": features}
    if not cached:
        return _datasets().IterableDataset.from_generator(**making)
    return _datasets().Dataset.from_generator(**making, fingerprint=cached["fingerprint"])


def _tokenize_rows(rows: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    texts, starts = parts_of_documents(rows["text"], re.compile(""))
    encoded = [*_encode(pieces_of_documents(zip(texts, starts, strict=True)), tokenizer)]
    return {name: [row[name] for row in encoded] for name in ("input_ids", "starts_document")}


def _tokenize_parts(
    rows: Dataset | IterableDataset, document_start: re.Pattern | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict]:
    batches = (parts_of_documents(batch["text"], document_start) for batch in rows.iter(batch_size=1000))
    parts = (part for texts, starts in batches for part in zip(texts, starts, strict=True))
    yield from _encode(pieces_of_documents(parts), tokenizer)


def _encode(pieces: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    while batch := list(islice(pieces, 64)):  # as many at a time as fit into memory when they are long
        texts, starts = zip(*batch, strict=True)
        with blaming("The text cannot be tokenized", Exception):  # tokenizers has no narrower
            encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
        for ids, starts_document in zip(encoded["input_ids"], starts, strict=True):
            # As arrays they keep their type where a stream joins rows without a token to others.
            yield {"input_ids": np.array(ids, np.int32), "starts_document": starts_document}


def _pack(
    tokenized: Sequence[Dataset | IterableDataset], block_size: int, eos_token_id: int, keep_tail: bool
) -> Iterator[dict]:
    rest = np.empty(0, np.int32)
    # Which a stream finds out while it trains, by the errors of any reader of files.
    with blaming("The text cannot be read to its end", Exception):
        for stream in _token_stream(tokenized, eos_token_id):
            tokens = np.concatenate([rest, stream])
            whole = len(tokens) - len(tokens) % block_size
            for start in range(0, whole, block_size):
                yield {"input_ids": tokens[start : start + block_size]}
            rest = tokens[whole:]
    if keep_tail and len(rest) >= 2:
        yield {"input_ids": rest}


def _token_stream(tokenized: Sequence[Dataset | IterableDataset], eos_token_id: int) -> Iterator[np.ndarray]:
    """Yield the tokens of all documents, with the end-of-text token after each that does not end in it already."""
    last = eos_token_id
    for dataset in tokenized:
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            rows = batch.column("input_ids").combine_chunks()
            offsets = rows.offsets.to_numpy()
            starts = batch.column("starts_document").to_numpy(zero_copy_only=False)
            tokens = rows.values.to_numpy()[offsets[0] : offsets[-1]]
            before = np.concatenate([[last], tokens])  # at each place the token before it
            places = np.unique((offsets[:-1] - offsets[0])[starts])
            yield np.insert(tokens, places[before[places] != eos_token_id], eos_token_id)
            last = before[-1]
        if last != eos_token_id:
            yield np.array([eos_token_id], np.int32)
            last = eos_token_id
