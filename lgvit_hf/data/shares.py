"""Samples shared out over the processes of `torch.distributed`, and what each found put together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def share(count: int, rank: int, num_processes: int) -> range:
    """Numbers of the samples of one process: all of them once, in order, as evenly as can be.

    Raises:
        ValueError: There are fewer samples than processes.

    Example:

        >>> [list(share(5, rank, 2)) for rank in range(2)]
        [[0, 1], [2, 3, 4]]
    """
    if count < num_processes:
        raise ValueError(f"{count} samples for {num_processes} processes: start at most {count}")
    return range(rank * count // num_processes, (rank + 1) * count // num_processes)


def own_share(count: int) -> range:
    """`share` of this process, of those in `torch.distributed`'s group."""
    return share(count, dist.get_rank(), dist.get_world_size())


def gather(found: Tensor, count: int) -> Tensor:
    """What all processes found, `[count, ...]` on the CPU, in each of them.

    Args:
        found (`Tensor`): `[n, ...]`, of the `n` samples of `own_share`; of one dtype and shape in every process.
        count (`int`): Samples of all.
    """
    shares = [share(count, rank, dist.get_world_size()) for rank in range(dist.get_world_size())]
    # shares differ by one sample at most, and this takes tensors of one size
    padded = found.new_zeros(max(map(len, shares)), *found.shape[1:], device=_device())
    padded[: len(found)] = found
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([part[: len(numbers)] for part, numbers in zip(parts, shares, strict=True)]).cpu()


def _device() -> str:
    """NCCL takes nothing that is not on its device."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
