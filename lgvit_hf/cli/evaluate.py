"""`lgvit evaluate`: a checkpoint judged under its policy, and pictures of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import check_counts, whole
from ..files import add_files, write_json
from .options import add_data, add_policy, policy_of

if TYPE_CHECKING:
    from ..data.processing import ProcessedImages
    from ..engine import Answers
    from ..evaluation.costs import Highway
    from ..evaluation.exit_table import ExitTable

HELP = "accuracy, depth, MACs and wall-clock of a highway, exit by exit"
EXAMPLE = "lgvit evaluate runs/stage2 --data digits --policy confidence --threshold 0.8 --output results.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit evaluate`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway")
    add_data(parser, "test", "rows to report on")
    add_policy(parser)
    parser.add_argument("--batch-size", type=whole(), default=64, help="default: 64")
    parser.add_argument("--timed-batch-sizes", type=whole(), nargs="+", default=[1, 32], help="default: 1 32")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--plots", help="folder for pictures: exits, cost, reliability, classes, confusion, gallery")
    parser.set_defaults(required=("data",))


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    from ..evaluation.report import evaluate_as_text

    report = run_evaluate(
        options.checkpoint,
        options.data,
        policy=policy_of(options),
        output=options.output,
        plots=options.plots,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        batch_size=options.batch_size,
        timed_batch_sizes=options.timed_batch_sizes,
    )
    print(evaluate_as_text(report))


def run_evaluate(
    checkpoint: str,
    data: str,
    *,
    policy: dict[str, Any] | None = None,
    output: str | None = None,
    plots: str | None = None,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    batch_size: int = 64,
    timed_batch_sizes: Sequence[int] = (1, 32),
) -> dict[str, Any]:
    """Judge a checkpoint under its own policy or another one, and draw what was found.

    Args:
        checkpoint (`str`): See `open_highway`.
        data (`str`): See `load_images`.
        policy (`dict`, *optional*): Instead of the saved one.
        output (`str`, *optional*): JSON file for the report.
        plots (`str`, *optional*):
            Folder for `exits.png`, `pareto.png`, `reliability.png`, `classes.png`, `confusion.png`, `gallery.png` and,
            where wall-clock is measured, `latency.png`; not of one exported file.
        which (`str`, *optional*, defaults to `"test"`), validation_share (`float`, *optional*, defaults to 0.15), seed
            (`int`, *optional*, defaults to 0): See `open_highway`.
        batch_size (`int`, *optional*), timed_batch_sizes (`Sequence[int]`, *optional*): See `evaluate`.

    Returns:
        See `evaluate`.
    """
    from transformers.utils import logging

    from ..evaluation.cost_table import machine
    from ..evaluation.costs import decides_inside
    from ..evaluation.report import judge, look
    from .drawing import check_can_draw
    from .inputs import open_highway

    if plots is not None:
        check_can_draw()
    check_counts(batch_size=[batch_size], timed_batch_sizes=timed_batch_sizes)
    model, _, dataset = open_highway(checkpoint, data, which, validation_share, seed)
    if plots is not None and decides_inside(model):
        raise ValueError(f"{checkpoint}: figures show what every exit answers; export with --layout segments for that")
    if policy is not None:
        model.set_exit_policy(policy)
    table, answers = look(model, dataset, batch_size=batch_size)
    progress = partial(logging.tqdm, desc="timing", leave=False)
    report = judge(model, dataset, table, answers, timed_batch_sizes=timed_batch_sizes, progress=progress)
    report = {"what": "lgvit evaluate", "data": data, "split": which, **report, "environment": machine(model)}
    if output is not None:
        write_json(output, report)
    if plots is not None:
        with add_files(plots) as folder:
            _draw_all(folder, model, dataset, table, answers, report)
    return report


def _draw_all(
    folder: Path,
    model: Highway,
    dataset: ProcessedImages,
    table: ExitTable,
    answers: Answers,
    report: dict[str, Any],
) -> None:
    from ..evaluation.plots import (
        plot_classes,
        plot_confusion,
        plot_exits,
        plot_gallery,
        plot_latency,
        plot_pareto,
        plot_reliability,
    )
    from ..evaluation.sweep import threshold_curve
    from .drawing import UNIT, StoredImages, points

    names = [entry["name"] for entry in report["classes"]]
    overall = report["overall"]
    plot_exits(folder / "exits.png", report)
    plot_pareto(
        folder / "pareto.png",
        {"one threshold for all exits": points(threshold_curve(table))},
        {
            f"this policy ({report['policy']['name']})": {
                "cost": overall["mean_macs"] / 1e6,
                "accuracy": overall["accuracy"],
            },
            "full model": {"cost": overall["backbone_macs"] / 1e6, "accuracy": overall["accuracy_full_model"]},
        },
        unit=UNIT,
    )
    diagrams = [
        {
            "name": f"after block {exit['exit_layer']}, {exit['head']}",
            "all": bins["reliability_all"],
            "exited": bins["reliability_exited"] if exit["samples"] else None,
        }
        for exit, bins in zip(report["exits"], report["reliability"], strict=True)
    ]
    plot_reliability(folder / "reliability.png", diagrams)
    plot_classes(folder / "classes.png", report["classes"])
    plot_confusion(folder / "confusion.png", report["confusion"], names)
    told = [
        {"depth": depth, "score": score, "predicted": names[answer], "label": names[label]}
        for depth, score, answer, label in zip(
            answers.exit_layer.tolist(),
            answers.exit_score.tolist(),
            answers.logits.argmax(-1).tolist(),
            table.labels.tolist(),
            strict=True,
        )
    ]
    plot_gallery(folder / "gallery.png", StoredImages(dataset), told)
    if report["wall_clock"]:
        timed = [
            {
                "batch_size": int(size),
                "wall_clock_speed_up": times["wall_clock_speed_up"],
                "layer_speed_up": overall["layer_speed_up"],
                "ideal_speed_up": None,
            }
            for size, times in report["wall_clock"].items()
        ]
        plot_latency(folder / "latency.png", timed)
