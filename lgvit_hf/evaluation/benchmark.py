"""Wall-clock of a highway against its own backbone, in one interleaved run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine import run_early
from ..policies import NeverPolicy
from ..segments import State


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 20, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, in rounds so that a slow moment of the machine hits all alike.

    The order within a round is shuffled (always in the same way), so that no run always finds another's warm caches.

    Example:

        >>> times = time_interleaved({"a": lambda: None, "b": lambda: None}, repeats=3, warm_up=1)
        >>> len(times["a"])
        3
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs.items()), random.Random(0).shuffle
    for round_number in range(warm_up + repeats):
        shuffle(order)
        for name, run in order:
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def wall_clock_speed_up(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    repeats: int = 5,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """How much faster the highway answers `batches` under its policy than the head-free backbone does.

    Each batch is run by both, in turn, `repeats` times; the medians are summed.

    Args:
        model (`PreTrainedModel`): A highway; run in `eval()` mode.
        batches (`Sequence[Tensor]`): `pixel_values`, real images, since what leaves depends on them.
        repeats (`int`, *optional*, defaults to 5): Timed rounds per batch.
        progress (callable, *optional*): Wraps the batches, to show progress.

    Returns:
        `early_exit_seconds`, `backbone_seconds`, and their ratio `wall_clock_speed_up`.
    """
    was_training = model.training
    model.eval()
    segments, never = model.segments(), NeverPolicy()
    total = {"early_exit": 0.0, "backbone": 0.0}
    for pixels in progress(batches):
        state = State({"pixel_values": pixels.to(model.device, model.dtype)})
        runs = {
            "early_exit": lambda state=state: run_early(segments, state, model.exit_policy),
            "backbone": lambda state=state: run_early(segments, state, never),
        }
        for name, seconds in time_interleaved(runs, repeats=repeats, warm_up=1).items():
            total[name] += statistics.median(seconds)
    model.train(was_training)
    return {
        "early_exit_seconds": total["early_exit"],
        "backbone_seconds": total["backbone"],
        "wall_clock_speed_up": total["backbone"] / total["early_exit"],
    }
