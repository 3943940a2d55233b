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
from tests.tiny import tiny_model, tiny_native

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


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
    torch.manual_seed(0)
    policy = {"name": "confidence", "threshold": 0.5}
    settings = {"num_hidden_layers": 4, "exit_positions": [1, 2, 3], "exit_types": "linear", "exit_policy": policy}
    model, processor = tiny_model("vit", **settings).eval(), make_processor(16)
    export_onnx(model, home / "onnx", processor=processor)
    model.split([1, 2], home / "parts", format="onnx", processor=processor)
    plain = tiny_native("deit")
    plain.save_pretrained(home / "my-finetuned-deit")
    size = (3, plain.config.num_channels, *([plain.config.image_size] * 2))
    return home, torch.randn(3, 3, 16, 16), torch.randn(size)


def test_every_project_has_its_page():
    assert {page.stem for page in PAGES if page.stem.startswith("from-")} == {
        f"from-{name}" for name in ("avit", "eevit", "lgvit", "tardis", "timm", "vit-tactile")
    }


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=of)
def test_its_commands_are_understood(page):
    for words in commands(page):
        options, others = build_parser().parse_known_args(words[1:])
        assert not others, words
        config = getattr(options, "config", None)
        assert config is None or not config.startswith("recipes/") or (ROOT / config).is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


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
