"""What codes of a row are expected to be, given a like row decoded before: integers only, alike on every machine.

Rows are decoded from the finest step to the coarsest, in blocks. A row may name a parent in an earlier block, as "Dog"
may name " dog", and how much of it it shares. The expectation, rounded, is subtracted; the rest is coded in a context:
the class of its spread (component, row and step each add a part), and how the expectation was rounded.
"""

from dataclasses import dataclass

import numpy as np

OCTAVE = 4  # steps and spreads are known in quarters of an octave
SHARE = 8  # parents count by eighths
ROUNDINGS = 5
SPREADS = 40
CONTEXTS = SPREADS * ROUNDINGS
_FIRST_BLOCK, _BLOCK = 64, 1024  # rows
_SPREAD_OF_CLASS_ZERO = -4 * OCTAVE  # a standard deviation of 1/16 of a step: all is zero
WIDE = 5 * OCTAVE  # a class of two steps, and those above, do not feel how an expectation was rounded
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class RowRelations:
    """What is known of rows before their codes.

    Attributes:
        step_index: (V,) int64, quarters of an octave.
        parent: (V,) int64, the row that each is predicted from, of an earlier block; any where `share` is 0.
        share: (V,) int64 in [0, SHARE], eighths of the parent.
        row_spread: (V,) int64, quarters of an octave.
        column_spread: (k,) int64, quarters of an octave.
    """

    step_index: np.ndarray
    parent: np.ndarray
    share: np.ndarray
    row_spread: np.ndarray
    column_spread: np.ndarray

    def blocks(self) -> list[np.ndarray]:
        """Return the rows of every block, in the order of decoding."""
        return decoding_blocks(self.step_index)

    def expectation(self, rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict rows.

        Args:
            rows: (n,) rows of one block.
            codes: (V, k) int8; those of the parents are read.

        Returns:
            The expected codes, (n, k) int32 in [-127, 127], and contexts, (n, k) uint8.
        """
        exact, spread = codes[self.parent[rows]] * self.ratio(rows)[:, None], self.classes(rows)
        expected = (exact + 2**15) >> 16
        rounding = (exact - (expected << 16) + 2**15) * ROUNDINGS >> 16
        contexts = spread * ROUNDINGS + np.where(spread < WIDE, rounding, ROUNDINGS // 2)
        return np.clip(expected, -127, 127), contexts.astype(np.uint8)

    def ratio(self, rows: np.ndarray) -> np.ndarray:
        """Return by what the codes of their parents are multiplied, (n,) int32 in 2^-16."""
        octaves = (self.step_index[self.parent[rows]] - self.step_index[rows]) / OCTAVE
        return np.rint(np.exp2(octaves) * self.share[rows] / SHARE * 2**16).astype(np.int32)

    def classes(self, rows: np.ndarray) -> np.ndarray:
        """Return classes of spread, (n, k) uint8 below SPREADS."""
        of_rows = (self.row_spread[rows] - self.step_index[rows] - _SPREAD_OF_CLASS_ZERO).astype(np.int16)
        return np.clip(self.column_spread.astype(np.int16) + of_rows[:, None], 0, SPREADS - 1).astype(np.uint8)


def decoding_blocks(step_index: np.ndarray) -> list[np.ndarray]:
    """Cut rows, finest step first, into blocks: some small ones, then of 1,024."""
    ends: list[int] = []
    size = _FIRST_BLOCK
    while sum(ends) < len(step_index):
        ends.append(size)
        size = min(2 * size, _BLOCK)
    return np.split(np.argsort(step_index, kind="stable"), np.cumsum(ends)[:-1])


def find_parents(scores: np.ndarray, step_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose for every row the earlier row that is most like it, and how much of it to take.

    Args:
        scores: (V, k) float32, in units in which a component that is coded with many bits has a variance of 1, one
            with none 0; likeness is their cosine.
        step_index: (V,) int64, by which rows are decoded.

    Returns:
        Parents and shares as `RowRelations` has them.
    """
    norms = np.maximum(np.linalg.norm(scores, axis=1), 1e-30)
    parent, share = np.zeros(len(scores), np.int64), np.zeros(len(scores), np.int64)
    blocks = decoding_blocks(step_index)
    order = np.concatenate(blocks)
    earlier = (scores / norms[:, None])[order]
    done = len(blocks[0])
    dimensions = scores.var(0).sum()
    for rows in blocks[1:]:
        for part in np.split(rows, range(_ROWS_AT_ONCE, len(rows), _ROWS_AT_ONCE)):
            place = np.argmax(scores[part] @ earlier[:done].T, axis=1)
            parent[part] = order[place]
            regression = np.einsum("nk,nk->n", scores[part], earlier[place]) / norms[parent[part]]
            share[part] = np.clip(np.rint(SHARE * regression), 0, SHARE)
            cosine = np.maximum(regression, 0) * norms[parent[part]] / norms[part]
            saved = -0.5 * dimensions * np.log2(np.maximum(1 - cosine**2, 1e-6))
            share[part[saved < np.log2(len(scores)) + 2]] = 0  # its parent's number would cost more
        done += len(rows)
    return parent, share


def measure_spreads(
    codes: np.ndarray, step_index: np.ndarray, parent: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit spreads of rows and columns to what prediction leaves, in quarters of an octave.

    Returns:
        `row_spread` (V,) and `column_spread` (k,), int64: residuals have about the standard deviation
        2^((row_spread + column_spread) / 4) steps of index 0.
    """
    flat = RowRelations(step_index, parent, share, np.zeros_like(parent), np.zeros(codes.shape[1], np.int64))
    scale = np.exp2(step_index / OCTAVE)
    column = np.zeros(codes.shape[1])
    squares = []
    for rows in flat.blocks():
        expected, _ = flat.expectation(rows, codes)
        # A residual of 0 still is somewhere within half a step of either side.
        squares.append(np.square((codes[rows] - expected) * scale[rows, None].astype(np.float32)))
        column += squares[-1].sum(0)
    column = np.sqrt(column / len(codes) + 1e-12)
    used = (column > 0.2 * np.median(scale)).astype(np.float32)
    weights = (used if used.any() else np.ones_like(used)) / column**2
    row = np.empty(len(codes))
    for rows, block in zip(flat.blocks(), squares, strict=True):
        row[rows] = np.sqrt(block @ weights / max((weights > 0).sum(), 1) + 1e-3)
    index = [np.rint(OCTAVE * np.log2(values)).astype(np.int64) for values in (row, column)]
    return np.clip(index[0], -60, 60), np.clip(index[1], -127, 127)
