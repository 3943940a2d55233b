"""`lgvit sweep`: a policy at many values of its first parameter."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.settings import real, whole
from .options import add_data

HELP = "a policy at many thresholds: accuracy, depth, cost; goes on where it stopped"
EXAMPLE = (
    "lgvit sweep runs/stage2 --data photos/ --output sweep --policy confidence --range 0.5 0.99 25\n"
    "  lgvit sweep runs/stage2 --data photos/ --output patience --policy patience --values 1 2 3 4"
)
REQUIRED = ("data", "output")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit sweep`."""
    add = parser.add_argument
    add_data(parser, "test", "samples to report on")
    add("--output", help="folder for the table, the rows and a plot")
    add("--policy", default="confidence", help="which built-in policy (default: confidence)")
    add("--values", type=real(), nargs="+", help="thresholds, or patiences, or exit indices of fixed")
    add("--range", type=real(), nargs=3, metavar=("FROM", "TO", "STEPS"), help="that many values, evenly spaced")
    add("--patience", type=whole(), help="of patience_confidence")
    add("--entropy-threshold", type=real(), help="of confidence_entropy")
    add("--timed-batch-sizes", type=whole(), nargs="+", default=[], help="also measure wall-clock at these")


# the parameter that a sweep varies, by policy
THRESHOLDS = ("confidence", "margin", "entropy", "confidence_entropy", "label_confidence", "patience_confidence")
SWEPT = {**dict.fromkeys(THRESHOLDS, "threshold"), "patience": "patience", "fixed": "exit_index"}


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result.

    Raises:
        KeyboardInterrupt: Stopped; says how to go on.
    """
    from ..evaluation.benchmark import wall_clock_speed_up
    from ..evaluation.costs import model_macs
    from ..evaluation.plots import plot_pareto
    from ..evaluation.report import timed_pixels
    from ..evaluation.sweep import sweep
    from ..policies import build_policy
    from .drawing import UNIT, point, points
    from .inputs import open_options, progress_bar, table_of

    parameter, values, policies = _policies(options)
    folder, file = Path(options.output), Path(options.output) / "sweep.jsonl"
    model, _, dataset, _ = open_options(options)
    for settings in policies:
        build_policy(settings, len(model.segments()) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(model, dataset, folder / "table.safetensors")
    pixels = timed_pixels(dataset)

    def time(settings: dict[str, Any]) -> dict[str, Any]:
        model.set_exit_policy(settings)
        timed = {size: wall_clock_speed_up(model, pixels.split(size), repeats=3) for size in options.timed_batch_sizes}
        return {str(size): times["wall_clock_speed_up"] for size, times in timed.items()}

    what = {"what": "lgvit sweep", "weights": table.weights, "data": options.data, "split": options.split}
    what |= {"samples": len(table), "timed_batch_sizes": options.timed_batch_sizes}
    clock, progress = time if options.timed_batch_sizes else None, partial(progress_bar, desc="sweep")
    try:
        rows = sweep(table, policies, file, what=what, time=clock, progress=progress)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"stopped; what is done is kept in {file}, the same command goes on") from stopped
    if importlib.util.find_spec("matplotlib"):
        full = point(model_macs(model).backbone, table.accuracies()[-1])
        name = f"{options.policy}, {parameter} from {min(values):g} to {max(values):g}"
        plot_pareto(folder / "sweep.png", {name: points(rows)}, {"full model": full}, unit=UNIT)
    print(sweep_as_text(rows))
    print(f"\nkept in {folder}: sweep.jsonl, table.safetensors, and sweep.png where matplotlib is installed")


def _policies(options: argparse.Namespace) -> tuple[str, list[float], list[dict[str, Any]]]:
    """The parameter that is varied, its values, and the policies."""
    if (options.values is None) == (options.range is None):
        raise ValueError("give either --values or --range FROM TO STEPS")
    values = options.values
    if values is None:
        first, last, steps = options.range
        if not steps >= 2 or steps % 1:
            raise ValueError(f"--range: STEPS={steps:g} must be a whole number of at least 2")
        values = [round(first + (last - first) * step / (steps - 1), 10) for step in range(int(steps))]
    parameter = SWEPT.get(options.policy)
    if parameter is None:
        raise ValueError(f"a sweep knows the policies {', '.join(SWEPT)}, not {options.policy!r}")
    if parameter != "threshold":
        if any(value % 1 for value in values):
            raise ValueError(f"{parameter} is a whole number; choose values or a range with steps of 1")
        values = list(map(int, values))
    names = ("patience", "entropy_threshold")
    fixed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return parameter, values, [{"name": options.policy, **fixed, parameter: value} for value in values]


def sweep_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line per value: accuracy, depth, layer speed-up, MACs, and the clock where it was measured."""
    parameter = SWEPT[rows[0]["policy"]["name"]]
    sizes = list(rows[0].get("wall_clock", {}))
    clock = "".join(f"   clock, batch {size}" for size in sizes)
    lines = [f"{parameter:>11}   accuracy   mean depth   layers    MMACs     MACs{clock}"]
    for row in rows:
        times = "".join(f"{row['wall_clock'][size]:>{15 + len(size)}.2f}x" for size in sizes)
        lines.append(
            f"{row['policy'][parameter]:>11.4g}   {row['accuracy']:8.2%}   {row['mean_depth']:10.2f}   "
            f"{row['layer_speed_up']:5.2f}x   {row['mean_macs'] / 1e6:6.1f}   {row['macs_speed_up']:5.2f}x{times}"
        )
    return "\n".join(lines)
