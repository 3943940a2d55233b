"""Keeping what modules give while a model runs: `hidden_states` and `attentions`, as transformers returns them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

# all, or the numbers of some, counted from the end where below 0; the others are `None` then
Selection = bool | int | Sequence[int]


def requested(config: PretrainedConfig, **asked: Selection | None) -> dict[str, Selection]:
    """Which of `hidden_states` and `attentions` are to be returned: what was asked for, or else what the config says.

    Example:

        >>> requested(PretrainedConfig(output_attentions=True), hidden_states=[0, -1], attentions=None)
        {'hidden_states': [0, -1], 'attentions': True}
    """
    said = {name: getattr(config, f"output_{name}") if ask is None else ask for name, ask in asked.items()}
    return {name: selection for name, selection in said.items() if selection}


@contextmanager
def recording(
    selections: dict[str, Selection], modules_of: Callable[[str], Sequence[nn.Module]]
) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """Keep what modules give while the model runs.

    Args:
        selections (`dict`): Of `requested`.
        modules_of (`Callable`): The modules that give the outputs of a name, in order; each runs once.

    Yields:
        By name what was kept; filled at the end.

    Example:

        >>> import torch
        >>> double, negate = nn.Upsample(scale_factor=2), nn.Softsign()
        >>> with recording({"hidden_states": [-1]}, lambda name: [double, negate]) as records:
        ...     _ = negate(double(torch.ones(1, 1, 1)))
        >>> records["hidden_states"]
        (None, tensor([[[0.5000, 0.5000]]]))
    """
    kept: dict[str, list[Any]] = {}
    hooks = []
    for name, selection in selections.items():
        modules = modules_of(name)
        kept[name] = [None] * len(modules)
        for place in _places(selection, len(modules)):
            hooks.append(modules[place].register_forward_hook(partial(_keep, name, kept[name], place)))
    records: dict[str, tuple[Tensor, ...]] = {}
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()
    records.update((name, tuple(outputs)) for name, outputs in kept.items())
    if "attentions" in records and all(attention is None for attention in records["attentions"]):
        logger.warning('attentions are only kept by attn_implementation="eager"; none are returned')
        records["attentions"] = ()


def _places(selection: Selection, number: int) -> set[int]:
    if isinstance(selection, bool):
        return set(range(number))
    places = [selection] if isinstance(selection, int) else selection
    return {place % number for place in places if -number <= place < number}


def _keep(name: str, kept: list[Any], place: int, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    """Forward hook: a module gives its state, or a tuple of its state and its attention weights."""
    if name == "attentions" and isinstance(output, tuple):
        kept[place] = output[1] if len(output) > 1 else None
    else:
        kept[place] = output[0] if isinstance(output, tuple) else output
