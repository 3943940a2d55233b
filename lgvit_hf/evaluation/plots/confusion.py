"""Which class is taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .style import MOST_NAMED_CLASSES, RED, draw_bars, new_figure, save, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

CONFUSED_PAIRS = 15
MOST_CELLS = 100  # a side: a thousand would each be smaller than a pixel


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
    names = short_names(class_names, 20)
    draw = _confusion_by_name if len(names) <= MOST_NAMED_CLASSES else _confusion_by_pairs
    save(draw(counts, names), file)


def _confusion_by_name(counts: np.ndarray, names: Sequence[str]) -> Figure:
    size = len(names)
    figure = new_figure(5 + 0.45 * size, 3 + 0.45 * size)
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
    axes.set(xlabel="answer", ylabel="true class (samples)", title="Which class is taken for which")
    return figure


def _confusion_by_pairs(counts: np.ndarray, names: Sequence[str]) -> Figure:
    figure = new_figure(14, 7)
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
    draw_bars(pairs, labels, [wrong[pair] for pair in confused], texts, RED)
    pairs.set(title="Most confused: true → answer", xlabel="samples")
    pairs.margins(x=0.25)
    return figure


def _shares_of_rows(counts: np.ndarray) -> np.ndarray:
    rows = counts.sum(1, keepdims=True)
    shares: np.ndarray = np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)
    return shares


def _draw_map(figure: Figure, axes: Axes, shares: np.ndarray, edges: np.ndarray, *, gamma: float) -> None:
    """A `gamma` below 1 shows faint confusions beside a strong diagonal."""
    from matplotlib.colors import PowerNorm

    cells = axes.pcolormesh(edges, edges, 100 * shares, cmap="Blues", norm=PowerNorm(gamma, 0, 100))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    figure.colorbar(cells, ax=axes, label="% of the true class", shrink=0.8)
