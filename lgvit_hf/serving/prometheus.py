"""`Metrics`: counts of one service, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from .device.loop import Arrays

# a second series for each counter, which nothing reads
disable_created_metrics()  # type: ignore[no-untyped-call]  # has no types

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SAMPLES = (0, 1, 2, 4, 8, 16, 32, 64)
FILLS = (0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
ANSWERING = ("/predict", "/continue")
PATHS = (*ANSWERING, "/health", "/metrics", "/livez", "/readyz")
# of all models and versions under KServe's paths
KSERVE = "/v2"


class Metrics:
    """Counts of one service, as Prometheus reads them."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._requests = Counter("lgvit_requests", "requests answered", ["path", "status"], registry=own)
        said = "samples by the blocks run before their answer, here or further on"
        self._exits = Counter("lgvit_exits", said, ["exit_layer"], registry=own)
        self._degraded = Counter("lgvit_answers_degraded", "answers for want of a next part", registry=own)
        self._seconds = Histogram("lgvit_request_seconds", "seconds until an answer", buckets=SECONDS, registry=own)
        said = "seconds that a request waited for its batch to run"
        self._ages = Histogram("lgvit_queue_age_seconds", said, buckets=SECONDS, registry=own)
        said = "samples of a batch by what it may hold"
        self._fills = Histogram("lgvit_batch_fill", said, buckets=FILLS, registry=own)
        of = ["segment"]
        said = "seconds that a sample waited before a segment"
        self._segment_ages = Histogram("lgvit_segment_queue_age_seconds", said, of, buckets=SECONDS, registry=own)
        said = "samples of a run in a segment by what it may hold"
        self._segment_fills = Histogram("lgvit_segment_batch_fill", said, of, buckets=FILLS, registry=own)
        said = "samples of a run that exit at the end of a segment"
        self._segment_exits = Histogram("lgvit_segment_exits", said, of, buckets=SAMPLES, registry=own)
        said = "samples that were not computed: their client left, or their deadline passed"
        self._dropped = Counter("lgvit_samples_dropped", said, ["reason"], registry=own)
        self._version = Gauge("lgvit_model_version", "how often the model was opened", registry=own)
        self._version.set(1)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered with a status."""
        known = path if path in PATHS else KSERVE if path.startswith(KSERVE) else "other"
        self._requests.labels(known, status).inc()
        if path in ANSWERING or path.endswith("/infer"):
            self._seconds.observe(seconds)

    def answered(self, answers: Arrays) -> None:
        """Count where samples exited."""
        for exit_layer in answers["exit_layer"].tolist():
            self._exits.labels(exit_layer).inc()
        self._degraded.inc(int(answers["degraded"].sum()))

    def batch(self, ages: list[float], fill: float) -> None:
        """Count a batch that runs, see `Observer`."""
        for seconds in ages:
            self._ages.observe(seconds)
        self._fills.observe(fill)

    def ran(self, segment: int, ages: list[float], fill: float, exits: int | None) -> None:
        """Count a run in a segment, see `SegmentObserver`."""
        ages_of = self._segment_ages.labels(segment)
        for seconds in ages:
            ages_of.observe(seconds)
        if ages:
            self._segment_fills.labels(segment).observe(fill)
        if exits is not None:
            self._segment_exits.labels(segment).observe(exits)

    def dropped(self, reason: str, samples: int) -> None:
        """Count samples that are not computed, see `Observer`."""
        self._dropped.labels(reason).inc(samples)

    def opened(self, version: int) -> None:
        """Another version of the model answers from now on."""
        self._version.set(version)

    def text(self, others: Mapping[str, int]) -> str:
        """All counts, and others by name."""
        registry = CollectorRegistry()
        for name, number in others.items():
            Counter(f"lgvit_{name}", name.replace("_", " "), registry=registry).inc(number)
        return (generate_latest(self._registry) + generate_latest(registry)).decode()
