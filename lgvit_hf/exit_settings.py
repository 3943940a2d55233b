"""Where exits may stand: the settings of a config that say it, and their checks."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .exit_head import is_head, known_heads


@dataclass(frozen=True)
class Exit:
    """One early exit: the blocks that have run before it (counted from 1) and the head it computes."""

    after: int
    head: str


def lgvit_positions(num_blocks: int) -> list[int]:
    """Where LGViT puts exits: up to eight, from a third of the depth to the last but one block, evenly.

    For 12 blocks that is the published 4..11.

    Example:

        >>> lgvit_positions(12), lgvit_positions(6)
        ([4, 5, 6, 7, 8, 9, 10, 11], [2, 3, 4, 5])
    """
    first, last = -(-num_blocks // 3), num_blocks - 1
    count = min(8, last - first + 1)
    if count < 2:
        return [last] if last >= 1 else []
    return [first + round(i * (last - first) / (count - 1)) for i in range(count)]


def checked_positions(
    positions: Any, num_blocks: int, truncated: bool, linear_blocks: list[int] | None = None
) -> list[int]:
    """Depths of the exits as plain integers; `ValueError` for none that the backbone has."""
    rule = f"a strictly increasing list of integers from 1 to {num_blocks - 1} (the backbone has {num_blocks} blocks)"
    wrong = f"exit_positions: {positions!r} must be {rule}, or 'lgvit'"
    if isinstance(positions, (str, bytes)) or not isinstance(positions, Sequence):
        raise ValueError(wrong)
    try:
        checked = [operator.index(position) for position in positions]
    except TypeError:
        raise ValueError(wrong) from None
    if any(isinstance(position, bool) for position in positions):
        raise ValueError(wrong)
    if truncated:
        if checked != [num_blocks]:
            raise ValueError(f"exit_positions: {positions!r} must be [{num_blocks}] in a truncated model")
        return checked
    outside = [position for position in checked if not 1 <= position < num_blocks]
    if outside:
        raise ValueError(f"{wrong}: {outside[0]} is outside")
    if any(a >= b for a, b in zip(checked, checked[1:], strict=False)):
        raise ValueError(f"{wrong}: it is not strictly increasing")
    inside = [position for position in checked if linear_blocks and position in range(*linear_blocks)]
    if linear_blocks and inside:
        raise ValueError(
            f"exit_positions: {inside} lie between blocks {linear_blocks[0]} and {linear_blocks[1]}, which are one "
            "linear map (linear_blocks); exits can be before them and after them"
        )
    return checked


def checked_linear_blocks(blocks: Any, num_blocks: int) -> list[int] | None:
    """First and last of the blocks that are one linear map, as plain integers; `ValueError` for none there."""
    if blocks is None:
        return None
    good = isinstance(blocks, Sequence) and len(blocks) == 2
    if not good or any(not isinstance(block, int) or isinstance(block, bool) for block in blocks):
        raise ValueError(f"linear_blocks: {blocks!r} must be the first and the last block, such as [4, 6]")
    first, last = blocks
    if not 1 <= first <= last <= num_blocks:
        raise ValueError(
            f"linear_blocks: {[first, last]} must be a first and a last block, in that order, from 1 to {num_blocks} "
            f"(the backbone has {num_blocks} blocks)"
        )
    if last - first + 1 == num_blocks:
        raise ValueError(f"linear_blocks: {[first, last]} are all blocks of the backbone; at least one must stay")
    return [first, last]


def checked_types(types: Any, positions: list[int], others: Sequence[str] = ()) -> list[str]:
    """One known head per exit, or `ValueError`; `others` may stand beside those of the registry."""
    if isinstance(types, (str, bytes)) or not isinstance(types, Sequence) or len(types) != len(positions):
        raise ValueError(
            f"exit_types: {types!r} must be one head name for all or a list of {len(positions)}, one per exit; "
            f"known heads: {known_heads()}"
        )
    for position, head in zip(positions, types, strict=True):
        if not is_head(head) and head not in others:
            raise ValueError(
                f"exit_types: unknown head {head!r} at the exit after block {position}; known heads: {known_heads()}"
            )
    return list(types)


def check_loss_weights(weights: Any, num_exits: int) -> None:
    """Raise `ValueError` for no way to weigh the losses of `num_exits` exits and the final classifier."""
    if weights in ("depth", "uniform"):
        return
    good = isinstance(weights, Sequence) and not isinstance(weights, str) and len(weights) == num_exits + 1
    good = good and all(isinstance(w, (int, float)) and not isinstance(w, bool) and 0 <= w < math.inf for w in weights)
    if not good or sum(weights) <= 0:
        raise ValueError(
            f"exit_loss_weights: {weights!r} must be 'depth', 'uniform' or {num_exits + 1} numbers >= 0, not all zero "
            f"({num_exits} exits and the final classifier)"
        )
