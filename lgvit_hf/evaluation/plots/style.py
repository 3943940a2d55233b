"""What all figures share: colours, an empty figure, how it is saved, names that fit.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which the colour-blind tell apart; a marker or a
hatch always says the same as the colour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import add_files
from ..report_types import ImageAnswer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

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
MOST_NAMED_CLASSES = 25  # beyond, only the extreme ones have their names drawn


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that knows no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures are drawn with matplotlib: pip install "lgvit-hf[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, file: str | Path) -> None:
    """Write a figure as a PNG, all of it or nothing."""
    file = Path(file)
    with add_files(file.parent) as folder:
        figure.savefig(folder / file.name, dpi=150, format="png")


def hide_frame(axes: Axes) -> None:
    """Leave only the axes that have numbers."""
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: FigureBase, axes: Axes, *, columns: int = 1) -> None:
    """Outside the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], texts: Sequence[str], color: str) -> None:
    """Horizontal bars, the first on top."""
    places = range(len(names))
    bars = axes.barh(places, values, color=color)
    axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
    hide_frame(axes)


def need(values: Sized, name: str, what: str) -> None:
    """Raise `ValueError` where there is nothing to draw."""
    if not len(values):
        raise ValueError(f"there is nothing to draw: {name} is empty; give one {what} at least")


def number_of(value: float | None) -> float:
    """The number, NaN for none, which matplotlib leaves out."""
    return math.nan if value is None else value


def percent(share: float | None) -> float:
    """A share in [0, 1] in percent, NaN for none."""
    return 100 * number_of(share)


def short(name: Any, limit: int) -> str:
    """A name on one line, cut to `limit` characters, as matplotlib takes it (a dollar would begin a formula)."""
    line = " ".join(str(name).split())
    line = line if len(line) <= limit else f"{line[: limit - 1].rstrip()}…"
    return line.replace("$", r"\$")


def first_synonym(name: Any, limit: int) -> str:
    """A class's name up to its first comma, cut to `limit` characters."""
    return short(str(name).split(",")[0], limit)


def short_names(names: Sequence[Any], limit: int) -> list[str]:
    """First synonyms, cut to `limit` characters; those that are then alike are told apart by their numbers.

    Example:

        >>> short_names(["crane", "tench, Tinca tinca", "crane"], 24)
        ['crane #0', 'tench', 'crane #2']
    """
    names = [first_synonym(name, limit) for name in names]
    seen = Counter(names)
    return [f"{name} #{number}" if seen[name] > 1 else name for number, name in enumerate(names)]


def is_wrong(answer: ImageAnswer) -> bool:
    """Whether `predicted` is not the `label`; nothing is wrong where that is `None`."""
    return answer["label"] is not None and answer["predicted"] != answer["label"]


def in_words(answer: ImageAnswer) -> list[str]:
    """What was `predicted`, marked as right or wrong, and the `label` where it is another.

    Example:

        >>> in_words({"predicted": "dog", "label": "cat"}), in_words({"predicted": "dog", "label": None})
        (['dog ✗', 'is cat'], ['dog'])
    """
    predicted, label = first_synonym(answer["predicted"], 14), answer["label"]
    if is_wrong(answer):
        return [f"{predicted} ✗", f"is {first_synonym(label, 13)}"]
    return [predicted if label is None else f"{predicted} ✓"]
