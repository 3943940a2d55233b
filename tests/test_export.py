"""Exported files answer as the model does: every policy, backbone and layout, any batch; and they really skip."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from lgvit_hf.cli import main
from lgvit_hf.data import make_processor
from lgvit_hf.engine import run_all
from lgvit_hf.policies import build_policy
from lgvit_hf.segments import State
from tests.tiny import IMAGE_SIZE, NUM_LABELS, tiny_images, tiny_model

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export.compose import compose_single  # noqa: E402
from lgvit_hf.export.onnx_export import export_onnx, verify  # noqa: E402
from lgvit_hf.export.parts import exits_that_run, export_decision, export_parts  # noqa: E402
from lgvit_hf.export.runtime import ORTHighway, parameter_inputs  # noqa: E402

POSITIONS = [2, 4]
DEPTHS = [2, 4, 6]
ROWS = 40


def session_of(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.fixture(scope="module", params=["vit", "deit", "swin"])
def exported(request):
    """A model, its images, and its parts as ONNX."""
    model = tiny_model(request.param, exit_positions=POSITIONS, exit_types=["conv2_1", "attention_r2"])
    return model, tiny_images(ROWS), export_parts(model, [0, 1, 2])


def between(scores):
    """A threshold in the widest gap of the middle scores: rounding decides nothing there."""
    ranked = np.sort(scores.detach().numpy())[ROWS // 4 : 3 * ROWS // 4]
    widest = int(np.diff(ranked).argmax())
    return float(ranked[widest : widest + 2].mean())


def policies(exit_logits):
    """Settings by which rows leave at several exits."""
    for name, extra in (
        ("confidence", {}),
        ("confidence", {"temperature": [0.5, 2.0]}),
        ("margin", {}),
        ("entropy", {}),
        ("confidence_entropy", {"entropy_threshold": 5.0}),
    ):
        judge = build_policy({"name": name, "threshold": 0.0, **extra}, 2)
        cuts = [between(judge(logits, {}, index)[1]["score"]) for index, logits in enumerate(exit_logits[:-1])]
        yield {"name": name, "threshold": cuts, **extra}
    cut = between(build_policy({"name": "entropy", "threshold": 0.0}, 2)(exit_logits[0], {}, 0)[1]["score"])
    yield {"name": "patience_confidence", "threshold": cut, "patience": 1}
    yield {"name": "patience_confidence", "threshold": 2 * cut, "patience": 2}
    yield {"name": "patience", "patience": 2}
    yield {"name": "patience", "patience": 1, "exits": [1]}
    yield {"name": "confidence", "threshold": [1.0, 0.3]}
    yield {"name": "fixed", "exit_index": 1}
    yield {"name": "never"}


@cache
def decision_of(name):
    """Numbers are inputs: a kind of policy is exported once."""
    every = {"threshold": 1.0, "entropy_threshold": 1.0, "patience": 1, "exit_index": 1}
    fields = {"patience": ["patience"], "patience_confidence": ["threshold", "patience"]}
    fields |= {"confidence_entropy": ["threshold", "entropy_threshold"], "fixed": ["exit_index"], "never": []}
    settings = {field: every[field] for field in fields.get(name, ["threshold"])}
    return export_decision(build_policy({"name": name, **settings}, 2), NUM_LABELS)


@torch.no_grad()
def test_single_file_answers_as_the_model(exported):
    model, images, all_parts = exported
    exit_logits = run_all(model.segments(), State({"pixel_values": images}))
    several = 0
    for settings in policies(exit_logits):
        policy = build_policy(settings, 2)
        exits = exits_that_run(policy, 3)
        if exits != [0, 1, 2] and model.config.model_type != "vit_highway":
            continue  # what is left out is cut the same way for all
        parts = all_parts if exits == [0, 1, 2] else export_parts(model, exits)
        judge = (
            policy
            if policy.name not in ("fixed", "never")
            else build_policy({"name": "confidence", "threshold": 1}, 2)
        )
        decision = decision_of(judge.name)
        session = session_of(compose_single(parts, decision, DEPTHS, parameter_inputs(judge, 3)))
        model.set_exit_policy(settings)
        for rows in (images, images[:1], images[3:5], images[:7], images.flip(0)):
            expected = model(rows)
            logits, index, layer, score = session.run(
                ["logits", "exit_index", "exit_layer", "exit_score"], {"pixel_values": rows.numpy()}
            )
            np.testing.assert_allclose(logits, expected.logits, atol=1e-4, err_msg=str(settings))
            np.testing.assert_array_equal(index, expected.exit_index, err_msg=str(settings))
            np.testing.assert_array_equal(layer, expected.exit_layer)
            np.testing.assert_allclose(score, expected.exit_score, atol=1e-5)
        several += len(set(model(images).exit_index.tolist())) > 1
    assert several >= 7


@torch.no_grad()
def test_thresholds_can_be_given_anew_and_branches_are_skipped(exported, tmp_path):
    model, images, parts = exported
    policy = build_policy({"name": "confidence", "threshold": 0.5}, 2)
    composed = compose_single(parts, decision_of("confidence"), DEPTHS, parameter_inputs(policy, 3))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.enable_profiling = 3, True
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ran = []
    for exit_index, thresholds in enumerate(([-1.0, -1.0], [2.0, -1.0], [2.0, 2.0])):
        options.profile_file_prefix = str(tmp_path / f"exit{exit_index}")
        session = onnxruntime.InferenceSession(composed.SerializeToString(), options)
        feeds = {"pixel_values": images.numpy(), "exit_thresholds": np.array(thresholds, np.float32)}
        assert set(session.run(["exit_index"], feeds)[0].tolist()) == {exit_index}
        events = json.loads(open(session.end_profiling()).read())
        ran.append(
            {event["name"] for event in events if event.get("cat") == "Node" and "kernel_time" in event["name"]}
        )
    for exit_index, names in enumerate(ran):
        reached = {index for index in range(3) if any(f"e{index}_part_" in name for name in names)}
        assert reached == set(range(exit_index + 1)), "a deeper part was run"


@pytest.mark.parametrize("layout", ["single", "segments", "all_exits"])
@torch.no_grad()
def test_folder_of_every_layout(layout, tmp_path, capsys):
    model, images = tiny_model("vit", exit_positions=POSITIONS, exit_types="linear"), tiny_images(9)
    names = [f"class {index}" for index in range(NUM_LABELS)]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    model.set_exit_policy("patience", patience=2)
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "onnx"), "--layout", layout]) == 0
    assert "as the model does" in capsys.readouterr().out
    ort, expected = ORTHighway.from_pretrained(tmp_path / "onnx", threads=1), model(images)
    for rows in (images, images[:1]):
        torch.testing.assert_close(ort(rows).logits, model(rows).logits, atol=1e-4, rtol=0)
    assert ort(images).exit_layer.tolist() == expected.exit_layer.tolist()
    ort.set_exit_policy("patience", patience=1)
    assert set(ort(images).exit_index.tolist()) == {0}
    if layout == "single":
        with pytest.raises(ValueError, match="decides by 'patience', not by 'confidence'"):
            ort.set_exit_policy("confidence", threshold=0.5)
        with pytest.raises(ValueError, match="always leaves early"):
            ort(images, early_exit=False)
    else:
        ort.set_exit_policy("confidence", threshold=2.0)
        full = ort(images, early_exit=False)
        torch.testing.assert_close(full.logits, model(images, early_exit=False).logits, atol=1e-4, rtol=0)
        assert len(full.exit_logits) == 3 and set(ort(images).exit_index.tolist()) == {2}
        assert set(ort(images, max_depth=4).exit_layer.tolist()) == {4}
    classify = pipeline("image-classification", model=ort, image_processor=make_processor(IMAGE_SIZE), device="cpu")
    photos = [Image.fromarray(np.full((20, 30, 3), 40 * shade, np.uint8)) for shade in range(4)]
    assert [answer[0]["label"] in names for answer in classify(photos, batch_size=2)] == [True] * 4


def test_infer_needs_no_torch(tmp_path):
    model = tiny_model("swin", exit_positions=POSITIONS, exit_types="linear")
    model.set_exit_policy("confidence", threshold=0.4)
    export_onnx(model, tmp_path / "onnx", processor=make_processor(IMAGE_SIZE))
    generator = np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        Image.fromarray(generator.integers(0, 255, (24, 31, 3), np.uint8)).save(file)
    done = subprocess.run(
        [sys.executable, tmp_path / "onnx" / "infer.py", *files], capture_output=True, text=True, check=True
    )
    processed = make_processor(IMAGE_SIZE)([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        expected = model(processed["pixel_values"])
    for line, logits, depth in zip(done.stdout.splitlines(), expected.logits, expected.exit_layer, strict=True):
        assert f"{model.config.id2label[int(logits.argmax())]} after {depth} blocks" in line
    source = (tmp_path / "onnx" / "infer.py").read_text()
    assert "torch" not in source and "transformers" not in source


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    model = tiny_model("vit", exit_positions=[3], exit_types="linear")
    model.set_exit_policy("confidence", threshold=0.5)
    export_onnx(model, tmp_path / "good")
    with torch.no_grad():
        model.classifier.bias += 1.0
    with pytest.raises(
        ValueError, match="does not answer as the model does: .* rows leave elsewhere, and logits differ"
    ):
        verify(model, tmp_path / "good")
    monkeypatch.setattr("lgvit_hf.export.onnx_export.verify", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        export_onnx(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    file = tmp_path / "good" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is missing or not the file that was exported"):
        ORTHighway.from_pretrained(tmp_path / "good")
    with pytest.raises(OSError, match="not an exported highway"):
        ORTHighway.from_pretrained(tmp_path)


def test_what_cannot_be_exported(tmp_path):
    model = tiny_model("vit", exit_positions=[3], exit_types="linear")
    with pytest.raises(ValueError, match="layout='nested' is none of single, segments, all_exits"):
        export_onnx(model, tmp_path / "out", "nested")
    model.set_exit_policy(lambda logits, memory: (logits[:, 0] > 0, memory))
    with pytest.raises(ValueError, match="layout='segments' runs any policy"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
