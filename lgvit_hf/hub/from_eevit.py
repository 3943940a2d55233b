"""EEVIT checkpoints (https://github.com/ionymikler/early_exit_vit), LGViT's weights under other names, as ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..configuration_sequence import ViTHighwayConfig
from ..data.settings import read_yaml
from ..heads import num_sparse_heads
from ..modeling_vit import ViTHighway
from .eevit_config import EXITS, is_eevit, translate_eevit
from .lgvit_names import BODIES
from .reading import find_weights, read_weights
from .strict import Rename, built_from, by_module, load_strictly, renamed, split_fused, write_model

_BLOCK = r"transformer\.layers\.(\d+)\."
_OURS = r"vit.encoder.layer.\1."
NAMES = [
    (r"patch_embedding\.cls_token", "vit.embeddings.cls_token"),
    (r"patch_embedding\.pos_embedding", "vit.embeddings.position_embeddings"),
    (r"patch_embedding\.projection", "vit.embeddings.patch_embeddings.projection"),
    (_BLOCK + "norm_1", _OURS + "layernorm_before"),
    (_BLOCK + "(query|key|value)", _OURS + r"attention.attention.\2"),
    (_BLOCK + r"attention_output\.0", _OURS + "attention.output.dense"),
    (_BLOCK + r"mlps\.norm_2", _OURS + "layernorm_after"),
    (_BLOCK + r"mlps\.mlp_intermediate\.0", _OURS + "intermediate.dense"),
    (_BLOCK + r"mlps\.mlp_output\.0", _OURS + "output.dense"),
    (r"transformer\.norm_post_layers", "vit.layernorm"),
    ("last_exit", "classifier"),
]


def convert_eevit(source: str | Path, output: str | Path) -> ViTHighwayConfig:
    """Turn an EEVIT checkpoint into a highway that gives the same logits at every exit.

    Args:
        source (`str` or `Path`):
            A folder with weights (see `find_weights`; EEVIT's are a state dict) and EEVIT's one `.yaml` or `.yml`
            file, or the file of weights beside that.
        output (`str` or `Path`): Folder to write; must not exist or be empty.

    Returns:
        The config of the written model. Its exits stand one higher than in EEVIT, which counts blocks from 0.

    Raises:
        ValueError: The settings cannot be understood or are not those of a highway; a tensor has no place in the
            model, another shape or is missing.
        OSError: A file is missing or damaged.
    """
    weights = find_weights(source)
    files = sorted(file for file in weights.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    if len(files) != 1:
        raise OSError(f"{weights.parent}: {len(files) or 'no'} .yaml files beside the weights; EEVIT's one is needed")
    state = read_weights(weights)
    moved = [name for name in state if re.fullmatch(_BLOCK + r"norm_2\.weight", name)]
    if moved:
        raise ValueError(
            f"{weights}: {moved[0]}: an EEVIT from before its second norm moved to mlps.norm_2; there a block adds "
            "to its normed input, which no ViT does"
        )
    classifier = state.get("last_exit.weight")
    if classifier is None or classifier.dim() != 2:
        raise ValueError(f"{weights}: no classifier 'last_exit.weight' there: not a checkpoint of EEVIT")
    with built_from(weights):
        state = split_fused(state, "W_QKV")
    with built_from(files[0]):
        config = eevit_config(read_yaml(files[0]), len(classifier))
        model = ViTHighway(config)
    load_strictly(model, state, _names(config), weights)
    write_model(model, output, weights)
    return config


def eevit_config(settings: dict[str, Any], num_labels: int) -> ViTHighwayConfig:
    """The config of an EEVIT as ours.

    Args:
        settings (`dict`): The content of its YAML file.
        num_labels (`int`): Of its classifiers.

    Raises:
        ValueError: Naming what ours cannot do, or what is no key of EEVIT's.

    Example:

        >>> exits = {"exits": [[3, "conv1_1"], [7, "attention", {"sr_ratio": 2}]], "num_attn_heads": 8}
        >>> config = eevit_config({"model": {"image_size": 224, "early_exit_config": exits}}, num_labels=100)
        >>> config.exits, config.layer_norm_eps
        ((Exit(after=4, head='conv1_1'), Exit(after=8, head='attention_r2')), 1e-05)
    """
    if not is_eevit(settings):
        raise ValueError(f"no EEVIT configuration: neither 'model' nor {EXITS[0]!r} or {EXITS[1]!r} in it")
    options, _ = translate_eevit(settings)
    model = dict(settings.get("model") or {})
    exits: dict[str, Any] = next((part[key] for part in (model, settings) for key in EXITS if part.get(key)), {})
    taken = [name for name in ("image_size", "pool", "exit_positions", "exit_types", "exit_policy") if name in options]
    fields = {"image_size": 224, "exit_positions": [], "exit_types": [], **{name: options[name] for name in taken}}
    if not fields["exit_positions"]:
        fields["exit_policy"] = {"name": "never"}
    config = ViTHighwayConfig(**fields, **options["model_settings"], num_labels=num_labels, layer_norm_eps=1e-5)
    _check(config, model, exits)
    return config


def _check(config: ViTHighwayConfig, model: dict[str, Any], exits: dict[str, Any]) -> None:
    """Refuse what EEVIT computes and we do not."""
    heads, width = config.num_attention_heads, config.hidden_size
    if model.get("dim_head", 64) * heads != width:
        raise ValueError(
            f"model.dim_head: {model.get('dim_head', 64)} times {heads} heads is not the width of {width}, which is "
            "what a ViT attends with"
        )
    if config.pool == "mean" and config.exits:
        raise ValueError("model.pool: 'mean' with exits: EEVIT's exits read the class token even so, ours the mean")
    if not any(head.startswith("attention") for head in config.exit_types):
        return
    ours, theirs = num_sparse_heads(width), exits.get("num_attn_heads", 8)
    if theirs != ours:
        raise ValueError(f"early_exits.num_attn_heads: {theirs} must be {ours}, as LGViT's at a width of {width}")
    for position, _, *given in exits.get("exits") or []:
        if given and given[0] and given[0].get("qk_scale"):
            raise ValueError(
                f"early_exits.exits: qk_scale of the exit at {position} must be left out: ours has 1/sqrt(d)"
            )


def _names(config: ViTHighwayConfig) -> Rename:
    """EEVIT's name -> ours."""
    bodies = {**BODIES, "mlp": {"body.widen": "mlp.layer1", "body.narrow": "mlp.layer2"}}
    modules = {}
    for index, exit in enumerate(config.exits):
        prefix = f"transformer.layers.{exit.after - 1}.highway."
        for ours, theirs in bodies["attention" if exit.head.startswith("attention") else exit.head].items():
            modules[prefix + theirs.replace("mlp.", "highway_head.", 1)] = f"exits.{index}.{ours}"
        modules[f"{prefix}classifier.classifier"] = f"exits.{index}.classifiers.0"
    return by_module(modules, lambda name: renamed(name, NAMES))
