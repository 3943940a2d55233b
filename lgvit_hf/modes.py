"""A module that is used for a while, and afterwards is as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction


class HasModes(Protocol):
    """A module, or what stands for one, such as an exported highway."""

    training: bool

    def modules(self) -> Iterator[Any]:
        """Itself and what is inside."""

    def eval(self) -> Any:
        """Make it ready to answer."""


@contextmanager
def evaluating(module: HasModes) -> Iterator[None]:
    """A module in `eval()` mode, each of its submodules as before afterwards; also where what runs inside fails."""
    before = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in before:
            each.training = training


# in which a module may keep what it has made
CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def plain_tensors(device: torch.device) -> Iterator[None]:
    """As outside of all modes that a caller may be in, so that a trace holds none of them."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def twin(module: nn.Module) -> nn.Module:
    """A copy with the same weights and modes, and caches as new; the module itself where it cannot be copied."""
    if any("forward" in vars(each) for each in module.modules()):
        # a function that may call the module itself, not the copy
        return module
    tensors = [held for each in module.modules() for held in values_in(vars(each)) if isinstance(held, Tensor)]
    try:
        copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        pairs = list(zip(copied.modules(), module.modules(), strict=True))
        for each, original in pairs:
            # to and fro: that is how modules forget what they have made of their weights
            each.train(not original.training)
            each.train(original.training)
    # attributes may be anything, and `train` the user's own
    except Exception:
        return module
    for each, original in pairs:
        each.training = original.training
    return copied


def fill_shared_caches(module: nn.Module, images: Tensor) -> None:
    """Answer images for real, so that a cache of a function (`functools.lru_cache`) holds what a trace asks of it."""
    if not any(each.training for each in module.modules()):
        with torch.no_grad(), torch.random.fork_rng():
            twin(module)(images.clone())


def values_in(value: Any, known: set[int] | None = None) -> Iterator[Any]:
    """A value and all that dicts, lists, tuples and sets in it hold."""
    known = set() if known is None else known
    yield value
    if type(value) in (*CONTAINERS, tuple) and id(value) not in known:
        known.add(id(value))
        for inner in list(value.values() if isinstance(value, dict) else value):
            yield from values_in(inner, known)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """A module's attributes, and what dicts, lists and sets in them hold, as before."""
    held = [each for submodule in module.modules() for each in values_in(vars(submodule)) if type(each) in CONTAINERS]
    before = [(container, container.copy()) for container in held]
    try:
        yield
    finally:
        for container, content in before:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def gradients_kept(module: nn.Module) -> Iterator[None]:
    """Refuse a `torch.autograd.Function` while training: a trace keeps what it computes, but not its backward."""
    if not any(each.training for each in module.modules()):
        yield
        return
    kept = vars(torch.autograd.Function)["apply"]

    def apply(function: type, *given: Any, **settings: Any) -> Any:
        if function is CheckpointFunction or not function.__module__.startswith("torch."):
            hint = "; use_reentrant=False keeps it" if function is CheckpointFunction else ""
            raise TypeError(f"the backward of {function.__name__}, a torch.autograd.Function, would be lost{hint}")
        return kept.__get__(None, function)(*given, **settings)

    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010  (a type checker would object)
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", kept)  # noqa: B010
