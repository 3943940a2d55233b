"""`Part`: a part of a split highway in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .info import PartInfo
from .loop import Arrays, run_part, try_part
from .pixels import prepare
from .session import open_session, run_segment, run_session


class Part:
    """A part that `split(..., format="onnx")` wrote. A sample's answer does not depend on those of the others.

    It is called with arrays by name, batch first, as `info.takes` says, and gives `answers`, `samples` and `state` as
    `run_part` does.

    Args:
        folder (`str` or `Path`): Of the part.
        threads (`int`, *optional*): Of one operator; by default as ONNX Runtime chooses.

    Raises:
        OSError: There is no part.
        ValueError: It is damaged, of another format, or does not run as its description says.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None):
        self.folder, self.info = Path(folder), PartInfo.load(folder)
        if self.info.format != "onnx":
            raise ValueError(f"{folder}: a {self.info.format} part, which lgvit_hf.serving.open_part.open_part opens")
        sessions = [open_session(self.folder / name, threads) for name in self.info.files]
        indices = [exit["index"] for exit in self.info.exits]
        self._segments = [partial(_run, session) for session in sessions[: len(indices)]]
        decisions = sessions[len(indices) :]
        # one for all exits, or one for each
        self._decisions = dict(zip(indices, decisions * (len(indices) // len(decisions)), strict=True))
        try_part(self)

    def __call__(self, inputs: Arrays) -> tuple[Arrays, np.ndarray, Arrays]:
        """Answer samples, as the class says."""
        return run_part(self.info, self._segments, self._decide, inputs)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the part takes it, float32 `[C, H, W]`.

        Raises:
            ValueError: It takes no images.
        """
        return prepare(image, self.info.image)

    def set_policy(self, policy: dict[str, Any]) -> None:
        """Give the policy other numbers; its name and the exits that it evaluates stay.

        Raises:
            ValueError: It is of another name, or was fitted anew: what was fitted is in the files.
        """
        held = self.info.policy
        if policy["name"] != held["name"]:
            raise ValueError(f"policy: this part decides by {held['name']!r}, not by {policy['name']!r}")
        for name, value in policy.items():
            fitted = isinstance(value, list) and any(isinstance(each, (list, dict)) for each in value)
            if fitted and value != held.get(name):
                raise ValueError(
                    f"policy: {name} of {held['name']!r} is in the files of this part; split the model again"
                )
        self.info = replace(self.info, policy=policy)

    def _decide(
        self, logits: np.ndarray, memory: Arrays, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Arrays]:
        feeds = {"logits": logits, **{f"{name}_in": array for name, array in memory.items()}}
        names = {entry.name for entry in self._decisions[index].get_inputs()} - set(feeds)
        numbers = {name: np.array([self._number(name, index)], np.float32) for name in names}
        found = run_session(self._decisions[index], {**feeds, **numbers})
        after = {name: found[f"{name}_out"] for name in memory}
        # of an ensemble, its own logits
        return found.get("answer", logits), found["leave"], found["score"], after

    def _number(self, name: str, index: int) -> float:
        """A policy's number at an exit; past the end of a list a temperature is 1, and a threshold the last one."""
        value = self.info.policy.get(name, 1.0)
        if isinstance(value, list):
            past_end = 1.0 if name == "temperature" else value[-1]
            value = [*value, past_end][min(index, len(value))]
        return float(value)


def _run(session: Any, state: Arrays) -> tuple[Arrays, np.ndarray]:
    found = run_segment(session, state)
    logits = found.pop("logits")
    return found, logits
