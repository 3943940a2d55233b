"""Random crops and flips of training images, with PIL alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

CROPS = ("random_resized", "pad", "none")
WHOLE_RANGE = (0.08, 1.0)
NARROWEST, WIDEST = 3 / 4, 4 / 3
Rng = np.random.Generator | random.Random


@dataclass(frozen=True)
class Augmentation:
    """A training image cut out at random, resized and flipped; LGViT was trained with `random_resized` and flips.

    Args:
        crop (`str`, *optional*, defaults to `"random_resized"`):
            `"random_resized"`: a random part of the image (https://arxiv.org/abs/1409.4842), resized; `"pad"`: the
            whole image, resized and shifted at random by up to an eighth of its size, with black around it, as is
            usual for CIFAR; `"none"`: the whole image, resized.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.08, 1.0)`):
            The smallest and the largest share of the image's area that `"random_resized"` takes.
        flip (`bool`, *optional*, defaults to `True`): Mirror half of the images left to right.

    Raises:
        ValueError: An unknown crop, a scale that is no range within (0, 1], or a scale that nothing would use.

    Example:

        >>> augment = Augmentation(crop="pad")
        >>> augment(Image.new("RGB", (40, 30)), (16, 24), np.random.default_rng(0)).size
        (24, 16)
    """

    crop: str = "random_resized"
    scale: tuple[float, float] = WHOLE_RANGE
    flip: bool = True

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; it must be one of {', '.join(CROPS)}")
        pair = isinstance(self.scale, (tuple, list)) and len(self.scale) == 2
        if not pair or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; it must be two numbers, 0 < smallest <= largest <= 1")
        if self.crop != "random_resized" and tuple(self.scale) != WHOLE_RANGE:
            raise ValueError(f"scale is {self.scale}, but crop {self.crop!r} does not use it; random_resized does")

    def __call__(self, image: Image.Image, size: tuple[int, int], rng: Rng) -> Image.Image:
        """The augmented image.

        Args:
            image (`Image.Image`): Of any size; RGB or grey.
            size (`tuple[int, int]`): Height and width of the result.
            rng (`np.random.Generator` or `random.Random`): All that is random comes from here.
        """
        height, width = size
        if self.crop == "random_resized":
            image = image.crop(random_box(image.width, image.height, self.scale, rng))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop == "pad":
            left, top = (random_integer(-(side // 8), side // 8, rng) for side in (width, height))
            # what a crop takes from beyond the image is black
            image = image.crop((left, top, left + width, top + height))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def random_box(width: int, height: int, scale: tuple[float, float], rng: Rng) -> tuple[int, int, int, int]:
    """Where to cut, as torchvision's `RandomResizedCrop` decides it: `(left, top, right, bottom)`.

    The share of the area is uniform in `scale`, the aspect ratio log-uniform between 3:4 and 4:3. After ten boxes that
    do not fit, the largest one in the middle whose ratio is between these is taken.

    Example:

        >>> random_box(1000, 10, (0.5, 1.0), np.random.default_rng(0))
        (493, 0, 506, 10)
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(NARROWEST), math.log(WIDEST)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random_integer(0, width - w, rng), random_integer(0, height - h, rng)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * WIDEST))), min(height, max(1, round(width / NARROWEST)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_integer(low: int, high: int, rng: Rng) -> int:
    """One of `low`, ..., `high`; unlike their own methods, the same call for NumPy's and Python's generators.

    Example:

        >>> random_integer(3, 3, random.Random(0))
        3
    """
    return low + int(rng.random() * (high - low + 1))
