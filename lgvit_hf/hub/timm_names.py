"""What timm calls the tensors of ViT, DeiT and Swin, what they say of the model, and their names in transformers."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

# timm's module (regular expression) -> that of a file of transformers 4, inside a block and inside the backbone
_INSIDE = {
    "norm1": "layernorm_before",
    r"attn\.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
VIT_NAMES = [
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"blocks\.(\d+)\.attn\.(query|key|value)", r"encoder.layer.\1.attention.attention.\2"),
    *((rf"blocks\.(\d+)\.{theirs}", rf"encoder.layer.\1.{ours}") for theirs, ours in _INSIDE.items()),
    ("norm", "layernorm"),
]
_SWIN_BLOCK, _SWIN_OURS = r"layers\.(\d+)\.blocks\.(\d+)\.", r"encoder.layers.\1.blocks.\2."
SWIN_NAMES = [
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"patch_embed\.norm", "embeddings.norm"),
    (_SWIN_BLOCK + r"attn\.(query|key|value|relative_position_bias_table)", _SWIN_OURS + r"attention.self.\3"),
    *((_SWIN_BLOCK + theirs, _SWIN_OURS + ours) for theirs, ours in _INSIDE.items()),
    (r"layers\.(\d+)\.downsample\.(norm|reduction)", r"encoder.layers.\1.downsample.\2"),
    ("norm", "layernorm"),
]

# heads of attention of widths that timm and torchvision have; by default one for every 64 channels
HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16}


def with_class_position(state: dict[str, Tensor], image_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Weights with a position for the class token: of those for the patches alone (`no_embed_class`, DeiT III) zeros.

    Example:

        >>> state = {"cls_token": torch.zeros(1, 1, 4), "pos_embed": torch.ones(1, 9, 4)}
        >>> with_class_position(state)["pos_embed"].shape
        torch.Size([1, 10, 4])
    """
    positions = state.get("pos_embed")
    if positions is None or positions.dim() != 3 or "cls_token" not in state or "dist_token" in state:
        return state
    number = positions.shape[1]
    if image_size is not None:
        _, _, patch = _patches(state)
        of_patches_alone = number == (image_size[0] // patch) * (image_size[1] // patch)
    else:
        of_patches_alone = math.isqrt(number) ** 2 == number
    if not of_patches_alone:
        return state
    return {**state, "pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


def vit_sizes(
    state: dict[str, Tensor], num_attention_heads: int | None = None, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The fields of a config of ViT or DeiT that the weights say.

    Args:
        state (`dict[str, Tensor]`): By timm's names, query, key and value apart.
        num_attention_heads (`int`, *optional*): By default as the width is known for, or one for every 64 channels.
        image_size (`tuple[int, int]`, *optional*): By default of a square grid of patches.

    Raises:
        KeyError: Of a tensor that a ViT must have.
        ValueError: The weights contradict what is given, or do not say it.
    """
    width, channels, patch = _patches(state)
    if "cls_token" not in state:
        raise ValueError("cls_token: none there; transformers has no ViT without class token (`class_token=False`)")
    positions = _shape(state, "pos_embed", 3)[1]
    num_patches = positions - (2 if "dist_token" in state else 1)
    side = math.isqrt(max(0, num_patches))
    if image_size is None and side * side != num_patches:
        raise ValueError(
            f"pos_embed: {num_patches} patches are no square; give --image-size HEIGHT WIDTH, in patches of {patch}"
        )
    height, width_of_image = image_size or (side * patch, side * patch)
    if (height // patch) * (width_of_image // patch) != num_patches:
        raise ValueError(
            f"image_size: {height} x {width_of_image} pixels are not the {num_patches} patches of {patch} x "
            f"{patch} pixels that pos_embed has"
        )
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": height if height == width_of_image else (height, width_of_image),
        "num_hidden_layers": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_attention_heads": _num_heads(width, num_attention_heads),
        "intermediate_size": _shape(state, "blocks.0.mlp.fc1.weight", 2)[0],
        "num_labels": _shape(state, "head.weight", 2)[0],
        "qkv_bias": "blocks.0.attn.query.bias" in state,
        "layer_norm_eps": 1e-6,
    }


def _shape(state: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor from which a size is read."""
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name}: its shape is {list(shape)}, which is not {dimensions} positive sizes")
    return shape


def _patches(state: dict[str, Tensor]) -> tuple[int, int, int]:
    """Width of the tokens, channels of the images, and side of a patch."""
    width, channels, *patch = _shape(state, "patch_embed.proj.weight", 4)
    if patch[0] != patch[1]:
        raise ValueError(f"patch_embed.proj.weight: patches of {patch[0]} x {patch[1]} pixels are not square")
    return width, channels, patch[0]


def _num_heads(width: int, given: int | None) -> int:
    if given is None and width % 64:
        raise ValueError(
            f"num_attention_heads: a width of {width} is not so many times 64, and weights do not say how many "
            "heads there are; give --num-attention-heads"
        )
    heads = HEADS_OF_WIDTH.get(width, width // 64) if given is None else given
    if heads < 1 or width % heads:
        raise ValueError(f"num_attention_heads: {heads} do not divide the width of {width}")
    return heads


def swin_sizes(state: dict[str, Tensor], image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The fields of a config of Swin that the weights say.

    Args:
        state (`dict[str, Tensor]`): By timm's names, query, key and value apart.
        image_size (`tuple[int, int]`, *optional*):
            By default that whose last grid is one window, as 224 pixels of `window7` and 384 of `window12` are.

    Raises:
        KeyError: Of a tensor that a Swin must have.
        ValueError: Windows or images of which transformers' Swin gives other answers.
    """
    width, channels, patch = _patches(state)
    ends = r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table"
    found = [(name, match) for name in state if (match := re.fullmatch(ends, name))]
    tables = {(int(match[1]), int(match[2])): _shape(state, name, 2) for name, match in found}
    depths = list(Counter(stage for stage, _ in sorted(tables)).values())
    if not tables:
        raise KeyError("layers.0.blocks.0.attn.relative_position_bias_table")
    # a window of w x w patches has (2w - 1) x (2w - 1) relative positions
    windows = sorted({(math.isqrt(positions) + 1) // 2 for positions, _ in tables.values()})
    if len(windows) > 1:
        raise ValueError(
            f"windows of {', '.join(map(str, windows))} patches: transformers' Swin has one size for all stages "
            "(timm makes windows smaller where the grid is)"
        )
    if any((2 * windows[0] - 1) ** 2 != positions for positions, _ in tables.values()):
        raise ValueError("relative_position_bias_table: windows that are not square")
    smallest = patch * windows[0] * 2 ** (len(depths) - 1)
    height, width_of_image = image_size or (smallest, smallest)
    if height != width_of_image or height < smallest or height % smallest:
        raise ValueError(
            f"image_size: {height} x {width_of_image} pixels; with patches of {patch}, windows of {windows[0]} and "
            f"{len(depths)} stages it must be a multiple of {smallest}, elsewhere Swins are padded each in their way"
        )
    classifier = "head.fc.weight" if "head.fc.weight" in state else "head.weight"
    return {
        "embed_dim": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": height,
        "depths": depths,
        "num_heads": [tables[stage, 0][1] for stage in range(len(depths))],
        "window_size": windows[0],
        "mlp_ratio": _shape(state, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / width,
        "num_labels": _shape(state, classifier, 2)[0],
        "qkv_bias": "layers.0.blocks.0.attn.query.bias" in state,
        "layer_norm_eps": 1e-5,
    }
