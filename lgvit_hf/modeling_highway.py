"""HighwayMixin: builds the exits, cuts the backbone into segments, and owns the only forward."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration import OWN_FIELDS, without_attention_code
from .engine import run_early, study_all
from .heads import ExitHead, HeadShape, build_head
from .losses import check_labels, loss_weights, task_loss, weighted_loss
from .policies import ExitPolicy, build_policy
from .segments import Block, Segment, State, Tokens

try:
    from transformers.conversion_mapping import get_model_conversion_mapping as name_conversions
except ImportError:

    def name_conversions(model: PreTrainedModel) -> list[Any]:
        """Transformers 4 calls weights in files as it calls them in modules."""
        return []


logger = logging.getLogger(__name__)

# buffers that are made, not learned
RECOMPUTED = ("relative_position_index", "num_batches_tracked")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


@dataclass
class HighwayOutput(ModelOutput):
    """What a highway answers.

    Args:
        loss (`Tensor`, *optional*): When labels were given.
        logits (`Tensor`): `[B, C]`, each row's answer; the final classifier's when all exits ran.
        exit_layer (`Tensor`): `[B]` int64, blocks run before the answer, from 1.
        exit_index (`Tensor`): `[B]` int64, which exit answered, from 0, the final classifier last.
        exit_score (`Tensor`): `[B]` float32, the policy's score where the row left; `None` when all exits ran.
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


def run_block(layer: nn.Module, state: State) -> State:
    """One transformer block of `[B, N, D]` hidden states, as ViT's and DeiT's are."""
    return State({"hidden": layer(state["hidden"])}, state.grid)


class HighwayMixin:
    """Exits for one of transformers' image classifiers, which is the other base class.

    A backbone implements `stem`, `blocks`, `tokens` and `final`, says what heads must fit (`head_shape`) and which
    modules hold its states (`recorded_modules`); nothing else here is overridden.
    """

    # the loss is a mean: `Trainer` must divide it by the accumulation steps itself
    accepts_loss_kwargs = False
    # transformers' classes whose checkpoints warm-start this one, the bare backbone last
    native_classes: tuple[type[PreTrainedModel], ...]

    def __init__(self, config):
        config.validate_exits()
        super().__init__(config)
        self.exits = nn.ModuleList(build_head(exit.head, self.head_shape(exit.after)) for exit in config.exits)
        if config.truncated:
            self._remove_final()
        self._policy: ExitPolicy | None = None
        self._policy_settings: dict[str, Any] | None = None
        self.post_init()

    # -- what a backbone implements ------------------------------------------------------------------------

    def stem(self, state: State, interpolate_pos_encoding: bool = False) -> State:
        """`pixel_values` -> `hidden` `[B, N, D]` and its grid."""
        raise NotImplementedError

    def blocks(self) -> list[Block]:
        """One callable `State -> State` per block."""
        raise NotImplementedError

    def tokens(self, state: State) -> Tokens:
        """What exits read of a state."""
        raise NotImplementedError

    def final(self, state: State) -> Tensor:
        """Logits `[B, C]` of the final classifier, exactly as upstream."""
        raise NotImplementedError

    def head_shape(self, after: int) -> HeadShape:
        """What a head behind block `after` (from 1) must fit."""
        raise NotImplementedError

    def recorded_modules(self, name: str) -> list[nn.Module]:
        """The modules whose outputs are `hidden_states` or `attentions`, in upstream's order."""
        raise NotImplementedError

    # -- the highway ---------------------------------------------------------------------------------------

    def segments(self, interpolate_pos_encoding: bool = False) -> list[Segment]:
        """The list of segments this highway is made of, one per exit, the final classifier's last.

        Args:
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether images of other sizes than `config.image_size` are taken.
        """
        blocks = [partial(self.stem, interpolate_pos_encoding=interpolate_pos_encoding), *self.blocks()]
        segments, start = [], 0
        for exit, head in zip(self.config.exits, self.exits, strict=True):
            passed = tuple(blocks[start : exit.after + 1])
            segments.append(Segment(exit.after, passed, partial(self._answer, head), partial(self._study, head)))
            start = exit.after + 1
        if not self.config.truncated:
            segments.append(Segment(self.config.num_blocks, tuple(blocks[start:]), self.final, self._study_final))
        return segments

    def _answer(self, head: ExitHead, state: State) -> Tensor:
        return head.answer(self.tokens(state))

    def _study(self, head: ExitHead, state: State) -> tuple[Tensor, Tensor]:
        return head(self.tokens(state))

    def _study_final(self, state: State) -> tuple[Tensor, Tensor]:
        return self.final(state), self.tokens(state).patches

    @property
    def exit_policy(self) -> ExitPolicy:
        """The policy in force: the object given to `set_exit_policy`, or what `config.exit_policy` says."""
        if self._policy is None or self._policy_settings != self.config.exit_policy:
            self._policy = build_policy(self.config.exit_policy, len(self.exits))
            self._policy_settings = copy.deepcopy(self.config.exit_policy)
        return self._policy

    def set_exit_policy(self, policy: str | dict[str, Any] | ExitPolicy | Callable, **parameters: Any) -> None:
        """Choose when rows leave; stored in the config where it can be.

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
        built = build_policy(policy, len(self.exits))
        if isinstance(policy, dict):
            self.config.exit_policy = dict(policy)
        elif built.name != "custom" and is_dataclass(built):
            self.config.exit_policy = built.to_dict()
        else:
            logger.warning("this exit policy is not a registered dataclass (`register_policy`): it will not be saved")
        self._policy, self._policy_settings = built, copy.deepcopy(self.config.exit_policy)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        early_exit: bool | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> HighwayOutput | tuple:
        """Answer images.

        Args:
            pixel_values (`Tensor`): `[B, num_channels, H, W]`, from the image processor.
            labels (`Tensor`, *optional*): `[B]` class numbers (or what `config.problem_type` asks for).
            early_exit (`bool`, *optional*):
                Whether rows leave early; otherwise all exits run. By default in `eval()` mode, unless hidden states or
                attentions are asked for, and not in `train()` mode.
            min_depth (`int`, *optional*): With early exit, shallower exits are not run.
            max_depth (`int`, *optional*): With early exit, the deepest exit within this depth answers what is left.
            interpolate_pos_encoding (`bool`, *optional*): Take images of another size.
            output_hidden_states (`bool`, *optional*), output_attentions (`bool`, *optional*):
                Also return what the backbone would; all exits run then.
            return_dict (`bool`, *optional*): `False` gives a tuple.

        Raises:
            ValueError: No, an empty or a misshapen batch; a label out of range; settings that exclude each other.
        """
        self._check_batch(pixel_values, labels)
        config = self.config
        wanted = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        recorded = [
            name for name, want in wanted.items() if (getattr(config, f"output_{name}") if want is None else want)
        ]
        early = (not self.training and not recorded) if early_exit is None else early_exit
        if not early and (min_depth, max_depth) != (None, None):
            raise ValueError("min_depth and max_depth bound early exit; they mean nothing when all exits run")
        if early and recorded:
            raise ValueError(f"output_{recorded[0]} needs every row in every block: early_exit=False")

        state = State({"pixel_values": pixel_values})
        segments = self.segments(bool(interpolate_pos_encoding))
        if early:
            answers = run_early(segments, state, self.exit_policy, min_depth=min_depth, max_depth=max_depth)
            loss = None if labels is None else task_loss(answers.logits, labels, config.problem_type)
            output = HighwayOutput(loss=loss, **vars(answers))
        else:
            with self._recording(recorded) as records:
                exit_logits, exit_features = study_all(segments, state)
            logits, last = exit_logits[-1], segments[-1]
            output = HighwayOutput(
                loss=None if labels is None else self._loss(exit_logits, labels),
                logits=logits,
                exit_layer=torch.full((len(logits),), last.depth, device=logits.device),
                exit_index=torch.full((len(logits),), len(segments) - 1, device=logits.device),
                exit_logits=tuple(exit_logits),
                exit_features=tuple(exit_features),
                **records,
            )
        keep_dict = config.return_dict if return_dict is None else return_dict
        return output if keep_dict else output.to_tuple()

    def _loss(self, exit_logits: list[Tensor], labels: Tensor) -> Tensor:
        config = self.config
        if config.truncated:
            return task_loss(exit_logits[-1], labels, config.problem_type)
        weights = loss_weights(config.exit_loss_weights, config.exit_positions, config.num_blocks)
        return weighted_loss(exit_logits, labels, weights, config.problem_type)

    @contextmanager
    def _recording(self, names: list[str]) -> Iterator[dict[str, tuple[Tensor, ...]]]:
        """Keep what the backbone's modules give while it runs; filled at the end."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            module.register_forward_hook(partial(_keep, outputs[name], name))
            for name in names
            for module in self.recorded_modules(name)
        ]
        records: dict[str, tuple[Tensor, ...]] = {}
        try:
            yield records
        finally:
            for hook in hooks:
                hook.remove()
        records.update((name, tuple(kept)) for name, kept in outputs.items())

    def _check_batch(self, pixel_values: Tensor | None, labels: Tensor | None) -> None:
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
        if labels is not None:
            check_labels(labels, self.config.num_labels)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers 4.57 leaves batch norms of a warm start as uninitialised memory
        if isinstance(module, nn.BatchNorm2d) and not getattr(module.running_mean, "_is_hf_initialized", False):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.reset_running_stats()

    # -- making and cutting models -------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any):
        """As upstream's; the names of checkpoint files are understood as well as those of the modules.

        transformers 5 renames weights between file and module, but its `Trainer` resumes without that.
        """
        known, conversions = set(self.state_dict()), name_conversions(self)
        state_dict = {name if name in known else _renamed(name, conversions): t for name, t in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As upstream's, from safetensors only; a tensor missing outside the exits raises.

        A plain checkpoint of the backbone loads too, with new exits (`from_backbone` also resets the classifier).

        Raises:
            ValueError:
                A tensor of the backbone, or some of a highway's own, is missing; a pickle was asked for; a highway is
                asked for other exits than it was trained with.
            OSError: No config or no safetensors there.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickle checkpoints can run code and are not loaded")
        kwargs["use_safetensors"] = True
        _check_files(pretrained_model_name_or_path)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(f"{pretrained_model_name_or_path}: damaged safetensors ({error})") from error
        if pretrained_model_name_or_path is not None:
            hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
            stored, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            for field in ("exit_positions", "exit_types"):
                if stored.get(field, getattr(model.config, field)) != getattr(model.config, field):
                    raise ValueError(
                        f"{field}: {getattr(model.config, field)!r} was asked for, but the exits of "
                        f"{pretrained_model_name_or_path} were trained with {stored[field]!r}"
                    )
        missing = sorted(key for key in info["missing_keys"] if not key.endswith(RECOMPUTED))
        exits = [key for key in missing if key.startswith("exits.")]
        known_exits = [key for key in model.state_dict() if key.startswith("exits.") and not key.endswith(RECOMPUTED)]
        is_highway = cls.__name__ in (model.config.architectures or [])
        if len(exits) < len(missing) or (exits and (is_highway or len(exits) < len(known_exits))):
            lost = [key for key in missing if key not in exits] or exits
            raise ValueError(
                f"{pretrained_model_name_or_path}: {len(lost)} tensors of {cls.__name__} are missing, such as "
                f"{lost[0]!r}; from_backbone(..., num_labels=N) makes a new classifier on a pretrained backbone"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_backbone(
        cls, backbone: str | os.PathLike | PreTrainedModel, *, output_loading_info: bool = False, **kwargs: Any
    ):
        """Put exits on a plain ViT, DeiT or Swin checkpoint; its own answers stay what they are.

        Args:
            backbone (`str`, path or `PreTrainedModel`): Hub id, folder, or a model in memory (copied).
            output_loading_info (`bool`, *optional*, defaults to `False`): Also return which tensors are new.
            kwargs:
                Config fields to set: `exit_positions`, `exit_types`, `exit_policy`, ..., `num_labels`, `id2label`.
                With a `num_labels` that the checkpoint does not have, the classifier is made anew. `dtype` converts
                the result; Hub arguments (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
                `subfolder`) are passed on.

        Raises:
            ValueError: The checkpoint is of another kind, or lacks a tensor.

        Example:

            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> from lgvit_hf import ViTHighway
            >>> small = dict(num_hidden_layers=4, hidden_size=24, intermediate_size=24, num_attention_heads=2)
            >>> plain = ViTForImageClassification(ViTConfig(**small))
            >>> ViTHighway.from_backbone(plain, exit_positions=[1, 2]).config.exit_positions
            [1, 2]
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        native = backbone if isinstance(backbone, PreTrainedModel) else cls._load_native(backbone, hub)
        cls._check_kind(native, native.config.model_type)
        model = cls(cls._config_of(native, kwargs)).to(native.device, native.dtype)
        ours, prefix = model.state_dict(), cls.base_model_prefix
        state = native.state_dict()
        if native.base_model is native:
            state = {f"{prefix}.{name}": tensor for name, tensor in state.items()}
        # a bare backbone may carry a pooler, which no classifier of transformers uses
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.pooler.")}
        classifiers = [name for name in ours if not name.startswith(("exits.", f"{prefix}."))]
        reset = [name for name in classifiers if name not in state or state[name].shape != ours[name].shape]
        if reset and not {"num_labels", "id2label"} & set(kwargs):
            raise ValueError(f"{_name(backbone)}: no tensor {reset[0]!r}; give num_labels to make a new classifier")
        kept = {name: tensor for name, tensor in state.items() if name not in reset}
        missing, unexpected = model.load_state_dict(kept, strict=False)
        exits = [name for name in missing if name.startswith("exits.")]
        lost = [name for name in missing if name not in exits + reset and not name.endswith(RECOMPUTED)]
        if lost or unexpected:
            what = f"no tensor {lost[0]!r}" if lost else f"unknown tensor {unexpected[0]!r}"
            raise ValueError(f"{_name(backbone)}: {what}; a plain {cls.native_classes[0].__name__} is needed")
        logger.warning(
            "%s: all %d tensors of the backbone are loaded. New: %d exits (%d tensors)%s. Train them before use.",
            cls.__name__,
            len(kept),
            len(model.exits),
            len(exits),
            f" and the classifier, for {model.config.num_labels} labels" if reset else "",
        )
        model.eval()
        if dtype is not None:
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        info = {"missing_keys": sorted(exits + reset), "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_native(cls, path: str | os.PathLike, hub: dict[str, Any]) -> PreTrainedModel:
        _check_files(path)
        native_config = cls.native_classes[0].config_class
        settings, _ = PretrainedConfig.get_config_dict(path, **hub)
        cls._check_kind(path, settings.get("model_type"))
        config = native_config.from_dict(without_attention_code(settings))
        # an architecture that is not listed (masked image modelling, say) still has the bare backbone inside, the last
        named = [native for native in cls.native_classes if native.__name__ in (config.architectures or [])]
        native_class = (named or [cls.native_classes[-1]])[0]
        model, info = native_class.from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, **hub
        )
        lost = sorted(name for name in info["missing_keys"] if not name.endswith(RECOMPUTED))
        lost = [name for name in lost if not name.startswith("pooler.")]
        if lost:
            raise ValueError(f"{path}: {len(lost)} tensors of the backbone are missing, such as {lost[0]!r}")
        return model

    @classmethod
    def _check_kind(cls, backbone: str | os.PathLike | PreTrainedModel, model_type: str | None) -> None:
        wanted = cls.native_classes[0].config_class.model_type
        if model_type != wanted:
            raise ValueError(
                f"{_name(backbone)}: model type {model_type!r}, but {cls.__name__} takes {wanted!r} backbones"
            )

    @classmethod
    def _config_of(cls, native: PreTrainedModel, changes: dict[str, Any]):
        """The native model's config as ours, with `changes`."""
        settings = native.config.to_dict()
        for key in ("model_type", "transformers_version", "_name_or_path"):
            settings.pop(key, None)
        unknown = sorted(set(changes) - set(settings) - set(OWN_FIELDS))
        if unknown:
            close = difflib.get_close_matches(unknown[0], [*settings, *OWN_FIELDS], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{unknown[0]!r} is no field of {cls.config_class.__name__}{hint}")
        if changes.get("num_labels", native.config.num_labels) != native.config.num_labels or "id2label" in changes:
            for key in ("num_labels", "id2label", "label2id"):
                settings.pop(key, None)
        settings["architectures"] = [type(native).__name__]
        settings["attn_implementation"] = native.config._attn_implementation
        return cls.config_class(**{**settings, **changes})

    def truncate(self, exit_index: int) -> HighwayMixin:
        """The smaller static model that always answers at one exit: deeper blocks and all other heads are left out.

        Args:
            exit_index (`int`): Which exit, from 0; the number of exits gives the plain backbone with its classifier.

        Returns:
            A new model of the same class with copied weights, which saves and loads as any other.

        Raises:
            ValueError: There is no such exit.

        Example:

            >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
            >>> model = ViTHighway(ViTHighwayConfig(num_hidden_layers=4, hidden_size=24, intermediate_size=24))
            >>> small = model.truncate(0)
            >>> small.config.num_hidden_layers, small.config.exit_positions
            (2, [2])
        """
        num_exits = len(self.exits)
        if not isinstance(exit_index, int) or not 0 <= exit_index <= num_exits or self.config.truncated:
            raise ValueError(
                f"exit_index={exit_index!r} must be from 0 to {num_exits} ({num_exits} exits and the final)"
            )
        settings = {key: value for key, value in self.config.to_dict().items() if key != "model_type"}
        settings["attn_implementation"] = self.config._attn_implementation
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("exits.")}
        if exit_index == num_exits:
            settings.update(exit_positions=[], exit_types=[])
        else:
            exit = self.config.exits[exit_index]
            settings.update(self.config.cut_to(exit.after), truncated=True)
            settings.update(exit_positions=[exit.after], exit_types=[exit.head])
            state |= {f"exits.0.{name}": tensor for name, tensor in self.exits[exit_index].state_dict().items()}
        settings.update(exit_policy={"name": "never"}, exit_loss_weights="uniform")
        model = type(self)(self.config_class(**settings)).to(device=self.device, dtype=self.dtype)
        model.load_state_dict({name: tensor for name, tensor in state.items() if name in model.state_dict()})
        return model.train(self.training)

    def _remove_final(self) -> None:
        self.base_model.layernorm = nn.Identity()
        for name, child in list(self.named_children()):
            if child is not self.base_model and child is not self.exits:
                setattr(self, name, nn.Identity())


def _renamed(name: str, conversions: list[Any]) -> str:
    for conversion in conversions:
        name, _ = conversion.rename_source_key(name)
    return name


def _keep(kept: list[Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    """Forward hook: a module gives its state, or a tuple of its state and its attention weights."""
    if name == "attentions" and isinstance(output, tuple):
        output = output[1]
    kept.append(output[0] if isinstance(output, tuple) else output)
    if kept[-1] is None:
        raise ValueError('attentions are only kept by attn_implementation="eager"')


def _name(backbone: str | os.PathLike | PreTrainedModel) -> str:
    return type(backbone).__name__ if isinstance(backbone, PreTrainedModel) else str(backbone)


def _check_files(path: str | os.PathLike | None) -> None:
    """Refuse a folder whose weights are a pickle, or whose index leads out of it."""
    folder = Path(path) if path is not None else None
    if folder is None or not folder.is_dir():
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder}: only {pickles[0]}, a pickle that could run code, and no safetensors; save the model again "
            "with save_pretrained, or convert an original LGViT checkpoint with `lgvit convert --from lgvit`"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        stray = sorted(shard for shard in shards if Path(shard).name != shard)
        if stray:
            raise ValueError(f"{index}: {stray[0]!r} must be the name of a file in this folder")
