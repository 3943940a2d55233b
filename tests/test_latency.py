"""The cost table: its arithmetic against sums by hand, its file, and what measuring one gives."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from lgvit_hf.evaluation import timing
from lgvit_hf.evaluation.cost_table import (
    CostTable,
    architecture,
    cost_table,
    measure_cost_table,
    measured_sizes,
)
from lgvit_hf.evaluation.timing import PartTimes, time_parts
from lgvit_hf.policies import ConfidencePolicy, PatiencePolicy
from lgvit_hf.segments import Segment, State
from tests.tiny import KINDS, NUM_BLOCKS, tiny_images, tiny_model

version_independent = pytest.mark.version_independent

POSITIONS = [2, 3, 5]
BY_HAND = {
    "batch_sizes": [1, 2, 4],
    "backbone_costs": [[1.0, 1.5, 2.0], [2.0, 3.0, 4.5]],
    "heads": [[0.5, 0.7, 0.8], [0.3, 0.3, 0.4]],
    "select": [[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]],
    "threads": 1,
    "device": "cpu",
    "model": "by hand",
}


def by_hand(**changes):
    return CostTable(**{**BY_HAND, **changes})


def tick(patch):
    """Have the clock go on by a second whenever it is read, so that whatever is timed takes a second."""
    patch.setattr(timing, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


def test_costs_of_a_batch_that_stays():
    costs = by_hand().at(4)
    assert costs.backbone_costs == pytest.approx([500.0, 1125.0]) and costs.heads == pytest.approx([200.0, 100.0])
    # 3 rows: half way from 2 to 4
    costs = by_hand().at(3)
    assert costs.backbone_costs == pytest.approx([1750 / 3, 3750 / 3]) and costs.heads == pytest.approx(
        [250.0, 350 / 3]
    )
    assert by_hand(batch_sizes=[2, 3, 4]).at(1).backbone_costs == pytest.approx([500.0, 1000.0]), (
        "half way from no rows to 2"
    )


@version_independent
def test_latency_of_one_image():
    early, late = 1.0 + 0.5, 1.0 + 0.5 + 2.0 + 0.3
    assert by_hand().mean_latency([0.25, 0.75], [0], 1) == pytest.approx(1e3 * (0.25 * early + 0.75 * late))


@version_independent
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_latency_over_every_way_to_leave(share):
    """Four rows, each of them stays or leaves: sixteen ways, and their chances."""
    backbone, head, final, select = [0, 2.0, 3.0, 3.75, 4.5], 0.8, [0, 0.3, 0.3, 0.35, 0.4], 0.3
    expected = 0.0
    for leaves in itertools.product([True, False], repeat=4):
        stay = leaves.count(False)
        chance = share ** (4 - stay) * (1 - share) ** stay
        expected += chance * (2.0 + head + backbone[stay] + final[stay] + (select if 0 < stay < 4 else 0.0))
    assert by_hand().mean_latency([share, 1 - share], [0], 4) == pytest.approx(1e3 * expected / 4)


@version_independent
def test_heads_that_are_not_asked_are_not_paid():
    plain = 1e3 * (2.0 + 4.5 + 0.4) / 4
    assert by_hand().mean_latency([0.0, 1.0], [], 4) == pytest.approx(plain)
    assert by_hand().mean_latency([0.0, 1.0], [0], 4) == pytest.approx(plain + 1e3 * 0.8 / 4)
    assert by_hand().at(4).backbone == pytest.approx(plain)


@version_independent
def test_latency_of_three_segments_thins_out_twice():
    flat = by_hand(
        batch_sizes=[1, 2],
        backbone_costs=[[1.0, 1.0]] * 3,
        heads=[[0.0, 0.0]] * 3,
        select=[[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]],
    )
    # each block takes 1 s while any of two rows is left; letting one of two go takes 1 s
    blocks = 1 + (1 - 0.5**2) + (1 - 0.75**2)
    first = 2 * 0.5 * 0.5
    second = 0.5**2 * (2 * 0.5 * 0.5)
    assert flat.mean_latency([0.5, 0.25, 0.25], [0, 1], 2) == pytest.approx(1e3 * (blocks + first + second) / 2)


@version_independent
def test_many_rows_do_not_overflow():
    # of 4,096 rows half go on, give or take 32: times are linear there
    table = by_hand(batch_sizes=[1, 2, 4096])
    half = (4.5 - 3.0) * 2046 / 4094 + 3.0 + (0.4 - 0.3) * 2046 / 4094 + 0.3
    expected = 1e3 * (2.0 + 0.8 + half + 0.3) / 4096
    assert table.mean_latency([0.5, 0.5], [0], 4096) == pytest.approx(expected, rel=1e-9)


@version_independent
@pytest.mark.parametrize("batch_size", [0, 5])
def test_batch_size_that_was_not_measured(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} is outside the cost table's 1 to 4"):
        by_hand().at(batch_size)


@version_independent
def test_shares_of_another_model():
    with pytest.raises(ValueError, match="3 shares, but the cost table is of 2 exits"):
        by_hand().mean_latency([0.2, 0.3, 0.5], [0], 1)


@version_independent
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [1, 4, 2]}, r"batch_sizes=\[1, 4, 2\] must ascend"),
        ({"batch_sizes": [0, 1, 2]}, "must ascend from at least 1"),
        ({"batch_sizes": []}, "must ascend from at least 1"),
        ({"heads": [[1.0, 1.0, 1.0]]}, r"heads must hold 2 segments.*holds \[3\]"),
        ({"select": [[1.0, 1.0, 1.0], [1.0]]}, r"select must hold .*holds \[3, 1\]"),
        ({"backbone_costs": [[1.0, -1.0, 1.0]] * 2}, "backbone_costs must hold seconds, from 0"),
        ({"backbone_costs": [[1.0, math.nan, 1.0]] * 2}, "backbone_costs must hold seconds, from 0"),
    ],
)
def test_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        by_hand(**changes)


# -- the file --------------------------------------------------------------------------------------------------


@version_independent
def test_saved_and_loaded(tmp_path):
    by_hand().save(tmp_path / "deep" / "costs.json")
    assert CostTable.load(tmp_path / "deep" / "costs.json", num_exits=2, model="by hand") == by_hand()
    assert json.loads((tmp_path / "deep" / "costs.json").read_text()) == BY_HAND == by_hand().to_dict()


@version_independent
def test_loaded_for_another_model(tmp_path):
    by_hand().save(tmp_path / "costs.json")
    with pytest.raises(ValueError, match="of 2 exits, the final classifier counted, but the model has 3"):
        CostTable.load(tmp_path / "costs.json", num_exits=3)
    with pytest.raises(ValueError, match="the cost table is of by hand, not of another"):
        CostTable.load(tmp_path / "costs.json", model="another")


@version_independent
@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"batch_sizes": [1]}', json.dumps({**BY_HAND, "extra": 1}), json.dumps({**BY_HAND, "heads": 3})],
)
def test_file_that_is_no_cost_table(tmp_path, content):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(ValueError, match="costs.json is not a cost table"):
        CostTable.load(tmp_path / "costs.json")


@version_independent
def test_file_whose_parts_do_not_fit(tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({**BY_HAND, "batch_sizes": [4, 1, 2]}))
    with pytest.raises(ValueError, match=r"costs.json: batch_sizes=\[4, 1, 2\]"):
        CostTable.load(tmp_path / "costs.json")


# -- measuring -------------------------------------------------------------------------------------------------


@version_independent
def test_sizes_that_are_measured():
    assert measured_sizes([1], 1) == [1] and measured_sizes([8, 1], 8) == [1, 2, 4, 8]
    assert measured_sizes([6, 3], 10) == [1, 2, 3, 4, 6]
    for sizes in ([], [0], [1, 11]):
        with pytest.raises(ValueError, match="must be from 1 to the number of images, 10"):
            measured_sizes(sizes, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_measured_on_a_model(kind, monkeypatch):
    tick(monkeypatch)
    model = tiny_model(kind, exit_positions=POSITIONS).train()
    table = measure_cost_table(model, tiny_images(3), [3], repeats=2)
    assert model.training, "the model is given back as it was"
    assert table.batch_sizes == [1, 2, 3] and table.threads == torch.get_num_threads() and table.device == "cpu"
    # the stem and two blocks, one, two and one; nobody is let go behind the last
    assert table.backbone_costs == [[blocks] * 3 for blocks in (3.0, 1.0, 2.0, 1.0)]
    assert table.heads == [[1.0] * 3] * 4 and table.select == [*[[1.0] * 3] * 3, [0.0] * 3]
    table.check(4, architecture(model))
    assert CostTable(**json.loads(json.dumps(table.to_dict()))) == table


def test_architecture_tells_models_apart():
    names = {
        architecture(model)
        for model in (
            tiny_model("vit", exit_positions=POSITIONS),
            tiny_model("vit", exit_positions=POSITIONS, exit_types="linear"),
            tiny_model("vit", exit_positions=POSITIONS, intermediate_size=96),
            tiny_model("vit", exit_positions=[2, 3, 4]),
            tiny_model("vit", exit_positions=POSITIONS).bfloat16(),
            tiny_model("deit", exit_positions=POSITIONS),
        )
    }
    assert len(names) == 6
    same = tiny_model("vit", exit_positions=POSITIONS, seed=1)
    assert architecture(same) in names and f"{NUM_BLOCKS} blocks" in architecture(same)


@version_independent
@pytest.mark.parametrize("policy", [ConfidencePolicy(threshold=0.0), PatiencePolicy(patience=1)])
@torch.no_grad()
def test_every_part_is_walked_with_all_rows(policy):
    """Whatever the policy says, no row is missing in a later part."""
    seen = []

    def block(name):
        def run(state):
            seen.append((name, state.batch_size))
            return state

        return run

    def head(name):
        def run(state):
            seen.append((name, state.batch_size))
            return torch.eye(3)[: state.batch_size]

        return run

    segments = [Segment(1, (block("stem"), block("1")), head("exit")), Segment(2, (block("2"),), head("final"))]
    times = time_parts(segments, State({"hidden": torch.zeros(3, 1)}), policy)
    assert seen == [("stem", 3), ("1", 3), ("exit", 3), ("2", 3), ("final", 3)]
    assert [len(blocks) for blocks in times.blocks] == [2, 1] and len(times.heads) == len(times.select) == 2


@version_independent
def test_table_of_medians():
    walks = [PartTimes([[1.0, 10.0], [n]], [2 * n, 3 * n], [4 * n, 0.0]) for n in (1.0, 2.0, 9.0)]
    table = cost_table(tiny_model("vit", exit_positions=[2]), {2: [walks[2]], 1: walks})
    assert table.batch_sizes == [1, 2]
    assert table.backbone_costs == [[11.0, 11.0], [2.0, 9.0]]
    assert table.heads == [[4.0, 18.0], [6.0, 27.0]] and table.select == [[8.0, 36.0], [0.0, 0.0]]


@version_independent
def test_interruptions_are_shared_out():
    # each of three walks is interrupted for 6 s, each time in another part: no part's median shows it, every walk does
    walks = [
        PartTimes([[1.0 + 6 * (n == 0)], [2.0 + 6 * (n == 1)]], [3.0 + 6 * (n == 2), 4.0], [2.0, 0.0])
        for n in range(3)
    ]
    table = cost_table(tiny_model("vit", exit_positions=[2]), {1: walks})
    assert table.backbone_costs == [[1.5], [3.0]] and table.heads == [[4.5], [6.0]] and table.select == [[3.0], [0.0]]


@version_independent
def test_walk_at_another_pace():
    walk = PartTimes([[1.0, 2.0], [3.0]], [4.0, 5.0], [6.0, 0.0])
    assert walk.total == 21.0 and walk.backbone_costs() == [3.0, 3.0]
    assert walk.scaled(2) == PartTimes([[2.0, 4.0], [6.0]], [8.0, 10.0], [12.0, 0.0])
