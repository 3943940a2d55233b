"""How many replicas a load needs, against replicas that are simulated."""

import heapq

import numpy as np
import pytest

from lgvit_hf.serving.capacity import mean_wait, replicas_needed
from tests.seeds import rng


def simulated_wait(replicas, rate, times, random):
    """Mean wait of images that come at random and are run first come, first served."""
    arrivals = np.cumsum(random.exponential(1e3 / rate, len(times)))
    free = [0.0] * replicas
    waits = []
    for now, time in zip(arrivals, times, strict=True):
        start = max(now, heapq.heappop(free))
        heapq.heappush(free, start + time)
        waits.append(start - now)
    return np.mean(waits)


@pytest.mark.parametrize("replicas, load", [(1, 0.5), (2, 0.7), (8, 0.8)])
@pytest.mark.parametrize("kind", ["exponential", "exits"])
def test_waits_are_those_of_a_simulation(replicas, load, kind):
    random = rng()
    number = 60_000
    times = random.exponential(10.0, number) if kind == "exponential" else random.choice([3.0, 7.0, 25.0], number)
    rate = 1e3 * load * replicas / times.mean()
    found = np.mean([simulated_wait(replicas, rate, random.permutation(times), random) for _ in range(3)])
    # Allen and Cunneen's is an approximation, and a simulation of that length is off by some percent
    assert mean_wait(replicas, rate, times) == pytest.approx(found, rel=0.2)


def test_the_fewest():
    times = rng().choice([4.0, 20.0], 1000).tolist()
    for rate in (10, 200, 3000):
        for most in (0.5, 5.0, 50.0):
            found = replicas_needed(rate, times, most)
            assert mean_wait(found, rate, times) <= most
            assert found == 1 or mean_wait(found - 1, rate, times) > most


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((0, [1.0], 1), "rate=0"),
        ((float("nan"), [1.0], 1), "rate=nan"),
        ((1, [], 1), "milliseconds"),
        ((1, [0.0], 1), "milliseconds"),
        ((1, [1.0], 0), "max_wait_ms=0"),
    ],
)
def test_what_is_no_load(arguments, said):
    with pytest.raises(ValueError, match=said):
        replicas_needed(*arguments)
