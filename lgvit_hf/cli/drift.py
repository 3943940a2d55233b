"""`lgvit drift`: whether answers already given are still like those that the policy was calibrated on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.settings import real
from ..files import write_json

HELP = "look for a change in answers already given"
EXAMPLE = (
    "lgvit drift predictions.parquet --baseline runs/stage2/calibration.json --plot drift.png\n"
    "the answers are those of the policy in calibration.json, in the order they were given; the exit code is 1 where\n"
    "something has changed"
)
REQUIRED = ("baseline",)
# answers between two looks, and labels in the table
STEP, MOST = 100, 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit drift`."""
    add = parser.add_argument
    add("answers", metavar="LOG", help=".parquet, .csv or .jsonl file of lgvit predict")
    add("--baseline", help="calibration.json, as lgvit calibrate writes it")
    add("--alpha", type=real(), default=0.001, help="probability of a false alarm, ever (default: 0.001)")
    add("--output", help="JSON file for the figures")
    add("--plot", help="PNG of the evidence and the exits")


def run(options: argparse.Namespace) -> int:
    """Run the command and print the result."""
    from ..evaluation.drift import DriftMonitor, load_baseline
    from .drawing import check_can_draw

    if options.plot is not None:
        check_can_draw(options.plot)
    monitor = DriftMonitor(load_baseline(options.baseline), alpha=options.alpha)
    names = _label_names(options.baseline, len(monitor.baseline["labels"]))
    history = list(_watched(monitor, options.answers, names))
    report = {"what": "lgvit drift", "data": options.answers, **monitor.report()}
    report["labels"] = [{**row, "label": names[row["label"]]} for row in report["labels"]]
    if options.output is not None:
        write_json(options.output, report)
    if options.plot is not None:
        from ..evaluation.plots import plot_drift

        plot_drift(options.plot, history, report)
    print(drift_as_text(report))
    return int(monitor.alarm)


def _label_names(file: str, num_labels: int) -> list[str]:
    names = json.loads(Path(file).read_text(encoding="utf-8")).get("label_names")
    if not isinstance(names, list) or len(names) != num_labels:
        raise ValueError(f"{file}: label_names must name the {num_labels} labels; `lgvit calibrate` writes them")
    return names


def _watched(monitor: Any, file: str, names: list[str]) -> Iterator[dict[str, float]]:
    """What the monitor says after each `STEP` answers."""
    from ..serving.read_answers import read_answers

    numbers, answers = {name: number for number, name in enumerate(names)}, read_answers(file)
    while batch := list(islice(answers, STEP)):
        unknown = [answer.label for answer in batch if answer.label not in numbers]
        if unknown:
            raise ValueError(f"{file}: label {unknown[0]!r} is none of the baseline's: another model gave it")
        harm = [answer.harm for answer in batch if answer.harm is not None]
        monitor.update([answer.exit_index for answer in batch], [numbers[answer.label] for answer in batch], harm)
        yield {"samples": monitor.samples, "p_value": monitor.p_value}
    if not monitor.samples:
        raise ValueError(f"{file} has no answers")


def drift_as_text(report: dict[str, Any]) -> str:
    """What `DriftMonitor.report` found, for a terminal; of labels those that changed most."""
    harm = report["harm"]
    what = f"something has changed: alarm after {report['alarm_at']:,} answers" if report["alarm"] else "no alarm"
    lines = [
        f"{report['samples']:,} answers, {harm['audited']:,} of the counted ones audited",
        f"{what}; p-value {report['p_value']:.2g}, alarm at {report['alpha']:g}",
        f"counted since answer {report['since']:,}",
        "",
        f"{'':20}  baseline      seen   p-value",
    ]
    labels = sorted(report["labels"], key=lambda row: row["p_value"])
    rows = [(f"exit {row['exit_index']}", row) for row in report["exits"]]
    rows += [(f"label {row['label']}", row) for row in labels[:MOST]]
    for name, row in [*rows, ("harm", harm)]:
        seen = "-" if row["share"] is None else f"{row['share']:.2%}"
        lines.append(f"{name[:20]:20}  {row['baseline_share']:8.2%}  {seen:>8}  {row['p_value']:8.2g}")
    if len(labels) > MOST:
        lines.append(f"and {len(labels) - MOST:,} more labels, which changed less")
    return "\n".join(lines)
