"""Prometheus' series of a service with a ladder, or that looks for drift; others do not have them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class RungMetrics:
    """Counts of rungs, refusals and audits, and the evidence of drift."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._samples = Counter("lgvit_rung_samples", "samples answered, by rung", ["rung"], registry=own)
        self._rung = Gauge("lgvit_rung", "rung of the last sample that was admitted, 0 the safest", registry=own)
        said = "requests refused at once: no certified rung is fast enough"
        self._refused = Counter("lgvit_ladder_refused", said, registry=own)
        self._alarm = Gauge("lgvit_drift_alarm", "1 from the first sign of drift on", registry=own)
        said = "smallest p-value so far of no drift, by rung"
        self._p_value = Gauge("lgvit_drift_p_value", said, ["rung"], registry=own)
        said = "audited samples: the full model answers the same, or otherwise (harm), or was not run (dropped)"
        self._audits = Counter("lgvit_audited_samples", said, ["outcome"], registry=own)

    def admitted(self, rung: int) -> None:
        """A request is answered by a rung."""
        self._rung.set(rung)

    def refused(self) -> None:
        """A request is not answered, for no rung is fast enough."""
        self._refused.inc()

    def answered(self, rung: int, samples: int) -> None:
        """Samples were answered by a rung."""
        self._samples.labels(rung).inc(samples)

    def audited(self, outcome: str, samples: int) -> None:
        """Samples were audited: `same`, `harm` or `dropped`."""
        self._audits.labels(outcome).inc(samples)

    def drift(self, alarm: bool, p_values: list[float]) -> None:
        """What is known of drift: whether there was an alarm, and the p-value of each rung."""
        self._alarm.set(alarm)
        for rung, p_value in enumerate(p_values):
            self._p_value.labels(rung).set(p_value)

    def text(self) -> str:
        """All of it."""
        return generate_latest(self._registry).decode()
