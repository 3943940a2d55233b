"""Harm gates with random regressions."""

import torch

from lgvit_hf.gate import num_features
from tests.seeds import generator


def random_models(num_exits, number=0):
    """The models of a gate that evaluates `num_exits` exits, so that samples exit everywhere."""
    numbers = generator(31 + number)

    def drawn(*shape):
        return torch.randn(*shape, generator=numbers, dtype=torch.float64)

    return [
        {
            "mean": drawn(length).tolist(),
            "scale": (drawn(length).abs() + 0.5).tolist(),
            "weights": drawn(2, length).tolist(),
            "bias": drawn(2).tolist(),
        }
        for length in map(num_features, range(num_exits))
    ]


def typical_models(num_exits):
    """The models of a gate whose score grows with the confidence at the exit that is judged."""
    lengths = [num_features(place) for place in range(num_exits)]
    return [
        {"mean": [0.0] * n, "scale": [1.0] * n, "weights": [[6.0, *[0.0] * (n - 1)]] * 2, "bias": [-3.0, -3.0]}
        for n in lengths
    ]
