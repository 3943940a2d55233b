"""`lgvit calibrate`: a policy chosen on a table of exits and written into a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import real, whole
from ..files import replace_folder, write_json
from .options import add_data

if TYPE_CHECKING:
    from ..evaluation.calibration import Calibration
    from ..evaluation.exit_table import ExitTable

HELP = "choose temperatures, thresholds and exits, and write them down"
EXAMPLE = (
    "lgvit calibrate runs/stage2 --data photos/ --max-accuracy-drop 0.01 --delta 0.05 --plot curve.png\n"
    "  lgvit calibrate runs/stage2 --data photos/ --max-latency 4 --cost-table costs.json --batch-size 8"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit calibrate`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway")
    add_data(parser, "validation", "rows it was not trained on")
    parser.add_argument("--policy", default="confidence", help="which built-in policy (default: confidence)")
    parser.add_argument("--max-accuracy-drop", type=real(), help="share of all rows, 0.01 for one point")
    parser.add_argument("--min-speedup", type=real(), help="cost of the plain model over the mean cost")
    parser.add_argument("--max-macs", type=real(), help="mean MACs of an image")
    parser.add_argument("--max-latency", type=real(), help="mean milliseconds of an image, by the cost table")
    parser.add_argument("--delta", type=real(), help="the drop holds with probability 1 - DELTA; needs more rows")
    parser.add_argument(
        "--bound", choices=("drop", "harm"), default="drop", help="what holds: the drop, or the harm without repairs"
    )
    parser.add_argument("--ignore-labels", action="store_true", help="judge by the full model's answers")
    parser.add_argument("--cost-table", help="measured times to save instead of MACs: lgvit benchmark --cost-table")
    parser.add_argument("--batch-size", type=whole(), default=1, help="at which the cost table is read (default: 1)")
    parser.add_argument("--all-exits", action="store_true", help="switch no exit off")
    parser.add_argument("--table", help="file of the table of exits: read if it is there, otherwise written")
    parser.add_argument("--output", help="folder for a calibrated copy, instead of the checkpoint's own config")
    parser.add_argument("--plot", help="PNG of accuracy against cost")
    parser.set_defaults(required=("data",))


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    names = ("policy", "max_accuracy_drop", "min_speedup", "max_macs", "max_latency", "delta", "bound", "batch_size")
    report = run_calibrate(
        options.checkpoint,
        options.data,
        output=options.output,
        plot=options.plot,
        table_file=options.table,
        cost_table=options.cost_table,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        labels=not options.ignore_labels,
        choose_exits=not options.all_exits,
        **{name: getattr(options, name) for name in names},
    )
    print(report.as_text())
    print(f"\nwritten to {options.output or options.checkpoint}: config.json, and calibration.json with the report")


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
        checkpoint (`str`): See `open_highway`.
        data (`str`): See `load_images`.
        output (`str`, *optional*): Folder for a calibrated copy; by default the checkpoint's own files are changed.
        plot (`str`, *optional*): PNG of accuracy against cost.
        table_file (`str`, *optional*): Where the table is, or is to be, kept.
        cost_table (`str`, *optional*): File of measured times.
        which (`str`, *optional*, defaults to `"validation"`): The split to calibrate on.
        validation_share (`float`, *optional*, defaults to 0.15), seed (`int`, *optional*, defaults to 0):
            See `open_highway`.
        wanted: See `calibrate`.
    """
    from ..evaluation.calibration import calibrate, check_request, check_rows
    from ..evaluation.cost_table import CostTable, architecture
    from .drawing import check_can_draw
    from .inputs import open_highway, table_of

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
    content = {"what": "lgvit calibrate", "data": data, "split": which, "samples": len(table), **report.to_dict()}
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
    from ..runtimes.onnxruntime import is_exported

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json to write the policy into; give --output FOLDER")
    if (folder / "manifest.json").exists() and not is_exported(folder):
        raise ValueError(f"{folder} is a training checkpoint, which must stay as it is; give --output FOLDER")


def plot_calibration(
    file: str | Path, table: ExitTable, report: Calibration, *, labels: bool = True, asked_drop: float | None = None
) -> None:
    """Accuracy against MACs on the half of a table that was not searched on: one threshold for all, and the choice."""
    from ..evaluation.calibration import split_table
    from ..evaluation.plots import plot_pareto
    from ..evaluation.search import RANGES
    from ..evaluation.sweep import threshold_curve
    from .drawing import UNIT, points

    _, tested = split_table(table if labels else table.without_labels())
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
