"""`DriftWatch`: whether the answers of a service are still like those of the calibration, kept over restarts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.drift import DriftMonitor
from ..files import write_json

logger = logging.getLogger(__name__)


class DriftWatch:
    """A `DriftMonitor` for each rung that answers, and the file that keeps what they know.

    Answers are collected by `answered` and `audited`, and counted all at once by `count`, since a look at the evidence
    takes longer than an answer may. However often one looks, false alarms are as rare as `alpha` says.

    Args:
        monitors (`Sequence[DriftMonitor]`): One for each rung, which share one alpha; see `Ladder.monitors`.
        file (`str` or `Path`): Is read if it is there, and written by `save`; all of it or nothing.
        audit (`float`, *optional*, defaults to 0): Share of the samples that are run to the end as well, in [0, 1].
            Which, is drawn here, by a generator that is seeded anew in each process: no client can know.

    Raises:
        ValueError: `audit` is out of range; the file is of other baselines, or damaged.

    Example:

        >>> import tempfile
        >>> baseline = {"samples": 1000, "exits": [500, 500], "labels": [500, 500], "harm": 10}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     watch = DriftWatch([DriftMonitor(baseline)], Path(folder) / "drift.json")
        ...     watch.answered(0, exit_index=np.ones(900, int), label=np.arange(900) % 2)
        ...     watch.count()
        ...     watch.save()
        ...     watch.alarm, DriftWatch([DriftMonitor(baseline)], Path(folder) / "drift.json").alarm
        True
        (True, True)
    """

    def __init__(self, monitors: Sequence[DriftMonitor], file: str | Path, audit: float = 0.0):
        if not 0 <= audit <= 1:
            raise ValueError(f"audit={audit!r} must be a share of the samples, from 0 to 1")
        self.file, self.audit, self._random = Path(file), audit, np.random.default_rng()
        self.monitors = _restored(monitors, self.file) if self.file.exists() else list(monitors)
        self._new: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in monitors]
        if self.alarm:
            logger.warning("%s", self.in_words())

    @property
    def alarm(self) -> bool:
        """Whether any monitor ever had evidence enough."""
        return any(monitor.alarm for monitor in self.monitors)

    def picked(self, samples: int) -> np.ndarray:
        """Which of so many samples are audited, `[samples]` bool."""
        return self._random.random(samples) < self.audit

    def answered(self, rung: int, exit_index: np.ndarray, label: np.ndarray) -> None:
        """Samples were answered by a rung: where each exited `[B]`, and its label's number `[B]`."""
        self._new[rung].append((exit_index, label, np.zeros(0, bool)))

    def audited(self, rung: int, harm: np.ndarray) -> None:
        """Of samples that a rung answered: whether the full model answers each otherwise `[A]` bool."""
        nobody = np.zeros(0, np.int64)
        self._new[rung].append((nobody, nobody, harm))

    def count(self) -> bool:
        """Look at what was collected since the last time; at the first alarm of all a line is logged.

        Returns:
            `bool`: Whether there was anything.
        """
        before, found = self.alarm, False
        for monitor, new in zip(self.monitors, self._new, strict=True):
            if new:
                monitor.update(*(np.concatenate(each) for each in zip(*new, strict=True)))
                new.clear()
                found = True
        if self.alarm and not before:
            logger.error("%s", self.in_words())
        return found

    def in_words(self) -> str:
        """What has changed most, in a line."""
        rung = min(range(len(self.monitors)), key=lambda each: self.monitors[each].p_value)
        report = self.monitors[rung].report()
        rows = [(f"exit {row['exit_index']}", row) for row in report["exits"]]
        rows += [(f"label {row['label']}", row) for row in report["labels"]]
        name, row = min([*rows, ("harm", report["harm"])], key=lambda each: each[1]["p_value"])
        now = "none were audited" if row["share"] is None else f"{row['share']:.2%}"
        what = f"drift alarm after {report['alarm_at']} samples" if report["alarm"] else "no drift alarm"
        advice = f"; calibrate again, or remove {self.file} to begin anew" if report["alarm"] else ""
        return (
            f"{what} of rung {rung}, p-value {report['p_value']:.2g}: {name} {now}, {row['baseline_share']:.2%} when "
            f"calibrated{advice}"
        )

    def state(self) -> dict[str, Any]:
        """All that is known, as plain JSON."""
        return {"what": "lgvit serve --drift", "monitors": [monitor.state() for monitor in self.monitors]}

    def save(self, state: Mapping[str, Any] | None = None) -> None:
        """Write the file; `state` is what another thread had of `state()`.

        Raises:
            OSError: It cannot be written.
        """
        write_json(self.file, self.state() if state is None else state)


def _restored(monitors: Sequence[DriftMonitor], file: Path) -> list[DriftMonitor]:
    """The same monitors, as the file knows them."""
    try:
        states = json.loads(file.read_text(encoding="utf-8"))["monitors"]
        pairs = zip(monitors, states, strict=True)
        return [DriftMonitor(monitor.baseline, alpha=monitor.alpha, state=state) for monitor, state in pairs]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: the state of drift is damaged or of another calibration ({error}); remove it to begin anew, or "
            "keep it and give another --drift-state"
        ) from error
