"""Other projects' files: found, read without running anything in them, and said to be damaged where they are."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
INDEX = ".index.json"
# as transformers calls the weights, the best to have first
NAMES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
# where a training checkpoint keeps its weights
WRAPPERS = ("model", "state_dict", "model_state_dict")


def find_weights(source: str | Path) -> Path:
    """The file of weights that a user means: the file itself, or the one in a folder.

    Args:
        source (`str` or `Path`):
            A `.safetensors`, `.bin`, `.pth` or `.pt` file, an `.index.json` of several, or a folder with
            `model.safetensors`, `pytorch_model.bin`, the index of one of these, or one other such file.

    Raises:
        OSError: There is none, or there are several.
    """
    source = Path(source)
    if source.is_dir():
        known = [source / name for name in NAMES if (source / name).is_file()]
        others = sorted(file for file in source.iterdir() if file.is_file() and file.suffix in SUFFIXES)
        found = known[:1] or others
        if len(found) > 1:
            raise OSError(f"{source}: {len(found)} files of weights ({', '.join(f.name for f in found)}); name one")
    else:
        found = [source] if source.is_file() else []
        if found and source.suffix not in SUFFIXES and not source.name.endswith(INDEX):
            raise OSError(f"{source}: not a file of weights; {', '.join(SUFFIXES)} and {INDEX} files are read")
    if not found:
        raise OSError(
            f"{source}: no weights there (no model.safetensors or pytorch_model.bin, nor one other "
            f"{', '.join(SUFFIXES)} file)"
        )
    return found[0]


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; of all the files that an index names, which must stand beside it.

    Raises:
        OSError: A file is missing or damaged, or a pickle that holds more than tensors and plain values.
        ValueError: There are no tensors by name in it, or an index leads out of its folder.
    """
    if file.name.endswith(INDEX):
        return _read_shards(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # a training checkpoint often holds the options of its run, a bag of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        whole = "" if file.suffix == ".safetensors" else ", or a pickle that holds more than tensors and is not run"
        hint = "; where you trust it, save model.state_dict() as safetensors" if whole else ""
        raise OSError(f"{file}: damaged{whole}{hint}") from error
    state = content
    if isinstance(content, dict):
        state = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        wrappers = ", ".join(map(repr, WRAPPERS))
        raise ValueError(f"{file}: not a state dict (names to tensors), nor one under {wrappers}")
    return {str(name): tensor for name, tensor in state.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: no 'weight_map' of tensors to files")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        file = index.parent / shard
        if Path(shard).name != shard or file.suffix not in SUFFIXES:
            raise ValueError(f"{index}: {shard!r} must be the name of a file of weights in this folder")
        if not file.is_file():
            raise OSError(f"{index}: {shard} is not there")
        # the Hub's cache is made of links from `snapshots/<commit>` to `blobs`
        if file.resolve().parent not in (index.parent.resolve(), (index.parent / "../../blobs").resolve()):
            raise ValueError(f"{index}: {shard} leads out of the folder")
        state |= read_weights(file)
    odd = sorted(places.keys() ^ state.keys())
    if odd:
        raise ValueError(f"{index}: {len(odd)} tensors are only in it or only in its files ({in_short(odd)})")
    return state


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: Not JSON, or no object.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OSError(f"{file}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise OSError(f"{file}: not a JSON object")
    return settings


def read_if_there(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    return read_json(file) if file.is_file() else {}


def in_short(names: list[str], most: int = 8) -> str:
    """A list of names for an error message.

    Example:

        >>> in_short(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
