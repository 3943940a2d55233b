"""`lgvit shorten`: a run of blocks of a frozen ViT, DeiT or Swin becomes one linear map, fitted in closed form."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.logging import tqdm

from ..data.batches import in_batches, to_model
from ..data.datasets import load_unlabelled
from ..data.processing import open_processor
from ..evaluation.cost_table import machine
from ..evaluation.costs import model_macs
from ..evaluation.timing import time_interleaved
from ..files import replace_folder, write_json
from ..hub.loading import BY_BACKBONE, HIGHWAYS, read_config
from ..losses import check_labels
from ..modeling_highway import HighwayMixin
from ..modes import evaluating
from ..segments import State
from .cached_states import Samples
from .distill_exits import FEWEST_IMAGES, labelled_items

logger = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 64
TIMED_BATCH_SIZES = (1, 8)
TIMED_IMAGES = 16


class Shortened(NamedTuple):
    """What `shorten` gives: the shorter model, and what `shorten.json` holds."""

    model: HighwayMixin
    report: dict[str, Any]


def shorten(
    checkpoint: str | os.PathLike | PreTrainedModel,
    dataset: str | Samples,
    output: str | Path | None = None,
    *,
    blocks: Sequence[int],
    processor: BaseImageProcessor | None = None,
    fit_images: int = 500,
    limit: int = 2500,
    ignore_labels: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = logger.info,
) -> Shortened:
    """Replace a run of blocks of a trained model by one linear map of each token; nothing is trained.

    The map is the least-squares fit, with an intercept, from the hidden state before the first block to the one after
    the last, over the tokens of some images; labels play no part in it. On other images the model is then compared
    with what it was. Source: transformer blocks approximated by linear maps (TOAST, arXiv 2410.04941).

    Args:
        checkpoint (`str`, path or `PreTrainedModel`):
            A plain ViT, DeiT or Swin, or a highway of these: folder, Hub id, or in memory (copied). A highway keeps
            its exits and its policy.
        dataset (`str` or `Dataset`): See `grow`. Accuracies are honest on images that the model was not trained on.
        output (`str` or `Path`, *optional*): Folder for the model, its image processor and `shorten.json`.
        blocks (`Sequence[int]`): First and last of the blocks to replace, from 1; of a Swin within one stage.
        processor (`BaseImageProcessor`, *optional*): By default the checkpoint's.
        fit_images (`int`, *optional*, defaults to 500): To fit the map on.
        limit (`int`, *optional*, defaults to 2500): Use at most this many images in all, drawn at random.
        ignore_labels (`bool`, *optional*, defaults to `False`): Do as if there were no labels.
        seed (`int`, *optional*, defaults to 0): Of the draw.
        say (callable, *optional*): Takes the lines to show.

    Returns:
        `Shortened`: A highway in `eval()` mode with `config.linear_blocks`, and the report: on the held-out images
        `accuracy` (where there are labels) and `agreement` (share of samples that it answers as the full model does),
        `macs` of one image, `parameters`, and for each batch size milliseconds of a batch, run in turn.

    Raises:
        ValueError: A model of another kind, or shortened already; blocks that are not there or of several stages; an
            exit between them; too few images; images or labels that do not fit the model; `output` exists.
        OSError: No checkpoint there.

    Example:

        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=1)
        >>> plain = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
        >>> images = [{"pixel_values": image} for image in torch.randn(60, 3, 8, 8)]
        >>> shorter = shorten(plain, images, blocks=[2, 3], fit_images=10)
        >>> shorter.model.config.linear_blocks, shorter.report["images"]["held_out"]
        ([2, 3], 50)
    """
    if fit_images < 1:
        raise ValueError(f"fit_images: {fit_images!r} must be at least 1")
    started = time.perf_counter()
    with ExitStack() as stack:
        folder = None if output is None else stack.enter_context(replace_folder(output))
        full = _opened(checkpoint)
        shorter = _with_linear_blocks(full, blocks)
        stack.enter_context(evaluating(full))
        if processor is None and not isinstance(checkpoint, PreTrainedModel):
            processor = open_processor(checkpoint)
        images = load_unlabelled(dataset, limit=limit, seed=seed) if isinstance(dataset, str) else dataset
        items = labelled_items(images, full, processor, ignore_labels)
        fitted, held_out = _drawn(items, fit_images, limit, seed)
        say(f"{fit_images} images to fit the map on, {len(held_out)} to compare on")

        first, last = shorter.config.linear_blocks or blocks
        place: Any = _block_modules(shorter)[first - 1]
        weight, bias = fit_linear_map(_tokens_around(full, first, last, _pixels(fitted, full, "fit")))
        with torch.no_grad():
            place.weight.copy_(weight)
            place.bias.copy_(bias)

        report: dict[str, Any] = {
            "what": "lgvit shorten",
            "settings": {"blocks": [first, last], "num_blocks": full.config.num_blocks, "seed": seed},
            "images": {"fit": fit_images, "held_out": len(held_out)},
            **_compared(full, shorter, held_out),
            "environment": machine(full),
            "seconds": time.perf_counter() - started,
        }
        if folder is not None:
            shorter.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
            write_json(folder / "shorten.json", report)
    say(shorten_as_text(report))
    return Shortened(shorter, report)


def fit_linear_map(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Least squares with an intercept by the normal equations, summed up in float64 from batch to batch.

    Where inputs depend on each other linearly, it is the solution of the smallest norm.

    Args:
        pairs (`Iterable[tuple[Tensor, Tensor]]`): Inputs `[..., D]` and what they should become `[..., E]`.

    Returns:
        `weight` `[E, D]` and `bias` `[E]`, float64, as of `nn.Linear`.

    Raises:
        ValueError: There are fewer rows than unknowns of each output, `D + 1`.

    Example:

        >>> inputs = torch.tensor([[0.0], [1.0], [2.0]])
        >>> weight, bias = fit_linear_map([(inputs, 2 * inputs + 1)])
        >>> round(weight.item(), 6), round(bias.item(), 6)
        (2.0, 1.0)
    """
    gram, cross, rows = torch.zeros(()), torch.zeros(()), 0
    for inputs, outputs in pairs:
        # on the CPU, since not all accelerators have float64
        x, y = (each.detach().flatten(0, -2).cpu().double() for each in (inputs, outputs))
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram, cross, rows = gram + x.T @ x, cross + x.T @ y, rows + len(x)
    if rows < len(gram):
        raise ValueError(
            f"fit_images: their {rows} tokens are fewer than the {len(gram)} unknowns of each output; give more images"
        )
    solution = torch.linalg.pinv(gram, hermitian=True) @ cross
    return solution[:-1].T, solution[-1]


# -- the models -------------------------------------------------------------------------------------------------


def _opened(checkpoint: str | os.PathLike | PreTrainedModel) -> HighwayMixin:
    """A highway, or a plain checkpoint as a highway without exits."""
    if isinstance(checkpoint, PreTrainedModel):
        name, config = type(checkpoint).__name__, checkpoint.config
    else:
        name, config = str(checkpoint), read_config(str(checkpoint))
    kind = config.model_type
    if kind not in (*BY_BACKBONE, *HIGHWAYS):
        raise ValueError(f"{name} is a {kind!r}; blocks can be replaced in {', '.join([*BY_BACKBONE, *HIGHWAYS])}")
    if getattr(config, "linear_blocks", None) is not None:
        raise ValueError(
            f"{name}: blocks {config.linear_blocks} are one linear map already; begin with the full model"
        )
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"{name}: answers are compared as classes, and this model answers with other numbers")
    if isinstance(checkpoint, HighwayMixin):
        return checkpoint
    if kind in HIGHWAYS:
        model: Any = HIGHWAYS[kind].from_pretrained(name)
    else:
        model = BY_BACKBONE[kind].from_backbone(checkpoint, exit_positions=[], exit_types=[], exit_policy="never")
    if not isinstance(checkpoint, PreTrainedModel):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def _with_linear_blocks(full: HighwayMixin, blocks: Sequence[int]) -> HighwayMixin:
    """A copy with a new linear map in the place of some blocks."""
    settings = {name: value for name, value in full.config.to_dict().items() if name != "model_type"}
    settings |= {"attn_implementation": full.config._attn_implementation, "linear_blocks": blocks}
    model: Any = type(full)(type(full.config)(**settings)).to(device=full.device, dtype=full.dtype)
    known = model.state_dict()
    model.load_state_dict({name: each for name, each in full.state_dict().items() if name in known}, strict=False)
    return model.eval()


def _block_modules(model: HighwayMixin) -> list[nn.Module]:
    return [block for blocks in model.block_lists() for block in blocks]


@torch.no_grad()
def _tokens_around(
    model: HighwayMixin, first: int, last: int, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states before block `first` and after block `last`, `[B, N, D]` each."""
    # the stem, which is no block, comes first
    runs = [run for segment in model.segments() for run in segment.blocks][: last + 1]
    before: list[Tensor] = []
    # of a Swin, the first block of a stage is given merged patches: what it takes itself is what counts
    hook = _block_modules(model)[first - 1].register_forward_pre_hook(lambda _, given: before.append(given[0]))
    try:
        for pixels in batches:
            state = State({"pixel_values": pixels})
            for run in runs:
                state = run(state)
            yield before.pop(), state["hidden"]
    finally:
        hook.remove()


# -- images, and the comparison ---------------------------------------------------------------------------------


def _drawn(items: Samples, fit_images: int, limit: int, seed: int) -> tuple[Any, Any]:
    """Images to fit on and others to compare on, drawn at random."""
    num_images = min(len(items), limit)
    if num_images < fit_images + FEWEST_IMAGES:
        raise ValueError(
            f"{num_images} images are too few to fit on {fit_images} and to compare on {FEWEST_IMAGES} others; give "
            "more images (and a higher limit), or lower fit_images"
        )
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:num_images].tolist()
    samples: Any = items
    return Subset(samples, order[:fit_images]), Subset(samples, order[fit_images:])


def _pixels(items: Any, model: HighwayMixin, what: str) -> Iterator[Tensor]:
    for batch in tqdm(in_batches(items, SAMPLES_AT_ONCE), desc=what, leave=False):
        yield to_model(batch["pixel_values"], model)


@torch.no_grad()
def _compared(full: HighwayMixin, shorter: HighwayMixin, items: Any) -> dict[str, Any]:
    """Answers, MACs, parameters and time of both models."""
    models = {"full": full, "shortened": shorter}
    answers: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    for batch in tqdm(in_batches(items, SAMPLES_AT_ONCE), desc="compare", leave=False):
        labels += [batch["labels"]] if "labels" in batch else []
        for name, model in models.items():
            answers[name].append(model(to_model(batch["pixel_values"], model)).logits.argmax(-1).cpu())
    given = {name: torch.cat(some) for name, some in answers.items()}
    truth = torch.cat(labels) if labels else None
    if truth is not None:
        check_labels(truth, full.config.num_labels)
    return {
        "accuracy": None if truth is None else {name: _share(some == truth) for name, some in given.items()},
        "agreement": _share(given["full"] == given["shortened"]),
        "macs": {name: model_macs(model).backbone for name, model in models.items()},
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "wall_clock": {str(size): _timed(models, items, size) for size in TIMED_BATCH_SIZES},
    }


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def _timed(models: dict[str, HighwayMixin], items: Any, batch_size: int) -> dict[str, float]:
    """Milliseconds of a batch and the speed-up, both models run in turn on the same images."""
    milliseconds = dict.fromkeys(models, 0.0)
    batches = in_batches(Subset(items, range(TIMED_IMAGES)), batch_size)
    for batch in batches:
        pixels = to_model(batch["pixel_values"], models["full"])
        runs = {name: partial(model, pixels) for name, model in models.items()}
        for name, seconds in time_interleaved(runs, repeats=7).items():
            milliseconds[name] += 1e3 * statistics.median(seconds) / len(batches)
    return {
        **{f"{name}_ms": each for name, each in milliseconds.items()},
        "speed_up": milliseconds["full"] / milliseconds["shortened"],
    }


def shorten_as_text(report: dict[str, Any]) -> str:
    """The report of `shorten` for a terminal."""
    first, last = report["settings"]["blocks"]
    accuracy, clock = report["accuracy"], report["wall_clock"]
    lines = [
        f"blocks {first} to {last} of {report['settings']['num_blocks']} are one linear map, fitted on "
        f"{report['images']['fit']} images; compared on {report['images']['held_out']} others",
        "",
        "           "
        + ("  accuracy" if accuracy else "")
        + "  agreement   GMACs  parameters"
        + "".join(f"  ms, batch {size}" for size in clock),
    ]
    for name, agreement in (("full", 1.0), ("shortened", report["agreement"])):
        lines.append(
            f"{name:11}"
            + (f"{accuracy[name]:10.1%}" if accuracy else "")
            + f"{agreement:11.1%}{report['macs'][name] / 1e9:8.3f}{report['parameters'][name] / 1e6:10.2f} M"
            + "".join(f"{times[f'{name}_ms']:13.2f}" for times in clock.values())
        )
    speed_ups = " and ".join(f"{times['speed_up']:.2f}x at batch {size}" for size, times in clock.items())
    return "\n".join([*lines, "", f"faster by the clock: {speed_ups}"])
