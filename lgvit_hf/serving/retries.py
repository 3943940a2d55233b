"""`Retries`: a request that is sent again under the same id is not computed again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request

from .device.loop import Arrays

ID_HEADER = "x-request-id"
# answers that are kept, and for how long
KEPT, SECONDS = 1024, 60.0
LARGE_BYTES = 1 << 18
Key = tuple[str, int, bytes]


class Retries:
    """Answers by the id and the body of their request, so that two requests with one id cannot get each other's."""

    def __init__(self) -> None:
        self._answers: dict[Key, asyncio.Future[Arrays]] = {}

    @staticmethod
    async def key(request: Request, version: int, body: bytes) -> Key | None:
        """By which a request is known; nothing where it has no id."""
        name = request.headers.get(ID_HEADER)
        if name is None:
            return None
        # of 30 MB it takes longer than others should wait
        large = len(body) > LARGE_BYTES
        digest = await asyncio.to_thread(hashlib.sha256, body) if large else hashlib.sha256(body)
        return name, version, digest.digest()

    async def once(self, key: Key, compute: Callable[[], Coroutine[Any, Any, Arrays]]) -> Arrays:
        """The answers under a key: those that were computed, are being computed, or are computed now.

        Raises:
            Exception: What `compute` raises; the next with this key computes again.
        """
        while (known := self._answers.get(key)) is not None:
            try:
                return await asyncio.shield(known)
            except asyncio.CancelledError:
                if not known.cancelled():
                    raise
        loop = asyncio.get_running_loop()
        future = self._answers[key] = loop.create_future()
        try:
            found = await compute()
        except BaseException:
            del self._answers[key]
            future.cancel()
            raise
        future.set_result(found)
        loop.call_later(SECONDS, self._answers.pop, key, None)
        for oldest in [old for old, kept in self._answers.items() if kept.done()][: len(self._answers) - KEPT]:
            del self._answers[oldest]
        return found
