"""`lgvit report`: its figures are those of `lgvit evaluate`, and in a browser the page shows them."""

import json
import re

import pytest
import torch

from lgvit_hf import CostTable, ExitTable
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.report_page import report_data
from lgvit_hf.pages import page as page_of
from lgvit_hf.policies import build_policy
from tests.browser import needs_browser, open_page
from tests.seeds import generator
from tests.test_evaluation_commands import checkpoint, copy, lgvit  # noqa: F401

pytestmark = pytest.mark.version_independent
# a class that would run a script, were it read as HTML
SCRIPT = "<img src=x onerror=window.hacked=1></script><script>window.hacked=1</script>"


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def evaluated(model, policy, tmp_path):
    """What `lgvit evaluate` says of a policy with one threshold."""
    words = ["--policy", policy["name"], "--threshold", policy["threshold"], "--timed-batch-sizes", 4]
    assert lgvit("evaluate", model, "--data", "digits", *words, "--output", tmp_path / "results.json") == 0
    return json.loads((tmp_path / "results.json").read_text())


@pytest.fixture
def calibrated(copy):  # noqa: F811
    """A checkpoint with a ladder."""
    asked = ["--data", "digits", "--policy", "confidence", "--max-accuracy-drop", 0.3, "--delta", 0.2]
    assert lgvit("calibrate", copy, *asked) == 0
    return copy


@pytest.fixture
def hostile(calibrated, tmp_path):
    """Its report, whose fourth class is called as an attacker would, as a file and as data."""
    file = tmp_path / "report.html"
    assert lgvit("report", calibrated, "--data", "digits", "--output", file) == 0
    data = data_of(file.read_text())
    data["class_names"][3] = data["model"] = SCRIPT
    file.write_text(page_of("report.html", data))
    return file, data


def test_figures_are_those_of_evaluate(copy, tmp_path, capsys):  # noqa: F811
    words = ["--data", "digits", "--table", tmp_path / "table.safetensors"]
    assert lgvit("report", copy, *words, "--output", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert "settings on 360 test samples" in capsys.readouterr().out and (tmp_path / "table.safetensors").exists()
    assert len(page) < 2e6 and not re.findall(r'(?:src|href)="|@import|https?://(?!www\.w3\.org)', page)
    data = data_of(page)
    steps = data["modes"][0]["settings"]
    assert [mode["name"] for mode in data["modes"]] == ["One threshold", "The saved policy"]
    for step in (steps[0], steps[len(steps) // 2], steps[-1]):
        report = evaluated(copy, step["policy"], tmp_path)
        for name in ("accuracy", "mean_depth", "layer_speed_up", "mean_macs", "macs_speed_up"):
            assert step[name] == pytest.approx(report["overall"][name], abs=1e-12), name
        assert step["cost"] == pytest.approx(report["overall"]["mean_macs"] / 1e6)
        for ours, theirs in zip(step["exits"], report["exits"], strict=True):
            assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
        for index, samples, accuracy, _, precision, early, depth in step["classes"]:
            row = report["classes"][index]
            assert [samples, accuracy, precision] == [row["samples"], row["accuracy"], row["precision"]]
            assert [early, depth] == [row["early_share"], row["mean_depth"]]
        bins = [bin and [bin["samples"]] for bin in report["reliability"][0]["reliability_exited"] if bin["samples"]]
        shown = data["diagrams"][step["exits"][0]["reliability_exited"]]
        assert [bin[:1] for bin in shown if bin] == bins
    assert steps[-1]["accuracy"] == data["full_accuracy"] and steps[-1]["agreement"][0][1] == 0


def test_certified_ladder_and_hostile_class_names(calibrated, hostile):
    page, data = hostile[0].read_text(), hostile[1]
    assert SCRIPT not in page and page.count("</script>") == 2 and data_of(page) == data
    report = json.loads((calibrated / "calibration.json").read_text())
    assert data["modes"][1]["name"] == "The certified ladder" and data["calibration"]["delta"] == 0.2
    steps, ladder = data["modes"][1]["settings"], report["ladder"]
    assert [steps[0]["policy"], steps[-1]["policy"]] == [ladder[-1]["policy"], ladder[0]["policy"]]
    assert [step["calibrated_accuracy"] for step in (steps[0], steps[-1])] == [
        ladder[-1]["accuracy"],
        ladder[0]["accuracy"],
    ]


def test_what_is_wrong_with_it_is_said(calibrated, tmp_path, capsys):
    words = ["report", calibrated, "--data", "digits", "--output"]
    assert lgvit(*words, tmp_path) == 2 and "is a folder; give the page's file name" in capsys.readouterr().err
    (tmp_path / "costs.json").write_text("{}")
    costs = ["--cost-table", tmp_path / "costs.json"]
    assert lgvit(*words, tmp_path / "a.html", *costs) == 2 and "is not a cost table" in capsys.readouterr().err
    report = json.loads((calibrated / "calibration.json").read_text())
    (calibrated / "calibration.json").write_text(json.dumps({**report, "temperatures": [1.0]}))
    assert lgvit(*words, tmp_path / "a.html") == 2
    assert "calibration.json is of 1 exits" in capsys.readouterr().err and not (tmp_path / "a.html").exists()


def test_many_classes_and_exits_stay_small():
    """12 exits and 1,000 classes: no more than the page's tables show is written down."""
    from PIL import Image

    numbers = generator()
    logits, labels = 3 * torch.randn(12, 150, 1000, generator=numbers), torch.arange(150) * 2
    table = ExitTable(logits, labels, list(range(1, 13)), Costs([1e6] * 12, [1e3] * 12))
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    names = [f"class number {index}" for index in range(1000)]
    policy = build_policy({"name": "patience", "patience": 2}, 11)
    sizes, backbone = [1, 4], [[0.001 * index, 0.002 * index] for index in range(1, 13)]
    costs = CostTable(sizes, backbone, [[0.001, 0.002]] * 12, [[0.001, 0.001]] * 12, 1, "cpu", "an example")
    words = {"command": ["lgvit"], "cost_table": costs, "batch_size": 4}
    data = report_data(table, policy, names, ["linear"] * 12, lambda index: noise, **words)
    assert len(json.dumps(data)) < 1.9e6
    assert all(len(step["classes"]) <= 40 for mode in data["modes"] for step in mode["settings"])
    saved = data["modes"][-1]["settings"][0]
    shares = [exit["share"] for exit in saved["exits"]]
    assert saved["cost"] == costs.mean_latency(shares, range(11), 4) and data["cost"]["unit"] == "ms"
    assert data["cost"]["full"] == costs.mean_latency([0.0] * 11 + [1.0], [], 4)
    assert saved["policy"]["name"] == "patience" and saved["copy"].endswith("lgvit --policy patience --patience 2")


@pytest.mark.slow
@needs_browser
def test_in_a_browser(calibrated, hostile, tmp_path):
    """Opened as a file: the slider moves the point, figures are those of `lgvit evaluate`, no class name is run."""
    file, data = hostile
    steps = data["modes"][0]["settings"]
    with open_page(f"file://{file}") as (page, errors):
        assert "early-exit report" in page.title()
        seen = set()
        for step in (0, len(steps) // 2, len(steps) - 1):
            page.locator("#slider").fill(str(step))
            overall = evaluated(calibrated, steps[step]["policy"], tmp_path)["overall"]
            assert page.inner_text("#accuracy").startswith(f"{100 * overall['accuracy']:.2f}\u00a0%")
            assert f"{overall['backbone_macs'] / overall['mean_macs']:.2f}x" in page.inner_text("#cost")
            assert page.inner_text("#depth").startswith(f"{overall['mean_depth']:.2f}")
            seen.add((page.get_attribute("#point", "cx"), page.get_attribute("#point", "cy")))
        assert len(seen) == 3
        assert SCRIPT in page.inner_text("#classes") and page.inner_text("#model") == SCRIPT
        page.get_by_label("The certified ladder").check()
        assert "rung" in page.inner_text("#position")
        page.locator("#which").select_option("1")
        page.locator("#slider").press("End")
        assert page.evaluate("window.hacked") is None and not errors, errors


@pytest.mark.slow
@needs_browser
def test_fits_a_phone(hostile):
    with open_page(f"file://{hostile[0]}", size=(390, 844)) as (page, errors):
        assert page.evaluate("document.documentElement.scrollWidth") == 390 and not errors
