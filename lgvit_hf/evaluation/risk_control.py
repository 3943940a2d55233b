"""What samples that were not chosen on prove of a mean loss: p-values, and tests in a fixed order.

A p-value here is of the hypothesis "the true mean of the loss is above `limit`": if that holds, it is at most `delta`
with probability at most `delta`, for any sample size.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from scipy.stats import binom

# of the largest bet after which no loss can ruin: ruin would end the test
_BOLDEST = 0.9


def binomial_p_value(losses: int, samples: int, limit: float) -> float:
    """Of `losses` out of `samples`: `P(Binomial(samples, limit) <= losses)`, exact (Clopper and Pearson, 1934).

    Args:
        losses (`int`): Samples whose loss is 1; that of the others is 0.
        samples (`int`): All samples, independent of one another.
        limit (`float`): Mean loss that is asked for, in (0, 1).

    Example:

        >>> round(binomial_p_value(0, 100, 0.05), 6) == round(0.95**100, 6)
        True
    """
    return float(binom.cdf(losses, samples, limit))


def betting_p_value(losses: np.ndarray, limit: float, delta: float) -> np.ndarray:
    """Of bounded losses: one over the most that bets on a small loss have ever won.

    Each sample is bet on with what the samples before it say of mean and spread, never with itself, so that the wealth
    is a supermartingale when the mean is above `limit`, and Ville's inequality holds (Waudby-Smith and Ramdas,
    https://arxiv.org/abs/2010.09686, their predictable plug-in bets).

    Args:
        losses (`np.ndarray`): `[..., N]` in [0, 1], samples in an order that does not depend on their values.
        limit (`float`): Mean loss that is asked for, in (0, 1).
        delta (`float`): For which the bets are sized; the p-value holds for any.

    Returns:
        `[...]` float64 in (0, 1].

    Example:

        >>> float(betting_p_value(np.zeros(100), 0.1, 0.05)) < 0.05 < float(betting_p_value(np.ones(100), 0.1, 0.05))
        True
    """
    losses = np.asarray(losses, dtype=np.float64)
    rows = losses.shape[-1]
    seen = np.arange(1, rows + 1)
    mean = (0.5 + losses.cumsum(-1)) / (seen + 1)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(-1)) / (seen + 1)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (rows * before)), _BOLDEST / (1 - limit))
    wealth = np.log1p(bets * (limit - losses)).cumsum(-1).max(-1, initial=0.0)
    p_values: np.ndarray = np.exp(-wealth)
    return p_values


def drop_p_value(drops: np.ndarray, limit: float, delta: float) -> np.ndarray:
    """As `betting_p_value`, of drops `[..., N]`: 1 if only the full model is right, -1 if only we are, else 0."""
    return betting_p_value((np.asarray(drops, dtype=np.float64) + 1) / 2, (limit + 1) / 2, delta)


def harm_p_value(harms: np.ndarray, limit: float) -> float:
    """As `binomial_p_value`, of harms `[N]` in {0, 1}: 1 if the full model is right and we are not."""
    return binomial_p_value(int(np.sum(harms)), len(harms), limit)


def samples_needed(bound: str, limit: float, delta: float) -> int:
    """The fewest samples that can prove `limit` at all: as many as it takes if none of them loses anything.

    Args:
        bound (`str`): `"drop"` or `"harm"`.
        limit (`float`): Mean drop or harm that is asked for, in (0, 1).
        delta (`float`): Allowed probability that the proof errs, in (0, 1).

    Example:

        >>> samples_needed("harm", 0.05, 0.1), samples_needed("harm", 0.01, 0.05)
        (45, 299)
    """
    if bound == "harm":
        return math.ceil(math.log(delta) / math.log1p(-limit))

    def proves(samples: int) -> bool:
        return bool(drop_p_value(np.zeros(samples), limit, delta) <= delta)

    enough = 1
    while not proves(enough):
        enough *= 2
    return bisect_left(range(enough), True, lo=enough // 2 + 1, key=proves)


def passed_in_order(p_values: list[float], delta: float) -> int:
    """How many hypotheses fall when they are tested in a fixed order, up to the first that stands.

    No correction for their number is due (Learn then Test, https://arxiv.org/abs/2110.01052, fixed-sequence testing),
    if the order was fixed without the samples that are tested on.

    Example:

        >>> passed_in_order([0.01, 0.04, 0.2, 0.01], delta=0.05)
        2
    """
    return next((index for index, p_value in enumerate(p_values) if p_value > delta), len(p_values))
