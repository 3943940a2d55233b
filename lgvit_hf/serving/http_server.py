"""`HttpServer`: uvicorn with the limits of a service, which drains on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading

import uvicorn
from starlette.applications import Starlette

from .admission import protocol

# for what runs when waiting requests are refused, before it is cancelled
LAST_BATCH_SECONDS = 60
# connections that are accepted before those that are too many are closed
BACKLOG = 64
# Python lets a thread run for 5 ms while others wait: whenever the event loop has sent or received something, it would
# wait that long for the thread that computes
TURN_SECONDS = 0.0005


class HttpServer(uvicorn.Server):
    """Runs what `make_app` gives.

    Args:
        app (`Starlette`): The service.
        drain_seconds (`float`): After SIGTERM, for requests that wait; those left then get 503.
    """

    def __init__(self, app: Starlette, drain_seconds: float = 20.0):
        self._service, self._drain_seconds = app.state.service, drain_seconds
        self._reloads: set[asyncio.Future[bool]] = set()  # the loop itself holds tasks weakly
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(self._service.limits),
                ws="none",
                # a client that says it is a proxy is none
                proxy_headers=False,
                backlog=BACKLOG,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(drain_seconds) + LAST_BATCH_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and open the model again at every SIGHUP."""
        sys.setswitchinterval(TURN_SECONDS)
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        task = asyncio.ensure_future(self._service.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has been admitted, or say that it will not be."""
        self._service.drain(self._drain_seconds)
        await super().shutdown(sockets)
