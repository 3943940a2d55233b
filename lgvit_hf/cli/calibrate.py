"""`lgvit calibrate`: a policy chosen on a table of exits and written into a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluation.calibration import Calibration, calibrate, check_request, check_rows, split
from ..evaluation.cost_table import CostTable, architecture
from ..evaluation.exit_table import ExitTable
from ..evaluation.plots import plot_pareto
from ..evaluation.search import RANGES
from ..evaluation.sweep import threshold_curve
from ..files import replace_folder, write_json
from ..runtimes.onnxruntime import is_exported
from .drawing import UNIT, check_can_draw, points
from .inputs import open_highway, table_of


def run_calibrate(
    checkpoint: str,
    data: str,
    *,
    output: str | None = None,
    plot: str | None = None,
    table_file: str | None = None,
    cost_table: str | None = None,
    which: str = "validation",
    validation_share: float = 0.15,
    seed: int = 0,
    **wanted: Any,
) -> Calibration:
    """Calibrate a checkpoint and write the policy into its config, with the report beside it as `calibration.json`.

    Args:
        checkpoint (`str`): As of `open_highway`.
        data (`str`): As of `load_images`.
        output (`str`, *optional*): Folder for a calibrated copy; by default the checkpoint's own files are changed.
        plot (`str`, *optional*): PNG of accuracy against cost.
        table_file (`str`, *optional*): Where the table is, or is to be, kept.
        cost_table (`str`, *optional*): File of measured times.
        which (`str`, *optional*, defaults to `"validation"`): The split to calibrate on.
        validation_share (`float`, *optional*, defaults to 0.15), seed (`int`, *optional*, defaults to 0):
            As of `open_highway`.
        wanted: As of `calibrate`.
    """
    folder = Path(checkpoint)
    if output is None:
        _check_may_change(folder)
    elif Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another output")
    if plot is not None:
        check_can_draw(plot)
    asked = {
        name: wanted.get(name) for name in ("max_accuracy_drop", "min_speedup", "max_macs", "max_latency", "delta")
    }
    bound = wanted.get("bound", "drop")
    check_request(wanted.get("policy", "confidence"), **asked, bound=bound, has_cost_table=cost_table is not None)
    model, processor, dataset = open_highway(checkpoint, data, which, validation_share, seed)
    check_rows(len(dataset) - len(dataset) // 2, asked["max_accuracy_drop"], asked["delta"], bound)
    costs = None
    if cost_table is not None:
        costs = CostTable.load(cost_table, num_exits=len(model.segments()), model=architecture(model))
        costs.at(wanted.get("batch_size", 1))
    table = table_of(model, dataset, table_file)
    report = calibrate(table, cost_table=costs, **wanted)
    if plot is not None:
        labels = wanted.get("labels", True)
        plot_calibration(plot, table, report, labels=labels, asked_drop=asked["max_accuracy_drop"])
    content = {"what": "lgvit calibrate", "data": data, "split": which, "rows": len(table), **report.to_dict()}
    if output is not None:
        model.set_exit_policy(report.policy)
        with replace_folder(output) as new:
            model.save_pretrained(new)
            processor.save_pretrained(new)
            write_json(new / "calibration.json", content)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # the report first: whatever the config says then is explained beside it
        write_json(folder / "calibration.json", content)
        write_json(folder / "config.json", {**config, "exit_policy": report.policy})
    return report


def _check_may_change(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json to write the policy into; give --output FOLDER")
    if (folder / "manifest.json").exists() and not is_exported(folder):
        raise ValueError(f"{folder} is a training checkpoint, which must stay as it is; give --output FOLDER")


def plot_calibration(
    file: str | Path, table: ExitTable, report: Calibration, *, labels: bool = True, asked_drop: float | None = None
) -> None:
    """Accuracy against MACs on the half of a table that was not searched on: one threshold for all, and the choice."""
    _, tested = split(table if labels else table.without_labels())
    name = report.policy["name"]
    plot_pareto(
        file,
        {
            "one threshold for all exits": points(threshold_curve(tested, name if name in RANGES else "confidence")),
            "thresholds and exits searched": points(report.frontier),
        },
        {
            "chosen": {"cost": report.mean_macs / 1e6, "accuracy": report.accuracy},
            "full model": {"cost": report.full_macs / 1e6, "accuracy": report.full_accuracy},
        },
        unit=UNIT,
        measure="accuracy" if labels else "agreement with the full model",
        asked_accuracy=None if asked_drop is None else report.full_accuracy - asked_drop,
    )
