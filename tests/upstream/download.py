"""Fetch the test files of the installed transformers: `python tests/upstream/download.py FOLDER`.

The wheel has none, the source distribution the two that others build on. pip checks the archive against the digest of
the package index.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE = "transformers_tests"
FILES = ("test_modeling_common.py", "test_configuration_common.py")
# what these files need that our own tests do not
REQUIRES = "parameterized==0.9.0"
# for `test_timm.py`, apart from all else and without torchvision, whose builds want a torch with CUDA
TIMM = "timm==1.0.31"
CONFIG_VALUES = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16"}
# what these files import of others that are not in the archive; text generation and exporters have no part here
STUBS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": f"config_common_kwargs = {CONFIG_VALUES}\n",
}


def main(folder: Path) -> None:
    """Write the package `transformers_tests` into `folder`; its `__version__` comes last and says that it is whole."""
    wanted = version("transformers")
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-binary", "transformers", "-d", scratch, f"transformers=={wanted}")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            texts = {name: archive.extractfile(f"transformers-{wanted}/tests/{name}").read() for name in FILES}
    pip("install", "--upgrade", "--target", str(folder), REQUIRES)
    pip("install", "--upgrade", "--target", str(folder / "with_timm"), TIMM)
    texts |= {name: text.encode() for name, text in STUBS.items()}
    for name, text in {**texts, "__init__.py": f'__version__ = "{wanted}"\n'.encode()}.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def pip(command: str, *args: str) -> None:
    """Run one of pip's commands, in the environment of this Python."""
    subprocess.run([sys.executable, "-m", "pip", command, "-qq", "--no-deps", *args], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
