"""Keys of the JSON that commands write: files of earlier versions are read under the keys of today."""

from __future__ import annotations

from typing import Any

OLD_KEYS = {
    **{"trunks": "backbone_costs", "rows": "samples", "n": "samples_tested", "position": "exit_layer"},
    **{f"{name}_leaving": f"{name}_exited" for name in ("accuracy", "calibration_error", "reliability")},
    "leaving": "exited",
}


def current_names(content: Any) -> Any:
    """What was read from a report, a sweep or a cost table, under the keys of today.

    Example:

        >>> current_names({"trunks": [4.0], "exits": [{"exit_index": 0, "depth": 4, "rows": 9}]})
        {'backbone_costs': [4.0], 'exits': [{'exit_index': 0, 'exit_layer': 4, 'samples': 9}]}
    """
    if isinstance(content, list):
        return [current_names(value) for value in content]
    if not isinstance(content, dict):
        return content
    names = OLD_KEYS | ({"depth": "exit_layer"} if "exit_index" in content else {})
    if isinstance(content.get("accuracy"), dict):  # of `lgvit benchmark`; elsewhere a number
        names |= {"accuracy": "accuracies", "early_exit": "accuracy", "full_model": "accuracy_full_model"}
        content = content | {"accuracy": {names.get(key, key): value for key, value in content["accuracy"].items()}}
    # a policy's settings have names of their own
    return {names.get(key, key): value if key == "policy" else current_names(value) for key, value in content.items()}
