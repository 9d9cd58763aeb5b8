"""Rows of a factor, each fitted to the vectors that its token meets. Arrays in, arrays out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

# Strength of the shared metric, in occurrences of a token: with this many of its own, both count alike.
PRIOR_OCCURRENCES = 15
_NUMBERS_AT_ONCE = 2**23  # of gathered vectors, a bound on scratch memory


@dataclass(frozen=True)
class Side:
    """One use of the vocabulary matrix, and a sample of the vectors that its rows are multiplied with.

    An error e (d,) in the row of token v costs, in nats and to second order, half the mean of (x . e)^2 over the
    vectors x that v meets. On the input side x is the gradient of a loss with respect to the token's embedding, on
    the output side a final hidden state, weighted by the variance p (1 - p) of the token's probability.

    Attributes:
        vectors: (N, d) float32.
        tokens: (n,) int64, the token of every meeting.
        sources: (n,) int64, the row in `vectors` of its vector.
        weights: (n,) float32, how many occurrences a meeting stands for.
    """

    vectors: np.ndarray
    tokens: np.ndarray
    sources: np.ndarray
    weights: np.ndarray

    def second_moment(self) -> np.ndarray:
        """E[x x^T], (d, d) float64, shrunk towards a multiple of the identity as far as the sample is small.

        The shrinkage is OAS (Chen et al., 2010): the result is regular even with fewer vectors than dimensions.
        """
        from sklearn.covariance import oas

        moment, _ = oas(self.vectors.astype(np.float64), assume_centered=True)
        floor = 1e-9 * np.trace(moment) / len(moment) + 1e-20  # the latter where all vectors are zero
        return moment + floor * np.eye(len(moment))


def fit_rows(
    weight: np.ndarray, projection: np.ndarray, sides: Sequence[Side], moments: Sequence[np.ndarray]
) -> np.ndarray:
    """Find the row a of every token v that makes `a @ projection` stand for its row w best on the vectors it meets.

    With C_s the shared second moment of side s, x_i the n_s meetings of v there with weights u_i, and n_0 the prior's
    occurrences, a minimises the sum over sides of

        (n_0 e C_s e^T + sum_i u_i (x_i . e)^2) / (n_0 + sum_i u_i),   e = w - a @ projection

    a Bayesian linear regression: tokens never met fall back on the shared metric. In the basis that diagonalises both
    projected moments the prior's system is diagonal for every token at once; a token with n meetings then costs one
    n x n system, or one k x k system where that is smaller. Tokens of like n are solved together.

    Args:
        weight: (V, d) float32, centred.
        projection: (k, d) float64, rows linearly independent.
        sides: One or two.
        moments: Of each side, (d, d) float64, positive definite.

    Returns:
        (V, k) float32.
    """
    basis, levels = _diagonalise([projection @ moment @ projection.T for moment in moments])
    prior = np.zeros((len(weight), len(projection)), np.float32)
    start = np.zeros_like(prior)
    shares = []
    for side, moment, level in zip(sides, moments, levels, strict=True):
        occurrences = np.bincount(side.tokens, weights=side.weights, minlength=len(weight))
        share = (1 / (PRIOR_OCCURRENCES + occurrences)).astype(np.float32)  # of one occurrence in its token's mean
        strength = PRIOR_OCCURRENCES * share[:, None]
        prior += strength * level.astype(np.float32)
        start += strength * (weight @ (moment @ projection.T @ basis).astype(np.float32))
        shares.append(share)
    start /= prior
    projected = [side.vectors @ (projection.T @ basis).astype(np.float32) for side in sides]
    meetings = _Meetings.of(weight, sides, shares, projected)
    rows = start
    for tokens, size in meetings.groups(projection.shape[0]):
        features, targets = meetings.gather(tokens, size)  # [n, size, k], [n, size]
        rows[tokens] = _posterior(prior[tokens], start[tokens], features, targets)
    return rows @ basis.T.astype(np.float32)


def _diagonalise(moments: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Find B with B^T P B diagonal for one or two positive definite P; return it and the diagonals."""
    *first, last = moments
    levels, basis = eigh(*first, last) if first else eigh(np.eye(len(last)), last)
    return basis, [*([levels] if first else []), np.ones(len(last))]


def _posterior(prior: np.ndarray, start: np.ndarray, features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Minimise `sum(prior * (a - start)**2) + |features @ a - targets|^2` over a, (n, k), for n tokens at once."""
    size, rank = features.shape[1:]
    if size > rank:
        system = features.transpose(0, 2, 1) @ features
        system[:, np.arange(rank), np.arange(rank)] += prior
        right = prior * start + np.einsum("nsk,ns->nk", features, targets)
        return np.linalg.solve(system, right[..., None])[..., 0]
    scaled = features / prior[:, None, :]
    system = features @ scaled.transpose(0, 2, 1)
    system[:, np.arange(size), np.arange(size)] += 1
    residuals = targets - np.einsum("nsk,nk->ns", features, start)
    return start + np.einsum("nsk,ns->nk", scaled, np.linalg.solve(system, residuals[..., None])[..., 0])


@dataclass(frozen=True)
class _Meetings:
    """Meetings of both sides in one list, sorted by token, scaled by the root of their weight."""

    vectors: np.ndarray  # (N, k), projected, of all sides
    sources: np.ndarray  # (n,)
    roots: np.ndarray  # (n,)
    targets: np.ndarray  # (n,)
    counts: np.ndarray  # (V,)
    starts: np.ndarray  # (V,)

    @staticmethod
    def of(
        weight: np.ndarray, sides: Sequence[Side], shares: Sequence[np.ndarray], projected: Sequence[np.ndarray]
    ) -> "_Meetings":
        offsets = np.cumsum([0, *(len(side.vectors) for side in sides[:-1])])
        tokens = np.concatenate([side.tokens for side in sides])
        sources = np.concatenate([side.sources + offset for side, offset in zip(sides, offsets, strict=True)])
        roots = np.concatenate(
            [np.sqrt(side.weights * share[side.tokens]) for side, share in zip(sides, shares, strict=True)]
        )
        products = np.concatenate([_row_products(side, weight) for side in sides])
        order = np.argsort(tokens, kind="stable")
        counts = np.bincount(tokens, minlength=len(weight))
        return _Meetings(
            vectors=np.concatenate(projected),
            sources=sources[order],
            roots=roots[order].astype(np.float32),
            targets=(products * roots)[order].astype(np.float32),
            counts=counts,
            starts=np.cumsum(counts) - counts,
        )

    def groups(self, rank: int):
        """Yield tokens to be solved together, and the number of meetings that all of them fit in."""
        size, done = 1, 0
        while done < self.counts.max(initial=0):
            tokens = np.flatnonzero((self.counts > done) & (self.counts <= size))
            at_once = max(1, _NUMBERS_AT_ONCE // (size * rank))
            for first in range(0, len(tokens), at_once):
                yield tokens[first : first + at_once], size
            size, done = 2 * size, size

    def gather(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Lay out the meetings of some tokens, zero where a token has fewer than `size`."""
        places = np.arange(min(size, self.counts[tokens].max()))
        inside = places < self.counts[tokens][:, None]
        at = np.where(inside, self.starts[tokens][:, None] + places, 0)
        # With its vector zero, a meeting that is none asks for nothing, whatever its target.
        return self.vectors[self.sources[at]] * np.where(inside, self.roots[at], 0)[..., None], self.targets[at]


def _row_products(side: Side, weight: np.ndarray) -> np.ndarray:
    """Compute w . x of every meeting, (n,)."""
    products = np.empty(len(side.tokens), np.float32)
    at_once = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    for first in range(0, len(products), at_once):
        part = slice(first, first + at_once)
        products[part] = np.einsum("nd,nd->n", side.vectors[side.sources[part]], weight[side.tokens[part]])
    return products
