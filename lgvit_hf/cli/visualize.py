"""`lgvit visualize`: what a checkpoint made of some images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import whole
from .options import add_data

if TYPE_CHECKING:
    import torch

    from ..data.processing import ProcessedImages

HELP = "draw how deep tokens went, or which images exited first and last"
EXAMPLE = "lgvit visualize runs/avit --data photos/ --output pictures --images 8"
REQUIRED = ("data", "output")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit visualize`."""
    add_data(parser, "test", "images to choose from, where they have labels", "an AViT or of a highway")
    parser.add_argument("--output", help="folder for the pictures")
    parser.add_argument("--images", type=whole(), default=8, help="how many are drawn (default: 8)")


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result.

    Of an `AViT`, the images whose tokens differ the most in depth: `depths.png` with the images, the depths of their
    tokens and both in one, `tokens_alive.png` with the tokens that run in each block. Of a highway, the images that
    exited first and last, half of each: `first_and_last.png` with their depths and the policy's score at every exit.

    Raises:
        ImportError: The extra `plots` is not installed.
        ValueError: Another type of model; more images asked for than there are.
    """
    import torch

    from ..data.processing import ProcessedImages, open_processor
    from ..hub.loading import HIGHWAYS, read_config
    from ..modeling_avit import AViT
    from ..runtimes.manifest import is_exported
    from .drawing import check_can_draw

    check_can_draw()
    checkpoint, data, images = options.checkpoint, options.data, options.images
    if is_exported(checkpoint):
        raise ValueError(f"{checkpoint} is exported; give the checkpoint that it came from")
    kinds: dict[str, Any] = {**HIGHWAYS, "avit": AViT}
    kind = read_config(checkpoint).model_type
    if kind not in kinds:
        raise ValueError(
            f"{checkpoint}: model type {kind!r} must be avit or one of {', '.join(HIGHWAYS)}; `lgvit grow` and "
            "AViT.from_backbone make one of a plain checkpoint"
        )
    processor = open_processor(checkpoint)
    dataset = ProcessedImages(_split_or_all(options), processor)
    if images > len(dataset):
        raise ValueError(f"images={images}: there are {len(dataset)} in {data}; ask for fewer, or for another --split")
    model = kinds[kind].from_pretrained(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    draw = _draw_tokens if kind == "avit" else _draw_first_and_last
    files = draw(Path(options.output), model, dataset, images)
    print(f"drawn in {options.output}: {', '.join(files)}")


def _split_or_all(options: argparse.Namespace) -> Any:
    """One split, where there are labels by which to split; otherwise all images."""
    from ..data.datasets import class_names, load_unlabelled
    from ..data.held_out import load_known

    data, seed = options.data, options.seed
    if class_names(load_unlabelled(data, limit=1)) is None:
        return load_unlabelled(data)
    known = load_known(data, options.checkpoint, validation_share=options.validation_share, seed=seed)
    return getattr(known.splits, options.split)


def _draw_tokens(folder: Path, model: Any, dataset: ProcessedImages, count: int) -> list[str]:
    from ..data.processing import stack
    from ..evaluation.image_scores import as_seen, patch_grid, token_depths, widest_spread
    from ..evaluation.plots import plot_token_depths, plot_tokens_alive

    depths, predicted = token_depths(model, dataset)
    shown = widest_spread(depths, count)
    patches = depths[:, model.config.num_prefix_tokens :].unflatten(1, patch_grid(model.config))
    names = _names_of(model.config, dataset, shown, predicted[shown])
    answers: list[Any] = [
        {"depths": patches[index].numpy(), "class_token": int(depths[index, 0]), **name}
        for index, name in zip(shown, names, strict=True)
    ]
    seen: Any = as_seen(stack([dataset[index] for index in shown])["pixel_values"], dataset.processor)
    num_blocks = model.config.num_hidden_layers
    title = f"{count:,} of {len(depths):,} images: those whose tokens differ the most in depth"
    plot_token_depths(folder / "depths.png", seen, answers, num_blocks=num_blocks, title=title)
    plot_tokens_alive(folder / "tokens_alive.png", depths.numpy(), shown=shown, num_blocks=num_blocks)
    return ["depths.png", "tokens_alive.png"]


def _draw_first_and_last(folder: Path, model: Any, dataset: ProcessedImages, count: int) -> list[str]:
    from ..data.processing import stack
    from ..evaluation.image_scores import SCORES, as_seen, first_and_last, limits_of, scores_by_exit
    from ..evaluation.plots import plot_scores
    from ..evaluation.report import answer_all
    from ..hub.loading import answer_depths

    found = answer_all(model, dataset)
    shown = first_and_last(found.exit_layer, count)
    pixels = stack([dataset[index] for index in shown])["pixel_values"]
    seen: Any = as_seen(pixels, dataset.processor)
    scores = scores_by_exit(model, pixels).T.tolist()
    names = _names_of(model.config, dataset, shown, found.logits[shown].argmax(-1))
    answers: list[Any] = [
        {"depth": int(found.exit_layer[index]), "scores": score, **name}
        for index, score, name in zip(shown, scores, names, strict=True)
    ]
    policy, depths = model.exit_policy, answer_depths(model.config)
    plot_scores(
        folder / "first_and_last.png",
        seen,
        answers,
        depths=depths,
        score=SCORES.get(policy.name, ("score",))[0],
        thresholds=limits_of(policy, len(depths) - 1),
    )
    return ["first_and_last.png"]


def _names_of(
    config: Any, dataset: ProcessedImages, shown: list[int], predicted: torch.Tensor
) -> list[dict[str, Any]]:
    """What was answered and, where the data have the model's classes, what is right."""
    from ..data.datasets import class_names

    names, known = [config.id2label[index] for index in range(config.num_labels)], class_names(dataset.images)
    if known is None or (names != known and names != [f"LABEL_{index}" for index in range(len(known))]):
        return [{"predicted": names[index], "label": None} for index in predicted.tolist()]
    labels = [known[dataset.images[index]["label"]] for index in shown]
    return [
        {"predicted": known[index], "label": label} for index, label in zip(predicted.tolist(), labels, strict=True)
    ]
