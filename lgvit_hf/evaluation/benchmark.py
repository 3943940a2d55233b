"""Wall-clock of a highway against its own backbone, a static model and the ideal, in one interleaved run."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Samples, to_model
from ..data.processing import stack
from ..engine import run_early
from ..modes import evaluating
from ..policies import ExitPolicy, FixedPolicy, NeverPolicy
from ..segments import Segment, State
from .cost_table import CostTable, architecture, cost_table, machine, measured_sizes, timed_segments
from .costs import Costs, Highway, decides_inside, export_of
from .exit_table import ExitTable, collect
from .profiling import export_facts, head_names, parameters_by_part, peak_memory, profile
from .timing import PartTimes, time_interleaved, time_parts

_PERCENTILES = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}


@torch.no_grad()
def wall_clock_speed_up(
    model: Highway,
    batches: Sequence[Tensor],
    *,
    repeats: int = 5,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, float | None]:
    """How much faster the highway answers `batches` under its policy than the head-free backbone does.

    Each batch is run by both, in turn, `repeats` times; the medians are summed. The heads of exported segments cannot
    be left out: of such a highway the backbone is the same files, of which no sample exits. One exported file has no
    backbone to run.

    Args:
        model (`Highway`): Run in `eval()` mode.
        batches (`Sequence[Tensor]`): `pixel_values`, real images, since which samples exit depends on them.
        repeats (`int`, *optional*, defaults to 5): Timed rounds per batch.
        progress (callable, *optional*): Wraps the batches, to show progress.

    Returns:
        `early_exit_seconds`, `backbone_seconds`, and their ratio `wall_clock_speed_up`; the last two `None` of one
        exported file.
    """
    with evaluating(model):
        total: dict[str, float] = {}
        for pixels in progress(batches):
            runs = _runs_to_compare(model, to_model(pixels, model))
            for name, seconds in time_interleaved(runs, repeats=repeats, warm_up=1).items():
                total[name] = total.get(name, 0.0) + statistics.median(seconds)
    early, backbone = total["early_exit"], total.get("backbone")
    speed_up = None if backbone is None else backbone / early
    return {"early_exit_seconds": early, "backbone_seconds": backbone, "wall_clock_speed_up": speed_up}


def _runs_to_compare(model: Highway, pixels: Tensor) -> dict[str, Callable[[], Any]]:
    if decides_inside(model):
        return {"early_exit": partial(model, pixels)}
    segments, state = model.segments(), State({"pixel_values": pixels})
    policies = {"early_exit": model.answering_policy, "backbone": NeverPolicy()}
    return {name: partial(run_early, segments, state, policy) for name, policy in policies.items()}


@torch.no_grad()
def benchmark(
    model: Highway,
    images: Samples | Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    repeats: int = 3,
    limit: int = 256,
    table: ExitTable | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Time a highway under its policy against what else could be run, and say what each part of it costs.

    Batches of all sizes come in one shuffled run. Each is run in turn by the highway, by the head-free backbone, by
    the static model of equal accuracy (the shallowest exit that is as accurate on all samples as the highway), and
    part by part, which gives the cost table. The ideal is the time of the blocks and heads that each sample really
    runs, a sample's being its share of the whole batch's.

    The heads of exported segments cannot be left out: of such a highway the backbone and the static model run them
    too, and so does an exit that is skipped.

    Args:
        model (`Highway`):
            Of PyTorch, or an exported one of the layout `segments`; run in `eval()` mode on its device, with the
            threads that are set.
        images (`Dataset` or `Tensor`):
            Items `pixel_values` and perhaps `labels`, or pixels `[N, C, H, W]`. Real images: which samples exit
            depends on them. Without labels, the full model's answers stand for them.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 8, 32)`): Timed; only full batches are.
        repeats (`int`, *optional*, defaults to 3): Timed rounds per batch.
        limit (`int`, *optional*, defaults to 256): At most that many images, drawn at random, always the same.
        table (`ExitTable`, *optional*): On which accuracies are compared; by default of the images that are timed.
        progress (callable, *optional*): Wraps the batches, to show progress.

    Returns:
        A dict that JSON takes.

        - `batches`, one for each batch size, times in milliseconds of a batch: `early_exit`, `backbone` and `static`
          (`None` where no exit is as accurate) with p50, p95 and p99 of all runs as they were, and a mean of the
          batches' medians, each in relation to the backbone's at the same moment, by which speed-ups are counted;
          wall-clock speed-ups against the backbone beside the ratio of blocks; the ideal; the cost table's prediction.
        - `exits`: where samples exit, and the latency of single images that exit there, if batch size 1 is timed.
        - `accuracies`, `memory`, `parameters`, the `profile` of each block and head, `environment`, and the
          `cost_table`, which `CostTable(**cost_table)` takes.
        - `exported`: `layout`, `precision`, `file_bytes` and `runtime` of an exported highway, whose `memory` and
          `parameters` are not known (`None`), and whose `profile` is of each segment with its head.

    Raises:
        ValueError: A batch size is below 1 or above the number of images, or the model is exported in another layout.

    Example:

        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> config = ViTHighwayConfig(image_size=32, num_hidden_layers=3, hidden_size=24, intermediate_size=24)
        >>> report = benchmark(ViTHighway(config), torch.zeros(2, 3, 32, 32), batch_sizes=[2], repeats=1)
        >>> report["batches"][0]["batch_size"], sorted(report["batches"][0]["early_exit"])
        (2, ['images_per_second', 'mean_ms', 'p50_ms', 'p95_ms', 'p99_ms'])
    """
    items = random_items(images, limit)
    sizes = measured_sizes(batch_sizes, len(items))
    with evaluating(model):
        segments, policy = timed_segments(model), model.exit_policy
        table = table or collect(model, items, batch_size=sizes[-1])
        accuracies = _accuracy(table, policy)
        policies: dict[str, ExitPolicy] = {"early_exit": model.answering_policy, "backbone": NeverPolicy()}
        if accuracies["static_exit"] is not None:
            policies["static"] = FixedPolicy(accuracies["static_exit"])
        pixels = to_model(stack(items)["pixel_values"], model)
        timings = _time_all(segments, policies, pixels, sizes, set(batch_sizes), repeats, progress)
        walks = {size: timing.steady_walks() for size, timing in timings.items()}
        costs = cost_table(model, walks)
        evaluated = [index for index in range(len(segments) - 1) if not policy.skips(index)]
        depths = [segment.depth for segment in segments]
        heads = head_names(model)
        parts = profile(model, segments, heads, pixels[:1], {size: walks[size] for size in (1, sizes[-1])})
        return {
            "environment": _environment(model, policy, repeats, len(items)),
            "accuracies": accuracies,
            "batches": [
                _of_batches(size, timings[size], depths, costs, evaluated) for size in sorted(set(batch_sizes))
            ],
            "exits": _of_exits(depths, heads, table.accuracies(), timings[min(batch_sizes)]),
            "memory": None if export_of(model) else _memory(segments, policies, pixels[: sizes[-1]]),
            "parameters": parameters_by_part(model, parts),
            "profile": parts,
            "cost_table": costs.to_dict(),
            "exported": export_facts(model),
        }


def random_items(images: Samples | Tensor, limit: int) -> list[dict[str, Any]]:
    """At most `limit` items, drawn at random, always the same."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    if isinstance(images, Tensor):
        return [{"pixel_values": images[index]} for index in chosen]
    items: Samples = images
    return [items[index] for index in chosen]


def _accuracy(table: ExitTable, policy: ExitPolicy) -> dict[str, Any]:
    """Of the highway and the full model, on all samples of a table; and the first exit as accurate as the highway."""
    exits = table.accuracies()
    highway = (table.replay(policy).logits.argmax(-1) == table.labels).float().mean().item()
    static = next((index for index, accuracy in enumerate(exits[:-1]) if accuracy >= highway), None)
    # where the full model is never wrong, its answers stand for the labels, or might as well
    against = "full model" if torch.equal(table.labels, table.logits[-1].argmax(-1)) else "labels"
    accuracies = {"accuracy": highway, "accuracy_full_model": exits[-1]}
    return {"against": against, "samples": len(table), **accuracies, "static_exit": static}


# -- timing ----------------------------------------------------------------------------------------------------


@dataclass
class _Timing:
    """What was timed at one batch size: seconds `[batch][repeat]` of each run, walks likewise, and the exits taken.

    The backbone does the same work for every batch: where it took longer than usual the machine was slow, and what ran
    beside it is brought back to the usual pace.
    """

    size: int
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    walks: list[list[PartTimes]] = field(default_factory=list)
    exits_taken: list[Tensor] = field(default_factory=list)

    @property
    def paces(self) -> list[float]:
        """The backbone's usual seconds over those it took beside each batch."""
        beside = [statistics.median(repeats) for repeats in self.seconds["backbone"]]
        return [statistics.median(beside) / seconds for seconds in beside]

    def of_batches(self, name: str) -> list[float]:
        """Seconds of each batch, at the usual pace."""
        medians = [statistics.median(repeats) for repeats in self.seconds[name]]
        return [seconds * pace for seconds, pace in zip(medians, self.paces, strict=True)]

    def steady_walks(self) -> list[PartTimes]:
        """All walks, at the usual pace."""
        return [walk.scaled(pace) for walks, pace in zip(self.walks, self.paces, strict=True) for walk in walks]

    @property
    def noise(self) -> float:
        """How far the middle half of the backbone's times spreads, relative: it does the same work for every batch."""
        low, middle, high = np.percentile(self.seconds["backbone"], (25, 50, 75)).tolist()
        return float((high - low) / middle)


def _time_all(
    segments: Sequence[Segment],
    policies: dict[str, ExitPolicy],
    pixels: Tensor,
    sizes: Sequence[int],
    run_sizes: set[int],
    repeats: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[int, _Timing]:
    """Time the parts and the backbone on batches of all `sizes`, and every policy where it is one of `run_sizes`."""
    jobs = [(size, pixels[start : start + size]) for size in sizes for start in range(0, len(pixels) - size + 1, size)]
    random.Random(0).shuffle(jobs)
    timings = {size: _Timing(size) for size in sizes}
    for size, batch in progress(jobs):
        timing, state = timings[size], State({"pixel_values": batch})
        walks: list[PartTimes] = []

        def walk(state: State = state, walks: list[PartTimes] = walks) -> None:
            walks.append(time_parts(segments, state, policies["early_exit"]))

        names = policies if size in run_sizes else ["backbone"]
        runs = {name: partial(run_early, segments, state, policies[name]) for name in names}
        seconds = time_interleaved({**runs, "parts": walk}, repeats=repeats, warm_up=1)
        for name in names:
            timing.seconds.setdefault(name, []).append(seconds[name])
        timing.walks.append(walks[1:])
        if size in run_sizes:
            timing.exits_taken.append(runs["early_exit"]().exit_index.cpu())
    return timings


def _of_batches(
    size: int, timing: _Timing, depths: list[int], table: CostTable, evaluated: list[int]
) -> dict[str, Any]:
    """Everything about one batch size; times are in milliseconds and of a batch."""
    runs = {name: _latency(timing, name) for name in timing.seconds}
    early, backbone = runs["early_exit"]["mean_ms"], runs["backbone"]["mean_ms"]
    static = runs.get("static")
    exits_taken = torch.cat(timing.exits_taken)
    shares = (torch.bincount(exits_taken, minlength=len(depths)).double() / len(exits_taken)).tolist()
    costs = table.at(size)
    ideal, predicted = size * costs.mean(shares, evaluated), size * table.mean_latency(shares, evaluated, size)
    return {
        "batch_size": size,
        "num_batches": len(timing.exits_taken),
        **runs,
        "static": static,
        "ideal_ms": ideal,
        "predicted_ms": predicted,
        "layer_speed_up": depths[-1] * len(exits_taken) / sum(depths[index] for index in exits_taken.tolist()),
        "wall_clock_speed_up": backbone / early,
        "static_speed_up": static and backbone / static["mean_ms"],
        "ideal_speed_up": backbone / ideal,
        "realised_over_ideal": ideal / early,
        "predicted_over_measured": predicted / early,
        **_where_time_goes(costs, shares, evaluated),
        "noise": timing.noise,
    }


def _latency(timing: _Timing, name: str) -> dict[str, float]:
    mean = 1e3 * statistics.mean(timing.of_batches(name))
    return {**_percentiles(timing.seconds[name]), "mean_ms": mean, "images_per_second": 1e3 * timing.size / mean}


def _percentiles(seconds: list[list[float]]) -> dict[str, float]:
    return {name: 1e3 * float(np.percentile(seconds, percent)) for name, percent in _PERCENTILES.items()}


def _where_time_goes(costs: Costs, shares: list[float], evaluated: list[int]) -> dict[str, float]:
    """Of the backbone's time: what is saved in blocks and the final classifier, and what evaluating the heads adds."""
    run = sum(share * sum(costs.backbone_costs[: index + 1]) for index, share in enumerate(shares))
    run += shares[-1] * costs.heads[-1]
    heads = costs.mean(shares, evaluated) - run
    return {"saved_share": 1 - run / costs.backbone, "heads_share": heads / costs.backbone}


def _of_exits(depths: list[int], heads: list[str], accuracies: list[float], timing: _Timing) -> list[dict[str, Any]]:
    """Samples that exit at each exit, and its accuracy on all of them; of single images, the latency too."""
    exits_taken = torch.cat(timing.exits_taken).tolist()
    # where single images are timed
    single = timing.seconds["early_exit"] if timing.size == 1 else []
    exits: list[dict[str, Any]] = []
    for index, (depth, head, accuracy) in enumerate(zip(depths, heads, accuracies, strict=True)):
        seconds = [seconds for seconds, exit in zip(single, exits_taken, strict=False) if exit == index]
        about = {"exit_index": index, "exit_layer": depth, "head": head, "samples": exits_taken.count(index)}
        latency = _percentiles(seconds) if seconds else dict.fromkeys(_PERCENTILES)
        exits.append({**about, "accuracy_all": accuracy, **latency})
    return exits


def _memory(segments: Sequence[Segment], policies: dict[str, ExitPolicy], pixels: Tensor) -> dict[str, Any]:
    state = State({"pixel_values": pixels})
    report = {"what": "peak of the tensors alive in a run, weights and images not counted", "batch_size": len(pixels)}
    for name in ("early_exit", "backbone"):
        report[f"{name}_bytes"] = peak_memory(partial(run_early, segments, state, policies[name]), pixels.device)
    return report


def _environment(model: Highway, policy: ExitPolicy, repeats: int, num_images: int) -> dict[str, Any]:
    about = {"model": architecture(model), "policy": policy.to_dict(), "ensemble": model.config.exit_ensemble}
    about["image_size"] = model.config.image_size
    return {**about, **machine(model), "images": num_images, "repeats": repeats}
