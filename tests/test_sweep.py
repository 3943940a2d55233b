"""The commands `calibrate` and `sweep`, and that a sweep keeps what is done, whatever stops it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from lgvit_hf import ExitTable, ViTHighway, ViTHighwayConfig
from lgvit_hf.cli import main
from lgvit_hf.data import make_processor
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.latency import measure_cost_table
from lgvit_hf.evaluation.sweep import sweep, threshold_curve


def lgvit(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ViT with three exits for digits, of random weights."""
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4, "num_attention_heads": 2}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = ViTHighway(
        ViTHighwayConfig(num_hidden_layers=4, exit_positions=[1, 2, 3], exit_types="linear", **sizes, **labels)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("models") / "highway"
    model.save_pretrained(folder)
    make_processor(8).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


# -- sweep -----------------------------------------------------------------------------------------------------


def a_table():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 4, generator=generator)
    return ExitTable(logits, torch.randint(4, (40,), generator=generator), [1, 2, 4], Costs([4.0, 4, 8], [1.0, 1, 1]))


POLICIES = [{"name": "confidence", "threshold": step / 10} for step in range(3, 10)]
WHAT = {"what": "lgvit sweep", "rows": 40}


def test_rows_are_what_a_replay_says(tmp_path):
    table = a_table()
    rows = sweep(table, POLICIES, tmp_path / "sweep.jsonl", what=WHAT)
    for row, policy in zip(rows, POLICIES, strict=True):
        answers = table.replay(policy)
        right = answers.logits.argmax(-1) == table.labels
        assert row["policy"] == policy and row["accuracy"] == pytest.approx(right.float().mean().item())
        assert row["mean_depth"] == pytest.approx(answers.exit_layer.float().mean().item())
        assert row["shares"] == [(answers.exit_index == index).sum().item() / 40 for index in range(3)]
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert lines == [WHAT, *rows]


@pytest.mark.parametrize("done", [0, 1, 4])
def test_what_is_done_is_kept_and_not_done_again(done, tmp_path):
    file, timed = tmp_path / "sweep.jsonl", []

    def clock(policy):
        if len(timed) == done and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        timed.append(policy)
        return {"1": 1.0}

    with pytest.raises(KeyboardInterrupt):
        sweep(a_table(), POLICIES, file, what=WHAT, time=clock)
    assert len(file.read_text().splitlines()) == 1 + done
    rows = sweep(a_table(), POLICIES, file, what=WHAT, time=clock)
    assert timed == POLICIES and [row["policy"] for row in rows] == POLICIES
    assert len(file.read_text().splitlines()) == 1 + len(POLICIES)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_half_a_line_is_taken_off(cut, tmp_path):
    file = tmp_path / "sweep.jsonl"
    rows = sweep(a_table(), POLICIES, file, what=WHAT)
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert sweep(a_table(), POLICIES, file, what=WHAT) == rows
    assert file.read_bytes() == whole
    file.write_bytes(whole[:9])
    assert sweep(a_table(), POLICIES, file, what=WHAT) == rows
    assert file.read_bytes() == whole


def test_file_of_another_sweep(tmp_path):
    file = tmp_path / "sweep.jsonl"
    sweep(a_table(), POLICIES, file, what=WHAT)
    with pytest.raises(ValueError, match="holds a sweep with another rows; choose another output"):
        sweep(a_table(), POLICIES, file, what={**WHAT, "rows": 41})
    file.write_text("no JSON\n")
    with pytest.raises(ValueError, match="is not a sweep's file"):
        sweep(a_table(), POLICIES, file, what=WHAT)


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy"])
def test_threshold_curve_goes_from_the_first_exit_to_the_full_model(policy):
    table = a_table()
    curve = threshold_curve(table, policy)
    first, last = curve[0], curve[-1]
    assert first["mean_macs"] == 5 and first["accuracy"] == pytest.approx(table.accuracies()[0])
    assert last["mean_macs"] == table.costs.backbone and last["accuracy"] == pytest.approx(table.accuracies()[-1])


def test_sweep_command(checkpoint, tmp_path, capsys):
    asked = ["sweep", checkpoint, "--data", "digits", "--output", tmp_path / "out", "--range", 0.3, 0.9, 4]
    assert lgvit(*asked) == 0
    said = capsys.readouterr().out
    assert "threshold" in said and len(said.splitlines()) >= 6
    lines = (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[-1])["policy"] == {"name": "confidence", "threshold": 0.9}
    assert ExitTable.load(tmp_path / "out" / "table.safetensors").logits.shape[:2] == (4, 360)
    assert Image.open(tmp_path / "out" / "sweep.png").width > 300
    before = (tmp_path / "out" / "table.safetensors").stat().st_mtime_ns
    assert lgvit(*asked[:-4], "--values", 0.3, 0.95) == 0
    assert len((tmp_path / "out" / "sweep.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "out" / "table.safetensors").stat().st_mtime_ns == before
    more = ["--policy", "patience", "--values", 1, 2, "--timed-batch-sizes", 4]
    assert lgvit(*asked[:4], "--output", tmp_path / "patience", *more) == 0
    assert "clock, batch 4" in capsys.readouterr().out


def test_ctrl_c_in_a_sweep(checkpoint, tmp_path):
    command = [
        sys.executable,
        "-m",
        "lgvit_hf.cli",
        "sweep",
        checkpoint,
        "--data",
        "digits",
        "--output",
        tmp_path / "o",
    ]
    command += ["--range", "0.1", "0.99", "400", "--timed-batch-sizes", "1"]
    running = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    file = tmp_path / "o" / "sweep.jsonl"
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said.splitlines()[-1] == f"lgvit: stopped; what is done is kept in {file}, the same command goes on"
    kept = file.read_text()
    assert kept.endswith("\n") and len(kept.splitlines()) >= 3 and [json.loads(line) for line in kept.splitlines()]


# -- calibrate -------------------------------------------------------------------------------------------------


def test_calibrate_command_writes_the_policy(copy, tmp_path, capsys):
    weights = (copy / "model.safetensors").read_bytes()
    asked = ["--data", "digits", "--split", "train", "--max-accuracy-drop", 0.1, "--delta", 0.1]
    more = ["--table", tmp_path / "table.safetensors", "--plot", tmp_path / "curve.png"]
    assert lgvit("calibrate", copy, *asked, *more) == 0
    said = capsys.readouterr().out
    assert "with probability 0.9" in said and "full model" in said
    report = json.loads((copy / "calibration.json").read_text())
    config = json.loads((copy / "config.json").read_text())
    assert config["exit_policy"] == report["policy"] and report["bound"] == "drop" and report["n"] == 611
    assert (copy / "model.safetensors").read_bytes() == weights
    assert ViTHighway.from_pretrained(copy).exit_policy.to_dict()["name"] == report["policy"]["name"]
    assert Image.open(tmp_path / "curve.png").width > 300
    # the table is read the second time, and refused by a model of other weights
    before = (tmp_path / "table.safetensors").stat().st_mtime_ns
    assert lgvit("calibrate", copy, *asked, *more, "--output", tmp_path / "new") == 0
    assert (tmp_path / "table.safetensors").stat().st_mtime_ns == before
    assert ViTHighway.from_pretrained(tmp_path / "new").config.exit_policy == report["policy"]
    other = ViTHighway.from_pretrained(copy)
    torch.nn.init.ones_(other.exits[0].classifiers[0].weight)
    other.save_pretrained(tmp_path / "new")
    assert lgvit("calibrate", tmp_path / "new", *asked, *more) == 2
    assert "is a table of a model with other weights; collect it again" in capsys.readouterr().err


def test_calibrate_for_a_latency(copy, tmp_path, capsys):
    table = measure_cost_table(ViTHighway.from_pretrained(copy), torch.randn(4, 3, 8, 8), [1, 4], repeats=2)
    table.save(tmp_path / "costs.json")
    asked = ["--data", "digits", "--cost-table", tmp_path / "costs.json", "--batch-size", 4]
    assert lgvit("calibrate", copy, *asked, "--max-latency", 1e4) == 0
    assert "ms per image" in capsys.readouterr().out
    report = json.loads((copy / "calibration.json").read_text())
    assert 0 < report["mean_latency"] <= 1e4 and report["bound"] == "none"
    assert lgvit("calibrate", copy, *asked, "--max-latency", 1e-9) == 2
    assert "max_latency=1e-09 is out of reach" in capsys.readouterr().err
    assert lgvit("calibrate", copy, "--data", "digits", "--max-latency", 1) == 2
    assert "max_latency needs measured times" in capsys.readouterr().err


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lgvit:")]
    assert len(lines) == 1
    return lines[0]


def test_one_clear_line(checkpoint, copy, tmp_path, capsys):
    images = tmp_path / "photos"
    for digit in range(9):  # one class is missing
        (images / str(digit)).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 20 * digit + number).save(images / str(digit) / f"{number}.png")
    assert lgvit("calibrate", copy, "--data", images, "--max-accuracy-drop", 0.1) == 2
    assert "knows 10 classes, the data have 9" in one_line(capsys)
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.01, "--delta", 0.05) == 2
    assert "rows to test on are too few to prove a drop of 0.01" in one_line(capsys)
    assert lgvit("calibrate", copy, "--data", "digits") == 2
    assert "nothing is asked" in one_line(capsys)
    (tmp_path / "empty").mkdir()
    assert lgvit("sweep", checkpoint, "--data", tmp_path / "empty", "--output", tmp_path / "o", "--values", 0.5) == 2
    assert "empty" in one_line(capsys)
    assert lgvit("sweep", checkpoint, "--data", "digits", "--output", tmp_path / "o") == 2
    assert "give either --values or --range" in one_line(capsys)
    wanted = ["--policy", "patience", "--values", 1.5]
    assert lgvit("sweep", checkpoint, "--data", "digits", "--output", tmp_path / "o", *wanted) == 2
    assert "patience is a whole number" in one_line(capsys)
    (copy / "manifest.json").write_text("{}")
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.1) == 2
    assert "is a training checkpoint, which must stay as it is; give --output" in one_line(capsys)
