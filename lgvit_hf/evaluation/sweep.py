"""A policy at many settings on one table: a row each, kept as soon as it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..hub.report_keys import current_names
from ..policies import build_policy
from .exit_table import ExitTable
from .metrics import summarise
from .predictions import Settings
from .threshold_search import RANGES, confidence_scores, uniform_thresholds


def sweep(
    table: ExitTable,
    policies: Sequence[Settings],
    file: str | Path,
    *,
    what: dict[str, Any],
    time: Callable[[Settings], dict[str, float]] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Replay every policy on a table and append what it does to a file of JSON lines, a line at a time.

    The first line is `what`. Policies that the file has already are not run again, so that a sweep which was stopped
    goes on; half a line, from a machine that stopped, is taken off.

    Args:
        table (`ExitTable`): With costs.
        policies (`Sequence[dict]`): Settings as `build_policy` takes them.
        file (`str` or `Path`): JSON lines; made where there is none.
        what (`dict`): Of which model and data the rows are.
        time (callable, *optional*): Measures the wall-clock speed-up of a policy by batch size.
        progress (callable, *optional*): Wraps the policies that are run, to show progress.

    Returns:
        A row per policy, in their order: `policy`, `accuracy`, `mean_depth`, `layer_speed_up`, `mean_macs`,
        `macs_speed_up`, `shares` of the samples that exit at each exit, and `wall_clock` where it was measured.

    Raises:
        ValueError: The file holds rows of something else than `what`.

    Example:

        >>> import tempfile, torch
        >>> from lgvit_hf.evaluation.costs import Costs
        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 5.0], [0.0, 5.0]]])
        >>> table = ExitTable(logits, torch.tensor([0, 1]), [1, 2], Costs([4.0, 4.0], [1.0, 1.0]))
        >>> policies = [{"name": "confidence", "threshold": threshold} for threshold in (0.5, 0.9, 1.0)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = sweep(table, policies, f"{folder}/sweep.jsonl", what={"model": "tiny"})
        >>> [(row["accuracy"], row["mean_depth"]) for row in rows]
        [(1.0, 1.0), (1.0, 1.5), (0.5, 2.0)]
    """
    file = Path(file)
    known = _read(file, what)
    todo = {_key(policy): policy for policy in policies if _key(policy) not in known}.values()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        if not file.stat().st_size:
            _append(stream, what)
        for policy in progress(todo):
            row = _row(table, policy)
            if time is not None:
                row["wall_clock"] = time(policy)
            _append(stream, row)
            known[_key(policy)] = row
    return [known[_key(policy)] for policy in policies]


def threshold_curve(table: ExitTable, policy: str = "confidence", points: int = 30) -> list[dict[str, float]]:
    """What one threshold for all exits does, from every sample exiting at the first exit to no sample exiting early.

    Args:
        table (`ExitTable`): With costs.
        policy (`str`, *optional*, defaults to `"confidence"`): Or `"margin"`, `"entropy"`.
        points (`int`, *optional*, defaults to 30): Thresholds, an equal share of the scores apart.

    Returns:
        `{"threshold", "accuracy", "mean_macs"}` of each, the fastest first.

    Example:

        >>> import torch
        >>> from lgvit_hf.evaluation.costs import Costs
        >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 5.0], [0.0, 5.0]]])
        >>> table = ExitTable(logits, torch.tensor([0, 1]), [1, 2], Costs([4.0, 4.0], [1.0, 1.0]))
        >>> [(point["accuracy"], point["mean_macs"]) for point in threshold_curve(table)]
        [(1.0, 5.0), (1.0, 7.5), (0.5, 10.0), (0.5, 9.0)]
    """
    settings = threshold_settings(table, policy, points)
    rows = [_row(table, each) for each in settings]
    return [
        {"threshold": each["threshold"], "accuracy": row["accuracy"], "mean_macs": row["mean_macs"]}
        for each, row in zip(settings, rows, strict=True)
    ]


def threshold_settings(table: ExitTable, policy: str = "confidence", points: int = 30) -> list[Settings]:
    """The policies of `threshold_curve`, which see: no score of the table lies on one of their thresholds."""
    scores = confidence_scores(table, policy, (1.0,) * len(table.depths)).numpy()
    cuts = uniform_thresholds(scores, RANGES[policy], points)
    sign = -1 if policy == "entropy" else 1
    numbers = [sign * cut[0].item() for cut in cuts] + [sign * RANGES[policy][1]]
    return [{"name": policy, "threshold": number} for number in numbers]


def _row(table: ExitTable, policy: Settings) -> dict[str, Any]:
    rule = build_policy(policy, len(table.depths) - 1)
    summary = summarise(table, table.replay(rule), table.known_costs, [""] * len(table.depths), rule)
    names = ("accuracy", "mean_depth", "layer_speed_up", "mean_macs", "macs_speed_up")
    figures = {name: summary["overall"][name] for name in names}
    return {"policy": policy, **figures, "shares": [exit["share"] for exit in summary["exits"]]}


def _append(stream: Any, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row) + "\n")
    stream.flush()
    os.fsync(stream.fileno())


def _read(file: Path, what: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by their policy; half a last line is cut off the file."""
    if not file.exists():
        return {}
    whole, _, half = file.read_bytes().rpartition(b"\n")
    if half:
        with file.open("r+b") as stream:
            stream.truncate(len(whole) + 1 if whole else 0)
    try:
        first, *rows = (current_names(json.loads(line)) for line in whole.decode().splitlines()) if whole else (what,)
        known = {_key(row["policy"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a sweep's file ({error}); choose another output") from error
    if first != what:
        differing = [name for name in what if not isinstance(first, dict) or first.get(name) != what[name]]
        raise ValueError(f"{file} holds a sweep with another {', '.join(differing)}; choose another output")
    return known


def _key(policy: Settings) -> str:
    return json.dumps(policy, sort_keys=True)
