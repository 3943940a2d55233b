"""`Scheduling`: which samples a service runs together: those of a batch to its end, or anew before each segment."""

from __future__ import annotations

from dataclasses import dataclass

from .batching import Batcher
from .device.remote import RemoteHighway
from .segment_scheduler import SegmentObserver, SegmentScheduler
from .whole_model import Whole

SCHEDULERS = ("segments", "batch")


@dataclass(frozen=True)
class Scheduling:
    """How samples are scheduled, whatever model they are of.

    Args:
        scheduler (`str`, *optional*):
            `"batch"`, `"segments"`, or `None`: segments of a whole highway that has some, else batch.
        max_samples (`int`, *optional*, defaults to 32), max_wait (`float`, *optional*, defaults to 0.002):
            See `Batcher` and `SegmentScheduler`.
        max_run_ms (`float`, *optional*): See `SegmentScheduler`.

    Raises:
        ValueError: An unknown scheduler; `max_run_ms` for `"batch"`, which has no runs.
    """

    scheduler: str | None = None
    max_samples: int = 32
    max_wait: float = 0.002
    max_run_ms: float | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in (None, *SCHEDULERS):
            raise ValueError(f"scheduler={self.scheduler!r} is none of {', '.join(SCHEDULERS)}")
        if self.scheduler == "batch" and self.max_run_ms is not None:
            raise ValueError(f"max_run_ms={self.max_run_ms:g} is for scheduler='segments'; 'batch' runs a batch whole")

    def start(self, highway: RemoteHighway, observer: SegmentObserver) -> Batcher | SegmentScheduler:
        """What runs a highway.

        Raises:
            ValueError: It has no segments, and `scheduler` or `max_run_ms` asks for them.
        """
        batches = {"max_samples": self.max_samples, "max_wait": self.max_wait, "observer": observer}
        if self.scheduler == "batch":
            return Batcher(highway, **batches)  # type: ignore[arg-type]  # of several types
        segments = highway.part.segments() if isinstance(highway.part, Whole) else None
        if segments is not None:
            return SegmentScheduler(segments, max_run_ms=self.max_run_ms, **batches)  # type: ignore[arg-type]
        if self.scheduler is None and self.max_run_ms is None:
            return Batcher(highway, **batches)  # type: ignore[arg-type]
        raise ValueError(
            f"{highway.part.folder}: scheduler='segments' needs a whole highway in segments, in PyTorch or exported "
            "with `lgvit export --layout segments`; what is in a single file, or a part, runs with scheduler='batch'"
        )
