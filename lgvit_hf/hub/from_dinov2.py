"""DINOv2 (https://arxiv.org/abs/2304.07193) of transformers as a plain ViT, which everything here takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, PretrainedConfig, ViTConfig, ViTForImageClassification, set_seed

from ..files import replace_folder, write_json
from ..safe_config import without_attention_code
from ..segments import height_width
from .from_timm import processor_settings
from .layer_scale import fold_layer_scale
from .reading import find_weights, read_if_there, read_json, read_weights
from .strict import PROCESSOR, built_from, load_strictly, renamed

# names in files, which are the same under transformers 4 and 5
FACTORS = {
    r"encoder\.layer\.(\d+)\.layer_scale1\.lambda1": r"encoder.layer.\1.attention.output.dense",
    r"encoder\.layer\.(\d+)\.layer_scale2\.lambda1": r"encoder.layer.\1.mlp.fc2",
}
NAMES = [
    (r"encoder\.layer\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
    (r"encoder\.layer\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
    (r"encoder\.layer\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"encoder\.layer\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
]
SAME_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "patch_size", "num_channels"),
    *("qkv_bias", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "id2label", "label2id"),
)
POSITIONS = "embeddings.position_embeddings"


def convert_dinov2(
    source: str | Path, output: str | Path, *, image_size: tuple[int, int] | None = None
) -> PretrainedConfig:
    """Turn a DINOv2 of transformers into a plain ViT with the same hidden states; its classifier is new.

    Layer scale is folded into the output layers of attention and MLP, and position embeddings are interpolated to the
    size of the images, as `Dinov2Model` does in each forward. A ViT's classifier reads the class token alone, so that
    a classifier of DINOv2, which reads the mean patch too, cannot be kept.

    Args:
        source (`str` or `Path`): Folder with `config.json` and weights, or the file of weights beside that config.
        output (`str` or `Path`): Folder to write; must not exist or be empty.
        image_size (`tuple[int, int]`, *optional*): Height and width, in whole patches; by default the checkpoint's.

    Returns:
        The config of the written ViT.

    Raises:
        ValueError: It is another model; registers or SwiGLU, which a ViT has not; an image size that is not in whole
            patches; a tensor that has no place, another shape, or is missing.
        OSError: A file is missing or damaged.
    """
    weights = find_weights(source)
    file = weights.parent / "config.json"
    settings = read_json(file)
    state = {name.removeprefix("dinov2."): tensor for name, tensor in read_weights(weights).items()}
    kind = settings.get("model_type")
    if kind == "dinov2_with_registers" or "embeddings.register_tokens" in state:
        raise ValueError(
            f"{weights}: register tokens, which a ViT has not; Dinov2WithRegistersHighway takes it as it is"
        )
    if kind != "dinov2":
        raise ValueError(f"{file}: model_type {kind!r} must be 'dinov2'")
    if any(".mlp.weights_" in name for name in state):
        raise ValueError(f"{weights}: SwiGLU, which a ViT's MLP does not compute; Dinov2Highway takes it as it is")
    with built_from(file):
        theirs = Dinov2Config.from_dict(without_attention_code(settings))
        size = height_width(image_size or theirs.image_size)
        patch = height_width(theirs.patch_size)
        fields: dict[str, Any] = {name: getattr(theirs, name) for name in SAME_FIELDS}
        width = int(theirs.hidden_size * theirs.mlp_ratio)
        image: Any = size[0] if size[0] == size[1] else size
        set_seed(0)
        model = ViTForImageClassification(ViTConfig(**fields, intermediate_size=width, image_size=image))
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"image_size: {size[0]} x {size[1]} pixels are not whole patches of {patch[0]} x {patch[1]}")
    if POSITIONS not in state or state[POSITIONS].dim() != 3:
        raise ValueError(f"{weights}: no tensor {POSITIONS!r} as of a DINOv2 of transformers")
    grid = tuple(height_width(theirs.image_size)[axis] // patch[axis] for axis in range(2))
    state[POSITIONS] = interpolated(state[POSITIONS], grid, (size[0] // patch[0], size[1] // patch[1]))
    state = fold_layer_scale(state, FACTORS)
    left_out = ("embeddings.mask_token", "classifier.weight", "classifier.bias")
    state = {f"vit.{renamed(name, NAMES)}": tensor for name, tensor in state.items() if name not in left_out}
    dtype = next(iter(state.values())).dtype
    state |= {f"classifier.{name}": each.detach().to(dtype) for name, each in model.classifier.named_parameters()}
    load_strictly(model, state, lambda name: name, weights)
    processor = read_if_there(weights.parent / PROCESSOR)
    with replace_folder(output) as folder:
        model.eval().save_pretrained(folder)
        if processor:
            mean_and_std = processor["image_mean"], processor["image_std"]
            write_json(folder / PROCESSOR, processor_settings(size, *mean_and_std, "bicubic"))
    return model.config


def interpolated(table: Tensor, grid: tuple[int, ...], wanted: tuple[int, int]) -> Tensor:
    """Position embeddings `[1, 1 + h * w, D]` of a class token and a grid of patches, for another grid.

    Example:

        >>> interpolated(torch.zeros(1, 1 + 16, 8), (4, 4), (2, 3)).shape
        torch.Size([1, 7, 8])
    """
    if tuple(grid) == tuple(wanted):
        return table
    patches = table[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=wanted, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
