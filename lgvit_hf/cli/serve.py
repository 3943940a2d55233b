"""`lgvit serve`: a part or a whole highway behind HTTP."""

from __future__ import annotations

import argparse
import signal
import socket
from typing import Any

from ..data.settings import real, whole
from .options import add_policy, policy_of

HELP = "answer images over HTTP, as a whole highway or as a part of one"
EXAMPLE = (
    "lgvit serve parts/part2 --port 8002\n"
    "  lgvit serve parts/part1 --port 8001 --next http://cloud:8002 --state-dtype float16\n"
    "  lgvit serve runs/stage2 --port 8000 --policy confidence --threshold 0.8"
)
LONGEST_WAIT_MS = 1000.0


def _wait(text: Any) -> float:
    """Milliseconds; `inf` stands for the longest wait."""
    return LONGEST_WAIT_MS if str(text) == "inf" else real(0, LONGEST_WAIT_MS)(text)


_wait.__name__ = real(0, LONGEST_WAIT_MS).__name__


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit serve`."""
    parser.add_argument("path", help="folder of a part or of an exported highway, or folder or Hub id of a highway")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0 for any that is free (default: 8000)")
    parser.add_argument("--next", metavar="URL", help="service of the next part")
    parser.add_argument(
        "--state-dtype", choices=("float32", "float16"), default="float32", help="sent to it (float32)"
    )
    parser.add_argument("--timeout", type=real(0, 3600), default=5.0, help="seconds for the next part (default: 5)")
    parser.add_argument(
        "--retries", type=whole(0, 100), default=2, help="of a message that did not arrive (default: 2)"
    )
    parser.add_argument("--max-batch-size", type=whole(), default=32, help="rows that run together (default: 32)")
    parser.add_argument(
        "--max-wait-ms",
        type=_wait,
        default=2.0,
        help=f"for others to run with, up to {LONGEST_WAIT_MS:g}, which `inf` stands for (default: 2)",
    )
    parser.add_argument("--max-body-mb", type=real(0, 1e6), default=32.0, help="of a request; states need 17 (32)")
    parser.add_argument("--threads", type=whole(1, 1024), help="of the processor")
    add_policy(parser)


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    names = ("host", "port", "state_dtype", "timeout", "retries", "max_batch_size", "max_wait_ms", "max_body_mb")
    run_serve(
        options.path,
        next_url=options.next,
        policy=policy_of(options),
        threads=options.threads,
        **{name: getattr(options, name) for name in names},
    )


def run_serve(
    path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    next_url: str | None = None,
    state_dtype: str = "float32",
    timeout: float = 5.0,
    retries: int = 2,
    policy: dict[str, Any] | None = None,
    max_batch_size: int = 32,
    max_wait_ms: float = 2.0,
    max_body_mb: float = 32.0,
    threads: int | None = None,
) -> None:
    """Serve until the process is told to stop; then answer what has come in, and return.

    Args:
        path (`str`): Folder of a part, of a checkpoint or of an exported highway, or a Hub id.
        host (`str`, *optional*), port (`int`, *optional*): Where; port 0 is any that is free.
        next_url (`str`, *optional*), state_dtype (`str`, *optional*), timeout (`float`, *optional*),
        retries (`int`, *optional*): See `RemoteHighway`.
        policy (`dict`, *optional*): Of a whole highway, instead of the saved one.
        max_batch_size (`int`, *optional*), max_wait_ms (`float`, *optional*): Of batches that requests share.
        max_body_mb (`float`, *optional*): Of a request, in MB.
        threads (`int`, *optional*): Of the processor.

    Raises:
        ImportError: The extra `serve` is not installed.
        OSError: There is no such thing, or the port is taken.
        ValueError: A setting that cannot be, or the next part is there and does not fit.
    """
    from ..serving.device.remote import RemoteHighway
    from ..serving.open_part import open_any

    try:
        import uvicorn

        from ..serving.server import make_app
    except ImportError as error:
        raise ImportError(
            'a service needs fastapi, uvicorn and prometheus_client: pip install "lgvit-hf[serve]"'
        ) from error
    if not max_body_mb > 0:
        raise ValueError(f"max_body_mb={max_body_mb} must be positive")
    part = open_any(path, policy=policy, max_batch_size=max_batch_size, threads=threads)
    highway = RemoteHighway(part, next_url, state_dtype=state_dtype, timeout=timeout, retries=retries)
    missing, info = highway.check_next(), highway.info
    app = make_app(highway, max_batch_size=max_batch_size, max_wait=max_wait_ms / 1e3, max_body=int(max_body_mb * 1e6))
    listening = socket.create_server((host, port), backlog=1024)
    # accepted connections take it over; without it the second packet of an answer waits for the first's receipt
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
    server = uvicorn.Server(config)
    # uvicorn takes the signal while it runs, drains, and then raises it again, by which the process would be said to
    # have failed; one that comes before it runs must not be lost
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(server, "should_exit", True))
    what = "a whole highway" if info.parts == 1 else f"part {info.index} of {info.parts}"
    print(f"{path}: {what} at http://{host}:{listening.getsockname()[1]}", flush=True)
    if missing is not None:
        print(f"until the next part is there, rows are answered here: {missing}", flush=True)
    elif info.gives and next_url is None:
        print("no --next: rows that are not sure here are answered here, and marked degraded", flush=True)
    server.run(sockets=[listening])
