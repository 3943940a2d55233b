"""What `lgvit predict` is to answer: image files, or the images of a dataset; found, numbered, known again."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..data.datasets import load_encoded
from ..data.folders import is_archive, is_saved
from ..files import file_stamp
from .device.rgb import IMAGE_FORMATS

if TYPE_CHECKING:
    import datasets

Source = tuple[str, str | bytes | None]  # path, and the file or what it holds; `None` where a dataset has no image


@dataclass(frozen=True)
class Files:
    """Image files, in order."""

    files: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Source:
        return self.files[number], self.files[number]

    def digest(self) -> str:
        """By which other images are known: names, sizes and times of change."""
        stamps = (os.fsencode(file) + b"\0" + file_stamp(file).encode() for file in self.files)
        return hashlib.sha256(b"\0".join(stamps)).hexdigest()


@dataclass(frozen=True)
class StoredImages:
    """The images of one split of a dataset."""

    source: str
    split: str | None
    dataset: datasets.Dataset

    def __reduce__(self) -> tuple[Any, ...]:
        # opened anew where it is read, which may be another machine
        return open_stored, (self.source, self.split)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Source:
        image = self.dataset[number]["image"] or {}
        path, encoded = image.get("path"), image.get("bytes")
        if encoded is None and path is not None:
            return path, path
        return f"{self.split}/{number}" if self.split else str(number), encoded

    def digest(self) -> str:
        """By which other images are known."""
        place = Path(self.source)
        files = sorted(map(str, place.rglob("*"))) if place.is_dir() else [self.source] if place.exists() else []
        # of what is not on this disk, `datasets` knows which version it holds
        known = Files(files).digest() if files else self.dataset._fingerprint
        return f"{len(self)} images of {self.source}, {self.split}: {known}"


Images = Files | StoredImages


def open_stored(source: str, split: str | None) -> StoredImages:
    """The images of a dataset, see `load_encoded`."""
    return StoredImages(source, split, load_encoded(source, split))


def find_images(paths: Sequence[str], split: str | None) -> Images:
    """The images that the arguments of `lgvit predict` stand for, see `run_predict`.

    Raises:
        ValueError: There are none; a split of what has none.
    """
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    if len(paths) == 1 and _is_dataset(paths[0], known):
        return open_stored(paths[0], split)
    if split is not None:
        raise ValueError(f"--split {split} goes with a dataset, not with files or folders")
    files = dict.fromkeys(file for path in paths for file in _files_of(path, known))
    return Files(list(files))


def _is_dataset(path: str, known: set[str]) -> bool:
    """Whether this is no image file: Parquet, an archive, a saved dataset, or written as the name of a Hub set."""
    place = Path(path)
    if place.is_dir():
        # beside images it may be predictions of them
        return (is_saved(place) or any(place.rglob("*.parquet"))) and not any(_walk(path, known))
    if place.exists() or is_archive(path) or place.suffix.lower() in {".parquet", *known}:
        return place.exists() and (place.suffix == ".parquet" or is_archive(path))
    return not (glob.has_magic(path) or path.startswith((".", "/", "~")) or path.count("/") > 1)


def _files_of(path: str, known: set[str]) -> list[str]:
    """The files that one argument stands for; an image of any suffix may be named itself."""
    place = Path(path)
    if place.is_dir():
        files, problem = sorted(_walk(path, known)), ": no images in this folder"
    elif place.exists():
        dataset = place.suffix == ".parquet" or is_archive(path)
        files, problem = [] if dataset else [path], " is a dataset; give it alone"
    elif glob.has_magic(path):
        files, problem = sorted(filter(os.path.isfile, glob.glob(path, recursive=True))), ": no file matches"
    else:
        files, problem = [], ": no such file or folder"
    if not files:
        raise ValueError(f"{path}{problem}")
    return files


def _walk(folder: str, known: set[str]) -> Iterator[str]:
    """Images of a folder and all its subfolders, links followed once; hidden files and pipes are no images.

    A folder that cannot be read stands among them, and its row says why.
    """
    seen, unreadable = set[str](), list[OSError]()
    for place, folders, files in os.walk(folder, onerror=unreadable.append, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in files if Path(name).suffix.lower() in known and not name.startswith("."))
        paths = (os.path.join(place, name) for name in images)
        # a link to nothing is one that cannot be read; what exists and is no file would be waited for
        yield from (path for path in paths if os.path.isfile(path) or not os.path.exists(path))
    yield from (str(error.filename) for error in unreadable)
