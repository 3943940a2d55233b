"""A checkpoint saved under one major version of transformers gives the same logits and ONNX file under the other.

What is saved needs a second environment: `LGVIT_OTHER_PYTHON=/path/to/python pytest tests/test_cross_version.py`.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from lgvit_hf import AViT, AViTConfig
from lgvit_hf.modeling_highway import HighwayMixin
from tests.seeds import seeded
from tests.tiny import KINDS, MODELS, OTHER_KINDS, tiny_images, tiny_model, tiny_native

OTHER_PYTHON = os.environ.get("LGVIT_OTHER_PYTHON")
EXITS = {"exit_positions": [2, 3, 5], "exit_types": ["conv1_1", "vit", "attention_r2"]}
HIGHWAYS = {"highway": {}, "shortened": {"linear_blocks": [1, 2]}}
every_kind = pytest.mark.parametrize("kind", KINDS)
ALL_KINDS = (*KINDS, *OTHER_KINDS)

# names that transformers 4 gives, and that stand in every file on the Hub
PORTABLE = {
    "vit": [
        "vit.encoder.layer.0.attention.attention.query.weight",
        "vit.encoder.layer.5.attention.output.dense.bias",
        "vit.encoder.layer.5.intermediate.dense.weight",
        "vit.layernorm.weight",
        "classifier.weight",
    ],
    "deit": [
        "deit.encoder.layer.0.attention.attention.query.weight",
        "deit.encoder.layer.5.output.dense.weight",
        "cls_classifier.weight",
        "distillation_classifier.weight",
    ],
    "deit_plain": ["deit.encoder.layer.0.attention.attention.query.weight", "classifier.weight"],
    "swin": [
        "swin.encoder.layers.0.blocks.0.attention.self.query.weight",
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
        "swin.encoder.layers.2.blocks.1.attention.output.dense.bias",
        "swin.encoder.layers.0.downsample.reduction.weight",
        "classifier.weight",
    ],
}
VIT = re.compile(r"vit\.encoder\.layer\.")
OF_TRANSFORMERS_5 = re.compile(r"q_proj|k_proj|v_proj|o_proj|mlp\.fc|(vit|deit)\.layers\.")


def tiny_avit(backbone):
    seeded(3)
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4}
    gate = {"gate_scale": 1.0, "gate_center": 1.0}
    return AViT(
        AViTConfig(backbone=backbone, distilled=backbone == "deit", num_attention_heads=2, **size, **gate)
    ).eval()


def answer_of(model):
    """Logits of all images, or the features of a backbone without a classifier."""
    out = model(tiny_images(4), early_exit=False) if isinstance(model, HighwayMixin) else model(tiny_images(4))
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits


def save_all(folder):
    """Highways, adaptive and plain models, with their logits."""
    for backbone in ("vit", "deit"):
        model = tiny_avit(backbone)
        model.save_pretrained(folder / f"{backbone}-avit")
        save_file({"avit": model(tiny_images(4)).logits.detach()}, folder / f"{backbone}-avit.safetensors")
    for kind in ALL_KINDS:
        native, logits = tiny_native(kind, seed=2), {}
        native.save_pretrained(folder / f"{kind}-plain")
        with torch.no_grad():
            logits["plain"] = answer_of(native)
            for name, settings in HIGHWAYS.items():
                highway = tiny_model(kind, seed=1, **EXITS, **settings)
                highway.save_pretrained(folder / f"{kind}-{name}")
                logits[name] = torch.stack(highway(tiny_images(4), early_exit=False).exit_logits)
        save_file(logits, folder / f"{kind}.safetensors")


def compare_all(folder):
    """What `save_all` has left, loaded here."""
    for backbone in ("vit", "deit"):
        expected = load_file(folder / f"{backbone}-avit.safetensors")["avit"]
        model = AutoModelForImageClassification.from_pretrained(folder / f"{backbone}-avit").eval()
        torch.testing.assert_close(model(tiny_images(4)).logits, expected, atol=1e-5, rtol=0)
    for kind in ALL_KINDS:
        expected = load_file(folder / f"{kind}.safetensors")
        # of DINOv3 there are features alone
        labels, logits = {"num_labels": 2} if kind == "dinov3_vit" else {}, {}
        # transformers 5 saves its own ViT-MSN under names that transformers 4 cannot read
        if kind != "vit_msn" or any(map(VIT.match, load_file(folder / f"{kind}-plain" / "model.safetensors"))):
            grown = MODELS[kind].from_backbone(folder / f"{kind}-plain", **EXITS, **labels)
            with torch.no_grad():
                logits["plain"] = answer_of(grown.base_model if labels else grown)
        for name in HIGHWAYS:
            highway, info = AutoModelForImageClassification.from_pretrained(
                folder / f"{kind}-{name}", output_loading_info=True
            )
            # Swin's index of relative positions is computed anew
            differ = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
            assert all(name.endswith("relative_position_index") for name in differ), (kind, info)
            with torch.no_grad():
                logits[name] = torch.stack(highway.eval()(tiny_images(4), early_exit=False).exit_logits)
        for name, ours in logits.items():
            difference = (ours - expected[name]).abs().max() / expected[name].abs().max()
            assert difference <= 1e-6, (kind, name, difference.item())


def elsewhere(code, folder):
    """Runs `code` with the other transformers."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    script = f"import sys\nfrom pathlib import Path\nfrom tests import test_cross_version\n{code}"
    result = subprocess.run(
        [OTHER_PYTHON, "-c", script, str(folder)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def other():
    if not OTHER_PYTHON:
        pytest.skip("LGVIT_OTHER_PYTHON does not name a Python that has the other major version of transformers")
    version = elsewhere("import transformers; print(transformers.__version__)", "").strip()
    assert version.split(".")[0] != transformers.__version__.split(".")[0], f"both are transformers {version}"


def test_saved_elsewhere_and_loaded_here(other, tmp_path):
    elsewhere("test_cross_version.save_all(Path(sys.argv[1]))", tmp_path)
    compare_all(tmp_path)


def test_saved_here_and_loaded_elsewhere(other, tmp_path):
    save_all(tmp_path)
    elsewhere("test_cross_version.compare_all(Path(sys.argv[1]))", tmp_path)


def test_saved_here_and_loaded_here(tmp_path):
    save_all(tmp_path)
    compare_all(tmp_path)


@every_kind
def test_names_on_disk_are_those_of_transformers_4(kind, tmp_path):
    tiny_model(kind, **EXITS).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert set(PORTABLE[kind]) <= names
    assert not [name for name in names if OF_TRANSFORMERS_5.search(name)]
    # exits keep their names, whatever is renamed elsewhere
    model = tiny_model(kind, **EXITS)
    assert {name for name in names if name.startswith("exits.")} == {
        name for name in model.state_dict() if name.startswith("exits.")
    }


@every_kind
def test_truncated_and_grown_models_have_portable_names_too(kind, tmp_path):
    models = {
        "truncated": tiny_model(kind, **EXITS).truncate(1),
        "whole": tiny_model(kind, **EXITS).truncate(3),
        "grown": MODELS[kind].from_backbone(tiny_native(kind), **EXITS),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        names = set(load_file(tmp_path / name / "model.safetensors"))
        assert PORTABLE[kind][0] in names and not [name for name in names if OF_TRANSFORMERS_5.search(name)]


EXPORTED = ("vit", "deit", "swin")


def save_small(folder):
    """Checkpoints that are quick to export."""
    for kind in EXPORTED:
        size = {"depths": [1, 2], "num_heads": [2, 2]} if kind == "swin" else {"num_hidden_layers": 2}
        model = tiny_model(kind, exit_positions=[1], exit_types="conv1_1", **size)
        with torch.no_grad():
            first = model(tiny_images(32), early_exit=False).exit_logits[0]
        # weights are drawn in another order on transformers 5: half of the samples exit early, whatever they are
        middle = first.softmax(-1).amax(-1).sort().values[15:17].mean().item()
        model.set_exit_policy("confidence", threshold=middle)
        model.save_pretrained(folder / kind)


def export_all(folder, name):
    """Each of those checkpoints as ONNX, into the folder `name` inside its own."""
    from lgvit_hf.export.onnx_export import write_onnx

    for kind in EXPORTED:
        model = AutoModelForImageClassification.from_pretrained(folder / kind).eval()
        (folder / kind / name).mkdir()
        write_onnx(model, folder / kind / name)


def operators(graph):
    """Kinds of nodes in the order in which they stand, branches of an `If` within."""
    return [
        (node.op_type, *(operators(attribute.g) for attribute in node.attribute if attribute.HasField("g")))
        for node in graph.node
    ]


def test_exported_here_and_elsewhere_are_the_same(other, tmp_path):
    onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
    onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    save_small(tmp_path)
    export_all(tmp_path, "here")
    elsewhere("test_cross_version.export_all(Path(sys.argv[1]), 'elsewhere')", tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    images = tiny_images(32).numpy()
    for kind in EXPORTED:
        files = [tmp_path / kind / name / "model.onnx" for name in ("here", "elsewhere")]
        answers = [onnxruntime.InferenceSession(file, options).run(None, {"pixel_values": images}) for file in files]
        for ours, theirs in zip(*answers, strict=True):
            assert (ours == theirs).all(), kind
        assert len(set(answers[0][1].tolist())) == 2, "samples exit at both exits"
        here, there = (operators(onnx.load(file).graph) for file in files)
        # transformers 5 multiplies Swin's attention by a scale where 4 divides by its inverse
        assert kind == "swin" or here == there, kind
