"""SiglipHighway: the image side of transformers' SigLIP with exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import SiglipForImageClassification, SiglipVisionModel

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_sequence import SiglipHighwayConfig
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
from .sequence_highway import VisionTowerHighway


class SiglipHighway(VisionTowerHighway, SiglipForImageClassification):
    """SigLIP with early exits: of a whole checkpoint, the image side. There is no class token.

    Example:

        >>> import torch
        >>> from lgvit_hf import SiglipHighway, SiglipHighwayConfig
        >>> sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32)
        >>> SiglipHighway(SiglipHighwayConfig(**sizes)).eval()(torch.randn(5, 3, 32, 32)).logits.shape
        torch.Size([5, 2])
    """

    if TYPE_CHECKING:
        config: SiglipHighwayConfig  # type: ignore[assignment]  # flat

    config_class = SiglipHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["SiglipVisionEmbeddings", "SiglipEncoderLayer"]
    native_classes = (SiglipForImageClassification, SiglipVisionModel)
    _keys_to_ignore_on_load_unexpected = [r"random_features", r"vision_model\.head\."]  # type: ignore[assignment]
    unread = ("text_model.", "vision_model.head.", "logit_scale", "logit_bias")
    num_prefix_tokens = 0
    final_modules = ("post_layernorm",)

    def __init__(self, config: SiglipHighwayConfig):
        # what answers texts and no classifier
        config.vision_use_head = False
        super().__init__(config)


SiglipHighwayForImageClassification = SiglipHighway
"""The name that transformers gives such a class: the same one."""
