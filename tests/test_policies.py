"""Each policy against its rule written out in plain Python, and the laws that all of them obey."""

import dataclasses
import inspect
import itertools
import json
import math

import pytest
import torch

from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.exit_table import ExitTable
from lgvit_hf.policies import (
    POLICIES,
    ExitPolicy,
    build_policy,
    entropy,
    margin,
    probabilities,
    register_policy,
)
from lgvit_hf.segments import Segment, State
from tests.gates import random_models
from tests.seeds import generator

pytestmark = pytest.mark.version_independent

NUM_EXITS, NUM_ROWS, NUM_LABELS = 4, 120, 3


def random_logits(scale=2.0):
    """Four exits and the final classifier, `[E, B, C]`."""
    return scale * torch.randn(NUM_EXITS + 1, NUM_ROWS, NUM_LABELS, generator=generator(1))


def stored(exit_logits):
    """Segments that answer with stored logits; the state is the row's number."""
    return [
        Segment(index + 1, (), lambda state, logits=logits: logits[state["row"]])
        for index, logits in enumerate(exit_logits)
    ]


def decide(policy, exit_logits):
    """The policy asked at every exit with all rows: `leave` `[E, B]` and `score` `[E, B]`."""
    memory = policy.start(exit_logits.shape[1], "cpu")
    leaves, scores = [], []
    for index, logits in enumerate(exit_logits):
        leave, memory = policy(logits, memory, index)
        leaves.append(leave)
        scores.append(memory["score"])
    return torch.stack(leaves), torch.stack(scores)


# -- the rules in plain Python: `history` holds one row's logits at every exit so far --------------------------


def softmax(logits, temperature=1.0):
    largest = max(logits)
    powers = [math.exp((z - largest) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def entropy_of(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


def at(value, index):
    return value[index] if isinstance(value, list) else value


def nearby(settings):
    """The same settings with every threshold a little lower, and a little higher."""
    for shift in (-1e-5, 1e-5):
        yield {
            key: (torch.tensor(value, dtype=torch.float64) + shift).tolist() if "threshold" in key else value
            for key, value in settings.items()
        }


def streak(flags):
    """How many of the last flags are true in a row."""
    count = 0
    for flag in flags:
        count = count + 1 if flag else 0
    return count


class PolicyTesterMixin:
    """`cases` are settings without the name; `rule` says whether a row leaves, and `score` what it is judged by."""

    name: str
    cases: list

    def rule(self, history, settings):
        raise NotImplementedError

    def score(self, history, settings):
        raise NotImplementedError

    def policies(self):
        for settings in self.cases:
            yield build_policy({"name": self.name, **settings}, NUM_EXITS), settings

    def test_rule_of_each_row(self):
        exit_logits = random_logits()
        for policy, settings in self.policies():
            leaves, scores = decide(policy, exit_logits)
            rows = exit_logits.transpose(0, 1).tolist()
            told = {True: 0, False: 0}
            for row, all_logits in enumerate(rows):
                histories = [all_logits[: index + 1] for index in range(NUM_EXITS)]
                expected = [self.rule(history, settings) for history in histories]
                if any([self.rule(history, near) for history in histories] != expected for near in nearby(settings)):
                    continue  # rounding decides
                assert leaves[:NUM_EXITS, row].tolist() == expected, (settings, row)
                assert scores[:NUM_EXITS, row].tolist() == pytest.approx(
                    [self.score(history, settings) for history in histories], abs=1e-5
                )
                told[True] += sum(expected)
                told[False] += NUM_EXITS - sum(expected)
            # a few may be too near to a threshold, not many
            assert sum(told.values()) > 0.9 * NUM_EXITS * NUM_ROWS
            if settings not in getattr(self, "one_sided", []):
                assert min(told.values()) >= 5, f"{settings} tells no samples apart"

    def test_rows_alone_and_in_any_order(self):
        exit_logits = random_logits()
        order = torch.randperm(NUM_ROWS)
        for policy, _ in self.policies():
            leaves, scores = decide(policy, exit_logits)
            for rows in (order, torch.tensor([5]), torch.tensor([7, 7, 2])):
                some_leaves, some_scores = decide(policy, exit_logits[:, rows])
                assert torch.equal(some_leaves, leaves[:, rows])
                torch.testing.assert_close(some_scores, scores[:, rows], rtol=1e-6, atol=0)

    def test_memory_is_batch_first(self):
        exit_logits = random_logits()
        kept = torch.tensor([3, 50, 4, 119])
        for policy, _ in self.policies():
            whole = policy.start(NUM_ROWS, "cpu")
            part = {name: tensor[kept] for name, tensor in whole.items()}
            for index, logits in enumerate(exit_logits):
                leave, whole = policy(logits, whole, index)
                some_leave, part = policy(logits[kept], part, index)
                assert all(len(tensor) == NUM_ROWS for tensor in whole.values())
                assert torch.equal(some_leave, leave[kept])
                part = {name: tensor[kept] for name, tensor in whole.items()}

    def test_leave_and_score_have_the_promised_types(self):
        for policy, _ in self.policies():
            leave, memory = policy(random_logits()[0], policy.start(NUM_ROWS, "cpu"), 0)
            assert leave.dtype == torch.bool and leave.shape == (NUM_ROWS,)
            assert memory["score"].dtype == torch.float32 and memory["score"].shape == (NUM_ROWS,)

    def test_half_precision_is_scored_in_float32(self):
        for half in (random_logits().bfloat16(), random_logits().half()):
            for policy, _ in self.policies():
                leaves, scores = decide(policy, half)
                expected_leaves, expected_scores = decide(policy, half.float())
                assert scores.dtype == torch.float32
                assert torch.equal(leaves, expected_leaves) and torch.equal(scores, expected_scores)

    def test_nan_rows_stay_to_the_next_exit(self):
        exit_logits = random_logits(scale=20.0)
        exit_logits[torch.rand(NUM_EXITS + 1, NUM_ROWS) < 0.3] = math.nan
        exit_logits[:2, :10, 1] = math.nan  # one class is enough
        is_nan = exit_logits.isnan().any(-1)
        for policy, _ in self.policies():
            answers = run_early(stored(exit_logits), State({"row": torch.arange(NUM_ROWS)}), policy)
            at_nan = is_nan[answers.exit_index, torch.arange(NUM_ROWS)]
            assert (answers.exit_index[at_nan] == NUM_EXITS).all()

    def test_all_nan_rows_reach_the_end(self):
        nan = torch.full((NUM_EXITS + 1, 4, NUM_LABELS), math.nan)
        for policy, _ in self.policies():
            answers = run_early(stored(nan), State({"row": torch.arange(4)}), policy)
            assert answers.exit_index.tolist() == [NUM_EXITS] * 4

    def test_dict_round_trip(self):
        exit_logits = random_logits()
        for policy, settings in self.policies():
            saved = json.loads(json.dumps(policy.to_dict()))
            assert saved["name"] == self.name and settings.items() <= saved.items()
            again = build_policy(saved, NUM_EXITS)
            assert type(again) is type(policy) and again.to_dict() == policy.to_dict()
            assert torch.equal(decide(again, exit_logits)[0], decide(policy, exit_logits)[0])

    def test_settings_stay_as_they_are(self):
        for policy, settings in self.policies():
            for key, value in {**settings, "another": 1}.items():
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(policy, key, value)
        for name, parameter in inspect.signature(POLICIES[self.name]).parameters.items():
            assert (parameter.kind is parameter.KEYWORD_ONLY) == (name in ("temperature", "exits")), name

    def test_unknown_parameter_is_named(self):
        with pytest.raises(ValueError, match="exit_policy.*'treshold'.*" + self.name):
            build_policy({"name": self.name, **self.cases[0], "treshold": 0.5}, NUM_EXITS)

    def test_missing_parameter_is_named(self):
        for key in self.cases[0]:
            settings = {name: value for name, value in self.cases[0].items() if name != key}
            if key != "temperature":
                with pytest.raises(ValueError, match=f"exit_policy.*missing.*'{key}'.*'{self.name}'"):
                    build_policy({"name": self.name, **settings}, NUM_EXITS)


class ThresholdPolicyMixin(PolicyTesterMixin):
    """Policies on the softmax: with a temperature, and with one threshold for all exits or one for each."""

    def test_temperature_divides_the_logits(self):
        exit_logits = random_logits()
        for policy, settings in self.policies():
            if "temperature" not in settings:
                warm = build_policy({"name": self.name, **settings, "temperature": 2.5}, NUM_EXITS)
                leaves, scores = decide(warm, 2.5 * exit_logits)
                expected_leaves, expected_scores = decide(policy, exit_logits)
                assert torch.equal(leaves, expected_leaves)
                torch.testing.assert_close(scores, expected_scores)

    def test_one_temperature_per_exit(self):
        exit_logits = random_logits()
        temperatures = [0.5, 1.0, 2.0, 4.0]
        settings = {"name": self.name, **self.cases[0]}
        listed = build_policy({**settings, "temperature": temperatures}, NUM_EXITS)
        leaves, _ = decide(listed, exit_logits)
        scaled = exit_logits / torch.tensor([*temperatures, 1.0])[:, None, None]
        assert torch.equal(leaves, decide(build_policy(settings, NUM_EXITS), scaled)[0])
        # the final classifier may have a temperature too
        build_policy({**settings, "temperature": [*temperatures, 3.0]}, NUM_EXITS)

    def test_one_threshold_for_all_is_that_threshold_for_each(self):
        exit_logits = random_logits()[:NUM_EXITS]
        for key in ("threshold", "entropy_threshold"):
            if key in self.cases[0]:
                each = {**self.cases[0], key: [self.cases[0][key]] * NUM_EXITS}
                scalar = decide(build_policy({"name": self.name, **self.cases[0]}, NUM_EXITS), exit_logits)[0]
                assert torch.equal(
                    decide(build_policy({"name": self.name, **each}, NUM_EXITS), exit_logits)[0], scalar
                )

    def test_the_first_exit_unless_another_is_named(self):
        # thresholds of their own, which no other exit shares
        for key in ("threshold", "entropy_threshold"):
            if key in self.cases[0]:
                each = {key: [self.cases[0][key], *([1.0] * 3 if key == "threshold" else [0.0] * 3)]}
                policy = build_policy({"name": self.name, **self.cases[0], **each}, NUM_EXITS)
                memory = policy.start(NUM_ROWS, "cpu")
                by_default, first, second = (policy(random_logits()[0], memory, *index) for index in ((), (0,), (1,)))
                alike = [
                    torch.equal(by_default[0], other[0])
                    and all(torch.equal(by_default[1][k], v) for k, v in other[1].items())
                    for other in (first, second)
                ]
                assert alike == [True, False]

    def test_wrong_number_of_thresholds_or_temperatures(self):
        for key in ("threshold", "entropy_threshold", "temperature"):
            for count in (0, 1, NUM_EXITS - 1, NUM_EXITS + 1, NUM_EXITS + 2):
                if key in ("temperature", *self.cases[0]) and (key, count) != ("temperature", NUM_EXITS + 1):
                    with pytest.raises(ValueError, match=rf"exit_policy: {key} has {count} values.*{NUM_EXITS} exits"):
                        build_policy({"name": self.name, **self.cases[0], key: [0.5] * count}, NUM_EXITS)

    def test_threshold_that_is_no_number(self):
        for value in (None, "0.5", True, math.nan, [0.5, "high"], {"a": 1}):
            for key in ("threshold", "entropy_threshold"):
                if key in self.cases[0]:
                    with pytest.raises(ValueError, match=f"exit_policy: {key}="):
                        build_policy({"name": self.name, **self.cases[0], key: value}, 2)

    def test_temperature_that_is_not_positive(self):
        for value in (0, -1.0, math.inf, math.nan, True, "2", [1.0, 0.0, 1.0, 1.0]):
            with pytest.raises(ValueError, match="exit_policy: temperature=.*positive"):
                build_policy({"name": self.name, **self.cases[0], "temperature": value}, NUM_EXITS)


class CountingPolicyMixin:
    def test_patience_that_is_no_count(self):
        for value in (0, -1, 1.5, True, "2", None, [2]):
            with pytest.raises(ValueError, match="exit_policy: patience="):
                build_policy({"name": self.name, **self.cases[0], "patience": value}, NUM_EXITS)


class TestConfidence(ThresholdPolicyMixin):
    name = "confidence"
    cases = [
        {"threshold": 0.8},
        {"threshold": [0.9, 0.6, 0.7, 0.5]},
        {"threshold": 0.6, "temperature": 2.0},
        {"threshold": [0.9, 0.6, 0.7, 0.5], "temperature": [0.5, 1.0, 2.0, 3.0]},
    ]

    def score(self, history, settings):
        return max(softmax(history[-1], at(settings.get("temperature", 1.0), len(history) - 1)))

    def rule(self, history, settings):
        return self.score(history, settings) > at(settings["threshold"], len(history) - 1)


class TestEntropy(ThresholdPolicyMixin):
    name = "entropy"
    cases = [
        {"threshold": 0.5},
        {"threshold": [0.2, 0.9, 0.3, 0.6]},
        {"threshold": 0.9, "temperature": 2.0},
    ]

    def score(self, history, settings):
        return entropy_of(softmax(history[-1], settings.get("temperature", 1.0)))

    def rule(self, history, settings):
        return self.score(history, settings) < at(settings["threshold"], len(history) - 1)


class TestMargin(ThresholdPolicyMixin):
    name = "margin"
    cases = [{"threshold": 0.7}, {"threshold": [0.9, 0.1, 0.5, 0.3]}, {"threshold": 0.4, "temperature": 3.0}]

    def score(self, history, settings):
        probs = sorted(softmax(history[-1], settings.get("temperature", 1.0)))
        return probs[-1] - probs[-2]

    def rule(self, history, settings):
        return self.score(history, settings) > at(settings["threshold"], len(history) - 1)


class TestConfidenceEntropy(ThresholdPolicyMixin):
    name = "confidence_entropy"
    cases = [
        {"threshold": 0.7, "entropy_threshold": 0.6},
        {"threshold": [0.9, 0.6, 0.5, 0.8], "entropy_threshold": [0.9, 0.2, 0.8, 0.4]},
        {"threshold": 0.6, "entropy_threshold": 0.9, "temperature": 1.5},
    ]

    def score(self, history, settings):
        return max(softmax(history[-1], settings.get("temperature", 1.0)))

    def rule(self, history, settings):
        index, probs = len(history) - 1, softmax(history[-1], settings.get("temperature", 1.0))
        return max(probs) > at(settings["threshold"], index) and entropy_of(probs) < at(
            settings["entropy_threshold"], index
        )

    def test_both_must_hold(self):
        # 0.5, 0.25, 0.25: entropy 1.04
        logits = torch.tensor([[math.log(2.0), 0.0, 0.0]])
        sure, unsure = {"threshold": 0.4, "entropy_threshold": 1.1}, {"threshold": 0.6, "entropy_threshold": 1.0}
        for first, second in ((sure, sure), (sure, unsure), (unsure, sure), (unsure, unsure)):
            settings = {"threshold": first["threshold"], "entropy_threshold": second["entropy_threshold"]}
            leave, _ = build_policy({"name": self.name, **settings}, 1)(logits, {}, 0)
            assert leave.item() == (first is sure and second is sure)


class TestLabelConfidence(ThresholdPolicyMixin):
    name = "label_confidence"
    cases = [
        {"threshold": 0.55},
        {"threshold": [0.52, 0.6, 0.65, 0.55]},
        {"threshold": 0.55, "temperature": 0.5},
        {"threshold": 0.55, "temperature": [0.5, 0.8, 1.0, 1.2]},
    ]

    def score(self, history, settings):
        temperature = at(settings.get("temperature", 1.0), len(history) - 1)
        chances = [1 / (1 + math.exp(-logit / temperature)) for logit in history[-1]]
        return min(max(chance, 1 - chance) for chance in chances)

    def rule(self, history, settings):
        return self.score(history, settings) > at(settings["threshold"], len(history) - 1)


class TestPatience(CountingPolicyMixin, PolicyTesterMixin):
    name = "patience"
    cases = [{"patience": 2}, {"patience": 3}, {"patience": 1}]
    one_sided = [{"patience": 1}]

    def score(self, history, settings):
        labels = [logits.index(max(logits)) for logits in history]
        return 1 + streak([a == b for a, b in zip(labels, labels[1:], strict=False)])

    def rule(self, history, settings):
        return self.score(history, settings) >= settings["patience"]

    def test_first_exit_counts_one_and_a_nan_breaks_the_streak(self):
        policy = build_policy({"name": "patience", "patience": 2}, 4)
        nan = math.nan
        labels_seen = torch.tensor([[[1.0, 0.0]], [[nan, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]])
        leaves, scores = decide(policy, labels_seen)
        assert scores[:, 0].tolist() == [1.0, 0.0, 1.0, 2.0]
        assert leaves[:, 0].tolist() == [False, False, False, True]


class TestPatienceConfidence(CountingPolicyMixin, ThresholdPolicyMixin):
    name = "patience_confidence"
    cases = [
        {"threshold": 0.7, "patience": 2},
        {"threshold": [0.9, 0.5, 0.7, 0.8], "patience": 2},
        {"threshold": 0.9, "patience": 3, "temperature": 1.5},
        {"threshold": 0.5, "patience": 1},
    ]

    def score(self, history, settings):
        temperature, threshold = settings.get("temperature", 1.0), settings["threshold"]
        return streak(
            [entropy_of(softmax(logits, temperature)) < at(threshold, i) for i, logits in enumerate(history)]
        )

    def rule(self, history, settings):
        return self.score(history, settings) >= settings["patience"]


class TestCalibratedConfidence(ThresholdPolicyMixin):
    name = "calibrated_confidence"
    bins = {
        "edges": [[0.5, 0.7, 0.9], [], [0.6], [0.5, 0.6]],
        "accuracies": [[0.2, 0.5, 0.8, 0.9], [0.5], [0.4, 0.9], [0.7, 0.3, 0.8]],
    }
    cases = [{"threshold": 0.6, **bins}, {"threshold": [0.85, 0.6, 0.5, 0.5], "temperature": 1.5, **bins}]

    def score(self, history, settings):
        index = len(history) - 1
        confidence = max(softmax(history[-1], at(settings.get("temperature", 1.0), index)))
        if index >= NUM_EXITS:
            return confidence
        return settings["accuracies"][index][sum(confidence > edge for edge in settings["edges"][index])]

    def rule(self, history, settings):
        return self.score(history, settings) > at(settings["threshold"], len(history) - 1)

    def test_exits_without_an_accurate_bin_are_skipped(self):
        policy = build_policy({"name": self.name, **self.cases[0]}, NUM_EXITS)
        assert [policy.skips(index) for index in range(NUM_EXITS)] == [False, True, False, False]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"edges": [[0.5]] * 4}, r"edges\[0\] must be 3 ascending numbers between the 4 bins"),
            ({"edges": [[0.7, 0.5, 0.9], [], [0.6], [0.5, 0.6]]}, r"edges\[0\] must be 3 ascending"),
            ({"edges": [[0.5]], "accuracies": [[0.1, 0.2]]}, "edges of 1 exits, but the model has 4"),
            ({"edges": [[0.5]]}, "edges of 1 exits, accuracies of 4"),
            ({"accuracies": [["high"], [0.5], [0.4, 0.9], [0.7, 0.3, 0.8]]}, r"accuracies\[0\]=\['high'\]"),
        ],
    )
    def test_settings_that_do_not_fit(self, change, message):
        with pytest.raises(ValueError, match=message):
            build_policy({"name": self.name, **self.cases[0], **change}, NUM_EXITS)


def gate_settings(exits, number, **settings):
    return {"models": random_models(len(exits), number), "num_labels": NUM_LABELS, "exits": exits, **settings}


class TestGate(ThresholdPolicyMixin):
    name = "gate"
    cases = [
        gate_settings([0, 1, 2, 3], 1, threshold=0.6),
        gate_settings([0, 1, 2, 3], 2, threshold=[0.7, 0.4, 0.5, 0.6], temperature=1.7),
        gate_settings([1, 3], 3, threshold=0.5, temperature=[0.5, 1.0, 2.0, 3.0]),
    ]

    def score(self, history, settings):
        exits, temperature = settings["exits"], settings.get("temperature", 1.0)
        index = len(history) - 1
        if index not in exits:
            return float(index >= NUM_EXITS)
        place = exits.index(index)
        scaled = [[z / at(temperature, i) for z in logits] for i, logits in enumerate(history)]
        probs = [softmax(logits) for logits in scaled]
        here = probs[index]
        first, second = sorted(here)[:-3:-1]
        log_sum = math.log(sum(math.exp(z) for z in scaled[index]))
        features = [first, first - second, entropy_of(here), log_sum, max(scaled[index])]
        label = here.index(first)
        for earlier in [probs[i] for i in exits[:place]][::-1][:3]:
            features += [max(earlier), float(earlier.index(max(earlier)) == label), earlier[label]]
        model = settings["models"][place]
        logits = [
            sum(w * (x - m) / s for w, x, m, s in zip(weights, features, model["mean"], model["scale"], strict=True))
            for weights in model["weights"]
        ]
        return sum(1 / (1 + math.exp(-z - b)) for z, b in zip(logits, model["bias"], strict=True)) / 2

    def rule(self, history, settings):
        index = len(history) - 1
        return index in settings["exits"] and self.score(history, settings) > at(settings["threshold"], index)

    def test_means_stand_in_for_exits_that_are_unknown(self):
        settings = self.cases[0]
        policy = build_policy({"name": "gate", **settings}, NUM_EXITS)
        first, second = random_logits()[:2]
        _, memory = policy(first.fill_(math.nan), policy.start(NUM_ROWS, "cpu"), 0)
        assert memory["score"].isnan().all()
        unknown, never = policy(second, memory, 1), policy(second, policy.start(NUM_ROWS, "cpu"), 1)
        assert torch.equal(unknown[1]["score"], never[1]["score"]), "as under min_depth"
        model = {**settings["models"][1]}
        own = {name: values[:5] for name, values in model.items() if name in ("mean", "scale")}
        alone = {**own, "weights": [row[:5] for row in model["weights"]], "bias": model["bias"]}
        shallowest = {"name": "gate", "threshold": 0.6, "num_labels": NUM_LABELS, "exits": [1], "models": [alone]}
        expected = build_policy(shallowest, NUM_EXITS)(second, {}, 1)[1]["score"]
        torch.testing.assert_close(never[1]["score"], expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"exits": []}, "exits=.* at least one index"),
            ({"exits": [2, 0, 1, 3]}, "in ascending order"),
            ({"exits": [0, 1, 2, NUM_EXITS]}, f"the model has {NUM_EXITS}"),
            ({"models": random_models(3)}, "one for each of the 4 exits"),
            ({"models": [{}] * 4}, r"models\[0\] must hold numbers"),
            ({"models": random_models(4)[::-1]}, r"models\[0\]: shapes"),
            ({"num_labels": 0}, "num_labels"),
            ({"threshold": "high"}, "threshold='high'"),
            ({"threshold": [0.5] * 3}, "threshold has 3 values"),
        ],
    )
    def test_settings_that_do_not_fit(self, change, message):
        with pytest.raises(ValueError, match=message):
            build_policy({"name": "gate", **self.cases[0], **change}, NUM_EXITS)

    def test_numbers_that_are_not_finite_are_refused(self):
        models = random_models(4)
        models[2]["weights"][0][3] = math.nan
        with pytest.raises(ValueError, match=r"models\[2\] must hold finite numbers"):
            build_policy({"name": "gate", **self.cases[0], "models": models}, NUM_EXITS)

    def test_another_number_of_labels(self):
        policy = build_policy({"name": "gate", **self.cases[0]}, NUM_EXITS)
        with pytest.raises(ValueError, match="the gate is of 3 labels, the logits of 5"):
            policy(torch.zeros(2, 5), policy.start(2, "cpu"), 0)


class TestFixed(PolicyTesterMixin):
    name = "fixed"
    cases = [{"exit_index": 0}, {"exit_index": 2}, {"exit_index": NUM_EXITS}]
    one_sided = cases

    def score(self, history, settings):
        return max(softmax(history[-1]))

    def rule(self, history, settings):
        return len(history) - 1 >= settings["exit_index"]

    def test_shallower_heads_are_skipped(self):
        policy = build_policy({"name": "fixed", "exit_index": 2}, NUM_EXITS)
        assert [policy.skips(index) for index in range(NUM_EXITS)] == [True, True, False, False]

    def test_exit_that_is_not_there(self):
        for value in (NUM_EXITS + 1, -1, 1.0, True, "1", None):
            with pytest.raises(ValueError, match="exit_policy: exit_index="):
                build_policy({"name": "fixed", "exit_index": value}, NUM_EXITS)


class TestNever(PolicyTesterMixin):
    name = "never"
    cases = [{}]
    one_sided = cases

    def score(self, history, settings):
        return max(softmax(history[-1]))

    def rule(self, history, settings):
        return False

    def test_every_head_is_skipped(self):
        assert all(build_policy("never", NUM_EXITS).skips(index) for index in range(NUM_EXITS))


# -- what does not belong to one policy ------------------------------------------------------------------------


def test_registry_is_covered():
    tested = {
        case.name
        for case in globals().values()
        if isinstance(case, type) and hasattr(case, "rule") and hasattr(case, "name")
    }
    assert tested == set(POLICIES)


def test_thresholds_are_strict():
    half = torch.tensor([[0.0, 0.0]])  # confidence 0.5, margin 0
    assert not build_policy({"name": "confidence", "threshold": 0.5}, 1)(half, {}, 0)[0].item()
    assert not build_policy({"name": "margin", "threshold": 0.0}, 1)(half, {}, 0)[0].item()
    sure = torch.tensor([[200.0, 0.0]])  # entropy 0
    assert not build_policy({"name": "entropy", "threshold": 0.0}, 1)(sure, {}, 0)[0].item()


# no probability is above 1, no entropy below 0, and a list says nothing of the final classifier
@pytest.mark.parametrize(
    ("settings", "skipped"),
    [
        ({"name": "confidence", "threshold": [1.0, 0.999, 1.5, 0.0]}, [True, False, True, False, True]),
        ({"name": "margin", "threshold": [1.0, 0.999, 1.5, 0.0]}, [True, False, True, False, True]),
        ({"name": "entropy", "threshold": [0.0, 1e-9, -0.5, 2.0]}, [True, False, True, False, True]),
        (
            {"name": "confidence_entropy", "threshold": [1, 0.9, 0.9, 0.9], "entropy_threshold": [1, 1e-9, 0, -1.0]},
            [True, False, True, True, True],
        ),
    ],
    ids=lambda value: value["name"] if "name" in value else "",
)
def test_exits_where_nothing_can_exit_are_skipped(settings, skipped):
    policy = build_policy(settings, NUM_EXITS)
    assert [policy.skips(index) for index in range(NUM_EXITS + 1)] == skipped
    sure = torch.tensor([[200.0, 0.0]])
    assert not policy(sure, {}, NUM_EXITS)[0].item()
    # a single number holds for the final classifier too
    for key in ("threshold", "entropy_threshold"):
        settings = {**settings, key: settings[key][1]} if key in settings else settings
    policy = build_policy(settings, NUM_EXITS)
    assert not policy.skips(NUM_EXITS) and policy(sure, {}, NUM_EXITS)[0].item()


def test_patience_confidence_counts_on_at_the_final_classifier():
    """By its last threshold: entropies of 0.56 and 0.69 where 0.6 is the bound."""
    policy = build_policy({"name": "patience_confidence", "threshold": [0.1, 0.6], "patience": 3}, 2)
    sure, rather, unsure = [200.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]
    _, scores = decide(policy, torch.tensor([[sure, sure], [rather, rather], [rather, unsure]]))
    assert scores.tolist() == [[1, 1], [2, 2], [3, 0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "entropy", "threshold": 1e-6},
        {"name": "confidence", "threshold": 0.999},
        {"name": "margin", "threshold": 0.999},
        {"name": "confidence_entropy", "threshold": 0.999, "entropy_threshold": 1e-6},
        {"name": "patience_confidence", "threshold": 1e-6, "patience": 1},
    ],
    ids=lambda settings: settings["name"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_surest_rows_leave(settings, dtype):
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 60000.0]]).to(dtype)
    policy = build_policy(settings, 1)
    leave, memory = policy(logits, policy.start(2, "cpu"), 0)
    assert leave.tolist() == [True, True]
    if settings["name"] == "entropy":
        assert memory["score"].tolist() == [0.0, 0.0]


def test_probabilities_are_the_softmax_in_float32():
    logits = random_logits()[0].to(torch.bfloat16)
    expected = torch.tensor([softmax(row, 1.7) for row in logits.tolist()])
    ours = probabilities(logits, 1.7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_scores_of_several_exits_at_once():
    for logits in (random_logits(), random_logits()[:, :1]):
        probs = probabilities(logits)
        each = [probabilities(one) for one in logits]
        torch.testing.assert_close(probs, torch.stack(each), rtol=0, atol=0)
        for score in (entropy, margin):
            torch.testing.assert_close(score(probs), torch.stack([score(one) for one in each]), rtol=0, atol=0)


def test_a_single_label_is_always_sure():
    one = probabilities(torch.tensor([[-3.0], [0.5]]))
    assert one.tolist() == [[1.0], [1.0]] and margin(one).tolist() == [1.0, 1.0] and entropy(one).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("seed_name", "settings", "ours"),
    [
        ("patient_and_confident", {"threshold": 0.5, "patience": 2}, "patience_confidence"),
        ("confidence_and_entropy", {"threshold": 0.5, "entropy_threshold": 0.4}, "confidence_entropy"),
    ],
)
def test_names_of_the_original_scripts(seed_name, settings, ours):
    policy = build_policy({"name": seed_name, **settings}, NUM_EXITS)
    assert policy.to_dict() == build_policy({"name": ours, **settings}, NUM_EXITS).to_dict()


def test_unknown_name_lists_the_choices():
    for name in ("gumbel_lte", "confident", "", None, 3, ["never"]):
        with pytest.raises(ValueError) as error:
            build_policy({"name": name}, NUM_EXITS)
        message = str(error.value)
        assert "exit_policy" in message and repr(name) in message and all(known in message for known in POLICIES)
        assert ("never existed" in message) == (name == "gumbel_lte")


def test_name_alone_is_enough_where_nothing_else_is_needed():
    assert build_policy("never", 3).to_dict() == {"name": "never"}
    with pytest.raises(ValueError, match="missing parameter 'threshold'"):
        build_policy("confidence", 3)


@pytest.fixture
def registry():
    """What a test registers is forgotten."""
    before = dict(POLICIES)
    yield POLICIES
    POLICIES.clear()
    POLICIES.update(before)


class LabelPolicy(ExitPolicy):
    """Rows of one label leave."""

    def __init__(self, label):
        self.label = label

    def __call__(self, logits, memory, exit_index=0):
        return logits.argmax(-1) == self.label, memory

    def to_dict(self):
        return {"name": self.name, "label": self.label}


def test_registered_policy_is_built_by_name(registry):
    register_policy("label")(LabelPolicy)
    policy = build_policy({"name": "label", "label": 2}, NUM_EXITS)
    exit_logits = random_logits()
    answers = run_early(stored(exit_logits), State({"row": torch.arange(NUM_ROWS)}), policy)
    for row, index in enumerate(answers.exit_index.tolist()):
        labels = exit_logits[:, row].argmax(-1).tolist()
        assert index == (labels.index(2) if 2 in labels[:-1] else NUM_EXITS)
    # without a score of its own, the confidence of the answer
    torch.testing.assert_close(answers.exit_score, answers.logits.softmax(-1).amax(-1))
    with pytest.raises(ValueError, match="missing parameter 'label'"):
        build_policy({"name": "label"}, NUM_EXITS)


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="already a policy called 'never'"):
        register_policy("never")(LabelPolicy)
    register_policy("label")(LabelPolicy)
    register_policy("label")(LabelPolicy)
    # a module that is imported again
    again = type("LabelPolicy", (LabelPolicy,), {})
    register_policy("label")(again)
    assert POLICIES["label"] is again and again.name == "label"


def test_a_policy_with_open_parameters_takes_any(registry):
    class Open(ExitPolicy):
        def __init__(self, label, *rest, depth=1, **more):
            self.settings = {"label": label, "depth": depth, **more}

    register_policy("open")(Open)
    assert build_policy({"name": "open", "label": 3, "colour": "red"}, 2).settings == {
        "label": 3,
        "depth": 1,
        "colour": "red",
    }
    with pytest.raises(TypeError, match="label"):
        build_policy({"name": "open", "colour": "red"}, 2)

    class Listed(ExitPolicy):
        def __init__(self, *rest):
            self.rest = rest

    register_policy("listed")(Listed)
    assert build_policy("listed", 2).rest == ()


def test_any_callable_with_or_without_start():
    exit_logits = random_logits()
    rows = State({"row": torch.arange(NUM_ROWS)})

    def first_label(logits, memory):
        return logits.argmax(-1) == 0, memory

    answers = run_early(stored(exit_logits), rows, build_policy(first_label, NUM_EXITS))
    early = answers.exit_index < NUM_EXITS
    assert early.any() and (answers.logits[early].argmax(-1) == 0).all()

    class Third:
        """Counts the exits it has seen."""

        def start(self, batch_size, device):
            return {"seen": torch.zeros(batch_size, device=device)}

        def __call__(self, logits, memory):
            seen = memory["seen"] + 1
            return seen == 3, {"seen": seen}

    answers = run_early(stored(exit_logits), rows, build_policy(Third(), NUM_EXITS))
    assert answers.exit_index.tolist() == [2] * NUM_ROWS


def test_what_is_no_policy_is_refused():
    with pytest.raises(ValueError, match="exit_policy: 3 is not callable"):
        build_policy(3, NUM_EXITS)


# -- exits that are switched off -------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [[0, 2], [3], [0, 1, 2, 3]])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "patience", "patience": 2},
        {"name": "patience_confidence", "patience": 2, "threshold": 0.9},
    ],
    ids=lambda settings: settings["name"],
)
def test_patience_with_some_exits_is_as_if_the_others_were_not_there(settings, exits):
    exit_logits = random_logits()
    rows = State({"row": torch.arange(NUM_ROWS)})
    segments, asked = stored(exit_logits), []
    for index, segment in enumerate(segments):
        answer = segment.answer
        segments[index] = Segment(
            segment.depth, (), lambda state, index=index, answer=answer: asked.append(index) or answer(state)
        )
    found = run_early(segments, rows, build_policy({**settings, "exits": exits}, NUM_EXITS))
    fewer = run_early(stored(exit_logits[[*exits, NUM_EXITS]]), rows, build_policy(settings, len(exits)))
    assert torch.equal(found.logits, fewer.logits) and torch.equal(found.exit_score, fewer.exit_score)
    assert found.exit_index.tolist() == [[*exits, NUM_EXITS][index] for index in fewer.exit_index.tolist()]
    assert set(asked) <= {*exits, NUM_EXITS}


def with_skipped_exits(name, evaluated):
    """Settings of a built-in policy that evaluates some exits, other numbers at each."""

    def each(numbers, skipped):
        return [number if index in evaluated else skipped for index, number in enumerate(numbers)]

    temperature, thresholds = [0.5, 1.0, 2.0, 3.0, 1.5], each([0.7, 0.5, 0.6, 0.8], 1.0)
    nats = each([0.8, 0.9, 0.7, 1.0], 0.0)
    bins = {"edges": [[0.6], [0.5, 0.8], [], [0.7]], "accuracies": [[0.5, 0.9], [0.4, 0.8, 0.95], [0.75], [0.6, 0.9]]}
    return {
        "confidence": {"threshold": thresholds, "temperature": temperature},
        "margin": {"threshold": each([0.5, 0.2, 0.3, 0.6], 1.0), "temperature": temperature[:4]},
        "entropy": {"threshold": nats},
        "label_confidence": {"threshold": thresholds},
        "confidence_entropy": {"threshold": [0.3] * 4, "entropy_threshold": nats},
        "calibrated_confidence": {**bins, "threshold": thresholds, "temperature": temperature},
        "patience": {"patience": 2, "exits": evaluated},
        "patience_confidence": {"patience": 2, "exits": evaluated, "threshold": [0.8, 0.9, 0.7, 1.0]},
        "gate": {**gate_settings(evaluated or [1], 5, threshold=0.5), "temperature": temperature},
        "fixed": {"exit_index": [*evaluated, NUM_EXITS][0]},
        "never": {},
    }[name]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_sample_exits_where_it_did_once_skipped_exits_are_gone(name):
    every, logits = range(NUM_EXITS), random_logits()
    full = ExitTable(logits, torch.zeros(NUM_ROWS, dtype=torch.long), [1, 2, 3, 4, 5])
    subsets = [list(exits) for size in range(NUM_EXITS + 1) for exits in itertools.combinations(every, size)]
    for settings in (with_skipped_exits(name, evaluated) for evaluated in subsets):
        policy = build_policy({"name": name, **settings}, NUM_EXITS)
        expected = full.replay(policy)
        needed = {
            index for index in every if not policy.skips(index) and (name != "fixed" or index in [policy.exit_index])
        }
        for exits in subsets:
            if needed <= set(exits):
                restricted = policy.with_exits(exits, NUM_EXITS)
                assert restricted == build_policy(restricted.to_dict(), len(exits))
                found = full.with_exits(exits).replay(restricted)
                assert torch.equal(found.exit_layer, expected.exit_layer)
                early = found.exit_index < len(exits)
                assert torch.equal(found.exit_score[early], expected.exit_score[early])
            else:
                with pytest.raises(ValueError, match=f"{name!r} evaluates exit"):
                    policy.with_exits(exits, NUM_EXITS)


def test_exits_are_saved_where_there_are_some():
    assert build_policy({"name": "patience", "patience": 2}, 4).to_dict() == {"name": "patience", "patience": 2}
    settings = {"name": "patience", "patience": 2, "exits": [0, 3]}
    assert build_policy(settings, 4).to_dict() == settings


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([0, 4], r"exits=\[0, 4\]: the model has 4, 0 to 3"),
        ([0, 7], r"exits=\[0, 7\]: the model has 4, 0 to 3"),
        ([0, 0], "not a list of different exit indices"),
        ([-1], "not a list of different exit indices"),
        ("01", "not a list of different exit indices"),
        ([True], "not a list of different exit indices"),
        (2, "not a list of different exit indices"),
    ],
)
def test_exits_that_are_none(exits, message):
    with pytest.raises(ValueError, match=message):
        build_policy({"name": "patience", "patience": 1, "exits": exits}, 4)


def test_confidence_entropy_skips_where_no_row_can_leave():
    policy = build_policy(
        {"name": "confidence_entropy", "threshold": [1.0, 0.5, 0.5], "entropy_threshold": [1.0, 0.0, 1.0]}, 3
    )
    assert [policy.skips(index) for index in range(3)] == [True, True, False]


def test_of_several_parameters_that_are_missing_the_first_is_named():
    with pytest.raises(ValueError, match="missing parameter 'threshold'"):
        build_policy({"name": "confidence_entropy"}, 4)


def test_the_old_name_of_nan_never_exits_still_holds():
    with pytest.warns(DeprecationWarning, match="nan_never_exits"):

        class Old(ExitPolicy):
            keeps_nan = True

    assert Old.nan_never_exits and not ExitPolicy.nan_never_exits
