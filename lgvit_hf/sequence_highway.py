"""SequenceHighway: what backbones have in common whose blocks all run on one sequence of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import FeatureMap
from .heads import HeadShape
from .modeling_highway import HighwayMixin, grid_of, is_replaced
from .segments import Block, State, Tokens


class SequenceHighway(HighwayMixin):
    """A backbone of transformers with `embeddings`, a list of layers, and hidden states `[B, P + h * w, D]`.

    `P` prefix tokens come first (class token, distillation token, registers); the exits read the first
    `num_read_tokens` of them and the patches. All is as in ViT where a model does not say otherwise.
    """

    num_prefix_tokens = 1
    # where attention is in a layer
    attention_name = "attention"

    def __init__(self, config: Any):
        super().__init__(config)
        # only pretraining masks patches: without a gradient, and thus frozen
        mask_token = getattr(self.base_model.embeddings, "mask_token", None)
        if mask_token is not None:
            mask_token.requires_grad_(False)

    @property
    def num_read_tokens(self) -> int:
        """How many of the prefix tokens the exits read: the class token, if there is one."""
        return min(1, self.num_prefix_tokens)

    @property
    def layers(self) -> Any:
        """The blocks, wherever a version of transformers has them."""
        model: Any = self.base_model
        if hasattr(model, "layers"):
            return model.layers
        return getattr(model.encoder, "layer", None) or model.encoder.layers

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        """`pixel_values` -> `hidden` `[B, P + h * w, D]` and its grid."""
        embeddings: Any = self.base_model.embeddings
        convolution = next(each for each in embeddings.modules() if isinstance(each, nn.Conv2d))
        pixels = state["pixel_values"].to(convolution.weight.dtype)
        height, width = pixels.shape[2:]
        grid = self.config.patch_grid(1, height, width)
        if min(grid) < 1:
            raise ValueError(
                f"pixel_values: {height} x {width} pixels are less than a patch of {self.config.patch_size} pixels"
            )
        return State({"hidden": self.embed(pixels, interpolate_pos_encoding)}, grid)

    def embed(self, pixels: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """`[B, C, H, W]` -> `[B, P + h * w, D]`; embeddings that fit themselves to any size are not told."""
        embeddings: Any = self.base_model.embeddings
        if self.takes_any_size:
            return embeddings(pixels)
        return embeddings(pixels, interpolate_pos_encoding=interpolate_pos_encoding)

    def blocks(self) -> list[Block]:
        """One callable per layer."""
        return [partial(self.run_layer, layer) for layer in self.layers]

    def run_layer(
        self, layer: nn.Module, state: State, feature_map: FeatureMap | None = None, **arguments: Any
    ) -> State:
        """One transformer block with its `arguments`, or the linear map that stands in its place."""
        hidden = state["hidden"]
        if is_replaced(layer):
            return State({"hidden": layer(hidden)}, state.grid)
        # what comes where a mask would goes to the attention function as it is
        mask = self.attention_bias(state) if feature_map is None else feature_map.random_features
        output = layer(hidden, mask, **self.layer_arguments(state), **arguments)
        # some give a tuple in transformers 4
        return State({"hidden": output[0] if isinstance(output, tuple) else output}, state.grid)

    def attention_bias(self, state: State) -> Tensor | None:
        """What all layers add to their attention; nothing."""
        return None

    def layer_arguments(self, state: State) -> dict[str, Any]:
        """What a layer takes besides hidden states and a mask; nothing."""
        return {}

    def block_lists(self) -> list[nn.ModuleList]:
        """All blocks are in one."""
        return [self.layers]

    def tokens(self, state: State) -> Tokens:
        """Patches, and the prefix tokens that the exits read."""
        hidden = state["hidden"]
        return Tokens(hidden[:, self.num_prefix_tokens :], grid_of(state), hidden[:, : self.num_read_tokens])

    def final(self, state: State) -> Tensor:
        """The classifier on the class token, with `pool="mean"` on the mean of all tokens, after the final norm."""
        hidden, classifier = self.normed(state), cast(nn.Linear, self.classifier)
        return classifier(hidden[:, 0] if self.config.pool == "cls" else hidden.mean(1))

    def normed(self, state: State) -> Tensor:
        """The last hidden state, through what the backbone has after its blocks."""
        hidden = state["hidden"]
        for name in self.final_modules:
            hidden = getattr(self.base_model, name)(hidden)
        return hidden

    def class_and_patches(self, state: State) -> Tensor:
        """DINOv2's classifier (https://arxiv.org/abs/2304.07193): class token and mean patch side by side."""
        hidden, classifier = self.normed(state), cast(nn.Linear, self.classifier)
        return classifier(torch.cat([hidden[:, 0], hidden[:, self.num_prefix_tokens :].mean(dim=1)], dim=1))

    def head_shape(self, after: int) -> HeadShape:
        """The same after each block."""
        config: Any = self.config
        return HeadShape(
            width=config.hidden_size,
            num_prefix=self.num_read_tokens,
            num_labels=config.num_labels,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio),
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.hidden_act,
            dropout=getattr(config, "hidden_dropout_prob", 0.0),
            pool=config.pool,
        )

    def recorded_modules(self, name: str) -> list[nn.Module]:
        """Embeddings and layers; of attention weights `attention.attention` in transformers 4, `attention` in 5.

        A linear map in the place of blocks has no attention.
        """
        if name == "hidden_states":
            return [self.base_model.embeddings, *self.layers]
        attentions = [getattr(layer, self.attention_name) for layer in self.layers if not is_replaced(layer)]
        return [getattr(attention, "attention", attention) for attention in attentions]


class VisionTowerHighway(SequenceHighway):
    """The image side of a model of images and texts, as upstream's image classifiers have it."""

    base_model_prefix = "vision_model"
    attention_name = "self_attn"

    def get_input_embeddings(self) -> nn.Module:
        """The layer that makes tokens of patches."""
        tower: Any = self.vision_model
        return cast(nn.Module, tower.embeddings.patch_embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        tower: Any = self.vision_model
        tower.embeddings.patch_embedding = value

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # upstream begins the modules that it knows, each in its way, and the exits have others
        exits = getattr(self, "exits", None)
        if exits is None or not isinstance(module, (nn.Linear, nn.Conv2d)) or module not in set(exits.modules()):
            return
        if not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
        if module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False):
            nn.init.zeros_(module.bias)
