"""Wall-clock of runs in turn, and of each part of a highway where it stands."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.devices import wait_for_accelerators
from ..engine import answers_of_exit, drop_exited_samples, evaluate_exit
from ..policies import ExitPolicy, Memory
from ..segments import Segment, State


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 20, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, in rounds so that a slow moment of the machine hits all alike.

    The order within a round is shuffled (always in the same way), so that no run always finds another's warm caches.

    Example:

        >>> times = time_interleaved({"a": lambda: None, "b": lambda: None}, repeats=3, warm_up=1)
        >>> len(times["a"])
        3
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs.items()), random.Random(0).shuffle
    for round_number in range(warm_up + repeats):
        shuffle(order)
        for name, run in order:
            _, passed = _timed(run)
            if round_number >= warm_up:
                seconds[name].append(passed)
    return seconds


def _timed(run: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    wait_for_accelerators()
    start = time.perf_counter()
    result = run(*arguments)
    wait_for_accelerators()
    return result, time.perf_counter() - start


@dataclass(frozen=True)
class PartTimes:
    """Seconds of every part of a highway in one walk.

    Args:
        blocks (`list[list[float]]`): Of each segment's blocks, one by one; the stem is the first of the first.
        heads (`list[float]`), select (`list[float]`): Of each segment, as in `CostTable`.
    """

    blocks: list[list[float]]
    heads: list[float]
    select: list[float]

    def scaled(self, factor: float) -> PartTimes:
        """All times multiplied."""
        blocks = [[factor * seconds for seconds in part] for part in self.blocks]
        heads, select = ([factor * seconds for seconds in part] for part in (self.heads, self.select))
        return PartTimes(blocks, heads, select)

    def backbone_costs(self) -> list[float]:
        """Of each segment's blocks together."""
        return [sum(blocks) for blocks in self.blocks]

    @property
    def total(self) -> float:
        """Seconds of the whole walk."""
        return sum(map(sum, (self.backbone_costs(), self.heads, self.select)))


def time_parts(segments: Sequence[Segment], state: State, policy: ExitPolicy) -> PartTimes:
    """Walk once through a highway with all samples, every exit evaluated, and time each part where it stands.

    One after the other, as in a run, so that each part finds what those before it have left in the caches.

    Args:
        segments (`Sequence[Segment]`): A highway.
        state (`State`): Before the stem.
        policy (`ExitPolicy`): Evaluated at every exit; all samples go on whatever it says.
    """
    home, last = state.device, len(segments) - 1
    memory = policy.start(state.batch_size, home)
    times = PartTimes([], [], [])
    for index, segment in enumerate(segments):
        times.blocks.append([])
        for block in segment.blocks:
            state, seconds = _timed(block, state)
            times.blocks[-1].append(seconds)
        evaluate = partial(evaluate_exit, segment, state, policy, memory, index, home, index == last)
        if index == last:
            times.heads.append(_timed(_conclude, evaluate, segment, index)[1])
            times.select.append(0.0)
        else:
            (logits, _, _, memory), seconds = _timed(evaluate)
            times.heads.append(seconds)
            times.select.append(_timed(_every_second_exits, segment, state, memory, logits, index)[1])
    return times


def _conclude(evaluate: Callable[[], tuple[Tensor, Tensor, int, Memory]], segment: Segment, index: int) -> None:
    logits, _, _, memory = evaluate()
    answers_of_exit(segment, logits, memory, index)


def _every_second_exits(segment: Segment, state: State, memory: Memory, logits: Tensor, index: int) -> None:
    answers = answers_of_exit(segment, logits, memory, index)
    exits = torch.arange(len(logits), device=logits.device) % 2 == 1
    _, _, stay = drop_exited_samples(state, memory, exits, len(logits) // 2)
    answers.exit_index.index_select(0, stay)  # the engine does so with the samples' numbers
