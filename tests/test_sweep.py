"""A sweep says what a replay says, and keeps what is done, whatever stops it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lgvit_hf import ExitTable
from lgvit_hf.cli import main
from lgvit_hf.cli.compare import PAPERS, compare
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.sweep import sweep, threshold_curve
from tests.seeds import rng

version_independent = pytest.mark.version_independent


def a_table():
    """Random answers whose confidence, at every exit, is spread evenly from 0.26 to 0.99 over the samples."""
    numbers = rng()
    confidence = torch.tensor(numbers.permuted(np.tile(np.linspace(0.26, 0.99, 40), (3, 1)), axis=1))
    answers, labels = (torch.tensor(numbers.integers(4, size=size)) for size in ((3, 40), 40))
    # the other three classes have logits of 0
    logits = F.one_hot(answers, 4) * torch.log(3 * confidence / (1 - confidence))[..., None]
    return ExitTable(logits.float(), labels, [1, 2, 4], Costs([4.0, 4, 8], [1.0, 1, 1]))


POLICIES = [{"name": "confidence", "threshold": step / 10} for step in range(3, 10)]
WHAT = {"what": "lgvit sweep", "samples": 40}


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


@version_independent
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


@version_independent
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


@version_independent
def test_equal_policies_are_run_once(tmp_path):
    rows = sweep(a_table(), [*POLICIES, *POLICIES], tmp_path / "sweep.jsonl", what=WHAT)
    assert len(rows) == 2 * len(POLICIES)
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1 + len(POLICIES)


@version_independent
def test_file_of_another_sweep(tmp_path):
    file = tmp_path / "sweep.jsonl"
    sweep(a_table(), POLICIES, file, what=WHAT)
    with pytest.raises(ValueError, match="holds a sweep with another samples; choose another output"):
        sweep(a_table(), POLICIES, file, what={**WHAT, "samples": 41})
    file.write_text("no JSON\n")
    with pytest.raises(ValueError, match="is not a sweep's file"):
        sweep(a_table(), POLICIES, file, what=WHAT)


@version_independent
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
    found = compare(str(tmp_path), "lgvit")
    assert [row["published"] for row in found] == [a for figures in PAPERS["lgvit"] for a, _ in figures.points]
    # where settings are equally fast, the best counts
    best = {r["layer_speed_up"]: r["accuracy"] for r in sorted(rows, key=lambda r: r["accuracy"])}
    assert min(best) < 1.48 and max(best) > 2.08, "every published figure lies between two settings"
    for row in found:
        ours = np.interp(row["layer_speed_up"], sorted(best), [best[speed] for speed in sorted(best)])
        assert row["ours"] == pytest.approx(ours)
        drop = table.accuracies()[-1] - row["ours"]
        assert row["difference"] == pytest.approx(drop - (0.908 - row["published"]))
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "compared.json")]) == 0
    assert "EEVIT" in capsys.readouterr().out
    assert json.loads((tmp_path / "compared.json").read_text()) == found
    # a sweep of one setting reaches no published figure
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (WHAT, rows[0])))
    assert [row["ours"] for row in compare(str(tmp_path), "lgvit")] == [None] * len(found)


@version_independent
def test_nothing_to_compare_is_said(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "no sweep.jsonl there" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), "--paper", "resnet"]) == 2
    assert "'resnet' must be one of lgvit" in capsys.readouterr().err
