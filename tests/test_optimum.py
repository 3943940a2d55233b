"""Optimum exports, loads, quantizes and runs highways, by the conditional graph that `export_onnx` writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from lgvit_hf import ORTHighway
from lgvit_hf.data.processing import make_processor
from lgvit_hf.hub.loading import HIGHWAYS
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, MODELS, tiny_images, tiny_model

pytest.importorskip(
    "optimum.exporters.onnx.model_configs",
    reason='pip install "lgvit-hf[optimum]", which needs transformers below 4.58',
    exc_type=ImportError,
)
onnx = pytest.importorskip("onnx")

import optimum.onnxruntime as optimum_ort  # noqa: E402
from optimum.exporters.onnx import export, main_export, onnx_export_from_model  # noqa: E402
from optimum.exporters.tasks import TasksManager  # noqa: E402

from lgvit_hf.export.optimum_config import HighwayOnnxConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "lgvit_hf/export/optimum_plugin"
TASK = "image-classification"
# Optimum's ways of exporting differ, and backbones do: each of them once, others in `test_backbone_exports.py`
only_vit = pytest.mark.parametrize("exported", ["vit"], indirect=True)
IMAGES = tiny_images(12)
PHOTOS = [Image.fromarray(rng(number).integers(0, 256, (20, 30, 3), np.uint8)) for number in range(4)]


def small_model(kind):
    """Two blocks with an exit behind the first, where half of the images exit; rounding changes no answer."""
    depth = {"depths": [1, 1], "num_heads": [2, 2]} if kind == "swin" else {"num_hidden_layers": 2}
    photos = make_processor(IMAGE_SIZE)(PHOTOS, return_tensors="pt")["pixel_values"]
    for number in range(100):
        model = tiny_model(kind, number, exit_positions=[1], exit_types="linear", **depth)
        with torch.no_grad():
            first, last = model(IMAGES, early_exit=False).exit_logits
            cut = between(first.softmax(-1).amax(-1))
            model.set_exit_policy("confidence", threshold=[cut])
            exit_logits = torch.stack(model(photos, early_exit=False).exit_logits)
            labels = model(photos).logits.argmax(-1)
        best, second = torch.cat([first, last, *exit_logits]).topk(2).values.unbind(-1)
        far = (exit_logits[0].softmax(-1).amax(-1) - cut).abs().min() > 1e-3
        if far and (best - second).min() > 1e-3 and len(labels.unique()) > 1:
            return model
    raise AssertionError("no such model in 100")


def between(scores):
    """A threshold in the widest gap of the middle scores: rounding decides nothing there."""
    ranked = np.sort(scores.numpy())[len(scores) // 4 : 3 * len(scores) // 4 + 1]
    widest = int(np.diff(ranked).argmax())
    return float(ranked[widest : widest + 2].mean())


def branches(file):
    """How many `If`s a file has."""
    return sum(node.op_type == "If" for node in onnx.load(file).graph.node)


@pytest.fixture(scope="module", params=["vit", "swin"])
def exported(request, tmp_path_factory):
    """A model, what it answers, its checkpoint, and what Optimum makes of that."""
    folder, model = tmp_path_factory.mktemp(request.param), small_model(request.param)
    model.save_pretrained(folder / "checkpoint")
    make_processor(IMAGE_SIZE).save_pretrained(folder / "checkpoint")
    main_export(str(folder / "checkpoint"), folder / "out", task=TASK)
    with torch.no_grad():
        expected = model(IMAGES)
    assert set(expected.exit_index.tolist()) == {0, 1}
    return model, expected, folder / "checkpoint", folder / "out"


@pytest.mark.parametrize("kind", MODELS)
def test_tasks_manager_knows_the_model_types(kind):
    model_type = MODELS[kind].config_class.model_type
    tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    assert list(tasks) == [TASK] and tasks[TASK].func is HighwayOnnxConfig
    assert TasksManager.infer_library_from_model(MODELS[kind]) == "transformers"
    with pytest.raises(ValueError, match="library name could not be automatically inferred"):
        TasksManager.infer_library_from_model(torch.nn.Linear(1, 1))


def test_main_export_writes_the_conditional_file(exported):
    _, expected, _, out = exported
    assert branches(out / "model.onnx") == 1
    for model in (ORTHighway.from_pretrained(out), optimum_ort.ORTModelForCustomTasks.from_pretrained(out)):
        for rows in (slice(None), slice(1), slice(3, 8)):
            answers = model(pixel_values=IMAGES[rows])
            for name in ("logits", "exit_layer", "exit_index", "exit_score"):
                torch.testing.assert_close(answers[name], expected[name][rows], atol=1e-4, rtol=0)
    assert ORTHighway.from_pretrained(out).manifest.checks["largest_difference"] < 1e-4


def test_ort_model_exports_by_itself(tmp_path):
    model = small_model("deit")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IMAGES)
    ort = optimum_ort.ORTModelForImageClassification.from_pretrained(tmp_path, export=True)
    assert branches(ort.path) == 1
    for rows in (slice(None), slice(1)):
        torch.testing.assert_close(ort(IMAGES[rows]).logits, expected.logits[rows], atol=1e-4, rtol=0)


@only_vit
@pytest.mark.parametrize("operators", [None, ["MatMul"]])
def test_quantizer_keeps_thresholds_adjustable(exported, operators, tmp_path):
    model, expected, _, out = exported
    quantizer = optimum_ort.ORTQuantizer.from_pretrained(out)
    settings = optimum_ort.configuration.AutoQuantizationConfig.avx512_vnni(
        is_static=False, per_channel=True, operators_to_quantize=operators
    )
    quantizer.quantize(save_dir=tmp_path, quantization_config=settings)
    file = tmp_path / "model_quantized.onnx"
    assert file.stat().st_size < (out / "model.onnx").stat().st_size
    quantized = optimum_ort.ORTModelForImageClassification.from_pretrained(tmp_path, file_name=file.name)
    agreement = quantized(IMAGES).logits.argmax(-1) == expected.logits.argmax(-1)
    assert agreement.float().mean() > 0.5
    constants = {constant.name: onnx.numpy_helper.to_array(constant) for constant in onnx.load(file).graph.initializer}
    np.testing.assert_allclose(constants["exit_thresholds"], model.config.exit_policy["threshold"], rtol=1e-6)
    for exit_index, threshold in enumerate((-1.0, 2.0)):
        feeds = {"pixel_values": IMAGES.numpy(), "exit_thresholds": np.array([threshold], np.float32)}
        assert set(quantized.session.run(["exit_index"], feeds)[0].tolist()) == {exit_index}


@only_vit
def test_pipelines(exported):
    model, _, _, out = exported
    processor = make_processor(IMAGE_SIZE)
    with torch.no_grad():
        logits = model(processor(PHOTOS, return_tensors="pt")["pixel_values"]).logits
    expected = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    ort_model = optimum_ort.ORTModelForImageClassification.from_pretrained(out)
    for classify in (
        optimum_ort.pipeline(TASK, model=str(out), accelerator="ort"),
        pipeline(TASK, model=ort_model, image_processor=processor),
    ):
        assert [answer[0]["label"] for answer in classify(PHOTOS, batch_size=2)] == expected


@only_vit
def test_a_file_that_answers_otherwise_is_not_kept(exported, tmp_path):
    model, _, checkpoint, out = exported
    shutil.copytree(out, tmp_path / "out")
    other = type(model).from_pretrained(checkpoint).eval()
    with torch.no_grad():
        other.exits[0].classifiers[0].bias += 1.0
    config = HighwayOnnxConfig(other.config, TASK)
    with config.patch_model_for_export(other):
        pass
    with pytest.raises(ValueError, match="does not answer as the model does"):
        config.post_process_exported_models(tmp_path / "out", {}, ["model.onnx"])
    assert not [name for name in ("model.onnx", "manifest.json") if (tmp_path / "out" / name).exists()]


@pytest.mark.parametrize("case", ["fixed", "truncated"])
@torch.no_grad()
def test_highways_without_a_decision(case, tmp_path):
    model = small_model("vit")
    if case == "truncated":
        model = model.truncate(0)
    else:
        model.set_exit_policy("fixed", exit_index=0)
    export(model, HighwayOnnxConfig(model.config, TASK), tmp_path / "model.onnx")
    model.config.save_pretrained(tmp_path)
    expected = model(IMAGES)
    answers = optimum_ort.ORTModelForCustomTasks.from_pretrained(tmp_path)(pixel_values=IMAGES)
    torch.testing.assert_close(answers["logits"], expected.logits, atol=1e-4, rtol=0)
    assert answers["exit_layer"].tolist() == expected.exit_layer.tolist()


def test_what_does_not_export_leaves_no_model(tmp_path):
    model = small_model("vit")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="dtype 'fp16': .* 'fp32'; for others, `lgvit export --quantize`"):
        main_export(str(tmp_path / "checkpoint"), tmp_path / "half", task=TASK, dtype="fp16")
    model.set_exit_policy(lambda logits, memory: (logits[:, 0] > 0, memory))
    with pytest.raises(ValueError, match="not built in and does not export"):
        onnx_export_from_model(model, tmp_path / "custom", task=TASK)
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"opset": 17}, "opset=17: a highway is written in opset 18; leave --opset out"),
        ({"no_dynamic_axes": True, "batch_size": 1}, "no_dynamic_axes=True: .* leave --no-dynamic-axes out"),
        ({"height": 32}, f"height=32: the model takes {IMAGE_SIZE}; leave --height out"),
        ({"num_channels": 1}, "num_channels=1: the model takes 3; leave --num_channels out"),
        ({"model_kwargs": {"early_exit": False}}, "model_kwargs=.*early_exit.* leave --model-kwargs out"),
    ],
)
def test_what_is_asked_of_optimum_and_cannot_be(asked, message, tmp_path, monkeypatch):
    small_model("vit").save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr("lgvit_hf.export.optimum_config.write_onnx", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=message):
        main_export(str(tmp_path / "checkpoint"), tmp_path / "out", task=TASK, **asked)
    assert not list(tmp_path.rglob("*.onnx"))


def test_what_is_asked_of_optimum_and_is_so(tmp_path):
    small_model("vit").save_pretrained(tmp_path / "checkpoint")
    asked = {"opset": 18, "batch_size": 3, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_channels": 3}
    main_export(str(tmp_path / "checkpoint"), tmp_path / "out", task=TASK, **asked)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert ORTHighway.from_pretrained(tmp_path / "out")(IMAGES[:5]).logits.shape[0] == 5


def test_optimum_may_be_imported_first():
    code = """
from optimum.onnxruntime import ORTModel
import lgvit_hf
from optimum.exporters.tasks import TasksManager
print(*sorted(kind for kind in TasksManager._SUPPORTED_MODEL_TYPE if "highway" in kind))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(HIGHWAYS)


def test_command_line(tmp_path):
    model = small_model("vit")
    model.save_pretrained(tmp_path / "checkpoint")
    # as in site-packages, where an installed wheel has it
    paths = os.pathsep.join(map(str, (PLUGIN, ROOT)))
    main = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", main, "export", "onnx", "--task", TASK]
    done = subprocess.run(
        [*command, "--model", tmp_path / "checkpoint", tmp_path / "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for misleading in ("Traceback", "TracerWarning", "W:onnxruntime", "lgvit_hf"):
        assert misleading not in done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["checks"]
    with torch.no_grad():
        expected = model(IMAGES)
    answers = ORTHighway.from_pretrained(tmp_path / "out")(IMAGES)
    torch.testing.assert_close(answers.logits, expected.logits, atol=1e-4, rtol=0)
    assert answers.exit_layer.tolist() == expected.exit_layer.tolist()
