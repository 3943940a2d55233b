"""What version 0.1 wrote opens and answers as it did: `tests/assets/written_by_0_1`, of which nothing is made anew.

A tiny model of each kind, with the images and answers of each in `answers.safetensors`; exports in three layouts and
parts in two formats of the first, its exit table, cost table and calibration. Answers are far from every threshold.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from lgvit_hf import CostTable, ExitTable, ORTHighway, calibrate
from lgvit_hf.serving.open_part import open_part
from lgvit_hf.serving.split import run_chain
from tests.test_remote_code import without_the_package

FOLDER = Path(__file__).parent / "assets" / "written_by_0_1"
ANSWERS = load_file(FOLDER / "answers.safetensors")
LAYOUTS = ("single", "segments", "all_exits")


def assert_answers(name, logits, exit_layer):
    assert exit_layer.tolist() == ANSWERS[f"{name}.exit_layer"].tolist()
    torch.testing.assert_close(torch.as_tensor(logits), ANSWERS[f"{name}.logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "avit", "wrapped"])
def test_checkpoints(kind):
    model = AutoModelForImageClassification.from_pretrained(FOLDER / kind).eval()
    with torch.no_grad():
        out = model(ANSWERS[f"{kind}.images"])
    assert_answers(kind, out.logits, out.exit_layer)


REMOTE = """
import json
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/vit", trust_remote_code=True).eval()
out = model(load_file(sys.argv[1] + "/answers.safetensors")["vit.images"])
print(json.dumps([out.logits.tolist(), out.exit_layer.tolist()]))
"""


def test_code_that_lies_with_a_checkpoint(tmp_path):
    logits, exit_layer = json.loads(without_the_package(REMOTE, [FOLDER], tmp_path))
    assert_answers("vit", torch.tensor(logits), torch.tensor(exit_layer))


@pytest.mark.version_independent
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_folders(layout):
    out = ORTHighway.from_pretrained(FOLDER / f"onnx_{layout}")(ANSWERS["vit.images"])
    assert_answers("vit", out.logits, out.exit_layer)


@pytest.mark.version_independent
@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_parts(format):
    parts = [open_part(FOLDER / f"parts_{format}" / f"part{index}", threads=1) for index in range(3)]
    answers = run_chain(parts, {"pixel_values": ANSWERS["vit.images"].numpy()})
    assert_answers("vit", answers.logits, answers.exit_layer)


@pytest.mark.version_independent
def test_tables_and_calibration():
    table = ExitTable.load(FOLDER / "table.safetensors")
    assert torch.equal(table.logits, ANSWERS["table.logits"])
    costs = CostTable.load(FOLDER / "cost_table.json", num_exits=3)
    assert costs.batch_sizes == [1, 2, 4]
    report = calibrate(table, max_accuracy_drop=0.2)
    written = json.loads((FOLDER / "calibration.json").read_text())
    assert report.policy == written["policy"] and report.mean_macs == written["mean_macs"]
