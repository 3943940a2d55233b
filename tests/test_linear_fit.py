"""Exits fitted to the optimum: against scipy's minimiser, and the head's own answers."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lgvit_hf.heads import HeadShape, build_head
from lgvit_hf.losses import distillation_loss
from lgvit_hf.segments import Tokens
from lgvit_hf.training import linear_fit
from lgvit_hf.training.linear_fit import fit_head, fit_linear, is_linear, whitening
from tests.seeds import generator

pytestmark = pytest.mark.version_independent


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_the_optimum_is_that_of_a_general_minimiser(monkeypatch):
    monkeypatch.setattr(linear_fit, "PENALTIES", (1e-2,))
    monkeypatch.setattr(linear_fit, "STEPS", 200)
    vectors, teacher = normal(60, 4), normal(60, 3, seed=1)
    weight, bias = fit_linear(vectors, teacher, 1.0)
    mean, scale, matrix = whitening(vectors)
    white = (vectors - mean) / scale @ matrix

    def objective(numbers):
        given = torch.tensor(numbers, requires_grad=True)
        found = given[:12].reshape(4, 3)
        logits = white @ found + given[12:]
        value = distillation_loss(logits, teacher, 1.0) * 3 + 1e-2 * (matrix @ found).square().sum()
        value.backward()
        return value.item(), given.grad.numpy()

    best = minimize(objective, np.zeros(15), jac=True, method="BFGS", options={"gtol": 1e-7})
    expected = white @ torch.tensor(best.x[:12]).reshape(4, 3) + torch.tensor(best.x[12:])
    torch.testing.assert_close(vectors @ weight.T + bias, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("name", ["concat", "average", "linear"])
def test_a_head_answers_as_what_it_was_distilled_from(name, num_prefix):
    """The teacher is linear in what the head reads, so that the fit can follow it closely."""
    shape = HeadShape(width=6, num_prefix=num_prefix, num_labels=3)
    head, teacher_head = build_head(name, shape), build_head(name, shape)
    if not is_linear(head):
        pytest.skip("has a layer of its own")
    reduced = normal(400, head.reduce(tokens_of(num_prefix)).shape[1], 6).float()
    with torch.no_grad():
        teacher = 3 * teacher_head.eval().answer_reduced(reduced)
    fit_head(head, reduced, teacher, 1.0)
    with torch.no_grad():
        found = head.answer_reduced(reduced)
    agreement = (found.argmax(-1) == teacher.argmax(-1)).float().mean()
    unfitted = distillation_loss(0 * teacher, teacher, 1.0)
    assert agreement > 0.9 and distillation_loss(found, teacher, 1.0) < 0.1 * unfitted


def tokens_of(num_prefix):
    return Tokens(torch.randn(2, 4, 6), (2, 2), torch.randn(2, num_prefix, 6))
