"""Factorizations that know how a model uses its vocabulary; docs/factorization.md derives them. Arrays in and out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models.factors import Factors
from .pca import check_matrices, check_ranks_of
from .row_fit import Side, fit_rows

FREQUENCY_EXPONENT = 0.75  # of token frequencies as row weights; docs/factorization.md measures others
_ROUNDS = 2  # of fitting rows, and the projection to them in between


@dataclass(frozen=True)
class VocabularyUse:
    """What text says of a vocabulary matrix.

    Attributes:
        token_counts: (V,) int64, how often each token occurs.
        input_side: Gradients with respect to token embeddings.
        output_side: Hidden states before the head.
        head_use: (V,) float64, the sum of p (1 - p) of each token's probability over positions, which is how much the
            head hears of it; `None` where it was not asked for.
    """

    token_counts: np.ndarray
    input_side: Side
    output_side: Side
    head_use: np.ndarray | None = None

    def row_weights(self) -> np.ndarray:
        """Weights of rows, (V,) float64 with sum 1; half an occurrence stands for those of tokens never seen."""
        weights = (self.token_counts + 0.5) ** FREQUENCY_EXPONENT
        return weights / weights.sum()


def weighted(weight: np.ndarray, lm_head: np.ndarray | None, use: VocabularyUse) -> "DataAwareFit":
    """Prepare PCA with rows weighted by frequency, C = I; arguments are those of `DataAwareFit`."""
    return DataAwareFit(weight, lm_head, use, has_metric=False)


def joint(weight: np.ndarray, lm_head: np.ndarray | None, use: VocabularyUse) -> "DataAwareFit":
    """Prepare a fit of the loss to second order on both sides, so that no factor has to balance them.

    C = E[g g^T] + E[h h^T], gradients on the input side and hidden states on the output side; arguments are those of
    `DataAwareFit`.
    """
    return DataAwareFit(weight, lm_head, use)


def tokenwise(weight: np.ndarray, lm_head: np.ndarray | None, use: VocabularyUse) -> "DataAwareFit":
    """Prepare the same start, then rows fitted to what their own tokens meet and the projection to the rows, in turn.

    Arguments are those of `DataAwareFit`.
    """
    return DataAwareFit(weight, lm_head, use, fits_rows=True)


class DataAwareFit:
    """A factorization of vocabulary matrices with regard to their use; a `methods.RankFit`.

    With row weights q, m = q W, G = (W - m)^T diag(q) (W - m) and a metric C, all methods take the k leading
    eigenvectors P of C^(1/2) G C^(1/2), which span the rows of `scale_up` as P^T C^(-1/2), `scale_down = scale_up.T`,
    and for `wte` the rows that fit best. They minimise sum_v q_v e_v C e_v^T over the errors e of the rows (Eckart &
    Young, 1936). Of all factors with one product, those with orthonormal rows of `scale_up` are returned, as by PCA.

    Args:
        weight: (V, d) floats, V >= 2, the token embedding; the head too when `lm_head` is `None`.
        lm_head: (V, d) floats, the head's own matrix when it is not tied: each side is then fitted for itself.
        use: What text says of the matrix, or of both.
        has_metric: Whether errors count by what the loss feels of them; if not, C = I.
        fits_rows: Whether each row is then fitted to its own token's use.

    Raises:
        ValueError: A matrix that is not two-dimensional, or NaN or infinity in it.
    """

    def __init__(
        self,
        weight: np.ndarray,
        lm_head: np.ndarray | None,
        use: VocabularyUse,
        has_metric: bool = True,
        fits_rows: bool = False,
    ):
        check_matrices(weight, lm_head)
        sides, row_weights = (use.input_side, use.output_side), use.row_weights()
        self._weight, self._lm_head, self._fits_rows = weight, lm_head, fits_rows
        self._input = _decompose(weight, has_metric, row_weights, sides if lm_head is None else sides[:1])
        self._head = None if lm_head is None else _decompose(lm_head, has_metric, row_weights, sides[1:])

    @property
    def shares(self) -> np.ndarray:
        """The share of tr(C^(1/2) G C^(1/2)) that the eigenvectors keep, (min(V, d),) float64, rank 1 first."""
        return self._input.shares[: min(self._input.weight.shape)]

    def factors(self, ranks: Sequence[int]) -> dict[int, Factors]:
        """Make the factors of ranks, each 1 <= k <= min(V, d); a `ValueError` for others, or none."""
        check_ranks_of(self._weight, self._lm_head, ranks)
        return {rank: self._factors(rank) for rank in ranks}

    def _factors(self, rank: int) -> Factors:
        embedding = _fit(self._input, rank, self._fits_rows)
        head = embedding if self._head is None else _fit(self._head, rank, self._fits_rows)
        return Factors(
            wte=_as_float32(embedding.rows),
            scale_up=_as_float32(embedding.projection),
            scale_down=_as_float32(head.projection.T),
            mean=_as_float32(embedding.mean),
            explained_share=float(self.shares[rank - 1]),
            lm_head=None if self._head is None else _as_float32(head.rows.T),
        )


@dataclass(frozen=True)
class _Fit:
    """One matrix as `rows @ projection + mean`."""

    rows: np.ndarray  # (V, k)
    projection: np.ndarray  # (k, d)
    mean: np.ndarray  # (d,)


@dataclass(frozen=True)
class _Decomposition:
    """Eigenvectors of C^(1/2) G C^(1/2), largest first, and what they were computed from."""

    weight: np.ndarray  # (V, d) float32
    row_weights: np.ndarray  # (V,)
    sides: Sequence[Side]
    moments: list[np.ndarray]
    mean: np.ndarray  # (d,)
    root: np.ndarray  # C^(1/2)
    inverse_root: np.ndarray
    vectors: np.ndarray
    shares: np.ndarray  # of the trace, that the first 1, 2, ... eigenvectors keep


def _decompose(weight: np.ndarray, has_metric: bool, row_weights: np.ndarray, sides: Sequence[Side]) -> _Decomposition:
    weight = _as_float32(weight)
    mean = row_weights @ weight
    centred = weight - mean.astype(np.float32)
    moments = [side.second_moment() for side in sides] if has_metric else [np.eye(weight.shape[1])]
    values, vectors = np.linalg.eigh(sum(moments))
    root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    gram = _weighted_product(centred, centred, row_weights)
    values, vectors = np.linalg.eigh(root @ gram @ root)
    values = np.maximum(values[::-1], 0)
    shares = np.minimum(values.cumsum() / values.sum(), 1) if values.sum() > 0 else np.ones_like(values)
    return _Decomposition(weight, row_weights, sides, moments, mean, root, inverse_root, vectors[:, ::-1], shares)


def _fit(of: _Decomposition, rank: int, fits_rows: bool) -> _Fit:
    leading, mean = of.vectors[:, :rank], of.mean
    projection = leading.T @ of.inverse_root
    if fits_rows:
        rows, projection, mean = _alternate(of.weight, projection, mean, of.row_weights, of.sides, of.moments)
    else:
        rows = (of.weight - mean.astype(np.float32)) @ (of.root @ leading).astype(np.float32)
    return _Fit(*_in_principal_axes(rows, projection), mean)


def _in_principal_axes(rows: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write the same product as PCA would: orthonormal rows of the projection, by falling square sum of the scores.

    Only training notices: AdamW's steps have one length for all weights, so each factor should have its usual scale.
    """
    axes, triangle = np.linalg.qr(projection.T)  # projection = triangle.T @ axes.T
    gram = _weighted_product(rows, rows, np.ones(len(rows)))
    _, rotation = np.linalg.eigh(triangle @ gram @ triangle.T)
    rotation = rotation[:, ::-1]
    return rows @ (triangle.T @ rotation).astype(np.float32), (axes @ rotation).T


def _alternate(
    weight: np.ndarray,
    projection: np.ndarray,
    mean: np.ndarray,
    row_weights: np.ndarray,
    sides: Sequence[Side],
    moments: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit rows to their tokens' use, then projection and mean to the rows, and rows again."""
    for left in reversed(range(_ROUNDS)):
        rows = fit_rows(weight - mean.astype(np.float32), projection, sides, moments)
        if left:
            projection, mean = _refit_projection(weight, rows, projection, mean, row_weights)
    return rows, projection, mean


def _refit_projection(
    weight: np.ndarray, rows: np.ndarray, projection: np.ndarray, mean: np.ndarray, row_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Regress the matrix on the rows, weighted, with intercept; a trace of ridge keeps to the last projection."""
    rows_mean = row_weights @ rows
    centred_rows = rows - rows_mean.astype(np.float32)
    residuals = weight - (rows @ projection.astype(np.float32) + mean.astype(np.float32))
    residuals_mean = row_weights @ residuals
    system = _weighted_product(centred_rows, centred_rows, row_weights)
    ridge = 1e-6 * np.trace(system) / len(system) + np.finfo(np.float64).tiny ** 0.5
    change = np.linalg.solve(
        system + ridge * np.eye(len(system)),
        _weighted_product(centred_rows, residuals - residuals_mean.astype(np.float32), row_weights),
    )
    return projection + change, mean + residuals_mean - rows_mean @ change


def _weighted_product(left: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute `left.T @ diag(weights) @ right` in float64, some rows at a time so that no copy is as large as W."""
    product = np.zeros((left.shape[1], right.shape[1]))
    for first in range(0, len(left), 4096):
        part = slice(first, first + 4096)
        product += (left[part] * weights[part, None]).T @ right[part].astype(np.float64)
    return product


def _as_float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
