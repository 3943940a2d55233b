"""DeiTHighway: transformers' DeiT with exits, with or without its distillation classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel

from .attention import FeatureMap  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401
from .configuration_sequence import DeiTHighwayConfig
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


class DeiTHighway(SequenceHighway, DeiTForImageClassificationWithTeacher):
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

    if TYPE_CHECKING:
        config: DeiTHighwayConfig

    config_class = DeiTHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["DeiTEmbeddings", "DeiTLayer"]
    native_classes = (DeiTForImageClassificationWithTeacher, DeiTForImageClassification, DeiTModel)

    num_prefix_tokens = 2

    def __init__(self, config: DeiTHighwayConfig):
        super().__init__(config)
        if not config.distilled and not config.truncated:
            self.classifier = self.cls_classifier
            del self.cls_classifier, self.distillation_classifier

    @property
    def num_read_tokens(self) -> int:
        return 2 if self.config.distilled else 1

    def final(self, state: State) -> Tensor:
        if not self.config.distilled:
            return super().final(state)
        hidden = self.normed(state)
        return (self.cls_classifier(hidden[:, 0]) + self.distillation_classifier(hidden[:, 1])) / 2


DeiTHighwayForImageClassification = DeiTHighway
"""The name that transformers gives such a class: the same one."""
