"""`lgvit export`: a checkpoint as ONNX, run against PyTorch before it is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.settings import check_counts, real, whole
from .options import add_data, add_policy, add_processor, policy_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from ..runtimes.manifest import Manifest

HELP = "write ONNX that really skips, and run it against the model"
EXAMPLE = (
    "lgvit export runs/stage2 onnx/\n"
    "  lgvit export runs/stage2 small/ --quantize int8 --data photos/ --max-accuracy-drop 0.005"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit export`."""
    parser.add_argument("checkpoint", help="folder or Hub id of a highway")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--layout",
        choices=("single", "segments", "all_exits"),
        default="single",
        help="one file with real branches, one per segment, or all exits' logits (default: single)",
    )
    parser.add_argument(
        "--quantize", choices=("int8", "float16"), help="smaller and less exact; give --data to know how much"
    )
    add_data(parser, "test", "rows on which the files are judged, where --data is given")
    parser.add_argument("--limit", type=whole(), help="judge on that many of them, drawn at random")
    parser.add_argument(
        "--max-accuracy-drop", type=real(), default=0.005, help="on these rows; more fails the export (default: 0.005)"
    )
    add_processor(parser)
    add_policy(parser)


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
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


def run_export(
    checkpoint: str,
    output: str,
    *,
    layout: str = "single",
    precision: str = "float32",
    policy: dict[str, Any] | None = None,
    data: str | None = None,
    max_accuracy_drop: float = 0.005,
    limit: int | None = None,
    which: str = "test",
    validation_share: float = 0.15,
    seed: int = 0,
    processor: str | None = None,
) -> Manifest:
    """Write a checkpoint as ONNX, run against PyTorch before it is kept.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        output (`str`): Folder to make.
        layout (`str`, *optional*), precision (`str`, *optional*), max_accuracy_drop (`float`, *optional*):
            See `export_onnx`.
        policy (`dict`, *optional*): Instead of the saved one.
        data (`str`, *optional*): See `load_images`: rows on which the export is judged as well.
        limit (`int`, *optional*): At most so many of them, drawn at random, always the same.
        which (`str`, *optional*), validation_share (`float`, *optional*), seed (`int`, *optional*):
            See `load_images`; which of its splits.
        processor (`str`, *optional*): See `processor_for`.
    """
    import torch
    from torch.utils.data import Subset

    from ..data.datasets import load_images
    from ..data.processing import ProcessedImages
    from ..export.onnx_export import export_onnx
    from ..hub.loading import check_class_names, load_highway
    from ..runtimes.onnxruntime import is_exported

    if is_exported(checkpoint):
        raise ValueError(f"{checkpoint} is exported already; give the checkpoint that it came from")
    opened, images = processor_for(checkpoint, processor), None
    splits = None if data is None else load_images(data, validation_share=validation_share, seed=seed)
    model = load_highway(checkpoint)
    if splits is not None:
        check_class_names(checkpoint, model.config, splits.label_names)
        images = ProcessedImages(getattr(splits, which), opened)
        if limit is not None:
            check_counts(limit=[limit])
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            images = Subset(images, order[:limit].tolist())
    if policy is not None:
        model.set_exit_policy(policy)
    return export_onnx(
        model,
        output,
        layout,
        precision=precision,
        processor=opened,
        images=images,
        max_accuracy_drop=max_accuracy_drop,
    )


def processor_for(checkpoint: str, source: str | None = None) -> BaseImageProcessor:
    """The image processor that goes with a checkpoint, from elsewhere where it has none.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        source (`str`, *optional*): Folder or Hub id of a processor, instead of the checkpoint's.

    Raises:
        ValueError: There is none.
    """
    from ..data.processing import open_processor

    place = checkpoint if source is None else source
    try:
        return open_processor(place)
    except OSError as error:
        raise ValueError(
            f"{place}: no preprocessor_config.json there, which says how images become pixels; give a folder or Hub "
            "id that has one, as the plain model has that the checkpoint began as: --processor FOLDER|NAME"
        ) from error


def export_as_text(manifest: Manifest, folder: str | Path) -> str:
    """What `run_export` wrote and how it was checked, for a terminal."""
    from ..evaluation.report_text import policy_in_words

    size = sum((Path(folder) / name).stat().st_size for name in manifest.files)
    checks, sizes = manifest.checks, ", ".join(map(str, manifest.checks["batch_sizes"]))
    lines = [
        f"{', '.join(manifest.files)} in {folder}: {manifest.precision}, {size / 1e6:.1f} MB; policy "
        f"{policy_in_words(manifest.policy)}",
        f"run in ONNX Runtime on batches of {sizes} with every exit taken: "
        + ("answers as the model does, " if manifest.precision == "float32" else "")
        + f"logits within {checks['largest_difference']:.1e}",
    ]
    if "images" in checks:
        found = checks["images"]
        lines.append(
            f"on {found['rows']} images {found['accuracy']:.2%} right, the model {found['accuracy_of_model']:.2%}; "
            f"the same answer on {found['agreement']:.2%}; mean depth {found['mean_depth']:.2f}, the model "
            f"{found['mean_depth_of_model']:.2f}"
        )
    elif manifest.precision != "float32":
        lines.append(f"what {manifest.precision} costs in accuracy was not measured; --data says on which images to")
    return "\n".join(lines)
