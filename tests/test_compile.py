"""torch.compile: a segment is one graph, the whole model breaks where rows leave, and answers stay what they are."""

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


@pytest.fixture(params=SIZES)
def model(request):
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = tiny_model(request.param, exit_positions=[1], exit_types="conv1_1", **SIZES[request.param])
    with torch.no_grad():
        scores = model(tiny_images(32), early_exit=False).exit_logits[0].softmax(-1).amax(-1)
        model.set_exit_policy("confidence", threshold=scores.sort().values[15:17].mean().item())
        yield model
    dynamo.reset()


def test_segments_compile_whole_and_answer_as_before(model):
    segments, exits = [compiled(segment) for segment in model.segments()], set()
    for size in (8, 3, 32, 7, 8):
        images = tiny_images(size)
        found = run_early(segments, State({"pixel_values": images}), model.exit_policy)
        assert_same(found, model(images))
        exits |= set(found.exit_index.tolist())
    assert exits == {0, 1}
    assert not dynamo.utils.counters["graph_break"]
    # blocks and exit of two segments: for the first number of rows, for one row, for any number
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 3 * 4


def test_the_whole_model_compiles_with_a_break_per_exit(model):
    whole, expected = torch.compile(model, backend=BACKEND), model(tiny_images(8))
    assert_same(whole(tiny_images(8)), expected)
    breaks = dynamo.utils.counters["graph_break"]
    # the one early exit asks how many rows leave, which no graph can know
    assert sum(breaks.values()) == 1 and "tolist" in next(iter(breaks))
    assert_same(whole(tiny_images(7)), model(tiny_images(7)))


def test_the_model_is_not_one_graph(model):
    with pytest.raises(dynamo.exc.Unsupported, match="tolist"):
        torch.compile(model, backend=BACKEND, fullgraph=True)(tiny_images(4))
