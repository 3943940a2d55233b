"""A highway and its image processor from what a user names: a saved highway, a plain checkpoint, or nothing yet."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, BaseImageProcessor, PretrainedConfig, PreTrainedModel, set_seed

from ..checkpoint_files import hub_arguments
from ..configuration import EXIT_FIELDS, OWN_FIELDS, HighwayConfig
from ..configuration_avit import HALTING_FIELDS, AViTConfig
from ..data.processing import image_size_of, make_processor, open_processor
from ..modeling_avit import AViT
from ..modeling_beit import BeitHighway
from ..modeling_clip import CLIPHighway
from ..modeling_deit import DeiTHighway
from ..modeling_dinov2 import Dinov2Highway
from ..modeling_dinov2_with_registers import Dinov2WithRegistersHighway
from ..modeling_dinov3_vit import Dinov3ViTHighway
from ..modeling_highway import HighwayMixin
from ..modeling_ijepa import IJepaHighway
from ..modeling_siglip import SiglipHighway
from ..modeling_swin import SwinHighway
from ..modeling_vit import ViTHighway
from ..modeling_vit_msn import ViTMSNHighway
from ..pretrained import name_of
from ..segments import height_width
from ..wrapper import HighwayWrapper
from .lora import add_lora

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

# by the model type of the backbone; a whole model of images and texts and its image side are each of their own
BY_BACKBONE: dict[str, type[HighwayMixin]] = {
    "vit": ViTHighway,
    "deit": DeiTHighway,
    "swin": SwinHighway,
    "dinov2": Dinov2Highway,
    "dinov2_with_registers": Dinov2WithRegistersHighway,
    "dinov3_vit": Dinov3ViTHighway,
    "siglip": SiglipHighway,
    "siglip_vision_model": SiglipHighway,
    "clip": CLIPHighway,
    "clip_vision_model": CLIPHighway,
    "beit": BeitHighway,
    "vit_msn": ViTMSNHighway,
    "ijepa": IJepaHighway,
}
HIGHWAYS = {highway.config_class.model_type: highway for highway in BY_BACKBONE.values()}
# those whose module is one of transformers' own; of any other, only whoever has its class can open them
SAVED: dict[str, type[HighwayMixin]] = {**HIGHWAYS, HighwayWrapper.config_class.model_type: HighwayWrapper}


class AutoHighway:
    """Any highway, the class by what it is made from; what transformers' Auto classes are for saved ones."""

    @staticmethod
    def from_backbone(backbone: str | PathLike[str] | PreTrainedModel, **kwargs: Any) -> Any:
        """Put exits on a plain checkpoint of any backbone that has a highway; see `ViTHighway.from_backbone`.

        Args:
            backbone (`str`, path or `PreTrainedModel`): Hub id, folder, or a model in memory (copied).
            kwargs: See there; without a classifier in the checkpoint, `num_labels` makes a new one.

        Raises:
            ValueError: There is no highway for that model type.

        Example:

            >>> from transformers import Dinov2Config, Dinov2Model
            >>> from lgvit_hf import AutoHighway
            >>> plain = Dinov2Model(Dinov2Config(num_hidden_layers=3, hidden_size=24, num_attention_heads=2))
            >>> type(AutoHighway.from_backbone(plain, num_labels=10)).__name__
            'Dinov2Highway'
        """
        if isinstance(backbone, PreTrainedModel):
            kind = backbone.config.model_type
        else:
            hub = hub_arguments(kwargs)
            kind = read_config(str(backbone), **hub).model_type
        return highway_for(name_of(backbone), kind).from_backbone(backbone, **kwargs)


def highway_for(name: str, model_type: str) -> type[HighwayMixin]:
    """The class for backbones of a model type; `ValueError`, which gives the checkpoint's `name`, if there is none."""
    if model_type not in BY_BACKBONE:
        raise ValueError(f"{name}: model type {model_type!r} must be one of {', '.join(BY_BACKBONE)}")
    return BY_BACKBONE[model_type]


def answer_depths(config: HighwayConfig) -> list[int]:
    """Blocks run before each answer, from 1: of the exits, and of the final classifier unless it was cut off.

    Example:

        >>> answer_depths(small_config("vit", 32, exit_positions=[4, 8]))
        [4, 8, 12]
    """
    return [*config.exit_positions, *([] if config.truncated else [config.num_blocks])]


def example_image(model: Any, batch_size: int = 1) -> Tensor:
    """Random pixels of the size the model was made for, `[B, C, H, W]`."""
    height, width = height_width(model.config.image_size)
    return torch.randn(batch_size, model.config.num_channels, height, width, device=model.device, dtype=model.dtype)


def small_config(backbone: str, image_size: int, **settings: Any) -> HighwayConfig:
    """A config of 12 narrow blocks for small images, which trains on a CPU; `settings` are fields set otherwise.

    Raises:
        ValueError: A field that the backbone's config does not have.

    Example:

        >>> small_config("swin", 32).depths
        [2, 4, 6]
    """
    config_class = BY_BACKBONE[backbone].config_class
    _check_fields(config_class, settings, OWN_FIELDS)
    return config_class(**{**_small_sizes(backbone, image_size), **settings})


def _small_sizes(backbone: str, image_size: int) -> dict[str, Any]:
    images = {"image_size": image_size, "patch_size": max(1, image_size // (16 if backbone == "swin" else 8))}
    if backbone == "swin":
        # three stages: a fourth would have a smaller grid than a window
        stages = {"embed_dim": 32, "depths": [2, 4, 6], "num_heads": [1, 2, 4]}
        return {**images, **stages, "window_size": 4, "drop_path_rate": 0.0}
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 3}
    return {**images, **sizes}


def _check_fields(config_class: type[PretrainedConfig], settings: dict[str, Any], own: Iterable[str] = ()) -> None:
    known = [*config_class().to_dict(), *own]
    unknown = sorted(set(settings) - set(known) - {"label2id"})
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"model_settings: {unknown[0]!r} is no field of {config_class.__name__}{hint}")


def _labels(label_names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def _source(checkpoint: str | None, backbone: str | None, model_settings: dict[str, Any] | None) -> str:
    """Whichever of checkpoint and backbone is given."""
    source = backbone if checkpoint is None else checkpoint
    if source is None or (checkpoint is not None and backbone is not None):
        raise ValueError("give either --model CHECKPOINT or --backbone vit|deit|swin")
    if checkpoint is not None and model_settings:
        raise ValueError(f"model_settings: {model_settings} are for a new backbone; {checkpoint} has its own")
    return source


def open_model(
    checkpoint: str | None = None,
    *,
    backbone: str | None = None,
    image_size: int = 32,
    model_settings: dict[str, Any] | None = None,
    label_names: list[str],
    exits: dict[str, Any] | None = None,
    must_be_highway: bool = False,
    lora: int | dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[HighwayMixin, BaseImageProcessor]:
    """Open a highway and the image processor that goes with it.

    Args:
        checkpoint (`str`, *optional*): Folder or Hub id of a highway, or of a plain ViT, DeiT or Swin.
        backbone (`str`, *optional*): `vit`, `deit` or `swin`, for a small new one where no checkpoint is given.
        image_size (`int`, *optional*, defaults to 32): Of a new one.
        model_settings (`dict`, *optional*): Fields of the config of a new one, such as `{"hidden_size": 192}`.
        label_names (`list[str]`):
            Classes of the data. Of a plain checkpoint with the same in another order the classifier is put in theirs;
            one with others gets a new classifier.
        exits (`dict`, *optional*):
            `exit_positions`, `exit_types`, `exit_policy`, `exit_loss_weights`, `pool`; LGViT's exits by default. Of a
            highway that has exits, only policy and weights may be set.
        must_be_highway (`bool`, *optional*, defaults to `False`): Whether a plain checkpoint is refused.
        lora (`int` or `dict`, *optional*): Adapters for the blocks; see `from_backbone`.
        seed (`int`, *optional*, defaults to 0): Of new weights.

    Raises:
        ValueError: Neither or both of checkpoint and backbone; other exits asked of a highway than it has; classes of
            the data and of a highway that differ.
    """
    source = _source(checkpoint, backbone, model_settings)
    exits, labels = dict(exits or {}), _labels(label_names)
    set_seed(seed)
    if checkpoint is None:
        new = small_config(source, image_size, **(model_settings or {}), **exits, **labels)
        return BY_BACKBONE[source](new), make_processor(new.image_size, new.num_channels)
    config = read_config(source)
    kind = config.model_type
    if kind in SAVED:
        check_class_names(source, config, label_names)
        model = SAVED[kind].from_pretrained(source)
        model = with_exits(source, model, exits) if exits or not (model.exits or must_be_highway) else model
    elif kind in BY_BACKBONE and not must_be_highway:
        model = _from_plain(source, config, label_names, partial(BY_BACKBONE[kind].from_backbone, source, **exits))
    else:
        choices = HIGHWAYS if must_be_highway else (*BY_BACKBONE, *HIGHWAYS)
        raise ValueError(f"{source}: model type {kind!r} must be one of {', '.join(choices)}")
    if lora is not None:
        add_lora(model, lora)
    return model, open_processor(source)


def open_for_probing(checkpoint: str, label_names: list[str]) -> tuple[HighwayMixin, BaseImageProcessor]:
    """A highway without exits for the classes of some data, whatever classes it had, and its image processor.

    Args:
        checkpoint (`str`): Folder or Hub id of a plain backbone, with or without a classifier, or of a highway.
        label_names (`list[str]`): Classes of the data. The classifier, which is to be fitted, may be new.

    Raises:
        ValueError: It is neither.
    """
    config, labels = read_config(checkpoint), _labels(label_names)
    settings: dict[str, Any]
    if config.model_type in HIGHWAYS:
        old = load_highway(checkpoint)
        settings = {**old.config.to_dict(), "attn_implementation": old.config._attn_implementation}
        for name in ("model_type", "num_labels"):
            settings.pop(name, None)
        model = type(old)(type(old.config)(**{**settings, **labels})).eval()
        ours = model.state_dict()
        fitting = {name: each for name, each in old.state_dict().items() if each.shape == ours[name].shape}
        model.load_state_dict(fitting, strict=False)
    else:
        highway = highway_for(checkpoint, config.model_type)
        settings = {"exit_positions": [], "exit_types": []}
        size = image_size_of(open_processor(checkpoint)) if highway.takes_any_size else None
        if isinstance(size, int):
            # what it was pretrained on may be far larger; upstream has positions of a square alone
            settings["image_size"] = size
        model = highway.from_backbone(checkpoint, **settings, **labels)
    return model, open_processor(checkpoint)


def open_avit(
    checkpoint: str | None = None,
    *,
    backbone: str | None = None,
    image_size: int = 32,
    model_settings: dict[str, Any] | None = None,
    label_names: list[str],
    halting: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[AViT, BaseImageProcessor]:
    """Open a model whose tokens halt and the image processor that goes with it.

    Args:
        checkpoint (`str`, *optional*):
            Folder or Hub id of an `AViT`, of a plain ViT or DeiT, or of a highway that has no exits.
        backbone (`str`, *optional*): `vit` or `deit`, for a small new one where no checkpoint is given.
        image_size, model_settings, label_names, seed: See `open_model`.
        halting (`dict`, *optional*): Fields of `AViTConfig` such as `gate` and `target_depth`.

    Raises:
        ValueError: Neither or both of checkpoint and backbone; an unknown field; classes of the data and of an `AViT`
            that differ.
    """
    source = _source(checkpoint, backbone, model_settings)
    halting, labels = dict(halting or {}), _labels(label_names)
    unknown = sorted(set(halting) - set(HALTING_FIELDS))
    if unknown:
        raise ValueError(f"halting: {unknown[0]!r} must be one of {', '.join(HALTING_FIELDS)}")
    set_seed(seed)
    if checkpoint is None:
        settings = {**_small_sizes(source, image_size), **(model_settings or {})}
        _check_fields(AViTConfig, settings)
        new = AViTConfig(backbone=source, **settings, **halting, **labels)
        return AViT(new), make_processor(new.image_size, new.num_channels)
    config = read_config(source)
    if config.model_type == AViTConfig.model_type:
        check_class_names(source, config, label_names)
        model = AViT.from_pretrained(source, **halting)
    else:
        plain = load_highway(source) if config.model_type in HIGHWAYS else source
        model = _from_plain(source, config, label_names, partial(AViT.from_backbone, plain, **halting))
    return model, open_processor(source)


def check_class_names(checkpoint: str, config: PretrainedConfig, label_names: list[str]) -> None:
    """Raise `ValueError` where a model's classes are not those of the data.

    Args:
        checkpoint (`str`): What the error names.
        config (`PretrainedConfig`): Of the model; a class that it only calls `LABEL_0` or so may be any.
        label_names (`list[str]`): Of the data.
    """
    if config.num_labels != len(label_names):
        raise ValueError(f"{checkpoint} knows {config.num_labels} classes, the data have {len(label_names)}")
    for index, (known, name) in enumerate(zip(_class_names(config), label_names, strict=True)):
        if known != name and known != f"LABEL_{index}":
            raise ValueError(f"{checkpoint}: class {index} is {known!r}, in the data it is {name!r}")


def _class_names(config: PretrainedConfig) -> list[str | None]:
    return [(config.id2label or {}).get(index) for index in range(config.num_labels)]


def class_order(config: PretrainedConfig, label_names: list[str]) -> list[int] | None:
    """The model's number of each class of the data, or `None` where its classes are others.

    Args:
        config (`PretrainedConfig`): Of the model; a class that it only calls `LABEL_0` or so may be any.
        label_names (`list[str]`): Of the data.

    Example:

        >>> class_order(PretrainedConfig(id2label={0: "dog", 1: "cat"}), ["cat", "dog"])
        [1, 0]
        >>> class_order(PretrainedConfig(num_labels=2), ["cat", "dog"])
        [0, 1]
    """
    known = _class_names(config)
    if len(known) != len(label_names):
        return None
    if all(old in (new, f"LABEL_{index}") for index, (old, new) in enumerate(zip(known, label_names, strict=True))):
        return list(range(len(known)))
    same = len(set(known)) == len(known) and set(known) == set(label_names)
    return [known.index(name) for name in label_names] if same else None


@torch.no_grad()
def _from_plain(checkpoint: str, old: PretrainedConfig, label_names: list[str], build: Callable[..., Model]) -> Model:
    """A model built from a plain checkpoint, its classifiers in the order of the data's classes.

    They get new weights where the checkpoint has other classes.

    Args:
        checkpoint (`str`): What the warning names.
        old (`PretrainedConfig`): Of the checkpoint.
        label_names (`list[str]`): Of the data.
        build (`Callable`): Builds the model from the fields of its config that name the classes.
    """
    order, known = class_order(old, label_names), _class_names(old)
    model = build(**({} if known == label_names else _labels(label_names)))
    is_new = order is None and len(known) == len(label_names)
    if is_new:
        index = next(i for i, name in enumerate(label_names) if known[i] != name)
        logger.warning(
            "%s: class %d is %r, in the data it is %r: the classifier is new. Train it.",
            *(checkpoint, index, known[index], label_names[index]),
        )
    # the last layer's, of a distilled DeiT both; not those of the exits, which are new
    for classifier in model.classifiers if isinstance(model, AViT) else model.children():
        if order is not None and isinstance(classifier, nn.Linear):
            classifier.weight.copy_(classifier.weight[order])
            classifier.bias.copy_(classifier.bias[order])
        elif is_new and isinstance(classifier, nn.Linear):
            classifier.weight.normal_(0.0, model.config.initializer_range)
            classifier.bias.zero_()
    return model


def with_exits(checkpoint: str, model: HighwayMixin, exits: dict[str, Any]) -> HighwayMixin:
    """A copy of a highway with another policy or other loss weights; with new exits where it has none.

    Args:
        checkpoint (`str`): What an error names.
        model (`HighwayMixin`): A highway.
        exits (`dict`): See `open_model`.

    Raises:
        ValueError: The highway has other exits than those asked for.
    """
    settings = {**model.config.to_dict(), "attn_implementation": model.config._attn_implementation}
    for name in ("model_type", *(() if model.exits else EXIT_FIELDS)):
        settings.pop(name, None)
    if model.exits and not _has_exits(model.config, settings, exits):
        raise ValueError(
            f"{checkpoint} has exits after {model.config.exit_positions} already, {model.config.exit_types}; "
            "leave --exit-positions, --exit-types and --pool out"
        )
    new = type(model)(type(model.config)(**{**settings, **exits}))
    new.load_state_dict(model.state_dict(), strict=bool(model.exits))
    return new


def _has_exits(config: HighwayConfig, settings: dict[str, Any], exits: dict[str, Any]) -> bool:
    """Whether a config with these settings has the exits asked for, presets resolved."""
    names = ("exit_positions", "exit_types", "pool")
    others = {"exit_policy": "never", "exit_loss_weights": "uniform", "exit_ensemble": None}
    try:
        wanted = type(config)(**{**settings, **others, **{name: exits[name] for name in names if name in exits}})
    except ValueError:
        return False
    return all(getattr(wanted, name) == getattr(config, name) for name in names)


def load_highway(checkpoint: str) -> HighwayMixin:
    """A saved highway, whatever its classes, ready to answer; its weights are copies, not the file's own.

    Args:
        checkpoint (`str`): Folder or Hub id.

    Raises:
        OSError: There is no saved model.
        ValueError: It is no highway.
    """
    kind = read_config(checkpoint).model_type
    if kind not in SAVED:
        raise ValueError(f"{checkpoint}: model type {kind!r} must be one of {', '.join(SAVED)}")
    model = SAVED[kind].from_pretrained(checkpoint).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        # safetensors maps the file: whatever is copied over it would change answers, and a cut one end the process
        tensor.data = tensor.data.clone()
    return model


def read_config(checkpoint: str, **hub: Any) -> PretrainedConfig:
    """The config of a folder or Hub id (found by `hub`, as `hub_arguments` gives them); code there is not run.

    Raises:
        OSError: There is no saved model.
        ValueError: Its model needs code of its own.
    """
    if Path(checkpoint).exists() and not (Path(checkpoint) / "config.json").is_file():
        raise OSError(f"{checkpoint}: no config.json there, not a saved model")
    settings, _ = PretrainedConfig.get_config_dict(checkpoint, **hub)
    kind = settings.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and "auto_map" not in settings:
        # transformers would say that it is too old
        raise ValueError(f"{checkpoint}: model type {kind!r} must be one of {', '.join((*BY_BACKBONE, *SAVED))}")
    for part in ("vision_config", "text_config"):
        if not isinstance(settings.get(part) or {}, dict):
            raise ValueError(f"{checkpoint}: {part}: {settings[part]!r} in config.json must be a dict")
    return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **hub)
