"""Rows fitted to the vectors that their tokens meet, against each token's own normal equations in float64."""

import numpy as np
import pytest

from factorized_gpt2.compress import row_fit as module
from factorized_gpt2.compress.row_fit import PRIOR_OCCURRENCES, Side, fit_rows

ARRAYS = ("vectors", "tokens", "sources", "weights")


def random_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw vectors whose directions differ in importance, about a mean that is not zero."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(2.0, 0.2, width)
    return (rng.normal(size=(count, width)) * scales + rng.normal(size=width)).astype(np.float32)


def random_side(meetings: list[int], width: int, count: int = 40, seed: int = 0) -> Side:
    """Let token v meet `meetings[v]` of `count` vectors, some of them more than once, in no order."""
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(np.repeat(np.arange(len(meetings)), meetings))
    return Side(
        vectors=random_vectors(count, width, seed),
        tokens=tokens,
        sources=rng.integers(0, count, len(tokens)),
        weights=(3 * rng.random(len(tokens))).astype(np.float32),
    )


def random_projection(rank: int, width: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(rank, width)) / np.sqrt(width)


def curvature(token: int, sides: list[Side], moments: list[np.ndarray]) -> np.ndarray:
    """The (d, d) matrix M of a token's objective e M e^T, term by term as `fit_rows` documents it."""
    total = np.zeros_like(moments[0])
    for side, moment in zip(sides, moments, strict=True):
        here = side.tokens == token
        met, weights = side.vectors[side.sources[here]].astype(np.float64), side.weights[here].astype(np.float64)
        own = sum((u * np.outer(x, x) for u, x in zip(weights, met, strict=True)), np.zeros_like(moment))
        total += (PRIOR_OCCURRENCES * moment + own) / (PRIOR_OCCURRENCES + weights.sum())
    return total


def plain_rows(weight, projection, sides, moments) -> np.ndarray:
    """Solve every token's k x k system for itself."""
    rows = np.zeros((len(weight), len(projection)))
    for token, row in enumerate(weight.astype(np.float64)):
        matrix = curvature(token, sides, moments)
        rows[token] = np.linalg.solve(projection @ matrix @ projection.T, projection @ matrix @ row)
    return rows


def setting(meetings: list[int], width: int, rank: int, n_sides: int):
    """Arguments of `fit_rows`; the sides differ in who meets what, and in scale."""
    sides = [random_side(meetings, width), random_side(meetings[::-1], width, count=25, seed=1)][-n_sides:]
    moments = [side.second_moment() * scale for side, scale in zip(sides, (1.0, 30.0), strict=False)]
    return random_vectors(len(meetings), width, seed=2), random_projection(rank, width), sides, moments


def assert_rows_close(rows: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


MEETINGS = {
    "none": [0] * 9,
    "few": [0, 1, 2, 3, 4, 5, 0, 1, 2],
    "around the rank": [5, 6, 7, 8, 9, 0, 7, 1],
    "many": [0, 300, 17, 1, 33, 64, 65, 2],
    "one token alone": [0, 0, 40, 0, 0],
    "fewer tokens than dimensions": [3, 0, 12],
}


@pytest.mark.parametrize("n_sides", [1, 2])
@pytest.mark.parametrize(("width", "rank"), [(13, 7), (16, 1), (11, 11)])
@pytest.mark.parametrize("meetings", MEETINGS.values(), ids=MEETINGS)
def test_rows_solve_their_own_normal_equations(meetings, width, rank, n_sides):
    arguments = setting(meetings, width, rank, n_sides)
    rows = fit_rows(*arguments)
    assert rows.shape == (len(meetings), rank)
    assert rows.dtype == np.float32
    assert_rows_close(rows, plain_rows(*arguments))


@pytest.mark.parametrize("numbers_at_once", [1, 50])
def test_scratch_memory_does_not_matter(monkeypatch, numbers_at_once):
    arguments = setting([3, 1, 1, 0, 9, 9, 2, 30, 1], 13, 5, 2)
    expected = plain_rows(*arguments)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", numbers_at_once)
    assert_rows_close(fit_rows(*arguments), expected)


@pytest.mark.parametrize("n_sides", [1, 2])
def test_tokens_never_met_are_projected_under_the_shared_metric(n_sides):
    weight, projection, sides, moments = setting([0, 6, 0, 25, 0, 1, 0], 13, 5, n_sides)
    metric = sum(moments)
    projected = weight @ metric @ projection.T @ np.linalg.inv(projection @ metric @ projection.T)
    rows = fit_rows(weight, projection, sides, moments)
    never_met = [0, 2, 4, 6]
    assert_rows_close(rows[never_met], projected[never_met])
    assert np.abs(rows[3] - projected[3]).max() > 0.01 * np.abs(projected).max()


def test_meeting_a_vector_twice_is_meeting_it_once_with_both_weights():
    weight, projection, (side,), moments = setting([4, 0, 12, 1], 13, 5, 1)
    halves = Side(
        side.vectors,
        np.concatenate([side.tokens, side.tokens[::-1]]),
        np.concatenate([side.sources, side.sources[::-1]]),
        np.concatenate([0.25 * side.weights, 0.75 * side.weights[::-1]]),
    )
    once, twice = (fit_rows(weight, projection, [each], moments) for each in (side, halves))
    assert_rows_close(twice, once)


def test_rows_within_reach_are_found_whatever_the_token_meets():
    _, projection, sides, moments = setting([0, 3, 50, 7], 13, 5, 2)
    rows = random_vectors(4, 5, seed=3)
    assert_rows_close(fit_rows((rows @ projection).astype(np.float32), projection, sides, moments), rows)


def test_with_many_meetings_the_prior_fades():
    weight, projection, _, _ = setting([0, 0], 13, 5, 1)
    own = random_vectors(50, 13, seed=4)
    side = Side(own, np.ones(50, np.int64), np.arange(50), np.full(50, 1e4, np.float32))
    rows = fit_rows(weight, projection, [side], [np.eye(13)])
    expected, *_ = np.linalg.lstsq(own @ projection.T, own @ weight[1], rcond=None)
    assert_rows_close(rows[1], expected)


def test_arguments_are_not_changed():
    weight, projection, sides, moments = setting([0, 3, 50, 7], 13, 5, 2)
    arrays = [weight, projection, *moments, *(getattr(side, name) for side in sides for name in ARRAYS)]
    before = [array.copy() for array in arrays]
    fit_rows(weight, projection, sides, moments)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def side_of(vectors: np.ndarray) -> Side:
    nobody = np.zeros(0, np.int64)
    return Side(vectors, nobody, nobody, nobody.astype(np.float32))


def sample_moment(vectors: np.ndarray) -> np.ndarray:
    return vectors.T.astype(np.float64) @ vectors / len(vectors)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("count", [2, 5, 12, 100])
def test_second_moment_is_symmetric_and_positive_definite(count, scale):
    moment = side_of(random_vectors(count, 12) * np.float32(scale)).second_moment()
    assert moment.dtype == np.float64
    np.testing.assert_array_equal(moment, moment.T)
    eigenvalues = np.linalg.eigvalsh(moment)
    assert eigenvalues[0] > 1e-10 * eigenvalues[-1]


@pytest.mark.parametrize("count", [5, 60])
def test_second_moment_is_shrunk_towards_a_multiple_of_the_identity(count):
    vectors = random_vectors(count, 12)
    moment, sample = side_of(vectors).second_moment(), sample_moment(vectors)
    off_diagonal = ~np.eye(12, dtype=bool)
    kept = moment[off_diagonal] / sample[off_diagonal]
    np.testing.assert_allclose(kept, kept[0], rtol=1e-5)
    assert 0 < kept[0] < 1
    mixture = kept[0] * sample + (1 - kept[0]) * np.trace(sample) / 12 * np.eye(12)
    np.testing.assert_allclose(moment, mixture, rtol=1e-5, atol=1e-7)


def test_second_moment_of_many_vectors_is_theirs():
    vectors = random_vectors(20_000, 12)
    sample = sample_moment(vectors)
    np.testing.assert_allclose(side_of(vectors).second_moment(), sample, atol=2e-3 * np.abs(sample).max())


def test_second_moment_of_vectors_that_are_all_zero_can_be_inverted():
    moment = side_of(np.zeros((7, 5), np.float32)).second_moment()
    assert np.isfinite(np.linalg.inv(moment)).all()
    assert (np.linalg.eigvalsh(moment) > 0).all()
