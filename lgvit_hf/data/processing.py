"""Images and an image processor become `pixel_values`: batches of tensors, as models take them. No torchvision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from ..segments import height_width
from ..serving.device.pixels import PROCESSOR_FILES
from ..serving.device.rgb import as_rgb, check_resized, read_image
from .augmentation import Augmentation
from .folders import require_datasets

if TYPE_CHECKING:
    import datasets
    from transformers import BaseImageProcessor


class ProcessedImages(TorchDataset):
    """Images as a model takes them: each item is `{"pixel_values": [C, H, W] float32, "labels": int}`.

    Images are upright, opaque RGB, or grey for a processor of one channel, as `serving/device/rgb.py` says. Without
    `augment` an item is what the processor makes of the image. With it, the image is augmented to the processor's size
    and then rescaled and normalised as the processor would. What is random about an item depends on `seed`, the epoch
    and its index alone: dataloader workers, several processes and resumed runs see the same images.

    Args:
        images (`datasets.Dataset`): With a column `image`; items have `labels` where there is a column `label`.
        processor (`BaseImageProcessor`): Resizes and normalises.
        keep (`bool`, *optional*, defaults to `False`):
            Hold images in memory once they are decoded, one byte per value; for small sets. Each dataloader worker
            holds its own, as long as it lives.
        augment (`Augmentation`, *optional*): For training.
        seed (`int`, *optional*, defaults to 0): Of the augmentation.

    Raises:
        ValueError:
            The processor has no size to augment to; a negative seed; when read, an image that is broken, too large, or
            of numbers without a known range.

    Example:

        >>> from lgvit_hf.data.datasets import load_images
        >>> images = ProcessedImages(load_images("digits").test, make_processor(16), augment=Augmentation(crop="pad"))
        >>> images.set_epoch(1)
        >>> images[0]["pixel_values"].shape
        torch.Size([3, 16, 16])
    """

    def __init__(
        self,
        images: datasets.Dataset,
        processor: BaseImageProcessor,
        *,
        keep: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
    ):
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        self.images = _as_stored(images)
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self._size = None if augment is None else image_size(processor)
        self._channels = channels_of(processor)
        self._table = value_table(processor)
        # to a height and a width, before each value is looked up, and that is all
        self.resizes_plainly = augment is None and _resizes_plainly(processor, self._table)
        # shared, so that dataloader workers that outlive an epoch hear of the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._kept: dict[int, tuple[Any, dict[str, int]]] | None = {} if keep else None

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for this epoch; call it before the epoch's first batch is read."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch, which PyTorch's `DataLoader` asks for at once."""
        own = range(len(self))
        indices = [own[int(index)] for index in indices]
        images, labels = zip(*self._prepared(indices), strict=True)
        finished = zip(self._finished(images, indices), labels, strict=True)
        return [{"pixel_values": pixels, **label} for pixels, label in finished]

    def picture(self, index: int) -> Image.Image:
        """One image of the dataset as people see it, upright RGB, before it is resized."""
        return as_rgb(decoded(self.images[index]["image"], f"image {index} of the dataset"))

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """What the model takes of one image that is not of the dataset, `[C, H, W]` float32."""
        return next(iter(self._finished([self._prepare(image)], [0])))

    def _prepared(self, indices: list[int]) -> list[tuple[Any, dict[str, int]]]:
        """Images as far as they are the same in every epoch, which is what is kept, with `{"labels": int}` or `{}`."""
        prepared = {} if self._kept is None else self._kept
        missing = [index for index in indices if index not in prepared]
        if missing:
            for index, sample in zip(missing, self.images.__getitems__(missing), strict=True):
                label = {"labels": sample["label"]} if "label" in sample else {}
                image = decoded(sample["image"], f"image {index} of the dataset")
                try:
                    prepared[index] = self._prepare(image), label
                except ValueError as error:
                    raise ValueError(f"image {index} of the dataset: {error}") from error
        return [prepared[index] for index in indices]

    def _prepare(self, image: Image.Image) -> np.ndarray | torch.Tensor:
        image = as_rgb(image, self._channels)
        if self.augment is not None:
            return np.asarray(image)
        if self.resizes_plainly:
            return np.asarray(_resized(image, self.processor))
        return _processed(image, self.processor)

    def _finished(self, images: Sequence[Any], indices: list[int]) -> Iterable[torch.Tensor]:
        """`pixel_values` of prepared images, one `[C, H, W]` each."""
        if self.augment is not None:
            images = [self._augmented(image, index) for image, index in zip(images, indices, strict=True)]
            if self._table is None:
                return [_normalised(image, self.processor) for image in images]
        elif self._table is None or not self.resizes_plainly:
            return images
        return look_up(np.stack(images), self._table)

    def _augmented(self, image: np.ndarray, index: int) -> Image.Image:
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        assert self.augment is not None and self._size is not None  # set together
        return self.augment(Image.fromarray(image), self._size, rng)


def _as_stored(images: Any) -> Any:
    """The dataset with its images as their files hold them, where they are: `read_image` is to decode them."""
    column = getattr(images, "features", {}).get("image")
    if getattr(column, "decode", None) is not True or images.format["type"] is not None:
        return images
    return images.cast_column("image", require_datasets().Image(decode=False))


def decoded(image: Any, name: str) -> Image.Image:
    """An image of a dataset, also where it is still as its file holds it.

    Args:
        image (`Image.Image` or `dict`): Or its `bytes` and `path`, one of which may be `None`.
        name (`str`): What an error calls it where it has no path.

    Raises:
        ValueError: It cannot be read.
    """
    if not isinstance(image, dict):
        return image
    path, content = image["path"], image["bytes"]
    if content is None and "://" in (path or ""):
        # inside an archive, or elsewhere: only `datasets` can open it
        return require_datasets().Image().decode_example(image)
    try:
        return read_image(path if content is None else content)
    except ValueError as error:
        raise ValueError(f"{path or name} is {error}") from error


def channels_of(processor: BaseImageProcessor) -> int:
    """Channels of what a processor gives: 1 where it normalises by a single mean, else 3.

    Example:

        >>> channels_of(make_processor(32)), channels_of(make_processor(32, num_channels=1))
        (3, 1)
    """
    mean = getattr(processor, "image_mean", None)
    return 1 if isinstance(mean, (list, tuple)) and len(mean) == 1 else 3


def image_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of what a processor makes of an image.

    Example:

        >>> image_size(make_processor(32))
        (32, 32)
    """
    size = getattr(processor, "crop_size" if getattr(processor, "do_center_crop", None) else "size", None)
    size = dict(size or {})
    edge = size.get("shortest_edge")
    height, width = size.get("height") or edge, size.get("width") or edge
    if height is None or width is None:
        raise ValueError(f"size of the processor is {size}; it must have height and width, or shortest_edge")
    return height, width


def value_table(processor: BaseImageProcessor) -> np.ndarray | None:
    """What a processor rescales and normalises each value to, if that is all it does beside resizing and cropping.

    Asked of the processor itself: looking values up is many times faster than calling it, and exactly equal.

    Returns:
        `np.ndarray` or `None`: `[C, 256]`, the results by channel and value; `None` if a result depends on more.

    Example:

        >>> table = value_table(make_processor(32))
        >>> table.shape, table[0, [0, 255]].tolist()
        ((3, 256), [-1.0, 1.0])
    """
    from transformers import BaseImageProcessor

    if not isinstance(processor, BaseImageProcessor):
        return None
    channels = channels_of(processor)
    every_value = as_rgb(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), channels)
    table = _normalised(every_value, processor).numpy()
    if table.shape != (channels, 16, 16):
        return None
    table = table.reshape(channels, 256)
    noise = _noise(20, 24, channels)
    same = torch.equal(_normalised(noise, processor), look_up(np.asarray(noise)[None], table)[0])
    return table if same else None


def look_up(images: np.ndarray, table: np.ndarray) -> torch.Tensor:
    """Values of images `[B, H, W, 3]`, or grey `[B, H, W]`, replaced by those of a [`value_table`], as `[B, C, H, W]`.

    Example:

        >>> look_up(np.zeros((2, 4, 5, 3), dtype=np.uint8), value_table(make_processor(4))).shape
        torch.Size([2, 3, 4, 5])
    """
    images = images.reshape(*images.shape[:3], len(table))
    batch, height, width, channels = images.shape
    pixels = np.empty((batch, channels, height, width), dtype=table.dtype)
    for channel in range(channels):
        # every value is in the table: `clip` only spares the check
        np.take(table[channel], images[..., channel], out=pixels[:, channel], mode="clip")
    return torch.from_numpy(pixels)


def _normalised(image: Image.Image, processor: BaseImageProcessor) -> torch.Tensor:
    """The image through the processor in the size that it has."""
    asis = {name: False for name in ("do_resize", "do_center_crop") if getattr(processor, name, None)}
    return _processed(image, processor, **asis)


def _processed(image: Image.Image, processor: BaseImageProcessor, **settings: Any) -> torch.Tensor:
    """What a processor makes of one image, `[C, H, W]`; a small one that it would make huge is refused."""
    edge = dict(getattr(processor, "size", None) or {}).get("shortest_edge")
    if edge and settings.get("do_resize", getattr(processor, "do_resize", False)):
        check_resized(image, edge)
    pixels: Any = image
    if image.mode == "L":
        # processors cannot tell a grey image's channel from its rows
        pixels, settings["input_data_format"] = np.asarray(image)[..., None], "channels_last"
    return processor(pixels, return_tensors="pt", **settings)["pixel_values"][0]


def _resized(image: Image.Image, processor: BaseImageProcessor) -> Image.Image:
    height, width = image_size(processor)
    return image if image.size == (width, height) else image.resize((width, height), processor.resample)  # type: ignore[attr-defined]  # of all that resize


def _resizes_plainly(processor: BaseImageProcessor, table: np.ndarray | None) -> bool:
    """Whether all a processor does to an image is what `_resized` and its value table do."""
    size = dict(getattr(processor, "size", None) or {})
    if table is None or getattr(processor, "do_center_crop", None) or not (size.get("height") and size.get("width")):
        return False
    noise = _noise(size["height"] + 3, size["width"] + 7, len(table))
    ours = look_up(np.asarray(_resized(noise, processor))[None], table)[0]
    return torch.equal(_processed(noise, processor), ours)


def _noise(height: int, width: int, channels: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return as_rgb(Image.fromarray(values), channels)


def open_processor(checkpoint: str | os.PathLike[str]) -> BaseImageProcessor:
    """The image processor of a folder or Hub id; code that lies there is not run.

    Raises:
        OSError: There is none.
        ValueError: It needs code of its own.
    """
    from transformers import AutoImageProcessor

    if Path(checkpoint).is_dir() and not any((Path(checkpoint) / name).is_file() for name in PROCESSOR_FILES):
        raise OSError(f"{checkpoint}: no preprocessor_config.json there, so nothing says how images are prepared")
    # left to itself, transformers asks on the terminal, and takes a `y` from whatever stands at the other end of it
    return AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)


def make_processor(image_size: int | Sequence[int], num_channels: int = 3) -> BaseImageProcessor:
    """The image processor of ViT for images of `image_size` pixels, values in [-1, 1]; saved with the model.

    Args:
        image_size (`int` or pair): Height and width.
        num_channels (`int`, *optional*, defaults to 3): 3 for RGB, 1 for grey.
    """
    from transformers import ViTImageProcessor

    size, half = dict(zip(("height", "width"), height_width(image_size), strict=True)), [0.5] * num_channels
    return ViTImageProcessor(size=size, image_mean=half, image_std=half, do_convert_rgb=num_channels == 3)


def image_size_of(processor: BaseImageProcessor) -> int | list[int]:
    """Height and width of what an image processor gives, as a config has them: one number for both where they agree.

    Example:

        >>> image_size_of(make_processor(32)), image_size_of(make_processor([16, 32]))
        (32, [16, 32])
    """
    picture = Image.new("RGB", (64, 64))
    height, width = processor(images=[picture], return_tensors="pt")["pixel_values"].shape[-2:]
    return height if height == width else [height, width]


def stack(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of items, as the model's forward takes it; without `labels` where the items have none."""
    batch = {"pixel_values": torch.stack([torch.as_tensor(item["pixel_values"]) for item in items])}
    if "labels" in items[0]:
        batch["labels"] = torch.as_tensor([item["labels"] for item in items])
    return batch
