"""Trellis-coded quantization (Marcellin and Fischer, 1990): a code's parity is what the codes before it say.

Integers one step apart round best, but only every second may come next, which is a bit less to store: a path of eight
states (Ungerboeck's code) tells the parity of each code, and the second bit of the code where the path goes on. Every
row has `PATHS` of them, which take turns in its columns. Where next to nothing but zeros is expected, codes are even
and no path goes through them. What is coded is half of a code, less the expectation of it.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .prediction import CONTEXTS, ROUNDINGS, WIDE, RowRelations
from .rans import Decoder

PATHS = 3  # of a row; a block's rows times this are decoded at once
STATES = 8  # the lowest bit is the parity of the code that comes next
LEAST_CLASS = 11  # of spread, that a path goes through: 0.4 of two steps
_STATES = np.arange(STATES)


def next_states(second_bit: int) -> np.ndarray:
    """Return where each state leads to, (8,), by the second bit of the code."""
    low, middle, high = _STATES & 1, _STATES >> 1 & 1, _STATES >> 2
    return (middle ^ low) | (high ^ second_bit) << 1 | low << 2


# By 16 (whether the path goes through here), 2 (the state) and 1 (the second bit of the code):
_NEXT = np.concatenate([np.repeat(_STATES, 2), np.stack([next_states(0), next_states(1)], 1).ravel()]).astype(np.uint8)


def on_path(classes: np.ndarray) -> np.ndarray:
    """Say by classes of spread, of any shape, whether a path goes through codes."""
    return classes >= LEAST_CLASS


def residuals(relations: RowRelations, codes: np.ndarray, columns: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what is to be coded, and contexts, in the order of decoding.

    Args:
        relations: Of the rows.
        codes: (V, k) int8.
        columns: How many of the first columns lie on paths; the others are rounded each by itself.

    Raises:
        ValueError: A code has another parity than its path says.
    """
    others, rest = _from(relations, columns), codes[:, columns:]
    for rows in relations.blocks():
        block = np.ascontiguousarray(codes[rows, :columns].T).view(np.uint8)
        passes, expected, contexts = _expectations(relations, rows, codes[:, :columns])
        parity, halves = block & 1, block.view(np.int8) >> 1
        state = np.zeros((PATHS, len(rows)), np.uint8)
        for group in _groups(columns):
            if not np.array_equal(parity[group], state[: group.stop - group.start] & passes[group]):
                raise ValueError("The codes do not lie on paths of the trellis.")
            state = _follow(state, passes[group], block[group] >> 1)
        left = (halves - np.where(parity, expected[1], expected[0])).astype(np.int8)
        used = np.where(parity, contexts[1], contexts[0])
        yield from ((left[group], used[group]) for group in _groups(columns))
        alone, their_contexts = others.expectation(rows, rest)
        yield (rest[rows] - alone).astype(np.int8), their_contexts


def read_codes(decoder: Decoder, relations: RowRelations, codes: np.ndarray, columns: int) -> None:
    """Fill `codes` with what `residuals` told.

    Raises:
        ValueError: The stream holds something else.
    """
    if len(decoder.lowest) < CONTEXTS:
        raise ValueError("The coded stream holds something else than what is read from it.")
    others, rest = _from(relations, columns), codes[:, columns:]
    for rows in relations.blocks():
        decoded = np.empty((columns, len(rows)), np.uint8)
        passes, expected, contexts = _expectations(relations, rows, codes[:, :columns])
        # What is added to what was read; all of it modulo 256.
        added = [(by + decoder.lowest.take(of)).astype(np.uint8) for by, of in zip(expected, contexts, strict=True)]
        state = np.zeros((PATHS, len(rows)), np.uint8)
        for group in _groups(columns):
            parity = state[: group.stop - group.start] & passes[group]
            odd = -parity  # all bits
            read = decoder.offsets(_chosen(contexts, group, odd).ravel()).reshape(parity.shape)
            read += _chosen(added, group, odd)
            np.bitwise_or(read << 1, parity, out=decoded[group])
            state = _follow(state, passes[group], read)
        codes[rows, :columns] = decoded.view(np.int8).T
        alone, their_contexts = others.expectation(rows, rest)
        rest[rows] = (decoder.read(their_contexts) + alone).astype(np.int8)


def _groups(columns: int) -> Iterator[slice]:
    return (slice(first, min(first + PATHS, columns)) for first in range(0, columns, PATHS))


def _expectations(
    relations: RowRelations, rows: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Predict halves of codes of a block's rows, if they are even and if they are odd.

    Returns:
        Where paths go through, (columns, n) uint8, 0 or 1; of each parity the expected halves, int32, and contexts,
        uint8, in the same shape.
    """
    exact = np.ascontiguousarray(codes[relations.parent[rows]].T) * relations.ratio(rows)  # in 2^-16; halves in 2^-17
    classes = np.ascontiguousarray(relations.classes(rows)[:, : codes.shape[1]].T)
    narrow = classes < WIDE
    base = classes * np.uint8(ROUNDINGS) + np.where(narrow, np.uint8(0), np.uint8(ROUNDINGS // 2))
    ways = narrow * np.int32(ROUNDINGS)
    exact += 2**16
    even = exact >> 17
    part = exact & 2**17 - 1
    # Odd codes are as even ones are, seen from a step further; so both are coded in the same contexts.
    odd = even - (part < 2**16)
    contexts = [base + (of * ways >> 17).astype(np.uint8) for of in (part, part ^ 2**16)]
    return on_path(classes).astype(np.uint8), [even, odd], contexts


def _chosen(values: list[np.ndarray], group: slice, odd: np.ndarray) -> np.ndarray:
    even_values, odd_values = (of[group] for of in values)
    return even_values ^ ((even_values ^ odd_values) & odd)


def _follow(state: np.ndarray, passed: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Go on along paths, of which the last columns may have fewer."""
    here = state[: len(halves)]
    after = _NEXT.take(passed << 4 | here << 1 | halves & 1)
    return after if len(after) == len(state) else np.concatenate([after, state[len(after) :]])


def _from(relations: RowRelations, column: int) -> RowRelations:
    return replace(relations, column_spread=relations.column_spread[column:])
