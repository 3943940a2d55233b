"""`lgvit report`: one page that shows what thresholds do, for a browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import whole
from ..files import replace_file
from .options import add_data

if TYPE_CHECKING:
    from ..evaluation.calibration_report import Calibration

HELP = "one HTML page of what thresholds do: accuracy, cost, exits, classes, images"
EXAMPLE = "lgvit report runs/stage2 --data photos/ --cost-table costs.json --output report.html"
REQUIRED = ("data", "output")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit report`."""
    add = parser.add_argument
    add_data(parser, "test", "samples to report on")
    add("--table", help="file of the table of exits: read if it is there, otherwise written")
    add("--cost-table", help="measured times to show instead of MACs: lgvit benchmark --cost-table")
    add("--batch-size", type=whole(), default=1, help="at which the cost table is read (default: 1)")
    add("--output", help="HTML file to write; it needs no server and no network")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result.

    Raises:
        ValueError: The model is one exported file, which does not say what exits answer.
    """
    from .. import __version__
    from ..evaluation.cost_table import CostTable, architecture
    from ..evaluation.profiling import head_names
    from ..evaluation.report_page import report_data
    from ..hub.card import data_name
    from ..pages import page
    from .inputs import open_options, table_of

    if Path(options.output).is_dir():
        raise ValueError(f"{options.output} is a folder; give the page's file name, as {options.output}/report.html")
    model, _, dataset, _ = open_options(options)
    costs = None
    if options.cost_table is not None:
        costs = CostTable.load(options.cost_table, num_exits=len(model.segments()), model=architecture(model))
        costs.at(options.batch_size)
    data: dict[str, Any] = report_data(
        table_of(model, dataset, options.table),
        model.exit_policy,
        [model.config.id2label[index] for index in range(model.config.num_labels)],
        head_names(model),
        dataset.picture,
        command=["lgvit", "evaluate", options.checkpoint, "--data", options.data, "--split", options.split],
        cost_table=costs,
        batch_size=options.batch_size,
        calibration=_calibration_of(options.checkpoint),
    )
    about = {
        "model": Path(options.checkpoint).resolve().name,
        "data": data_name({"data": options.data}),
        "split": options.split,
    }
    with replace_file(options.output) as file:
        file.write_text(page("report.html", {**about, "version": __version__, **data}), encoding="utf-8")
    settings = sum(len(mode["settings"]) for mode in data["modes"])
    print(
        f"{settings} settings on {data['samples']:,} {options.split} samples in {options.output}; open it in a browser"
    )


def _calibration_of(checkpoint: str) -> Calibration | None:
    """What `lgvit calibrate` wrote beside a checkpoint, if it did."""
    from ..evaluation.calibration_report import Calibration

    file = Path(checkpoint) / "calibration.json"
    return Calibration.load(file) if file.is_file() else None
