"""BeitHighway: transformers' BEiT with exits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import BeitForImageClassification, BeitModel

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_sequence import BeitHighwayConfig
from .engine import run_early  # noqa: F401
from .ensemble import Ensemble  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .files import add_files  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HeadShape  # noqa: F401
from .losses import task_loss  # noqa: F401
from .modeling_highway import grid_of
from .plain_checkpoint import load_native  # noqa: F401
from .policies import ExitPolicy  # noqa: F401
from .pretrained import PretrainedHighway  # noqa: F401
from .recording import recording  # noqa: F401
from .remote_code import write_code  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import State
from .sequence_highway import SequenceHighway


class BeitHighway(SequenceHighway, BeitForImageClassification):  # type: ignore[misc]  # keys to ignore on loading
    """BEiT with early exits. Its attention adds a bias by position, and layer scale is inside its blocks.

    Example:

        >>> import torch
        >>> from lgvit_hf import BeitHighway, BeitHighwayConfig
        >>> sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8)
        >>> BeitHighway(BeitHighwayConfig(**sizes)).eval()(torch.randn(5, 3, 32, 32)).logits.shape
        torch.Size([5, 2])
    """

    if TYPE_CHECKING:
        config: BeitHighwayConfig

    config_class = BeitHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["BeitEmbeddings", "BeitLayer"]
    native_classes = (BeitForImageClassification, BeitModel)
    takes_any_size = True
    unread = ()
    final_modules = ("layernorm", "pooler")

    def embed(self, pixels: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        embedded = super().embed(pixels, interpolate_pos_encoding)
        # a tuple in transformers 4
        return embedded[0] if isinstance(embedded, tuple) else embedded

    def attention_bias(self, state: State) -> Tensor | None:
        shared = getattr(self.beit, "shared_position_bias", None)
        return None if shared is None else shared(grid_of(state))

    def layer_arguments(self, state: State) -> dict[str, Any]:
        rows, columns = grid_of(state)
        patch: Any = self.config.patch_size
        given: dict[str, Any] = {"resolution": (rows * patch, columns * patch)}
        # there the bias that all layers share has an argument of its own
        encoder: Any = getattr(self.beit, "encoder", None)
        if getattr(encoder, "has_relative_position_bias", False):
            given["relative_position_bias"] = encoder.relative_position_bias((rows, columns))
        return given

    def final(self, state: State) -> Tensor:
        return self.classifier(self.normed(state))

    def recorded_modules(self, name: str) -> list[nn.Module]:
        modules = super().recorded_modules(name)
        # transformers 4 gives the weights only on request; its dropout sees them in any case
        return modules if name == "hidden_states" else [getattr(each, "dropout", each) for each in modules]


BeitHighwayForImageClassification = BeitHighway
"""The name that transformers gives such a class: the same one."""
