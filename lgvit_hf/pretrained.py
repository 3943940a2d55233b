"""PretrainedHighway: how a highway is loaded, grown from a plain backbone, and cut down to a smaller model."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .checkpoint_files import HUB_ARGUMENTS, NO_OTHER_WEIGHTS, WrongShape, check_files, hub_arguments
from .configuration import OWN_FIELDS, HighwayConfig
from .plain_checkpoint import HIGHWAY_NAMES, RECOMPUTED, load_native, name_of, resized
from .remote_code import auto_map, code_goes_with, write_code

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    _Model = PreTrainedModel
else:
    _Model = object

try:
    from transformers.conversion_mapping import get_model_conversion_mapping as name_conversions
except ImportError:

    def name_conversions(model: PreTrainedModel) -> list[Any]:
        """Transformers 4 calls weights in files as it calls them in modules."""
        return []


logger = logging.getLogger(__name__)

PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "revision",
    "create_pr",
    "tags",
)


class SafeCheckpoint(_Model):
    """Loading from safetensors alone, for a class that also derives from one of transformers' models."""

    if TYPE_CHECKING:
        # upstream's says `None`, and its methods are wrapped by decorators without types
        config_class: type[Any]  # type: ignore[assignment]
        to: Callable[..., Self]  # type: ignore[assignment]

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any):
        """As upstream's; the names of checkpoint files are understood as well as those of the modules.

        transformers 5 renames weights between file and module, but its `Trainer` resumes without that.
        """
        known, conversions = set(self.state_dict()), name_conversions(self)
        state_dict = {name if name in known else _renamed(name, conversions): t for name, t in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def _load_safely(cls, pretrained_model_name_or_path, *args, **kwargs) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model as upstream loads it, and which tensors were missing or left over."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickle checkpoints can run code and are not loaded")
        kwargs["use_safetensors"] = True
        check_files(pretrained_model_name_or_path, hub_arguments(kwargs))
        if kwargs.get("transformers_weights") is not None:
            raise ValueError(f"transformers_weights: {NO_OTHER_WEIGHTS}")
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(f"{pretrained_model_name_or_path}: damaged safetensors ({error})") from error
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise WrongShape(f"{pretrained_model_name_or_path}: {error}") from error
        vars(model.config).pop("auto_map", None)  # of that folder; `save_pretrained` says what goes with another
        return model, info

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As upstream's, with the code of the model beside its weights; with `push_to_hub=True`, `push_to_hub` too.

        A saved folder opens with `trust_remote_code=True` where this package is not installed. The `checkpoint-N`
        folders of a `Trainer` go without the code: save the model that is to be handed on.
        """
        if kwargs.pop("push_to_hub", False):
            # upstream would push what it writes itself, without the code
            hub = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
            repo_id = hub.pop("repo_id", None) or Path(save_directory).name
            shared = {
                name: kwargs[name] for name in ("token", "max_shard_size", "safe_serialization") if name in kwargs
            }
            self.save_pretrained(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                self.push_to_hub(repo_id, **hub, **shared)
            return None
        if not (kwargs.get("is_main_process", True) and code_goes_with(type(self), save_directory)):
            return super().save_pretrained(save_directory, *args, **kwargs)
        write_code(type(self), save_directory)
        self.config.auto_map = auto_map(type(self))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            vars(self.config).pop("auto_map", None)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # wrapped there
        """As upstream's, with the image processor, the reports and the card of the folder the model was loaded from.

        Where there is no card, one is made of the config and the reports; see `lgvit_hf.hub.push.push`.
        """
        if f"{__package__}.auto" not in sys.modules:
            # the copy of this file that goes with a checkpoint has no packages beside it
            return PreTrainedModel.push_to_hub(self, repo_id, *args, **kwargs)
        return import_module(f"{__package__}.hub.push").push(self, repo_id, *args, **kwargs)


class PretrainedHighway(SafeCheckpoint):
    """Loading, growing and cutting, for a class that also derives from one of transformers' image classifiers."""

    # transformers' classes whose checkpoints warm-start this one, the bare backbone last
    native_classes: tuple[Any, ...]
    # how the names of those of their tensors begin, in the backbone or beside it, that no classifier reads
    unread: tuple[str, ...] = ("pooler.",)
    # softmax checkpoints load as Performers, and Performers as softmax
    _keys_to_ignore_on_load_missing: list[str] | None = [r"random_features"]  # type: ignore[assignment]  # None there
    _keys_to_ignore_on_load_unexpected: list[str] | None = [r"random_features"]  # type: ignore[assignment]  # likewise

    if TYPE_CHECKING:
        exits: nn.ModuleList
        grown_from: str | None
        config: HighwayConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As upstream's, from safetensors only; a tensor missing outside the exits raises.

        A plain checkpoint of the backbone loads too, with new exits (`from_backbone` also resets the classifier).

        Args:
            output_loading_info (`bool`, *optional*, defaults to `False`):
                Also return which tensors are missing or left over, and leave it to the caller to judge them.

        Raises:
            ValueError:
                A tensor of the backbone, or some of a highway's own, is missing; a pickle was asked for; a highway is
                asked for other exits than it was trained with.
            OSError: No config or no safetensors there.
        """
        if pretrained_model_name_or_path is not None:
            stored, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_arguments(kwargs))
            cls._check_family(str(pretrained_model_name_or_path), stored.get("model_type"))
        model, info = cls._load_safely(pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is not None:
            for field in ("exit_positions", "exit_types", "linear_blocks", "feature_map_dim", "feature_map_seed"):
                asked = getattr(model.config, field, None)
                if asked is not None and stored.get(field) not in (None, asked):
                    raise ValueError(
                        f"{field}: {asked!r} was asked for, but {pretrained_model_name_or_path} was saved with "
                        f"{stored[field]!r}"
                    )
        if output_loading_info:
            return model, info
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
        return model

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        *,
        lora: int | dict[str, Any] | str | os.PathLike | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ):
        """Put exits on a plain checkpoint of the backbone; its own answers stay what they are.

        Args:
            backbone (`str`, path or `PreTrainedModel`): Hub id, folder, or a model in memory (copied).
            lora (`int`, `dict`, `str` or path, *optional*): Adapters in the frozen blocks: a rank, fields of
                `lgvit_hf.hub.lora.Lora`, or where `save_pretrained(..., adapters_only=True)` put some, exits and all.
            output_loading_info (`bool`, *optional*, defaults to `False`): Also return which tensors are new.
            kwargs:
                Config fields to set: `exit_positions`, `exit_types`, `exit_policy`, ..., `num_labels`, `id2label`.
                With a `num_labels` that the checkpoint does not have, the classifier is made anew. With another
                `image_size`, position embeddings are interpolated as upstream does in each forward. `dtype` converts
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
        if isinstance(lora, (str, os.PathLike)):
            return import_module(f"{__package__}.hub.lora").load_adapters(cls, backbone, lora, **kwargs)
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        native = backbone if isinstance(backbone, PreTrainedModel) else load_native(backbone, hub, cls._natives)
        cls._natives(name_of(backbone), native.config.model_type)
        model = cls(cls._config_of(native, kwargs)).to(native.device, native.dtype)
        ours, prefix = model.state_dict(), f"{cls.base_model_prefix}."
        state = native.state_dict()
        if not any(name.startswith(prefix) for name in state):
            state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        unread = (*cls.unread, *(f"{prefix}{name}" for name in cls.unread))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unread)}
        state = {name: resized(native, tensor, ours.get(name), model.config) for name, tensor in state.items()}
        classifiers = [name for name in ours if not name.startswith(("exits.", "feature_maps.", prefix))]
        reset = [name for name in classifiers if name not in state or state[name].shape != ours[name].shape]
        if reset and not {"num_labels", "id2label"} & set(kwargs):
            raise ValueError(
                f"{name_of(backbone)}: no tensor {reset[0]!r}; give num_labels to make a new classifier, "
                "which `lgvit train --stage head` fits (`lgvit grow --new-classifier`: and exits)"
            )
        kept = {name: tensor for name, tensor in state.items() if name not in reset}
        wrong = [name for name, tensor in kept.items() if name in ours and tensor.shape != ours[name].shape]
        if wrong:
            raise ValueError(
                f"{name_of(backbone)}: tensor {wrong[0]!r} is {tuple(kept[wrong[0]].shape)} there, and "
                f"{tuple(ours[wrong[0]].shape)} with the settings asked for"
            )
        missing, unexpected = model.load_state_dict(kept, strict=False)
        exits = [name for name in missing if name.startswith("exits.")]
        lost = [name for name in missing if name not in exits + reset and not name.endswith(RECOMPUTED)]
        if lost or unexpected:
            what = f"no tensor {lost[0]!r}" if lost else f"unknown tensor {unexpected[0]!r}"
            raise ValueError(f"{name_of(backbone)}: {what}; a plain {cls.native_classes[0].__name__} is needed")
        logger.warning(
            "%s: all %d tensors of the backbone are loaded. New: %d exits (%d tensors)%s. Train them before use.",
            cls.__name__,
            len(kept),
            len(model.exits),
            len(exits),
            f" and the classifier, for {model.config.num_labels} labels" if reset else "",
        )
        model.eval()
        model.grown_from = native.name_or_path  # where its image processor is
        if dtype is not None:
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if lora is not None:
            import_module(f"{__package__}.hub.lora").add_lora(model, lora)
        info = {"missing_keys": sorted(exits + reset), "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, adapters_only: bool = False, **kwargs: Any) -> None:
        """See `SafeCheckpoint.save_pretrained`; adapters are merged, or saved alone: see `lgvit_hf.hub.lora.save`."""
        if not hasattr(self, "lora") and not adapters_only:
            return super().save_pretrained(save_directory, *args, **kwargs)
        return import_module(f"{__package__}.hub.lora").save(
            self, save_directory, *args, adapters_only=adapters_only, **kwargs
        )

    @classmethod
    def _check_family(cls, name: str, model_type: str | None) -> None:
        """Raise `ValueError` where another highway takes what is saved there, plain or with exits."""
        fits = HIGHWAY_NAMES.get((model_type or "").removesuffix("_highway"))
        if fits is not None and fits not in {base.__name__ for base in cls.__mro__}:
            raise ValueError(f"{name}: model type {model_type!r} is not for {cls.__name__}; {fits} fits")

    @classmethod
    def _natives(cls, name: str, model_type: str | None) -> tuple[Any, ...]:
        """The classes that load a checkpoint of a model type, if this highway takes it."""
        wanted = list(dict.fromkeys(native.config_class.model_type for native in cls.native_classes))
        if model_type not in wanted:
            fits = f"; {HIGHWAY_NAMES[model_type]} fits" if model_type in HIGHWAY_NAMES else ""
            raise ValueError(
                f"{name}: model type {model_type!r}, but {cls.__name__} takes {' and '.join(map(repr, wanted))}{fits}"
            )
        return cls.native_classes

    @classmethod
    def _config_of(cls, native: PreTrainedModel, changes: dict[str, Any]):
        """The native model's config as ours, with `changes`."""
        settings = cls.config_class.as_own(native.config.to_dict())
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

    def truncate(self, exit_index: int) -> PretrainedHighway:
        """The smaller static model that always answers at one exit: deeper blocks and all other heads are left out.

        Its answers are those of that exit's own head: an `exit_ensemble` is left out too.

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
            exit, replaced = self.config.exits[exit_index], self.config.linear_blocks
            settings["linear_blocks"] = replaced if replaced and replaced[1] <= exit.after else None
            settings.update(self.config.cut_to(exit.after), truncated=True)
            settings.update(exit_positions=[exit.after], exit_types=[exit.head])
            state |= {f"exits.0.{name}": tensor for name, tensor in self.exits[exit_index].state_dict().items()}
        settings.update(exit_policy={"name": "never"}, exit_loss_weights="uniform", exit_ensemble=None)
        model = type(self)(self.config_class(**settings)).to(device=self.device, dtype=self.dtype)
        model.load_state_dict({name: tensor for name, tensor in state.items() if name in model.state_dict()})
        return model.train(self.training)


def _renamed(name: str, conversions: list[Any]) -> str:
    for conversion in conversions:
        name, _ = conversion.rename_source_key(name)
    return name
