"""Where samples exit, and how right they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..report_types import EvaluationReport, ExitFigures
from .costs import FULL_MODEL, draw_costs
from .style import BLUE, RED, hide_frame, legend_below, need, new_figure, number_of, percent, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def plot_report(
    report: dict[str, Any], curve: list[dict[str, float]], file: str | Path, *, measure: str = "accuracy"
) -> None:
    """Draw where samples exit, how right they are and what that costs, as a PNG.

    Args:
        report (`dict`): Of `evaluate`.
        curve (`list[dict]`): Points `{"mean_macs", "accuracy"}` of the same model under other thresholds.
        file (`str` or `Path`): The PNG to write.
        measure (`str`, *optional*, defaults to `"accuracy"`): What the shares are of, `"agreement"` without labels.

    Raises:
        ImportError: The extra `plots` is not installed.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> final = {"exit_layer": 2, "head": "final", "samples": 4, "share": 1.0}
        >>> final |= {"accuracy_exited": 0.5, "accuracy_all": 0.5}
        >>> overall = {"accuracy": 0.5, "mean_macs": 9e6, "accuracy_full_model": 0.5, "backbone_macs": 9e6}
        >>> curve = [{"accuracy": 0.4, "mean_macs": 6e6}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_report({"exits": [final], "overall": overall}, curve, f"{folder}/report.png")
    """
    typed = cast("EvaluationReport", report)
    overall = typed["overall"]
    full = number_of(overall["accuracy_full_model"])
    width = _width(len(typed["exits"]))
    figure = new_figure(width + 6, 6)
    left, right = figure.subfigures(1, 2, width_ratios=[width, 6], squeeze=False).flat
    _draw_exits(left, typed["exits"], measure)
    draw_costs(
        right,
        {"other thresholds": [{"cost": point["mean_macs"] / 1e6, **point} for point in curve]},
        {
            "chosen": {"cost": overall["mean_macs"] / 1e6, "accuracy": overall["accuracy"]},
            FULL_MODEL: {"cost": overall["backbone_macs"] / 1e6, "accuracy": full},
        },
        unit="million MACs per image, heads counted",
        measure=measure,
    )
    save(figure, file)


def plot_exits(file: str | Path, report: Mapping[str, Any], *, measure: str = "accuracy") -> None:
    """Draw how many samples exit at each exit, and how right they are there and over all samples.

    Args:
        file (`str` or `Path`): The PNG to write.
        report (`dict`): Of `summarise`.
        measure (`str`, *optional*, defaults to `"accuracy"`): What the shares are of, `"agreement"` without labels.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no exit.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> first = {"exit_layer": 1, "head": "linear", "samples": 3, "share": 0.75}
        >>> final = {"exit_layer": 2, "head": "final", "samples": 1, "share": 0.25}
        >>> right = {"accuracy_exited": 1.0, "accuracy_all": 0.5}
        >>> with TemporaryDirectory() as folder:
        ...     plot_exits(f"{folder}/exits.png", {"exits": [{**first, **right}, {**final, **right}]})
    """
    exits: list[ExitFigures] = report["exits"]
    need(exits, "exits", "exit")
    figure = new_figure(_width(len(exits)), 6)
    _draw_exits(figure, exits, measure)
    save(figure, file)


def _width(num_exits: int) -> float:
    """Inches that a panel with this many exits needs."""
    return min(14, max(6, 2 + 0.6 * num_exits))


def _draw_exits(figure: FigureBase, exits: Sequence[ExitFigures], measure: str) -> None:
    axes_of_both: list[Axes] = list(figure.subplots(2, 1))
    exited, right = axes_of_both
    places, many = range(len(exits)), len(exits) > 12
    bars = exited.bar(places, [percent(row["share"]) for row in exits], color=BLUE)
    exited.bar_label(bars, [f"{row['samples']:,}" for row in exits], fontsize=8)
    exited.set(title="How many samples exit at each exit", ylabel="samples that exit, %")
    exited.margins(y=0.15)
    exited.tick_params(labelbottom=False)
    exited.set_xticks(places)

    accuracies_all = [percent(row["accuracy_all"]) for row in exits]
    accuracies_exited = [percent(row["accuracy_exited"]) for row in exits]
    right.plot(places, accuracies_all, color=BLUE, marker="o", label="all samples")
    right.plot(places, accuracies_exited, "D", color=RED, markersize=7, label="samples that exit there")
    names = [f"{row['exit_layer']} {short(row['head'], 14)}" for row in exits]
    right.set_xticks(places, names, fontsize=8, rotation=60 if many else 30, ha="right", rotation_mode="anchor")
    right.set(title="How right they are", xlabel="blocks run, and head", ylabel=f"{measure}, %", ylim=(-4, 104))
    for axes in (exited, right):
        axes.set_xlim(-0.6, len(exits) - 0.4)
        hide_frame(axes)
    legend_below(figure, right, columns=2)
