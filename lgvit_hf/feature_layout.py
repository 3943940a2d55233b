"""How exit heads read what a submodule gives: maps, sequences of tokens and vectors, told by their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .segments import Tokens

# most prefix tokens (class, distillation, registers) that a sequence is thought to begin with
MOST_PREFIX_TOKENS = 8


@dataclass(frozen=True)
class Reading:
    """How heads read what a submodule gives.

    Args:
        kind (`str`):
            `"map"` `[B, D, h, w]`, `"map_last"` `[B, h, w, D]`, `"sequence"` `[B, N, D]` or `"vector"` `[B, D]`.
        width (`int`): Channels `D`.
        grid (`tuple[int, int]`): `(h, w)` of the patches.
        num_prefix (`int`): Tokens before the patches of a sequence.
    """

    kind: str
    width: int
    grid: tuple[int, int]
    num_prefix: int = 0

    def tokens(self, hidden: Tensor) -> Tokens:
        """The same values as patches and prefix tokens."""
        if self.kind == "map":
            patches = hidden.flatten(2).transpose(1, 2)
        elif self.kind == "map_last":
            patches = hidden.flatten(1, 2)
        elif self.kind == "vector":
            patches = hidden[:, None]
        else:
            patches = hidden[:, self.num_prefix :]
        prefix = hidden[:, : self.num_prefix] if self.num_prefix else patches[:, :0]
        return Tokens(patches, self.grid, prefix)


def reading_of(shape: Sequence[int], image_size: tuple[int, int]) -> Reading:
    """How to read a submodule's output, told by its shape.

    A map has its channels where the two others are not in the proportion of the image, first if in doubt. A sequence
    begins with as few prefix tokens (class tokens, registers) as leave a grid in that proportion; where no number up
    to 8 does, it is a row of patches.

    Args:
        shape (`Sequence[int]`): Without the batch.
        image_size (`tuple[int, int]`): Height and width of the image.

    Raises:
        ValueError: It is none of `[D, h, w]`, `[h, w, D]`, `[N, D]` and `[D]`.

    Example:

        >>> reading_of([64, 8, 8], (32, 32)).kind, reading_of([8, 8, 64], (32, 32)).kind
        ('map', 'map_last')
        >>> reading_of([201, 384], (224, 224))
        Reading(kind='sequence', width=384, grid=(14, 14), num_prefix=5)
    """
    height, width = image_size
    if len(shape) == 1:
        return Reading("vector", shape[0], (1, 1))
    if len(shape) == 2:
        for num_prefix in range(min(MOST_PREFIX_TOKENS, shape[0] - 1) + 1):
            rows = round(((shape[0] - num_prefix) * height / width) ** 0.5)
            if rows and rows * rows * width == (shape[0] - num_prefix) * height:
                return Reading("sequence", shape[1], (rows, (shape[0] - num_prefix) // rows), num_prefix)
        return Reading("sequence", shape[1], (1, shape[0]))
    if len(shape) == 3:
        channels_last = shape[0] * width == shape[1] * height and shape[1] * width != shape[2] * height
        if channels_last:
            return Reading("map_last", shape[2], (shape[0], shape[1]))
        return Reading("map", shape[0], (shape[1], shape[2]))
    raise ValueError(
        f"heads: an output of shape {list(shape)} (without the batch) is no map, sequence or vector; give a module of "
        "your own that turns it into logits"
    )


def default_head(shape: Sequence[int]) -> str:
    """The head of an exit for which none was chosen, by what it reads, without the batch.

    Example:

        >>> default_head([197, 384]), default_head([64, 8, 8])
        ('concat', 'average')
    """
    return "concat" if len(shape) == 2 else "average"
