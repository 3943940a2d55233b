"""`lgvit benchmark`: a checkpoint against the clock."""

from __future__ import annotations

import argparse

from ..data.settings import whole
from ..files import write_json
from .options import add_data, add_policy

HELP = "wall-clock against the backbone and a static model of equal accuracy"
EXAMPLE = (
    "lgvit benchmark runs/stage2 --data photos/ --batch-sizes 1 8 32 --cost-table costs.json\n"
    "  lgvit benchmark onnx/ --data photos/ --runtime torch onnxruntime openvino --torch-checkpoint runs/stage2"
)
RUNTIMES = ("torch", "onnxruntime", "openvino")
REQUIRED = ("data",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit benchmark`."""
    add_data(parser, "test", "which samples exit early depends on the images")
    add_policy(parser)
    parser.add_argument("--batch-sizes", type=whole(), nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument("--threads", type=whole(1, 1024), help="of the processor (default: as PyTorch chooses)")
    several = "of an exported folder; several are compared with each other, torch among them (default: onnxruntime)"
    parser.add_argument("--runtime", choices=RUNTIMES, nargs="+", help=several)
    parser.add_argument("--torch-checkpoint", help="for --runtime torch: the checkpoint that was exported")
    parser.add_argument("--repeats", type=whole(), default=3, help="timed rounds per batch (default: 3)")
    parser.add_argument("--limit", type=whole(), default=256, help="images to time, drawn at random (default: 256)")
    parser.add_argument("--table", help="table of exits on which accuracies are compared; written if not there")
    parser.add_argument("--cost-table", help="JSON file for the measured times, for lgvit calibrate")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--plot", help="PNG of the speed-ups")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    import torch

    from ..evaluation.benchmark import benchmark
    from ..evaluation.cost_table import CostTable
    from ..evaluation.plots import plot_latency
    from ..evaluation.report_text import benchmark_as_text
    from .drawing import check_can_draw
    from .inputs import open_options, progress_bar, table_of

    if options.plot is not None:
        check_can_draw(options.plot)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.runtime is not None and (len(options.runtime) > 1 or "torch" in options.runtime):
        _compare(options)
        return
    options.runtime = options.runtime and options.runtime[0]
    model, _, dataset, _ = open_options(options, has_policy=True)
    table = None if options.table is None else table_of(model, dataset, options.table)
    settings = {name: getattr(options, name) for name in ("batch_sizes", "repeats", "limit")}
    report = benchmark(model, dataset, table=table, progress=progress_bar, **settings)
    report = {"what": "lgvit benchmark", "data": options.data, "split": options.split, **report}
    if options.output is not None:
        write_json(options.output, report)
    if options.cost_table is not None:
        CostTable(**report["cost_table"]).save(options.cost_table)
    if options.plot is not None:
        plot_latency(options.plot, report["batches"])
    print(benchmark_as_text(report))


def _compare(options: argparse.Namespace) -> None:
    """One exported folder in several runtimes, and the checkpoint that it came from."""
    from ..data.processing import stack
    from ..evaluation.benchmark import random_items
    from ..evaluation.costs import Highway
    from ..evaluation.runtime_comparison import compare_runtimes, comparison_as_text
    from .inputs import open_options, progress_bar

    for name in ("table", "cost_table", "plot"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is of one runtime; leave it out, or name one --runtime")
    if ("torch" in options.runtime) != (options.torch_checkpoint is not None):
        raise ValueError("--runtime torch goes with --torch-checkpoint, the checkpoint that was exported")
    exported, models = options.checkpoint, dict[str, Highway]()
    for name in dict.fromkeys(options.runtime):
        is_torch = name == "torch"
        options.checkpoint, options.runtime = (options.torch_checkpoint, None) if is_torch else (exported, name)
        models[name], _, dataset, _ = open_options(options, has_policy=True)
    pixels = stack(random_items(dataset, options.limit))["pixel_values"]
    sizes = {"batch_sizes": options.batch_sizes, "repeats": options.repeats}
    report = compare_runtimes(models, pixels, progress=progress_bar, **sizes)
    report = {"what": "lgvit benchmark", "data": options.data, "split": options.split, **report}
    if options.output is not None:
        write_json(options.output, report)
    print(comparison_as_text(report))
