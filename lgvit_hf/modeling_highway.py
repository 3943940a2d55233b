"""HighwayMixin: builds the exits, cuts the backbone into segments, and owns the only forward."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from .attention import FeatureMap
from .engine import run_all_with_features, run_early
from .ensemble import with_ensemble
from .exit_settings import Exit
from .heads import HeadShape, build_head
from .losses import check_labels, loss_weights, task_loss, weighted_loss
from .policies import ExitPolicy
from .pretrained import PretrainedHighway
from .recording import Selection, recording, requested
from .segments import Block, Segment, State, Tokens, height_width

logger = logging.getLogger(__name__)


@dataclass
class HighwayOutput(ModelOutput):
    """What a highway answers.

    Args:
        loss (`Tensor`, *optional*): When labels were given.
        logits (`Tensor`): `[B, C]`, each sample's answer, with early exit that of `config.exit_ensemble` if there is
            one; the final classifier's when all exits ran.
        exit_layer (`Tensor`): `[B]` int64, blocks run before the answer, from 1.
        exit_index (`Tensor`): `[B]` int64, which exit answered, from 0, the final classifier last.
        exit_score (`Tensor`): `[B]` float32, the policy's score where the sample exited; `None` when all exits ran.
        exit_logits (`tuple[Tensor]`, *optional*):
            When all exits ran: `[B, C]` each, shallowest first, final classifier last.
        exit_features (`tuple[Tensor]`, *optional*):
            Likewise, what distillation compares: an exit's feature map `[B, N, D]` or pooled vectors; last, the
            backbone's last patches before its final norm.
        hidden_states (`tuple[Tensor]`, *optional*), attentions (`tuple[Tensor]`, *optional*): As the backbone's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    exit_index: Tensor | None = None
    exit_score: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    exit_features: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def all_exits_output(
    exit_logits: Sequence[Tensor], depth: int, labels: Tensor | None, config: PretrainedConfig, **others: Any
) -> HighwayOutput:
    """The output of a highway of which every exit was run, with the loss of all exits by the config's weights.

    Args:
        exit_logits (`Sequence[Tensor]`): `[B, C]` of each exit, the final classifier last.
        depth (`int`): Blocks run before the last one.
        labels (`Tensor`, *optional*): See `task_loss`.
        config (`PretrainedConfig`): Of the highway; a truncated one has its last exit's loss alone.
        others: Further fields of the output.
    """
    loss, logits = None, exit_logits[-1]
    if labels is not None and config.truncated:
        loss = task_loss(logits, labels, config.problem_type)
    elif labels is not None:
        weights = loss_weights(config.exit_loss_weights, config.exit_positions, config.num_blocks)
        loss = weighted_loss(exit_logits, labels, weights, config.problem_type)
    return HighwayOutput(
        loss=loss,
        logits=logits,
        exit_layer=torch.full((len(logits),), depth, device=logits.device),
        exit_index=torch.full((len(logits),), len(exit_logits) - 1, device=logits.device),
        exit_logits=tuple(exit_logits),
        **others,
    )


def is_replaced(block: nn.Module) -> bool:
    """Whether a linear map of each token (`config.linear_blocks`) stands in the place of a transformer block."""
    return isinstance(block, (nn.Linear, nn.Identity))


def grid_of(state: State) -> tuple[int, int]:
    """Rows and columns of patches of a state after the stem."""
    assert state.grid is not None, "the stem says it"
    return state.grid


class PolicyHolder:
    """The exit policy of a highway, which its config stores where it can."""

    config: Any
    _policy: ExitPolicy | None = None
    _policy_settings: dict[str, Any] | None = None
    _answering: tuple[ExitPolicy, dict[str, Any], ExitPolicy] | None = None

    def _checked_policy(self, policy: Any) -> ExitPolicy:
        return self.config.checked_policy(policy)

    @property
    def exit_policy(self) -> ExitPolicy:
        """The policy in force: the object given to `set_exit_policy`, or what `config.exit_policy` says."""
        if self._policy is None or self._policy_settings != self.config.exit_policy:
            self._policy = self._checked_policy(self.config.exit_policy)
            self._policy_settings = copy.deepcopy(self.config.exit_policy)
        return self._policy

    @property
    def answering_policy(self) -> ExitPolicy:
        """By what a run decides and answers: `exit_policy`, on the ensemble where `config.exit_ensemble` has one."""
        policy, settings = self.exit_policy, self.config.exit_ensemble
        if settings is None:
            return policy
        if self._answering is None or self._answering[0] is not policy or self._answering[1] != settings:
            self.config.check_ensemble()
            ensemble = with_ensemble(policy, settings, len(settings["weights"]), len(settings["bias"]))
            self._answering = policy, copy.deepcopy(settings), ensemble
        return self._answering[2]

    def set_exit_policy(self, policy: str | dict[str, Any] | ExitPolicy | Callable, **parameters: Any) -> None:
        """Choose when samples exit; stored in the config where it can be.

        Args:
            policy (`str`, `dict`, `ExitPolicy` or callable):
                A registered name with its `parameters`, a dict of both, or an object of the policy contract. An object
                that is not registered stays with this model in memory and is not saved.

        Raises:
            ValueError: Unknown name or parameter, wrong number of thresholds.

        Example:

            >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
            >>> model = ViTHighway(ViTHighwayConfig(num_hidden_layers=3, hidden_size=24, intermediate_size=24))
            >>> model.set_exit_policy("patience", patience=2)
            >>> model.config.exit_policy
            {'name': 'patience', 'patience': 2}
        """
        if isinstance(policy, str):
            policy = {"name": policy, **parameters}
        elif parameters:
            raise ValueError(
                f"exit_policy: parameters {sorted(parameters)} go with a policy name, not with {policy!r}"
            )
        built = self._checked_policy(policy)
        if isinstance(policy, dict):
            self.config.exit_policy = dict(policy)
        elif built.name != "custom" and is_dataclass(built):
            self.config.exit_policy = built.to_dict()
        else:
            logger.warning("this exit policy is not a registered dataclass (`register_policy`): it will not be saved")
        self._policy, self._policy_settings = built, copy.deepcopy(self.config.exit_policy)


class HighwayMixin(PolicyHolder, PretrainedHighway):
    """Exits for one of transformers' image classifiers, which is the other base class.

    A backbone implements `stem`, `blocks`, `tokens` and `final`, says what heads must fit (`head_shape`) and which
    modules hold its states (`recorded_modules`); nothing else here is overridden.
    """

    # whether images of another size than the config's need no new position embeddings
    takes_any_size = False
    # what of the backbone only its final answer needs
    final_modules: tuple[str, ...] = ("layernorm",)
    # the loss is a mean: `Trainer` must divide it by the accumulation steps itself
    accepts_loss_kwargs = False

    def __init__(self, config: Any):
        config.validate_exits()
        super().__init__(config)
        self._replace_blocks()
        self.exits = nn.ModuleList(map(self.build_exit, config.exits))
        if config.truncated:
            self._remove_final()
        self._set_feature_maps()
        self.post_init()
        # what stays on one device, and is a unit of FSDP: names of classes that are there
        self._no_split_modules = [*(type(self)._no_split_modules or []), *self._head_classes()]

    def _head_classes(self) -> list[str]:
        return sorted({type(head).__name__ for head in self.exits})

    # -- what a backbone implements ------------------------------------------------------------------------

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        """`pixel_values` -> `hidden` `[B, N, D]` and its grid."""
        raise NotImplementedError

    def blocks(self) -> list[Block]:
        """One callable `State -> State` per block."""
        raise NotImplementedError

    def block_lists(self) -> list[nn.ModuleList]:
        """The lists of modules, one per stage, in which the blocks are."""
        raise NotImplementedError

    def tokens(self, state: State) -> Tokens:
        """What exits read of a state."""
        raise NotImplementedError

    def final(self, state: State) -> Tensor:
        """Logits `[B, C]` of the final classifier, exactly as upstream."""
        raise NotImplementedError

    def head_shape(self, after: int) -> HeadShape:
        """What a head after block `after` (from 1) must fit."""
        raise NotImplementedError

    def recorded_modules(self, name: str) -> list[nn.Module]:
        """The modules whose outputs are `hidden_states` or `attentions`, in upstream's order."""
        raise NotImplementedError

    # -- the highway ---------------------------------------------------------------------------------------

    def build_exit(self, exit: Exit) -> nn.Module:
        """The head of one exit."""
        return build_head(exit.head, self.head_shape(exit.after))

    def segments(self, interpolate_pos_encoding: bool = False) -> list[Segment]:
        """The list of segments this highway is made of, one per exit, the final classifier's last.

        Args:
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether images of other sizes than `config.image_size` are taken.
        """
        blocks = self.blocks()
        if self.config._attn_implementation == "performer" and self.feature_maps:
            maps: Any = zip(blocks, self.feature_maps, strict=True)
            blocks = [partial(block, feature_map=each) for block, each in maps]
        blocks = [partial(self.stem, interpolate_pos_encoding=interpolate_pos_encoding), *blocks]
        segments, start = [], 0
        for exit, head in zip(self.config.exits, self.exits, strict=True):
            passed = tuple(blocks[start : exit.after + 1])
            segments.append(
                Segment(exit.after, passed, partial(self._answer, head), partial(self._forward_with_features, head))
            )
            start = exit.after + 1
        if not self.config.truncated:
            segments.append(
                Segment(self.config.num_blocks, tuple(blocks[start:]), self.final, self._final_with_features)
            )
        return segments

    def _answer(self, head: nn.Module, state: State) -> Tensor:
        # called as a module, so that hooks run: those of FSDP and of accelerate bring the weights
        return head(self.tokens(state), with_features=False)[0]

    def _forward_with_features(self, head: nn.Module, state: State) -> tuple[Tensor, Tensor]:
        return head(self.tokens(state))

    def _final_with_features(self, state: State) -> tuple[Tensor, Tensor]:
        return self.final(state), self.tokens(state).patches

    def split(self, positions: Sequence[int], folder: str, format: str = "safetensors", **options: Any) -> list[Any]:
        """Cut this highway after exits into parts for machines in a row: see `lgvit_hf.serving.split.split`.

        Args:
            positions (`list[int]`): Blocks run before each cut; there must be exits.
            folder (`str` or `Path`): To be made, with `part0`, `part1`, ... in it.
            format (`str`, *optional*, defaults to `"safetensors"`): Or `"onnx"`, which runs without PyTorch.
            options: Such as `processor`, what prepares images.
        """
        # by its name: packages do not travel with a checkpoint, as the files beside this one do
        return import_module(f"{__package__}.serving.split").split(self, positions, folder, format, **options)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        early_exit: bool | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: Selection | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> HighwayOutput | tuple:
        """Answer images.

        Args:
            pixel_values (`Tensor`): `[B, num_channels, H, W]`, from the image processor.
            labels (`Tensor`, *optional*): `[B]` class numbers (or what `config.problem_type` asks for).
            early_exit (`bool`, *optional*):
                Whether samples exit early; otherwise all exits run. By default in `eval()` mode, unless hidden states
                or attentions are asked for, and not in `train()` mode. Under FSDP all processes must run the same
                blocks: `False`, or the same images in each.
            min_depth (`int`, *optional*): With early exit, shallower exits are not run.
            max_depth (`int`, *optional*): With early exit, the deepest exit within this depth answers the rest.
            interpolate_pos_encoding (`bool`, *optional*): Take images of another size.
            output_hidden_states (`bool` or numbers of some, *optional*), output_attentions (`bool`, *optional*):
                Also return what the backbone would; all exits run then.
            return_dict (`bool`, *optional*): `False` gives a tuple.

        Raises:
            ValueError: No, an empty or a misshapen batch; a label out of range; settings that exclude each other.
        """
        images = self._checked_images(pixel_values, labels, bool(interpolate_pos_encoding))
        config = self.config
        recorded = requested(config, hidden_states=output_hidden_states, attentions=output_attentions)
        early = (not self.training and not recorded) if early_exit is None else early_exit
        if not early and (min_depth, max_depth) != (None, None):
            raise ValueError("min_depth and max_depth bound early exit; they mean nothing when all exits run")
        if early and recorded:
            raise ValueError(f"output_{next(iter(recorded))} needs every sample in every block: early_exit=False")

        state = State({"pixel_values": images})
        segments = self.segments(bool(interpolate_pos_encoding))
        if early:
            answers = run_early(segments, state, self.answering_policy, min_depth=min_depth, max_depth=max_depth)
            loss = None if labels is None else task_loss(answers.logits, labels, config.problem_type)
            output = HighwayOutput(loss=loss, **vars(answers))
        else:
            with recording(recorded, self.recorded_modules) as records:
                exit_logits, exit_features = run_all_with_features(segments, state)
            features = tuple(exit_features)
            output = all_exits_output(
                exit_logits, segments[-1].depth, labels, config, exit_features=features, **records
            )
        keep_dict = config.return_dict if return_dict is None else return_dict
        return output if keep_dict else output.to_tuple()

    def _checked_images(self, pixel_values: Tensor | None, labels: Tensor | None, interpolate: bool) -> Tensor:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        channels = self.config.num_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values: shape {tuple(pixel_values.shape)} must be (batch, {channels}, height, width); "
                f"the model takes {channels} channels"
            )
        if len(pixel_values) == 0:
            raise ValueError(
                f"pixel_values: shape {tuple(pixel_values.shape)} is an empty batch; give at least one image"
            )
        wanted, given = height_width(self.config.image_size), tuple(pixel_values.shape[-2:])
        if given != wanted and not interpolate and not self.takes_any_size:
            raise ValueError(
                f"pixel_values: {given[0]} x {given[1]} pixels, but the model takes {wanted[0]} x {wanted[1]}; resize "
                "them with its image processor, or give interpolate_pos_encoding=True"
            )
        if labels is not None:
            check_labels(labels, self.config.num_labels)
        return pixel_values

    def _init_weights(self, module: nn.Module) -> None:
        # upstream would begin with the classifier, which a truncated model has not
        if not (module is self and self.config.truncated):
            super()._init_weights(module)
        # transformers 4.57 leaves batch norms of a warm start as uninitialised memory
        if isinstance(module, nn.BatchNorm2d) and not getattr(module.running_mean, "_is_hf_initialized", False):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.reset_running_stats()
        if isinstance(module, FeatureMap) and not getattr(module.random_features, "_is_hf_initialized", False):
            module.reset()

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """As upstream's; `"performer"` with the config's `feature_map_dim` and `feature_map_seed`, or their defaults.

        Raises:
            ValueError: Unknown, or not possible for this backbone.
        """
        if attn_implementation == "performer":
            self.config.check_performer()
        before = self.config._attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if self.config._attn_implementation != before:
            self._set_feature_maps()
            self.feature_maps.to(self.device, self.dtype)

    def _set_feature_maps(self) -> None:
        """What `attn_implementation="performer"` needs, and nothing for any other."""
        config = self.config
        performer = config._attn_implementation == "performer"
        if config.feature_map_dim is not None and not performer:
            # another choice was made since the config was
            config.feature_map_dim = config.feature_map_seed = None
        config.validate_performer()
        self.feature_maps = nn.ModuleList()
        features, seed = config.feature_map_dim, config.feature_map_seed
        if performer and features is not None and seed is not None:
            head_dim = config.hidden_size // config.num_attention_heads
            self.feature_maps.extend(
                FeatureMap(features, head_dim, seed + block) for block in range(config.num_blocks)
            )

    def _replace_blocks(self) -> None:
        """What `config.linear_blocks` asks for: the first is the linear map, the others do nothing."""
        if self.config.linear_blocks is None:
            return
        first, last = self.config.linear_blocks
        width = self.head_shape(first).width
        places = [(blocks, index) for blocks in self.block_lists() for index in range(len(blocks))]
        for number, (blocks, index) in enumerate(places[first - 1 : last]):
            blocks[index] = nn.Identity() if number else nn.Linear(width, width)

    def _remove_final(self) -> None:
        for name in self.final_modules:
            setattr(self.base_model, name, nn.Identity())
        for name, child in list(self.named_children()):
            if child is not self.base_model and child is not self.exits:
                setattr(self, name, nn.Identity())
