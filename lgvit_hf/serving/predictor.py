"""`Predictor`: numpy arrays in, numpy arrays out, from a checkpoint or an exported folder; for any batch engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from ..runtimes.manifest import Manifest, is_exported
from .device import loop
from .device.info import is_text
from .device.loop import Arrays, scaled_softmax
from .device.pixels import PixelSettings
from .device.rgb import as_rgb, read_image
from .exported_model import SingleFile

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from ..evaluation.costs import Highway
    from .torch_model import TorchModel

ANSWERS = ("logits", "label", "exit_index", "exit_layer", "exit_score")

# an input beside `pixel_values`: the thresholds of each sample, `[E]`; what `PerSamplePolicy` calls them in its memory
THRESHOLDS = "thresholds"


class Opened(Protocol):
    """What a `Predictor` opened: `TorchModel`, or `SingleFile`, which needs no PyTorch.

    `labels` are the classes, `depths` the blocks run before each answer, `shape` `[C, H, W]` is that of one sample,
    `digest` a SHA-256 of the weights.
    """

    labels: list[str]
    depths: list[int]
    shape: list[int]
    problem_type: str | None

    @property
    def digest(self) -> str | None:
        """Of the weights."""

    @property
    def policy(self) -> dict[str, Any]:
        """The exit policy in force."""

    @property
    def takes_images(self) -> bool:
        """Whether there is an image processor."""

    @property
    def image(self) -> PixelSettings | None:
        """What the image processor does, where that is no more than to resize, crop and scale values."""

    @property
    def processor_digest(self) -> str:
        """By which another image processor is known."""

    @property
    def weights(self) -> str | None:
        """By which a calibration names the model, where that is not `digest`: of the checkpoint that was exported."""

    def __call__(self, pixels: np.ndarray, thresholds: np.ndarray | None = None) -> Arrays:
        """Logits, exits and scores of `pixels` `[B, C, H, W]` float32, by `thresholds` `[B, E]` if there are any."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the model takes it, float32 `[C, H, W]`."""


class Predictor:
    """Answers batches of images, wherever it is called: in a script, a service, Ray Data's or Spark's workers.

    It holds its arguments alone and can be pickled; the model is opened at the first batch, once in each process.
    Batches larger than `max_batch_size` are run in parts. A sample's answer does not depend on those beside it.

    A batch is a dict of numpy arrays with one of these two:

    - `pixel_values` `[B, C, H, W]`: what the checkpoint's image processor gives, of any floating dtype, every value
      finite. Whole numbers are refused: raw bytes from 0 to 255 are no `pixel_values`.
    - `image`: raw images, which the checkpoint's image processor resizes, rescales and normalises: `[B, H, W, 3]`
      uint8 from 0 to 255 (or `[B, H, W]`, grey), or an object array of such images in different sizes, or of what
      image files hold (`bytes`).

    Other columns are handed back as they are, beside

    - `logits` `[B, num_labels]` float32,
    - `label` `[B]` int64, the class with the largest,
    - `exit_index` `[B]` int64, which exit answered, from 0, the final classifier last,
    - `exit_layer` `[B]` int64, blocks run before the answer, from 1,
    - `exit_score` `[B]` float32, the exit policy's score where the sample exited.

    Args:
        path (`str` or `Path`): Folder or Hub id of a highway, or a folder that `lgvit export` wrote.
        policy (`dict` or `str`, *optional*): Exit policy instead of the saved one.
        max_batch_size (`int`, *optional*, defaults to 64): Samples that run at once.
        runtime (`str`, *optional*): Of an exported folder, see `open_exported`.
        threads (`int`, *optional*): Of the processor; by default as PyTorch or the runtime chooses, see `SingleFile`.

    An exported folder of the layout `single` answers without PyTorch, see `SingleFile`.

    Raises:
        ValueError:
            `max_batch_size` is less than 1. At the first batch: this is no highway, or none that chooses one label; a
            policy that it cannot have. At any batch: columns that are missing, or not as described here.
        OSError: At the first batch: there is no saved model.

    Example:

        >>> import tempfile
        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> small = dict(image_size=16, patch_size=8, hidden_size=24, intermediate_size=24, num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ViTHighway(ViTHighwayConfig(**small, num_labels=5)).save_pretrained(folder)
        ...     predictor = Predictor(folder, policy="never")
        ...     answers = predictor({"pixel_values": np.zeros((3, 3, 16, 16)), "name": np.array(["a", "b", "c"])})
        >>> answers["logits"].shape, answers["exit_layer"].tolist(), answers["name"].tolist()
        ((3, 5), [12, 12, 12], ['a', 'b', 'c'])
    """

    def __init__(
        self,
        path: str | Path,
        policy: dict[str, Any] | str | None = None,
        *,
        max_batch_size: int = 64,
        runtime: str | None = None,
        threads: int | None = None,
    ) -> None:
        if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size!r} must be an integer of at least 1")
        self.path, self.policy, self.max_batch_size = path, policy, max_batch_size
        self.runtime, self.threads = runtime, threads
        self._opened: Opened | None = None
        self._process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def __repr__(self) -> str:
        return f"Predictor({str(self.path)!r}, {self.policy!r}, max_batch_size={self.max_batch_size})"

    @property
    def model(self) -> Highway:
        """The highway in PyTorch, opened on first use; from then on it is what answers."""
        return self._in_torch().model

    @property
    def processor(self) -> BaseImageProcessor:
        """The checkpoint's image processor of transformers, opened on first use."""
        self._check_takes_images()
        images = self._in_torch().images
        assert images is not None  # as was checked
        return images.processor

    @property
    def takes_images(self) -> bool:
        """Whether the checkpoint has an image processor; without one it answers `pixel_values` alone."""
        return self.opened.takes_images

    @property
    def label_names(self) -> list[str]:
        """What the numbers in `label` stand for."""
        return list(self.opened.labels)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Answer a batch, as the class says; an empty one gets empty arrays."""
        given = [name for name in ("pixel_values", "image") if name in batch]
        if len(given) != 1:
            raise ValueError(
                f"a batch must have one column 'pixel_values' or one column 'image'; it has {sorted(batch) or 'none'}"
            )
        taken = sorted(set(ANSWERS) & set(batch))
        if taken:
            raise ValueError(f"{taken[0]!r} is a column of the answers; give that of the batch another name")
        images = batch[given[0]]
        if given[0] == "pixel_values":
            pixels = _checked_pixels(images)
            chunks: Iterator[np.ndarray] = (pixels[part] for part in self._parts(len(pixels)))
        else:
            paths = [image for image in images if isinstance(image, (str, Path))]
            if paths:
                raise ValueError(f"image: {str(paths[0])!r} is a path; Predictor.images takes those")
            chunks = self._processed(images)
        kept = {name: column for name, column in batch.items() if name != given[0]}
        return {**kept, **self._answers(chunks)}

    def images(self, sources: Sequence[str | Path | bytes | Image.Image | np.ndarray]) -> dict[str, np.ndarray]:
        """Answer images that the checkpoint's image processor still has to prepare.

        Args:
            sources (`Sequence`): Of whatever [`open_image`] reads.

        Raises:
            ValueError: One of them is no readable image, by its path or number.
        """
        return self._answers(self._processed(sources))

    def pixel_values(self, source: str | Path | bytes | Image.Image | np.ndarray) -> np.ndarray:
        """One image as the model takes it, `[C, H, W]` float32.

        Raises:
            OSError: The checkpoint has no image processor.
            ValueError: The image cannot be read.
        """
        self._check_takes_images()
        return self.opened.pixels(open_image(source))

    def probabilities(self, answers: Mapping[str, np.ndarray]) -> np.ndarray:
        """Probability of each class, `[B, num_labels]` float32: the softmax, with the policy's temperature if any.

        Args:
            answers (`Mapping`): As they were given.
        """
        return scaled_softmax(self.opened.policy, len(self.opened.depths), answers)

    @property
    def opened(self) -> Opened:
        """What this process opened: all of it at once, so that a folder that changes later changes no answer.

        A forked process opens its own, for threads and sessions do not survive a fork.
        """
        if self._opened is None or self._process != os.getpid():
            opened = self._open()
            _check_answers(self.path, opened)
            self._opened, self._process = opened, os.getpid()
        return self._opened

    def _open(self) -> Opened:
        if is_exported(self.path):
            manifest = Manifest.load(self.path)
            if manifest.layout == "single":
                return SingleFile(self.path, manifest, self.policy, runtime=self.runtime, threads=self.threads)
        from .torch_model import TorchModel

        return TorchModel(str(self.path), self.policy, self.runtime, self.threads)

    def _in_torch(self) -> TorchModel:
        from .torch_model import TorchModel

        opened = self.opened
        if not isinstance(opened, TorchModel):
            self._opened = opened = TorchModel(str(self.path), self.policy, self.runtime, self.threads)
        return opened

    def _check_takes_images(self) -> None:
        if not self.takes_images:
            raise OSError(
                f"{self.path} has no image processor (preprocessor_config.json); it takes pixel_values alone"
            )

    def _parts(self, num_samples: int) -> list[slice]:
        return [slice(start, start + self.max_batch_size) for start in range(0, num_samples, self.max_batch_size)]

    def _processed(self, sources: Sequence[Any]) -> Iterator[np.ndarray]:
        for part in self._parts(len(sources)):
            pixels = []
            for number, source in enumerate(sources[part], start=part.start):
                try:
                    pixels.append(self.pixel_values(source))
                except ValueError as error:
                    raise ValueError(f"image {number}: {error}") from error
            yield np.stack(pixels)

    def _answers(self, chunks: Iterator[np.ndarray]) -> Arrays:
        opened, counts = self.opened, np.zeros(0, np.int64)
        empty = np.zeros((0, len(opened.labels)), np.float32)
        parts: list[Arrays] = [dict(zip(loop.ANSWERS, (empty, counts, counts, np.zeros(0, np.float32)), strict=True))]
        parts += map(opened, chunks)
        found = {name: np.concatenate([part[name] for part in parts]) for name in loop.ANSWERS}
        found["label"] = found["logits"].argmax(-1)
        return {name: found[name] for name in ANSWERS}


def _check_answers(path: str | Path, opened: Opened) -> None:
    """Raise `ValueError` where a highway does not choose one of several labels that can be written."""
    if len(opened.labels) < 2 or opened.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"{path}: {len(opened.labels)} label(s), problem_type {opened.problem_type!r}: it does not choose one "
            "label of several; call the model itself"
        )
    for name in opened.labels:
        if not is_text(name):
            raise ValueError(f"{path}: id2label in config.json: {name!r} is no text that UTF-8 can write")


def open_image(source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """An image as models see it: upright, opaque RGB, by the rules of `serving/device/rgb.py`.

    Args:
        source (`str`, `Path`, `bytes`, `PIL.Image.Image` or `np.ndarray`):
            A file, what a file holds, an open image, or `[H, W, 3]`, `[H, W, 1]` or `[H, W]` uint8.

    Raises:
        ValueError: It is no image, damaged, too large, or of numbers without a known range.

    Example:

        >>> open_image(np.zeros((4, 6), dtype=np.uint8)).size
        (6, 4)
    """
    if isinstance(source, np.ndarray):
        good = source.dtype == np.uint8 and source.ndim in (2, 3) and source.size
        if not good or source.shape[2:] not in ((), (1,), (3,)):
            raise ValueError(
                f"an image of shape {source.shape} and dtype {source.dtype} must be [H, W, 3] or [H, W] uint8, values "
                "from 0 to 255"
            )
        grey = source.shape[2:] == (1,)
        source = Image.fromarray(np.ascontiguousarray(source[..., 0] if grey else source))
    if isinstance(source, Image.Image):
        return as_rgb(source)
    try:
        return read_image(source)
    except ValueError as error:
        raise ValueError(f"{source} is {error}" if isinstance(source, (str, Path)) else str(error)) from error


def _checked_pixels(pixels: Any) -> np.ndarray:
    """`pixel_values` as float32; what only the model can say of them, it says itself."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype.kind != "f":
        kind = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(
            f"pixel_values: {kind} must be a numpy array of floats, from the image processor; raw images, uint8 from "
            "0 to 255, go into the column 'image'"
        )
    if pixels.ndim != 4:
        raise ValueError(f"pixel_values: shape {pixels.shape} must be (batch, channels, height, width)")
    with np.errstate(over="ignore"):
        checked = np.asarray(pixels, dtype=np.float32)
    finite = np.isfinite(checked).all(axis=(1, 2, 3))
    if not finite.all():
        raise ValueError(f"pixel_values: sample {int(finite.argmin())} has values that are NaN or infinite")
    return checked
