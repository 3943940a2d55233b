"""`recipes/benchmarks/frozen_exits.py`: what heads read, curves read at a drop, and the paired bootstrap."""

import numpy as np
import pytest
import torch

from lgvit_hf.heads import HeadShape, build_head
from lgvit_hf.segments import Tokens

pytestmark = pytest.mark.usefixtures("benchmark")


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("head", ["concat", "average", "linear"])
def test_pooled_vectors_hold_what_the_head_reads(head, num_prefix):
    from frozen_exits import head_inputs
    from frozen_features import Pooled

    tokens = Tokens(torch.randn(3, 6, 16), (2, 3), torch.randn(3, num_prefix, 16))
    inputs = head_inputs(head, Pooled(num_prefix, (2, 3), 16).pack(None, tokens))
    built = build_head(head, HeadShape(width=16, num_prefix=num_prefix, num_labels=4, layer_norm_eps=1e-6))
    if head == "linear" and num_prefix:
        inputs = torch.tanh(built.dense(inputs))
    # half precision
    torch.testing.assert_close(inputs, built.read(tokens)[1], atol=1e-2, rtol=1e-2)


def test_a_curve_is_read_at_the_cheapest_point_within_the_drop():
    from frozen_exits import read_at

    drops, costs = np.array([0.0, 0.004, 0.01, 0.03]), np.array([12.0, 9.0, 9.5, 6.0])
    assert [read_at(drops, costs, drop) for drop in (0.0, 0.005, 0.01, 0.05)] == [12.0, 9.0, 9.0, 6.0]
    assert read_at(drops, costs, -0.01) == np.inf


def test_ratios_are_those_of_each_resample_read_anew():
    from frozen_exits import Curve, interval, paired_ratios, resample_weights

    draws = np.random.default_rng(torch.initial_seed() % 2**32)
    curves = [
        Curve(
            np.concatenate([np.zeros((1, 50)), draws.integers(-1, 2, (4, 50))]),
            np.concatenate([np.full((1, 50), 20.0), draws.uniform(1, 10, (4, 50))]),
        )
        for _ in range(4)
    ]
    ours, rivals, weights = curves[:2], curves[2:], resample_weights(50, 30)
    found = paired_ratios(ours, rivals, weights, 0.02)
    assert np.allclose(weights.sum(0), 1) and np.allclose(weights[:, 0], 1 / 50)
    for column, ratio in zip(weights.T, found, strict=True):

        def read(curve, column=column):
            drops = (curve.drops * column).sum(1)
            return (curve.costs * column).sum(1)[drops <= 0.02 + 1e-9].min()

        assert ratio == pytest.approx(np.mean([read(curve) for curve in rivals]) / np.mean(list(map(read, ours))))
    value, low, high = interval(found)
    assert low <= high and value == pytest.approx(found[0], abs=1e-4)
