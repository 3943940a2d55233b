"""Bounds against scipy and formulas by hand and, as promises, against samples of known truth."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from lgvit_hf.evaluation.risk_control import (
    betting_p_value,
    binomial_p_value,
    drop_p_value,
    harm_p_value,
    passed_in_order,
    samples_needed,
)
from tests.seeds import rng

version_independent = pytest.mark.version_independent

SPLITS = 2000


def at_most(delta):
    """`delta`, and room for chance: more than four standard errors of a share of the splits."""
    return delta + 3 * math.sqrt(delta * (1 - delta) / 1000)


@version_independent
@pytest.mark.parametrize(("losses", "rows", "limit"), [(0, 10, 0.1), (3, 10, 0.3), (10, 10, 0.2), (7, 500, 0.02)])
def test_binomial_tail_by_hand(losses, rows, limit):
    expected = sum(math.comb(rows, k) * limit**k * (1 - limit) ** (rows - k) for k in range(losses + 1))
    assert binomial_p_value(losses, rows, limit) == pytest.approx(expected, rel=1e-9)


@version_independent
def test_binomial_tail_is_that_of_scipy():
    numbers = rng()
    for rows in (1, 7, *numbers.integers(2, 3000, 40).tolist()):
        limit, losses = numbers.uniform(0.001, 0.999), int(numbers.integers(0, rows + 1))
        for count in (losses, rows):
            p_value = binomial_p_value(count, rows, limit)
            assert p_value == pytest.approx(binom.cdf(count, rows, limit), rel=1e-7) and p_value <= 1
    harms = numbers.random(60) < 0.3
    assert harm_p_value(harms, 0.4) == pytest.approx(binom.cdf(harms.sum(), 60, 0.4), rel=1e-9)


def betting_by_hand(losses, limit, delta):
    """The p-value, and how many of the bets are the boldest."""
    wealth, most, total, squares, before, boldest = 1.0, 1.0, 0.5, 0.25, 0.25, 0
    for count, loss in enumerate(losses, start=1):
        bet = math.sqrt(2 * math.log(1 / delta) / (len(losses) * before))
        if bet > 0.9 / (1 - limit):
            bet, boldest = 0.9 / (1 - limit), boldest + 1
        wealth *= 1 + bet * (limit - loss)
        most = max(most, wealth)
        total += loss
        squares += (loss - total / (count + 1)) ** 2
        before = squares / (count + 1)
    return 1 / most, boldest


def test_betting_by_hand():
    seen = []
    losses = np.array([[0.5, 0.0, 1.0, 0.5, 0.0], [0.0, 0.25, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    for limit, delta in ((0.6, 0.1), (0.6, 0.4), (0.1, 0.05), (0.05, 1e-9)):
        expected, boldest = zip(*(betting_by_hand(row, limit, delta) for row in losses.tolist()), strict=True)
        assert betting_p_value(losses, limit, delta) == pytest.approx(expected, rel=1e-12)
        assert betting_p_value(losses[1], limit, delta) == pytest.approx(expected[1], rel=1e-12)
        seen.append(boldest)
    # none, some and all bets are as bold as any may be
    assert min(map(min, seen)) == 0 and {1, 2, 3, 4} & {*itertools.chain(*seen)} and max(map(min, seen)) == 5
    assert betting_p_value(np.ones(5), 0.6, 0.1) == 1


@version_independent
def test_a_drop_is_a_loss_from_0_to_1():
    drops, losses = [1, -1, 0, 0, -1], [1.0, 0.0, 0.5, 0.5, 0.0]
    assert drop_p_value(drops, 0.2, 0.1) == pytest.approx(betting_by_hand(losses, 0.6, 0.1)[0])


@version_independent
@pytest.mark.parametrize("bound", ["drop", "harm"])
@pytest.mark.parametrize("delta", [0.05, 0.1])
@pytest.mark.parametrize("limit", [0.3, 0.02])
def test_samples_needed_is_the_least_that_can_pass(bound, limit, delta):
    rows, p_value = samples_needed(bound, limit, delta), (lambda *args: drop_p_value(*args, delta))
    p_value = harm_p_value if bound == "harm" else p_value
    assert p_value(np.zeros(rows), limit) <= delta < p_value(np.zeros(rows - 1), limit)


@version_independent
def test_one_row_may_be_enough():
    # harm: 1 - 0.5 <= 0.9; drop: the only bet, sqrt(2 log(1 / 0.9) / 0.25) = 0.918, wins 0.918 / 4, and 1 / 1.23 < 0.9
    assert samples_needed("harm", 0.5, 0.9) == samples_needed("drop", 0.5, 0.9) == 1


@version_independent
@pytest.mark.parametrize("limit", [0.01, 0.05])
@pytest.mark.parametrize("rows", [200, 2000])
@pytest.mark.parametrize("repairs", [0.0, 0.04])
def test_a_drop_at_the_limit_is_rarely_passed(limit, rows, repairs):
    # at the limit itself most pass
    chance = rng().random((SPLITS, rows))
    drops = (chance < limit + repairs).astype(float) - (chance > 1 - repairs)
    for delta in (0.05, 0.1):
        assert (drop_p_value(drops, limit, delta) <= delta).mean() <= at_most(delta)


@version_independent
def test_a_harm_at_the_limit_is_passed_with_probability_delta_at_most():
    for rows, limit, delta in itertools.product((200, 2000), (0.01, 0.05), (0.05, 0.1, 0.3)):
        # the fewest losses that come with a probability above delta, they or fewer
        losses = int(binom.ppf(delta, rows, limit))
        p_values = [binomial_p_value(count, rows, limit) for count in range(losses + 2)]
        assert [p_value <= delta for p_value in p_values] == [True] * losses + [False] * 2


def test_a_small_drop_is_proven():
    drops = (rng().random((200, 2000)) < 0.005).astype(float)
    assert (drop_p_value(drops, 0.02, 0.05) <= 0.05).mean() > 0.9


@version_independent
def test_tests_in_order_end_at_the_first_that_fails():
    assert passed_in_order([0.01, 0.04, 0.2, 0.01], 0.05) == 2
    assert passed_in_order([0.05, 0.0500001], 0.05) == 1 and passed_in_order([0.06, 0.01], 0.05) == 0
    assert passed_in_order([0.01] * 3, 0.05) == 3 and passed_in_order([], 0.05) == 0


@version_independent
def test_testing_in_order_needs_no_correction():
    # 12 candidates, the first that is not safe at the limit itself, and nested losses as faster policies have them
    limit, rows, risks = 0.04, 500, np.linspace(0.01, 0.12, 12)
    safe = 3
    assert risks[safe] == limit
    chance = rng().random((SPLITS, rows))
    losses = [(chance < risk).astype(float) for risk in risks]
    for delta in (0.05, 0.1):
        p_values = np.stack([drop_p_value(some, limit, delta) for some in losses], 1)
        passed = np.array([passed_in_order(row, delta) for row in p_values.tolist()])
        assert (passed > safe).mean() <= at_most(delta)
        assert passed.mean() >= 1.5
