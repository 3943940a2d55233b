"""A page that classifies images in a browser, in the folder of an exported highway: `lgvit export --web`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BaseImageProcessor

from ..pages import FOLDER, page
from ..policies import ExitPolicy
from ..runtimes.manifest import Manifest
from .infer import checked_pixel_settings

# of onnxruntime-web: what runs WebAssembly on a processor
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SCRIPTS = ("demo.mjs", "pixels.mjs")
# policies that compare one score with a threshold: the largest of it, and those by which every sample exits, or none
SCORES = {"confidence": (1.0, -1.0, 2.0), "margin": (1.0, -2.0, 2.0), "calibrated_confidence": (1.0, -1.0, 2.0)}
ENTROPY = (1e9, -1.0)
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
    policy: ExitPolicy,
    processor: BaseImageProcessor,
    num_channels: int,
    *,
    layout: str = "single",
    precision: str = "float32",
    thresholds: str = "input",
) -> None:
    """Raise `ValueError` where an export would have no page: what a slider cannot move, or a browser cannot run.

    Args:
        policy (`ExitPolicy`), processor (`BaseImageProcessor`), num_channels (`int`): Of the model.
        layout (`str`, *optional*), precision (`str`, *optional*), thresholds (`str`, *optional*): Of the export.

    Example:

        >>> from lgvit_hf.data.processing import make_processor
        >>> from lgvit_hf.policies import PatiencePolicy
        >>> check_web(PatiencePolicy(2), make_processor(16), 3)
        Traceback (most recent call last):
        ...
        ValueError: --web: policy 'patience' has no threshold for its slider; choose one of confidence, ...
    """
    known = (*SCORES, "entropy")
    if policy.name not in known:
        raise ValueError(
            f"--web: policy {policy.name!r} has no threshold for its slider; choose one of {', '.join(known)}, "
            "as with --policy confidence --threshold 0.9"
        )
    if layout != "single" or thresholds != "input":
        raise ValueError(
            f"--web takes --layout single and --thresholds input, not {layout} and {thresholds}; leave them out"
        )
    if precision == "float16":
        raise ValueError("--web: browsers run float32 and int8 on a processor, not float16; take --quantize int8")
    try:
        resample = checked_pixel_settings(processor, num_channels)["resample"]
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
    pictures: Sequence[Image.Image] = (),
) -> None:
    """Add `index.html`, its scripts, onnxruntime-web's files and sample images to an exported folder.

    Args:
        folder (`str` or `Path`): With the single file of `manifest`, whose thresholds are inputs.
        manifest (`Manifest`): Of the folder.
        class_names (`Sequence[str]`): Of all classes, in the order of their numbers.
        runtime (`Path`): As `find_runtime` gives it.
        name (`str`): The page's heading.
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
    data = {**_page_data(manifest, class_names), "model": name, "samples": samples}
    data["runtime"] = json.loads((runtime.parent / "package.json").read_text(encoding="utf-8"))["version"]
    (folder / "index.html").write_text(page("demo.html", data), encoding="utf-8")


def _page_data(manifest: Manifest, class_names: Sequence[str]) -> dict[str, Any]:
    """What `demo.mjs` reads of an export."""
    policy, (file,) = manifest.policy["name"], manifest.files
    most, always, never = SCORES.get(policy) or (math.log(max(2, len(class_names))), *ENTROPY)
    return {
        "version": manifest.versions["lgvit_hf"],
        "file": file,
        "precision": manifest.precision,
        "policy": policy,
        "depths": manifest.depths,
        "exits": manifest.exits,
        "inputs": manifest.inputs,
        "image": manifest.image,
        "class_names": list(map(str, class_names)),
        "most": most,
        "always": always,
        "never": never,
        "lower": policy == "entropy",
    }


def spread_samples(count: int) -> list[int]:
    """Numbers of up to six samples, evenly spread over `count` of them, since many data are in order of class.

    Example:

        >>> spread_samples(60), spread_samples(2)
        ([0, 10, 20, 30, 40, 50], [0, 1])
    """
    shown = min(SAMPLES, count)
    return [index * count // shown for index in range(shown)]
