"""Answers that rounding cannot change: for comparing models that add up in another order, whatever the seed."""

import torch

from tests.tiny import tiny_images, tiny_model


def clear_model(kind, each, temperature=1.0, pool=600, **changes):
    """The first random model of which `each` images per exit are clear; its exits take half of what reaches them.

    Returns the model and the images, the exits in turn.
    """
    for number in range(20):
        model, images = tiny_model(kind, seed=number, **changes), tiny_images(pool, seed=number)
        exit_halves(model, images, temperature=temperature)
        with torch.no_grad():
            exit_index = model(images).exit_index
        exit_index[~clear(model, images)] = -1
        at_exits = [images[exit_index == index][:each] for index in range(len(model.exits) + 1)]
        if all(len(found) == each for found in at_exits):
            return model, torch.stack(at_exits, dim=1).flatten(0, 1)
    raise AssertionError("twenty models, and none has clear images at every exit")


@torch.no_grad()
def exit_halves(model, images, temperature=1.0):
    """Set a confidence policy whose thresholds are medians: of the samples that reach an exit, half take it."""
    model.set_exit_policy("confidence", threshold=0.5, temperature=temperature)
    thresholds, there = [], torch.ones(len(images), dtype=torch.bool)
    for scores in _two_largest(model, images)[:-1]:
        thresholds.append(round(float(scores[there, 0].median()), 4))
        there &= scores[:, 0] < thresholds[-1]
    model.set_exit_policy("confidence", threshold=thresholds, temperature=temperature)


@torch.no_grad()
def clear(model, images, margin=1e-3):
    """Which images are neither close to a threshold nor between two labels, at any exit: `[B]` bool."""
    *exits, final = _two_largest(model, images)
    kept = final[:, 0] - final[:, 1] > margin
    for scores, threshold in zip(exits, model.exit_policy.threshold, strict=True):
        kept &= (scores[:, 0] - scores[:, 1] > margin) & ((scores[:, 0] - threshold).abs() > margin)
    return kept


def _two_largest(model, images):
    """The two largest probabilities at every exit, as the policy sees them: a list of `[B, 2]`."""
    exit_logits = model(images, early_exit=False).exit_logits
    temperature = model.exit_policy.temperature
    divisors = temperature if isinstance(temperature, (list, tuple)) else [temperature] * len(exit_logits)
    return [(z / d).softmax(-1).topk(2).values for z, d in zip(exit_logits, divisors, strict=True)]
