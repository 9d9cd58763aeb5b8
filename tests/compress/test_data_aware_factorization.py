"""Factorizations that know how the vocabulary is used: what each minimises, and that it stays finite."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from factorized_gpt2.compress.data_aware import VocabularyUse
from factorized_gpt2.compress.methods import BY_RANK
from factorized_gpt2.compress.methods import METHODS as ALL_METHODS
from factorized_gpt2.compress.pca import factorize
from factorized_gpt2.compress.row_fit import PRIOR_OCCURRENCES, Side, fit_rows
from factorized_gpt2.models.factors import Factors

METHODS = [name for name in BY_RANK if ALL_METHODS[name].needs_text]
V, WIDTH = 60, 16
ARRAYS = ("wte", "scale_up", "scale_down", "mean", "lm_head")


def random_matrix(rows: int = V, columns: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Draw a matrix whose directions differ in importance, about a mean that is not zero."""
    rng = np.random.default_rng(seed)
    scales = rng.permutation(np.geomspace(1.0, 0.05, columns))
    return (rng.normal(size=(rows, columns)) * scales + rng.normal(size=columns)).astype(np.float32)


def random_side(vocab_size: int, width: int, count: int, draws: int, seed: int) -> Side:
    rng = np.random.default_rng(seed)
    return Side(
        vectors=random_matrix(count, width, seed),
        tokens=rng.integers(0, vocab_size, count * draws),
        sources=np.repeat(np.arange(count), draws),
        weights=rng.random(count * draws).astype(np.float32),
    )


def random_use(vocab_size: int = V, width: int = WIDTH, count: int = 400, seed: int = 0) -> VocabularyUse:
    """Make use in which some tokens never occur and others often, on sides that differ in scale."""
    rng = np.random.default_rng(seed)
    counts = (rng.integers(0, 500, vocab_size) * rng.random(vocab_size) ** 4).astype(np.int64)
    output = random_side(vocab_size, width, count, 3, seed + 2)
    return VocabularyUse(
        counts,
        input_side=random_side(vocab_size, width, count, 1, seed + 1),
        output_side=replace(output, vectors=3 * output.vectors),
    )


WEIGHT, HEAD, USE = random_matrix(), random_matrix(seed=1), random_use()
SIDES = (USE.input_side, USE.output_side)


def factorize_by(
    weight: np.ndarray, ranks: Sequence[int], method: str, use: VocabularyUse, lm_head: np.ndarray | None = None
) -> dict[int, Factors]:
    return ALL_METHODS[method].fit(weight, lm_head, use).factors(ranks)


def approximation(factors: Factors) -> np.ndarray:
    return factors.wte.astype(np.float64) @ factors.scale_up.astype(np.float64) + factors.mean


def head_approximation(factors: Factors) -> np.ndarray:
    """The matrix (V, d) that hidden states meet."""
    return (factors.scale_down.astype(np.float64) @ factors.lm_head).T


def metric_of(method: str, *sides: Side) -> np.ndarray:
    return np.eye(WIDTH) if method == "weighted" else sum(side.second_moment() for side in sides)


def metric_error(error: np.ndarray, use: VocabularyUse, metric: np.ndarray) -> float:
    return use.row_weights() @ np.einsum("vd,de,ve->v", error, metric, error)


def best_approximation(weight: np.ndarray, rank: int, use: VocabularyUse, metric: np.ndarray) -> np.ndarray:
    """The affine rank-k approximation of least weighted error under a metric, by numpy's SVD."""
    weight, root_weights = weight.astype(np.float64), np.sqrt(use.row_weights())[:, None]
    mean = use.row_weights() @ weight
    factor = np.linalg.cholesky(metric)  # a root of the metric, though not the symmetric one
    left, singular, right = np.linalg.svd(root_weights * (weight - mean) @ factor, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ np.linalg.inv(factor) / root_weights + mean


def own_errors(error: np.ndarray, use: VocabularyUse) -> np.ndarray:
    """What `fit_rows` minimises for every token, (V,)."""
    total = np.zeros(len(error))
    for side in (use.input_side, use.output_side):
        occurrences = np.bincount(side.tokens, side.weights, minlength=len(error))
        squares = np.einsum("nd,nd->n", side.vectors[side.sources], error[side.tokens]) ** 2
        own = np.bincount(side.tokens, side.weights * squares, minlength=len(error))
        shared = np.einsum("vd,de,ve->v", error, side.second_moment(), error)
        total += (PRIOR_OCCURRENCES * shared + own) / (PRIOR_OCCURRENCES + occurrences)
    return total


def test_row_weights_by_hand():
    # (0 + 1/2)^(3/4) : (7.5 + 1/2)^(3/4) = 1 : 16^(3/4) = 1 : 8.
    use = replace(USE, token_counts=np.array([0, 7.5, 0]))
    np.testing.assert_allclose(use.row_weights(), [0.1, 0.8, 0.1])


@pytest.mark.parametrize("rank", [1, 5, WIDTH - 1, WIDTH])
@pytest.mark.parametrize("method", ["weighted", "joint"])
def test_error_is_the_least_there_is(method, rank):
    metric = metric_of(method, *SIDES)
    best = best_approximation(WEIGHT, rank, USE, metric)
    found = approximation(factorize_by(WEIGHT, [rank], method, USE)[rank])
    pca = approximation(factorize(WEIGHT, rank))
    np.testing.assert_allclose(found, best, atol=1e-4)
    error, least, of_pca = (metric_error(matrix - WEIGHT, USE, metric) for matrix in (found, best, pca))
    variance = metric_error(WEIGHT - USE.row_weights() @ WEIGHT, USE, metric)
    assert error == pytest.approx(least, rel=1e-3, abs=1e-10 * variance)
    assert error < 0.99 * of_pca + 1e-10 * variance


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 5, WIDTH - 1])
def test_rows_fitted_to_their_tokens_cost_less_in_their_use(rank, seed):
    weight, use = random_matrix(seed=10 + seed), random_use(count=2000, seed=20 + seed)
    joint, tokenwise = (
        use.row_weights() @ own_errors(approximation(factorize_by(weight, [rank], method, use)[rank]) - weight, use)
        for method in ("joint", "tokenwise")
    )
    assert tokenwise < 0.999 * joint


def test_tokenwise_fits_rows_then_projection_and_mean_then_rows():
    moments = [side.second_moment() for side in SIDES]
    start = factorize_by(WEIGHT, [5], "joint", USE)[5]
    rows = fit_rows(WEIGHT - start.mean, start.scale_up.astype(np.float64), SIDES, moments)
    root_weights = np.sqrt(USE.row_weights())[:, None]
    regressors = np.column_stack([rows, np.ones(V)])
    line, *_ = np.linalg.lstsq(root_weights * regressors, root_weights * WEIGHT, rcond=None)
    found = factorize_by(WEIGHT, [5], "tokenwise", USE)[5]
    np.testing.assert_allclose(found.mean, line[-1], atol=1e-4)
    axes, _ = np.linalg.qr(line[:-1].T)  # factors of one product differ by a change of basis
    np.testing.assert_allclose(found.scale_up.T @ found.scale_up, axes @ axes.T, atol=1e-4)
    assert np.abs(found.scale_up - start.scale_up).max() > 1e-3
    final = fit_rows(WEIGHT - found.mean, found.scale_up.astype(np.float64), SIDES, moments)
    np.testing.assert_allclose(found.wte, final, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_loses_nothing(method):
    factors = factorize_by(WEIGHT, [WIDTH], method, USE, HEAD)[WIDTH]
    np.testing.assert_allclose(approximation(factors), WEIGHT, atol=1e-4)
    # The head lacks its mean, which adds one number to all logits of a position.
    lacking = HEAD - head_approximation(factors)
    np.testing.assert_allclose(lacking, np.tile(lacking[0], (V, 1)), atol=1e-4)


@pytest.mark.parametrize("method", ["weighted", "joint"])
def test_untied_sides_are_each_the_best_under_their_own_metric(method):
    factors = factorize_by(WEIGHT, [5], method, USE, HEAD)[5]
    best = best_approximation(WEIGHT, 5, USE, metric_of(method, USE.input_side))
    np.testing.assert_allclose(approximation(factors), best, atol=1e-4)
    best = best_approximation(HEAD, 5, USE, metric_of(method, USE.output_side))
    np.testing.assert_allclose(head_approximation(factors), best - USE.row_weights() @ HEAD, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_exchanging_the_sides_exchanges_their_factors(method):
    exchanged = replace(USE, input_side=USE.output_side, output_side=USE.input_side)
    one = factorize_by(WEIGHT, [5], method, USE, HEAD)[5]
    other = factorize_by(HEAD, [5], method, exchanged, WEIGHT)[5]
    np.testing.assert_array_equal(one.lm_head, other.wte.T)
    np.testing.assert_array_equal(one.scale_down, other.scale_up.T)
    np.testing.assert_array_equal(one.scale_up, other.scale_down.T)
    np.testing.assert_array_equal(one.wte, other.lm_head.T)


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_contiguous_float32_of_the_documented_shapes(method, dtype, with_head):
    weight, head = (matrix.astype(dtype) for matrix in (WEIGHT, HEAD))
    factors = factorize_by(weight, [5], method, USE, head if with_head else None)[5]
    shapes = [(V, 5), (5, WIDTH), (WIDTH, 5), (WIDTH,), *([(5, V)] if with_head else [])]
    for name, shape in zip(ARRAYS, shapes, strict=False):
        array = getattr(factors, name)
        assert array.shape == shape, name
        assert array.dtype == np.float32, name
        assert array.flags.c_contiguous, name
    if not with_head:
        assert factors.lm_head is None
        np.testing.assert_array_equal(factors.scale_down, factors.scale_up.T)
    assert type(factors.explained_share) is float


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_asked_together_equal_separate_fits_and_repeat_exactly(method, with_head):
    head = HEAD if with_head else None
    together, again = (factorize_by(WEIGHT, [7, 1, WIDTH], method, USE, head) for _ in range(2))
    assert list(together) == [7, 1, WIDTH]
    for rank, factors in together.items():
        alone = factorize_by(WEIGHT, [rank], method, USE, head)[rank]
        assert factors.rank == rank
        assert factors.explained_share == alone.explained_share
        for name in ARRAYS[: 5 if with_head else 4]:
            np.testing.assert_allclose(getattr(factors, name), getattr(alone, name), atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(getattr(factors, name), getattr(again[rank], name), err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed(method):
    arrays = [WEIGHT, HEAD, USE.token_counts, *(array for side in SIDES for array in vars(side).values())]
    before = [array.copy() for array in arrays]
    factorize_by(WEIGHT, [5], method, USE, HEAD)
    factorize_by(WEIGHT, [5], method, USE)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [V, 9])
def test_shares_are_those_of_the_factors_at_every_rank(method, tied, rows):
    weight, head, use = random_matrix(rows), random_matrix(rows, seed=1), random_use(rows)
    ranks = range(1, min(rows, WIDTH) + 1)
    shares = ALL_METHODS[method].fit(weight, None if tied else head, use).shares
    factors = factorize_by(weight, ranks, method, use, None if tied else head)
    assert shares.shape == (len(ranks),)
    np.testing.assert_allclose(shares, [factors[rank].explained_share for rank in ranks], rtol=1e-12)
    assert (np.diff(shares) >= 0).all()
    assert shares[-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("method", ["weighted", "joint"])
def test_the_share_is_that_of_the_error_avoided(method):
    metric = metric_of(method, *SIDES)
    factors = factorize_by(WEIGHT, [5], method, USE)[5]
    left = metric_error(approximation(factors) - WEIGHT, USE, metric)
    whole = metric_error(WEIGHT - USE.row_weights() @ WEIGHT, USE, metric)
    assert factors.explained_share == pytest.approx(1 - left / whole, abs=1e-5)


@pytest.mark.parametrize("weight_scale", [1e3, 1e-3])
@pytest.mark.parametrize("vector_scale", [1e2, 1e-4])
@pytest.mark.parametrize("method", METHODS)
def test_units_do_not_matter(method, vector_scale, weight_scale):
    inputs, outputs = (replace(side, vectors=side.vectors * np.float32(vector_scale)) for side in SIDES)
    use = VocabularyUse(USE.token_counts, inputs, outputs)
    scaled = factorize_by(WEIGHT * np.float32(weight_scale), [5], method, use)[5]
    plain = factorize_by(WEIGHT, [5], method, USE)[5]
    np.testing.assert_allclose(approximation(scaled) / weight_scale, approximation(plain), atol=1e-4)


NEVER = {"tokens": np.zeros(0, np.int64), "sources": np.zeros(0, np.int64), "weights": np.zeros(0, np.float32)}
AWKWARD = {
    "no token ever seen": (WEIGHT, replace(USE, token_counts=np.zeros(V, np.int64))),
    "no token ever met": (WEIGHT, VocabularyUse(USE.token_counts, *(replace(side, **NEVER) for side in SIDES))),
    "one token only": (WEIGHT, replace(USE, token_counts=np.eye(V, dtype=np.int64)[3] * 10**9)),
    "singular covariance": (WEIGHT, random_use(count=5)),
    "repeated rows": (np.repeat(WEIGHT[:6], 10, axis=0), USE),
    "constant": (np.full((V, WIDTH), 2.5, np.float32), USE),
    "zero": (np.zeros((V, WIDTH), np.float32), USE),
    "fewer tokens than dimensions": (random_matrix(9), random_use(9)),
    "two tokens": (random_matrix(2), random_use(2)),
    "large": (WEIGHT * np.float32(1e3), USE),
    "small": (WEIGHT * np.float32(1e-3), USE),
}


def check_factors(weight: np.ndarray, use: VocabularyUse, method: str, with_head: bool) -> None:
    ranks, head = sorted({1, min(weight.shape) // 2, min(weight.shape)}), weight[::-1] if with_head else None
    for rank, factors in factorize_by(weight, ranks, method, use, head).items():
        for name in ARRAYS[: 5 if with_head else 4]:
            assert np.isfinite(getattr(factors, name)).all(), (rank, name)
        assert 0 <= factors.explained_share <= 1
    # The last rank is the full one.
    np.testing.assert_allclose(approximation(factors), weight, atol=1e-3 * max(np.abs(weight).max(), 1e-6))


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("method", METHODS)
def test_awkward_input_gives_finite_factors(method, case, with_head):
    check_factors(*AWKWARD[case], method, with_head)


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_written_in_principal_axes(method):
    factors = factorize_by(WEIGHT, [6], method, USE)[6]
    np.testing.assert_allclose(factors.scale_up @ factors.scale_up.T, np.eye(6), atol=1e-5)
    gram = factors.wte.T.astype(np.float64) @ factors.wte
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4 * gram[0, 0])
    assert (np.diff(np.diag(gram)) <= 0).all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_side_of_zeros_gives_finite_factors():
    inputs, outputs = (replace(side, vectors=np.zeros_like(side.vectors)) for side in SIDES)
    uses = (replace(USE, input_side=inputs), replace(USE, output_side=outputs))
    for use, method, with_head in itertools.product(uses, METHODS, (False, True)):
        check_factors(WEIGHT, use, method, with_head)


NAN = np.where(np.eye(V, WIDTH) > 0, np.nan, WEIGHT)


@pytest.mark.parametrize(
    ("weight", "ranks", "method", "head", "message"),
    [
        (WEIGHT, [0], "joint", None, "Rank 0 is out of range"),
        (WEIGHT, [5, WIDTH + 1], "weighted", None, f"Rank {WIDTH + 1} is out of range"),
        (WEIGHT[:9], [10], "tokenwise", None, "Rank 10 is out of range"),
        (WEIGHT, [], "joint", None, "No rank"),
        (NAN, [5], "joint", None, "the token embedding contains NaN"),
        (WEIGHT, [5], "joint", NAN, "the head contains NaN"),
        (WEIGHT[0], [1], "joint", None, "the token embedding must be a matrix"),
    ],
)
def test_bad_input_is_refused(weight, ranks, method, head, message):
    with pytest.raises(ValueError, match=message):
        factorize_by(weight, ranks, method, random_use(len(weight)), head)
