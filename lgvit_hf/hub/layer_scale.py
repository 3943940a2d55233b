"""Layer scale, a factor per channel at the end of each branch of a block, folded into the linear layer before it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def fold_layer_scale(state: dict[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    r"""The same weights without layer scale: rows of the layer before it are multiplied by its factors.

    Args:
        state (`dict[str, Tensor]`): By name; copied where it changes.
        places (`Mapping[str, str]`): Factors (regular expression of the whole name) -> the layer they follow.

    Raises:
        ValueError: That layer is not there, or has another number of rows.

    Example:

        >>> import torch
        >>> state = {"0.fc.weight": torch.ones(2, 1), "0.fc.bias": torch.ones(2), "0.gamma": torch.tensor([2.0, 3.0])}
        >>> folded = fold_layer_scale(state, {r"(\d+)\.gamma": r"\1.fc"})
        >>> sorted(folded), folded["0.fc.weight"].tolist(), folded["0.fc.bias"].tolist()
        (['0.fc.bias', '0.fc.weight'], [[2.0], [3.0]], [2.0, 3.0])
    """
    folded = dict(state)
    for name, factors in state.items():
        for pattern, layer in places.items():
            if match := re.fullmatch(pattern, name):
                module = match.expand(layer)
                weight = folded.get(f"{module}.weight")
                if weight is None or weight.dim() != 2 or factors.shape != weight.shape[:1]:
                    raise ValueError(f"{name}: {module}.weight, which it scales, is not there with as many rows")
                del folded[name]
                # in float32, since factors may be small
                scaled = weight.float() * factors.float()[:, None]
                folded[f"{module}.weight"] = scaled.to(weight.dtype)
                if (bias := folded.get(f"{module}.bias")) is not None:
                    folded[f"{module}.bias"] = (bias.float() * factors.float()).to(bias.dtype)
    return folded
