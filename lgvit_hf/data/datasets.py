"""The name of a dataset becomes its images, labels and splits."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..serving.device.rgb import IMAGE_FORMATS
from .folders import SPLITS, is_archive, name_of_split, read_path, require_datasets, split_named

if TYPE_CHECKING:
    import datasets

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "cls")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSplits:
    """Three splits with columns `image` and `label`, and the names of the classes.

    `validation` is for choices (thresholds, early stopping), `test` for what is reported.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    label_names: list[str]


def load_images(
    source: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_share: float = 0.15,
    seed: int = 0,
) -> ImageSplits:
    """Load images and labels; nothing is decoded yet.

    Args:
        source (`str`):
            `"digits"` (scikit-learn's 1,797 handwritten digits, no network), the id of a dataset on the Hub, or a
            folder, Parquet file or archive here: `docs/data.md` lists what is read. A single split of any name is the
            training split.
        image_column (`str`, *optional*): Where the images are; by default `image`, `img` or any column of images.
        label_column (`str`, *optional*):
            Where the labels are; by default `label`, `labels`, `fine_label` or any column of classes.
        validation_share (`float`, *optional*, defaults to 0.15):
            Share of the training samples that becomes the validation split where the source has no split to spare, and
            of the remaining ones that becomes the test split where it has neither. A split whose labels are hidden
            (all of them -1, or none at all) counts as missing.
        seed (`int`, *optional*, defaults to 0): Decides which samples.

    Raises:
        ImportError: The extra `train` is not installed.
        ValueError:
            No images, no labels, no training split or no such column there; images that would be left out, such as
            one that lies beside the folders of classes; a sample without an image or a label.

    Example:

        >>> splits = load_images("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test), splits.label_names[:3]
        (1221, 216, 360, ['0', '1', '2'])
    """
    raw, found = _load_raw(source, seed), {}
    for split, name in _split_names(source, raw).items():
        where = f"{source} ({name})"
        needed = split == "train" or label_column is not None
        dataset = _with_plain_columns(raw[name], where, needed, image_column, label_column)
        if has_labels(dataset):
            refuse_missing(dataset, where)
            found[split] = dataset
        elif split != "train":
            logger.warning("%s has no labels: it counts as missing", where)
    if "train" not in found:
        raise ValueError(f"{source}: no split called 'train' that has labels; splits there: {', '.join(raw)}")
    label_names = _names_of(found["train"])
    if len(label_names) < 2:
        raise ValueError(f"{source}: {len(label_names)} class(es) found ({label_names}); at least two are needed")
    found = {split: _with_labels(dataset, label_names, f"{source} ({split})") for split, dataset in found.items()}

    # the split that others report on is the test; whatever is missing is taken from the training samples
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    for split in ("test", "validation"):
        if split not in found:
            found["train"], found[split] = _hold_out(found["train"], validation_share, seed, source)
    return ImageSplits(**found, label_names=label_names)


def load_unlabelled(source: str, *, limit: int | None = None, seed: int = 0) -> datasets.Dataset:
    """Load images for which labels are welcome but not needed.

    Args:
        source (`str`):
            As for [`load_images`]; a folder of images need not have a folder per class, and its images may lie at any
            depth. Of several splits the training split is taken.
        limit (`int`, *optional*): Take at most this many samples, drawn at random, in the order of the source.
        seed (`int`, *optional*, defaults to 0): Decides which samples.

    Returns:
        `datasets.Dataset`: With a column `image` and, where the source has labels, a column `label`.

    Raises:
        ImportError: The extra `train` is not installed.
        ValueError: No images there, several splits and none for training, a file that is no image, a missing image.

    Example:

        >>> images = load_unlabelled("digits", limit=20)
        >>> len(images), class_names(images)[:3]
        (20, ['0', '1', '2'])
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all samples")
    raw = _load_raw(source, seed, labelled=False)
    dataset, where = _one_split(source, raw, None if len(raw) == 1 else "train")
    refuse_missing(dataset, where, ["image"])
    if has_labels(dataset) and first_missing(dataset, "label") is None:
        dataset = _with_labels(dataset, _names_of(dataset), where)
    else:
        dataset = dataset.select_columns("image")
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(sorted(np.random.default_rng(seed).permutation(len(dataset))[:limit]))
    if Path(source).is_dir():
        refuse_broken(dataset)
    return dataset


def load_encoded(source: str, split: str | None = None) -> datasets.Dataset:
    """Images of one split of a dataset, in its order, as they are stored: nothing is decoded, labels are not needed.

    Args:
        source (`str`): See [`load_images`]; no samples are held out.
        split (`str`, *optional*): By its name in the source; may be left out where there is only one.

    Returns:
        `datasets.Dataset`: Whose column `image` is a dict of `bytes` and `path`, one of which may be `None`.

    Raises:
        ImportError: The extra `train` is not installed.
        ValueError: No images there, no such split, or several and none was named.

    Example:

        >>> len(load_encoded("digits", "test"))
        360
    """
    images, _ = _one_split(source, _load_raw(source, seed=0, labelled=False), split)
    return _undecoded(images)


def _one_split(source: str, raw: Any, split: str | None) -> tuple[Any, str]:
    """The images of a split, by any of its names, or of the only one, and what errors call it."""
    names = list(raw) if split is None else [name for name in SPLITS.get(split, (split,)) if name in raw][:1]
    if len(names) != 1:
        which = "one of its splits must be named" if split is None else f"no split called {split!r}"
        raise ValueError(f"{source}: {which}; splits there: {', '.join(raw)}")
    where = f"{source} ({names[0]})"
    return _with_plain_columns(raw[names[0]], where, labelled=False), where


def _undecoded(dataset: Any) -> Any:
    """The images alone, as they are stored."""
    return dataset.select_columns("image").cast_column("image", require_datasets().Image(decode=False))


def class_names(dataset: datasets.Dataset) -> list[str] | None:
    """What the numbers in the column `label` stand for, or `None` where there are no labels.

    Example:

        >>> class_names(load_unlabelled("digits").select_columns("image")) is None
        True
    """
    feature = dataset.features.get("label")
    return list(feature.names) if hasattr(feature, "names") else None


def _load_raw(source: str, seed: int, labelled: bool = True) -> Any:
    """The splits by name, with whatever columns they have."""
    source = str(source)
    if source == "digits":
        return _load_digits(seed)
    path = Path(source).expanduser()
    if path.exists():
        return read_path(path, labelled=labelled)
    is_file = path.suffix.lower() == ".parquet" or is_archive(source)
    if is_file or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source}: no such folder, Parquet file or archive")
    try:
        return require_datasets().load_dataset(source)
    except OSError as error:
        raise OSError(f"{source}: no such folder or file here, and as a dataset of the Hub: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{source}, as a dataset of the Hub: {error}\nOne that load_dataset reads with other arguments can be "
            "kept with save_to_disk(FOLDER); give that folder"
        ) from error


def _split_names(source: str, raw: Any) -> dict[str, str]:
    """What the training, validation and test splits are called there; one split alone is for training."""
    if len(raw) == 1 and split_named(next(iter(raw))) is None:
        return {"train": next(iter(raw))}
    return name_of_split(source, raw, "make one of them")


def _load_digits(seed: int) -> dict[str, Any]:
    datasets = require_datasets()
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    classes = datasets.ClassLabel(names=list(map(str, digits.target_names)))
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    train, test = _hold_out(whole, 0.2, seed, "digits")
    return {"train": train, "test": test}


def _hold_out(dataset: Any, share: float, seed: int, source: str) -> tuple[Any, Any]:
    per_class = Counter(dataset["label"][:])
    # every class on both sides, where there are enough samples for that
    enough = len(dataset) * min(share, 1 - share) >= len(per_class) and min(per_class.values()) >= 2
    # as the splitting library rounds
    held_out = math.ceil(share * len(dataset))
    if not 0 < share < 1 or not 0 < held_out < len(dataset):
        raise ValueError(
            f"{source}: validation_share {share:g} of {len(dataset)} training samples leaves none to train on or "
            "none to hold out; give more images, or another share between 0 and 1"
        )
    parts = dataset.train_test_split(test_size=share, seed=seed, stratify_by_column="label" if enough else None)
    return parts["train"], parts["test"]


def _with_plain_columns(
    dataset: Any, where: str, labelled: bool, image_column: str | None = None, label_column: str | None = None
) -> Any:
    """The dataset with its image and label columns alone, called `image` and `label`."""
    features = dataset.features
    image, label = find_columns(features, image_column, label_column)
    for column, asked, kind in ((image, image_column, "images"), (label, label_column, "labels")):
        if column is None and (kind == "images" or labelled):
            missing = f"no column of {kind}" if asked is None else f"{asked!r} is no column of {kind}"
            hint = "; a folder for each class, or a metadata.csv, gives labels" if set(features) == {"image"} else ""
            raise ValueError(f"{where}: {missing}; columns: {dict(features)}{hint}")
    return with_columns(dataset, image, label)  # type: ignore[arg-type]  # there is one, or it was refused


def find_columns(
    features: Mapping[str, Any], image_column: str | None = None, label_column: str | None = None
) -> tuple[str | None, str | None]:
    """The columns of images and of labels; `None` where there is none.

    Args:
        features (`Mapping`): Of the dataset.
        image_column (`str`, *optional*): The one that is meant.
        label_column (`str`, *optional*): The one that is meant.

    Example:

        >>> import datasets
        >>> find_columns({"img": datasets.Image(), "fine_label": datasets.ClassLabel(2), "id": datasets.Value("int8")})
        ('img', 'fine_label')
    """
    datasets = require_datasets()
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    stored = [name for name, feature in features.items() if _holds_files(feature)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in LABEL_NAMES if isinstance(features.get(name), (datasets.ClassLabel, datasets.Value))]
    likely = images or [name for name in stored if name in IMAGE_NAMES or len(stored) == 1]
    image = _choose(image_column, [*images, *stored], [*(name for name in IMAGE_NAMES if name in likely), *likely])
    return image, _choose(label_column, features.keys() - {*images, *stored}, [*named, *classes])


def _holds_files(feature: Any) -> bool:
    """Whether a column may hold encoded images that nothing calls images, as Parquet of other programs does."""
    if isinstance(feature, dict):
        return "bytes" in feature and feature.keys() <= {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def with_columns(dataset: Any, image: str, label: str | None) -> Any:
    """The dataset with these columns alone, called `image` and `label`, and the first one of images."""
    datasets = require_datasets()
    columns = {image: "image"} if label is None else {image: "image", label: "label"}
    dataset = dataset.select_columns(list(columns))
    if not isinstance(dataset.features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image())
    return dataset.rename_columns({old: new for old, new in columns.items() if old != new})


def first_missing(dataset: Any, column: str) -> int | None:
    """The first sample without an image or a label, as Arrow stores it: no image is read."""
    import pyarrow.compute as compute

    datasets = require_datasets()
    feature = dataset.features[column]
    values = dataset.data.column(column)
    if isinstance(feature, datasets.Image):
        missing = compute.and_(*(compute.is_null(compute.struct_field(values, part)) for part in ("bytes", "path")))
    else:
        missing = compute.is_null(values, nan_is_null=True)
    if isinstance(feature, datasets.ClassLabel):
        missing = compute.or_(missing, compute.fill_null(compute.equal(values, -1), True))
    if dataset._indices is not None:
        # the samples of a selection, without copying their images
        missing = missing.take(dataset._indices.column(0))
    index = compute.index(missing, True).as_py()
    return None if index < 0 else index


def refuse_missing(dataset: Any, where: str, columns: Sequence[str] = ("image", "label")) -> None:
    """Raise `ValueError` for the first sample without an image or a label.

    Args:
        dataset (`datasets.Dataset`): With a column `image`, and perhaps `label`.
        where (`str`): What the error names.
        columns (`Sequence[str]`, *optional*, defaults to both): Which must be there.
    """
    for column in columns:
        index = first_missing(dataset, column) if column in dataset.features else None
        if index is not None:
            raise ValueError(f"{where}: sample {index} (from 0) has no {column}; leave it out, as dataset.filter does")


def _choose(asked: str | None, possible: Iterable[str], likely: list[str]) -> str | None:
    return next((name for name in (likely if asked is None else [asked]) if name in possible), None)


def has_labels(dataset: Any) -> bool:
    """Whether there is a column `label` with more in it than hidden labels, which are -1 or nothing."""
    return "label" in dataset.features and any(label not in (-1, None) for label in dataset["label"][:])


def _names_of(dataset: Any) -> list[str]:
    return class_names(dataset) or [str(label) for label in sorted(set(dataset["label"][:]))]


def _with_labels(dataset: Any, names: list[str], where: str) -> Any:
    """The dataset with its classes numbered as in `names`, those of the training split."""
    own = class_names(dataset)
    if own == names:
        return dataset
    labels = [str(label) if own is None else own[label] for label in dataset["label"][:]]
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise ValueError(f"{where}: class {unknown[0]!r} is not one of the training split's: {', '.join(names)}")
    classes = require_datasets().ClassLabel(names=names)
    return dataset.remove_columns("label").add_column("label", classes.str2int(labels)).cast_column("label", classes)


def refuse_broken(dataset: Any) -> None:
    """Raise for the first image that cannot be read, by its header and checksums."""
    for index, image in enumerate(_undecoded(dataset)["image"]):
        path, content = image["path"], image["bytes"]
        try:
            with Image.open(path if content is None else BytesIO(content), formats=IMAGE_FORMATS) as opened:
                opened.verify()
        # PIL raises OSError, SyntaxError, ValueError, struct.error, zlib.error ... for what it cannot read
        except Exception as error:
            raise ValueError(f"{path or f'sample {index}'} is no readable image: {error}") from error
