"""The scheduler between segments, by a simulated clock: who runs when, and that nothing is lost; its answers."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgvit_hf.serving.batching import Busy, Expired
from lgvit_hf.serving.expected_work import ExpectedWork
from lgvit_hf.serving.prometheus import Metrics
from lgvit_hf.serving.run_costs import RunCosts
from lgvit_hf.serving.segment_queues import Run, Sample, SegmentQueues
from lgvit_hf.serving.segment_scheduler import SegmentScheduler
from lgvit_hf.serving.simulation import Arrival, SampleFails, simulate
from lgvit_hf.serving.torch_segments import TorchSegments
from tests.gates import typical_models
from tests.seeds import examples, rng
from tests.test_split import NAN_ROW, PATIENCE, SMALL, between, drawn
from tests.tiny import KINDS

pytestmark = pytest.mark.version_independent
SIZES = [1, 2, 4, 8]


def costs_of(num_blocks, one=4.0, more=1.0):
    """Blocks that take `one` ms, and `more` for each sample after the first."""
    return RunCosts(SIZES, [[[one + more * (size - 1) for size in SIZES]] * blocks for blocks in num_blocks])


# -- costs ------------------------------------------------------------------------------------------------------


def test_costs_are_those_measured_and_lines_between():
    costs = RunCosts([1, 2, 4], [[[2.0, 3.0, 5.0], [1.0, 1.0, 2.0]], [[4.0, 4.0, 6.0]]])
    assert [costs.milliseconds(0, 0, 2, samples) for samples in (1, 2, 3, 4, 8)] == [3, 4, 5.5, 7, 14]
    assert costs.milliseconds(0, 1, 2, 3) == 1.5 and costs.whole_ms(1) == 7.0 and costs.num_blocks == [2, 1]


def test_a_run_is_the_one_that_gains_most_within_its_time():
    costs = costs_of([4])
    for waiting in (1, 2, 3, 8, 32):
        for most in (3.0, 8.5, 15.0, 60.0):
            best = costs.best(0, 1, waiting, most)
            limit = max(most, 4.0)  # what one block of one sample takes
            assert best.samples <= waiting and 2 <= best.stop <= 4
            assert best.milliseconds == costs.milliseconds(0, 1, best.stop, best.samples) <= limit
    assert costs.best(0, 0, 32, 15.0).samples == 10 and costs.best(0, 0, 2, 15.0).stop == 3


def test_sizes_are_measured_until_a_block_takes_longer_than_a_run():
    sizes = []

    def walk(samples):
        sizes.append(samples)
        return [[4.0 * samples + (len(sizes) == 2)]]

    costs = RunCosts.measured(walk, max_samples=32, max_run_ms=15.0, seconds=1000)
    assert costs.batch_sizes == [1, 2, 4] and costs.blocks == [[[4.0, 8.0, 16.0]]]  # the least of several
    assert costs.usual_run_ms == 16.0
    assert RunCosts.measured(walk, max_samples=32, max_run_ms=None, seconds=1000).batch_sizes == [1, 2, 4, 8]
    assert RunCosts.measured(walk, max_samples=2, max_run_ms=100.0, seconds=1000).batch_sizes == [1, 2]
    # large models: no more than time allows
    assert RunCosts.measured(walk, max_samples=32, max_run_ms=15.0, seconds=0.0).batch_sizes == [1]


@pytest.mark.parametrize("sizes", [[], [2, 4], [1, 1]])
def test_sizes_that_are_refused(sizes):
    with pytest.raises(ValueError, match="batch_sizes"):
        RunCosts(sizes, [[[1.0] * len(sizes)]])


def test_times_that_are_refused():
    for blocks in ([], [[[1.0]]], [[[1.0, 0.0]]], [[[1.0, math.nan]]], [[[1.0, math.inf]]]):
        with pytest.raises(ValueError, match="blocks="):
            RunCosts([1, 2], blocks)


# -- decisions --------------------------------------------------------------------------------------------------


def waiting_for(queues, *owners, now=0.0, **more):
    for owner, samples in owners:
        queues.add([Sample(owner, number, now, **more) for number in range(samples)], client=owner)


def owners(run):
    return [sample.owner for sample in run.samples]


def test_clients_take_turns():
    queues = SegmentQueues(costs_of([1]), max_samples=4)
    waiting_for(queues, ("large", 20), ("a", 1), ("b", 2))
    first, second = queues.next(0.0), queues.next(0.0)
    assert sorted(owners(first)) == ["a", "b", "b", "large"] or sorted(owners(first)) == ["a", "b", "large", "large"]
    assert owners(second).count("large") >= 3
    # who comes later waits for no more than a sample of each of the others
    waiting_for(queues, ("late", 1))
    assert "late" in owners(queues.next(0.0))


def test_requests_of_one_client_wait_for_one_another():
    queues = SegmentQueues(costs_of([1]), max_samples=4)
    for _ in range(20):
        waiting_for(queues, ("many", 1))
    waiting_for(queues, ("one", 1))
    assert owners(queues.next(0.0)).count("one") == 1


def gone_on(queues, samples, segment_ms=4.0):
    """So many samples before the second segment."""
    waiting_for(queues, ("deeper", samples))
    run = queues.next(0.0)
    queues.ran(run, run.samples, segment_ms / 1e3, now=0.0)


def test_the_first_segment_has_half_of_the_time():
    queues = SegmentQueues(costs_of([1, 4], one=14.0), max_samples=1)
    now, had = 0.0, [0.0, 0.0]
    for number in range(200):
        if not any(sample.state is None for sample in queues.samples()):
            queues.add([Sample("always", number, now)])
        run = queues.next(now)
        milliseconds = queues.costs.milliseconds(run.segment, run.start, run.stop, 1)
        had[run.segment] += milliseconds
        now += milliseconds / 1e3
        run.samples[0].state = "in"
        queues.ran(run, [] if run.stop == 4 else run.samples, milliseconds / 1e3, now)
    assert 0.45 < had[0] / sum(had) < 0.55


def test_the_deepest_goes_before_those_that_can_still_be_joined():
    queues = SegmentQueues(costs_of([1, 1, 1], one=10.0))
    gone_on(queues, 1, segment_ms=0.0)
    queues.ran(queues.next(0.0), [Sample("third", 0, 0.0)], 0.01, 0.0)
    gone_on(queues, 1, segment_ms=0.0)
    assert [queues.next(0.0).segment for _ in range(2)] == [2, 1]


@pytest.mark.parametrize("now, expected", [(0.02, [1, 2]), (0.2, [2, 1])])
def test_the_fullest_goes_before_a_deeper_one_until_that_is_old(now, expected):
    queues = SegmentQueues(costs_of([1, 1, 1], one=2.0, more=0.1))
    gone_on(queues, 1, segment_ms=0.0)
    queues.ran(queues.next(0.0), [Sample("deep", 0, 0.0)], 0.0, 0.0)
    waiting_for(queues, ("full", 8), now=now)
    run = queues.next(now)
    queues.ran(run, run.samples, 0.0, now)
    assert [queues.next(now).segment for _ in range(2)] == expected


def test_where_nothing_else_waits_it_is_a_moment_if_others_are_coming():
    queues = SegmentQueues(costs_of([1]), max_wait=0.002)
    waiting_for(queues, ("a", 1), now=1.0)
    assert queues.next(1.0, coming=True) == 1.002
    assert len(queues.next(1.002, coming=True).samples) == 1
    waiting_for(queues, ("a", 1), now=1.0)
    assert len(queues.next(1.0).samples) == 1
    # nor may the time run out
    waiting_for(queues, ("a", 1), now=1.0, deadline=1.0199)
    assert len(queues.next(1.001, coming=True).samples) == 1
    # a run that is full waits for nothing
    waiting_for(queues, ("a", 40), now=1.0)
    assert len(queues.next(1.0, coming=True).samples) == 10 and queues.next(1.0).fill == 1.0
    assert SegmentQueues(costs_of([1])).next(0.0) == math.inf


def test_what_nobody_waits_for_is_taken_out():
    queues = SegmentQueues(costs_of([1]), over=lambda owner: owner == "gone")
    waiting_for(queues, ("gone", 2), ("here", 1))
    waiting_for(queues, ("late", 1), deadline=1.0)
    assert owners(queues.next(1.0)) == ["here"]
    assert sorted(sample.owner for sample in queues.dropped) == ["gone", "gone", "late"] and not len(queues)
    waiting_for(queues, ("gone", 1), ("here", 1))
    queues.purge(2.0)
    assert len(queues) == 1


# -- properties -------------------------------------------------------------------------------------------------

NUM_BLOCKS = [1, 3, 2]
requests = st.builds(
    Arrival,
    seconds=st.floats(0, 0.3),
    exits=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    timeout=st.none() | st.floats(0.001, 0.2),
    cancelled=st.none() | st.none() | st.floats(0, 0.1),
    fails_in=st.none() | st.none() | st.none() | st.integers(0, 2),
    client=st.none() | st.sampled_from("ab"),
)
costs = st.builds(costs_of, st.just(NUM_BLOCKS), one=st.floats(0.1, 20), more=st.floats(0.01, 5))
options = st.fixed_dictionaries(
    {
        "max_samples": st.sampled_from([1, 3, 32]),
        "max_run_ms": st.sampled_from([None, 1.0, 15.0, 100.0]),
        "max_wait": st.sampled_from([0.0, 0.002]),
        "max_waiting": st.sampled_from([5, 1024]),
    }
)


@settings(max_examples=examples(60))
@given(st.lists(requests, max_size=25).map(lambda all: sorted(all, key=lambda each: each.seconds)), costs, options)
def test_each_request_ends_once_and_as_it_should(arrivals, costs, options):
    outcomes, runs = simulate(arrivals, costs, **options)
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        assert outcome.seconds < math.inf  # nothing is lost
        for exit, evaluated in zip(arrival.exits, outcome.runs, strict=True):
            # no exit is evaluated twice but where a run failed, nor any after the one where it exits
            assert evaluated == list(range(len(evaluated))) and len(evaluated) <= exit + 1
        if outcome.answer is not None:
            assert outcome.answer["exit_index"].tolist() == list(arrival.exits)
            assert arrival.fails_in is None or arrival.fails_in > max(arrival.exits)
            assert [len(evaluated) - 1 for evaluated in outcome.runs] == list(arrival.exits)
            continue
        allowed = {
            SampleFails: arrival.fails_in is not None and arrival.fails_in <= max(arrival.exits),
            Expired: arrival.timeout is not None and outcome.seconds >= arrival.timeout,
            TimeoutError: arrival.cancelled is not None,
            Busy: options["max_waiting"] == 5,
        }
        assert allowed[type(outcome.error)], outcome
    for segment, start, stop, samples in runs:
        assert 1 <= samples <= options["max_samples"] and 0 <= start < stop <= NUM_BLOCKS[segment]
        longest = costs.usual_run_ms if options["max_run_ms"] is None else options["max_run_ms"]
        most = max(longest, costs.milliseconds(segment, start, start + 1, 1))
        assert costs.milliseconds(segment, start, stop, samples) <= most * (1 + 1e-9)


def one_more_run(queues, now, exits):
    """Run what is next; `exits` says of a sample behind which segment it exits. Gives the run, and when it ended."""
    run = queues.next(now)
    milliseconds = queues.costs.milliseconds(run.segment, run.start, run.stop, len(run.samples))
    is_evaluated, now = run.stop == NUM_BLOCKS[run.segment], now + milliseconds / 1e3
    staying = [each for each in run.samples if not is_evaluated or run.segment < exits(each.owner)]
    queues.ran(run, staying, milliseconds / 1e3, now)
    return run, now


@settings(max_examples=examples(20))
@given(costs)
def test_a_sample_that_goes_on_does_not_starve_beside_those_that_exit_first(costs):
    queues, now, others = SegmentQueues(costs, max_run_ms=costs.usual_run_ms), 0.0, 0.0
    queues.add([Sample("goes on", 0, now)])
    for _ in range(300):
        while len(queues) < 40:
            queues.add([Sample("exits first", 0, now)])
        run, now = one_more_run(queues, now, lambda owner: 2 if owner == "goes on" else 0)
        others += queues.costs.milliseconds(0, 0, 1, len(run.samples)) if "goes on" not in owners(run) else 0.0
        if not any(sample.owner == "goes on" for sample in queues.samples()):
            break
    else:
        raise AssertionError("still waits")
    # until the first segment is ahead by a run, and then as long as its own runs
    assert others <= 1e3 * now - others + 3 * costs.longest_run_ms(costs.usual_run_ms)


@settings(max_examples=examples(20))
@given(costs)
def test_a_sample_that_exits_first_does_not_starve_beside_those_that_go_on(costs):
    queues, now = SegmentQueues(costs, max_run_ms=costs.usual_run_ms), 0.0
    for _ in range(200):
        queues.add([Sample("goes on", 0, now)])
    while any(sample.state is None and sample.since == 0.0 for sample in queues.samples()):
        _, now = one_more_run(queues, now, lambda owner: 2)
    came = now
    queues.add([Sample("exits first", 0, now)])
    while any(sample.owner == "exits first" for sample in queues.samples()):
        _, now = one_more_run(queues, now, lambda owner: 2 if owner == "goes on" else 0)
    assert 1e3 * (now - came) <= 4 * costs.longest_run_ms(costs.usual_run_ms)


def test_nothing_idles_while_samples_wait():
    draw, costs = rng(), costs_of(NUM_BLOCKS)
    arrivals = [Arrival(float(time), [int(draw.integers(3))]) for time in np.sort(draw.uniform(0, 0.01, 100))]
    outcomes, runs = simulate(arrivals, costs, max_wait=0.0)
    busy = sum(0.2 + costs.milliseconds(*run) for run in runs) / 1e3
    end = max(arrival.seconds + outcome.seconds for arrival, outcome in zip(arrivals, outcomes, strict=True))
    assert end == pytest.approx(arrivals[0].seconds + busy)


@pytest.mark.parametrize("pace", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("samples, gap", [(8, 0.0), (8, 0.02), (1, 0.0025)])
def test_what_can_be_answered_in_time_is_under_overload(samples, gap, pace):
    """Of a burst, and of twice what can be borne: a scheduler that begins all of it answers none in time.

    Nor does one that believes its costs where other work makes runs longer.
    """
    costs, timeout = costs_of([2] * 6, one=0.8, more=0.47), 0.6
    whole_ms = pace * costs.whole_ms(32)
    number = 800 // samples if gap else 16
    arrivals = [Arrival(gap * each, [5] * samples, timeout=timeout) for each in range(number)]
    outcomes, _ = simulate(arrivals, costs, pace, max_samples=32)
    answered = sum(outcome.answer is not None for outcome in outcomes)
    possible = 32 / whole_ms * 1e3 * (gap * number + timeout) / samples
    # what was begun before it knew how long runs really take is lost
    assert answered >= (0.9 if pace == 1 else 0.85) * min(number, possible)


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("one, more", [(1.2, 0.7), (3.0, 2.8)])
def test_what_is_left_is_expected_by_where_samples_exit(samples, one, more):
    """Twice what can be borne, most of which exits first: who took all for hard would leave the machine idle."""
    draw, costs, timeout = rng(), costs_of([2] * 6, one, more), 0.7
    shares = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    possible = 32e3 / (costs.milliseconds(0, 0, 2, 32) * float(shares @ np.arange(1, 7))) / samples
    times = np.cumsum(draw.exponential(0.5 / possible, int(20 * possible)))  # for ten seconds
    arrivals = [Arrival(float(time), draw.choice(6, samples, p=shares).tolist(), timeout=timeout) for time in times]
    outcomes, _ = simulate(arrivals, costs)
    answered = sum(outcome.answer is not None for outcome in outcomes)
    assert answered >= 0.8 * possible * times[-1]


@pytest.mark.parametrize("one, more, timeout", [(3.0, 0.5, 0.1), (1.0, 0.03, 0.02)])
def test_samples_that_exit_first_run_together_though_there_is_no_time_for_the_whole_way(one, more, timeout):
    costs = costs_of([2] * 6, one, more)
    together = costs.best(0, 0, 32, 15.0).samples
    gap = costs.milliseconds(0, 0, 2, together) / together / 0.7e3
    outcomes, _ = simulate([Arrival(gap * number, [0], timeout) for number in range(1000)], costs)
    assert np.mean([outcome.answer is not None for outcome in outcomes]) > 0.95


def test_a_large_request_without_a_chance_holds_up_no_small_one():
    costs = costs_of([2] * 6, one=6.5, more=3.5)
    small = [Arrival(0.1 * number, [0], 0.15) for number in range(60)]
    large = [Arrival(0.5 * number, [5] * 300, 0.2) for number in range(1, 12)]
    outcomes, _ = simulate(sorted([*small, *large], key=lambda each: each.seconds), costs)
    assert sum(outcome.answer is not None for outcome in outcomes if len(outcome.arrival.exits) == 1) >= 57


def test_who_is_begun_late_takes_no_turn_of_others():
    queues = SegmentQueues(costs_of([1, 1], one=4.0, more=1.0), max_samples=1)
    for number in range(50):
        queues.add([Sample(f"a{number}", 0, 0.0, deadline=0.005)], client="a")
    assert owners(queues.next(0.0)) == ["a49"]  # all would be late
    queues.add([Sample("a50", 0, 0.0)], client="a")
    queues.add([Sample("b", 0, 0.0)], client="b")
    assert owners(queues.next(0.0)) == ["b"]


def test_a_request_that_has_begun_goes_on_behind_one_that_would_be_late():
    queues = SegmentQueues(costs_of([1, 1], one=4.0, more=1.0), max_samples=4)
    waiting_for(queues, ("begun", 6))
    assert owners(queues.next(0.0)) == ["begun"] * 4
    queues.ran(Run(0, 0, 1, [], 1.0), [Sample("deeper", 0, 0.0, deadline=0.008)], seconds=0.0, now=0.0)
    queues.add([Sample("late", 0, 0.0, deadline=0.005)])
    run = queues.next(0.0)
    assert (run.segment, owners(run)) == (0, ["begun"] * 2)


def test_the_deadline_of_what_runs_is_known_after_a_purge():
    queues = SegmentQueues(costs_of([1, 1, 1], one=20.0, more=19.0), max_samples=1, max_run_ms=80.0)
    queues.add([Sample("urgent", 0, 0.0, deadline=0.12)])
    run = queues.next(0.0)
    queues.purge(0.01)
    queues.ran(run, run.samples, seconds=0.02, now=0.02)
    for number in range(5):
        queues.add([Sample(number, 0, 0.02)])
    assert owners(queues.next(0.02)) == ["urgent"]


def test_a_block_that_takes_longer_than_a_run_may_is_waited_for():
    queues = SegmentQueues(RunCosts([1], [[[40.0]]] * 3), max_run_ms=15.0)
    queues.add([Sample("new", 0, 0.08)])
    queues.ran(Run(1, 0, 1, [], 1.0), [Sample("urgent", 0, 0.0, deadline=0.15)], seconds=0.04, now=0.08)
    assert owners(queues.next(0.08)) == ["urgent"]


def test_a_pause_while_the_first_segment_runs_is_not_its_share_of_the_time():
    queues, now = SegmentQueues(costs_of([1, 3]), max_run_ms=15.0), 5.0
    waiting_for(queues, ("deeper", 8))
    run = queues.next(0.0)
    queues.ran(run, run.samples * 50, seconds=5.0, now=now)
    queues.add([Sample("easy", 0, now)])
    while now < 5.3 and "easy" not in owners(run):
        run = queues.next(now)
        seconds = queues.costs.milliseconds(run.segment, run.start, run.stop, len(run.samples)) / 1e3
        now += seconds
        queues.ran(run, [], seconds, now)
    assert now < 5.3


def test_a_late_request_that_has_begun_goes_on():
    queues = SegmentQueues(costs_of([1, 1], one=4.0, more=1.0), max_samples=4)
    for owner in "ab":
        queues.add([Sample(owner, number, 0.0, deadline=0.005) for number in range(8)])
    assert [owners(queues.next(0.0)) for _ in range(2)] == [["b"] * 4] * 2


@pytest.mark.parametrize("had_error", [True, False])
def test_how_long_runs_take_is_not_learnt_from_those_that_fail(had_error):
    queues = SegmentQueues(costs_of([1], one=4.0, more=1.0), max_samples=4)
    for _ in range(100):
        queues.add([Sample("failing", 0, 0.0)])
        queues.ran(queues.next(0.0), [], seconds=0.04, now=0.0, failed=1, had_error=had_error)
    for owner in "ab":
        queues.add([Sample(owner, 0, 0.0, deadline=0.02)])
    # by the costs both have time; where runs take ten times as long, neither has, and one alone begins
    assert len(owners(queues.next(0.0))) == (2 if had_error else 1)


def test_a_pause_of_the_machine_says_nothing_of_the_next_runs():
    work = ExpectedWork(costs_of([2] * 3, one=3.0, more=2.0), 32, 15.0)
    for milliseconds in [10.0] * 100 + [10_000.0]:
        work.took(10.0, milliseconds)
    assert work.pace < 1.5


@pytest.mark.parametrize("patient", [None, 60.0])
@pytest.mark.parametrize("exits", [0, 3])
def test_who_has_little_time_does_not_wait_behind_those_who_have_much(patient, exits):
    costs = RunCosts([1, 2], [[[1.0, 1.2]]] + [[[5.0, 6.5]]] * 3)
    flood = [Arrival(0.0, [3], patient) for _ in range(500)]
    few = [Arrival(1.0 + 0.05 * number, [exits], 0.2) for number in range(30)]
    outcomes, _ = simulate(flood + few, costs)
    assert all(outcome.answer is not None for outcome in outcomes[500:])


def test_what_is_cancelled_before_it_runs_has_had_no_turn():
    queues = SegmentQueues(costs_of([1]), max_samples=1, over=lambda owner: owner == "cancelled")
    queues.add([Sample("cancelled", number, 0.0) for number in range(400)], client="a")
    queues.purge(0.0)
    for _ in range(20):
        queues.add([Sample("other", 0, 0.0)], client="b")
    queues.add([Sample("again", 0, 0.0)], client="a")
    assert ["again"] in [owners(queues.next(0.0)) for _ in range(2)]


def test_who_has_no_time_left_is_told_at_once_whatever_runs():
    costs = RunCosts([1, 2], [[[1.0, 1.2]]] + [[[5.0, 6.5]]] * 3)
    arrivals = [*(Arrival(0.0, [3]) for _ in range(500)), Arrival(1.0, [3] * 50, 0.2), Arrival(100.0, [0])]
    outcomes, _ = simulate(arrivals, costs)
    assert isinstance(outcomes[500].error, Expired) and outcomes[500].seconds < 0.2 + 0.05


def test_requests_of_one_size_are_begun_one_after_the_other():
    queues = SegmentQueues(costs_of([1]), max_samples=4)
    waiting_for(queues, ("a", 6), ("b", 6))
    assert [owners(queues.next(0.0)) for _ in range(3)] == [["a"] * 4, ["a"] * 2 + ["b"] * 2, ["b"] * 4]


def test_samples_that_exit_first_are_answered_soon_however_many_go_on():
    """Beside 16 clients whose samples go through all blocks, one after another."""
    costs, waits = costs_of([1, 3, 4, 4], one=6.5, more=3.5), []
    hard = [Arrival(0.0, [3]) for _ in range(16)] + [Arrival(0.3 + 0.06 * number, [3]) for number in range(100)]
    easy = [Arrival(0.2 + 0.11 * number, [0]) for number in range(50)]
    arrivals = sorted(hard + easy, key=lambda each: each.seconds)
    outcomes, _ = simulate(arrivals, costs)
    waits = [outcome.seconds for outcome in outcomes if outcome.arrival.exits == [0]]
    alone = simulate([Arrival(0.0, [0])], costs)[0][0].seconds
    assert np.median(waits) <= 3 * alone + 1e-9 and max(waits) <= 6 * alone


# -- answers ----------------------------------------------------------------------------------------------------


def gate(model, images):
    cuts = between(model, images, "confidence")["threshold"]
    # the score of such a gate
    threshold = [1 / (1 + math.exp(3 - 6 * cut)) for cut in cuts]
    models = {"exits": [0, 2], "models": typical_models(2), "num_labels": model.config.num_labels}
    return {"name": "gate", "threshold": threshold, **models}


POLICIES = {
    "confidence": lambda model, images: between(model, images, "confidence", temperature=[0.8, 1.1, 0.9]),
    "patience": lambda model, images: PATIENCE,
    "patience_confidence": lambda model, images: {
        **between(model, images, "entropy"), "name": "patience_confidence", "patience": 2
    },
    "gate": gate,
}  # fmt: skip


def answered(model, images, draw, **settings):
    """Answers to requests of some images each that come while others run."""
    opened = SimpleNamespace(model=model, shape=list(images.shape[1:]))
    runner, now = TorchSegments(opened), [0.0]
    scheduler = SegmentScheduler(runner, costs_of(runner.num_blocks), clock=lambda: now[0], **settings)
    order, futures = draw.permutation(len(images)), []
    while len(order) or scheduler.waiting:
        if len(order) and (draw.random() < 0.5 or not scheduler.waiting):
            some, order = np.split(order, [int(draw.integers(1, 6))])
            futures.append((some, scheduler.submit({"pixel_values": images[some].numpy()})))
        scheduler.step()
        now[0] += draw.exponential(0.01)
    return futures


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_answers_do_not_depend_on_which_samples_run_together(name):
    model, images = drawn(POLICIES[name], **SMALL)
    images = images[:20]
    expected = model(images)
    for settings_ in ({}, {"max_samples": 2}):
        for some, future in answered(model, images, rng(), **settings_):
            found = future.result(0)
            assert found["degraded"].tolist() == [0] * len(some)
            for key in ("logits", "exit_index", "exit_layer", "exit_score"):
                wanted = getattr(expected, key)[some].numpy()
                np.testing.assert_allclose(found[key], wanted, atol=1e-5, rtol=1e-5)
    # the NaN sample reached the end, and the others are as they are without it
    assert expected.exit_index[NAN_ROW] == 3 and expected.logits[NAN_ROW].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vit"])
def test_every_backbone_and_an_ensemble(kind):
    small = {key: value for key, value in SMALL.items() if kind != "swin" or key != "num_hidden_layers"}
    more = {"exit_positions": [1, 2, 3], "exit_ensemble": {"weights": [0.5, 1.0, 1.0, 2.0], "bias": [0.1] + [0.0] * 4}}
    model, images = drawn(POLICIES["confidence"], kind, **{**small, **more})
    images = images[:20]
    expected = model(images)
    for some, future in answered(model, images, rng()):
        found = future.result(0)
        assert found["exit_index"].tolist() == expected.exit_index[some].tolist()
        np.testing.assert_allclose(found["logits"], expected.logits[some].numpy(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_skipped_exits_make_longer_segments_and_blocks_are_measured():
    model, images = drawn(gate, **SMALL)
    runner = TorchSegments(SimpleNamespace(model=model, shape=list(images.shape[1:])))
    assert runner.num_blocks == [2, 2, 1]
    for samples in (1, 3):
        times = runner.walk(samples)
        assert [len(blocks) for blocks in times] == runner.num_blocks and min(map(min, times)) > 0


@torch.no_grad()
@pytest.mark.parametrize("ensemble", [None, {"weights": [0.5, 1.0, 1.0, 2.0], "bias": [0.1] + [0.0] * 4}])
def test_each_sample_may_have_thresholds_of_its_own(ensemble):
    model, images = drawn(POLICIES["confidence"], **SMALL, exit_ensemble=ensemble)
    images, wanted = images[:20], {}
    runner, now = TorchSegments(SimpleNamespace(model=model, shape=list(images.shape[1:]))), [0.0]
    scheduler = SegmentScheduler(runner, costs_of(runner.num_blocks), clock=lambda: now[0])
    rungs = [[cut * factor for cut in model.exit_policy.threshold] for factor in (0.9, 1.0, 1.1)]
    for number, threshold in enumerate(rungs):
        some = slice(number, None, 3)
        thresholds = np.tile(np.array(threshold, np.float32), (len(images[some]), 1))
        future = scheduler.submit({"pixel_values": images[some].numpy(), "thresholds": thresholds})
        model.set_exit_policy({**model.exit_policy.to_dict(), "threshold": threshold})
        wanted[future] = model(images[some])
    while scheduler.waiting:
        scheduler.step()
        now[0] += 0.01
    for future, expected in wanted.items():
        assert future.result(0)["exit_index"].tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(future.result(0)["logits"], expected.logits.numpy(), atol=1e-5, rtol=1e-5)


# -- the thread -------------------------------------------------------------------------------------------------


class Held:
    """Two segments of a block each; waits to be told to go on, and fails where a sample is told to."""

    num_blocks = [1, 1]

    def __init__(self):
        self.begun, self.go_on, self.runs = threading.Event(), threading.Event(), []

    def run(self, segment, start, stop, samples):
        self.begun.set()
        assert self.go_on.wait(60)
        values = [float(np.asarray(sample["x"])) for sample in samples]
        self.runs.append((segment, values))
        if any(value < 0 for value in values):
            raise RuntimeError("too much for me")
        ends = [segment == 1 or value > 10 for value in values]
        answer = {"exit_index": np.array([segment])}
        return samples, [answer if end else None for end in ends]


def held(**options):
    runner = Held()
    return runner, SegmentScheduler(runner, costs_of([1, 1]), max_wait=0, **options)


def x(*values):
    return {"x": np.array(values)}


def test_the_guilty_sample_alone_fails_and_costs_of_others_are_refused():
    runner, scheduler = held()
    first = scheduler.submit(x(20.0))
    assert runner.begun.wait(60)
    futures = [scheduler.submit(x(*values)) for values in ((1.0, 20.0), (-1.0,), (2.0,))]
    runner.go_on.set()
    assert first.result(60)["exit_index"].tolist() == [0]
    assert futures[0].result(60)["exit_index"].tolist() == [1, 0]
    with pytest.raises(RuntimeError, match="too much"):
        futures[1].result(60)
    assert futures[2].result(60)["exit_index"].tolist() == [1]
    scheduler.close()
    assert [sorted(values) for segment, values in runner.runs if len(values) > 2] == [[-1.0, 1.0, 2.0, 20.0]]
    with pytest.raises(Busy, match="shutting down"):
        scheduler.submit(x(1.0))
    with pytest.raises(ValueError, match="costs of segments of"):
        SegmentScheduler(runner, costs_of([2]))
    for wrong in ({"max_samples": 0}, {"max_run_ms": 0.0}, {"max_wait": 61}, {"max_waiting": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            SegmentScheduler(runner, costs_of([1, 1]), **wrong)


def test_cancelled_and_expired_samples_go_no_further():
    metrics = Metrics()
    runner, scheduler = held(observer=metrics)
    first = scheduler.submit(x(1.0))
    assert runner.begun.wait(60)
    left, late = scheduler.submit(x(2.0)), scheduler.submit(x(3.0), 0.0)
    assert left.cancel() and first.cancel() and scheduler.waiting == 0
    good = scheduler.submit(x(20.0))
    runner.go_on.set()
    with pytest.raises(Expired):
        late.result(60)
    assert len(good.result(60)["exit_index"]) == 1
    scheduler.close()
    assert runner.runs == [(0, [1.0]), (0, [20.0])]
    text = metrics.text({})
    assert 'lgvit_samples_dropped_total{reason="cancelled"} 2' in text
    assert 'lgvit_samples_dropped_total{reason="expired"} 1' in text


def test_too_many_are_refused_and_those_that_have_begun_are_answered_at_the_end():
    runner, scheduler = held(max_waiting=3)
    with pytest.raises(ValueError, match="empty batch"):
        scheduler.submit(x())
    with pytest.raises(ValueError, match="timeout=nan"):
        scheduler.submit(x(1.0), math.nan)
    running = scheduler.submit(x(1.0))
    assert runner.begun.wait(60)
    waiting = [scheduler.submit(x(1.0)) for _ in range(3)]
    with pytest.raises(Busy, match="3 samples are waiting"):
        scheduler.submit(x(1.0))
    scheduler.refuse_waiting()
    for future in waiting:
        with pytest.raises(Busy, match="shutting down"):
            future.result(60)
    runner.go_on.set()
    scheduler.close()
    assert running.result(0)["exit_index"].tolist() == [1] and not scheduler.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_request_waits_for_a_thread_that_has_ended():
    runner, scheduler = held()

    def ends(*_):
        runner.begun.set()
        runner.go_on.wait(60)
        raise SystemExit

    runner.run = ends
    futures = [scheduler.submit(x(1.0))]
    assert runner.begun.wait(60)
    futures.append(scheduler.submit(x(1.0)))
    runner.go_on.set()
    for future in futures:
        with pytest.raises(Busy, match="no thread computes any more"):
            future.result(60)
    scheduler._thread.join(60)
    assert not scheduler.alive
    with pytest.raises(Busy, match="no thread computes"):
        scheduler.submit(x(1.0))
