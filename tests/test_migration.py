"""The pages for who comes from another project: what they say to type can be typed, and their Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from lgvit_hf.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("from-*.md"))


def snippets(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def commands(page):
    lines = [line.split("#")[0] for block in snippets(page, "bash") for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    inline = re.findall(r"`(lgvit [a-z]+ [^`]+)`", prose)
    return [shlex.split(line) for line in [*lines, *inline] if line.startswith("lgvit ")]


def test_every_project_has_its_page():
    assert {page.stem for page in PAGES} == {
        f"from-{name}" for name in ("avit", "eevit", "lgvit", "tardis", "timm", "vit-tactile")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_are_understood(page):
    found = commands(page)
    assert found
    for words in found:
        options, others = build_parser().parse_known_args(words[1:])
        assert not others, words
        config = getattr(options, "config", None)
        assert config is None or not config.startswith("recipes/") or (ROOT / config).is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: page.stem)
def test_its_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet in snippets(page, "python"):
        exec(compile(snippet, str(page), "exec"), {"__name__": "snippet"})
