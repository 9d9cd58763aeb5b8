"""Other ways to make a vocabulary matrix small: low rank in half precision, round to nearest, GPTQ, types of gguf.

Each takes a matrix (V, d) float32 and returns what stands for it, and the bytes of that, scales counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factorized_gpt2.models.factors import Factors

GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "TQ2_0")  # what gguf quantizes itself, in numpy
_CLIPPINGS = np.linspace(1, 0.5, 11)  # shares of a group's range that are tried
_ROWS_AT_ONCE = 8192
_DAMPING = 0.01  # of the Hessian's mean diagonal, as Frantar et al. (2022) have it


@dataclass(frozen=True)
class Small:
    """What stands for a vocabulary matrix, and how many bytes it takes.

    Attributes:
        embedding: (V, d) float32.
        nbytes: Of all that is stored.
        head: (V, d) float32; None where it is the embedding.
        bias: (V,) float32, of the head; None where there is none.
    """

    embedding: np.ndarray
    nbytes: int
    head: np.ndarray | None = None
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Groups:
    """Integers with a step and an offset a group, in fp16's numbers.

    Attributes:
        codes: (V, groups of a row, numbers of a group) uint8.
        steps: (V, groups of a row, 1) float32.
        offsets: Of the same shape.
        bits: Of an integer.
    """

    codes: np.ndarray
    steps: np.ndarray
    offsets: np.ndarray
    bits: int

    @property
    def nbytes(self) -> int:
        """How many bytes codes, steps and offsets take."""
        return self.codes.size * self.bits // 8 + 4 * self.steps.size

    def small(self) -> Small:
        """Return the matrix that it stands for."""
        dense = self.codes * self.steps + self.offsets
        return Small(dense.reshape(len(dense), -1), self.nbytes)


def low_rank(factors: Factors) -> Small:
    """Round factors to half precision; `scale_down` is `scale_up` again and takes no bytes."""
    wte, scale_up, mean = (array.astype(np.float16) for array in (factors.wte, factors.scale_up, factors.mean))
    return Small(wte.astype(np.float32) @ scale_up.astype(np.float32) + mean, low_rank_bytes(factors))


def low_rank_bytes(factors: Factors) -> int:
    """Count the bytes of factors in half precision, `scale_down` for none."""
    return 2 * (factors.wte.size + factors.scale_up.size + factors.mean.size)


def round_to_nearest(weight: np.ndarray, bits: int, group: int) -> Groups:
    """Round to integers with a step and an offset a group in fp16, its range clipped where that lowers squared error.

    Args:
        weight: (V, d) float32.
        bits: Of an integer.
        group: Numbers of a row that share a step; 0 for the row.
    """
    groups = weight.reshape(-1, group or weight.shape[1])
    codes = np.empty(groups.shape, np.uint8)
    steps, offsets = (np.empty((len(groups), 1), np.float32) for _ in range(2))
    for first in range(0, len(groups), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        steps[part], offsets[part] = _searched_grid(groups[part], bits, _CLIPPINGS if bits < 8 else (1,))
        codes[part] = _codes(groups[part], steps[part], offsets[part], bits)
    shape = (len(weight), -1)
    return Groups(codes.reshape(*shape, groups.shape[1]), steps.reshape(*shape, 1), offsets.reshape(*shape, 1), bits)


def gptq(weight: np.ndarray, hessian: np.ndarray, bits: int, group: int) -> Groups:
    """Round column by column, each error made good by the columns to come (Frantar et al., 2022)."""
    width = weight.shape[1]
    damped = hessian + _DAMPING * np.trace(hessian) / width * np.eye(width)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    left, codes = weight.copy(), np.empty(weight.shape, np.uint8)
    grids = []
    for first in range(0, width, group):
        block = slice(first, first + group)
        errors = np.empty((len(weight), group), np.float32)
        step, offset = _searched_grid(left[:, block], bits, _CLIPPINGS)
        for place, column in enumerate(range(first, first + group)):
            codes[:, column, None] = _codes(left[:, column, None], step, offset, bits)
            rounded = (codes[:, column, None] * step + offset)[:, 0]
            errors[:, place] = (left[:, column] - rounded) / upper[column, column]
            left[:, column + 1 : first + group] -= np.outer(
                errors[:, place], upper[column, column + 1 : first + group]
            )
        left[:, first + group :] -= errors @ upper[block, first + group :]
        grids.append((step, offset))
    steps, offsets = (np.stack(values, axis=1) for values in zip(*grids, strict=True))
    return Groups(codes.reshape(len(weight), -1, group), steps, offsets, bits)


def gguf_types(width: int) -> list[str]:
    """List the types that the package gguf can make of rows of a width; none where it is not installed."""
    try:
        import gguf
    except ImportError:
        return []
    sizes = gguf.GGML_QUANT_SIZES
    return [name for name in GGUF_TYPES if width % sizes[gguf.GGMLQuantizationType[name]][0] == 0]


def gguf_type(weight: np.ndarray, name: str) -> Small:
    """Quantize with the package gguf."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quantize(weight, kind)
    return Small(gguf.dequantize(blocks, kind), blocks.nbytes)


def _grid(groups: np.ndarray, bits: int, clipping: float) -> tuple[np.ndarray, np.ndarray]:
    """Lay 2^bits levels over a share of each group's range: distance and lowest, (n, 1), in fp16's numbers."""
    low, high = (clipping * edge(1, keepdims=True) for edge in (groups.min, groups.max))
    step = np.maximum((high - low) / (2**bits - 1), 1e-6)
    return (values.astype(np.float16).astype(np.float32) for values in (step, low))


def _searched_grid(groups: np.ndarray, bits: int, clippings: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Choose for every group the clipping whose squared error is least."""
    grids = [tuple(_grid(groups, bits, clipping)) for clipping in clippings]
    errors = [np.square(_codes(groups, *grid, bits) * grid[0] + grid[1] - groups).sum(1) for grid in grids]
    best = np.argmin(errors, axis=0)
    return tuple(np.stack(values)[best, np.arange(len(best))] for values in zip(*grids, strict=True))


def _codes(groups: np.ndarray, step: np.ndarray, offset: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint((groups - offset) / step), 0, 2**bits - 1)
