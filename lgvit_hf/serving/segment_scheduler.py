"""`SegmentScheduler`: batches are made anew before each segment, and a sample is answered the moment it exits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from .batching import MAX_WAIT, Busy, Expired, Observer
from .compute_thread import SHUTTING_DOWN, ComputeThread
from .device.loop import Arrays
from .run_costs import RunCosts
from .segment_queues import Run, Sample, SegmentQueues


class Runs(Protocol):
    """What runs the blocks: `TorchSegments`, or a simulated one."""

    @property
    def num_blocks(self) -> list[int]:
        """Of each segment."""

    def run(
        self, segment: int, start: int, stop: int, samples: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Arrays | None]]:
        """Run samples through blocks of a segment, and evaluate its exit where `stop` is its last block's end.

        Args:
            segment (`int`), start (`int`), stop (`int`): See `Run`.
            samples (`Sequence`): Before the first block the arrays of each, by name; later what this gave of it.

        Returns:
            What each sample has reached, and its answer, each array `[1, ...]`, if it exits.
        """

    def walk(self, samples: int) -> list[list[float]]:
        """Milliseconds of each block, `[segment][block]`, of so many samples; those of an exit with the last."""


class SegmentObserver(Observer, Protocol):
    """Who is told of runs: `Metrics`."""

    def ran(self, segment: int, ages: list[float], fill: float, exits: int | None) -> None:
        """Samples have run; `ages` are the seconds that they waited before the segment, and none within it.

        `exits` says how many of them exit, where the exit was evaluated.
        """


class _Request:
    """What was asked together, and its answers so far."""

    def __init__(self, asked: float, timeout: float, samples: int):
        self.asked, self.timeout, self.began = asked, timeout, False
        self.future: Future[Arrays] = Future()
        self._answers: list[Arrays | None] = [None] * samples
        self._left = samples

    def answer(self, number: int, answer: Arrays) -> None:
        """The answer of a sample; with the last one the request is answered."""
        self._answers[number] = answer
        self._left -= 1
        if self._left:
            return
        # copies, so that one answer does not hold the memory of a batch, nor change with it
        parts = [each for each in self._answers if each is not None]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _settle(self.future, {**found, "degraded": np.zeros(len(parts), np.uint8)})


# a sample, and its answer or what ended it
_Ending = tuple[Sample[_Request], Arrays | Exception]


class SegmentScheduler(ComputeThread):
    """Runs a highway's segments, each on samples of any requests that have come there; see `SegmentQueues`.

    Used as a `Batcher` is. One thread computes. A sample's answer does not depend on those it runs with. A request is
    answered when its last sample exits, and can be cancelled until then: what is cancelled or expired goes no further.
    The samples of a run that fails run again, one by one.

    Args:
        runner (`Runs`): What runs the blocks.
        costs (`RunCosts`, *optional*): Of the blocks; by default measured now, in a second or so.
        max_samples (`int`, *optional*, defaults to 32): Of a run.
        max_run_ms (`float`, *optional*):
            Of a run, for all others wait that long; by default 15, or four times what the longest block takes for one
            sample if that is more.
        max_wait (`float`, *optional*, defaults to 0.002): Seconds that a sample waits for others, see `coming`.
        max_waiting (`int`, *optional*, defaults to 1024):
            Samples that may wait; a request that would make them more is refused, unless nothing waits.
        observer (`SegmentObserver`, *optional*): Is told of every run.
        clock (`Callable`, *optional*): Seconds; whoever gives another calls `step` himself, and no thread is started.

    Raises:
        ValueError: A number that is not positive, a wait of more than a minute, or costs of another highway.
    """

    def __init__(
        self,
        runner: Runs,
        costs: RunCosts | None = None,
        *,
        max_samples: int = 32,
        max_run_ms: float | None = None,
        max_wait: float = 0.002,
        max_waiting: int = 1024,
        observer: SegmentObserver | None = None,
        clock: Callable[[], float] | None = None,
    ):
        if (
            max_samples < 1
            or not 0 <= max_wait <= MAX_WAIT
            or max_waiting < 1
            or max_run_ms is not None
            and not 0 < max_run_ms < math.inf
        ):
            raise ValueError(
                f"{max_samples=}, {max_wait=}, {max_waiting=}, {max_run_ms=}: must be positive; a wait at most "
                f"{MAX_WAIT:g} s"
            )
        if costs is None:
            costs = RunCosts.measured(runner.walk, max_samples, max_run_ms)
        if costs.num_blocks != runner.num_blocks:
            raise ValueError(f"costs of segments of {costs.num_blocks} blocks, but here are {runner.num_blocks}")
        self.max_samples, self.max_waiting, self.batches = max_samples, max_waiting, 0
        self.max_run_ms = costs.usual_run_ms if max_run_ms is None else max_run_ms
        self._runner, self._observer, self._clock = runner, observer, clock or time.monotonic
        self._queues: SegmentQueues[_Request] = SegmentQueues(
            costs, max_samples=max_samples, max_run_ms=self.max_run_ms, max_wait=max_wait, over=_is_over
        )
        self._had_error = False
        self._pass_seconds = costs.whole_ms(max_samples) / 1e3
        super().__init__()
        if clock is None:
            self._thread.start()

    @property
    def waiting(self) -> int:
        """Samples that wait, before any segment."""
        with self._changed:
            self._purge(self._clock())
            return len(self._queues)

    @property
    def queue_age(self) -> float:
        """Seconds that the sample that has waited for longest has waited, in all queues together; 0 if none waits."""
        with self._changed:
            now = self._clock()
            return max((sample.waited + now - sample.since for sample in self._queues.samples()), default=0.0)

    @property
    def pass_seconds(self) -> float:
        """Of `max_samples` through all segments, by the costs: what to add to a timeout that is of the queue alone."""
        return self._pass_seconds

    def submit(self, inputs: Arrays, timeout: float | None = None, client: Hashable = None) -> Future[Arrays]:
        """Have samples answered; the future can be cancelled until they are.

        Args:
            inputs (`dict[str, np.ndarray]`): Batch first; `pixel_values` `[B, C, H, W]` float32.
            timeout (`float`, *optional*): Seconds from now on after which the request has expired.
            client (`Hashable`, *optional*): Whose request it is; clients take turns. By default each is another's.

        Raises:
            Busy: Too many samples are waiting, or no more are taken.
            ValueError: There are none, or the timeout is not a number.
        """
        number = len(next(iter(inputs.values())))
        if not number:
            raise ValueError("an empty batch; give at least one image")
        if timeout is not None and math.isnan(timeout):
            raise ValueError(f"{timeout=}: must be a number of seconds, or None for no limit")
        with self._changed:
            if self._closed or self._dead:
                raise Busy(self._why_none())
            now, waiting = self._clock(), len(self._queues)
            if waiting + number > self.max_waiting:
                self._purge(now)
                waiting = len(self._queues)
            if waiting and waiting + number > self.max_waiting:
                raise Busy(f"{waiting} samples are waiting already")
            request = _Request(now, math.inf if timeout is None else timeout, number)
            deadline = now + request.timeout
            samples = [
                Sample(request, each, now, deadline, {name: array[each] for name, array in inputs.items()})
                for each in range(number)
            ]
            self._queues.add(samples, client)
            self._changed.notify()
        return request.future

    def refuse_waiting(self) -> None:
        """Take no more, and tell all that have not begun to run that the service is shutting down."""
        with self._changed:
            self._closed = True
            self._fail((sample for sample in self._queues.samples() if not sample.owner.began), SHUTTING_DOWN)
            self._purge(self._clock())
            self._changed.notify()

    def step(self) -> float | None:
        """Run the next samples; gives nothing where some have run, and else until when to wait for more."""
        with self._changed:
            decided = self._decided()
        if isinstance(decided, Run):
            self._run(decided)
            return None
        return decided

    def _work(self) -> None:
        run: Run[_Request] | None = None
        try:
            while (run := self._awaited()) is not None:
                self._run(run)
        except BaseException as error:
            # whatever ended this thread: no request waits for it
            with self._changed:
                self._dead = True
                lost = [*(run.samples if run else []), *self._queues.samples()]
                self._fail(lost, f"no thread computes any more ({type(error).__name__})")
            raise

    def _awaited(self) -> Run[_Request] | None:
        """The next run, or nothing at the end."""
        with self._changed:
            while not isinstance(decided := self._decided(), Run):
                if self._closed and not len(self._queues):
                    return None
                self._changed.wait(None if decided == math.inf else max(0.0, decided - self._clock()))
            return decided

    def _decided(self) -> Run[_Request] | float:
        """The next run, whose requests have begun then, or until when to wait."""
        now = self._clock()
        decided = self._queues.next(now, coming=self._coming > 0 and not self._closed)
        self._settle_dropped(now)
        if isinstance(decided, Run):
            for sample in decided.samples:
                sample.owner.began = True
        return decided

    def _run(self, run: Run[_Request]) -> None:
        began, self._had_error = self._clock(), False
        staying, ending = self._attempt(run)
        ended = self._clock()
        # before a client has its answer, so that it finds it counted
        failed = sum(isinstance(answer, Exception) for _, answer in ending)
        self._observe(run, began, len(ending) - failed)
        with self._changed:  # in which `submit` may find that a request has expired
            for sample, answer in ending:
                if isinstance(answer, Exception):
                    _settle(sample.owner.future, answer)
                else:
                    sample.owner.answer(sample.number, answer)
            self._queues.ran(run, staying, ended - began, ended, failed, self._had_error)

    def _attempt(self, run: Run[_Request]) -> tuple[list[Sample[_Request]], list[_Ending]]:
        """Run samples; gives those that go on, and the others with their answer, or with what ended them."""
        samples = run.samples
        try:
            reached, answers = self._runner.run(run.segment, run.start, run.stop, [each.state for each in samples])
        except Exception as error:
            self._had_error = True
            if len(samples) == 1:
                return [], [(samples[0], error)]
            alone = [self._attempt(replace(run, samples=[sample])) for sample in samples]
            return [each for staying, _ in alone for each in staying], [each for _, ending in alone for each in ending]
        staying: list[Sample[_Request]] = []
        ending: list[_Ending] = []
        for sample, state, answer in zip(samples, reached, answers, strict=True):
            if answer is None:
                sample.state = state
                staying.append(sample)
            else:
                ending.append((sample, answer))
        return staying, ending

    def _observe(self, run: Run[_Request], began: float, exits: int) -> None:
        is_new = (run.segment, run.start) == (0, 0)
        self.batches += is_new
        if self._observer is None:
            return
        if is_new:
            first = {sample.owner: None for sample in run.samples if sample.number == 0}
            self._observer.batch([began - request.asked for request in first], run.fill)
        evaluated = run.stop == self._runner.num_blocks[run.segment]
        ages = [began - sample.since for sample in run.samples] if run.start == 0 else []
        self._observer.ran(run.segment, ages, run.fill, exits if evaluated else None)

    def _purge(self, now: float) -> None:
        self._queues.purge(now)
        self._settle_dropped(now)

    def _settle_dropped(self, now: float) -> None:
        """Tell those whose time is over, and count them and those who have left."""
        for sample in self._queues.dropped:
            request = sample.owner
            expired, cancelled = now >= sample.deadline, request.future.cancelled()
            if self._observer is not None and (expired or cancelled):
                self._observer.dropped("expired" if expired else "cancelled", 1)
            if expired:
                _settle(request.future, Expired(f"it waited longer than its {request.timeout:g} s"))
        self._queues.dropped.clear()

    def _fail(self, samples: Iterable[Sample[_Request]], reason: str) -> None:
        for sample in samples:
            _settle(sample.owner.future, Busy(reason))


def _is_over(request: _Request) -> bool:
    return request.future.done()


def _settle(future: Future[Arrays], answer: Arrays | Exception) -> None:
    """Give a request its answer or an error, unless it has one or was cancelled."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
