"""Adaptive tokens (A-ViT): halting scores, when a token halts, what that costs. Tensors in, tensors out.

Formulas: A-ViT (https://arxiv.org/abs/2112.07658), adaptive computation time (https://arxiv.org/abs/1603.08983).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from .segments import height_width

# scale and centre of the gate, as published for DeiT-tiny and DeiT-small, and as students trained it on Caltech-256
GATES = {"tiny": (10.0, 30.0), "small": (10.0, 75.0), "student": (5.0, 10.0)}


def halting_scores(hidden: Tensor, gate_scale: float, gate_center: float) -> Tensor:
    """How much nearer a block brings each token to its halt: `sigmoid(gate_scale * x[..., 0] - gate_center)`.

    Args:
        hidden (`Tensor`): `[..., D]`, what a block gives; the first of its channels is the score's.
        gate_scale (`float`), gate_center (`float`): Of the gate.

    Returns:
        `[...]`, from 0 to 1, float32.

    Example:

        >>> halting_scores(torch.tensor([[3.0, 7.0], [9.0, 7.0]]), gate_scale=10.0, gate_center=30.0).tolist()
        [0.5, 1.0]
    """
    return hidden.select(-1, 0).float().mul(gate_scale).sub_(gate_center).sigmoid_()


@dataclass(frozen=True)
class Halting:
    """How far each token has come. Carried from block to block; nothing of it stays with a model.

    A token halts after the block where its scores add up to `1 - eps`. What it gives is the mean of its states after
    all the blocks it ran, weighted by their scores; the last takes what is left of 1.

    Args:
        total (`Tensor`): Sum of its scores.
        depth (`Tensor`): Blocks it has run, int64.
        ponder (`Tensor`): `rho`, blocks it has run and, once it has halted, the weight of the last.
        live (`Tensor`): Whether it has not halted yet, bool.

    Example:

        >>> state = Halting.start((2,))
        >>> for scores in ([0.25, 0.995], [1.0, 0.5]):
        ...     weights, state = state.step(torch.tensor(scores), eps=0.01)
        ...     print(weights.tolist(), state.live.tolist())
        [0.25, 1.0] [True, False]
        [0.75, 0.0] [False, False]
        >>> state.depth.tolist(), state.ponder.tolist()
        ([2, 1], [2.75, 2.0])
    """

    total: Tensor
    depth: Tensor
    ponder: Tensor
    live: Tensor

    @classmethod
    def start(cls, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Halting:
        """Before the first block: every token of `shape` is live."""
        zeros = torch.zeros(shape, device=device)
        return cls(zeros, zeros.long(), zeros, torch.ones(shape, dtype=torch.bool, device=device))

    def step(self, scores: Tensor, eps: float) -> tuple[Tensor, Halting]:
        """Behind one more block.

        Args:
            scores (`Tensor`): Of that block, shaped as the tokens are; 1 after the last, where all halt.
            eps (`float`): How far from 1 the sum may stay.

        Returns:
            The weight of that block in what each token gives, 0 where it had halted before, and the new state.
        """
        total = self.total + scores
        halts = self.live & (total >= 1 - eps)
        weights = torch.where(halts, 1 - self.total, scores * self.live)
        ponder = self.ponder + self.live + weights * halts
        return weights, Halting(total, self.depth + self.live, ponder, self.live & ~halts)


def settle(tokens: Sequence[Tensor], scores: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `Halting` says step by step, at the end of a run of live tokens only.

    Args:
        tokens (`Sequence[Tensor]`): Of each block the numbers of the tokens that ran it, int64.
        scores (`Sequence[Tensor]`): Their halting scores after it; of a token's last block, not looked at.
        num_tokens (`int`): How many there were at first.

    Returns:
        Weights `[L, num_tokens]`, depths and ponder costs `[num_tokens]`.

    Example:

        >>> tokens = [torch.tensor([0, 1]), torch.tensor([0])]
        >>> weights, depth, ponder = settle(tokens, [torch.tensor([0.25, 0.995]), torch.tensor([1.0])], 2)
        >>> weights.tolist(), depth.tolist(), ponder.tolist()
        ([[0.25, 1.0], [0.75, 0.0]], [2, 1], [2.75, 2.0])
    """
    depth = torch.cat(list(tokens)).bincount(minlength=num_tokens)
    none = torch.zeros(num_tokens, device=depth.device)
    weights = torch.stack([none.scatter(0, *block) for block in zip(tokens, scores, strict=True)])
    last = depth.sub(1).unsqueeze(0)
    rest = 1 - weights.scatter_(0, last, 0.0).sum(0)
    return weights.scatter_(0, last, rest.unsqueeze(0)), depth, depth + rest


def halting_target(num_blocks: int, target_depth: float, published: bool = False) -> Tensor:
    """How the halting scores should be spread over the blocks: a normal curve of width 1, `[num_blocks]`.

    Args:
        num_blocks (`int`): Depth of the model.
        target_depth (`float`): Blocks before the one where the curve is highest.
        published (`bool`, *optional*, defaults to `False`):
            As in the published code: scaled so that the values of the first `target_depth` blocks add up to 0.98,
            those of all blocks to more than 1. Otherwise they add up to 1.

    Example:

        >>> [round(share, 3) for share in halting_target(4, 2).tolist()]
        [0.058, 0.258, 0.426, 0.258]
    """
    curve = torch.exp(-0.5 * (torch.arange(num_blocks, dtype=torch.float64, device="cpu") - target_depth) ** 2)
    scale = curve[: math.ceil(target_depth)].sum() / 0.98 if published else curve.sum()
    return (curve / scale).float()


def distribution_loss(scores: Tensor, target: Tensor) -> Tensor:
    """How far the spread of halting scores over the blocks is from its target: the KL divergence, by blocks.

    Args:
        scores (`Tensor`): `[L]`, mean halting score after each block.
        target (`Tensor`): `[L]`, of `halting_target`.

    Example:

        >>> distribution_loss(torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.5])).item()
        0.071...
    """
    # a gate far from all tokens gives scores that are 0 in float32
    spread = (scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)).clamp(0.01, 0.99)
    return F.kl_div(spread.log(), target.to(spread), reduction="sum") / len(target)


def attend_live_tokens(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as transformers calls it, for tokens of which some have halted.

    Args:
        module (`nn.Module`): The attention layer; not looked at.
        query (`Tensor`), key (`Tensor`), value (`Tensor`): `[B, heads, N, d]`.
        attention_mask (`Tensor`, *optional*): Which keys are live, bool `[B, 1, 1, N]`.
        scaling (`float`, *optional*): Of the scores, `d ** -0.5` by default.
        dropout (`float`, *optional*, defaults to 0.0): Of the attention weights.
        kwargs: What else transformers says; not needed.

    Returns:
        `[B, N, heads, d]`, and `None` for the weights, which are not kept.
    """
    mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return mixed.transpose(1, 2), None


def weigh_live_tokens(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """As `attend_live_tokens`, in plain steps: slower, but the attention weights `[B, heads, N, N]` are there."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2), weights


def attend_in_a_row(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Scaled dot-product attention of several images whose tokens stand in a row: each attends to itself.

    Args:
        query (`Tensor`), key (`Tensor`), value (`Tensor`): `[1, heads, n, d]`.
        lengths (`tuple[int, ...]`): How many tokens each image has, none of them 0; `n` together.

    Returns:
        `[1, heads, n, d]`.

    Example:

        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> mixed = attend_in_a_row(q, k, v, (4, 1))
        >>> torch.equal(mixed[:, :, 4], v[:, :, 4])  # a token by itself
        True
    """
    if len(lengths) == 1:
        return F.scaled_dot_product_attention(query, key, value)
    return (_attend_in_turn if query.device.type == "cpu" else _attend_padded)(query, key, value, lengths)


def _attend_in_turn(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One image after the other, without a copy or a padded token: what is fastest on a processor."""
    images = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*image) for image in images], dim=2)


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """All images at once, padded to the longest: an accelerator waits for each call."""
    longest = max(lengths)
    there = torch.arange(longest, device=query.device) < torch.tensor(lengths, device=query.device)[:, None]
    padded = [query.new_zeros(len(lengths), longest, *tensor[0, :, 0].shape) for tensor in (query, key, value)]
    for rows, tensor in zip(padded, (query, key, value), strict=True):
        rows[there] = tensor[0].transpose(0, 1)
    query, key, value = (rows.transpose(1, 2) for rows in padded)
    mixed = F.scaled_dot_product_attention(query, key, value, there[:, None, None])
    return mixed.transpose(1, 2)[there].transpose(0, 1)[None]


def token_macs(config: PretrainedConfig, token_depth: Tensor) -> Tensor:
    """Multiply-accumulates (MACs) that each image takes, when a token costs only the blocks that it runs.

    Args:
        config (`PretrainedConfig`): Of a ViT or DeiT.
        token_depth (`Tensor`): `[B, N]`, blocks that each token runs.

    Returns:
        `[B]` float64, on the CPU, since not every accelerator has float64: the patch embedding, for each block the
        products of its live tokens and their attention among themselves, and a classifier for one token.

    Example:

        >>> from transformers import ViTConfig
        >>> tiny = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
        >>> all_blocks = token_macs(tiny, torch.full((1, 197), 12))
        >>> round(all_blocks.item() / 1e9, 2)
        1.25
    """
    token_depth = token_depth.cpu()
    width, blocks = config.hidden_size, torch.arange(config.num_hidden_layers, device="cpu")
    live = (token_depth[:, :, None] > blocks).sum(1).double()  # [B, L]
    products = live * (4 * width**2 + 2 * width * config.intermediate_size) + 2 * live**2 * width
    rows, columns = height_width(config.patch_size)
    height, wide = height_width(config.image_size)
    stem = (height // rows * rows) * (wide // columns * columns) * config.num_channels * width
    return products.sum(1) + stem + width * config.num_labels
