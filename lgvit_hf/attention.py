"""Performer attention: softmax attention estimated from random features, in time and memory linear in the tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

# tokens taken at a time: their features stay in a processor's cache, or time would grow faster than the tokens
CHUNK = 512


def orthogonal_gaussian(num_features: int, head_dim: int, seed: int) -> Tensor:
    """Draw the directions of FAVOR+: each is standard normal, and any `head_dim` in a row are orthogonal.

    Args:
        num_features (`int`): How many, `M`.
        head_dim (`int`): Their dimension, `d`.
        seed (`int`): The same seed gives the same directions.

    Returns:
        `[M, d]` float32, on the CPU.

    Example:

        >>> w = orthogonal_gaussian(6, head_dim=4, seed=0)
        >>> gram = w[:4] @ w[:4].T
        >>> w.shape, bool((gram - gram.diag().diag()).abs().max() < 1e-5)
        (torch.Size([6, 4]), True)
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int) -> Tensor:
        return torch.randn(rows, head_dim, generator=generator, device="cpu", dtype=torch.float32)

    blocks = []
    for _ in range(0, num_features, head_dim):
        rotation, triangle = torch.linalg.qr(gaussian(head_dim))
        # QR chooses its signs: undone, every rotation is as likely as any other
        blocks.append(rotation * triangle.diagonal().sign())
    lengths = gaussian(num_features).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:num_features] * lengths


def performer(
    query: Tensor, key: Tensor, value: Tensor, random_features: Tensor, scaling: float | None = None
) -> Tensor:
    """Estimate softmax attention with FAVOR+ (https://arxiv.org/abs/2009.14794), without any `N x N` tensor.

    `exp(q.k)` is the mean over directions `w` of `f(q) f(k)`, `f(x) = exp(w.x - |x|^2 / 2)`. A feature reads the mean
    of the values in proportion to `f(k)`, and a query mixes what the features read in proportion to `f(q)` times the
    sum of all `f(k)`: numerator and denominator have the same features. Both proportions are softmaxes, which subtract
    their largest logit, so that nothing overflows and no denominator vanishes.

    Args:
        query (`Tensor`), key (`Tensor`), value (`Tensor`): `[B, heads, N, d]`; below float32, computed in float32.
        random_features (`Tensor`):
            `[M, d]` directions, of `orthogonal_gaussian`. The error falls as `1 / sqrt(M)`, once `M` is large beside
            `exp(|q + k|^2)` of the scaled queries and keys.
        scaling (`float`, *optional*, defaults to `d ** -0.5`): Of the products of queries and keys.

    Returns:
        `[B, heads, N, d]` of the values' dtype, for `4 M N d` MACs a head where softmax attention takes `2 N^2 d`.

    Example:

        >>> q, k, v = torch.randn(3, 2, 3, 50, 16, generator=torch.Generator().manual_seed(0)) / 2
        >>> exact = nn.functional.scaled_dot_product_attention(q, k, v)
        >>> errors = [(performer(q, k, v, orthogonal_gaussian(m, 16, seed=0)) - exact).norm() for m in (64, 4096)]
        >>> bool(errors[1] < errors[0] / 4)
        True
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # under autocast too: an exponential magnifies what its exponent has lost
    with _without_autocast(query.device.type):
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v, w = (tensor.to(dtype) for tensor in (query, key, value, random_features))
        w = w * scaling**0.5
        chunks = [_read(*each, w, scaling) for each in zip(k.split(CHUNK, -2), v.split(CHUNK, -2), strict=True)]
        totals, read = (torch.stack(each) for each in zip(*chunks, strict=True))
        read = (totals.softmax(0)[..., None] * read).sum(0)  # [B, heads, M, d]
        totals = totals.logsumexp(0)[..., None, :]
        # |q|^2 is the same for all features, and cancels
        mixed = torch.cat([(each @ w.T + totals).softmax(-1) @ read for each in q.split(CHUNK, -2)], -2)
    return mixed.to(value.dtype)


def _read(key: Tensor, value: Tensor, w: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What each feature reads of some tokens: the logarithm of the sum of `f(k)`, and the mean of the values."""
    logits = w @ key.mT - key.square().sum(-1)[..., None, :] * (scaling / 2)  # [B, heads, M, N]
    return logits.logsumexp(-1), logits.softmax(-1) @ value


def _without_autocast(device: str) -> Any:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def performer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    random_features: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`performer` as transformers calls it; the directions come where other functions have a mask.

    Returns:
        `[B, N, heads, d]`, and no attention weights: there are none.

    Raises:
        ValueError: The model is not ours, and has no directions.
    """
    if random_features is None:
        raise ValueError(
            f'attn_implementation="performer": {type(module).__name__} was given no random features; ViTHighway and '
            'DeiTHighway have them: from_backbone(model, attn_implementation="performer"), or '
            'set_attn_implementation("performer") of one that has been made'
        )
    return performer(query, key, value, random_features, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register("performer", performer_attention)


class FeatureMap(nn.Module):
    """The directions of one block, shared by its heads, as a buffer that is saved with the model.

    Args:
        num_features (`int`), head_dim (`int`), seed (`int`): See `orthogonal_gaussian`.
    """

    random_features: Tensor

    def __init__(self, num_features: int, head_dim: int, seed: int):
        super().__init__()
        self.seed = seed
        self.register_buffer("random_features", orthogonal_gaussian(num_features, head_dim, seed))

    def reset(self) -> None:
        """Draw again what the seed gives."""
        num_features, head_dim = self.random_features.shape
        drawn = orthogonal_gaussian(num_features, head_dim, self.seed)
        self.random_features = drawn.to(self.random_features)
