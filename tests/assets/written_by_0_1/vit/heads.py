"""Exit heads: what an exit computes. Small bodies that turn patches into a map, and the readers that classify.

Formulas: LGViT (https://arxiv.org/abs/2308.00255), ViT-EE (https://arxiv.org/abs/2106.15183), EEVIT.
No parameter here may be called `output.dense`, `intermediate.dense`, `attention.*` or `mlp.fc*`: transformers 5
renames such keys of a Swin checkpoint wherever they stand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .segments import Tokens

HEADS: dict[str, Callable[..., nn.Module]] = {}
"""Bodies of exit heads by name: what `exit_types` may hold; `register_head` adds one."""


@dataclass(frozen=True)
class HeadShape:
    """What a head must fit: the state where its exit stands, and the labels.

    Args:
        width (`int`): Channels `D` of the tokens.
        num_prefix (`int`): Prefix tokens its classifiers read: 0, 1 or 2.
        num_labels (`int`): Classes `C`.
        num_attention_heads (`int`): Of the backbone's blocks at that depth.
        intermediate_size (`int`): Hidden width of the MLP of the backbone's blocks at that depth.
        layer_norm_eps (`float`), hidden_act (`str`), dropout (`float`): As in the backbone.
        pool (`str`): `"cls"` reads the prefix tokens, `"mean"` the mean of all tokens.
    """

    width: int
    num_prefix: int
    num_labels: int
    num_attention_heads: int = 1
    intermediate_size: int = 1
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    dropout: float = 0.0
    pool: str = "cls"

    @property
    def num_classifiers(self) -> int:
        """One per prefix token that is read, one where none is."""
        return max(1, self.num_prefix) if self.pool == "cls" else 1


def register_head(name: str) -> Callable[[type], type]:
    """Class decorator: make a head body known under `name`, for `exit_types`.

    The class is built with one argument, a `HeadShape`, and its `forward(patches, grid)` takes patches `[B, h * w, D]`
    and gives a map `[B, N, D]` with any `N`, which is then averaged and classified. A method `pooled` with the same
    arguments may give that average `[B, D]` at less cost, for inference. A class attribute `kind` may say `"local"` or
    `"global"`: the group that the exit joins in LGViT distillation.

    Example:

        >>> @register_head("identity")
        ... class Identity(nn.Module):
        ...     def __init__(self, shape):
        ...         super().__init__()
        ...     def forward(self, patches, grid):
        ...         return patches
        >>> head = build_head("identity", HeadShape(width=8, num_prefix=1, num_labels=3))
        >>> logits, features = head(Tokens(torch.randn(2, 6, 8), (2, 3), torch.randn(2, 1, 8)))
        >>> logits.shape, features.shape
        (torch.Size([2, 3]), torch.Size([2, 6, 8]))
        >>> _ = HEADS.pop("identity")
    """

    def decorate(head: type) -> type:
        if name in HEADS and HEADS[name].__qualname__ != head.__qualname__:
            raise ValueError(f"there is already a head called {name!r} ({HEADS[name]}); choose another name")
        HEADS[name] = head
        return head

    return decorate


def known_heads() -> str:
    """The names that `exit_types` accepts, for error messages."""
    return ", ".join(sorted({*HEADS, "attention_r{n}"} - {"attention"}))


def _parse(name: str) -> tuple[str, dict[str, int]] | None:
    """`attention_r2` -> `("attention", {"ratio": 2})`; `None` for a name nobody registered."""
    if isinstance(name, str):
        if match := re.fullmatch(r"attention_r([1-9]\d*)", name):
            return "attention", {"ratio": int(match[1])}
        if name in HEADS and name != "attention":
            return name, {}
    return None


def is_head(name: str) -> bool:
    """Whether `exit_types` may hold `name`.

    Example:

        >>> is_head("attention_r12"), is_head("attention"), is_head("conv1_2")
        (True, False, False)
    """
    return _parse(name) is not None


def head_kind(name: str) -> str | None:
    """`"local"` for convolution heads, `"global"` for attention heads, `None` for heads without a feature map.

    Example:

        >>> head_kind("conv1_1"), head_kind("attention_r2"), head_kind("linear")
        ('local', 'global', None)
    """
    parsed = _parse(name)
    return getattr(HEADS[parsed[0]], "kind", None) if parsed else None


def build_head(name: str, shape: HeadShape) -> ExitHead:
    """Make the head `name` for `shape`.

    Raises:
        ValueError: Nobody registered such a head.
    """
    parsed = _parse(name)
    if parsed is None:
        raise ValueError(f"unknown head {name!r}; known heads: {known_heads()}")
    cls, options = HEADS[parsed[0]], parsed[1]
    if isinstance(cls, type) and issubclass(cls, ExitHead):
        return cls(shape, **options)
    return MapHead(shape, cls(shape, **options))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has hung a hook on a module, or put another `forward`: then it must be called as a whole."""
    forward = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


class ExitHead(nn.Module):
    """Reads tokens and classifies: the mean over one classifier per prefix token.

    `read` gives one vector per classifier, and the features that distillation compares; `summarise` only the vectors.
    """

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.pool = shape.pool
        self.classifiers = nn.ModuleList(
            nn.Linear(shape.width, shape.num_labels) for _ in range(shape.num_classifiers)
        )

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        """`[B, D]` for each classifier, and the features."""
        raise NotImplementedError

    def summarise(self, tokens: Tokens) -> list[Tensor]:
        """`[B, D]` for each classifier."""
        return self.read(tokens)[0]

    def forward(self, tokens: Tokens, with_features: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, C]` and features; without these (`None`), at the least cost."""
        tokens = self._in_own_dtype(tokens)
        if not with_features:
            return self._classify(self.summarise(tokens)), None
        vectors, features = self.read(tokens)
        return self._classify(vectors), features

    def answer(self, tokens: Tokens) -> Tensor:
        """Logits `[B, C]` alone."""
        return self(tokens, with_features=False)[0]

    def _in_own_dtype(self, tokens: Tokens) -> Tokens:
        """A head in float32 reads what a backbone in bfloat16 gives; autocast sees to that itself."""
        given = tokens.patches.dtype
        own = next((each.dtype for each in self.parameters() if each.is_floating_point()), given)
        return tokens if own == given or torch.is_autocast_enabled(tokens.patches.device.type) else tokens.to(own)

    def _classify(self, vectors: list[Tensor]) -> Tensor:
        logits = [classifier(vector) for classifier, vector in zip(self.classifiers, vectors, strict=True)]
        return logits[0] if len(logits) == 1 else sum(logits) / len(logits)

    def prefixes(self, tokens: Tokens) -> list[Tensor]:
        """The prefix tokens that are read, each `[B, D]`; none under mean pooling."""
        return list(tokens.prefix.unbind(1)) if self.pool == "cls" else []


class MapHead(ExitHead):
    """A body turns the patches into a map; its mean plus each prefix token is classified.

    Without prefix tokens (Swin) the map is normalised before it is averaged. Features: the map `[B, N, D]`.
    """

    def __init__(self, shape: HeadShape, body: nn.Module):
        super().__init__(shape)
        self.body = body
        self.norm = nn.Identity() if shape.num_prefix else nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        feature_map = self.body(tokens.patches, tokens.grid)
        return self._vectors(self.norm(feature_map).mean(1), tokens), feature_map

    def summarise(self, tokens: Tokens) -> list[Tensor]:
        # batch norm in training looks at every patch, a layer norm at every token of the map, and so do hooks
        needs_map = self.training or not isinstance(self.norm, nn.Identity) or is_watched(self.body)
        if needs_map or not hasattr(self.body, "pooled"):
            return super().summarise(tokens)
        return self._vectors(self.body.pooled(tokens.patches, tokens.grid), tokens)

    def _vectors(self, pooled: Tensor, tokens: Tokens) -> list[Tensor]:
        return [pooled + prefix for prefix in self.prefixes(tokens)] or [pooled]


@register_head("linear")
class LinearHead(ExitHead):
    """What the backbone's own classifier would be here; no feature map.

    One prefix token: dense, tanh, dropout, classifier (features `[B, D]`). Two: layer norm, a classifier each
    (features `[B, 2, D]`). None, or `pool="mean"`: layer norm, mean over the tokens, classifier (features `[B, D]`).
    """

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.pools_one_token = shape.pool == "cls" and shape.num_prefix == 1
        if self.pools_one_token:
            self.dense = nn.Linear(shape.width, shape.width)
            self.dropout = nn.Dropout(shape.dropout)
        else:
            self.norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        prefixes = self.prefixes(tokens)
        if self.pools_one_token:
            pooled = self.dropout(torch.tanh(self.dense(prefixes[0])))
            return [pooled], pooled
        if prefixes:
            normed = [self.norm(prefix) for prefix in prefixes]
            return normed, torch.stack(normed, dim=1)
        pooled = self.norm(torch.cat([tokens.prefix, tokens.patches], dim=1)).mean(1)
        return [pooled], pooled


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
        prefixes = self.prefixes(tokens)
        if prefixes:
            vectors = [self.norm(tokens.patches.mean(1) + prefix) for prefix in prefixes]
            return vectors, vectors[0] if len(vectors) == 1 else torch.stack(vectors, dim=1)
        everything = torch.cat([tokens.prefix, tokens.patches], dim=1) if tokens.prefix.shape[1] else tokens.patches
        pooled = self.norm(everything.mean(1))
        return [pooled], pooled


@register_head("concat")
class ConcatHead(ExitHead):
    """DINOv2's own classifier (https://arxiv.org/abs/2304.07193): prefix tokens and mean patch side by side.

    One layer norm over all tokens, then one classifier of the P prefix tokens and the mean of the patches, which are
    the features, `[B, (P + 1) * D]`. Where no prefix token is read (Swin, `pool="mean"`): of the mean and the largest
    value of each channel, `[B, 2 * D]`.
    """

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        num_vectors = 1 + (shape.num_prefix if shape.pool == "cls" and shape.num_prefix else 1)
        self.norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.classifiers = nn.ModuleList([nn.Linear(num_vectors * shape.width, shape.num_labels)])

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        num_prefix = tokens.prefix.shape[1]
        normed = self.norm(torch.cat([tokens.prefix, tokens.patches], dim=1) if num_prefix else tokens.patches)
        if num_prefix and self.pool == "cls":
            vectors = [*normed[:, :num_prefix].unbind(1), normed[:, num_prefix:].mean(1)]
        else:
            vectors = [normed.mean(1), normed.amax(1)]
        joined = torch.cat(vectors, dim=-1)
        return [joined], joined


@register_head("vit")
class ViTHead(LinearHead):
    """One more transformer block on all tokens, then the `linear` head (ViT-EE)."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape)
        self.block = TransformerBlock(shape)

    def read(self, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        num_prefix = tokens.prefix.shape[1]
        mixed = self.block(torch.cat([tokens.prefix, tokens.patches], dim=1))
        return super().read(Tokens(mixed[:, num_prefix:], tokens.grid, mixed[:, :num_prefix]))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block as in ViT: attention and MLP, each with its residual."""

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.norm_before = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.mix = SelfAttention(shape)
        self.norm_after = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.widen = nn.Linear(shape.width, shape.intermediate_size)
        self.activation = ACT2FN[shape.hidden_act]
        self.narrow = nn.Linear(shape.intermediate_size, shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mix(self.norm_before(x)))
        return x + self.dropout(self.narrow(self.activation(self.widen(self.norm_after(x)))))


def _attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of `[B, N, D]` tensors with `num_heads` heads."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@register_head("self_attention")
class SelfAttention(nn.Module):
    """The backbone's self-attention on the patches: biases, its number of heads, no norm, no residual."""

    kind = "global"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.query, self.key, self.value, self.proj = (nn.Linear(shape.width, shape.width) for _ in range(4))

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
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(self._mixed(patches, grid))

    def pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(self._mixed(patches, grid).mean(1))

    def _mixed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.ratio > 1:
            patches = patches.unflatten(1, grid)[:, :: self.ratio, :: self.ratio].flatten(1, 2)
        return _attend(*self.qkv(patches).chunk(3, dim=-1), self.num_heads)


@register_head("mlp")
class BottleneckMLP(nn.Module):
    """EEVIT's `dummy_mlp`: each patch through ten hidden units, the cheapest head that makes a map."""

    kind = "local"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.widen = nn.Linear(shape.width, 10)
        self.narrow = nn.Linear(10, shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.narrow(F.relu(self.widen(patches)))

    def pooled(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.narrow(F.relu(self.widen(patches)).mean(1))


def _as_image(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, h * w, D]` -> `[B, D, h, w]`."""
    return patches.transpose(1, 2).unflatten(2, grid)


def _as_patches(image: Tensor) -> Tensor:
    """`[B, D, h, w]` -> `[B, h * w, D]`."""
    return image.flatten(2).transpose(1, 2)


def _pointwise(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, kernel_size=1)


@register_head("conv_normal")
class Convolution(nn.Module):
    """A full 3x3 convolution, GELU, batch norm; no residual."""

    kind = "local"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.conv = nn.Conv2d(shape.width, shape.width, kernel_size=3, padding=1)
        self.bn = nn.BatchNorm2d(shape.width)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return _as_patches(self.bn(F.gelu(self.conv(_as_image(patches, grid)))))


@register_head("conv2_1")
class PointwisePerception(nn.Module):
    """Local perception, light (LGViT): two 1x1 convolutions with batch norm, GELU after the first, residual."""

    kind = "local"

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.expand, self.expand_bn = _pointwise(shape.width), nn.BatchNorm2d(shape.width)
        self.project, self.project_bn = _pointwise(shape.width), nn.BatchNorm2d(shape.width)

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
        self.depthwise = nn.Conv2d(shape.width, shape.width, kernel_size=3, padding=1, groups=shape.width)
        self.depthwise_bn = nn.BatchNorm2d(shape.width)

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
