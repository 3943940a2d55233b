"""Chains of `nn.Sequential` cut between their children, which are called as they are; and what a piece is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .segments import State

PIXELS, HIDDEN, LOGITS = "pixel_values", "hidden", "logits"


class Piece(Protocol):
    """What runs between two cuts."""

    def __call__(self, state: State) -> State:
        """From one cut to the next: `hidden`, which the exit there reads, and what else goes on; or the `logits`."""


def logits_of(answer: Any) -> Tensor:
    """The logits `[B, C]` among what a classifier returns.

    Raises:
        ValueError: There are none.
    """
    found = answer.get(LOGITS) if isinstance(answer, dict) else getattr(answer, LOGITS, answer)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ValueError(
            f"module: it returns {type(answer).__name__}{shape}; logits [batch, classes] are needed, as a tensor, the "
            "first of a tuple, or `logits` of an output"
        )
    return found


@dataclass
class ChainPiece:
    """Modules that run one after the other, called as they are.

    Args:
        modules (`tuple[nn.Module]`): In order.
        writes_input (`bool`): Whether one changes what it is given in place, which the exit before it still reads.
        ends (`bool`): Whether the logits come out.
    """

    modules: tuple[nn.Module, ...]
    writes_input: bool
    ends: bool

    def __call__(self, state: State) -> State:
        """Run the modules."""
        x = state[HIDDEN if HIDDEN in state.tensors else PIXELS]
        if self.writes_input:
            x = x.clone()
        for module in self.modules:
            x = module(x)
        return State({LOGITS: logits_of(x)} if self.ends else {HIDDEN: x})


def chain_of(module: nn.Module, after: Sequence[str]) -> list[tuple[nn.Module, ...]] | None:
    """The modules between cuts; `None` where a cut does not lie between children of `nn.Sequential`s.

    Raises:
        ValueError: The names are not in the order in which they run, or nothing runs after one.
    """
    links = _links(module, "", after)
    place = {name: index + 1 for index, (names, _) in enumerate(links) for name in names}
    if any(name not in place for name in after):
        return None
    for earlier, name in zip(after, after[1:], strict=False):
        if place[name] < place[earlier]:
            raise ValueError(wrong_order(name, earlier))
        if place[name] == place[earlier]:
            raise ValueError(one_place(name, earlier))
    if after and place[after[-1]] == len(links):
        raise ValueError(nothing_after(after[-1], [names[0] for names, _ in links[:-1]]))
    bounds = [0, *(place[name] for name in after), len(links)]
    return [tuple(link for _, link in links[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def _links(module: nn.Module, path: str, after: Sequence[str]) -> list[tuple[list[str], nn.Module]]:
    """Names and modules of a chain; a `Sequential` inside is taken apart where a cut lies within."""
    inside = not path or any(name.startswith(f"{path}.") for name in after)
    if not (inside and _is_sequential(module)):
        return [([path], module)]
    links = []
    for name, child in module.named_children():
        links += _links(child, f"{path}.{name}" if path else name, after)
    if path:
        # after its last child a `Sequential` is at its own end
        links[-1][0].append(path)
    return links


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) > 0


def chain_points(module: nn.Module, path: str = "") -> list[str]:
    """Names of all children of `nn.Sequential`s that are run one after the other."""
    if not _is_sequential(module):
        return [path] if path else []
    names: list[str] = []
    for name, child in module.named_children():
        inner = chain_points(child, f"{path}.{name}" if path else name)
        # after its last child a `Sequential` is at its own end
        names += [*inner[:-1], f"{path}.{name}" if path else name]
    return names if path else names[:-1]


def chain_pieces(chain: Sequence[tuple[nn.Module, ...]], images: Tensor) -> list[Piece] | None:
    """The pieces of a chain; `None` where anything but one tensor, batch first, crosses a cut."""
    pieces: list[Piece] = []
    x: Any = images
    for modules in chain:
        if not isinstance(x, Tensor) or not x.dim() or len(x) != len(images):
            return None
        writes, x = _tried(modules, x)
        pieces.append(ChainPiece(modules, writes, ends=len(pieces) + 1 == len(chain)))
    return pieces


@torch.no_grad()
def _tried(modules: Sequence[nn.Module], x: Tensor) -> tuple[bool, Any]:
    """Whether modules change what they are given in place, and what they give; their own statistics stay."""
    given = x.clone()
    twins, x = copy.deepcopy(nn.ModuleList(modules)), given
    with torch.random.fork_rng():
        for twin in twins:
            x = twin(x)
    return given._version > 0, x


def listed(names: Sequence[str]) -> str:
    """Names as an error shows them, the first dozen."""
    return ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")


def wrong_order(name: str, earlier: str) -> str:
    """The error of names that do not run in this order."""
    return f"after: {name!r} runs before {earlier!r}; name the places in the order in which they run"


def one_place(name: str, earlier: str) -> str:
    """The error of two names of one place."""
    return f"after: {earlier!r} and {name!r} are one place; name one of them"


def nothing_after(name: str, others: Sequence[str]) -> str:
    """The error of a place after which nothing is left to run."""
    return (
        f"after: {name!r} cannot be cut after: nothing but the answer is left after it; "
        f"places that can: {listed(others)}"
    )
