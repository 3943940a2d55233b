"""`export_onnx`: a highway as ONNX files that have been run against it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..engine import replay, run_all, run_early
from ..files import replace_folder, write_json
from ..models import example_image
from ..policies import build_policy
from ..segments import State
from .parts import exits_that_run, export_decision, export_parts
from .runtime import LAYOUTS, MANIFEST, ORTHighway, file_digest, parameter_inputs

BATCH_SIZES = (1, 2, 7, 32)
TOLERANCE = 1e-4
ROUNDING = 1e-5
EXPORTABLE = (
    "confidence",
    "entropy",
    "margin",
    "confidence_entropy",
    "patience",
    "patience_confidence",
    "fixed",
    "never",
)

# what a machine without torch needs to answer an image; the processor's own arithmetic
INFER = '''"""python infer.py IMAGE...: needs numpy, pillow and onnxruntime."""
import json, pathlib, sys
import numpy as np, onnxruntime
from PIL import Image
here = pathlib.Path(__file__).parent
config, processor = (json.loads((here / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
session, size = onnxruntime.InferenceSession(here / "model.onnx"), processor["size"]
for file in sys.argv[1:]:
    image = Image.open(file).convert("RGB").resize((size["width"], size["height"]), processor.get("resample", 2))
    pixels = np.asarray(image, np.float32) * processor["rescale_factor"]
    pixels = (pixels - np.array(processor["image_mean"])) / np.array(processor["image_std"])
    logits, depth, _, score = session.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
    print(file, config["id2label"][str(logits[0].argmax())], f"after {depth[0]} blocks, score {score[0]:.3f}")
'''


def export_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    layout: str = "single",
    *,
    processor: BaseImageProcessor | None = None,
) -> dict[str, Any]:
    """Write a highway as ONNX, run it in ONNX Runtime against PyTorch, and keep it only if they agree.

    Args:
        model (`PreTrainedModel`): A highway, with its exit policy; exported in `eval()` mode, on the CPU.
        folder (`str` or `Path`): To be made: the model, config, processor, `manifest.json` and `infer.py`.
        layout (`str`, *optional*, defaults to `"single"`):
            `"single"`: one file whose exits are real branches and which drops rows that have left; its thresholds are
            inputs with defaults. `"segments"`: one file per segment, for any policy. `"all_exits"`: all exits' logits.
        processor (`BaseImageProcessor`, *optional*): Saved beside the model.

    Returns:
        The manifest: `layout`, `files` with their SHA-256, `depths`, `exits` (indices that are in the files),
        `policy`, and `verified`: the largest difference of logits on inputs that take every exit.

    Raises:
        ImportError: The extra `onnx` is not installed.
        ValueError: Unknown layout or policy, the folder is in use, or the files do not answer as the model does.
    """
    try:
        from .compose import compose_all_exits, compose_single
    except ImportError as error:
        raise ImportError('export needs onnx and onnxruntime: pip install "lgvit-hf[onnx]"') from error
    import onnx

    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    policy = model.exit_policy
    if policy.name not in EXPORTABLE and layout == "single":
        raise ValueError(
            f"exit_policy {policy.name!r} is not built in and does not export; layout='segments' runs any policy"
        )
    was_training, device = model.training, model.device
    model.eval().cpu()
    try:
        with replace_folder(folder) as new:
            depths = [segment.depth for segment in model.segments()]
            exits = exits_that_run(policy, len(depths)) if layout == "single" else list(range(len(depths)))
            parts = export_parts(model, exits)
            if layout == "single":
                decision = export_decision(policy, model.config.num_labels)
                inputs = parameter_inputs(policy, len(depths))
                models = {"model.onnx": compose_single(parts, decision, depths, inputs)}
            elif layout == "all_exits":
                models = {"model.onnx": compose_all_exits(parts)}
            else:
                models = {f"segment_{part.exit_index:02}.onnx": part.model for part in parts}
            for name, content in models.items():
                onnx.save(content, new / name)
            model.config.save_pretrained(new)
            if processor is not None:
                processor.save_pretrained(new)
                if layout == "single":
                    (new / "infer.py").write_text(INFER, encoding="utf-8")
            manifest = {
                "what": "lgvit export",
                "layout": layout,
                "files": {name: file_digest(new / name) for name in models},
                "depths": depths,
                "exits": exits,
                "policy": policy.to_dict(),
                "versions": {
                    "lgvit_hf": version("lgvit-hf"),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
            write_json(new / MANIFEST, manifest)
            manifest["verified"] = {"batch_sizes": list(BATCH_SIZES), "largest_difference": verify(model, new)}
            write_json(new / MANIFEST, manifest)
    finally:
        model.train(was_training).to(device)
    return manifest


@torch.no_grad()
def verify(model: PreTrainedModel, folder: str | Path) -> float:
    """Run an exported folder against its model: every exit forced, mixed batches, and batches of 1, 2, 7 and 32.

    Rows with a score within 1e-5 of its threshold may leave elsewhere.

    Returns:
        The largest difference of logits.

    Raises:
        ValueError: Logits differ by more than 1e-4 of the largest, or a row leaves elsewhere; with the numbers.
    """
    exported = ORTHighway.from_pretrained(folder)
    images = example_image(model, batch_size=max(BATCH_SIZES))
    segments, largest = model.segments(), 0.0
    exit_logits = torch.stack(run_all(segments, State({"pixel_values": images})))
    scale = max(1.0, exit_logits.abs().max().item())
    for settings in _policies_to_try(exported, exit_logits):
        policy = build_policy(settings, len(segments) - 1)
        exported.set_exit_policy(settings)
        undecided = _undecided(settings, exit_logits, exported.depths)
        for size in BATCH_SIZES:
            expected = run_early(segments, State({"pixel_values": images[:size]}), policy)
            found = exported(images[:size])
            decided = ~undecided[:size]
            difference = ((found.logits - expected.logits).abs().amax(-1) * decided).max().item()
            elsewhere = (found.exit_index != expected.exit_index) | (found.exit_layer != expected.exit_layer)
            elsewhere &= decided
            if elsewhere.any() or not difference <= TOLERANCE * scale:
                raise ValueError(
                    f"the export does not answer as the model does: of a batch of {size} under {settings}, "
                    f"{int(elsewhere.sum())} rows leave elsewhere, and logits differ by {difference:.2g} "
                    f"(largest {scale:.2g}); nothing was written"
                )
            largest = max(largest, difference)
    return largest


def _policies_to_try(exported: ORTHighway, exit_logits: Tensor) -> Iterator[dict[str, Any]]:
    """The policy as it is; and such that all rows leave at one exit, or different rows at different ones."""
    held = exported.manifest["policy"]
    policy = build_policy(held, len(exit_logits) - 1)
    if "temperature" in held or policy.name == "patience":
        yield from _with_other_numbers(held, exit_logits, exported.manifest["exits"])
    yield held


def _with_other_numbers(held: dict[str, Any], exit_logits: Tensor, exits: list[int]) -> Iterator[dict[str, Any]]:
    early = len(exit_logits) - 1
    if "patience" in held:
        for patience in range(1, early + 1):
            yield {**held, "patience": patience}
    if "threshold" not in held:
        return
    never, always = {"entropy": (-1.0, 1e6), "patience_confidence": (-1.0, 1e6)}.get(held["name"], (2.0, -2.0))
    entropies = {} if "entropy_threshold" not in held else {"entropy_threshold": [1e6] * early}
    for target in exits[:-1]:
        numbers = [always if index >= target and index in exits else never for index in range(early)]
        yield {**held, **entropies, "threshold": numbers}
    policy = build_policy({**held, **entropies, "threshold": 0.0}, early)
    mixed = []
    for index in range(early):
        memory = policy.start(exit_logits.shape[1], "cpu")
        _, after = policy(exit_logits[index], memory, index)
        mixed.append(_between(after["score"]) if index in exits else never)
    if held["name"] != "patience_confidence":
        yield {**held, **entropies, "threshold": mixed}


def _undecided(settings: dict[str, Any], exit_logits: Tensor, depths: list[int]) -> Tensor:
    """Which rows leave elsewhere when every threshold moves by as much as rounding may, `[B]` bool."""

    def left(step: float) -> Tensor:
        moved = {
            name: [number + step for number in value] if isinstance(value, list) else value + step
            for name, value in settings.items()
            if name in ("threshold", "entropy_threshold")
        }
        return replay(exit_logits, depths, build_policy({**settings, **moved}, len(depths) - 1)).exit_index

    return (left(-ROUNDING) != left(0.0)) | (left(ROUNDING) != left(0.0))


def _between(scores: Tensor) -> float:
    """A number in the widest gap of the middle half of some scores, so that rounding decides nothing."""
    ranked = np.sort(scores.numpy())
    middle = ranked[len(ranked) // 4 : 3 * len(ranked) // 4 + 1]
    widest = int(np.diff(middle).argmax())
    return float((middle[widest] + middle[widest + 1]) / 2)
