"""Which of several certified policies a sample is answered by when there is more to do than can be done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.drift import DriftMonitor
from ..policies import build_policy
from ..runtimes.manifest import exits_that_run

# a faster rung is left again when the queue is this much shorter than what it was taken at
_RETURN = 0.5
HOW = "`lgvit calibrate CHECKPOINT --data DATA --max-accuracy-drop SHARE --delta DELTA` writes one"


class Ladder:
    """Chooses a rung of `report.ladder` by the age of the queue: the safest when idle, faster ones as it grows.

    Of R rungs the i-th (from 0, the safest) is taken when the oldest waiting sample has waited `i / R` of
    `max_queue_ms`, and left for a safer one when that is down to half as much, so that the rung does not change with
    every sample. From `max_queue_ms` on, samples are refused: no rung that is not certified ever answers. As queues
    may still grow behind the oldest sample, one whose turn comes after `max_queue_ms` must be refused then, too.

    Ask once for each sample, when it is admitted, and keep the rung for that sample. All rungs hold the bound at once
    (fixed-sequence testing), so any mixture of them holds it too, as long as which rung a sample gets has nothing to
    do with the sample itself: arrivals that are independent of one another and alike. Hard images lengthen queues;
    where they come in bursts, the bound is not guaranteed.

    Args:
        report (`dict`): What `lgvit calibrate` wrote, `calibration.json`, with `delta`; `load` reads the file.
        max_queue_ms (`float`): Milliseconds that a sample waits at most before others are refused.
        policy (`dict`): Of the model that answers; only its `threshold` may differ from a rung's.
        num_exits (`int`): Early exits of that model, the final classifier not counted.
        weights (`str`, *optional*): Its digest, as `weights_digest` gives it.

    Raises:
        ValueError:
            The ladder is empty, not certified, of another model or policy, or its thresholds are not one per exit.

    Example:

        >>> rungs = [{"policy": {"name": "confidence", "threshold": threshold}} for threshold in (0.9, 0.8)]
        >>> report = {"ladder": rungs, "delta": 0.05, "max_accuracy_drop": 0.01, "bound": "drop"}
        >>> ladder = Ladder(report, 100, policy=rungs[1]["policy"], num_exits=3)
        >>> [ladder.rung(age) for age in (0, 60, 40, 20, 100)]
        [0, 1, 1, 0, None]
        >>> ladder.thresholds[1]
        [0.8, 0.8, 0.8]
    """

    def __init__(
        self,
        report: Mapping[str, Any],
        max_queue_ms: float,
        *,
        policy: Mapping[str, Any],
        num_exits: int,
        weights: str | None = None,
    ):
        if not 0 < max_queue_ms < math.inf:
            raise ValueError(f"max_queue_ms={max_queue_ms!r} must be a number of milliseconds above 0")
        rungs = report.get("ladder")
        if not isinstance(rungs, (list, tuple)) or not rungs:
            raise ValueError(f"the ladder is empty: there is no rung to answer by; {HOW}")
        if report.get("delta") is None:
            raise ValueError(f"the ladder is not certified: its drops are estimates, without delta; {HOW}")
        if None not in (weights, report.get("weights")) and weights != report["weights"]:
            raise ValueError(f"the ladder is of a model with other weights; {HOW}")
        self.rungs: Sequence[Mapping[str, Any]] = rungs
        self.thresholds = [_thresholds(rung["policy"], policy, num_exits) for rung in rungs]
        self.max_queue_ms, self._report, self._rung = float(max_queue_ms), report, 0

    @classmethod
    def load(cls, file: str | Path, max_queue_ms: float, **of_model: Any) -> Ladder:
        """The ladder in a `calibration.json`; arguments and errors as of the class.

        Raises:
            ValueError: The file is no such report.
        """
        try:
            return cls(dict(json.loads(Path(file).read_text(encoding="utf-8"))), max_queue_ms, **of_model)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: no ladder to answer by: {error}") from error

    def rung(self, queue_age: float, alarm: bool = False) -> int | None:
        """The rung of a sample that arrives now; `None`: refuse it.

        Args:
            queue_age (`float`): Milliseconds that the oldest waiting sample has waited, 0 if none waits.
            alarm (`bool`, *optional*, defaults to `False`): A `DriftMonitor`'s: only the safest rung answers.
        """
        if queue_age >= self.max_queue_ms:
            return None
        share = len(self.rungs) * queue_age / self.max_queue_ms
        fastest_left = min(len(self.rungs) - 1, int(share / _RETURN))
        self._rung = min(max(self._rung, int(share)), fastest_left)
        return 0 if alarm else self._rung

    def monitors(self, alpha: float = 0.001) -> list[DriftMonitor]:
        """A monitor for each rung, of an equal share of `alpha`: samples exit elsewhere by another rung.

        Raises:
            ValueError: A rung has no baseline, or one without exits, labels or harm.
        """
        return [DriftMonitor(rung.get("baseline") or {}, alpha=alpha / len(self.rungs)) for rung in self.rungs]

    def promise(self) -> str:
        """What holds of the answers, in words, and on which assumption."""
        report = self._report
        what = {"drop": "accuracy drop", "harm": "share of samples where only the full model is right"}
        return (
            f"the {what[report['bound']]} of each of {len(self.rungs)} rungs, and so of any mixture of them, is at "
            f"most {report['max_accuracy_drop']:g} with probability {1 - report['delta']:g}, if samples arrive "
            "independently of one another and are alike; bursts of hard images void this"
        )


def _thresholds(rung: Mapping[str, Any], served: Mapping[str, Any], num_exits: int) -> list[float]:
    """A rung's threshold at each exit, if that is all that tells it from the policy of the model that answers."""
    names = sorted(name for name in {*rung, *served} - {"threshold"} if rung.get(name) != served.get(name))
    if names:
        values = [json.dumps(each.get(names[0]))[:80] for each in (rung, served)]
        raise ValueError(
            f"the ladder is of another policy: {names[0]} is {values[0]}, and the model's is {values[1]}; calibrate "
            "this model, and set the policy of that report"
        )
    threshold = rung.get("threshold")
    if threshold is None:
        raise ValueError(f"the policy {rung.get('name')!r} has no thresholds; calibrate with --policy confidence")
    thresholds = [float(threshold)] * num_exits if isinstance(threshold, (int, float)) else list(threshold)
    if len(thresholds) != num_exits:
        raise ValueError(f"the ladder has {len(thresholds)} thresholds, but the model has {num_exits} exits; {HOW}")
    evaluated, ours = (exits_that_run(build_policy(dict(each), num_exits), num_exits + 1) for each in (rung, served))
    if evaluated != ours:
        raise ValueError(
            f"the ladder is of another policy: a rung evaluates exits {evaluated}, and the model's {ours}; set the "
            "policy of that report"
        )
    return thresholds
