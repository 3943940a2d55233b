"""`lgvit sweep`: a policy at many values of its first parameter."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.settings import check_counts, real, whole
from .options import add_data

HELP = "a policy at many thresholds: accuracy, depth, cost; goes on where it stopped"
EXAMPLE = (
    "lgvit sweep runs/stage2 --data photos/ --output sweep --policy confidence --range 0.5 0.99 25\n"
    "  lgvit sweep runs/stage2 --data photos/ --output patience --policy patience --values 1 2 3 4"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit sweep`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway")
    add_data(parser, "test", "rows to report on")
    parser.add_argument("--output", help="folder for the table, the rows and a plot")
    parser.add_argument("--policy", default="confidence", help="which built-in policy (default: confidence)")
    parser.add_argument("--values", type=real(), nargs="+", help="thresholds, or patiences, or exit indices of fixed")
    parser.add_argument(
        "--range", type=real(), nargs=3, metavar=("FROM", "TO", "STEPS"), help="that many values, evenly spaced"
    )
    parser.add_argument("--patience", type=whole(), help="of patience_confidence")
    parser.add_argument("--entropy-threshold", type=real(), help="of confidence_entropy")
    parser.add_argument(
        "--timed-batch-sizes", type=whole(), nargs="+", default=[], help="also measure wall-clock at these"
    )
    parser.set_defaults(required=("data", "output"))


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    if (options.values is None) == (options.range is None):
        raise ValueError("give either --values or --range FROM TO STEPS")
    if options.values is None:
        first, last, steps = options.range
        if not steps >= 2 or steps % 1:
            raise ValueError(f"--range: STEPS={steps:g} must be a whole number of at least 2")
        options.values = [round(first + (last - first) * step / (steps - 1), 10) for step in range(int(steps))]
    given = {name: getattr(options, name) for name in ("patience", "entropy_threshold")}
    rows = run_sweep(
        options.checkpoint,
        options.data,
        options.output,
        policy={"name": options.policy, **{name: value for name, value in given.items() if value is not None}},
        values=options.values,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        timed_batch_sizes=options.timed_batch_sizes,
    )
    print(sweep_as_text(rows))
    print(f"\nkept in {options.output}: sweep.jsonl, table.safetensors, and sweep.png where matplotlib is installed")


# the parameter that a sweep varies, by policy
SWEPT = {
    "confidence": "threshold",
    "margin": "threshold",
    "entropy": "threshold",
    "confidence_entropy": "threshold",
    "label_confidence": "threshold",
    "patience": "patience",
    "patience_confidence": "threshold",
    "fixed": "exit_index",
}


def run_sweep(
    checkpoint: str,
    data: str,
    output: str,
    *,
    policy: dict[str, Any],
    values: Sequence[float],
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    timed_batch_sizes: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """A policy at many values of its first parameter: `table.safetensors`, `sweep.jsonl` and `sweep.png` in a folder.

    Args:
        checkpoint (`str`): See `open_highway`.
        data (`str`): See `load_images`.
        output (`str`): The folder; what an earlier run of the same sweep left there is not run again.
        policy (`dict`): Its name, and the parameters that stay as they are.
        values (`Sequence[float]`): Of the parameter in `SWEPT`.
        which (`str`, *optional*, defaults to `"test"`): The split.
        validation_share (`float`, *optional*, defaults to 0.15), seed (`int`, *optional*, defaults to 0):
            See `open_highway`.
        timed_batch_sizes (`Sequence[int]`, *optional*): Batch sizes at which wall-clock is measured for every value.

    Raises:
        KeyboardInterrupt: Stopped; says how to go on.
    """
    from transformers.utils import logging

    from ..evaluation.benchmark import wall_clock_speed_up
    from ..evaluation.plots import plot_pareto
    from ..evaluation.report import timed_pixels
    from ..evaluation.sweep import sweep
    from ..policies import build_policy
    from .drawing import UNIT, points
    from .inputs import open_highway, table_of

    parameter = SWEPT.get(policy["name"])
    if parameter is None:
        raise ValueError(f"a sweep knows the policies {', '.join(SWEPT)}, not {policy['name']!r}")
    check_counts(timed_batch_sizes=timed_batch_sizes)
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values={list(values)} must be numbers")
    whole = parameter != "threshold"
    policies = [{**policy, parameter: int(value) if whole else value} for value in values]
    for settings in policies:
        if whole and settings[parameter] not in values:
            raise ValueError(f"{parameter} is a whole number; choose values or a range with steps of 1")
    folder = Path(output)
    model, _, dataset = open_highway(checkpoint, data, which, validation_share, seed)
    for settings in policies:
        build_policy(settings, len(model.segments()) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(model, dataset, folder / "table.safetensors")
    pixels = timed_pixels(dataset)

    def time(settings: dict[str, Any]) -> dict[str, float]:
        model.set_exit_policy(settings)
        timed = {size: wall_clock_speed_up(model, pixels.split(size), repeats=3) for size in timed_batch_sizes}
        return {str(size): times["wall_clock_speed_up"] for size, times in timed.items()}

    what = {
        "what": "lgvit sweep",
        "weights": table.weights,
        "data": data,
        "split": which,
        "samples": len(table),
        "timed_batch_sizes": list(timed_batch_sizes),
    }
    progress = partial(logging.tqdm, desc="sweep", leave=False)
    file = folder / "sweep.jsonl"
    try:
        rows = sweep(table, policies, file, what=what, time=time if timed_batch_sizes else None, progress=progress)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"stopped; what is done is kept in {file}, the same command goes on") from stopped
    if importlib.util.find_spec("matplotlib"):
        full = {"cost": table.costs.backbone / 1e6, "accuracy": table.accuracies()[-1]}
        plot_pareto(
            folder / "sweep.png",
            {f"{policy['name']}, {parameter} from {min(values):g} to {max(values):g}": points(rows)},
            {"full model": full},
            unit=UNIT,
        )
    return rows


def sweep_as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line per value: accuracy, depth, layer speed-up, MACs, and the clock where it was asked."""
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
