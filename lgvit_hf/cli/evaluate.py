"""`lgvit evaluate`: a checkpoint judged under its policy, and pictures of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import whole
from ..files import add_files, write_json
from .options import add_data, add_policy, add_runtime

if TYPE_CHECKING:
    from ..data.processing import ProcessedImages
    from ..engine import Answers
    from ..evaluation.exit_table import ExitTable

HELP = "accuracy, depth, MACs and wall-clock of a highway, exit by exit"
EXAMPLE = "lgvit evaluate runs/stage2 --data digits --policy confidence --threshold 0.8 --output results.json"
REQUIRED = ("data",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit evaluate`."""
    add_data(parser, "test", "samples to report on")
    add_policy(parser)
    add_runtime(parser)
    parser.add_argument("--batch-size", type=whole(), default=64, help="default: 64")
    parser.add_argument("--timed-batch-sizes", type=whole(), nargs="+", default=[1, 32], help="default: 1 32")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--plots", help="folder for pictures: exits, cost, reliability, classes, confusion, gallery")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..evaluation.cost_table import machine
    from ..evaluation.costs import decides_inside
    from ..evaluation.report import evaluate_as_text, judge, look
    from .drawing import check_can_draw
    from .inputs import launched, open_options, progress_bar

    if options.plots is not None:
        check_can_draw()
    with launched() as (distributed, is_first):
        model, _, dataset, _ = open_options(options, has_policy=True)
        if options.plots is not None and decides_inside(model):
            hint = "figures show what every exit answers; export with --layout segments for that"
            raise ValueError(f"{options.checkpoint}: {hint}")
        if options.plots is not None and not model.config.exits:
            raise ValueError(
                f"{options.checkpoint}: the figures of --plots compare exits, and it has none; leave it out"
            )
        table, answers = look(model, dataset, batch_size=options.batch_size, distributed=distributed)
    if not is_first:
        return
    timed = options.timed_batch_sizes
    report = judge(model, dataset, table, answers, timed_batch_sizes=timed, progress=progress_bar)
    report = {"what": "lgvit evaluate", "data": options.data, "split": options.split, **report}
    report["environment"] = machine(model)
    if options.output is not None:
        write_json(options.output, report)
    if options.plots is not None:
        with add_files(options.plots) as folder:
            _draw_all(folder, dataset, table, answers, report)
    print(evaluate_as_text(report))


def _draw_all(folder: Path, dataset: ProcessedImages, table: ExitTable, answers: Answers, report: dict) -> None:
    from ..evaluation import plots
    from ..evaluation.sweep import threshold_curve
    from .drawing import UNIT, StoredImages, evaluated, points

    names = [entry["name"] for entry in report["classes"]]
    curve = points(threshold_curve(table))
    marks = evaluated(f"this policy ({report['policy']['name']})", report["overall"])
    plots.plot_exits(folder / "exits.png", report)
    plots.plot_pareto(folder / "pareto.png", {"one threshold for all exits": curve}, marks, unit=UNIT)
    diagrams = [
        {
            "name": f"after block {exit['exit_layer']}, {exit['head']}",
            "all": bins["reliability_all"],
            "exited": bins["reliability_exited"] if exit["samples"] else None,
        }
        for exit, bins in zip(report["exits"], report["reliability"], strict=True)
    ]
    plots.plot_reliability(folder / "reliability.png", diagrams)
    plots.plot_classes(folder / "classes.png", report["classes"])
    plots.plot_confusion(folder / "confusion.png", report["confusion"], names)
    columns = (answers.exit_layer, answers.exit_score, answers.logits.argmax(-1), table.labels)
    told: list[Any] = [
        {"depth": depth, "score": score, "predicted": names[answer], "label": names[label]}
        for depth, score, answer, label in zip(*(column.tolist() for column in columns), strict=True)
    ]
    plots.plot_gallery(folder / "gallery.png", StoredImages(dataset), told)
    if report["wall_clock"]:
        layers = {"layer_speed_up": report["overall"]["layer_speed_up"], "ideal_speed_up": None}
        timed = [
            {"batch_size": int(size), "wall_clock_speed_up": times["wall_clock_speed_up"], **layers}
            for size, times in report["wall_clock"].items()
        ]
        plots.plot_latency(folder / "latency.png", timed)
