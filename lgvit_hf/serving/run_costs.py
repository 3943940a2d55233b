"""`RunCosts`: how long some blocks of a highway take, by the number of samples, and which run of them gains most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

# milliseconds that each run takes beside its blocks: choosing samples, joining and parting their states, answering
OVERHEAD_MS = 0.2
# of a run, where nobody says; or as long as the longest block takes for one sample, so many times
MAX_RUN_MS = 15.0
BLOCKS_OF_A_RUN = 4


@dataclass(frozen=True)
class Stretch:
    """What a run does: `samples` through the blocks of a segment up to `stop`; how long, and how much that gains.

    Args:
        samples (`int`): How many run together.
        stop (`int`): The block before which it ends; the exit is evaluated where that is the segment's last.
        milliseconds (`float`): Expected.
        gain (`float`): What its blocks take one sample at a time, over what the run takes, `OVERHEAD_MS` included.
    """

    samples: int
    stop: int
    milliseconds: float
    gain: float


@dataclass(frozen=True)
class RunCosts:
    """Milliseconds of each block of a highway's segments at several batch sizes.

    Args:
        batch_sizes (`list[int]`):
            Ascending from 1. Between two of them times are interpolated linearly; beyond the last, a sample takes as
            long as there.
        blocks (`list[list[list[float]]]`): `[segment][block][batch size]`, the exit with the last block of each.

    Raises:
        ValueError: The batch sizes do not ascend from 1, or a block does not have a positive time for each.

    Example:

        >>> costs = RunCosts([1, 2], [[[4.0, 5.0], [4.0, 5.0]]])
        >>> costs.milliseconds(0, 0, 2, samples=2), costs.milliseconds(0, 1, 2, samples=4)
        (10.0, 10.0)
        >>> costs.best(0, 0, waiting=3, max_run_ms=12.0)
        Stretch(samples=2, stop=2, milliseconds=10.0, gain=1.56...)
    """

    batch_sizes: list[int]
    blocks: list[list[list[float]]]
    _known: dict[tuple[int, int, int, int], float] = field(default_factory=dict, init=False, repr=False)
    _best: dict[tuple[int, int, int, float], Stretch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or sizes[0] != 1 or any(low >= high for low, high in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(f"batch_sizes={sizes} must ascend from 1")
        times = [block for segment in self.blocks for block in segment]
        if not times or any(len(block) != len(sizes) or not _are_positive(block) for block in times):
            raise ValueError(f"blocks={self.blocks}: each must have {len(sizes)} times above 0, one per batch size")

    @property
    def usual_run_ms(self) -> float:
        """See the function of that name."""
        return usual_run_ms([[block[0] for block in segment] for segment in self.blocks])

    def longest_run_ms(self, max_run_ms: float) -> float:
        """Of any run where one may take `max_run_ms`: one block of one sample may take longer."""
        return max(max_run_ms, max(block[0] for segment in self.blocks for block in segment))

    @property
    def num_blocks(self) -> list[int]:
        """Of each segment."""
        return [len(segment) for segment in self.blocks]

    def whole_ms(self, samples: int) -> float:
        """Of so many samples that go through all blocks together."""
        return sum(self.milliseconds(segment, 0, blocks, samples) for segment, blocks in enumerate(self.num_blocks))

    def milliseconds(self, segment: int, start: int, stop: int, samples: int) -> float:
        """Of some blocks of a segment, from `start` to before `stop`."""
        key = (segment, start, stop, samples)
        if key not in self._known:
            sizes, times = self.batch_sizes, np.sum(self.blocks[segment][start:stop], axis=0)
            beyond = max(1.0, samples / sizes[-1])
            self._known[key] = beyond * float(np.interp(samples, sizes, times))
        return self._known[key]

    def best(self, segment: int, start: int, waiting: int, max_run_ms: float) -> Stretch:
        """The run that gains most of at most `waiting` samples before block `start`, within `max_run_ms`.

        One block of one sample may take longer: a run cannot be shorter.
        """
        key = (segment, start, waiting, max_run_ms)
        if key not in self._best:
            runs = [self.longest(segment, start, samples, max_run_ms) for samples in range(1, waiting + 1)]
            within = [run for run in runs if run.milliseconds <= max_run_ms or run.samples == 1]
            self._best[key] = max(within, key=lambda run: run.gain)
        return self._best[key]

    def longest(self, segment: int, start: int, samples: int, max_run_ms: float) -> Stretch:
        """The longest run of so many samples within `max_run_ms`, or of one block."""
        stop = start + 1
        while stop < len(self.blocks[segment]) and (
            self.milliseconds(segment, start, stop + 1, samples) <= max_run_ms
        ):
            stop += 1
        alone, together = (self.milliseconds(segment, start, stop, number) for number in (1, samples))
        return Stretch(samples, stop, together, samples * alone / (together + OVERHEAD_MS))

    @classmethod
    def measured(
        cls, walk: Callable[[int], list[list[float]]], max_samples: int, max_run_ms: float | None, seconds: float = 1.0
    ) -> RunCosts:
        """Time walks through a highway at 1, 2, 4, ... samples, until every block takes longer than a run may.

        Args:
            walk (`Callable`): Runs a number of samples through all blocks; milliseconds of each, `[segment][block]`.
            max_samples (`int`): That run together at most.
            max_run_ms (`float`, *optional*): Of a run.
            seconds (`float`, *optional*, defaults to 1.0):
                After which no walk begins. Each of the sizes that one walk reaches in thrice that is walked once.
        """
        began, sizes, walks = time.perf_counter(), [], []
        walk(1)
        for size in (2**power for power in range(max_samples.bit_length())):
            before = time.perf_counter()
            walks.append([walk(size)])
            sizes.append(size)
            now = time.perf_counter()
            most_ms = usual_run_ms(walks[0][0]) if max_run_ms is None else max_run_ms
            if min(map(min, walks[-1][0])) > most_ms or now + 2 * (now - before) > began + 3 * seconds:
                break
        for _ in range(4):
            for size, found in zip(sizes, walks, strict=True):
                if time.perf_counter() < began + seconds:
                    found.append(walk(size))
        # the least of each: what disturbs a walk only makes it longer
        least = [_each_least(found) for found in walks]
        segments = zip(*least, strict=True)
        return cls(sizes, [[list(times) for times in zip(*segment, strict=True)] for segment in segments])


def _are_positive(times: Sequence[float]) -> bool:
    return all(0 < each < math.inf for each in times)


def usual_run_ms(blocks: Sequence[Sequence[float]]) -> float:
    """What a run may take where nobody says: long enough for some samples, so that large models run batches too.

    Args:
        blocks (`Sequence`): Milliseconds of one sample in each block, `[segment][block]`.

    Example:

        >>> usual_run_ms([[2.0, 1.0], [2.0]]), usual_run_ms([[40.0]])
        (15.0, 160.0)
    """
    return max(MAX_RUN_MS, BLOCKS_OF_A_RUN * max(map(max, blocks)))


def _each_least(walks: Sequence[list[list[float]]]) -> list[list[float]]:
    return [[max(1e-6, min(times)) for times in zip(*blocks, strict=True)] for blocks in zip(*walks, strict=True)]
