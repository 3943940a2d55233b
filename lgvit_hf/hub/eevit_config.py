"""EEVIT's configuration files (https://github.com/ionymikler/early_exit_vit) in our words. Data in, data out."""

from __future__ import annotations

from typing import Any

HEADS = {"dummy_mlp": "mlp", "conv1_1": "conv1_1", "conv2_1": "conv2_1"}
# EEVIT's key in `model`, and the field of our config
MODEL_FIELDS = {
    "embed_depth": "hidden_size",
    "patch_size": "patch_size",
    "num_attn_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "num_layers_transformer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "general_dropout": "hidden_dropout_prob",
    "transformer_dropout": "attention_probs_dropout_prob",
    "channels_num": "num_channels",
}
# said by the data, or true of every export of ours, or no setting of ours
NOT_NEEDED = {
    "num_classes": "the data say",
    "enable_export": "every model can be exported",
    "dim_head": "is hidden_size / num_attention_heads",
}
EXITS = ("early_exits", "early_exit_config")
ATTENTION_SETTINGS = ("sr_ratio", "qkv_bias", "qk_scale", "attn_drop", "proj_drop")


def is_eevit(settings: dict[str, Any]) -> bool:
    """Whether a mapping has EEVIT's shape: `model` is a mapping, or exits stand under EEVIT's key."""
    return isinstance(settings.get("model"), dict) or any(key in settings for key in EXITS)


def translate_eevit(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of `lgvit train` for an EEVIT configuration, and a note for each key that says what became of it.

    EEVIT counts blocks from 0, so its exit at 3 is ours at 4. Exits are either `exits: [[position, type, {...}], ...]`
    or `positions: [...]` and `types: [...]`, in `model` or beside it.

    Raises:
        ValueError: A key or a head that EEVIT does not have, or that ours cannot do.

    Example:

        >>> exits = {"exits": [[3, "dummy_mlp"], [6, "attention", {"sr_ratio": 2}]], "confidence_threshold": 0.9}
        >>> options, notes = translate_eevit({"model": {"pool": "mean", "early_exits": exits}})
        >>> options["exit_positions"], options["exit_types"], options["pool"]
        ([4, 7], ['mlp', 'attention_r2'], 'mean')
        >>> notes[1]
        'early_exits.exits [3, dummy_mlp] -> exit_positions 4, exit_types mlp'
    """
    settings = dict(settings)
    dataset, model = (dict(settings.pop(part, None) or {}) for part in ("dataset", "model"))
    exits = next((part.pop(key) for part in (model, settings) for key in EXITS if key in part), None)
    model_settings: dict[str, Any] = {}
    # what else stands beside EEVIT's keys is an option of ours
    options, notes = {"backbone": "vit", **settings, "model_settings": model_settings}, []
    parts = (("dataset", dataset), ("model", model))
    for part, key, value in ((part, *item) for part, values in parts for item in values.items()):
        if key in NOT_NEEDED:
            target = f"left out: {NOT_NEEDED[key]}"
        elif key in MODEL_FIELDS:
            target = f"model_settings.{MODEL_FIELDS[key]}"
            model_settings[MODEL_FIELDS[key]] = value
        elif key in ("image_size", "pool") or (part, key) == ("dataset", "name"):
            target = "data" if key == "name" else key
            options[target] = value
        else:
            known = ", ".join(["image_size", "pool", *NOT_NEEDED, *MODEL_FIELDS, EXITS[0]])
            raise ValueError(f"{part}.{key}: no key of EEVIT's; known: {known}")
        notes.append(f"{part}.{key} {value} -> {target}")
    if exits is not None:
        exit_options, exit_notes = _translate_exits(exits)
        return options | exit_options, notes + exit_notes
    return options, notes


def _translate_exits(exits: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    exits, notes = dict(exits), []
    if not exits.pop("enabled", True):
        return {"exit_positions": []}, ["early_exits.enabled false -> exit_positions []: a plain backbone"]
    listed = exits.pop("exits", None)
    if listed is None:
        listed = list(zip(exits.pop("positions", []), exits.pop("types", []), strict=True))
    heads = []
    for position, kind, *settings in listed:
        head, dropped = _head(kind, settings[0] if settings and settings[0] else {})
        heads.append(head)
        notes.append(
            f"early_exits.exits [{position}, {kind}] -> exit_positions {position + 1}, exit_types {head}"
            + (f" (left out: {', '.join(dropped)})" if dropped else "")
        )
    name, threshold = exits.pop("exit_strategy", "confidence"), exits.pop("confidence_threshold", 0.9)
    if name != "confidence":
        raise ValueError(f"early_exits.exit_strategy: {name!r} must be 'confidence', the only one that EEVIT has")
    notes.append(f"early_exits.confidence_threshold {threshold} -> exit_policy confidence")
    same = [key for key in ("embed_depth", "num_classes", "num_attn_heads", "general_dropout") if key in exits]
    if same:
        notes.append(f"early_exits.{', '.join(same)} -> left out: heads take the backbone's sizes")
    if unknown := sorted(set(exits) - set(same)):
        raise ValueError(f"early_exits.{unknown[0]}: no key of EEVIT's")
    positions, policy = [entry[0] + 1 for entry in listed], {"name": "confidence", "threshold": threshold}
    return {"exit_positions": positions, "exit_types": heads, "exit_policy": policy}, notes


def _head(kind: str, settings: dict[str, Any]) -> tuple[str, list[str]]:
    """Our name of a head, and which of its settings are left out since they are the default or dropout."""
    if kind in HEADS:
        return HEADS[kind], sorted(settings)
    if kind != "attention":
        raise ValueError(f"early_exits.exits: unknown head {kind!r}; EEVIT has {', '.join([*HEADS, 'attention'])}")
    unknown = sorted(set(settings) - set(ATTENTION_SETTINGS))
    if unknown:
        raise ValueError(f"early_exits.exits: {unknown[0]!r} is no setting of EEVIT's attention head")
    return f"attention_r{settings.get('sr_ratio', 1)}", sorted(set(settings) - {"sr_ratio"})
