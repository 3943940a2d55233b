"""`lgvit`: finds the commands, which are a file each beside this one, parses, runs one, and tells errors in a line."""

from __future__ import annotations

import argparse
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .. import __version__
from ..data.settings import read_settings, read_yaml, refuse_unknown
from ..training.recipe import read_recipe, read_training

# of this folder, what is no command
SHARED = ("main", "options", "inputs", "drawing")


@cache
def commands() -> dict[str, ModuleType]:
    """The module of each command, by name: `HELP`, `EXAMPLE`, `REQUIRED`, `add_options(parser)`, `run(options)`.

    None imports torch before it runs.
    """
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in SHARED]
    return {name: import_module(f"{__package__}.{name}") for name in names if not name.startswith("_")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 1 where a command did what it was asked and says that something is wrong; 2 on bad input, with one line that
    says why; 130 on Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if arguments[:1] == ["train"] and arguments[-1] == "--debug":
        del arguments[-1]
    try:
        given, words = build_parser().parse_known_args(arguments)
        module, command, where = commands()[given.command], given.parser, getattr(given, "config", None)
        training = given.command == "train"
        read = read_recipe if training else read_yaml
        settings, keys = read_settings(command, read(where), where) if where else ({}, {})
        options = argparse.Namespace(**(given.defaults | settings | vars(given)))
        if training:
            options.training = read_training(keys, words, where)
        else:
            refuse_unknown([command], keys, words, where)
        for name in getattr(module, "REQUIRED", ()):
            if getattr(options, name, None) is None and not (name == "output" and getattr(options, "dry_run", False)):
                raise ValueError(f"lgvit {options.command} needs --{name}")
        return module.run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        # one line: libraries wrap theirs over several
        print(f"lgvit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"lgvit: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """One whose errors are raised, so that they are told in one line as any other."""

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`; says which command, where it is one."""
        command = self.prog.removeprefix("lgvit").strip()
        raise ValueError(f"{command}: {message}" if command else message)


def build_parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported for it."""
    parser = Parser(prog="lgvit", description="Vision Transformers that answer early.")
    parser.add_argument("--version", action="version", version=f"lgvit-hf {__version__}")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands().items():
        command = choices.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--config", help="YAML file with these options; the command line overrides it")
        if name != "train":  # whose `--debug` is that of `TrainingArguments`, where a word follows it
            command.add_argument("--debug", action="store_true", help="show where an error comes from")
        module.add_options(command)
        # what is parsed is what was typed: it wins over a file, which wins over these
        defaults = {action.dest: action.default for action in command._actions if action.default != argparse.SUPPRESS}
        for action in command._actions:
            action.default = argparse.SUPPRESS
        command.set_defaults(parser=command, defaults=defaults)
    return parser
