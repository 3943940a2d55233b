"""Speed-up by the clock, beside what was promised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import BLUE, LIGHT_BLUE, ORANGE, hide_frame, legend_below, need, new_figure, number_of, save


def plot_latency(file: str | Path, benchmark_rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the speed-up that was measured beside what the depth promises, per batch size.

    Args:
        file (`str` or `Path`): The PNG to write.
        benchmark_rows (`list[dict]`):
            `{"batch_size", "wall_clock_speed_up", "layer_speed_up", "ideal_speed_up"}`, each against the backbone
            without heads: measured; by blocks run; by the time of the blocks and heads really run, or `None`.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no row.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> rows = [{"batch_size": 1, "wall_clock_speed_up": 1.4, "layer_speed_up": 1.6, "ideal_speed_up": None}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_latency(f"{folder}/latency.png", rows)
    """
    need(benchmark_rows, "benchmark_rows", "batch size")
    series = [
        ("measured by the clock", "wall_clock_speed_up", BLUE, None),
        ("ideal: time of the blocks and heads really run", "ideal_speed_up", LIGHT_BLUE, "//"),
        ("layer ratio: blocks of the backbone over blocks run", "layer_speed_up", ORANGE, ".."),
    ]
    series = [one for one in series if any(row[one[1]] is not None for row in benchmark_rows)]
    figure = new_figure(max(6, 1.5 + 1.5 * len(benchmark_rows)), 5)
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (name, key, color, hatch) in enumerate(series):
        left = [place + (number - (len(series) - 1) / 2) * width for place in range(len(benchmark_rows))]
        heights = [number_of(row[key]) for row in benchmark_rows]
        bars = axes.bar(left, heights, width, label=name, color=color, hatch=hatch, edgecolor="white")
        texts = ["" if math.isnan(height) else f"{height:.2f}" for height in heights]
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line at 1 may pass there
        axes.bar_label(bars, texts, fontsize=8, padding=2, bbox=behind)
    axes.axhline(1, color="black", linestyle="--", label="as fast as the backbone without heads")
    axes.set_xticks(range(len(benchmark_rows)), [str(row["batch_size"]) for row in benchmark_rows])
    axes.set(xlabel="batch size", ylabel="times as fast as the backbone", title="Speed-up, measured and promised")
    axes.margins(y=0.1)
    hide_frame(axes)
    legend_below(figure, axes)
    save(figure, file)
