"""A sweep says what a replay says, and keeps what is done, whatever stops it."""

import json

import pytest
import torch

from lgvit_hf import ExitTable
from lgvit_hf.cli import main
from lgvit_hf.commands.compare import PAPERS, run_compare
from lgvit_hf.costs import Costs
from lgvit_hf.evaluation.sweep import sweep, threshold_curve


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


def test_equal_policies_are_run_once(tmp_path):
    rows = sweep(a_table(), [*POLICIES, *POLICIES], tmp_path / "sweep.jsonl", what=WHAT)
    assert len(rows) == 2 * len(POLICIES)
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1 + len(POLICIES)


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


# -- beside published figures ----------------------------------------------------------------------------------


def test_a_sweep_stands_beside_published_figures_at_the_same_speed_up(tmp_path, capsys):
    table = a_table()
    rows = sweep(table, POLICIES, tmp_path / "sweep.jsonl", what=WHAT)
    table.save(tmp_path / "table.safetensors")
    found = run_compare(str(tmp_path), "lgvit")
    assert [row["published"] for row in found] == [a for figures in PAPERS["lgvit"] for a, _ in figures.points]
    speeds = [row["layer_speed_up"] for row in rows]
    reached = [row for row in found if min(speeds) <= row["layer_speed_up"] <= max(speeds)]
    assert reached
    for row in reached:
        below = max(
            (r for r in rows if r["layer_speed_up"] <= row["layer_speed_up"]), key=lambda r: r["layer_speed_up"]
        )
        above = min(
            (r for r in rows if r["layer_speed_up"] >= row["layer_speed_up"]), key=lambda r: r["layer_speed_up"]
        )
        lines = sorted([below["accuracy"], above["accuracy"]])
        assert lines[0] - 1e-9 <= row["ours"] <= lines[1] + 1e-9
        drop = table.accuracies()[-1] - row["ours"]
        assert row["difference"] == pytest.approx(drop - (0.908 - row["published"]))
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "compared.json")]) == 0
    assert "EEVIT" in capsys.readouterr().out
    assert json.loads((tmp_path / "compared.json").read_text()) == found


def test_nothing_to_compare_is_said(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "no sweep.jsonl there" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), "--paper", "resnet"]) == 2
    assert "'resnet' must be one of lgvit" in capsys.readouterr().err
