"""`ExpectedWork`: how long samples still take, by how many have exited where so far."""

from __future__ import annotations

from .run_costs import OVERHEAD_MS, RunCosts, Stretch

# samples that count as seen at each exit from the start, all of which went on
SEEN_BEFORE = 16
# samples seen at an exit, from which on older ones count for less
REMEMBERED = 512


class ExpectedWork:
    """Milliseconds that samples are expected to take yet, each among as many others as its run holds.

    Args:
        costs (`RunCosts`): Of the blocks.
        max_samples (`int`), max_run_ms (`float`): Of a run.

    Attributes:
        way_ms (`float`): Of all runs that a sample is in which goes to the end: soonest when it is there.

    Example:

        >>> work = ExpectedWork(RunCosts([1], [[[9.8]], [[19.8]]]), max_samples=1, max_run_ms=15.0)
        >>> work.left_ms(0, 0), work.left_ms(1, 0)
        (30.0, 20.0)
        >>> work.saw(0, samples=48, staying=16)  # and 16 that count from the start: half have gone on
        >>> work.left_ms(0, 0)
        20.0
    """

    def __init__(self, costs: RunCosts, max_samples: int, max_run_ms: float):
        def runs(segment: int, start: int) -> list[Stretch]:
            """From a block to the end of its segment."""
            found: list[Stretch] = []
            while start < costs.num_blocks[segment]:
                found.append(costs.best(segment, start, max_samples, max_run_ms))
                start = found[-1].stop
            return found

        segments = enumerate(costs.num_blocks)
        of_block = [[runs(segment, start) for start in range(blocks)] for segment, blocks in segments]
        self.way_ms = sum(run.milliseconds + OVERHEAD_MS for blocks in of_block for run in blocks[0])
        self._within_ms = [
            [sum((run.milliseconds + OVERHEAD_MS) / run.samples for run in runs) for runs in blocks]
            for blocks in of_block
        ]
        # at each exit, and how many of them went on
        self._seen = [(float(SEEN_BEFORE), float(SEEN_BEFORE)) for _ in of_block]
        self._after_ms = [0.0] * len(of_block)
        self._expect()

    def left_ms(self, segment: int, start: int) -> float:
        """A sample's share of the runs from a block on, until it is expected to exit."""
        return self._within_ms[segment][start] + self._after_ms[segment]

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
            self._after_ms[segment] = staying / samples * self.left_ms(segment + 1, 0)
