"""What lies in a folder, or in an archive, becomes raw splits: image folders, metadata, Parquet, saved datasets.

The names of files and classes never decide what is read: `test_tube` is a class, and `speed-test-1.png` an image.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import file_stamp, replace_folder
from ..serving.device.rgb import IMAGE_FORMATS

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
_SUFFIXES = {suffix: kind in IMAGE_FORMATS for suffix, kind in Image.registered_extensions().items()}
IMAGES = tuple(suffix for suffix, read in _SUFFIXES.items() if read)
# of other programs, or read by pillow with decoders that we do without; documents, films and data are no images
FOREIGN = {".heic", ".heif", ".avif", ".avifs", ".svg", ".svgz", ".jxl", ".exr", ".hdr", ".xcf", ".dcm"}
FOREIGN |= {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"}
FOREIGN |= {suffix for suffix, read in _SUFFIXES.items() if not read}
FOREIGN -= {".pdf", ".mpg", ".mpeg", ".h5", ".hdf"}


def require_datasets() -> Any:
    """The `datasets` library.

    Raises:
        ImportError: The extra `train` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('images are loaded with the datasets library: pip install "lgvit-hf[train]"') from error
    return datasets


def split_named(name: str) -> str | None:
    """The split that a word names, or `None`.

    Example:

        >>> split_named("val"), split_named("Train"), split_named("test_tube")
        ('validation', 'train', None)
    """
    return _SPLIT_OF.get(name.lower())


def name_of_split(where: str, names: Iterable[str], fix: str) -> dict[str, str]:
    """Which of some names names which split.

    Raises:
        ValueError: Two name the same split; `fix` ends its message.

    Example:

        >>> name_of_split("photos", ["val", "Train", "test_tube"], "rename one")
        {'validation': 'val', 'train': 'Train'}
    """
    found: dict[str, str] = {}
    for name in names:
        split = split_named(name)
        if split in found:
            raise ValueError(f"{where}: {found[split]} and {name} are the same split, {split}; {fix}")
        if split is not None:
            found[split] = name
    return found


def is_archive(name: str) -> bool:
    """Whether a file name is that of a ZIP or tar archive.

    Example:

        >>> is_archive("photos.TAR.gz"), is_archive("photos.gz")
        (True, False)
    """
    return name.lower().endswith(ARCHIVES)


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_path(path: str | Path, *, labelled: bool = True) -> dict[str, Any]:
    """The splits in a folder, a Parquet file or an archive, with whatever columns they have.

    Args:
        path (`str` or `Path`): See `docs/data.md`.
        labelled (`bool`, *optional*, defaults to `True`):
            Whether labels are needed; without, images may lie at any depth, and those of mixed depth have none.

    Raises:
        ImportError: The extra `train` is not installed.
        ValueError: Nothing there can be read, or more than one thing; names what was found and what would do.

    Example:

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("bus", "train"):
        ...         (Path(folder) / name).mkdir()
        ...         Image.new("RGB", (2, 2)).save(Path(folder) / name / "test 1.png")
        ...     splits = read_path(folder)
        >>> list(splits), splits["train"].features["label"].names
        (['train'], ['bus', 'train'])
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, str(path), labelled)
    if path.suffix.lower() == ".parquet":
        return {"train": _load("parquet", [path])}
    if is_archive(path.name):
        return _read_archive(path, labelled)
    raise ValueError(
        f"{path}: a file, but neither Parquet nor an archive ({', '.join(ARCHIVES)}); give the folder of images"
    )


def _read_folder(root: Path, where: str, labelled: bool, archives: bool = True) -> dict[str, Any]:
    if is_saved(root):
        return _read_saved(root)
    files = _files_in(root)
    of_kind: dict[str, list[str]] = {"image": [], "foreign": [], "parquet": [], "archive": [], "metadata": []}
    for file in files:
        of_kind.get(_kind(file) or "", []).append(file)
    if not of_kind["image"]:
        # Parquet of that name is a dataset where there are no images that it could describe
        of_kind["parquet"] += [file for file in of_kind["metadata"] if file.endswith(".parquet")]
    found = {kind: of_kind[kind] for kind in ("image", "parquet", "archive") if of_kind[kind]}
    if len(found) > 1:
        examples = " and ".join(f"{kind} files ({names[0]})" for kind, names in found.items())
        raise ValueError(f"{where}: {examples} lie there; give the folder or the file of one kind")
    if "parquet" in found:
        return _read_parquet(root, where, found["parquet"])
    if "archive" in found and archives:
        return _read_archives(root, where, found["archive"], labelled)
    if of_kind["foreign"]:
        raise ValueError(
            f"{where}: {of_kind['foreign'][0]} is of a format that is not read; save it, and others like it "
            f"({len(of_kind['foreign'])} in all), as PNG or JPEG, or take it away (read are "
            f"{', '.join(IMAGE_FORMATS)})"
        )
    if "image" in found:
        if of_kind["metadata"]:
            return _read_metadata(root, where, found["image"], of_kind["metadata"])
        return _read_images(root, where, found["image"], labelled)
    there = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "") if files else "no files"
    raise ValueError(
        f"{where}: no images there; found: {there}. Images in a folder for each class, Parquet files, archives of "
        "either, or what save_to_disk wrote would do"
    )


def _files_in(root: str | Path, parents: tuple[str, ...] = ()) -> list[str]:
    """Files below a folder, sorted, by their path from there; without hidden ones and links in circles."""
    real, found = os.path.realpath(root), []
    if real in parents:
        return []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                found += [f"{entry.name}/{file}" for file in _files_in(entry.path, (*parents, real))]
            else:
                found.append(entry.name)
    return sorted(found)


def _kind(file: str) -> str | None:
    name = file.rsplit("/", 1)[-1]
    suffix = os.path.splitext(name)[1].lower()
    if name in METADATA:
        return "metadata"
    if is_archive(name):
        return "archive"
    if suffix == ".parquet":
        return "parquet"
    return "image" if suffix in IMAGES else "foreign" if suffix in FOREIGN else None


# -- images in folders -----------------------------------------------------------------------------------------


def _read_images(root: Path, where: str, files: list[str], labelled: bool) -> dict[str, Any]:
    root, files = _unwrapped(root, files)
    splits = _by_split_folder(root, where, files) or {"train": (root, files)}
    depths = {split: {name.count("/") for name in names} for split, (_, names) in splits.items()}
    for split, (folder, names) in splits.items():
        # each image in the folder of its class, or all in one
        if labelled and depths[split] not in ({0}, {1}):
            odd = (folder / next(name for name in names if name.count("/") != 1)).relative_to(root).as_posix()
            raise ValueError(
                f"{where}: {odd} does not lie in the folder of a class, as CLASS/image.png or train/CLASS/image.png "
                "does; move it, and others like it, or give the folder that holds the classes"
            )
    in_classes = [split for split, found in depths.items() if found == {1}]
    if len({name.split("/")[0] for split in in_classes for name in splits[split][1]}) < 2:
        in_classes = []
    return {split: _dataset(folder, names, split in in_classes) for split, (folder, names) in splits.items()}


def _unwrapped(root: Path, files: list[str]) -> tuple[Path, list[str]]:
    """Without folders that hold one folder alone, as `photos/` in `photos.zip`."""
    while True:
        parts = [file.split("/", 2) for file in files]
        first = parts[0][0]
        if split_named(first) or not all(len(part) == 3 and part[0] == first for part in parts):
            return root, files
        root, files = root / first, [file.split("/", 1)[1] for file in files]


def _by_split_folder(root: Path, where: str, files: Iterable[str]) -> dict[str, tuple[Path, list[str]]] | None:
    """Each split's folder and the files in it, where every folder of the first level is named as a split is."""
    inside: dict[str, list[str]] = {}
    for file in files:
        first, _, rest = file.partition("/")
        inside.setdefault(first if rest else "", []).append(rest)
    if not all(map(split_named, inside)):
        return None
    splits = name_of_split(where, inside, "put them in one folder")
    return {split: (root / first, inside[first]) for split, first in splits.items()}


def _dataset(folder: Path, names: list[str], has_labels: bool) -> Any:
    datasets = require_datasets()
    columns: dict[str, list[Any]] = {"image": [str(folder / name) for name in names]}
    features = {"image": datasets.Image()}
    if has_labels:
        labels = [name.split("/")[0] for name in names]
        features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
        columns["label"] = features["label"].str2int(labels)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _read_metadata(root: Path, where: str, files: list[str], metadata: list[str]) -> dict[str, Any]:
    """Images with a `metadata.csv` or so, which `datasets` reads; each image must be in it."""
    root, inner = _unwrapped(root, [*files, *metadata])
    files, metadata = inner[: len(files)], inner[len(files) :]
    groups = _by_split_folder(root, where, files)
    if groups is not None and all("/" in file for file in metadata):
        return {split: _described(folder, where, names) for split, (folder, names) in groups.items()}
    whole = _described(root, where, files)
    if groups is None:
        return {"train": whole}
    split_of = {os.path.realpath(folder / name): split for split, (folder, names) in groups.items() for name in names}
    splits = [split_of[os.path.realpath(path)] for path in _paths(whole)]
    return {split: whole.select([i for i, s in enumerate(splits) if s == split]).flatten_indices() for split in groups}


def _described(folder: Path, where: str, files: list[str]) -> Any:
    try:
        dataset = _load("imagefolder", [f"{glob.escape(str(folder))}/**"], escape=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
    described = {os.path.realpath(path) for path in _paths(dataset)}
    for file in files:
        if os.path.realpath(folder / file) not in described:
            raise ValueError(f"{where}: {file} is not in the metadata; add its row, or take it away")
    return dataset


def _paths(dataset: Any) -> list[str]:
    datasets = require_datasets()
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    plain = dataset.select_columns(images[:1]).cast_column(images[0], datasets.Image(decode=False))
    return [image["path"] for image in plain[images[0]] if image is not None]


# -- Parquet and what `save_to_disk` wrote ---------------------------------------------------------------------


def _read_saved(root: Path) -> dict[str, Any]:
    try:
        loaded = require_datasets().load_from_disk(str(root))
    # a damaged one raises errors of many kinds, of Arrow and of JSON
    except Exception as error:
        raise ValueError(f"{root}: no dataset that save_to_disk wrote can be read there: {error}") from error
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    # the format is saved with it
    return {name: dataset.with_format(None) for name, dataset in splits.items()}


def _read_parquet(root: Path, where: str, files: list[str]) -> dict[str, Any]:
    configurations = grouped(files)
    if len(configurations) > 1:
        found = ", ".join(name or "in the folder itself" for name in configurations)
        folder = next((name for name in configurations if name and (root / name).is_dir()), None)
        fix = f"give one of them, as {root / folder}" if folder else "put each in a folder of its own"
        raise ValueError(f"{where}: several configurations lie there: {found}; {fix}")
    splits = next(iter(configurations.values()))
    return {split: _load("parquet", [root / file for file in shards]) for split, shards in splits.items()}


def grouped(files: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Files of the Hub's layouts by configuration and split; a file or its folder is named after its split.

    Example:

        >>> grouped(["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test.parquet"])
        {'data': {'train': ['data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet'],
                  'test': ['data/test.parquet']}}
        >>> grouped(["default/train/0000.parquet", "other/cifar10-test-0.parquet"])
        {'default': {'train': ['default/train/0000.parquet']},
         'other/cifar10': {'test': ['other/cifar10-test-0.parquet']}}
    """
    found: dict[str, dict[str, list[str]]] = {}
    for file in files:
        *folders, name = file.split("/")
        rest, split = _ending(_stem(name))
        if split is None and folders and _ending(folders[-1])[1]:
            # names of shards in a folder per split do not name it
            rest, split = _ending(folders.pop())
        if split is None:
            rest, split = "", _stem(name) or "train"
        configuration = "/".join([*folders, *([rest] if rest else [])])
        found.setdefault(configuration, {}).setdefault(split, []).append(file)
    return found


def _stem(name: str) -> str:
    """A file's name without suffix and number of its shard."""
    stem = name.split(".tar")[0] if ".tar" in name else os.path.splitext(name)[0]
    return re.sub(r"(^|[-_.])\d+([-_.]of[-_.]\d+.*)?$", "", stem)


def _ending(name: str) -> tuple[str, str | None]:
    """`cifar10-train` as `("cifar10", "train")`; with `None` where the last word names no split."""
    last = re.split(r"[-_.]", name)[-1]
    return (name[: -len(last) - 1], last.lower()) if split_named(last) else (name, None)


def _load(builder: str, files: list[Any], escape: bool = True) -> Any:
    """All samples of some files; what `datasets` would make of the names of splits does not matter here."""
    datasets = require_datasets()
    names = [glob.escape(str(file)) if escape else file for file in files]
    try:
        return datasets.load_dataset(builder, data_files={"train": names}, split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:500]
        raise ValueError(f"{files[0]} cannot be read as {builder}, or not with the others: {reason}") from error


# -- archives --------------------------------------------------------------------------------------------------


def _read_archives(root: Path, where: str, files: list[str], labelled: bool) -> dict[str, Any]:
    configurations = grouped(files)
    splits = next(iter(configurations.values()))
    if len(files) == 1:
        only = _read_archive(root / files[0], labelled)
        name = next(iter(splits))
        return {name: only["train"]} if list(only) == ["train"] and split_named(name) else only
    if len(configurations) > 1 or not all(map(split_named, splits) if len(splits) > 1 else [True]):
        raise ValueError(
            f"{where}: archives {files[0]}, {files[1]}, ... are not named after splits (train.zip, test.zip, "
            "train-0000.tar); give one, or unpack them into a folder for each class"
        )
    return {split: _read_shards(where, [root / file for file in shards], labelled) for split, shards in splits.items()}


def _read_shards(where: str, archives: list[Path], labelled: bool) -> Any:
    if all(map(_is_webdataset, archives)):
        return _load("webdataset", archives)
    if len(archives) > 1:
        raise ValueError(f"{where}: {archives[0].name}, {archives[1].name}, ...: unpack them into one folder")
    inside = _read_archive(archives[0], labelled)
    if list(inside) != ["train"]:
        raise ValueError(f"{archives[0]}: splits {', '.join(inside)} in an archive that is one of several; unpack it")
    return inside["train"]


def _read_archive(archive: Path, labelled: bool) -> dict[str, Any]:
    if _is_webdataset(archive):
        return {"train": _load("webdataset", [archive])}
    return _read_folder(_unpacked(archive), str(archive), labelled, archives=False)


def _is_webdataset(archive: Path) -> bool:
    """Whether an image and what is known of it stand side by side in a tar, as `0.jpg` and `0.cls`."""
    if archive.suffix.lower() == ".zip":
        return False
    try:
        with tarfile.open(archive) as tar:
            names = (member.name for member in itertools.islice(tar, 1000) if member.isfile())
            shown = (name for name in names if not os.path.basename(name).startswith("."))
            # a file's name up to its first dot is that of its sample
            files = ((re.sub(r"\.[^/]*$", "", name), _kind(name) == "image") for name in shown)
            return any(one[0] == two[0] and one[1] != two[1] for one, two in itertools.pairwise(files))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{archive} is no archive that can be read: {error}") from error


def _unpacked(archive: Path) -> Path:
    """Where the files of an archive lie, in the cache of `datasets`; unpacked once, and anew when it changes."""
    stamp = f"{archive.resolve()} {file_stamp(archive)}"
    cache = Path(require_datasets().config.HF_DATASETS_CACHE) / "lgvit"
    folder = cache / hashlib.sha256(os.fsencode(stamp)).hexdigest()[:32]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with replace_folder(folder) as unfinished:
                _unpack(archive, unfinished)
        # RuntimeError: of a password, or a compression that Python does not know
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:
            raise ValueError(f"{archive} is no archive that can be read: {error}") from error
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            # files outside of it are refused, as are devices
            opened.extractall(folder, filter="data")
