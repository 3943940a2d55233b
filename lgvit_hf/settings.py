"""Settings of a YAML file, or of Python, as the command line would have read them."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: Not YAML, or no mapping.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('--config reads YAML: pip install "lgvit-hf[train]"') from error
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: a mapping of options to values is needed")
    return settings


def names_of(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What may stand in a file: the options of a command, but for those about files and help."""
    actions = {action.dest: action for action in command._actions if action.option_strings}
    return {name: action for name, action in actions.items() if name not in ("help", "config")}


def apply_settings(
    command: argparse.ArgumentParser, settings: dict[str, Any], where: str | Path, *, keep_unknown: bool = False
) -> dict[str, Any]:
    """Make `settings` the defaults of a command, each checked as on the command line.

    Args:
        command (`argparse.ArgumentParser`): The command.
        settings (`dict`): By name, with `-` or `_`.
        where (`str` or `Path`): What an error names.
        keep_unknown (`bool`, *optional*, defaults to `False`): Whether other names are returned, and no error.

    Raises:
        ValueError: An unknown name, with the nearest one; a value of the wrong type.

    Example:

        >>> command = argparse.ArgumentParser()
        >>> _ = command.add_argument("--batch-size", type=int)
        >>> apply_settings(command, {"batch_size": 8}, "run.yaml"), command.parse_args([]).batch_size
        ({}, 8)
    """
    known, left = names_of(command), {}
    for key, value in settings.items():
        action = known.get(str(key).replace("-", "_"))
        if action is not None:
            command.set_defaults(**{action.dest: _as_typed(action, key, value, where)})
        elif keep_unknown:
            left[str(key)] = value
        else:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    return left


def _as_typed(action: argparse.Action, key: str, value: Any, where: str | Path) -> Any:
    """A YAML value as the command line would have read it."""
    if value is None:
        return action.default
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {key}: {value!r} must be true or false")
        return value
    many = action.nargs == "+"
    read = action.type or str
    try:
        typed = [read(entry) for entry in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: {key}: {value!r} must be {read.__name__}{' or a list of them' if many else ''}"
        ) from None
    if len(typed) > 1 and not many:
        raise ValueError(f"{where}: {key}: {value!r} must be one value")
    if action.choices and typed[0] not in action.choices:
        raise ValueError(f"{where}: {key}: {value!r} must be one of {', '.join(action.choices)}")
    return typed if many else typed[0]
