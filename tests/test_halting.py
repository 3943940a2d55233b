"""Halting, its losses and its cost, against the same written out token by token."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import ViTConfig

from lgvit_hf.evaluation.metrics import macro_f1
from lgvit_hf.token_halting import (
    Halting,
    _attend_padded,
    attend_in_a_row,
    attend_live_tokens,
    distribution_loss,
    halting_scores,
    halting_target,
    token_macs,
)
from tests.seeds import examples, generator, rng

pytestmark = pytest.mark.version_independent

EPS = 0.01


def spent_by_hand(scores):
    """One token: the weight of each block in what it gives, and its ponder cost; all halt behind the last block."""
    weights, left = [], 1.0
    for block, score in enumerate(scores, start=1):
        if block == len(scores) or sum(scores[:block]) >= 1 - EPS:
            return [*weights, left], block + left
        weights.append(score)
        left -= score


@settings(max_examples=examples(50))
@given(st.lists(st.lists(st.floats(0, 1, width=16), min_size=6, max_size=6), min_size=1, max_size=5))
def test_a_token_gives_the_mean_of_its_states_and_stops(scores):
    table = torch.tensor(scores)  # [tokens, blocks]
    last = torch.cat([table[:, :-1], torch.ones(len(table), 1)], dim=1)
    state, weights = Halting.start((len(table),)), []
    for block in range(6):
        weight, state = state.step(last[:, block], EPS)
        weights.append(weight)
    assert not state.live.any()
    for token, row in enumerate(scores):
        near = any(abs(sum(row[:block]) - (1 - EPS)) < 1e-5 for block in range(1, 6))
        if near:
            continue  # rounding decides
        expected, ponder = spent_by_hand(row)
        ours = torch.stack(weights)[:, token]
        assert ours.tolist() == pytest.approx(expected + [0.0] * (6 - len(expected)), abs=1e-5)
        assert ours.sum().item() == pytest.approx(1, abs=1e-5)
        assert state.depth[token].item() == len(expected)
        assert state.ponder[token].item() == pytest.approx(ponder, abs=1e-5)


def test_a_sum_that_just_reaches_the_bound_halts():
    _, state = Halting.start((1,)).step(torch.tensor([0.75]), eps=0.25)
    assert not state.live.item()


def test_gradient_reaches_the_scores_through_weights_and_ponder_cost():
    scores = [torch.full((1,), 0.5, requires_grad=True) for _ in range(3)]
    first, state = Halting.start((1,)).step(scores[0], EPS)
    second, state = state.step(scores[1], EPS)
    third, state = state.step(scores[2], EPS)
    (first * 2 + second * 5 + third * 7 + state.ponder).sum().backward()
    # the second block takes what the first left: 2 s - 5 s, and the ponder cost 2 + (1 - s)
    assert [score.grad.item() for score in scores] == [2 - 5 - 1, 0, 0]


def test_scores_are_float32_and_bounded_at_any_precision():
    hidden = torch.tensor([[-300.0], [300.0]])
    for dtype in (torch.float16, torch.bfloat16):
        scores = halting_scores(hidden.to(dtype), gate_scale=1000.0, gate_center=75.0)
        assert scores.dtype == torch.float32 and scores.tolist() == [0, 1]


def test_published_target(shared):
    theirs = load_file(shared / "reference" / "avit.safetensors")["distr_target"]
    torch.testing.assert_close(halting_target(12, 8, published=True), theirs, rtol=1e-5, atol=1e-12)
    assert theirs.sum() > 3


@pytest.mark.parametrize(("num_blocks", "depth"), [(12, 8), (6, 4), (24, 16), (12, 3.5)])
def test_target_is_a_distribution_that_follows_the_depth(num_blocks, depth):
    target = halting_target(num_blocks, depth)
    assert target.shape == (num_blocks,) and target.sum().item() == pytest.approx(1, abs=1e-6)
    expected = [math.exp(-0.5 * (block - depth) ** 2) for block in range(num_blocks)]
    np.testing.assert_allclose(target.numpy(), np.array(expected) / sum(expected), rtol=1e-5, atol=1e-30)


def test_distribution_loss_by_hand():
    scores, target = [0.2, 0.5, 0.1], [0.2, 0.3, 0.5]
    expected = sum(t * (math.log(t) - math.log(s / sum(scores))) for s, t in zip(scores, target, strict=True)) / 3
    assert distribution_loss(torch.tensor(scores), torch.tensor(target)).item() == pytest.approx(expected, rel=1e-5)


def test_distribution_loss_of_nothing_is_finite():
    for values in ([1e-30, 1e-38, 0.0], [0.0, 0.0, 0.0]):
        scores = torch.tensor(values, requires_grad=True)
        loss = distribution_loss(scores, halting_target(3, 2))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()


# -- attention ---------------------------------------------------------------------------------------------


def softmax_attention(query, key, value, scaling):
    return (query @ key.transpose(-1, -2) * scaling).softmax(-1) @ value


def random_heads(num_tokens, batch_size=1, seed=0):
    numbers = generator(seed)
    return [torch.randn(batch_size, 3, num_tokens, 8, generator=numbers) for _ in range(3)]


@settings(max_examples=examples(25))
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_images_in_a_row_attend_to_themselves(lengths):
    heads = random_heads(sum(lengths))
    images = zip(*(heads_of.split(lengths, dim=2) for heads_of in heads), strict=True)
    alone = torch.cat([softmax_attention(*image, 8**-0.5) for image in images], dim=2)
    torch.testing.assert_close(attend_in_a_row(*heads, tuple(lengths)), alone)
    torch.testing.assert_close(_attend_padded(*heads, tuple(lengths)), alone)


def test_masked_keys_are_as_if_they_were_not_there():
    query, key, value = random_heads(5, batch_size=2)
    live = torch.tensor([[True, False, True, True, False], [False, False, False, True, False]])
    mixed, _ = attend_live_tokens(None, query, key, value, live[:, None, None], scaling=0.3)
    for row in range(2):
        expected = softmax_attention(query[row], key[row, :, live[row]], value[row, :, live[row]], 0.3)
        torch.testing.assert_close(mixed[row].transpose(0, 1), expected)


def test_no_mask_is_plain_attention():
    heads = random_heads(5, batch_size=2)
    mixed, _ = attend_live_tokens(None, *heads, None)
    torch.testing.assert_close(mixed.transpose(1, 2), F.scaled_dot_product_attention(*heads))


# -- cost --------------------------------------------------------------------------------------------------


def test_macs_by_hand():
    config = ViTConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=3, image_size=8, patch_size=4)
    depth = torch.tensor([[3, 1, 1, 2, 3], [1, 1, 1, 1, 1]])
    live = [[5, 3, 2], [5, 0, 0]]
    for row, macs in enumerate(token_macs(config, depth).tolist()):
        blocks = sum(n * (4 * 8 * 8 + 2 * 8 * 16) + 2 * n * n * 8 for n in live[row])
        assert macs == blocks + 4 * (4 * 4 * 3 * 8) + 8 * config.num_labels


def test_deit_tiny_costs_what_is_published():
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    assert token_macs(config, torch.full((1, 197), 12)).item() == pytest.approx(1.25e9, rel=0.01)


def test_macro_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    numbers = rng()
    for classes in (2, 5, 9):
        said, there = numbers.integers(0, classes, 40), numbers.integers(0, classes - 1, 40)
        assert macro_f1(said, there) == pytest.approx(metrics.f1_score(there, said, average="macro"))
