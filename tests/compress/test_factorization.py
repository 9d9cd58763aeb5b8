"""The factorization: an optimal affine low-rank approximation, checked against numpy's SVD."""

import numpy as np
import pytest

from factorized_gpt2 import Factors, factorize, factorize_ranks
from factorized_gpt2.compress.pca import explained_shares


def random_matrix(rows: int, columns: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    """Draw a matrix whose directions differ in importance, about a mean that is not zero."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 0.05, columns)
    return (rng.normal(size=(rows, columns)) * scales + rng.normal(size=columns) + offset).astype(np.float32)


def best_approximation(weight: np.ndarray, rank: int) -> np.ndarray:
    """The affine rank-k approximation of least squared error, by a full SVD in float64."""
    weight = weight.astype(np.float64)
    mean = weight.mean(axis=0)
    left, singular, right = np.linalg.svd(weight - mean, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] + mean


def input_side(factors: Factors) -> np.ndarray:
    return factors.wte.astype(np.float64) @ factors.scale_up.astype(np.float64) + factors.mean


def output_side(factors: Factors) -> np.ndarray:
    """The matrix (V, d) that hidden states meet."""
    lm_head = factors.wte.T if factors.lm_head is None else factors.lm_head
    return (factors.scale_down.astype(np.float64) @ lm_head).T


def relative_error(approximation: np.ndarray, weight: np.ndarray) -> float:
    weight = weight.astype(np.float64)
    return np.linalg.norm(approximation - weight) / np.linalg.norm(weight - weight.mean(axis=0))


SHAPES = [(99, 32), (57, 31), (32, 32), (20, 32), (200, 1), (2, 5)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_error_is_that_of_the_best_approximation_at_every_rank(rows, columns):
    weight = random_matrix(rows, columns)
    for rank in range(1, min(rows, columns) + 1):
        factors = factorize(weight, rank)
        assert factors.rank == rank
        best = best_approximation(weight, rank)
        assert relative_error(input_side(factors), weight) == pytest.approx(relative_error(best, weight), abs=1e-5)
        # Where singular values differ the best approximation is unique, so the matrices agree, not just their errors.
        np.testing.assert_allclose(input_side(factors), best, atol=2e-5)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_full_rank_loses_nothing(rows, columns):
    weight = random_matrix(rows, columns)
    factors = factorize(weight, min(rows, columns))
    np.testing.assert_allclose(input_side(factors), weight, atol=1e-5)
    assert factors.explained_share == pytest.approx(1.0)


def test_points_on_a_line_by_hand():
    # The points (1, 2) + t (3, 4) for t = -1, 0, 1: the mean is (1, 2), the one direction (3, 4) / 5, the scores 5 t.
    weight = np.array([[-2.0, -2.0], [1.0, 2.0], [4.0, 6.0]])
    factors = factorize(weight, 1)
    sign = np.sign(factors.scale_up[0, 0])
    np.testing.assert_allclose(factors.mean, [1, 2], atol=1e-6)
    np.testing.assert_allclose(sign * factors.scale_up, [[0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(sign * factors.scale_down, [[0.6], [0.8]], atol=1e-6)
    np.testing.assert_allclose(sign * factors.wte, [[-5], [0], [5]], atol=1e-6)
    assert factors.explained_share == pytest.approx(1.0)
    assert factors.lm_head is None


def test_two_directions_by_hand():
    # Four corners of a rectangle of half sides 3 and 1 about the origin: rank 1 keeps 9 of 10 parts of the variance.
    weight = np.array([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    factors = factorize(weight, 1)
    assert factors.explained_share == pytest.approx(0.9)
    np.testing.assert_allclose(input_side(factors), weight * [1, 0], atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("rank", [1, 7, 31])
def test_explained_variance_ratio_is_that_of_numpy(rank, offset):
    weight = random_matrix(99, 32, offset=offset)
    eigenvalues = np.linalg.eigvalsh(np.cov(weight.astype(np.float64), rowvar=False))[::-1]
    expected = eigenvalues[:rank].sum() / eigenvalues.sum()
    ratio = factorize(weight, rank).explained_share
    assert type(ratio) is float
    assert ratio == pytest.approx(expected, abs=1e-7)
    error = relative_error(best_approximation(weight, rank), weight)
    assert ratio == pytest.approx(1 - error**2, abs=1e-7)


@pytest.mark.parametrize("ranks", [[1, 5, 12], [12, 1, 5], [32], (3, 3)])
def test_nested_ranks_equal_separate_fits(ranks):
    weight, head = random_matrix(99, 32), random_matrix(99, 32, seed=1)
    together = factorize_ranks(weight, ranks, head)
    assert set(together) == set(ranks)
    for rank in ranks:
        alone = factorize(weight, rank, head)
        for name in ("scale_up", "scale_down", "mean"):
            np.testing.assert_array_equal(getattr(together[rank], name), getattr(alone, name), err_msg=name)
        for name in ("wte", "lm_head"):  # products in float32, rounded otherwise at another width
            np.testing.assert_allclose(getattr(together[rank], name), getattr(alone, name), atol=2e-6, err_msg=name)
        assert together[rank].explained_share == alone.explained_share


def test_explained_share_never_exceeds_one():
    shares = [factorize(random_matrix(40, 8, seed), 8).explained_share for seed in range(40)]
    assert max(shares) <= 1.0
    assert min(shares) > 1 - 1e-12


@pytest.mark.parametrize(("rows", "columns"), [(99, 32), (20, 32), (2, 5)])
def test_shares_are_those_of_each_rank(rows, columns):
    weight = random_matrix(rows, columns)
    shares = explained_shares(weight)
    ranks = range(1, min(rows, columns) + 1)
    assert shares.dtype == np.float64
    assert shares.tolist() == pytest.approx([factorize(weight, rank).explained_share for rank in ranks])
    assert shares.max() <= 1.0


@pytest.mark.filterwarnings("error")
def test_a_constant_matrix_has_nothing_to_lose_at_any_rank():
    assert explained_shares(np.full((9, 4), 2.5)).tolist() == [1.0] * 4


def test_shares_of_a_bad_matrix_are_refused():
    with pytest.raises(ValueError, match=r"^the token embedding contains NaN"):
        explained_shares(np.full((9, 4), np.nan))


def test_components_are_orthonormal_and_shared_by_the_tied_head():
    factors = factorize(random_matrix(99, 32), 12)
    np.testing.assert_allclose(factors.scale_up @ factors.scale_up.T, np.eye(12), atol=1e-6)
    np.testing.assert_array_equal(factors.scale_down, factors.scale_up.T)


def test_tied_head_differs_from_the_embedding_by_the_mean_alone():
    factors = factorize(random_matrix(99, 32), 12)
    np.testing.assert_allclose(input_side(factors) - output_side(factors), np.tile(factors.mean, (99, 1)), atol=1e-6)


def test_untied_head_gets_factors_of_its_own():
    weight, head = random_matrix(99, 32), random_matrix(99, 32, seed=1)
    untied, alone = factorize(weight, 12, head), factorize(weight, 12)
    np.testing.assert_array_equal(untied.wte, alone.wte)
    np.testing.assert_array_equal(untied.scale_up, alone.scale_up)
    assert untied.explained_share == alone.explained_share
    centred = best_approximation(head, 12) - head.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(output_side(untied), centred, atol=2e-5)
    assert np.abs(untied.scale_down - untied.scale_up.T).max() > 0.1


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_outputs_are_contiguous_float32_of_the_documented_shapes(dtype, with_head):
    weight = random_matrix(99, 32).astype(dtype)
    factors = factorize(weight, 12, weight[::-1] if with_head else None)
    shapes = {"wte": (99, 12), "scale_up": (12, 32), "scale_down": (32, 12), "mean": (32,)}
    shapes |= {"lm_head": (12, 99)} if with_head else {}
    for name, shape in shapes.items():
        array = getattr(factors, name)
        assert array.shape == shape, name
        assert array.dtype == np.float32, name
        assert array.flags.c_contiguous, name
        assert array.flags.owndata or array.base is None or array.base.shape == shape, name


def test_input_is_not_changed():
    weight = random_matrix(99, 32)
    before = weight.copy()
    factorize(weight, 12, weight)
    np.testing.assert_array_equal(weight, before)


def test_same_input_gives_the_same_factors():
    first, second = factorize(random_matrix(99, 32), 12), factorize(random_matrix(99, 32), 12)
    np.testing.assert_array_equal(first.wte, second.wte)


def test_repeated_rows_stay_repeated():
    weight = np.repeat(random_matrix(10, 32), 5, axis=0)
    factors = factorize(weight, 9)  # ten distinct rows span nine directions about their mean
    np.testing.assert_array_equal(factors.wte, np.repeat(factors.wte[::5], 5, axis=0))
    np.testing.assert_allclose(input_side(factors), weight, atol=1e-5)


def test_a_large_mean_costs_no_accuracy():
    weight = random_matrix(99, 32, offset=1e3)
    factors = factorize(weight, 12)
    best = best_approximation(weight, 12)
    # A float32 mean of 1000 is known to 3e-5: what is left must not exceed that rounding.
    assert relative_error(input_side(factors), weight) == pytest.approx(relative_error(best, weight), abs=1e-5)
    np.testing.assert_allclose(input_side(factors), best, atol=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_matrix_is_its_mean(value):
    factors = factorize(np.full((9, 4), value, dtype=np.float32), 2)
    np.testing.assert_allclose(input_side(factors), value, atol=1e-6)
    assert factors.explained_share == 1.0


@pytest.mark.parametrize(
    ("weight", "ranks", "message"),
    [
        (np.ones((9, 4)), [0], "Rank 0 is out of range"),
        (np.ones((9, 4)), [-1], "Rank -1 is out of range"),
        (np.ones((9, 4)), [5], "Rank 5 is out of range"),
        (np.ones((3, 4)), [4], "Rank 4 is out of range"),
        (np.ones((9, 4)), [2, 5], "Rank 5 is out of range"),
        (np.ones((9, 4)), [], r"^No rank given\.$"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), [1], "the token embedding contains NaN"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), [1], "the token embedding contains NaN or inf"),
        (np.ones((1, 4)), [1], r"with V >= 2, got shape \(1, 4\)"),
        (np.ones(9), [1], r"must be a matrix \(V, d\) .* got shape \(9,\)"),
        (np.ones((2, 3, 4)), [1], "must be a matrix"),
    ],
)
def test_bad_input_is_refused(weight, ranks, message):
    with pytest.raises(ValueError, match=message):
        factorize_ranks(weight, ranks)


def test_a_bad_head_is_refused_as_the_head():
    with pytest.raises(ValueError, match="the head contains NaN"):
        factorize(np.ones((9, 4)), 1, np.full((9, 4), np.nan))
