"""Layers of ViT and DeiT whose tokens halt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from .exit_head import is_watched
from .token_halting import attend_in_a_row

if TYPE_CHECKING:
    # either of the two, whose parts have the same names and differ between versions of transformers
    _Layer: Any = nn.Module
else:
    _Layer = object


class _HaltingBlock(_Layer):
    """One of transformers' blocks, which is told which of its tokens are live.

    Where that is a mask, tokens that have halted are zero, and no key of the others. They give what zeros do, which
    counts in the distribution of halting scores. Where it is lengths, the live tokens of all images stand in a row.
    """

    def forward(self, hidden_states: Tensor, live: Tensor | tuple[int, ...]) -> Tensor:
        if isinstance(live, Tensor):
            return self._masked(hidden_states, live)
        return self._in_a_row(hidden_states, live)

    def _masked(self, hidden: Tensor, live: Tensor) -> Tensor:
        mask = live[..., None]
        # where no token is live, the class token stands for them: of no key at all the mean is not a number
        first = torch.arange(live.shape[1], device=live.device) == 0
        keys = (live | (first & ~live.any(1, keepdim=True)))[:, None, None]
        hidden = hidden * mask
        attended = self.attention(self.layernorm_before(hidden) * mask, keys)
        if isinstance(attended, tuple):  # transformers 5
            hidden = hidden + self.dropout(attended[0])
            return hidden + self.dropout(self.mlp(self.layernorm_after(hidden) * mask))
        hidden = hidden + attended
        return self.output(self.intermediate(self.layernorm_after(hidden) * mask), hidden)

    def _in_a_row(self, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The same of `[1, n, D]`, nothing dropped, in as few steps as it takes: of few tokens they are what costs."""
        norm, query, key, value, output, second_norm, widen, activation, narrow = _layers_in_order(self)
        tokens = _run(norm, hidden)
        heads = (1, tokens.shape[1], -1, self.head_dim)
        query, key, value = (_run(layer, tokens).view(heads).transpose(1, 2) for layer in (query, key, value))
        mixed = attend_in_a_row(query, key, value, lengths).transpose(1, 2).flatten(2)
        hidden = _run(output, mixed).add_(hidden)
        return _run(narrow, activation(_run(widen, _run(second_norm, hidden)))).add_(hidden)


def _layers_in_order(block: Any) -> tuple[Any, ...]:
    """Norm, query, key, value and output of attention, norm, first layer, activation and last layer of the MLP.

    Read where `nn.Module` keeps them: its attributes take ten times as long.
    """
    parts: dict[str, Any] = block._modules
    norms, attention = (parts["layernorm_before"], parts["layernorm_after"]), parts["attention"]._modules
    if "mlp" in parts:  # transformers 5
        projections = (attention["q_proj"], attention["k_proj"], attention["v_proj"], attention["o_proj"])
        mlp = parts["mlp"]._modules
        return norms[0], *projections, norms[1], mlp["fc1"], mlp["activation_fn"], mlp["fc2"]
    inner, first = attention["attention"]._modules, parts["intermediate"]._modules
    projections = (inner["query"], inner["key"], inner["value"], attention["output"]._modules["dense"])
    mlp = (first["dense"], first["intermediate_act_fn"], parts["output"]._modules["dense"])
    return norms[0], *projections, norms[1], *mlp


def _run(layer: Any, tokens: Tensor) -> Tensor:
    """`layer(tokens)`, without the way through `nn.Module` where it is a plain one that nobody watches."""
    if type(layer) is nn.Linear and not is_watched(layer):
        values: dict[str, Any] = layer._parameters
        return F.linear(tokens, values["weight"], values["bias"])
    if type(layer) is nn.LayerNorm and not is_watched(layer):
        values = layer._parameters
        return torch.layer_norm(tokens, layer.normalized_shape, values["weight"], values["bias"], layer.eps)
    return layer(tokens)


class HaltingViTLayer(_HaltingBlock, ViTLayer):  # type: ignore[misc]  # called with what is live
    """A block of ViT."""


class HaltingDeiTLayer(_HaltingBlock, DeiTLayer):  # type: ignore[misc]  # likewise
    """A block of DeiT."""
