"""`ExpectedWork`: how long samples still take, by how many have exited where so far; `Backlog`: by their deadlines."""

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


class ExpectedWork:
    """Milliseconds that samples are expected to take yet, each among as many others as its run holds.

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
        self._through_ms: dict[int, float] = {}
        self._within_ms = [
            [
                sum(_run_ms(run) / run.samples for run in self._runs(segment, start, max_samples))
                for start in range(blocks)
            ]
            for segment, blocks in enumerate(costs.num_blocks)
        ]
        # of runs, by the costs and by the clock
        self._by_costs_ms = self._by_clock_ms = costs.whole_ms(1)
        # at each exit, and how many of them went on
        self._seen = [(float(SEEN_BEFORE), float(SEEN_BEFORE)) for _ in costs.num_blocks]
        # after the exit of each, by how many go on there
        self._after_ms = [0.0] * len(costs.num_blocks)
        self._expect()

    def left_ms(self, segment: int, start: int) -> float:
        """A sample's share of the runs from a block on, until it is expected to exit."""
        return self.pace * (self._within_ms[segment][start] + self._after_ms[segment])

    def through_ms(self, samples: int) -> float:
        """From the first block to the end, in runs of at most so many samples."""
        if samples not in self._through_ms:
            segments = range(len(self._costs.num_blocks))
            runs = [run for segment in segments for run in self._runs(segment, 0, samples)]
            self._through_ms[samples] = sum(map(_run_ms, runs))
        return self.pace * self._through_ms[samples]

    @property
    def pace(self) -> float:
        """How much longer the last runs took than by the costs."""
        return self._by_clock_ms / self._by_costs_ms

    def took(self, expected_ms: float, milliseconds: float) -> None:
        """Count how long a run was to take by the costs, and how long it has taken."""
        self._by_costs_ms = KEPT * self._by_costs_ms + expected_ms
        self._by_clock_ms = KEPT * self._by_clock_ms + milliseconds

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
        for segment in reversed(range(len(self._seen) - 1)):
            samples, staying = self._seen[segment]
            next_ms = self._within_ms[segment + 1][0] + self._after_ms[segment + 1]
            self._after_ms[segment] = staying / samples * next_ms

    def _runs(self, segment: int, start: int, samples: int) -> Iterator[Stretch]:
        """From a block to the end of its segment, of at most so many samples."""
        while start < self._costs.num_blocks[segment]:
            run = self._costs.best(segment, start, samples, self._max_run_ms)
            yield run
            start = run.stop


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


def _run_ms(run: Stretch) -> float:
    return run.milliseconds + OVERHEAD_MS
