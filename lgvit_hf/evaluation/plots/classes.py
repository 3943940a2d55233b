"""How deep the samples of a class go and how right they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXTREMES = 10


def plot_classes(file: str | Path, classes: Sequence[Mapping[str, Any]]) -> None:
    """Draw how deep the samples of each class go and how often they are answered rightly.

    Up to 25 classes are all named; of more, those that exit first, those that exit last and those right least often.

    Args:
        file (`str` or `Path`): The PNG to write.
        classes (`list[dict]`):
            `{"name", "samples", "accuracy", "mean_depth"}`; depth in blocks from 1; the last two are `None` where a
            class has no samples, and such classes are only counted.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: No class has samples.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> classes = [{"name": "cat", "samples": 2, "accuracy": 0.5, "mean_depth": 6.5}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_classes(f"{folder}/classes.png", classes)
    """
    names = style.short_names([row["name"] for row in classes], 24)
    drawn = [{**row, "name": name} for row, name in zip(classes, names, strict=True) if row["samples"]]
    style.need(drawn, "classes", "class with samples")
    absent = len(classes) - len(drawn)
    without = f" ({absent} more without samples)" if absent else ""
    figure = _classes_by_name(drawn) if len(drawn) <= style.MOST_NAMED_CLASSES else _classes_by_extremes(drawn)
    what = "1 class" if len(drawn) == 1 else f"{len(drawn):,} classes"
    figure.suptitle(f"Depth and accuracy of {what}{without}")
    style.save(figure, file)


def _classes_by_name(classes: Sequence[Mapping[str, Any]]) -> Figure:
    figure = style.new_figure(10, 1.6 + 0.3 * len(classes))
    depth, right = figure.subplots(1, 2, sharey=True)
    ordered = sorted(classes, key=lambda row: row["mean_depth"])
    _draw_depths(depth, ordered, style.BLUE, deepest=ordered[-1]["mean_depth"])
    _draw_accuracies(right, ordered, style.ORANGE)
    depth.set(title="How deep samples go", ylabel="class (samples)")
    right.set_title("How right the answers are")
    right.tick_params(labelleft=False)
    return figure


def _classes_by_extremes(classes: Sequence[Mapping[str, Any]]) -> Figure:
    figure = style.new_figure(13, 9)
    axes = figure.subplot_mosaic([["all", "first"], ["all", "last"], ["all", "wrong"]], width_ratios=[1.4, 1])
    by_depth = sorted(classes, key=lambda row: row["mean_depth"])
    first, last = by_depth[:EXTREMES], by_depth[: -EXTREMES - 1 : -1]
    wrong = sorted(classes, key=lambda row: row["accuracy"])[:EXTREMES]
    _draw_depths(axes["first"], first, style.BLUE, deepest=last[0]["mean_depth"])
    _draw_depths(axes["last"], last, style.RED, deepest=last[0]["mean_depth"])
    _draw_accuracies(axes["wrong"], wrong, style.ORANGE)
    filled, hollow = {"markeredgecolor": "black"}, {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 2}
    for place, drawn, what, marker in (
        ("all", classes, "a class", {"marker": "o", "color": style.GREY, "alpha": 0.4, "markersize": 4}),
        ("first", first, f"the {EXTREMES} that exit first", {"marker": "v", "color": style.BLUE, **filled}),
        ("last", last, f"the {EXTREMES} that exit last", {"marker": "^", "color": style.RED, **filled}),
        ("wrong", wrong, f"the {EXTREMES} right least often", {"marker": "s", "color": style.ORANGE, **hollow}),
    ):
        depths, accuracies = [row["mean_depth"] for row in drawn], [style.percent(row["accuracy"]) for row in drawn]
        axes["all"].plot(depths, accuracies, linestyle="", label=what, **marker)
        axes[place].set_title("Every class" if place == "all" else f"T{what[1:]} (samples)", fontsize=10)
    axes["all"].set(xlabel="mean depth, blocks", ylabel="accuracy, %", ylim=(-3, 103))
    style.hide_frame(axes["all"])
    style.legend_below(figure, axes["all"], columns=4)
    return figure


def _draw_depths(axes: Axes, classes: Sequence[Mapping[str, Any]], color: str, *, deepest: float) -> None:
    depths = [row["mean_depth"] for row in classes]
    style.draw_bars(axes, _with_samples(classes), depths, [f"{depth:.1f}" for depth in depths], color)
    axes.set(xlabel="mean depth, blocks", xlim=(0, 1.12 * deepest))


def _draw_accuracies(axes: Axes, classes: Sequence[Mapping[str, Any]], color: str) -> None:
    accuracies = [style.percent(row["accuracy"]) for row in classes]
    style.draw_bars(axes, _with_samples(classes), accuracies, [f"{accuracy:.0f}" for accuracy in accuracies], color)
    axes.set(xlabel="accuracy, %", xlim=(0, 112), xticks=range(0, 101, 20))


def _with_samples(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{row['name']} ({row['samples']:,})" for row in classes]
