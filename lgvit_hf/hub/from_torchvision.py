"""Plain ViT and Swin of torchvision (https://github.com/pytorch/vision) as checkpoints of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .from_timm import convert_plain, known_by
from .reading import find_weights, read_weights
from .strict import renamed

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
# torchvision's module (regular expression) -> timm's
VIT_NAMES = [
    ("class_token", "cls_token"),
    ("conv_proj", "patch_embed.proj"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (_BLOCK + "ln_([12])", r"blocks.\1.norm\2"),
    (_BLOCK + r"self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"self_attention\.out_proj", r"blocks.\1.attn.proj"),
    # the second names are those of version 0.12 and before
    (_BLOCK + r"mlp\.(?:0|linear_1)", r"blocks.\1.mlp.fc1"),
    (_BLOCK + r"mlp\.(?:3|linear_2)", r"blocks.\1.mlp.fc2"),
    (r"encoder\.ln", "norm"),
    (r"heads\.head", "head"),
]
SWIN_NAMES = [(r"features\.0\.0", "patch_embed.proj"), (r"features\.0\.2", "patch_embed.norm")]
SWIN_INSIDE = [(r"mlp\.0", "mlp.fc1"), (r"mlp\.3", "mlp.fc2")]
# all its weights were trained on pixels normalised like that
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def convert_torchvision(
    source: str | Path,
    output: str | Path,
    *,
    num_attention_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    **exits: Any,
) -> PretrainedConfig:
    """Turn weights of torchvision's ViT or Swin into a checkpoint that gives the same logits.

    What is written, and the arguments, are those of `convert_timm`. The image processor normalises pixels as
    torchvision's own weights ask for, unless there is another one beside the weights.

    Raises:
        ValueError: It is another model, or one that transformers' classes do not compute; a tensor has no place in
            the model, another shape or is missing.
        OSError: A file is missing or damaged.
    """
    weights = find_weights(source)
    state = read_weights(weights)
    stem = sorted(name for name in state if name.startswith("conv_proj.conv_"))
    if stem:
        raise ValueError(
            f"{weights}: {stem[0]}: several convolutions make the patches, which transformers' ViT has not"
        )
    if not {"conv_proj.weight", "features.0.0.weight"} & set(state):
        raise ValueError(
            f"{weights}: neither a ViT (conv_proj.weight) nor a Swin (features.0.0.weight) with torchvision's names; "
            f"found are {known_by(state)}"
        )
    is_swin = "features.0.0.weight" in state
    state = {timm_name(name, is_swin): tensor for name, tensor in state.items()}
    pixels = {**IMAGENET, "interpolation": "bicubic" if is_swin else "bilinear"}
    return convert_plain(state, weights, output, {"pixels": pixels}, num_attention_heads, image_size, exits)


def timm_name(name: str, is_swin: bool) -> str:
    """What timm calls a tensor of torchvision's; a name that torchvision does not have stays.

    Example:

        >>> timm_name("encoder.layers.encoder_layer_3.ln_1.bias", False), timm_name("features.4.norm.bias", True)
        ('blocks.3.norm1.bias', 'layers.1.downsample.norm.bias')
    """
    if not is_swin:
        return renamed(name, VIT_NAMES)
    if match := re.fullmatch(r"features\.(\d*[13579])\.(\d+)\.(.+)", name):
        return f"layers.{(int(match[1]) - 1) // 2}.blocks.{match[2]}.{renamed(match[3], SWIN_INSIDE)}"
    if match := re.fullmatch(r"features\.(\d*[02468])\.((?:norm|reduction)\.\w+)", name):
        # as the original, whose first stage ends in a merging
        return f"layers.{int(match[1]) // 2 - 1}.downsample.{match[2]}"
    return renamed(name, SWIN_NAMES)
