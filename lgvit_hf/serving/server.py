"""The HTTP service of a part or of a whole highway: /predict, /continue, KServe's /v2, health and metrics."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import kserve
from .admission import RETRY, Admission, EarlyAnswer, Gone, Limits, Refused, watched
from .batching import Busy, Expired
from .certified import MARKS, Certified
from .decoding import Decoder, Resize, Undecodable, check_json
from .device.info import SCHEMA
from .device.loop import Arrays, probabilities
from .device.message import CONTENT_TYPE, MessageError, pack, unpack
from .device.remote import MESSAGE_SAMPLES, TIMEOUT_HEADER, RemoteHighway
from .model_version import Served
from .prometheus import PATHS, Metrics
from .retries import ID_HEADER, Retries
from .scheduling import Scheduling
from .tracing import span

logger = logging.getLogger(__name__)

# smaller work is done at once: to hand it to a thread takes longer
SMALL_BYTES = 1 << 18


def make_app(
    highway: RemoteHighway,
    *,
    max_batch_size: int = 32,
    max_wait: float = 0.002,
    max_request_samples: int = MESSAGE_SAMPLES,
    limits: Limits | None = None,
    workers: int | None = None,
    reopen: Callable[[], RemoteHighway] | None = None,
    scheduler: str | None = "batch",
    max_run_ms: float | None = None,
    certified: Certified | None = None,
) -> Starlette:
    """The service around a highway.

    `POST /predict` takes, of a first part or a whole highway, an image file, JSON with base64 `image` or `images`, or
    a safetensors message with `pixel_values`; the answer is JSON, or a message where the request accepts one. `POST
    /continue` takes and gives the messages of parts after the first. A bad request gets a status of 400 to 499 and a
    reason; one that cannot be answered now 503.

    Args:
        highway (`RemoteHighway`): What answers.
        max_batch_size (`int`, *optional*, defaults to 32), max_wait (`float`, *optional*, defaults to 0.002):
            Of the batches that requests share, samples and seconds.
        max_request_samples (`int`, *optional*, defaults to 256): Samples of a request.
        limits (`Limits`, *optional*): Of connections and bodies.
        workers (`int`, *optional*): Processes that decode images, in each of two lanes; by default one a core.
        reopen (`Callable`, *optional*): Opens the model again, for `Service.reload`.
        scheduler (`str`, *optional*, defaults to `"batch"`), max_run_ms (`float`, *optional*): See `Scheduling`.
        certified (`Certified`, *optional*): Has samples answered by rungs, or looks for drift; of this highway's part.
    """
    limits = limits or Limits()
    scheduling = Scheduling(scheduler, max_batch_size, max_wait, max_run_ms)
    given = limits, workers or _cores(), reopen, certified
    service = Service(highway, scheduling, max_request_samples, *given)

    async def predict(request: Request) -> Response:
        served = service.served
        if served.info.index > 0:
            raise Refused(
                400, f"this is part {served.info.index}, which takes states at /continue; images go to part 0"
            )
        answers = await service.answers(request, served, service.images)
        wrong = ~np.isfinite(answers["logits"]).all(-1)
        if wrong.any():
            raise Refused(422, f"sample {int(wrong.argmax())}: the model's logits for it are not finite")
        if CONTENT_TYPE in request.headers.get("accept", ""):
            return _message(served, answers)
        return JSONResponse({"answers": _as_json(served, answers)})

    async def infer(request: Request) -> Response:
        served = service.served
        kserve.check_model(request, served)
        asked: list[kserve.Asked] = []

        async def inputs_of(request: Request, served: Served, body: bytes) -> Arrays:
            asked.append(await asyncio.to_thread(kserve.read, body, request.headers, served.info, max_request_samples))
            return asked[0].inputs if asked[0].images is None else await service.decoded(served, asked[0].images)

        answers = await service.answers(request, served, inputs_of)
        return kserve.answered(asked[0], served, answers)

    async def model_ready(request: Request) -> JSONResponse:
        kserve.check_model(request, service.served)
        return await ready(request)

    async def server_metadata(request: Request) -> JSONResponse:
        return JSONResponse(kserve.SERVER)

    async def metadata(request: Request) -> JSONResponse:
        kserve.check_model(request, service.served)
        return JSONResponse(kserve.metadata(service.served))

    async def go_on(request: Request) -> Response:
        served = service.served
        if served.info.index == 0:
            raise Refused(400, "this is the first part: images go to /predict")
        return _message(served, await service.answers(request, served, service.states))

    async def health(request: Request) -> JSONResponse:
        served, info = service.served, service.served.info
        said = {
            "status": "ok" if served.batcher.alive else "no thread computes any more: start the service again",
            "schema": SCHEMA,
            "part": info.index,
            **{name: getattr(info, name) for name in ("model", "parts", "format", "takes", "labels", "policy")},
            "next": served.highway.hop and served.highway.hop.url,
            "version": served.version,
            **({} if certified is None else certified.health()),
        }
        return JSONResponse(said, 200 if served.batcher.alive else 503)

    async def live(request: Request) -> JSONResponse:
        return JSONResponse({"live": service.served.batcher.alive}, 200 if service.served.batcher.alive else 503)

    async def ready(request: Request) -> JSONResponse:
        reason = service.not_ready
        return JSONResponse({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)

    async def show_metrics(request: Request) -> PlainTextResponse:
        return PlainTextResponse(service.metrics_text)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # the first to begin and the last to end: what waits at the end is counted too
        async with certified.watching() if certified is not None else nullcontext(), service.running():
            yield

    app = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/continue", go_on, methods=["POST"]),
            Route("/health", health),
            Route("/livez", live),
            Route("/readyz", ready),
            Route("/metrics", show_metrics),
            Route("/v2", server_metadata),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            *(
                Route(f"/v2/models/{{model}}{version}{path}", route, methods=[method])
                for version in ("", "/versions/{version}")
                for path, route, method in (
                    ("", metadata, "GET"),
                    ("/ready", model_ready, "GET"),
                    ("/infer", infer, "POST"),
                )
            ),
        ],
        lifespan=lifespan,
        middleware=[Middleware(_Counted, metrics=service.metrics)],
        exception_handlers={
            HTTPException: _refuse,
            MessageError: _refusing(400),
            Undecodable: _refusing(400),
            Busy: _refusing(503),
            Expired: _refusing(503),
            Gone: _refusing(499),
        },
    )
    app.state.service = service
    return app


class Service:
    """What the routes share: the model that answers, its decoder and its limits. See `make_app`."""

    def __init__(
        self,
        highway: RemoteHighway,
        scheduling: Scheduling,
        max_request_samples: int,
        limits: Limits,
        workers: int,
        reopen: Callable[[], RemoteHighway] | None = None,
        certified: Certified | None = None,
    ):
        self.certified = certified
        self.metrics, self.limits, self.max_samples = Metrics(), limits, max_request_samples
        self.served = Served(highway, scheduling, self.metrics)
        self._reopen, self._scheduling, self._reloading = reopen, scheduling, asyncio.Lock()
        self._retries = Retries()
        self._past: Counter[str] = Counter()
        self.not_ready: str | None = "it is starting"
        self._admission, self._workers, self._decoder = Admission(limits), workers, Decoder(workers)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the service runs; at the end what waits is answered."""
        if self.served.info.index == 0:
            await self._decoder.start()
        self.not_ready = None
        try:
            yield
        finally:
            self._decoder.close()
            await asyncio.to_thread(self.served.batcher.close)

    @property
    def counts(self) -> dict[str, int]:
        """Counters that `Metrics` does not hold itself."""
        total = Counter(self._past)
        total.update(self.served.counts)
        return total

    @property
    def metrics_text(self) -> str:
        """All that is counted, as Prometheus reads it."""
        return self.metrics.text(self.counts) + ("" if self.certified is None else self.certified.metrics())

    async def reload(self) -> bool:
        """As `renew` with the same `reopen`.

        Returns:
            `bool`: Whether it could be opened; if not, the last one goes on, and the log says why.
        """
        if self._reopen is None:
            raise ValueError("reopen=None: give make_app what opens the model again")
        try:
            await self.renew(self._reopen)
        except (OSError, ValueError, RuntimeError) as error:
            logger.error("the model is not opened again, version %d goes on: %s", self.served.version, error)
            return False
        return True

    async def renew(self, reopen: Callable[[], RemoteHighway]) -> None:
        """Open the model again, here and from now on by `reopen`.

        Requests that come from then on get its answers, earlier ones those of the last.

        Raises:
            OSError, ValueError, RuntimeError: It cannot be opened, and the last one goes on.
        """
        async with self._reloading:
            before = self.served
            highway = await asyncio.to_thread(reopen)
            if (highway.info.index, highway.info.parts) != (before.info.index, before.info.parts):
                raise ValueError(f"it is part {highway.info.index} of {highway.info.parts} now")
            served = await asyncio.to_thread(Served, highway, self._scheduling, self.metrics, before.version + 1)
            seen = Counter(before.counts)
            self._past.update(seen)
            self.served, self._reopen = served, reopen
            self.metrics.opened(self.served.version)
            # requests that are still decoded are for the last version
            while before.users:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(before.batcher.close)
            self._past.update(before.counts)
            self._past.subtract(seen)

    def drain(self, seconds: float) -> None:
        """Say that the service is not ready, and after some seconds refuse what has not begun to run."""
        self.not_ready = "it is shutting down"
        asyncio.get_running_loop().call_later(seconds, self.served.batcher.refuse_waiting)

    async def answers(self, request: Request, served: Served, inputs_of: Callable[..., Any]) -> Arrays:
        """The answers to a request, whose inputs `inputs_of(request, served, body)` gives."""
        timeout, asked = _timeout(request), time.monotonic()
        certified = self.certified
        with self._admission.admitted(request), served.used(), span("lgvit.request", request.headers):
            if certified is not None:
                certified.check_queue(served)
            async with self._admission.body(request) as body, watched(request):
                with served.batcher.coming():
                    with span("lgvit.decode"):
                        inputs = await inputs_of(request, served, body)
                    key = await Retries.key(request, served.version, body)
                    del body
                    left = None if timeout is None else timeout - (time.monotonic() - asked)
                    submit = served.submit if certified is None else partial(certified.submit, served)
                    compute = partial(submit, inputs, left)
                    # submitted in this context (without an id), so that a batch that waits for it finds it
                    found = compute() if key is None else self._retries.once(key, compute)
                with span("lgvit.answer"):
                    answers = await found
        self.metrics.answered(answers)
        return answers

    async def images(self, request: Request, served: Served, body: bytes) -> Arrays:
        """Pixels, from whatever a request to `/predict` holds."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == CONTENT_TYPE:
            return await _unpacked(body, served.info.takes, None, self.max_samples)
        if kind.startswith("multipart/"):
            raise Refused(400, "no forms are taken: the image file is the body itself (curl --data-binary @FILE)")
        is_json = kind == "application/json"
        if is_json:
            check_json(body, self.max_samples)
        return await self._decoded(served, body, is_json)

    async def decoded(self, served: Served, files: list[bytes]) -> Arrays:
        """Pixels of what several image files hold."""
        found = [await self._decoded(served, file, False) for file in files]
        return {"pixel_values": np.concatenate([each["pixel_values"] for each in found])}

    async def _decoded(self, served: Served, body: bytes, is_json: bool) -> Arrays:
        if self._decoder.full:
            raise Refused(503, f"{self._decoder.max_waiting} requests wait to be decoded already", RETRY)
        resize = Resize.of(served.info.image)
        arrays = await self._decoder(body, is_json, resize, self.max_samples)
        if sum(array.size for array in arrays) > SMALL_BYTES:
            return await asyncio.to_thread(_pixels, served, arrays)
        return _pixels(served, arrays)

    async def states(self, request: Request, served: Served, body: bytes) -> Arrays:
        """The state in a request to `/continue`."""
        return await _unpacked(body, served.info.takes, served.info.words, self.max_samples)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def _unpacked(body: bytes, takes: Any, words: Any, most: int) -> Arrays:
    if len(body) <= SMALL_BYTES:
        return unpack(body, takes, words, max_samples=most)
    return await asyncio.to_thread(unpack, body, takes, words, max_samples=most)


def _pixels(served: Served, arrays: list[np.ndarray]) -> Arrays:
    """What the model takes, of images that were decoded."""
    try:
        return {"pixel_values": served.pixels(arrays)}
    except ValueError as error:
        raise Refused(400, str(error)) from error


def _timeout(request: Request) -> float | None:
    """Seconds that the sender allows."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 3600:
        raise Refused(400, f"{TIMEOUT_HEADER}: {given[:40]!r} is no number of seconds")
    return seconds


def _as_json(served: Served, answers: Arrays) -> list[dict[str, Any]]:
    labels, probs = answers["logits"].argmax(-1), probabilities(served.info, answers)
    return [
        {
            "label": served.info.labels[label],
            "probability": round(float(probs[number, label]), 6),
            "exit_index": int(answers["exit_index"][number]),
            "exit_layer": int(answers["exit_layer"][number]),
            "exit_score": float(answers["exit_score"][number]),
            "degraded": bool(answers["degraded"][number]),
            **{name: kind(answers[name][number]) for name, kind in MARKS.items() if name in answers},
        }
        for number, label in enumerate(labels.tolist())
    ]


def _message(served: Served, answers: Arrays) -> Response:
    words = {"schema": str(SCHEMA), "model": served.info.model}
    return Response(pack({name: answers[name] for name in served.info.answers}, words), media_type=CONTENT_TYPE)


# -- errors and counts -------------------------------------------------------------------------------------------


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = error.detail
    if not isinstance(error, Refused):
        reason += f": {request.method} {request.url.path[:100]}; there is {', '.join(PATHS)}"
    elif error.pace is not None:
        return EarlyAnswer({"error": reason}, error.status_code, error.headers, error.pace)
    return JSONResponse({"error": reason}, error.status_code, error.headers)


def _refusing(status: int) -> Callable[[Request, Exception], Any]:
    async def refuse(request: Request, error: Exception) -> Response:
        code = getattr(error, "status", status)
        return JSONResponse({"error": str(error)}, code, RETRY if code == 503 else None)

    return refuse


class _Counted:
    """Counts requests, and answers 500 where the service failed: what it was stands in the log, not in the answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # whoever sent an id finds it in the answer
                name = ID_HEADER.encode()
                given = [value for key, value in scope["headers"] if key == name]
                message["headers"] = [*message.get("headers", []), *((name, value) for value in given[:1])]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"][:100])
            if not status:
                await JSONResponse({"error": "the service failed; its log says how"}, 500)(scope, receive, sent)
        self._metrics.request(scope["path"], status, time.perf_counter() - start)
