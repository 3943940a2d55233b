"""Exit heads: what an exit computes. Small bodies that turn patches into a map, and the readers that classify.

Formulas: LGViT (https://arxiv.org/abs/2308.00255), ViT-EE (https://arxiv.org/abs/2106.15183), EEVIT.
No parameter here may be called `output.dense`, `intermediate.dense`, `attention.*` or `mlp.fc*`: transformers 5
renames such keys of a Swin checkpoint wherever they stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .exit_head import (
    HEADS,
    ExitHead,
    HeadShape,
    MapHead,
    build_head,
    head_kind,
    is_head,
    is_watched,
    known_heads,
    register_head,
)
from .segments import Tokens

# a module as its callers see it
Layer = Callable[[Tensor], Tensor]

# the contract is imported from here, so that what this file registers is there
__all__ = [
    "AverageHead",
    "BottleneckMLP",
    "build_head",
    "ConcatHead",
    "Convolution",
    "DepthwisePerception",
    "ExitHead",
    "head_kind",
    "HEADS",
    "HeadShape",
    "is_head",
    "is_watched",
    "known_heads",
    "lgvit_heads",
    "LinearHead",
    "MapHead",
    "num_sparse_heads",
    "PointwisePerception",
    "register_head",
    "SelfAttention",
    "SubsampledAttention",
    "TransformerBlock",
    "ViTHead",
]


def _all_tokens(tokens: Tokens) -> Tensor:
    """Prefix tokens and patches, `[B, P + N, D]`."""
    return torch.cat([tokens.prefix, tokens.patches], dim=1) if tokens.prefix.shape[1] else tokens.patches


def _standardise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm without its scale and shift, which commute with a mean."""
    return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def _scale(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The scale and shift of a layer norm."""
    return x * norm.weight + norm.bias


@register_head("linear")
class LinearHead(ExitHead):
    """What the backbone's own classifier would be here; no feature map.

    One prefix token: dense, tanh, dropout, classifier (features `[B, D]`). Two: layer norm, a classifier each
    (features `[B, 2, D]`). None, or `pool="mean"`: layer norm, mean over the tokens, classifier (features `[B, D]`).
    """

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.reads_prefixes = shape.pool == "cls" and shape.num_prefix > 0
        self.pools_one_token = self.reads_prefixes and shape.num_prefix == 1
        if self.pools_one_token:
            self.dense: Layer = nn.Linear(shape.width, shape.width)
            self.dropout: Layer = nn.Dropout(shape.dropout)
        else:
            self.norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        prefixes = self.prefixes(tokens)
        if prefixes:
            return self._read_prefixes(prefixes)
        pooled = self.norm(torch.cat([tokens.prefix, tokens.patches], dim=1)).mean(1)
        return [pooled], pooled

    def reduce(self, tokens: Tokens) -> Tensor | None:
        prefixes = self.prefixes(tokens)
        if prefixes:
            return torch.stack(prefixes, dim=1)
        return _standardise(self.norm, torch.cat([tokens.prefix, tokens.patches], dim=1)).mean(1, keepdim=True)

    def read_reduced(self, reduced: Tensor) -> tuple[list[Tensor], Tensor]:
        if self.reads_prefixes:
            return self._read_prefixes(list(reduced.unbind(1)))
        pooled = _scale(self.norm, reduced[:, 0])
        return [pooled], pooled

    def _read_prefixes(self, prefixes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        if self.pools_one_token:
            pooled = self.dropout(torch.tanh(self.dense(prefixes[0])))
            return [pooled], pooled
        normed = [self.norm(prefix) for prefix in prefixes]
        return normed, torch.stack(normed, dim=1)


@register_head("average")
class AverageHead(ExitHead):
    """How convolutional networks end: the mean over all places, layer norm, classifier; no feature map.

    Each prefix token that is read is added to the mean of the patches; features `[B, D]`, of two such tokens
    `[B, 2, D]`. With `pool="mean"` all tokens count alike. On the maps of early layers far faster than `linear`, which
    normalises every place.
    """

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        return self.read_reduced(self.reduce(tokens))

    def reduce(self, tokens: Tokens) -> Tensor:
        prefixes = self.prefixes(tokens)
        if prefixes:
            return torch.stack([tokens.patches.mean(1) + prefix for prefix in prefixes], dim=1)
        return _all_tokens(tokens).mean(1, keepdim=True)

    def read_reduced(self, reduced: Tensor) -> tuple[list[Tensor], Tensor]:
        vectors = [self.norm(vector) for vector in reduced.unbind(1)]
        return vectors, vectors[0] if len(vectors) == 1 else torch.stack(vectors, dim=1)


@register_head("concat")
class ConcatHead(ExitHead):
    """DINOv2's own classifier (https://arxiv.org/abs/2304.07193): prefix tokens and mean patch side by side.

    One layer norm over all tokens, then one classifier of the P prefix tokens and the mean of the patches, which are
    the features, `[B, (P + 1) * D]`. Where no prefix token is read (Swin, `pool="mean"`): of the mean and the largest
    value of each channel, `[B, 2 * D]`.
    """

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.reads_prefixes = shape.pool == "cls" and shape.num_prefix > 0
        num_vectors = 1 + (shape.num_prefix if self.reads_prefixes else 1)
        self.norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.classifiers = nn.ModuleList([nn.Linear(num_vectors * shape.width, shape.num_labels)])

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        num_prefix, normed = tokens.prefix.shape[1], self.norm(_all_tokens(tokens))
        if self.reads_prefixes:
            vectors = [*normed[:, :num_prefix].unbind(1), normed[:, num_prefix:].mean(1)]
        else:
            vectors = [normed.mean(1), normed.amax(1)]
        joined = torch.cat(vectors, dim=-1)
        return [joined], joined

    def reduce(self, tokens: Tokens) -> Tensor:
        num_prefix, standard = tokens.prefix.shape[1], _standardise(self.norm, _all_tokens(tokens))
        if self.reads_prefixes:
            return torch.cat([standard[:, :num_prefix], standard[:, num_prefix:].mean(1, keepdim=True)], dim=1)
        # a channel whose scale is negative is largest where the channel was smallest
        return torch.stack([standard.mean(1), standard.amax(1), standard.amin(1)], dim=1)

    def read_reduced(self, reduced: Tensor) -> tuple[list[Tensor], Tensor]:
        vectors = _scale(self.norm, reduced)
        if not self.reads_prefixes:
            mean, *ends = vectors.unbind(1)
            vectors = torch.stack([mean, torch.maximum(*ends)], dim=1)
        joined = vectors.flatten(1)
        return [joined], joined


@register_head("vit")
class ViTHead(LinearHead):
    """One more transformer block on all tokens, then the `linear` head (ViT-EE)."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.block: Layer = TransformerBlock(shape)

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        num_prefix = tokens.prefix.shape[1]
        mixed = self.block(torch.cat([tokens.prefix, tokens.patches], dim=1))
        return super().read(Tokens(mixed[:, num_prefix:], tokens.grid, mixed[:, :num_prefix]))

    def reduce(self, tokens: Tokens) -> None:
        """The block needs all tokens."""


class TransformerBlock(nn.Module):
    """A pre-norm transformer block as in ViT: attention and MLP, each with its residual."""

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.norm_before: Layer = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.mix: Layer = SelfAttention(shape)
        self.norm_after: Layer = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.widen: Layer = nn.Linear(shape.width, shape.intermediate_size)
        self.activation: Layer = ACT2FN[shape.hidden_act]
        self.narrow: Layer = nn.Linear(shape.intermediate_size, shape.width)
        self.dropout: Layer = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mix(self.norm_before(x)))
        return x + self.dropout(self.narrow(self.activation(self.widen(self.norm_after(x)))))


def _attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of `[B, N, D]` tensors with `num_heads` heads."""
    query, key, value = (torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _linear(width: int, new_width: int) -> Layer:
    return nn.Linear(width, new_width)


@register_head("self_attention")
class SelfAttention(nn.Module):
    """The backbone's self-attention on the patches: biases, its number of heads, no norm, no residual."""

    kind = "global"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.query, self.key, self.value, self.proj = (_linear(shape.width, shape.width) for _ in range(4))

    def forward(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj(self._mixed(patches))

    def pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(self._mixed(patches).mean(1))

    def _mixed(self, patches: Tensor) -> Tensor:
        return _attend(self.query(patches), self.key(patches), self.value(patches), self.num_heads)


def num_sparse_heads(width: int) -> int:
    """Attention heads of `attention_r{n}`: 8, or the largest smaller number that divides the width."""
    return max(n for n in range(1, 9) if width % n == 0)


@register_head("attention")
class SubsampledAttention(nn.Module):
    """Global aggregation (LGViT): self-attention on every `ratio`-th patch of every `ratio`-th row.

    8 attention heads, or the largest smaller number that divides the width; no bias in query, key and value, no norm,
    no residual. The map has `ceil(h / ratio) * ceil(w / ratio)` tokens.
    """

    kind = "global"

    def __init__(self, shape: HeadShape, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.num_heads = num_sparse_heads(shape.width)
        self.qkv: Layer = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.proj: Layer = nn.Linear(shape.width, shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(self._mixed(patches, grid))

    def pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(self._mixed(patches, grid).mean(1))

    def _mixed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.ratio > 1:
            patches = torch.unflatten(patches, 1, grid)[:, :: self.ratio, :: self.ratio].flatten(1, 2)
        query, key, value = self.qkv(patches).chunk(3, dim=-1)
        return _attend(query, key, value, self.num_heads)


@register_head("mlp")
class BottleneckMLP(nn.Module):
    """EEVIT's `dummy_mlp`: each patch through ten hidden units, the cheapest head that makes a map."""

    kind = "local"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.widen: Layer = nn.Linear(shape.width, 10)
        self.narrow: Layer = nn.Linear(10, shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.narrow(F.relu(self.widen(patches)))

    def pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.narrow(F.relu(self.widen(patches)).mean(1))


def _as_image(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, h * w, D]` -> `[B, D, h, w]`."""
    return torch.unflatten(patches.transpose(1, 2), 2, grid)


def _as_patches(image: Tensor) -> Tensor:
    """`[B, D, h, w]` -> `[B, h * w, D]`."""
    return image.flatten(2).transpose(1, 2)


def _pointwise(width: int) -> Layer:
    return nn.Conv2d(width, width, kernel_size=1)


def _batch_norm(width: int) -> Layer:
    return nn.BatchNorm2d(width)


@register_head("conv_normal")
class Convolution(nn.Module):
    """A full 3x3 convolution, GELU, batch norm; no residual."""

    kind = "local"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.conv: Layer = nn.Conv2d(shape.width, shape.width, kernel_size=3, padding=1)
        self.bn: Layer = nn.BatchNorm2d(shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return _as_patches(self.bn(F.gelu(self.conv(_as_image(patches, grid)))))


@register_head("conv2_1")
class PointwisePerception(nn.Module):
    """Local perception, light (LGViT): two 1x1 convolutions with batch norm, GELU after the first, residual."""

    kind = "local"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.expand, self.expand_bn = _pointwise(shape.width), _batch_norm(shape.width)
        self.project, self.project_bn = _pointwise(shape.width), _batch_norm(shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        image = _as_image(patches, grid)
        return _as_patches(image + self._project(self._activate(image)))

    def pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        # what follows the last GELU is affine: of the mean it is the mean, at a fraction of the cost
        activated = self._activate(_as_image(patches, grid)).mean((2, 3), keepdim=True)
        return patches.mean(1) + self._project(activated).flatten(1)

    def _activate(self, image: Tensor) -> Tensor:
        return F.gelu(self.expand(image))

    def _project(self, activated: Tensor) -> Tensor:
        return self.project_bn(self.project(self.expand_bn(activated)))


@register_head("conv1_1")
class DepthwisePerception(PointwisePerception):
    """Local perception (LGViT): `conv2_1` with a 3x3 depth-wise convolution, GELU and batch norm in between."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.depthwise: Layer = nn.Conv2d(shape.width, shape.width, kernel_size=3, padding=1, groups=shape.width)
        self.depthwise_bn: Layer = nn.BatchNorm2d(shape.width)

    def _activate(self, image: Tensor) -> Tensor:
        return F.gelu(self.depthwise(self.expand_bn(F.gelu(self.expand(image)))))

    def _project(self, activated: Tensor) -> Tensor:
        return self.project_bn(self.project(self.depthwise_bn(activated)))


def lgvit_heads(num_exits: int, *, attention: tuple[str, str] = ("attention_r2", "attention_r3")) -> list[str]:
    """LGViT's layout: local perception in the shallow half, global aggregation in the deep half.

    Published for 2, 4, 6 and 8 exits on ViT and DeiT, and for 8 on Swin, whose `attention` is `r1` and `r2`; the same
    rule for every other number.

    Example:

        >>> lgvit_heads(4)
        ['conv1_1', 'conv2_1', 'attention_r2', 'attention_r3']
        >>> lgvit_heads(3)
        ['conv1_1', 'conv2_1', 'attention_r2']
    """
    # the published layout for 6 exits has two local heads, not three
    num_local = 2 if num_exits == 6 else math.ceil(num_exits / 2)
    num_global = num_exits - num_local

    def halves(first: str, second: str, count: int) -> list[str]:
        return [first] * math.ceil(count / 2) + [second] * (count // 2)

    return halves("conv1_1", "conv2_1", num_local) + halves(*attention, num_global)
