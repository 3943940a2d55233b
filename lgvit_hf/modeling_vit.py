"""ViTHighway: transformers' ViT with exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import ViTForImageClassification, ViTModel

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_sequence import ViTHighwayConfig
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
from .segments import State  # noqa: F401
from .sequence_highway import SequenceHighway


class ViTHighway(SequenceHighway, ViTForImageClassification):
    """ViT with early exits. Heads read the class token and the patches.

    Example:

        >>> import torch
        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> config = ViTHighwayConfig(
        ...     hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=32
        ... )
        >>> model = ViTHighway(config).eval()
        >>> out = model(torch.randn(5, 3, 32, 32))
        >>> out.logits.shape, out.exit_layer.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    if TYPE_CHECKING:
        config: ViTHighwayConfig

    config_class = ViTHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]
    native_classes = (ViTForImageClassification, ViTModel)


ViTHighwayForImageClassification = ViTHighway
"""The name that transformers gives such a class: the same one."""
