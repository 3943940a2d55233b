"""What the page of `lgvit report` shows: figures of every setting that its slider can take, images, calibration."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..engine import Answers
from ..policies import ExitPolicy, build_policy, probabilities
from .calibration_report import Calibration
from .cost_table import CostTable
from .exit_table import ExitTable
from .metrics import per_class, reliability_by_exit, summarise
from .predictions import Settings
from .sweep import threshold_settings
from .threshold_search import RANGES

# of a page: positions of the slider, classes and pairs of answers in a table, images on each side and their pixels
STEPS, CLASSES, PAIRS, IMAGES, PIXELS = 40, 40, 20, 8, 96
# what the command line can say of a policy
TYPED = ("threshold", "patience", "exit_index", "entropy_threshold")


def report_data(
    table: ExitTable,
    policy: ExitPolicy,
    class_names: Sequence[str],
    head_names: Sequence[str],
    picture: Callable[[int], Image.Image],
    *,
    command: Sequence[str],
    cost_table: CostTable | None = None,
    batch_size: int = 1,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """The data of a report's page: each setting that it can show, worked out as `evaluate` does.

    Args:
        table (`ExitTable`): Of the samples to report on, with costs.
        policy (`ExitPolicy`): The model's own.
        class_names (`Sequence[str]`): Of all classes, in the order of their numbers.
        head_names (`Sequence[str]`): Of each classifier, the last included.
        picture (callable): The image of a sample, by its number.
        command (`Sequence[str]`): Words of a command line to which `--policy` and its numbers are added.
        cost_table (`CostTable`, *optional*): Measured times to show instead of MACs.
        batch_size (`int`, *optional*, defaults to 1): At which it is read.
        calibration (`Calibration`, *optional*): Whose ladder the slider walks, too.

    Returns:
        What `report.js` reads: `modes`, each a list of `settings`; `diagrams` and `images`, to which they refer.

    Raises:
        ValueError: The calibration is of another model, or the cost table is.
    """
    names = [str(name) for name in class_names]
    if calibration is not None:
        _check_calibration(calibration, table)
    full = per_class(_final(table), table.labels, table.depths[-1], names)
    diagrams: dict[str, int] = {}
    shown: set[int] = set()

    def cost_of(shares: Sequence[float], evaluated: Sequence[int]) -> float:
        if cost_table is not None:
            return cost_table.mean_latency(shares, evaluated, batch_size)
        return table.known_costs.mean(shares, evaluated) / 1e6

    def described(settings: Settings, label: str, **more: Any) -> dict[str, Any]:
        rule = build_policy(settings, len(table.depths) - 1)
        answers = table.replay(rule)
        summary = summarise(table, answers, table.known_costs, list(head_names), rule)
        overall, exits = summary["overall"], summary["exits"]
        for exit, bins in zip(exits, reliability_by_exit(table, answers, rule), strict=True):
            for key in ("reliability_all", "reliability_exited"):
                exit[key] = diagrams.setdefault(_as_text(bins[key]), len(diagrams))
        evaluated = [index for index in range(len(exits) - 1) if not rule.skips(index)]
        first, last = exited_first_and_last(answers, IMAGES)
        shown.update(first + last)
        keys = ("accuracy", "mean_depth", "layer_speed_up", "mean_macs", "macs_speed_up")
        return {
            "label": label,
            "policy": rule.to_dict(),
            "copy": _to_copy(rule, command),
            **{key: overall[key] for key in keys},
            "cost": cost_of([exit["share"] for exit in exits], evaluated),
            "exits": exits,
            "classes": _classes(table, answers, names, full),
            "agreement": _agreement(table, answers),
            "pairs": _pairs(table, answers),
            "first": _answered(answers, first),
            "last": _answered(answers, last),
            **more,
        }

    name = policy.name if policy.name in RANGES else "confidence"
    curve = threshold_settings(table, name, STEPS)
    uniform = [described(each, f"{name}, threshold {each['threshold']:.4g}") for each in curve]
    modes = [{"name": "One threshold", "settings": uniform}, *_ladder_mode(calibration, described)]
    modes.append({"name": "The saved policy", "settings": [described(policy.to_dict(), f"saved: {policy.name}")]})
    full_accuracy = table.accuracies()[-1]
    for mode in modes:
        near = [step["accuracy"] >= full_accuracy - 0.01 for step in mode["settings"]]
        mode["start"] = near.index(True) if True in near else len(near) - 1
    never = [0.0] * (len(table.depths) - 1) + [1.0]
    return {
        "depths": table.depths,
        "heads": list(head_names),
        "class_names": names,
        "classes_shown": CLASSES,
        "samples": len(table),
        "full_accuracy": full_accuracy,
        "cost": {"full": cost_of(never, []), **_cost_in_words(cost_table, batch_size)},
        "modes": modes,
        "diagrams": [json.loads(text) for text in diagrams],
        "images": {str(index): _thumbnail(picture(index), int(table.labels[index])) for index in sorted(shown)},
        "calibration": None if calibration is None else _promise(calibration),
    }


def _ladder_mode(calibration: Calibration | None, described: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The ladder from the fastest rung to the safest, as the slider goes; thinned where it is long."""
    if calibration is None or not calibration.ladder:
        return []
    last = len(calibration.ladder) - 1
    rungs = np.unique(np.linspace(last, 0, min(STEPS, last + 1)).round().astype(int))[::-1].tolist()
    found = [
        described(rung["policy"], f"rung {index} of {last}, from the safest", calibrated_accuracy=rung["accuracy"])
        for index, rung in ((index, calibration.ladder[index]) for index in rungs)
    ]
    name = "The ladder, not certified" if calibration.delta is None else "The certified ladder"
    return [{"name": name, "settings": found}]


def exited_first_and_last(answers: Answers, count: int) -> tuple[list[int], list[int]]:
    """The samples that exit first, the most confident first, and those that exit last, the least confident first.

    Args:
        answers (`Answers`): Of `N` samples.
        count (`int`): How many of each, at most; no sample is in both.

    Example:

        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [5.0, 0.0]])
        >>> depth = torch.tensor([4, 4, 12, 8])
        >>> exited_first_and_last(Answers(logits, depth, depth, torch.ones(4)), 1)
        ([1], [2])
    """
    confidence = probabilities(answers.logits).amax(-1).nan_to_num(0.0).cpu().numpy()
    order = np.lexsort((-confidence, answers.exit_layer.cpu().numpy())).tolist()
    count = min(count, len(order) // 2)
    return order[:count], order[::-1][:count]


def _answered(answers: Answers, samples: Sequence[int]) -> list[list[int]]:
    """Number, exit and answered class of some samples."""
    said = answers.logits.argmax(-1)
    return [[index, int(answers.exit_index[index]), int(said[index])] for index in samples]


def _as_text(diagram: Sequence[dict[str, Any]]) -> str:
    """The bins of a diagram as `[samples, confidence, accuracy]`, `null` without samples."""
    bins = [
        [bin["samples"], round(bin["confidence"], 4), round(bin["accuracy"], 4)] if bin["samples"] else None
        for bin in diagram
    ]
    return json.dumps(bins)


def _classes(
    table: ExitTable, answers: Answers, names: Sequence[str], full: Sequence[dict[str, Any]]
) -> list[list[float | int | None]]:
    """A row per class: number, samples, accuracy, the full model's, precision, early share and mean depth."""
    rows: list[list[Any]] = [
        [index, row["samples"], row["accuracy"], before["accuracy"]]
        + [row[key] for key in ("precision", "early_share", "mean_depth")]
        for index, (row, before) in enumerate(
            zip(per_class(answers, table.labels, table.depths[-1], names), full, strict=True)
        )
        if row["samples"]
    ]
    most = sorted(rows, key=lambda row: -abs(row[2] - row[3]))[:CLASSES]
    return sorted(most) if len(names) <= CLASSES else most


def _final(table: ExitTable) -> Answers:
    logits = table.logits[-1]
    return Answers.of(logits, len(table.depths) - 1, table.depths[-1], probabilities(logits).amax(-1))


def _agreement(table: ExitTable, answers: Answers) -> list[list[int]]:
    """Samples by whether this setting is right (first index) and the full model (second index), right before wrong."""
    ours, full = answers.logits.argmax(-1) == table.labels, table.right[-1]
    return [[int((here & there).sum()) for there in (full, ~full)] for here in (ours, ~ours)]


def _pairs(table: ExitTable, answers: Answers) -> list[list[int]]:
    """Where answers differ from the full model's: its class, ours, samples, how many of them we have right."""

    def counted(samples: Tensor) -> Counter[tuple[int, int]]:
        return Counter(zip(final[samples].tolist(), ours[samples].tolist(), strict=True))

    final, ours = table.logits[-1].argmax(-1), answers.logits.argmax(-1)
    right = counted((final != ours) & (ours == table.labels))
    return [[*pair, count, right[pair]] for pair, count in counted(final != ours).most_common(PAIRS)]


def _thumbnail(image: Image.Image, label: int) -> dict[str, Any]:
    """A small copy of an image as a data URL, its class, and whether its pixels are to be seen."""
    small = image.copy()
    small.thumbnail((PIXELS, PIXELS))
    stream, tiny = io.BytesIO(), max(small.size) < PIXELS
    small.save(stream, **({"format": "PNG"} if tiny else {"format": "JPEG", "quality": 80}))
    kind = "png" if tiny else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"source": source, "label": label, "small": tiny}


def _to_copy(policy: ExitPolicy, command: Sequence[str]) -> str:
    """A policy for Python, and for the command line where that can say it."""
    settings = policy.to_dict()
    lines = [f"model.set_exit_policy({settings!r})"]
    defaults = {"name": policy.name, "temperature": 1.0, "exits": None}
    numbers = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
    if set(numbers) <= set(TYPED):
        typed = ["--policy", policy.name]
        for name, value in numbers.items():
            typed += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        lines.append(shlex.join([*command, *typed]))
    return "\n".join(lines)


def _cost_in_words(cost_table: CostTable | None, batch_size: int) -> dict[str, str]:
    if cost_table is None:
        note = "cost in multiply-accumulates (MACs), exit heads counted"
        return {"name": "cost per image", "unit": "MMACs", "note": note}
    threads = f"{cost_table.threads} thread{'s' if cost_table.threads > 1 else ''}"
    note = f"measured times of {cost_table.device}, {threads}, batch size {batch_size}"
    return {"name": "time per image", "unit": "ms", "note": note}


def _promise(calibration: Calibration) -> dict[str, Any]:
    keys = ("bound", "delta", "guaranteed_drop", "samples_tested", "calibration_errors")
    return {key: value for key, value in asdict(calibration).items() if key in keys}


def _check_calibration(calibration: Calibration, table: ExitTable) -> None:
    """Raise `ValueError` where a calibration is of another model than the table."""
    if len(calibration.temperatures) != len(table.depths) or calibration.ensemble != table.ensemble:
        raise ValueError(
            f"calibration.json is of {len(calibration.temperatures)} exits, the final classifier counted, and the "
            f"ensemble {calibration.ensemble}; the model has {len(table.depths)} and {table.ensemble}: run "
            "`lgvit calibrate` again, or remove the file"
        )
