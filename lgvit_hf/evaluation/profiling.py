"""What a highway is made of: depth, MACs, parameters and time of each part, and the memory that a run takes."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..segments import Segment, State
from .costs import Highway, count_macs, export_of
from .report_types import PartFigures
from .timing import PartTimes


def head_names(model: Highway) -> list[str]:
    """What each classifier of a highway computes; the backbone's own, where it is still there, is called `final`."""
    return [*model.config.exit_types, *([] if model.config.truncated else ["final"])]


def export_facts(model: Highway) -> dict[str, Any] | None:
    """`layout`, `precision`, `file_bytes` and `runtime` of an exported highway; `None` of a model of PyTorch."""
    exported = export_of(model)
    if exported is None:
        return None
    return {name: getattr(exported, name) for name in ("layout", "precision", "file_bytes", "runtime")}


def profile(
    model: Highway,
    segments: Sequence[Segment],
    heads: list[str],
    image: Tensor,
    walks: dict[int, Sequence[PartTimes]],
) -> list[PartFigures]:
    """Depth, MACs, parameters and milliseconds of the stem, each block and each head, in the order they are run.

    Of an exported highway, of each segment with its head, since they are one file; its parameters are `None`.
    """
    exported = export_of(model)
    state = State({"pixel_values": image})
    rows: list[PartFigures] = []

    def add(part: str, depth: int, macs: float, parameters: int | None, blocks: slice, head: bool) -> None:
        """A part of the segment at hand: some of its blocks, and perhaps its head."""
        ms = {}
        for size, some in walks.items():
            seconds = [sum(walk.blocks[index][blocks]) + head * walk.heads[index] for walk in some]
            ms[str(size)] = 1e3 * statistics.median(seconds)
        rows.append({"part": part, "depth": depth, "macs": macs, "parameters": parameters, "ms": ms})

    for index, (segment, name) in enumerate(zip(segments, heads, strict=True)):
        if exported is not None:
            macs = exported.macs.backbone_costs[index] + exported.macs.heads[index]
            add(f"segment {index}", segment.depth, macs, None, slice(None), head=True)
            continue
        first = segment.depth - len(segment.blocks) + 1
        for number, block in enumerate(segment.blocks):
            part = Segment(first + number, (block,), lambda state: torch.empty(0))
            macs = count_macs([part], state).backbone_costs[0]
            state, parameters = _parameters_given(partial(block, state))
            which = slice(number, number + 1)
            add("block" if first + number else "stem", first + number, macs, parameters, which, head=False)
        macs = count_macs([Segment(segment.depth, (), segment.answer)], state).heads[0]
        _, parameters = _parameters_given(partial(segment.answer, state))
        part_name = name if name == "final" else f"exit {index}, {name}"
        add(part_name, segment.depth, macs, parameters, slice(0), head=True)
    return rows


def _parameters_given(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a run gives, and how many parameters its operations are given."""
    with _Parameters() as given:
        result = run()
    return result, sum(parameter.numel() for parameter in given.found)


def parameters_by_part(model: Highway, profile: list[PartFigures]) -> dict[str, Any] | None:
    """How many parameters each part has, by a `profile`; those of heads in a list, and of all parts together.

    `None` of an exported highway, whose files do not tell weights from other numbers.
    """
    if export_of(model) is not None:
        return None

    def of(part: str) -> int:
        return sum(row["parameters"] or 0 for row in profile if row["part"] == part)

    heads = [row["parameters"] for row in profile if row["part"].startswith("exit")]
    parts = {"stem": of("stem"), "blocks": of("block"), "final": of("final")}
    return {**parts, "heads": heads, "total": cast("PreTrainedModel", model).num_parameters()}


class _Parameters(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch declares no types here
    """Follows which parameters operations are given; a traced module runs without calling any module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types here
        self.found: set[nn.Parameter] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.update(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch declares no types here
    """Follows how many bytes of tensors that were made under it are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types here
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # views and changes in place give storages that were there before
        self.known.update(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result).difference(self.known):
            self.known.add(storage)
            weakref.finalize(storage, self._add, -storage.nbytes())
            self._add(storage.nbytes())
        return result

    def _add(self, num_bytes: int) -> None:
        self.bytes += num_bytes
        self.peak = max(self.peak, self.bytes)


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes at a time that a run takes for tensors, beyond those that were there before.

    On CUDA as the allocator counts them, scratch space inside operations included; elsewhere that is not seen.

    Example:

        >>> peak_memory(lambda: (torch.zeros(10) + 1).sum(), torch.device("cpu"))
        80
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveTensors() as live:
        run()
    return int(live.peak)
