"""An entropy coder: range asymmetric numeral systems (Duda, 2013), many coders side by side as lanes of numpy arrays.

A stream is a checksum, the tables, the last state of every lane and 16-bit words. The decoder consumes symbols in the
order of the array, n-th symbol from lane n modulo the lanes; so contexts may depend on symbols decoded before.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from .frequencies import MAX_SYMBOLS, PRECISION, FrequencyTables

MAX_LANES = 4096
_SYMBOLS_A_LANE = 8192  # at least, so that four bytes of state a lane weigh nothing
_SMALLEST_STATE = 1 << 16  # states live in [2^16, 2^32)
_HEAD = struct.Struct("<IIIQ")  # checksum of all that follows, bytes of tables, lanes, symbols
_SYMBOL_BITS = MAX_SYMBOLS.bit_length() - 1


def encode(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Encode integers, each in a context that the decoder will know when it comes to the symbol.

    Args:
        parts: Arrays (n,) of symbols and of their contexts in [0, 256). Contexts of a part may depend on the symbols
            of those before it. Symbols of one context span at most 256 integers.

    Returns:
        The stream, with a checksum.
    """
    parts = [(np.ravel(symbols), np.ravel(contexts)) for symbols, contexts in parts]
    all_symbols, all_contexts = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    tables = FrequencyTables.count(all_symbols, all_contexts)
    lanes = int(min(max(len(all_symbols) // _SYMBOLS_A_LANE, 1), MAX_LANES))
    starts = np.cumsum(tables.frequencies, axis=1) - tables.frequencies
    states = np.full(lanes, _SMALLEST_STATE, np.uint64)
    words = []
    shift = np.uint64(PRECISION)
    for symbols, contexts in reversed(parts):
        at = symbols - tables.lowest[contexts] + (contexts.astype(np.int64) << _SYMBOL_BITS)
        for first in reversed(range(0, len(symbols), lanes)):
            places = at[first : first + lanes]
            x = states[: len(places)]
            frequency = tables.frequencies.ravel()[places].astype(np.uint64)
            full = x >= frequency << np.uint64(32 - PRECISION)
            words.append(x[full].astype("<u2"))
            x = np.where(full, x >> np.uint64(16), x)
            # Exact in float64: both are integers, below 2^32 and 2^15.
            quotient = np.floor(x / frequency.astype(np.float64)).astype(np.uint64)
            remainder = x - quotient * frequency
            states[: len(places)] = (quotient << shift) + remainder + starts.ravel()[places].astype(np.uint64)
    coded_tables = tables.to_bytes()
    body = b"".join([coded_tables, states.astype("<u4").tobytes(), *(chunk.tobytes() for chunk in reversed(words))])
    head = _HEAD.pack(0, len(coded_tables), lanes, len(all_symbols))[4:]
    return struct.pack("<I", zlib.crc32(head + body)) + head + body


class Decoder:
    """A stream, read from its start.

    Args:
        stream: What `encode` returned.

    Attributes:
        left: How many symbols have not been read yet.
        lowest: The smallest symbol of each context, (C,) int32.

    Raises:
        ValueError: The stream is damaged.
    """

    def __init__(self, stream: bytes):
        if len(stream) < _HEAD.size or zlib.crc32(memoryview(stream)[4:]) != struct.unpack_from("<I", stream)[0]:
            raise ValueError("The coded stream is damaged: its checksum is not that of its bytes.")
        _, table_bytes, lanes, self.left = _HEAD.unpack_from(stream)
        first_word = _HEAD.size + table_bytes + 4 * lanes
        if not 1 <= lanes <= MAX_LANES or first_word > len(stream) or (len(stream) - first_word) % 2:
            raise ValueError("The coded stream is damaged: its parts do not add up.")
        tables = FrequencyTables.from_bytes(stream[_HEAD.size : _HEAD.size + table_bytes])
        self._states = np.frombuffer(stream, "<u4", lanes, _HEAD.size + table_bytes).astype(np.uint32)
        self._words = np.frombuffer(stream, "<u2", offset=first_word).astype(np.uint32)
        self._at = 0
        self.lowest = tables.lowest.astype(np.int32)
        starts = np.cumsum(tables.frequencies, axis=1) - tables.frequencies
        self._pairs = (tables.frequencies << 16 | starts).astype(np.uint32).ravel()
        symbols = np.arange(MAX_SYMBOLS, dtype=np.uint8)
        self._symbol_of_slot = np.concatenate([np.repeat(symbols, row) for row in tables.frequencies])

    def read(self, contexts: np.ndarray) -> np.ndarray:
        """Decode the next part.

        Args:
            contexts: Integers of any shape, those it was encoded with.

        Returns:
            The symbols, int32, in the shape of `contexts`.

        Raises:
            ValueError: The stream ends before, or knows no such context.
        """
        flat = np.ravel(contexts)
        if flat.max(initial=0) >= len(self.lowest) or flat.min(initial=0) < 0:
            raise ValueError("The coded stream holds something else than what is read from it.")
        return (self.offsets(flat) + self.lowest[flat]).reshape(np.shape(contexts))

    def offsets(self, contexts: np.ndarray) -> np.ndarray:
        """Decode the next part, in contexts (n,) that are known to be there.

        Returns:
            How far the symbols are above the `lowest` of their context, (n,) uint8.

        Raises:
            ValueError: The stream ends before.
        """
        if contexts.size > self.left:
            raise ValueError("The coded stream holds something else than what is read from it.")
        self.left -= contexts.size
        decoded = np.empty(contexts.size, np.uint8)
        lanes, mask = len(self._states), np.uint32((1 << PRECISION) - 1)
        for first in range(0, contexts.size, lanes):
            context = contexts[first : first + lanes].astype(np.intp)
            x = self._states[: len(context)]
            slot = x & mask
            symbol = self._symbol_of_slot.take((context << PRECISION) + slot, mode="clip")
            pair = self._pairs.take((context << _SYMBOL_BITS) + symbol, mode="clip")
            x >>= PRECISION
            x *= pair >> 16
            x += slot
            x -= pair & 0xFFFF
            (low,) = np.nonzero(x < _SMALLEST_STATE)
            words = self._words[self._at : self._at + len(low)]
            if len(words) < len(low):
                raise ValueError("The coded stream ends too early.")
            x[low] = x[low] << 16 | words
            self._at += len(low)
            decoded[first : first + lanes] = symbol
        if not self.left and (self._at < len(self._words) or (self._states != _SMALLEST_STATE).any()):
            raise ValueError("The coded stream does not end where its symbols do.")
        return decoded


def decode(stream: bytes, contexts: np.ndarray) -> np.ndarray:
    """Decode a stream of one part; see `Decoder`."""
    decoder = Decoder(stream)
    symbols = decoder.read(contexts)
    if decoder.left:
        raise ValueError("The coded stream holds more symbols than there are contexts.")
    return symbols
