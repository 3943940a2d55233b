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
        ValueError: There is something at `output` and `overwrite` is false, or another run makes it now.

    Example:

        >>> with tempfile.TemporaryDirectory() as home:
        ...     with replace_folder(Path(home) / "out") as folder:
        ...         _ = (folder / "a.txt").write_text("whole")
        ...     [file.name for file in (Path(home) / "out").iterdir()]
        ['a.txt']
    """
    with locked(output):
        yield from _replaced_folder(Path(output).resolve(), overwrite)


def _replaced_folder(output: Path, overwrite: bool) -> Iterator[Path]:
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


@contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """Hold an output while it is made; a second run for the same is refused at once, whatever it would have done.

    A run that was killed holds nothing. Of several processes of one training the first holds it for all. One process
    may hold it several times over.

    Args:
        output (`str` or `Path`): File or folder; beside it lies `.NAME.lock` meanwhile.

    Raises:
        ValueError: Another run makes it now.

    Example:

        >>> with tempfile.TemporaryDirectory() as home:
        ...     with locked(Path(home) / "out"):
        ...         print([file.name for file in Path(home).iterdir()])
        ['.out.lock']
    """
    from filelock import FileLock, Timeout

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    output = Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output.with_name(f".{output.name}.lock")
    lock = FileLock(place, timeout=0, is_singleton=True)
    try:
        lock.acquire()
        while not place.exists():  # the run before removed it between our opening and our locking it
            lock.release()
            lock.acquire()
    except Timeout:
        raise ValueError(f"{output} is being written by another run; wait for it, or choose another output") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            place.unlink(missing_ok=True)
        lock.release()


def file_stamp(file: str | Path) -> str:
    """Size and time of a file's last change, by which another of the same name is known; or that it is missing.

    Example:

        >>> file_stamp("/nowhere/photo.png")
        'missing'
    """
    try:
        found = os.stat(file)
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"


def _share(folder: Path) -> None:
    """Files that were written for their owner alone, as safetensors', become readable as any other."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.stat().st_mode & 0o077:
            file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def leads_out(file: Path) -> bool:
    """Whether a file of a folder is a link to somewhere else; the Hub's cache is made of links, which are no such."""
    folder, target = file.parent.resolve(), file.resolve()
    # snapshots/<commit>/<file> is a link to a file in blobs
    allowed = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return not any(target.is_relative_to(place) for place in allowed)


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


@contextmanager
def replace_file(output: str | Path) -> Iterator[Path]:
    """A new file that takes the place of `output` when the block ends well, and vanishes when it does not.

    Example:

        >>> with tempfile.TemporaryDirectory() as home:
        ...     with replace_file(Path(home) / "a.txt") as file:
        ...         _ = file.write_text("whole")
        ...     [file.name for file in Path(home).iterdir()]
        ['a.txt']
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, output)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(file: str | Path, content: Any) -> None:
    """Write `content` as JSON, all of it or nothing."""
    with replace_file(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
