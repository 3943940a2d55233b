"""Images, how deep they went and what was answered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report_types import ImageAnswer
from .style import BLUE, GREY, RED, hide_frame, in_words, is_wrong, legend_below, need, new_figure, number_of, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES_PER_LINE = 12


def plot_gallery(file: str | Path, images: Sequence[Any], answers: Sequence[ImageAnswer]) -> None:
    """Draw the images that exited first and those that exited last.

    Args:
        file (`str` or `Path`): The PNG to write.
        images (`Sequence`):
            PIL images or arrays `[H, W, 3]` or `[H, W]` uint8; only those drawn, up to 12 of either kind, are read. Of
            images that exited at one depth, the first in order are drawn.
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
    order = _by_depth(images, answers)
    shown = min(IMAGES_PER_LINE, math.ceil(len(order) / 2))
    lines = [("Exited first (below: depth and score, answer)", order[:shown]), ("Exited last", order[shown:][-shown:])]
    lines = [(title, indices) for title, indices in lines if indices]
    figure = new_figure(max(5, 1.25 * shown), 2.1 * len(lines))
    for (title, indices), part in zip(lines, figure.subfigures(len(lines), 1, squeeze=False).flat, strict=True):
        part.suptitle(title, x=0.005, ha="left", fontsize=11)
        for axes, index in zip(part.subplots(1, shown, squeeze=False).flat, indices + [None] * shown, strict=False):
            if index is None:
                axes.remove()
            else:
                _draw_answer(axes, images[index], answers[index])
    save(figure, file)


def plot_scores(
    file: str | Path,
    images: Sequence[Any],
    answers: Sequence[ImageAnswer],
    *,
    depths: Sequence[int],
    score: str = "score",
    thresholds: Sequence[float | None] | None = None,
) -> None:
    """Draw images beside what the policy saw of each at every exit: those that exited first, those that exited last.

    Args:
        file (`str` or `Path`): The PNG to write.
        images (`Sequence`): See `plot_gallery`; all are drawn.
        answers (`list[dict]`):
            For each image `{"depth", "scores", "predicted", "label"}`: the blocks run, `E` scores (`None` or NaN
            where the exit is skipped), the answer, and the true label or `None`.
        depths (`list[int]`): Blocks run before each of the `E` exits, the final classifier last.
        score (`str`, *optional*, defaults to `"score"`): What the scores are.
        thresholds (`list[float]`, *optional*): `E` numbers with which they are compared, `None` where there is none.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no image, or there are not as many answers.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> answers = [{"depth": 4, "scores": [0.9, 1.0], "predicted": "cat", "label": None}]
        >>> with TemporaryDirectory() as folder:
        ...     plot_scores(f"{folder}/scores.png", np.zeros((1, 8, 8, 3), dtype=np.uint8), answers, depths=[4, 12])
    """
    order = _by_depth(images, answers)
    half = math.ceil(len(order) / 2)
    halves = [("Exited first", order[:half]), ("Exited last", order[: half - 1 : -1])]
    halves = [(title, indices) for title, indices in halves if indices]
    numbers = [number_of(number) for answer in answers for number in answer["scores"]]
    highest = max([1.0, *(number for number in numbers if math.isfinite(number))])
    figure = new_figure(6.2 * len(halves), 0.9 + 1.75 * half)
    for (title, indices), part in zip(halves, figure.subfigures(1, len(halves), squeeze=False).flat, strict=True):
        part.suptitle(title, fontsize=11)
        grid = part.subplots(half, 2, squeeze=False, width_ratios=[1, 2.6])
        for (picture, chart), index in itertools.zip_longest(grid, indices):
            if index is None:
                picture.remove()
                chart.remove()
                continue
            _draw_image(picture, images[index], wrong=is_wrong(answers[index]))
            _draw_scores(chart, answers[index], depths, thresholds or [None] * len(depths))
            chart.set(ylabel=score, ylim=(-0.06 * highest, 1.1 * highest))
            chart.tick_params(labelbottom=index == indices[-1])
        grid[len(indices) - 1, 1].set_xlabel("blocks run")
    legend_below(figure, grid[0, 1], columns=4)
    save(figure, file)


def check_answers(images: Sequence[Any], answers: Sequence[ImageAnswer]) -> None:
    """Raise `ValueError` where there is no image, or not one answer for each."""
    if len(images) != len(answers):
        raise ValueError(f"there are {len(images)} images but {len(answers)} answers; give one answer per image")
    need(answers, "images", "image")


def _by_depth(images: Sequence[Any], answers: Sequence[ImageAnswer]) -> list[int]:
    check_answers(images, answers)
    return sorted(range(len(answers)), key=lambda index: answers[index]["depth"])


def _draw_scores(axes: Axes, answer: ImageAnswer, depths: Sequence[int], thresholds: Sequence[float | None]) -> None:
    points = [(float(depth), number_of(score)) for depth, score in zip(depths, answer["scores"], strict=True)]
    until = [point for point in points if point[0] <= answer["depth"]]
    after = [point for point in points if point[0] > answer["depth"]] or [(math.nan, math.nan)]
    axes.plot(*zip(*until, strict=True), color=BLUE, marker="o", markersize=4, label="seen by the policy")
    axes.plot(
        *zip(*after, strict=True), "o", color=GREY, markerfacecolor="none", markersize=4, label="not run any more"
    )
    axes.plot(*until[-1], "D", color=RED, markersize=7, label="where it exited")
    limits = [number_of(threshold) for threshold in thresholds]
    if not all(map(math.isnan, limits)):
        axes.plot(depths, limits, "_", color="black", markersize=12, markeredgewidth=1.5, label="threshold")
    axes.set_title(f"{_place(answer['depth'], until[-1][1])}: {', '.join(in_words(answer))}", loc="left", fontsize=9)
    axes.set_xlim(depths[0] - 0.5, depths[-1] + 0.5)
    axes.set_xticks(depths[:: math.ceil(len(depths) / 12)])
    axes.tick_params(labelsize=8)
    hide_frame(axes)


def _draw_answer(axes: Axes, image: Any, answer: ImageAnswer) -> None:
    _draw_image(axes, image, wrong=is_wrong(answer))
    axes.set_xlabel("\n".join([_place(answer["depth"], number_of(answer["score"])), *in_words(answer)]), fontsize=8)


def _place(depth: int, score: float) -> str:
    return f"block {depth}" if math.isnan(score) else f"block {depth}, {score:.2f}"


def _draw_image(axes: Axes, image: Any, *, wrong: bool) -> None:
    axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[], anchor="N")
    for spine in axes.spines.values():
        spine.set(color=RED if wrong else GREY, linewidth=3 if wrong else 0.5, linestyle="--" if wrong else "-")
