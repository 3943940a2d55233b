"""`RemoteHighway`: a part here, the next at a URL; samples that get no answer there are answered here, and marked."""

from __future__ import annotations

import http.client
import io
import json
import logging
import queue
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from .info import MEMORY, SCHEMA
from .loop import Arrays, Runs
from .message import CONTENT_TYPE, MessageError, pack, unpack

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-lgvit-timeout"
STATE_DTYPES = ("float32", "float16")
REPLY_LIMIT = 1 << 26
# the largest number of float16
HALF_MAX = 65504.0
# of the time that is left: what the next hop is given, so that its own fallback is back in time
SHARE = 0.8
# what one message to the next part holds at most, well within what a service takes
MESSAGE_SAMPLES = 256
MESSAGE_BYTES = 1 << 24


class NextPartGone(ConnectionError):
    """The next part did not answer."""


class Hop:
    """The way to the service that runs the next part: one message there, one back.

    A message that could not be delivered is sent again, `retries` times, after `backoff` seconds and twice as long
    each time; one that was not answered in time is not. After a failure the service is left alone for `cooldown`
    seconds; then one message tries it, and the others follow when that was answered. It is no failure of the service
    that it refused a message, or did not answer in less than half of `timeout` to one whose sender had no more.

    Args:
        url (`str`): Such as `http://edge:8000`.
        timeout (`float`, *optional*, defaults to 5): Seconds for all attempts together, at most 3600.
        retries (`int`, *optional*, defaults to 2), backoff (`float`, *optional*, defaults to 0.05):
            See above.
        cooldown (`float`, *optional*, defaults to 1): Seconds.

    Raises:
        ValueError: The URL is none, or a number is out of its range.
    """

    def __init__(
        self, url: str, *, timeout: float = 5.0, retries: int = 2, backoff: float = 0.05, cooldown: float = 1.0
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"next: {url!r} must be a URL such as http://edge:8000")
        if not 0 < timeout <= 3600 or not all(number >= 0 for number in (retries, backoff, cooldown)):
            raise ValueError(
                f"{timeout=}, {retries=}, {backoff=}, {cooldown=}: numbers of at least 0; timeout more, up to 3600"
            )
        self.url, self.timeout, self.retries, self.backoff, self.cooldown = url, timeout, retries, backoff, cooldown
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection, self._path = partial(kind, parts.hostname, parts.port), parts.path.rstrip("/")
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        self._lock, self._gone, self._rest_until = threading.Lock(), False, 0.0

    def post(self, path: str, body: bytes, timeout: float | None = None) -> bytes:
        """Send a message and return the answer.

        Args:
            path (`str`): Such as `/continue`.
            body (`bytes`): The message.
            timeout (`float`, *optional*): Seconds, if less than the hop's own.

        Raises:
            NextPartGone: There is no answer; says why.
        """
        limit = self.timeout if timeout is None else min(self.timeout, timeout)
        patient = limit >= self.timeout / 2
        deadline = self._begin(limit, patient) + limit
        reason, gone = "no answer in time", patient
        for attempt in range(self.retries + 1):
            try:
                status, reply = self._exchange("POST", path, body, deadline)
            except TimeoutError:
                break
            except (OSError, http.client.HTTPException) as error:
                reason, gone = str(error) or type(error).__name__, True
            else:
                reason, gone = f"status {status}: {reply[:300].decode(errors='replace')}", status >= 500
                if not gone:
                    self._end(gone=False)
                    if status == 200:
                        return reply
                    break
            pause = self.backoff * 2**attempt * random.uniform(0.5, 1.5)
            if attempt < self.retries:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        if gone:
            self._end(gone=True)
        logger.warning("samples are answered here, for the next part does not: %s: %s", self.url, reason)
        raise NextPartGone(f"{self.url}: {reason}")

    def _begin(self, limit: float, patient: bool) -> float:
        """The time. After a failure one patient message tries the service, while no other waits for it."""
        with self._lock:
            now = time.monotonic()
            if now < self._rest_until:
                raise NextPartGone(f"{self.url} failed less than {self.cooldown:g} s ago, or is being tried again")
            if self._gone and patient:
                self._rest_until = now + limit
            return now

    def _end(self, *, gone: bool) -> None:
        with self._lock:
            self._gone, self._rest_until = gone, time.monotonic() + self.cooldown if gone else 0.0

    def health(self) -> dict[str, Any]:
        """What the service says of itself.

        Raises:
            NextPartGone: There is none.
        """
        try:
            status, reply = self._exchange("GET", "/health", None, time.monotonic() + self.timeout)
            said = json.loads(reply) if status == 200 else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NextPartGone(f"{self.url}: {error}") from error
        if not isinstance(said, dict):
            raise NextPartGone(f"{self.url}: no such service there (status {status})")
        return said

    def _exchange(self, method: str, path: str, body: bytes | None, deadline: float) -> tuple[int, bytes]:
        """One request; on a connection that is still open, and if that was closed meanwhile, on a new one."""
        while True:
            try:
                connection, fresh = self._idle.get_nowait(), False
            except queue.Empty:
                connection, fresh = self._connection(), True
            try:
                connection.timeout = _left(deadline)
                if connection.sock is None:
                    connection.connect()
                left = _left(deadline)
                connection.sock.settimeout(left)
                headers = {"content-type": CONTENT_TYPE, TIMEOUT_HEADER: f"{SHARE * left:g}"}
                connection.request(method, self._path + path, body, headers)
                connection.response_class = partial(_response, deadline)  # type: ignore[assignment]  # called, never derived from
                response = connection.getresponse()
                status, reply = response.status, response.read(REPLY_LIMIT)
                if response.read(1):
                    raise http.client.HTTPException(f"an answer of more than {REPLY_LIMIT} bytes")
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if fresh or isinstance(error, TimeoutError):
                    raise
            else:
                self._idle.put(connection)
                return status, reply


class _Until(io.RawIOBase):
    """What a socket receives until a deadline: each read has the time that is left, not all of it again."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._sock, self._raw, self._deadline = sock, sock.makefile("rb", buffering=0), deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _response(deadline: float, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
    # all it takes of a socket is `makefile`
    return http.client.HTTPResponse(_Until(sock, deadline), **options)  # type: ignore[arg-type]


def _left(deadline: float) -> float:
    """Seconds until a deadline; `TimeoutError` after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class RemoteHighway:
    """A split highway as one: samples that do not exit in the part here are sent to the next.

    Called with a batch as the part takes it, it gives `logits`, `exit_index`, `exit_layer`, `exit_score` and
    `degraded` of every sample. A sample is degraded when it should have gone deeper but no part there answered: its
    answer is then that of the deepest exit that was evaluated. As soon as the next part is back, it is used again.

    Args:
        part (`Part` or another that runs one): What runs here.
        next_url (`str`, *optional*): Of the service that runs the next part.
        state_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float16"` halves what is sent. A state whose numbers are too large for it is sent as float32.
        hop (`dict`, *optional*): `timeout`, `retries`, `backoff`, `cooldown`: see `Hop`.

    Raises:
        ValueError: `state_dtype` is none of the two; the part is the last and has no next.
    """

    def __init__(self, part: Runs, next_url: str | None = None, *, state_dtype: str = "float32", **hop: Any):
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype={state_dtype!r} is none of {', '.join(STATE_DTYPES)}")
        if next_url is not None and not part.info.gives:
            raise ValueError(f"next={next_url!r}: this is the last part; no part comes after it")
        self.part, self.info, self.state_dtype = part, part.info, state_dtype
        self.hop = None if next_url is None else Hop(next_url, **hop)
        self.counts = Counter(sent_rows=0, sent_bytes=0, next_failures=0, degraded_rows=0)
        self._lock = threading.Lock()

    def __call__(self, inputs: Arrays, timeout: float | None = None) -> Arrays:
        """Answer a batch, as the class says."""
        return self.finish(*self.part(inputs), timeout=timeout)

    def check_next(self) -> str | None:
        """What is wrong with the next part, if anything: that it cannot be reached is, too.

        Raises:
            ValueError: It is there, but does not fit this one.
        """
        if self.hop is None:
            return None
        try:
            said = self.hop.health()
        except NextPartGone as error:
            return str(error)
        wanted = {"model": self.info.model, "part": self.info.index + 1, "schema": SCHEMA}
        for name, value in wanted.items():
            if said.get(name) != value:
                raise ValueError(f"{self.hop.url} serves {name}={said.get(name)!r}, but {name}={value!r} comes next")
        return None

    def finish(self, answers: Arrays, samples: np.ndarray, state: Arrays, timeout: float | None = None) -> Arrays:
        """The answers of a part, those of `samples` replaced by the next part's where it gives any."""
        answers = {**answers, "degraded": np.zeros(len(answers["logits"]), np.uint8)}
        if not len(samples):
            return answers
        until = None if timeout is None else time.monotonic() + timeout
        # which samples share a message must not decide how one of them is answered: those whose state is not finite
        # are not sent, and end as in the whole model; those that float16 cannot hold travel apart
        finite = _each_sample(state, lambda name, array: np.isfinite(array))
        answers["logits"] = answers["logits"].copy()
        answers["logits"][samples[~finite]] = np.nan
        halves = _each_sample(state, _fits_half)
        size = sum(array.nbytes for array in state.values())
        step = max(1, min(MESSAGE_SAMPLES, MESSAGE_BYTES * len(samples) // max(1, size)))
        for group in (np.flatnonzero(finite & halves), np.flatnonzero(finite & ~halves)):
            for some in (group[start : start + step] for start in range(0, len(group), step)):
                left = None if until is None else until - time.monotonic()
                self._continue(answers, samples[some], {name: array[some] for name, array in state.items()}, left)
        return answers

    def _continue(self, answers: Arrays, samples: np.ndarray, state: Arrays, timeout: float | None) -> None:
        """Replace the answers of `samples` by the next part's, or mark them as degraded."""
        try:
            deeper = self._ask(state, timeout)
        except NextPartGone:
            answers["degraded"][samples] = 1
            self._count(degraded_rows=len(samples), next_failures=int(self.hop is not None))
            return
        for name, array in deeper.items():
            answers[name][samples] = array

    def _ask(self, state: Arrays, timeout: float | None) -> Arrays:
        if self.hop is None:
            raise NextPartGone("there is no next part")
        body, samples = self.message(state), len(next(iter(state.values())))
        reply = self.hop.post("/continue", body, timeout)
        try:
            words = {"schema": str(SCHEMA), "model": self.info.model}
            deeper = unpack(reply, self.info.answers, words, finite=False)
            if len(deeper["logits"]) != samples:
                raise MessageError(f"{len(deeper['logits'])} answers to {samples} samples")
            self._check_answers(deeper)
        except MessageError as error:
            logger.warning("the answer of %s is not taken: %s", self.hop.url, error)
            raise NextPartGone(f"{self.hop.url}: {error}") from error
        self._count(sent_rows=samples, sent_bytes=len(body))
        return deeper

    def _check_answers(self, deeper: Arrays) -> None:
        """Raise `MessageError` for answers that no part after this one gives."""
        index, first = deeper["exit_index"], self.info.exits[-1]["index"] + 1
        if not np.isin(index, np.arange(first, len(self.info.depths))).all():
            raise MessageError(f"an exit_index that is not from {first} to {len(self.info.depths) - 1}")
        if (deeper["exit_layer"] != np.asarray(self.info.depths)[index]).any():
            raise MessageError("an exit_layer that is not that of its exit_index")
        if (deeper["degraded"] > 1).any():
            raise MessageError("a degraded that is neither 0 nor 1")

    def message(self, state: Arrays) -> bytes:
        """The state of some samples, as the next part takes it: in float16 where that was asked for and holds all."""
        if self.state_dtype == "float16" and _each_sample(state, _fits_half).all():
            state = {
                name: array.astype(np.float16) if _halves(name, array) else array for name, array in state.items()
            }
        return pack(state, {**self.info.words, "part": str(self.info.index + 1)})

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)


def _halves(name: str, array: np.ndarray) -> bool:
    """Whether an array of a state is one that float16 halves."""
    return array.dtype == np.float32 and not name.startswith(MEMORY)


def _fits_half(name: str, array: np.ndarray) -> np.ndarray:
    return np.abs(array) <= HALF_MAX if _halves(name, array) else np.ones(array.shape, bool)


def _each_sample(state: Arrays, holds: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
    """Of which samples it holds for every number of every array, `[K]` bool."""
    each = [holds(name, array).reshape(len(array), -1).all(-1) for name, array in state.items()]
    return np.asarray(np.logical_and.reduce(each))
