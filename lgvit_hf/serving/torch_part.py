"""`TorchPart`: a part of a split highway in PyTorch, with the weights of that part alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..hub.loading import HIGHWAYS, read_config
from ..modeling_highway import HighwayMixin
from ..policies import probabilities
from ..pretrained import RECOMPUTED
from ..segments import Segment, State
from .device.info import MEMORY, WEIGHTS, PartInfo
from .device.loop import Arrays, run_part, try_part
from .device.pixels import prepare


class TorchPart:
    """A part that `split(..., format="safetensors")` wrote; called as `Part` is.

    Args:
        folder (`str` or `Path`): Of the part.
        device (`str`, *optional*, defaults to `"cpu"`): Where it runs.
        threads (`int`, *optional*): Of the processor, for all of PyTorch in this process.

    Raises:
        OSError: There is no part.
        ValueError: It is damaged, of another format, or does not run as its description says.
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu", threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.folder, self.info, self.device = Path(folder), PartInfo.load(folder), torch.device(device)
        if self.info.format != "safetensors":
            raise ValueError(f"{folder}: this is no safetensors part, but {self.info.format}")
        config = read_config(str(folder))
        if config.model_type not in HIGHWAYS:
            raise ValueError(f"{folder}: model type {config.model_type!r} must be one of {', '.join(HIGHWAYS)}")
        self.model: HighwayMixin = HIGHWAYS[config.model_type](config).train(False)
        try:
            missing, unexpected = self.model.load_state_dict(load_file(self.folder / WEIGHTS), strict=False)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{self.folder / WEIGHTS} is not of this model ({error})") from error
        strange = [name for name in unexpected if not name.endswith(RECOMPUTED)]
        if strange:
            raise ValueError(f"{self.folder / WEIGHTS}: unknown tensor {strange[0]!r}")
        for name in missing:  # another part's: their memory is freed
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if isinstance(held := getattr(module, attribute), nn.Parameter):
                setattr(module, attribute, nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False))
        self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        self.model.set_exit_policy(self.info.policy)
        indices = [exit["index"] for exit in self.info.exits]
        segments = merged_segments(self.model.segments(), indices, self.info.start)
        self._segments = [
            partial(self._run, segment, exit["grid"]) for segment, exit in zip(segments, self.info.exits, strict=True)
        ]
        try_part(self)

    @torch.inference_mode()
    def __call__(self, inputs: Arrays) -> tuple[Arrays, np.ndarray, Arrays]:
        """Answer samples, as `run_part` says."""
        # copies, for an array may be a piece of a message, which is read-only; the state stays where the model is
        given = {
            name: array if name.startswith(MEMORY) else torch.tensor(array, device=self.device)
            for name, array in inputs.items()
        }
        answers, samples, state = run_part(self.info, self._segments, self._decide, cast(Arrays, given))
        return answers, samples, {name: np.asarray(torch.as_tensor(array).cpu()) for name, array in state.items()}

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the part takes it, float32 `[C, H, W]`.

        Raises:
            ValueError: It takes no images.
        """
        return prepare(image, self.info.image)

    def set_policy(self, policy: dict[str, Any]) -> None:
        """Give the policy other numbers; the exits that it evaluates stay."""
        self.model.set_exit_policy(policy)
        self.info = replace(self.info, policy=policy)

    def _run(self, segment: Segment, grid: list[int] | None, tensors: Any) -> tuple[Any, np.ndarray]:
        state = segment.advance(State(tensors, None if grid is None else (grid[0], grid[1])))
        return state.tensors, segment.answer(state).float().cpu().numpy()

    def _decide(
        self, logits: np.ndarray, memory: Arrays, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Arrays]:
        scores, before = torch.from_numpy(logits), {name: torch.tensor(array) for name, array in memory.items()}
        exits, after = self.model.answering_policy(scores, before, index)
        answer = after.get("answer", scores)
        score = after["score"] if "score" in after else probabilities(answer).amax(-1)
        return answer.numpy(), exits.numpy(), score.float().numpy(), {name: after[name].numpy() for name in memory}


def merged_segments(segments: Sequence[Segment], indices: Sequence[int], start: int = 0) -> list[Segment]:
    """Segments that end at the exits `indices` alone; the blocks before a skipped exit join those after it.

    Args:
        segments (`Sequence[Segment]`): Of a whole highway.
        indices (`Sequence[int]`): Of exits, ascending.
        start (`int`, *optional*, defaults to 0): Index of the first segment that is kept.
    """
    merged = []
    for index in indices:
        blocks = [block for segment in segments[start : index + 1] for block in segment.blocks]
        merged.append(replace(segments[index], blocks=tuple(blocks)))
        start = index + 1
    return merged
