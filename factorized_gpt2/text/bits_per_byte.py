"""Bits per byte of documents: a measure that does not depend on the tokenizer, as evaluation harnesses report it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..common.progress import Progress
from .blocks import IGNORED_LABEL, encode_pieces
from .documents import pieces_of_documents
from .loss import LossSum, sum_batches
from .source import TextSource
from .tokenizers import end_of_text

_BATCHES_HELD = 256  # among which windows of like length are put together


def rolling_windows(
    tokens: Sequence[int] | np.ndarray, prefix: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a document into windows that predict each of its tokens once.

    Each window predicts the next `size` tokens, the first of them from the one token before it, or from `prefix` where
    the document begins. Where fewer are left, the last window reaches back over tokens that were predicted already and
    are now context alone.

    Args:
        tokens: Ids of the document's n tokens; there may be none, and then there is no window.
        prefix: Id that stands before the first, such as that of the end-of-text token.
        size: Tokens a window at most: what the model has positions for.

    Yields:
        Inputs and labels, int64 and equally long, min(n, size). A label is what follows the input at its place, or
        -100 where it is not to be predicted.
    """
    stream = np.concatenate([[prefix], np.asarray(tokens, dtype=np.int64)])
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        begin = max(0, end - size)
        labels = stream[begin + 1 : end + 1].copy()
        labels[: start - begin] = IGNORED_LABEL
        yield stream[begin:end], labels


def sum_document_loss(
    model: nn.Module,
    documents: Iterable[Sequence[int] | np.ndarray],
    prefix: int,
    size: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    desc: str | None = None,
) -> LossSum:
    """Sum a causal language model's loss over every token of documents, the first of each included.

    Args:
        model: Takes `input_ids`, `labels`, `shift_labels` (B, T), `num_items_in_batch` and `skip_logits`, returns
            `loss`. Its mode is restored.
        documents: Token ids of each.
        prefix: As `rolling_windows` takes it.
        size: As `rolling_windows` takes it.
        batch_size: Windows a forward pass. Like with like in length, so that little is padded; changes nothing else.
        device: Where the model is.
        desc: Label of the progress bar; `None` for no bar.

    Returns:
        The sum, as exact as that of `sum_loss`, and its number of tokens.
    """
    windows = (window for tokens in documents for window in rolling_windows(tokens, prefix, size))
    batches = Progress(_batches(windows, batch_size), desc=desc, disable=desc is None)
    return sum_batches(model, map(_collate, batches), device)


def bits_per_byte(nats: float, size: int) -> float:
    """Convert a loss summed over text of `size` bytes in UTF-8; NaN where there is no text."""
    return nats / (math.log(2) * size) if size else math.nan


def measure_bits_per_byte(
    model: nn.Module,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    desc: str | None = None,
) -> float:
    """Measure a model on the documents of a text, each tokenized as a whole and read from the end-of-text token on.

    Of the text no more than a document is held at a time.

    Args:
        model: As in `sum_document_loss`.
        source: The text.
        tokenizer: The model's.
        size: Tokens a window at most.
        batch_size: Windows a forward pass.
        device: Where the model is.
        desc: Label of the progress bar; `None` for no bar.

    Returns:
        Summed loss in bits, divided by the text's bytes in UTF-8.

    Raises:
        UserError: The text cannot be read, or the tokenizer has no end of text.
    """
    bytes_read = 0

    def documents() -> Iterator[tuple[str, bool]]:
        nonlocal bytes_read
        for text in source.documents():
            bytes_read += len(text.encode())
            yield text, True

    tokens = _joined(encode_pieces(pieces_of_documents(documents()), tokenizer))
    loss = sum_document_loss(model, tokens, end_of_text(tokenizer), size, batch_size, device, desc)
    return bits_per_byte(loss.nats, bytes_read)


def _joined(pieces: Iterable[dict]) -> Iterator[np.ndarray]:
    """Join the tokens of pieces to those of whole documents."""
    held: list[np.ndarray] = []
    for piece in pieces:
        if piece["starts_document"] and held:
            yield np.concatenate(held)
            held = []
        held.append(piece["input_ids"])
    if held:
        yield np.concatenate(held)


def _batches(windows: Iterator[tuple], batch_size: int) -> Iterator[list[tuple]]:
    """Batch windows, like with like in length among some that are held at a time."""
    while some := list(islice(windows, _BATCHES_HELD * batch_size)):
        some.sort(key=lambda window: len(window[0]), reverse=True)
        yield from (some[start : start + batch_size] for start in range(0, len(some), batch_size))


def _collate(windows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack windows, (B, T) int64; padding stands on the right, where a causal model never looks back from."""
    inputs, targets = ([torch.from_numpy(part) for part in parts] for parts in zip(*windows, strict=True))
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED_LABEL)
    return {
        "input_ids": pad_sequence(inputs, batch_first=True, padding_value=0),
        "labels": labels,  # without them, models compute no loss
        "shift_labels": labels,
    }
