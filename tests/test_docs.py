"""README and `docs/`: commands are understood, links lead somewhere, Python runs, every public name is there."""

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lgvit_hf
from lgvit_hf.cli.main import build_parser
from lgvit_hf.data.processing import make_processor
from lgvit_hf.heads import HEADS
from lgvit_hf.policies import POLICIES
from tests.seeds import generator
from tests.tiny import tiny_images, tiny_model, tiny_native

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
# in `test_demo.py`, each snippet in a process of its own, beside the model that the demo makes
RUN_WITH_THE_DEMO = [
    ROOT / "README.md",
    *(ROOT / f"docs/{name}.md" for name in ("index", "train", "choosing-thresholds")),
]
version_independent = pytest.mark.version_independent


def snippets(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def commands(page):
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line.split(" #")[0] for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = re.findall(r"`(lgvit [a-z]+ [^`]+)`", prose)
    whole = [line for line in [*lines, *inline] if line.startswith("lgvit ") and "..." not in line]
    return [shlex.split(line) for line in whole]


def anchors(page):
    """Of its headings, as GitHub and mkdocs make them."""
    text = re.sub(r'^--8<-- "(.+)"$', lambda match: (ROOT / match[1]).read_text(), page.read_text(), flags=re.M)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def of(page):
    return page.stem


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with what the pages speak of: an export, parts, a plain checkpoint."""
    pytest.importorskip("onnx")
    from lgvit_hf import export_onnx

    home = tmp_path_factory.mktemp("docs")
    policy = {"name": "confidence", "threshold": 0.5}
    settings = {"num_hidden_layers": 4, "exit_positions": [1, 2, 3], "exit_types": "linear", "exit_policy": policy}
    processor = make_processor(16)
    export_onnx(tiny_model("vit", **settings), home / "onnx", processor=processor)
    settings |= {"num_hidden_layers": 2, "exit_positions": [1]}
    tiny_model("vit", **settings).split([1], home / "parts", format="onnx", processor=processor)
    plain = tiny_native("deit")
    plain.save_pretrained(home / "my-finetuned-deit")
    size = (3, plain.config.num_channels, *([plain.config.image_size] * 2))
    return home, tiny_images(3), torch.randn(size, generator=generator())


@version_independent
def test_every_project_has_its_page():
    assert {page.stem for page in PAGES if page.stem.startswith("from-")} == {
        f"from-{name}" for name in ("avit", "eevit", "lgvit", "tardis", "timm", "vit-tactile")
    }


@version_independent
def test_commands_are_understood():
    found = [(page.name, words) for page in TEXTS for words in commands(page)]
    assert len(found) > 60
    parser = build_parser()
    for page, words in found:
        options, others = parser.parse_known_args(words[1:])
        assert not others, (page, words)
        config = getattr(options, "config", None)
        assert config is None or not config.startswith("recipes/") or (ROOT / config).is_file(), (page, words)


@version_independent
def test_links_lead_somewhere():
    links = [
        (page, target, anchor)
        for page in TEXTS
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text())
    ]
    assert len(links) > 55
    for page, target, anchor in links:
        file = page.parent / target if target else page
        assert file.exists(), (page.name, target)
        assert not anchor or anchor in anchors(file), (page.name, target, anchor)


@version_independent
def test_readme_is_a_first_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert "](docs/demo.png)" in text
    for command in ("make demo", "make test"):
        assert f"```bash\n{command}\n```" in text
    pages = {path.name for path in PAGES if path.parent.name == "docs"} - {"contributing.md"}
    assert pages <= set(re.findall(r"\]\(docs/([a-z-]+\.md)", text))


@version_independent
def test_every_head_and_policy_is_named():
    text = (ROOT / "docs" / "heads-and-policies.md").read_text()
    for name in {*HEADS, *POLICIES} - {"attention"}:
        assert f"`{name}`" in text, name
    assert "`attention_r{n}`" in text


@version_independent
def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^::: lgvit_hf\.(\w+)$", text, flags=re.M)
    assert sorted(named) == sorted(lgvit_hf.__all__)


@version_independent
@pytest.mark.parametrize("name", lgvit_hf.__all__)
def test_every_public_name_has_a_docstring(name):
    """In its module, where the reference reads it: no object is asked, which would inherit one."""
    assert_documented(lgvit_hf._HOME_OF[name], name)


def assert_documented(home, name):
    spec = importlib.util.find_spec(f"lgvit_hf.{home}")
    body = ast.parse(Path(spec.origin).read_text()).body
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.ImportFrom) and name in [alias.name for alias in statement.names]:
            return assert_documented(statement.module, name)
        if getattr(statement, "name", None) == name:
            assert ast.get_docstring(statement)
            return
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(following, ast.Expr) and isinstance(following.value.value, str)
            return
    raise AssertionError(f"{name} is not defined in {spec.origin}")


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p, "python") and p not in RUN_WITH_THE_DEMO], ids=of)
def test_its_python_runs(page, workspace, tmp_path, monkeypatch):
    import onnxruntime

    home, pixels, pixel_values = workspace
    for name in ("onnx", "parts", "my-finetuned-deit"):
        (tmp_path / name).symlink_to(home / name)
    given = {"__name__": "snippet", "np": np, "onnxruntime": onnxruntime, "pixels": pixels.numpy()}
    given["pixel_values"] = pixel_values if page.stem == "adaptive-tokens" else pixels
    for snippet in snippets(page, "python"):
        # what travels with a part is used from inside it
        monkeypatch.chdir(home / "parts" / "part0" if "lgvit_part" in snippet else tmp_path)
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        exec(compile(snippet, str(page), "exec"), dict(given))
