"""`lgvit calibrate`: a policy chosen on a table of exits and written into a checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.settings import real, whole
from ..files import replace_folder, write_json
from .options import add_data, add_runtime

if TYPE_CHECKING:
    from ..evaluation.calibration_report import Calibration
    from ..evaluation.exit_table import ExitTable

logger = logging.getLogger(__name__)

HELP = "choose temperatures, thresholds and exits, and write them down"
EXAMPLE = (
    "lgvit calibrate runs/stage2 --data photos/ --max-accuracy-drop 0.01 --delta 0.05 --plot curve.png\n"
    "  lgvit calibrate runs/stage2 --data photos/ --max-latency 4 --cost-table costs.json --batch-size 8"
)
REQUIRED = ("data",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit calibrate`."""
    add = parser.add_argument
    add_data(parser, "validation", "samples it was not trained on")
    add_runtime(parser)
    add("--policy", default="auto", help="a built-in policy, or the best of all (default: auto)")
    add("--max-accuracy-drop", type=real(), help="share of all samples, 0.01 for one point")
    add("--min-speedup", type=real(), help="cost of the plain model over the mean cost")
    add("--max-macs", type=real(), help="mean MACs of an image")
    add("--max-latency", type=real(), help="mean milliseconds of an image, by the cost table")
    add("--delta", type=real(), help="the drop holds with probability 1 - DELTA; needs more samples")
    add("--bound", choices=("drop", "harm"), default="drop", help="what holds: the drop, or the harm without repairs")
    add("--ignore-labels", action="store_true", help="judge by the full model's answers")
    add("--cost-table", help="measured times to save instead of MACs: lgvit benchmark --cost-table")
    add("--batch-size", type=whole(), default=1, help="at which the cost table is read (default: 1)")
    add("--all-exits", action="store_true", help="skip no exit")
    add("--table", help="file of the table of exits: read if it is there, otherwise written")
    add("--output", help="folder for a calibrated copy, instead of the checkpoint's own config")
    add("--plot", help="PNG of accuracy against cost")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..data.held_out import read_training_data, write_training_data
    from ..evaluation.calibration import calibrate, check_request, check_rows
    from ..evaluation.cost_table import CostTable, architecture
    from .drawing import check_can_draw
    from .inputs import launched, open_options, table_of

    folder = Path(options.checkpoint)
    if options.output is None:
        _check_may_change(folder)
    elif Path(options.output).exists() and (not Path(options.output).is_dir() or any(Path(options.output).iterdir())):
        raise ValueError(f"{options.output} exists and is not an empty folder; choose another output")
    if options.plot is not None:
        check_can_draw(options.plot)
    names = ("policy", "max_accuracy_drop", "min_speedup", "max_macs", "max_latency", "delta", "bound")
    wanted = {name: getattr(options, name) for name in names}
    check_request(**wanted, has_cost_table=options.cost_table is not None)
    with launched() as (distributed, is_first):
        model, processor, dataset, known = open_options(options)
        warning = known.warning(options.split)
        if warning is not None:
            logger.warning(warning)
        check_rows(len(dataset) - len(dataset) // 2, options.max_accuracy_drop, options.delta, options.bound)
        costs = None
        if options.cost_table is not None:
            costs = CostTable.load(options.cost_table, num_exits=len(model.segments()), model=architecture(model))
            costs.at(options.batch_size)
        table = table_of(model, dataset, options.table, distributed=distributed)
    if not is_first:
        return
    report = calibrate(
        table,
        cost_table=costs,
        batch_size=options.batch_size,
        labels=not options.ignore_labels,
        choose_exits=not options.all_exits,
        **wanted,
    )
    if options.plot is not None:
        labelled = table.without_labels() if options.ignore_labels else table
        plot_calibration(options.plot, labelled, report, not options.ignore_labels, options.max_accuracy_drop)
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    found = {"what": "lgvit calibrate", **known.samples(options.split), **report.to_dict(), "label_names": label_names}
    if options.output is not None:
        model.set_exit_policy(report.policy)
        with replace_folder(options.output) as new:
            model.save_pretrained(new)  # type: ignore[attr-defined]  # of exported ones too
            processor.save_pretrained(new)
            write_training_data(new, read_training_data(options.checkpoint))
            write_json(new / "calibration.json", found)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # the report first: whatever the config says then is explained beside it
        write_json(folder / "calibration.json", found)
        write_json(folder / "config.json", {**config, "exit_policy": report.policy})
    print(f"{known.as_text(options.split)}\n\n{report.as_text()}")
    print(f"\nwritten to {options.output or options.checkpoint}: config.json, and calibration.json with the report")


def _check_may_change(folder: Path) -> None:
    from ..runtimes.manifest import is_exported

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder with a config.json to write the policy into; give --output FOLDER")
    if (folder / "manifest.json").exists() and not is_exported(folder):
        raise ValueError(f"{folder} is a training checkpoint, which must stay as it is; give --output FOLDER")


def plot_calibration(
    file: str, table: ExitTable, report: Calibration, has_labels: bool, max_accuracy_drop: float | None
) -> None:
    """Accuracy against MACs on the half of a table that was not searched on: one threshold for all, and the choice."""
    from ..evaluation.calibration import split_table
    from ..evaluation.plots import plot_pareto
    from ..evaluation.sweep import threshold_curve
    from ..evaluation.threshold_search import RANGES
    from .drawing import UNIT, point, points

    name = report.policy["name"] if report.policy["name"] in RANGES else "confidence"
    curve, full = threshold_curve(split_table(table)[1], name), point(report.full_macs, report.full_accuracy)
    plot_pareto(
        file,
        {"one threshold for all exits": points(curve), "thresholds and exits searched": points(report.frontier)},
        {"chosen": point(report.mean_macs, report.accuracy), "full model": full},
        unit=UNIT,
        measure="accuracy" if has_labels else "agreement with the full model",
        asked_accuracy=None if max_accuracy_drop is None else report.full_accuracy - max_accuracy_drop,
    )
