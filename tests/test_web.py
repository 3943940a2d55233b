"""A single file answers in onnxruntime-web, as a browser runs it, as it does in ONNX Runtime."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.tiny import tiny_model

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
    tiny_model("vit", num_hidden_layers=2, exit_positions=[1], exit_types="linear").save_pretrained(tmp_path)
    script = ROOT / "recipes" / "benchmarks" / "web_parity.py"
    command = [sys.executable, script, tmp_path, "--web", WEB, "--policies", "confidence"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kinds = [f"{name} {kind}" for name in ("float32", "int8") for kind in ("input", "fixed")]
    names = [f"{policy} {kind}" for policy in ("confidence", "confidence ensemble") for kind in kinds]
    assert [line["file"] for line in lines] == names
    for line in lines:
        assert set(line["exits"]) == {"0", "1"} and sum(line["exits"].values()) == 64
        if " int8 " in line["file"]:
            # a step of 8 bits, where another runtime rounds another way
            assert line["other_exits"] <= 3 and line["other_logits"] <= 16
