"""`ResizedImages`: from images that a worker has resized to what a model takes, by looking up each value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from .device.pixels import PixelSettings

_MODES = {1: "L", 3: "RGB"}


class ResizedImages:
    """What a part's own `pixels` gives, many times faster: it is asked once for each of the 256 values.

    Args:
        settings (`dict`): How images are prepared.
        pixels (`Callable`): From an image to `[C, H, W]` float32, which depends on each value alone.

    Raises:
        ValueError: It depends on more.

    Example:

        >>> from functools import partial
        >>> from lgvit_hf.serving.device.pixels import pixel_settings, prepare
        >>> processor = {"do_resize": True, "size": {"height": 8, "width": 6}, "resample": 2}
        >>> settings = pixel_settings(processor, 1)
        >>> images = ResizedImages(settings, partial(prepare, settings=settings))
        >>> images([np.full((8, 6), 255, np.uint8)] * 5).shape
        (5, 1, 8, 6)
    """

    def __init__(self, settings: PixelSettings, pixels: Callable[[Image.Image], np.ndarray]):
        self._channels, (self._height, self._width) = settings["channels"], settings["size"]
        height, width = settings["crop"] or settings["size"]
        top, left = (self._height - height) // 2, (self._width - width) // 2
        self._crop = slice(top, top + height), slice(left, left + width)
        self._table = np.empty((self._channels, 256), np.float32)
        for first in range(0, 256, height * width):
            values = np.minimum(first + np.arange(height * width), 255).reshape(height, width)
            self._table[:, values] = pixels(self._image(values))
        rng = np.random.default_rng(0)
        noise = self._image(rng.integers(0, 256, (height, width, self._channels)))
        if not np.array_equal(self([np.asarray(noise)])[0], pixels(noise)):
            raise ValueError("a pixel of the image processor depends on more than its own value")

    def __call__(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """`[B, C, H, W]` float32 of images `[H, W, C]` or `[H, W]` uint8 that have the size before the crop."""
        rows, columns = self._crop
        shape = rows.stop - rows.start, columns.stop - columns.start
        found = np.empty((len(arrays), self._channels, *shape), np.float32)
        for array, into in zip(arrays, found, strict=True):
            values = array.reshape(self._height, self._width, self._channels)[rows, columns]
            for channel, table in enumerate(self._table):
                # every value is in the table: `clip` only spares the check
                np.take(table, values[..., channel], out=into[channel], mode="clip")
        return found

    def _image(self, values: np.ndarray) -> Image.Image:
        """An image of the size before the crop that has these values, `[H, W]` or `[H, W, C]`, within the crop."""
        array = np.zeros((self._height, self._width, self._channels), np.uint8)
        array[self._crop] = values.reshape(*values.shape[:2], -1)
        return Image.fromarray(array if self._channels > 1 else array[..., 0], _MODES[self._channels])
