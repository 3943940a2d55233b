"""`lgvit`: parse, call one function of a room, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__

# small training sets are processed once and held in memory
KEPT_IMAGES = 20_000

EXAMPLES = {
    "demo": "lgvit demo --output demo_output",
    "train": "lgvit train --backbone vit --data digits --stage backbone --epochs 12 --output runs/backbone\n"
    "  lgvit train --model runs/backbone --data digits --stage 1 --epochs 8 --output runs/stage1\n"
    "  lgvit train --model runs/stage1 --data photos/ --stage 2 --epochs 6 --output runs/stage2 --resume",
    "evaluate": "lgvit evaluate runs/stage2 --data digits --policy confidence --threshold 0.8 --output results.json",
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
    train.add_argument("--data", help="digits, a folder of images, parquet files or a Hub id")
    train.add_argument("--output", help="folder for the model and its checkpoints")
    train.add_argument("--stage", choices=("backbone", "1", "2"), default="1", help="what to train (default: 1)")
    train.add_argument("--model", help="checkpoint to start from: a highway, or a plain ViT, DeiT or Swin")
    train.add_argument("--backbone", choices=("vit", "deit", "swin"), help="or: start from a small new one")
    train.add_argument("--image-size", type=int, default=32, help="of a new backbone (default: 32)")
    train.add_argument("--strategy", help="how exits share the loss; default alternating_weighted, distillation_lgvit")
    train.add_argument(
        "--exit-positions", type=int, nargs="+", metavar="BLOCK", help="blocks before each exit, from 1"
    )
    train.add_argument("--exit-types", nargs="+", metavar="HEAD", help="one head for all exits, or one per exit")
    train.add_argument("--epochs", type=float, default=10, help="default: 10")
    train.add_argument("--batch-size", type=int, default=32, help="per process (default: 32)")
    train.add_argument("--learning-rate", type=float, default=5e-4, help="default: 5e-4")
    train.add_argument("--warmup-steps", type=int, default=20, help="default: 20")
    train.add_argument("--weight-decay", type=float, default=0.05, help="default: 0.05")
    train.add_argument("--seed", type=int, default=0, help="default: 0")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    train.set_defaults(run=_train, required=("data", "output"))

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
        options = parser.parse_args(arguments)
        if options.config:
            options = _with_config_file(parser, options, arguments)
        for name in options.required:
            if getattr(options, name) is None:
                raise ValueError(f"lgvit {options.command} needs --{name}")
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        # one line: libraries wrap theirs over several
        print(f"lgvit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lgvit: stopped", file=sys.stderr)
        return 130
    return 0


def _with_config_file(
    parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str]
) -> argparse.Namespace:
    """The options again, with the YAML file's values as defaults."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError('--config reads YAML: pip install "lgvit-hf[train]"') from error
    try:
        settings = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{options.config}: not YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{options.config}: a mapping of options to values is needed")
    command = parser.get_default("commands")[options.command]
    known = {action.dest: action for action in command._actions if action.option_strings}
    for special in ("help", "config"):
        known.pop(special)
    for key, value in settings.items():
        action = known.get(str(key).replace("-", "_"))
        if action is None:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"{options.config}: unknown key {key!r}; {hint}")
        command.set_defaults(**{action.dest: _as_typed(action, key, value, options.config)})
    return parser.parse_args(arguments)


def _as_typed(action: argparse.Action, key: str, value: Any, file: str) -> Any:
    """A YAML value as the command line would have read it."""
    if value is None:
        return action.default
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{file}: {key}: {value!r} must be true or false")
        return value
    many = action.nargs == "+"
    read = action.type or str
    try:
        typed = [read(entry) for entry in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise ValueError(
            f"{file}: {key}: {value!r} must be {read.__name__}{' or a list of them' if many else ''}"
        ) from None
    if len(typed) > 1 and not many:
        raise ValueError(f"{file}: {key}: {value!r} must be one value")
    if action.choices and typed[0] not in action.choices:
        raise ValueError(f"{file}: {key}: {value!r} must be one of {', '.join(action.choices)}")
    return typed if many else typed[0]


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(options.output, quick=options.quick, seed=options.seed)


def _train(options: argparse.Namespace) -> None:
    from .data import ProcessedImages, load_images
    from .files import write_json
    from .models import open_model
    from .training.run import train

    splits = load_images(options.data, seed=options.seed)
    model, processor = open_model(
        options.model,
        backbone=options.backbone,
        image_size=options.image_size,
        label_names=splits.label_names,
        exit_positions=options.exit_positions,
        exit_types=options.exit_types,
        seed=options.seed,
    )
    run = train(
        model,
        processor,
        ProcessedImages(splits.train, processor, keep=len(splits.train) <= KEPT_IMAGES),
        options.output,
        stage=options.stage,
        resume=options.resume,
        strategy=options.strategy,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        lr_scheduler_type="cosine",
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="epoch",
        report_to=[],
        seed=options.seed,
    )
    write_json(Path(options.output) / "training.json", run)
    print(f"{run['steps']} steps in {run['seconds']:.0f} s, mean loss {run['loss']:.3f}; model in {options.output}")


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


if __name__ == "__main__":
    sys.exit(main())
