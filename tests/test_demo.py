"""The demo, and README and pages with the model that it makes."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from lgvit_hf.cli import main
from lgvit_hf.cli.demo import MODEL
from tests.test_docs import RUN_WITH_THE_DEMO, snippets


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # half as wide, and fewer images for the clock
        patch.setattr("lgvit_hf.cli.demo.MODEL", MODEL | {"hidden_size": 48, "intermediate_size": 96})
        patch.setattr("lgvit_hf.evaluation.report.TIMED_ROWS", 64)
        with contextlib.redirect_stdout(said):
            assert main(["demo", "--output", str(home / "demo_output"), "--quick"]) == 0
    return home, json.loads((home / "demo_output" / "results.json").read_text()), said.getvalue()


def test_demo_reports_what_it_did(demo):
    home, results, text = demo
    assert (home / "demo_output" / "highway.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [row["exit_layer"] for row in results["exits"]] == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    assert sum(row["samples"] for row in results["exits"]) == results["overall"]["samples"] == 360
    assert [stage["stage"] for stage in results["stages"]] == ["backbone", "1", "2"]
    assert set(results["wall_clock"]) == {"1", "32"}
    for size, times in results["wall_clock"].items():
        early, backbone = times["early_exit_seconds"], times["backbone_seconds"]
        assert times["wall_clock_speed_up"] == pytest.approx(backbone / early)
        said = f"wall-clock, batch {size:>3} {backbone / early:.2f}x the speed of the backbone without heads"
        assert said in text


def test_demo_replaces_its_own_output_only(demo, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    beside = demo[0] / "demo_output" / "notes.txt"
    beside.write_text("mine")
    assert main(["demo", "--quick", "--output", str(beside.parent)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert beside.read_text() == "mine"
    beside.unlink()


def test_saved_model_answers_in_a_fresh_process(demo):
    code = (
        "import torch, lgvit_hf\n"
        "from transformers import pipeline\n"
        "from PIL import Image\n"
        "classify = pipeline('image-classification', model='demo_output/model')\n"
        "answers = classify([Image.new('L', (8, 8))] * 3, batch_size=3, top_k=2)\n"
        "print(len(answers), len(answers[0]), answers[0][0]['label'] in '0123456789')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=demo[0], capture_output=True, text=True)
    assert done.stdout.split() == ["3", "2", "True"], done.stderr


# each in a process of its own, which has imported nothing of ours
ONE_BY_ONE = """
import os, runpy, sys
import torch, transformers.pipelines, transformers.modeling_utils
assert not any(name.split(".")[0] == "lgvit_hf" for name in sys.modules)
for number in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        runpy.run_path(f"snippet{number}.py", run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, f"snippet {number}"
"""


@pytest.mark.version_independent
def test_snippets_run(demo):
    found = [snippet for page in RUN_WITH_THE_DEMO for snippet in snippets(page, "python")]
    assert len(found) == 7
    for number, snippet in enumerate(found):
        (demo[0] / f"snippet{number}.py").write_text(snippet)
    command = [sys.executable, "-c", ONE_BY_ONE, str(len(found))]
    done = subprocess.run(command, cwd=demo[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # what they print: shapes, depths, the policy found
    assert "torch.Size([5, 10])" in done.stdout and "tensor(True)" in done.stdout
