"""The files of `--ladder` and `--drift`, and whether they are of the model that is served."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.drift import DriftMonitor
from ..policies import build_policy, number_at
from .ladder import HOW, Ladder
from .whole_model import Whole


def check_options(ladder: Any, max_queue_ms: float | None, drift: Any, audit: float, drift_state: Any) -> None:
    """Raise `ValueError` for an option without the one that it belongs to."""
    if ladder is None and max_queue_ms is not None:
        raise ValueError(f"--max-queue-ms {max_queue_ms:g} goes with --ladder, whose rungs it is for")
    if ladder is not None and max_queue_ms is None:
        raise ValueError("--ladder needs --max-queue-ms: milliseconds that a sample may wait")
    if not 0 <= audit <= 1:
        raise ValueError(f"--audit {audit:g} must be a share of the samples, from 0 to 1")
    for name, value in (("--audit", audit), ("--drift-state", drift_state)):
        if value and drift is None:
            raise ValueError(f"{name} {value} goes with --drift calibration.json, which says what was usual")


def checked_whole(part: Any) -> Whole:
    """The part, if it is a whole model; else `ValueError`."""
    if not isinstance(part, Whole):
        raise ValueError(
            "--ladder and --drift are for a whole model: parts of a split one decide by the thresholds of their "
            "split; serve the checkpoint, or a single file that `lgvit export` wrote"
        )
    return part


def ladder_of(whole: Whole, file: str | Path, max_queue_ms: float) -> Ladder:
    """The ladder in a report.

    Raises:
        ValueError: See `Ladder`.
    """
    _check_weights(whole, _report(file), file)
    return Ladder.load(file, max_queue_ms, policy=whole.info.policy, num_exits=len(whole.info.depths) - 1)


def monitors_of(whole: Whole, file: str | Path, ladder: Ladder | None) -> list[DriftMonitor]:
    """A monitor for each rung, or of the model's own policy where there is no ladder, from the baselines in a report.

    Raises:
        ValueError: The report is of another model, policy or ladder, or has no such baseline.
    """
    try:
        monitors = _monitors(whole, file, ladder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--drift {file}: {error}") from error
    sizes = {"exits": len(whole.info.depths), "labels": len(whole.info.labels)}
    for monitor in monitors:
        for name, size in sizes.items():
            if (found := len(monitor.baseline[name])) != size:
                raise ValueError(f"--drift {file}: a baseline of {found} {name}, but the model has {size}; {HOW}")
    return monitors


def _monitors(whole: Whole, file: str | Path, ladder: Ladder | None) -> list[DriftMonitor]:
    if ladder is not None:
        theirs = ladder_of(whole, file, ladder.max_queue_ms)
        if theirs.thresholds != ladder.thresholds:
            raise ValueError("its rungs are not those of the ladder; give --drift and --ladder the same file")
        return theirs.monitors()
    report = _report(file)
    _check_weights(whole, report, file)
    if build_policy(report["policy"], len(whole.info.depths) - 1).to_dict() != whole.info.policy:
        raise ValueError("its baseline is of another policy than the model's; set the policy of that report")
    return [DriftMonitor(report.get("baseline") or {})]


def check_end(file: str | Path) -> None:
    """Raise `ValueError` for a report of a model whose answer at its end is not the full model's."""
    if _report(file).get("ensemble") is not None:
        raise ValueError(
            f"--audit: {file} is of a model that answers by an ensemble, whose answer at the end is not the full "
            "model's; leave it out"
        )


def own_thresholds(policy: Mapping[str, Any], num_exits: int) -> list[float]:
    """The thresholds of a policy, one per exit.

    Raises:
        ValueError: It has none.
    """
    threshold = policy.get("threshold")
    if threshold is None:
        raise ValueError(
            f"--audit: the policy {policy['name']!r} has no thresholds, by which a sample could be run to the end"
        )
    return [number_at(threshold, index, math.inf) for index in range(num_exits)]


def _report(file: str | Path) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not what `lgvit calibrate` writes ({error})") from error


def _check_weights(whole: Whole, report: Mapping[str, Any], file: str | Path) -> None:
    theirs = report.get("weights")
    if theirs is not None and theirs not in (whole.info.model, whole.weights):
        raise ValueError(f"{file}: it is of a model with other weights; {HOW}")
