"""`ray_app`: the service in replicas of Ray Serve, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from .admission import Limits
from .device.info import PART_FILE
from .http_server import TURN_SECONDS
from .open_service import ServiceSettings
from .ray_cluster import check_cpus, check_ray, cluster

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)
# how long a replica may take to say what it has counted, to end once it has answered, and to be connected to
METRICS_SECONDS, END_SECONDS, CONNECT_SECONDS = 5.0, 10.0, 5.0
APPLICATION, DEPLOYMENT = "lgvit", "highway"


def ray_app(
    model: str | ServiceSettings,
    *,
    replicas: int = 1,
    autoscaling: dict[str, Any] | None = None,
    user_config: dict[str, Any] | None = None,
    drain_seconds: float = 20.0,
    **settings: Any,
) -> Application:
    """A highway as an application of Ray Serve: each replica is a service of its own, as `lgvit serve` starts it.

    Routes, answers and limits of requests are those of `make_app`; connections and the time of a header are the
    proxy's. A replica forms its batches itself. `GET /metrics` gives the counts of all replicas, each with its name as
    the label `replica`.

    Args:
        model (`str` or `ServiceSettings`): Folder or Hub id of a whole highway, which must be there on each machine.
        replicas (`int`, *optional*, defaults to 1): Each takes `threads` CPUs, by default one.
        autoscaling (`dict`, *optional*):
            `autoscaling_config` of Ray Serve instead of `replicas`, such as `{"min_replicas": 1, "max_replicas": 8,
            "target_ongoing_requests": 16}`.
        user_config (`dict`, *optional*):
            `{"policy": {"name": "confidence", "threshold": 0.8}}`: the exit policy instead of the saved one. Changed
            under `deployments` of a configuration file, replicas open their model again by it beside the old one, and
            drop no request; one that the model cannot have is logged, and the old one stays. (Whatever else changes,
            and a program that deploys again, has Ray replace replicas.)
        drain_seconds (`float`, *optional*, defaults to 20): For requests of a replica that is told to stop.
        settings (`Any`): Of `ServiceSettings`.

    Raises:
        ImportError: Ray Serve is not installed.
        ValueError: A part of a split highway, options that are for one process, or an unknown setting.

    Example:

        from lgvit_hf.serving import ray_app
        app = ray_app("runs/stage2", replicas=4)  # serve run this_file:app
    """
    opened = _of_a_replica(_settings_of(model, settings))
    _policy_of(user_config, opened)
    check_ray("serve")
    from ray import serve

    def build() -> Starlette:
        return _service(opened)

    deployment = serve.deployment(serve.ingress(build)(_Replica))
    scale = {"num_replicas": replicas} if autoscaling is None else {"autoscaling_config": autoscaling}
    return deployment.options(
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": opened.threads},
        # a batch can hold only what the proxy has let through
        max_ongoing_requests=opened.limits.requests,
        graceful_shutdown_timeout_s=drain_seconds,
        max_constructor_retry_count=3,
        user_config=user_config,
        **scale,
    ).bind()


def build_app(arguments: dict[str, Any]) -> Application:
    """`ray_app` for configuration files: `import_path: lgvit_hf.serving.ray_serve:build_app`, `args: {model: ...}`.

    Raises:
        ImportError, ValueError: See `ray_app`; `model` is missing.
        TypeError: An unknown limit.
    """
    if "model" not in arguments:
        raise ValueError(f"args={arguments}: model is missing, the folder or Hub id of a highway")
    limits = {"limits": Limits(**arguments["limits"])} if "limits" in arguments else {}
    return ray_app(**{**arguments, **limits})


def serve_on_ray(
    settings: ServiceSettings,
    host: str,
    port: int,
    replicas: int,
    drain_seconds: float,
    started: Callable[[int], None],
) -> None:
    """Serve until the process is told to stop, by a signal; then answer what has come in, and return.

    Args:
        settings (`ServiceSettings`), replicas (`int`), drain_seconds (`float`): See `ray_app`.
        host (`str`), port (`int`): Of Ray's proxies, the port 0 for any that is free.
        started (`Callable`): Is told the port once requests are answered.

    Raises:
        ImportError, ValueError: See `ray_app`; the cluster has too few CPUs, or serves another one or elsewhere.
        OSError: The port is taken, there is no such model, or Ray does not start; says why.
    """
    app = ray_app(settings, replicas=replicas, drain_seconds=drain_seconds)
    # here, where what is wrong with it can be said at once; replicas open it again
    settings.app().state.service.served.batcher.close()
    import ray
    from ray import serve

    threads, stopped = settings.threads or 1, threading.Event()
    # Ray gives its proxy five seconds, and kills it where the machine is busy
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    with cluster(replicas * threads) as own:
        check_cpus("replicas", replicas, threads)
        is_first = not serve.status().proxies
        if not is_first:
            _check_proxy(host, port)
        elif own or not port:
            with socket.create_server((host, port)) as free:
                port = free.getsockname()[1]
        handlers = dict[signal.Signals, Any]()
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(app, name=APPLICATION)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                handlers[number] = signal.signal(number, lambda number, frame: stopped.set())
            started(port)
            stopped.wait()
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise OSError(f"Ray does not start the service: {error}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            _end(drain_seconds)
            if is_first and not serve.status().applications:
                serve.shutdown()


def _check_proxy(host: str, port: int) -> None:
    """Raise `ValueError` where Ray Serve, which runs already, has this application or does not listen there."""
    from ray import serve

    if APPLICATION in serve.status().applications:
        raise ValueError(
            f"this Ray cluster serves {APPLICATION!r} already; end its `lgvit serve`, or type `serve shutdown`"
        )
    # all of this machine are meant
    address = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: Ray Serve runs on this cluster, and does not listen there ({error}); "
            "give the address that it was started with, or type `serve shutdown` first"
        ) from error


def _end(drain_seconds: float) -> None:
    """Have replicas answer what they have, while the proxies still pass it on, and end."""
    from ray import serve

    if APPLICATION not in serve.status().applications:
        return  # Ray did not come so far
    until = time.monotonic() + drain_seconds + END_SECONDS
    # it waits a minute, however long requests may take
    with suppress(TimeoutError):
        serve.delete(APPLICATION)
    while APPLICATION in serve.status().applications and time.monotonic() < until:
        time.sleep(0.2)


def _settings_of(model: str | ServiceSettings, settings: dict[str, Any]) -> ServiceSettings:
    known = [field.name for field in fields(ServiceSettings) if field.name != "path"]
    if isinstance(model, ServiceSettings):
        known = []
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"unknown settings {', '.join(unknown)}; known: {', '.join(known) or 'none beside yours'}")
    return model if isinstance(model, ServiceSettings) else ServiceSettings(path=str(model), **settings)


def _of_a_replica(settings: ServiceSettings) -> ServiceSettings:
    """Settings as each replica takes them."""
    if (Path(settings.path) / PART_FILE).is_file() or settings.next is not None:
        raise ValueError(
            f"{settings.path}: a replica holds the whole model; serve parts with lgvit serve --engine local"
        )
    if settings.drift is not None:
        raise ValueError(
            f"--drift {settings.drift} is for one process, which sees all answers; with several replicas keep the "
            "answers and run `lgvit drift`"
        )
    path = Path(settings.path)
    return replace(
        settings,
        path=str(path.resolve()) if path.is_dir() else settings.path,
        ladder=settings.ladder and str(Path(settings.ladder).resolve()),
        threads=settings.threads or 1,
        decoders=settings.decoders or settings.threads or 1,
    )


def _policy_of(user_config: dict[str, Any] | None, settings: ServiceSettings) -> dict[str, Any] | None:
    """The policy that a `user_config` asks for."""
    if user_config is None:
        return settings.policy
    if set(user_config) != {"policy"} or not isinstance(user_config["policy"], dict):
        raise ValueError(
            f"user_config={user_config}: it takes a policy and nothing else, such as "
            "{'policy': {'name': 'confidence', 'threshold': 0.8}}"
        )
    if settings.ladder is not None:
        raise ValueError(f"user_config={user_config}: with --ladder the policy is that of {settings.ladder}")
    return user_config["policy"]


def _service(settings: ServiceSettings) -> Starlette:
    """What a replica runs."""
    # as `HttpServer` does
    sys.setswitchinterval(TURN_SECONDS)
    app = settings.app()
    app.state.settings = settings
    app.router.routes.insert(0, Route("/metrics", _metrics_of_all))
    return app


class _Replica:
    """What Ray calls beside the routes; Ray adds `app`."""

    app: Starlette
    _has_started = False

    def check_health(self) -> None:
        """Raises where nothing computes any more, upon which Ray starts another replica."""
        # Ray asks for the first time after the first `reconfigure`
        self._has_started = True
        if not self.app.state.service.served.batcher.alive:
            raise RuntimeError("no thread computes any more")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Answer by another policy, as the model is opened again; keep the old one where the model cannot have it."""
        state = self.app.state
        try:
            changed = replace(state.settings, policy=_policy_of(user_config, state.settings))
            if changed != state.settings:
                await state.service.renew(changed.highway)
        except (OSError, ValueError) as error:
            # Ray would stop a replica that answers
            if not self._has_started:
                raise
            logger.error("user_config=%s is not in force, the policy before it stays: %s", user_config, error)
            return
        state.settings = changed

    async def metrics(self) -> tuple[str, str]:
        """Its name, and what it has counted."""
        from ray import serve

        return serve.get_replica_context().replica_tag, self.app.state.service.metrics_text


async def _metrics_of_all(request: Request) -> PlainTextResponse:
    from ray import serve

    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        # one that has died meanwhile has nothing to say
        found = await handle.broadcast("metrics").results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
    except TimeoutError:
        return PlainTextResponse("a replica does not answer", 503)
    return PlainTextResponse(merged_metrics(each for each in found if not isinstance(each, Exception)))


def merged_metrics(texts: Iterable[tuple[str, str]]) -> str:
    r"""The counts of several replicas, as Prometheus reads them.

    Args:
        texts (`Iterable`): Of each its name, and what it has counted.

    Example:

        >>> print(merged_metrics([("a", "# TYPE up gauge\nup 1.0\n"), ("b", "# TYPE up gauge\nup 2.0\n")]))
        # HELP up
        # TYPE up gauge
        up{replica="a"} 1.0
        up{replica="b"} 2.0
    """
    families: dict[str, Metric] = {}
    for name, text in texts:
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={**sample.labels, "replica": name}))
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry).decode()


class _Families(Collector):
    """Counts that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        return iter(self._families)
