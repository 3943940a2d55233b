"""torch.compile: a segment is one graph, the whole model breaks where samples exit, and answers stay what they are."""

from dataclasses import replace

import pytest
import torch
from torch import _dynamo as dynamo

from lgvit_hf.engine import run_early
from lgvit_hf.segments import Segment, State
from tests.tiny import tiny_images, tiny_model

# captured as for any backend, then run as it is: needs no C++ compiler
BACKEND = "eager"
SIZES = {
    "vit": {"num_hidden_layers": 2},
    "deit": {"num_hidden_layers": 2},
    "swin": {"depths": [1, 1], "num_heads": [2, 2]},
}


def compiled(segment: Segment) -> Segment:
    """The segment with its blocks as one graph, and its exit as one."""
    advance, answer = (torch.compile(f, fullgraph=True, backend=BACKEND) for f in (segment.advance, segment.answer))
    return replace(segment, blocks=(advance,), answer=answer)


def assert_same(found, expected):
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    assert found.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.exit_score, expected.exit_score, atol=1e-5, rtol=0)


@pytest.fixture
def few_exits():
    """Makes a model of a kind with one early exit, and 32 images of which every other one takes it."""
    dynamo.reset()
    dynamo.utils.counters.clear()

    def make(kind):
        model, images = tiny_model(kind, exit_positions=[1], exit_types="conv1_1", **SIZES[kind]), tiny_images(64)
        scores = model(images, early_exit=False).exit_logits[0].softmax(-1).amax(-1)
        order = scores.argsort()
        low, high = order[:16], order[-16:]
        assert scores[low].max() < scores[high].min() - 1e-3
        model.set_exit_policy("confidence", threshold=(scores[low].max() + scores[high].min()).item() / 2)
        return model, images[torch.stack([low, high], dim=1).flatten()]

    with torch.no_grad():
        yield make
    dynamo.reset()


@pytest.mark.parametrize("kind", SIZES)
def test_segments_compile_whole_and_answer_as_before(kind, few_exits):
    model, images = few_exits(kind)
    segments = [compiled(segment) for segment in model.segments()]
    for size in (8, 3, 32, 7, 8):
        found = run_early(segments, State({"pixel_values": images[:size]}), model.exit_policy)
        assert_same(found, model(images[:size]))
        assert found.exit_index.tolist() == ([1, 0] * 16)[:size]
    assert not dynamo.utils.counters["graph_break"]
    # blocks and exit of two segments: for the first number of samples, for one, for any number
    assert 4 <= dynamo.utils.counters["stats"]["unique_graphs"] <= 3 * 4


# of the whole model it is the loop that matters, which is the same for all
@pytest.mark.version_independent
def test_the_whole_model_compiles_with_a_break_per_exit(few_exits):
    model, images = few_exits("vit")
    whole = torch.compile(model, backend=BACKEND)
    assert_same(whole(images[:8]), model(images[:8]))
    breaks = dynamo.utils.counters["graph_break"]
    # the one early exit asks how many samples take it, which no graph can know
    assert sum(breaks.values()) == 1 and "tolist" in next(iter(breaks))
    assert_same(whole(images[:7]), model(images[:7]))


@pytest.mark.version_independent
def test_the_model_is_not_one_graph(few_exits):
    model, images = few_exits("vit")
    with pytest.raises(dynamo.exc.Unsupported, match="tolist"):
        torch.compile(model, backend=BACKEND, fullgraph=True)(images[:4])
