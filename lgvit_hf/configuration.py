"""What the config of every highway has: where exits stand, what they compute, when samples exit; all checked."""

from __future__ import annotations

import copy
import difflib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .ensemble import build_ensemble
from .exit_head import ExitHead  # noqa: F401
from .exit_policy import Rule
from .exit_settings import (
    Exit,
    check_loss_weights,
    checked_linear_blocks,
    checked_positions,
    checked_types,
    lgvit_positions,
)
from .gate import GatePolicy  # noqa: F401
from .heads import lgvit_heads
from .policies import ExitPolicy, build_policy, check_problem, default_policy, following_default, problem_of
from .safe_config import SafeConfig, check_num_labels
from .segments import height_width

if TYPE_CHECKING:
    from typing_extensions import Self

EXIT_FIELDS = ("exit_positions", "exit_types", "exit_policy", "exit_loss_weights", "exit_ensemble")
PERFORMER_FIELDS = ("feature_map_dim", "feature_map_seed")
OTHER_FIELDS = ("pool", "truncated", "linear_blocks")
OWN_FIELDS = (*EXIT_FIELDS, *PERFORMER_FIELDS, *OTHER_FIELDS, "distilled", "num_labels", "attn_implementation")
DEFAULT_FEATURES = 256


class HighwayConfig(SafeConfig):
    """The exit settings that every highway config has, mixed into the backbone's own config.

    Args:
        exit_positions (`list[int]` or `"lgvit"`, *optional*, defaults to `"lgvit"`):
            Blocks already run when each exit is reached, counted from 1: strictly increasing, `1 <= p < L`.
        exit_types (`list[str]`, `str`, *optional*, defaults to `"lgvit"`):
            Head of each exit, or one for all.
        exit_policy (`dict`, *optional*):
            When a sample exits, such as `{"name": "confidence", "threshold": [0.8, 0.9]}`. By default confidence above
            0.8; with several labels at once (`problem_type="multi_label_classification"`) `label_confidence` above
            0.9; `never` for a regression, as of one label.
        exit_loss_weights (`str` or `list[float]`, *optional*, defaults to `"depth"`):
            Share of each exit, and of the final classifier as the last, in the training loss: `"depth"` (the
            position), `"uniform"`, or a list of exits + 1 numbers.
        exit_ensemble (`dict`, *optional*):
            `{"weights": [...], "bias": [...]}`, as `fit_ensemble` gives it, one weight per exit, the final
            classifier's last, one bias per class: with early exit, the exits evaluated so far answer together.
        pool (`str`, *optional*):
            What the final classifier and the exits read: `"cls"`, or `"mean"` over all tokens.
        truncated (`bool`, *optional*, defaults to `False`):
            Written by `model.truncate`: the one exit stands after the last block and is the model's only answer.
        linear_blocks (`list[int]`, *optional*):
            Written by `lgvit_hf.shorten`: first and last of the blocks, from 1, whose place one linear map of each
            token takes. All blocks keep their numbers; between these there is no exit.
        feature_map_dim (`int`, *optional*):
            Random features of `attn_implementation="performer"`, 256 by default there; not given, attention is exact.
            transformers saves no `attn_implementation`: this field is how a saved model knows that it is a Performer.
        feature_map_seed (`int`, *optional*):
            With `feature_map_dim`, what the directions of the first block are drawn from, 0 by default; each block
            counts on by one.

    Raises:
        ValueError: Naming the field, its value and what it may be.
    """

    # predictions of a plain `Trainer` are then the answers alone, as for any other classifier
    keys_to_ignore_at_inference = [
        "exit_layer",
        "exit_index",
        "exit_score",
        "exit_logits",
        "exit_features",
        "hidden_states",
        "attentions",
    ]
    pools: tuple[str, ...] = ("cls", "mean")
    # what `exit_types` may hold beside the heads of `heads.py`
    other_types: tuple[str, ...] = ()
    takes_performer = True
    exit_ensemble: dict[str, Any] | None = None
    feature_map_dim: int | None = None
    feature_map_seed: int | None = None

    if TYPE_CHECKING:
        # set below, and by the backbone's config
        exit_positions: list[int]
        exit_types: list[str]
        exit_policy: dict[str, Any]
        exit_loss_weights: str | list[float]
        pool: str
        truncated: bool
        linear_blocks: list[int] | None
        image_size: int | Sequence[int]
        patch_size: int | Sequence[int]
        num_channels: int
        num_hidden_layers: int
        hidden_size: int
        num_attention_heads: int
        attention_probs_dropout_prob: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # transformers 5 writes an `__init__` of the fields for each class of a config that has none of its own
        if "__init__" not in vars(cls):
            cls.__init__ = cls.__init__  # type: ignore[method-assign]  # inherited
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        exit_positions: Any = "lgvit",
        exit_types: Any = "lgvit",
        exit_policy: dict[str, Any] | str | None = None,
        exit_loss_weights: Any = "depth",
        pool: str | None = None,
        truncated: bool = False,
        linear_blocks: Any = None,
        feature_map_dim: int | None = None,
        feature_map_seed: int | None = None,
        exit_ensemble: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**_own_settings(kwargs))
        # lists of anything: `validate_exits` looks at them
        self.truncated = truncated
        self.linear_blocks = linear_blocks
        self.validate_linear_blocks()
        if exit_positions == "lgvit":
            exit_positions = [each for each in self._preset_positions() if each not in self.replaced_positions]
        self.exit_positions = exit_positions
        num_exits = len(self.exit_positions) if isinstance(self.exit_positions, Sequence) else 0
        if exit_types == "lgvit":
            exit_types = self._preset_types(num_exits)
        self.exit_types = [exit_types] * num_exits if isinstance(exit_types, str) else exit_types
        if exit_policy is None:
            exit_policy = default_policy(self.num_labels, self.problem_type)
        self.exit_policy = {"name": exit_policy} if isinstance(exit_policy, str) else copy.deepcopy(exit_policy)
        self.exit_loss_weights = exit_loss_weights
        self.exit_ensemble = copy.deepcopy(exit_ensemble)
        self.pool = self.pools[0] if pool is None else pool
        self.validate_exits()
        _offer_models()
        if self.takes_performer or (feature_map_dim, feature_map_seed) != (None, None):
            self.feature_map_dim, self.feature_map_seed = feature_map_dim, feature_map_seed
        if self._attn_implementation is None and feature_map_dim is not None:
            self._attn_implementation = "performer"
        self.validate_performer()

    @classmethod
    def as_own(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Fields of an upstream's config as fields of this one: the same ones."""
        return settings

    def validate_performer(self) -> None:
        """Check `attn_implementation` and the fields that go with it, and fill in their defaults.

        Raises:
            ValueError: Naming the field, its value and what it may be.
        """
        given = {field: getattr(self, field) for field in PERFORMER_FIELDS if getattr(self, field) is not None}
        if self._attn_implementation != "performer":
            if given:
                raise ValueError(
                    f"{', '.join(given)}: {', '.join(map(repr, given.values()))} takes no effect with "
                    f"attn_implementation={self._attn_implementation!r}, only with 'performer'"
                )
            return
        self.check_performer()
        for field, least, default in (("feature_map_dim", 1, DEFAULT_FEATURES), ("feature_map_seed", 0, 0)):
            value = given.get(field, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field}: {value!r} must be an integer of at least {least}")
            setattr(self, field, value)

    def check_performer(self) -> None:
        """Raise `ValueError` where `attn_implementation="performer"` cannot take effect."""
        if not self.takes_performer:
            raise ValueError(
                f"attn_implementation='performer' is not possible for {self.model_type}: its attention adds a bias to "
                "every pair of tokens, and an estimate in linear time never forms the pairs; choices: 'eager', 'sdpa'"
            )
        if self.attention_probs_dropout_prob > 0:
            raise ValueError(
                f"attention_probs_dropout_prob: {self.attention_probs_dropout_prob} takes no effect with "
                "attn_implementation='performer', which never forms the probabilities; set it to 0.0"
            )

    @property
    def num_blocks(self) -> int:
        """Depth `L` of the backbone in blocks; Swin's are counted through all its stages."""
        return self.num_hidden_layers

    @property
    def replaced_positions(self) -> range:
        """Depths at which no exit can be: between the blocks that are one linear map."""
        return range(*self.linear_blocks) if self.linear_blocks else range(0)

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The early exits, shallowest first."""
        return tuple(map(Exit, self.exit_positions, self.exit_types))

    def _preset_positions(self) -> list[int]:
        return lgvit_positions(self.num_blocks)

    def _preset_types(self, num_exits: int) -> list[str]:
        return lgvit_heads(num_exits)

    def cut_to(self, num_blocks: int) -> dict[str, Any]:
        """The settings of the same backbone with only its first `num_blocks` blocks."""
        # of configs that a detector could have as its backbone; they follow from the depth
        follow = [name for name in ("out_features", "out_indices", "stage_names") if hasattr(self, name)]
        return {"num_hidden_layers": num_blocks, **dict.fromkeys(follow)}

    def patch_grid(self, after: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches after block `after` (from 1) for images of `height` x `width` pixels."""
        rows, columns = height_width(self.patch_size)
        return height // rows, width // columns

    def validate_linear_blocks(self) -> None:
        """Check `linear_blocks`, which is copied and made plain; `ValueError` for none that there can be."""
        self.linear_blocks = checked_linear_blocks(self.linear_blocks, self.num_blocks)

    def validate_exits(self) -> None:
        """Check all exit settings against each other and the backbone; lists are copied and made plain.

        Raises:
            ValueError: Naming the field, its value and what it may be.
        """
        self.check_sizes()
        self.validate_linear_blocks()
        self.exit_positions = checked_positions(
            self.exit_positions, self.num_blocks, self.truncated, self.linear_blocks
        )
        num_exits = len(self.exit_positions)
        self.exit_types = checked_types(self.exit_types, self.exit_positions, self.other_types)
        check_loss_weights(self.exit_loss_weights, num_exits)
        if not isinstance(self.exit_loss_weights, str):
            self.exit_loss_weights = list(self.exit_loss_weights)
        if self.pool not in self.pools:
            raise ValueError(f"pool: {self.pool!r} is not possible for {self.model_type}; choices: {self.pools}")
        if not isinstance(self.exit_policy, dict):
            raise ValueError(
                f"exit_policy: {self.exit_policy!r} is not a dict like {{'name': 'confidence', 'threshold': 0.8}}"
            )
        self.exit_policy = following_default(self.exit_policy, self.num_labels, self.problem_type)
        self.checked_policy(self.exit_policy)
        self.check_ensemble()

    def check_sizes(self) -> None:
        """Raise `ValueError` where images have no size, or hold no patch."""
        sizes = {name: getattr(self, name, None) for name in ("patch_size", "image_size")}
        if None in sizes.values():
            return
        for name, size in sizes.items():
            numbers = size if isinstance(size, (list, tuple)) else (size, size)
            if len(numbers) != 2 or not all(isinstance(number, int) and number > 0 for number in numbers):
                raise ValueError(f"{name}: {size!r} must be a positive number of pixels, or [height, width]")
        if min(self.patch_grid(1, *height_width(self.image_size))) < 1:
            raise ValueError(f"image_size: {self.image_size!r} is less than a patch of {self.patch_size!r} pixels")

    def checked_policy(self, policy: ExitPolicy | Rule | dict[str, Any] | str) -> ExitPolicy:
        """The policy that a name, dict or object stands for, if it suits these exits and this kind of answer.

        Raises:
            ValueError: Naming what does not fit, and what does.
        """
        built = build_policy(policy, len(self.exit_positions))
        check_problem(built, self.num_labels, self.problem_type)
        return built

    def check_ensemble(self) -> None:
        """Raise `ValueError` where `exit_ensemble` is of other exits, other classes or another kind of answer."""
        if self.exit_ensemble is None:
            return
        problem = problem_of(self.num_labels, self.problem_type)
        if problem != "single_label_classification":
            raise ValueError(f"exit_ensemble: it averages answers of one label, and this model's are for {problem}")
        build_ensemble(self.exit_ensemble, len(self.exit_positions) + (not self.truncated), self.num_labels)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As upstream's; exit settings among `kwargs` replace those of the dict and are checked with it."""
        settings = dict(config_dict)
        if kwargs.get("attn_implementation") not in (None, "performer"):
            settings = {key: value for key, value in settings.items() if key not in PERFORMER_FIELDS}
        names = ("exits", *OTHER_FIELDS, *PERFORMER_FIELDS)
        ours = [key for key in kwargs if key.startswith("exit_") or key in names]
        settings.update((key, kwargs.pop(key)) for key in ours)
        if "exit_positions" in ours and "exit_types" not in ours:
            settings.pop("exit_types", None)
        return super().from_dict(settings, **kwargs)


def _own_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` for upstream's config: without what it must not see, and with a misspelt `exit_*` key refused."""
    for key in kwargs:
        if key.startswith("exit_") or key == "exits":
            close = difflib.get_close_matches(key, EXIT_FIELDS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown config field {key!r}: {hint}The exit fields are {', '.join(EXIT_FIELDS)}")
    check_num_labels(kwargs.get("num_labels"))
    kwargs.pop("model_type", None)
    return {key: value for key, value in kwargs.items() if not key.startswith("_attn_implementation")}


def _offer_models() -> None:
    # Auto classes are asked for a model with a config in hand; registering earlier would import all models at once.
    # No import: in a checkpoint's folder there is this file and no `auto`, and its `auto_map` names the models
    auto = sys.modules.get(f"{__package__}.auto")
    if auto is not None:
        auto.register_models()
