"""Principal component analysis of vocabulary matrices: arrays in, arrays out. No model, no files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..models.factors import Factors

if TYPE_CHECKING:
    from sklearn.decomposition import PCA


def factorize(weight: np.ndarray, rank: int, lm_head: np.ndarray | None = None) -> Factors:
    """Factorize a vocabulary matrix at one rank; see `factorize_ranks`."""
    return factorize_ranks(weight, [rank], lm_head)[rank]


def factorize_ranks(weight: np.ndarray, ranks: Sequence[int], lm_head: np.ndarray | None = None) -> dict[int, Factors]:
    """Factorize a vocabulary matrix by principal component analysis at several ranks, with one decomposition.

    With U the k leading eigenvectors of the covariance of the rows, (d, k), and m their mean:
    `wte = (W - m) U`, `scale_up = U.T`, `scale_down = U`. This is the affine rank-k map of least squared error
    (Eckart & Young, 1936). Leading components are nested, so the largest rank serves all. On the head's side
    `W h = wte U.T h + (m . h) 1`: the mean adds one number to all logits of a position, which softmax does not see.

    Args:
        weight: (V, d) floats, V >= 2, the token embedding; the head too when `lm_head` is `None`.
        ranks: Ranks k, each 1 <= k <= min(V, d).
        lm_head: (V, d) floats, the head's own matrix when it is not tied; it gets a decomposition of its own.

    Returns:
        Factors by rank.

    Raises:
        ValueError: A rank out of range or none, a matrix that is not two-dimensional, or NaN or infinity in it.
    """
    return PCAFit(weight, lm_head).factors(ranks)


def explained_shares(weight: np.ndarray) -> np.ndarray:
    """Compute the share of variance that a principal component analysis keeps at every rank.

    Args:
        weight: (V, d) floats, V >= 2.

    Returns:
        (min(V, d),) float64, rank 1 first; ones where there is no variance.

    Raises:
        ValueError: As in `factorize_ranks`.
    """
    return PCAFit(weight).shares


class PCAFit:
    """The decompositions of a vocabulary's matrices; a `methods.RankFit`.

    Args:
        weight: As in `factorize_ranks`.
        lm_head: As there.
        use: Nothing that this method looks at.

    Raises:
        ValueError: A matrix that is not two-dimensional, or NaN or infinity in it.
    """

    def __init__(self, weight: np.ndarray, lm_head: np.ndarray | None = None, use: None = None):
        check_matrices(weight, lm_head)
        self._weight, self._lm_head = weight, lm_head

    @cached_property
    def _embedding(self) -> PCA:
        return _fit_pca(self._weight)

    @cached_property
    def _head(self) -> PCA | None:
        return None if self._lm_head is None else _fit_pca(self._lm_head)

    @property
    def shares(self) -> np.ndarray:
        """The `explained_share` of every rank, (min(V, d),) float64, rank 1 first."""
        return np.minimum(np.nan_to_num(self._embedding.explained_variance_ratio_.cumsum(), nan=1.0), 1.0)

    def factors(self, ranks: Sequence[int]) -> dict[int, Factors]:
        """Make the factors of ranks, each 1 <= k <= min(V, d); a `ValueError` for others, or none."""
        check_ranks_of(self._weight, self._lm_head, ranks)
        embedding, head, largest = self._embedding, self._head, max(ranks)
        scores = _transform(embedding, self._weight, largest)
        head_scores = None if head is None else _transform(head, self._lm_head, largest)
        shares, output_side = self.shares, embedding if head is None else head
        return {
            rank: Factors(
                wte=_as_float32(scores[:, :rank]),
                scale_up=_as_float32(embedding.components_[:rank]),
                scale_down=_as_float32(output_side.components_[:rank].T),
                mean=_as_float32(embedding.mean_),
                explained_share=float(shares[rank - 1]),
                lm_head=None if head_scores is None else _as_float32(head_scores[:, :rank].T),
            )
            for rank in ranks
        }


def check_matrices(weight: np.ndarray, lm_head: np.ndarray | None) -> None:
    """Check what is to be factorized.

    Raises:
        ValueError: A matrix that is not two-dimensional, or NaN or infinity in it.
    """
    for name, matrix in _named(weight, lm_head):
        if matrix.ndim != 2 or len(matrix) < 2:
            raise ValueError(f"{name} must be a matrix (V, d) with V >= 2, got shape {matrix.shape}.")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name} contains NaN or infinity.")


def check_ranks_of(weight: np.ndarray, lm_head: np.ndarray | None, ranks: Sequence[int]) -> None:
    """Check the ranks asked of matrices.

    Raises:
        ValueError: A rank out of range, or none.
    """
    if not ranks:
        raise ValueError("No rank given.")
    for name, matrix in _named(weight, lm_head):
        largest = min(matrix.shape)
        for rank in ranks:
            if not 1 <= rank <= largest:
                raise ValueError(f"Rank {rank} is out of range: {name} is {matrix.shape}, so 1 <= rank <= {largest}.")


def _named(weight: np.ndarray, lm_head: np.ndarray | None) -> list[tuple[str, np.ndarray]]:
    named = [("the token embedding", weight), ("the head", lm_head)]
    return [(name, matrix) for name, matrix in named if matrix is not None]


def _fit_pca(weight: np.ndarray) -> PCA:
    from sklearn.decomposition import PCA  # not for those who only load a model

    # The covariance squares the condition number; in float64 the leading subspace is that of a full SVD.
    with np.errstate(invalid="ignore"):  # equal rows: no variance, and shares of it are 0 / 0
        return PCA(n_components=min(weight.shape), svd_solver="covariance_eigh").fit(_as_float64(weight))


def _transform(pca: PCA, weight: np.ndarray, rank: int) -> np.ndarray:
    """Do what `pca.transform` does, in the result's own precision: half the time and memory of float64."""
    return (_as_float32(weight) - _as_float32(pca.mean_)) @ _as_float32(pca.components_[:rank].T)


def _as_float64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def _as_float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
