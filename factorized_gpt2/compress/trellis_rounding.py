"""The codes on a trellis that are closest to a matrix: Viterbi's search, along all rows at once."""

import numpy as np

from ..network.trellis import PATHS, STATES, next_states

FARTHEST = 3  # a code lies at most this far from the even integer that is nearest to what it stands for
_ROWS_AT_ONCE = 1024

# Every state is reached from two others, with codes that are this modulo 4:
_SOURCES = np.array(
    [sorted(np.argwhere(np.stack([next_states(0), next_states(1)], 1) == s).tolist()) for s in range(STATES)]
)
_BEFORE = _SOURCES[..., 0].T  # (2, 8)
_REMAINDER = (_SOURCES[..., 0] % 2 + 2 * _SOURCES[..., 1]).T


def round_on_trellis(targets: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """Round to integers as `network.trellis` reads them, with the least sum of squared errors.

    Args:
        targets: (V, k) float32.
        passes: (V, k) bool, where a path goes through; elsewhere a code is the nearest even integer.

    Returns:
        (V, k) int32.
    """
    codes = 2 * np.rint(targets / 2).astype(np.int32)
    for first in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        for path in range(PATHS):
            columns = slice(path, None, PATHS)
            _round_paths(targets[rows, columns].T, passes[rows, columns].T, codes[rows, columns].T)
    return codes


def _round_paths(targets: np.ndarray, passes: np.ndarray, codes: np.ndarray) -> None:
    """Round n paths, (length, n) each, in place."""
    costs = np.full((STATES, targets.shape[1]), np.inf, np.float32)
    costs[0] = 0
    remainders, everyone = np.arange(4, dtype=np.float32)[:, None], np.arange(targets.shape[1])
    nearest = np.empty((len(targets), 4, targets.shape[1]), np.float32)
    second = np.empty((len(targets), STATES, targets.shape[1]), bool)  # which of the two states before is better
    for place, (target, passed) in enumerate(zip(targets, passes, strict=True)):
        nearest[place] = 4 * np.rint((target - remainders) / 4) + remainders
        errors = np.square(nearest[place] - target)
        first, other = (costs[_BEFORE[way]] + errors[_REMAINDER[way]] for way in (0, 1))
        second[place] = other < first
        np.copyto(costs, np.minimum(first, other), where=passed)
    state = costs.argmin(0)
    for place in reversed(range(len(targets))):
        way, passed = second[place, state, everyone].astype(np.intp), passes[place]
        code = nearest[place, _REMAINDER[way, state], everyone]
        np.copyto(codes[place], code, where=passed, casting="unsafe")
        np.copyto(state, _BEFORE[way, state], where=passed)
