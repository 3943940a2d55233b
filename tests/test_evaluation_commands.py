"""The commands `evaluate`, `benchmark`, `calibrate` and `sweep`, as they are typed."""

import json
import shutil

import pytest
import torch
from PIL import Image

from lgvit_hf import CostTable, ExitTable, ViTHighway, ViTHighwayConfig
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.evaluation import benchmark as benchmarking
from tests.seeds import seeded
from tests.test_latency import tick

version_independent = pytest.mark.version_independent


def lgvit(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ViT with three exits for digits, of random weights."""
    seeded()
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


# -- evaluate and benchmark ------------------------------------------------------------------------------------


def test_evaluate_command_draws(checkpoint, tmp_path, capsys):
    asked = ["--data", "digits", "--policy", "confidence", "--threshold", 0.6, "--timed-batch-sizes", 4]
    files = ["--output", tmp_path / "results.json", "--plots", tmp_path / "plots"]
    assert lgvit("evaluate", checkpoint, *asked, *files) == 0
    assert "the speed of the backbone without heads" in capsys.readouterr().out
    report = json.loads((tmp_path / "results.json").read_text())
    assert [entry["name"] for entry in report["classes"]] == [str(digit) for digit in range(10)]
    assert sum(map(sum, report["confusion"])) == report["overall"]["samples"] == 360
    right = sum(line[index] for index, line in enumerate(report["confusion"]))
    assert right / 360 == pytest.approx(report["overall"]["accuracy"])
    assert [len(entry["reliability_all"]) for entry in report["reliability"]] == [15] * 4
    names = {"exits", "pareto", "reliability", "classes", "confusion", "gallery", "latency"}
    assert {file.stem for file in (tmp_path / "plots").iterdir()} == names
    assert all(Image.open(file).width > 300 for file in (tmp_path / "plots").iterdir())


@version_independent
def test_benchmark_command_and_its_cost_table(copy, tmp_path, capsys, monkeypatch):
    """By a clock by which everything takes a second."""
    tick(monkeypatch)
    asked = ["--data", "digits", "--policy", "confidence", "--threshold", 0.6, "--batch-sizes", 1, 4]
    fast = ["--limit", 8, "--repeats", 1, "--threads", torch.get_num_threads()]
    files = {name: tmp_path / f"{name}.json" for name in ("output", "cost-table")}
    written = [word for name, file in files.items() for word in (f"--{name}", file)]
    assert lgvit("benchmark", copy, *asked, *fast, *written, "--plot", tmp_path / "speed.png") == 0
    said = capsys.readouterr().out
    assert "by blocks run" in said and "at batch size 4" in said and "parameters" in said
    report = json.loads(files["output"].read_text())
    assert [entry["batch_size"] for entry in report["batches"]] == [1, 4]
    table = CostTable.load(files["cost-table"], num_exits=4)
    assert table.batch_sizes == [1, 2, 4] and table.backbone_costs == [[2.0] * 3, *[[1.0] * 3] * 3]
    assert Image.open(tmp_path / "speed.png").width > 300
    # the stem, four blocks and the classifier for four images take 6 s; up to the first exit it is 3 s
    wanted = ["--max-latency", 1e3, "--cost-table", files["cost-table"], "--batch-size", 4]
    assert lgvit("calibrate", copy, "--data", "digits", *wanted) == 0
    assert "ms per image" in capsys.readouterr().out
    found = json.loads((copy / "calibration.json").read_text())
    assert 750 <= found["mean_latency"] <= 1000 and found["full_latency"] == 1500 and found["bound"] == "none"
    assert found["frontier"][0]["mean_latency"] == 1500
    assert lgvit("calibrate", copy, "--data", "digits", "--max-latency", 740, *wanted[2:]) == 2
    assert "max_latency=740 is out of reach: the least is" in capsys.readouterr().err
    assert lgvit("calibrate", copy, "--data", "digits", "--max-latency", 1, *wanted[2:4], "--batch-size", 5) == 2
    assert "batch_size=5 is outside the cost table's 1 to 4" in capsys.readouterr().err
    assert lgvit("benchmark", copy, "--data", "digits", "--threads", 0) == 2
    assert "argument --threads: '0' must be a whole number" in capsys.readouterr().err


# -- sweep -----------------------------------------------------------------------------------------------------


@version_independent
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


@version_independent
def test_ctrl_c_in_a_sweep(checkpoint, tmp_path, monkeypatch, capsys):
    asked = ["sweep", checkpoint, "--data", "digits", "--output", tmp_path / "o", "--range", 0.1, 0.9, 5]
    asked += ["--timed-batch-sizes", 1]
    timed = []

    def stopping(*arguments, **settings):
        timed.append(1)
        if len(timed) == 3:
            raise KeyboardInterrupt
        return {"wall_clock_speed_up": 1.5}

    monkeypatch.setattr(benchmarking, "wall_clock_speed_up", stopping)
    assert lgvit(*asked) == 130
    file = tmp_path / "o" / "sweep.jsonl"
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"lgvit: stopped; what is done is kept in {file}, the same command goes on"
    kept = file.read_text()
    assert kept.endswith("\n") and len([json.loads(line) for line in kept.splitlines()]) == 1 + 2
    # the two that are done are not done again
    assert lgvit(*asked) == 0 and len(timed) == 3 + 3
    whole = file.read_text()
    assert whole.startswith(kept)
    rows = [json.loads(line) for line in whole.splitlines()[1:]]
    assert [row["policy"]["threshold"] for row in rows] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [row["wall_clock"] for row in rows] == [{"1": 1.5}] * 5


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
    assert config["exit_policy"] == report["policy"] and report["bound"] == "drop" and report["samples_tested"] == 611
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


@version_independent
def test_a_truncated_model_goes_on_from_its_table(checkpoint, tmp_path):
    model = ViTHighway.from_pretrained(checkpoint)
    small = model.truncate(2)
    small.save_pretrained(tmp_path / "small")
    make_processor(8).save_pretrained(tmp_path / "small")
    asked = ["sweep", tmp_path / "small", "--data", "digits", "--output", tmp_path / "out", "--values", 0.5]
    assert lgvit(*asked) == 0
    before = (tmp_path / "out" / "table.safetensors").stat().st_mtime_ns
    assert lgvit(*asked, 0.6) == 0
    assert (tmp_path / "out" / "table.safetensors").stat().st_mtime_ns == before
    assert len((tmp_path / "out" / "sweep.jsonl").read_text().splitlines()) == 3


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lgvit:")]
    assert len(lines) == 1
    return lines[0]


@version_independent
def test_one_clear_line(checkpoint, copy, tmp_path, capsys):
    images = tmp_path / "photos"
    for digit in range(9):  # one class is missing
        (images / str(digit)).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 20 * digit + number).save(images / str(digit) / f"{number}.png")
    assert lgvit("calibrate", copy, "--data", images, "--max-accuracy-drop", 0.1) == 2
    assert "knows 10 classes, the data have 9" in one_line(capsys)
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.01, "--delta", 0.05) == 2
    assert "samples to test on are too few to prove a drop of 0.01" in one_line(capsys)
    assert lgvit("calibrate", copy, "--data", "digits", "--max-latency", 1) == 2
    assert "max_latency needs measured times" in one_line(capsys)
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
    # 360 rows too, but others
    other = ["--table", tmp_path / "table.safetensors", "--max-accuracy-drop", 0.1]
    assert lgvit("calibrate", copy, "--data", "digits", "--split", "test", *other) == 0
    shares = ["--split", "validation", "--validation-share", 360 / 1437]
    capsys.readouterr()
    assert lgvit("calibrate", copy, "--data", "digits", *shares, *other) == 2
    assert "is a table of 360 other samples than these" in one_line(capsys)
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.1, "--plot", tmp_path) == 2
    assert "is a folder; give the PNG's file name" in one_line(capsys)
    assert lgvit("evaluate", checkpoint, "--data", "digits", "--timed-batch-sizes", 0) == 2
    assert "argument --timed-batch-sizes: '0' must be a whole number of at least 1" in one_line(capsys)
    wanted = ["--values", "nan"]
    assert lgvit("sweep", checkpoint, "--data", "digits", "--output", tmp_path / "o", *wanted) == 2
    assert "--values: 'nan' must be a finite number" in one_line(capsys)
    (copy / "manifest.json").write_text("{}")
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.1) == 2
    assert "is a training checkpoint, which must stay as it is; give --output" in one_line(capsys)
