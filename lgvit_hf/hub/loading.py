"""A highway and its image processor from what a user names: a saved highway, a plain checkpoint, or nothing yet."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from ..configuration import EXIT_FIELDS, OWN_FIELDS, HighwayConfig
from ..configuration_avit import HALTING_FIELDS, AViTConfig
from ..data.processing import make_processor, open_processor
from ..modeling_avit import AViT
from ..modeling_deit import DeiTHighway
from ..modeling_swin import SwinHighway
from ..modeling_vit import ViTHighway
from ..segments import height_width
from ..wrapper import HighwayWrapper

logger = logging.getLogger(__name__)

BY_BACKBONE = {"vit": ViTHighway, "deit": DeiTHighway, "swin": SwinHighway}
HIGHWAYS = {f"{kind}_highway": highway for kind, highway in BY_BACKBONE.items()}
# those whose module is one of transformers' own; of any other, only whoever has its class can open them
SAVED = {**HIGHWAYS, HighwayWrapper.config_class.model_type: HighwayWrapper}


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
    if backbone == "swin":
        return {
            "image_size": image_size,
            "patch_size": max(1, image_size // 16),
            "embed_dim": 32,
            # three stages: a fourth would have a smaller grid than a window
            "depths": [2, 4, 6],
            "num_heads": [1, 2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
        }
    return {
        "image_size": image_size,
        "patch_size": max(1, image_size // 8),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
    }


def _check_fields(config_class: type[PretrainedConfig], settings: dict[str, Any], own: Iterable[str] = ()) -> None:
    known = [*config_class().to_dict(), *own]
    unknown = sorted(set(settings) - set(known) - {"label2id"})
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"model_settings: {unknown[0]!r} is no field of {config_class.__name__}{hint}")


def _labels(label_names: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }


def _check_source(checkpoint: str | None, backbone: str | None, model_settings: dict[str, Any] | None) -> None:
    if (checkpoint is None) == (backbone is None):
        raise ValueError("give either --model CHECKPOINT or --backbone vit|deit|swin")
    if checkpoint is not None and model_settings:
        raise ValueError(f"model_settings: {model_settings} are for a new backbone; {checkpoint} has its own")


def open_model(
    checkpoint: str | None = None,
    *,
    backbone: str | None = None,
    image_size: int = 32,
    model_settings: dict[str, Any] | None = None,
    label_names: list[str],
    exits: dict[str, Any] | None = None,
    must_be_highway: bool = False,
    seed: int = 0,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
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
        seed (`int`, *optional*, defaults to 0): Of new weights.

    Raises:
        ValueError: Neither or both of checkpoint and backbone; other exits asked of a highway than it has; classes of
            the data and of a highway that differ.
    """
    _check_source(checkpoint, backbone, model_settings)
    exits, labels = dict(exits or {}), _labels(label_names)
    set_seed(seed)
    if backbone is not None:
        config = small_config(backbone, image_size, **(model_settings or {}), **exits, **labels)
        return BY_BACKBONE[backbone](config), make_processor(config.image_size, config.num_channels)

    config = read_config(checkpoint)
    if config.model_type in SAVED:
        check_class_names(checkpoint, config, label_names)
        model = SAVED[config.model_type].from_pretrained(checkpoint)
        model = with_exits(checkpoint, model, exits) if exits or not (model.exits or must_be_highway) else model
    elif config.model_type in BY_BACKBONE and not must_be_highway:
        order = class_order(config, label_names)
        labels = {} if config.id2label == labels["id2label"] else labels
        model = BY_BACKBONE[config.model_type].from_backbone(checkpoint, **exits, **labels)
        _order_classes(checkpoint, model, config, order)
    else:
        raise ValueError(f"{checkpoint}: model type {config.model_type!r} must be one of {', '.join(HIGHWAYS)}")
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
    _check_source(checkpoint, backbone, model_settings)
    halting, labels = dict(halting or {}), _labels(label_names)
    unknown = sorted(set(halting) - set(HALTING_FIELDS))
    if unknown:
        raise ValueError(f"halting: {unknown[0]!r} must be one of {', '.join(HALTING_FIELDS)}")
    set_seed(seed)
    if backbone is not None:
        settings = {**_small_sizes(backbone, image_size), **(model_settings or {})}
        _check_fields(AViTConfig, settings)
        config = AViTConfig(backbone=backbone, **settings, **halting, **labels)
        return AViT(config), make_processor(config.image_size, config.num_channels)
    config = read_config(checkpoint)
    if config.model_type == AViTConfig.model_type:
        check_class_names(checkpoint, config, label_names)
        model = AViT.from_pretrained(checkpoint, **halting)
    else:
        order = class_order(config, label_names)
        labels = {} if config.id2label == labels["id2label"] else labels
        source = load_highway(checkpoint) if config.model_type in HIGHWAYS else checkpoint
        model = AViT.from_backbone(source, **halting, **labels)
        _order_classes(checkpoint, model, config, order)
    return model, open_processor(checkpoint)


def check_class_names(checkpoint: str, config: PretrainedConfig, label_names: list[str]) -> None:
    """Raise `ValueError` where a model's classes are not those of the data.

    Args:
        checkpoint (`str`): What the error names.
        config (`PretrainedConfig`): Of the model; a class that it only calls `LABEL_0` or so may be any.
        label_names (`list[str]`): Of the data.
    """
    if config.num_labels != len(label_names):
        raise ValueError(f"{checkpoint} knows {config.num_labels} classes, the data have {len(label_names)}")
    for index, name in enumerate(label_names):
        known = config.id2label[index]
        if known != name and known != f"LABEL_{index}":
            raise ValueError(f"{checkpoint}: class {index} is {known!r}, in the data it is {name!r}")


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
    known = [config.id2label.get(index) for index in range(config.num_labels)]
    if len(known) != len(label_names):
        return None
    if all(old in (new, f"LABEL_{index}") for index, (old, new) in enumerate(zip(known, label_names, strict=True))):
        return list(range(len(known)))
    same = len(set(known)) == len(known) and set(known) == set(label_names)
    return [known.index(name) for name in label_names] if same else None


@torch.no_grad()
def _order_classes(checkpoint: str, model: PreTrainedModel, old: PretrainedConfig, order: list[int] | None) -> None:
    """Give the classifiers of a plain checkpoint the order of the model's classes; new weights where it has others."""
    if order is None and old.num_labels == model.config.num_labels:
        index = next(i for i, name in model.config.id2label.items() if old.id2label.get(i) != name)
        logger.warning(
            "%s: class %d is %r, in the data it is %r: the classifier is new. Train it.",
            *(checkpoint, index, old.id2label.get(index), model.config.id2label[index]),
        )
    for classifier in _final_classifiers(model):
        if order is not None:
            classifier.weight.copy_(classifier.weight[order])
            classifier.bias.copy_(classifier.bias[order])
        elif old.num_labels == model.config.num_labels:
            # of another number of classes it is new already
            classifier.weight.normal_(0.0, model.config.initializer_range)
            classifier.bias.zero_()


def _final_classifiers(model: PreTrainedModel) -> list[nn.Linear]:
    """The last layer's, of a distilled DeiT both; not those of the exits, which are new."""
    children = model.classifiers if isinstance(model, AViT) else model.children()
    return [child for child in children if isinstance(child, nn.Linear)]


def with_exits(checkpoint: str, model: PreTrainedModel, exits: dict[str, Any]) -> PreTrainedModel:
    """A copy of a highway with another policy or other loss weights; with new exits where it has none.

    Args:
        checkpoint (`str`): What an error names.
        model (`PreTrainedModel`): A highway.
        exits (`dict`): See `open_model`.

    Raises:
        ValueError: The highway has other exits than those asked for.
    """
    settings = {**model.config.to_dict(), "attn_implementation": model.config._attn_implementation}
    for name in ("model_type", *(() if model.exits else EXIT_FIELDS)):
        settings.pop(name, None)
    if model.exits and not _same_exits(model.config, settings, exits):
        raise ValueError(
            f"{checkpoint} has exits after {model.config.exit_positions} already, {model.config.exit_types}; "
            "leave --exit-positions, --exit-types and --pool out"
        )
    config = type(model.config)(**{**settings, **exits})
    new = type(model)(config)
    new.load_state_dict(model.state_dict(), strict=bool(model.exits))
    return new


def _same_exits(config: HighwayConfig, settings: dict[str, Any], exits: dict[str, Any]) -> bool:
    """Whether the exits asked for, presets resolved, are those of a config."""
    names = ("exit_positions", "exit_types", "pool")
    asked = {name: exits[name] for name in names if name in exits}
    try:
        wanted = type(config)(**{**settings, "exit_policy": "never", "exit_loss_weights": "uniform", **asked})
    except ValueError:
        return False
    return all(getattr(wanted, name) == getattr(config, name) for name in names)


def load_highway(checkpoint: str) -> PreTrainedModel:
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


def read_config(checkpoint: str) -> PretrainedConfig:
    """The config of a folder or Hub id; code that lies there is not run.

    Raises:
        OSError: There is no saved model.
        ValueError: Its model needs code of its own.
    """
    if Path(checkpoint).exists() and not (Path(checkpoint) / "config.json").is_file():
        raise OSError(f"{checkpoint}: no config.json there, not a saved model")
    return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
