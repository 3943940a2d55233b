"""What the reports of `evaluate` and `benchmark` hold, by key; the same keys stand in their JSON."""

from __future__ import annotations

from typing import Any, TypedDict


class ExitFigures(TypedDict):
    """One exit in a report of `evaluate`, the final classifier last."""

    exit_layer: int
    head: str
    samples: int
    share: float
    accuracy_exited: float | None
    accuracy_all: float | None
    calibration_error_exited: float | None
    calibration_error_all: float | None
    macs: float
    head_macs: float


class Overall(TypedDict):
    """All samples in a report of `evaluate`."""

    samples: int
    accuracy: float
    accuracy_full_model: float | None
    mean_depth: float
    layer_speed_up: float
    mean_macs: float
    backbone_macs: float
    macs_speed_up: float


class SpeedUp(TypedDict):
    """Wall-clock at one batch size; of one exported file there is no backbone to run."""

    early_exit_seconds: float
    backbone_seconds: float | None
    wall_clock_speed_up: float | None


class ExportFacts(TypedDict):
    """Of an exported highway."""

    layout: str
    precision: str
    file_bytes: int
    runtime: str


class EvaluationReport(TypedDict):
    """The report of `evaluate`."""

    exits: list[ExitFigures]
    overall: Overall
    wall_clock: dict[str, SpeedUp]
    policy: dict[str, Any]
    ensemble: dict[str, Any] | None
    exported: ExportFacts | None


class Latency(TypedDict, total=False):
    """Of one kind of run, in milliseconds of a batch."""

    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mean_ms: float
    images_per_second: float


class BatchFigures(TypedDict):
    """One batch size in a report of `benchmark`."""

    batch_size: int
    early_exit: Latency
    backbone: Latency
    static: Latency | None
    static_speed_up: float | None
    ideal_ms: float
    predicted_ms: float
    wall_clock_speed_up: float
    layer_speed_up: float
    ideal_speed_up: float
    realised_over_ideal: float
    predicted_over_measured: float
    saved_share: float
    heads_share: float
    noise: float


class TimedExit(TypedDict):
    """One exit in a report of `benchmark`."""

    exit_index: int
    exit_layer: int
    head: str
    samples: int
    accuracy_all: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


class Accuracies(TypedDict):
    """Of early exit, the full model and each exit alone."""

    against: str
    samples: int
    accuracy: float
    accuracy_full_model: float
    exits: list[float]
    static_exit: int | None


class PartFigures(TypedDict):
    """The stem, a block or a head in a report of `benchmark`."""

    part: str
    depth: int
    macs: float
    parameters: int | None
    ms: dict[str, float]


class BenchmarkReport(TypedDict):
    """The report of `benchmark`."""

    environment: dict[str, Any]
    accuracies: Accuracies
    batches: list[BatchFigures]
    exits: list[TimedExit]
    memory: dict[str, Any] | None
    parameters: dict[str, Any] | None
    profile: list[PartFigures]
    exported: ExportFacts | None


class Bin(TypedDict):
    """One bin of a reliability diagram."""

    samples: int
    confidence: float | None
    accuracy: float | None


class ImageAnswer(TypedDict, total=False):
    """The answer to one image: the blocks it took, the score at that exit or at each, and both labels."""

    depth: int
    score: float | None
    scores: list[float | None]
    predicted: str
    label: str | None
