"""`lgvit drift`, as it is typed, on the three formats of `lgvit predict`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lgvit_hf import load_baseline
from lgvit_hf.serving.answer_files import COLUMNS, write_predictions
from lgvit_hf.serving.read_answers import read_answers
from tests.seeds import rng
from tests.test_evaluation_commands import checkpoint, copy, lgvit  # noqa: F401
from tests.test_json_keys import strange

BASELINE = {"samples": 2000, "exits": [1000, 600, 400], "labels": [800, 1200], "harm": 40}
NAMES = ["a cat", "dog, hound"]


@pytest.fixture
def baseline(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"what": "lgvit calibrate", "baseline": BASELINE, "label_names": NAMES}))
    return file


def answers(file, exits, samples=3000, columns=("path", "label", "exit_index", "error")):
    random = rng()
    rows = [
        {"path": f"{number}.png", "label": NAMES[random.random() < 0.6], "exit_index": int(index)}
        for number, index in enumerate(random.choice(3, samples, p=exits))
    ]
    write_predictions(file, [*rows, {"path": "bad.png", "error": "unreadable"}], columns, file.suffix)
    return [(row["exit_index"], row["label"], None) for row in rows]


@pytest.mark.version_independent
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_change_is_found_in_each_format(suffix, baseline, tmp_path, capsys):
    file, figures, plot = tmp_path / f"answers{suffix}", tmp_path / "drift.json", tmp_path / "drift.png"
    rows = answers(file, [0.65, 0.25, 0.1])
    assert list(read_answers(file)) == rows
    assert lgvit("drift", file, "--baseline", baseline, "--output", figures, "--plot", plot) == 1
    said, report = capsys.readouterr().out, json.loads(figures.read_text())
    assert "something has changed: alarm after" in said and "exit 0" in said and "label dog, hound" in said
    assert strange(report) == [] and report["alarm"] and report["samples"] == 3000
    assert [row["label"] for row in report["labels"]] == NAMES
    with Image.open(plot) as image:
        image.load()


@pytest.mark.version_independent
def test_no_change_is_no_alarm_and_audits_are_read(baseline, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    answers(file, [0.5, 0.3, 0.2])
    lines = [{**json.loads(line), "harm": number % 50 == 0} for number, line in enumerate(file.open())]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lgvit("drift", file, "--baseline", baseline, "--alpha", 1e-6) == 0
    assert "no alarm" in (said := capsys.readouterr().out) and "3,000 of the counted ones audited" in said


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.txt", "", "read from .parquet, .csv, .jsonl"),
        ("log.jsonl", "", "has no answers"),
        ("log.jsonl", '{"label": "a cat"}\n', "row 1: there is no 'exit_index'"),
        ("log.jsonl", '{"label": "a cat", "exit_index": 1}\n{"label\n', "row 2: no answer"),
        ("log.jsonl", '{"label": "a cat", "exit_index": "1"}\n', "exit_index='1'"),
        ("log.jsonl", "null", "row 1: no answer"),
        ("log.jsonl", '{"label": "bird", "exit_index": 1}\n', "label 'bird' is none of the baseline's"),
        ("log.jsonl", '{"label": "a cat", "exit_index": 3}\n', "exit_index=3 is none of the 3"),
        ("log.csv", "label,path\na cat,b\n", "row 1: there is no 'exit_index'"),
        ("log.csv", "path,exit_index\nb,1\n", "there is no 'label'"),
        ("log.parquet", "PAR", "no answer as lgvit predict writes it"),
    ],
)
def test_what_is_no_answers_is_one_line(name, content, message, baseline, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert lgvit("drift", tmp_path / name, "--baseline", baseline) == 2
    assert message in (said := capsys.readouterr().err) and len(said.splitlines()) == 1


@pytest.mark.version_independent
def test_old_and_nameless_baselines_are_refused(baseline, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    answers(file, [0.5, 0.3, 0.2], samples=5)
    old = Path(__file__).parent / "assets/fashion_vit_highway/calibration.json"
    assert lgvit("drift", file, "--baseline", old) == 2
    assert "lgvit calibrate CHECKPOINT --data DATA" in capsys.readouterr().err
    baseline.write_text(json.dumps({"baseline": BASELINE}))
    assert lgvit("drift", file, "--baseline", baseline) == 2
    assert "label_names must name the 2 labels" in capsys.readouterr().err
    assert lgvit("drift", file) == 2 and "needs --baseline" in capsys.readouterr().err
    assert lgvit("drift", file, "--baseline", baseline, "--alpha", 0) == 2


def test_a_model_calibrated_and_its_own_predictions(copy, tmp_path, capsys):  # noqa: F811
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.2) == 0
    assert sum(load_baseline(copy / "calibration.json")["labels"]) > 100
    predictions = tmp_path / "predictions.csv"
    assert lgvit("predict", copy, "digits", "--split", "test", "--output", predictions) == 0
    assert lgvit("drift", predictions, "--baseline", copy / "calibration.json", "--alpha", 1e-9) == 0
    assert set(read_answers(predictions)) and "no alarm" in capsys.readouterr().out
    assert set(COLUMNS) >= {"exit_index", "label"}
