"""Static tables of an entropy coder: how frequent each symbol is in each context, in parts of 2^14."""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

PRECISION = 14  # bits; frequencies of a context sum to 2^14
MAX_CONTEXTS = 256
MAX_SYMBOLS = 256  # of one context

_CONTEXT = struct.Struct("<hH")  # the smallest symbol, how many follow


@dataclass(frozen=True)
class FrequencyTables:
    """Frequencies of integer symbols by context.

    Attributes:
        lowest: (C,) int64, the smallest symbol of each context.
        frequencies: (C, MAX_SYMBOLS) int64, of `lowest`, `lowest + 1`, ...; every row sums to 2^14. A context that
            never occurs has one symbol, 0.
    """

    lowest: np.ndarray
    frequencies: np.ndarray

    @staticmethod
    def count(symbols: np.ndarray, contexts: np.ndarray) -> "FrequencyTables":
        """Count symbols by context.

        Args:
            symbols: (n,) integers.
            contexts: (n,) integers in [0, MAX_CONTEXTS).

        Returns:
            Tables in which every symbol that occurs has a frequency of at least 1.

        Raises:
            ValueError: Symbols of one context span more than `MAX_SYMBOLS` integers.
        """
        number = int(contexts.max(initial=0)) + 1
        if number > MAX_CONTEXTS:
            raise ValueError(f"At most {MAX_CONTEXTS} contexts can be told apart, got {number}.")
        smallest = int(symbols.min(initial=0))
        span = int(symbols.max(initial=0)) - smallest + 1
        counts = np.bincount(
            contexts.astype(np.int64) * span + (symbols - np.int64(smallest)), minlength=number * span
        )
        lowest, frequencies = np.zeros(number, np.int64), np.zeros((number, MAX_SYMBOLS), np.int64)
        for context, row in enumerate(counts.reshape(number, span)):
            occurring = np.flatnonzero(row)
            if not len(occurring):
                frequencies[context, 0] = 1 << PRECISION
                continue
            first, last = occurring[0], occurring[-1]
            if last - first >= MAX_SYMBOLS:
                raise ValueError(f"Symbols of a context may span {MAX_SYMBOLS} integers, got {last - first + 1}.")
            lowest[context] = first + smallest
            frequencies[context, : last - first + 1] = _quantize(row[first : last + 1])
        return FrequencyTables(lowest, frequencies)

    def bits(self, symbols: np.ndarray, contexts: np.ndarray) -> float:
        """Compute how many bits an ideal coder with these tables spends on symbols (n,) in contexts (n,)."""
        used = self.frequencies[contexts, symbols - self.lowest[contexts]]
        return float(PRECISION * len(symbols) - np.log2(used).sum())

    def to_bytes(self) -> bytes:
        """Write the tables down, deflated."""
        parts = [struct.pack("<H", len(self.lowest))]
        for lowest, row in zip(self.lowest, self.frequencies, strict=True):
            used = row[: np.flatnonzero(row)[-1] + 1]
            parts += [_CONTEXT.pack(lowest, len(used)), used.astype("<u2").tobytes()]
        return zlib.compress(b"".join(parts), 9)

    @staticmethod
    def from_bytes(data: bytes) -> "FrequencyTables":
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: It is something else.
        """
        try:
            return _parse(zlib.decompressobj().decompress(data, 2 + MAX_CONTEXTS * (_CONTEXT.size + 2 * MAX_SYMBOLS)))
        except (struct.error, zlib.error, IndexError) as error:
            raise ValueError("The frequency tables are damaged.") from error


def _parse(text: bytes) -> FrequencyTables:
    number = struct.unpack_from("<H", text)[0]
    at = 2
    lowest, frequencies = np.zeros(number, np.int64), np.zeros((number, MAX_SYMBOLS), np.int64)
    for context in range(number):
        lowest[context], size = _CONTEXT.unpack_from(text, at)
        at += _CONTEXT.size
        used = np.frombuffer(text[at : at + 2 * size], "<u2")
        at += 2 * size
        if len(used) != size or size > MAX_SYMBOLS or used.sum(dtype=np.int64) != 1 << PRECISION:
            raise ValueError("The frequency tables are damaged.")
        frequencies[context, :size] = used
    return FrequencyTables(lowest, frequencies)


def _quantize(counts: np.ndarray) -> np.ndarray:
    """Scale counts to a sum of 2^14 with at least 1 where any was counted; the largest pay what rounding leaves."""
    total = 1 << PRECISION
    scaled = counts * (total / counts.sum())
    frequencies = np.where(counts > 0, np.maximum(np.rint(scaled), 1), 0).astype(np.int64)
    while (excess := int(frequencies.sum()) - total) != 0:
        largest = np.argsort(-frequencies, kind="stable")[: abs(excess)]
        largest = largest[frequencies[largest] > 1] if excess > 0 else largest
        frequencies[largest] -= np.sign(excess)
    return frequencies
