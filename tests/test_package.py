"""What the wheel holds, what the extras for tools say, and where the version stands."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lgvit_hf

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "lgvit_hf" / "export" / "optimum_plugin"
pytestmark = pytest.mark.version_independent

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy with tests and recipes beside the package: what an earlier build left here is not seen."""
    home = tmp_path_factory.mktemp("package")
    source, unwanted = home / "source", shutil.ignore_patterns("__pycache__", "*.pyc")
    source.mkdir()
    for name in ("lgvit_hf", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    for name in ("__init__.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, source / "tests")
    done = subprocess.run([sys.executable, "-c", BUILD, str(home)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(home.glob("*.whl")))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    kinds = (".py", ".md", ".yaml", ".html", ".css", ".js", ".mjs", ".typed")
    files = [path for path in (ROOT / "lgvit_hf").rglob("*") if path.suffix in kinds]
    wanted = {str(path.relative_to(PLUGIN if PLUGIN in path.parents else ROOT)) for path in files}
    assert {
        "lgvit_hf/py.typed",
        "lgvit_hf/hub/model_card_template.md",
        "lgvit_hf/serving/device/__main__.py",
    } <= wanted
    assert "optimum/commands/register/register_lgvit.py" in wanted
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_optimum_stays_a_package_of_its_own(wheel):
    assert not [name for name in wheel.namelist() if re.fullmatch(r"optimum/(.*/)?__init__\.py", name)]


def test_metadata(wheel):
    folder = f"lgvit_hf-{lgvit_hf.__version__}.dist-info"
    text = wheel.read(f"{folder}/METADATA").decode()
    assert f"Version: {lgvit_hf.__version__}\n" in text
    assert "License-Expression: Apache-2.0" in text and f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert (ROOT / "README.md").read_text() in text
    assert "lgvit = lgvit_hf.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_one_version():
    assert f"\nversion: {lgvit_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_pins_of_the_site_are_of_the_majors_that_the_extra_allows(wheel):
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / ".ci" / "requirements-docs.txt").read_text(), flags=re.M))
    text = wheel.read(f"lgvit_hf-{lgvit_hf.__version__}.dist-info/METADATA").decode()
    extra = re.findall(r'^Requires-Dist: ([\w-]+)(?:\[\w+\])?<(\d+),>=([\d.]+); extra == "docs"$', text, flags=re.M)
    assert sorted(name for name, *_ in extra) == ["mkdocs-material", "mkdocstrings"]
    for name, below, least in extra:
        pinned = [int(part) for part in pins[name].split(".")]
        assert [int(part) for part in least.split(".")] <= pinned < [int(below)], name


def test_no_file_is_long():
    files = (ROOT / "lgvit_hf").rglob("*.py")
    assert [file.name for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 450] == []
