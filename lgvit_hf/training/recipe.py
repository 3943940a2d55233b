"""`lgvit train`: one YAML file, or the same options by hand, is one stage of one published method on one dataset."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.settings import apply_settings, names_of, parse_yaml, read_yaml, real, whole
from ..hub.eevit_config import is_eevit, translate_eevit
from .recipe_text import exit_accuracies_text, exit_lines, halting_lines, halting_text

REQUIRED = ("data", "output")
# what is held in memory of decoded images, so that small sets are decoded once
KEPT_BYTES = 1_000_000_000
EXIT_OPTIONS = ("exit_positions", "exit_types", "exit_policy", "exit_loss_weights", "pool")
# our short words for `TrainingArguments`
TRAINING_NAMES = {
    "output": "output_dir",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
TRAINING_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "report_to": [],
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit train`; any other is one of `HighwayTrainingArguments`."""
    add = parser.add_argument
    add("--data", help="digits, a folder of images, parquet files or a Hub id")
    add("--output", help="folder for the model and its checkpoints")
    add("--stage", choices=("backbone", "1", "2", "avit"), default="1", help="what to train (default: 1)")
    add("--model", help="checkpoint to start from: a highway, an A-ViT, or a plain ViT, DeiT or Swin")
    add("--backbone", choices=("vit", "deit", "swin"), help="or: start from a small new one")
    add("--image-size", type=whole(), help="of a new backbone (default: 32)")
    add("--model-settings", type=mapping, help="of a new backbone, such as '{hidden_size: 192, num_hidden_layers: 6}'")
    add(
        "--exit-positions", type=position, nargs="+", metavar="BLOCK", help="blocks before each exit, from 1, or lgvit"
    )
    add("--exit-types", nargs="+", metavar="HEAD", help="one head for all exits, one per exit, or lgvit")
    add("--exit-policy", type=policy, help="a name, or such as '{name: confidence, threshold: 0.8}'")
    add("--exit-loss-weights", type=weight, nargs="+", metavar="W", help="depth, uniform, or exits + 1 numbers")
    add("--pool", choices=("cls", "mean"), help="what exits and classifier read")
    add("--halting", type=mapping, help="of stage avit, how tokens halt: such as '{gate: tiny, target_depth: 8}'")
    add("--strategy", help="how exits share the loss; default alternating_weighted, distillation_lgvit")
    add("--augment", choices=("random_resized", "pad", "none"), default="none", help="crops of training images")
    add("--crop-scale", type=real(), nargs="+", help="shares of the image that random_resized takes (0.08 1.0)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the augmented images")
    add("--image-column", help="where the images are, if that is not clear")
    add("--label-column", help="where the labels are")
    add("--validation-share", type=real(), default=0.15, help="of the training rows, if there is no split (0.15)")
    add("--max-train-samples", type=whole(), help="train on that many random images only")
    add("--max-eval-samples", type=whole(), help="validate and test on that many")
    add("--epochs", type=real(), default=10, help="default: 10")
    add("--batch-size", type=whole(), default=32, help="per process (default: 32)")
    add("--learning-rate", type=real(), default=5e-4, help="default: 5e-4")
    add("--warmup-steps", type=whole(0), default=20, help="default: 20")
    add("--weight-decay", type=real(), default=0.05, help="default: 0.05")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="default: 0")
    add("--early-stopping-patience", type=whole(), help="stop after that many evaluations without a better accuracy")
    add("--resume", nargs="?", const="auto", type=resumption, help="auto, or a checkpoint folder to go on from")
    add("--dry-run", action="store_true", help="say what would be trained, load one batch, write nothing")


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, or its YAML text."""
    if isinstance(value, str):
        value = parse_yaml(value, repr(value[:40]))
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no mapping")
    return value


def policy(value: Any) -> Any:
    """A policy's name or mapping."""
    return mapping(value) if isinstance(value, dict) or "{" in str(value) else str(value)


def position(value: Any) -> int | str:
    """A block, or `lgvit`."""
    return value if value == "lgvit" else whole()(value)


def weight(value: Any) -> float | str:
    """A loss weight, or `depth` or `uniform` for all."""
    return value if value in ("depth", "uniform") else real()(value)


def resumption(value: Any) -> str | None:
    """`auto`, a folder, or nothing; YAML's true and false mean the first and the last."""
    return {True: "auto", False: None}[value] if isinstance(value, bool) else str(value)


def others_as_arguments(others: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
    """`--name value` of `HighwayTrainingArguments` as a dict of typed values.

    Args:
        others (`Sequence[str]`): Words of a command line that `lgvit train` does not know.
        own (`Sequence[str]`): Names that it knows, to be suggested where one is misspelt.

    Raises:
        ValueError: A name that neither knows, with the nearest one; a value of the wrong type.

    Example:

        >>> others_as_arguments(["--gradient-checkpointing", "true", "--lr_scheduler_type=linear"], [])
        {'gradient_checkpointing': True, 'lr_scheduler_type': 'linear'}
    """
    if not others:
        return {}
    from transformers import HfArgumentParser

    from .arguments import HighwayTrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str):
            raise ValueError(message)

    parser = Parser(HighwayTrainingArguments, allow_abbrev=False, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    # the folder is ours to name: `--output`
    known = {action.dest for action in parser._actions} - {"output_dir"}
    words = []
    for word in others:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name[2:].replace("-", "_")
            if name not in known:
                close = difflib.get_close_matches(name, [*own, *known], n=1)
                hint = f"did you mean {close[0]!r}?" if close else "see lgvit train --help"
                raise ValueError(f"unknown key {name!r}; {hint}")
            word = f"--{name}{equals}{value}"
        words.append(word)
    namespace, stray = parser.parse_known_args(words)
    if stray:
        raise ValueError(f"{stray[0]!r} is not understood; options are --name value")
    found = {name: getattr(value, "value", value) for name, value in vars(namespace).items()}
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {value} must be a finite number")
    return found


def as_words(settings: dict[str, Any]) -> list[str]:
    """Settings of a YAML file as the words of a command line.

    Example:

        >>> as_words({"bf16": True, "label_names": ["a", "b"], "seed": 1})
        ['--bf16=true', '--label_names', 'a', 'b', '--seed=1']
    """
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
            words.append(f"--{name}={text}")
    return words


def training_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What `HighwayTrainingArguments` is made of, but for the folder: our defaults, our options, any others."""
    import torch

    arguments = {**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
    if options.early_stopping_patience:
        arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    for ours in ("epochs", "batch_size", "learning_rate", "warmup_steps", "weight_decay", "seed", "strategy"):
        arguments[TRAINING_NAMES.get(ours, ours)] = getattr(options, ours)
    arguments["per_device_eval_batch_size"] = options.batch_size
    return arguments | others_as_arguments(options.others, list(vars(options)))


def train_recipe(config: str | Path | None = None, **options: Any) -> dict[str, Any] | None:
    """`lgvit train` from Python: a YAML file, options that override it, or options alone.

    Args:
        config (`str` or `Path`, *optional*): A YAML file.
        options: Those of `lgvit train`, such as `data`, `backbone`, `output`, and of `HighwayTrainingArguments`.

    Returns:
        What `training.json` in the output folder holds; `None` of a dry run.

    Raises:
        ValueError: An option that is unknown, of the wrong type, or missing.

    Example:

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     few = dict(max_train_samples=8, max_eval_samples=8, epochs=1, batch_size=4, disable_tqdm=True)
        ...     result = train_recipe(data="digits", backbone="vit", image_size=16, output=folder, **few)
        epoch 1: % right in validation...
        >>> result["steps"]
        2
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    left = {} if config is None else read_recipe(parser, config)
    left |= _apply(parser, options, "train_recipe")
    namespace = parser.parse_args([])
    namespace.others = as_words(left)
    for name in REQUIRED:
        if getattr(namespace, name) is None and not namespace.dry_run:
            raise ValueError(f"train_recipe needs {name}")
    return run(namespace)


def read_recipe(command: argparse.ArgumentParser, file: str | Path) -> dict[str, Any]:
    """Make a YAML file's settings the defaults of a command; what `HighwayTrainingArguments` takes is returned.

    A file of EEVIT's is translated, and what became of each of its keys is printed.

    Raises:
        ValueError: A name that neither knows, with the nearest one; a value of the wrong type.
    """
    settings = read_yaml(file)
    if is_eevit(settings):
        settings, notes = translate_eevit(settings)
        print("\n".join([f"{file}: EEVIT's configuration, read as", *(f"  {note}" for note in notes)]))
    return _apply(command, settings, file)


def _apply(command: argparse.ArgumentParser, settings: dict[str, Any], where: str | Path) -> dict[str, Any]:
    left = apply_settings(command, settings, where, keep_unknown=True)
    try:
        others_as_arguments(as_words(left), list(names_of(command)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return left


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Load the images, open the model, train one stage, report on the test split."""
    from ..data.datasets import load_images
    from ..data.processing import ProcessedImages
    from ..files import locked, write_json
    from .run import train

    _check_stage(options)
    _settle_model(options)
    arguments = training_arguments(options)
    splits = load_images(
        options.data,
        validation_share=options.validation_share,
        seed=options.seed,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    model, processor = _open(options, splits.label_names)

    def images(rows: Any, most: int | None, **training: Any) -> ProcessedImages:
        if most is not None and most < len(rows):
            rows = rows.shuffle(seed=options.seed).select(range(most))
        width, height = ProcessedImages(rows, processor).picture(0).size
        return ProcessedImages(rows, processor, keep=3 * width * height * len(rows) <= KEPT_BYTES, **training)

    train_images = images(splits.train, options.max_train_samples, augment=_augmentation(options), seed=options.seed)
    validation, test = (images(rows, options.max_eval_samples) for rows in (splits.validation, splits.test))
    if options.dry_run:
        print(_dry_run(options, arguments, model, train_images, {"validation": validation, "test": test}))
        return None
    with locked(options.output):
        result = train(
            model,
            processor,
            train_images,
            options.output,
            stage=options.stage,
            eval_dataset=validation,
            test_dataset=test,
            early_stopping_patience=options.early_stopping_patience,
            resume=options.resume or False,
            **arguments,
        )
        main_process = result.pop("main_process")
        if main_process:
            write_json(Path(options.output) / "training.json", result)
    if main_process:
        print(halting_text(result["test"], model) if options.stage == "avit" else exit_accuracies_text(result["test"]))
        print(f"{result['steps']} steps, mean loss {result['loss']:.3f}; model and training.json in {options.output}")
    return result


def _check_stage(options: argparse.Namespace) -> None:
    """Settings of exits and of tokens that halt do not go together."""
    if options.stage != "avit":
        if options.halting is not None:
            raise ValueError(f"halting: {options.halting} is for --stage avit, this is stage {options.stage}")
        return
    for name in (*EXIT_OPTIONS, "strategy"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: {getattr(options, name)!r} is for exits, which an A-ViT has not; leave it out")


def _settle_model(options: argparse.Namespace) -> None:
    """Each field of a new model is told once: by an option, in `model_settings`, in `halting`, or by the data."""
    settings = dict(options.model_settings or {})
    told = {"backbone": "--backbone", **dict.fromkeys(("num_labels", "id2label", "label2id"), "the data")}
    for name in ("image_size", *EXIT_OPTIONS):
        if getattr(options, name) is not None:
            told[name] = f"--{name.replace('_', '-')}"
    told |= dict.fromkeys(options.halting or (), "--halting")
    for name, value in settings.items():
        if not isinstance(name, str):
            raise ValueError(f"model_settings: {name!r} is no name of a field")
        if name in told:
            raise ValueError(f"model_settings: {name}: {value!r} is told by {told[name]} too; leave one of them out")
    if options.stage == "avit":
        exits = [name for name in EXIT_OPTIONS[:-1] if name in settings]
        if exits:
            raise ValueError(f"model_settings: {exits[0]!r} is for exits, which an A-ViT has not; leave it out")
    if "image_size" in settings:
        try:
            options.image_size = whole()(settings.pop("image_size"))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"model_settings: image_size: {error}") from None
        options.model_settings = settings
    elif options.image_size is None:
        options.image_size = 32


def _open(options: argparse.Namespace, label_names: list[str]) -> tuple[Any, Any]:
    """The model that the stage trains, and its image processor."""
    from ..hub.loading import open_avit, open_model

    source = {
        "backbone": options.backbone,
        "image_size": options.image_size,
        "model_settings": options.model_settings,
        "label_names": label_names,
        "seed": options.seed,
    }
    if options.stage == "avit":
        return open_avit(options.model, halting=options.halting, **source)
    exits = {name: _one_or_all(getattr(options, name)) for name in EXIT_OPTIONS if getattr(options, name) is not None}
    if options.stage == "backbone" and "exit_positions" not in (options.model_settings or {}):
        # exits come with the stage that trains them
        exits.setdefault("exit_positions", [])
    return open_model(options.model, exits=exits, **source)


def _one_or_all(value: Any) -> Any:
    """`["lgvit"]` and `["linear"]` are one word for all exits, as the config wants it."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _augmentation(options: argparse.Namespace) -> Any:
    from ..data.augmentation import Augmentation

    if options.augment == "none":
        return None
    scale = {} if options.crop_scale is None else {"scale": tuple(options.crop_scale)}
    return Augmentation(crop=options.augment, flip=options.flip, **scale)


def _dry_run(
    options: argparse.Namespace, arguments: dict[str, Any], model: Any, images: Any, others: dict[str, Any]
) -> str:
    """The resolved configuration, the model with what it costs, and one batch."""
    import yaml

    from ..data.processing import stack
    from .run import arguments_for

    arguments["strategy"] = arguments_for(options.stage, options.output or "dry-run", arguments).strategy
    hidden = {*TRAINING_NAMES, "command", "commands", "config", "required", "run", "others", "dry_run", "resume"}
    settings = {name: value for name, value in vars(options).items() if name not in hidden and value is not None}
    if options.stage == "avit":
        from ..configuration_avit import HALTING_FIELDS

        # a gate by its name has become a scale and a centre
        fields, described = [name for name in HALTING_FIELDS if name != "gate"], halting_lines(model)
    else:
        fields, described = ("exit_positions", "exit_types", "exit_policy", "exit_loss_weights"), exit_lines(model)
    resolved = {
        **settings,
        **{name: getattr(model.config, name) for name in fields},
        **{name: value for name, value in arguments.items() if value is not None},
    }
    lines = [
        yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=110).rstrip(),
        "",
        *described,
    ]
    size = arguments["per_device_train_batch_size"]
    batch = stack([images[index] for index in range(min(size, len(images)))])
    pixels = batch["pixel_values"]
    rows = ", ".join(f"{len(part)} for {name}" for name, part in others.items())
    lines += [
        f"{len(images)} images to train on, {rows}",
        f"one batch: pixel_values {list(pixels.shape)} from {pixels.min():.2f} to {pixels.max():.2f}, "
        f"labels {batch['labels'][:8].tolist()} ...",
        "nothing was written",
    ]
    return "\n".join(lines)
