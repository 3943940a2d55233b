"""What a service takes from its clients: limits on connections, headers, and bodies, before anything is decoded."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

# file descriptors that a process needs for other things than connections
OTHER_FILES = 128
RETRY = {"retry-after": "1"}
CLOSE = {"connection": "close"}
# of a body that is dropped; the pauses are shared, so that all together are read at some 50 MB a second
DROP_SECONDS, DROP_PAUSE = 10.0, 0.005
# bodies of fewer bytes leave no memory behind that is worth looking for
TRIMMED_BYTES = 1 << 20
_LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# of glibc, whose heap keeps what it once held: gives free memory back to the system
_trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Refused(HTTPException):
    """A request that is not answered; says why. Where its body is still arriving, `pace` is at which it is dropped."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None, pace: Pace | None = None):
        super().__init__(status, reason, headers)
        self.pace = pace


class Gone(Exception):
    """The client left before it had its answer."""


class Pace:
    """At which all bodies that nobody wants are dropped: slowly, so that it takes little of the processor."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def drop(self, receive: Receive) -> None:
        """Read what still comes of a body, for some seconds."""
        with anyio.move_on_after(DROP_SECONDS):
            while (await receive()).get("more_body"):
                async with self._turn:
                    await asyncio.sleep(DROP_PAUSE)


class EarlyAnswer(JSONResponse):
    """An answer to a request whose body is still arriving: it is sent at once, and the rest of the body dropped.

    Were the connection closed instead, the system would reset it, and a client that reads when it has sent everything
    would not find the answer.
    """

    def __init__(self, content: Any, status: int, headers: Mapping[str, str] | None, pace: Pace):
        super().__init__(content, status, headers)
        self._pace = pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await self._pace.drop(receive)
        await send({"type": "http.response.body", "body": b""})


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Args:
        connections (`int`): Open at a time, and no more than file descriptors allow.
        header_seconds (`float`): Until the header of a request is complete.
        body_seconds (`float`): Until its body is.
        body_bytes (`int`): Of one request.
        total_bytes (`int`): Of all bodies that are held at a time.
        requests (`int`): Worked on at a time, health and metrics apart.
        per_address (`int`, *optional*): Of them, from one peer address; behind a proxy all have that of the proxy.

    Raises:
        ValueError: A limit that is not positive, or a total that does not hold one body.

    Example:

        >>> Limits(body_bytes=10**6).requests
        2048
    """

    connections: int = 1000
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    body_bytes: int = 32 * 1024 * 1024
    total_bytes: int = 256 * 1024 * 1024
    requests: int = 2048
    per_address: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.total_bytes < self.body_bytes:
            raise ValueError(f"total_bytes={self.total_bytes} must hold one body, body_bytes={self.body_bytes}")


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Uvicorn's HTTP protocol, with limits on connections and on the time of a header.

    Where there are more connections than may be, the one that has kept the service waiting for longest is closed.
    """
    # those that wait for their client, for longest first
    waiting: dict[Any, None] = {}
    most = min(limits.connections, _files() - OTHER_FILES)

    class Limited(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # which of two is known at run time
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()
            if len(self.connections) > most:
                longest = next(iter(waiting))
                del waiting[longest]
                longest.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            waiting.pop(self, None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            cycle = self.cycle
            has_header = cycle is not None and not cycle.response_complete
            if has_header:
                self._unwatch()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.header_seconds, self._is_late)
            if has_header and not cycle.more_body:
                waiting.pop(self, None)
            else:
                waiting.setdefault(self)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _is_late(self) -> None:
            if not self.transport.is_closing():
                self.transport.write(_LATE)
                self.transport.close()

    return Limited


def _files() -> int:
    """File descriptors that this process may have."""
    if sys.platform == "win32":
        return 1 << 16
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft, OTHER_FILES + 8)


@dataclass(eq=False)
class _Upload:
    scope: anyio.CancelScope
    size: int = 0
    refused: bool = False


class Admission:
    """Which requests are worked on, and how much of their bodies is held.

    When all bodies together have more bytes than may be, the largest that is still arriving is refused: a client that
    sends much never keeps out one that sends little.

    Args:
        limits (`Limits`): See there.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._requests, self._held = 0, 0
        self._addresses: Counter[str] = Counter()
        self._arriving: set[_Upload] = set()
        self._pace = Pace()

    @contextmanager
    def admitted(self, request: Request) -> Iterator[None]:
        """While a request is worked on.

        Raises:
            Refused: There are too many, in total (503) or of this address (429).
        """
        limits, address = self.limits, request.client.host if request.client else ""
        if self._requests >= limits.requests:
            raise Refused(503, f"{self._requests} requests are worked on already", RETRY, self._pace)
        if limits.per_address is not None and self._addresses[address] >= limits.per_address:
            raise Refused(429, f"{limits.per_address} requests of {address} are worked on already", RETRY, self._pace)
        self._requests += 1
        self._addresses[address] += 1
        try:
            yield
        finally:
            self._requests -= 1
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held until the end of the context.

        Raises:
            Refused: It is empty, too long, late, or the largest where all together are too long.
        """
        limits, upload = self.limits, _Upload(anyio.CancelScope())
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.body_bytes:
            raise self._too_long()
        try:
            try:
                # most come at once, with the header
                self._arriving.add(upload)
                with anyio.move_on_after(limits.body_seconds) as upload.scope:
                    body = await self._received(request, upload)
            except ClientDisconnect:
                if _trim_heap is not None and upload.size >= TRIMMED_BYTES:
                    _trim_heap(0)
                raise Gone from None
            finally:
                self._arriving.discard(upload)
            if upload.refused:
                reason = "the bodies under way have more bytes than are held, and this has most"
                raise Refused(503, reason, {**RETRY, **CLOSE}, self._pace)
            if upload.scope.cancelled_caught:
                raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s")
            if body is None:
                raise self._too_long()
            if not body:
                raise Refused(400, "the body is empty")
            yield body
        finally:
            self._held -= upload.size

    async def _received(self, request: Request, upload: _Upload) -> bytes | None:
        # one large piece of memory goes back to the system when it is freed; thousands of small ones do not
        body = bytearray()
        try:
            async for chunk in request.stream():
                if len(body) + len(chunk) > self.limits.body_bytes:
                    return None
                body += chunk
                self._hold(upload, len(chunk))
            return bytes(body)
        finally:
            # the error of an upload that was broken off holds this frame, and with it all that had come
            body.clear()

    def _too_long(self) -> Refused:
        return Refused(413, f"the body has more than {self.limits.body_bytes} bytes", CLOSE, self._pace)

    def _hold(self, upload: _Upload, more: int) -> None:
        upload.size += more
        self._held += more
        if self._held > self.limits.total_bytes:
            arriving = (each for each in self._arriving if not each.refused)
            largest = max(arriving, key=lambda each: each.size, default=upload)
            largest.refused = True
            # it is let go at once, or the next chunk of another would be refused for it
            self._held -= largest.size
            largest.size = 0
            largest.scope.cancel()


@asynccontextmanager
async def watched(request: Request) -> AsyncIterator[None]:
    """Cancels what is done for a client that leaves; the body must have been read.

    Raises:
        Gone: The client left.
    """
    task, gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        assert task is not None  # of a coroutine that runs
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
        if gone:
            await asyncio.sleep(0)  # the cancellation is on its way
    except asyncio.CancelledError:
        if not gone:
            raise
        if sys.version_info >= (3, 11):
            assert task is not None
            task.uncancel()
        raise Gone from None
    finally:
        watcher.cancel()
