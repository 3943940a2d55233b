"""`lgvit grow`: exits for a plain fine-tuned ViT, DeiT or Swin, from images alone, without touching its answers."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, set_seed
from transformers.utils.logging import tqdm

from ..data.datasets import class_names, find_columns, with_columns
from ..data.held_out import write_training_data
from ..data.processing import ProcessedImages, open_processor
from ..evaluation.calibration import calibrate
from ..evaluation.cost_table import measured_costs
from ..evaluation.costs import model_macs
from ..evaluation.exit_table import ExitTable
from ..evaluation.plots import plot_report
from ..evaluation.report import judge
from ..evaluation.sweep import threshold_curve
from ..files import locked, replace_folder, write_json
from ..hub.loading import BY_BACKBONE, read_config, with_exits
from ..losses import check_labels
from ..modeling_highway import HighwayMixin
from . import cached_states
from .cached_states import HeadTraining, OtherStates, Samples, StateCache
from .grow_images import ToGrow, images_to_grow
from .grow_report import candidate_rows, choice_of, grow_as_text

logger = logging.getLogger(__name__)

# fewer do not show a drop of one point
FEWEST_IMAGES = 50
# one half of them is searched on, and four fit a harm gate
FEWEST_HELD_OUT = 8
TIMED_BATCH = 32
# of the report; the plain model and the early exits take turns on the same ones
TIMED_IMAGES = 32

Say = Callable[[str], None]


class Grown(NamedTuple):
    """What `grow` gives: the early-exit model, and what `grow.json` holds."""

    model: HighwayMixin
    report: dict[str, Any]


def grow(
    checkpoint: str | os.PathLike | PreTrainedModel,
    dataset: str | Samples,
    output: str | Path | None = None,
    *,
    processor: BaseImageProcessor | None = None,
    new_classifier: bool = False,
    exit_positions: list[int] | None = None,
    exit_types: list[str] | str = "conv1_1",
    max_accuracy_drop: float = 0.01,
    limit: int | None = None,
    ignore_labels: bool = False,
    validation_share: float | None = None,
    training: HeadTraining | None = None,
    cost: str = "time",
    cache_limit: float = 20.0,
    seed: int = 0,
    say: Say = logger.info,
) -> Grown:
    """Make an early-exit model of a plain fine-tuned one; its final answers stay what they are, bit by bit.

    The frozen backbone runs once on the images. The features for the exits are kept on disk, and each exit is trained
    from there to answer as the full model does. On images that were not trained on, `calibrate(policy="auto")` chooses
    the exits that are worth their cost, and the policy; nor was the backbone trained on these, where its folder says
    on what it was (`training.json`). A stopped run goes on when it is started again with the same arguments.

    Args:
        checkpoint (`str`, path or `PreTrainedModel`):
            A plain ViT, DeiT or Swin, or a highway without exits: folder, Hub id, or in memory.
        dataset (`str` or `Dataset`):
            Images for `load_unlabelled` (a folder, parquet files, a Hub id, `"digits"`), a `datasets.Dataset` with a
            column `image`, or items `{"pixel_values": [C, H, W], "labels": int}`. Where a source has labels, exits are
            trained on the training split of `load_images` and chosen on its validation split, by the seed and the
            share of the backbone's training where that had the same data; a warning says where the samples that the
            backbone was trained on cannot be told apart. Labels are not needed: where they
            are, the accuracy drop is counted with them, otherwise it is what the full model's own probabilities expect
            it to be (`calibrate(labels="expected")`). Exits are never trained on labels.
        output (`str` or `Path`, *optional*):
            Folder for the model, its image processor, `grow.json` and `highway.png`. The states of a run that was
            stopped wait in the hidden folder `.{output}-states` beside it; those of one that failed are removed.
            Without an output, nothing is saved.
        processor (`BaseImageProcessor`, *optional*): By default the checkpoint's.
        new_classifier (`bool`, *optional*, defaults to `False`):
            First fit a classifier to the labels of the dataset, as `lgvit train --stage head` does: a checkpoint may
            then have none, or one for other classes. Checkpoint and dataset must be names, and an output is needed.
        exit_positions (`list[int]`, *optional*): Candidates; the first block and every second one by default.
        exit_types (`list[str]` or `str`, *optional*, defaults to `"conv1_1"`): Head of each, or one for all.
        max_accuracy_drop (`float`, *optional*, defaults to 0.01): On the held-out images, a point estimate.
        limit (`int`, *optional*): Use at most this many images, drawn at random.
        ignore_labels (`bool`, *optional*, defaults to `False`): Do as if there were no labels.
        validation_share (`float`, *optional*): Share of the images that is held out for the choice; by default that of
            the backbone's training where it had the same data, otherwise 0.2.
        training (`HeadTraining`, *optional*): Epochs, learning rate and so on.
        cost (`str`, *optional*, defaults to `"time"`):
            `"time"` chooses by the wall-clock of blocks and heads on this machine, at batch sizes 1 and 32; `"macs"`
            by multiply-accumulates, for the same choice on every machine.
        cache_limit (`float`, *optional*, defaults to 20): GB of disk for the states. If the images need more, as many
            as fit are drawn at random.
        seed (`int`, *optional*, defaults to 0): Of new weights, batches and the split.
        say (callable, *optional*): Takes the lines to show.

    Returns:
        `Grown`: The model, in `eval()` mode with its policy set, and the report.

    Raises:
        ValueError: No plain checkpoint, too few images, images or labels that do not fit the model, no exit that pays,
            a stopped run that was another one.
        OSError: No checkpoint there; too little disk.

    Example:

        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=1)
        >>> plain = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
        >>> images = [{"pixel_values": image} for image in torch.randn(60, 3, 8, 8)]
        >>> grown = grow(plain, images, training=HeadTraining(epochs=1), max_accuracy_drop=0.5, cost="macs")
        >>> grown.report["choice"]["cost"] < 1, grown.report["overall"]["samples"]
        (True, 12)
    """
    if cost not in ("time", "macs"):
        raise ValueError(f"cost: {cost!r} must be 'time' or 'macs'")
    if validation_share is not None and not 0 < validation_share < 1:
        raise ValueError(f"validation_share: {validation_share!r} must be between 0 and 1")
    if not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop: {max_accuracy_drop!r} must be from 0 to 1, such as 0.01 for one point")
    if limit is not None and limit < FEWEST_IMAGES:
        raise ValueError(f"limit: {limit!r} images are too few to train and choose exits with; give {FEWEST_IMAGES}")
    if not 0 < cache_limit < math.inf:
        raise ValueError(f"cache_limit: {cache_limit!r} must be a number of GB above 0")
    started, training = time.perf_counter(), training or HeadTraining()
    if new_classifier:
        if isinstance(checkpoint, PreTrainedModel) or not isinstance(dataset, str) or output is None:
            raise ValueError("new_classifier: checkpoint and dataset must be names, and a folder for the output given")
        from .new_classifier import with_new_classifier

        source: dict[str, Any] = {"limit": limit, "validation_share": validation_share, "seed": seed}
        others: dict[str, Any] = {"processor": processor, "exit_positions": exit_positions, "exit_types": exit_types}
        others |= {"training": training, "cost": cost, "cache_limit": cache_limit, "say": say}
        with with_new_classifier(os.fspath(checkpoint), dataset, Path(output), **source) as folder:
            return grow(folder, dataset, output, max_accuracy_drop=max_accuracy_drop, **source, **others)
    with cache_folder(output, say) as folder, ExitStack() as stack:
        set_seed(seed)
        model = _candidates(checkpoint, exit_positions, exit_types)
        if processor is None and not isinstance(checkpoint, PreTrainedModel):
            processor = open_processor(checkpoint)
        place = None if isinstance(checkpoint, PreTrainedModel) else checkpoint
        data = images_to_grow(
            dataset, place, limit=limit, ignore_labels=ignore_labels, validation_share=validation_share, seed=seed
        )
        items = labelled_items(data.images, model, processor, ignore_labels)
        settings: dict[str, Any] = {
            "checkpoint": backbone_digest(model),
            "images": len(items),
            "seed": seed,
            **data.settings,
        }
        settings |= {name: getattr(model.config, name) for name in ("exit_positions", "exit_types")}
        wanted = min(len(items), limit or len(items))
        cache, order = _cache_for(model, items, folder, wanted, cache_limit, settings, say)
        stack.enter_context(gone_if_it_fails(folder))
        indices, num_trained = data.drawn(order, cache.num_samples)
        num_held_out = len(indices) - num_trained
        if num_held_out < FEWEST_HELD_OUT:
            raise ValueError(
                f"validation_share: {num_held_out} of {len(indices)} images are held out, and {FEWEST_HELD_OUT} are "
                "needed to choose on; raise it, or give more images"
            )
        if data.samples:
            say(data.as_text())
        say(f"{num_trained} images to train {len(model.exits)} exits on, {num_held_out} to choose on")
        cached_states.fill_cache(cache, model, items, indices, progress=partial(tqdm, desc="backbone"))
        if cache.labels is not None:
            check_labels(cache.labels, model.config.num_labels)
        cached_states.train_exits(model, cache, num_trained, training, seed=seed, progress=partial(tqdm, desc="exits"))

        is_labelled, logits = cache.labels is not None, cached_states.exit_logits(model, cache, num_trained)
        labels = logits[-1].argmax(-1) if cache.labels is None else cache.labels[num_trained:]
        if cost == "time":
            timed = [torch.as_tensor(items[index]["pixel_values"]) for index in indices[:TIMED_BATCH]]
            costs = measured_costs(model, torch.stack(timed), repeats=8)
        else:
            costs = model_macs(model).relative()
        table = ExitTable(logits, labels, [*model.config.exit_positions, model.config.num_blocks], costs)
        found = calibrate(
            table,
            policy="auto",
            max_accuracy_drop=max_accuracy_drop,
            labels=True if is_labelled else "expected",
        )
        if not found.exits:
            raise ValueError(
                f"no exit is cheaper than the full model within an accuracy drop of {max_accuracy_drop:g}; allow more "
                "with max_accuracy_drop, or give more images"
            )
        choice = choice_of(found, len(model.exits))
        report: dict[str, Any] = {
            "what": "lgvit grow",
            "settings": {**settings, "max_accuracy_drop": max_accuracy_drop, "cost": cost},
            "training": asdict(training),
            "images": {"trained": num_trained, "held_out": num_held_out, "labels": is_labelled},
            "samples": data.samples,
            "choice": choice,
            "candidates": candidate_rows(model.config.exits, table, is_labelled, found.exits),
        }
        keep_exits(model, found.exits, choice["policy"])
        kept = replace(table.with_exits(found.exits), costs=model_macs(model))
        report |= _report(model, _Relabelled(items, indices[num_trained:][:TIMED_IMAGES], labels), kept)
        report["seconds"] = time.perf_counter() - started
        if output is not None:
            _save(model, processor, report, data, Path(output))
    say(grow_as_text(report))
    return Grown(model, report)


# -- what is grown, and from what ------------------------------------------------------------------------------


def early_positions(num_blocks: int) -> list[int]:
    """Candidates for exits: after the first block, and after every second one.

    Example:

        >>> early_positions(12), early_positions(2), early_positions(1)
        ([1, 2, 4, 6, 8, 10], [1], [])
    """
    return [*range(1, min(2, num_blocks)), *range(2, num_blocks - 1, 2)]


def _depth(config: PretrainedConfig) -> int:
    """Blocks of a backbone: of all stages, and of a model of images and texts those of the image side."""
    if hasattr(config, "depths"):
        return sum(config.depths)
    return cast(int, getattr(config, "vision_config", config).num_hidden_layers)


def _candidates(
    checkpoint: str | os.PathLike | PreTrainedModel, exit_positions: list[int] | None, exit_types: list[str] | str
) -> HighwayMixin:
    """A highway with every candidate exit, from a plain checkpoint."""
    if isinstance(checkpoint, PreTrainedModel):
        name, config = type(checkpoint).__name__, checkpoint.config
    else:
        name, config = str(checkpoint), read_config(str(checkpoint))
    kind, is_highway = config.model_type.removesuffix("_highway"), config.model_type.endswith("_highway")
    if kind not in BY_BACKBONE or (is_highway and config.exit_positions):
        has_exits = " that has exits already; `lgvit train` trains those" if is_highway else ""
        plain = f"exits grow on a plain checkpoint of {', '.join(BY_BACKBONE)}"
        raise ValueError(f"{name} is a {config.model_type!r}{has_exits}; {plain}")
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"{name}: exits learn from class probabilities, and this model answers with other numbers")
    depth = _depth(config)
    if exit_positions is None:
        replaced = getattr(config, "replaced_positions", ())
        positions = [position for position in early_positions(depth) if position not in replaced]
    else:
        positions = exit_positions
    exits: dict[str, Any] = {"exit_positions": positions, "exit_types": exit_types, "exit_policy": "never"}
    highway_class: type[HighwayMixin] = BY_BACKBONE[kind]
    if is_highway:
        # what `lgvit train --stage backbone` saves
        bare: Any = checkpoint if isinstance(checkpoint, PreTrainedModel) else highway_class.from_pretrained(name)
        model: Any = with_exits(name, bare, exits)
        model.to(bare.device, bare.dtype).eval()
    else:
        model = highway_class.from_backbone(checkpoint, **exits)
    if not model.exits:
        raise ValueError(f"exit_positions: {exit_positions!r} must name at least one block")
    if not isinstance(checkpoint, PreTrainedModel):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def labelled_items(
    images: Samples, model: HighwayMixin, processor: BaseImageProcessor | None, ignore_labels: bool
) -> Samples:
    """Items `pixel_values` and, where they are known and wanted, `labels` numbered as the model's."""
    image, label = find_columns(images.features) if hasattr(images, "features") else (None, None)
    if image is None:
        return _Relabelled(images, range(len(images)), None) if ignore_labels else images
    pictures = with_columns(images, image, None if ignore_labels else label)
    if processor is None:
        raise ValueError("processor: images are not pixel_values yet; give the image processor of the model")
    names, labels = class_names(pictures), model.config.id2label or {}
    known = [labels[index] for index in range(model.config.num_labels)]
    if names is not None and names != known and known != [f"LABEL_{index}" for index in range(len(names))]:
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            raise ValueError(
                f"the images' class {strange!r} is none of the model's ({', '.join(known[:5])}, ...); "
                "--ignore-labels does without labels"
            )
        numbers = [known.index(names[label]) for label in pictures["label"][:]]
        pictures = pictures.remove_columns("label").add_column("label", numbers)
    return ProcessedImages(pictures, processor)


class _Relabelled(Dataset):
    """Some items with labels of our own, or with none."""

    def __init__(self, items: Samples, indices: Sequence[int], labels: Tensor | None):
        self.items, self.indices, self.labels = items, indices, labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"pixel_values": self.items[self.indices[index]]["pixel_values"]}
        return item if self.labels is None else {**item, "labels": int(self.labels[index])}


def backbone_digest(model: HighwayMixin) -> str:
    """What the weights of a backbone are, its exits left out."""
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("exits."):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- the cache -------------------------------------------------------------------------------------------------


@contextmanager
def cache_folder(output: str | Path | None, say: Say) -> Iterator[Path]:
    """A folder for the states: beside `output`, and left there when a run stops; a temporary one without output."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="lgvit-states-") as temporary:
            yield Path(temporary)
        return
    output = Path(output).resolve()
    folder = output.parent / f".{output.name}-states"
    with locked(output):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"{output} exists and is not an empty folder; choose another output")
        try:
            yield folder
        except KeyboardInterrupt:
            if folder.exists():
                say(f"stopped; the same command goes on from what is in {folder}")
            raise
        shutil.rmtree(folder)


@contextmanager
def gone_if_it_fails(folder: Path) -> Iterator[None]:
    """Remove the states of a run that fails: they may be gigabytes, and it would fail again. A stopped one goes on."""
    try:
        yield
    except (OtherStates, KeyboardInterrupt):
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _cache_for(
    model: HighwayMixin, items: Samples, folder: Path, wanted: int, max_gb: float, settings: dict[str, Any], say: Say
) -> tuple[StateCache, list[int]]:
    """An open cache for as many samples as it may hold, and all indices in a random order."""
    if len(items) < FEWEST_IMAGES:
        raise ValueError(f"{len(items)} images are too few to train and choose exits with; give {FEWEST_IMAGES}")
    pixels = torch.as_tensor(items[0]["pixel_values"])[None]
    with torch.no_grad():
        # raises where the model does not take such images
        model(pixels.to(model.device, model.dtype))
    shapes = cached_states.token_shapes(model, pixels)
    size = cached_states.bytes_per_image(shapes, model.config.num_labels)
    fitting = min(wanted, int(max_gb * 1e9) // size)
    if fitting < FEWEST_IMAGES:
        raise ValueError(
            f"cache_limit: {max_gb:g} GB hold the states of {fitting} images at {len(shapes)} exits "
            f"({size / 1e6:.1f} MB each), {FEWEST_IMAGES} are needed; raise it, or take fewer exits"
        )
    if fitting < wanted:
        say(
            f"the states of {wanted} images take {wanted * size / 1e9:.1f} GB: {fitting} of them, drawn at random, "
            f"fit into the cache limit of {max_gb:g} GB"
        )
    cache = cached_states.open_cache(folder, shapes, fitting, model.config.num_labels, settings)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(settings["seed"]))
    return cache, order.tolist()


# -- the highway and its report -------------------------------------------------------------------------------


def keep_exits(model: HighwayMixin, exits: Sequence[int], policy: dict[str, Any]) -> None:
    """Leave only some exits in a highway, by index from 0, with a policy for these."""
    config = model.config
    config.exit_policy = {"name": "never"}
    config.exit_positions = [config.exit_positions[index] for index in exits]
    config.exit_types = [config.exit_types[index] for index in exits]
    model.exits = nn.ModuleList(model.exits[index] for index in exits)
    config.validate_exits()
    model.set_exit_policy(policy)


def _report(model: HighwayMixin, timed: Samples, table: ExitTable) -> dict[str, Any]:
    """What `lgvit evaluate` measures, on the table of held-out images, some of which are timed."""
    answers = table.replay(model.exit_policy)
    report = judge(model, timed, table, answers, progress=partial(tqdm, desc="timing", leave=False))
    return {**report, "curve": threshold_curve(table)}


def _save(
    model: HighwayMixin, processor: BaseImageProcessor | None, report: dict[str, Any], data: ToGrow, output: Path
) -> None:
    with replace_folder(output) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        write_training_data(folder, data.history)
        write_json(folder / "grow.json", report)
        if importlib.util.find_spec("matplotlib"):
            measure = "accuracy" if report["images"]["labels"] else "agreement with the full model"
            plot_report(report, report["curve"], folder / "highway.png", measure=measure)
