"""The loop over a part's segments: answers of all samples, and the state of those that have not exited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .info import MEMORY, PART_FILE, Exit, PartInfo

Arrays = dict[str, np.ndarray]
ANSWERS = ("logits", "exit_index", "exit_layer", "exit_score")
# state in; state and logits out
Segment = Callable[[Arrays], tuple[Arrays, np.ndarray]]
# logits, memory and exit index in; logits to answer with, which samples exit, score and memory out
Decision = Callable[[np.ndarray, Arrays, int], tuple[np.ndarray, np.ndarray, np.ndarray, Arrays]]


class Runs(Protocol):
    """What runs a part: `Part`, or its likes in PyTorch."""

    folder: Path
    info: PartInfo

    def __call__(self, inputs: Arrays) -> tuple[Arrays, np.ndarray, Arrays]:
        """Answers of all samples, which samples go on, and their state."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        """One image as the part takes it."""


def run_part(
    info: PartInfo, segments: Sequence[Segment], decide: Decision, inputs: Arrays
) -> tuple[Arrays, np.ndarray, Arrays]:
    """Run a part; the remaining segments run on the samples that have not exited.

    Args:
        info (`PartInfo`): Of the part.
        segments (`Sequence[Segment]`): One per exit of the part.
        decide (`Decision`): The policy.
        inputs (`dict[str, np.ndarray]`): What the part takes, batch first.

    Returns:
        - `answers`: `logits` `[B, C]`, `exit_index` `[B]` (from 0, in the whole highway), `exit_layer` `[B]` (blocks
          run, from 1) and `exit_score` `[B]` of every sample,
        - `samples` `[K]`: those that have not exited; their answers are those of the deepest exit here,
        - `state`: of these samples, what the next part takes.
    """
    state = {name: array for name, array in inputs.items() if not name.startswith(MEMORY)}
    samples = np.arange(len(next(iter(state.values()))))
    # the last part alone gives no memory, and takes it
    arrays = info.takes | info.gives
    memory = {
        name: np.repeat(np.asarray(first, arrays[MEMORY + name]["dtype"])[None], len(samples), axis=0)
        for name, first in info.memory.items()
    }
    memory |= {name.removeprefix(MEMORY): array for name, array in inputs.items() if name.startswith(MEMORY)}
    answers: Arrays = {}
    for exit, segment in zip(info.exits, segments, strict=True):
        state, logits = segment(state)
        logits, exits, score, memory = _decided(exit, decide, logits, memory)
        index = np.full(len(samples), exit["index"])
        layers = np.asarray(info.depths)[index]
        here = {"logits": logits, "exit_index": index, "exit_layer": layers, "exit_score": score}
        if not answers:
            answers = {name: array.copy() for name, array in here.items()}
        # of samples that go on, too: a deeper exit replaces their answer, where one is reached
        for name, array in here.items():
            answers[name][samples] = array
        further = np.flatnonzero(~exits)
        if len(further) == len(samples):
            continue
        samples = samples[further]
        if not len(samples):
            return answers, samples, {}
        state = {name: array[further] for name, array in state.items()}
        memory = {name: array[further] for name, array in memory.items()}
    return answers, samples, {**state, **{MEMORY + name: array for name, array in memory.items()}}


def _decided(
    exit: Exit, decide: Decision, logits: np.ndarray, memory: Arrays
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Arrays]:
    if exit["leave"] == "nobody":
        return logits, np.zeros(len(logits), bool), softmax(logits).max(-1), memory
    answer, exits, score, memory = decide(logits, memory, exit["index"])
    if exit["leave"] == "everybody":
        return answer, np.ones(len(logits), bool), score, memory
    return answer, exits & ~np.isnan(logits).any(-1), score, memory


def try_part(part: Runs) -> None:
    """Run a part on a sample of zeros, so that what does not fit is said when it is opened, not at a request.

    Raises:
        ValueError: It does not run, or its answers are not those that its description says.
    """
    info = part.info
    try:
        answers, further, state = part(
            {name: np.zeros((1, *a["shape"]), a["dtype"]) for name, a in info.takes.items()}
        )
        given, described = (answers | state, info.answers | info.gives) if len(further) else (answers, info.answers)
        shapes = {name: list(array.shape[1:]) for name, array in given.items()}
        wanted = {name: array["shape"] for name, array in described.items() if name != "degraded"}
        if shapes != wanted:
            raise ValueError(f"it gives {shapes}, not {wanted}")
        probabilities(info, answers)
        if info.image is not None:
            pixels, shape = part.pixels(Image.new("RGB", (2, 2))), info.takes["pixel_values"]["shape"]
            if list(pixels.shape) != shape or not np.isfinite(pixels).all():
                raise ValueError(f"images become {list(pixels.shape)}, not numbers of shape {shape}")
    except Exception as error:  # of NumPy, pillow, PyTorch and ONNX Runtime
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{part.folder} does not run as its {PART_FILE} says; split it again ({reason})") from error


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of each sample of `logits` `[B, C]`, float32.

    Example:

        >>> softmax(np.array([[0.0, 0.0]], np.float32)).tolist()
        [[0.5, 0.5]]
    """
    with np.errstate(invalid="ignore"):
        powers: np.ndarray = np.exp(logits - logits.max(-1, keepdims=True))
        powers /= powers.sum(-1, keepdims=True)
        return powers


def probabilities(info: PartInfo, answers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Probability of each class, `[B, C]` float32, with the policy's temperature at the exit that answered."""
    return scaled_softmax(info.policy, len(info.depths), answers)


def scaled_softmax(policy: Mapping[str, Any], num_exits: int, answers: Mapping[str, np.ndarray]) -> np.ndarray:
    """`probabilities` by the settings of a policy of `num_exits` exits, the final classifier counted."""
    given = policy.get("temperature", 1.0)
    spread = given if isinstance(given, (list, tuple)) else [given] * num_exits
    temperatures = np.array([*spread, *[1.0] * (num_exits - len(spread))], np.float32)
    return softmax(answers["logits"] / temperatures[answers["exit_index"]][:, None])
