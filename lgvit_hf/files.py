"""Writing without losing: outputs are made under a temporary name and moved when they are whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replace_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block ends well, and vanishes when it does not.

    Args:
        output (`str` or `Path`): The folder to make.
        overwrite (`bool`, *optional*, defaults to `False`): Whether what is there may be replaced.

    Raises:
        ValueError: There is something at `output` and `overwrite` is false.

    Example:

        >>> with tempfile.TemporaryDirectory() as home:
        ...     with replace_folder(Path(home) / "out") as folder:
        ...         _ = (folder / "a.txt").write_text("whole")
        ...     [file.name for file in (Path(home) / "out").iterdir()]
        ['a.txt']
    """
    output = Path(output).resolve()
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another output")
    if output == Path.cwd() or os.path.ismount(output):
        raise ValueError(f"{output} is in use as a working folder or mount; choose a folder inside it")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.chmod(0o777 & ~_umask())
    _share(folder)
    old = None
    try:
        if output.exists() and overwrite:
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
            os.replace(output, old / output.name)
        os.replace(folder, output)  # refuses a folder in which something appeared meanwhile
    except OSError as error:
        if old is not None and not output.exists():
            os.replace(old / output.name, output)
        raise OSError(f"{output} could not be written; the whole result is in {folder}") from error
    if old is not None:
        shutil.rmtree(old)


def _share(folder: Path) -> None:
    """Files that were written for their owner alone, as safetensors', become readable as any other."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.stat().st_mode & 0o077:
            file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def add_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` when the block ends well; others there are left alone."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        yield Path(temporary)
        _share(Path(temporary))
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)


def write_json(file: str | Path, content: Any) -> None:
    """Write `content` as JSON, all of it or nothing."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)
            stream.write("\n")
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
