"""Every backbone beside ViT, DeiT and Swin, exported: the answers of PyTorch, in both runtimes and by Optimum."""

import importlib.util

import pytest
import torch

from lgvit_hf.data.processing import make_processor
from tests.tiny import IMAGE_SIZE, OTHER_KINDS, tiny_images, tiny_model

pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.export.segment_graphs import export_parts  # noqa: E402
from lgvit_hf.export.verification import between  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402


def optimum_is_there():
    try:
        return importlib.util.find_spec("optimum.exporters.onnx.model_configs") is not None
    except ModuleNotFoundError:
        return False


SMALL = {"num_hidden_layers": 2, "exit_positions": [1], "exit_types": "concat"}


def assert_same(ours, expected):
    assert ours.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(torch.as_tensor(ours.logits), expected.logits, atol=1e-4, rtol=1e-4)


# these are a ViT, or another of the list, by another name: on transformers 5 those speak for them
ALIKE = ("dinov2", "vit_msn", "ijepa")


KINDS = [pytest.param(kind, marks=pytest.mark.version_independent if kind in ALIKE else ()) for kind in OTHER_KINDS]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exported(kind, tmp_path, monkeypatch):
    """By `export_onnx` and, where it is installed, by Optimum."""
    model, images = tiny_model(kind, **SMALL), tiny_images(24)
    scores = model(images, early_exit=False).exit_logits[0].softmax(-1).amax(-1)
    model.set_exit_policy("confidence", threshold=between(scores))
    expected = model(images)
    assert set(expected.exit_index.tolist()) == {0, 1}
    parts = export_parts(model, range(2))
    monkeypatch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda *_: parts)
    for layout in ("single", "segments"):
        export_onnx(model, tmp_path / layout, layout, processor=make_processor(IMAGE_SIZE))
        assert_same(ORTHighway.from_pretrained(tmp_path / layout, threads=1)(images), expected)
    if optimum_is_there():
        from optimum.exporters.onnx import main_export

        model.save_pretrained(tmp_path / "checkpoint")
        main_export(str(tmp_path / "checkpoint"), tmp_path / "optimum", task="image-classification")
        assert_same(ORTHighway.from_pretrained(tmp_path / "optimum", threads=1)(images), expected)
    pytest.importorskip("openvino")
    from lgvit_hf.runtimes.openvino import OVHighway

    for layout in ("single", "segments"):
        assert_same(OVHighway.from_pretrained(tmp_path / layout, threads=1)(images), expected)
