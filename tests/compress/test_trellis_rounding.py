from itertools import product

import numpy as np
import pytest

from factorized_gpt2.compress.trellis_rounding import round_on_trellis
from factorized_gpt2.network.trellis import PATHS, next_states


def _on_a_path(codes: np.ndarray) -> bool:
    state = 0
    for code in codes:
        if code & 1 != state & 1:
            return False
        state = next_states(code >> 1 & 1)[state]
    return True


def test_no_path_is_closer():
    targets = 3 * np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    alone = np.zeros((len(targets), 5 * PATHS), np.float32)
    alone[:, ::PATHS] = targets  # the first of the paths; the others stay at zero
    codes = round_on_trellis(alone, np.ones(alone.shape, bool))[:, ::PATHS]
    for target, code in zip(targets, codes, strict=True):
        assert _on_a_path(code)
        near = [range(int(np.floor(value)) - 2, int(np.floor(value)) + 4) for value in target]
        best = min(np.square(np.array(path) - target).sum() for path in product(*near) if _on_a_path(np.array(path)))
        assert np.square(code - target).sum() == pytest.approx(best, rel=1e-4)


def test_where_no_path_goes_codes_are_the_nearest_even_ones():
    targets = 3 * np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    passes = np.random.default_rng(1).random(targets.shape) < 0.5
    codes = round_on_trellis(targets, passes)
    assert np.array_equal(codes[~passes], (2 * np.rint(targets / 2))[~passes])
    for row, passed in zip(codes, passes, strict=True):
        for path in range(PATHS):
            assert _on_a_path(row[path::PATHS][passed[path::PATHS]])


def test_errors_are_a_fifth_less_than_those_of_rounding_at_equal_bits():
    targets = 20 * np.random.default_rng(0).normal(size=(500, 300)).astype(np.float32)
    codes = round_on_trellis(targets, np.ones(targets.shape, bool))
    squares = np.square(codes - targets).mean() / (4 / 12)
    assert 0.77 < squares < 0.81
    assert (codes * targets).sum() / np.square(targets).sum() == pytest.approx(1, abs=1e-3)
