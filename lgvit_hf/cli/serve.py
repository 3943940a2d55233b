"""`lgvit split` and `lgvit serve`: a checkpoint in parts, and a part or a whole highway behind HTTP."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from typing import Any

from ..serving.device.remote import RemoteHighway
from ..serving.open_part import open_any


def run_split(
    checkpoint: str,
    output: str,
    positions: Sequence[int],
    format: str,
    policy: dict[str, Any] | None = None,
    processor: str | None = None,
) -> str:
    """Write a checkpoint as parts, and say what they are.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        output (`str`): Folder to make.
        positions (`Sequence[int]`), format (`str`): As of `split`.
        policy (`dict`, *optional*): Instead of the saved one.
        processor (`str`, *optional*): As of `processor_for`.
    """
    from ..hub.loading import load_highway
    from ..serving.split import split
    from .export import processor_for

    opened, model = processor_for(checkpoint, processor), load_highway(checkpoint)
    if policy is not None:
        model.set_exit_policy(policy)
    parts = split(model, positions, output, format, processor=opened)
    lines = []
    for part in parts:
        depths = ", ".join(str(part.depths[exit["index"]]) for exit in part.exits)
        sent = " and ".join(f"{name} {array['shape']}" for name, array in part.gives.items())
        lines.append(f"{output}/part{part.index}: answers after {depths} blocks" + (f", gives {sent}" if sent else ""))
    lines.append(
        f"run as a chain on batches of {', '.join(map(str, parts[0].checks['batch_sizes']))} with every exit taken: "
        f"answers as the model does, logits within {parts[0].checks['largest_difference']:.1e}"
    )
    return "\n".join(lines)


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
        retries (`int`, *optional*): As of `RemoteHighway`.
        policy (`dict`, *optional*): Of a whole highway, instead of the saved one.
        max_batch_size (`int`, *optional*), max_wait_ms (`float`, *optional*): Of batches that requests share.
        max_body_mb (`float`, *optional*): Of a request, in MB.
        threads (`int`, *optional*): Of the processor.

    Raises:
        ImportError: The extra `serve` is not installed.
        OSError: There is no such thing, or the port is taken.
        ValueError: A setting that cannot be, or the next part is there and does not fit.
    """
    try:
        import uvicorn

        from ..serving.server import make_app
    except ImportError as error:
        raise ImportError('a service needs fastapi and uvicorn: pip install "lgvit-hf[serve]"') from error
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
