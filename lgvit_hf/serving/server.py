"""The HTTP service of a part or of a whole highway: /predict, /continue, /health and /metrics."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import logging
import reprlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from pydantic import BaseModel, Field, StrictStr, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .batching import Batcher, Busy
from .device.info import SCHEMA
from .device.loop import Arrays, probabilities
from .device.message import CONTENT_TYPE, MessageError, pack, unpack
from .device.remote import MESSAGE_SAMPLES, TIMEOUT_HEADER, RemoteHighway
from .device.rgb import read_image

logger = logging.getLogger(__name__)
# a second series for each counter, which nothing reads
disable_created_metrics()  # type: ignore[no-untyped-call]  # has no types

PATHS = ("/predict", "/continue", "/health", "/metrics")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BODY_TIMEOUT = 30.0
# of glibc, whose heap keeps what it once held: gives free memory back to the system
_trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Refused(HTTPException):
    """A request that is not answered; says why."""


class Images(BaseModel):
    """JSON at `/predict`: what image files hold, in base64; `{"image": ...}` stands for one."""

    images: list[StrictStr] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _one(cls, said: Any) -> Any:
        return {"images": [said["image"]], **said} if isinstance(said, dict) and "image" in said else said

    @classmethod
    def decoded(cls, body: bytes, most: int) -> list[bytes]:
        """The files in a body.

        Raises:
            Refused: It is not such JSON, or holds more than `most`.
        """
        try:
            images = cls.model_validate_json(body).images
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            found = f"{'.'.join(map(str, first['loc'])) or 'the body'}={reprlib.repr(first['input'])}: {first['msg']}"
            raise Refused(400, f'{found}; send {{"image": BASE64}} or {{"images": [BASE64, ...]}}') from None
        if len(images) > most:
            raise Refused(413, f"{len(images)} images, but at most {most} are taken at once")
        try:
            return [base64.b64decode(image, validate=True) for image in images]
        except ValueError as error:
            raise Refused(400, f"not base64: {error}") from error


def make_app(
    highway: RemoteHighway,
    *,
    max_batch_size: int = 32,
    max_wait: float = 0.002,
    max_body: int = 32 * 1024 * 1024,
    max_request_samples: int = MESSAGE_SAMPLES,
) -> FastAPI:
    """The service around a highway.

    `POST /predict` takes, of a first part or a whole highway, an image file, JSON with base64 `image` or `images`, or
    a safetensors message with `pixel_values`; the answer is JSON, or a message where the request accepts one. `POST
    /continue` takes and gives the messages of parts after the first. A bad request gets a status of 400 to 499 and a
    reason.

    Args:
        highway (`RemoteHighway`): What answers.
        max_batch_size (`int`, *optional*, defaults to 32), max_wait (`float`, *optional*, defaults to 0.002):
            Of the batches that requests share, samples and seconds.
        max_body (`int`, *optional*, defaults to 32 MiB): Bytes of a request.
        max_request_samples (`int`, *optional*, defaults to 256): Samples of a request.
    """
    metrics = Metrics()
    batcher = Batcher(highway, max_samples=max_batch_size, max_wait=max_wait)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="lgvit serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    info = highway.info

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        reason = error.detail
        if not isinstance(error, Refused):
            reason += f": {request.method} {request.url.path[:100]}; there is {', '.join(PATHS)}"
        return JSONResponse({"error": reason}, error.status_code, error.headers)

    @app.exception_handler(MessageError)
    async def refuse_message(request: Request, error: MessageError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(Busy)
    async def refuse_now(request: Request, error: Busy) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 503, {"retry-after": "1"})

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        start = time.perf_counter()
        try:
            response: Response = await call_next(request)
        except Exception:
            # a fault of ours: what it was stands in the log, not in the answer
            logger.exception("%s %s failed", request.method, request.url.path[:100])
            response = JSONResponse({"error": "the service failed; its log says how"}, 500)
        metrics.request(request.url.path, response.status_code, time.perf_counter() - start)
        return response

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        if info.index > 0:
            raise Refused(400, f"this is part {info.index}, which takes states at /continue; images go to part 0")
        body = await _body(request, max_body)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        inputs = await asyncio.to_thread(_inputs, highway, body, kind, max_request_samples)
        answers = await _answers(batcher, inputs, _timeout(request), metrics)
        wrong = ~np.isfinite(answers["logits"]).all(-1)
        if wrong.any():
            raise Refused(422, f"sample {int(wrong.argmax())}: the model's logits for it are not finite")
        if CONTENT_TYPE in request.headers.get("accept", ""):
            return _message(highway, answers)
        return JSONResponse({"answers": _as_json(highway, answers)})

    @app.post("/continue")
    async def go_on(request: Request) -> Response:
        if info.index == 0:
            raise Refused(400, "this is the first part: images go to /predict")
        body = await _body(request, max_body)
        inputs = await asyncio.to_thread(unpack, body, info.takes, info.words, max_samples=max_request_samples)
        return _message(highway, await _answers(batcher, inputs, _timeout(request), metrics))

    @app.get("/health")
    async def health() -> JSONResponse:
        said = {
            "status": "ok" if batcher.alive else "no thread computes any more: start the service again",
            "schema": SCHEMA,
            "part": info.index,
            **{name: getattr(info, name) for name in ("model", "parts", "format", "takes", "labels", "policy")},
            "next": highway.hop and highway.hop.url,
        }
        return JSONResponse(said, 200 if batcher.alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text({**highway.counts, "batches": batcher.batches}))

    return app


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request, if it is no longer than it may be."""
    try:
        body, size = await asyncio.wait_for(_received(request, limit), BODY_TIMEOUT)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_TIMEOUT:g} s") from None
    except ClientDisconnect:
        if _trim_heap is not None:
            _trim_heap(0)
        raise Refused(400, "the body was not sent to its end") from None
    if size > limit:
        raise Refused(413, f"the body has more than {limit} bytes")
    if not size:
        raise Refused(400, "the body is empty")
    return body


async def _received(request: Request, limit: int) -> tuple[bytes, int]:
    # one large piece of memory goes back to the system when it is freed; thousands of small ones do not
    size, body = 0, bytearray()
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                body += chunk
            else:
                # read on, within bounds, without keeping anything: a client that is still sending can read the answer
                body.clear()
                if size > 4 * limit:
                    break
        return bytes(body), size
    finally:
        # the error of an upload that was broken off holds this frame, and with it all that had come
        body.clear()


def _timeout(request: Request) -> float | None:
    """Seconds that the sender allows for the next part."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise Refused(400, f"{TIMEOUT_HEADER}: {given[:40]!r} is no number of seconds")
    return seconds


def _inputs(highway: RemoteHighway, body: bytes, kind: str, max_samples: int) -> Arrays:
    """Pixels, from whatever a request to `/predict` holds."""
    if kind == CONTENT_TYPE:
        return unpack(body, highway.info.takes, max_samples=max_samples)
    if kind.startswith("multipart/"):
        raise Refused(400, "no forms are taken: the image file is the body itself (curl --data-binary @FILE)")
    images = Images.decoded(body, max_samples) if kind == "application/json" else [body]
    pixels = []
    for number, image in enumerate(images):
        try:
            pixels.append(highway.part.pixels(read_image(image)))
        # also where a checkpoint has no image processor
        except (ValueError, OSError) as error:
            raise Refused(400, f"image {number}: {error}") from error
    return {"pixel_values": np.stack(pixels)}


async def _answers(batcher: Batcher, inputs: Arrays, timeout: float | None, metrics: Metrics) -> Arrays:
    answers: Arrays = await asyncio.wrap_future(batcher.submit(inputs, timeout))
    metrics.answered(answers)
    return answers


def _as_json(highway: RemoteHighway, answers: Arrays) -> list[dict[str, Any]]:
    labels, probs = answers["logits"].argmax(-1), probabilities(highway.info, answers)
    return [
        {
            "label": highway.info.labels[label],
            "probability": round(float(probs[number, label]), 6),
            "exit_index": int(answers["exit_index"][number]),
            "exit_layer": int(answers["exit_layer"][number]),
            "exit_score": float(answers["exit_score"][number]),
            "degraded": bool(answers["degraded"][number]),
        }
        for number, label in enumerate(labels.tolist())
    ]


def _message(highway: RemoteHighway, answers: Arrays) -> Response:
    words = {"schema": str(SCHEMA), "model": highway.info.model}
    return Response(pack({name: answers[name] for name in highway.info.answers}, words), media_type=CONTENT_TYPE)


class Metrics:
    """Counts of one service, as Prometheus reads them."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter("lgvit_requests", "requests answered", ["path", "status"], registry=own)
        said = "samples by the blocks run before their answer, here or further on"
        self._exits = Counter("lgvit_exits", said, ["exit_layer"], registry=own)
        self._degraded = Counter("lgvit_answers_degraded", "answers for want of a next part", registry=own)
        self._seconds = Histogram("lgvit_request_seconds", "seconds until an answer", buckets=SECONDS, registry=own)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered with a status."""
        self._requests.labels(path if path in PATHS else "other", status).inc()
        if path in ("/predict", "/continue"):
            self._seconds.observe(seconds)

    def answered(self, answers: Arrays) -> None:
        """Count where samples exited."""
        for exit_layer in answers["exit_layer"].tolist():
            self._exits.labels(exit_layer).inc()
        self._degraded.inc(int(answers["degraded"].sum()))

    def text(self, others: dict[str, int]) -> str:
        """All counts, and others by name."""
        registry = CollectorRegistry()
        for name, number in others.items():
            Counter(f"lgvit_{name}", name.replace("_", " "), registry=registry).inc(number)
        return (generate_latest(self._registry) + generate_latest(registry)).decode()
