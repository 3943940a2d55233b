"""`ComputeThread`: the one thread of a scheduler, how it hears of requests to come, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

SHUTTING_DOWN = "the service is shutting down"


class ComputeThread:
    """What the schedulers of a service share; each computes in `_work`, and waits for `_changed`."""

    def __init__(self) -> None:
        self._coming, self._closed, self._dead = 0, False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="lgvit-compute", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the computing thread runs."""
        return not self._dead and self._thread.is_alive()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a request is being decoded: it will soon be submitted, and those that wait may wait for it."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            if not self._coming:
                with self._changed:
                    self._changed.notify()

    def close(self) -> None:
        """Answer what is waiting, take no more, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _why_none(self) -> str:
        """Why no more are taken."""
        return SHUTTING_DOWN if self._closed else "no thread computes any more"

    def _work(self) -> None:
        raise NotImplementedError
