"""The benchmark: its arithmetic on given times, what is counted, what its report holds and says."""

import copy
import json

import pytest
import torch

from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.benchmark import _accuracy, _of_batches, _of_exits, _Timing, benchmark
from lgvit_hf.evaluation.cost_table import CostTable
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.evaluation.exit_table import ExitTable, collect
from lgvit_hf.evaluation.profiling import peak_memory
from lgvit_hf.evaluation.report_text import benchmark_as_text, verdict
from lgvit_hf.evaluation.timing import PartTimes
from lgvit_hf.policies import NeverPolicy, build_policy
from lgvit_hf.segments import State
from tests.test_evaluation import in_a_gap
from tests.test_latency import tick
from tests.tiny import KINDS, NUM_BLOCKS, NUM_LABELS, tiny_dataset, tiny_images, tiny_model

version_independent = pytest.mark.version_independent

POSITIONS = [2, 3, 5]


# -- arithmetic ------------------------------------------------------------------------------------------------


def timing():
    """Two batches of two images; at the second the machine was twice as slow."""
    return _Timing(
        size=2,
        seconds={"early_exit": [[0.3, 0.2, 0.1], [0.8, 0.8, 0.8]], "backbone": [[0.4, 0.4, 0.5], [0.8, 0.9, 0.8]]},
        walks=[[PartTimes([[0.4], [0.4]], [0.0, 0.0], [0.0, 0.0])], [PartTimes([[1.0], [1.0]], [0.0] * 2, [0.0] * 2)]],
        exits_taken=[torch.tensor([0, 0]), torch.tensor([0, 1])],
    )


@version_independent
def test_times_are_brought_to_one_pace():
    # the backbone's medians are 0.4 and 0.8, so usually 0.6
    assert timing().paces == pytest.approx([1.5, 0.75])
    assert timing().of_batches("early_exit") == pytest.approx([0.3, 0.6])
    assert timing().of_batches("backbone") == pytest.approx([0.6, 0.6])
    first, second = timing().steady_walks()
    assert first.blocks == [pytest.approx([0.6])] * 2 and second.blocks == [pytest.approx([0.75])] * 2
    # of 0.4, 0.4, 0.5, 0.8, 0.8 and 0.9 s: quartiles 0.425 and 0.8 around 0.65
    assert timing().noise == pytest.approx(0.375 / 0.65)


@version_independent
def test_figures_of_a_batch_size():
    table = CostTable(
        batch_sizes=[1, 2],
        backbone_costs=[[0.1, 0.2], [0.2, 0.3]],
        heads=[[0.02, 0.04], [0.01, 0.01]],
        select=[[0.0, 0.05], [0.0, 0.0]],
        threads=1,
        device="cpu",
        model="by hand",
    )
    entry = _of_batches(2, timing(), [1, 3], table, [0])
    early, backbone = 450.0, 600.0
    assert entry["early_exit"]["mean_ms"] == pytest.approx(early)
    assert entry["early_exit"]["p50_ms"] == pytest.approx(550.0) and entry["early_exit"]["p99_ms"] <= 800.0
    assert entry["early_exit"]["images_per_second"] == pytest.approx(2 / 0.45)
    assert entry["backbone"]["mean_ms"] == pytest.approx(backbone)
    assert entry["static"] is None and entry["static_speed_up"] is None
    assert entry["wall_clock_speed_up"] == pytest.approx(backbone / early)
    assert entry["layer_speed_up"] == pytest.approx(3 * 4 / (1 + 1 + 1 + 3))
    # of two rows 3/4 leave at once: 200 + 40 for both, then a quarter of 300 + 10
    assert entry["ideal_ms"] == pytest.approx(240 + 310 / 4)
    assert entry["ideal_speed_up"] == pytest.approx(backbone / entry["ideal_ms"])
    assert entry["realised_over_ideal"] == pytest.approx(entry["ideal_ms"] / early)
    one, both = 2 * 3 / 4 * 1 / 4, 1 / 16
    assert entry["predicted_ms"] == pytest.approx(240 + one * (50 + 200 + 10) + both * 310)
    assert entry["predicted_over_measured"] == pytest.approx(entry["predicted_ms"] / early)
    assert entry["saved_share"] == pytest.approx(3 / 4 * 310 / 510)
    assert entry["heads_share"] == pytest.approx(40 / 510)


@version_independent
def test_latency_of_each_exit_is_of_single_images():
    one = _Timing(1, {"early_exit": [[0.1, 0.3], [0.2, 0.2], [0.7, 0.9]]}, [], list(torch.tensor([[0], [0], [2]])))
    exits = _of_exits([1, 2, 3], ["linear", "mlp", "final"], [0.5, 0.6, 0.7], one)
    assert [exit["samples"] for exit in exits] == [2, 0, 1]
    assert [exit["p50_ms"] for exit in exits] == [pytest.approx(200.0), None, pytest.approx(800.0)]
    assert exits[0]["p95_ms"] == pytest.approx(285.0)  # of 100, 200, 200 and 300
    assert [exit["p50_ms"] for exit in _of_exits([1, 3], ["linear", "final"], [0.5, 0.6], timing())] == [None, None]


@version_independent
def test_static_model_is_the_shallowest_that_is_as_accurate():
    sure, other = [9.0, 0.0], [0.0, 9.0]
    unsure = [0.1, 0.0]
    # of three rows of class 0: exit 0 has two right, exit 1 all, the final classifier two
    logits = torch.tensor([[sure, unsure, other], [sure, sure, sure], [sure, sure, other]])
    table = ExitTable(logits, labels=torch.tensor([0, 0, 0]), depths=[1, 2, 3])

    def static(policy):
        return _accuracy(table, build_policy(policy, 2))["static_exit"]

    assert static("never") == 0, "two of three are enough"
    assert static({"name": "fixed", "exit_index": 1}) == 1
    none = ExitTable(logits[[0, 2, 1]], labels=torch.tensor([0, 0, 0]), depths=[1, 2, 3])
    accuracy = _accuracy(none, build_policy("never", 2))
    assert accuracy["static_exit"] is None and accuracy["against"] == "full model"
    assert none.accuracies() == pytest.approx([2 / 3, 2 / 3, 1.0]) and accuracy["accuracy"] == 1.0


def test_peak_of_live_tensors():
    weight = torch.zeros(100)

    def run():
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        second.add_(1)
        return second[:10] * 2, weight[1:].view(-1)  # 4040; views take nothing

    assert peak_memory(run, torch.device("cpu")) == 8000
    assert peak_memory(lambda: weight.add_(0), torch.device("cpu")) == 0


@torch.no_grad()
def test_half_the_rows_take_half_the_memory():
    model = tiny_model("vit", exit_positions=[1], exit_types="linear")
    state, half = State({"pixel_values": tiny_images(8)}), State({"pixel_values": tiny_images(4)})
    whole, part = (
        peak_memory(lambda state=state: run_early(model.segments(), state, NeverPolicy()), torch.device("cpu"))
        for state in (state, half)
    )
    assert whole == pytest.approx(2 * part, rel=0.1)


# -- the report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked_at():
    """A model, and its table: under its policy a quarter of 20 rows or more leave at the first exit, or stay."""
    model = tiny_model("vit", exit_positions=POSITIONS)
    table = collect(model, tiny_dataset(20))
    model.set_exit_policy("confidence", threshold=in_a_gap(table.logits[0].softmax(-1).amax(-1)))
    return model, table


@pytest.fixture(scope="module")
def report(looked_at):
    """By a clock by which everything takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        tick(patch)
        return benchmark(looked_at[0], tiny_dataset(20), batch_sizes=[4, 1], repeats=2)


def test_report_is_json_and_complete(report, looked_at):
    assert json.loads(json.dumps(report)) == report
    assert [entry["batch_size"] for entry in report["batches"]] == [1, 4]
    assert [entry["num_batches"] for entry in report["batches"]] == [20, 5]
    for entry in report["batches"]:
        for run in ("early_exit", "backbone"):
            assert {entry[run][name] for name in ("p50_ms", "p95_ms", "p99_ms", "mean_ms")} == {1e3}
            assert entry[run]["images_per_second"] == entry["batch_size"]
        assert entry["wall_clock_speed_up"] == 1 and entry["noise"] == 0
        # the stem and the blocks, and every head on the way
        passed = [3 + 1, 4 + 2, 6 + 3, 7 + 4]
        ideal = (
            1e3 * sum(exit["samples"] * seconds for exit, seconds in zip(report["exits"], passed, strict=True)) / 20
        )
        assert entry["ideal_ms"] == pytest.approx(ideal) and entry["realised_over_ideal"] == pytest.approx(ideal / 1e3)
    shares = [exit["samples"] / 20 for exit in report["exits"]]
    # one image is let go whole or not at all
    assert report["batches"][0]["predicted_ms"] == pytest.approx(report["batches"][0]["ideal_ms"])
    table = CostTable(**report["cost_table"])
    assert report["batches"][1]["predicted_ms"] == pytest.approx(4 * table.mean_latency(shares, [0, 1, 2], 4))
    assert table.batch_sizes == [1, 2, 4] and table.backbone_costs == [[3.0] * 3, [1.0] * 3, [2.0] * 3, [1.0] * 3]
    assert report["environment"]["policy"] == looked_at[0].exit_policy.to_dict()
    assert report["environment"]["images"] == 20 and report["environment"]["dtype"] == "float32"


def test_report_says_where_rows_leave(report, looked_at):
    model, table = looked_at
    counts = torch.bincount(table.replay(model.exit_policy).exit_index, minlength=4).tolist()
    assert 5 <= counts[0] <= 15
    assert [exit["samples"] for exit in report["exits"]] == counts
    assert [exit["exit_layer"] for exit in report["exits"]] == [*POSITIONS, NUM_BLOCKS]
    assert [exit["p50_ms"] for exit in report["exits"]] == [1e3 if rows else None for rows in counts]
    layers = NUM_BLOCKS * 20 / sum(rows * depth for rows, depth in zip(counts, [*POSITIONS, NUM_BLOCKS], strict=True))
    assert [entry["layer_speed_up"] for entry in report["batches"]] == [pytest.approx(layers)] * 2
    assert report["accuracies"]["against"] == "labels" and report["accuracies"]["samples"] == 20
    assert [exit["accuracy_all"] for exit in report["exits"]] == pytest.approx(table.accuracies())


@pytest.mark.parametrize("kind", KINDS)
def test_profile_adds_up_to_the_model(kind, monkeypatch):
    tick(monkeypatch)
    model = tiny_model(kind, exit_positions=POSITIONS).train()
    report = benchmark(model, tiny_images(2), batch_sizes=[2], repeats=1)
    assert model.training, "the model is given back as it was"
    parameters, profile = report["parameters"], report["profile"]
    parts = parameters["stem"] + parameters["blocks"] + parameters["final"] + sum(parameters["heads"])
    assert parts == parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
    heads = [sum(parameter.numel() for parameter in head.parameters()) for head in model.exits]
    assert parameters["heads"] == heads
    order = [(row["part"].split()[0], row["depth"]) for row in profile]
    blocks = [("block", depth) for depth in range(1, NUM_BLOCKS + 1)]
    exits = [("exit", 2), ("exit", 3), ("exit", 5)]
    assert order == [
        ("stem", 0), *blocks[:2], exits[0], blocks[2], exits[1], *blocks[3:5], exits[2], blocks[5], ("final", 6)
    ]  # fmt: skip
    costs = model_macs(model)
    backbone = sum(row["macs"] for row in profile if row["part"] in ("stem", "block"))
    assert backbone == sum(costs.backbone_costs)
    assert [row["macs"] for row in profile if row["part"] not in ("stem", "block")] == costs.heads
    assert all(row["ms"] == {"1": 1e3, "2": 1e3} for row in profile)
    state = State({"pixel_values": tiny_images(2)})
    with torch.no_grad():
        memory = peak_memory(lambda: run_early(model.eval().segments(), state, NeverPolicy()), torch.device("cpu"))
    assert report["memory"]["batch_size"] == 2 and report["memory"]["backbone_bytes"] == memory
    assert report["accuracies"]["against"] == "full model" and report["accuracies"]["accuracy_full_model"] == 1.0
    assert report["exits"][0]["p50_ms"] is None, "single images were not timed"


def test_a_truncated_highway_has_one_exit_and_no_final_classifier():
    model = tiny_model("vit", exit_positions=POSITIONS).truncate(2)
    report = benchmark(model, tiny_images(2), batch_sizes=[1], repeats=1)
    assert report["profile"][-1]["part"] == "exit 0, attention_r2" and report["parameters"]["final"] == 0
    assert len(report["exits"]) == 1 and report["batches"][0]["layer_speed_up"] == 1.0
    assert "exit 0, attention_r2" in benchmark_as_text(report)


@version_independent
def test_accuracies_of_another_table(monkeypatch):
    tick(monkeypatch)
    model = tiny_model("vit", exit_positions=[2])
    logits = torch.zeros(2, 50, NUM_LABELS)
    logits[:, :, 1] = 9.0
    table = ExitTable(logits, labels=torch.ones(50, dtype=torch.long), depths=[2, NUM_BLOCKS])
    report = benchmark(model, tiny_images(2), batch_sizes=[1], repeats=1, table=table)
    assert report["accuracies"]["samples"] == 50 and report["accuracies"]["static_exit"] == 0
    assert report["batches"][0]["static_speed_up"] == 1


@version_independent
def test_images_are_drawn_at_random_but_always_the_same():
    model, rows = tiny_model("vit", exit_positions=[2]), tiny_dataset(12)
    shown = []

    def progress(jobs):
        jobs = list(jobs)
        shown.extend(batch for size, batch in jobs if size == 1)
        return jobs

    for _ in range(2):
        benchmark(model, rows, batch_sizes=[1], repeats=1, limit=5, progress=progress)
    torch.testing.assert_close(torch.cat(shown[:5]), torch.cat(shown[5:]))
    assert len(shown) == 10
    first = torch.stack([row["pixel_values"] for row in rows[:5]])
    assert not torch.equal(torch.cat(shown[:5]).sum(0), first.sum(0)), "not merely the first five"


@version_independent
@pytest.mark.parametrize("sizes", [[0], [1, 8], []])
def test_batches_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="must be from 1 to the number of images, 4; give more"):
        benchmark(tiny_model("vit", exit_positions=[2]), tiny_images(4), batch_sizes=sizes)


# -- words -----------------------------------------------------------------------------------------------------


def told(report, **changes):
    """The verdict on the report's first batch size with some figures changed."""
    quiet = {"wall_clock_speed_up": 1.25, "predicted_over_measured": 1.0, "noise": 0.01, "static": None}
    quiet |= {"static_speed_up": None, "layer_speed_up": 1.5, "realised_over_ideal": 0.875}
    quiet |= {"ideal_speed_up": 1.4, "heads_share": 0.1, "saved_share": 0.4}
    report = copy.deepcopy(report)
    report["batches"] = [{**report["batches"][0], **quiet, **changes}]
    report["accuracies"] |= {"samples": 20, "accuracy": 0.85, "accuracy_full_model": 0.9}
    return report


@version_independent
def test_what_is_gained(report):
    assert verdict(told(report)) == [
        "of 20 images early exit answers 85.0% rightly, the full model 90.0%",
        "at batch size 1 early exit is 1.25x as fast as the backbone (1.50x by blocks run), 88% of the ideal",
    ]


@version_independent
def test_without_labels_it_is_agreement(report):
    report = told(report)
    report["accuracies"]["against"] = "full model"
    assert verdict(report)[0] == "early exit agrees with the full model on 85.0% of 20 images"


@version_independent
def test_why_early_exit_loses(report):
    loss = "at batch size 1 early exit is slower than the backbone: 0.93x, because "
    lines = verdict(told(report, wall_clock_speed_up=0.93, heads_share=0.35, saved_share=0.3))
    assert lines[1] == loss + "evaluating the heads adds 35% of its time, and the blocks not run save 30%"
    lines = verdict(told(report, wall_clock_speed_up=0.93))
    assert lines[1].startswith(loss + "fewer samples do not take proportionately less time: it would be 1.40x")


@version_independent
def test_a_static_model_that_is_faster(report):
    report = told(report, static={"mean_ms": 1.0}, static_speed_up=1.5)
    report["accuracies"]["static_exit"], report["exits"][1]["accuracy_all"] = 1, 0.86
    assert verdict(report)[2:] == [
        "at batch size 1 the static model that ends at exit 1, depth 3, is faster and no less accurate: 1.50x, "
        "accuracy 86.0%"
    ]
    report["batches"][0]["static_speed_up"] = 1.2
    assert len(verdict(report)) == 2


@version_independent
def test_predictions_and_noise(report):
    early = {**report["batches"][0]["early_exit"], "mean_ms": 4.0}
    off = {"predicted_over_measured": 1.2, "predicted_ms": 4.8, "early_exit": early}
    assert verdict(told(report, **off))[2:] == [
        "at batch size 1 the cost table does not hold: it predicts 4.80 ms, and 4.00 ms were measured"
    ]
    lines = verdict(told(report, **off, noise=0.3))[2:]
    assert len(lines) == 1 and "the machine was too busy to trust this" in lines[0] and "30%" in lines[0]


@version_independent
def test_text_holds_the_figures_side_by_side(report):
    report = told(report, static=report["batches"][0]["backbone"], static_speed_up=1.11)
    report["accuracies"]["static_exit"], report["environment"]["policy"]["threshold"] = 1, 0.61234
    text = benchmark_as_text(report)
    early = next(line for line in text.splitlines() if "early exit   " in line)
    assert early.endswith("1.25x          1.50x") and early.lstrip().startswith("1  early exit")
    alone = next(line for line in text.splitlines() if "exit 1 alone" in line)
    assert alone.endswith("1.11x          2.00x")
    assert "exit 0, conv1_1" in text and "policy confidence: threshold 0.6123;" in text
    assert text.endswith(verdict(report)[-1])
    assert max(map(len, text.splitlines())) < 180
