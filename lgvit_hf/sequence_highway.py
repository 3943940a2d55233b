"""SequenceHighway: what backbones have in common whose blocks all run on one sequence of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .heads import HeadShape
from .modeling_highway import HighwayMixin, is_replaced, run_block
from .segments import Block, State, Tokens


class SequenceHighway(HighwayMixin):
    """A backbone of transformers with `embeddings`, a list of layers, and hidden states `[B, P + h * w, D]`.

    `P` prefix tokens come first (class token, distillation token), of which the classifiers read `num_read_tokens`.
    A model adds `final` and the names of its modules.
    """

    num_prefix_tokens = 1

    @property
    def num_read_tokens(self) -> int:
        """How many of the prefix tokens the classifiers read."""
        return self.num_prefix_tokens

    @property
    def layers(self) -> Any:
        """The blocks, as transformers has them: `encoder.layer` in its version 4, `layers` in 5."""
        model: Any = self.base_model
        return getattr(model, "layers", None) or model.encoder.layer

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        """`pixel_values` -> `hidden` `[B, P + h * w, D]` and its grid."""
        embeddings: Any = self.base_model.embeddings
        patches = embeddings.patch_embeddings
        pixels, patch = state["pixel_values"].to(patches.projection.weight.dtype), patches.patch_size
        hidden = embeddings(pixels, interpolate_pos_encoding=interpolate_pos_encoding)
        return State({"hidden": hidden}, (pixels.shape[2] // patch[0], pixels.shape[3] // patch[1]))

    def blocks(self) -> list[Block]:
        """One callable per layer."""
        return [partial(run_block, layer) for layer in self.layers]

    def block_lists(self) -> list[nn.ModuleList]:
        """All blocks are in one."""
        return [self.layers]

    def tokens(self, state: State) -> Tokens:
        """Patches, and the prefix tokens that the classifiers read."""
        assert state.grid is not None, "the stem says it"
        hidden = state["hidden"]
        return Tokens(hidden[:, self.num_prefix_tokens :], state.grid, hidden[:, : self.num_read_tokens])

    def head_shape(self, after: int) -> HeadShape:
        """The same after each block."""
        config: Any = self.config
        return HeadShape(
            width=config.hidden_size,
            num_prefix=self.num_read_tokens,
            num_labels=config.num_labels,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.hidden_act,
            dropout=config.hidden_dropout_prob,
            pool=config.pool,
        )

    def recorded_modules(self, name: str) -> list[nn.Module]:
        """Embeddings and layers; of attention weights `attention.attention` in transformers 4, `attention` in 5.

        A linear map in the place of blocks has no attention.
        """
        if name == "hidden_states":
            return [self.base_model.embeddings, *self.layers]
        return [
            getattr(layer.attention, "attention", layer.attention) for layer in self.layers if not is_replaced(layer)
        ]
