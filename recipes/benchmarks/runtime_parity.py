"""Does a single file answer in OpenVINO, and in onnxruntime-web as a browser runs it, as it does in ONNX Runtime?

    npm install --prefix web onnxruntime-web@1.30
    python recipes/benchmarks/runtime_parity.py onnx/ --web web --data photos/
    python recipes/benchmarks/runtime_parity.py runs/vit runs/deit runs/swin --web web --data photos/ --limit 1000

What is given is a folder that `lgvit export` wrote with `--thresholds input` or `fixed`, or a checkpoint: of that one
a file is made for each built-in policy and for an ensemble, float and int8, with thresholds as inputs and fixed, such
that about half of the samples exit at every exit. OpenVINO and, with `--web`, Node run the files on batches of several
sizes, whose samples exit at different exits. Without `--data` the pixels are random.

Printed, a line of JSON per file and runtime: samples that exit elsewhere (`other_exits`), those of them whose score is
within 1e-5 of a threshold aside (`near_threshold`); samples whose logits differ by more than 1e-4 (`other_logits`);
the largest differences. The exit code is 1 where a float file has any of the first or third kind. Of int8 files they
are counted alone: rounding to 8 bits makes a whole step of a difference of 1e-7, now and then.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, open_processor
from lgvit_hf.engine import run_all
from lgvit_hf.ensemble import with_ensemble
from lgvit_hf.gate import num_features
from lgvit_hf.hub.loading import example_image, load_highway
from lgvit_hf.policies import build_policy
from lgvit_hf.runtimes.manifest import Manifest, is_exported
from lgvit_hf.runtimes.openvino_session import open_openvino
from lgvit_hf.runtimes.single_file import parameter_inputs
from lgvit_hf.segments import State
from lgvit_hf.serving.device.loop import ANSWERS
from lgvit_hf.serving.device.session import open_session

NODE = Path(__file__).with_suffix(".mjs")
SIZES = (1, 3, 8, 32)
TYPES = {"logits": np.float32, "exit_index": np.int64, "exit_layer": np.int64, "exit_score": np.float32}
PRECISIONS = ("float32", "int8")
NEAR, LOGITS = 1e-5, 1e-4


class Case(NamedTuple):
    """A single file, what it takes beside pixels, and by which policy it decides."""

    name: str
    file: Path
    inputs: dict[str, list[float]]
    policy: dict[str, Any]


def exported(folder: str) -> Case:
    """What `lgvit export` wrote."""
    manifest = Manifest.load(folder)
    if manifest.layout != "single" or manifest.thresholds == "optional":
        raise ValueError(f"{folder}: a browser runs a single file; export with --thresholds input or fixed")
    name = f"{manifest.policy['name']} {manifest.precision} {manifest.thresholds}"
    return case_of(name, Path(folder, *manifest.files), manifest.inputs, manifest.policy)


def case_of(name: str, file: Path, inputs: dict[str, Any], policy: dict[str, Any]) -> Case:
    """With those of the inputs that the file requires, in float32."""
    required = {entry.name for entry in open_session(file, 1).get_inputs()} - {"pixel_values"}
    return Case(name, file, {each: np.array(inputs[each], np.float32).tolist() for each in required}, policy)


# -- a checkpoint: files of all policies ---------------------------------------------------------------------------


def policies(exit_logits: list[torch.Tensor]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Settings of each built-in policy, and an ensemble or none, by which half of the samples exit at every exit."""
    early, (samples, labels) = len(exit_logits) - 1, exit_logits[0].shape

    def cut(settings: dict[str, Any], ensemble: dict[str, Any] | None = None) -> list[float]:
        judge = with_ensemble(build_policy({**settings, "threshold": 0.5}, early), ensemble, early + 1, labels)
        memory, scores = judge.start(samples, "cpu"), []
        for index, logits in enumerate(exit_logits[:-1]):
            _, memory = judge(logits, memory, index)
            scores.append(between(memory["score"]))
        return scores

    for name in ("confidence", "entropy", "margin", "label_confidence"):
        yield {"name": name, "threshold": cut({"name": name}), "temperature": 1.0}, None
    entropies = cut({"name": "entropy"})
    confidences = cut({"name": "confidence"})
    yield {"name": "confidence_entropy", "threshold": confidences, "entropy_threshold": entropies}, None
    quartiles = [logits.softmax(-1).amax(-1).quantile(torch.tensor([0.25, 0.5, 0.75])) for logits in exit_logits[:-1]]
    bins = {"edges": [edges.tolist() for edges in quartiles], "accuracies": [[0.2, 0.4, 0.6, 0.8]] * early}
    yield {"name": "calibrated_confidence", "threshold": 0.5, **bins}, None
    weights = [[6.0, *[0.1] * (num_features(place) - 1)] for place in range(early)]
    models = [
        {"mean": [0.0] * len(row), "scale": [1.0] * len(row), "weights": [row, row], "bias": [-3.0, -3.0]}
        for row in weights
    ]
    gate = {"name": "gate", "exits": list(range(early)), "models": models, "num_labels": labels}
    yield {**gate, "threshold": cut(gate)}, None
    for patience in (1, 2):
        yield {"name": "patience", "patience": patience}, None
        yield {"name": "patience_confidence", "threshold": entropies, "patience": patience}, None
    yield {"name": "fixed", "exit_index": early // 2}, None
    yield {"name": "never"}, None
    ensemble = {"weights": [float(1 + index) for index in range(early + 1)], "bias": [0.0] * labels}
    for settings in ({"name": "confidence"}, gate):
        yield {**settings, "threshold": cut(settings, ensemble)}, ensemble


def between(scores: torch.Tensor) -> float:
    """In the middle of the widest gap between the scores of the middle third."""
    middle = scores.sort().values[len(scores) // 3 : len(scores) - len(scores) // 3]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


@torch.inference_mode()
def answers_of_exits(model: Any, pixels: np.ndarray) -> list[torch.Tensor]:
    batches = torch.from_numpy(pixels).split(32)
    found = [run_all(model.segments(), State({"pixel_values": batch})) for batch in batches]
    return [torch.cat(logits) for logits in zip(*found, strict=True)]


def composed(
    model: Any,
    pixels: np.ndarray,
    folder: Path,
    names: Sequence[str] | None = None,
    precisions: Sequence[str] = PRECISIONS,
) -> Iterator[Case]:
    """A file per policy, precision and kind of thresholds, each written when it is asked for."""
    import onnx

    from lgvit_hf.export.composition import compose_single, set_thresholds
    from lgvit_hf.export.quantization import quantize
    from lgvit_hf.export.segment_graphs import export_decisions, export_parts
    from lgvit_hf.export.writing import exits_in_files

    depths = [segment.depth for segment in model.segments()]
    file, made = folder / "model.onnx", dict[tuple[int, ...], dict[str, Any]]()
    for settings, ensemble in policies(answers_of_exits(model, pixels)):
        policy = build_policy(settings, len(depths) - 1)
        if names is not None and policy.name not in names:
            continue
        exits = exits_in_files(policy, len(depths), "single")
        decider = with_ensemble(policy, ensemble, len(depths), model.config.num_labels)
        if tuple(exits) not in made:
            parts = export_parts(model, exits)
            made[tuple(exits)] = {"float32": parts}
            if "int8" in precisions:
                made[tuple(exits)]["int8"] = [replace(part, model=quantize(part.model)) for part in parts]
        inputs = parameter_inputs(policy, len(depths))
        decisions = export_decisions(decider, model.config.num_labels, exits, len(depths) - 1)
        for precision in precisions:
            for thresholds in ("input", "fixed"):
                content = compose_single(made[tuple(exits)][precision], decisions, depths, inputs)
                set_thresholds(content, thresholds)
                onnx.save(content, file)
                name = f"{policy.name}{' ensemble' if ensemble else ''} {precision} {thresholds}"
                yield case_of(name, file, inputs, policy.to_dict())


# -- the comparison ------------------------------------------------------------------------------------------------


def batch_sizes(samples: int) -> list[int]:
    sizes, left = [], samples
    for size in cycle(SIZES):
        if not left:
            return sizes
        sizes.append(min(size, left))
        left -= sizes[-1]
    return sizes


def in_session(session: Any, case: Case, pixels: np.ndarray, sizes: list[int]) -> dict[str, np.ndarray]:
    start, found = 0, []
    numbers = {name: np.array(values, np.float32) for name, values in case.inputs.items()}
    for size in sizes:
        found.append(session.run(ANSWERS, {"pixel_values": pixels[start : start + size], **numbers}))
        start += size
    return dict(zip(ANSWERS, map(np.concatenate, zip(*found, strict=True)), strict=True))


def in_web(case: Case, pixels: np.ndarray, sizes: list[int], web: Path) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels.tofile(folder / "pixels.bin")
        request = {
            "web": str(web.resolve()),
            "model": str(case.file),
            "pixels": str(folder / "pixels.bin"),
            "shape": pixels.shape[1:],
            "sizes": sizes,
            "inputs": case.inputs,
            "output": name,
        }
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(["node", NODE, folder / "request.json"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case.name}: onnxruntime-web failed: {done.stderr[-2000:]}")
        found = {name: np.fromfile(folder / f"{name}.bin", kind) for name, kind in TYPES.items()}
    found["logits"] = found["logits"].reshape(len(pixels), -1)
    return found


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], policy: dict[str, Any]) -> dict[str, Any]:
    """How far two runtimes' answers to the same samples are apart."""
    same = ours["exit_index"] == theirs["exit_index"]
    thresholds, near = policy.get("threshold"), 0
    for sample in np.flatnonzero(~same):
        # the score by which one of them exited, where the other did not
        first = min((ours, theirs), key=lambda found: found["exit_index"][sample])
        index = first["exit_index"][sample]
        threshold = thresholds[index] if isinstance(thresholds, list) else thresholds
        near += threshold is not None and abs(first["exit_score"][sample] - threshold) <= NEAR
    differences = {name: np.abs(ours[name] - theirs[name])[same] for name in ("logits", "exit_score")}
    return {
        "exits": dict(sorted(Counter(ours["exit_index"].tolist()).items())),
        "other_exits": int((~same).sum() - near),
        "near_threshold": int(near),
        "other_logits": int((differences["logits"].max(-1, initial=0) > LOGITS).sum()),
        **{f"largest_difference_of_{name}": float(each.max(initial=0)) for name, each in differences.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="exported folders or checkpoints")
    parser.add_argument("--web", type=Path, help="folder with node_modules/onnxruntime-web (default: OpenVINO alone)")
    parser.add_argument("--data", help="see `load_images`; its test split (default: random pixels)")
    parser.add_argument("--policies", nargs="+", help="of a checkpoint (default: all that are built in)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of a checkpoint")
    parser.add_argument("--limit", type=int, default=64, help="images (default: 64)")
    options = parser.parse_args()
    good = True
    for path in options.paths:
        with tempfile.TemporaryDirectory() as folder:
            if is_exported(path):
                case = exported(path)
                shape = open_session(case.file, 1).get_inputs()[0].shape[1:]
                pixels = pixels_of(path, options.data, options.limit, shape)
                cases: Any = [case]
            else:
                model = load_highway(path).eval()
                pixels = pixels_of(path, options.data, options.limit, example_image(model).shape[1:])
                cases = composed(model, pixels, Path(folder), options.policies, options.precisions)
            sizes = batch_sizes(len(pixels))
            for case in cases:
                ours = in_session(open_session(case.file, 1), case, pixels, sizes)
                theirs = {"openvino": in_session(open_openvino(case.file, 1), case, pixels, sizes)}
                if options.web:
                    theirs["onnxruntime-web"] = in_web(case, pixels, sizes, options.web)
                for runtime, found in theirs.items():
                    line = compare(ours, found, case.policy)
                    good &= " int8 " in case.name or not (line["other_exits"] or line["other_logits"])
                    what = {"path": path, "file": case.name, "runtime": runtime, "samples": len(pixels)}
                    print(json.dumps({**what, **line}), flush=True)
    return 0 if good else 1


def pixels_of(path: str, data: str | None, limit: int, shape: Any) -> np.ndarray:
    if data is None:
        random = np.random.default_rng(0)
        pixels = random.standard_normal((limit, *shape)) + 2 * random.standard_normal((limit, len(shape), 1, 1))
        return pixels.astype(np.float32)
    images = ProcessedImages(load_images(data).test, open_processor(path))
    return np.stack([images[index]["pixel_values"] for index in range(min(limit, len(images)))])


if __name__ == "__main__":
    sys.exit(main())
