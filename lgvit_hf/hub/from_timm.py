"""Plain ViT, DeiT and Swin of timm (https://github.com/huggingface/pytorch-image-models) as those of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ..segments import height_width
from .layer_scale import fold_layer_scale
from .loading import BY_BACKBONE
from .reading import find_weights, in_short, read_if_there, read_weights
from .strict import Rename, load_strictly, renamed, split_fused, write_model
from .timm_names import SWIN_NAMES, VIT_NAMES, swin_sizes, vit_sizes, with_class_position

NAMES = {kind: [(theirs, f"{kind}.{ours}") for theirs, ours in VIT_NAMES] for kind in ("vit", "deit")}
NAMES["vit"] += [("head", "classifier")]
NAMES["deit"] += [("head", "cls_classifier"), ("head_dist", "distillation_classifier")]
NAMES["swin"] = [*((theirs, f"swin.{ours}") for theirs, ours in SWIN_NAMES), (r"head(?:\.fc)?", "classifier")]
# layer scale (`init_values`), and the layers before it
FACTORS = {
    r"blocks\.(\d+)\.(?:ls1\.gamma|gamma_1)": r"blocks.\1.attn.proj",
    r"blocks\.(\d+)\.(?:ls2\.gamma|gamma_2)": r"blocks.\1.mlp.fc2",
}
# tensors (regular expression) that say what transformers' classes do not compute
REFUSED = [
    (r"reg_token", "register tokens (`reg_tokens`)"),
    (r"fc_norm\..+", "it averages the patches before the last norm (`global_pool='avg'`, `fc_norm`)"),
    (r"norm_pre\..+", "a norm before the first block (`pre_norm`, as CLIP)"),
    (r"attn_pool\..+", "attention pooling (`global_pool='map'`)"),
    (r"pre_logits\..+|heads\.pre_logits\..+", "a layer before the classifier (`representation_size`)"),
    (r"layers\.\d+\.blocks\.\d+\.(ls[12]\..+|gamma_[12])", "layer scale (`init_values`)"),
    (r"blocks\.\d+\.attn\.(q_norm|k_norm|norm)\..+", "norms inside attention (`qk_norm`, `scale_attn_norm`)"),
    (r"blocks\.\d+\.mlp\.(w12|w3|w1|w2|fc1_g|fc1_x|norm)\..+", "another MLP than two linear layers (gated, normed)"),
    (r"blocks\.\d+\.attn\.(q_bias|v_bias|relative_position_bias_table)|rel_pos_bias\..+", "BEiT's attention"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.(logit_scale|cpb_mlp\..+)", "Swin V2's attention"),
    (r"patch_embed\.backbone\..+", "a convolutional network before the patches (hybrid)"),
    (r"absolute_pos_embed", "Swin with absolute positions (`ape`)"),
]


def convert_timm(
    source: str | Path,
    output: str | Path,
    *,
    num_attention_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    **exits: Any,
) -> PretrainedConfig:
    """Turn weights of timm's ViT, DeiT, distilled DeiT or Swin into a checkpoint that gives the same logits.

    What is written is a plain checkpoint of transformers, a ViT, a DeiT with teacher (only where there is a
    distillation token; without one DeiT is a ViT) or a Swin, which `from_backbone`, `lgvit grow` and `lgvit train`
    take. Layer scale, as of DeiT III, is folded into the layer before it. With `exit_positions` it is a highway, whose
    exits are new and untrained.

    Args:
        source (`str` or `Path`):
            A file of weights or a folder with one; see `find_weights`. Names and shapes say which model it is. The
            `config.json` of timm beside it, if there is one, says how pixels are normalised and classes are called.
        output (`str` or `Path`): Folder to write; must not exist or be empty.
        num_attention_heads (`int`, *optional*):
            Of ViT and DeiT, whose weights do not say it; by default one for every 64 channels (16 at widths of 1280,
            1408 and 1664, as timm's are).
        image_size (`tuple[int, int]`, *optional*): Height and width, where the weights do not say it.
        exits: `exit_positions` and other settings of `from_backbone`, for a highway.

    Returns:
        The config of the written model.

    Raises:
        ValueError: It is another model, or one that transformers' classes do not compute; a tensor has no place in
            the model, another shape or is missing.
        OSError: A file is missing or damaged.
    """
    weights = find_weights(source)
    state, about = read_weights(weights), timm_settings(weights)
    return convert_plain(state, weights, output, about, num_attention_heads, image_size, exits)


def convert_plain(
    state: dict[str, Tensor],
    weights: Path,
    output: str | Path,
    about: dict[str, Any],
    num_attention_heads: int | None,
    image_size: tuple[int, int] | None,
    exits: dict[str, Any],
) -> PretrainedConfig:
    """Write the model of transformers that has the weights of a state dict with timm's names.

    Args:
        state (`dict[str, Tensor]`): By timm's names.
        weights (`Path`): The file they come from, which errors name.
        output, num_attention_heads, image_size, exits: See `convert_timm`.
        about (`dict`): See `timm_settings`.
    """
    for pattern, what in REFUSED:
        found = sorted(name for name in state if re.fullmatch(pattern, name))
        if found:
            raise ValueError(f"{weights}: {found[0]}: {what}, which transformers' ViT, DeiT and Swin do not compute")
    if any(name.endswith("relative_position_bias_table") for name in state):
        kind, pool = "swin", "avg"
    else:
        # DeiT without a distillation token is a ViT
        kind, pool = "deit" if "dist_token" in state else "vit", "token"
    if about.get("pool") not in (None, pool):
        raise ValueError(
            f"{weights}: config.json: global_pool={about['pool']!r} is not what transformers' {kind} computes, "
            f"{pool!r} is"
        )
    image_size = image_size or about.get("image_size")
    try:
        state = split_fused(with_class_position(fold_layer_scale(state, FACTORS), image_size), "qkv")
        sizes = swin_sizes(state, image_size) if kind == "swin" else vit_sizes(state, num_attention_heads, image_size)
    except KeyError as error:
        raise ValueError(
            f"{weights}: no tensor {error} there: not a ViT, DeiT or Swin with a classifier and timm's names; found "
            f"are {known_by(state)}{_whose(state)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    if kind == "swin" and num_attention_heads is not None:
        raise ValueError(f"num_attention_heads: the weights of a Swin say {sizes['num_heads']}; leave it out")
    labels = about.get("label_names")
    if isinstance(labels, list) and len(set(map(str, labels))) == len(labels) == sizes["num_labels"]:
        sizes |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    plain_class = BY_BACKBONE[kind].native_classes[0]
    model = plain_class(plain_class.config_class(**sizes))
    load_strictly(model, state, _rename(kind, state), weights)
    if exits:
        model = BY_BACKBONE[kind].from_backbone(model, **exits)
    processor = processor_settings(model.config.image_size, **about["pixels"]) if "pixels" in about else None
    write_model(model, output, weights, processor)
    return model.config


def known_by(state: dict[str, Tensor]) -> str:
    """Some names of a state dict by which one sees whose it is."""
    return in_short(sorted(name for name in state if name.endswith("weight")) or sorted(state), 4)


def _whose(state: dict[str, Tensor]) -> str:
    """Whose names these are, if somebody else's that can be converted."""
    if any(name.startswith(("vit.", "deit.", "swin.")) for name in state):
        return "; these are transformers' names: such a checkpoint needs no conversion, or --from lgvit"
    if {"conv_proj.weight", "features.0.0.weight"} & set(state):
        return "; --from torchvision takes torchvision's"
    return ""


def _rename(kind: str, state: dict[str, Tensor]) -> Rename:
    # merging stands at the end of a stage, as here, in the original and old timm; at the start of the next in timm
    later = "layers.0.downsample.reduction.weight" not in state

    def rename(name: str) -> str | None:
        if kind == "swin" and name.endswith(".attn_mask"):
            return None  # made from the sizes of image and window
        if later:
            name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
        return renamed(name, NAMES[kind])

    return rename


def timm_settings(weights: Path) -> dict[str, Any]:
    """What the `config.json` of timm beside the weights says: `pool`, `image_size`, `label_names`, `pixels`.

    Raises:
        ValueError: It speaks of a model that transformers does not compute.
    """
    file = weights.parent / "config.json"
    settings = read_if_there(file)
    trained = settings.get("pretrained_cfg")
    if not isinstance(trained, dict):
        return {}
    if "quickgelu" in str(settings.get("architecture")):
        raise ValueError(f"{file}: {settings['architecture']!r} has another GELU (quick) than the weights can show")
    about: dict[str, Any] = {"pool": settings.get("global_pool"), "label_names": settings.get("label_names")}
    size = trained.get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(isinstance(side, int) and side > 0 for side in size):
        about["image_size"] = (size[1], size[2])
    if "mean" in trained and "std" in trained:
        about["pixels"] = {name: trained.get(name) for name in ("mean", "std", "interpolation")}
    return about


def processor_settings(
    image_size: int | tuple[int, int], mean: list[float], std: list[float], interpolation: str | None
) -> dict[str, Any]:
    """The settings of a `ViTImageProcessor`, which resizes to the whole size without cutting anything off."""
    height, width = height_width(image_size)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        # as in PIL: bicubic, or bilinear
        "resample": 3 if interpolation == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
