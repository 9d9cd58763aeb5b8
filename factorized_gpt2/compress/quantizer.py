"""How to round a vocabulary matrix so that a budget of bytes buys most."""

from dataclasses import dataclass

import numpy as np

from ..network.coded_table import CodedTable
from ..network.prediction import OCTAVE, RowRelations, find_parents, measure_spreads
from ..network.trellis import on_path
from .data_aware import FREQUENCY_EXPONENT, VocabularyUse
from .trellis_rounding import FARTHEST, round_on_trellis

STEP_EXPONENT = 0.25  # steps are row weights to the power of minus this; docs/coding.md measures others
INPUT_SIDE = 3  # times the head's in the metric; docs/coding.md measures others
_LEAST_HEARD = 1e-9  # of all that the head hears
_SCALE_DEVIATION = 8  # of the integers of `scale_up`
_DIGIT = 128  # a column whose codes leave [-127, 127] becomes two, in units of 128 and of 1
_LARGEST_STEP_INDEX = 60
_PARENT_COMPONENTS = 256  # by which rows are told to be alike
_SEARCH_ROUNDS = 8
_TOLERANCE = 0.01  # of the budget


def coding_weights(token_counts: np.ndarray, head_use: np.ndarray) -> np.ndarray:
    """Weigh rows by how often they are looked up and by how much the head hears of them, the geometric mean of both.

    Args:
        token_counts: (V,) counts of tokens in text; half an occurrence stands for those never seen.
        head_use: (V,) floats, the sum of p (1 - p) of a token's probability over positions of text.

    Returns:
        (V,) float64 with sum 1.
    """
    looked_up, heard = token_counts + 0.5, head_use / head_use.sum()
    weights = (looked_up * np.maximum(heard, _LEAST_HEARD)) ** (FREQUENCY_EXPONENT / 2)
    return weights / weights.sum()


class TableFit:
    """What `encode_table` is told of a tied matrix, whatever the budget; a `methods.BytesFit`.

    Args:
        weight: (V, d) floats, finite.
        lm_head: `None`.
        use: What text says of the matrix.

    Raises:
        ValueError: The head has a matrix of its own.
    """

    def __init__(self, weight: np.ndarray, lm_head: np.ndarray | None, use: VocabularyUse):
        if lm_head is not None:
            raise ValueError("One matrix is coded, for both sides; this head has its own.")
        self._weight = weight
        self._metric = INPUT_SIDE * use.input_side.second_moment() + use.output_side.second_moment()
        self._row_weights = coding_weights(use.token_counts, use.head_use)

    def table(self, bits_per_weight: float, rank: int | None = None) -> CodedTable:
        """Code within a budget; as `encode_table`."""
        return encode_table(self._weight, self._metric, self._row_weights, bits_per_weight, rank=rank)


def encode_table(
    weight: np.ndarray,
    metric: np.ndarray,
    row_weights: np.ndarray,
    bits_per_weight: float,
    exponent: float = STEP_EXPONENT,
    rank: int | None = None,
) -> CodedTable:
    """Code a vocabulary matrix within a budget.

    With m = q W, q the row weights, and a metric C, rows are rotated into the eigenvectors P of C^(1/2) G C^(1/2),
    G = (W - m)^T diag(q) (W - m), where an error costs the same in every direction, and rounded to integers with one
    step a row, proportional to q^(-exponent). Components of which no code is left fall away: low rank is where
    precision ends. The codes are entropy-coded, predicted from like rows; all that a decoder needs is counted.

    Args:
        weight: (V, d) floats, finite.
        metric: (d, d) float64, positive definite: what an error e of a row costs, e C e^T.
        row_weights: (V,) positive float64: what a row's errors weigh.
        bits_per_weight: The budget, bytes times 8 / (V d); `nbytes` is at most that.
        exponent: Of row weights in the steps.
        rank: The most components that may be left; `None`: any number. One may take two columns at many bits.

    Returns:
        The coded matrix.

    Raises:
        ValueError: The budget is too small.
    """
    rotation = _Rotation.of(weight, metric, row_weights, rank)
    step_index = _step_indices(row_weights, exponent)
    relative = np.exp2(step_index / OCTAVE).astype(np.float32)
    budget = bits_per_weight * weight.size / 8
    step = _plain_step(rotation.scores, relative, 8 * budget)
    weights = 1 / np.sqrt(rotation.scores.var(0) + (step * np.median(relative)) ** 2 / 12)
    parents = find_parents((rotation.scores * weights)[:, :_PARENT_COMPONENTS], step_index)
    best = None
    for _ in range(_SEARCH_ROUNDS):
        table = _code(rotation, step, step_index, *parents)
        size = table.nbytes
        if size <= budget and (best is None or size > best[0]):
            best = size, table
        if (1 - _TOLERANCE) * budget <= size <= budget:
            break
        excess = 8 * (size - (1 - _TOLERANCE / 2) * budget)
        step *= 2 ** np.clip(excess / _plain_bits(rotation.scores, step * relative)[1], -2, 2)
    if best is None:
        raise ValueError(f"{bits_per_weight} bits a weight do not hold a matrix of {weight.shape}.")
    return best[1]


@dataclass(frozen=True)
class _Rotation:
    """`scores @ scale_up + mean` is the matrix; a step in any score costs the same."""

    scores: np.ndarray  # (V, k) float32
    codes: np.ndarray  # (k, d) int8
    steps: np.ndarray  # (k,) float16
    mean: np.ndarray  # (d,) float16

    @staticmethod
    def of(weight: np.ndarray, metric: np.ndarray, row_weights: np.ndarray, rank: int | None) -> "_Rotation":
        weight = np.asarray(weight, np.float32)
        weights = row_weights / row_weights.sum()
        mean = (weights @ weight).astype(np.float16)
        centred = weight - mean.astype(np.float32)
        values, vectors = np.linalg.eigh(metric * (len(metric) / np.trace(metric)))  # in the range of fp16's numbers
        root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
        gram = (centred * weights[:, None].astype(np.float32)).T @ centred
        _, vectors = np.linalg.eigh(root @ gram @ root)
        scale_up = (vectors[:, ::-1].T @ inverse_root)[:rank]
        steps = (np.sqrt((scale_up**2).mean(1)) / _SCALE_DEVIATION).astype(np.float16)
        steps = np.maximum(steps, np.finfo(np.float16).tiny)
        codes = np.clip(np.rint(scale_up / steps[:, None].astype(np.float64)), -127, 127).astype(np.int8)
        # The scores are those of the rounded matrix, so its rounding is no error.
        rounded = codes * steps[:, None].astype(np.float64)
        inverse = metric @ np.linalg.solve(rounded @ metric @ rounded.T, rounded).T  # its own where all are kept
        return _Rotation(centred @ inverse.astype(np.float32), codes, steps, mean)


def _step_indices(row_weights: np.ndarray, exponent: float) -> np.ndarray:
    logarithms = -exponent * np.log2(row_weights)
    return np.minimum(np.rint(OCTAVE * (logarithms - logarithms.min())).astype(np.int64), _LARGEST_STEP_INDEX)


def _plain_step(scores: np.ndarray, relative: np.ndarray, bits: float) -> float:
    """Find the step at which `_plain_bits` meets a budget, by bisection of its logarithm."""
    low, high = -60.0, 60.0
    while high - low > 0.01:
        middle = (low + high) / 2
        spends_more = _plain_bits(scores, relative * np.float32(2**middle))[0] > bits
        low, high = (middle, high) if spends_more else (low, middle)
    return 2**high


def _plain_bits(scores: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Estimate, from some of the rows, bits of codes that nothing predicts, and how many a doubled step saves.

    A Gaussian of many steps' spread s has log2(2 pi e s^2) / 2 bits.
    """
    rows = slice(None, None, max(1, len(scores) // 1024))
    above = 2 * np.pi * np.e * (scores[rows] / steps[rows, None]).var(0)
    return len(scores) * 0.5 * float(np.log2(1 + above).sum()), len(scores) * float((above / (1 + above)).sum())


def _code(
    rotation: _Rotation, step: float, step_index: np.ndarray, parent: np.ndarray, share: np.ndarray
) -> CodedTable:
    """Code with twice the step that codes are apart: on the trellis, every second of them may come next."""
    steps = (step * np.exp2(step_index / OCTAVE)).astype(np.float32)
    targets = rotation.scores / (steps / 2)[:, None]
    plain = 2 * np.rint(targets / 2).astype(np.int32)
    used = plain.any(0)
    targets, plain = targets[:, used], plain[:, used]
    column, unit = _columns(np.abs(plain).max(0, initial=0))
    row_spread, column_spread = measure_spreads(_digits(plain, column, unit), step_index, parent, share)
    column_spread[unit == 1] = np.maximum(column_spread[unit == 1] - OCTAVE, -127)  # of the halves of codes
    relations = RowRelations(step_index, parent, share, row_spread, column_spread)
    classes = relations.classes(np.arange(len(targets)))[:, : targets.shape[1]]
    codes = _digits(round_on_trellis(targets, on_path(classes)), column, unit)
    scale_codes, scale_steps = (of_all[used][column] for of_all in (rotation.codes, rotation.steps))
    scale_steps = (unit * scale_steps).astype(np.float16)
    first_step = float(np.float32(step / 2))
    scales = scale_codes, scale_steps, rotation.mean
    return CodedTable.quantized(codes, relations, first_step, *scales, trellis_columns=targets.shape[1])


def _columns(largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose int8 columns for integers: one a component, more where eight bits do not hold it.

    Args:
        largest: (d,) of the integers' magnitudes, when each is rounded by itself.

    Returns:
        Of each column, first all that hold ones, the component, (k,), and what its 1 stands for, (k,).
    """
    components, units = [], []
    component, unit = np.arange(len(largest)), 1
    while len(component):
        components.append(component)
        units.append(np.full(len(component), unit))
        carried = largest > 127 - FARTHEST
        component, largest, unit = component[carried], (largest[carried] + _DIGIT // 2) // _DIGIT, unit * _DIGIT
    return np.concatenate(components or [np.arange(0)]), np.concatenate(units or [np.arange(0)])


def _digits(wide: np.ndarray, column: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Write integers (V, d) into the columns that `_columns` chose, (V, k) int8."""
    columns = []
    for digit in np.unique(unit):
        carried = np.isin(column[unit == digit], column[unit == digit * _DIGIT])
        carry = (wide[:, carried] + _DIGIT // 2) // _DIGIT
        low = wide.copy()
        low[:, carried] -= carry * _DIGIT
        columns.append(low.astype(np.int8))
        wide = carry
    return np.concatenate(columns, axis=-1) if columns else wide.astype(np.int8)
