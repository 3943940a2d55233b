"""A single file answers in onnxruntime-web, as a browser runs it, as it does in ONNX Runtime."""

import os
import runpy
import shutil
from pathlib import Path

import pytest

from lgvit_hf.serving.device.session import open_session
from tests.processes import ROOT
from tests.tiny import tiny_images, tiny_model

pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
WEB = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT))
pytestmark = [
    pytest.mark.version_independent,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (WEB / "node_modules" / "onnxruntime-web").is_dir(),
        reason="npm install --prefix web onnxruntime-web@1.30, and ONNXRUNTIME_WEB=web",
    ),
]


def test_exits_and_logits_are_those_of_onnxruntime(tmp_path):
    """An ensemble and none, float and int8, thresholds as inputs and fixed, in batches whose samples exit anywhere."""
    parity = runpy.run_path(str(ROOT / "recipes" / "benchmarks" / "runtime_parity.py"))
    model = tiny_model("vit", num_hidden_layers=2, exit_positions=[1], exit_types="linear")
    pixels, names = tiny_images(60).numpy(), []
    sizes = parity["batch_sizes"](len(pixels))
    for number, case in enumerate(parity["composed"](model, pixels, tmp_path, ["confidence"])):
        if number not in (0, 3, 5, 6):
            continue
        found = parity["in_web"](case, pixels, sizes, WEB)
        ours = parity["in_session"](open_session(case.file, 1), case, pixels, sizes)
        told = parity["compare"](ours, found, case.policy)
        names.append(case.name)
        assert set(told["exits"]) == {0, 1}
        # a step of 8 bits, where another runtime rounds another way
        most = {"other_exits": 3, "other_logits": 15} if "int8" in case.name else {"other_exits": 0, "other_logits": 0}
        assert all(told[name] <= limit for name, limit in most.items()), told
    ensemble = ["confidence ensemble float32 fixed", "confidence ensemble int8 input"]
    assert names == ["confidence float32 input", "confidence int8 fixed", *ensemble]
