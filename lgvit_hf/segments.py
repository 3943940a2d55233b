"""A highway is a list of segments: each carries the state as far as the next exit and gives that exit's answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True)
class State:
    """What flows from block to block: batch-first tensors and the grid of patches they stand for.

    Args:
        tensors (`dict[str, Tensor]`):
            Every tensor has the batch as first dimension, so that samples can be dropped. Before the stem there is
            one, `pixel_values` `[B, C, H, W]`; after it a backbone keeps `hidden` `[B, N, D]`.
        grid (`tuple[int, int]`, *optional*):
            Rows and columns of patches; their product is the number of patch tokens.

    Example:

        >>> import torch
        >>> state = State({"hidden": torch.arange(3.0)[:, None]})
        >>> state.select(torch.tensor([2, 0]))["hidden"].tolist()
        [[2.0], [0.0]]
    """

    tensors: dict[str, Tensor]
    grid: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def batch_size(self) -> int:
        """Number of samples `B`."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """Where it is; of a model on several devices, where its first tensor is."""
        return next(iter(self.tensors.values())).device

    def select(self, samples: Tensor) -> State:
        """The state of some `samples` (`[K]`, int64) only; each tensor stays on its own device."""
        tensors = {name: tensor.index_select(0, samples.to(tensor.device)) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class Tokens:
    """What an exit reads: patch tokens, their grid, and the prefix tokens its classifiers look at.

    Args:
        patches (`Tensor`): `[B, h * w, D]`, row by row.
        grid (`tuple[int, int]`): `(h, w)`.
        prefix (`Tensor`): `[B, P, D]`; `P` is 1 for ViT, 2 for DeiT with a distillation head, 0 for Swin.
    """

    patches: Tensor
    grid: tuple[int, int]
    prefix: Tensor

    def to(self, target: torch.device | torch.dtype | str | int, non_blocking: bool = False) -> Tokens:
        """The same on another device, as accelerate's hooks ask for, or in another dtype."""
        patches, prefix = (each.to(target, non_blocking=non_blocking) for each in (self.patches, self.prefix))
        return Tokens(patches, self.grid, prefix)


def _from_leaves(tensors: Any, grid: Any) -> Tokens:
    patches, prefix = tensors
    return Tokens(patches, grid, prefix)


# FSDP looks for the tensors that a head is given, to cast them and to see their gradients
register_pytree_node(
    Tokens,
    lambda tokens: ([tokens.patches, tokens.prefix], tokens.grid),
    _from_leaves,
)


Block = Callable[[State], State]


@dataclass(frozen=True, init=False)
class Segment:
    """A stretch of the backbone and the exit at its end.

    Args:
        depth (`int`): Blocks already run when the exit is reached, counted from 1.
        blocks (`tuple`): Callables `State -> State`; the stem counts as the first one of the first segment.
        answer (`Callable`): `State -> logits [B, C]`, the exit or, in the last segment, the final classifier.
        forward_with_features (`Callable`, *optional*):
            `State -> (logits, features)`, as `answer` and what distillation compares; may cost more.
    """

    depth: int
    blocks: tuple[Block, ...]
    answer: Callable[[State], Tensor]
    forward_with_features: Callable[[State], tuple[Tensor, Tensor]] | None = None

    def __init__(
        self,
        depth: int,
        blocks: tuple[Block, ...],
        answer: Callable[[State], Tensor],
        forward_with_features: Callable[[State], tuple[Tensor, Tensor]] | None = None,
        *,
        study: Callable[[State], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if study is not None:
            _warn_of_study()
        values = (depth, blocks, answer, forward_with_features or study)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @property
    def study(self) -> Callable[[State], tuple[Tensor, Tensor]] | None:
        """The old name of `forward_with_features`."""
        _warn_of_study()
        return self.forward_with_features

    def advance(self, state: State) -> State:
        """Carry the state to this segment's exit."""
        for block in self.blocks:
            state = block(state)
        return state


def _warn_of_study() -> None:
    warnings.warn("Segment.study is now Segment.forward_with_features", DeprecationWarning, stacklevel=3)


def height_width(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width of what a config calls a size, where one number stands for both.

    Example:

        >>> height_width(32), height_width([32, 64])
        ((32, 32), (32, 64))
    """
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
