"""`Batcher`: requests that arrive together run together, and each is answered as soon as all of its samples are."""

from __future__ import annotations

import math
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .device.loop import Arrays
from .device.remote import SHARE, RemoteHighway

# seconds that a request may be made to wait for others
MAX_WAIT = 60.0


class Busy(RuntimeError):
    """More samples are waiting than may."""


@dataclass(frozen=True)
class _Waiting:
    inputs: Arrays
    samples: int
    timeout: float
    asked: float
    future: Future[Arrays]


class Batcher:
    """Runs a highway on batches of what several callers ask at the same time.

    One thread computes; others send to the next part meanwhile. A sample's answer does not depend on the other samples
    of its batch, so that requests may share one.

    Args:
        highway (`RemoteHighway`): What answers.
        max_samples (`int`, *optional*, defaults to 32): Samples of a batch; a request with more runs alone.
        max_wait (`float`, *optional*, defaults to 0.002): Seconds that a request waits for others to join it.
        max_waiting (`int`, *optional*, defaults to 1024): Samples that may wait; more are refused.
        senders (`int`, *optional*, defaults to 16): Batches that may be on their way to the next part.

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
    ):
        if max_samples < 1 or not 0 <= max_wait <= MAX_WAIT or max_waiting < 1 or senders < 1:
            raise ValueError(
                f"{max_samples=}, {max_wait=}, {max_waiting=}, {senders=}: must be positive; at most {MAX_WAIT:g} s"
            )
        self.highway, self.max_samples, self.max_wait, self.max_waiting = highway, max_samples, max_wait, max_waiting
        self.batches = 0
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._next: _Waiting | None = None
        self._samples, self._lock, self._closed, self._dead = 0, threading.Lock(), False, False
        self._senders = ThreadPoolExecutor(senders, thread_name_prefix="lgvit-send")
        self._thread = threading.Thread(target=self._work, name="lgvit-compute", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the computing thread runs."""
        return not self._dead and self._thread.is_alive()

    def submit(self, inputs: Arrays, timeout: float | None = None) -> Future[Arrays]:
        """Have samples answered; the future gives what `RemoteHighway` would.

        Args:
            inputs (`dict[str, np.ndarray]`): As the part takes them, batch first.
            timeout (`float`, *optional*):
                Seconds from now on after which no next part is waited for, if less than it usually would be. Requests
                with much shorter deadlines are not batched together with others.

        Raises:
            Busy: Too many samples are waiting, or no more are taken.
        """
        samples = len(next(iter(inputs.values())))
        with self._lock:
            if self._closed or not self.alive:
                raise Busy("the service is shutting down" if self._closed else "no thread computes any more")
            if self._samples and self._samples + samples > self.max_waiting:
                raise Busy(f"{self._samples} samples are waiting already")
            self._samples += samples
            waiting = _Waiting(inputs, samples, math.inf if timeout is None else timeout, time.monotonic(), Future())
            self._queue.put(waiting)
        return waiting.future

    def close(self) -> None:
        """Answer what is waiting, take no more, and stop."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._senders.shutdown()

    def _work(self) -> None:
        group: list[_Waiting] | None = []
        try:
            while (group := self._group()) is not None:
                group = [waiting for waiting in group if waiting.future.set_running_or_notify_cancel()]
                if group:
                    self._run(group)
        except BaseException as error:
            # whatever ended this thread: no request waits for it
            with self._lock:
                self._dead = True
                while not self._queue.empty():
                    group = [*(group or []), *filter(None, [self._queue.get()])]
            _fail(group or [], Busy(f"no thread computes any more ({type(error).__name__})"))
            raise

    def _group(self) -> list[_Waiting] | None:
        """The next requests to run together, or nothing at the end."""
        first = self._next or self._queue.get()
        self._next = None
        if first is None:
            return None
        group, samples, until = [first], first.samples, time.monotonic() + self.max_wait
        while samples < self.max_samples:
            try:
                waiting = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if waiting is None:
                self._queue.put(None)  # the end is found again after this group
                break
            if samples + waiting.samples > self.max_samples or not _alike(first.timeout, waiting.timeout):
                self._next = waiting
                break
            group.append(waiting)
            samples += waiting.samples
        with self._lock:
            self._samples -= samples
        return group

    def _run(self, group: list[_Waiting]) -> None:
        try:
            names = group[0].inputs
            inputs = {name: np.concatenate([waiting.inputs[name] for waiting in group]) for name in names}
            answers, further, state = self.highway.part(inputs)
            self.batches += 1
            ends = np.cumsum([waiting.samples for waiting in group]).tolist()
            done, rest = self.highway.finish(answers, further[:0], {}), []
            for waiting, end in zip(group, ends, strict=True):
                span = slice(end - waiting.samples, end)
                if ((further >= span.start) & (further < span.stop)).any():
                    rest.append((waiting, span))
                else:
                    waiting.future.set_result(_piece(done, span))
            if rest:
                self._senders.submit(self._finish, rest, answers, further, state)
        except Exception as error:
            _fail(group, error)

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
