"""What is known of a highway before it is timed: multiply-accumulates (MACs; FLOPs are twice as many) of each part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..hub.loading import example_image
from ..modes import evaluating
from ..policies import ExitPolicy
from ..segments import Segment, State


@dataclass(frozen=True)
class Costs:
    """Costs of one image, in any unit (MACs, milliseconds).

    Args:
        backbone_costs (`list[float]`): Of the blocks of each segment, the stem counted with the first.
        heads (`list[float]`): Of the exit of each segment, the final classifier last.
        fused (`bool`, *optional*, defaults to `False`):
            Whether each head runs with its blocks even where its exit is skipped, as in an exported file.
    """

    backbone_costs: list[float]
    heads: list[float]
    fused: bool = False

    @property
    def backbone(self) -> float:
        """The plain model: all blocks and the final classifier."""
        return sum(self.backbone_costs) + self.heads[-1]

    def of_exit(self, exit_index: int, evaluated: Sequence[int] | None = None) -> float:
        """Cost of a sample that exits at an exit: blocks until there and every head evaluated on the way.

        Args:
            exit_index (`int`): From 0, the final classifier last.
            evaluated (`Sequence[int]`, *optional*):
                Exits whose heads are run; all by default, and where they are `fused`.

        Example:

            >>> Costs(backbone_costs=[4.0, 8.0], heads=[1.0, 0.5]).of_exit(1)
            13.5
        """
        passed: Sequence[int] = range(exit_index)
        if evaluated is not None and not self.fused:
            passed = [index for index in evaluated if index < exit_index]
        heads = sum(self.heads[index] for index in passed) + self.heads[exit_index]
        return sum(self.backbone_costs[: exit_index + 1]) + heads

    def mean(self, shares: Sequence[float], evaluated: Sequence[int] | None = None) -> float:
        """Mean cost of a sample when `shares[e]` of the samples exit at exit `e`.

        Example:

            >>> Costs(backbone_costs=[4.0, 8.0], heads=[1.0, 0.5]).mean([0.5, 0.5])
            9.25
        """
        return sum(share * self.of_exit(index, evaluated) for index, share in enumerate(shares))

    def with_exits(self, exits: Sequence[int]) -> Costs:
        """Costs of the same model with only some of its early exits, by index from 0 in ascending order.

        Example:

            >>> Costs([1.0, 2.0, 4.0, 8.0], [0.1, 0.2, 0.3, 0.4]).with_exits([1])
            Costs(backbone_costs=[3.0, 12.0], heads=[0.2, 0.4], fused=False)
        """
        ends = [*exits, len(self.heads) - 1]
        starts = [0, *(index + 1 for index in exits)]
        backbone = [sum(self.backbone_costs[start : end + 1]) for start, end in zip(starts, ends, strict=True)]
        return Costs(backbone, [self.heads[index] for index in ends], self.fused)

    def relative(self) -> Costs:
        """The same costs in units of the plain model's.

        Example:

            >>> Costs([4.0, 3.0], [0.5, 1.0]).relative().of_exit(0)
            0.5625
        """
        full = self.backbone
        return replace(
            self, backbone_costs=[c / full for c in self.backbone_costs], heads=[c / full for c in self.heads]
        )

    @property
    def trunks(self) -> list[float]:  # old name
        """`backbone_costs` by its old name."""
        warnings.warn("Costs.trunks is now Costs.backbone_costs", DeprecationWarning, stacklevel=2)
        return self.backbone_costs


@dataclass(frozen=True)
class Exported:
    """What an exported highway says of itself, since no counter sees into its files.

    Args:
        layout (`str`), precision (`str`): See `export_onnx`.
        macs (`Costs`): Of one image.
        digest (`str`): A SHA-256 of its files.
        file_bytes (`int`): Of all of them.
        runtime (`str`): Name and version of what runs them.
        threads (`int`): Of the processor.
    """

    layout: str
    precision: str
    macs: Costs
    digest: str
    file_bytes: int
    runtime: str
    threads: int


class Highway(Protocol):
    """What evaluation takes: one of our models of PyTorch, or an exported one, which has `exported` besides."""

    config: Any
    training: bool

    @property
    def exit_policy(self) -> ExitPolicy:
        """The policy in force."""

    @property
    def answering_policy(self) -> ExitPolicy:
        """The same, on the running ensemble where the config has one."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its images."""

    def modules(self) -> Iterator[Any]:
        """Itself and what is inside, each with its `training`."""

    def segments(self) -> list[Segment]:
        """The highway as a list of segments, the final classifier's last."""

    def set_exit_policy(self, policy: Any, **parameters: Any) -> None:
        """Choose when samples exit."""

    def eval(self) -> Any:
        """Make it ready to answer."""

    def train(self, mode: bool = True) -> Any:
        """Make it ready to be trained, or give it back as it was."""

    def __call__(self, pixel_values: Tensor, **settings: Any) -> Any:
        """Answer images; see `HighwayOutput`."""


def export_of(model: Highway) -> Exported | None:
    """What an exported highway says of itself; `None` of a model of PyTorch, which can be looked into."""
    return getattr(model, "exported", None)


def decides_inside(model: Highway) -> bool:
    """Whether a model is one exported file, which does not say what an exit answers where a sample does not exit."""
    exported = export_of(model)
    return exported is not None and exported.layout == "single"


@torch.no_grad()
def count_macs(segments: Sequence[Segment], state: State) -> Costs:
    """Count the MACs of each segment's blocks and head for one image.

    Args:
        segments (`Sequence[Segment]`): A highway.
        state (`State`): One image, before the stem.
    """
    backbone_costs, heads = [], []
    for segment in segments:
        state, macs = _counted(segment.advance, state)
        backbone_costs.append(macs)
        heads.append(_counted(segment.answer, state)[1])
    return Costs(backbone_costs, heads)


def _counted(run: Callable[[State], Any], state: State) -> tuple[Any, float]:
    # the counter sees the plain formula of attention, not the fused kernels of every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run(state)
    return result, counter.get_total_flops() / 2


def model_macs(model: Highway, image: Tensor | None = None) -> Costs:
    """MACs of a highway for one image, heads counted; of an exported one, as counted when it was exported.

    Args:
        model (`Highway`): Counted in `eval()` mode.
        image (`Tensor`, *optional*): `[1, C, H, W]`; by default of the size that the model was made for.
    """
    exported = export_of(model)
    if exported is not None:
        return exported.macs
    with evaluating(model):
        image = example_image(model) if image is None else image
        return count_macs(model.segments(), State({"pixel_values": image}))
