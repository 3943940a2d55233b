"""One vocabulary for the keys of every JSON that a command writes, and the kind of value of each."""

import json
from numbers import Real
from pathlib import Path

import pytest

from lgvit_hf import CostTable
from lgvit_hf.hub.card import read_report
from lgvit_hf.hub.report_keys import OLD_KEYS, current_names
from tests.test_evaluation_commands import checkpoint, copy, lgvit  # noqa: F401

ASSETS = Path(__file__).parent / "assets"
pytestmark = pytest.mark.version_independent


def count(value):
    return type(value) is int and value >= 0


def share(value):
    return number(value) and 0 <= value <= 1


def number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def text(value):
    return isinstance(value, str)


def mapping(value):
    return isinstance(value, dict)


def list_of(kind):
    return lambda value: isinstance(value, list) and all(map(kind, value))


def either(*kinds):
    return lambda value: any(kind(value) for kind in kinds)


def nothing(value):
    return value is None


def exit_or_index(value):
    """An exit with its figures, or its index where only the choice is told."""
    return mapping(value) or count(value)


VOCABULARY = {
    # samples and classes
    "samples": count,
    "samples_tested": count,
    "images": count,
    "classes": list_of(mapping),
    "confusion": list_of(list_of(count)),
    "name": text,
    "precision": either(share, text, nothing),  # of a class; of exported weights
    "early_share": either(share, nothing),
    # exits
    "exits": list_of(exit_or_index),
    "exit_index": count,
    "exit_layer": count,
    "static_exit": either(count, nothing),
    "head": text,
    "share": either(share, nothing),
    "shares": list_of(share),
    # accuracy and calibration
    "accuracy": either(share, nothing),
    "accuracy_exited": either(share, nothing),
    "accuracy_all": either(share, nothing),
    "accuracy_full_model": either(share, nothing),
    "full_accuracy": share,
    "accuracies": mapping,
    "against": text,
    "overall": mapping,
    "confidence": either(share, nothing),
    "reliability": list_of(mapping),
    "reliability_all": list_of(mapping),
    "reliability_exited": list_of(mapping),
    "calibration_error_all": either(share, nothing),
    "calibration_error_exited": either(share, nothing),
    "calibration_errors": list_of(mapping),
    "before": either(share, mapping),  # a calibration error, or what a policy did
    "after": either(share, mapping),
    "exited": either(share, nothing),
    "temperatures": list_of(number),
    "frontier": list_of(mapping),
    "bound": text,
    "delta": either(share, nothing),
    "guaranteed_drop": either(share, nothing),
    "max_accuracy_drop": either(share, nothing),
    "ladder": list_of(mapping),
    # drift
    "baseline": mapping,
    "labels": list_of(either(count, mapping)),
    "label_names": list_of(text),
    "harm": either(count, mapping),
    "alpha": share,
    "alarm": lambda value: type(value) is bool,
    "alarm_at": either(count, nothing),
    "p_value": share,
    "since": count,
    "audited": count,
    "baseline_share": share,
    "label": text,
    # depth and cost
    "depth": count,  # blocks until the end of a part
    "mean_depth": either(number, nothing),
    "layer_speed_up": number,
    "macs": number,
    "head_macs": number,
    "mean_macs": number,
    "full_macs": number,
    "backbone_macs": number,
    "macs_speed_up": number,
    "mean_latency": either(number, nothing),
    "full_latency": either(number, nothing),
    "backbone_costs": list_of(list_of(number)),
    "heads": list_of(either(count, list_of(number))),  # parameters, or seconds by batch size
    "select": list_of(list_of(number)),
    # wall-clock
    "batch_size": count,
    "batch_sizes": list_of(count),
    "timed_batch_sizes": list_of(count),
    "num_batches": count,
    "batches": list_of(mapping),
    "wall_clock": mapping,
    "early_exit": mapping,
    "backbone": mapping,
    "static": either(mapping, nothing),
    "early_exit_seconds": number,
    "backbone_seconds": either(number, nothing),
    "wall_clock_speed_up": either(number, nothing),
    "static_speed_up": either(number, nothing),
    "ideal_speed_up": number,
    "speed_up": number,
    "int8_p50_ms": number,
    "against_int8": mapping,
    "ideal_ms": number,
    "predicted_ms": number,
    "p50_ms": either(number, nothing),
    "p95_ms": either(number, nothing),
    "p99_ms": either(number, nothing),
    "mean_ms": number,
    "images_per_second": number,
    "realised_over_ideal": number,
    "predicted_over_measured": number,
    "saved_share": number,
    "heads_share": number,
    "noise": number,
    "cost_table": mapping,
    # parts
    "profile": list_of(mapping),
    "part": text,
    "parameters": either(count, mapping, nothing),
    "ms": mapping,
    "memory": either(mapping, nothing),
    "early_exit_bytes": count,
    "backbone_bytes": count,
    "stem": count,
    "blocks": count,
    "final": count,
    "total": count,
    # of what, and with what
    "what": text,
    "data": text,
    "seed": count,
    "validation_share": share,
    "warning": either(text, nothing),
    "split": text,
    "splits": mapping,
    "judged": mapping,
    "ranges": mapping,
    "thresholds": mapping,
    "recalibration": mapping,
    "weights": either(text, nothing),
    "policy": lambda value: mapping(value) and text(value.get("name")),
    "ensemble": either(mapping, nothing),
    "environment": mapping,
    "exported": either(mapping, nothing),
    "model": text,
    "image_size": either(count, list_of(count)),
    "dtype": text,
    "device": text,
    "processor": text,
    "threads": count,
    "torch": text,
    "transformers": text,
    "repeats": count,
    # beside published figures
    "source": text,
    "published": share,
    "published_drop": number,
    "ours": either(share, nothing),
    "drop": either(number, nothing),
    "difference": either(number, nothing),
}
# their keys are batch sizes
BY_BATCH_SIZE = {"wall_clock", "ms"}


def strange(content, where="report"):
    """Every key that the vocabulary does not have, and every value of another kind than it says."""
    if isinstance(content, list):
        return [line for index, value in enumerate(content) for line in strange(value, f"{where}[{index}]")]
    if not isinstance(content, dict):
        return []
    lines = []
    for key, value in content.items():
        here = f"{where}.{key}"
        if key not in VOCABULARY:
            lines.append(f"{here} is no word of the vocabulary")
        elif not VOCABULARY[key](value):
            lines.append(f"{here} is {value!r}")
        elif key in BY_BATCH_SIZE:
            assert all(size.isdigit() for size in value)
            lines += strange(list(value.values()), here)
        elif key not in ("policy", "ensemble"):  # their settings are their own
            lines += strange(value, here)
    return lines


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_evaluate(checkpoint, tmp_path):  # noqa: F811
    file = tmp_path / "results.json"
    given = ["--data", "digits", "--policy", "confidence", "--threshold", 0.6, "--timed-batch-sizes", 4]
    assert lgvit("evaluate", checkpoint, *given, "--output", file) == 0
    assert strange(read(file)) == []


def test_benchmark_and_its_cost_table(checkpoint, tmp_path):  # noqa: F811
    file, costs = tmp_path / "results.json", tmp_path / "costs.json"
    given = ["--data", "digits", "--batch-sizes", 1, 4, "--repeats", 1, "--limit", 8, "--policy", "confidence"]
    assert lgvit("benchmark", checkpoint, *given, "--threshold", 0.6, "--output", file, "--cost-table", costs) == 0
    assert strange(read(file)) == strange(read(costs)) == []
    assert {part["part"].split()[0] for part in read(file)["profile"]} == {"stem", "block", "exit", "final"}


def test_calibrate(copy):  # noqa: F811
    assert lgvit("calibrate", copy, "--data", "digits", "--max-accuracy-drop", 0.2) == 0
    report = read(copy / "calibration.json")
    assert strange(report) == [] and report["samples_tested"] < report["samples"]


def test_sweep_and_compare(checkpoint, tmp_path):  # noqa: F811
    given = ["--data", "digits", "--values", 0.0, 0.5, 1.0, "--timed-batch-sizes", 4]
    assert lgvit("sweep", checkpoint, *given, "--output", tmp_path / "sweep") == 0
    lines = (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()
    assert len(lines) == 4 and strange([json.loads(line) for line in lines]) == []
    assert lgvit("compare", tmp_path / "sweep", "--output", tmp_path / "compared.json") == 0
    compared = read(tmp_path / "compared.json")
    assert len(compared) == 4 and strange(compared) == []


def test_a_sweep_with_old_keys_goes_on(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    given = ["sweep", checkpoint, "--data", "digits", "--output", tmp_path]
    assert lgvit(*given, "--values", 0.5) == 0
    file = tmp_path / "sweep.jsonl"
    first, *rows = file.read_text().splitlines()
    old = first.replace('"samples"', '"rows"')
    assert old != first
    file.write_text("\n".join([old, *rows, ""]))
    assert lgvit(*given, "--values", 0.5, 0.9) == 0
    assert file.read_text().splitlines()[:2] == [old, *rows] and len(file.read_text().splitlines()) == 3


def test_old_keys_are_read():
    old = {
        "what": "lgvit benchmark",
        "accuracy": {"rows": 5, "early_exit": 0.5, "full_model": 0.6, "exits": [0.4, 0.6], "static_exit": None},
        "exits": [{"exit_index": 0, "depth": 2, "head": "linear", "rows": 3}],
        "environment": {"policy": {"name": "mine", "rows": 2, "n": 1}},
        "profile": [{"part": "stem", "depth": 0}],
    }
    new = current_names(old)
    assert new["accuracies"] == {
        "samples": 5, "accuracy": 0.5, "accuracy_full_model": 0.6, "exits": [0.4, 0.6], "static_exit": None
    }  # fmt: skip
    assert new["exits"] == [{"exit_index": 0, "exit_layer": 2, "head": "linear", "samples": 3}]
    assert new["environment"] == old["environment"] and new["profile"] == old["profile"]
    assert current_names({"rows": 9, "n": 4, "policy": {"rows": 1}}) == {
        "samples": 9, "samples_tested": 4, "policy": {"rows": 1}
    }  # fmt: skip


def test_no_old_key_is_a_word_of_today():
    assert not set(OLD_KEYS) & set(VOCABULARY) and set(OLD_KEYS.values()) <= set(VOCABULARY)


def test_a_cost_table_with_old_keys_is_read(tmp_path):
    times = [[0.001], [0.002]]
    table = CostTable([1], times, times, times, 1, "cpu", "a model")
    table.save(tmp_path / "costs.json")
    old = read(tmp_path / "costs.json")
    old["trunks"] = old.pop("backbone_costs")
    (tmp_path / "costs.json").write_text(json.dumps(old))
    assert CostTable.load(tmp_path / "costs.json") == table


def test_the_test_sees_a_strange_key_and_a_wrong_kind():
    assert len(strange({"rows": 3, "samples": "3", "exits": [{"accuracy": 2.0}], "ms": {"1": 0.5}})) == 3


@pytest.mark.parametrize("name", ["evaluation", "benchmark", "calibration"])
def test_reports_of_the_reference_model_are_read_in_the_words_of_today(name):
    report = read_report(ASSETS / "fashion_vit_highway" / f"{name}.json")
    assert [line for line in strange(report) if "accuracies.exits" not in line] == []
