"""Text to packed blocks of token ids, through `datasets`: cached on disk and flat in memory, or streamed.

Files of token ids need neither, and so `datasets` is imported only where text is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase

from ..common.errors import UserError, blaming
from .documents import parts_of_documents, pieces_of_documents
from .source import TextSource, cache_hash, datasets_package
from .token_file import TokenBlocks, load_token_blocks
from .tokenizers import end_of_text
from .tokenizers import load_tokenizer as load_tokenizer
from .tokenizers import vocabulary_size as vocabulary_size

if TYPE_CHECKING:
    import datasets
    from datasets import Dataset, IterableDataset

IGNORED_LABEL = -100


class Blocks(Protocol):
    """Blocks of tokens by their numbers: of `datasets`, `TokenBlocks`, some of either, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Read a block, `input_ids`."""


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
    end = end_of_text(tokenizer)
    settings: dict[str, Any] = {"block_size": block_size, "eos_token_id": end, "keep_tail": keep_tail}
    tokenized = _tokenized(source, tokenizer, num_proc)
    is_empty = not any(len(row) for dataset in tokenized for row in dataset["input_ids"])
    if is_empty or not any(_pack(tokenized, **settings)):
        tokens = sum(len(row) for dataset in tokenized for row in dataset["input_ids"])
        raise UserError(
            f"{source.name} has {tokens} tokens of text, too few for one block of {block_size}: give more text, or a "
            "smaller block_size."
        )
    # A list among the arguments would be split into shards, each packed for itself; a tuple stays whole.
    blocks = datasets_package().Dataset.from_generator(
        _pack,
        features=_block_features(),
        gen_kwargs={"tokenized": tuple(tokenized), **settings},
        fingerprint=cache_hash(([dataset._fingerprint for dataset in tokenized], sorted(settings.items()))),
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
        raise UserError(
            f"streaming has no effect on {source.name}: token ids are always read during training. Leave it out."
        )
    settings = {"block_size": block_size, "eos_token_id": end_of_text(tokenizer), "keep_tail": False}
    loaded = source.load(streaming=True)
    tokenized = tuple(_tokenize(text, document_start, tokenizer) for text, document_start in loaded)
    blocks = datasets_package().IterableDataset.from_generator(
        _pack, features=_block_features(), gen_kwargs={"tokenized": tokenized, **settings}
    )
    return blocks.shuffle(seed=seed, buffer_size=shuffle_buffer)


def token_stream(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Tokenize text and join its documents as `load_blocks` does, in pieces (n,) int32.

    Raises:
        UserError: The text cannot be read.
    """
    return _token_stream(_tokenized(source, tokenizer), end_of_text(tokenizer))


def collate_blocks(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack blocks into `input_ids` and `labels`, (B, T) int64; a shorter block is padded and its padding ignored.

    There is no attention mask: padding stands on the right, where a causal model never looks back from.
    """
    blocks = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
    return {
        "input_ids": pad_sequence(blocks, batch_first=True, padding_value=0),
        "labels": pad_sequence(blocks, batch_first=True, padding_value=IGNORED_LABEL),
    }


def batches_of(blocks: Blocks, batch_size: int) -> DataLoader:
    """Read blocks in their order, as `collate_blocks` stacks them."""
    # torch reads whatever has a length and numbers.
    return DataLoader(blocks, batch_size=batch_size, collate_fn=collate_blocks)  # type: ignore[arg-type]


def some_of(blocks: Blocks, numbers: Sequence[int]) -> Blocks:
    """Choose blocks by their numbers."""
    return Subset(blocks, numbers)  # type: ignore[arg-type]  # as in `batches_of`


def _block_features(**more: str) -> datasets.Features:
    """Types of the column `input_ids`, and of more by name."""
    datasets = datasets_package()
    types = {name: datasets.Value(kind) for name, kind in more.items()}
    return datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))} | types)


def _tokenized(source: TextSource, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None) -> list[Dataset]:
    """Tokenize what `source.load` returns, cached on disk."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer  # that is all of it, in Python
    tokenizer_hash = cache_hash((rules, tokenizer.eos_token_id))
    tokenized = []
    for text, document_start in source.load():
        fingerprint = cache_hash((text._fingerprint, tokenizer_hash, document_start and document_start.pattern))
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
        return datasets_package().IterableDataset.from_generator(**making)
    return datasets_package().Dataset.from_generator(**making, fingerprint=cached["fingerprint"])


def _tokenize_rows(rows: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    texts, starts = parts_of_documents(rows["text"], re.compile(""))
    encoded = [*encode_pieces(pieces_of_documents(zip(texts, starts, strict=True)), tokenizer)]
    return {name: [row[name] for row in encoded] for name in ("input_ids", "starts_document")}


def _tokenize_parts(
    rows: Dataset | IterableDataset, document_start: re.Pattern | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict]:
    batches = (parts_of_documents(batch["text"], document_start) for batch in rows.iter(batch_size=1000))
    parts = (part for texts, starts in batches for part in zip(texts, starts, strict=True))
    yield from encode_pieces(pieces_of_documents(parts), tokenizer)


def encode_pieces(pieces: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Tokenize pieces of documents, some at a time.

    Args:
        pieces: As `pieces_of_documents` yields them.
        tokenizer: Of transformers.

    Yields:
        For each piece its `input_ids`, (n,) int32, and whether it `starts_document`.

    Raises:
        UserError: The tokenizer fails on the text.
    """
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
    with blaming("The text cannot be read to the end", Exception):
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
