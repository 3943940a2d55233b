"""Parts of a highway in 8 bits, with what was measured of them on images: ranges, thresholds anew, and their time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..data.batches import Samples, in_batches
from ..engine import run_early
from ..evaluation.calibration import calibrate
from ..evaluation.costs import Highway, model_macs
from ..evaluation.exit_table import ExitTable, collect, is_right
from ..evaluation.search import SEARCHES
from ..evaluation.timing import time_interleaved
from ..hub.loading import example_image
from ..modeling_highway import HighwayMixin
from ..policies import ExitPolicy, NeverPolicy
from ..runtimes.manifest import QUANTIZED
from ..runtimes.onnxruntime import ORTHighway
from ..segments import State
from .segment_graphs import OnnxSegment
from .writing import open_parts

TIMED_BATCH_SIZES = (1, 8)
_BATCH = 32


@dataclass(frozen=True)
class QuantizationImages:
    """Images for quantising a highway, by what they are for.

    Args:
        ranges (`Dataset`, *optional*):
            Of `int8-static`, which needs them: on these the ranges of activations are measured. A few hundred of those
            that the model was trained on.
        thresholds (`Dataset`, *optional*):
            Labelled ones, which the model was neither trained on nor is judged on: on what the quantized exits answer
            on these, thresholds and temperatures are calibrated anew. See `recalibrate`.
        max_accuracy_drop (`float`, *optional*), delta (`float`, *optional*), bound (`str`, *optional*):
            Of the new thresholds, see `recalibrate`.
    """

    ranges: Samples | None = None
    thresholds: Samples | None = None
    max_accuracy_drop: float | None = None
    delta: float | None = None
    bound: str = "drop"

    def check(self, precision: str, judged: Samples | None) -> None:
        """Raise `ValueError` where a precision needs other images.

        Args:
            precision (`str`): See `export_onnx`.
            judged (`Dataset`, *optional*): On which the files are judged.
        """
        if (precision == "int8-static") != (self.ranges is not None):
            needs = "needs images" if self.ranges is None else "has no use for images"
            raise ValueError(
                f"precision={precision!r} {needs} to measure ranges of activations on: quantization.ranges (--data)"
            )
        if self.thresholds is not None and precision not in QUANTIZED:
            raise ValueError(
                f"precision={precision!r} keeps its thresholds; quantization.thresholds is for {', '.join(QUANTIZED)}"
            )
        if self.thresholds is not None and judged is None:
            raise ValueError("quantization.thresholds needs images beside it, on which the new thresholds are judged")


def quantized(parts: Sequence[OnnxSegment], precision: str, ranges: Samples | None = None) -> list[OnnxSegment]:
    """Parts of a highway, in the order in which they run, in 8 bits where the precision is one of `QUANTIZED`.

    Args:
        parts (`Sequence[OnnxSegment]`): Of float32.
        precision (`str`): See `export_onnx`.
        ranges (`Dataset`, *optional*): See `QuantizationImages`.
    """
    from .quantization import quantize, quantize_static

    models = [part.model for part in parts]
    if precision == "int8":
        models = [quantize(model) for model in models]
    elif precision == "int8-static":
        QuantizationImages(ranges).check(precision, None)
        batches = [batch["pixel_values"].float().numpy() for batch in in_batches(ranges or (), _BATCH)]
        models = quantize_static(models, batches)
    return [replace(part, model=model) for part, model in zip(parts, models, strict=True)]


def quantized_on_images(
    model: HighwayMixin,
    parts: Sequence[OnnxSegment],
    precision: str,
    given: QuantizationImages,
    judged: Samples | None,
) -> tuple[list[OnnxSegment], dict[str, Any]]:
    """Quantise the parts of a highway, and give it the thresholds that fit them.

    Args:
        model (`HighwayMixin`): The highway; its policy changes.
        parts (`Sequence[OnnxSegment]`): Of all exits, in float32.
        precision (`str`), judged (`Dataset`, *optional*): See `export_onnx`.
        given (`QuantizationImages`): What there is.

    Returns:
        The parts, and for the manifest what was found: `recalibration` and `against_int8`, see `export_onnx`.
    """
    made, checks = quantized(parts, precision, given.ranges), {}
    exported = open_parts(model, made, precision)
    if given.thresholds is not None and judged is not None and can_recalibrate(model):
        settings, checks["recalibration"] = recalibrate(
            model, exported, given.thresholds, judged, given.max_accuracy_drop, given.delta, given.bound
        )
        model.set_exit_policy(settings)
    if precision == "int8-static":
        checks["against_int8"] = time_against(exported, open_parts(model, quantized(parts, "int8"), "int8"))
    return made, checks


def can_recalibrate(model: HighwayMixin) -> bool:
    """Whether the model's policy has thresholds that `calibrate` chooses."""
    return model.exit_policy.name in SEARCHES and model.exit_policy.name != "fixed" and len(model.segments()) > 1


def recalibrate(
    model: HighwayMixin,
    exported: Highway,
    images: Samples,
    judged: Samples,
    max_accuracy_drop: float | None = None,
    delta: float | None = None,
    bound: str = "drop",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Thresholds and temperatures for a quantized highway, of its model's kind of policy.

    One half of the images is searched on, the other is tested on. Exits may be skipped where the model's policy skips
    some.

    Args:
        model (`HighwayMixin`): The model, with its policy.
        exported (`Highway`): The same quantized, in a layout that says what every exit answers.
        images (`Dataset`): Labelled; neither trained nor judged on.
        judged (`Dataset`): On which both policies are judged.
        max_accuracy_drop (`float`, *optional*):
            See `calibrate`; by default the drop of the model itself on the images that are tested on.
        delta (`float`, *optional*), bound (`str`, *optional*, defaults to `"drop"`): See `calibrate`.

    Returns:
        The settings of the policy, and a report: `samples`, `max_accuracy_drop`, `delta`, and `before` and `after`
        with `policy`, `accuracy` and `mean_depth` of the quantized highway on the judged images.

    Raises:
        ValueError: As `calibrate`: too few samples, or logits that are not finite.
    """
    policy, order = model.exit_policy, torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    searched, tested = order[: len(order) // 2], order[len(order) // 2 :]
    # costs of a file that leaves heads out where their exits are skipped
    table = replace(collect(exported, images), costs=model_macs(model))
    if max_accuracy_drop is None:
        max_accuracy_drop = _drop(model, Subset(cast("Dataset[Any]", images), tested.tolist()))
    found = calibrate(
        table.select(searched),
        tested=table.select(tested),
        policy=policy.name,
        max_accuracy_drop=max_accuracy_drop,
        delta=delta,
        bound=bound,
        choose_exits=any(policy.skips(index) for index in range(len(table.depths) - 1)),
    )
    judging = collect(exported, judged)
    report = {
        "samples": len(table),
        "max_accuracy_drop": found.max_accuracy_drop,
        "delta": found.delta,
        "before": _figures(judging, policy),
        "after": _figures(judging, found.policy),
    }
    return found.policy, report


def _drop(model: HighwayMixin, images: Samples) -> float:
    """Of a model's early exit, and 0 where that is more accurate than no early exit."""
    table = collect(model, images)
    early = is_right(table.replay(model.exit_policy).logits, table.labels)
    return max(0.0, (table.right[-1].long() - early.long()).double().mean().item())


def _figures(table: ExitTable, policy: ExitPolicy | dict[str, Any]) -> dict[str, Any]:
    answers = table.replay(policy)
    return {
        "policy": policy if isinstance(policy, dict) else policy.to_dict(),
        "accuracy": is_right(answers.logits, table.labels).float().mean().item(),
        "mean_depth": answers.exit_layer.float().mean().item(),
    }


def time_against(exported: ORTHighway, int8: ORTHighway, *, repeats: int = 20) -> dict[str, Any]:
    """Milliseconds of a quantized highway and of its `int8` in turn, no sample exiting early.

    Returns:
        `threads`, and of each of the `batches` the `batch_size`, the medians `p50_ms` and `int8_p50_ms`, and the
        `speed_up` over `int8`, the median over rounds.
    """
    batches = []
    for size in TIMED_BATCH_SIZES:
        pixels = example_image(exported, batch_size=size)
        seconds = time_interleaved(
            {"static": partial(_run, exported, pixels), "int8": partial(_run, int8, pixels)}, repeats=repeats
        )
        static, int8_p50 = (1e3 * statistics.median(seconds[name]) for name in ("static", "int8"))
        # of each round by itself: a slow moment of the machine lasts longer than a round
        ratios = [theirs / ours for ours, theirs in zip(seconds["static"], seconds["int8"], strict=True)]
        speed_up = statistics.median(ratios)
        batches.append({"batch_size": size, "p50_ms": static, "int8_p50_ms": int8_p50, "speed_up": speed_up})
    return {"threads": exported.exported.threads, "batches": batches}


def _run(exported: ORTHighway, pixels: Tensor) -> None:
    run_early(exported.segments(), State({"pixel_values": pixels}), NeverPolicy())
