"""The smallest rank that is good enough."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..common.errors import UserError


def smallest_rank_by_share(shares: Sequence[float], target: float) -> int:
    """Find the smallest rank that keeps a share.

    Args:
        shares: Kept at rank 1, 2, ..., not falling.
        target: In (0, 1].

    Returns:
        The rank.

    Raises:
        UserError: No rank keeps so much.
    """
    # A share that misses 1 by rounding is 1.
    reaching = np.flatnonzero(np.asarray(shares) >= target - 1e-12)
    if not len(reaching):
        raise UserError(f"No rank keeps {target} of the variance; rank {len(shares)} keeps {shares[-1]:.6f}.")
    return int(reaching[0]) + 1


def is_good_enough(increase: float, target: float) -> bool:
    """Tell whether a loss increase is no more than a target, both in nats a token; NaN is not."""
    return increase <= target


def smallest_rank_by_loss(
    increase_of: Callable[[int], float], largest: int, target: float, name: Callable[[int], str] = "rank {}".format
) -> int:
    """Find the smallest rank whose loss exceeds the baseline's by no more than a target, with few evaluations.

    The increase is taken to fall as the rank grows. The logarithm of an increase is nearly a straight line in the
    rank: where that line meets the target is tried next, unless it lies too near an end of what is still open, or so
    many tries have gone by that halving is due (as in the ITP method, Oliveira & Takahashi, 2020).

    Args:
        increase_of: Measures a rank's loss increase, in nats a token. Called once for any rank.
        largest: Largest rank to consider.
        target: Increase allowed, in nats a token, positive.
        name: What to call a rank.

    Returns:
        The rank; every smaller one that was measured exceeds the target.

    Raises:
        UserError: Even the largest rank exceeds the target.
    """
    increases, log_excess = {}, {}

    def exceeds(rank: int) -> bool:
        increases[rank] = increase_of(rank)
        excess = increases[rank] / target
        # Infinite or NaN, a model that does not work; zero or less, one that loses nothing.
        logarithm = math.log(min(max(excess, 1e-3), 1e6)) if not math.isnan(excess) else math.log(1e6)
        good = is_good_enough(increases[rank], target)
        # The quotient is rounded: the sign, on which the line between two ranks depends, is the comparison's.
        log_excess[rank] = min(logarithm, 0.0) if good else max(logarithm, 1e-9)
        return not good

    if exceeds(largest):
        raise UserError(f"Even {name(largest)} costs {increases[largest]:.4f} nats a token, more than {target}.")
    if largest == 1 or not exceeds(1):
        return 1
    too_small, enough = 1, largest
    halvings_left = math.ceil(math.log2(largest - 1)) + 1
    while enough - too_small > 1:
        open_ranks = enough - too_small
        halvings_left -= 1
        slope = (log_excess[too_small] - log_excess[enough]) / open_ranks
        guess = too_small + round(log_excess[too_small] / slope)
        margin = min(max(1, open_ranks // 8, open_ranks - 2**halvings_left), open_ranks // 2)
        rank = min(max(guess, too_small + margin), enough - margin)
        if exceeds(rank):
            too_small = rank
        else:
            enough = rank
    return enough
