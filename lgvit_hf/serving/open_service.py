"""`ServiceSettings`: what a service is opened with, on this machine or in each replica."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette

from .admission import Limits
from .certified import Certified
from .certified_files import check_options
from .device.loop import Runs
from .device.remote import RemoteHighway
from .open_part import open_any
from .server import make_app


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What a service is opened with.

    Args:
        path (`str`): Folder of a part, of a checkpoint or of an exported highway, or a Hub id.
        policy (`dict`, *optional*), runtime (`str`, *optional*), threads (`int`, *optional*): See `open_any`.
        max_batch_size, max_wait, limits, scheduler, max_run_ms: See `make_app`.
        decoders (`int`, *optional*): `workers` of `make_app`.
        ladder, max_queue_ms, drift, audit, drift_state: See `Certified`.
        next (`str`, *optional*): URL of the next part's service.
        state_dtype, timeout, retries: See `RemoteHighway`.

    Raises:
        ValueError: An option of load and drift without the one that it belongs to.
    """

    path: str
    policy: dict[str, Any] | None = None
    runtime: str | None = None
    threads: int | None = None
    max_batch_size: int = 32
    max_wait: float = 0.002
    limits: Limits = field(default_factory=Limits)
    decoders: int | None = None
    scheduler: str | None = None
    max_run_ms: float | None = None
    ladder: str | None = None
    max_queue_ms: float | None = None
    drift: str | None = None
    audit: float = 0.0
    drift_state: str | None = None
    next: str | None = None
    state_dtype: str = "float32"
    timeout: float = 5.0
    retries: int = 2

    def __post_init__(self) -> None:
        check_options(*self._promised.values())

    @property
    def _promised(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("ladder", "max_queue_ms", "drift", "audit", "drift_state")}

    def highway(self, certified: Certified | None = None) -> RemoteHighway:
        """What answers, opened anew.

        Raises:
            OSError, ValueError: See `open_any` and `Certified.fitted`.
        """
        return self._answering(self._part(), certified)

    def app(self) -> Starlette:
        """The service; its state's `service` has what it is made of.

        Raises:
            OSError, ValueError: See `open_any` and `Certified`.
        """
        part = self._part()
        certified = None if self.ladder is None and self.drift is None else Certified(part, **self._promised)
        return make_app(
            self._answering(part, certified),
            max_batch_size=self.max_batch_size,
            max_wait=self.max_wait,
            limits=self.limits,
            workers=self.decoders,
            reopen=lambda: self.highway(certified),
            scheduler=self.scheduler,
            max_run_ms=self.max_run_ms,
            certified=certified,
        )

    def _part(self) -> Runs:
        most, threads, runtime = self.max_batch_size, self.threads, self.runtime
        return open_any(self.path, policy=self.policy, max_batch_size=most, threads=threads, runtime=runtime)

    def _answering(self, part: Runs, certified: Certified | None) -> RemoteHighway:
        sending = {"state_dtype": self.state_dtype, "timeout": self.timeout, "retries": self.retries}
        return RemoteHighway(part if certified is None else certified.fitted(part), self.next, **sending)  # type: ignore[arg-type]  # of several types
