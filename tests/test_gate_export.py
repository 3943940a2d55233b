"""Policies whose rule differs by exit, exported and split: the answers are those of the model."""

import json

import pytest
import torch
from torch.utils.data import Subset
from transformers import ViTImageProcessor

from lgvit_hf import ProcessedImages, ViTHighway, load_images
from lgvit_hf.evaluation.exit_table import collect
from lgvit_hf.evaluation.gate_fitting import fit_gate
from lgvit_hf.policies import build_policy
from lgvit_hf.serving.open_part import open_part
from lgvit_hf.serving.split import run_chain, split
from tests.gates import random_models
from tests.tiny import tiny_images, tiny_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.export.verification import between  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402

pytestmark = pytest.mark.version_independent

COMPARED = ("logits", "exit_score")
EXITS = 4
SMALL = {"num_hidden_layers": 5, "exit_positions": [1, 2, 3, 4], "exit_types": "linear"}


def gate(model, exits=range(EXITS), threshold=0.5):
    exits, num_labels = list(exits), model.config.num_labels
    return {
        "name": "gate",
        "threshold": [threshold] * EXITS,
        "temperature": [0.5, 1.0, 2.0, 1.5, 1.0],
        "exits": exits,
        "models": random_models(len(exits), 3),
        "num_labels": num_labels,
    }


def calibrated(model):
    confidences = 1 / model.config.num_labels + torch.tensor([0.02, 0.05]).double()
    return {
        "name": "calibrated_confidence",
        "threshold": 0.5,
        "edges": [confidences.tolist()] * EXITS,
        "accuracies": [[0.1, 0.6, 0.9], [0.6, 0.3, 0.7], [0.2, 0.4, 0.6], [0.7, 0.4, 0.6]],
    }


POLICIES = {
    "gate": gate,
    "gate of two exits": lambda model: gate(model, exits=[1, 3]),
    "calibrated_confidence": calibrated,
}


@torch.no_grad()
def model_with(policy):
    model = tiny_model("vit", **SMALL)
    settings, images = POLICIES[policy](model), some_images()
    if settings["name"] == "gate":
        # in the middle of the scores, so that some samples exit and others do not
        logits = torch.stack(model(images[~images.isnan().any((1, 2, 3))], early_exit=False).exit_logits)
        scores = scores_of(build_policy(settings, EXITS), logits)
        settings["threshold"] = [between(each) for each in scores]
    model.set_exit_policy(settings)
    return model


def some_images():
    images = tiny_images(64, seed=5)
    images[7] = float("nan")
    return images


def assert_same(answers, expected):
    assert answers.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(answers.logits, expected.logits, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(answers.exit_score, expected.exit_score, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        ("gate", "single"),
        ("gate", "segments"),
        ("gate of two exits", "single"),
        ("calibrated_confidence", "single"),
        ("calibrated_confidence", "all_exits"),
    ],
)
@torch.no_grad()
def test_exported(policy, layout, tmp_path):
    model, images = model_with(policy), some_images()
    export_onnx(model, tmp_path / "export", layout)
    exported = ORTHighway.from_pretrained(tmp_path / "export")
    expected = model(images)
    assert_same(exported(images), expected)
    assert len(set(expected.exit_index.tolist())) > 1
    changed = {**model.config.exit_policy, "threshold": 0.45}
    for each in (exported, model):
        each.set_exit_policy(changed)
    assert_same(exported(images), model(images))
    if layout == "single":
        name = "accuracies" if policy == "calibrated_confidence" else "models"
        fitted = [[0.1, 0.5, 0.9]] * EXITS if name == "accuracies" else random_models(len(changed["exits"]), 4)
        other = {**changed, name: fitted}
        with pytest.raises(ValueError, match=f"exit_policy: {name} of '{changed['name']}' is in this file"):
            exported.set_exit_policy(other)


@pytest.mark.parametrize(
    ("policy", "format", "positions"),
    [
        ("gate", "onnx", [1, 3]),
        ("gate", "safetensors", [2]),
        ("gate of two exits", "onnx", [2]),
        ("gate of two exits", "safetensors", [1, 3]),
        ("calibrated_confidence", "onnx", [2]),
    ],
)
@torch.no_grad()
def test_split(policy, format, positions, tmp_path):
    model, images = model_with(policy), some_images()
    split(model, positions, tmp_path / "parts", format)
    parts = [open_part(tmp_path / "parts" / f"part{number}") for number in range(len(positions) + 1)]
    assert_same(run_chain(parts, {"pixel_values": images.numpy()}), model(images))
    described = json.loads((tmp_path / "parts" / "part1" / "part.json").read_text(encoding="utf-8"))
    assert described["schema"] == 2
    if format == "onnx":
        name = "accuracies" if policy == "calibrated_confidence" else "models"
        held = described["policy"]
        parts[1].set_policy({**held, "threshold": 0.3})
        with pytest.raises(ValueError, match=f"policy: {name} of '{held['name']}' is in the files of this part"):
            parts[1].set_policy({**held, name: held[name][::-1]})
    if policy == "gate":
        assert described["takes"]["memory.probabilities"]["shape"] == [3, model.config.num_labels]


def scores_of(policy, exit_logits):
    """The gate's score of each sample at each early exit, none of which stops a sample, `[E - 1, N]`."""
    memory, scores = policy.start(exit_logits.shape[1], "cpu"), []
    for index, logits in enumerate(exit_logits[:-1]):
        _, memory = policy(logits, memory, index)
        scores.append(memory["score"])
    return torch.stack(scores)


@pytest.mark.slow
@torch.no_grad()
def test_a_fitted_gate_on_a_thousand_real_images(shared, tmp_path):
    """Heads were not trained: what is compared is PyTorch and ONNX Runtime."""
    folder = shared / "models" / "cifar10_vit_s"
    model = ViTHighway.from_pretrained(folder, exit_positions=[4, 7, 10], exit_types="concat").float().eval()
    processor = ViTImageProcessor.from_pretrained(folder)
    images = Subset(ProcessedImages(load_images(shared / "data" / "cifar10_jpeg").test, processor), range(1000))
    table = collect(model, images)
    fitted = fit_gate(table)
    scores = scores_of(build_policy(fitted, 3), table.logits)
    thresholds = scores.quantile(0.7, dim=1)
    model.set_exit_policy({**fitted, "threshold": thresholds.tolist()})
    decided = ((scores - thresholds[:, None]).abs() > 1e-5).all(0)
    assert decided.sum() > 950
    pixels = torch.stack([torch.as_tensor(image["pixel_values"]) for image in images]).split(50)
    expected = [model(batch) for batch in pixels]
    exits = torch.cat([answers.exit_index for answers in expected])
    assert set(exits.tolist()) == {0, 1, 2, 3}
    for layout in ("single", "segments", "all_exits"):
        export_onnx(model, tmp_path / layout, layout)
        exported = ORTHighway.from_pretrained(tmp_path / layout)
        found = [exported(batch) for batch in pixels]
        same = torch.cat([answers.exit_index for answers in found]) == exits
        assert same[decided].all(), layout
        pairs = ((torch.cat([getattr(a, name) for a in each]) for each in (found, expected)) for name in COMPARED)
        differences = [(one - other)[same].abs().max().item() for one, other in pairs]
        print(
            layout,
            f"{len(same) - int(same.sum())} of {len(same)} elsewhere",
            dict(zip(COMPARED, differences, strict=True)),
        )
        assert max(differences) < 1e-4, layout
