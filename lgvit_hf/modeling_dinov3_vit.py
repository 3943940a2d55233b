"""Dinov3ViTHighway: transformers' DINOv3 with a classifier and exits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DINOv3ViTModel, DINOv3ViTPreTrainedModel

from .attention import FeatureMap
from .checkpoint_files import check_files  # noqa: F401
from .configuration import HighwayConfig  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .configuration_sequence import Dinov3ViTHighwayConfig
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
from .segments import Block, State
from .sequence_highway import SequenceHighway

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    # transformers 4 has the weight names of the checkpoints
    pass
else:
    # transformers 5 renames weights by model type; unknown types would be left with random ones
    register_checkpoint_conversion_mapping(
        "dinov3_vit_highway", get_checkpoint_conversion_mapping("dinov3_vit"), overwrite=True
    )


# cosines and sines, by which attention turns queries and keys
Angles = tuple[Tensor, Tensor]


class Dinov3ViTClassifier(DINOv3ViTPreTrainedModel):
    """What transformers does not have: DINOv3 and a linear classifier on the class token and the mean patch."""

    base_model_prefix = "dinov3_vit"

    def __init__(self, config: Dinov3ViTHighwayConfig):
        super().__init__(config)
        self.dinov3_vit = DINOv3ViTModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()


class Dinov3ViTHighway(SequenceHighway, Dinov3ViTClassifier):
    """DINOv3 with early exits, which do not read the registers, and a final classifier as DINOv2 has it.

    Example:

        >>> import torch
        >>> from lgvit_hf import Dinov3ViTHighway, Dinov3ViTHighwayConfig
        >>> sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8)
        >>> Dinov3ViTHighway(Dinov3ViTHighwayConfig(**sizes)).eval()(torch.randn(5, 3, 32, 32)).logits.shape
        torch.Size([5, 2])
    """

    if TYPE_CHECKING:
        config: Dinov3ViTHighwayConfig

    config_class = Dinov3ViTHighwayConfig  # type: ignore[assignment]  # `None` upstream
    _no_split_modules = ["DINOv3ViTEmbeddings", "DINOv3ViTLayer"]
    native_classes = (DINOv3ViTModel,)
    takes_any_size = True
    final_modules = ("norm",)

    @property
    def num_prefix_tokens(self) -> int:  # type: ignore[override]  # reading it is all there is
        """The class token and the registers."""
        return 1 + self.config.num_register_tokens

    @property
    def layers(self) -> Any:
        model: Any = self.dinov3_vit
        return getattr(model, "model", model).layer

    def blocks(self) -> list[Block]:
        drawn: list[Angles] = []
        return [partial(self._run_at_angles, drawn, number, layer) for number, layer in enumerate(self.layers)]

    def _run_at_angles(
        self, drawn: list[Angles], number: int, layer: nn.Module, state: State, feature_map: FeatureMap | None = None
    ) -> State:
        # training jitters the positions, all blocks of a forward alike: the first block draws
        if not self.dinov3_vit.rope_embeddings.training:
            angles = self._angles(state)
        else:
            if number == 0 or not drawn:
                drawn[:] = [self._angles(state)]
            angles = drawn[0]
        return self.run_layer(layer, state, feature_map, position_embeddings=angles)

    def _angles(self, state: State) -> Angles:
        rows, columns = grid_of(state)
        patch, dtype = self.config.patch_size, self.dinov3_vit.embeddings.cls_token.dtype
        # upstream reads the size of the images, and nothing that is in them
        images = state["hidden"].new_empty((), dtype=dtype).expand(1, 1, rows * patch, columns * patch)
        return self.dinov3_vit.rope_embeddings(images)

    def final(self, state: State) -> Tensor:
        return self.class_and_patches(state)


Dinov3ViTHighwayForImageClassification = Dinov3ViTHighway
"""The name that transformers would give such a class: the same one."""
