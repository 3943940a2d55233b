"""DeiTHighway: stem, blocks, tokens and final for transformers' DeiT, with or without its distillation classifier."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .configuration import DeiTHighwayConfig
from .engine import run_early  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .files import add_files  # noqa: F401
from .heads import HeadShape
from .losses import task_loss  # noqa: F401
from .modeling_highway import HighwayMixin, run_block
from .policies import ExitPolicy  # noqa: F401
from .pretrained import PretrainedHighway  # noqa: F401
from .recording import recording  # noqa: F401
from .remote_code import write_code  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import Block, State, Tokens


class DeiTHighway(HighwayMixin, DeiTForImageClassificationWithTeacher):
    """DeiT with early exits.

    With `config.distilled`, as in `DeiTForImageClassificationWithTeacher`, the final classifier and the exits average
    a classifier on the class token and one on the distillation token; otherwise, as in `DeiTForImageClassification`,
    they read the class token alone.

    Example:

        >>> import torch
        >>> from lgvit_hf import DeiTHighway, DeiTHighwayConfig
        >>> config = DeiTHighwayConfig(
        ...     hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=32
        ... )
        >>> DeiTHighway(config).eval()(torch.randn(5, 3, 32, 32), early_exit=False).exit_logits[0].shape
        torch.Size([5, 2])
    """

    config_class = DeiTHighwayConfig
    _no_split_modules = ["DeiTEmbeddings", "DeiTLayer"]
    native_classes = (DeiTForImageClassificationWithTeacher, DeiTForImageClassification, DeiTModel)

    def __init__(self, config):
        super().__init__(config)
        if not config.distilled and not config.truncated:
            self.classifier = self.cls_classifier
            del self.cls_classifier, self.distillation_classifier

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        patches = self.deit.embeddings.patch_embeddings
        pixels, patch = state["pixel_values"].to(patches.projection.weight.dtype), patches.patch_size
        hidden = self.deit.embeddings(pixels, interpolate_pos_encoding=interpolate_pos_encoding)
        return State({"hidden": hidden}, (pixels.shape[2] // patch[0], pixels.shape[3] // patch[1]))

    @property
    def _layers(self) -> nn.ModuleList:
        # `encoder.layer` in transformers 4, `layers` in 5
        return getattr(self.deit, "layers", None) or self.deit.encoder.layer

    def blocks(self) -> list[Block]:
        return [partial(run_block, layer) for layer in self._layers]

    def tokens(self, state: State) -> Tokens:
        return Tokens(state["hidden"][:, 2:], state.grid, state["hidden"][:, : 2 if self.config.distilled else 1])

    def final(self, state: State) -> Tensor:
        hidden = self.deit.layernorm(state["hidden"])
        if self.config.distilled:
            return (self.cls_classifier(hidden[:, 0]) + self.distillation_classifier(hidden[:, 1])) / 2
        return self.classifier(hidden[:, 0] if self.config.pool == "cls" else hidden.mean(1))

    def head_shape(self, after: int) -> HeadShape:
        config = self.config
        return HeadShape(
            width=config.hidden_size,
            num_prefix=2 if config.distilled else 1,
            num_labels=config.num_labels,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.hidden_act,
            dropout=config.hidden_dropout_prob,
            pool=config.pool,
        )

    def recorded_modules(self, name: str) -> list[nn.Module]:
        if name == "hidden_states":
            return [self.deit.embeddings, *self._layers]
        # the weights are given by `attention.attention` in transformers 4, by `attention` in 5
        return [getattr(layer.attention, "attention", layer.attention) for layer in self._layers]


DeiTHighwayForImageClassification = DeiTHighway
"""The name that transformers gives such a class: the same one."""
