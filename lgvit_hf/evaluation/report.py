"""Evaluate a highway and say it in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..data.batches import Samples, in_batches, to_model
from ..data.shares import gather, own_share
from ..engine import Answers
from ..hub.loading import answer_depths
from ..modes import evaluating
from .benchmark import wall_clock_speed_up
from .costs import Highway, decides_inside, model_macs
from .exit_table import ExitTable, collect
from .metrics import confusion_matrix, per_class, reliability_by_exit, summarise
from .profiling import export_facts, head_names
from .report_text import export_in_words, policy_in_words
from .report_types import EvaluationReport

TIMED_ROWS = 256


@torch.no_grad()
def evaluate(
    model: Highway,
    dataset: Samples,
    *,
    batch_size: int = 64,
    timed_batch_sizes: Sequence[int] = (1, 32),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Run a highway on a dataset, once with every exit and once exiting early, and time it.

    Args:
        model (`Highway`): With the exit policy to be judged; of PyTorch, or an exported one of any layout.
        dataset (`Dataset`): Items `pixel_values` and `labels`.
        batch_size (`int`, *optional*, defaults to 64): Of the evaluation.
        timed_batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 32)`):
            Batch sizes at which the wall-clock speed-up against the head-free backbone is measured, on up to 256
            samples.
        progress (callable, *optional*): Wraps the timed batches, to show progress.

    Returns:
        `exits` and `overall` as of `summarise`, `classes` as of `per_class`, `confusion` as of `confusion_matrix`,
        `reliability` as of `reliability_by_exit`, `wall_clock` by batch size, the `policy`, and `exported`: `layout`,
        `precision`, `file_bytes` and `runtime` of an exported highway. One exported file does not say what an exit
        answers where a sample does not exit: what is told of all samples at an exit is then `None`.
    """
    table, answers = look(model, dataset, batch_size=batch_size)
    return judge(model, dataset, table, answers, timed_batch_sizes=timed_batch_sizes, progress=progress)


def look(
    model: Highway, dataset: Samples, *, batch_size: int = 64, distributed: bool = False
) -> tuple[ExitTable, Answers]:
    """What every exit of a highway says of a dataset, and what the highway answers, run by itself.

    With `distributed`, by all processes of `torch.distributed`'s group at once, see `collect`.

    Of one exported file, which does not say what exits answer where a sample does not exit, the table holds the
    sample's answer at every exit.
    """
    if not decides_inside(model):
        table = collect(model, dataset, batch_size=batch_size, distributed=distributed)
        return table, answer_all(model, dataset, batch_size=batch_size, distributed=distributed)
    answers = answer_all(model, dataset, batch_size=batch_size, distributed=distributed)
    depths = answer_depths(model.config)
    labels = torch.tensor([int(dataset[index]["labels"]) for index in range(len(dataset))])
    return ExitTable(answers.logits.expand(len(depths), -1, -1), labels, depths, model_macs(model)), answers


@torch.no_grad()
def answer_all(model: Highway, dataset: Samples, *, batch_size: int = 64, distributed: bool = False) -> Answers:
    """The answers of a highway to every sample of a dataset, each sample exiting by the model's policy; on the CPU.

    With `distributed`, by all processes of `torch.distributed`'s group at once, see `collect`.
    """
    names = ("logits", "exit_index", "exit_layer", "exit_score")
    if distributed:
        part = answer_all(model, Subset(cast("Dataset[Any]", dataset), own_share(len(dataset))), batch_size=batch_size)
        return Answers(*(gather(getattr(part, name), len(dataset)) for name in names))
    with evaluating(model):
        outs = [model(to_model(batch["pixel_values"], model)) for batch in in_batches(dataset, batch_size)]
    return Answers(*(torch.cat([getattr(out, name) for out in outs]).cpu() for name in names))


def judge(
    model: Highway,
    dataset: Samples,
    table: ExitTable,
    answers: Answers,
    *,
    timed_batch_sizes: Sequence[int] = (1, 32),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """The report of `evaluate`, from what was already run.

    Args:
        model (`Highway`): The highway.
        dataset (`Dataset`): The samples, of which some are timed.
        table (`ExitTable`), answers (`Answers`): Of these samples, as of `look`.
        timed_batch_sizes (`Sequence[int]`, *optional*), progress (callable, *optional*): See `evaluate`.
    """
    report = summarise(table, answers, table.known_costs, head_names(model), model.exit_policy)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    report["classes"] = per_class(answers, table.labels, table.depths[-1], names)
    report["confusion"] = confusion_matrix(answers, table.labels, len(names))
    report["reliability"] = reliability_by_exit(table, answers, model.exit_policy)
    pixels = timed_pixels(dataset)
    report["wall_clock"] = {
        str(size): wall_clock_speed_up(model, torch.split(pixels, size), repeats=3, progress=progress)
        for size in timed_batch_sizes
    }
    report["policy"], report["ensemble"] = model.exit_policy.to_dict(), model.config.exit_ensemble
    report["exported"] = export_facts(model)
    if decides_inside(model):  # it does not say what exits answer where samples do not exit
        for exit, bins in zip(report["exits"], report["reliability"], strict=True):
            exit["accuracy_all"] = exit["calibration_error_all"] = bins["reliability_all"] = None
        report["overall"]["accuracy_full_model"] = None
    return report


def timed_pixels(dataset: Samples) -> Tensor:
    """The images on which wall-clock is measured, up to 256 of them, `[N, C, H, W]`."""
    return torch.stack([dataset[index]["pixel_values"] for index in range(min(TIMED_ROWS, len(dataset)))])


def evaluate_as_text(report: dict[str, Any]) -> str:
    """The report of `evaluate` as text for a terminal."""
    lines = ["exit     layer  head                  exited   acc. exited    acc. of all   MMACs until there"]
    typed = cast("EvaluationReport", report)
    for index, row in enumerate(typed["exits"]):
        lines.append(
            f"{index:4}  {row['exit_layer']:8}  {row['head']:14}  {row['samples']:5} ({row['share']:4.0%})  "
            f"{_percent(row['accuracy_exited']):>11}  {_percent(row['accuracy_all']):>13}  {row['macs'] / 1e6:18.1f}"
        )
    overall, exported = typed["overall"], typed["exported"]
    full = "" if overall["accuracy_full_model"] is None else f"full model {overall['accuracy_full_model']:.1%}, "
    lines += [
        "",
        f"accuracy              {overall['accuracy']:.1%}   ({full}{overall['samples']} samples)",
        f"mean depth            {overall['mean_depth']:.2f} of {typed['exits'][-1]['exit_layer']} blocks, "
        f"layer speed-up {overall['layer_speed_up']:.2f}x",
        f"MACs                  {overall['mean_macs'] / 1e6:.1f} M per image, heads counted, against "
        f"{overall['backbone_macs'] / 1e6:.1f} M: {overall['macs_speed_up']:.2f}x",
    ]
    against = "the backbone without heads" if exported is None else "the same files without early exit"
    for size, times in typed["wall_clock"].items():
        early, backbone = 1e3 * times["early_exit_seconds"], times["backbone_seconds"]
        told = (
            f"{early / min(TIMED_ROWS, overall['samples']):.2f} ms per image"
            if backbone is None
            else f"{times['wall_clock_speed_up']:.2f}x the speed of {against} ({early:.0f} ms against "
            f"{backbone * 1e3:.0f} ms)"
        )
        lines.append(f"wall-clock, batch {size:>3} {told}")
    ensemble = ", on the running ensemble" if typed.get("ensemble") else ""
    lines.append(f"policy                {policy_in_words(typed['policy'])}{ensemble}")
    if exported is not None:
        lines.append(f"files                 {export_in_words(exported)}")
        if exported["layout"] == "all_exits":
            indent = 22 * " "
            lines.append(f"{indent}this layout runs every exit of every sample: the MACs are those of the others")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
