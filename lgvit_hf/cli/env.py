"""`lgvit env`: versions."""

from __future__ import annotations

import argparse

HELP = "print the versions to paste in an issue"
EXAMPLE = "lgvit env"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `lgvit env`."""


def run(options: argparse.Namespace) -> None:
    """Run the command and print the result."""
    from ..evaluation.environment import report

    print(report())
