"""The command line: a file per command."""

from .main import main

__all__ = ["main"]
