"""Configs of backbones with one sequence of tokens, with exits: upstream's fields and those of `HighwayConfig`."""

from __future__ import annotations

from typing import Any

from transformers import (
    BeitConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    PretrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTMSNConfig,
)

from .configuration import HighwayConfig
from .ensemble import Ensemble  # noqa: F401  (see CONTRIBUTING.md, rule 5)
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HEADS  # noqa: F401
from .policies import ExitPolicy  # noqa: F401
from .safe_config import SafeConfig, without_attention_code  # noqa: F401
from .segments import State  # noqa: F401


class ViTHighwayConfig(HighwayConfig, ViTConfig):
    """A `ViTConfig` with exits; see `HighwayConfig` for the exit settings.

    Example:

        >>> config = ViTHighwayConfig(num_hidden_layers=6, exit_positions=[2, 4])
        >>> config.exits
        (Exit(after=2, head='conv1_1'), Exit(after=4, head='attention_r2'))
    """

    model_type = "vit_highway"


class DeiTHighwayConfig(HighwayConfig, DeiTConfig):
    """A `DeiTConfig` with exits; see `HighwayConfig` for the exit settings.

    Args:
        distilled (`bool`, *optional*, defaults to `True` unless `architectures` names `DeiTForImageClassification`):
            Whether there is a classifier for the distillation token, as in `DeiTForImageClassificationWithTeacher`.
            The exits then have two as well; otherwise the final classifier and the exits read the class token alone.

    Example:

        >>> DeiTHighwayConfig(exit_positions=[4, 8], exit_types="linear").exit_types
        ['linear', 'linear']
    """

    model_type = "deit_highway"

    def __init__(self, *settings, distilled=None, **kwargs):
        if distilled is None:
            distilled = "DeiTForImageClassification" not in (kwargs.get("architectures") or [])
        # before the rest, which asks for the pools
        self.distilled = distilled
        super().__init__(*settings, **kwargs)

    @property
    def pools(self) -> tuple[str, ...]:  # type: ignore[override]  # reading it is all there is
        """With two classifiers each must read its own token."""
        return ("cls",) if self.distilled else ("cls", "mean")


class SquareImages(HighwayConfig):
    """Of backbones that upstream builds for square images alone, and that take others for all that."""

    image_size: int
    patch_size: int
    others_are_taken = "as they are"

    def check_sizes(self) -> None:
        """As of the base; sizes are single numbers, or twice the same."""
        for field in ("image_size", "patch_size"):
            size = getattr(self, field)
            if isinstance(size, (list, tuple)) and len(set(size)) == 1:
                setattr(self, field, size[0])
            elif not isinstance(size, int):
                raise ValueError(
                    f"{field}: {size!r} must be one number: {self.model_type} is built for squares; images of other "
                    f"sizes are taken {self.others_are_taken}"
                )
        super().check_sizes()


class Registers(HighwayConfig):
    """Of backbones with tokens that neither the exits nor the classifier read."""

    num_register_tokens: int

    def check_sizes(self) -> None:
        """As of the base; and there is a number of registers."""
        if not isinstance(self.num_register_tokens, int) or self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens: {self.num_register_tokens!r} must be a number from 0")
        super().check_sizes()


class Dinov2HighwayConfig(SquareImages, Dinov2Config):
    """A `Dinov2Config` with exits; see `HighwayConfig` for the exit settings. `pool` is what the exits read.

    Example:

        >>> Dinov2HighwayConfig(exit_positions=[4, 8], exit_types="concat").pool
        'cls'
    """

    model_type = "dinov2_highway"


class Dinov2WithRegistersHighwayConfig(Registers, SquareImages, Dinov2WithRegistersConfig):
    """A `Dinov2WithRegistersConfig` with exits; see `HighwayConfig`. `pool` is what the exits read."""

    model_type = "dinov2_with_registers_highway"


class Dinov3ViTHighwayConfig(Registers, SquareImages, DINOv3ViTConfig):
    """A `DINOv3ViTConfig` with exits; see `HighwayConfig`. `pool` is what the exits read."""

    model_type = "dinov3_vit_highway"
    attribute_map = {"attention_probs_dropout_prob": "attention_dropout"}


class VisionTower(SquareImages):
    """Of the image side of a model of images and texts: fields of its `vision_config` are this config's own.

    Args:
        vision_config (`dict` or `PretrainedConfig`, *optional*): Such fields, as `SiglipConfig` has them.
        text_config (`Any`, *optional*): Of the other side, which is left out.
    """

    # a saved one is no part of another config
    base_config_key = ""
    others_are_taken = "with interpolate_pos_encoding=True"
    attribute_map = {"attention_probs_dropout_prob": "attention_dropout"}
    initializer_factor: float = 1.0

    def __init__(self, *settings: Any, **kwargs: Any):
        super().__init__(*settings, **self.as_own(kwargs))

    @classmethod
    def as_own(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """`settings` without `vision_config`, whose fields come in its place, and without the other side's."""
        others = {"text_config", "vision_config", "projection_dim", "logit_scale_init_value"}
        own = {name: value for name, value in settings.items() if name not in others}
        tower = settings.get("vision_config") or {}
        tower = tower.to_dict() if isinstance(tower, PretrainedConfig) else tower
        if not isinstance(tower, dict):
            raise ValueError(f"vision_config: {tower!r} must be a dict of fields of {cls.__name__}")
        names = {"id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype", "transformers_version"}
        tower = {name: value for name, value in without_attention_code(tower).items() if name not in names}
        return {**tower, **own}

    @property
    def vision_config(self) -> PretrainedConfig:
        """Itself: upstream's classifiers build their tower of this."""
        return self


class SiglipHighwayConfig(VisionTower, SiglipVisionConfig):
    """A `SiglipVisionConfig` with exits; see `HighwayConfig`. A whole `SiglipConfig`'s fields are taken as well.

    Example:

        >>> SiglipHighwayConfig(vision_config={"hidden_size": 96, "num_attention_heads": 3}).hidden_size
        96
    """

    model_type = "siglip_highway"
    pools = ("mean",)


class CLIPHighwayConfig(VisionTower, CLIPVisionConfig):
    """A `CLIPVisionConfig` with exits; see `HighwayConfig`. A whole `CLIPConfig`'s fields are taken as well.

    `pool` is what the exits read; the final classifier reads the mean of the patches.
    """

    model_type = "clip_highway"


class BeitHighwayConfig(HighwayConfig, BeitConfig):
    """A `BeitConfig` with exits; see `HighwayConfig`. `pool` is what the exits read."""

    model_type = "beit_highway"
    takes_performer = False


class ViTMSNHighwayConfig(HighwayConfig, ViTMSNConfig):
    """A `ViTMSNConfig` with exits; see `HighwayConfig`."""

    model_type = "vit_msn_highway"


class IJepaHighwayConfig(HighwayConfig, IJepaConfig):
    """An `IJepaConfig` with exits; see `HighwayConfig`."""

    model_type = "ijepa_highway"
    pools = ("mean",)
