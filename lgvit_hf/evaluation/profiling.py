"""What a highway is made of: depth, MACs, parameters and time of each part, and the memory that a run takes."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..segments import Segment, State
from .costs import Costs, Highway, count_macs, export_of
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
) -> list[dict[str, Any]]:
    """Depth, MACs, parameters and milliseconds of the stem, each block and each head, in the order they are run.

    Of an exported highway, of each segment with its head, since they are one file; its parameters are `None`.
    """
    exported = export_of(model)
    if exported is not None:
        return _profile_of_segments(segments, exported.macs, walks)
    state, rows = State({"pixel_values": image}), []
    for index, (segment, head) in enumerate(zip(segments, heads, strict=True)):
        first = segment.depth - len(segment.blocks) + 1
        for number, block in enumerate(segment.blocks):
            macs = count_macs([Segment(first + number, (block,), lambda state: None)], state).backbone_costs[0]
            state, parameters = _parameters_called(model, partial(block, state))
            ms = _medians_ms(walks, lambda walk, index=index, number=number: walk.blocks[index][number])
            part = "block" if first + number else "stem"
            rows.append({"part": part, "depth": first + number, "macs": macs, "parameters": parameters, "ms": ms})
        macs = count_macs([Segment(segment.depth, (), segment.answer)], state).heads[0]
        _, parameters = _parameters_called(model, partial(segment.answer, state))
        ms = _medians_ms(walks, lambda walk, index=index: walk.heads[index])
        part = head if head == "final" else f"exit {index}, {head}"
        rows.append({"part": part, "depth": segment.depth, "macs": macs, "parameters": parameters, "ms": ms})
    return rows


def _profile_of_segments(
    segments: Sequence[Segment], macs: Costs, walks: dict[int, Sequence[PartTimes]]
) -> list[dict[str, Any]]:
    return [
        {
            "part": f"segment {index}",
            "depth": segment.depth,
            "macs": macs.backbone_costs[index] + macs.heads[index],
            "parameters": None,
            "ms": _medians_ms(walks, lambda walk, index=index: sum(walk.blocks[index]) + walk.heads[index]),
        }
        for index, segment in enumerate(segments)
    ]


def _medians_ms(walks: dict[int, Sequence[PartTimes]], part: Callable[[PartTimes], float]) -> dict[str, float]:
    return {str(size): 1e3 * statistics.median(map(part, some)) for size, some in walks.items()}


def _parameters_called(model: Highway, run: Callable[[], Any]) -> tuple[Any, int]:
    """What a run gives, and how many parameters the modules have that it calls, or its operations are given."""
    called = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()]
    try:
        with _Parameters() as given:
            result = run()
    finally:
        for hook in hooks:
            hook.remove()
    own = {parameter for module in called for parameter in module.parameters(recurse=False)} | given.found
    return result, sum(parameter.numel() for parameter in own)


def parameters_by_part(model: Highway, profile: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How many parameters each part has, by a `profile`; those of heads in a list, and of all parts together.

    `None` of an exported highway, whose files do not tell weights from other numbers.
    """
    if export_of(model) is not None:
        return None

    def of(*parts: str) -> int:
        return sum(row["parameters"] for row in profile if row["part"] in parts)

    heads = [row["parameters"] for row in profile if row["part"].startswith("exit")]
    return {
        "stem": of("stem"),
        "blocks": of("block"),
        "final": of("final"),
        "heads": heads,
        "total": model.num_parameters(),
    }


class _Parameters(TorchDispatchMode):
    """Follows which parameters operations are given; a traced module runs without calling any module."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[nn.Parameter] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.update(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))


class _LiveTensors(TorchDispatchMode):
    """Follows how many bytes of tensors that were made under it are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakSet = weakref.WeakSet()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        run()
    return live.peak
