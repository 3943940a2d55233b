"""Evidence of drift as it grew, and which exits are taken more or less often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import BLUE, LIGHT_BLUE, RED, hide_frame, legend_below, need, new_figure, percent, save


def plot_drift(file: str | Path, history: Sequence[Mapping[str, float]], report: Mapping[str, Any]) -> None:
    """Draw the evidence against "nothing has changed" over the samples, and the share of each exit then and now.

    Args:
        file (`str` or `Path`): The PNG to write.
        history (`list[dict]`): `{"samples", "p_value"}` as they came.
        report (`dict`): As `DriftMonitor.report` gives it.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no history.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> exits = [{"exit_index": 0, "baseline_share": 0.5, "share": 0.6}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_drift(f"{folder}/drift.png", [{"samples": 9, "p_value": 0.2}], {"alpha": 0.01, "exits": exits})
    """
    need(history, "history", "check")
    figure = new_figure(max(9, 5 + 0.7 * len(report["exits"])), 4.5)
    left, right = figure.subplots(1, 2)
    # what is less than a float can say is drawn as the least it can
    evidence = [-math.log10(max(entry["p_value"], 1e-300)) for entry in history]
    left.plot([entry["samples"] for entry in history], evidence, color=BLUE, label="evidence: 1 / p-value")
    left.axhline(-math.log10(report["alpha"]), color=RED, linestyle="--", label=f"alarm: 1 / {report['alpha']:g}")
    left.set(xlabel="samples", ylabel="power of ten", title="Evidence that something has changed")
    places = range(len(report["exits"]))
    for shift, key, name, color in ((-0.2, "baseline_share", "baseline", LIGHT_BLUE), (0.2, "share", "seen", BLUE)):
        heights = [percent(row[key]) for row in report["exits"]]
        right.bar([place + shift for place in places], heights, 0.4, color=color, label=name)
    right.set_xticks(places, [str(row["exit_index"]) for row in report["exits"]])
    right.set(xlabel="exit", ylabel="samples that exit there, %", title="Exits")
    for axes in (left, right):
        axes.margins(y=0.1)
        hide_frame(axes)
    legend_below(figure, left)
    right.legend(frameon=False, fontsize=9)
    save(figure, file)
