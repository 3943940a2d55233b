"""`lgvit env`: versions."""

from __future__ import annotations

import argparse

HELP = "print the versions to paste in an issue"
EXAMPLE = "lgvit env"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What may be typed behind `lgvit env`."""


def run(options: argparse.Namespace) -> None:
    """Do what was typed, and print what came of it."""
    from ..evaluation.environment import report

    print(report())
