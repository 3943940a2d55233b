"""The pages of `docs/`: what they say to type can be typed, their links lead somewhere, and their Python runs."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lgvit_hf.options import build_parser
from lgvit_hf.processing import make_processor
from tests.seeds import generator
from tests.tiny import tiny_images, tiny_model, tiny_native

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
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
    found = [(page.name, words) for page in PAGES for words in commands(page)]
    assert len(found) > 20
    parser = build_parser()
    for page, words in found:
        options, others = parser.parse_known_args(words[1:])
        assert not others, (page, words)
        config = getattr(options, "config", None)
        assert config is None or not config.startswith("recipes/") or (ROOT / config).is_file(), (page, words)


@version_independent
def test_links_lead_somewhere():
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text())]
    assert len(links) >= 5
    for page, target in links:
        assert (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=of)
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
