"""`simulate`: a `SegmentScheduler` by a simulated clock, to test and tune its decisions without waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from .batching import Busy
from .device.loop import Arrays
from .run_costs import OVERHEAD_MS, RunCosts
from .segment_scheduler import SegmentScheduler


class SampleFails(RuntimeError):
    """A run held a sample that fails."""


@dataclass(frozen=True)
class Arrival:
    """A request of a simulation.

    Args:
        seconds (`float`): When it comes.
        exits (`list[int]`): The segment in which each of its samples exits, from 0.
        timeout (`float`, *optional*): Seconds.
        cancelled (`float`, *optional*): Seconds after which its client leaves.
        fails_in (`int`, *optional*): The segment in which every run that holds one of its samples fails.
        client (`str`, *optional*): Whose it is.
    """

    seconds: float
    exits: Sequence[int]
    timeout: float | None = None
    cancelled: float | None = None
    fails_in: int | None = None
    client: str | None = None


@dataclass
class Outcome:
    """What became of a request.

    Args:
        arrival (`Arrival`): The request.
        answer (`dict[str, np.ndarray]`, *optional*): With `exit_index` `[B]`, if it has one.
        error (`BaseException`, *optional*): Else.
        seconds (`float`): From its arrival to its end; `inf` where it has none.
        runs (`list[list[int]]`): Of each sample, the segments whose exit was evaluated.
    """

    arrival: Arrival
    answer: Arrays | None = None
    error: BaseException | None = None
    seconds: float = math.inf
    runs: list[list[int]] = field(default_factory=list)


def simulate(
    arrivals: Sequence[Arrival], costs: RunCosts, pace: float = 1.0, **settings: object
) -> tuple[list[Outcome], list[tuple[int, int, int, int]]]:
    """Let requests come at their times, and runs take what they cost.

    Args:
        arrivals (`Sequence[Arrival]`): In the order in which they come.
        costs (`RunCosts`): Of the blocks, as the scheduler knows them.
        pace (`float`, *optional*, defaults to 1.0): How much longer runs really take.
        settings: Of `SegmentScheduler`.

    Returns:
        What became of each request; and of each run its segment, start, stop and number of samples.

    Example:

        >>> costs = RunCosts([1, 2], [[[4.0, 5.0]], [[9.0, 10.0]]])
        >>> outcomes, runs = simulate([Arrival(0.0, [0]), Arrival(0.001, [1]), Arrival(0.002, [1])], costs)
        >>> [round(1e3 * outcome.seconds, 1) for outcome in outcomes], [samples for *_, samples in runs]
        ([4.2, 18.6, 17.6], [1, 2, 2])
    """
    world = _World(arrivals, costs, pace, settings)
    while not world.is_over():
        world.step()
    return world.outcomes, world.runs


class _World:
    """The clock, what is to come, and what runs the blocks (see `Runs`); a state says whose it is."""

    def __init__(self, arrivals: Sequence[Arrival], costs: RunCosts, pace: float, settings: dict[str, object]):
        self.now, self.costs, self.pace, self.num_blocks = 0.0, costs, pace, costs.num_blocks
        self.outcomes = [Outcome(arrival, runs=[[] for _ in arrival.exits]) for arrival in arrivals]
        self.runs: list[tuple[int, int, int, int]] = []
        self._futures: dict[int, Future[Arrays]] = {}
        events = [(each.seconds, number, False) for number, each in enumerate(arrivals)]
        for number, each in enumerate(arrivals):
            if each.cancelled is not None:
                events.append((each.seconds + each.cancelled, number, True))
        self._events = sorted(events, reverse=True)
        self._scheduler = SegmentScheduler(self, costs, clock=lambda: self.now, **settings)  # type: ignore[arg-type]

    def is_over(self) -> bool:
        """Whether nothing will happen any more."""
        return not self._events and not self._scheduler.waiting

    def step(self) -> None:
        """The next run, or the time until something comes."""
        until = self._scheduler.step()
        if until is not None:
            self._pass(min(until, self._events[-1][0] if self._events else until))

    def run(
        self, segment: int, start: int, stop: int, samples: Sequence[Arrays]
    ) -> tuple[list[Arrays], list[Arrays | None]]:
        """See `Runs`."""
        milliseconds = OVERHEAD_MS + self.costs.milliseconds(segment, start, stop, len(samples))
        self._pass(self.now + self.pace * milliseconds / 1e3)
        self.runs.append((segment, start, stop, len(samples)))
        outcomes = [self.outcomes[int(sample["request"])] for sample in samples]
        if any(outcome.arrival.fails_in == segment for outcome in outcomes):
            raise SampleFails
        answers: list[Arrays | None] = [None] * len(samples)
        if stop == self.num_blocks[segment]:
            for place, (outcome, sample) in enumerate(zip(outcomes, samples, strict=True)):
                number = int(sample["number"])
                outcome.runs[number].append(segment)
                if outcome.arrival.exits[number] == segment:
                    answers[place] = {"exit_index": np.array([segment])}
        return list(samples), answers

    def walk(self, samples: int) -> list[list[float]]:
        """See `Runs`."""
        raise NotImplementedError("the costs are given")

    def _pass(self, until: float) -> None:
        """Let time pass, and what comes meanwhile come."""
        while self._events and self._events[-1][0] <= until:
            self.now, number, leaves = self._events.pop()
            if leaves:
                self._futures[number].cancel()
            else:
                self._submit(number)
        self.now = max(self.now, until) if until < math.inf else self.now

    def _submit(self, number: int) -> None:
        outcome = self.outcomes[number]
        arrival = outcome.arrival
        samples = len(arrival.exits)
        states = {"request": np.full(samples, number), "number": np.arange(samples)}
        try:
            future = self._scheduler.submit(states, arrival.timeout, arrival.client)
        except Busy as error:
            future = Future()
            future.set_exception(error)
        self._futures[number] = future
        future.add_done_callback(lambda done: self._settle(outcome, done))

    def _settle(self, outcome: Outcome, future: Future[Arrays]) -> None:
        outcome.seconds = self.now - outcome.arrival.seconds
        if future.cancelled():
            outcome.error = TimeoutError("cancelled")
        elif (error := future.exception()) is not None:
            outcome.error = error
        else:
            outcome.answer = future.result()
