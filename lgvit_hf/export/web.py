"""A page that classifies images in a browser, in the folder of an exported highway: `lgvit export --web`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BaseImageProcessor, PretrainedConfig

from ..pages import FOLDER, page
from ..policies import problem_of
from ..runtimes.manifest import Manifest
from .infer import checked_pixel_settings

# of onnxruntime-web: what runs WebAssembly on a processor
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SCRIPTS = ("demo.mjs", "pixels.mjs")
# what a policy compares with the number that the slider sets
SCORES = {
    "calibrated_confidence": "how often images of this confidence are answered rightly",
    "confidence": "the largest probability",
    "confidence_entropy": "the largest probability",
    "entropy": "the entropy in nats",
    "gate": "the probability that no right answer is lost",
    "label_confidence": "the confidence of the least confident label",
    "margin": "the largest probability less the second",
    "patience": "exits in a row that agree",
    "patience_confidence": "the entropy in nats",
}
# thresholds by which every sample exits, and none: of a confidence, and of an entropy
CONFIDENCE, ENTROPY = (-1.0, 2.0), (1e9, -1.0)
# Pillow's filters that `pixels.mjs` knows: all but the nearest pixel
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
SAMPLES, SAMPLE_SIDE = 6, 512


def find_runtime(folder: str | Path | None) -> Path:
    """The folder `dist` of the npm package onnxruntime-web.

    Args:
        folder (`str` or `Path`, *optional*):
            The package, or a folder in which it was installed; by default the present one or one that it lies in.

    Raises:
        ValueError: It is not there, or lacks a file.
    """
    here = Path.cwd()
    places = [here, *here.parents] if folder is None else [Path(folder)]
    for place in places:
        for home in (place, place / "node_modules" / "onnxruntime-web"):
            if (home / "package.json").is_file() and all((home / "dist" / name).is_file() for name in RUNTIME):
                return home / "dist"
    raise ValueError(
        f"--web: no onnxruntime-web with dist/{RUNTIME[0]} in {places[0]}; "
        "npm install --prefix web onnxruntime-web@1.30, and give --web web"
    )


def check_web(
    config: PretrainedConfig,
    processor: BaseImageProcessor,
    *,
    layout: str = "single",
    precision: str = "float32",
    thresholds: str = "input",
) -> None:
    """Raise `ValueError` where an export would have no page: what a slider cannot move, or a browser cannot run.

    Args:
        config (`PretrainedConfig`), processor (`BaseImageProcessor`): Of the model.
        layout (`str`, *optional*), precision (`str`, *optional*), thresholds (`str`, *optional*): Of the export.

    Example:

        >>> from lgvit_hf import ViTHighwayConfig
        >>> from lgvit_hf.data.processing import make_processor
        >>> check_web(ViTHighwayConfig(), make_processor(16), layout="segments")
        Traceback (most recent call last):
        ...
        ValueError: --web takes --layout single and --thresholds input, not segments and input; leave them out
    """
    if problem_of(config.num_labels, config.problem_type) == "regression":
        raise ValueError(f"--web: the page shows classes, and this model's {config.num_labels} label(s) are numbers")
    if layout != "single" or thresholds != "input":
        raise ValueError(
            f"--web takes --layout single and --thresholds input, not {layout} and {thresholds}; leave them out"
        )
    if precision == "float16":
        raise ValueError("--web: browsers run float32 and int8 on a processor, not float16; take --quantize int8")
    try:
        resample = checked_pixel_settings(processor, config.num_channels)["resample"]
    except ValueError as error:
        raise ValueError(f"--web: a page cannot prepare images as the image processor does: {error}") from error
    if resample not in FILTERS:
        filters = ", ".join(f"{key} ({name})" for key, name in FILTERS.items())
        raise ValueError(f"--web: resample={resample} of the image processor must be one of {filters}")


def write_web(
    folder: str | Path,
    manifest: Manifest,
    class_names: Sequence[str],
    runtime: Path,
    *,
    name: str,
    has_several: bool = False,
    pictures: Sequence[Image.Image] = (),
) -> None:
    """Add `index.html`, its scripts, onnxruntime-web's files and sample images to an exported folder.

    Args:
        folder (`str` or `Path`): With the single file of `manifest`, whose thresholds are inputs.
        manifest (`Manifest`): Of the folder.
        class_names (`Sequence[str]`): Of all classes, in the order of their numbers.
        runtime (`Path`): As `find_runtime` gives it.
        name (`str`): The page's heading.
        has_several (`bool`, *optional*, defaults to `False`): Whether an image may be of several classes at once.
        pictures (`Sequence[PIL.Image.Image]`, *optional*): Samples to choose from, RGB or grey.
    """
    folder, web = Path(folder), Path(folder) / "web"
    web.mkdir()
    for file in (*(runtime / each for each in RUNTIME), *(FOLDER / each for each in SCRIPTS)):
        shutil.copyfile(file, web / file.name)
    samples = []
    for index, picture in enumerate(pictures):
        small = picture.copy()
        small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        samples.append(f"web/sample{index}.png")
        small.save(folder / samples[-1])
    data = {**page_data(manifest, class_names), "model": name, "samples": samples, "several": has_several}
    data["runtime"] = json.loads((runtime.parent / "package.json").read_text(encoding="utf-8"))["version"]
    (folder / "index.html").write_text(page("demo.html", data), encoding="utf-8")


def page_data(manifest: Manifest, class_names: Sequence[str]) -> dict[str, Any]:
    """What `demo.mjs` reads of an export.

    It knows no policy: `inputs` are those of the file, `slider` is which of them moves and how far (`None` where
    nothing can), and `runs` are values of them by which an image exits at one exit after the other.
    """
    return {
        "version": manifest.versions["lgvit_hf"],
        "file": next(iter(manifest.files)),
        "precision": manifest.precision,
        "policy": manifest.policy["name"],
        "depths": manifest.depths,
        "exits": manifest.exits,
        "inputs": manifest.inputs,
        "image": manifest.image,
        "class_names": list(map(str, class_names)),
        "slider": _slider(manifest, len(class_names)),
        "runs": _runs(manifest),
    }


def _slider(manifest: Manifest, num_labels: int) -> dict[str, Any] | None:
    """The input that is moved, in `steps` from `least` to `most`, and whether `lower` means fewer early exits."""
    name = next((each for each in ("exit_thresholds", "exit_patience") if each in manifest.inputs), None)
    early = len(manifest.exits) - 1
    if name is None or not early:
        return None
    moves: dict[str, Any] = {"lower": False, "least": 0, "most": 1, "steps": 1000}
    if name == "exit_patience":  # more than the early exits is never reached
        moves |= {"least": 1, "most": early + 1, "steps": early}
    elif _is_entropy(manifest):
        moves |= {"lower": True, "most": math.log(num_labels)}
    return {"input": name, "score": SCORES[manifest.policy["name"]], **moves}


def _is_entropy(manifest: Manifest) -> bool:
    return manifest.policy["name"] in ("entropy", "patience_confidence")


def _runs(manifest: Manifest) -> list[dict[str, list[float]]]:
    """Inputs for each exit; of a patience alone for each number, by which an image need not exit everywhere."""
    inputs, exits, early = manifest.inputs, manifest.exits, range(len(manifest.depths) - 1)
    if "exit_thresholds" in inputs:
        always, never = ENTROPY if _is_entropy(manifest) else CONFIDENCE
        others = {"exit_patience": [1.0], "exit_entropy_thresholds": [ENTROPY[0] for _ in early]}
        others = {name: numbers for name, numbers in others.items() if name in inputs}
        return [
            others | {"exit_thresholds": [always if index == exit else never for index in early]} for exit in exits
        ]
    return [{"exit_patience": [number]} if "exit_patience" in inputs else {} for number in range(1, len(exits) + 1)]


def spread_samples(count: int) -> list[int]:
    """Numbers of up to six samples, evenly spread over `count` of them, since many data are in order of class.

    Example:

        >>> spread_samples(60), spread_samples(2)
        ([0, 10, 20, 30, 40, 50], [0, 1])
    """
    shown = min(SAMPLES, count)
    return [index * count // shown for index in range(shown)]
