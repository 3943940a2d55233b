"""`Decoder`: image files become pixels in worker processes that can be killed; a file harms its own request alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import reprlib
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, StrictStr, ValidationError, model_validator

from .device.pixels import PixelSettings
from .device.rgb import MAX_PIXELS, MAX_SCANNED, TooLarge, as_rgb, read_image

# of one request; what takes more in the quick lane goes to the other; pixels of a JPEG count once for each scan there
QUICK_PIXELS, QUICK_BYTES, QUICK_SECONDS = 4_000_000, 4_000_000, 1.0
PIXELS, SECONDS = 2 * MAX_PIXELS, 10.0
# of a worker: 50 million pixels of 16 bits take 1.3 GB on their way to 8
WORKER_BYTES = 2 << 30
# seconds in which a worker may finish for a client that has left: most images take less than a new process
GRACE = 0.25
# `,` `{` and `[` in a body beside those between its images, which have none
JSON_MARKS = 64
# until a new process answers
START_SECONDS = 60.0
# of a message that is written at a time
PIECE_BYTES = 1 << 18
_SIZES = struct.Struct("<QQ")
# of a worker: words and pixels
Answer = tuple[dict[str, Any], memoryview]


class Undecodable(ValueError):
    """What a request holds is no images, or more than is taken; `status` is that of the answer."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


class Resize(NamedTuple):
    """How a worker makes an image small: a height, a width, pillow's filter, 1 or 3 channels."""

    height: int
    width: int
    resample: int
    channels: int

    @classmethod
    def of(cls, settings: PixelSettings | None) -> Resize | None:
        """From a part's description; nothing where only its image processor knows."""
        if settings is None:
            return None
        height, width = settings["size"]
        return cls(height, width, settings["resample"], settings["channels"])


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
            Undecodable: It is not such JSON, or holds more than `most`.
        """
        try:
            images = cls.model_validate_json(body).images
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            found = f"{'.'.join(map(str, first['loc'])) or 'the body'}={reprlib.repr(first['input'])}: {first['msg']}"
            raise Undecodable(f'{found}; send {{"image": BASE64}} or {{"images": [BASE64, ...]}}') from None
        if len(images) > most:
            raise Undecodable(f"{len(images)} images, but at most {most} are taken at once", 413)
        try:
            return [base64.b64decode(image, validate=True) for image in images]
        except ValueError as error:
            raise Undecodable(f"not base64: {error}") from error


def check_json(body: bytes, most: int) -> None:
    """Raise `Undecodable` for JSON of more values than `most` images can be, before any of them is made."""
    marks = sum(map(body.count, (b",", b"{", b"[")))
    if marks > most + JSON_MARKS:
        raise Undecodable(
            f"JSON of more than {most + JSON_MARKS} values; at most {most} images are taken at once", 413
        )


def decode(files: list[bytes], resize: Resize | None, budget: int, max_scanned: int) -> list[np.ndarray]:
    """Image files as `[H, W, C]` or `[H, W]` uint8, of the size that the model takes where `resize` says so.

    Raises:
        Undecodable: One of them cannot be read, all have more pixels than `budget`, or one more than `max_scanned` in
            all of its scans; says which.
    """
    arrays = []
    for number, file in enumerate(files):
        try:
            image = read_image(file, budget, max_scanned)
        except ValueError as error:
            raise Undecodable(f"image {number}: {error}", 413 if isinstance(error, TooLarge) else 400) from error
        budget -= image.width * image.height
        if resize is not None:
            image = as_rgb(image, resize.channels).resize((resize.width, resize.height), resize.resample)
        arrays.append(np.asarray(image))
    return arrays


class Decoder:
    """Workers in two lanes: small requests never wait for large ones.

    Every request is tried in the quick lane. What has more pixels or scans, or takes longer, than is quick goes to the
    other, whose workers have a lower priority. A worker that exceeds its time or memory is killed, and another takes
    its place.

    Args:
        workers (`int`): In each of the lanes.
        max_waiting (`int`, *optional*, defaults to 1024): Requests that may wait in a lane.
    """

    def __init__(self, workers: int, max_waiting: int = 1024):
        self._quick = _Lane(workers, QUICK_SECONDS, 0)
        self._slow = _Lane(workers, SECONDS, 10)
        self.max_waiting = max_waiting

    @property
    def full(self) -> bool:
        """Whether as many requests wait as may; large images that wait keep out no small ones."""
        return self._quick.waiting >= self.max_waiting

    async def start(self) -> None:
        """Start the workers and wait until they can be used."""
        await asyncio.gather(self._quick.start(), self._slow.start())

    def close(self) -> None:
        """End all workers."""
        self._quick.close()
        self._slow.close()

    async def __call__(self, body: bytes, is_json: bool, resize: Resize | None, most: int) -> list[np.ndarray]:
        """The images of a request, as `decode` gives them.

        Args:
            body (`bytes`): An image file, or JSON as `Images` says.
            is_json (`bool`): Which of them.
            resize (`Resize`, *optional*): To what size.
            most (`int`): Images that are taken.

        Raises:
            Undecodable: It is none, is damaged, or takes too much time or memory; too many large ones wait (503).
        """
        words = {"json": is_json, "resize": resize, "most": most, "pixels": QUICK_PIXELS, "scanned": QUICK_PIXELS}
        if len(body) <= QUICK_BYTES:
            with contextlib.suppress(_WorkerLost):
                said, data = await self._quick.ask(words, body)
                if said.get("status") != 413:
                    return _arrays(said, data)
        if self._slow.waiting >= self.max_waiting:
            raise Undecodable(f"{self._slow.waiting} large images wait to be decoded already", 503)
        try:
            said, data = await self._slow.ask({**words, "pixels": PIXELS, "scanned": MAX_SCANNED}, body)
        except _WorkerLost as error:
            raise Undecodable(f"no readable image: {error}", 413) from error
        return _arrays(said, data)


class _WorkerLost(Exception):
    """A worker ended before it answered; says why."""


class _Worker(asyncio.Protocol):
    """One process, and the connection on which it is asked one request at a time.

    Args:
        niceness (`int`): Of the process.
        ended (`Callable`): Is told when it is free again (`True`) or gone (`False`).
    """

    def __init__(self, niceness: int, ended: Callable[[_Worker, bool], None]):
        self._ended, self._late, self._received = ended, False, bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._socket, theirs = socket.socketpair()
        self._process = _context().Process(target=_work, args=(theirs, niceness), daemon=True)
        self._process.start()
        theirs.close()

    async def connect(self) -> None:
        """Before it is asked."""
        loop, is_unix = asyncio.get_running_loop(), self._socket.family != socket.AF_INET
        connect = loop.create_unix_connection if is_unix else loop.create_connection
        self._transport, _ = await connect(lambda: self, sock=self._socket)

    async def ask(self, words: dict[str, Any], data: bytes, seconds: float) -> Answer:
        """What it answers; who no longer waits for it lets it finish, if that does not take long."""
        assert self._transport is not None  # is connected
        answer, sent = asyncio.get_running_loop().create_future(), False
        self._answer = answer
        self._kill_in(seconds)
        try:
            for piece in _message(words, data):
                for start in range(0, len(piece), PIECE_BYTES):
                    self._transport.write(piece[start : start + PIECE_BYTES])
                    await self._writable.wait()
            sent = True
            found: Answer = await answer
            return found
        except asyncio.CancelledError:
            if self._answer is answer:
                self._kill_in(GRACE if sent else 0.0)
            raise

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        if self._transport is None:
            self._socket.close()
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._received += data
        if len(self._received) < _SIZES.size:
            return
        length, size = _SIZES.unpack_from(self._received)
        end = _SIZES.size + length
        if len(self._received) >= end + size and self._answer is not None:
            found = json.loads(self._received[_SIZES.size : end]), memoryview(self._received)[end:]
            answer, self._answer, self._received = self._answer, None, bytearray()
            self._stop_timer()
            if not answer.done():
                answer.set_result(found)
            self._ended(self, True)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._process.kill()
        self._stop_timer()
        self._writable.set()
        if self._answer is not None and not self._answer.done():
            reason = "took too long" if self._late else "ended the process that decoded it"
            self._answer.set_exception(_WorkerLost(f"it {reason}"))
        self._ended(self, False)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._writable.set()

    def _kill_in(self, seconds: float) -> None:
        """Unless it is free by then."""
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._is_late)

    def _is_late(self) -> None:
        self._late = True
        self._process.kill()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Lane:
    """Workers that are asked one request at a time each."""

    def __init__(self, workers: int, seconds: float, niceness: int):
        self.waiting = 0
        self._workers, self._seconds, self._niceness = workers, seconds, niceness
        self._free = asyncio.Semaphore(workers)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    async def start(self) -> None:
        await asyncio.gather(*(self.ask({}, b"") for _ in range(self._workers)))

    def close(self) -> None:
        for worker in list(self._all):
            worker.close()

    async def ask(self, words: dict[str, Any], data: bytes) -> Answer:
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        worker = self._idle.pop() if self._idle else await self._started()
        # the first request finds a process that is still starting
        return await worker.ask(words, data, self._seconds if words else START_SECONDS)

    async def _started(self) -> _Worker:
        worker = None
        try:
            worker = _Worker(self._niceness, self._ended)
            self._all.add(worker)
            await worker.connect()
            return worker
        except BaseException:
            if worker is not None:
                self._all.discard(worker)
                worker.close()
            self._free.release()
            raise

    def _ended(self, worker: _Worker, free: bool) -> None:
        was_idle = worker in self._idle
        if free:
            self._idle.append(worker)
        else:
            self._all.discard(worker)
            if was_idle:
                self._idle.remove(worker)
        if not was_idle:
            self._free.release()


def _context() -> Any:
    """Processes that take milliseconds to start: forked from one that has imported this file and nothing else."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _message(words: dict[str, Any], data: bytes) -> list[memoryview]:
    text = json.dumps(words).encode()
    head = _SIZES.pack(len(text), len(data)) + text
    return [memoryview(head + data)] if len(data) < 1 << 16 else [memoryview(head), memoryview(data)]


def _arrays(said: dict[str, Any], data: memoryview) -> list[np.ndarray]:
    """What a worker's answer holds; it is believed no more than a client."""
    if "error" in said:
        raise Undecodable(said["error"], said["status"])
    flat, arrays, start = np.frombuffer(data, np.uint8), [], 0
    for shape in said["shapes"]:
        size = int(np.prod(shape))
        arrays.append(flat[start : start + size].reshape(shape))
        start += size
    return arrays


# -- in a worker -------------------------------------------------------------------------------------------------


def _work(connection: socket.socket, niceness: int) -> None:
    """Answer requests until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends its workers
    if sys.platform != "win32":
        import resource

        os.nice(niceness)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (WORKER_BYTES, WORKER_BYTES))
    with connection, connection.makefile("rb") as stream:
        while head := stream.read(_SIZES.size):
            length, size = _SIZES.unpack(head)
            words, data = json.loads(stream.read(length)), stream.read(size)
            said, arrays = _answered(words, data) if words else ({}, [])
            for piece in _message(said, b"".join(array.tobytes() for array in arrays)):
                connection.sendall(piece)


def _answered(words: dict[str, Any], body: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    resize = words["resize"] and Resize(*words["resize"])
    try:
        files = Images.decoded(body, words["most"]) if words["json"] else [body]
        arrays = decode(files, resize, words["pixels"], words["scanned"])
    except MemoryError:
        return {"error": "no readable image: it takes too much memory", "status": 413}, []
    except Undecodable as error:
        return {"error": str(error), "status": error.status}, []
    return {"shapes": [array.shape for array in arrays]}, arrays
