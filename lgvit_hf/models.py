"""A highway and its image processor from what a user names: a saved highway, a plain checkpoint, or nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedModel, set_seed

from .configuration import DeiTHighwayConfig, HighwayConfig, SwinHighwayConfig, ViTHighwayConfig
from .data import make_processor
from .modeling_deit import DeiTHighway
from .modeling_swin import SwinHighway
from .modeling_vit import ViTHighway

BY_BACKBONE = {"vit": ViTHighway, "deit": DeiTHighway, "swin": SwinHighway}


def small_config(backbone: str, image_size: int, **settings: Any) -> HighwayConfig:
    """A config of 12 narrow blocks for small images, which trains on a CPU.

    Example:

        >>> small_config("swin", 32).depths
        [2, 4, 6]
    """
    patch_size = max(1, image_size // 8)
    if backbone == "swin":
        return SwinHighwayConfig(
            image_size=image_size,
            patch_size=max(1, image_size // 16),
            embed_dim=32,
            # three stages: a fourth would have a smaller grid than a window
            depths=[2, 4, 6],
            num_heads=[1, 2, 4],
            window_size=4,
            drop_path_rate=0.0,
            **settings,
        )
    config_class = {"vit": ViTHighwayConfig, "deit": DeiTHighwayConfig}[backbone]
    return config_class(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=3,
        **settings,
    )


def open_model(
    checkpoint: str | None = None,
    *,
    backbone: str | None = None,
    image_size: int = 32,
    label_names: list[str],
    exit_positions: list[int] | None = None,
    exit_types: list[str] | None = None,
    must_be_highway: bool = False,
    seed: int = 0,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Open a highway and the image processor that goes with it.

    Args:
        checkpoint (`str`, *optional*): Folder or Hub id of a highway, or of a plain ViT, DeiT or Swin.
        backbone (`str`, *optional*): `vit`, `deit` or `swin`, for a small new one where no checkpoint is given.
        image_size (`int`, *optional*, defaults to 32): Of a new one.
        label_names (`list[str]`): Classes of the data; a plain checkpoint with others gets a new classifier.
        exit_positions (`list[int]`, *optional*), exit_types (`list[str]`, *optional*): LGViT's by default.
        must_be_highway (`bool`, *optional*, defaults to `False`): Whether a plain checkpoint is refused.
        seed (`int`, *optional*, defaults to 0): Of new weights.

    Raises:
        ValueError: Neither or both of checkpoint and backbone; exits asked of a highway that has its own; classes of
            the data and of a highway that differ in number.
    """
    if (checkpoint is None) == (backbone is None):
        raise ValueError("give either --model CHECKPOINT or --backbone vit|deit|swin")
    exits: dict[str, Any] = {}
    if exit_positions is not None:
        exits["exit_positions"] = exit_positions
    if exit_types is not None:
        exits["exit_types"] = exit_types[0] if len(exit_types) == 1 else exit_types
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }
    set_seed(seed)
    if backbone is not None:
        config = small_config(backbone, image_size, **exits, **labels)
        return BY_BACKBONE[backbone](config), make_processor(image_size)

    if Path(checkpoint).exists() and not (Path(checkpoint) / "config.json").is_file():
        raise OSError(f"{checkpoint}: no config.json there, not a saved model")
    config = AutoConfig.from_pretrained(checkpoint)
    kinds = {f"{kind}_highway": kind for kind in BY_BACKBONE}
    if config.model_type in kinds:
        if exits:
            raise ValueError(f"{checkpoint} has exits after {config.exit_positions} already; leave --exit-* out")
        if config.num_labels != len(label_names):
            raise ValueError(f"{checkpoint} knows {config.num_labels} classes, the data have {len(label_names)}")
        for index, name in enumerate(label_names):
            known = config.id2label[index]
            if known != name and known != f"LABEL_{index}":
                raise ValueError(f"{checkpoint}: class {index} is {known!r}, in the data it is {name!r}")
        model = BY_BACKBONE[kinds[config.model_type]].from_pretrained(checkpoint)
    elif config.model_type in BY_BACKBONE and not must_be_highway:
        if config.num_labels == len(label_names):
            labels = {} if config.id2label == labels["id2label"] else labels
        model = BY_BACKBONE[config.model_type].from_backbone(checkpoint, **exits, **labels)
    else:
        raise ValueError(f"{checkpoint}: model type {config.model_type!r} must be one of {', '.join(kinds)}")
    return model, AutoImageProcessor.from_pretrained(checkpoint)
