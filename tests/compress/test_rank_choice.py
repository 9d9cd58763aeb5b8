"""The smallest rank that is good enough, against a linear scan."""

import math

import numpy as np
import pytest

from factorized_gpt2.common.errors import UserError
from factorized_gpt2.compress.ranks import is_good_enough, smallest_rank_by_loss, smallest_rank_by_share

LARGEST = 767  # GPT-2 small's width, less one
TARGETS = np.geomspace(1e-3, 1.0, 15)


@pytest.mark.parametrize(
    ("target", "rank"), [(0.1, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.9, 4), (0.95, 4), (0.951, 5), (1.0, 5)]
)
def test_share(target, rank):
    shares = [0.4, 0.7, 0.7, 0.95, 1.0]
    assert smallest_rank_by_share(shares, target) == rank
    assert smallest_rank_by_share(np.array(shares), target) == rank
    assert type(smallest_rank_by_share(shares, target)) is int


def test_the_whole_share_is_reached_but_for_rounding():
    shares = np.full(10, 0.1).cumsum()
    assert shares[-1] < 1
    assert smallest_rank_by_share(shares, 1.0) == 10
    with pytest.raises(UserError, match=r"No rank keeps 1.0 of the variance; rank 2 keeps 0.999999"):
        smallest_rank_by_share([0.5, 0.9999991], 1.0)


def search(curve, target: float, largest: int = LARGEST, known=None) -> tuple[int, list[int]]:
    """Return the rank found, and all that were measured."""
    measured = []

    def increase_of(rank: int) -> float:
        measured.append(rank)
        return curve(rank)

    return smallest_rank_by_loss(increase_of, largest, target, known), measured


def scan(curve, target: float, largest: int = LARGEST) -> int:
    return next(rank for rank in range(1, largest + 1) if curve(rank) <= target)


def steps(levels: list[float], seed: int):
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(2, LARGEST), len(levels) - 1, replace=False))
    return lambda rank: levels[np.searchsorted(cuts, rank, side="right")]


def noisy_tail(rank: int) -> float:
    """Fall to a tail that is noise about zero."""
    noise = 5e-5 * np.random.default_rng(rank).normal()
    return 4 * math.exp(-rank / 40) + (noise if rank > 450 else 0.0)


EXPONENTIALS = {
    f"exponential {scale}": lambda rank, scale=scale: 5 * math.exp(-rank / scale) for scale in (20, 60, 120)
}
CURVES = {
    "exponential below zero": lambda rank: 5 * math.exp(-rank / 80) - 0.01,
    "power law": lambda rank: 5 / rank**2,
    "slow power law": lambda rank: 0.02 / rank**0.5,
    "linear to zero": lambda rank: 5 * (1 - rank / LARGEST),
    "linear below zero": lambda rank: 5 * (1 - rank / 400),
    "sigmoid": lambda rank: 6 / (1 + math.exp((rank - 200) / 30)),
    "three steps": steps([5, 0.1, 1e-4], seed=0),
    "many steps": steps([5, 1, 0.3, 0.1, 0.03, 0.01, 1e-3, -1e-3], seed=1),
    "a cliff": lambda rank: 5.0 if rank < 700 else -0.1,
    "noisy tail": noisy_tail,
    "good from the start": lambda rank: 1e-4 / rank,
}


def reached(curve) -> list[float]:
    return [target for target in TARGETS if curve(LARGEST) <= target]


@pytest.mark.parametrize("curve", (EXPONENTIALS | CURVES).values(), ids=EXPONENTIALS | CURVES)
def test_the_smallest_rank_is_found_and_none_measured_twice(curve):
    assert reached(curve)
    for target in reached(curve):
        rank, measured = search(curve, target)
        assert rank == scan(curve, target)
        assert type(rank) is int
        assert len(set(measured)) == len(measured)
        assert all(1 <= each <= LARGEST for each in measured)


@pytest.mark.parametrize("curve", EXPONENTIALS.values(), ids=EXPONENTIALS)
def test_exponentials_take_few_evaluations(curve):
    assert max(len(search(curve, target)[1]) for target in reached(curve)) <= 8


def test_no_curve_takes_many_more_evaluations_than_bisection():
    # Bisection takes 10, for 768 answers. The cliffs that start just above the target are the worst case.
    cliffs = [lambda rank, at=at: 0.0101 if rank < at else -0.1 for at in range(2, LARGEST, 15)]
    searches = [(curve, target) for curve in (EXPONENTIALS | CURVES).values() for target in reached(curve)]
    searches += [(cliff, 0.01) for cliff in cliffs]
    assert max(len(search(*each)[1]) for each in searches) <= 12


@pytest.mark.parametrize("true_rank", range(1, 13))
def test_every_place_among_few_ranks(true_rank):
    for high in (1.0, 0.010001):
        rank, measured = search(lambda rank, high=high: high if rank < true_rank else 0.0, 0.01, largest=12)
        assert rank == true_rank
        assert len(set(measured)) == len(measured)


def test_an_increase_equal_to_the_target_is_allowed():
    assert search(lambda rank: 0.5 if rank < 100 else 0.25, 0.25)[0] == 100


@pytest.mark.parametrize("true_rank", [1, 2, 7, 12])
@pytest.mark.parametrize("good_step", [0, -1])
@pytest.mark.parametrize("target", [0.1, 0.3, 1e-9, 1e-320])
def test_increases_next_to_the_target_are_told_apart_by_comparison(target, good_step, true_rank):
    """As quotients by the target they are all 1."""
    good, bad = (np.nextafter(target, target + step) if step else target for step in (good_step, 1))
    assert is_good_enough(good, target)
    assert not is_good_enough(bad, target)
    assert search(lambda rank: bad if rank < true_rank else good, target, largest=12)[0] == true_rank


def test_one_rank_alone():
    assert search(lambda rank: 0.1, 0.2, largest=1) == (1, [1])
    with pytest.raises(UserError, match="Even rank 1 costs"):
        search(lambda rank: 0.3, 0.2, largest=1)


def test_a_target_out_of_reach():
    with pytest.raises(UserError, match=r"Even rank 767 costs 0\.1234 nats a token, more than 0\.05"):
        smallest_rank_by_loss(lambda rank: 0.1234, LARGEST, 0.05)


@pytest.mark.parametrize("curve", EXPONENTIALS.values(), ids=EXPONENTIALS)
def test_the_ends_are_not_measured_unless_the_search_leads_there(curve):
    for target in reached(curve):
        rank, measured = search(curve, target)
        assert LARGEST not in measured or rank > LARGEST - 50
        assert 1 not in measured or rank < 50


@pytest.mark.parametrize("curve", (EXPONENTIALS | CURVES).values(), ids=EXPONENTIALS | CURVES)
def test_what_is_known_is_not_measured_again(curve):
    for target in reached(curve):
        rank, alone = search(curve, target)
        known = {each: curve(each) for each in alone}
        assert search(curve, target, known=known) == (rank, [])
        known = {each: curve(each) for each in (64, 128, 256, 512, LARGEST + 5)}
        found, measured = search(curve, target, known=known)
        assert found == rank
        assert not known.keys() & set(measured)
        assert len(measured) <= 11


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_does_not_work_is_not_good_enough(bad):
    assert search(lambda rank: bad if rank < 50 else 0.0, 0.01)[0] == 50
    with pytest.raises(UserError, match="Even rank 767"):
        smallest_rank_by_loss(lambda rank: bad, LARGEST, 0.01)
