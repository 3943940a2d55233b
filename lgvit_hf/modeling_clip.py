"""CLIPHighway: the image side of transformers' CLIP with exits."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import CLIPForImageClassification, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_sequence import CLIPHighwayConfig
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
from .sequence_highway import VisionTowerHighway

# where a layer serves the text side too, and gives attention weights only on request
IS_TRANSFORMERS_4 = "causal_attention_mask" in signature(CLIPEncoderLayer.forward).parameters


class CLIPHighway(VisionTowerHighway, CLIPForImageClassification):
    """CLIP with early exits: of a whole checkpoint, the image side. The final classifier reads the mean patch.

    Example:

        >>> import torch
        >>> from lgvit_hf import CLIPHighway, CLIPHighwayConfig
        >>> sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32)
        >>> CLIPHighway(CLIPHighwayConfig(**sizes)).eval()(torch.randn(5, 3, 32, 32)).logits.shape
        torch.Size([5, 2])
    """

    if TYPE_CHECKING:
        config: CLIPHighwayConfig  # type: ignore[assignment]  # flat

    config_class = CLIPHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer"]
    native_classes = (CLIPForImageClassification, CLIPVisionModel)
    _keys_to_ignore_on_load_unexpected = [r"random_features", r"vision_model\.post_layernorm\."]  # type: ignore[assignment]
    unread = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "vision_model.post_layernorm.")
    final_modules = ()

    def __init__(self, config: CLIPHighwayConfig):
        super().__init__(config)
        # of the class token, which no classifier of upstream's reads
        self.vision_model.post_layernorm = nn.Identity()

    def embed(self, pixels: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        return self.vision_model.pre_layrnorm(super().embed(pixels, interpolate_pos_encoding))

    def layer_arguments(self, state: State) -> dict[str, Any]:
        if not IS_TRANSFORMERS_4:
            return {}
        return {"causal_attention_mask": None, "output_attentions": self.config._attn_implementation == "eager"}

    def final(self, state: State) -> Tensor:
        return self.classifier(self.normed(state)[:, 1:].mean(dim=1))

    def recorded_modules(self, name: str) -> list[nn.Module]:
        modules = super().recorded_modules(name)
        return [self.vision_model.pre_layrnorm, *modules[1:]] if name == "hidden_states" else modules


CLIPHighwayForImageClassification = CLIPHighway
"""The name that transformers gives such a class: the same one."""
