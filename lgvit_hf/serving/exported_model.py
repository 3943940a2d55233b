"""`SingleFile`: an exported single file that answers without PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..policies import build_policy, check_problem, default_policy
from ..runtimes.manifest import Manifest
from ..runtimes.sessions import SESSIONS, check_runtime, open_sessions
from ..runtimes.single_file import check_file_policy, run_file
from .device.info import file_digest
from .device.loop import ANSWERS, Arrays
from .device.pixels import PROCESSOR_FILES, PixelSettings, pixel_settings, prepare

if TYPE_CHECKING:
    from ..data.processing import ProcessedImages

# what transformers leaves out of a config
_TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}


class SingleFile:
    """A folder that `lgvit export` wrote with the layout `single`, opened; see `Opened` of `predictor.py`.

    Images are prepared by `prepare`, as it was tried when the folder was written. Where the image processor does more,
    was changed since, or was exported by version 0.1, transformers' own is used, which imports PyTorch.

    Args:
        folder (`str` or `Path`): What was exported.
        manifest (`Manifest`): Of it.
        policy (`dict` or `str`, *optional*): Exit policy instead of the saved one.
        runtime (`str`, *optional*, defaults to `"onnxruntime"`): One of `SESSIONS`.
        threads (`int`, *optional*): Of one operator; by default `OMP_NUM_THREADS`, or as the runtime chooses.

    Raises:
        ImportError: The runtime is not installed.
        OSError, ValueError: See `ORTHighway.from_pretrained`.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        policy: dict[str, Any] | str | None = None,
        *,
        runtime: str | None = None,
        threads: int | None = None,
    ):
        check_runtime(runtime)
        threads = _usual_threads() if threads is None else threads
        self.folder, runtime = Path(folder), runtime or next(iter(SESSIONS))
        self.depths, self.digest, self.weights = manifest.depths, manifest.digest, manifest.weights
        config = _settings_of(self.folder, manifest)
        self.labels, self.problem_type = config["labels"], config.get("problem_type")
        if policy is None:
            policy = config.get("exit_policy") or default_policy(len(self.labels), self.problem_type)
        self._policy = build_policy(policy, len(config["exit_positions"]))
        check_problem(self._policy, len(self.labels), self.problem_type)
        check_file_policy(self._policy, config.get("exit_ensemble"), manifest, runtime, self.folder)
        (self._session,) = open_sessions(self.folder, manifest, lambda file: SESSIONS[runtime].open(file, threads))
        self.shape = list(self._session.get_inputs()[0].shape[1:])
        self.image = _image_settings(self.folder, manifest, self.shape[0])
        self._images: ProcessedImages | None = None
        if self.image is None and self._processor_file.is_file():
            from .torch_model import open_images

            self._images = open_images(str(folder))

    @property
    def policy(self) -> dict[str, Any]:
        """The exit policy in force."""
        return self._policy.to_dict()

    @property
    def _processor_file(self) -> Path:
        files = [self.folder / name for name in PROCESSOR_FILES]
        return next(filter(Path.is_file, files), files[0])

    @property
    def processor_digest(self) -> str:
        """By which another image processor is known."""
        return file_digest(self._processor_file)

    @property
    def takes_images(self) -> bool:
        """Whether there is an image processor."""
        return self.image is not None or self._images is not None

    def __call__(self, pixels: np.ndarray, thresholds: np.ndarray | None = None) -> Arrays:
        """`ANSWERS` to `pixels` `[B, C, H, W]` float32, by `thresholds` `[B, E]` instead of the policy's, if given."""
        if not len(pixels) or list(pixels.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"pixel_values: shape {pixels.shape} must be (batch, {wanted}), with at least one image")
        given = self._session, np.ascontiguousarray(pixels), self._policy, len(self.depths)
        found = run_file(*given, thresholds=thresholds)
        return dict(zip(ANSWERS, found, strict=True))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the file takes it, float32 `[C, H, W]`."""
        return prepare(image, self.image) if self._images is None else self._images.pixels(image).numpy()


def _usual_threads() -> int | None:
    """What PyTorch goes by, too; the runtimes themselves do not."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() else None


def _settings_of(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What `config.json` says, with `labels`; it must be of the highway that was exported. No transformers."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, positions = config["model_type"], config["exit_positions"]
        num_blocks = sum(config["depths"]) if "depths" in config else config["num_hidden_layers"]
        depths = [*positions, *([] if config.get("truncated") else [num_blocks])]
        names = config.get("id2label") or _TWO_LABELS
        labels = [str(names[str(index)]) for index in range(len(names))]
    except FileNotFoundError as error:
        raise OSError(f"no config.json in {str(folder)!r}: not a saved model") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not the config of a highway ({type(error).__name__}: {error})") from error
    if not str(kind).endswith("_highway"):
        raise ValueError(f"{file}: model type {kind!r} is no highway")
    if depths != manifest.depths:
        raise ValueError(
            f"{file} is of a highway that answers at depths {depths}, the files beside it at {manifest.depths}; "
            "export it again"
        )
    return {**config, "labels": labels}


def _image_settings(folder: Path, manifest: Manifest, num_channels: int) -> PixelSettings | None:
    """How images are prepared, if it is as it was tried when the folder was written."""
    file = folder / PROCESSOR_FILES[0]
    try:
        settings = pixel_settings(json.loads(file.read_text(encoding="utf-8")), num_channels)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # none, or one that only transformers' processor can say what is wrong with
    return settings if settings == manifest.image else None
