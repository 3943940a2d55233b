"""What an exit head is: the shape it must fit, its contract, the registry, and a head from its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .segments import Tokens

AnyHead = TypeVar("AnyHead", bound=type[nn.Module])

HEADS: dict[str, type[nn.Module]] = {}
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


def register_head(name: str) -> Callable[[AnyHead], AnyHead]:
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

    def decorate(head: AnyHead) -> AnyHead:
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
    head = cls(shape, **options)
    return head if isinstance(head, ExitHead) else MapHead(shape, head)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has hung a hook on a module, or put another `forward`: then it must be called as a whole."""
    forward = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


class ExitHead(nn.Module):
    """Reads tokens and classifies: the mean over one classifier per prefix token.

    `read` gives one vector per classifier, and the features that distillation compares; `summarise` only the vectors.
    A head that needs a few vectors alone, which no weight changes, gives them in `reduce` and goes on from there in
    `read_reduced`: on a frozen backbone these vectors are all that has to be kept to train it.
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

    def reduce(self, tokens: Tokens) -> Tensor | None:
        """All that the head needs of the tokens, `[B, V, D]`, whatever its weights; `None`: it needs the tokens."""
        return None

    def read_reduced(self, reduced: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `read` gives, from what `reduce` gave."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, with_features: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, C]` and features; without these (`None`), at the least cost."""
        tokens = self._in_own_dtype(tokens)
        if not with_features:
            return self._classify(self.summarise(tokens)), None
        vectors, features = self.read(tokens)
        return self._classify(vectors), features

    def answer(self, tokens: Tokens) -> Tensor:
        """Logits `[B, C]` alone."""
        return cast(Tensor, self(tokens, with_features=False)[0])

    def answer_reduced(self, reduced: Tensor) -> Tensor:
        """Logits `[B, C]` from what `reduce` gave."""
        return self._classify(self.read_reduced(reduced)[0])

    def _in_own_dtype(self, tokens: Tokens) -> Tokens:
        """A head in float32 reads what a backbone in bfloat16 gives; autocast sees to that itself."""
        given = tokens.patches.dtype
        own = next((each.dtype for each in self.parameters() if each.is_floating_point()), given)
        return tokens if own == given or torch.is_autocast_enabled(tokens.patches.device.type) else tokens.to(own)

    def _classify(self, vectors: list[Tensor]) -> Tensor:
        logits = [classifier(vector) for classifier, vector in zip(self.classifiers, vectors, strict=True)]
        return cast(Tensor, logits[0] if len(logits) == 1 else sum(logits) / len(logits))

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
        pooled: Any = getattr(self.body, "pooled", None)
        if needs_map or pooled is None:
            return super().summarise(tokens)
        return self._vectors(pooled(tokens.patches, tokens.grid), tokens)

    def _vectors(self, pooled: Tensor, tokens: Tokens) -> list[Tensor]:
        return [pooled + prefix for prefix in self.prefixes(tokens)] or [pooled]
