"""`TorchModel`: a checkpoint, or an exported folder of any layout, that answers in PyTorch."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..configuration import HighwayConfig
from ..data.processing import ProcessedImages, open_processor
from ..engine import run_early
from ..ensemble import with_ensemble
from ..evaluation.costs import Highway
from ..evaluation.exit_table import weights_digest
from ..exit_policy import ExitPolicy, PerSamplePolicy
from ..hub.loading import answer_depths, load_highway
from ..runtimes.open_exported import open_exported
from ..segments import State, height_width
from .device.loop import ANSWERS, Arrays
from .device.pixels import PixelSettings, pixel_settings


class TorchModel:
    """A highway, opened; see `Opened` of `predictor.py`.

    Args:
        path (`str`): Folder or Hub id of a highway, or a folder that `lgvit export` wrote.
        policy (`dict` or `str`, *optional*): Exit policy instead of the saved one.
        runtime (`str`, *optional*): Of an exported folder, see `open_exported`.
        threads (`int`, *optional*): Of the processor, for all of PyTorch in this process.

    Raises:
        OSError, ValueError: There is no saved highway, or it cannot have this policy.
    """

    def __init__(
        self,
        path: str,
        policy: dict[str, Any] | str | None = None,
        runtime: str | None = None,
        threads: int | None = None,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        opened: nn.Module | None = open_exported(path, runtime)
        if opened is None:
            opened = load_highway(path)
            opened.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model = cast(Highway, opened)
        config = self.model.config
        names, self.problem_type = config.id2label or {}, config.problem_type
        self.labels = [str(names[index]) for index in range(config.num_labels)]
        self.depths, self.shape = (
            answer_depths(cast(HighwayConfig, config)),
            [config.num_channels, *height_width(config.image_size)],
        )
        if policy is not None:
            self.model.set_exit_policy(policy)
        self.images = open_images(path)

    @property
    def policy(self) -> dict[str, Any]:
        """The exit policy in force."""
        return self.model.exit_policy.to_dict()

    @cached_property
    def digest(self) -> str | None:
        """See `weights_digest`."""
        return weights_digest(self.model)

    @property
    def weights(self) -> str | None:
        """Of the checkpoint that was exported, if it is known."""
        manifest = getattr(self.model, "manifest", None)
        return None if manifest is None else manifest.weights

    @property
    def processor_digest(self) -> str:
        """By which another image processor is known."""
        assert self.images is not None  # whoever asks has images
        return hashlib.sha256(self.images.processor.to_json_string().encode()).hexdigest()

    @property
    def image(self) -> PixelSettings | None:
        """What the image processor does, where that is no more than to resize and scale values."""
        if self.images is None or not self.images.resizes_plainly:
            return None
        settings = json.loads(self.images.processor.to_json_string())
        return pixel_settings(settings, self.shape[0])

    @property
    def takes_images(self) -> bool:
        """Whether there is an image processor."""
        return self.images is not None

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, thresholds: np.ndarray | None = None) -> Arrays:
        """`ANSWERS` to `pixels` `[B, C, H, W]` float32, by `thresholds` `[B, E]` instead of the policy's, if given."""
        # a copy, for others' arrays may be read-only
        images = torch.tensor(pixels, device=self.model.device, dtype=self.model.dtype)
        if thresholds is None:
            found: Any = self.model(pixel_values=images)
        else:
            policy = policy_by(torch.tensor(thresholds), self.model)
            found = run_early(self.model.segments(), State({"pixel_values": images}), policy)
        tensors = {name: getattr(found, name) for name in ANSWERS}
        return {name: (each.float() if name == "logits" else each).cpu().numpy() for name, each in tensors.items()}

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the model takes it, float32 `[C, H, W]`."""
        assert self.images is not None  # whoever asks has images
        return self.images.pixels(image).numpy()


def policy_by(thresholds: torch.Tensor, model: Highway) -> ExitPolicy:
    """The policy in force in `model` with thresholds of each sample's own, `[B, E]`."""
    num_exits = thresholds.shape[1]
    policy = PerSamplePolicy(model.exit_policy, thresholds, num_exits)
    return with_ensemble(policy, model.config.exit_ensemble, num_exits + 1, model.config.num_labels)


def open_images(path: str) -> ProcessedImages | None:
    """Images by transformers' image processor of a folder or Hub id, if it has one.

    Raises:
        ValueError: It does not run.
    """
    try:
        return ProcessedImages([], open_processor(path))
    except OSError:
        return None  # it answers `pixel_values` all the same
    except ValueError as error:
        raise ValueError(f"{path}: its image processor does not run ({error})") from error
