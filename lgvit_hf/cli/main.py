"""`lgvit`: parse, call one function of a room, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from ..data.settings import apply_settings, read_yaml
from ..training.recipe import as_words, read_recipe
from .options import build_parser, policy_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 where a command did what it was asked and says that something is wrong; 2 on bad input, with one line that
    says why; 130 on Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if arguments[:1] == ["train"] and arguments[-1] == "--debug":
        del arguments[-1]
    parser = build_parser()
    try:
        options, others = parser.parse_known_args(arguments)
        from_file: list[str] = []
        if options.config:
            options, from_file = _with_config_file(parser, options, arguments)
        if options.command == "train":
            options.others = [*from_file, *others]
        elif others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        for name in options.required:
            if getattr(options, name) is None and not (name == "output" and getattr(options, "dry_run", False)):
                raise ValueError(f"lgvit {options.command} needs --{name}")
        return COMMANDS[options.command](options) or 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        # one line: libraries wrap theirs over several
        print(f"lgvit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"lgvit: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130


def _with_config_file(
    parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options again, with the YAML file's values as defaults; and what is left of it, as words, for `train`."""
    command = parser.get_default("commands")[options.command]
    if options.command == "train":
        left = read_recipe(command, options.config)
    else:
        left = {}
        apply_settings(command, read_yaml(options.config), options.config)
    return parser.parse_known_args(arguments)[0], as_words(left)


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(options.output, quick=options.quick, seed=options.seed)


def _train(options: argparse.Namespace) -> None:
    import torch.distributed

    from ..training.recipe import run

    run(options)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # a group that is still held when the interpreter ends now and then aborts it
        torch.distributed.destroy_process_group()


def _grow(options: argparse.Namespace) -> None:
    from ..training.distill_exits import HeadTraining, grow

    names = ("exit_positions", "max_accuracy_drop", "limit", "ignore_labels", "validation_share", "cost")
    types = options.exit_types or ["conv1_1"]
    grow(
        options.checkpoint,
        options.images,
        options.output,
        **{name: getattr(options, name) for name in names},
        exit_types=types[0] if len(types) == 1 else types,
        training=HeadTraining(epochs=options.epochs),
        cache_limit=options.cache_limit,
        seed=options.seed,
        say=print,
    )
    print(f"\nsaved in {options.output}: load it with AutoModelForImageClassification")


def _evaluate(options: argparse.Namespace) -> None:
    from ..evaluation.report import as_table
    from .evaluate import run_evaluate

    report = run_evaluate(
        options.checkpoint,
        options.data,
        policy=policy_of(options),
        output=options.output,
        plots=options.plots,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        batch_size=options.batch_size,
        timed_batch_sizes=options.timed_batch_sizes,
    )
    print(as_table(report))


def _benchmark(options: argparse.Namespace) -> None:
    from ..evaluation.report_text import as_text
    from .benchmark import run_benchmark

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
    print(as_text(report))


def _calibrate(options: argparse.Namespace) -> None:
    from .calibrate import run_calibrate

    names = ("policy", "max_accuracy_drop", "min_speedup", "max_macs", "max_latency", "delta", "bound", "batch_size")
    report = run_calibrate(
        options.checkpoint,
        options.data,
        output=options.output,
        plot=options.plot,
        table_file=options.table,
        cost_table=options.cost_table,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        labels=not options.ignore_labels,
        choose_exits=not options.all_exits,
        **{name: getattr(options, name) for name in names},
    )
    print(report.as_text())
    print(f"\nwritten to {options.output or options.checkpoint}: config.json, and calibration.json with the report")


def _sweep(options: argparse.Namespace) -> None:
    from .sweep import run_sweep, sweep_as_text

    if (options.values is None) == (options.range is None):
        raise ValueError("give either --values or --range FROM TO STEPS")
    if options.values is None:
        first, last, steps = options.range
        if not steps >= 2 or steps % 1:
            raise ValueError(f"--range: STEPS={steps:g} must be a whole number of at least 2")
        options.values = [round(first + (last - first) * step / (steps - 1), 10) for step in range(int(steps))]
    given = {name: getattr(options, name) for name in ("patience", "entropy_threshold")}
    rows = run_sweep(
        options.checkpoint,
        options.data,
        options.output,
        policy={"name": options.policy, **{name: value for name, value in given.items() if value is not None}},
        values=options.values,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        timed_batch_sizes=options.timed_batch_sizes,
    )
    print(sweep_as_text(rows))
    print(f"\nkept in {options.output}: sweep.jsonl, table.safetensors, and sweep.png where matplotlib is installed")


def _export(options: argparse.Namespace) -> None:
    from .export import export_as_text, run_export

    manifest = run_export(
        options.checkpoint,
        options.output,
        layout=options.layout,
        precision=options.quantize or "float32",
        policy=policy_of(options),
        data=options.data,
        max_accuracy_drop=options.max_accuracy_drop,
        limit=options.limit,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
        processor=options.processor,
    )
    print(export_as_text(manifest, options.output))


def _predict(options: argparse.Namespace) -> int:
    from .predict import predict_as_text, run_predict

    names = ("split", "batch_size", "workers", "top_k", "probabilities")
    report = run_predict(
        options.checkpoint,
        options.paths,
        options.output,
        policy=policy_of(options),
        **{name: getattr(options, name) for name in names},
    )
    print(predict_as_text(report, options.output))
    return 1 if report["errors"] else 0


def _split(options: argparse.Namespace) -> None:
    from .serve import run_split

    settings = (options.at, options.format, policy_of(options), options.processor)
    print(run_split(options.checkpoint, options.output, *settings))


def _serve(options: argparse.Namespace) -> None:
    from .serve import run_serve

    names = ("host", "port", "state_dtype", "timeout", "retries", "max_batch_size", "max_wait_ms", "max_body_mb")
    run_serve(
        options.path,
        next_url=options.next,
        policy=policy_of(options),
        threads=options.threads,
        **{name: getattr(options, name) for name in names},
    )


def _visualize(options: argparse.Namespace) -> None:
    from .visualize import run_visualize

    files = run_visualize(
        options.checkpoint,
        options.data,
        options.output,
        images=options.images,
        which=options.split,
        validation_share=options.validation_share,
        seed=options.seed,
    )
    print(f"drawn in {options.output}: {', '.join(files)}")


def _convert(options: argparse.Namespace) -> None:
    from .convert import OPTIONS, run_convert

    given = {name: getattr(options, name) for name in OPTIONS}
    if given["exit_types"] is not None and len(given["exit_types"]) == 1:
        given["exit_types"] = given["exit_types"][0]
    if given["image_size"] is not None:
        given["image_size"] = tuple(given["image_size"])
    formats = {name: getattr(options, name) for name in ("source_format", "target_format")}
    print(run_convert(options.source, options.output, **formats, **given))


def _compare(options: argparse.Namespace) -> None:
    from .compare import compare_as_text, run_compare

    rows = run_compare(options.sweep, options.paper)
    print(compare_as_text(rows))
    if options.output:
        from ..files import write_json

        write_json(options.output, rows)


def _card(options: argparse.Namespace) -> None:
    from .card import run_card

    names = ("output", "name", "datasets", "base_model", "license", "tags")
    file, reports = run_card(
        options.checkpoint, options.evaluation, **{name: getattr(options, name) for name in names}
    )
    print(f"written to {file}" + (f", from {', '.join(reports)}" if reports else ", from the config alone"))


def _env(options: argparse.Namespace) -> None:
    from ..evaluation.environment import report

    print(report())


COMMANDS = {
    "demo": _demo,
    "train": _train,
    "grow": _grow,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "calibrate": _calibrate,
    "sweep": _sweep,
    "export": _export,
    "predict": _predict,
    "split": _split,
    "serve": _serve,
    "visualize": _visualize,
    "convert": _convert,
    "compare": _compare,
    "card": _card,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())
