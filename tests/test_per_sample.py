"""Thresholds of each sample's own: each is answered as the policy of its thresholds alone would, in any batch."""

import re
from itertools import product

import pytest
import torch

from lgvit_hf.engine import replay, run_early
from lgvit_hf.ensemble import with_ensemble
from lgvit_hf.exit_policy import PerSamplePolicy
from lgvit_hf.policies import build_policy
from lgvit_hf.segments import State
from tests.seeds import generator
from tests.test_engine import DEPTHS, LOGITS, NUM_EXITS, NUM_LABELS, NUM_ROWS, SPREADING, assert_same, taken
from tests.tiny import tiny_images, tiny_model

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


@torch.no_grad()
def test_one_file_takes_thresholds_of_each_sample(tmp_path):
    """In ONNX Runtime, against the engine; in batches of several sizes, and with one row of thresholds for all."""
    pytest.importorskip("onnxruntime")
    from lgvit_hf.export.segment_graphs import export_parts
    from lgvit_hf.export.writing import manifest_of, write_parts
    from lgvit_hf.policies import entropy
    from lgvit_hf.runtimes.onnxruntime import ORTHighway
    from lgvit_hf.runtimes.single_file import run_file

    model, images = tiny_model("vit", num_hidden_layers=3, exit_positions=[1, 2], exit_types="linear"), tiny_images(24)
    probs = torch.stack(model(images, early_exit=False).exit_logits[:2]).softmax(-1)
    scores = entropy(probs).sort(-1).values
    # between the scores of two images
    low, middle, high = (scores[:, place : place + 2].mean(-1) for place in (5, 11, 17))
    model.set_exit_policy("patience_confidence", threshold=middle.tolist(), patience=1)
    files = write_parts(model, export_parts(model, range(3)), tmp_path, "single")
    model.config.save_pretrained(tmp_path)
    manifest_of(model, tmp_path, files).save(tmp_path)
    exported = ORTHighway.from_pretrained(tmp_path, threads=1)

    def answered(pixels, thresholds):
        given = (exported.sessions[0], pixels.numpy(), model.exit_policy, 3)
        return [torch.from_numpy(each) for each in run_file(*given, thresholds=thresholds)]

    mine = torch.stack([low, middle, high])[torch.arange(24) % 3]
    policy = PerSamplePolicy(model.exit_policy, mine, 2)
    expected = run_early(model.segments(), State({"pixel_values": images}), policy)
    assert len(set(expected.exit_index.tolist())) > 1
    for size in (24, 7, 1):
        found = [
            answered(images[start : start + size], mine[start : start + size].numpy()) for start in range(0, 24, size)
        ]
        logits, exit_index, exit_layer, _ = (torch.cat(each) for each in zip(*found, strict=True))
        assert exit_index.tolist() == expected.exit_index.tolist()
        assert exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    assert exported(images).exit_index.tolist() == model(images).exit_index.tolist()
    for wrong in (mine[:5], mine[:, :1]):
        with pytest.raises(ValueError, match=r"exit_thresholds: shape .* must be \(24, 2\): samples, early exits"):
            answered(images, wrong.numpy())
