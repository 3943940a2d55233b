"""HighwayWrapperConfig: where a module of any kind is cut, and what stands there. Everything is checked when built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from .configuration import HighwayConfig
from .ensemble import Ensemble  # noqa: F401
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Memory  # noqa: F401
from .exit_settings import Exit  # noqa: F401
from .gate import GatePolicy  # noqa: F401
from .heads import HEADS  # noqa: F401
from .policies import POLICIES  # noqa: F401
from .safe_config import SafeConfig  # noqa: F401
from .segments import State  # noqa: F401

# an exit whose head is a module of the user's own
OWN = "own"


class HighwayWrapperConfig(HighwayConfig, PretrainedConfig):
    """Exits after named submodules of any module; see `HighwayConfig` for the exit settings.

    A block is a stretch between two cuts: exit number `i` stands after block `i + 1`, the module's own answer after
    the last.

    Args:
        after (`list[str]`): Names of the submodules after which it is cut, in the order in which they run.
        exit_types (`list[str]` or `str`, *optional*, defaults to `"average"`):
            Head of each exit, or one for all; `"own"` is a module that is given with the model.
        exit_shapes (`list[list[int]]`): What each exit reads, without the batch.
        image_size (`int` or `list[int]`, *optional*, defaults to 224): Height and width of the images.
        num_channels (`int`, *optional*, defaults to 3): Of the images.
        module_class (`str`, *optional*): What was wrapped, for messages.
        module_config (`dict`, *optional*): The config of a transformers model, from which it is built when loaded.
        kwargs: Other exit settings, and fields of `PretrainedConfig` such as `id2label`.

    Raises:
        ValueError: Naming the field, its value and what it may be.

    Example:

        >>> config = HighwayWrapperConfig(after=["layer1", "layer2"], exit_shapes=[[8, 4, 4], [16, 2, 2]])
        >>> config.exits, config.num_blocks
        ((Exit(after=1, head='average'), Exit(after=2, head='average')), 3)
    """

    model_type = "wrapped_highway"
    pools = ("mean",)
    other_types = (OWN,)
    takes_performer = False

    def __init__(
        self,
        after=(),
        exit_types="average",
        exit_shapes=(),
        image_size=224,
        num_channels=3,
        module_class=None,
        module_config=None,
        exit_positions=None,
        exit_policy=None,
        exit_loss_weights="depth",
        pool=None,
        truncated=False,
        exit_ensemble=None,
        **kwargs,
    ):
        # before the rest, which asks for the number of blocks
        self.after = after
        self.exit_shapes = exit_shapes
        self.image_size = image_size
        self.num_channels = num_channels
        self.module_class = module_class
        self.module_config = module_config
        self.validate_cuts()
        positions = list(range(1, self.num_blocks))
        if exit_positions is not None and list(exit_positions) != positions:
            raise ValueError(
                f"exit_positions: {exit_positions!r} must be {positions}: every cut has its exit; `after` says where"
            )
        super().__init__(
            positions,
            exit_types,
            exit_policy,
            exit_loss_weights,
            pool,
            truncated,
            exit_ensemble=exit_ensemble,
            **kwargs,
        )

    @property
    def num_blocks(self) -> int:
        """Stretches between cuts."""
        return len(self.after) + 1

    def validate_cuts(self) -> None:
        """Check the places of the cuts; lists are copied and made plain.

        Raises:
            ValueError: Naming the field, its value and what it may be.
        """
        if not _is_list(self.after) or not all(isinstance(name, str) and name for name in self.after):
            raise ValueError(
                f"after: {self.after!r} must be a list of names of submodules, such as ['layer1', 'layer2']"
            )
        if not _is_list(self.exit_shapes) or len(self.exit_shapes) != len(self.after):
            raise ValueError(f"exit_shapes: {self.exit_shapes!r} must be a list of {len(self.after)}, one per exit")
        for shape in self.exit_shapes:
            if not _is_list(shape) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
                raise ValueError(f"exit_shapes: {shape!r} must be a list of sizes, without the batch")
        self.after = list(self.after)
        self.exit_shapes = [list(shape) for shape in self.exit_shapes]

    def patch_grid(self, after: int, height: int, width: int) -> tuple[int, int]:
        """Not known: the last block of a wrapped module ends in its logits.

        Raises:
            ValueError: Always; features are compared by one strategy alone.
        """
        raise ValueError(
            "strategy: 'distillation_lgvit' compares the maps of exits with the backbone's last patches, which a "
            "wrapped module does not show; use strategy='distillation'"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def config_of_wrapped(
    module: nn.Module,
    after: list[str],
    heads: Sequence[str | nn.Module],
    shapes: list[list[int]],
    num_labels: int,
    images: Tensor,
    settings: dict[str, Any],
) -> HighwayWrapperConfig:
    """The config of a module that is cut after `after`, with heads that read `shapes`, and settings of its own."""
    theirs = getattr(module, "config", None)
    labels: dict[str, Any] = {"num_labels": num_labels}
    if isinstance(theirs, PretrainedConfig) and theirs.num_labels == num_labels:
        labels = {"id2label": theirs.id2label, "label2id": theirs.label2id, "problem_type": theirs.problem_type}
    if "id2label" in settings:
        labels.pop("num_labels", None)
        if len(settings["id2label"]) != num_labels:
            raise ValueError(f"id2label: {len(settings['id2label'])} names for the {num_labels} logits of the module")
    height, width = images.shape[2:]
    is_theirs = isinstance(module, transformers.PreTrainedModel) and getattr(
        transformers, class_name(module), None
    ) is type(module)
    fields = {
        "after": after,
        "exit_types": [OWN if isinstance(head, nn.Module) else head for head in heads],
        "exit_shapes": shapes,
        "image_size": height if height == width else [height, width],
        "num_channels": images.shape[1],
        "module_class": f"{type(module).__module__}.{type(module).__qualname__}",
        "module_config": theirs.to_dict() if is_theirs and theirs is not None else None,
    }
    wrong = sorted(set(fields) & set(settings))
    if wrong:
        raise ValueError(f"{wrong[0]}: it is told by the module and its heads, and cannot be set")
    unknown = sorted(set(settings) - set(HighwayWrapperConfig().to_dict()) - {"num_labels"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no field of HighwayWrapperConfig")
    return HighwayWrapperConfig(**{**fields, **labels, **settings})


def class_name(module: nn.Module) -> str:
    """What a module is called in messages."""
    return type(module).__name__
