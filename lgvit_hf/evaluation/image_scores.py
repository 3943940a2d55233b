"""What a model made of each image, as it is drawn: token depths, scores at every exit, the pixels it was shown."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PretrainedConfig
from transformers.utils import logging

from ..data.batches import Samples, in_batches, to_model
from ..engine import run_all
from ..modeling_avit import AViT
from ..policies import ExitPolicy, number_at, probabilities
from ..segments import State, height_width
from .costs import Highway

# what the scores of the built-in policies are, and the field with which they are compared
SCORES = {
    "confidence": ("largest probability", "threshold"),
    "entropy": ("entropy, nats", "threshold"),
    "margin": ("margin", "threshold"),
    "confidence_entropy": ("largest probability", "threshold"),
    "label_confidence": ("least confident label", "threshold"),
    "patience": ("exits that agree", "patience"),
    "patience_confidence": ("confident exits in a row", "patience"),
}


@torch.no_grad()
def token_depths(model: AViT, dataset: Samples, *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """How deep the tokens of every image of a dataset go, and what is answered.

    Args:
        model (`AViT`): In `eval()` mode.
        dataset (`Dataset`): Items with `pixel_values`.
        batch_size (`int`, *optional*, defaults to 32): Images at a time.

    Returns:
        `[M, N]` int64, blocks that each token ran, from 1; `[M]` int64 class numbers. On the CPU.
    """
    batches = in_batches(dataset, batch_size)
    outs = [
        model(to_model(batch["pixel_values"], model)) for batch in logging.tqdm(batches, desc="images", leave=False)
    ]
    return torch.cat([out.token_depth for out in outs]).cpu(), torch.cat([out.logits.argmax(-1) for out in outs]).cpu()


def widest_spread(token_depth: Tensor, count: int) -> list[int]:
    """The images whose tokens differ the most in depth, by their standard deviation; the widest first.

    Args:
        token_depth (`Tensor`): `[M, N]`.
        count (`int`): How many.

    Example:

        >>> widest_spread(torch.tensor([[3, 3, 3], [1, 6, 2], [2, 3, 3]]), 2)
        [1, 2]
    """
    spread = token_depth.cpu().double().std(-1, correction=0)
    return spread.argsort(descending=True, stable=True)[:count].tolist()


def patch_grid(config: PretrainedConfig) -> tuple[int, int]:
    """Rows and columns of patches.

    Example:

        >>> from transformers import ViTConfig
        >>> patch_grid(ViTConfig(image_size=(32, 64), patch_size=16))
        (2, 4)
    """
    (height, width), (rows, columns) = height_width(config.image_size), height_width(config.patch_size)
    return height // rows, width // columns


def first_and_last(exit_layer: Tensor, count: int) -> list[int]:
    """The images that exited first and those that exited last, half of each, by depth; at one depth by number.

    Args:
        exit_layer (`Tensor`): `[M]`, blocks run.
        count (`int`): How many, at most `M`.

    Example:

        >>> first_and_last(torch.tensor([4, 12, 4, 8, 6]), 3)
        [0, 2, 1]
    """
    order = exit_layer.argsort(stable=True).tolist()
    last = count // 2
    return order[: count - last] + order[len(order) - last :]


@torch.no_grad()
def scores_by_exit(model: Highway, pixel_values: Tensor) -> Tensor:
    """What the policy sees of images at each exit, if none exits before.

    Args:
        model (`Highway`): In `eval()` mode, with its policy.
        pixel_values (`Tensor`): `[N, C, H, W]`.

    Returns:
        `[E, N]` float32 on the CPU, the final classifier last; NaN at exits that the policy skips.
    """
    pixels, policy = to_model(pixel_values, model), model.answering_policy
    logits_by_exit = run_all(model.segments(), State({"pixel_values": pixels}))
    memory, scores = policy.start(len(pixels), pixels.device), []
    for index, logits in enumerate(logits_by_exit):
        if index < len(logits_by_exit) - 1 and policy.skips(index):
            scores.append(torch.full((len(pixels),), torch.nan))
            continue
        _, memory = policy(logits, memory, index)
        scores.append((memory["score"] if "score" in memory else probabilities(logits).amax(-1)).float().cpu())
    return torch.stack(scores)


def limits_of(policy: ExitPolicy, num_exits: int) -> list[float | None]:
    """With what a policy compares its score at each of `num_exits` early exits, and `None` for the final classifier.

    Example:

        >>> from lgvit_hf.policies import ConfidencePolicy
        >>> limits_of(ConfidencePolicy(threshold=[0.9, 1.0]), num_exits=2)
        [0.9, None, None]
    """
    if policy.name not in SCORES:
        return [None] * (num_exits + 1)
    numbers = getattr(policy, SCORES[policy.name][1])
    evaluated = [not policy.skips(index) for index in range(num_exits)]
    return [number_at(numbers, index, math.nan) if here else None for index, here in enumerate(evaluated)] + [None]


def as_seen(pixel_values: Tensor, processor: BaseImageProcessor) -> np.ndarray:
    """Images as the model is shown them, in the size and crop that the processor gives them, in colours again.

    Args:
        pixel_values (`Tensor`): `[N, C, H, W]`, as the processor gives them.
        processor (`BaseImageProcessor`): What it rescaled and normalised is undone.

    Returns:
        `[N, H, W, C]` uint8.

    Example:

        >>> from lgvit_hf.data.processing import make_processor
        >>> as_seen(torch.tensor([-1.0, 0.2, 1.0]).view(1, 3, 1, 1), make_processor(1)).tolist()
        [[[[0, 153, 255]]]]
    """
    pixels = pixel_values.float().cpu()
    settings = processor.to_dict()  # type: ignore[no-untyped-call]  # transformers declares no types here
    if settings.get("do_normalize"):
        mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    if settings.get("do_rescale"):
        pixels = pixels / settings["rescale_factor"]
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
