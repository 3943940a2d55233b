"""A checkpoint or an exported folder, its data and its table of exits, as the commands open them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..data.held_out import KnownSplits, load_known
from ..data.processing import ProcessedImages, open_processor
from ..evaluation.costs import Highway
from ..evaluation.exit_table import ExitTable, collect, weights_digest
from ..hub.loading import check_class_names, load_highway, open_model
from ..runtimes.open_exported import open_exported
from .options import policy_of

progress_bar = partial(logging.tqdm, desc="timing", leave=False)


class Opened(NamedTuple):
    """A highway, its image processor, one split as the model takes it, and how the data were split."""

    model: Highway
    processor: BaseImageProcessor
    dataset: ProcessedImages
    known: KnownSplits


def open_highway(
    checkpoint: str,
    data: str,
    which: str = "test",
    validation_share: float | None = None,
    seed: int | None = None,
    threads: int | None = None,
    runtime: str | None = None,
) -> Opened:
    """A highway in `eval()` mode, its image processor, and one split of a dataset as the model takes it.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway, or folder of an exported one.
        data (`str`): See `load_images`.
        which (`str`, *optional*, defaults to `"test"`): Or `"validation"`, `"train"`.
        validation_share (`float`, *optional*), seed (`int`, *optional*): See `load_known`.
        threads (`int`, *optional*): Of an exported highway; by default as many as PyTorch uses.
        runtime (`str`, *optional*): Of an exported highway, see `open_exported`.
    """
    known = load_known(data, checkpoint, validation_share=validation_share, seed=seed)
    splits = known.splits
    model: Any = open_exported(checkpoint, runtime, threads)
    if model is not None:
        check_class_names(checkpoint, model.config, splits.label_names)
        processor = open_processor(checkpoint)
    else:
        model, processor = open_model(checkpoint, label_names=splits.label_names, must_be_highway=True)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Opened(model, processor, ProcessedImages(getattr(splits, which), processor), known)


def open_options(options: argparse.Namespace, *, has_policy: bool = False) -> Opened:
    """`open_highway` with the options of `add_data`, `add_policy`, and `--threads` and `--runtime` where they are.

    Raises:
        ValueError: There are no exits, and the command chooses a policy instead of taking one.
    """
    policy = policy_of(options) if has_policy else None
    splitting = (options.split, options.validation_share, options.seed)
    running = (getattr(options, "threads", None), getattr(options, "runtime", None))
    opened = open_highway(options.checkpoint, options.data, *splitting, *running)
    if not has_policy and not opened.model.config.exits:
        raise ValueError(f"{options.checkpoint} has no exits; `lgvit grow` or `lgvit train --stage 1` gives it some")
    if policy is not None:
        opened.model.set_exit_policy(policy)
    return opened


def open_checkpoint(options: argparse.Namespace) -> tuple[Any, BaseImageProcessor]:
    """A highway of PyTorch with the policy of `add_policy`, and the image processor, by `--processor` another one.

    Raises:
        ValueError: There is no image processor.
    """
    policy, place = policy_of(options), options.processor or options.checkpoint
    try:
        processor = open_processor(place)
    except OSError as error:
        raise ValueError(
            f"{place}: no preprocessor_config.json there, which says how images become pixels; give a folder or Hub "
            "id that has one, as the plain model has that the checkpoint began as: --processor FOLDER|NAME"
        ) from error
    model: Any = load_highway(options.checkpoint)
    if policy is not None:
        model.set_exit_policy(policy)
    return model, processor


@contextmanager
def launched() -> Iterator[tuple[bool, bool]]:
    """Whether several processes were started to do this together, and whether this is the first, which reports.

    `torchrun` and `accelerate launch` start them; a group of `torch.distributed` that is there already is used.
    """
    has_group = dist.is_available() and dist.is_initialized()
    if not has_group and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield False, True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not has_group:
        dist.init_process_group("gloo")  # what is sent are answers, on the CPU
    is_first = dist.get_rank() == 0
    if not is_first:
        logging.disable_progress_bar()
    try:
        yield dist.get_world_size() > 1, is_first
    finally:
        if not has_group:
            dist.destroy_process_group()


def table_of(
    model: Highway, dataset: ProcessedImages, file: str | Path | None, *, distributed: bool = False
) -> ExitTable:
    """The table of a model and a dataset: read from `file` where that is there, otherwise collected and written to it.

    With `distributed`, by all processes together, see `collect`; the first writes it.

    Raises:
        ValueError: The file holds a table of another model or of other samples; the model is one exported file.
    """
    if file is not None and Path(file).exists():
        table = ExitTable.load(
            file,
            depths=[segment.depth for segment in model.segments()],
            num_labels=model.config.num_labels,
            weights=weights_digest(model),
        )
        labels = dataset.images["label"][:]
        if table.labels.tolist() != list(labels):
            raise ValueError(
                f"{file} is a table of {len(table)} other samples than these {len(labels)}: another split?"
            )
        # of the model as it is now: the table holds what each exit says
        return replace(table, ensemble=model.config.exit_ensemble)
    table = collect(model, dataset, distributed=distributed)
    if file is not None and not (distributed and dist.get_rank()):
        table.save(file)
    return table
