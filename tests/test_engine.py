"""The law of early exit, on stored logits: a sample's answer never depends on its batch, nor on the order there."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgvit_hf.engine import run_all, run_all_with_features, run_early
from lgvit_hf.evaluation.exit_table import ExitTable
from lgvit_hf.policies import POLICIES, ExitPolicy, build_policy
from lgvit_hf.segments import Segment, State
from tests.gates import random_models, typical_models
from tests.seeds import examples, generator

pytestmark = pytest.mark.version_independent

NUM_ROWS, NUM_LABELS = 1000, 4
DEPTHS = [2, 3, 5, 6, 8, 12]
NUM_EXITS = len(DEPTHS) - 1
FINAL = NUM_EXITS


def random_logits():
    """Ever surer exits; one sample in ten is NaN at one exit, some at all of them, and some tie."""
    numbers = generator(7)
    truth = 2 * torch.randn(NUM_ROWS, NUM_LABELS, generator=numbers)
    noise = torch.randn(len(DEPTHS), NUM_ROWS, NUM_LABELS, generator=numbers)
    logits = truth + noise * torch.linspace(2.0, 0.5, len(DEPTHS))[:, None, None]
    hit = torch.randint(len(DEPTHS), (NUM_ROWS // 10,), generator=numbers)
    logits[hit, torch.arange(0, NUM_ROWS, 10), 1] = math.nan
    logits[:, :5] = math.nan
    logits[:, 5:10] = 0.0
    logits[:, 11:15, 0] = 200.0
    return logits


LOGITS = random_logits()
CLEAN = torch.arange(21, 30)  # never NaN


class Recorded:
    """A highway of stored logits that counts the rows which every block and every head sees."""

    def __init__(self, exit_logits=LOGITS, depths=DEPTHS):
        self.exit_logits, self.depths = exit_logits, depths
        self.rows_in_block = {}
        self.rows_in_head = {}

    def block(self, number, state):
        self.rows_in_block[number] = state.batch_size
        return state

    def head(self, index, state):
        self.rows_in_head[index] = state.batch_size
        return self.exit_logits[index].index_select(0, state["row"])

    def segments(self):
        segments, start = [], 1
        for index, depth in enumerate(self.depths):
            blocks = tuple(
                lambda state, number=number: self.block(number, state) for number in range(start, depth + 1)
            )
            segments.append(Segment(depth, blocks, lambda state, index=index: self.head(index, state)))
            start = depth + 1
        return segments


def rows_state(rows):
    return State({"row": torch.as_tensor(rows)})


def run(policy, rows=None, **depths):
    rows = torch.arange(NUM_ROWS) if rows is None else rows
    return run_early(Recorded().segments(), rows_state(rows), policy, **depths)


def one_row_after_the_other(policy, rows, min_depth=None, max_depth=None):
    """The law as a loop: no batch, nothing dropped, nothing put back."""
    last = max(index for index, depth in enumerate(DEPTHS) if max_depth is None or depth <= max_depth)
    answers = []
    for row in rows:
        memory = policy.start(1, "cpu")
        for index in range(last + 1):
            if index < last and (DEPTHS[index] < (min_depth or 0) or policy.skips(index)):
                continue
            logits = LOGITS[index, row : row + 1]
            exits, memory = policy(logits, memory, index)
            if index == last or (exits.item() and not logits.isnan().any()):
                answers.append((logits[0], index, DEPTHS[index], memory["score"].item()))
                break
    logits, exits, depths, scores = zip(*answers, strict=True)
    return torch.stack(logits), list(exits), list(depths), torch.tensor(scores)


def assert_same(answers, other):
    assert torch.equal(answers.exit_index, other.exit_index)
    assert torch.equal(answers.exit_layer, other.exit_layer)
    torch.testing.assert_close(answers.logits, other.logits, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(answers.exit_score, other.exit_score, rtol=1e-6, atol=1e-7, equal_nan=True)


def taken(answers, rows):
    return type(answers)(
        answers.logits[rows], answers.exit_index[rows], answers.exit_layer[rows], answers.exit_score[rows]
    )


numbers = st.floats(0.0, 1.0)
entropies = st.floats(0.0, math.log(NUM_LABELS) + 0.1)


def for_exits(values):
    return values | st.lists(values, min_size=NUM_EXITS, max_size=NUM_EXITS)


temperatures = for_exits(st.floats(0.25, 4.0))
PARAMETERS = {
    "confidence": {"threshold": for_exits(numbers), "temperature": temperatures},
    "entropy": {"threshold": for_exits(entropies), "temperature": temperatures},
    "margin": {"threshold": for_exits(numbers), "temperature": temperatures},
    "confidence_entropy": {
        "threshold": for_exits(numbers),
        "entropy_threshold": for_exits(entropies),
        "temperature": temperatures,
    },
    "label_confidence": {"threshold": for_exits(st.floats(0.5, 1.0)), "temperature": temperatures},
    "patience": {"patience": st.integers(1, NUM_EXITS + 1)},
    "patience_confidence": {
        "threshold": for_exits(entropies),
        "patience": st.integers(1, 4),
        "temperature": temperatures,
    },
    "calibrated_confidence": {
        "threshold": for_exits(numbers),
        "temperature": temperatures,
        "edges": st.just([[0.5, 0.75, 0.9]] * NUM_EXITS),
        "accuracies": st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=NUM_EXITS, max_size=NUM_EXITS),
    },
    "gate": {
        "threshold": for_exits(numbers),
        "temperature": temperatures,
        "exits": st.just(list(range(NUM_EXITS))),
        "models": st.integers(0, 99).map(partial(random_models, NUM_EXITS)),
        "num_labels": st.just(NUM_LABELS),
    },
    "fixed": {"exit_index": st.integers(0, NUM_EXITS)},
    "never": {},
}
# one setting of each under which samples exit everywhere
TYPICAL = [
    {"name": "confidence", "threshold": [0.97, 0.9, 0.85, 0.8, 0.75]},
    {"name": "entropy", "threshold": [0.1, 0.3, 0.5, 0.7, 0.9], "temperature": 1.3},
    {"name": "margin", "threshold": 0.9},
    {"name": "confidence_entropy", "threshold": 0.8, "entropy_threshold": 0.4},
    {"name": "label_confidence", "threshold": 0.7},
    {"name": "patience", "patience": 3},
    {"name": "patience_confidence", "threshold": 0.5, "patience": 2},
    {
        "name": "calibrated_confidence",
        "threshold": 0.5,
        "edges": [[0.97], [0.9], [0.85], [0.8], [0.75]],
        "accuracies": [[0.4, 0.6]] * NUM_EXITS,
    },
    {
        "name": "gate",
        "threshold": [0.94, 0.91, 0.89, 0.86, 0.82],
        "exits": list(range(NUM_EXITS)),
        "models": typical_models(NUM_EXITS),
        "num_labels": NUM_LABELS,
    },
    {"name": "fixed", "exit_index": 2},
    {"name": "never"},
]
every_policy = pytest.mark.parametrize("typical", TYPICAL, ids=lambda policy: policy["name"])
SPREADING = [typical for typical in TYPICAL if typical["name"] not in ("fixed", "never")]
policies = st.sampled_from(sorted(PARAMETERS)).flatmap(
    lambda name: st.fixed_dictionaries({"name": st.just(name), **PARAMETERS[name]})
)
bounds = st.sampled_from(
    [(None, None), (None, 12), (None, 7), (None, 2), (3, None), (5, 8), (8, 8), (12, None), (1, 4)]
)


def test_every_policy_has_parameters():
    assert set(PARAMETERS) == {typical["name"] for typical in TYPICAL} == set(POLICIES)


@settings(max_examples=examples(40))
@given(policy=policies, bounds=bounds, seed=st.integers(0, 2**16), batch_size=st.sampled_from([1, 2, 7, 64]))
def test_law(policy, bounds, seed, batch_size):
    policy = build_policy(policy, NUM_EXITS)
    depths = {"min_depth": bounds[0], "max_depth": bounds[1]}
    whole = run(policy, **depths)

    order = torch.randperm(NUM_ROWS, generator=generator(seed))
    assert_same(run(policy, order, **depths), taken(whole, order))
    assert_same(ExitTable(LOGITS, torch.zeros(NUM_ROWS), DEPTHS).replay(policy, **depths), whole)

    batch = order[:batch_size]
    assert_same(run(policy, batch, **depths), taken(whole, batch))
    for row in batch[:8]:
        assert_same(run(policy, row[None], **depths), taken(whole, row[None]))

    some = order[:40].tolist()
    logits, exits, layers, scores = one_row_after_the_other(policy, some, **depths)
    here = taken(whole, torch.tensor(some))
    assert here.exit_index.tolist() == exits and here.exit_layer.tolist() == layers
    torch.testing.assert_close(here.logits, logits, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(here.exit_score, scores, rtol=1e-6, atol=1e-7, equal_nan=True)


@every_policy
def test_a_thousand_rows_alone(typical):
    policy = build_policy(typical, NUM_EXITS)
    whole = run(policy)
    segments = Recorded().segments()
    alone = [run_early(segments, rows_state([row]), policy) for row in range(NUM_ROWS)]
    joined = type(whole)(
        *(torch.cat(values) for values in zip(*(vars(answer).values() for answer in alone), strict=True))
    )
    assert_same(joined, whole)
    if typical in SPREADING:
        # nothing exits before patience is over
        first = {"patience": 2, "patience_confidence": 1}.get(typical["name"], 0)
        assert set(whole.exit_index.tolist()) == set(range(first, FINAL + 1)), "samples must exit everywhere"


@every_policy
def test_types_and_order_of_answers(typical):
    answers = run(build_policy(typical, NUM_EXITS))
    assert answers.logits.shape == (NUM_ROWS, NUM_LABELS)
    assert answers.exit_index.dtype == answers.exit_layer.dtype == torch.int64
    assert answers.exit_score.dtype == torch.float32
    chosen = LOGITS[answers.exit_index, torch.arange(NUM_ROWS)]
    torch.testing.assert_close(answers.logits, chosen, rtol=0, atol=0, equal_nan=True)
    assert answers.exit_layer.tolist() == [DEPTHS[index] for index in answers.exit_index.tolist()]


@every_policy
def test_nan_never_leaves_early(typical):
    for bounds in ({}, {"max_depth": 6}, {"min_depth": 5}):
        answers = run(build_policy(typical, NUM_EXITS), **bounds)
        at_nan = LOGITS[answers.exit_index, torch.arange(NUM_ROWS)].isnan().any(-1)
        assert at_nan.sum() >= 5
        assert (answers.exit_index[at_nan] == (3 if "max_depth" in bounds else FINAL)).all()


def test_nan_never_leaves_early_under_a_policy_that_lets_all_go():
    class Always(ExitPolicy):
        def __call__(self, logits, memory, exit_index=0):
            return torch.ones(len(logits), dtype=torch.bool), memory

    answers = run(Always())
    for row, index in enumerate(answers.exit_index.tolist()):
        clean = [i for i in range(NUM_EXITS) if not LOGITS[i, row].isnan().any()]
        assert index == (clean[0] if clean else FINAL)


@settings(max_examples=examples(30))
@given(policy=policies, bounds=bounds, batch_size=st.sampled_from([1, 3, 64, 1000]))
def test_blocks_and_heads_run_on_survivors_only(policy, bounds, batch_size):
    policy = build_policy(policy, NUM_EXITS)
    recorded, rows = Recorded(), torch.arange(NUM_ROWS - batch_size, NUM_ROWS)
    answers = run_early(recorded.segments(), rows_state(rows), policy, min_depth=bounds[0], max_depth=bounds[1])
    depths = answers.exit_layer.tolist()
    survivors = {number: sum(depth >= number for depth in depths) for number in range(1, max(depths) + 1)}
    assert recorded.rows_in_block == survivors  # and no block behind the last survivor

    last = max(index for index, depth in enumerate(DEPTHS) if bounds[1] is None or depth <= bounds[1])
    asked = [index for index in range(last) if not policy.skips(index) and DEPTHS[index] >= (bounds[0] or 0)] + [last]
    assert recorded.rows_in_head == {index: survivors[DEPTHS[index]] for index in asked if DEPTHS[index] in survivors}


def never_sure(logits, memory):
    """Is asked everywhere and lets nobody go."""
    return torch.zeros(len(logits), dtype=torch.bool), memory


@pytest.mark.parametrize(
    ("policy", "heads"),
    [
        ({"name": "never"}, [FINAL]),
        ({"name": "fixed", "exit_index": 2}, [2]),
        ({"name": "fixed", "exit_index": FINAL}, [FINAL]),
        ({"name": "confidence", "threshold": 1.0}, [FINAL]),
        ({"name": "margin", "threshold": [2.0, -1.0, 2.0, 2.0, 2.0]}, [1]),
        ({"name": "entropy", "threshold": 0.0}, [FINAL]),
        (never_sure, list(range(FINAL + 1))),
    ],
    ids=["never", "fixed", "fixed-final", "confidence", "margin", "entropy", "asked-for-nothing"],
)
def test_only_heads_that_are_asked_are_run(policy, heads):
    recorded = Recorded()
    run_early(recorded.segments(), rows_state(CLEAN), build_policy(policy, NUM_EXITS))
    assert sorted(recorded.rows_in_head) == heads


def test_min_depth_skips_heads_and_max_depth_skips_blocks():
    recorded = Recorded()
    policy = build_policy(never_sure, NUM_EXITS)
    answers = run_early(recorded.segments(), rows_state(torch.arange(9)), policy, min_depth=4, max_depth=7)
    assert sorted(recorded.rows_in_head) == [2, 3] and max(recorded.rows_in_block) == 6
    assert answers.exit_layer.tolist() == [6] * 9


@pytest.mark.parametrize(("threshold", "exit_index"), [(-1.0, 0), (2.0, FINAL)])
def test_everything_leaves_at_once_or_nothing_leaves(threshold, exit_index):
    recorded = Recorded()
    policy = build_policy({"name": "confidence", "threshold": threshold}, NUM_EXITS)
    answers = run_early(recorded.segments(), rows_state(CLEAN), policy)
    assert answers.exit_index.tolist() == [exit_index] * 9
    assert recorded.rows_in_block == dict.fromkeys(range(1, DEPTHS[exit_index] + 1), 9)
    assert recorded.rows_in_head == {exit_index: 9}
    assert torch.equal(answers.logits, LOGITS[exit_index, CLEAN])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_depth": 1}, r"max_depth=1 .*first exit.*\[2, 3, 5, 6, 8, 12\]"),
        ({"max_depth": 0}, "max_depth=0"),
        ({"min_depth": 13}, r"min_depth=13 .*12.*\[2, 3, 5, 6, 8, 12\]"),
        ({"min_depth": 7, "max_depth": 7}, "min_depth=7 .*6"),
    ],
)
def test_impossible_depths(bounds, message):
    with pytest.raises(ValueError, match=message):
        run(build_policy("never", NUM_EXITS), **bounds)


@pytest.fixture
def waits(monkeypatch):
    """How often the host waits for the device: `tolist` is counted, every other way fails."""
    counted = []
    tolist = torch.Tensor.tolist

    def counting(self):
        counted.append(self.shape)
        return tolist(self)

    def refuse(name):
        def wait(self, *args, **kwargs):
            raise AssertionError(f"the engine waits for the device in Tensor.{name}")

        return wait

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    for name in ("nonzero", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"):
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    for name in ("nonzero", "masked_select", "unique", "equal", "allclose"):
        monkeypatch.setattr(torch, name, refuse(name))
    yield counted
    monkeypatch.undo()


@every_policy
def test_one_host_sync_per_evaluated_exit(typical, waits):
    recorded = Recorded()
    policy = build_policy(typical, NUM_EXITS)
    run_early(recorded.segments(), rows_state(range(NUM_ROWS)), policy)
    early_heads = [index for index in recorded.rows_in_head if index != FINAL]
    assert len(waits) == len(early_heads)


def test_run_all_with_and_without_features_visit_every_exit():
    recorded = Recorded()
    exit_logits = run_all(recorded.segments(), rows_state(torch.arange(NUM_ROWS)))
    torch.testing.assert_close(torch.stack(exit_logits), LOGITS, rtol=0, atol=0, equal_nan=True)
    assert recorded.rows_in_block == {number: NUM_ROWS for number in range(1, 13)}

    with_features = [
        Segment(depth, (), None, lambda state, index=index: (LOGITS[index][state["row"]], state["row"] + index))
        for index, depth in enumerate(DEPTHS)
    ]
    logits, features = run_all_with_features(with_features, rows_state(torch.arange(20, 23)))
    torch.testing.assert_close(torch.stack(logits), LOGITS[:, 20:23], rtol=0, atol=0, equal_nan=True)
    assert [feature.tolist() for feature in features] == [[20 + i, 21 + i, 22 + i] for i in range(len(DEPTHS))]


def test_every_tensor_of_the_state_loses_the_same_rows():
    def check(state):
        assert torch.equal(state["row"] * 10, state["other"])
        return state

    segments = [
        Segment(depth, (check,), lambda state, logits=logits: logits[state["row"]])
        for depth, logits in zip(DEPTHS, LOGITS, strict=True)
    ]
    rows = torch.randperm(NUM_ROWS)
    answers = run_early(
        segments, State({"row": rows, "other": rows * 10}, (3, 5)), build_policy(TYPICAL[0], NUM_EXITS)
    )
    assert len(set(answers.exit_index.tolist())) == len(DEPTHS)


def test_half_precision_answers_keep_their_dtype():
    half = LOGITS.bfloat16()
    answers = run_early(
        Recorded(half).segments(), rows_state(torch.arange(NUM_ROWS)), build_policy(TYPICAL[0], NUM_EXITS)
    )
    assert answers.logits.dtype == torch.bfloat16 and answers.exit_score.dtype == torch.float32
    same = run_early(
        Recorded(half.float()).segments(), rows_state(torch.arange(NUM_ROWS)), build_policy(TYPICAL[0], NUM_EXITS)
    )
    assert torch.equal(answers.exit_index, same.exit_index)
