"""Accuracy against cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

POINT_STYLES = (
    (style.RED, "*", 15),
    (style.PURPLE, "D", 8),
    (style.ORANGE, "^", 9),
    (style.BLUE, "v", 9),
    (style.GREY, "P", 9),
    (style.LIGHT_BLUE, "X", 9),
)

FULL_MODEL, FULL_MODEL_STYLE = "full model", (style.GREEN, "s", 8)


def plot_pareto(
    file: str | Path,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    points: Mapping[str, Mapping[str, float]],
    *,
    unit: str,
    measure: str = "accuracy",
    asked_accuracy: float | None = None,
) -> None:
    """Draw accuracy against cost: up and to the left is better.

    Args:
        file (`str` or `Path`): The PNG to write.
        curves (`dict`): Name to points `{"cost", "accuracy"}` of one method under several settings.
        points (`dict`):
            Name to one point `{"cost", "accuracy"}`; a dashed line goes through that of `"full model"`.
        unit (`str`): Of the costs, such as `"million MACs per image"` or `"ms per image"`.
        measure (`str`, *optional*, defaults to `"accuracy"`): What the accuracies, shares in [0, 1], are called.
        asked_accuracy (`float`, *optional*): The least that was asked for: a dotted line.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is neither a curve nor a point.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> curve = [{"cost": 0.5, "accuracy": 0.81}, {"cost": 0.8, "accuracy": 0.84}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_pareto(
        ...         f"{folder}/pareto.png",
        ...         {"one threshold for all exits": curve},
        ...         {"full model": {"cost": 1.0, "accuracy": 0.85}},
        ...         unit="million MACs per image",
        ...     )
        ...     [file.name for file in Path(folder).iterdir()]
        ['pareto.png']
    """
    if not points and not any(curves.values()):
        raise ValueError("there is nothing to draw: curves and points are both empty; give one point at least")
    figure = style.new_figure(8, 5 + 0.2 * (len(curves) + len(points)))
    draw_costs(figure, curves, points, unit=unit, measure=measure, asked_accuracy=asked_accuracy)
    style.save(figure, file)


def draw_costs(
    figure: FigureBase,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    points: Mapping[str, Mapping[str, float]],
    *,
    unit: str,
    measure: str,
    asked_accuracy: float | None = None,
) -> None:
    """The panel of `plot_pareto`, of the same arguments, in a figure or a part of one."""
    axes = figure.subplots()
    for (name, curve), (color, line, marker) in zip(curves.items(), itertools.cycle(style.CURVE_STYLES), strict=False):
        ordered = sorted(curve, key=lambda point: point["cost"])
        costs, accuracies = [p["cost"] for p in ordered], [style.percent(p["accuracy"]) for p in ordered]
        axes.plot(costs, accuracies, color=color, linestyle=line, marker=marker, label=style.short(name, 60))
    if asked_accuracy is not None:
        name = f"asked for: {asked_accuracy:.1%}"
        axes.axhline(style.percent(asked_accuracy), color="black", linestyle=":", label=name)
    styles = itertools.cycle(POINT_STYLES)
    for name, point in points.items():
        color, marker, size = FULL_MODEL_STYLE if name == FULL_MODEL else next(styles)
        line = "--" if name == FULL_MODEL else ""
        drawn: dict[str, Any] = {"color": color, "marker": marker, "markersize": size, "markeredgecolor": "black"}
        values = f"{point['accuracy']:.1%} at {point['cost']:,.4g} {unit.split(' per ')[0]}"
        told = f"{style.short(name, 40)}: {values}"
        axes.plot(point["cost"], style.percent(point["accuracy"]), **drawn, linestyle=line, zorder=3, label=told)
        if name == FULL_MODEL:
            axes.axhline(style.percent(point["accuracy"]), color=color, linestyle="--", linewidth=1)
    axes.set(title=f"{measure.capitalize()} against cost", xlabel=unit, ylabel=f"{measure}, %")
    axes.set_xlim(left=0)
    style.hide_frame(axes)
    style.legend_below(figure, axes)
