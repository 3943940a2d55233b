"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) in the blocks of a highway, through peft.

The frozen weights stay in the model; what is trained are the adapters, the exits and the final classifier.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..files import add_files
from ..pretrained import SafeCheckpoint
from ..remote_code import TRAINING_CHECKPOINT
from ..safe_config import without_attention_code

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:

    def revert_weight_conversion(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Transformers 4 calls weights in files as it calls them in modules."""
        return state_dict


# as peft calls its files and its only adapter
SETTINGS, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "default"
# what LoRA's authors adapt, by its names in files and in the modules of transformers 5
DEFAULT_TARGETS = ("query", "value", "q_proj", "v_proj")
EXIT_SETTINGS = ("exit_positions", "exit_types", "exit_policy", "exit_loss_weights", "pool", "id2label", "label2id")


@dataclass(frozen=True)
class Lora:
    """How a backbone is adapted: `W + alpha / rank * B A` in place of each `W` that is named.

    Args:
        rank (`int`): Of the update.
        alpha (`float`, *optional*): Its scale; twice the rank by default.
        target_modules (`tuple[str]`, *optional*): Last names of linear layers; queries and values by default.

    Raises:
        ValueError: A rank or scale that is none.
    """

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"lora: rank {self.rank!r} must be a whole number of at least 1, such as 8")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora: alpha {self.alpha!r} must be above 0, and finite")
        if self.target_modules is not None:
            wanted = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
            object.__setattr__(self, "target_modules", wanted)

    @classmethod
    def read(cls, value: int | dict[str, Any]) -> Lora:
        """A rank, or a mapping of the fields.

        Example:

            >>> Lora.read({"rank": 4, "target_modules": ["key"]})
            Lora(rank=4, alpha=None, target_modules=('key',))
        """
        if not isinstance(value, dict):
            return cls(value)
        known = tuple(cls.__dataclass_fields__)
        unknown = [name for name in value if name not in known]
        if unknown or "rank" not in value:
            raise ValueError(f"lora: {value} must give a rank, and may give {', '.join(known[1:])}")
        return cls(**value)


def add_lora(model: Any, lora: int | dict[str, Any]) -> None:
    """Put adapters into the blocks of a highway, in place, and freeze all else but exits and final classifier.

    Args:
        model (`PretrainedHighway`): Without adapters.
        lora (`int` or `dict`): The rank, or the fields of `Lora`.

    Raises:
        ImportError: The extra `peft` is not installed.
        ValueError: No such rank, or no such layers in the blocks.
    """
    settings = Lora.read(lora)
    if not getattr(type(model), "native_classes", None):
        raise ValueError(f"lora: adapt the module of one's own before it becomes a {type(model).__name__}")
    if importlib.util.find_spec("peft") is None:
        raise ImportError('lora: adapters are made with peft: pip install "lgvit-hf[peft]"')
    from peft import LoraConfig, inject_adapter_in_model

    if has_lora(model):
        raise ValueError("lora: the model has adapters already; save it, which merges them, before it gets new ones")
    wanted = settings.target_modules or DEFAULT_TARGETS
    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    layers = [f"{model.base_model_prefix}.{name}" for name in linear]
    # of each layer its last name as a module and in files, which differ in transformers 5
    names = {name: {_last(name), _last(_file_name(model, name))} for name in layers}
    known = set().union(*names.values())
    strange = [name for name in settings.target_modules or () if name not in known]
    targets = [name for name, found in names.items() if found & set(wanted)]
    if strange or not targets:
        raise ValueError(
            f"lora: target_modules {list(strange or wanted)} are no linear layers of the backbone; choices: "
            + ", ".join(sorted(known))
        )
    before = backbone_digest(model)
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    scale: Any = alpha  # of any kind of number, though peft says int
    inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=scale, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            parameter.requires_grad_(True)
    model.lora = Lora(settings.rank, alpha, tuple(sorted({_last(_file_name(model, name)) for name in targets})))
    model.lora_backbone = before


def has_lora(model: nn.Module) -> bool:
    """Whether a model has adapters that are not merged."""
    return getattr(model, "lora", None) is not None


@torch.no_grad()
def merged(model: Any) -> Any:
    """A copy of a highway whose adapters have become part of its weights; the model itself stays as it is.

    Args:
        model (`PretrainedHighway`): With adapters.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + module.get_delta_weight(NAME).to(weight.dtype)
    plain = type(model)(copy.deepcopy(model.config)).to(device=model.device, dtype=model.dtype)
    plain.load_state_dict(state)
    plain.grown_from = getattr(model, "grown_from", None)
    return plain.train(model.training)


def save(model: Any, folder: str | os.PathLike[str], adapters_only: bool, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of a highway with adapters: merged into a copy, which any program opens, or alone.

    In the `checkpoint-N` folders of a `Trainer` they stay beside the weights, so that the run can go on.

    Args:
        model (`PretrainedHighway`): With adapters.
        folder (`str` or path): Where to.
        adapters_only (`bool`): See `save_adapters`.
        args, kwargs: See `PreTrainedModel.save_pretrained`.
    """
    if adapters_only:
        if kwargs.pop("push_to_hub", False):
            return model.push_to_hub(kwargs.pop("repo_id", None) or Path(folder).name, adapters_only=True)
        return save_adapters(model, folder)
    if TRAINING_CHECKPOINT.fullmatch(Path(folder).name):
        return SafeCheckpoint.save_pretrained(model, folder, *args, **kwargs)
    # a state dict that is given has the names of the adapters
    kwargs.pop("state_dict", None)
    return merged(model).save_pretrained(folder, *args, **kwargs)


def save_adapters(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write adapters, exits and final classifier of a highway, and its config, without the frozen backbone.

    The files and the names of the adapters are peft's.

    Args:
        model (`PretrainedHighway`): With adapters, made by `from_backbone` from a plain checkpoint.
        folder (`str` or path): Where to.

    Raises:
        ValueError: No adapters; a backbone that others cannot find, or that is not what it was.
    """
    base = backbone_of(model)
    if backbone_digest(model) != model.lora_backbone:
        raise ValueError("adapters_only: the weights beside the adapters have changed; leave adapters_only out")
    prefix = f"{model.base_model_prefix}."
    state = model.state_dict()
    state = {name: each for name, each in state.items() if ".lora_" in name or not name.startswith(prefix)}
    state = revert_weight_conversion(model, state)
    state = {name.replace(f".{NAME}.", "."): each.detach().cpu().contiguous() for name, each in state.items()}
    lora: Lora = model.lora
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": lora.rank, "lora_alpha": lora.alpha}
    settings["target_modules"] = list(lora.target_modules or ())
    with add_files(Path(folder)) as files:
        model.config.save_pretrained(files)
        (files / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        save_file(state, files / WEIGHTS, metadata={"format": "pt", "backbone": model.lora_backbone})


def backbone_of(model: Any) -> str:
    """The plain checkpoint that the adapters of a model go with.

    Raises:
        ValueError: There are no adapters, or the backbone has no name by which others find it.
    """
    if not has_lora(model):
        raise ValueError("adapters_only: the model has no adapters; from_backbone(..., lora=8) adds them")
    base = getattr(model, "grown_from", None)
    if not base:
        raise ValueError(
            "adapters_only: adapters go with the plain checkpoint they were trained on, and this model was not made "
            "from one by its name; leave adapters_only out"
        )
    return str(base)


def load_adapters(cls: Any, backbone: Any, source: str | os.PathLike[str], **arguments: Any) -> Any:
    """A highway on a plain backbone, with the adapters, exits and classifier that `save_adapters` wrote.

    Args:
        cls (`type`): Of the highway.
        backbone (`str`, path or `PreTrainedModel`): The plain checkpoint the adapters were trained on.
        source (`str` or path): Folder or Hub id of the adapters.
        arguments: Of `from_backbone`; exits and labels come with the adapters.

    Raises:
        ValueError: Another backbone; settings that the adapters bring; no adapters there.
    """
    given = [name for name in (*EXIT_SETTINGS, "num_labels") if name in arguments]
    if given:
        raise ValueError(f"{given[0]}: {arguments[given[0]]!r} comes with the adapters of {source}; leave it out")
    folder = _folder_of(source, arguments)
    stored, _ = PretrainedConfig.get_config_dict(folder)
    stored = without_attention_code(stored)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        lora = {"rank": settings["r"], "alpha": settings["lora_alpha"], "target_modules": settings["target_modules"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: {SETTINGS} was not saved with adapters_only=True: {error}") from error
    if stored.get("model_type") != cls.config_class.model_type:
        raise ValueError(f"{source}: adapters of a {stored.get('model_type')!r}, which {cls.__name__} is not")
    ours = {name: stored[name] for name in EXIT_SETTINGS if stored.get(name) is not None}
    if "id2label" in ours:
        ours["id2label"] = {int(number): name for number, name in ours["id2label"].items()}
    model = cls.from_backbone(backbone, **ours, lora=lora, **arguments)
    with safe_open(folder / WEIGHTS, "pt") as file:
        trained_on = (file.metadata() or {}).get("backbone")
    if trained_on != model.lora_backbone:
        raise ValueError(
            f"{source}: the adapters were trained on another backbone ({settings.get('base_model_name_or_path')}, or "
            "the same in another precision)"
        )
    state = {_adapter_name(name): each for name, each in load_file(folder / WEIGHTS).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in missing if ".lora_" in name or not name.startswith(f"{model.base_model_prefix}.")]
    if lost or unexpected:
        what = f"no tensor {lost[0]!r}" if lost else f"unknown tensor {unexpected[0]!r}"
        raise ValueError(f"{source}: {what} in {WEIGHTS}")
    return model


def backbone_digest(model: Any) -> str:
    """What the frozen weights of a backbone are, whatever they are called."""
    digests = []
    for name, tensor in model.base_model.state_dict().items():
        if ".lora_" not in name:
            digests.append(hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _file_name(model: Any, module: str) -> str:
    """What a linear layer is called in files, the same under both majors of transformers."""
    (name,) = revert_weight_conversion(model, {f"{module}.weight": torch.zeros(())})
    return name.removesuffix(".weight")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _adapter_name(name: str) -> str:
    """`lora_A.weight` -> `lora_A.default.weight`."""
    layer, found, rest = name.rpartition(".lora_")
    matrix, _, last = rest.partition(".")
    return f"{layer}.lora_{matrix}.{NAME}.{last}" if found else name


def _folder_of(source: str | os.PathLike[str], arguments: dict[str, Any]) -> Path:
    """The adapters' folder, fetched from the Hub where it is none."""
    if Path(source).is_dir():
        return Path(source)
    hub = {name: arguments[name] for name in ("token", "cache_dir", "local_files_only") if name in arguments}
    return Path(snapshot_download(str(source), allow_patterns=["config.json", SETTINGS, WEIGHTS], **hub))
