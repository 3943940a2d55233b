"""Figures of a report. The only file that imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_report(
    report: dict[str, Any], curve: list[dict[str, float]], file: str | Path, *, measure: str = "accuracy"
) -> None:
    """Draw where rows leave and what that costs, as a PNG.

    Args:
        report (`dict`): Of `evaluate`.
        curve (`list[dict]`): Points `{"mean_macs", "accuracy"}` of the same model under other thresholds.
        file (`str` or `Path`): The PNG to write.
        measure (`str`, *optional*, defaults to `"accuracy"`): What the shares are of, `"agreement"` without labels.

    Raises:
        ImportError: The extra `plots` is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures are drawn with matplotlib: pip install "lgvit-hf[plots]"') from error

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    exits, overall = report["exits"], report["overall"]
    names = [f"{row['position']} {row['head']}" for row in exits]
    left.bar(range(len(exits)), [100 * row["share"] for row in exits], color="#4c78a8", label="rows leaving here")
    left.plot(
        range(len(exits)),
        [100 * row["accuracy_all"] for row in exits],
        color="#f58518",
        marker="o",
        label=f"{measure}, all rows",
    )
    left.set_xticks(range(len(exits)), names, fontsize=8, rotation=30, ha="right")
    left.set(xlabel="blocks run, and head", ylabel="%", title="Where rows leave", ylim=(0, 105))
    left.legend(loc="center right")

    right.plot(
        [point["mean_macs"] / 1e6 for point in curve],
        [100 * point["accuracy"] for point in curve],
        color="#4c78a8",
        marker=".",
        label="other thresholds",
    )
    right.plot(
        overall["mean_macs"] / 1e6, 100 * overall["accuracy"], "*", color="#e45756", markersize=15, label="chosen"
    )
    right.plot(
        overall["backbone_macs"] / 1e6,
        100 * overall["accuracy_full_model"],
        "s",
        color="#54a24b",
        label="backbone without exits",
    )
    right.set(xlabel="million MACs per image, heads counted", ylabel=f"{measure}, %", title="What it costs")
    right.set_xlim(left=0)
    right.legend()
    figure.savefig(file, dpi=150)
