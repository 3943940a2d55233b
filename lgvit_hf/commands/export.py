"""`lgvit export`: a checkpoint as ONNX, run against PyTorch before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ..evaluation.verdict import in_words
from ..export.manifest import Manifest
from ..export.onnx_export import export_onnx
from ..export.runtime import is_exported
from ..models import load_highway
from ..processing import open_processor
from .opening import check_counts, open_highway


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
) -> Manifest:
    """Write a checkpoint as ONNX, run against PyTorch before it is kept.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        output (`str`): Folder to make.
        layout (`str`, *optional*), precision (`str`, *optional*), max_accuracy_drop (`float`, *optional*):
            As of `export_onnx`.
        policy (`dict`, *optional*): Instead of the saved one.
        data (`str`, *optional*): As of `load_images`: rows on which the export is judged as well.
        limit (`int`, *optional*): At most so many of them, drawn at random, always the same.
        which (`str`, *optional*), validation_share (`float`, *optional*), seed (`int`, *optional*):
            As of `open_highway`.
    """
    if is_exported(checkpoint):
        raise ValueError(f"{checkpoint} is exported already; give the checkpoint that it came from")
    if data is None:
        model, processor, images = load_highway(checkpoint), open_processor(checkpoint), None
    else:
        model, processor, images = open_highway(checkpoint, data, which, validation_share, seed)
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
        processor=processor,
        images=images,
        max_accuracy_drop=max_accuracy_drop,
    )


def export_as_text(manifest: Manifest, folder: str | Path) -> str:
    """What `run_export` wrote and how it was checked, for a terminal."""
    size = sum((Path(folder) / name).stat().st_size for name in manifest.files)
    checks, sizes = manifest.checks, ", ".join(map(str, manifest.checks["batch_sizes"]))
    lines = [
        f"{', '.join(manifest.files)} in {folder}: {manifest.precision}, {size / 1e6:.1f} MB; policy "
        f"{in_words(manifest.policy)}",
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
