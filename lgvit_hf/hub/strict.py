"""Every tensor of a checkpoint gets its place in a model, or the conversion fails with the list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from ..files import replace_folder, write_json
from ..pretrained import RECOMPUTED, name_conversions
from .reading import in_short, read_if_there

PROCESSOR = "preprocessor_config.json"
Rename = Callable[[str], str | None]
Name = TypeVar("Name", bound=str | None)


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    r"""A tensor's name in another project: its module by a table of regular expressions; as it is if it is in none.

    Example:

        >>> renamed("blocks.3.norm1.bias", [(r"blocks\.(\d+)\.norm1", r"layer.\1.layernorm_before")])
        'layer.3.layernorm_before.bias'
    """
    for pattern, ours in table:
        if match := re.fullmatch(rf"(?:{pattern})(?P<leaf>\.\w+)?", name):
            return match.expand(ours) + (match["leaf"] or "")
    return name


def by_module(table: Mapping[str, str], otherwise: Callable[[str], Name]) -> Callable[[str], str | Name]:
    """Renames the modules of a table, and any other tensor `otherwise`."""

    def rename(name: str) -> str | Name:
        module, _, leaf = name.rpartition(".")
        return f"{table[module]}.{leaf}" if module in table else otherwise(name)

    return rename


def split_fused(state: dict[str, Tensor], fused: str) -> dict[str, Tensor]:
    """Query, key and value, of which some projects make one tensor, as three.

    Args:
        state (`dict[str, Tensor]`): By name.
        fused (`str`): What in a name says that it is such a tensor, as `".qkv."`; `query` and so on take its place.

    Example:

        >>> import torch
        >>> sorted(split_fused({"attn.qkv.bias": torch.zeros(6)}, "qkv"))
        ['attn.key.bias', 'attn.query.bias', 'attn.value.bias']
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if fused not in name:
            split[name] = tensor
            continue
        if tensor.dim() == 0 or len(tensor) % 3:
            raise ValueError(f"{name}: {list(tensor.shape)} is not as many rows for each of query, key and value")
        for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            split[name.replace(fused, part)] = rows
    return split


@contextmanager
def built_from(file: Path) -> Iterator[None]:
    """While a model is built from the settings in a file: whatever is wrong with them is a `ValueError` that names it.

    Settings of others may be anything, and what the classes of transformers raise about them is as various.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:
        raise ValueError(
            f"{file}: no model can be built of these settings ({type(error).__name__}: {error})"
        ) from error


def load_strictly(model: PreTrainedModel, state: dict[str, Tensor], rename: Rename, source: Path) -> None:
    """Fill a model with a checkpoint of which each tensor must have a place, of its shape; and each place a tensor.

    The model gets the dtype of the checkpoint. Buffers that are made rather than learned may be missing.

    Args:
        model (`PreTrainedModel`): Any, with random weights.
        state (`dict[str, Tensor]`): By the original names.
        rename (`Callable`):
            Original name to what transformers 4 calls it in a file; `None` for one that nothing computes with.
        source (`Path`): What an error names.

    Raises:
        ValueError: With the tensors that have no place, another shape, or are missing.
    """
    places, conversions = model.state_dict(), name_conversions(model)
    found: dict[str, Tensor] = {}
    unknown, misshapen = [], []
    for name, tensor in state.items():
        ours = rename(name)
        if ours is None or (ours.endswith(RECOMPUTED) and ours not in places):
            continue
        # transformers 5 has other names in its modules than in files
        for conversion in [] if ours in places else conversions:
            ours, _ = conversion.rename_source_key(ours)
        if ours not in places or ours in found:
            unknown.append(name)
        elif places[ours].shape != tensor.shape:
            misshapen.append(f"{name}: {list(tensor.shape)}, not {list(places[ours].shape)}")
            found[ours] = places[ours]
        else:
            found[ours] = tensor
    missing = sorted(name for name in places.keys() - found.keys() if not name.endswith(RECOMPUTED))
    wrong = [
        f"{len(names)} tensors {what} ({in_short(sorted(names))})"
        for names, what in (
            (unknown, "have no place in the model"),
            (missing, "are missing"),
            (misshapen, "have another shape"),
        )
        if names
    ]
    if wrong:
        raise ValueError(f"{source}: {'; '.join(wrong)}")
    floating = {tensor.dtype for tensor in found.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())  # type: ignore[arg-type]  # a decorator hides its arguments
    model.load_state_dict(found, strict=False)


def write_model(
    model: PreTrainedModel, output: str | Path, weights: Path, processor: dict[str, Any] | None = None
) -> None:
    """Save a model, and the settings of its image processor: those beside the weights, or else those given.

    Raises:
        ValueError: The folder is in use.
    """
    processor = read_if_there(weights.parent / PROCESSOR) or processor
    with replace_folder(output) as folder:
        model.eval().save_pretrained(folder)
        if processor is not None:
            write_json(folder / PROCESSOR, processor)
