"""Cutting any module into pieces: chains of `nn.Sequential` as they are, other modules as `torch.export` sees them.

A piece takes a `State` to the next cut. Nothing is taken on trust: pieces are run against the module.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .graph_split import trace, traced_pieces
from .segments import State
from .sequential_split import HIDDEN, LOGITS, PIXELS, Piece, chain_of, chain_pieces, chain_points, logits_of


def cut(module: nn.Module, after: Sequence[str], images: Tensor) -> list[Piece]:
    """Cut a module after some of its submodules.

    Args:
        module (`nn.Module`): Takes images and gives logits, a tuple of which they are the first, or an output that has
            `logits`. Cut as it is: in `train()` mode for training.
        after (`Sequence[str]`): Names of submodules, in the order in which they run.
        images (`Tensor`): `[2 or more, C, H, W]`, of the size, dtype and device that the pieces will run on.

    Returns:
        One piece more than `after`.

    Raises:
        ValueError: A name that is not there, or a place that cannot be cut: with the obstacle and places that can.
    """
    _check_names(module, after)
    chain = chain_of(module, after)
    pieces = None if chain is None else chain_pieces(chain, images)
    return traced_pieces(module, after, images) if pieces is None else pieces


def cut_points(module: nn.Module, images: Tensor) -> list[str]:
    """Names of the submodules after which a module can be cut, in the order in which they run.

    Where several names mean one place, the shortest stands for it.
    """
    try:
        traced = trace(module, images)
    except ValueError:
        return chain_points(module)
    return [name for name in traced.shortest() if traced.obstacle(name) is None]


@torch.no_grad()
def proven_pieces(module: nn.Module, after: Sequence[str], images: Tensor) -> tuple[list[Piece], list[list[int]], int]:
    """The pieces of a module, run against it with samples that exit and move; what exits read; the classes."""
    name = type(module).__name__
    try:
        answer = module(images)
    # the user's code may raise anything
    except Exception as error:
        raise ValueError(
            f"example: {name} does not take {tuple(images.shape)} ({type(error).__name__}: {error})"
        ) from error
    expected = logits_of(answer)
    if len(expected) != len(images):
        raise ValueError(
            f"module: {len(images)} images give logits of shape {tuple(expected.shape)}, not one per image"
        )
    if not expected.isfinite().all():
        raise ValueError(
            f"module: {name} answers NaN or infinity in eval() mode (asked for your example and for random "
            "images of mean 0 and standard deviation 1)"
        )
    alone = logits_of(module(images[:1]))
    if not _same(alone, expected[:1]):
        raise ValueError(
            f"module: {name} answers an image otherwise where it is alone, in eval() mode: samples that exit "
            "would change the answers of those that stay (statistics of the batch?)"
        )
    pieces, shapes = cut(module, after, images), []
    state, samples = State({PIXELS: images}), torch.arange(len(images), device=images.device)
    for index, piece in enumerate(pieces):
        state = piece(state)
        if index < len(after):
            shapes.append(list(state[HIDDEN].shape[1:]))
            # the last one exits, the others change places; then these do, at every cut
            order = torch.arange(2 if index == 0 else len(samples), device=images.device).flip(0)
            state, samples = state.select(order), samples[order]
    if not _same(state[LOGITS], expected[samples]):
        raise ValueError(
            f"after: cut after {list(after)}, {name} gives other answers for samples that others have exited "
            "after; what crosses a cut depends on the batch"
        )
    return pieces, shapes, expected.shape[1]


def _same(ours: Tensor, expected: Tensor) -> bool:
    if ours.shape != expected.shape:
        return False
    tolerance = 100 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    return bool((ours - expected).abs().max() <= tolerance)


def _check_names(module: nn.Module, after: Sequence[str]) -> None:
    known = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for name in after:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"after: {type(module).__name__} has no submodule {name!r}; {hint}"
                "HighwayWrapper.cut_points(module, example) lists the places that can be cut"
            )
    double = [name for index, name in enumerate(after) if name in after[:index]]
    if double:
        raise ValueError(f"after: {double[0]!r} is named twice")
