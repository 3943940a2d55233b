"""Original LGViT checkpoints (https://github.com/falcon-xu/LGViT) as ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..configuration import HighwayConfig
from ..configuration_sequence import DeiTHighwayConfig, ViTHighwayConfig
from ..configuration_swin import SwinHighwayConfig
from .lgvit_names import from_lgvit, kind_of
from .loading import BY_BACKBONE
from .reading import find_weights, read_json, read_weights
from .strict import built_from, load_strictly, write_model

# settings of LGViT's config that are ours under another name, or that only its training code read
LGVIT_ONLY = (
    "num_early_exits position_exits highway_type backbone exit_strategy train_strategy threshold encoder_ensemble "
    "loss_coefficient homo_coefficient hete_coefficient homo_loss_coefficient hete_loss_coefficient "
    "feature_loss_coefficient train_highway architectures model_type transformers_version torch_dtype auto_map "
    "_name_or_path"
).split()


def convert_lgvit(source: str | Path, output: str | Path) -> HighwayConfig:
    """Turn an original LGViT checkpoint into one of ours that gives the same logits at every exit.

    Args:
        source (`str` or `Path`):
            A folder with `config.json` and weights, or the file of weights beside its `config.json`; see
            `find_weights`. Pickles are read with `weights_only=True`. The strings in the config are parsed, never run.
        output (`str` or `Path`): Folder to write; must not exist or be empty.

    Returns:
        The config of the written model.

    Raises:
        ValueError: The config cannot be understood, or a tensor has no place in the model or is missing.
        OSError: A file is missing or damaged.
    """
    weights = find_weights(source)
    settings = weights.parent / "config.json"
    if not settings.is_file():
        raise OSError(f"{weights.parent}: no config.json beside the weights")
    state = read_weights(weights)
    with built_from(settings):
        config = lgvit_config(read_json(settings))
        model = BY_BACKBONE[kind_of(config)](config)
    load_strictly(model, state, from_lgvit(config), weights)
    write_model(model, output, weights)
    return config


def lgvit_config(settings: dict[str, Any]) -> HighwayConfig:
    """The config of an original LGViT model as ours.

    Args:
        settings (`dict`): The content of its `config.json`.

    Raises:
        ValueError: Naming the field, its value and what it may be.

    Example:

        >>> original = {"backbone": "ViT", "position_exits": "[4, 8]", "highway_type": "LGViT", "threshold": 0.9}
        >>> config = lgvit_config(original)
        >>> config.exits
        (Exit(after=4, head='conv1_1'), Exit(after=8, head='attention_r2'))
        >>> config.exit_policy
        {'name': 'entropy', 'threshold': 0.9}
    """
    is_swin = "depths" in settings
    plain = {key: value for key, value in settings.items() if key not in LGVIT_ONLY}
    highway_type, backbone = settings.get("highway_type", "linear"), settings.get("backbone", "ViT")
    if is_swin:
        config_class: type[HighwayConfig] = SwinHighwayConfig
        positions = _swin_positions(settings.get("position_exits"), settings["depths"])
    elif backbone in ("ViT", "DeiT"):
        config_class = ViTHighwayConfig if backbone == "ViT" else DeiTHighwayConfig
        positions = parse_positions(settings.get("position_exits"))
        plain.setdefault("layer_norm_eps", 1e-12)
    else:
        raise ValueError(f"backbone: {backbone!r} must be 'ViT' or 'DeiT'")
    return config_class(
        exit_positions=positions,
        exit_types="lgvit" if highway_type == "LGViT" else highway_type,
        exit_policy=_lgvit_policy(settings, len(positions), is_swin),
        exit_loss_weights="depth" if "weighted" in str(settings.get("train_strategy")) else "uniform",
        **plain,
    )


def parse_positions(text: Any) -> list[Any]:
    """`position_exits` of an LGViT config, a list or a string such as `"[4, 5, 6]"`, as a list; nothing is executed.

    Example:

        >>> parse_positions("[[],[2],[3,6]]")
        [[], [2], [3, 6]]
        >>> parse_positions("__import__('os').getcwd()")
        Traceback (most recent call last):
        ...
        ValueError: position_exits: "__import__('os').getcwd()" must be a list of block numbers such as "[4, 5, 6]"
    """
    value = text
    if isinstance(text, str) and re.fullmatch(r"[\[\]\d,\s]{1,1000}", text):
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            value = None
    parts = value if isinstance(value, list) else [None]
    # a boolean is an int, and no block number
    if not all(type(entry) is int for part in parts for entry in (part if isinstance(part, list) else [part])):
        raise ValueError(f'position_exits: {text!r} must be a list of block numbers such as "[4, 5, 6]"')
    return parts


def _swin_positions(text: Any, depths: list[int]) -> list[int]:
    stages = parse_positions(text)
    if len(stages) != len(depths) or not all(isinstance(stage, list) for stage in stages):
        raise ValueError(f"position_exits: {text!r} must have one list for each of the {len(depths)} stages")
    return [sum(depths[:stage]) + position for stage, positions in enumerate(stages) for position in positions]


def _lgvit_policy(settings: dict[str, Any], num_exits: int, is_swin: bool) -> dict[str, Any]:
    strategy = settings.get("exit_strategy", "confidence" if is_swin else "entropy")
    threshold: Any = settings.get("threshold")
    if threshold is None:
        threshold = {
            "confidence": 0.75 if is_swin else 0.865,
            "entropy": 0.65 if is_swin else 0.6,
            "patience": 3 if is_swin else 7,
        }.get(str(strategy))
    if strategy in ("confidence", "entropy"):
        return {"name": strategy, "threshold": threshold}
    if strategy == "patience":
        return {"name": "patience", "patience": threshold[0] if isinstance(threshold, list) else threshold}
    if strategy == "patient_and_confident":
        values = threshold if isinstance(threshold, list) else [0.8 if is_swin else 0.5] * num_exits + [2]
        return {"name": "patience_confidence", "threshold": values[:-1], "patience": values[-1]}
    if strategy == "confidence_and_entropy":
        raise ValueError(
            "exit_strategy: 'confidence_and_entropy' never exited early in LGViT; set it to 'confidence' and choose "
            "confidence_entropy with set_exit_policy afterwards"
        )
    raise ValueError(
        f"exit_strategy: {strategy!r} is unknown; known: confidence, entropy, patience, patient_and_confident"
    )
