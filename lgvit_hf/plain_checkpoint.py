"""Plain checkpoints of transformers: who takes them, how they are loaded, and positions for images of another size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .checkpoint_files import WrongShape, check_files
from .safe_config import without_attention_code
from .segments import height_width

# buffers that are made, not learned, and what stands for patches that pretraining masks
RECOMPUTED = ("relative_position_index", "num_batches_tracked", "random_features", "embeddings.mask_token")
# who takes the backbones of a model type
HIGHWAY_NAMES = {
    "vit": "ViTHighway",
    "deit": "DeiTHighway",
    "swin": "SwinHighway",
    "dinov2": "Dinov2Highway",
    "dinov2_with_registers": "Dinov2WithRegistersHighway",
    "dinov3_vit": "Dinov3ViTHighway",
    "siglip": "SiglipHighway",
    "siglip_vision_model": "SiglipHighway",
    "clip": "CLIPHighway",
    "clip_vision_model": "CLIPHighway",
    "beit": "BeitHighway",
    "vit_msn": "ViTMSNHighway",
    "ijepa": "IJepaHighway",
}


def load_native(
    path: str | os.PathLike[str], hub: dict[str, Any], natives: Callable[[str, str | None], Sequence[Any]]
) -> PreTrainedModel:
    """A plain checkpoint of a backbone, from safetensors only, without code that its config names.

    Args:
        path (`str` or path): Folder or Hub id.
        hub (`dict`): As `hub_arguments` gives them.
        natives (`Callable`):
            Name and model type -> transformers' classes for it, the bare backbone last, or `ValueError`.

    Raises:
        ValueError: The checkpoint is of another kind, or lacks a tensor.
        OSError: There is none, or only pickles.
    """
    check_files(path, hub)
    settings, _ = PretrainedConfig.get_config_dict(path, **hub)
    classes = natives(str(path), settings.get("model_type"))
    # an architecture that is not listed (masked image modelling, say) still has the bare backbone inside, the last
    named = [native for native in classes if native.__name__ in (settings.get("architectures") or [])]
    native = (named or [classes[-1]])[0]
    # of a model of images and texts the config of the image side is a part
    part = native.config_class.base_config_key
    settings = settings.get(part, settings)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {part}: {settings!r} in config.json must be a dict")
    config = native.config_class.from_dict(without_attention_code(settings))
    model, info = native.from_pretrained(
        path, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **hub
    )
    # names in transformers 4, names and shapes in 5
    misshapen = sorted(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"])
    if misshapen:
        raise WrongShape(
            f"{path}: mismatch: {len(misshapen)} tensors have not the shape that config.json says, such as "
            f"{misshapen[0]!r}"
        )
    lost = sorted(name for name in info["missing_keys"] if not name.endswith(RECOMPUTED))
    lost = [name for name in lost if not name.startswith("pooler.")]
    if len(lost) == len(model.state_dict()):
        raise ValueError(f"{path}: no tensor of {native.__name__}, the backbone, is there")
    if lost:
        raise ValueError(f"{path}: {len(lost)} tensors of the backbone are missing, such as {lost[0]!r}")
    return cast(PreTrainedModel, model)


def name_of(backbone: str | os.PathLike | PreTrainedModel) -> str:
    """What an error calls a checkpoint, or a model in memory."""
    return type(backbone).__name__ if isinstance(backbone, PreTrainedModel) else str(backbone)


def resized(native: PreTrainedModel, tensor: Tensor, ours: Tensor | None, config: Any) -> Tensor:
    """Position embeddings as upstream interpolates them to `config.image_size`; any other tensor as it is.

    Args:
        native (`PreTrainedModel`): What they come from.
        tensor (`Tensor`): `[1, P + N, D]` or `[P + N, D]`, or any other.
        ours (`Tensor`, *optional*): The place it is for, whose shape says whether it must be another size.
        config (`PretrainedConfig`): With the new size.
    """
    interpolate = [module for module in native.modules() if hasattr(module, "interpolate_pos_encoding")]
    if ours is None or not interpolate or ours.shape == tensor.shape or tensor.dim() not in (2, 3):
        return tensor
    embeddings: Any = interpolate[0]
    table = getattr(embeddings, "position_embeddings", None)
    if table is None and hasattr(embeddings, "position_embedding"):
        table = embeddings.position_embedding.weight
    if table is None or table.shape != tensor.shape or ours.shape[-1] != tensor.shape[-1]:
        return tensor
    if config.patch_size != getattr(native.config, "vision_config", native.config).patch_size:
        # its weights do not fit, which says more
        return tensor
    with torch.no_grad():
        made = embeddings.interpolate_pos_encoding(
            ours.reshape(1, -1, ours.shape[-1]), *height_width(config.image_size)
        )
    return cast(Tensor, made.reshape(ours.shape))
