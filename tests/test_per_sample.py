"""Thresholds of each sample's own: each is answered as the policy of its thresholds alone would, in any batch."""

import re
from itertools import product

import pytest
import torch

from lgvit_hf.engine import replay
from lgvit_hf.ensemble import with_ensemble
from lgvit_hf.exit_policy import PerSamplePolicy
from lgvit_hf.policies import build_policy
from tests.seeds import generator
from tests.test_engine import DEPTHS, LOGITS, NUM_EXITS, NUM_LABELS, NUM_ROWS, SPREADING, assert_same, taken

pytestmark = pytest.mark.version_independent
WITH_THRESHOLDS = [typical for typical in SPREADING if "threshold" in typical]
OF_ONE_LABEL = [typical for typical in WITH_THRESHOLDS if typical["name"] != "label_confidence"]
ENSEMBLE = {"weights": [0.2, 0.3, 0.5, 0.7, 1.0, 1.0], "bias": [0.1, 0.0, -0.1, 0.0]}


def rungs(typical):
    """Three settings of one policy and one set of exits, from more to fewer early exits or the other way round."""
    threshold = typical["threshold"]
    spread = torch.tensor([threshold] * NUM_EXITS if isinstance(threshold, float) else threshold)
    return torch.stack([spread * factor for factor in (0.94, 1.0, 1.02)])


@pytest.mark.parametrize(
    ("typical", "ensemble"),
    [*product(WITH_THRESHOLDS, [None]), *product(OF_ONE_LABEL, [ENSEMBLE])],
    ids=lambda value: value and value.get("name", "ensemble"),
)
def test_each_sample_is_answered_by_its_own_thresholds(typical, ensemble):
    numbers = generator()
    known, mine = rungs(typical), torch.randint(3, (NUM_ROWS,), generator=numbers)

    def answers(policy, logits):
        return replay(logits, DEPTHS, with_ensemble(policy, ensemble, len(DEPTHS), NUM_LABELS))

    base = build_policy(typical, NUM_EXITS)
    together = answers(PerSamplePolicy(base, known[mine], NUM_EXITS), LOGITS)
    assert len(set(together.exit_index.tolist())) > 2
    for rung in range(3):
        # for all samples the plain policy of this rung
        alone = answers(build_policy({**typical, "threshold": known[rung].tolist()}, NUM_EXITS), LOGITS)
        assert_same(taken(together, mine == rung), taken(alone, mine == rung))
    # in another order, and without the others
    some = torch.randperm(NUM_ROWS, generator=numbers)[:50]
    assert_same(answers(PerSamplePolicy(base, known[mine[some]], NUM_EXITS), LOGITS[:, some]), taken(together, some))


def test_what_is_no_thresholds():
    confidence, fine = build_policy({"name": "confidence", "threshold": 0.5}, 2), torch.full((3, 2), 0.5)
    for thresholds, message in (
        (fine[0], "thresholds (2,) of torch.float32 must be floats (samples, 2)"),
        (fine[:, :1], "thresholds (3, 1)"),
        (fine.long(), "of torch.int64 must be floats"),
        (fine * torch.nan, "thresholds are NaN"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            PerSamplePolicy(confidence, thresholds, 2)
    with pytest.raises(ValueError, match="'patience' has no threshold"):
        PerSamplePolicy(build_policy({"name": "patience", "patience": 2}, 2), fine, 2)
    with pytest.raises(ValueError, match="thresholds of 3 samples for a batch of 4"):
        replay(torch.zeros(3, 4, 5), [1, 2, 3], PerSamplePolicy(confidence, fine, 2))
