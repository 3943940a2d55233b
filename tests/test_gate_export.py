"""Policies whose rule differs by exit, exported and split: the answers are those of the model."""

import json

import pytest
import torch

from lgvit_hf.serving.open_part import open_part
from lgvit_hf.serving.split import run_chain, split
from tests.gates import random_models
from tests.seeds import generator
from tests.tiny import tiny_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402

pytestmark = pytest.mark.version_independent

EXITS = 4  # of the tiny highway, after blocks 2 to 5


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


@pytest.fixture(scope="module", params=["gate", "gate of two exits", "calibrated_confidence"])
def model(request):
    model = tiny_model("vit")
    assert len(model.exits) == EXITS
    policy = calibrated(model) if request.param == "calibrated_confidence" else gate(model)
    if request.param == "gate of two exits":
        policy = gate(model, exits=[1, 3])
    model.set_exit_policy(policy)
    return model


@pytest.fixture(scope="module")
def images(model):
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(64, model.config.num_channels, height, width, generator=generator(5))
    images[7] = float("nan")
    return images


def assert_same(answers, expected):
    assert answers.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(answers.logits, expected.logits, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(answers.exit_score, expected.exit_score, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", ["single", "segments", "all_exits"])
def test_exported(model, images, layout, tmp_path):
    export_onnx(model, tmp_path / "export", layout)
    exported = ORTHighway.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        expected = model(images)
        assert_same(exported(images), expected)
        assert len(set(expected.exit_index.tolist())) > 1
        raised = {**model.config.exit_policy, "threshold": 0.45}
        exported.set_exit_policy(raised)
        model.set_exit_policy(raised)
        assert_same(exported(images), model(images))


def test_a_single_file_keeps_what_was_fitted(model, tmp_path):
    export_onnx(model, tmp_path / "export")
    exported = ORTHighway.from_pretrained(tmp_path / "export")
    policy = model.config.exit_policy
    name = "accuracies" if policy["name"] == "calibrated_confidence" else "models"
    changed = json.loads(json.dumps(policy))
    if name == "models":
        changed["models"][0]["bias"][0] += 1
    else:
        changed["accuracies"][0][0] += 0.01
    with pytest.raises(ValueError, match=f"exit_policy: {name} of '{policy['name']}' is in this file"):
        exported.set_exit_policy(changed)


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
@pytest.mark.parametrize("positions", [[3], [2, 4]], ids=str)
def test_split(model, images, format, positions, tmp_path):
    split(model, positions, tmp_path / "parts", format)
    parts = [open_part(tmp_path / "parts" / f"part{number}") for number in range(len(positions) + 1)]
    answers = run_chain(parts, {"pixel_values": images.numpy()})
    with torch.no_grad():
        assert_same(answers, model(images))
    described = json.loads((tmp_path / "parts" / "part1" / "part.json").read_text(encoding="utf-8"))
    assert described["schema"] == 2
    if model.exit_policy.name == "gate" and len(model.exit_policy.exits) > 2:
        assert described["takes"]["memory.probabilities"]["shape"] == [3, model.config.num_labels]
