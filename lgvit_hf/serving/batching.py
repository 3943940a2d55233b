"""`Batcher`: requests that arrive together run together, and each is answered as soon as all of its samples are."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .compute_thread import SHUTTING_DOWN, ComputeThread
from .device.loop import Arrays
from .device.remote import SHARE, RemoteHighway
from .returning import Returning

# seconds that a request may be made to wait for others
MAX_WAIT = 60.0


class Busy(RuntimeError):
    """More samples are waiting than may, or no more are taken."""


class Expired(RuntimeError):
    """The request's deadline passed before it was computed."""


class Observer(Protocol):
    """Who is told of batches: `Metrics`."""

    def batch(self, ages: list[float], fill: float) -> None:
        """Requests that waited for so many seconds run, as a batch that is filled to a share of what it may hold."""

    def dropped(self, reason: str, samples: int) -> None:
        """Samples are not computed: their client has left (`cancelled`) or their deadline has passed (`expired`)."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    inputs: Arrays
    samples: int
    timeout: float
    asked: float
    future: Future[Arrays]


class Batcher(ComputeThread):
    """Runs a highway on batches of what several callers ask at the same time.

    One thread computes; others send to the next part meanwhile. A sample's answer does not depend on the other samples
    of its batch, so that requests may share one. What is cancelled or expired before it runs is not computed. The
    requests of a batch that fails are run again, one by one.

    Args:
        highway (`RemoteHighway`): What answers.
        max_samples (`int`, *optional*, defaults to 32): Samples of a batch; a request with more runs alone.
        max_wait (`float`, *optional*, defaults to 0.002):
            Seconds that a request waits for others to join it, as long as some are on their way, see `coming`; longer
            for clients that ask again as soon as they are answered, see `Returning`.
        max_waiting (`int`, *optional*, defaults to 1024): Samples that may wait; more are refused.
        senders (`int`, *optional*, defaults to 16): Batches that may be on their way to the next part.
        observer (`Observer`, *optional*): Is told of every batch.

    Raises:
        ValueError: A number that is not positive, or a wait of more than a minute.
    """

    def __init__(
        self,
        highway: RemoteHighway,
        *,
        max_samples: int = 32,
        max_wait: float = 0.002,
        max_waiting: int = 1024,
        senders: int = 16,
        observer: Observer | None = None,
    ):
        if max_samples < 1 or not 0 <= max_wait <= MAX_WAIT or max_waiting < 1 or senders < 1:
            raise ValueError(
                f"{max_samples=}, {max_wait=}, {max_waiting=}, {senders=}: must be positive; at most {MAX_WAIT:g} s"
            )
        self.highway, self.max_samples, self.max_wait, self.max_waiting = highway, max_samples, max_wait, max_waiting
        super().__init__()
        self.batches, self._observer, self._returning = 0, observer, Returning(max_wait)
        self._queue: deque[_Waiting] = deque()
        self._held: float | None = None  # since when it waits for others
        self._senders = ThreadPoolExecutor(senders, thread_name_prefix="lgvit-send")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        with self._changed:
            return self._samples()

    @property
    def queue_age(self) -> float:
        """Seconds that the first request in the queue has waited, given up meanwhile or not; 0 if none waits.

        Not those in which nothing ran but it waited for others to join it: that is no load.
        """
        with self._changed:
            until = time.monotonic() if self._held is None else self._held
            return max(0.0, until - self._queue[0].asked) if self._queue else 0.0

    @property
    def pass_seconds(self) -> float:
        """How much longer than its timeout a request may run: 0, for one that has begun is answered."""
        return 0.0

    @contextmanager
    def coming(self) -> Iterator[None]:
        """See `ComputeThread`."""
        with self._changed:
            self._returning.arrives(time.monotonic())
        with super().coming():
            yield

    def submit(self, inputs: Arrays, timeout: float | None = None) -> Future[Arrays]:
        """Have samples answered; the future gives what `RemoteHighway` would, or can be cancelled until it runs.

        Args:
            inputs (`dict[str, np.ndarray]`): As the part takes them, batch first.
            timeout (`float`, *optional*):
                Seconds from now on after which the request has expired, and no next part is waited for. Requests with
                much shorter deadlines are not batched together with others.

        Raises:
            Busy: Too many samples are waiting, or no more are taken.
        """
        samples = len(next(iter(inputs.values())))
        with self._changed:
            if self._closed or not self.alive:
                raise Busy(self._why_none())
            if self._queue and self._samples() + samples > self.max_waiting:
                raise Busy(f"{self._samples()} samples are waiting already")
            now = time.monotonic()
            waiting = _Waiting(inputs, samples, math.inf if timeout is None else timeout, now, Future())
            self._queue.append(waiting)
            self._returning.asked(now)
            self._changed.notify()
        return waiting.future

    def refuse_waiting(self) -> None:
        """Take no more, and tell all that have not begun to run that the service is shutting down."""
        with self._changed:
            self._closed = True
            refused = [waiting for waiting in self._queue if waiting.future.set_running_or_notify_cancel()]
            self._queue.clear()
            self._changed.notify()
        _fail(refused, Busy(SHUTTING_DOWN))

    def close(self) -> None:
        """As of any scheduler; what is on its way to the next part comes back first."""
        super().close()
        self._senders.shutdown()

    def _samples(self) -> int:
        return sum(waiting.samples for waiting in self._queue if not waiting.future.cancelled())

    def _work(self) -> None:
        group: list[_Waiting] | None = []
        try:
            while (group := self._group()) is not None:
                group = [waiting for waiting in group if self._begins(waiting)]
                if group:
                    self._observe(group)
                    self._run(group)
        except BaseException as error:
            # whatever ended this thread: no request waits for it
            with self._changed:
                self._dead = True
                group = [*(group or []), *self._queue]
                self._queue.clear()
            _fail(group, Busy(f"no thread computes any more ({type(error).__name__})"))
            raise

    def _group(self) -> list[_Waiting] | None:
        """The next requests to run together, or nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._held = began = time.monotonic()
            while self._samples() < self.max_samples and not self._closed:
                if (left := self._wait_until(began) - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            self._held = None
            if not self._queue:
                return None if self._closed else []
            first, samples, group = self._queue[0], 0, []
            for waiting in self._queue:
                # one that was given up takes no place
                more = 0 if waiting.future.cancelled() else waiting.samples
                if waiting is first or (samples + more <= self.max_samples and _alike(first.timeout, waiting.timeout)):
                    group.append(waiting)
                    samples += more
                if samples >= self.max_samples:
                    break
            taken = set(group)
            self._queue = deque(waiting for waiting in self._queue if waiting not in taken)
            return group

    def _wait_until(self, began: float) -> float:
        """Until when to wait for others, since `began`; for those who ask again half of a request's time at most."""
        decoded = began + self.max_wait if self._coming else began
        if not self._returning.awaited:
            return decoded
        now = time.monotonic()
        alive = (each for each in self._queue if not each.future.cancelled() and now < each.asked + each.timeout)
        half = min((each.asked + each.timeout / 2 for each in alive), default=math.inf)
        return max(decoded, min(self._returning.until, half))

    def _begins(self, waiting: _Waiting) -> bool:
        """Whether a request is still to be computed."""
        expired = time.monotonic() >= waiting.asked + waiting.timeout
        runs = waiting.future.set_running_or_notify_cancel()
        if runs and not expired:
            return True
        if self._observer is not None:
            self._observer.dropped("expired" if expired else "cancelled", waiting.samples)
        if runs:
            waiting.future.set_exception(Expired(f"it waited longer than its {waiting.timeout:g} s"))
        return False

    def _observe(self, group: list[_Waiting]) -> None:
        self.batches += 1
        if self._observer is not None:
            now, samples = time.monotonic(), sum(waiting.samples for waiting in group)
            self._observer.batch([now - waiting.asked for waiting in group], min(1.0, samples / self.max_samples))

    def _run(self, group: list[_Waiting]) -> None:
        try:
            began, names = time.monotonic(), group[0].inputs
            inputs = {name: np.concatenate([waiting.inputs[name] for waiting in group]) for name in names}
            answers, further, state = self.highway.part(inputs)
            ends = np.cumsum([waiting.samples for waiting in group]).tolist()
            done = self.highway.finish(answers, further[:0], {})
            answered: list[tuple[_Waiting, slice]] = []
            rest: list[tuple[_Waiting, slice]] = []
            for waiting, end in zip(group, ends, strict=True):
                span = slice(end - waiting.samples, end)
                goes_on = ((further >= span.start) & (further < span.stop)).any()
                (rest if goes_on else answered).append((waiting, span))
            with self._changed:  # before any client can ask again
                now = time.monotonic()
                self._returning.answered(len(answered), now - began, now)
            for waiting, span in answered:
                waiting.future.set_result(_piece(done, span))
            if rest:
                self._senders.submit(self._finish, rest, answers, further, state)
        except Exception as error:
            if len(group) == 1:
                _fail(group, error)
                return
            for waiting in group:
                if not waiting.future.done():
                    self._run([waiting])

    def _finish(self, rest: list[tuple[_Waiting, slice]], answers: Arrays, further: np.ndarray, state: Arrays) -> None:
        try:
            left = min(waiting.asked + waiting.timeout for waiting, _ in rest) - time.monotonic()
            found = self.highway.finish(answers, further, state, timeout=left)
            for waiting, span in rest:
                waiting.future.set_result(_piece(found, span))
        except Exception as error:
            _fail([waiting for waiting, _ in rest], error)


def _alike(one: float, other: float) -> bool:
    return min(one, other) >= SHARE * max(one, other)


def _piece(answers: Arrays, span: slice) -> Arrays:
    # a copy, so that one answer does not hold the memory of a batch, nor change with it
    return {name: array[span].copy() for name, array in answers.items()}


def _fail(group: list[_Waiting], error: Exception) -> None:
    for waiting in group:
        if not waiting.future.done():
            waiting.future.set_exception(error)
