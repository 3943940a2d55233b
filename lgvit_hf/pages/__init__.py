"""Pages for a browser: their HTML, CSS and JavaScript lie here; `page` puts one and its data together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def source(name: str) -> str:
    """The text of a file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def page(name: str, data: Mapping[str, Any]) -> str:
    r"""An HTML page of this folder with the files that it names as `{{file}}`, and its data as `{{data}}`, in place.

    Args:
        name (`str`): File of the page.
        data (`dict`): What its script reads, as JSON takes it. Text in it cannot end the script that holds it.

    Raises:
        ValueError: A number is NaN or infinite.

    Example:

        >>> text = page("report.html", {"model": "<script>"})
        >>> text.count("<script>"), text.count("script>\""), text.count("{{")
        (1, 1, 0)
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"data": text}
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: parts.get(found[1]) or source(found[1]), source(name))
