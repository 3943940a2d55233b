"""`lgvit serve`: a part or a whole highway behind HTTP."""

from __future__ import annotations

import argparse
import signal
import socket
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..data.settings import real, whole
from .options import add_policy, add_runtime, policy_of

if TYPE_CHECKING:
    from ..serving.open_service import ServiceSettings

HELP = "answer images over HTTP, as a whole highway or as a part of one"
EXAMPLE = (
    "lgvit serve parts/part2 --port 8002\n"
    "  lgvit serve parts/part1 --port 8001 --next http://cloud:8002 --state-dtype float16\n"
    "  lgvit serve runs/stage2 --port 8000 --policy confidence --threshold 0.8\n"
    "  lgvit serve runs/stage2 --ladder runs/stage2/calibration.json --max-queue-ms 200\n"
    "  lgvit serve runs/stage2 --drift runs/stage2/calibration.json --audit 0.01\n"
    "  lgvit serve runs/stage2 --engine ray --replicas 4"
)
LONGEST_WAIT_MS, CONNECTIONS = 1000.0, 1000


def _wait(text: Any) -> float:
    """Milliseconds; `inf` stands for the longest wait."""
    return LONGEST_WAIT_MS if str(text) == "inf" else real(0, LONGEST_WAIT_MS)(text)


_wait.__name__ = real(0, LONGEST_WAIT_MS).__name__


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit serve`."""
    add = parser.add_argument
    add("path", help="folder of a part or of an exported highway, or folder or Hub id of a highway")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    add("--port", type=whole(0, 65535), default=8000, help="0 for any that is free (default: 8000)")
    add("--next", metavar="URL", help="service of the next part")
    add("--state-dtype", choices=("float32", "float16"), default="float32", help="sent to it (float32)")
    add("--timeout", type=real(0, 3600), default=5.0, help="seconds for the next part (default: 5)")
    add("--retries", type=whole(0, 100), default=2, help="of a message that did not arrive (default: 2)")
    add("--max-batch-size", type=whole(), default=32, help="samples that run together (default: 32)")
    wait = f"for others to run with, up to {LONGEST_WAIT_MS:g}, which `inf` stands for (default: 2)"
    add("--max-wait-ms", type=_wait, default=2.0, help=wait)
    how = "make batches anew before each segment, the default where there are segments, or run each to its end"
    add("--scheduler", choices=("segments", "batch"), help=how)
    add("--max-run-ms", type=real(0.1, 1e4), help="of a run of some blocks, with segments (15, more for large models)")
    add("--max-body-mb", type=real(0, 1e6), default=32.0, help="of a request; states need 17 (32)")
    add("--max-connections", type=whole(), default=CONNECTIONS, help=f"open at a time ({CONNECTIONS})")
    add("--max-per-address", type=whole(), help="requests of one peer address at a time; none behind a proxy")
    add("--decoders", type=whole(1, 1024), help="processes that decode images, in each of two lanes (one a core)")
    add("--drain-seconds", type=real(0, 3600), default=20.0, help="after SIGTERM for what waits (default: 20)")
    add("--threads", type=whole(1, 1024), help="of the processor")
    add("--ladder", metavar="FILE", help="calibration.json with --delta: faster certified policies as the queue grows")
    add("--max-queue-ms", type=real(0), help="with --ladder: what would wait for longer gets 503")
    add("--drift", metavar="FILE", help="calibration.json to compare answers with; after an alarm the safest policy")
    add("--audit", type=real(), default=0.0, help="with --drift: share of samples that are run to the end, too (0)")
    add("--drift-state", metavar="FILE", help="kept over restarts (default: calibration.drift.json beside --drift)")
    engines = "ray: replicas of Ray Serve, on the cluster of RAY_ADDRESS or on this machine (default: local)"
    add("--engine", choices=("local", "ray"), default="local", help=engines)
    add("--replicas", type=whole(1, 10000), help="with --engine ray, each with --threads CPUs and a model (1)")
    add_policy(parser)
    add_runtime(parser)


def run(options: argparse.Namespace) -> None:
    """Serve until the process is told to stop; then answer what has come in, and return.

    Raises:
        ImportError: The extra `serve` is not installed.
        OSError: There is no such thing, or the port is taken.
        ValueError: A setting that cannot be, or the next part is there and does not fit.
    """
    try:
        from ..serving.admission import Limits
        from ..serving.http_server import HttpServer
        from ..serving.open_service import ServiceSettings
    except ImportError as error:
        packages = "starlette, uvicorn, pydantic and prometheus_client"
        raise ImportError(f'a service needs {packages}: pip install "lgvit-hf[serve]"') from error
    if not options.max_body_mb > 0:
        raise ValueError(f"max_body_mb={options.max_body_mb} must be positive")
    body = int(options.max_body_mb * 1e6)
    limits = Limits(
        connections=options.max_connections,
        body_bytes=body,
        total_bytes=max(8 * body, 1 << 28),
        per_address=options.max_per_address,
    )
    names = set(vars(options)) & {field.name for field in fields(ServiceSettings)}
    given = {name: getattr(options, name) for name in names} | {"policy": policy_of(options), "limits": limits}
    settings = ServiceSettings(**given, max_wait=options.max_wait_ms / 1e3)
    if options.engine == "ray":
        _serve_on_ray(settings, options)
        return
    if options.replicas is not None:
        raise ValueError(f"--replicas {options.replicas} goes with --engine ray")
    app = settings.app()
    highway, certified = app.state.service.served.highway, app.state.service.certified
    missing, info = highway.check_next(), highway.info
    listening = socket.create_server((options.host, options.port), backlog=1024)
    # accepted connections take it over; without it the second packet of an answer waits for the first's receipt
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = HttpServer(app, options.drain_seconds)
    # uvicorn takes the signal while it runs, drains, and then raises it again, by which the process would be said to
    # have failed; one that comes before it runs must not be lost
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(server, "should_exit", True))
    what = "a whole highway" if info.parts == 1 else f"part {info.index} of {info.parts}"
    print(f"{options.path}: {what} at http://{options.host}:{listening.getsockname()[1]}", flush=True)
    if missing is not None:
        print(f"until the next part is there, samples are answered here: {missing}", flush=True)
    elif info.gives and options.next is None:
        print("no --next: samples that do not exit are answered here too, and marked degraded", flush=True)
    if certified is None:
        server.run(sockets=[listening])
        return
    if certified.ladder is not None:
        print(certified.ladder.promise(), flush=True)
    with certified.held():
        server.run(sockets=[listening])


def _serve_on_ray(settings: ServiceSettings, options: argparse.Namespace) -> None:
    from ..serving.ray_serve import serve_on_ray

    if options.max_connections != CONNECTIONS or options.max_per_address is not None:
        raise ValueError(
            "--max-connections and --max-per-address: with --engine ray connections are those of its proxy"
        )
    replicas = options.replicas or 1
    many = "1 replica" if replicas == 1 else f"{replicas} replicas"

    def started(port: int) -> None:
        print(f"{options.path}: a whole highway in {many} at http://{options.host}:{port}", flush=True)

    where = {"host": options.host, "port": options.port, "drain_seconds": options.drain_seconds}
    serve_on_ray(settings, replicas=replicas, started=started, **where)
