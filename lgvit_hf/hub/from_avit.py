"""Original A-ViT checkpoints (https://github.com/NVlabs/A-ViT) as ours."""

from __future__ import annotations

import re
from pathlib import Path

from ..configuration_avit import AViTConfig
from ..modeling_avit import AViT
from .reading import find_weights, read_if_there, read_weights
from .strict import built_from, load_strictly, renamed, split_fused, write_model
from .timm_names import VIT_NAMES, vit_sizes

NAMES = [
    *((theirs, f"backbone.{ours}") for theirs, ours in VIT_NAMES),
    ("head", "classifiers.0"),
    ("head_dist", "classifiers.1"),
]


def convert_avit(
    source: str | Path,
    output: str | Path,
    *,
    gate_scale: float | None = None,
    gate_center: float | None = None,
    num_attention_heads: int | None = None,
) -> AViTConfig:
    """Turn an original A-ViT checkpoint, with timm's names, into an `AViT` that gives the same logits and depths.

    Args:
        source (`str` or `Path`):
            A file of weights or a folder with one; see `find_weights`. Pickles are read with `weights_only=True`; a
            training checkpoint's `"model"` is taken. A `config.json` beside it may say what weights do not, in the
            words of `AViTConfig`.
        output (`str` or `Path`): Folder to write; must not exist or be empty.
        gate_scale (`float`, *optional*), gate_center (`float`, *optional*):
            Of the gate. By default as the config or the name of the file says: official ones are called
            `<size>-<scale>-<center>.pth`.
        num_attention_heads (`int`, *optional*): By default one for every 64 channels.

    Returns:
        The config of the written model.

    Raises:
        ValueError: The gate is not known; a tensor has no place in the model or is missing.
        OSError: A file is missing or damaged.
    """
    weights = find_weights(source)
    config_file = weights.parent / "config.json"
    given = {"gate_scale": gate_scale, "gate_center": gate_center, "num_attention_heads": num_attention_heads}
    given = {key: value for key, value in given.items() if value is not None}
    settings = {**_gate_of_name(weights.stem), **read_if_there(config_file), **given}
    if not {"gate_scale", "gate_center"} <= set(settings):
        raise ValueError(
            f"{weights.name}: gate_scale and gate_center are not in the name (<size>-<scale>-<center>); give both "
            "--gate-scale and --gate-center, 10 and 30 for A-ViT-T, 10 and 75 for A-ViT-S"
        )
    state = read_weights(weights)
    if "patch_embed.proj.weight" not in state:
        raise ValueError(
            f"{weights}: no tensor 'patch_embed.proj.weight' there: not a checkpoint of A-ViT, by timm's names"
        )
    backbone = "deit" if "dist_token" in state else "vit"
    with built_from(config_file if config_file.is_file() else weights):
        state = split_fused(state, "qkv")
        size = settings.get("image_size")
        sizes = vit_sizes(state, settings.get("num_attention_heads"), (size, size) if isinstance(size, int) else size)
        config = AViTConfig(**{"backbone": backbone, "distilled": backbone == "deit", **sizes, **settings})
        model = AViT(config)
    load_strictly(model, state, lambda name: renamed(name, NAMES), weights)
    write_model(model, output, weights)
    return config


def _gate_of_name(name: str) -> dict[str, float]:
    """Scale and centre of the gate in the name of an official checkpoint, if they are.

    Example:

        >>> _gate_of_name("avit_tiny-10-30")
        {'gate_scale': 10.0, 'gate_center': 30.0}
    """
    match = re.fullmatch(r".*?-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", name)
    return {"gate_scale": float(match[1]), "gate_center": float(match[2])} if match else {}
