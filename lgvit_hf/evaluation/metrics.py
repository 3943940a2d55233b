"""What a policy does to a table: accuracy, calibration, where samples exit, depth and cost. Plain numbers in dicts.

What is undefined, such as the accuracy of no samples, is `None`; no figure is NaN or infinite, so that all of it is
JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import Answers
from ..policies import ExitPolicy, number_at, probabilities
from .costs import Costs
from .exit_table import ExitTable, is_right


def layer_speed_up(answers: Answers, num_blocks: int) -> float:
    """Blocks of the full model over blocks really run, `L * N / sum(depth)`; heads and overheads are not counted."""
    return num_blocks * len(answers.exit_layer) / answers.exit_layer.sum().item()


def summarise(
    table: ExitTable, answers: Answers, costs: Costs, head_names: list[str], policy: ExitPolicy | None = None
) -> dict[str, Any]:
    """Per exit and overall figures of a policy.

    Args:
        table (`ExitTable`): Logits and labels.
        answers (`Answers`): Of a policy, on the same samples, from `table.replay` or from the model.
        costs (`Costs`): In MACs.
        head_names (`list[str]`): Of each classifier, the last included.
        policy (`ExitPolicy`, *optional*):
            Which heads it skips, and its temperature; by default all heads are counted, and the temperature is 1.

    Returns:
        `{"exits": [...], "overall": {...}}`; accuracies and calibration errors are shares in [0, 1], `None` where no
        sample exits.

    Example:

        >>> import torch
        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 0.1]], [[0.0, 9.0], [0.0, 9.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 1]), depths=[1, 2])
        >>> answers = table.replay({"name": "confidence", "threshold": 0.9})
        >>> summary = summarise(table, answers, Costs([4.0, 4.0], [1.0, 1.0]), ["linear", "final"])
        >>> summary["overall"]["accuracy"], summary["overall"]["mean_macs"]
        (1.0, 7.5)
    """
    right = answers.logits.argmax(-1) == table.labels
    exits: list[dict[str, Any]] = []
    total = len(table)
    evaluated = [index for index in range(len(table.depths)) if policy is None or not policy.skips(index)]
    diagrams = reliability_by_exit(table, answers, policy)
    for index, (depth, accuracy, head) in enumerate(zip(table.depths, table.accuracies(), head_names, strict=True)):
        here = answers.exit_index == index
        exited = int(here.sum())
        exits.append(
            {
                "exit_layer": depth,
                "head": head,
                "samples": exited,
                "share": exited / total,
                "accuracy_exited": right[here].float().mean().item() if exited else None,
                "accuracy_all": accuracy,
                "calibration_error_exited": calibration_error(diagrams[index]["reliability_exited"]),
                "calibration_error_all": calibration_error(diagrams[index]["reliability_all"]),
                "macs": costs.of_exit(index, evaluated),
                "head_macs": costs.heads[index],
            }
        )
    mean_macs = sum(exit["share"] * exit["macs"] for exit in exits)
    overall = {
        "samples": total,
        "accuracy": right.float().mean().item(),
        "accuracy_full_model": table.accuracies()[-1],
        "mean_depth": answers.exit_layer.float().mean().item(),
        "layer_speed_up": layer_speed_up(answers, table.depths[-1]),
        "mean_macs": mean_macs,
        "backbone_macs": costs.backbone,
        "macs_speed_up": costs.backbone / mean_macs,
    }
    return {"exits": exits, "overall": overall}


def confusion_matrix(answers: Answers, labels: Tensor, num_classes: int) -> list[list[int]]:
    """How many samples of each class (first index) were answered as each class (second index).

    Args:
        answers (`Answers`): Of `N` samples.
        labels (`Tensor`): `[N]` int64, their classes.
        num_classes (`int`): `C`.

    Returns:
        `[C][C]` counts.

    Raises:
        ValueError: A label or an answer is no class from 0 to `num_classes - 1`.

    Example:

        >>> answers = Answers.of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 0, 4, torch.ones(3))
        >>> confusion_matrix(answers, torch.tensor([0, 0, 1]), num_classes=2)
        [[1, 1], [0, 1]]
    """
    answered = answers.logits.argmax(-1)
    for name, classes in (("labels", labels), ("answers", answered)):
        strange = classes[(classes < 0) | (classes >= num_classes)]
        if len(strange):
            raise ValueError(f"{name}: class {strange[0]} is not one of the {num_classes} classes, from 0")
    counts = torch.bincount(labels * num_classes + answered, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).tolist()


def macro_f1(answers: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 score of the classes that occur among the labels `[N]` or the answers `[N]`.

    Example:

        >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]))
        0.666...
    """
    classes, numbers = np.unique(np.concatenate([answers, labels]), return_inverse=True)
    right = np.bincount(numbers[: len(answers)][answers == labels], minlength=len(classes))
    return float((2 * right / np.bincount(numbers)).mean())


def per_class(
    answers: Answers, labels: Tensor, num_blocks: int, class_names: Sequence[str]
) -> list[dict[str, str | int | float | None]]:
    """Figures of each class under a policy: which are answered early, and which pay for it.

    Args:
        answers (`Answers`): Of `N` samples.
        labels (`Tensor`): `[N]` int64, their classes.
        num_blocks (`int`): Of the full model; an answer from fewer blocks is early.
        class_names (`Sequence[str]`): Of all `C` classes, in the order of their numbers.

    Returns:
        For each class `name`, `samples`, `accuracy` (the share of its samples that are answered rightly: its recall),
        `precision` (the share of the answers naming it that are right), `mean_depth` and `early_share` of its samples.
        What there is nothing to take a share of is `None`.

    Raises:
        ValueError: A label or an answer has no name.

    Example:

        >>> answers = Answers.of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 0, 4, torch.ones(3))
        >>> cat, dog = per_class(answers, torch.tensor([0, 0, 1]), num_blocks=12, class_names=["cat", "dog"])
        >>> cat
        {'name': 'cat', 'samples': 2, 'accuracy': 0.5, 'precision': 1.0, 'mean_depth': 4.0, 'early_share': 1.0}
        >>> dog["accuracy"], dog["precision"]
        (1.0, 0.5)
    """
    matrix = confusion_matrix(answers, labels, len(class_names))
    answered = [sum(column) for column in zip(*matrix, strict=True)]
    blocks = _sums(answers.exit_layer, labels, len(class_names))
    early = _sums(answers.exit_layer < num_blocks, labels, len(class_names))
    return [
        {
            "name": name,
            "samples": sum(counts),
            "accuracy": _ratio(counts[number], sum(counts)),
            "precision": _ratio(counts[number], answered[number]),
            "mean_depth": _ratio(blocks[number], sum(counts)),
            "early_share": _ratio(early[number], sum(counts)),
        }
        for number, (name, counts) in enumerate(zip(class_names, matrix, strict=True))
    ]


def reliability(confidence: Tensor, right: Tensor, bins: int = 15) -> list[dict[str, int | float | None]]:
    """The bins of a reliability diagram (https://arxiv.org/abs/1706.04599), in order; all have the width `1 / bins`.

    Args:
        confidence (`Tensor`): `[N]`, the probability of each sample's answer; NaN counts as 0.
        right (`Tensor`): `[N]` bool, whether that answer is right, or how likely.
        bins (`int`, *optional*, defaults to 15): Open below, closed above.

    Returns:
        For each bin `samples`, and their mean `confidence` and `accuracy`, `None` without samples.

    Example:

        >>> reliability(torch.tensor([0.75, 1.0, 0.25]), torch.tensor([True, False, False]), bins=2)
        [{'samples': 1, 'confidence': 0.25, 'accuracy': 0.0}, {'samples': 2, 'confidence': 0.875, 'accuracy': 0.5}]
    """
    # not every accelerator has float64
    confidence, right = confidence.cpu().double().nan_to_num(0.0), right.cpu()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    samples = torch.bincount(bin_of, minlength=bins).tolist()
    sums = zip(samples, _sums(confidence, bin_of, bins), _sums(right, bin_of, bins), strict=True)
    return [
        {"samples": count, "confidence": _ratio(mass, count), "accuracy": _ratio(hits, count)}
        for count, mass, hits in sums
    ]


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equal width (https://arxiv.org/abs/1706.04599).

    Args:
        logits (`Tensor`): `[N, C]`, already divided by a temperature if there is one.
        labels (`Tensor`): `[N]` int64, or probabilities `[N, C]`.
        bins (`int`, *optional*, defaults to 15): Open below, closed above.

    Raises:
        ValueError: There are no samples.

    Example:

        >>> logits = torch.tensor([[9.0, 0.0]] * 4)
        >>> round(expected_calibration_error(logits, torch.tensor([0, 0, 0, 1])), 2)
        0.25
    """
    error = calibration_error(_diagram(logits, labels, 1.0, bins))
    if error is None:
        raise ValueError("logits: without samples there is no calibration error; give at least one")
    return error


def reliability_by_exit(
    table: ExitTable, answers: Answers, policy: ExitPolicy | None = None, bins: int = 15
) -> list[dict[str, Any]]:
    """The reliability diagrams of each exit, of all samples and of those that exit there.

    The two differ by selection: an exit can be well calibrated on all samples, and overconfident on those that exit.

    Args:
        table (`ExitTable`): Logits and labels.
        answers (`Answers`): Of a policy, on the same samples, from `table.replay` or from the model.
        policy (`ExitPolicy`, *optional*): Whose temperature, if it has one, divides the logits.
        bins (`int`, *optional*, defaults to 15): Of each diagram.

    Returns:
        For each exit its `exit_layer`, and `reliability_all` and `reliability_exited` as of `reliability`.

    Example:

        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 0.1]], [[0.0, 9.0], [0.0, 9.0]]])
        >>> table = ExitTable(logits, labels=torch.tensor([0, 1]), depths=[1, 2])
        >>> first, final = reliability_by_exit(table, table.replay({"name": "confidence", "threshold": 0.9}), bins=2)
        >>> [[bin["samples"] for bin in first[f"reliability_{which}"]] for which in ("all", "exited")]
        [[0, 2], [0, 1]]
    """
    diagrams: list[dict[str, Any]] = []
    for index, depth in enumerate(table.depths):
        temperature, here = number_at(getattr(policy, "temperature", 1.0), index, 1.0), answers.exit_index == index
        everyone = _diagram(table.logits[index], table.labels, temperature, bins)
        exited = _diagram(answers.logits[here], table.labels[here], temperature, bins)
        diagrams.append({"exit_layer": depth, "reliability_all": everyone, "reliability_exited": exited})
    return diagrams


def _diagram(logits: Tensor, labels: Tensor, temperature: float, bins: int) -> list[dict[str, int | float | None]]:
    confidence = probabilities(logits, temperature).amax(-1)
    return reliability(confidence, is_right(logits, labels), bins)


def calibration_error(diagram: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean distance of confidence and accuracy over the bins of a diagram; `None` without samples."""
    gaps = sum(bin["samples"] * abs(bin["confidence"] - bin["accuracy"]) for bin in diagram if bin["samples"])
    return _ratio(gaps, sum(bin["samples"] for bin in diagram))


def _sums(values: Tensor, groups: Tensor, num_groups: int) -> list[float]:
    """Of the values `[N]` in each group, `groups` `[N]` int64."""
    return torch.bincount(groups.cpu(), weights=values.cpu().double(), minlength=num_groups).tolist()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
