"""Settings of a YAML file, or of Python, as the command line would have read them."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

# of a YAML document, with everything that its aliases stand for
MAX_NODES = 100_000

Number = TypeVar("Number", int, float)


def whole(least: int = 1, most: int = 2**31 - 1) -> Callable[[Any], int]:
    """Reads a whole number for `argparse`, or of YAML; nothing is rounded.

    Example:

        >>> whole(0, 65535)("8000")
        8000
        >>> whole(0, 65535)(99999)
        Traceback (most recent call last):
        ...
        argparse.ArgumentTypeError: 99999 must be a whole number from 0 to 65535
    """
    bounds = f"of at least {least}" if most >= 2**31 - 1 else f"from {least} to {most}"
    return _reader(int, least, most, f"a whole number {bounds}")


def real(least: float = -math.inf, most: float = math.inf) -> Callable[[Any], float]:
    """Reads a finite number, as `whole` does.

    Example:

        >>> real(0)("1e400")
        Traceback (most recent call last):
        ...
        argparse.ArgumentTypeError: '1e400' must be a finite number of at least 0
    """
    bounds = [f"of at least {least:g}"] * (least > -math.inf) + [f"of at most {most:g}"] * (most < math.inf)
    return _reader(float, least, most, " ".join(["a finite number", " and ".join(bounds)]).strip())


def _reader(number_type: type[Number], least: float, most: float, name: str) -> Callable[[Any], Number]:
    def read(value: Any) -> Number:
        try:
            number = number_type(str(value))
            if least <= number <= most and math.isfinite(number):
                return number
        except ValueError:
            pass  # not a number at all
        raise argparse.ArgumentTypeError(f"{value!r} must be {name}")

    read.__name__ = name
    return read


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: Not YAML, or no mapping, or one that is nested too deep or grows too large.
    """
    settings = parse_yaml(Path(file).read_text(encoding="utf-8"), file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: a mapping of options to values is needed")
    return settings


def parse_yaml(text: str, where: str | Path) -> Any:
    """The content of a YAML document, if its size stays within bounds once every alias is what it stands for.

    Args:
        text (`str`): The document.
        where (`str` or `Path`): What an error names.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: Not YAML, or nested too deep, or too large.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('YAML is read by PyYAML: pip install "lgvit-hf[train]"') from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _num_nodes(root, {}) > MAX_NODES:
            raise ValueError(f"{where}: more than {MAX_NODES:,} values, with what its aliases stand for")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({error})") from error
    except RecursionError:
        raise ValueError(f"{where}: nested too deep, or within itself") from None


def _num_nodes(node: Any, known: dict[int, int]) -> int:
    """Nodes of a YAML tree; of one that several aliases name, as often as it is named."""
    if id(node) not in known:
        inner = node.value if isinstance(node.value, list) else []
        inner = [each for entry in inner for each in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_num_nodes(each, known) for each in inner)
    return known[id(node)]


def names_of(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What may stand in a file: the options of a command, but for those about files and help."""
    # of two that set one name, `--x` and `--no-x`, the first
    actions = {action.dest: action for action in reversed(command._actions) if action.option_strings}
    return {name: action for name, action in actions.items() if name not in ("help", "config")}


def read_settings(
    command: argparse.ArgumentParser, settings: dict[str, Any], where: str | Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `settings` that are options of a command, each as the command line would have read it; and the others.

    Args:
        command (`argparse.ArgumentParser`): The command.
        settings (`dict`): By name, with `-` or `_`; one that is `None` keeps its default.
        where (`str` or `Path`): What an error names.

    Raises:
        ValueError: A name that is there twice; a value of the wrong type.

    Example:

        >>> command = argparse.ArgumentParser()
        >>> _ = command.add_argument("--batch-size", type=int)
        >>> read_settings(command, {"batch-size": "8", "epoch": 3}, "run.yaml")
        ({'batch_size': 8}, {'epoch': 3})
    """
    known = names_of(command)
    typed, others, spelt = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name in spelt:
            raise ValueError(f"{where}: {spelt[name]!r} and {key!r} are one key; leave one of them out")
        spelt[name] = key
        if name not in known:
            others[str(key)] = value
        elif value is not None:
            typed[name] = _as_typed(known[name], key, value, where)
    return typed, others


def refuse_unknown(
    commands: Sequence[argparse.ArgumentParser], keys: Iterable[str], words: Iterable[str], where: str | Path | None
) -> None:
    """Raise `ValueError` for a key of a file, or a word of a command line, that is no option; with the nearest one.

    Example:

        >>> command = argparse.ArgumentParser()
        >>> _ = command.add_argument("--threshold")
        >>> refuse_unknown([command], [], ["--treshold", "0.5"], None)
        Traceback (most recent call last):
        ...
        ValueError: unknown option --treshold; did you mean --threshold?
    """

    def hint(wrong: str, names: Callable[[argparse.ArgumentParser], Iterable[str]], spell: Any = str) -> str:
        close = difflib.get_close_matches(wrong, chain(*map(names, commands)), n=1)
        return f"did you mean {spell(close[0])}?" if close else f"see {commands[0].prog} --help"

    for key in keys:
        raise ValueError(f"{where}: unknown key {key!r}; {hint(key, names_of, repr)}")
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not understood; options are --name value")
        option = word.partition("=")[0]
        raise ValueError(f"unknown option {option}; {hint(option, lambda command: command._option_string_actions)}")


def _as_typed(action: argparse.Action, key: str, value: Any, where: str | Path | None) -> Any:
    """A YAML value as the command line would have read it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {key}: {value!r} must be true or false")
        return value
    many = action.nargs == "+"
    read: Any = action.type or str
    try:
        typed = [read(entry) for entry in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError):
        raise ValueError(
            f"{where}: {key}: {value!r} must be {read.__name__}{' or a list of them' if many else ''}"
        ) from None
    if len(typed) != 1 and not many:
        raise ValueError(f"{where}: {key}: {value!r} must be one value")
    if action.choices and typed[0] not in action.choices:
        raise ValueError(f"{where}: {key}: {value!r} must be one of {', '.join(action.choices)}")
    return typed if many else typed[0]


def check_counts(**counts: Sequence[int]) -> None:
    """Raise `ValueError`, by its name, for a number below 1."""
    for name, numbers in counts.items():
        if any(number < 1 for number in numbers):
            raise ValueError(f"{name}={' '.join(map(str, numbers))} must be at least 1")
