"""`lgvit benchmark`: a checkpoint against the clock."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from ..evaluation.benchmark import benchmark
from ..evaluation.cost_table import CostTable
from ..evaluation.plots import plot_latency
from ..files import write_json
from .drawing import check_can_draw
from .inputs import check_counts, open_highway, table_of


def run_benchmark(
    checkpoint: str,
    data: str,
    *,
    policy: dict[str, Any] | None = None,
    output: str | None = None,
    plot: str | None = None,
    cost_table: str | None = None,
    table_file: str | None = None,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    threads: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Time a checkpoint on real images against the backbone, a static model of equal accuracy, and the ideal.

    Args:
        checkpoint (`str`): As of `open_highway`.
        data (`str`): As of `load_images`.
        policy (`dict`, *optional*): Instead of the saved one.
        output (`str`, *optional*): JSON file for the report.
        plot (`str`, *optional*): PNG of the speed-ups.
        cost_table (`str`, *optional*): JSON file for the measured times, which `calibrate` reads.
        table_file (`str`, *optional*): Table of exits of the whole split, on which accuracies are then compared.
        which (`str`, *optional*), validation_share (`float`, *optional*), seed (`int`, *optional*):
            As of `open_highway`.
        threads (`int`, *optional*): Of the processor, of an exported highway too; by default as PyTorch chose.
        settings: `batch_sizes`, `repeats`, `limit`, as of `benchmark`.
    """
    check_counts(**{name: [value] for name, value in settings.items() if name in ("repeats", "limit")})
    if plot is not None:
        check_can_draw(plot)
    if threads is not None:
        check_counts(threads=[threads])
        torch.set_num_threads(threads)
    model, _, dataset = open_highway(checkpoint, data, which, validation_share, seed, threads)
    if policy is not None:
        model.set_exit_policy(policy)
    table = None if table_file is None else table_of(model, dataset, table_file)
    progress = partial(logging.tqdm, desc="timing", leave=False)
    report = benchmark(model, dataset, table=table, progress=progress, **settings)
    report = {"what": "lgvit benchmark", "data": data, "split": which, **report}
    if output is not None:
        write_json(output, report)
    if cost_table is not None:
        CostTable(**report["cost_table"]).save(cost_table)
    if plot is not None:
        plot_latency(plot, report["batches"])
    return report
