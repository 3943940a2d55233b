"""Fixed ranges in 8 bits: formulas, the law of early exit in each runtime, and thresholds that fit the files."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.evaluation.calibration import fit_temperature
from lgvit_hf.evaluation.exit_table import collect
from tests.seeds import generator, rng
from tests.test_json_keys import strange
from tests.tiny import IMAGE_SIZE, tiny_images, tiny_model

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export.composition import joined  # noqa: E402
from lgvit_hf.export.onnx_export import export_onnx, write_onnx  # noqa: E402
from lgvit_hf.export.onnx_graph import Graph  # noqa: E402
from lgvit_hf.export.quantization import quantize_static  # noqa: E402
from lgvit_hf.export.recalibration import QuantizationImages, quantized, recalibrate, time_against  # noqa: E402
from lgvit_hf.export.segment_graphs import export_parts  # noqa: E402
from lgvit_hf.export.verification import between  # noqa: E402
from lgvit_hf.export.writing import manifest_of, open_parts, write_parts  # noqa: E402
from lgvit_hf.runtimes.open_exported import open_exported  # noqa: E402

pytestmark = pytest.mark.version_independent
SMALL = {"num_hidden_layers": 3, "exit_positions": [1, 2], "exit_types": "linear"}
LAYOUTS = ("single", "segments", "all_exits")
# of probabilities and logits, by other orders of sums
ROUNDING = 0.01


def samples(images, labels):
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


# -- the file -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
    """A model, images, and its parts in float32."""
    model, images = tiny_model("vit", **SMALL), tiny_images(64)
    return model, images, export_parts(model, range(3))


@pytest.fixture(scope="module")
def exports(traced, tmp_path_factory):
    """Exports of some precision and layout, whose samples exit at all three places, and images that rounding leaves.

    They are not verified, which takes its time and is tested elsewhere.
    """
    model, images, parts = traced
    folder, known = tmp_path_factory.mktemp("static"), {}

    def prepared(precision):
        if precision == "float16":
            made = export_parts(copy.deepcopy(model).half(), range(3))
        else:
            made = quantized(parts, precision, samples(images, [0] * len(images)))
        opened = open_parts(model, made, precision)
        scores = collect(opened, samples(images, [0] * len(images))).logits.softmax(-1).amax(-1)[:2]
        first = between(scores[0])
        thresholds = torch.tensor([[first], [between(scores[1][scores[0] < first])]])
        decided = ((scores - thresholds).abs() > ROUNDING).all(0)
        ours = copy.deepcopy(model)
        ours.set_exit_policy("confidence", threshold=thresholds[:, 0].tolist())
        return ours, made, images[decided]

    def exported(precision, layout):
        known[precision] = known.get(precision) or prepared(precision)
        (ours, made, decided), target = known[precision], folder / f"{precision}_{layout}"
        if not target.exists():
            target.mkdir()
            files = write_parts(ours, made, target, layout)
            manifest_of(ours, target, files, layout, precision).save(target)
            ours.config.save_pretrained(target)
        return target, decided

    return exported


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float16", "int8-static"])
@torch.no_grad()
def test_a_sample_does_not_meet_its_batch(precision, layout, runtime, traced, exports):
    pytest.importorskip(runtime)
    folder, images = exports(precision, layout)
    exported = open_exported(folder, runtime, 1)
    bad = torch.stack([images[0] * 3e38, torch.full_like(images[0], torch.nan), images[0], -images[0]])
    bad[2, 0, 0, 0], bad[3, 1, -1, -1] = torch.inf, -torch.inf
    mixed = exported(torch.cat([images[:8], bad, images[8:]]))
    places = [*range(8), *range(12, len(images) + 4)]
    assert len(set(mixed.exit_index[places].tolist())) == 3
    for place, image in zip(places, images, strict=True):
        alone = exported(image[None])
        torch.testing.assert_close(mixed.logits[place], alone.logits[0], atol=ROUNDING, rtol=1e-5)
        assert alone.exit_index[0] == mixed.exit_index[place]
    assert not mixed.logits[8:12].isfinite().any()
    assert mixed.exit_index[8:12].tolist() == [2] * 4, "what is not a number never exits early"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_patches_that_are_merged_keep_nan(precision, runtime, merging, tmp_path):
    """Swin's stages end in a product around which there is no residual connection."""
    pytest.importorskip(runtime)
    model, parts = merging
    images = tiny_images(8)
    made = quantized(parts, precision, samples(images, [0] * 8) if precision == "int8-static" else None)
    files = write_parts(model, made, tmp_path, "single")
    manifest_of(model, tmp_path, files, "single", precision).save(tmp_path)
    model.config.save_pretrained(tmp_path)
    exported, bad = open_exported(tmp_path, runtime, 1), images[:2].clone()
    bad[0, 0, 0, 0], bad[1, 2, -1, -1] = torch.inf, torch.nan
    mixed = exported(torch.cat([bad, images, bad]))
    assert mixed.exit_index.tolist() == [1] * 2 + [0] * 8 + [1] * 2
    assert mixed.logits.isfinite().all(-1).tolist() == [False] * 2 + [True] * 8 + [False] * 2
    torch.testing.assert_close(mixed.logits[2:-2], exported(images).logits, atol=ROUNDING, rtol=0)


@pytest.fixture(scope="module")
def merging():
    """A Swin, the first part of which ends after a stage, where all samples that are finite exit; and its parts."""
    model = tiny_model("swin", exit_positions=[3], exit_types="linear")
    model.set_exit_policy("confidence", threshold=0.0)
    return model, export_parts(model, [0, 1])


def part_of(weight, size):
    """One product with a matrix, whose mean over the tokens is the logits."""
    graph = Graph()
    graph.add("MatMul", ["pixel_values", graph.constant("weight", weight)], "state_out")
    graph.add("ReduceMean", ["state_out", graph.constant("axis", np.array([1]))], "logits", keepdims=0)
    entries = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("pixel_values", (5, len(weight))), ("state_out", (5, size)), ("logits", (size,)))
    ]
    made = onnx.helper.make_graph(graph.nodes, "part", entries[:1], entries[1:], graph.constants)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def test_formulas():
    """Against numpy: 256 steps from the smallest to the largest number, zero among them, and a scale per column."""
    random = rng()
    weight = random.normal(size=(24, 16)).astype(np.float32)
    weight[:, 3] = 0
    images = (random.normal(size=(9, 5, 24)) + 1).astype(np.float32)
    (made,) = quantize_static([part_of(weight, 16)], [images[:4], images[4:]])
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("DequantizeLinear") == 2
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["state_out"], {"pixel_values": images * 2})

    step = (images.max() - images.min()) / np.float32(255)
    zero = np.rint(-images.min() / step)
    steps = np.clip(np.rint(images * 2 / step) + zero, 0, 255) - zero
    channel = np.abs(weight).max(0) / 127
    columns = np.rint(weight / np.where(channel == 0, 1, channel))
    expected = (steps * step) @ (columns * channel)
    # a number half way between two steps may be rounded to either
    assert np.mean(np.abs(found - expected) > 1e-3) < 0.1
    np.testing.assert_allclose(found, expected, atol=3 * step * np.abs(weight).max())


def test_nothing_to_quantize():
    """A part without a constant matrix stays in float: ONNX Runtime would quantize all products of a part."""
    plain = part_of(np.ones((2, 2), np.float32), 2)
    plain.graph.node[0].input[1] = "pixel_values"
    plain.graph.node[0].op_type = "Mul"
    (made,) = quantize_static([plain], [np.ones((1, 5, 2), np.float32)])
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in made.graph.node}


def test_other_exits_left_out(traced):
    model, images, parts = traced
    with torch.no_grad():
        expected = model(images, early_exit=False).exit_logits
    for exits in ([0, 1, 2], [1, 2], [0, 2], [2]):
        fewer = joined(parts, exits)
        assert [part.exit_index for part in fewer] == exits
        state = {"pixel_values": images.numpy()}
        for part in fewer:
            onnx.checker.check_model(part.model)
            session = onnxruntime.InferenceSession(part.model.SerializeToString(), providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_outputs()]
            answers = dict(zip(names, session.run(None, state), strict=True))
            np.testing.assert_allclose(answers.pop("logits"), expected[part.exit_index], atol=1e-4)
            state = {name.removesuffix("_out"): array for name, array in answers.items()}
    whole = sum(len(part.model.graph.initializer) for part in parts)
    assert sum(len(part.model.graph.initializer) for part in joined(parts, [2])) < whole, "heads are left out"


def test_bad_images(traced, tmp_path):
    model, images, _ = traced
    some = samples(images[:2], [0, 1])
    with pytest.raises(ValueError, match="precision='int8-static' needs images .*quantization.ranges"):
        export_onnx(model, tmp_path / "out", precision="int8-static")
    with pytest.raises(ValueError, match="precision='int8-static' needs images"):
        write_onnx(model, tmp_path, precision="int8-static")
    with pytest.raises(ValueError, match="precision='int8' has no use for images .*: quantization.ranges"):
        export_onnx(model, tmp_path / "out", precision="int8", quantization=QuantizationImages(ranges=some))
    thresholds = QuantizationImages(thresholds=some)
    with pytest.raises(ValueError, match="precision='float16' keeps its thresholds"):
        export_onnx(model, tmp_path / "out", precision="float16", images=some, quantization=thresholds)
    with pytest.raises(ValueError, match="quantization.thresholds needs images beside it"):
        export_onnx(model, tmp_path / "out", precision="int8", quantization=thresholds)
    with pytest.raises(ValueError, match="no image to measure the ranges"):
        quantize_static([part_of(np.ones((2, 2), np.float32), 2)], [])
    bad = np.full((1, 5, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="pixel_values is NaN or infinite before part 0"):
        quantize_static([part_of(np.ones((2, 2), np.float32), 2)], [bad])
    assert not (tmp_path / "out").exists()


# -- thresholds ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shifted():
    """A model, the same with logits five times as large at its first exit, and images labelled as its exits answer."""
    model = tiny_model("vit", **SMALL)
    images = tiny_images(400)
    with torch.no_grad():
        exit_logits = torch.stack(model(images, early_exit=False).exit_logits)
    probabilities = (exit_logits.mean(0) * 2).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=generator())[:, 0]
    model.set_exit_policy("confidence", threshold=exit_logits.softmax(-1).amax(-1)[:2].median(-1).values.tolist())
    other = copy.deepcopy(model)
    first, *deeper = other.segments()
    other.segments = lambda: [replace(first, answer=lambda state: 5 * first.answer(state)), *deeper]
    return model, other, samples(images, labels)


@torch.no_grad()
def test_thresholds_fit_the_quantized_exits(shifted):
    model, other, images = shifted
    before = model.exit_policy.to_dict()
    found = {}
    for name, quantized_model in (("same", model), ("shifted", other)):
        settings, report = recalibrate(model, quantized_model, images[:300], images[300:])
        assert settings == report["after"]["policy"] and report["before"]["policy"] == before
        assert report["samples"] == 300 and report["delta"] is None and strange(report) == []
        judged = collect(quantized_model, images[300:])
        for policy in (report["before"], report["after"]):
            replayed = judged.replay(policy["policy"])
            right = (replayed.logits.argmax(-1) == judged.labels).float().mean().item()
            depth = replayed.exit_layer.float().mean().item()
            assert policy["accuracy"] == pytest.approx(right) and policy["mean_depth"] == pytest.approx(depth)
        found[name] = settings, report
    assert found["same"][1]["max_accuracy_drop"] == found["shifted"][1]["max_accuracy_drop"], "of the model in float"
    assert found["shifted"][0] != before
    assert model.exit_policy.to_dict() == before, "it returns the settings, and changes nothing"


@torch.no_grad()
def test_temperatures_follow_the_logits(shifted):
    """Logits five times as large want a temperature five times as high, at their exit alone."""
    model, other, images = shifted
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:150]
    same, moved = (recalibrate(model, each, images[:300], images[300:])[0]["temperature"] for each in (model, other))
    table = collect(model, images[:300]).select(order)
    for index in range(3):
        assert same[index] == pytest.approx(fit_temperature(table.logits[index], table.labels), rel=1e-3)
    assert moved[0] == pytest.approx(min(50, 5 * same[0]), rel=1e-2)
    assert moved[1:] == pytest.approx(same[1:], rel=1e-3)


@torch.no_grad()
def test_the_drop_that_was_asked_for_is_kept(shifted):
    model, other, images = shifted
    _, report = recalibrate(model, other, images[:300], images[300:], 0.4, delta=0.2)
    assert report["max_accuracy_drop"] == 0.4 and report["delta"] == 0.2
    with pytest.raises(ValueError, match="2 samples to test on are too few to prove a drop of 0.4"):
        recalibrate(model, other, images[:4], images[300:], 0.4, delta=0.2)


@torch.no_grad()
def test_time_is_compared_round_by_round(traced, monkeypatch):
    model, _, parts = traced
    opened = open_parts(model, parts, "float32")
    ran = []

    def fake(runs, *, repeats):
        ran.append([run() for run in runs.values()])
        return {"static": [1.0, 4.0, 9.0], "int8": [2.0, 6.0, 9.0]}

    monkeypatch.setattr("lgvit_hf.export.recalibration.time_interleaved", fake)
    found = time_against(opened, opened)
    assert [entry["batch_size"] for entry in found["batches"]] == [1, 8] and len(ran) == 2
    for entry in found["batches"]:
        assert (entry["p50_ms"], entry["int8_p50_ms"], entry["speed_up"]) == (4000, 6000, 1.5)


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    names = [str(digit) for digit in range(10)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    one_exit = {"num_hidden_layers": 2, "exit_positions": [1], "exit_types": "linear"}
    model = tiny_model("vit", num_labels=10, **one_exit, **labels)
    model.set_exit_policy("confidence", threshold=0.2)
    checkpoint, output = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(checkpoint)
    make_processor(IMAGE_SIZE).save_pretrained(checkpoint)
    command = ["export", str(checkpoint), str(output), "--quantize", "int8-static"]
    assert main(command) == 2
    assert "int8-static measures the ranges of activations on images: give --data DATA" in capsys.readouterr().err
    command += ["--data", "digits", "--limit", "60", "--max-accuracy-drop", "1"]
    for split, why in (("train", "ranges are measured"), ("validation", "thresholds are calibrated")):
        assert main([*command, "--split", split]) == 2
        assert f"--split {split}: {why} on these samples; judge on --split test" in capsys.readouterr().err
    chosen = {"policy": model.exit_policy.to_dict(), "max_accuracy_drop": 0.5, "delta": None, "bound": "none"}
    (checkpoint / "calibration.json").write_text(json.dumps({**chosen, "max_accuracy_drop": "much"}))
    assert main(command) == 2
    assert "calibration.json is damaged" in capsys.readouterr().err
    (checkpoint / "calibration.json").write_text(json.dumps(chosen))
    assert main(command) == 0
    told, manifest = capsys.readouterr().out, json.loads((output / "manifest.json").read_text())
    config, checks = json.loads((output / "config.json").read_text()), manifest["checks"]
    assert manifest["precision"] == "int8-static" and checks["images"]["rows"] == 60
    assert strange({name: checks[name] for name in ("recalibration", "against_int8", "splits")}) == []
    assert {use: (entry["split"], entry["samples"]) for use, entry in checks["splits"].items()} == {
        "judged": ("test", 60),
        "ranges": ("train", 256),
        "thresholds": ("validation", 60),
    }
    recalibration, judged = checks["recalibration"], checks["images"]
    assert config["exit_policy"] == manifest["policy"] == recalibration["after"]["policy"]
    assert recalibration["max_accuracy_drop"] == 0.5 and recalibration["delta"] is None
    assert recalibration["before"]["policy"] == model.exit_policy.to_dict()
    assert judged["accuracy"] == pytest.approx(recalibration["after"]["accuracy"])
    assert judged["mean_depth"] == pytest.approx(recalibration["after"]["mean_depth"])
    assert [entry["batch_size"] for entry in checks["against_int8"]["batches"]] == [1, 8]
    for entry in checks["against_int8"]["batches"]:
        assert min(entry["speed_up"], entry["int8_p50_ms"], entry["p50_ms"]) > 0
        assert ("faster" if entry["speed_up"] > 1 else "not faster") in told
    lost = judged["accuracy_of_model"] - judged["accuracy"]
    verdict = "more" if lost > 0.005 else "not more"
    assert f"points of accuracy lost against float: {verdict} than half a point" in told
    assert "against int8 on this machine" in told and "thresholds calibrated anew on 60 other samples" in told
