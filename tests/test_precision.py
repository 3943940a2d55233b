"""Exports of less precision: smaller, still real branches, judged on images; and infer.py for every processor."""

import copy
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from transformers import DeiTImageProcessor, ViTImageProcessor

from lgvit_hf import ViTHighway
from lgvit_hf.cli import main
from lgvit_hf.cli.export import export_as_text
from lgvit_hf.cli.inputs import open_highway
from lgvit_hf.data.processing import make_processor
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, NUM_LABELS, tiny_dataset, tiny_images, tiny_model

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export.infer import write_infer  # noqa: E402
from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.export.recalibration import QuantizationImages  # noqa: E402
from lgvit_hf.export.segment_graphs import export_parts  # noqa: E402
from lgvit_hf.export.verification import compare  # noqa: E402
from lgvit_hf.runtimes.manifest import PRECISIONS, Manifest  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402

independent = pytest.mark.version_independent
NUM_BLOCKS = 2
SMALL = {"exit_positions": [1], "exit_types": "linear", "num_hidden_layers": NUM_BLOCKS}


def every_node(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_node(attribute.g)


@pytest.fixture(scope="module")
def wide():
    """Wide enough for its weights to be most of the file; and 64 samples that int8 cannot change.

    The 32 of 1,000 that are surest at the exit, and 32 of the least sure, sure at the end; the threshold between them.
    """
    model, images = tiny_model("vit", hidden_size=96, intermediate_size=384, **SMALL), tiny_images(1000)
    with torch.no_grad():
        early, final = (z.softmax(-1).topk(2).values for z in model(images, early_exit=False).exit_logits)
    order = early[:, 0].argsort()
    unsure = order[final[order, 0] - final[order, 1] > 0.1][:32]
    chosen = torch.cat([unsure, order[-32:]])
    low, high = early[unsure, 0].max().item(), early[order[-32:], 0].min().item()
    assert high - low > 0.1
    model.set_exit_policy("confidence", threshold=(low + high) / 2)
    return model, [{"pixel_values": image, "labels": i % NUM_LABELS} for i, image in enumerate(images[chosen])]


@pytest.fixture(scope="module")
def parts_of_wide():
    """Its parts, which are the same in every layout; those of each dtype are exported once, and copied."""
    exported = {}

    def parts(model, exits):
        key = model.dtype, tuple(exits)
        if key not in exported:
            exported[key] = export_parts(model, exits)
        return copy.deepcopy(exported[key])

    return parts


@pytest.fixture(scope="module", params=["single", "segments"])
def exports(request, wide, parts_of_wide, tmp_path_factory):
    """Layout, folders and manifests in each precision."""
    layout, (model, samples), found = request.param, wide, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lgvit_hf.export.onnx_export.export_parts", parts_of_wide)
        for precision in PRECISIONS:
            folder = tmp_path_factory.mktemp(layout) / precision
            given = QuantizationImages(samples[:32]) if precision == "int8-static" else QuantizationImages()
            judged = {"images": samples, "max_accuracy_drop": 1, "quantization": given}
            manifest = export_onnx(model, folder, layout, precision=precision, **judged)
            found[precision] = folder, manifest
    return layout, found


@independent
@pytest.mark.parametrize(("precision", "share"), [("float16", 0.6), ("int8", 0.5), ("int8-static", 0.5)])
def test_smaller_files(exports, precision, share):
    layout, found = exports
    folder, small = found[precision]
    full, *sizes = [
        sum((folder / name).stat().st_size for name in manifest.files)
        for folder, manifest in (found["float32"], found[precision])
    ]
    assert sizes[0] < share * full
    assert 0 < small.checks["largest_difference"] < 0.5
    judged = small.checks["images"]
    assert judged["agreement"] == 1 and judged["mean_depth"] == judged["mean_depth_of_model"] and judged["rows"] == 64
    assert judged["mean_depth"] == 1.5

    graphs = [onnx.load(folder / name).graph for name in small.files]
    nodes = [node for graph in graphs for node in every_node(graph)]
    # query, key, value, output, and both layers of the MLP, in each block; and what heads have
    matrices, in_8_bits = 6 * NUM_BLOCKS, {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    products = [node for node in nodes if node.op_type == "MatMul" and set(node.input) <= in_8_bits]
    assert len(products) >= matrices if "int8" in precision else not in_8_bits
    assert sum(node.op_type == "If" for node in nodes) == (1 if layout == "single" else 0)
    if layout == "single" and "int8" in precision:
        outside = [node for graph in graphs for node in graph.node if node in products]
        assert len(outside) < matrices, "what lies inside branches is quantized too"

    exported = ORTHighway.from_pretrained(folder)
    out = exported(tiny_images(5))
    assert out.logits.dtype == torch.float32 and exported.dtype == torch.float32
    for threshold, exit_index in ((-1.0, 0), (2.0, 1)):
        exported.set_exit_policy("confidence", threshold=threshold)
        assert set(exported(tiny_images(5)).exit_index.tolist()) == {exit_index}, "thresholds are still inputs"


@independent
@pytest.mark.parametrize("precision", ["float16", "int8", "int8-static"])
def test_a_sample_does_not_meet_its_batch(exports, precision):
    layout, found = exports
    exported, good = ORTHighway.from_pretrained(found[precision][0]), tiny_images(8)
    policies = [exported.exit_policy.to_dict()] + [{"name": "confidence", "threshold": t} for t in (-1.0, 2.0)]
    bad = torch.stack([good[0] * 3e38, torch.full_like(good[0], torch.nan), good[0].clone(), good[0] * 1e4])
    bad[2, 0, 0, 0] = torch.inf
    for policy in policies:
        exported.set_exit_policy(policy)
        mixed = exported(torch.cat([good[:4], bad, good[4:]]))
        for place, image in zip((0, 1, 2, 3, 8, 9, 10, 11), good, strict=True):
            alone = exported(image[None])
            # matrix products of other sizes may add in another order, and round to another of the 255 steps
            torch.testing.assert_close(mixed.logits[place], alone.logits[0], atol=0.01, rtol=1e-5)
            assert alone.exit_index[0] == mixed.exit_index[place]
        assert not mixed.logits[4:7].isfinite().any()
        assert (mixed.exit_index[4:7] == 1).all(), "what is not a number never exits early"


@independent
def test_rounding_is_by_token_and_by_channel():
    """Against the formulas in numpy, and against the product itself within half a step of each."""
    from lgvit_hf.export.onnx_graph import Graph
    from lgvit_hf.export.quantization import quantize

    graph, random = Graph(), rng()
    weight = random.normal(size=(24, 16)).astype(np.float32)
    # without VNNI a processor adds the products of two neighbours in 16 bits, which two of the largest do not fit into
    weight[1::2] = 0
    weight[:, 3] = 0
    graph.add("MatMul", ["state", graph.constant("weight", weight)], "state_out")
    graph.add("ReduceMean", ["state_out", graph.constant("axis", np.array([1]))], "logits", keepdims=0)
    state, state_out = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 5, size])
        for name, size in (("state", 24), ("state_out", 16))
    )
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 16])
    made = onnx.helper.make_graph(graph.nodes, "part", [state], [state_out, logits], graph.constants)
    opset = [onnx.helper.make_opsetid("", 18)]
    content = quantize(onnx.helper.make_model(made, opset_imports=opset, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    tokens = (random.normal(size=(3, 5, 24)) * 10.0 ** random.integers(-3, 4, (3, 5, 1))).astype(np.float32)
    tokens[0, 0] = 0
    (found,) = session.run(["state_out"], {"state": tokens})
    step, channel = (
        np.maximum(np.abs(array).max(axis, keepdims=True) / 127, 1e-30) for array, axis in ((tokens, -1), (weight, 0))
    )
    by_formula = np.rint(tokens / step) @ np.rint(weight / channel) * step * channel
    np.testing.assert_allclose(found, by_formula, rtol=1e-4, atol=1e-4 * np.abs(by_formula).max())
    bound = 0.5 * (
        step * np.abs(weight).sum(0) + channel * np.abs(tokens).sum(-1, keepdims=True) + 24 * step * channel
    )
    assert (np.abs(found - tokens @ weight) <= bound + 1e-5 * np.abs(tokens).max()).all()


@independent
def test_what_is_said_of_an_export(exports):
    folder, manifest = exports[1]["int8"]
    told = export_as_text(manifest, folder)
    assert "int8" in told and "on 64 images" in told and "as the model does" not in told
    told = export_as_text(replace(manifest, checks={"batch_sizes": [1], "largest_difference": 0.1}), folder)
    assert "what int8 costs in accuracy was not measured" in told


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model in half precision whose processor does not resize, its folder and its manifest."""
    model, folder = tiny_model("vit", **SMALL).half(), tmp_path_factory.mktemp("half") / "out"
    model.set_exit_policy("fixed", exit_index=0)
    with pytest.warns(UserWarning, match="infer.py is left out: .* does not resize to a height and a width"):
        return model, folder, export_onnx(model, folder, processor=ViTImageProcessor(do_resize=False))


@independent
def test_a_model_in_half_precision_exports_as_float32(half):
    model, folder, manifest = half
    assert manifest.precision == "float32" and model.dtype == torch.float16
    images = tiny_images(4)
    torch.testing.assert_close(
        ORTHighway.from_pretrained(folder)(images).logits,
        copy.deepcopy(model).float()(images).logits,
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.version_independent
def test_no_infer_for_another_processor(half):
    folder = half[1]
    assert not (folder / "infer.py").exists() and (folder / "preprocessor_config.json").exists()


@independent
def test_accuracy_lost_is_an_error(wide, exports, tmp_path):
    model, samples = wide
    exported = ORTHighway.from_pretrained(exports[1]["float32"][0])
    images = [{"pixel_values": sample["pixel_values"]} for sample in samples[:40]]
    with pytest.raises(ValueError, match=r"float32 export is right on 100.00% of 40 images, the model on 100.00%"):
        compare(model, exported, images, -0.01)
    with pytest.raises(ValueError, match="the dataset is empty"):
        compare(model, exported, [], 0.01)
    with pytest.raises(ValueError, match="precision='int4' is none of float32, float16, int8, int8-static"):
        export_onnx(model, tmp_path / "out", precision="int4")


@independent
def test_an_export_that_loses_accuracy_is_not_kept(tmp_path):
    model = tiny_model("vit", **SMALL)
    model.set_exit_policy("fixed", exit_index=0)
    with pytest.raises(ValueError, match="nothing was written"):
        export_onnx(model, tmp_path / "out", images=tiny_dataset(20), max_accuracy_drop=-0.01)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@independent
def test_int8_on_a_real_model(shared, tmp_path):
    """Exits were never trained here: what is judged is the backbone's answers, 60,000 images' worth of training."""
    model = ViTHighway.from_backbone(shared / "models" / "fashion_vit", exit_positions=[3], exit_types="linear")
    model.set_exit_policy("never")
    model.save_pretrained(tmp_path / "model")
    make_processor(28).from_pretrained(shared / "models" / "fashion_vit").save_pretrained(tmp_path / "model")
    data = str(shared / "data" / "fashion_mnist")
    model, _, dataset, _ = open_highway(str(tmp_path / "model"), data)
    images = Subset(dataset, range(1000))
    checks = export_onnx(model, tmp_path / "int8", precision="int8", images=images).checks["images"]
    assert checks["accuracy_of_model"] > 0.8 and checks["accuracy"] >= checks["accuracy_of_model"] - 0.005
    assert checks["agreement"] > 0.97


@independent
def test_quantize_from_the_command_line(tmp_path, capsys):
    names = [str(digit) for digit in range(10)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = tiny_model("vit", num_labels=10, **SMALL, **labels)
    model.set_exit_policy("confidence", threshold=0.5)
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "judged"), "--quantize", "int8"]
    assert main([*command, "--data", "digits", "--limit", "50", "--max-accuracy-drop", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "model.onnx in" in out and "int8" in out and "on 50 images" in out
    assert Manifest.load(tmp_path / "judged").checks["images"]["rows"] == 50
    assert main(["export", str(tmp_path / "judged"), str(tmp_path / "again")]) == 2
    assert "is exported already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def with_infer(tmp_path_factory):
    """A model and its export with a processor that does not crop."""
    model, folder = tiny_model("deit", **SMALL), tmp_path_factory.mktemp("infer") / "onnx"
    model.set_exit_policy("fixed", exit_index=0)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    export_onnx(model, folder, processor=ViTImageProcessor(size=size, resample=3))
    return model, folder


@pytest.mark.version_independent
@pytest.mark.parametrize("crop", [False, True])
def test_infer_does_what_the_processor_does(crop, with_infer, tmp_path):
    model, folder = with_infer
    processor = ViTImageProcessor.from_pretrained(folder)
    if crop:
        size, crop_size = {"height": 20, "width": 20}, {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = DeiTImageProcessor(size=size, crop_size=crop_size)
        folder = shutil.copytree(folder, tmp_path / "onnx")
        processor.save_pretrained(folder)
        write_infer(folder, processor, model.config.num_channels)
    photo = Image.fromarray(rng().integers(0, 255, (24, 31, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, folder / "infer.py", tmp_path / "photo.png"], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        expected = model(processor(photo, return_tensors="pt")["pixel_values"])
    label = model.config.id2label[int(expected.logits.argmax())]
    told, score = done.stdout.strip().rsplit(" ", 1)
    assert f"{label} after {int(expected.exit_layer)} blocks, score" in told
    # the last of three decimals may be rounded the other way
    assert float(score) == pytest.approx(float(expected.exit_score), abs=6e-4)
