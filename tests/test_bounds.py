"""Bounds against formulas by hand and, as promises, against samples of known truth."""

import math

import numpy as np
import pytest

from lgvit_hf.evaluation.bounds import (
    betting_p_value,
    binomial_p_value,
    drop_p_value,
    harm_p_value,
    passed_in_order,
    rows_needed,
)

SPLITS = 1000


def noise(delta):
    """Three standard errors of a share over the splits."""
    return 3 * math.sqrt(delta * (1 - delta) / SPLITS)


@pytest.mark.parametrize(("losses", "rows", "limit"), [(0, 10, 0.1), (3, 10, 0.3), (10, 10, 0.2), (7, 500, 0.02)])
def test_binomial_tail_by_hand(losses, rows, limit):
    expected = sum(math.comb(rows, k) * limit**k * (1 - limit) ** (rows - k) for k in range(losses + 1))
    assert binomial_p_value(losses, rows, limit) == pytest.approx(expected, rel=1e-9)


def test_betting_by_hand():
    losses, limit, delta = [0.5, 0.0, 1.0, 0.5, 0.0], 0.6, 0.1
    wealth, most, total, squares, before = 1.0, 1.0, 0.5, 0.25, 0.25
    for count, loss in enumerate(losses, start=1):
        bet = min(math.sqrt(2 * math.log(1 / delta) / (len(losses) * before)), 0.9 / (1 - limit))
        wealth *= 1 + bet * (limit - loss)
        most = max(most, wealth)
        total += loss
        squares += (loss - total / (count + 1)) ** 2
        before = squares / (count + 1)
    assert betting_p_value(np.array(losses), limit, delta) == pytest.approx(1 / most)


@pytest.mark.parametrize("bound", ["drop", "harm"])
@pytest.mark.parametrize("delta", [0.05, 0.1])
@pytest.mark.parametrize("limit", [0.3, 0.02])
def test_rows_needed_is_the_least_that_can_pass(bound, limit, delta):
    rows, p_value = rows_needed(bound, limit, delta), (lambda *args: drop_p_value(*args, delta))
    p_value = harm_p_value if bound == "harm" else p_value
    assert p_value(np.zeros(rows), limit) <= delta < p_value(np.zeros(rows - 1), limit)


@pytest.mark.parametrize("delta", [0.05, 0.1])
@pytest.mark.parametrize("limit", [0.01, 0.05])
@pytest.mark.parametrize("rows", [200, 2000])
@pytest.mark.parametrize("repairs", [0.0, 0.04])
def test_a_drop_above_the_limit_is_rarely_passed(delta, limit, rows, repairs):
    # at the limit itself, where most pass
    rng = np.random.default_rng(0)
    chance = rng.random((SPLITS, rows))
    drops = (chance < limit + repairs).astype(float) - (chance > 1 - repairs)
    assert (drop_p_value(drops, limit, delta) <= delta).mean() <= delta + noise(delta)
    harms = (chance < limit).sum(-1)
    p_values = {count: binomial_p_value(count, rows, limit) for count in set(harms.tolist())}
    assert np.mean([p_values[count] <= delta for count in harms.tolist()]) <= delta + noise(delta)


def test_a_small_drop_is_proven():
    rng = np.random.default_rng(0)
    drops = (rng.random((200, 2000)) < 0.005).astype(float)
    assert (drop_p_value(drops, 0.02, 0.05) <= 0.05).mean() > 0.9


@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_testing_in_order_needs_no_correction(delta):
    # 12 candidates; the first above the limit is the seventh, and nested losses as faster policies have them
    rng, limit, rows = np.random.default_rng(1), 0.04, 500
    risks = np.linspace(0.01, 0.12, 12)
    truly_safe = int((risks <= limit).sum())
    chance = rng.random((SPLITS, rows))
    p_values = np.stack([drop_p_value((chance < risk).astype(float), limit, delta) for risk in risks], 1)
    broken = [passed_in_order(row, delta) > truly_safe for row in p_values.tolist()]
    assert np.mean(broken) <= delta + noise(delta)
    assert np.mean([passed_in_order(row, delta) for row in p_values.tolist()]) >= 1
