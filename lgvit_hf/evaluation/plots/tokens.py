"""How many blocks each token of an image ran."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .images import check_answers
from .style import CURVE_STYLES, GREY, hide_frame, in_words, legend_below, need, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from numpy.typing import ArrayLike

# ever lighter with depth, which all eyes see
COLORS = "viridis"
IMAGES_PER_STRIP = 8
MARKERS = "o^sDvPX*<>ph"  # more images have curves without names


def plot_token_depths(
    file: str | Path,
    images: Sequence[Any],
    answers: Sequence[Any],
    *,
    num_blocks: int,
    title: str = "How deep tokens went",
) -> None:
    """Draw images, the depths of their tokens, and both in one.

    Args:
        file (`str` or `Path`): The PNG to write.
        images (`Sequence`): Arrays `[H, W, 3]` uint8, or PIL images.
        answers (`list[dict]`):
            For each image `{"depths", "class_token", "predicted", "label"}`: the blocks that each patch ran, `[h, w]`,
            and the class token; the answer, and the true label or `None`.
        num_blocks (`int`): Of the model.
        title (`str`, *optional*): Which images these are.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no image, or there are not as many answers.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> answer = {"depths": [[1, 4], [4, 2]], "class_token": 4, "predicted": "cat", "label": None}
        >>> with TemporaryDirectory() as folder:
        ...     plot_token_depths(f"{folder}/a.png", np.zeros((1, 8, 8, 3), dtype=np.uint8), [answer], num_blocks=4)
    """
    check_answers(images, answers)
    pictures = [np.asarray(image) for image in images]
    columns, strips = min(IMAGES_PER_STRIP, len(images)), math.ceil(len(images) / IMAGES_PER_STRIP)
    tallest = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    figure = new_figure(1.4 + 1.6 * max(2, columns), 0.5 + strips * (0.7 + 4.8 * min(2.5, max(0.5, tallest))))
    figure.suptitle(f"{title}\nBelow: blocks that CLS ran, and patches on average", fontsize=10)
    grid = figure.subplots(3 * strips, columns, squeeze=False)
    colors = _colors(num_blocks)
    # three panels, one below the other, for each place
    places = [panels for strip in np.split(grid, strips) for panels in strip.T]
    for number, panels in enumerate(places, start=1):
        if number > len(images):
            for axes in panels:
                axes.remove()
            continue
        answer = answers[number - 1]
        depths = np.asarray(answer["depths"])
        _draw_depths(panels, pictures[number - 1], depths, colors)
        depths_told = f"CLS {answer['class_token']}, patches {depths.mean():.1f}"
        panels[0].set_title("\n".join([f"image {number}", *in_words(answer), depths_told]), fontsize=8)
    for axes, what in zip(grid[:, 0], strips * ("image", "depth of tokens", "both"), strict=True):
        axes.set_ylabel(what, fontsize=9)
    bar = figure.colorbar(
        colors,
        ax=[axes for panels in places[: len(images)] for axes in panels],
        ticks=range(num_blocks, 0, -math.ceil(num_blocks / 16)),
        label="blocks that a token ran",
        aspect=30,
        pad=0.01,
    )
    bar.minorticks_off()
    save(figure, file)


def plot_tokens_alive(file: str | Path, token_depth: ArrayLike, *, shown: Sequence[int], num_blocks: int) -> None:
    """Draw how many tokens still run in each block.

    Args:
        file (`str` or `Path`): The PNG to write.
        token_depth (`ArrayLike`): `[M, N]`, blocks that each token of each image ran, from 1.
        shown (`list[int]`): Rows that have a curve of their own; the mean is that of all.
        num_blocks (`int`): Of the model.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: There is no image.

    Example:

        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     plot_tokens_alive(f"{folder}/a.png", [[4, 1, 2], [4, 4, 4]], shown=[0], num_blocks=4)
    """
    depths = np.asarray(token_depth)
    need(depths, "token_depth", "image")
    blocks = np.arange(1, num_blocks + 1)
    alive = np.stack([100 * (depths >= block).mean(1) for block in blocks], axis=1)  # [M, L]
    figure = new_figure(8, 5.5)
    axes = figure.subplots()
    colors = itertools.cycle(color for color, _, _ in CURVE_STYLES)
    if len(shown) <= len(MARKERS):
        for number, (row, color, marker) in enumerate(zip(shown, colors, MARKERS, strict=False), start=1):
            axes.plot(
                blocks, alive[row], color=color, marker=marker, markersize=5, linewidth=1, label=f"image {number}"
            )
    else:
        thin = axes.plot(blocks, alive[list(shown)].T, color=GREY, linewidth=0.5)
        thin[0].set_label("an image")
    everyone = "mean of the only image" if len(depths) == 1 else f"mean of all {len(depths):,} images"
    told = f"{everyone}: {depths.mean():.1f} blocks a token"
    axes.plot(blocks, alive.mean(0), color="black", linewidth=3, label=told)
    axes.set(xlabel="block", ylabel="tokens that run in it, %", title="Tokens still alive per block", ylim=(-3, 104))
    axes.set_xticks(blocks[:: math.ceil(num_blocks / 16)])
    hide_frame(axes)
    legend_below(figure, axes, columns=4)
    save(figure, file)


def _colors(num_blocks: int) -> ScalarMappable:
    """A colour per block, from 1."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    edges = np.arange(num_blocks + 1) + 0.5
    return ScalarMappable(BoundaryNorm(edges, num_blocks), colormaps[COLORS].resampled(num_blocks))


def _draw_depths(panels: Sequence[Axes], image: np.ndarray, depths: np.ndarray, colors: ScalarMappable) -> None:
    """The image, its depths `[h, w]` on the same area, and these over the image in grey."""
    height, width = image.shape[:2]
    over: dict[str, Any] = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    heat = {**over, "cmap": colors.cmap, "norm": colors.norm}
    grey = image if image.ndim == 2 else image.mean(-1)
    panels[0].imshow(image, cmap="gray", vmin=0, vmax=255, **over)
    panels[1].imshow(depths, **heat)
    panels[2].imshow(grey, cmap="gray", vmin=-120, vmax=255, **over)  # a colour over black would be another
    panels[2].imshow(depths, alpha=0.6, **heat)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=GREY, linewidth=0.5)
