"""A highway of ours as an original LGViT checkpoint, for LGViT's own code and for `--from lgvit`."""

from __future__ import annotations

import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration import HighwayConfig
from ..configuration_swin import SwinHighwayConfig
from ..files import replace_folder, write_json
from ..heads import lgvit_heads, num_sparse_heads
from ..policies import build_policy
from ..pretrained import RECOMPUTED
from .lgvit_names import POOLER, exit_modules, kind_of, to_lgvit
from .loading import load_highway
from .reading import read_if_there
from .strict import PROCESSOR

# fields that LGViT's config shares with ours, by backbone
_SHARED = (
    "image_size patch_size num_channels hidden_act hidden_dropout_prob attention_probs_dropout_prob initializer_range "
    "layer_norm_eps qkv_bias label2id problem_type"
)
_VIT = f"{_SHARED} hidden_size num_hidden_layers num_attention_heads intermediate_size".split()
_SWIN = f"{_SHARED} embed_dim depths num_heads window_size mlp_ratio drop_path_rate use_absolute_embeddings".split()
SHARED = {"vit": _VIT, "deit": _VIT, "swin": _SWIN}
# coefficients of LGViT's stage two; it needs them whatever is done
COEFFICIENTS = {"loss_coefficient": 0.3, "homo_coefficient": 0.01, "hete_coefficient": 0.01}
SWIN_COEFFICIENTS = {"loss_coefficient": 0.3, "homo_loss_coefficient": 0.01, "hete_loss_coefficient": 0.01}
SWIN_HEADS = ("linear", "conv1_1", "conv2_1", "attention")
LAYOUTS = (2, 4, 6, 8)
# LGViT's name of a policy, where it is another than ours
STRATEGIES = {"patience_confidence": "patient_and_confident"}
ADVICE = 'save the model after set_exit_policy("confidence", threshold=0.9), or entropy, patience, patience_confidence'


def export_lgvit(checkpoint: str, output: str | Path) -> dict[str, Any]:
    """Write a highway as LGViT's own code saves one: the same tensors by its names, and its `config.json`.

    Args:
        checkpoint (`str`): Folder or Hub id of a highway.
        output (`str` or `Path`):
            Folder to write, with `model.safetensors` (never a pickle); must not exist or be empty.

    Returns:
        The content of the `config.json`.

    Raises:
        ValueError: LGViT's code has no such model; the message says what.
        OSError: There is no saved model.
    """
    model = load_highway(checkpoint)
    settings = lgvit_settings(model.config)
    rename = to_lgvit(model.config)
    state = {rename(name): tensor for name, tensor in _saved(model).items() if not name.endswith(RECOMPUTED)}
    if kind_of(model.config) != "swin":
        # LGViT builds a pooler, and uses it nowhere
        width = model.config.hidden_size
        state |= {f"{POOLER}dense.weight": torch.zeros(width, width), f"{POOLER}dense.bias": torch.zeros(width)}
    with replace_folder(output) as folder:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        write_json(folder / "config.json", settings)
        if processor := read_if_there(Path(checkpoint) / PROCESSOR):
            write_json(folder / PROCESSOR, processor)
    return settings


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model by their names in files, which are the same in transformers 4 and 5."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        return load_file(Path(folder) / "model.safetensors")


def lgvit_settings(config: HighwayConfig) -> dict[str, Any]:
    """The `config.json` of LGViT for a highway of ours.

    Raises:
        ValueError: LGViT's code has no such model; the message says what.

    Example:

        >>> from lgvit_hf import ViTHighwayConfig
        >>> policy = {"name": "entropy", "threshold": 0.6}
        >>> settings = lgvit_settings(ViTHighwayConfig(exit_positions=[4, 8], exit_policy=policy))
        >>> settings["position_exits"], settings["highway_type"], settings["exit_strategy"]
        ('[4,8]', 'LGViT', 'entropy')
    """
    kind, ours = kind_of(config), config.to_dict()
    _check_known(config, kind)
    model, coefficients = ("Swin", SWIN_COEFFICIENTS) if kind == "swin" else ("DeiT", COEFFICIENTS)
    return {
        **{name: ours[name] for name in SHARED[kind] if ours.get(name) is not None},
        "architectures": [f"{model}HighwayForImageClassification"],
        "model_type": model.lower(),
        "num_labels": config.num_labels,
        "id2label": {str(number): name for number, name in (config.id2label or {}).items()},
        **_places(config, kind),
        "highway_type": _highway_type(config),
        "train_strategy": "weighted" if config.exit_loss_weights == "depth" else "normal",
        **coefficients,
        **_decision(config),
    }


def _check_known(config: HighwayConfig, kind: str) -> None:
    """Refuse what LGViT's code cannot be told."""
    if kind not in ("vit", "deit", "swin"):
        raise ValueError(f"model type {config.model_type!r} is not in LGViT, which has ViT, DeiT and Swin")
    if config.truncated or not config.exits:
        raise ValueError(
            "exit_positions: LGViT has exits and a final classifier; there are none, or there is no final"
        )
    if config.pool != ("mean" if kind == "swin" else "cls"):
        raise ValueError(f"pool: {config.pool!r} is not in LGViT, whose exits read the class token")
    if kind == "deit" and not config.distilled:
        raise ValueError("distilled: LGViT's DeiT always has a classifier for the distillation token")
    if config.feature_map_dim is not None:
        raise ValueError("attn_implementation: 'performer' is not in LGViT")
    if config.linear_blocks is not None:
        raise ValueError(f"linear_blocks: {config.linear_blocks} are one linear map, which is not in LGViT")
    if config.exit_ensemble is not None:
        raise ValueError("exit_ensemble: LGViT's exits answer alone; leave it out with exit_ensemble=None")
    if not isinstance(config.exit_loss_weights, str):
        raise ValueError(f"exit_loss_weights: {config.exit_loss_weights} must be 'depth' or 'uniform' for LGViT")
    for exit in config.exits:
        width = config.embed_dim * 2 ** config.stage_of(exit.after) if kind == "swin" else config.hidden_size
        name = exit.head.split("_r")[0] if exit.head.startswith("attention_r") else exit.head
        if not exit_modules(kind, exit.head) or (kind == "swin" and name not in SWIN_HEADS):
            raise ValueError(f"exit_types: {exit.head!r} after block {exit.after} is no head of LGViT's {kind}")
        if name == "attention" and (num_sparse_heads(width) != 8 or len(exit.head) != len("attention_r1")):
            raise ValueError(
                f"exit_types: {exit.head!r} after block {exit.after}: LGViT's has 8 heads, which the width of {width} "
                "must be a multiple of, and a ratio below 10"
            )


def _highway_type(config: HighwayConfig) -> str:
    types = config.exit_types
    fits, attention = len(types) in LAYOUTS, ("attention_r2", "attention_r3")
    known = f"{', '.join(map(str, LAYOUTS))} exits"
    if isinstance(config, SwinHighwayConfig):
        stages = [config.stage_of(exit.after) for exit in config.exits]
        published = {1: ["conv1_1"] * stages.count(1), 3: ["attention_r2"] * stages.count(3)}
        published[2] = ["conv1_1", "conv2_1", "conv2_1", "attention_r1", "attention_r1", "attention_r2"]
        fits = types == [head for stage in sorted(set(stages)) for head in published.get(stage, [])]
        attention, known = ("attention_r1", "attention_r2"), "8 exits of Swin-B"
    if fits and lgvit_heads(len(types), attention=attention) == types:
        return "LGViT"
    if len(set(types)) == 1:
        return types[0]
    raise ValueError(
        f"exit_types: {types} is neither one head for all exits nor LGViT's layout, which it has for {known}"
    )


def _places(config: HighwayConfig, kind: str) -> dict[str, Any]:
    """`position_exits`, a string, and `num_early_exits`; of Swin stage by stage."""
    if not isinstance(config, SwinHighwayConfig):
        places = {"num_early_exits": len(config.exits), "position_exits": _text(config.exit_positions)}
        return {"backbone": {"vit": "ViT", "deit": "DeiT"}[kind], **places}
    positions, starts = config.exit_positions, zip(config.depths, accumulate(config.depths, initial=0), strict=False)
    stages = [[after - start for after in positions if 0 < after - start <= depth] for depth, start in starts]
    return {"num_early_exits": _text([len(stage) for stage in stages]), "position_exits": _text(stages)}


def _text(numbers: list[Any]) -> str:
    return str(numbers).replace(" ", "")


def _decision(config: HighwayConfig) -> dict[str, Any]:
    """`exit_strategy` and `threshold`."""
    policy = build_policy(config.exit_policy, len(config.exits)).to_dict()
    name, threshold, patience = policy.pop("name"), policy.pop("threshold", None), policy.pop("patience", None)
    temperature = policy.pop("temperature", 1.0)
    extra = sorted(key for key, value in policy.items() if value is not None)
    if any(value != 1 for value in (temperature if isinstance(temperature, (list, tuple)) else [temperature])):
        extra.append("temperature")
    if name not in ("confidence", "entropy", "patience", *STRATEGIES) or extra:
        raise ValueError(f"exit_policy: {', '.join(extra) or name} of {config.exit_policy} is not in LGViT; {ADVICE}")
    if name == "patience":
        threshold = [patience]
    elif name == "patience_confidence":
        each = list(threshold) if isinstance(threshold, (list, tuple)) else [threshold] * len(config.exits)
        threshold = [*each, patience]
    return {"exit_strategy": STRATEGIES.get(name, name), "threshold": threshold}
