"""Files whose thresholds are inputs with a default, required inputs, or fixed: one graph, and the same answers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, tiny_images, tiny_model

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.export.segment_graphs import export_parts  # noqa: E402
from lgvit_hf.runtimes.manifest import THRESHOLDS, Manifest  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402

pytestmark = pytest.mark.version_independent


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A model some of whose samples exit early, images, and its export of each kind."""
    images = tiny_images(16)
    model = tiny_model("vit", num_hidden_layers=2, exit_positions=[1], exit_types="linear")
    with torch.no_grad():
        ranked = model(images, early_exit=False).exit_logits[0].softmax(-1).amax(-1).sort().values
    model.set_exit_policy("confidence", threshold=ranked[7:9].mean().item())
    folder, parts = tmp_path_factory.mktemp("thresholds"), export_parts(model, range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda *_: parts)
        for kind in THRESHOLDS:
            export_onnx(model, folder / kind, thresholds=kind, processor=make_processor(IMAGE_SIZE))
    return model, images, folder


@pytest.mark.parametrize("kind", THRESHOLDS)
@torch.no_grad()
def test_inputs_of_each_kind(kind, exports):
    model, images, folder = exports
    session = onnxruntime.InferenceSession(folder / kind / "model.onnx", providers=["CPUExecutionProvider"])
    numbers = {"exit_thresholds", "exit_temperatures"}
    required = {entry.name for entry in session.get_inputs()} - {"pixel_values"}
    assert required == (numbers if kind == "input" else set())
    optional = {entry.name for entry in session.get_overridable_initializers()}
    assert optional == (numbers if kind == "optional" else set())
    manifest = Manifest.load(folder / kind)
    assert manifest.thresholds == kind and set(manifest.inputs) == numbers
    # what another runtime has to do: the manifest's numbers for the inputs
    feeds = {name: np.array(manifest.inputs[name], np.float32) for name in required}
    exit_index, logits = session.run(["exit_index", "logits"], {"pixel_values": images.numpy(), **feeds})
    expected = model(images)
    assert set(exit_index.tolist()) == {0, 1} and exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", THRESHOLDS)
@torch.no_grad()
def test_runtime_and_infer_take_each_kind(kind, exports, tmp_path):
    model, images, folder = exports
    exported, expected = ORTHighway.from_pretrained(folder / kind), model(images)
    assert exported(images).exit_index.tolist() == expected.exit_index.tolist()
    exported.set_exit_policy(exported.exit_policy)
    if kind == "fixed":
        with pytest.raises(ValueError, match="takes no new numbers for this file: its thresholds are .fixed."):
            exported.set_exit_policy("confidence", threshold=2.0)
        assert exported(images).exit_index.tolist() == expected.exit_index.tolist()
    else:
        exported.set_exit_policy("confidence", threshold=2.0)
        assert set(exported(images).exit_index.tolist()) == {1}
    Image.fromarray(rng().integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    pixels = make_processor(IMAGE_SIZE)(Image.open(tmp_path / "photo.png"), return_tensors="pt")["pixel_values"]
    infer = [sys.executable, folder / kind / "infer.py", tmp_path / "photo.png"]
    told = subprocess.run(infer, capture_output=True, text=True, check=True).stdout
    assert f"after {int(model(pixels).exit_layer)} blocks" in told


def test_from_the_command_line_and_bad_input(exports, tmp_path, capsys):
    model, _, folder = exports
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--thresholds", "input"]) == 0
    assert Manifest.load(tmp_path / "out").thresholds == "input"
    command = [
        "export",
        str(tmp_path / "model"),
        str(tmp_path / "no"),
        "--thresholds",
        "fixed",
        "--layout",
        "segments",
    ]
    assert main(command) == 2
    assert "thresholds='fixed' is for layout='single'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="thresholds='baked' is none of optional, input, fixed"):
        export_onnx(model, tmp_path / "no", thresholds="baked")
    assert not (tmp_path / "no").exists()

    said = json.loads((folder / "input" / "manifest.json").read_text())
    for field, value in (("thresholds", "baked"), ("inputs", {"exit_thresholds": ["1"]}), ("inputs", [])):
        damaged = tmp_path / "damaged"
        damaged.mkdir(exist_ok=True)
        (damaged / "manifest.json").write_text(json.dumps({**said, field: value}))
        with pytest.raises(ValueError, match=f"manifest.json is not what .* writes .{field}="):
            Manifest.load(damaged)
