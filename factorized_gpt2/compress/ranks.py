"""Which ranks there are, and the smallest that is good enough."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from transformers import PretrainedConfig

from ..common.errors import UserError
from ..models.sizes import vocabulary_width


def largest_rank(config: PretrainedConfig) -> int:
    """Say which rank a baseline's vocabulary can have at most: below its width, so that the model becomes smaller."""
    return min(vocabulary_width(config) - 1, config.vocab_size)


def check_ranks(ranks: Iterable[int], config: PretrainedConfig) -> None:
    """Refuse ranks that make a baseline no smaller, or none at all.

    Args:
        ranks: Ranks k.
        config: The baseline's.

    Raises:
        UserError: Naming the rank.
    """
    for rank in ranks:
        if not 1 <= rank <= largest_rank(config):
            raise UserError(
                f"Rank {rank} is out of range: the baseline is {vocabulary_width(config)} wide and has "
                f"{config.vocab_size} tokens, so a rank lies between 1 and {largest_rank(config)}."
            )


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
    increase_of: Callable[[int], float],
    largest: int,
    target: float,
    known: Mapping[int, float] | None = None,
    name: Callable[[int], str] = "rank {}".format,
) -> int:
    """Find the smallest rank whose loss exceeds the baseline's by no more than a target, with few evaluations.

    The increase is taken to fall as the rank grows. The logarithm of an increase is nearly a straight line in the
    rank: where that line meets the target is tried next, unless it lies too near an end of what is still open, or so
    many tries have gone by that halving is due (as in the ITP method, Oliveira & Takahashi, 2020). The line goes
    through the two measured ranks nearest to what is open, which may lie on one side of it; with fewer than two, what
    is open is halved. So neither the largest rank nor the smallest is measured unless the search leads there.

    Args:
        increase_of: Measures a rank's loss increase, in nats a token. Called once for any rank.
        largest: Largest rank to consider.
        target: Increase allowed, in nats a token, positive.
        known: Increases of ranks that were measured before, which are not measured again.
        name: What to call a rank.

    Returns:
        The rank; every smaller one that was measured exceeds the target.

    Raises:
        UserError: Even the largest rank exceeds the target.
    """
    increases = {rank: increase for rank, increase in (known or {}).items() if 1 <= rank <= largest}
    enough = min((rank for rank in increases if is_good_enough(increases[rank], target)), default=largest + 1)
    too_small = max((rank for rank in increases if rank < enough), default=0)
    halvings_left = math.ceil(math.log2(enough - too_small)) + 2
    while enough - too_small > 1:
        open_ranks = enough - too_small
        halvings_left -= 1
        margin = min(max(1, open_ranks // 8, open_ranks - 2**halvings_left), open_ranks // 2)
        crossing = _crossing(increases, target, too_small, enough)
        guess = too_small + open_ranks // 2 if crossing is None else round(crossing)
        rank = min(max(guess, too_small + margin), enough - margin)
        increases[rank] = increase_of(rank)
        if is_good_enough(increases[rank], target):
            enough = rank
        else:
            too_small = rank
    if enough > largest:
        raise UserError(f"Even {name(largest)} costs {increases[largest]:.4f} nats a token, more than {target}.")
    return enough


def _crossing(increases: Mapping[int, float], target: float, too_small: int, enough: int) -> float | None:
    """Say where the line through two measured ranks meets the target; `None` where no falling line is known.

    Args:
        increases: Of the measured ranks.
        target: As `smallest_rank_by_loss` has it.
        too_small: Largest rank below what is open, 0 before one was measured.
        enough: Smallest rank above what is open, beyond the largest before one was measured.
    """
    ends = [rank for rank in (too_small, enough) if rank in increases]
    if not ends:
        return None
    if len(ends) == 1:  # and the measured rank nearest to it, on its other side
        others = [rank for rank in increases if rank != ends[0]]
        if not others:
            return None
        ends.append(min(others, key=lambda rank: abs(rank - ends[0])))
    low, high = sorted(ends)
    above, below = (_log_excess(increases[rank], target) for rank in (low, high))
    slope = (below - above) / (high - low)
    return low - above / slope if slope < 0 else None


def _log_excess(increase: float, target: float) -> float:
    """Compute the logarithm of an increase in units of the target, within limits, of the comparison's sign."""
    excess = increase / target
    # Infinite or NaN, a model that does not work; zero or less, one that loses nothing.
    logarithm = math.log(min(max(excess, 1e-3), 1e6)) if not math.isnan(excess) else math.log(1e6)
    # The quotient is rounded: the sign, on which the line between two ranks depends, is the comparison's.
    return min(logarithm, 0.0) if is_good_enough(increase, target) else max(logarithm, 1e-9)
