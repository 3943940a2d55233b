"""One highway in several runtimes, against the clock: the same batches in one interleaved run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine import run_early
from ..policies import NeverPolicy
from ..segments import State
from .cost_table import machine, measured_sizes
from .costs import Highway, decides_inside
from .timing import time_interleaved


def compare_runtimes(
    models: Mapping[str, Highway],
    pixels: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    repeats: int = 5,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Time the same highway in several runtimes, with early exit under its policy and without.

    Args:
        models (`Mapping[str, Highway]`): By the name to report; speed-ups count from the first, without early exit.
        pixels (`Tensor`): `[N, C, H, W]`, real images: which samples exit early depends on them.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 8, 32)`): Only full batches are timed.
        repeats (`int`, *optional*, defaults to 5): Timed rounds per batch.
        progress (callable, *optional*): Wraps the batches, to show progress.

    Returns:
        `environment`, and of each batch size in `batches` the `runs` of each runtime: `early_exit_ms` and `full_ms` of
        a batch, the mean over batches of the medians (`None` of one file, which decides inside), `images_per_second`,
        `speed_up` over the first runtime without early exit, and over itself (`early_exit_speed_up`).

    Raises:
        ValueError: The first runtime cannot run without early exit; a batch size that does not fit the images.

    Example:

        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> model = ViTHighway(ViTHighwayConfig(image_size=32, num_hidden_layers=3, hidden_size=24)).eval()
        >>> report = compare_runtimes({"torch": model}, torch.zeros(2, 3, 32, 32), batch_sizes=[2], repeats=1)
        >>> sorted(report["batches"][0]["runs"]["torch"])
        ['early_exit_ms', 'early_exit_speed_up', 'full_ms', 'images_per_second', 'speed_up']
    """
    measured_sizes(batch_sizes, len(pixels))
    first, *_ = models
    if decides_inside(models[first]):
        raise ValueError(f"{first}: one file that decides inside does not run without early exit; name torch first")
    report: dict[str, Any] = {"environment": {name: machine(model) for name, model in models.items()}, "batches": []}
    for size in progress(sorted(set(batch_sizes))):
        times: dict[str, list[float]] = {}
        for start in range(0, len(pixels) - size + 1, size):
            seconds = time_interleaved(_runs(models, pixels[start : start + size]), repeats=repeats, warm_up=1)
            for name, measured in seconds.items():
                times.setdefault(name, []).append(1e3 * statistics.median(measured))
        means = {name: statistics.mean(each) for name, each in times.items()}
        runs = {name: _figures(means, name, first, size) for name in models}
        report["batches"].append({"batch_size": size, "num_batches": len(pixels) // size, "runs": runs})
    return report


def _runs(models: Mapping[str, Highway], batch: Tensor) -> dict[str, Callable[[], Any]]:
    runs: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        runs[f"{name} early"] = partial(torch.inference_mode()(model), batch.to(model.device))
        if not decides_inside(model):
            state = State({"pixel_values": batch.to(model.device, model.dtype)})
            runs[f"{name} full"] = partial(run_early, model.segments(), state, NeverPolicy())
    return runs


def _figures(means: Mapping[str, float], name: str, first: str, size: int) -> dict[str, float | None]:
    early, full = means[f"{name} early"], means.get(f"{name} full")
    return {
        "early_exit_ms": early,
        "full_ms": full,
        "images_per_second": 1e3 * size / early,
        "speed_up": means[f"{first} full"] / early,
        "early_exit_speed_up": full and full / early,
    }


def comparison_as_text(report: Mapping[str, Any]) -> str:
    """What `compare_runtimes` found, for a terminal."""
    lines = ["batch size  runtime        full ms  early ms  images/s  speed-up  by early exit"]
    for entry in report["batches"]:
        for number, (name, run) in enumerate(entry["runs"].items()):
            size, full = "" if number else str(entry["batch_size"]), run["full_ms"]
            own = "" if full is None else f"{run['early_exit_speed_up']:.2f}x"
            shown = "-" if full is None else f"{full:.2f}"
            figures = f"{shown:>9}{run['early_exit_ms']:>10.2f}{run['images_per_second']:>10.1f}"
            lines.append(f"{size:>10}  {name:12}{figures}{run['speed_up']:>9.2f}x{own:>15}".rstrip())
    return "\n".join(lines)
