"""How the site reads docstrings, in which arguments are written as in transformers.

`` name (`int`, *optional*, defaults to 3): `` becomes `name (int): `, as the default is read from the code. Several
arguments on one line become one line each, with the same description.
"""

import re

from griffe import Extension

ARGUMENT = r"\w+ \((?:[^()\n]|\([^()\n]*\))*\)"
ARGUMENTS = re.compile(rf"^( +)({ARGUMENT}(?:, {ARGUMENT})*):((?: .*)?(?:\n\1 .*)*)$", flags=re.M)


def one_line_each(match: re.Match) -> str:
    """The arguments of one line, without what the code says."""
    indent, arguments, description = match.groups()
    arguments = re.sub(r",? ?\*optional\*(?:, defaults to (?:\(.*?\)|`.*?`|[^,()]*))?", "", arguments).replace("`", "")
    arguments = re.findall(ARGUMENT, arguments)
    return "\n".join(f"{indent}{argument.replace(' ()', '')}:{description}" for argument in arguments)


class Docstrings(Extension):
    """What `mkdocs.yml` names."""

    def on_object(self, *, obj, **_) -> None:
        """Every docstring, before it is parsed."""
        if obj.docstring:
            obj.docstring.value = ARGUMENTS.sub(one_line_each, obj.docstring.value)
