"""Tables, costs and metrics, each against a count by hand."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from lgvit_hf.engine import Answers
from lgvit_hf.evaluation import timing
from lgvit_hf.evaluation.benchmark import wall_clock_speed_up
from lgvit_hf.evaluation.costs import Costs, count_macs, model_macs
from lgvit_hf.evaluation.exit_table import ExitTable, collect
from lgvit_hf.evaluation.metrics import layer_speed_up, summarise
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.segments import State
from tests.tiny import KINDS, NUM_BLOCKS, NUM_LABELS, tiny_dataset, tiny_images, tiny_model

version_independent = pytest.mark.version_independent

POSITIONS = [2, 3, 5]


# -- tables ----------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """A dataset that is no list."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def in_a_gap(scores):
    """A number that about half of the scores are above, and none near."""
    ranked = scores.sort().values
    middle = ranked[len(ranked) // 4 : -len(ranked) // 4]
    widest = (middle[1:] - middle[:-1]).argmax()
    return middle[widest : widest + 2].mean().item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_table_holds_every_exit_and_replays_the_model(kind):
    model, rows = tiny_model(kind, exit_positions=POSITIONS), tiny_dataset(21)
    model.train()
    table = collect(model, Rows(rows), batch_size=8)
    assert model.training, "collect gives the model back as it was"
    model.eval()
    images = torch.stack([row["pixel_values"] for row in rows])
    everything = model(images, early_exit=False)
    torch.testing.assert_close(table.logits, torch.stack(everything.exit_logits), rtol=1e-4, atol=1e-5)
    assert table.labels.tolist() == [row["labels"] for row in rows] and len(table) == 21
    assert table.depths == [*POSITIONS, NUM_BLOCKS]

    # at least a quarter of all rows leave at the first exit that they come to, and at least a quarter go on
    policy = {"name": "confidence", "threshold": list(map(in_a_gap, table.logits[:-1].softmax(-1).amax(-1)))}
    model.set_exit_policy(policy)
    for bounds in ({}, {"max_depth": 4}, {"min_depth": 3}):
        replayed, run = table.replay(policy, **bounds), model(images, **bounds)
        assert len(set(run.exit_index.tolist())) > 1
        assert replayed.exit_layer.tolist() == run.exit_layer.tolist()
        torch.testing.assert_close(replayed.logits, run.logits, rtol=1e-4, atol=1e-5)


def test_table_of_a_half_precision_model_is_float32():
    table = collect(tiny_model("vit", exit_positions=POSITIONS).bfloat16(), tiny_dataset(3))
    assert table.logits.dtype == torch.float32 and table.logits.shape == (4, 3, NUM_LABELS)


def by_hand():
    """Three exits, four rows, two labels; the table and what leaves under confidence 0.9."""
    sure, unsure = [5.0, 0.0], [0.1, 0.0]
    other, unsure_other = [0.0, 5.0], [0.0, 0.1]
    logits = torch.tensor(
        [
            [sure, unsure, unsure_other, other],
            [sure, sure, unsure_other, sure],
            [other, sure, other, sure],
        ]
    )
    return ExitTable(logits, labels=torch.tensor([0, 0, 1, 0]), depths=[1, 2, 4])


@version_independent
def test_replay_by_hand():
    answers = by_hand().replay({"name": "confidence", "threshold": 0.9})
    assert answers.exit_index.tolist() == [0, 1, 2, 0] and answers.exit_layer.tolist() == [1, 2, 4, 1]
    assert answers.logits.argmax(-1).tolist() == [0, 0, 1, 1]
    expected = 1 / (1 + math.exp(-5))
    assert answers.exit_score.tolist() == pytest.approx([expected] * 4)
    assert by_hand().accuracies() == [3 / 4, 1.0, 3 / 4]


@version_independent
def test_replay_checks_the_policy():
    with pytest.raises(ValueError, match="threshold has 3 values.*2 exits"):
        by_hand().replay({"name": "confidence", "threshold": [0.5] * 3})


# -- metrics ---------------------------------------------------------------------------------------------------


def test_summary_by_hand():
    table = by_hand()
    costs = Costs(backbone_costs=[10.0, 20.0, 40.0], heads=[1.0, 2.0, 3.0])
    answers = table.replay({"name": "confidence", "threshold": 0.9})
    summary = summarise(table, answers, costs, ["linear", "mlp", "final"])
    macs = [10 + 1, 10 + 1 + 20 + 2, 10 + 1 + 20 + 2 + 40 + 3]
    sure, unsure = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(-0.1))
    expected = [
        {
            "exit_layer": position,
            "head": head,
            "samples": rows,
            "share": rows / 4,
            "accuracy_exited": leaving,
            "accuracy_all": accuracy,
            "calibration_error_exited": error_exited,
            "calibration_error_all": error_all,
            "macs": spent,
            "head_macs": head_macs,
        }
        for position, head, rows, leaving, accuracy, error_exited, error_all, spent, head_macs in [
            (1, "linear", 2, 0.5, 0.75, sure - 0.5, (2 * (sure - 0.5) + 2 * (1 - unsure)) / 4, macs[0], 1.0),
            (2, "mlp", 1, 1.0, 1.0, 1 - sure, (3 * (1 - sure) + 1 - unsure) / 4, macs[1], 2.0),
            (4, "final", 1, 1.0, 0.75, 1 - sure, sure - 0.75, macs[2], 3.0),
        ]
    ]
    assert len(summary["exits"]) == 3
    for entry, figures in zip(summary["exits"], expected, strict=True):
        assert entry == pytest.approx(figures, abs=1e-6)
    overall = summary["overall"]
    mean_macs = (2 * macs[0] + macs[1] + macs[2]) / 4
    expected = {
        "samples": 4,
        "accuracy": 0.75,
        "accuracy_full_model": 0.75,
        "mean_depth": (1 + 2 + 4 + 1) / 4,
        "layer_speed_up": 4 * 4 / (1 + 2 + 4 + 1),
        "mean_macs": mean_macs,
        "backbone_macs": 70 + 3,
        "macs_speed_up": 73 / mean_macs,
    }
    assert overall == pytest.approx(expected)


@version_independent
def test_exit_where_nobody_leaves_has_no_accuracy():
    table = by_hand()
    summary = summarise(table, table.replay("never"), Costs([1.0] * 3, [1.0] * 3), ["linear", "mlp", "final"])
    assert [entry["samples"] for entry in summary["exits"]] == [0, 0, 4]
    assert [entry["accuracy_exited"] for entry in summary["exits"]] == [None, None, 0.75]


@version_independent
def test_layer_speed_up():
    depths = torch.tensor([4, 12, 12, 8])
    assert layer_speed_up(Answers(None, None, depths, None), 12) == pytest.approx(12 * 4 / 36)


@version_independent
def test_costs_of_exits_that_are_not_asked():
    costs = Costs(backbone_costs=[10.0, 20.0, 40.0], heads=[1.0, 2.0, 3.0])
    assert costs.of_exit(2, evaluated=[1]) == 10 + 20 + 2 + 40 + 3
    assert costs.of_exit(2, evaluated=[]) == costs.backbone == 73.0


# -- costs -----------------------------------------------------------------------------------------------------

WIDTH, HIDDEN, PATCHES, GRID = 32, 64, 16, 4


def block_macs(tokens, width, hidden):
    """Query, key, value and output projections, scores and mixing, and the MLP."""
    return 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * hidden


def head_macs(name, prefix):
    """By hand, for one image; means, norms and activations are no multiply-accumulates."""
    d, n = WIDTH, PATCHES
    classify = max(1, prefix) * d * NUM_LABELS
    if name == "linear":
        return (d * d if prefix == 1 else 0) + classify
    if name == "concat":
        return (prefix + 1) * d * NUM_LABELS
    if name == "vit":
        return block_macs(n + prefix, d, HIDDEN) + head_macs("linear", prefix)
    coarse = (GRID // 2) ** 2
    body = {
        # the last projection sees the mean of all patches
        "mlp": n * d * 10 + 10 * d,
        "conv_normal": 9 * n * d * d,
        "conv1_1": n * d * d + 9 * n * d + d * d,
        "conv2_1": n * d * d + d * d,
        "attention_r1": 3 * n * d * d + 2 * n * n * d + d * d,
        "attention_r2": 3 * coarse * d * d + 2 * coarse * coarse * d + d * d,
        "self_attention": 3 * n * d * d + 2 * n * n * d + d * d,
    }
    return body[name] + classify


@pytest.mark.parametrize(
    ("kind", "prefix", "heads"),
    [
        ("vit", 1, "linear vit mlp conv_normal conv1_1 conv2_1 attention_r1 attention_r2 self_attention"),
        # another prefix token: its classifier, no pooler, and one token more in a block
        ("deit", 2, "linear vit mlp"),
        ("vit", 1, "concat linear mlp"),
        ("deit", 2, "concat linear mlp"),
    ],
)
def test_macs_by_hand(kind, prefix, heads):
    block = block_macs(PATCHES + prefix, WIDTH, HIDDEN)
    stem = PATCHES * (3 * 4 * 4) * WIDTH
    for start in range(0, len(heads.split()), 3):
        three = heads.split()[start : start + 3]
        costs = model_macs(tiny_model(kind, exit_positions=POSITIONS, exit_types=three))
        assert costs.backbone_costs == [stem + 2 * block, block, 2 * block, block]
        assert costs.heads == [
            *(head_macs(head, prefix) for head in three),
            prefix * WIDTH * NUM_LABELS,
        ]


def test_macs_of_swin_by_hand():
    model = tiny_model("swin", exit_positions=POSITIONS, exit_types="linear")
    costs = model_macs(model)

    def block(patches, width, window=4):
        projections = 4 * patches * width * width + 2 * patches * width * (2 * width)
        return projections + 2 * patches * window * width

    stem = 64 * (3 * 2 * 2) * 16
    merge_1, merge_2 = 16 * (4 * 16) * 32, 4 * (4 * 32) * 64
    first, second, third = block(64, 16), block(16, 32), block(4, 64)
    assert costs.backbone_costs == [stem + 2 * first, merge_1 + second, second + merge_2 + third, third]
    assert costs.heads == [width * NUM_LABELS for width in (16, 32, 64, 64)]


def test_macs_grow_with_the_image():
    model = tiny_model("vit", exit_positions=POSITIONS, exit_types="linear")
    costs = count_macs(model.segments(interpolate_pos_encoding=True), State({"pixel_values": tiny_images(1, 32)}))
    assert costs.backbone_costs[1] == block_macs(64 + 1, WIDTH, HIDDEN)


# -- clocks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Its `now` is the time that is measured."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@version_independent
def test_runs_are_timed_in_turn(clock):
    calls = []

    def run(name):
        calls.append(name)
        # the first two rounds, to warm up, take far longer; every later one a second more than the one before
        clock.now += {"a": 100.0, "b": 200.0, "c": 300.0}[name] + (1e6 if len(calls) <= 6 else (len(calls) - 7) // 3)

    seconds = time_interleaved({name: partial(run, name) for name in "abc"}, repeats=4, warm_up=2)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, 18, 3)]
    assert len(calls) == 18 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(set(rounds)) > 1
    assert seconds == {name: [first + n for n in range(4)] for name, first in (("a", 100), ("b", 200), ("c", 300))}


def test_wall_clock_speed_up_is_of_the_blocks_run_where_these_alone_take_time(clock):
    """Each image takes a second in each block: one of twelve is run."""
    model = tiny_model("vit", exit_positions=[1], exit_types="linear", num_hidden_layers=12).train()
    model.set_exit_policy("confidence", threshold=0.0)

    def pass_a_second(module, given, result):
        clock.now += given[0].shape[0]

    for block in model.layers:
        block.register_forward_hook(pass_a_second)
    times = wall_clock_speed_up(model, [tiny_images(16), tiny_images(3)], repeats=3)
    assert times == {"early_exit_seconds": 19.0, "backbone_seconds": 12 * 19.0, "wall_clock_speed_up": 12.0}
    assert model.training
