"""What each part of a highway costs, in multiply-accumulates (MACs; FLOPs are twice as many)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models import example_image
from ..segments import Segment, State


@dataclass(frozen=True)
class Costs:
    """Costs of one image, in any unit (MACs, milliseconds).

    Args:
        trunks (`list[float]`): Of the blocks of each segment, the stem counted with the first.
        heads (`list[float]`): Of the exit of each segment, the final classifier last.
    """

    trunks: list[float]
    heads: list[float]

    @property
    def backbone(self) -> float:
        """The plain model: all blocks and the final classifier."""
        return sum(self.trunks) + self.heads[-1]

    def of_exit(self, exit_index: int, asked: Sequence[int] | None = None) -> float:
        """Cost of a row that leaves at an exit: blocks until there and every head it was asked at.

        Args:
            exit_index (`int`): From 0, the final classifier last.
            asked (`Sequence[int]`, *optional*): Exits whose heads are run; all by default.

        Example:

            >>> Costs(trunks=[4.0, 8.0], heads=[1.0, 0.5]).of_exit(1)
            13.5
        """
        passed = range(exit_index) if asked is None else [index for index in asked if index < exit_index]
        return sum(self.trunks[: exit_index + 1]) + sum(self.heads[index] for index in passed) + self.heads[exit_index]

    def mean(self, shares: Sequence[float], asked: Sequence[int] | None = None) -> float:
        """Mean cost of a row when `shares[e]` of the rows leave at exit `e`.

        Example:

            >>> Costs(trunks=[4.0, 8.0], heads=[1.0, 0.5]).mean([0.5, 0.5])
            9.25
        """
        return sum(share * self.of_exit(index, asked) for index, share in enumerate(shares))


@torch.no_grad()
def count_macs(segments: Sequence[Segment], state: State) -> Costs:
    """Count the MACs of each segment's blocks and head for one image.

    Args:
        segments (`Sequence[Segment]`): A highway.
        state (`State`): One image, before the stem.
    """
    trunks, heads = [], []
    for segment in segments:
        state, macs = _counted(segment.advance, state)
        trunks.append(macs)
        heads.append(_counted(segment.answer, state)[1])
    return Costs(trunks, heads)


def _counted(run: Callable[[State], Any], state: State) -> tuple[Any, float]:
    # the counter sees the plain formula of attention, not the fused kernels of every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run(state)
    return result, counter.get_total_flops() / 2


def model_macs(model: PreTrainedModel) -> Costs:
    """MACs of a highway at its own image size, heads counted."""
    was_training = model.training
    model.eval()
    costs = count_macs(model.segments(), State({"pixel_values": example_image(model)}))
    model.train(was_training)
    return costs
