"""`ExpectedWork`: how long samples still take, by how many have exited where so far; `Prospects`: who ends in time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

from .run_costs import OVERHEAD_MS, RunCosts, Stretch

# samples that count as seen at each exit from the start, all of which went on
SEEN_BEFORE = 16
# samples seen at an exit, from which on older ones count for less
REMEMBERED = 512
# share of what runs have taken so far that counts still after one more
KEPT = 0.97
# a run that took longer, as often as it was to take, counts as this: a pause of the machine says nothing of the next
MOST_PACE = 10.0


class ExpectedWork:
    """Milliseconds that samples are expected to take until they exit.

    They are as much longer than by the costs as the last runs were: whoever else has work for the same cores.

    Args:
        costs (`RunCosts`): Of the blocks.
        max_samples (`int`), max_run_ms (`float`): Of a run.

    Example:

        >>> work = ExpectedWork(RunCosts([1], [[[9.8]], [[19.8]]]), max_samples=1, max_run_ms=15.0)
        >>> work.left_ms(0, 0), work.left_ms(1, 0)
        (30.0, 20.0)
        >>> work.saw(0, samples=48, staying=16)  # and 16 that count from the start: half have gone on
        >>> work.left_ms(0, 0)
        20.0
        >>> for _ in range(200):
        ...     work.took(10.0, milliseconds=15.0)
        >>> round(work.left_ms(0, 0))
        30
    """

    def __init__(self, costs: RunCosts, max_samples: int, max_run_ms: float):
        self._costs, self._max_run_ms = costs, max_run_ms
        self._longest_run_ms = costs.longest_run_ms(max_run_ms)
        self._through: dict[int, list[float]] = {}
        self._shared, self._alone = self._way(max_samples), self._way(1)
        # of runs, by the costs and by the clock
        self._by_costs_ms = self._by_clock_ms = costs.whole_ms(1)
        # at each exit, and how many of them went on
        self._seen = [(float(SEEN_BEFORE), float(SEEN_BEFORE)) for _ in costs.num_blocks]
        self._expect()

    def left_ms(self, segment: int, start: int) -> float:
        """A sample's share of the runs from a block on, each with as many as gain most."""
        return self.pace * self._shared.left_ms(segment, start)

    def alone_ms(self, segment: int, start: int) -> float:
        """Of a sample from a block on, if nothing else ran."""
        return self.pace * self._alone.left_ms(segment, start)

    def through_ms(self, together: int, samples: int) -> float:
        """Of a request from the first block on until all of its samples have exited, in runs of at most `together`."""
        if together not in self._through:
            segments = range(len(self._costs.num_blocks))
            self._through[together] = [sum(map(_run_ms, self._runs(segment, 0, together))) for segment in segments]
        reaching, total = 1.0, 0.0
        for of_segment, (seen, staying) in zip(self._through[together], self._seen, strict=True):
            total += (1 - (1 - reaching) ** samples) * of_segment
            reaching *= staying / seen
        return self.pace * total

    @property
    def longest_run_ms(self) -> float:
        """Of what samples wait for that come while others run."""
        return self.pace * self._longest_run_ms

    @property
    def pace(self) -> float:
        """How much longer the last runs took than by the costs."""
        return self._by_clock_ms / self._by_costs_ms

    def took(self, expected_ms: float, milliseconds: float) -> None:
        """Count how long a run was to take by the costs, and how long it has taken."""
        self._by_costs_ms = KEPT * self._by_costs_ms + expected_ms
        self._by_clock_ms = KEPT * self._by_clock_ms + min(milliseconds, MOST_PACE * expected_ms)

    def saw(self, segment: int, samples: int, staying: int) -> None:
        """Count what an exit has decided.

        Args:
            segment (`int`): Whose exit.
            samples (`int`), staying (`int`): That came there, and how many of them go on.
        """
        before, stayed = self._seen[segment]
        keep = min(1.0, REMEMBERED / (before + samples))
        self._seen[segment] = (keep * before + samples, keep * stayed + staying)
        self._expect()

    def _expect(self) -> None:
        going_on = [staying / samples for samples, staying in self._seen]
        self._shared.expect(going_on)
        self._alone.expect(going_on)

    def _way(self, samples: int) -> _Way:
        """A sample's share of runs of at most so many."""

        def share_ms(segment: int, start: int) -> float:
            return sum(_run_ms(run) / run.samples for run in self._runs(segment, start, samples))

        sizes = enumerate(self._costs.num_blocks)
        return _Way([[share_ms(segment, start) for start in range(blocks)] for segment, blocks in sizes])

    def _runs(self, segment: int, start: int, samples: int) -> Iterator[Stretch]:
        """From a block to the end of its segment, of at most so many samples."""
        while start < self._costs.num_blocks[segment]:
            run = self._costs.best(segment, start, samples, self._max_run_ms)
            yield run
            start = run.stop


class _Way:
    """Milliseconds of a sample's way, from each block to the end of its segment, and expected after that."""

    def __init__(self, within_ms: list[list[float]]):
        self._within_ms = within_ms
        self._after_ms = [0.0] * len(within_ms)

    def left_ms(self, segment: int, start: int) -> float:
        return self._within_ms[segment][start] + self._after_ms[segment]

    def expect(self, going_on: list[float]) -> None:
        """Take other shares of the samples that go on at each exit."""
        for segment in reversed(range(len(going_on) - 1)):
            self._after_ms[segment] = going_on[segment] * self.left_ms(segment + 1, 0)


class Backlog:
    """What samples are expected to take yet, by their deadlines.

    Args:
        samples (`Iterable[tuple[float, float]]`): Deadline in seconds, and milliseconds, of each.

    Attributes:
        soonest (`float`): The earliest deadline, or `inf`.

    Example:

        >>> backlog = Backlog([(0.3, 100.0), (math.inf, 500.0), (0.2, 50.0)])
        >>> backlog.soonest, backlog.due_ms(0.25), backlog.due_ms(1.0)
        (0.2, 50.0, 150.0)
    """

    def __init__(self, samples: Iterable[tuple[float, float]]):
        ordered = sorted(samples)
        self._deadlines = [deadline for deadline, _ in ordered]
        self._sums_ms = list(accumulate((milliseconds for _, milliseconds in ordered), initial=0.0))
        self.soonest = self._deadlines[0] if ordered else math.inf

    def due_ms(self, deadline: float) -> float:
        """Milliseconds of those whose deadline is not after another."""
        return self._sums_ms[bisect_right(self._deadlines, deadline)]


class Prospects:
    """Which requests are expected to end in time if they begin now, one after the other.

    Args:
        work (`ExpectedWork`): Of samples.
        backlog (`Backlog`): Of what has begun.
        now (`float`): Seconds.
        together (`int`): Samples that run together at most.

    Example:

        >>> work = ExpectedWork(RunCosts([1], [[[29.8]]]), max_samples=1, max_run_ms=30.0)
        >>> prospects = Prospects(work, Backlog([(0.2, 30.0)]), now=0.0, together=1)
        >>> prospects.ends_in_time(1, deadline=0.1), prospects.ends_in_time(4, deadline=0.1)
        (True, False)
        >>> for _ in range(3):
        ...     prospects.begins()
        >>> prospects.ends_in_time(1, deadline=0.1)
        False
    """

    def __init__(self, work: ExpectedWork, backlog: Backlog, now: float, together: int):
        self._work, self._backlog, self._now, self._together = work, backlog, now, together
        self._share_ms, self._beside_ms = work.left_ms(0, 0), 0.0
        self._through_ms: dict[int, float] = {}

    def ends_in_time(self, samples: int, deadline: float) -> bool:
        """Whether a request of so many samples does, and what has begun, too."""
        if samples not in self._through_ms:
            through_ms = self._work.through_ms(self._together, samples)
            self._through_ms[samples] = (samples - 1) * self._share_ms + through_ms
        due_ms = self._backlog.due_ms(deadline)
        own_ms = due_ms + self._beside_ms + self._through_ms[samples]
        others_ms = due_ms + self._work.longest_run_ms
        return self._now + own_ms / 1e3 <= deadline and self._now + others_ms / 1e3 <= self._backlog.soonest

    def begins(self) -> None:
        """One more sample begins."""
        self._beside_ms += self._share_ms


def _run_ms(run: Stretch) -> float:
    return run.milliseconds + OVERHEAD_MS
