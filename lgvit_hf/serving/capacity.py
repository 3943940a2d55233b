"""`replicas_needed`: how many replicas a load needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_wait(replicas: int, rate: float, milliseconds: Sequence[float]) -> float:
    """Mean milliseconds that an image waits for a replica, infinite where they are too few.

    Arrivals are random and independent, and a replica runs one image at a time (batches only do better). Erlang's
    formula for equal replicas behind one queue, times half of one plus the squared variation of the times (Allen
    and Cunneen): exact where the times are exponential or there is one replica, else close.

    Args:
        replicas (`int`): Each answers images alone.
        rate (`float`): Images per second.
        milliseconds (`Sequence[float]`): What images take in a replica: a sample of them, as they come.

    Example:

        >>> round(mean_wait(1, 50, [10.0] * 100), 2)  # one replica that is busy half of the time
        5.0
        >>> mean_wait(1, 101, [10.0] * 100)
        inf
    """
    times = np.asarray(milliseconds, dtype=float)
    load = rate * times.mean() / 1e3
    if load >= replicas:
        return math.inf
    blocked = 1.0  # Erlang B, by its recursion
    for count in range(1, replicas + 1):
        blocked = load * blocked / (count + load * blocked)
    waits = blocked / (1 - load / replicas * (1 - blocked))
    variation = times.var() / times.mean() ** 2
    return float(waits * times.mean() / (replicas - load) * (1 + variation) / 2)


def replicas_needed(rate: float, milliseconds: Sequence[float], max_wait_ms: float) -> int:
    """The fewest replicas in which images wait no longer than `max_wait_ms` on average.

    Args:
        rate (`float`), milliseconds (`Sequence[float]`): See `mean_wait`.
        max_wait_ms (`float`): In addition to the time that an image takes itself.

    Raises:
        ValueError: A number that is not positive, or no times.

    Example:

        >>> half_exit_first = [4.0, 20.0] * 50
        >>> [replicas_needed(rate, half_exit_first, max_wait_ms=10) for rate in (20, 100, 1000)]
        [1, 2, 13]
    """
    times = np.asarray(milliseconds, dtype=float)
    if not times.size or not np.isfinite(times).all() or not (times > 0).all():
        raise ValueError("milliseconds must hold what images take, each a positive number")
    for name, value in (("rate", rate), ("max_wait_ms", max_wait_ms)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be positive")
    replicas = max(1, math.ceil(rate * float(times.mean()) / 1e3))
    while mean_wait(replicas, rate, milliseconds) > max_wait_ms:
        replicas += 1
    return replicas
