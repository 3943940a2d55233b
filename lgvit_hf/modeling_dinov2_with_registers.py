"""Dinov2WithRegistersHighway: transformers' DINOv2 with registers with exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Dinov2WithRegistersForImageClassification, Dinov2WithRegistersModel

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_sequence import Dinov2WithRegistersHighwayConfig
from .engine import run_early  # noqa: F401
from .ensemble import Ensemble  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .files import add_files  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HeadShape  # noqa: F401
from .losses import task_loss  # noqa: F401
from .modeling_highway import HighwayMixin  # noqa: F401
from .plain_checkpoint import load_native  # noqa: F401
from .policies import ExitPolicy  # noqa: F401
from .pretrained import PretrainedHighway  # noqa: F401
from .recording import recording  # noqa: F401
from .remote_code import write_code  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import State
from .sequence_highway import SequenceHighway


class Dinov2WithRegistersHighway(SequenceHighway, Dinov2WithRegistersForImageClassification):
    """DINOv2 with registers, and early exits, which do not read the registers.

    Example:

        >>> import torch
        >>> from lgvit_hf import Dinov2WithRegistersHighway, Dinov2WithRegistersHighwayConfig
        >>> sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8)
        >>> model = Dinov2WithRegistersHighway(Dinov2WithRegistersHighwayConfig(**sizes)).eval()
        >>> model(torch.randn(5, 3, 32, 32)).logits.shape
        torch.Size([5, 2])
    """

    if TYPE_CHECKING:
        config: Dinov2WithRegistersHighwayConfig

    config_class = Dinov2WithRegistersHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["Dinov2WithRegistersEmbeddings", "Dinov2WithRegistersLayer"]
    native_classes = (Dinov2WithRegistersForImageClassification, Dinov2WithRegistersModel)
    takes_any_size = True

    @property
    def num_prefix_tokens(self) -> int:  # type: ignore[override]  # reading it is all there is
        """The class token and the registers."""
        return 1 + self.config.num_register_tokens

    def final(self, state: State) -> Tensor:
        return self.class_and_patches(state)


Dinov2WithRegistersHighwayForImageClassification = Dinov2WithRegistersHighway
"""The name that transformers gives such a class: the same one."""
