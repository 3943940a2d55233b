"""`lgvit benchmark`: a checkpoint against the clock."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from ..data.settings import check_counts, whole
from ..files import write_json
from .options import add_data, add_policy, policy_of

HELP = "wall-clock against the backbone and a static model of equal accuracy"
EXAMPLE = "lgvit benchmark runs/stage2 --data photos/ --batch-sizes 1 8 32 --cost-table costs.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit benchmark`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway")
    add_data(parser, "test", "what leaves depends on the images")
    add_policy(parser)
    parser.add_argument("--batch-sizes", type=whole(), nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument("--threads", type=whole(1, 1024), help="of the processor (default: as PyTorch chooses)")
    parser.add_argument("--repeats", type=whole(), default=3, help="timed rounds per batch (default: 3)")
    parser.add_argument("--limit", type=whole(), default=256, help="images to time, drawn at random (default: 256)")
    parser.add_argument("--table", help="table of exits on which accuracies are compared; written if not there")
    parser.add_argument("--cost-table", help="JSON file for the measured times, for lgvit calibrate")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--plot", help="PNG of the speed-ups")
    parser.set_defaults(required=("data",))


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    from ..evaluation.report_text import benchmark_as_text

    report = run_benchmark(
        options.checkpoint,
        options.data,
        policy=policy_of(options),
        output=options.output,
        plot=options.plot,
        cost_table=options.cost_table,
        table_file=options.table,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        threads=options.threads,
        batch_sizes=options.batch_sizes,
        repeats=options.repeats,
        limit=options.limit,
    )
    print(benchmark_as_text(report))


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
        checkpoint (`str`): See `open_highway`.
        data (`str`): See `load_images`.
        policy (`dict`, *optional*): Instead of the saved one.
        output (`str`, *optional*): JSON file for the report.
        plot (`str`, *optional*): PNG of the speed-ups.
        cost_table (`str`, *optional*): JSON file for the measured times, which `calibrate` reads.
        table_file (`str`, *optional*): Table of exits of the whole split, on which accuracies are then compared.
        which (`str`, *optional*), validation_share (`float`, *optional*), seed (`int`, *optional*):
            See `open_highway`.
        threads (`int`, *optional*): Of the processor, of an exported highway too; by default as PyTorch chose.
        settings: `batch_sizes`, `repeats`, `limit`, as of `benchmark`.
    """
    import torch
    from transformers.utils import logging

    from ..evaluation.benchmark import benchmark
    from ..evaluation.cost_table import CostTable
    from ..evaluation.plots import plot_latency
    from .drawing import check_can_draw
    from .inputs import open_highway, table_of

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
