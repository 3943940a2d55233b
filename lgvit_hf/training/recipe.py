"""`lgvit train`: one YAML file, or the same options by hand, is one stage of one published method on one dataset."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ..data.settings import read_settings, read_yaml, real, refuse_unknown, whole
from ..hub.eevit_config import is_eevit, translate_eevit
from .recipe_text import exit_accuracies_text, exit_lines, halting_lines, halting_text
from .recipe_values import adapters, boolean, integer, mapping, policy, position, resumption, text, weight

if TYPE_CHECKING:
    from ..data.held_out import TrainingData

Settings: TypeAlias = dict[str, Any]
REQUIRED = ("data", "output")
# what is held in memory of decoded images, so that small sets are decoded once
KEPT_BYTES = 1_000_000_000
EXIT_OPTIONS = ("exit_positions", "exit_types", "exit_policy", "exit_loss_weights", "pool")
# what means nothing to a stage without steps
STEPS = (
    *(*EXIT_OPTIONS, "strategy", "augment", "crop_scale", "epochs", "batch_size", "learning_rate", "warmup_steps"),
    *("weight_decay", "early_stopping_patience", "model_settings", "training"),
)
# our short words for `TrainingArguments`
TRAINING_NAMES = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
TRAINING_DEFAULTS = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "report_to": [],
}


# for the types that `HfArgumentParser` gives to options, as words are read and as values of YAML are; finite numbers
_READERS = {"float": real(), "int": integer, "string_to_bool": boolean, "str": text, "<lambda>": text}


def _option(help: str, default: Any = None, **settings: Any) -> Any:
    """A field that is an option of `lgvit train`, with the settings of `add_argument`."""
    return field(default=default, metadata={"help": help, **settings})


def _many(help: str, read: Callable[[Any], Any], metavar: str | None = None) -> Any:
    """One that takes several values."""
    return _option(help, type=read, nargs="+", metavar=metavar)


@dataclass
class Recipe:
    """What `lgvit train` trains, and on what: its options, and those of `HighwayTrainingArguments` in `training`.

    Raises:
        ValueError: Options that exclude each other.
    """

    data: str = _option("digits, a folder of images, parquet files or a Hub id")
    output: str = _option("folder for the model and its checkpoints")
    stage: str = _option("what to train (default: 1)", "1", choices=("backbone", "head", "1", "2", "avit"))
    model: str | None = _option("checkpoint to start from: a highway, an A-ViT, or a plain backbone")
    backbone: str | None = _option("or: start from a small new one", choices=("vit", "deit", "swin"))
    image_size: int | None = _option("of a new backbone (default: 32)", type=whole())
    model_settings: Settings = _option("of a new backbone, such as '{hidden_size: 192}'", type=mapping)
    exit_positions: list[int | str] | None = _many("blocks before each exit, from 1, or lgvit", position, "BLOCK")
    exit_types: list[str] | None = _many("one head for all exits, one per exit, or lgvit", str, "HEAD")
    exit_policy: str | Settings | None = _option(
        "a name, or such as '{name: confidence, threshold: 0.8}'", type=policy
    )
    exit_loss_weights: list[float | str] | None = _many("depth, uniform, or exits + 1 numbers", weight, "W")
    pool: str | None = _option("what exits and classifier read", choices=("cls", "mean"))
    halting: Settings | None = _option("of stage avit, such as '{gate: tiny, target_depth: 8}'", type=mapping)
    lora: int | Settings | None = _option(
        "rank of adapters in the frozen blocks, or such as '{rank: 8, target_modules: [query]}'", type=adapters
    )
    adapters_only: bool = _option("save adapters, exits and classifier alone", False, action="store_true")
    strategy: str | None = _option("how exits share the loss; default alternating_weighted, distillation_lgvit")
    augment: str = _option("crops of training images", "none", choices=("random_resized", "pad", "none"))
    crop_scale: list[float] | None = _many("shares of the image that random_resized takes (0.08 1.0)", real())
    flip: bool = _option("mirror half of the augmented images (default)", True, action=argparse.BooleanOptionalAction)
    image_column: str | None = _option("where the images are, if that is not clear")
    label_column: str | None = _option("where the labels are")
    validation_share: float = _option("of the training samples, if there is no split (0.15)", 0.15, type=real())
    max_train_samples: int | None = _option("train on that many random images only", type=whole())
    max_eval_samples: int | None = _option("validate and test on that many", type=whole())
    epochs: float | None = _option("default: 10", type=real())
    batch_size: int | None = _option("per process (default: 32)", type=whole())
    learning_rate: float = _option("default: 5e-4", 5e-4, type=real())
    warmup_steps: int = _option("default: 20", 20, type=whole(0))
    weight_decay: float = _option("default: 0.05", 0.05, type=real())
    seed: int = _option("default: 0", 0, type=whole(0, 2**32 - 1))
    early_stopping_patience: int | None = _option("stop after N evaluations without better accuracy", type=whole())
    resume: str | None = _option("auto, or a checkpoint to go on from", nargs="?", const="auto", type=resumption)
    dry_run: bool = _option("say what would be trained, load one batch, write nothing", False, action="store_true")
    training: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model_settings = dict(self.model_settings or {})
        if self.lora is not None and self.stage not in ("backbone", "1"):
            raise ValueError(
                f"lora: {self.lora!r} is for stages backbone and 1, this is stage {self.stage}; leave it out"
            )
        if self.adapters_only and self.lora is None:
            raise ValueError("adapters_only: there are none without --lora RANK")
        if self.lora is not None and self.backbone is not None:
            raise ValueError(f"lora: {self.lora!r} adapts a trained backbone, and a {self.backbone!r} would be new")
        if self.stage == "head":
            self._refuse_steps()
        if self.stage == "avit":
            self._refuse_exits()
        elif self.halting is not None:
            raise ValueError(f"halting: {self.halting} is for --stage avit, this is stage {self.stage}")
        if self.model is not None and self.image_size is not None:
            raise ValueError(
                f"image_size: {self.image_size} is of a new --backbone; {self.model} has its own; leave it out"
            )
        # each field of a new model is given once
        given = dict.fromkeys(("num_labels", "id2label", "label2id"), "the data")
        given |= dict.fromkeys(self.halting or (), "--halting")
        for name, value in self.model_settings.items():
            if not isinstance(name, str):
                raise ValueError(f"model_settings: {name!r} is no name of a field")
            if name == "backbone" or (name in ("image_size", *EXIT_OPTIONS) and getattr(self, name) is not None):
                given[name] = f"--{name.replace('_', '-')}"
            if name in given:
                where = f"is given by {given[name]} too; leave one of them out"
                raise ValueError(f"model_settings: {name}: {value!r} {where}")
        if self.image_size is None:
            try:
                self.image_size = whole()(self.model_settings.pop("image_size", 32))
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"model_settings: image_size: {error}") from None

    def _refuse_steps(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in STEPS and value and value != each.default:
                raise ValueError(
                    f"{each.name}: {value!r} is for stages that train step by step; stage head fits the classifier to "
                    "the optimum; leave it out"
                )
        if self.backbone is not None:
            raise ValueError(f"backbone: {self.backbone!r} is new; stage head needs a trained one: --model CHECKPOINT")

    def _refuse_exits(self) -> None:
        for name in (*EXIT_OPTIONS, "strategy"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: {getattr(self, name)!r} is for exits, which an A-ViT has not; leave it out")
            if name in self.model_settings and name != "pool":
                raise ValueError(f"model_settings: {name!r} is for exits, which an A-ViT has not; leave it out")


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options of `lgvit train`, with the recipe's defaults; any other is one of `HighwayTrainingArguments`."""
    for each in fields(Recipe):
        if each.metadata:
            parser.add_argument("--" + each.name.replace("_", "-"), default=argparse.SUPPRESS, **each.metadata)
    return parser


def read_training(settings: Settings, words: Sequence[str] = (), where: str | Path | None = None) -> Settings:
    """Options of `HighwayTrainingArguments` with their types, from YAML or Python, or from a command line, which wins.

    Args:
        settings (`dict`): Values by name.
        words (`Sequence[str]`, *optional*): Words of a command line, `--name value`.
        where (`str` or `Path`, *optional*): What an error says of the settings.

    Raises:
        ValueError: A name that is no option, with the nearest one; a value of the wrong type.

    Example:

        >>> read_training({"gradient_checkpointing": True}, ["--lr_scheduler_type=linear"])
        {'gradient_checkpointing': True, 'lr_scheduler_type': 'linear'}
    """
    if not (settings or words):
        return {}
    from transformers import HfArgumentParser

    from .arguments import HighwayTrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(HighwayTrainingArguments, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]  # takes any class
    for action in list(parser._actions):
        action.default = argparse.SUPPRESS
        action.type = _READERS.get(getattr(action.type, "__name__", ""), action.type)
        if action.dest == "output_dir":
            # the folder is ours to name: `--output`
            parser._actions.remove(action)
            for option in action.option_strings:
                del parser._option_string_actions[option]
    given, keys = read_settings(parser, settings, where)
    found, stray = parser.parse_known_args(words)
    refuse_unknown([add_options(argparse.ArgumentParser("lgvit train")), parser], keys, stray, where)
    return given | vars(found)


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
    parser = add_options(argparse.ArgumentParser())
    given, training = Settings(), Settings()
    for settings, where in (({} if config is None else read_recipe(config), config), (options, "train_recipe")):
        known, others = read_settings(parser, settings, str(where))
        given |= known
        training |= read_training(others, where=str(where))
    recipe = Recipe(**given, training=training)
    for name in REQUIRED:
        if getattr(recipe, name) is None and not recipe.dry_run:
            raise ValueError(f"train_recipe needs {name}")
    return run(recipe)


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The settings in a YAML file; one of EEVIT's is translated, and what became of each of its keys is printed."""
    settings = read_yaml(file)
    if is_eevit(settings):
        settings, notes = translate_eevit(settings)
        print("\n".join([f"{file}: EEVIT's configuration, read as", *(f"  {note}" for note in notes)]))
    return settings


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """Fields of `HighwayTrainingArguments` without the folder: our defaults, our options, any others."""
    import torch

    arguments = {**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
    if recipe.early_stopping_patience:
        arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    for ours in ("learning_rate", "warmup_steps", "weight_decay", "seed", "strategy"):
        arguments[ours] = getattr(recipe, ours)
    for ours, name in TRAINING_NAMES.items():
        value = getattr(recipe, ours)
        if value is not None:
            arguments[name] = value
            if name in recipe.training:
                raise ValueError(
                    f"{name}: {recipe.training[name]!r} and {ours}: {value!r} are the same option; give one"
                )
    return {**arguments, "per_device_eval_batch_size": arguments["per_device_train_batch_size"], **recipe.training}


def run(recipe: Recipe) -> dict[str, Any] | None:
    """Load the images, open the model, train one stage, report on the test split."""
    from ..data.datasets import load_images
    from ..data.held_out import TrainingData, training_data_as_json
    from ..data.processing import ProcessedImages
    from ..files import locked, write_json
    from .run import train

    arguments = training_arguments(recipe)
    names = ("validation_share", "seed", "image_column", "label_column")
    splitting = {name: getattr(recipe, name) for name in names}
    splits = load_images(recipe.data, **splitting)
    data = TrainingData.of(splits, recipe.data, **splitting, max_train_samples=recipe.max_train_samples)
    history = [*_trained_on_before(recipe.model, splits.label_names), data]
    model, processor = _open(recipe, splits.label_names)

    def images(samples: Any, most: int | None, **training: Any) -> ProcessedImages:
        if most is not None and most < len(samples):
            samples = samples.shuffle(seed=recipe.seed).select(range(most))
        width, height = ProcessedImages(samples, processor).picture(0).size
        return ProcessedImages(samples, processor, keep=3 * width * height * len(samples) <= KEPT_BYTES, **training)

    train_images = images(splits.train, recipe.max_train_samples, augment=_augmentation(recipe), seed=recipe.seed)
    validation, test = (images(split, recipe.max_eval_samples) for split in (splits.validation, splits.test))
    if recipe.dry_run:
        print(_dry_run(recipe, arguments, model, train_images, {"validation": validation, "test": test}))
        return None
    if recipe.stage == "head":
        from .linear_probe import train_classifier

        result = train_classifier(model, processor, train_images, validation, test, recipe.output, say=print)
        result["data"] = training_data_as_json(history)
        write_json(Path(recipe.output) / "training.json", result)
        print(exit_accuracies_text(result["test"]))
        print(f"model and training.json in {recipe.output}; exits: lgvit grow {recipe.output} {recipe.data} FOLDER")
        return result
    with locked(recipe.output):
        result = train(
            model,
            processor,
            train_images,
            recipe.output,
            stage=recipe.stage,
            eval_dataset=validation,
            test_dataset=test,
            early_stopping_patience=recipe.early_stopping_patience,
            adapters_only=recipe.adapters_only,
            resume=recipe.resume or False,
            **arguments,
        )
        result["data"] = training_data_as_json(history)
        if result.pop("main_process"):
            write_json(Path(recipe.output) / "training.json", result)
            test = result["test"]
            print(halting_text(test, model) if recipe.stage == "avit" else exit_accuracies_text(test))
            steps = f"{result['steps']} steps, mean loss {result['loss']:.3f}"
            print(f"{steps}; model and training.json in {recipe.output}")
    return result


def _trained_on_before(checkpoint: str | None, label_names: list[str]) -> list[TrainingData]:
    """What the model that a stage begins with was trained on.

    One that has the classes of the data, and does not say, was trained on data that are not known. One that has others
    gets a new classifier here: what it was pretrained on does not count.
    """
    from ..data.held_out import TrainingData, read_training_data
    from ..hub.loading import class_order, read_config

    if checkpoint is None:
        return []
    is_trained = class_order(read_config(checkpoint), label_names) is not None
    return read_training_data(checkpoint) or ([TrainingData(None)] if is_trained else [])


def _open(recipe: Recipe, label_names: list[str]) -> tuple[Any, Any]:
    """The model that the stage trains, and its image processor."""
    from ..hub.loading import open_avit, open_for_probing, open_model
    from ..hub.lora import backbone_of

    if recipe.stage == "head":
        if recipe.model is None:
            raise ValueError("stage head needs a trained backbone: --model CHECKPOINT")
        return open_for_probing(recipe.model, label_names)

    source = {name: getattr(recipe, name) for name in ("backbone", "image_size", "model_settings", "seed")}
    source["label_names"] = label_names
    if recipe.stage == "avit":
        return open_avit(recipe.model, halting=recipe.halting, **source)
    exits = {name: _one_or_all(getattr(recipe, name)) for name in EXIT_OPTIONS if getattr(recipe, name) is not None}
    if recipe.stage == "backbone" and "exit_positions" not in recipe.model_settings:
        # exits come with the stage that trains them
        exits.setdefault("exit_positions", [])
    model, processor = open_model(recipe.model, exits=exits, lora=recipe.lora, **source)
    if recipe.adapters_only:
        # that they can be saved so is known before they are trained
        backbone_of(model)
    return model, processor


def _one_or_all(value: Any) -> Any:
    """`["lgvit"]` and `["linear"]` are one word for all exits, as the config wants it."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _augmentation(recipe: Recipe) -> Any:
    from ..data.augmentation import Augmentation

    if recipe.augment == "none":
        return None
    scale: Settings = {} if recipe.crop_scale is None else {"scale": tuple(recipe.crop_scale)}
    return Augmentation(crop=recipe.augment, flip=recipe.flip, **scale)


def _dry_run(recipe: Recipe, arguments: dict[str, Any], model: Any, images: Any, others: dict[str, Any]) -> str:
    """The resolved configuration, the model with what it costs, and one batch."""
    import yaml

    from ..data.processing import stack
    from .run import arguments_for

    if recipe.stage != "head":
        arguments["strategy"] = arguments_for(recipe.stage, recipe.output or "dry-run", arguments).strategy
    hidden = {*TRAINING_NAMES, "output", "training", "dry_run", "resume"}
    settings = {name: value for name, value in vars(recipe).items() if name not in hidden and value not in (None, {})}
    if recipe.stage == "avit":
        from ..configuration_avit import HALTING_FIELDS

        # a gate by its name has become a scale and a centre
        names, described = [name for name in HALTING_FIELDS if name != "gate"], halting_lines(model)
    else:
        names, described = list(EXIT_OPTIONS[:-1]), exit_lines(model)
    resolved = settings | {name: getattr(model.config, name) for name in names}
    resolved |= {name: value for name, value in arguments.items() if value is not None}
    batch = stack([images[index] for index in range(min(arguments["per_device_train_batch_size"], len(images)))])
    pixels = batch["pixel_values"]
    lines = [
        yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=110),
        *described,
        f"{len(images)} images to train on, " + ", ".join(f"{len(part)} for {name}" for name, part in others.items()),
        f"one batch: pixel_values {list(pixels.shape)} from {pixels.min():.2f} to {pixels.max():.2f}, "
        f"labels {batch['labels'][:8].tolist()} ...",
        "nothing was written",
    ]
    return "\n".join(lines)
