"""A vocabulary matrix as integers in the eigenvectors of a metric, at any number of bits a weight."""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from .prediction import CONTEXTS, OCTAVE, RowRelations
from .rans import Decoder, encode
from .trellis import read_codes, residuals

_HEAD = struct.Struct("<IIIIf")  # checksum of what follows, V, k, d, step of index 0
_ON_TRELLIS = 1 << 31  # in d: how many columns are, follows the head
_COLUMNS = struct.Struct("<I")
# Contexts of what is coded beside the codes:
_STEP, _SHARE, _ROW, _COLUMN, _SCALE, _GAIN, _BIAS, _PARENT = range(CONTEXTS, CONTEXTS + 8)
_PARENT_BYTES = 4  # each in a context of its own, from _PARENT on

GAIN_OCTAVE = 64
BIAS_NAT = 32


@dataclass(frozen=True)
class CodedTable:
    """`(codes * steps) @ scale_up + mean` stands for the embedding, the head meets `scale_down` and `bias`.

    Attributes:
        codes: (V, k) int8.
        relations: Steps of rows as indices, and what their coder knows of rows and columns.
        first_step: The step of index 0.
        scale_codes: (k, d) int8, `scale_up` in units of each row's `scale_steps`.
        scale_steps: (k,) float16.
        mean: (d,) float16.
        gains: (V,) int8, by how many 64ths of an octave a row's step is larger than its index says.
        bias_codes: (V,) int8, in 32nds of a nat.
        head_scale_steps: (k,) float16, what `scale_steps` are for `scale_down`.
        trellis_columns: How many of the first columns of codes lie on paths of a trellis; 0 in older files.
    """

    codes: np.ndarray
    relations: RowRelations
    first_step: float
    scale_codes: np.ndarray
    scale_steps: np.ndarray
    mean: np.ndarray
    gains: np.ndarray
    bias_codes: np.ndarray
    head_scale_steps: np.ndarray
    trellis_columns: int = 0

    @staticmethod
    def quantized(
        codes: np.ndarray,
        relations: RowRelations,
        first_step: float,
        scale_codes: np.ndarray,
        scale_steps: np.ndarray,
        mean: np.ndarray,
        trellis_columns: int = 0,
    ) -> "CodedTable":
        """Make a table that is not refined.

        `scale_down` is the transpose of `scale_up`, and gains and bias are zero, which takes no bytes.
        """
        zeros = np.zeros(len(relations.step_index), np.int8)
        scales = scale_codes, scale_steps, mean, zeros, zeros, scale_steps
        return CodedTable(codes, relations, first_step, *scales, trellis_columns)

    @property
    def steps(self) -> np.ndarray:
        """The step of every row, (V,) float32."""
        octaves = self.relations.step_index / OCTAVE + self.gains / GAIN_OCTAVE
        return (self.first_step * np.exp2(octaves)).astype(np.float32)

    @property
    def scale_up(self) -> np.ndarray:
        """(k, d) float32."""
        return self.scale_codes * self.scale_steps.astype(np.float32)[:, None]

    @property
    def scale_down(self) -> np.ndarray:
        """(d, k) float32."""
        return (self.scale_codes * self.head_scale_steps.astype(np.float32)[:, None]).T

    @property
    def bias(self) -> np.ndarray:
        """(V,) float32."""
        return self.bias_codes.astype(np.float32) / BIAS_NAT

    @property
    def nbytes(self) -> int:
        """How many bytes `to_bytes` returns."""
        return len(self.to_bytes())

    @property
    def bits_per_weight(self) -> float:
        """Bits of `to_bytes` for each of the V d weights."""
        return 8 * self.nbytes / (len(self.codes) * len(self.mean))

    def dense(self) -> np.ndarray:
        """Return the embedding that it stands for, (V, d) float32."""
        return (self.codes * self.steps[:, None]) @ self.scale_up + self.mean.astype(np.float32)

    def dense_head(self) -> np.ndarray:
        """Return the head that it stands for, (V, d) float32; its logits lack what is the same for all tokens."""
        return (self.codes * self.steps[:, None]) @ self.scale_down.T

    def to_bytes(self) -> bytes:
        """Write all of it down, entropy-coded; codes that have left the paths of the trellis each by itself."""
        rows, columns = self.relations, self.trellis_columns
        try:
            coded = list(residuals(rows, self.codes, columns))
        except ValueError:
            columns = 0
            coded = list(residuals(rows, self.codes, columns))
        parents = rows.parent[rows.share > 0]
        side = [(_STEP, rows.step_index), (_SHARE, rows.share), (_ROW, rows.row_spread)]
        side += [(_COLUMN, rows.column_spread), (_SCALE, self.scale_codes)]
        side += [(_GAIN, self.gains), (_BIAS, self.bias_codes)]
        side += [(_PARENT + place, (parents >> 8 * place) & 0xFF) for place in range(_PARENT_BYTES)]
        parts = [(np.ravel(values), np.full(values.size, context, np.uint8)) for context, values in side]
        stream = encode([*parts, *coded])
        width = len(self.mean) | (_ON_TRELLIS if columns else 0)
        head = _HEAD.pack(0, *self.codes.shape, width, self.first_step)[4:]
        head += _COLUMNS.pack(columns) if columns else b""
        halves = (self.mean, self.scale_steps, self.head_scale_steps)
        body = b"".join([head, *(array.astype("<f2").tobytes() for array in halves), stream])
        return struct.pack("<I", zlib.crc32(body)) + body

    @staticmethod
    def from_bytes(data: bytes, shape: tuple[int, int, int] | None = None) -> "CodedTable":
        """Read what `to_bytes` wrote.

        Args:
            data: The bytes.
            shape: V, k and d that it must have; `None`: any. They are compared before memory is taken for them.

        Raises:
            ValueError: It is damaged, or something else.
        """
        if len(data) < _HEAD.size or zlib.crc32(memoryview(data)[4:]) != struct.unpack_from("<I", data)[0]:
            raise ValueError("The coded matrix is damaged: its checksum is not that of its bytes.")
        _, size, rank, width, first_step = _HEAD.unpack_from(data)
        halves_at, columns = _HEAD.size, 0
        if width & _ON_TRELLIS and len(data) >= _HEAD.size + _COLUMNS.size:
            width ^= _ON_TRELLIS
            (columns,) = _COLUMNS.unpack_from(data, _HEAD.size)
            halves_at += _COLUMNS.size
        if shape is not None and shape != (size, rank, width):
            raise ValueError(f"The coded matrix has V, k, d = {(size, rank, width)}, expected {shape}.")
        at = halves_at + 2 * (width + 2 * rank)
        if at > len(data) or columns > rank:
            raise ValueError("The coded matrix is damaged: its parts do not add up.")
        halves = np.frombuffer(data, "<f2", width + 2 * rank, halves_at)
        mean, scale_steps, head_scale_steps = np.split(halves, [width, width + rank])
        decoder = Decoder(data[at:])
        if max(size, rank * width, size * rank) > decoder.left:
            raise ValueError("The coded matrix is damaged: it holds fewer numbers than its shape says.")

        def read(context: int, *shape: int) -> np.ndarray:
            return decoder.read(np.full(shape, context, np.uint8)).astype(np.int64)

        step_index, share, row_spread = (read(context, size) for context in (_STEP, _SHARE, _ROW))
        column_spread, scale_codes = read(_COLUMN, rank), read(_SCALE, rank, width).astype(np.int8)
        gains, bias_codes = (read(context, size).astype(np.int8) for context in (_GAIN, _BIAS))
        parent, predicted = np.zeros(size, np.int64), share > 0
        for place in range(_PARENT_BYTES):
            parent[predicted] += read(_PARENT + place, predicted.sum()) << 8 * place
        if parent.max(initial=0) >= max(size, 1):
            raise ValueError("The coded matrix is damaged: a row is predicted from one that is not there.")
        relations = RowRelations(step_index, parent, share, row_spread, column_spread)
        codes = np.zeros((size, rank), np.int8)
        read_codes(decoder, relations, codes, columns)
        refined = (gains, bias_codes, head_scale_steps)
        return CodedTable(codes, relations, first_step, scale_codes, scale_steps, mean, *refined, columns)
