"""Whether exits are as right as they are confident."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metrics import calibration_error
from ..report_types import Bin
from .style import BLUE, LIGHT_BLUE, RED, hide_frame, legend_below, need, new_figure, percent, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_reliability(file: str | Path, exits: Sequence[Mapping[str, Any]]) -> None:
    """Draw a reliability diagram for each exit: is a head that says 80 % right 80 % of the time?

    Bars are of all samples, diamonds of those that exit there; on the diagonal a head is as confident as it is right
    (Guo et al., https://arxiv.org/abs/1706.04599). The strip below each panel says how many of all samples there are.
    The title gives the expected calibration error, the mean distance from the diagonal.

    Args:
        file (`str` or `Path`): The PNG to write.
        exits (`list[dict]`):
            `{"name", "all", "exited"}`: each exit's name and its bins, which divide [0, 1] equally, for all
            samples and for those that exit there (or `None`). A bin is `{"samples", "confidence", "accuracy"}`, the
            last two `None` where it is empty.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no exit.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> empty = {"samples": 0, "confidence": None, "accuracy": None}
        >>> bins = [empty, {"samples": 10, "confidence": 0.9, "accuracy": 0.7}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_reliability(f"{folder}/reliability.png", [{"name": "block 4", "all": bins, "exited": None}])
    """
    need(exits, "exits", "exit")
    columns = math.ceil(math.sqrt(len(exits)))
    lines = math.ceil(len(exits) / columns)
    figure = new_figure(max(5, 2.6 * columns), 2 + 3 * lines)
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[3, 1] * lines)
    highest = max(percent(share) for exit in exits for share in _shares(exit["all"], exit["all"]))
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
            strip.set_ylabel("samples, %")
    legend_below(figure, grid[0, 0], columns=min(columns, 3))
    save(figure, file)


def _draw_reliability(panel: Axes, strip: Axes, exit: Mapping[str, Any]) -> None:
    everyone: list[Bin] = exit["all"]
    exited: list[Bin] = exit["exited"] or []
    width = 100 / len(everyone)
    middles = [width * (place + 0.5) for place in range(len(everyone))]
    style: dict[str, Any] = {"width": width, "color": LIGHT_BLUE, "edgecolor": BLUE}
    panel.bar(middles, [percent(bin["accuracy"]) for bin in everyone], **style, label="all samples")
    panel.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="as right as confident")
    confidences = [percent(bin["confidence"]) for bin in exited]
    accuracies = [percent(bin["accuracy"]) for bin in exited]
    label = "samples that exit there (narrow bars)"
    panel.plot(confidences, accuracies, "D", color=RED, markeredgecolor="white", label=label)
    panel.set_title(f"{short(exit['name'], 28)}\nECE {_error(everyone)}, exited {_error(exited)}", fontsize=9)
    panel.tick_params(labelbottom=False)
    panel.set_ylim(-4, 104)

    strip.bar(middles, [percent(share) for share in _shares(everyone, everyone)], **style)
    if exited:
        strip.bar(middles, [percent(share) for share in _shares(exited, everyone)], 0.4 * width, color=RED)
    for axes in (panel, strip):
        axes.set(xlim=(-4, 104), xticks=range(0, 101, 25))
        hide_frame(axes)


def _shares(bins: Sequence[Bin], everyone: Sequence[Bin]) -> list[float]:
    total = sum(bin["samples"] for bin in everyone)
    return [bin["samples"] / max(total, 1) for bin in bins]


def _error(bins: Sequence[Bin]) -> str:
    error = calibration_error(bins)
    return "–" if error is None else f"{error:.1%}"
