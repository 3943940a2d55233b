"""`lgvit`: parse, call one function of a room, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .recipe import add_options as add_train_options
from .recipe import as_words, read_recipe
from .settings import apply_settings, read_yaml

EXAMPLES = {
    "demo": "lgvit demo --output demo_output",
    "train": "lgvit train --config recipes/configs/vit_small/stage1.yaml --data photos/ --epochs 3\n"
    "  lgvit train --backbone vit --data digits --stage backbone --epochs 12 --output runs/backbone\n"
    "  lgvit train --model runs/backbone --data digits --stage 1 --epochs 8 --output runs/stage1 --resume auto\n"
    "any other option is one of HighwayTrainingArguments, such as --bf16 true or --gradient-checkpointing true",
    "grow": "lgvit grow google/vit-base-patch16-224 photos/ early_vit --max-accuracy-drop 0.01",
    "evaluate": "lgvit evaluate runs/stage2 --data digits --policy confidence --threshold 0.8 --output results.json",
    "env": "lgvit env",
    "convert": "lgvit convert --from lgvit LGViT-ViT-Cifar100/ converted/",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(prog="lgvit", description="Vision Transformers that answer early.")
    parser.add_argument("--version", action="version", version=f"lgvit-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "train a ViT with exits on handwritten digits, from nothing, and measure it")
    demo.add_argument("--output", default="demo_output", help="folder for the model, the figures and a plot")
    demo.add_argument("--quick", action="store_true", help="one epoch per stage, to see that everything works")
    demo.add_argument("--seed", type=int, default=0, help="of weights, splits and batches")
    demo.set_defaults(run=_demo)

    train = _command(
        commands, "train", "train the backbone, stage 1 (backbone and exits) or stage 2 (exits, distilled)"
    )
    add_train_options(train)
    train.set_defaults(run=_train, required=("data", "output"))

    grow = _command(commands, "grow", "give a plain fine-tuned ViT, DeiT or Swin early exits, from images alone")
    grow.add_argument("checkpoint", help="folder or Hub id of a plain ViT, DeiT or Swin")
    grow.add_argument("images", help="digits, a folder of images, parquet files or a Hub id; labels are not needed")
    grow.add_argument("output", help="folder for the model; type the same command again to go on after a stop")
    grow.add_argument("--limit", type=int, default=5000, help="use at most that many random images (default: 5000)")
    grow.add_argument("--ignore-labels", action="store_true", help="do as if the images had none")
    grow.add_argument("--exit-positions", type=int, nargs="+", metavar="BLOCK", help="candidates, from 1")
    grow.add_argument("--exit-types", nargs="+", metavar="HEAD", help="one head for all, or one each (conv1_1)")
    grow.add_argument("--max-accuracy-drop", type=float, default=0.01, help="on images held out (default: 0.01)")
    grow.add_argument("--validation-share", type=float, default=0.2, help="of the images, held out (default: 0.2)")
    grow.add_argument("--epochs", type=int, default=20, help="of the exits' training (default: 20)")
    grow.add_argument("--cost", choices=("time", "macs"), default="time", help="what to save (default: time)")
    grow.add_argument("--cache-limit", type=float, default=20, help="GB of disk for cached states (default: 20)")
    grow.add_argument("--seed", type=int, default=0, help="default: 0")
    grow.set_defaults(run=_grow)

    evaluate = _command(commands, "evaluate", "accuracy, depth, MACs and wall-clock of a highway, exit by exit")
    evaluate.add_argument("checkpoint", help="folder or Hub id of a highway")
    evaluate.add_argument(
        "--data", help="digits, a folder of images, parquet files or a Hub id; its test split is used"
    )
    evaluate.add_argument("--policy", help="exit policy instead of the saved one")
    evaluate.add_argument("--threshold", type=float, nargs="+", help="of the policy: one number, or one per exit")
    evaluate.add_argument("--patience", type=int, help="of the patience policies")
    evaluate.add_argument("--exit-index", type=int, help="of fixed, from 0")
    evaluate.add_argument("--entropy-threshold", type=float, help="of confidence_entropy")
    evaluate.add_argument("--batch-size", type=int, default=64, help="default: 64")
    evaluate.add_argument("--timed-batch-sizes", type=int, nargs="+", default=[1, 32], help="default: 1 32")
    evaluate.add_argument("--output", help="JSON file for the figures")
    evaluate.set_defaults(run=_evaluate, required=("data",))

    convert = _command(commands, "convert", "turn another project's checkpoint into one of ours")
    convert.add_argument("--from", dest="source_format", choices=("lgvit",), default="lgvit", help="whose checkpoint")
    convert.add_argument("source", help="folder with config.json and model.safetensors or pytorch_model.bin")
    convert.add_argument("output", help="folder to write")
    convert.set_defaults(run=_convert)

    env = _command(commands, "env", "print the versions to paste in an issue")
    env.set_defaults(run=_env)
    parser.set_defaults(commands=commands.choices)
    return parser


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file with these options; the command line overrides it")
    parser.set_defaults(required=())
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 on bad input with one line that says why, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
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
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        # one line: libraries wrap theirs over several
        print(f"lgvit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"lgvit: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


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
    from .recipe import run

    run(options)


def _grow(options: argparse.Namespace) -> None:
    from .growth import HeadTraining, grow

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
    import torch
    from transformers.utils import logging

    from .data import ProcessedImages, load_images
    from .evaluation.report import as_table, evaluate
    from .files import write_json
    from .models import open_model

    given = {name: getattr(options, name) for name in ("threshold", "patience", "exit_index", "entropy_threshold")}
    given = {name: value for name, value in given.items() if value is not None}
    if "threshold" in given and len(given["threshold"]) == 1:
        given["threshold"] = given["threshold"][0]
    if given and not options.policy:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --policy")
    splits = load_images(options.data)
    model, processor = open_model(options.checkpoint, label_names=splits.label_names, must_be_highway=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if options.policy:
        model.set_exit_policy(options.policy, **given)
    report = evaluate(
        model,
        ProcessedImages(splits.test, processor),
        batch_size=options.batch_size,
        timed_batch_sizes=options.timed_batch_sizes,
        progress=lambda batches: logging.tqdm(batches, desc="timing", leave=False),
    )
    print(as_table(report))
    if options.output:
        write_json(options.output, report)


def _convert(options: argparse.Namespace) -> None:
    from .hub.convert import convert_lgvit

    config = convert_lgvit(options.source, options.output)
    exits = ", ".join(f"{exit.after} {exit.head}" for exit in config.exits)
    print(f"all tensors matched: {config.model_type}, exits after {exits}; written to {options.output}")


def _env(options: argparse.Namespace) -> None:
    from .environment import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
