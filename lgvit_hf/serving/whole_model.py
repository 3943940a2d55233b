"""`Whole`: a highway that was not split, as the only part there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .device.info import PartInfo
from .device.loop import ANSWERS, Arrays, try_part
from .exported_model import SingleFile
from .predictor import THRESHOLDS, Predictor

if TYPE_CHECKING:
    from .torch_segments import TorchSegments


class Whole:
    """A checkpoint or an exported highway; called as a part is, but all samples exit in it.

    Args:
        path (`str` or `Path`): See `Predictor`.
        policy (`dict`, *optional*): Instead of the saved one.
        max_batch_size (`int`, *optional*, defaults to 32): Samples that run at once.
        runtime (`str`, *optional*), threads (`int`, *optional*): See `Predictor`.

    Raises:
        OSError, ValueError: See `Predictor`; also where it does not run, or its image processor does not fit it.
    """

    def __init__(
        self,
        path: str | Path,
        policy: dict[str, Any] | None = None,
        *,
        max_batch_size: int = 32,
        runtime: str | None = None,
        threads: int | None = None,
    ):
        self.folder = Path(path)
        self._predictor = Predictor(path, policy, max_batch_size=max_batch_size, runtime=runtime, threads=threads)
        opened = self._predictor.opened
        self.weights = opened.weights
        self.info = PartInfo(
            model=opened.digest or "",
            format="whole",
            takes={"pixel_values": {"dtype": "float32", "shape": opened.shape}},
            memory={},
            depths=opened.depths,
            policy=opened.policy,
            labels=opened.labels,
        )
        try_part(self)
        if self._predictor.takes_images:
            self._try_images(path)
            self.info = replace(self.info, image=opened.image)

    def _try_images(self, path: str | Path) -> None:
        """Images of three shapes through the processor: a size that does not fit would fail at a client's request."""
        wanted = self.info.takes["pixel_values"]["shape"]
        for height, width in ((37, 53), (53, 37), tuple(wanted[1:])):
            try:
                found = list(self.pixels(Image.new("RGB", (width, height))).shape)
            except Exception as error:  # whatever transformers' processors raise for settings that do not go together
                raise ValueError(f"{path}: its image processor does not run ({error})") from error
            if found != wanted:
                raise ValueError(
                    f"{path}: its image processor makes {found} of {height} x {width} pixels, but the model takes "
                    f"{wanted}; mend size or crop_size in preprocessor_config.json"
                )

    def __call__(self, inputs: Arrays) -> tuple[Arrays, np.ndarray, Arrays]:
        """Answer samples, all of them; by `thresholds` `[B, E]` of each sample's own, where the inputs hold them."""
        thresholds = inputs.get(THRESHOLDS)
        if thresholds is None:
            found = self._predictor(inputs)
        else:
            found = self._predictor.opened(inputs["pixel_values"], thresholds)
        return {name: found[name] for name in ANSWERS}, np.zeros(0, np.int64), {}

    def segments(self) -> TorchSegments | None:
        """What runs its segments one by one; nothing of what is exported in one file."""
        opened = self._predictor.opened
        if isinstance(opened, SingleFile):
            return None
        from .torch_model import TorchModel
        from .torch_segments import TorchSegments

        if isinstance(opened, TorchModel) and getattr(opened.model, "layout", "segments") == "segments":
            return TorchSegments(opened)
        return None

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the model takes it, float32 `[C, H, W]`."""
        return self._predictor.pixel_values(image)
