"""`Certified`: a service that keeps the promise of a calibration: rungs by load, drift watched, samples audited."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import locked
from ..policies import POLICIES
from .admission import RETRY, Refused
from .batching import Busy, Expired
from .certified_files import check_end, check_options, checked_whole, ladder_of, monitors_of, own_thresholds
from .device.info import Array, PartInfo
from .device.loop import Arrays
from .drift_watch import DriftWatch
from .model_version import Served
from .predictor import THRESHOLDS
from .rung_metrics import RungMetrics
from .whole_model import Whole

logger = logging.getLogger(__name__)

# what answers say beside the model's: the rung, from 0, the safest; and whether drift was found by then
MARKS: dict[str, type] = {"rung": int, "alarm": bool}
_DTYPES = {"rung": "int64", "alarm": "uint8"}
# seconds between two looks at the evidence
SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class _MarkedInfo(PartInfo):
    """What a service says of its model, whose answers have marks."""

    marks: dict[str, Array] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, Array]:
        return {**super().answers, **self.marks}


class Certified:
    """Has the samples of a service answered as a calibration promises, and looks whether it still may.

    A sample's rung is chosen when it is submitted, by the age of the queue (see `Ladder`), and goes with it as its
    `thresholds`, a row of an input of that name: whatever schedules samples may mix those of several rungs. What would
    begin to run only after `max_queue_ms` is refused. Without a ladder there is one rung: the model's own policy.

    Audited samples are run again to the end, behind their answer. One that is refused, because too many wait, is not
    compared.

    Args:
        part (`Whole`): The model that answers, with the policy that was calibrated, whatever its thresholds.
        ladder (`str` or `Path`, *optional*): `calibration.json`, with rungs that are certified.
        max_queue_ms (`float`, *optional*): See `Ladder`, which needs it.
        drift (`str` or `Path`, *optional*): `calibration.json`, with baselines of the same policy, or the same rungs.
        audit (`float`, *optional*, defaults to 0): Share of the samples that are audited.
        drift_state (`str` or `Path`, *optional*):
            File that keeps what is known of drift; by default `calibration.drift.json` beside `calibration.json`.

    Raises:
        ValueError: An option without the one that it belongs to; a part of a split model, or a model that takes no
            thresholds of each sample's own; a report of another model or policy, or that has not what is asked of it.
        OSError: There is no such file.
    """

    def __init__(
        self,
        part: Any,
        *,
        ladder: str | Path | None = None,
        max_queue_ms: float | None = None,
        drift: str | Path | None = None,
        audit: float = 0.0,
        drift_state: str | Path | None = None,
    ):
        check_options(ladder, max_queue_ms, drift, audit, drift_state)
        whole = checked_whole(part)
        self._of, num_exits = _identity(whole.info), len(whole.info.depths) - 1
        self.ladder, self.watch = None, None
        rows: list[list[float]] | None = None
        if ladder is not None:
            assert max_queue_ms is not None  # as was checked
            self.ladder = ladder_of(whole, ladder, max_queue_ms)
            rows = self.ladder.thresholds
        elif audit:
            rows = [own_thresholds(whole.info.policy, num_exits)]
        if drift is not None:
            if audit:
                check_end(drift)
            monitors = monitors_of(whole, drift, self.ladder)
            file = Path(drift).with_suffix(".drift.json") if drift_state is None else Path(drift_state)
            self.watch = DriftWatch(monitors, file, audit)
        self._rows = None if rows is None else np.array(rows, np.float32)
        out_of_reach = POLICIES[whole.info.policy["name"]].out_of_reach if rows else math.inf
        self._to_the_end = np.full(num_exits, out_of_reach, np.float32)
        self._audits: set[asyncio.Task[None]] = set()
        self._metrics = RungMetrics()

    def fitted(self, part: Any) -> Whole:
        """The model, opened for the first time or again, whose answers get marks.

        Raises:
            ValueError: It is another than the files are of, or takes no thresholds of each sample's own.
        """
        whole = checked_whole(part)
        if _identity(whole.info) != self._of:
            raise ValueError(
                "it is another model, or has another policy, than that of --ladder and --drift; start the service "
                "again with those of the new one"
            )
        if self._rows is not None:
            zeros = np.zeros((1, *whole.info.takes["pixel_values"]["shape"]), np.float32)
            answers, _, _ = whole({"pixel_values": zeros, THRESHOLDS: self._to_the_end[None]})
            if answers["exit_index"].tolist() != [len(whole.info.depths) - 1]:
                raise ValueError(f"{whole.info.policy['name']!r}: no threshold keeps samples from exiting early")
        given = {"rung": self.ladder, "alarm": self.watch}
        marks = {name: Array(dtype=_DTYPES[name], shape=[]) for name in MARKS if given[name] is not None}
        whole.info = _MarkedInfo(**{**vars(whole.info), "marks": marks})
        return whole

    # -- answers -------------------------------------------------------------------------------------------

    def check_queue(self, served: Served) -> None:
        """Raise `Refused` (503) where no certified rung is fast enough; before anything is read or decoded."""
        self._rung(served)

    def submit(self, served: Served, inputs: Arrays, timeout: float | None) -> Coroutine[Any, Any, Arrays]:
        """As `Served.submit`, by a rung.

        Raises:
            Refused: No certified rung is fast enough.
            Busy, Expired: See `Batcher`.
        """
        rung = self._rung(served)
        if self._rows is not None:
            samples = len(inputs["pixel_values"])
            inputs = {**inputs, THRESHOLDS: np.tile(self._rows[rung], (samples, 1))}
        return self._marked(served, inputs, rung, served.submit(inputs, self._within(served, timeout)))

    def _rung(self, served: Served) -> int:
        if self.ladder is None:
            return 0
        rung = self.ladder.rung(1e3 * served.batcher.queue_age, self._alarm)
        if rung is None:
            self._metrics.refused()
            raise Refused(503, f"samples have waited for {self.ladder.max_queue_ms:g} ms already", RETRY)
        self._metrics.admitted(rung)
        return rung

    def _within(self, served: Served, timeout: float | None) -> float | None:
        """The time in which samples must begin to run, or of segments have exited."""
        if self.ladder is None:
            return timeout
        most = self.ladder.max_queue_ms / 1e3 + served.batcher.pass_seconds
        return most if timeout is None else min(timeout, most)

    @property
    def _alarm(self) -> bool:
        return self.watch is not None and self.watch.alarm

    async def _marked(self, served: Served, inputs: Arrays, rung: int, found: Coroutine[Any, Any, Arrays]) -> Arrays:
        answers = await found
        samples = len(answers["logits"])
        if self.ladder is not None:
            answers["rung"] = np.full(samples, rung)
            self._metrics.answered(rung, samples)
        if self.watch is not None:
            answers["alarm"] = np.full(samples, self._alarm, np.uint8)
            self._observe(self.watch, served, inputs, rung, answers)
        return answers

    # -- drift ---------------------------------------------------------------------------------------------

    def _observe(self, watch: DriftWatch, served: Served, inputs: Arrays, rung: int, answers: Arrays) -> None:
        """Count answers, and audit some of them."""
        # what is not finite is no answer: its client gets an error
        known = np.asarray(np.isfinite(answers["logits"]).all(-1))
        exits, labels = answers["exit_index"], answers["logits"].argmax(-1)
        watch.answered(rung, exits[known], labels[known])
        picked = watch.picked(len(known)) & known
        at_end = exits == len(served.info.depths) - 1
        self._compared(watch, rung, np.zeros(int((picked & at_end).sum()), bool))
        early = np.flatnonzero(picked & ~at_end)
        if len(early):
            audit = self._audit(watch, served, rung, inputs["pixel_values"][early], labels[early])
            task = asyncio.ensure_future(audit)
            self._audits.add(task)
            task.add_done_callback(self._audits.discard)

    async def _audit(
        self, watch: DriftWatch, served: Served, rung: int, pixels: np.ndarray, labels: np.ndarray
    ) -> None:
        """Run samples that exited early to the end, and compare."""
        inputs = {"pixel_values": pixels, THRESHOLDS: np.tile(self._to_the_end, (len(pixels), 1))}
        try:
            full = (await served.submit(inputs, self._within(served, None)))["logits"]
        except Exception as error:  # of a runtime, too: answers are given all the same
            if not isinstance(error, (Busy, Expired)):
                logger.exception("an audit failed")
            self._metrics.audited("dropped", len(pixels))
            return
        self._compared(watch, rung, full.argmax(-1) != labels)

    def _compared(self, watch: DriftWatch, rung: int, harm: np.ndarray) -> None:
        if len(harm):
            watch.audited(rung, harm)
            self._metrics.audited("harm", int(harm.sum()))
            self._metrics.audited("same", int((~harm).sum()))

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a service runs, no other may keep what it knows of drift in the same file.

        Raises:
            ValueError: Another does.
            OSError: The file cannot be written.
        """
        if self.watch is None:
            yield
            return
        with locked(self.watch.file):
            self.watch.save()
            yield

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """While a service runs: looks at the evidence every `SECONDS`, and writes it down; at the end once more."""
        task = asyncio.ensure_future(self._look_often())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, *self._audits, return_exceptions=True)
            await self._look()

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(SECONDS)
            await self._look()

    async def _look(self) -> None:
        watch = self.watch
        if watch is None or not watch.count():
            return
        try:
            await asyncio.to_thread(watch.save, watch.state())
        except OSError as error:
            logger.error("what is known of drift is not kept: %s", error)

    # -- what it says --------------------------------------------------------------------------------------

    def promise(self) -> str | None:
        """What holds of the answers, in words; nothing without a ladder."""
        return None if self.ladder is None else self.ladder.promise()

    def health(self) -> dict[str, Any]:
        """For `/health`."""
        said: dict[str, Any] = {}
        if self.ladder is not None:
            said["ladder"] = {"rungs": len(self.ladder.rungs), "promise": self.ladder.promise()}
        if self.watch is not None:
            samples = sum(monitor.samples for monitor in self.watch.monitors)
            said["drift"] = {"alarm": self.watch.alarm, "samples": samples, "what": self.watch.in_words()}
        return said

    def metrics(self) -> str:
        """As Prometheus reads them."""
        if self.watch is not None:
            self._metrics.drift(self.watch.alarm, [monitor.p_value for monitor in self.watch.monitors])
        return self._metrics.text()


def _identity(info: PartInfo) -> tuple[Any, ...]:
    return info.model, info.policy, info.depths, info.labels
