"""What may be typed behind `lgvit`: commands, their options, an example of each. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from .. import __version__
from ..data.settings import real, whole
from ..training.recipe import add_options as add_train_options

LONGEST_WAIT_MS = 1000.0
EXAMPLES = {
    "demo": "lgvit demo --output demo_output",
    "train": "lgvit train --config recipes/configs/vit_small/stage1.yaml --data photos/ --epochs 3\n"
    "  lgvit train --backbone vit --data digits --stage backbone --epochs 12 --output runs/backbone\n"
    "  lgvit train --model runs/backbone --data digits --stage 1 --epochs 8 --output runs/stage1 --resume auto\n"
    "any other option is one of HighwayTrainingArguments, such as --bf16 true or --gradient-checkpointing true;\n"
    "--debug at the end shows where an error comes from",
    "grow": "lgvit grow google/vit-base-patch16-224 photos/ early_vit --max-accuracy-drop 0.01",
    "evaluate": "lgvit evaluate runs/stage2 --data digits --policy confidence --threshold 0.8 --output results.json",
    "benchmark": "lgvit benchmark runs/stage2 --data photos/ --batch-sizes 1 8 32 --cost-table costs.json",
    "calibrate": "lgvit calibrate runs/stage2 --data photos/ --max-accuracy-drop 0.01 --delta 0.05 --plot curve.png\n"
    "  lgvit calibrate runs/stage2 --data photos/ --max-latency 4 --cost-table costs.json --batch-size 8",
    "sweep": "lgvit sweep runs/stage2 --data photos/ --output sweep --policy confidence --range 0.5 0.99 25\n"
    "  lgvit sweep runs/stage2 --data photos/ --output patience --policy patience --values 1 2 3 4",
    "compare": "lgvit compare sweep/ --paper lgvit",
    "card": "lgvit evaluate runs/stage2 --data photos/ --output runs/stage2/evaluation.json\n"
    "  lgvit card runs/stage2 --name me/my-highway --license apache-2.0 --base-model google/vit-base-patch16-224",
    "env": "lgvit env",
    "export": "lgvit export runs/stage2 onnx/\n"
    "  lgvit export runs/stage2 small/ --quantize int8 --data photos/ --max-accuracy-drop 0.005",
    "predict": "lgvit predict runs/stage2 photos/ --output predictions.parquet --workers 4\n"
    "  lgvit predict onnx/ 'photos/**/*.jpg' --output predictions.csv --top-k 5\n"
    "  lgvit predict runs/stage2 digits --split test --output predictions.jsonl --policy confidence --threshold 0.8\n"
    "stopped or killed, the same command goes on where it was; an image that cannot be read has an error in its row,\n"
    "and the exit code is then 1",
    "split": "lgvit split runs/stage2 parts/ --at 4 8 --format onnx",
    "serve": "lgvit serve parts/part2 --port 8002\n"
    "  lgvit serve parts/part1 --port 8001 --next http://cloud:8002 --state-dtype float16\n"
    "  lgvit serve runs/stage2 --port 8000 --policy confidence --threshold 0.8",
    "visualize": "lgvit visualize runs/avit --data photos/ --output pictures --images 8",
    "convert": "lgvit convert --from lgvit LGViT-ViT-Cifar100/ converted/\n"
    "  lgvit convert --from eevit eevit/ converted/    (a state dict and EEVIT's one .yaml)\n"
    "  lgvit convert --from avit small-10-75.pth avit_small/\n"
    "  lgvit convert --from timm vit_small_patch16_224/model.safetensors plain/\n"
    "  lgvit convert --from torchvision swin_t-704ceda3.pth highway/ --exit-positions 4 8 --exit-types conv1_1\n"
    "  lgvit convert --to lgvit runs/stage2 original/",
}


def _wait(text: Any) -> float:
    """Milliseconds; `inf` stands for the longest wait."""
    return LONGEST_WAIT_MS if str(text) == "inf" else real(0, LONGEST_WAIT_MS)(text)


_wait.__name__ = real(0, LONGEST_WAIT_MS).__name__


class Parser(argparse.ArgumentParser):
    """One whose errors are raised, so that they are told in one line as any other."""

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`; says which command, where it is one."""
        command = self.prog.removeprefix("lgvit").strip()
        raise ValueError(f"{command}: {message}" if command else message)


def build_parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported for it."""
    parser = Parser(prog="lgvit", description="Vision Transformers that answer early.")
    parser.add_argument("--version", action="version", version=f"lgvit-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "train a ViT with exits on handwritten digits, from nothing, and measure it")
    demo.add_argument("--output", default="demo_output", help="folder for the model, the figures and a plot")
    demo.add_argument("--quick", action="store_true", help="one epoch per stage, to see that everything works")
    demo.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of weights, splits and batches")

    train = _command(
        commands, "train", "train the backbone, stage 1 (backbone and exits) or stage 2 (exits, distilled)"
    )
    add_train_options(train)
    train.set_defaults(required=("data", "output"))

    grow = _command(commands, "grow", "give a plain fine-tuned ViT, DeiT or Swin early exits, from images alone")
    grow.add_argument("checkpoint", help="folder or Hub id of a plain ViT, DeiT or Swin")
    grow.add_argument("images", help="digits, a folder of images, parquet files or a Hub id; labels are not needed")
    grow.add_argument("output", help="folder for the model; type the same command again to go on after a stop")
    grow.add_argument(
        "--limit", type=whole(), default=5000, help="use at most that many random images (default: 5000)"
    )
    grow.add_argument("--ignore-labels", action="store_true", help="do as if the images had none")
    grow.add_argument("--exit-positions", type=whole(), nargs="+", metavar="BLOCK", help="candidates, from 1")
    grow.add_argument("--exit-types", nargs="+", metavar="HEAD", help="one head for all, or one each (conv1_1)")
    grow.add_argument("--max-accuracy-drop", type=real(), default=0.01, help="on images held out (default: 0.01)")
    grow.add_argument("--validation-share", type=real(), default=0.2, help="of the images, held out (default: 0.2)")
    grow.add_argument("--epochs", type=whole(), help="of the exits' training (default: from 5 to 20, by the images)")
    grow.add_argument("--cost", choices=("time", "macs"), default="time", help="what to save (default: time)")
    grow.add_argument("--cache-limit", type=real(), default=20, help="GB of disk for cached states (default: 20)")
    grow.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="default: 0")

    evaluate = _command(commands, "evaluate", "accuracy, depth, MACs and wall-clock of a highway, exit by exit")
    evaluate.add_argument("checkpoint", help="folder or Hub id of a highway")
    _add_data(evaluate, "test", "rows to report on")
    _add_policy(evaluate)
    evaluate.add_argument("--batch-size", type=whole(), default=64, help="default: 64")
    evaluate.add_argument("--timed-batch-sizes", type=whole(), nargs="+", default=[1, 32], help="default: 1 32")
    evaluate.add_argument("--output", help="JSON file for the figures")
    evaluate.add_argument("--plots", help="folder for pictures: exits, cost, reliability, classes, confusion, gallery")
    evaluate.set_defaults(required=("data",))

    benchmark = _command(commands, "benchmark", "wall-clock against the backbone and a static model of equal accuracy")
    benchmark.add_argument("checkpoint", help="folder or Hub id of a highway")
    _add_data(benchmark, "test", "what leaves depends on the images")
    _add_policy(benchmark)
    benchmark.add_argument("--batch-sizes", type=whole(), nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    benchmark.add_argument("--threads", type=whole(1, 1024), help="of the processor (default: as PyTorch chooses)")
    benchmark.add_argument("--repeats", type=whole(), default=3, help="timed rounds per batch (default: 3)")
    benchmark.add_argument("--limit", type=whole(), default=256, help="images to time, drawn at random (default: 256)")
    benchmark.add_argument("--table", help="table of exits on which accuracies are compared; written if not there")
    benchmark.add_argument("--cost-table", help="JSON file for the measured times, for lgvit calibrate")
    benchmark.add_argument("--output", help="JSON file for the figures")
    benchmark.add_argument("--plot", help="PNG of the speed-ups")
    benchmark.set_defaults(required=("data",))

    calibrate = _command(commands, "calibrate", "choose temperatures, thresholds and exits, and write them down")
    calibrate.add_argument("checkpoint", help="folder or Hub id of a highway")
    _add_data(calibrate, "validation", "rows it was not trained on")
    calibrate.add_argument("--policy", default="confidence", help="which built-in policy (default: confidence)")
    calibrate.add_argument("--max-accuracy-drop", type=real(), help="share of all rows, 0.01 for one point")
    calibrate.add_argument("--min-speedup", type=real(), help="cost of the plain model over the mean cost")
    calibrate.add_argument("--max-macs", type=real(), help="mean MACs of an image")
    calibrate.add_argument("--max-latency", type=real(), help="mean milliseconds of an image, by the cost table")
    calibrate.add_argument("--delta", type=real(), help="the drop holds with probability 1 - DELTA; needs more rows")
    calibrate.add_argument(
        "--bound", choices=("drop", "harm"), default="drop", help="what holds: the drop, or the harm without repairs"
    )
    calibrate.add_argument("--ignore-labels", action="store_true", help="judge by the full model's answers")
    calibrate.add_argument("--cost-table", help="measured times to save instead of MACs: lgvit benchmark --cost-table")
    calibrate.add_argument(
        "--batch-size", type=whole(), default=1, help="at which the cost table is read (default: 1)"
    )
    calibrate.add_argument("--all-exits", action="store_true", help="switch no exit off")
    calibrate.add_argument("--table", help="file of the table of exits: read if it is there, otherwise written")
    calibrate.add_argument("--output", help="folder for a calibrated copy, instead of the checkpoint's own config")
    calibrate.add_argument("--plot", help="PNG of accuracy against cost")
    calibrate.set_defaults(required=("data",))

    sweep = _command(commands, "sweep", "a policy at many thresholds: accuracy, depth, cost; goes on where it stopped")
    sweep.add_argument("checkpoint", help="folder or Hub id of a highway")
    _add_data(sweep, "test", "rows to report on")
    sweep.add_argument("--output", help="folder for the table, the rows and a plot")
    sweep.add_argument("--policy", default="confidence", help="which built-in policy (default: confidence)")
    sweep.add_argument("--values", type=real(), nargs="+", help="thresholds, or patiences, or exit indices of fixed")
    sweep.add_argument(
        "--range", type=real(), nargs=3, metavar=("FROM", "TO", "STEPS"), help="that many values, evenly spaced"
    )
    sweep.add_argument("--patience", type=whole(), help="of patience_confidence")
    sweep.add_argument("--entropy-threshold", type=real(), help="of confidence_entropy")
    sweep.add_argument(
        "--timed-batch-sizes", type=whole(), nargs="+", default=[], help="also measure wall-clock at these"
    )
    sweep.set_defaults(required=("data", "output"))

    compare = _command(commands, "compare", "a sweep beside published figures, at the same layer speed-up")
    compare.add_argument("sweep", help="folder of `lgvit sweep`")
    compare.add_argument("--paper", default="lgvit", help="whose figures (default: lgvit)")
    compare.add_argument("--output", help="JSON file for the figures")

    export = _command(commands, "export", "write ONNX that really skips, and run it against the model")
    export.add_argument("checkpoint", help="folder or Hub id of a highway")
    export.add_argument("output", help="folder to write")
    export.add_argument(
        "--layout",
        choices=("single", "segments", "all_exits"),
        default="single",
        help="one file with real branches, one per segment, or all exits' logits (default: single)",
    )
    export.add_argument(
        "--quantize", choices=("int8", "float16"), help="smaller and less exact; give --data to know how much"
    )
    _add_data(export, "test", "rows on which the files are judged, where --data is given")
    export.add_argument("--limit", type=whole(), help="judge on that many of them, drawn at random")
    export.add_argument(
        "--max-accuracy-drop", type=real(), default=0.005, help="on these rows; more fails the export (default: 0.005)"
    )
    _add_processor(export)
    _add_policy(export)

    predict = _command(commands, "predict", "answer images into one file; goes on where it stopped")
    predict.add_argument("checkpoint", help="folder or Hub id of a highway, or folder of an exported one")
    predict.add_argument(
        "paths",
        nargs="+",
        metavar="images",
        help="files, folders, patterns; or one dataset: digits, parquet files or a Hub id",
    )
    predict.add_argument("--output", help=".parquet, .csv or .jsonl file")
    predict.add_argument("--split", help="of a dataset that has several")
    _add_policy(predict)
    predict.add_argument("--batch-size", type=whole(), default=64, help="default: 64")
    predict.add_argument(
        "--workers", type=whole(), default=1, help="processes; one thread each if several (default: 1)"
    )
    predict.add_argument("--top-k", type=whole(), help="also write that many most probable labels")
    predict.add_argument("--probabilities", action="store_true", help="also write the probabilities of all labels")
    predict.set_defaults(required=("output",))

    split = _command(commands, "split", "cut a highway at exits into parts for machines in a row")
    split.add_argument("checkpoint", help="folder or Hub id of a highway")
    split.add_argument("output", help="folder to write")
    split.add_argument("--at", type=whole(), nargs="+", metavar="BLOCK", help="blocks run before each cut, at exits")
    split.add_argument(
        "--format", choices=("safetensors", "onnx"), default="safetensors", help="onnx needs no PyTorch (safetensors)"
    )
    _add_processor(split)
    _add_policy(split)
    split.set_defaults(required=("at",))

    serve = _command(commands, "serve", "answer images over HTTP, as a whole highway or as a part of one")
    serve.add_argument("path", help="folder of a part or of an exported highway, or folder or Hub id of a highway")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    serve.add_argument("--port", type=whole(0, 65535), default=8000, help="0 for any that is free (default: 8000)")
    serve.add_argument("--next", metavar="URL", help="service of the next part")
    serve.add_argument("--state-dtype", choices=("float32", "float16"), default="float32", help="sent to it (float32)")
    serve.add_argument("--timeout", type=real(0, 3600), default=5.0, help="seconds for the next part (default: 5)")
    serve.add_argument(
        "--retries", type=whole(0, 100), default=2, help="of a message that did not arrive (default: 2)"
    )
    serve.add_argument("--max-batch-size", type=whole(), default=32, help="rows that run together (default: 32)")
    serve.add_argument(
        "--max-wait-ms",
        type=_wait,
        default=2.0,
        help=f"for others to run with, up to {LONGEST_WAIT_MS:g}, which `inf` stands for (default: 2)",
    )
    serve.add_argument("--max-body-mb", type=real(0, 1e6), default=32.0, help="of a request; states need 17 (32)")
    serve.add_argument("--threads", type=whole(1, 1024), help="of the processor")
    _add_policy(serve)

    visualize = _command(commands, "visualize", "draw how deep tokens went, or which images left first and last")
    visualize.add_argument("checkpoint", help="folder or Hub id of an AViT or of a highway")
    _add_data(visualize, "test", "images to choose from, where they have labels")
    visualize.add_argument("--output", help="folder for the pictures")
    visualize.add_argument("--images", type=whole(), default=8, help="how many are drawn (default: 8)")
    visualize.set_defaults(required=("data", "output"))

    convert = _command(commands, "convert", "turn another project's checkpoint into one of ours, or ours into LGViT's")
    convert.add_argument(
        "--from",
        dest="source_format",
        choices=("lgvit", "eevit", "avit", "timm", "torchvision"),
        help="whose checkpoint (default: lgvit)",
    )
    convert.add_argument("--to", dest="target_format", choices=("lgvit",), help="the way back, for a highway of ours")
    convert.add_argument("source", help="folder with weights and what belongs to them, or the file of weights")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--gate-scale", type=real(), help="of avit, where the file's name does not say it")
    convert.add_argument("--gate-center", type=real(), help="likewise")
    convert.add_argument(
        "--num-attention-heads", type=whole(), help="of avit, timm, torchvision (one for 64 channels)"
    )
    convert.add_argument(
        "--image-size", type=whole(), nargs=2, metavar=("HEIGHT", "WIDTH"), help="of timm, torchvision"
    )
    convert.add_argument(
        "--exit-positions", type=whole(), nargs="+", metavar="BLOCK", help="of these: new exits, from 1"
    )
    convert.add_argument("--exit-types", nargs="+", metavar="HEAD", help="one head for all, or one each (LGViT's)")

    card = _command(commands, "card", "write the model card, from the config and the reports of other commands")
    card.add_argument("checkpoint", help="folder or Hub id of a highway or an AViT")
    card.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="JSON",
        help="reports of evaluate, calibrate, benchmark (default: evaluation.json, calibration.json and "
        "benchmark.json of the folder)",
    )
    card.add_argument("--output", help="Markdown file (default: README.md of the folder)")
    card.add_argument("--name", help="Hub id under which the model will be found (default: the folder's name)")
    card.add_argument("--datasets", nargs="+", default=[], metavar="HUB_ID", help="what it was trained on")
    card.add_argument("--base-model", help="Hub id of the model that it was made from")
    card.add_argument("--license", help="such as apache-2.0")
    card.add_argument("--tags", nargs="+", default=[], help="beside the usual ones")

    _command(commands, "env", "print the versions to paste in an issue")
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
    if name != "train":  # whose `--debug` is that of `TrainingArguments`, where a word follows it
        parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(required=())
    return parser


def _add_processor(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--processor", metavar="FOLDER|NAME", help="folder or Hub id with the image processor, instead of checkpoint's"
    )


def _add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", help="exit policy instead of the saved one")
    command.add_argument("--threshold", type=real(), nargs="+", help="of the policy: one number, or one per exit")
    command.add_argument("--patience", type=whole(), help="of the patience policies")
    command.add_argument("--exit-index", type=whole(0), help="of fixed, from 0")
    command.add_argument("--entropy-threshold", type=real(), help="of confidence_entropy")


def policy_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of the exit policy that was typed, `None` for the saved one.

    Raises:
        ValueError: A setting without `--policy`.

    Example:

        >>> policy_of(build_parser().parse_args(["evaluate", "runs/", "--policy", "confidence", "--threshold", "0.8"]))
        {'name': 'confidence', 'threshold': 0.8}
    """
    given = {name: getattr(options, name) for name in ("threshold", "patience", "exit_index", "entropy_threshold")}
    given = {name: value for name, value in given.items() if value is not None}
    if "threshold" in given and len(given["threshold"]) == 1:
        given["threshold"] = given["threshold"][0]
    if given and not options.policy:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --policy")
    return {"name": options.policy, **given} if options.policy else None


def _add_data(command: argparse.ArgumentParser, which: str, why: str) -> None:
    command.add_argument("--data", help="digits, a folder of images, parquet files or a Hub id")
    command.add_argument(
        "--split", choices=("train", "validation", "test"), default=which, help=f"{why} (default: {which})"
    )
    command.add_argument(
        "--validation-share",
        type=real(),
        default=0.15,
        help="of the training rows, where the data have no such split; as in training (default: 0.15)",
    )
    command.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="by which rows are split; as in training (default: 0)"
    )
