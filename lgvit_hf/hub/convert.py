"""Other projects' checkpoints as ours: every tensor is renamed or the conversion fails with the list."""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..configuration import DeiTHighwayConfig, HighwayConfig, SwinHighwayConfig, ViTHighwayConfig
from ..configuration_avit import AViTConfig
from ..files import replace_folder, write_json
from ..heads import lgvit_heads
from ..modeling_avit import AViT
from ..models import BY_BACKBONE

# settings of LGViT's config that are ours under another name, or that only its training code read
LGVIT_ONLY = (
    "num_early_exits position_exits highway_type backbone exit_strategy train_strategy threshold encoder_ensemble "
    "loss_coefficient homo_coefficient hete_coefficient homo_loss_coefficient hete_loss_coefficient "
    "feature_loss_coefficient train_highway architectures model_type transformers_version torch_dtype auto_map "
    "_name_or_path"
).split()

# original name inside one exit (regular expression) -> ours
LGVIT_HEAD_NAMES = [
    (r"mlp\.conv\.0\.", "body.conv."),
    (r"mlp\.conv\.2\.", "body.bn."),
    (r"mlp\.conv1\.0\.", "body.expand."),
    (r"mlp\.conv1\.2\.", "body.expand_bn."),
    (r"mlp\.proj_bn\.", "body.depthwise_bn."),
    (r"mlp\.conv2\.0\.", "body.project."),
    (r"mlp\.conv2\.1\.", "body.project_bn."),
    (r"mlp\.qkv\.", "body.qkv."),
    (r"mlp\.attention\.(query|key|value)\.", r"body.\1."),
    (r"mlp\.output\.dense\.", "body.proj."),
    (r"layer\.attention\.attention\.(query|key|value)\.", r"block.mix.\1."),
    (r"layer\.attention\.output\.dense\.", "block.mix.proj."),
    (r"layer\.intermediate\.dense\.", "block.widen."),
    (r"layer\.output\.dense\.", "block.narrow."),
    (r"layer\.layernorm_(before|after)\.", r"block.norm_\1."),
    (r"(?:classifier\.)?pooler\.dense\.", "dense."),
    (r"(?:classifier\.)?layernorm\.", "norm."),
    (r"(?:classifier\.)?distillation_classifier\.", "classifiers.1."),
    (r"(?:classifier\.)?(?:cls_)?classifier\.", "classifiers.0."),
]

# timm's name (regular expression) -> that of a checkpoint of transformers
AVIT_NAMES = [
    (r"cls_token", "backbone.embeddings.cls_token"),
    (r"dist_token", "backbone.embeddings.distillation_token"),
    (r"pos_embed", "backbone.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"backbone.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"backbone.encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.attn\.(query|key|value)\.(\w+)", r"backbone.encoder.layer.\1.attention.attention.\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"backbone.encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"backbone.encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"backbone.encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"backbone.encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"backbone.layernorm.\1"),
    (r"head\.(\w+)", r"classifiers.0.\1"),
    (r"head_dist\.(\w+)", r"classifiers.1.\1"),
]


def convert_lgvit(source: str | Path, output: str | Path) -> HighwayConfig:
    """Turn an original LGViT checkpoint into one of ours that gives the same logits at every exit.

    Args:
        source (`str` or `Path`):
            A folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, or the weights file beside its
            `config.json`. A `.bin` is read with `weights_only=True`. The strings in the config are parsed, never run.
        output (`str` or `Path`): Folder to write; must not exist or be empty.

    Returns:
        The config of the written model.

    Raises:
        ValueError: The config cannot be understood, or a tensor has no place in the model or is missing.
        OSError: A file is missing or damaged.
    """
    weights, config_file = _find_files(Path(source))
    config = lgvit_config(_read_json(config_file))
    rename = _swin_names(config) if isinstance(config, SwinHighwayConfig) else _vit_names(config)
    state, original_names = {}, {}
    for name, tensor in _read_weights(weights).items():
        renamed = rename(name)
        if renamed is not None:
            state[renamed], original_names[renamed] = tensor, name
    return _write(config, state, original_names, config_file.parent / "preprocessor_config.json", Path(output))


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
            A `.safetensors`, `.pth` or `.bin` file, or a folder with one of these. Pickles are read with
            `weights_only=True`; a training checkpoint's `"model"` is taken. A `config.json` beside it may say what
            weights do not, in the words of `AViTConfig`.
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
    weights = _find_weights(Path(source))
    config_file = weights.parent / "config.json"
    settings = _read_json(config_file) if config_file.is_file() else {}
    given = {"gate_scale": gate_scale, "gate_center": gate_center, "num_attention_heads": num_attention_heads}
    settings |= {key: value for key, value in given.items() if value is not None}
    settings = {**_gate_of_name(weights.stem), **settings}
    if not {"gate_scale", "gate_center"} <= set(settings):
        raise ValueError(
            f"{weights.name}: gate_scale and gate_center are not in the name (<size>-<scale>-<center>); give both "
            "--gate-scale and --gate-center, 10 and 30 for A-ViT-T, 10 and 75 for A-ViT-S"
        )
    state = _split_qkv(_read_checkpoint(weights))
    config = AViTConfig(**{**_avit_sizes(state), **settings})
    renamed = {_avit_name(name): tensor.contiguous().clone() for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(renamed, Path(folder) / "model.safetensors", {"format": "pt"})
        try:
            model, info = AViT.from_pretrained(folder, output_loading_info=True)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, weights.name)) from None
    unknown = sorted(name for name in state if _avit_name(name) in info["unexpected_keys"])
    if unknown:
        raise ValueError(
            f"{weights.name}: {len(unknown)} tensors have no place in the model ({', '.join(unknown[:5])})"
        )
    with replace_folder(output) as folder:
        model.save_pretrained(folder)
        processor = weights.parent / "preprocessor_config.json"
        if processor.is_file():
            write_json(folder / processor.name, _read_json(processor))
    return model.config


def _find_weights(source: Path) -> Path:
    suffixes = (".safetensors", ".pth", ".bin")
    found = [source] if source.is_file() else sorted(file for file in source.glob("*") if file.suffix in suffixes)
    if len(found) != 1 or found[0].suffix not in suffixes:
        raise OSError(f"{source}: {len(found) or 'no'} files of weights there; name one {', '.join(suffixes)} file")
    return found[0]


def _read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights in a file, which may be a training checkpoint with weights under `"model"`."""
    if file.suffix == ".safetensors":
        return _read_weights(file)
    try:
        # official checkpoints hold the options of their run, a bag of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise OSError(f"{file}: damaged, or a pickle that holds more than tensors and is not run") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: not a state dict (names to tensors), nor one under 'model'")
    return state


def _gate_of_name(name: str) -> dict[str, float]:
    """Scale and centre of the gate in the name of an official checkpoint, if they are.

    Example:

        >>> _gate_of_name("avit_tiny-10-30")
        {'gate_scale': 10.0, 'gate_center': 30.0}
    """
    match = re.fullmatch(r".*?-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", name)
    return {"gate_scale": float(match[1]), "gate_center": float(match[2])} if match else {}


def _avit_name(name: str) -> str:
    for pattern, ours in AVIT_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


def _split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as three tensors each."""
    split = {name: tensor for name, tensor in state.items() if ".attn.qkv." not in name}
    for name in state.keys() - split.keys():
        for part, tensor in zip(("query", "key", "value"), state[name].chunk(3), strict=True):
            split[name.replace(".qkv.", f".{part}.")] = tensor
    return split


def _avit_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of the config that the weights say."""
    try:
        width, channels, *patch = state["patch_embed.proj.weight"].shape
        distilled = "dist_token" in state
        num_patches = state["pos_embed"].shape[1] - (2 if distilled else 1)
        blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        intermediate, num_labels = len(state["blocks.0.mlp.fc1.weight"]), len(state["head.weight"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"no tensor {error} there: not a checkpoint of A-ViT with timm's names") from None
    side = math.isqrt(num_patches)
    return {
        "backbone": "deit" if distilled else "vit",
        "distilled": distilled,
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch[0],
        "image_size": side * patch[0],
        "num_hidden_layers": blocks,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": intermediate,
        "num_labels": num_labels,
        "qkv_bias": "blocks.0.attn.query.bias" in state,
        "layer_norm_eps": 1e-6,
    }


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
    highway_type = settings.get("highway_type", "linear")
    if is_swin:
        config_class = SwinHighwayConfig
        positions = _swin_positions(settings.get("position_exits"), settings["depths"])
        attention = ("attention_r1", "attention_r2")
    else:
        backbone = settings.get("backbone", "ViT")
        if backbone not in ("ViT", "DeiT"):
            raise ValueError(f"backbone: {backbone!r} must be 'ViT' or 'DeiT'")
        config_class = {"ViT": ViTHighwayConfig, "DeiT": DeiTHighwayConfig}[backbone]
        positions = parse_positions(settings.get("position_exits"))
        attention = ("attention_r2", "attention_r3")
        plain.setdefault("layer_norm_eps", 1e-12)
    types = lgvit_heads(len(positions), attention=attention) if highway_type == "LGViT" else highway_type
    return config_class(
        exit_positions=positions,
        exit_types=types,
        exit_policy=_lgvit_policy(settings, len(positions), is_swin),
        exit_loss_weights="depth" if "weighted" in str(settings.get("train_strategy")) else "uniform",
        **plain,
    )


def parse_positions(text: Any) -> list:
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
    flat = (
        [entry for part in value for entry in (part if isinstance(part, list) else [part])]
        if _is_list(value)
        else [None]
    )
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in flat):
        raise ValueError(f'position_exits: {text!r} must be a list of block numbers such as "[4, 5, 6]"')
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _swin_positions(text: Any, depths: list[int]) -> list[int]:
    stages = parse_positions(text)
    if len(stages) != len(depths) or not all(_is_list(stage) for stage in stages):
        raise ValueError(f"position_exits: {text!r} must have one list for each of the {len(depths)} stages")
    return [sum(depths[:stage]) + position for stage, positions in enumerate(stages) for position in positions]


def _lgvit_policy(settings: dict[str, Any], num_exits: int, is_swin: bool) -> dict[str, Any]:
    strategy = settings.get("exit_strategy", "confidence" if is_swin else "entropy")
    threshold = settings.get("threshold")
    if strategy in ("confidence", "entropy"):
        defaults = {"confidence": 0.75, "entropy": 0.65} if is_swin else {"confidence": 0.865, "entropy": 0.6}
        return {"name": strategy, "threshold": defaults[strategy] if threshold is None else threshold}
    if strategy == "patience":
        patience = (3 if is_swin else 7) if threshold is None else threshold
        return {"name": "patience", "patience": patience[0] if _is_list(patience) else patience}
    if strategy == "patient_and_confident":
        values = threshold if _is_list(threshold) else [0.8 if is_swin else 0.5] * num_exits + [2]
        return {"name": "patience_confidence", "threshold": values[:-1], "patience": values[-1]}
    if strategy == "confidence_and_entropy":
        raise ValueError(
            "exit_strategy: 'confidence_and_entropy' never left early in LGViT; set it to 'confidence' and choose "
            "confidence_entropy with set_exit_policy afterwards"
        )
    raise ValueError(
        f"exit_strategy: {strategy!r} is unknown; known: confidence, entropy, patience, patient_and_confident"
    )


def _head_name(rest: str) -> str | None:
    for pattern, ours in LGVIT_HEAD_NAMES:
        name, count = re.subn(f"^{pattern}", ours, rest)
        if count:
            return name
    return None


def _vit_names(config: HighwayConfig) -> Callable[[str], str | None]:
    prefix = "deit" if isinstance(config, DeiTHighwayConfig) else "vit"

    def rename(name: str) -> str | None:
        if name.startswith("deit.pooler."):
            return None  # LGViT built the pooler and never used it
        if match := re.fullmatch(r"deit\.encoder\.highway\.(\d+)\.(.+)", name):
            exit_index, rest = int(match[1]), match[2]
            # the attention heads call their last layer what conv1_1 calls its depth-wise convolution
            if rest.startswith("mlp.proj."):
                is_conv = config.exit_types[min(exit_index, len(config.exit_types) - 1)] == "conv1_1"
                return f"exits.{exit_index}.body.{'depthwise' if is_conv else 'proj'}.{rest.removeprefix('mlp.proj.')}"
            ours = _head_name(rest)
            return f"exits.{exit_index}.{ours}" if ours else name
        return re.sub(r"^deit\.", f"{prefix}.", name)

    return rename


def _swin_names(config: SwinHighwayConfig) -> Callable[[str], str | None]:
    exit_of = {}
    for exit_index, exit in enumerate(config.exits):
        stage = config.stage_of(exit.after)
        exit_of[stage, sum(key[0] == stage for key in exit_of)] = exit_index

    def rename(name: str) -> str | None:
        if re.match(r"layernorm\.", name):
            return None  # LGViT's stage two added a norm of its own by mistake
        if match := re.fullmatch(r"swin\.encoder\.layers\.(\d+)\.highway\.(\d+)\.(.+)", name):
            exit_index, rest = exit_of.get((int(match[1]), int(match[2]))), match[3]
            if exit_index is None:
                return name
            if rest.startswith("mlp.proj."):
                is_conv = config.exit_types[exit_index] == "conv1_1"
                return f"exits.{exit_index}.body.{'depthwise' if is_conv else 'proj'}.{rest.removeprefix('mlp.proj.')}"
            ours = _head_name(rest)
            return f"exits.{exit_index}.{ours}" if ours else name
        return name

    return rename


def _find_files(source: Path) -> tuple[Path, Path]:
    folder = source if source.is_dir() else source.parent
    candidates = [source] if source.is_file() else [folder / "model.safetensors", folder / "pytorch_model.bin"]
    weights = next((file for file in candidates if file.is_file()), None)
    if weights is None or weights.suffix not in (".safetensors", ".bin"):
        raise OSError(f"{source}: no model.safetensors or pytorch_model.bin there")
    config = folder / "config.json"
    if not config.is_file():
        raise OSError(f"{folder}: no config.json beside the weights")
    return weights, config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{file}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise OSError(f"{file}: not a JSON object")
    return settings


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise OSError(f"{file}: damaged, or a pickle that holds more than tensors and is not run") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: not a state dict (names to tensors)")
    return state


def _write(
    config: HighwayConfig, state: dict[str, Tensor], original_names: dict[str, str], processor: Path, output: Path
) -> HighwayConfig:
    """Load `state` (checkpoint names of transformers 4) strictly and save it as a model of `config`.

    The settings of the image processor, where there are any, go with it.
    """
    model_class = BY_BACKBONE[config.model_type.removesuffix("_highway")]
    for name in [name for name in state if name.endswith(".running_var")]:
        # some exporters leave out the batch counters, which nothing here reads
        state.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file, {"format": "pt"})
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
    unknown = sorted(
        original_names.get(key, key) for key in info["unexpected_keys"] if not key.endswith("relative_position_index")
    )
    exits = sorted(key for key in info["missing_keys"] if key.startswith("exits."))
    if unknown or exits:
        raise ValueError(
            f"{len(unknown)} tensors have no place in the model ({', '.join(unknown[:5]) or 'none'}), "
            f"{len(exits)} tensors of exits are missing ({', '.join(exits[:5]) or 'none'})"
        )
    with replace_folder(output) as folder:
        model.save_pretrained(folder)
        if processor.is_file():
            write_json(folder / processor.name, _read_json(processor))
    return model.config
