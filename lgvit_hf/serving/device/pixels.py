"""From an image to what a model takes, with numpy and pillow: the image processor's resizing, cropping and scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from .rgb import as_rgb

# where transformers looks for an image processor
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class PixelSettings(TypedDict):
    """How `prepare` makes pixels of an image; sizes are height and width."""

    channels: int
    size: list[int]
    resample: int
    crop: list[int] | None
    rescale: float
    mean: list[float]
    std: list[float]


def pixel_settings(processor: Mapping[str, Any], num_channels: int) -> PixelSettings:
    """What `prepare` needs to know, from the fields of `preprocessor_config.json`.

    Args:
        processor (`dict`): Of a processor that resizes to a height and a width, and may crop, rescale and normalize.
        num_channels (`int`): 3 for colours, 1 for grey.

    Raises:
        ValueError: It does something else.

    Example:

        >>> settings = pixel_settings({"do_resize": True, "size": {"height": 8, "width": 6}, "resample": 2}, 3)
        >>> prepare(Image.new("RGB", (20, 10)), settings).shape
        (3, 8, 6)
    """
    if not processor.get("do_resize") or not {"height", "width"} <= set(processor.get("size") or {}):
        raise ValueError(f"it does not resize to a height and a width: size={processor.get('size')}")
    if num_channels not in (1, 3):
        raise ValueError(f"images of {num_channels} channels are neither grey nor coloured")
    crop = processor["crop_size"] if processor.get("do_center_crop") else None
    rescale, normalize = processor.get("do_rescale"), processor.get("do_normalize")
    return {
        "channels": num_channels,
        "size": [processor["size"]["height"], processor["size"]["width"]],
        "resample": int(processor["resample"]),
        "crop": None if crop is None else [crop["height"], crop["width"]],
        "rescale": processor["rescale_factor"] if rescale else 1.0,
        "mean": list(processor["image_mean"]) if normalize else [0.0] * num_channels,
        "std": list(processor["image_std"]) if normalize else [1.0] * num_channels,
    }


def prepare(image: Image.Image, settings: PixelSettings | None) -> np.ndarray:
    """One image as the model takes it, float32 `[C, H, W]`.

    Args:
        image (`PIL.Image.Image`): Of any size and mode.
        settings (`dict`): As `pixel_settings` gives them.

    Raises:
        ValueError: There are none, or the image is not one that `as_rgb` takes.
    """
    if settings is None:
        raise ValueError(
            "this part takes pixel_values, no images: it was split without an image processor it could use"
        )
    height, width = settings["size"]
    image = as_rgb(image, settings["channels"]).resize((width, height), settings["resample"])
    pixels = np.asarray(image, np.float32).reshape(height, width, settings["channels"])
    if settings["crop"] is not None:
        rows, columns = settings["crop"]
        top, left = (height - rows) // 2, (width - columns) // 2
        pixels = pixels[top : top + rows, left : left + columns]
    mean, std = np.array(settings["mean"], np.float32), np.array(settings["std"], np.float32)
    normalised: np.ndarray = ((pixels * np.float32(settings["rescale"]) - mean) / std).transpose(2, 0, 1)
    return normalised
