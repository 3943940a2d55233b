"""`Served`: one version of a model that answers in a service."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from .batching import Expired
from .device.loop import Arrays
from .device.remote import RemoteHighway
from .resized import ResizedImages
from .scheduling import Scheduling
from .segment_scheduler import SegmentObserver


class Served:
    """A highway and the scheduler that runs it.

    Args:
        highway (`RemoteHighway`): What answers.
        scheduling (`Scheduling`): Which samples run together.
        observer (`SegmentObserver`): Is told of that.
        version (`int`, *optional*, defaults to 1): How often the model was opened.
    """

    def __init__(self, highway: RemoteHighway, scheduling: Scheduling, observer: SegmentObserver, version: int = 1):
        self.highway, self.info, self.version, self.users = highway, highway.info, version, 0
        self.batcher = scheduling.start(highway, observer)
        self._resized = _resized(highway)

    @property
    def counts(self) -> dict[str, int]:
        """What it has counted so far."""
        return {**self.highway.counts, "batches": self.batcher.batches}

    @contextmanager
    def used(self) -> Iterator[None]:
        """While a request is answered by this version."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def pixels(self, arrays: list[np.ndarray]) -> np.ndarray:
        """What the model takes, `[B, C, H, W]` float32, of images as a `Decoder` gives them.

        Raises:
            ValueError: One cannot be prepared, with its number; there is no image processor.
        """
        if self._resized is not None:
            return self._resized(arrays)
        pixels = []
        for number, array in enumerate(arrays):
            try:
                pixels.append(self.highway.part.pixels(Image.fromarray(array)))
            # also where a checkpoint has no image processor
            except (ValueError, OSError) as error:
                raise ValueError(f"image {number}: {error}") from error
        return np.stack(pixels)

    def submit(self, inputs: Arrays, timeout: float | None) -> Coroutine[Any, Any, Arrays]:
        """Have samples answered. Those of a large request run in several batches, between which others have theirs.

        Raises:
            Busy, Expired: See `Batcher` and `SegmentScheduler`.
        """
        samples, step = len(next(iter(inputs.values()))), self.batcher.max_samples
        return self._answers(inputs, self._begun(inputs, 0, timeout), range(step, samples, step), timeout)

    async def _answers(self, inputs: Arrays, first: Future[Arrays], starts: range, timeout: float | None) -> Arrays:
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        found = [await _answer(first, timeout)]
        for start in starts:
            left = None if until is None else until - asyncio.get_running_loop().time()
            found.append(await _answer(self._begun(inputs, start, left), left))
        if len(found) == 1:
            return found[0]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    def _begun(self, inputs: Arrays, start: int, timeout: float | None) -> Future[Arrays]:
        span = slice(start, start + self.batcher.max_samples)
        return self.batcher.submit({name: array[span] for name, array in inputs.items()}, timeout)


def _resized(highway: RemoteHighway) -> ResizedImages | None:
    """What makes pixels of resized images; nothing where only the image processor can."""
    settings = highway.info.image
    if settings is None:
        return None
    try:
        return ResizedImages(settings, highway.part.pixels)
    except ValueError:
        return None


async def _answer(future: Future[Arrays], timeout: float | None) -> Arrays:
    """What a request gets; `Expired` as soon as its time is over, unless it runs by then."""
    if timeout is None:
        return await asyncio.wrap_future(future)
    # uvloop's timers come up to a millisecond early: that ours has come is known by itself, not by the clock
    expired: list[bool] = []
    timer = asyncio.get_running_loop().call_later(max(0.0, timeout), lambda: expired.append(future.cancel()))
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if not any(expired):
            raise
        raise Expired(f"it waited longer than its {timeout:g} s") from None
    finally:
        timer.cancel()
