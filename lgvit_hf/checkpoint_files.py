"""What may lie in the folder of a checkpoint: safetensors alone, and a config that leads nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .files import leads_out

NO_OTHER_WEIGHTS = "weights are read from model.safetensors or by its index, from no other file; leave it out"
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


class WrongShape(ValueError, RuntimeError):
    """A tensor of a file has not the shape that the config asks for; a `RuntimeError` too, which upstream raises."""


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where a checkpoint is found."""
    return {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}


def check_files(path: str | os.PathLike | None, hub: Mapping[str, Any] | None = None) -> None:
    """Refuse a checkpoint whose weights are a pickle, or whose config or index leads to other files.

    Args:
        path (`str` or path, *optional*): Folder or Hub id.
        hub (`dict`, *optional*): As `hub_arguments` gives them.

    Raises:
        OSError: There are only pickles.
        ValueError: A file names weights elsewhere, or is no JSON.
    """
    if path is None:
        return
    folder = Path(path) / (dict(hub or {}).get("subfolder") or "")
    if not Path(path).is_dir():
        settings, _ = PretrainedConfig.get_config_dict(path, **(hub or {}))
    elif (folder / "config.json").is_file():
        settings = _read_json(folder / "config.json")
    else:
        settings = {}
    if settings.get("transformers_weights") is not None:
        raise ValueError(f"{path}: transformers_weights in config.json: {NO_OTHER_WEIGHTS}")
    if not folder.is_dir():
        return
    # transformers would go on to the base model that such a file names, wherever that lies
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder}: adapter_config.json names a base model elsewhere: from_backbone(BASE, lora=FOLDER)"
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder}: only {pickles[0]}, a pickle that could run code, and no safetensors; save the model again "
            "with save_pretrained, or convert an original LGViT checkpoint with `lgvit convert --from lgvit`"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(_read_json(index)["weight_map"].values())
            stray = sorted(shard for shard in shards if not _is_shard(folder, shard))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weights: {error}") from error
        if stray:
            raise ValueError(
                f"{index}: {stray[0]!r} must be the name of a .safetensors file in this folder, and no link out of it"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON object: {error}") from error


def _is_shard(folder: Path, name: str) -> bool:
    # what is called otherwise upstream would open as a pickle
    return name.endswith(".safetensors") and Path(name).name == name and not leads_out(folder / name)
