"""Evaluate a highway and say it in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..data import stack
from ..engine import Answers
from ..policies import in_words
from .anatomy import head_names
from .benchmark import wall_clock_speed_up
from .metrics import confusion_matrix, per_class, reliability_by_exit, summarise
from .table import ExitTable, collect

TIMED_ROWS = 256


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    timed_batch_sizes: Sequence[int] = (1, 32),
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Run a highway on a dataset, once with every exit and once leaving early, and time it.

    Args:
        model (`PreTrainedModel`): A highway, with the exit policy to be judged.
        dataset (`Dataset`): Items `pixel_values` and `labels`.
        batch_size (`int`, *optional*, defaults to 64): Of the evaluation.
        timed_batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 32)`):
            Batch sizes at which the wall-clock speed-up against the head-free backbone is measured, on up to 256 rows.
        progress (callable, *optional*): Wraps the timed batches, to show progress.

    Returns:
        `exits` and `overall` as of `summarise`, `classes` as of `per_class`, `confusion` as of `confusion_matrix`,
        `reliability` as of `reliability_by_exit`, `wall_clock` by batch size, and the `policy`.
    """
    table, answers = collect(model, dataset, batch_size=batch_size), answer_all(model, dataset, batch_size=batch_size)
    return judge(model, dataset, table, answers, timed_batch_sizes=timed_batch_sizes, progress=progress)


@torch.no_grad()
def answer_all(model: PreTrainedModel, dataset: Dataset, *, batch_size: int = 64) -> Answers:
    """The answers of a highway to every row of a dataset, each row leaving by the model's policy; on the CPU."""
    model.eval()
    outs = [
        model(batch["pixel_values"].to(model.device, model.dtype))
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=stack)
    ]
    names = ("logits", "exit_index", "exit_layer", "exit_score")
    return Answers(*(torch.cat([getattr(out, name) for out in outs]).cpu() for name in names))


def judge(
    model: PreTrainedModel,
    dataset: Dataset,
    table: ExitTable,
    answers: Answers,
    *,
    timed_batch_sizes: Sequence[int] = (1, 32),
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """The report of `evaluate`, from what was already run.

    Args:
        model (`PreTrainedModel`): A highway.
        dataset (`Dataset`): The rows, of which some are timed.
        table (`ExitTable`), answers (`Answers`): Of these rows, as of `collect` and `answer_all`.
        timed_batch_sizes (`Sequence[int]`, *optional*), progress (callable, *optional*): As of `evaluate`.
    """
    report = summarise(table, answers, table.costs, head_names(model), model.exit_policy)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    report["classes"] = per_class(answers, table.labels, table.depths[-1], names)
    report["confusion"] = confusion_matrix(answers, table.labels, len(names))
    report["reliability"] = reliability_by_exit(table, answers, model.exit_policy)
    pixels = timed_pixels(dataset)
    report["wall_clock"] = {
        str(size): wall_clock_speed_up(model, pixels.split(size), repeats=3, progress=progress)
        for size in timed_batch_sizes
    }
    report["policy"] = model.exit_policy.to_dict()
    return report


def timed_pixels(dataset: Dataset) -> Tensor:
    """The images on which wall-clock is measured, up to 256 of them, `[N, C, H, W]`."""
    return torch.stack([dataset[index]["pixel_values"] for index in range(min(TIMED_ROWS, len(dataset)))])


def as_table(report: dict[str, Any]) -> str:
    """The report of `evaluate` as text for a terminal."""
    lines = ["exit  position  head            rows leaving   right there   right of all   MMACs until there"]
    for index, row in enumerate(report["exits"]):
        leaving = "-" if row["accuracy_leaving"] is None else f"{row['accuracy_leaving']:.1%}"
        lines.append(
            f"{index:4}  {row['position']:8}  {row['head']:14}  {row['rows']:5} ({row['share']:4.0%})  {leaving:>11}  "
            f"{row['accuracy_all']:13.1%}  {row['macs'] / 1e6:18.1f}"
        )
    overall = report["overall"]
    lines += [
        "",
        f"accuracy              {overall['accuracy']:.1%}   (full model {overall['accuracy_full_model']:.1%}, "
        f"{overall['rows']} rows)",
        f"mean depth            {overall['mean_depth']:.2f} of {report['exits'][-1]['position']} blocks, "
        f"layer speed-up {overall['layer_speed_up']:.2f}x",
        f"MACs                  {overall['mean_macs'] / 1e6:.1f} M per image, heads counted, against "
        f"{overall['backbone_macs'] / 1e6:.1f} M: {overall['macs_speed_up']:.2f}x",
    ]
    for size, times in report["wall_clock"].items():
        lines.append(
            f"wall-clock, batch {size:3} {times['wall_clock_speed_up']:.2f}x the speed of the backbone without heads "
            f"({times['early_exit_seconds'] * 1e3:.0f} ms against {times['backbone_seconds'] * 1e3:.0f} ms)"
        )
    lines.append(f"policy                {in_words(report['policy'])}")
    return "\n".join(lines)
