"""`Batcher`: requests that arrive together run together, and each is answered as soon as all of its rows are."""

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
    """More rows are waiting than may."""


@dataclass(frozen=True)
class _Waiting:
    inputs: Arrays
    rows: int
    timeout: float
    asked: float
    future: Future[Arrays]


class Batcher:
    """Runs a highway on batches of what several callers ask at the same time.

    One thread computes; what goes on to the next part is sent by others meanwhile. A row's answer does not depend on
    the rows beside it, so that nobody notices whom the batch was shared with.

    Args:
        highway (`RemoteHighway`): What answers.
        max_rows (`int`, *optional*, defaults to 32): Rows of a batch; a request with more runs alone.
        max_wait (`float`, *optional*, defaults to 0.002): Seconds that a request waits for others to join it.
        max_waiting (`int`, *optional*, defaults to 1024): Rows that may wait; more are refused.
        senders (`int`, *optional*, defaults to 16): Batches that may be on their way to the next part.

    Raises:
        ValueError: A number that is not positive, or a wait of more than a minute.
    """

    def __init__(
        self,
        highway: RemoteHighway,
        *,
        max_rows: int = 32,
        max_wait: float = 0.002,
        max_waiting: int = 1024,
        senders: int = 16,
    ):
        if max_rows < 1 or not 0 <= max_wait <= MAX_WAIT or max_waiting < 1 or senders < 1:
            raise ValueError(
                f"{max_rows=}, {max_wait=}, {max_waiting=}, {senders=}: must be positive; at most {MAX_WAIT:g} s"
            )
        self.highway, self.max_rows, self.max_wait, self.max_waiting = highway, max_rows, max_wait, max_waiting
        self.batches = 0
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._next: _Waiting | None = None
        self._rows, self._lock, self._closed, self._dead = 0, threading.Lock(), False, False
        self._senders = ThreadPoolExecutor(senders, thread_name_prefix="lgvit-send")
        self._thread = threading.Thread(target=self._work, name="lgvit-compute", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anybody computes."""
        return not self._dead and self._thread.is_alive()

    def submit(self, inputs: Arrays, timeout: float | None = None) -> Future[Arrays]:
        """Have rows answered; the future gives what `RemoteHighway` would.

        Args:
            inputs (`dict[str, np.ndarray]`): As the part takes them, batch first.
            timeout (`float`, *optional*):
                Seconds from now on after which no next part is waited for, if less than it usually would be. Who has
                much less of them than others shares no batch with them.

        Raises:
            Busy: Too many rows are waiting, or no more are taken.
        """
        rows = len(next(iter(inputs.values())))
        with self._lock:
            if self._closed or not self.alive:
                raise Busy("the service is shutting down" if self._closed else "nobody computes any more")
            if self._rows and self._rows + rows > self.max_waiting:
                raise Busy(f"{self._rows} rows are waiting already")
            self._rows += rows
            waiting = _Waiting(inputs, rows, math.inf if timeout is None else timeout, time.monotonic(), Future())
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
            # whatever ended this thread: nobody waits for it
            with self._lock:
                self._dead = True
                while not self._queue.empty():
                    group = [*(group or []), *filter(None, [self._queue.get()])]
            _fail(group or [], Busy(f"nobody computes any more ({type(error).__name__})"))
            raise

    def _group(self) -> list[_Waiting] | None:
        """The next requests to run together, or nothing at the end."""
        first = self._next or self._queue.get()
        self._next = None
        if first is None:
            return None
        group, rows, until = [first], first.rows, time.monotonic() + self.max_wait
        while rows < self.max_rows:
            try:
                waiting = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if waiting is None:
                self._queue.put(None)  # the end is found again behind this group
                break
            if rows + waiting.rows > self.max_rows or not _alike(first.timeout, waiting.timeout):
                self._next = waiting
                break
            group.append(waiting)
            rows += waiting.rows
        with self._lock:
            self._rows -= rows
        return group

    def _run(self, group: list[_Waiting]) -> None:
        try:
            names = group[0].inputs
            inputs = {name: np.concatenate([waiting.inputs[name] for waiting in group]) for name in names}
            answers, rows, state = self.highway.part(inputs)
            self.batches += 1
            ends = np.cumsum([waiting.rows for waiting in group])
            spans = [slice(end - waiting.rows, end) for waiting, end in zip(group, ends, strict=True)]
            goes_on = [bool(((rows >= span.start) & (rows < span.stop)).any()) for span in spans]
            sure = self.highway.finish(answers, rows[:0], {})
            for waiting, span, further in zip(group, spans, goes_on, strict=True):
                if not further:
                    waiting.future.set_result(_piece(sure, span))
            rest = [(waiting, span) for waiting, span, further in zip(group, spans, goes_on, strict=True) if further]
            if rest:
                self._senders.submit(self._finish, rest, answers, rows, state)
        except Exception as error:
            _fail(group, error)

    def _finish(self, rest: list[tuple[_Waiting, slice]], answers: Arrays, rows: np.ndarray, state: Arrays) -> None:
        try:
            left = min(waiting.asked + waiting.timeout for waiting, _ in rest) - time.monotonic()
            found = self.highway.finish(answers, rows, state, timeout=left)
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
