"""Figures, as PNG files, from plain numbers. The only file that imports matplotlib.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind tell apart; a marker or a
hatch always says the same as the colour.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import add_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from numpy.typing import ArrayLike

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
LIGHT_BLUE, GREY = "#9ECAE9", "#666666"
CURVE_STYLES = (
    (BLUE, "-", "."),
    (ORANGE, "--", "x"),
    (GREEN, "-.", "+"),
    (PURPLE, ":", "1"),
    (GREY, "-", "2"),
    (RED, "--", "|"),
)
POINT_STYLES = (
    (RED, "*", 15),
    (PURPLE, "D", 8),
    (ORANGE, "^", 9),
    (BLUE, "v", 9),
    (GREY, "P", 9),
    (LIGHT_BLUE, "X", 9),
)

FULL_MODEL, FULL_MODEL_STYLE = "full model", (GREEN, "s", 8)
MOST_NAMED_CLASSES = 25  # beyond, only the extreme ones have their names drawn
EXTREMES = 10
CONFUSED_PAIRS = 15
IMAGES_PER_LINE = 12
MOST_CELLS = 100  # of a confusion matrix, a side: a thousand would each be smaller than a pixel


def plot_report(
    report: dict[str, Any], curve: list[dict[str, float]], file: str | Path, *, measure: str = "accuracy"
) -> None:
    """Draw where rows leave, how right they are and what that costs, as a PNG.

    Args:
        report (`dict`): Of `evaluate`.
        curve (`list[dict]`): Points `{"mean_macs", "accuracy"}` of the same model under other thresholds.
        file (`str` or `Path`): The PNG to write.
        measure (`str`, *optional*, defaults to `"accuracy"`): What the shares are of, `"agreement"` without labels.

    Raises:
        ImportError: The extra `plots` is not installed.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> final = {"position": 2, "head": "final", "rows": 4, "share": 1.0}
        >>> final |= {"accuracy_leaving": 0.5, "accuracy_all": 0.5}
        >>> overall = {"accuracy": 0.5, "mean_macs": 9e6, "accuracy_full_model": 0.5, "backbone_macs": 9e6}
        >>> curve = [{"accuracy": 0.4, "mean_macs": 6e6}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_report({"exits": [final], "overall": overall}, curve, f"{folder}/report.png")
    """
    overall = report["overall"]
    width = _width(len(report["exits"]))
    figure = _figure(width + 6, 6)
    left, right = figure.subfigures(1, 2, width_ratios=[width, 6])
    _draw_exits(left, report["exits"], measure)
    _draw_costs(
        right,
        {"other thresholds": [{"cost": point["mean_macs"] / 1e6, **point} for point in curve]},
        {
            "chosen": {"cost": overall["mean_macs"] / 1e6, "accuracy": overall["accuracy"]},
            FULL_MODEL: {"cost": overall["backbone_macs"] / 1e6, "accuracy": overall["accuracy_full_model"]},
        },
        unit="million MACs per image, heads counted",
        measure=measure,
    )
    _save(figure, file)


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
    figure = _figure(8, 5 + 0.2 * (len(curves) + len(points)))
    _draw_costs(
        figure,
        curves,
        points,
        unit=unit,
        measure=measure,
        asked_accuracy=asked_accuracy,
    )
    _save(figure, file)


def plot_exits(file: str | Path, report: Mapping[str, Any], *, measure: str = "accuracy") -> None:
    """Draw how many rows leave at each exit, and how right they are there and over all rows.

    Args:
        file (`str` or `Path`): The PNG to write.
        report (`dict`): Of `summarise`.
        measure (`str`, *optional*, defaults to `"accuracy"`): What the shares are of, `"agreement"` without labels.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no exit.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> first = {"position": 1, "head": "linear", "rows": 3, "share": 0.75}
        >>> final = {"position": 2, "head": "final", "rows": 1, "share": 0.25}
        >>> right = {"accuracy_leaving": 1.0, "accuracy_all": 0.5}
        >>> with TemporaryDirectory() as folder:
        ...     plot_exits(f"{folder}/exits.png", {"exits": [{**first, **right}, {**final, **right}]})
    """
    exits = report["exits"]
    _need(exits, "exits", "exit")
    figure = _figure(_width(len(exits)), 6)
    _draw_exits(figure, exits, measure)
    _save(figure, file)


def plot_reliability(file: str | Path, exits: Sequence[Mapping[str, Any]]) -> None:
    """Draw a reliability diagram for each exit: is a head that says 80 % right 80 % of the time?

    Bars are of all rows, diamonds of those that leave there; on the diagonal a head is as sure as it is right (Guo et
    al., https://arxiv.org/abs/1706.04599). The strip below each panel says how many of all rows there are. The title
    gives the expected calibration error, the mean distance from the diagonal.

    Args:
        file (`str` or `Path`): The PNG to write.
        exits (`list[dict]`):
            `{"name", "all", "leaving"}`: each exit's name and its bins, which divide [0, 1] equally, for all rows and
            for those that leave there (or `None`). A bin is `{"rows", "confidence", "accuracy"}`, the last two `None`
            where it is empty.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no exit.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> empty = {"rows": 0, "confidence": None, "accuracy": None}
        >>> bins = [empty, {"rows": 10, "confidence": 0.9, "accuracy": 0.7}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_reliability(f"{folder}/reliability.png", [{"name": "block 4", "all": bins, "leaving": None}])
    """
    _need(exits, "exits", "exit")
    columns = math.ceil(math.sqrt(len(exits)))
    lines = math.ceil(len(exits) / columns)
    figure = _figure(max(5, 2.6 * columns), 2 + 3 * lines)
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[3, 1] * lines)
    highest = max(_percent(share) for exit in exits for share in _shares(exit["all"], exit["all"]))
    for place in range(lines * columns):
        panel, strip = grid[2 * (place // columns) : 2 * (place // columns) + 2, place % columns]
        if place >= len(exits):
            panel.remove()
            strip.remove()
            continue
        _draw_reliability(panel, strip, exits[place])
        strip.set(xlabel="confidence, %", ylim=(0, max(1, 1.05 * highest)))
        if place % columns == 0:
            panel.set_ylabel("accuracy, %")
            strip.set_ylabel("rows, %")
    _legend_below(figure, grid[0, 0], columns=min(columns, 3))
    _save(figure, file)


def plot_classes(file: str | Path, classes: Sequence[Mapping[str, Any]]) -> None:
    """Draw how deep the rows of each class go and how often they are answered rightly.

    Up to 25 classes are all named; of more, those that leave first, those that leave last and those right least often.

    Args:
        file (`str` or `Path`): The PNG to write.
        classes (`list[dict]`):
            `{"name", "rows", "accuracy", "mean_depth"}`; depth in blocks from 1; the last two are `None` where a class
            has no rows, and such classes are only counted.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: No class has rows.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> classes = [{"name": "cat", "rows": 2, "accuracy": 0.5, "mean_depth": 6.5}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_classes(f"{folder}/classes.png", classes)
    """
    names = _short_names([row["name"] for row in classes], 24)
    drawn = [{**row, "name": name} for row, name in zip(classes, names, strict=True) if row["rows"]]
    _need(drawn, "classes", "class with rows")
    absent = len(classes) - len(drawn)
    without = f" ({absent} more without rows)" if absent else ""
    figure = _classes_by_name(drawn) if len(drawn) <= MOST_NAMED_CLASSES else _classes_by_extremes(drawn)
    what = "1 class" if len(drawn) == 1 else f"{len(drawn):,} classes"
    figure.suptitle(f"Depth and accuracy of {what}{without}")
    _save(figure, file)


def plot_confusion(file: str | Path, matrix: ArrayLike, class_names: Sequence[str]) -> None:
    """Draw which classes are taken for which.

    Up to 25 classes are all named; of more, the pairs that are confused most often. Where there are more than 100,
    neighbours share a cell.

    Args:
        file (`str` or `Path`): The PNG to write.
        matrix (`ArrayLike`): Counts `[C, C]`, a line per true class and a column per answer.
        class_names (`list[str]`): `C` names.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: The matrix is not square, or there are not as many names.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     plot_confusion(f"{folder}/confusion.png", [[8, 2], [1, 9]], ["cat", "dog"])
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape != (len(class_names), len(class_names)) or not len(class_names):
        raise ValueError(
            f"matrix has shape {counts.shape}, but there are {len(class_names)} class_names; give a line and a column "
            "per name"
        )
    names = _short_names(class_names, 20)
    draw = _confusion_by_name if len(names) <= MOST_NAMED_CLASSES else _confusion_by_pairs
    _save(draw(counts, names), file)


def plot_gallery(file: str | Path, images: Sequence[Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """Draw the images that left first and those that left last.

    Args:
        file (`str` or `Path`): The PNG to write.
        images (`Sequence`):
            PIL images or arrays `[H, W, 3]` or `[H, W]` uint8; only those drawn, up to 12 of either kind, are read. Of
            images that left at one depth, the first in order are drawn.
        answers (`list[dict]`):
            For each image `{"depth", "score", "predicted", "label"}`: the blocks run, the policy's score (`None`
            or NaN where it has none), the answer, and the true label or `None`.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no image, or there are not as many answers.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> answers = [{"depth": 4, "score": 0.9, "predicted": "cat", "label": "cat"}]
        >>> answers += [{"depth": 12, "score": 0.4, "predicted": "cat", "label": "dog"}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_gallery(f"{folder}/gallery.png", images, answers)
    """
    if len(images) != len(answers):
        raise ValueError(f"there are {len(images)} images but {len(answers)} answers; give one answer per image")
    _need(answers, "images", "image")
    order = sorted(range(len(answers)), key=lambda index: answers[index]["depth"])
    shown = min(IMAGES_PER_LINE, math.ceil(len(order) / 2))
    lines = [("Left first (below: depth and score, answer)", order[:shown]), ("Left last", order[shown:][-shown:])]
    lines = [(title, indices) for title, indices in lines if indices]
    figure = _figure(max(5, 1.25 * shown), 2.1 * len(lines))
    for (title, indices), part in zip(lines, figure.subfigures(len(lines), 1, squeeze=False).flat, strict=True):
        part.suptitle(title, x=0.005, ha="left", fontsize=11)
        for axes, index in zip(part.subplots(1, shown, squeeze=False).flat, indices + [None] * shown, strict=False):
            if index is None:
                axes.remove()
            else:
                _draw_answer(axes, images[index], answers[index])
    _save(figure, file)


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
    _need(benchmark_rows, "benchmark_rows", "batch size")
    series = [
        ("measured by the clock", "wall_clock_speed_up", BLUE, None),
        ("ideal: time of the blocks and heads really run", "ideal_speed_up", LIGHT_BLUE, "//"),
        ("layer ratio: blocks of the backbone over blocks run", "layer_speed_up", ORANGE, ".."),
    ]
    series = [one for one in series if any(row[one[1]] is not None for row in benchmark_rows)]
    figure = _figure(max(6, 1.5 + 1.5 * len(benchmark_rows)), 5)
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (name, key, color, hatch) in enumerate(series):
        left = [place + (number - (len(series) - 1) / 2) * width for place in range(len(benchmark_rows))]
        heights = [_number(row[key]) for row in benchmark_rows]
        bars = axes.bar(left, heights, width, label=name, color=color, hatch=hatch, edgecolor="white")
        texts = ["" if math.isnan(height) else f"{height:.2f}" for height in heights]
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line at 1 may pass there
        axes.bar_label(bars, texts, fontsize=8, padding=2, bbox=behind)
    axes.axhline(1, color="black", linestyle="--", label="as fast as the backbone without heads")
    axes.set_xticks(range(len(benchmark_rows)), [str(row["batch_size"]) for row in benchmark_rows])
    axes.set(xlabel="batch size", ylabel="times as fast as the backbone", title="Speed-up, measured and promised")
    axes.margins(y=0.1)
    _plain(axes)
    _legend_below(figure, axes)
    _save(figure, file)


def _width(num_exits: int) -> float:
    """Inches that a panel with this many exits needs."""
    return min(14, max(6, 2 + 0.6 * num_exits))


def _draw_exits(figure: FigureBase, exits: Sequence[Mapping[str, Any]], measure: str) -> None:
    leaving, right = figure.subplots(2, 1)
    places, many = range(len(exits)), len(exits) > 12
    bars = leaving.bar(places, [_percent(row["share"]) for row in exits], color=BLUE)
    leaving.bar_label(bars, [f"{row['rows']:,}" for row in exits], fontsize=8)
    leaving.set(title="How many rows leave at each exit", ylabel="rows leaving, %")
    leaving.margins(y=0.15)
    leaving.tick_params(labelbottom=False)
    leaving.set_xticks(places)

    accuracies_all = [_percent(row["accuracy_all"]) for row in exits]
    accuracies_leaving = [_percent(row["accuracy_leaving"]) for row in exits]
    right.plot(places, accuracies_all, color=BLUE, marker="o", label="all rows")
    right.plot(places, accuracies_leaving, "D", color=RED, markersize=7, label="rows leaving there")
    names = [f"{row['position']} {_short(row['head'], 14)}" for row in exits]
    right.set_xticks(places, names, fontsize=8, rotation=60 if many else 30, ha="right", rotation_mode="anchor")
    right.set(title="How right they are", xlabel="blocks run, and head", ylabel=f"{measure}, %", ylim=(-4, 104))
    for axes in (leaving, right):
        axes.set_xlim(-0.6, len(exits) - 0.4)
        _plain(axes)
    _legend_below(figure, right, columns=2)


def _draw_costs(
    figure: FigureBase,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    points: Mapping[str, Mapping[str, float]],
    *,
    unit: str,
    measure: str,
    asked_accuracy: float | None = None,
) -> None:
    axes = figure.subplots()
    for (name, curve), (color, line, marker) in zip(curves.items(), itertools.cycle(CURVE_STYLES), strict=False):
        ordered = sorted(curve, key=lambda point: point["cost"])
        costs, accuracies = [p["cost"] for p in ordered], [_percent(p["accuracy"]) for p in ordered]
        axes.plot(costs, accuracies, color=color, linestyle=line, marker=marker, label=_short(name, 60))
    if asked_accuracy is not None:
        name = f"asked for: {asked_accuracy:.1%}"
        axes.axhline(_percent(asked_accuracy), color="black", linestyle=":", label=name)
    styles = itertools.cycle(POINT_STYLES)
    for name, point in points.items():
        color, marker, size = FULL_MODEL_STYLE if name == FULL_MODEL else next(styles)
        line = "--" if name == FULL_MODEL else ""
        style = {"color": color, "marker": marker, "markersize": size, "markeredgecolor": "black", "linestyle": line}
        values = f"{point['accuracy']:.1%} at {point['cost']:,.4g} {unit.split(' per ')[0]}"
        axes.plot(point["cost"], _percent(point["accuracy"]), **style, zorder=3, label=f"{_short(name, 40)}: {values}")
        if name == FULL_MODEL:
            axes.axhline(_percent(point["accuracy"]), color=color, linestyle="--", linewidth=1)
    axes.set(title=f"{measure.capitalize()} against cost", xlabel=unit, ylabel=f"{measure}, %")
    axes.set_xlim(left=0)
    _plain(axes)
    _legend_below(figure, axes)


def _draw_reliability(panel: Axes, strip: Axes, exit: Mapping[str, Any]) -> None:
    everyone, leaving = exit["all"], exit["leaving"] or []
    width = 100 / len(everyone)
    middles = [width * (place + 0.5) for place in range(len(everyone))]
    style = {"width": width, "color": LIGHT_BLUE, "edgecolor": BLUE}
    panel.bar(middles, [_percent(bin["accuracy"]) for bin in everyone], **style, label="all rows")
    panel.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="as right as sure")
    confidences = [_percent(bin["confidence"]) for bin in leaving]
    accuracies = [_percent(bin["accuracy"]) for bin in leaving]
    style_leaving = {"color": RED, "markeredgecolor": "white"}
    panel.plot(confidences, accuracies, "D", **style_leaving, label="rows leaving there (narrow bars)")
    panel.set_title(f"{_short(exit['name'], 28)}\nECE {_error(everyone)}, leaving {_error(leaving)}", fontsize=9)
    panel.tick_params(labelbottom=False)
    panel.set_ylim(-4, 104)

    strip.bar(middles, [_percent(share) for share in _shares(everyone, everyone)], **style)
    if leaving:
        strip.bar(middles, [_percent(share) for share in _shares(leaving, everyone)], 0.4 * width, color=RED)
    for axes in (panel, strip):
        axes.set(xlim=(-4, 104), xticks=range(0, 101, 25))
        _plain(axes)


def _shares(bins: Sequence[Mapping[str, Any]], everyone: Sequence[Mapping[str, Any]]) -> list[float]:
    total = sum(bin["rows"] for bin in everyone)
    return [bin["rows"] / max(total, 1) for bin in bins]


def _error(bins: Sequence[Mapping[str, Any]]) -> str:
    """The expected calibration error, in percent."""
    filled = [bin for bin in bins if bin["rows"]]
    if not filled:
        return "–"
    gaps = sum(bin["rows"] * abs(bin["confidence"] - bin["accuracy"]) for bin in filled)
    return f"{gaps / sum(bin['rows'] for bin in filled):.1%}"


def _classes_by_name(classes: Sequence[Mapping[str, Any]]) -> Figure:
    figure = _figure(10, 1.6 + 0.3 * len(classes))
    depth, right = figure.subplots(1, 2, sharey=True)
    ordered = sorted(classes, key=lambda row: row["mean_depth"])
    _draw_depths(depth, ordered, BLUE, deepest=ordered[-1]["mean_depth"])
    _draw_accuracies(right, ordered, ORANGE)
    depth.set(title="How deep rows go", ylabel="class (rows)")
    right.set_title("How right the answers are")
    right.tick_params(labelleft=False)
    return figure


def _classes_by_extremes(classes: Sequence[Mapping[str, Any]]) -> Figure:
    figure = _figure(13, 9)
    axes = figure.subplot_mosaic([["all", "first"], ["all", "last"], ["all", "wrong"]], width_ratios=[1.4, 1])
    by_depth = sorted(classes, key=lambda row: row["mean_depth"])
    first, last = by_depth[:EXTREMES], by_depth[: -EXTREMES - 1 : -1]
    wrong = sorted(classes, key=lambda row: row["accuracy"])[:EXTREMES]
    _draw_depths(axes["first"], first, BLUE, deepest=last[0]["mean_depth"])
    _draw_depths(axes["last"], last, RED, deepest=last[0]["mean_depth"])
    _draw_accuracies(axes["wrong"], wrong, ORANGE)
    filled, hollow = {"markeredgecolor": "black"}, {"markersize": 12, "markerfacecolor": "none", "markeredgewidth": 2}
    for place, rows, what, style in (
        ("all", classes, "a class", {"marker": "o", "color": GREY, "alpha": 0.4, "markersize": 4}),
        ("first", first, f"the {EXTREMES} that leave first", {"marker": "v", "color": BLUE, **filled}),
        ("last", last, f"the {EXTREMES} that leave last", {"marker": "^", "color": RED, **filled}),
        ("wrong", wrong, f"the {EXTREMES} right least often", {"marker": "s", "color": ORANGE, **hollow}),
    ):
        depths, accuracies = [row["mean_depth"] for row in rows], [_percent(row["accuracy"]) for row in rows]
        axes["all"].plot(depths, accuracies, linestyle="", label=what, **style)
        axes[place].set_title("Every class" if place == "all" else f"T{what[1:]} (rows)", fontsize=10)
    axes["all"].set(xlabel="mean depth, blocks", ylabel="accuracy, %", ylim=(-3, 103))
    _plain(axes["all"])
    _legend_below(figure, axes["all"], columns=4)
    return figure


def _draw_depths(axes: Axes, classes: Sequence[Mapping[str, Any]], color: str, *, deepest: float) -> None:
    depths = [row["mean_depth"] for row in classes]
    _draw_bars(axes, _with_rows(classes), depths, [f"{depth:.1f}" for depth in depths], color)
    axes.set(xlabel="mean depth, blocks", xlim=(0, 1.12 * deepest))


def _draw_accuracies(axes: Axes, classes: Sequence[Mapping[str, Any]], color: str) -> None:
    accuracies = [_percent(row["accuracy"]) for row in classes]
    _draw_bars(axes, _with_rows(classes), accuracies, [f"{accuracy:.0f}" for accuracy in accuracies], color)
    axes.set(xlabel="accuracy, %", xlim=(0, 112), xticks=range(0, 101, 20))


def _with_rows(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{row['name']} ({row['rows']:,})" for row in classes]


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], texts: Sequence[str], color: str) -> None:
    """Horizontal bars, the first on top."""
    places = range(len(names))
    bars = axes.barh(places, values, color=color)
    axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
    _plain(axes)


def _confusion_by_name(counts: np.ndarray, names: Sequence[str]) -> Figure:
    size = len(names)
    figure = _figure(5 + 0.45 * size, 3 + 0.45 * size)
    axes = figure.subplots()
    rows = counts.sum(1)
    shares = _shares_of_rows(counts)
    _draw_map(figure, axes, shares, np.arange(size + 1) - 0.5, gamma=1.0)
    for truth, answer in np.argwhere(counts):
        share = shares[truth, answer]
        text = f"{100 * share:.0f}" if share >= 0.01 else "<1"
        color = "white" if share > 0.5 else "black"
        axes.text(answer, truth, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), [f"{name} ({number:,})" for name, number in zip(names, rows, strict=True)])
    axes.set(xlabel="answer", ylabel="true class (rows)", title="Which class is taken for which")
    return figure


def _confusion_by_pairs(counts: np.ndarray, names: Sequence[str]) -> Figure:
    figure = _figure(14, 7)
    axes, pairs = figure.subplots(1, 2, width_ratios=[1.5, 1])
    group = math.ceil(len(names) / MOST_CELLS)
    starts = np.arange(0, len(names), group)
    grouped = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    _draw_map(figure, axes, _shares_of_rows(grouped), np.append(starts, len(names)) - 0.5, gamma=0.5)
    cell = "" if group == 1 else f", {group} neighbours in a cell"
    axes.set(title=f"Which class is taken for which{cell}", xlabel="answer, number of the class")
    axes.set_ylabel("true class, number")

    wrong = counts * ~np.eye(len(names), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED_PAIRS]
    confused = [(truth, answer) for truth, answer in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    confused = [pair for pair in confused if wrong[pair]]
    if not confused:
        pairs.set_axis_off()
        pairs.set_title("No answer is wrong")
        return figure
    labels = [f"{names[truth]} → {names[answer]}" for truth, answer in confused]
    texts = [f"{wrong[pair]:,} of {counts[pair[0]].sum():,}" for pair in confused]
    _draw_bars(pairs, labels, [wrong[pair] for pair in confused], texts, RED)
    pairs.set(title="Most confused: true → answer", xlabel="rows")
    pairs.margins(x=0.25)
    return figure


def _shares_of_rows(counts: np.ndarray) -> np.ndarray:
    rows = counts.sum(1, keepdims=True)
    return np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)


def _draw_map(figure: Figure, axes: Axes, shares: np.ndarray, edges: np.ndarray, *, gamma: float) -> None:
    """A `gamma` below 1 shows faint confusions beside a strong diagonal."""
    from matplotlib.colors import PowerNorm

    cells = axes.pcolormesh(edges, edges, 100 * shares, cmap="Blues", norm=PowerNorm(gamma, 0, 100))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    figure.colorbar(cells, ax=axes, label="% of the true class", shrink=0.8)


def _draw_answer(axes: Axes, image: Any, answer: Mapping[str, Any]) -> None:
    label = answer["label"]
    wrong = label is not None and answer["predicted"] != label
    axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[], anchor="N")
    for spine in axes.spines.values():
        spine.set(color=RED if wrong else GREY, linewidth=3 if wrong else 0.5, linestyle="--" if wrong else "-")
    score = "" if math.isnan(_number(answer["score"])) else f", {answer['score']:.2f}"
    mark = "" if label is None else " ✗" if wrong else " ✓"
    lines = [f"block {answer['depth']}{score}", f"{_first_synonym(answer['predicted'], 14)}{mark}"]
    if wrong:
        lines.append(f"is {_first_synonym(label, 13)}")
    axes.set_xlabel("\n".join(lines), fontsize=8)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that knows no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures are drawn with matplotlib: pip install "lgvit-hf[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, file: str | Path) -> None:
    file = Path(file)
    with add_files(file.parent) as folder:
        figure.savefig(folder / file.name, dpi=150, format="png")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: FigureBase, axes: Axes, *, columns: int = 1) -> None:
    """Outside the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _need(values: Sequence[Any], name: str, what: str) -> None:
    if not len(values):
        raise ValueError(f"there is nothing to draw: {name} is empty; give one {what} at least")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _percent(share: float | None) -> float:
    return 100 * _number(share)


def _short(name: Any, limit: int) -> str:
    """A name on one line, cut to `limit` characters, as matplotlib takes it (a dollar would begin a formula)."""
    name = " ".join(str(name).split())
    name = name if len(name) <= limit else f"{name[: limit - 1].rstrip()}…"
    return name.replace("$", r"\$")


def _first_synonym(name: Any, limit: int) -> str:
    return _short(str(name).split(",")[0], limit)


def _short_names(names: Sequence[Any], limit: int) -> list[str]:
    """First synonyms, cut to `limit` characters; those that are then alike are told apart by their numbers.

    Example:

        >>> _short_names(["crane", "tench, Tinca tinca", "crane"], 24)
        ['crane #0', 'tench', 'crane #2']
    """
    short = [_first_synonym(name, limit) for name in names]
    seen = Counter(short)
    return [f"{name} #{number}" if seen[name] > 1 else name for number, name in enumerate(short)]
