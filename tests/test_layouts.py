"""Every layout of images and labels that `docs/data.md` lists, and what is refused because images would be lost."""

import csv
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lgvit_hf.data.datasets import load_encoded, load_images, load_unlabelled
from tests.seeds import rng

datasets = pytest.importorskip("datasets", reason='the datasets library comes with "lgvit-hf[train]"')
pytestmark = pytest.mark.version_independent
PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(names=["cat", "dog"])
ROWS = 12  # of each class in each split


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path_factory.mktemp("extracted")))


def picture(label, number, split=0):
    """Red says the class, green which one, blue the split."""
    return Image.new("RGB", (3, 2), (50 * label + 50, number, split))


def content(*colour):
    file = io.BytesIO()
    picture(*colour).save(file, "PNG")
    return file.getvalue()


def write_classes(root, names=("cat", "dog"), split=0, files="{}.png"):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(ROWS):
            picture(label, number, split).save(root / name / files.format(number))
    return root


def write_flat(root, split=0):
    """Images beside each other; their labels by name."""
    root.mkdir(parents=True, exist_ok=True)
    labels = {f"{number}.png": number % 2 for number in range(2 * ROWS)}
    for name, label in labels.items():
        picture(label, int(name[:-4]) // 2, split).save(root / name)
    return labels


def write_metadata(root, labels, kind="csv"):
    rows = [{"file_name": name, "label": ("cat", "dog")[label]} for name, label in labels.items()]
    with (root / f"metadata.{kind}").open("w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["file_name", "label"])
            writer.writeheader()
            writer.writerows(rows)


def rows(split=0):
    labels = [number % 2 for number in range(2 * ROWS)]
    images = [picture(label, number // 2, split) for number, label in enumerate(labels)]
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels}, features=datasets.Features({"image": IMAGE, "label": CLASSES})
    )


def write_parquet(file, split=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows(split).to_parquet(file)


def write_foreign_parquet(file, split=0, struct=False):
    """As pandas would, without a word of what the columns mean."""
    import pyarrow
    from pyarrow import parquet

    labels = [number % 2 for number in range(2 * ROWS)]
    images = [content(label, number // 2, split) for number, label in enumerate(labels)]
    images = [{"bytes": image, "path": None} for image in images] if struct else images
    names = [("cat", "dog")[label] for label in labels]
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": images, "label": names}), file)


def write_webdataset(file, split=0, labelled=True):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in range(2 * ROWS):
            parts = {"jpg": content(number % 2, number // 2, split)}
            for suffix, held in (parts | ({"cls": b"%d" % (number % 2)} if labelled else {})).items():
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))


def classes_and_splits(root, splits=("train", "val")):
    for number, split in enumerate(splits):
        write_classes(root / split, split=number)


def hidden_test(root):
    write_classes(root / "train")
    write_flat(root / "test", split=1)


def metadata_by_split(root):
    for number, split in enumerate(("train", "test")):
        write_metadata(root / split, write_flat(root / split, number))


def metadata_of_all(root):
    labels = {split: write_flat(root / split, number) for number, split in enumerate(("train", "test"))}
    write_metadata(root, {f"{split}/{name}": labels[split][name] for split in labels for name in labels[split]})


def archive_of_classes(file):
    folder = write_classes(file.parent / "unpacked" / "pets")
    (folder.parent / "__MACOSX" / "cat").mkdir(parents=True)
    (folder.parent / "__MACOSX" / "cat" / "._1.png").write_bytes(b"no image")
    shutil.make_archive(str(file.with_suffix("")), "zip", folder.parent)


def archives_by_split(root):
    for number, split in enumerate(("train", "test")):
        folder = write_classes(root.parent / f"unpacked_{split}", split=number)
        shutil.make_archive(str(root / split), "zip", folder)


def by_split(write, *names):
    def both(root):
        for number, name in enumerate(names):
            write(root / name, number)

    return both


# WebDataset knows its classes by number
tars = by_split(write_webdataset, "train-0000.tar", "test-0000.tar")
NUMBERED = (write_webdataset, tars)
# in the order of the page: what is written, whether there is a second split, and what is given
LAYOUTS = [
    (write_classes, False, "pets"),
    (classes_and_splits, True, "pets"),
    (lambda root: write_classes(root / "images"), False, "pets"),
    (hidden_test, False, "pets"),
    (lambda root: write_metadata(root, write_flat(root), "jsonl"), False, "pets"),
    (metadata_by_split, True, "pets"),
    (metadata_of_all, True, "pets"),
    (archive_of_classes, False, "pets.zip"),
    (archives_by_split, True, "pets"),
    (write_webdataset, False, "pets.tar"),
    (tars, True, "pets"),
    (write_parquet, False, "pets.parquet"),
    (by_split(write_parquet, "train.parquet", "test.parquet"), True, "pets"),
    (
        by_split(write_parquet, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001-a09b.parquet"),
        True,
        "pets",
    ),
    (by_split(write_parquet, "default/train/0000.parquet", "default/test/0000.parquet"), True, "pets"),
    (
        by_split(write_parquet, "plain_text/train-00000-of-00001.parquet", "other/train-00000-of-00001.parquet"),
        False,
        "pets/plain_text",
    ),
    (by_split(write_foreign_parquet, "train.parquet", "test.parquet"), True, "pets"),
    (lambda root: rows().save_to_disk(root), False, "pets"),
    (lambda root: datasets.DatasetDict(train=rows(), test=rows(1)).save_to_disk(root), True, "pets"),
    (lambda root: write_flat(root / "2019" / "may"), False, "photos"),
]
LINES = re.findall(r"^\| (?!what lies there)([^|-].*?) \| `(.*?)` \|$", PAGE.read_text(), flags=re.M)


def test_the_page_has_these_layouts():
    assert len(LINES) == len(LAYOUTS)
    assert [re.search(r'"(.*?)"', call)[1] for _, call in LINES] == [given for *_, given in LAYOUTS]


def colours(dataset):
    return sorted(image.getpixel((0, 0)) for image in dataset["image"])


def written(split=0):
    return sorted((50 * label + 50, number, split) for label in range(2) for number in range(ROWS))


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[line for line, _ in LINES])
def test_a_layout_is_read_whole(tmp_path, number, monkeypatch):
    write, has_second, given = LAYOUTS[number]
    write(tmp_path / given.split("/")[0])
    monkeypatch.chdir(tmp_path)
    if LINES[number][1].startswith("load_unlabelled"):
        images = load_unlabelled(given)
        assert colours(images) == written() and images.column_names == ["image"]
        return
    splits = load_images(given)
    train = datasets.concatenate_datasets([splits.train, splits.validation])
    if has_second:
        assert colours(train) == written(0) and colours(splits.test) == written(1)
    else:
        assert colours(datasets.concatenate_datasets([train, splits.test])) == written()
    assert splits.label_names == (["0", "1"] if write in NUMBERED else ["cat", "dog"])
    for split in (splits.train, splits.validation, splits.test):
        for image, label in zip(split["image"], split["label"][:], strict=True):
            assert image.getpixel((0, 0))[0] == 50 * label + 50, "the label is that of the image"
    assert len(load_unlabelled(given)) >= 2 * ROWS


# -- words in names decide nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("beaker", "test_tube"),
        ("museum", "train station"),
        ("bus", "train"),
        ("dev board", "validation"),
        ("Test", "[a]"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("files", ["{}.png", "speed-test-{}.png", "a[{}]?.PNG", "train-0000{}.png"])
def test_words_in_names_make_no_split(tmp_path, names, files):
    folder = write_classes(tmp_path / "val [1]", names, files=files)
    splits = load_images(str(folder))
    assert splits.label_names == sorted(names)
    assert (
        len(splits.train) + len(splits.validation) + len(splits.test) == 2 * ROWS == len(load_unlabelled(str(folder)))
    )


def test_files_of_words_in_metadata(tmp_path):
    labels = {f"test-{name}": label for name, label in write_flat(tmp_path).items()}
    for name in labels:
        (tmp_path / name.removeprefix("test-")).rename(tmp_path / name)
    write_metadata(tmp_path, labels)
    splits = load_images(str(tmp_path))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 2 * ROWS


@pytest.mark.parametrize("name", ["train-0[1].parquet", "photos.parquet", "0000.parquet", "cifar10-train.parquet"])
def test_one_parquet_file_is_the_training_split(tmp_path, name):
    write_parquet(tmp_path / name)
    splits = load_images(str(tmp_path))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 2 * ROWS


def test_struct_of_bytes_in_parquet(tmp_path):
    write_foreign_parquet(tmp_path / "train.parquet", struct=True)
    splits = load_images(str(tmp_path))
    assert splits.label_names == ["cat", "dog"] and splits.train[0]["image"].size == (3, 2)
    assert load_encoded(str(tmp_path))[0]["image"]["bytes"] == content(0, 0)


def test_a_saved_format_is_laid_off(tmp_path):
    rows().with_format("numpy").save_to_disk(tmp_path / "saved")
    assert isinstance(load_images(str(tmp_path / "saved")).train[0]["image"], Image.Image)


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    for names in (("a", "b"), ("a", "b", "c")):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        shutil.make_archive(str(tmp_path / "pets"), "gztar", write_classes(tmp_path / "made", names))
        assert load_images(str(tmp_path / "pets.tar.gz")).label_names == list(names)


@pytest.mark.parametrize("name", ["org/name.v1", "imagenet.1k"])
def test_ids_with_dots_reach_the_hub(monkeypatch, name):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda source: asked.append(source) or {"train": rows()})
    assert len(load_unlabelled(name)) == 2 * ROWS and asked == [name]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_classes(tmp_path / "pets" / "train")
    write_classes(tmp_path / "elsewhere", split=1)
    (tmp_path / "pets" / "test").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pets" / "val").symlink_to(tmp_path / "pets" / "test")
    (tmp_path / "pets" / "train" / "round").symlink_to(tmp_path / "pets")
    splits = load_images(str(tmp_path / "pets"))
    assert colours(splits.train) == written()
    assert colours(splits.test) == colours(splits.validation) == written(1)


@pytest.mark.parametrize("place", ["train", "data/train", "pets/images/train"])
def test_archives_of_splits_of_classes(tmp_path, place):
    for number, split in enumerate(("train", "test")):
        write_classes(tmp_path / "made" / place.replace("train", split), split=number)
    shutil.make_archive(str(tmp_path / "pets"), "tar", tmp_path / "made")
    splits = load_images(str(tmp_path / "pets.tar"))
    assert colours(splits.test) == written(1) and len(splits.train) + len(splits.validation) == 2 * ROWS


# -- what is refused -------------------------------------------------------------------------------------------


def beside_the_classes(root):
    write_classes(root)
    picture(0, 0).save(root / "odd.png")


def below_a_class(root):
    write_classes(root)
    (root / "cat" / "kittens").mkdir()
    picture(0, 0).save(root / "cat" / "kittens" / "odd.png")


def foreign(name):
    def write(root):
        write_classes(root)
        (root / "dog" / name).write_bytes(b"...")

    return write


def left_out_of_metadata(root):
    labels = write_flat(root)
    write_metadata(root, {name: label for name, label in labels.items() if name != "7.png"})


def two_kinds(root):
    write_classes(root)
    write_parquet(root / "test.parquet")


def mixed_webdataset(root):
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for name in ("0.jpg", "0.cls", "1.png", "1.cls"):
            held = content(0, 0) if name[-1] == "g" else b"1"
            member = tarfile.TarInfo(name)
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))


def damaged_parquet(root):
    root.mkdir()
    (root / "train.parquet").write_bytes(b"PAR1 damaged PAR1")


def damaged_archive(root):
    root.mkdir()
    (root / "train.zip").write_bytes(b"PK damaged")


REFUSED = {
    "beside the classes": (beside_the_classes, "odd.png does not lie in the folder of a class"),
    "below a class": (below_a_class, "cat/kittens/odd.png does not lie in the folder of a class"),
    "heic": (foreign("1.HEIC"), "dog/1.HEIC is of a format that is not read.*as PNG or JPEG"),
    "svg": (foreign("1.svg"), "dog/1.svg is of a format that is not read"),
    "eps": (foreign("1.eps"), "dog/1.eps is of a format that is not read"),
    "metadata": (left_out_of_metadata, "7.png is not in the metadata"),
    "two kinds": (two_kinds, r"image files \(cat/0.png\) and parquet files \(test.parquet\)"),
    "two names of a split": (
        lambda root: classes_and_splits(root, ("train", "val", "dev")),
        "dev and val are the same",
    ),
    "two files of a split": (by_split(write_parquet, "train.parquet", "val.parquet", "dev.parquet"), "the same split"),
    "configurations": (
        by_split(write_parquet, "small/train-0.parquet", "large/train-0.parquet"),
        "configurations lie there: large, small; give one of them, as .*/large",
    ),
    "prefixes": (
        by_split(write_parquet, "a-train.parquet", "b-train.parquet"),
        "configurations lie there: a, b; put each in a folder of its own",
    ),
    "archives of classes": (by_split(write_webdataset, "a.tar", "b.tar"), "a.tar, b.tar, ... are not named"),
    "mixed webdataset": (mixed_webdataset, "0.tar cannot be read as webdataset"),
    "damaged parquet": (damaged_parquet, "train.parquet cannot be read as parquet"),
    "damaged archive": (damaged_archive, "train.zip is no archive that can be read"),
    "flat": (write_flat, "no column of labels.*a folder for each class"),
    "saved, damaged": (
        lambda root: [root.mkdir(), (root / "state.json").write_text("{}")],
        "no dataset that save_to_disk wrote",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_lose_images_is_refused(tmp_path, what):
    write, message = REFUSED[what]
    write(tmp_path / "pets")
    with pytest.raises(ValueError, match=message) as raised:
        load_images(str(tmp_path / "pets"))
    assert str(tmp_path / "pets") in str(raised.value)


def test_images_of_mixed_depth_need_no_labels(tmp_path):
    below_a_class(tmp_path / "pets")
    images = load_unlabelled(str(tmp_path / "pets"))
    assert len(images) == 2 * ROWS + 1 and images.column_names == ["image"]


@pytest.mark.parametrize("name", ["notes.txt", "labels.csv", "film.mp4"])
def test_what_was_found_is_said(tmp_path, name):
    (tmp_path / name).write_text("...")
    with pytest.raises(ValueError, match=f"no images there; found: {name}. Images in a folder for each class"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match=f"{name}: a file, but neither Parquet nor an archive"):
        load_images(str(tmp_path / name))


# -- rows that lack something ----------------------------------------------------------------------------------


def lacking(column, row, value=None, kind=CLASSES):
    columns = {"image": [picture(n % 2, n // 2) for n in range(2 * ROWS)], "label": [n % 2 for n in range(2 * ROWS)]}
    columns[column][row] = value
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": IMAGE, "label": kind}))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("image", None, CLASSES),
        ("label", None, CLASSES),
        ("label", -1, CLASSES),
        ("label", None, datasets.Value("int8")),
    ],
)
def test_a_row_without_image_or_label_is_named(tmp_path, split, column, value, kind, monkeypatch):
    number = int(rng().integers(2 * ROWS))
    for name in ("train", "test"):
        complete = lacking("label", 1, 1, kind)
        (lacking(column, number, value, kind) if name == split else complete).to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was read"))
    with pytest.raises(ValueError, match=rf"{tmp_path} \({split}\): sample {number} \(from 0\) has no {column}"):
        load_images(str(tmp_path))


def test_unlabelled_images_must_be_there(tmp_path):
    lacking("image", 5).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"sample 5 \(from 0\) has no image"):
        load_unlabelled(str(tmp_path / "train.parquet"))
    assert load_encoded(str(tmp_path))[5]["image"] is None, "lgvit predict says so in its row"
    lacking("label", 5).to_parquet(tmp_path / "train.parquet")
    assert load_unlabelled(str(tmp_path)).column_names == ["image"], "labels that some rows lack are none"


def test_a_struct_of_nothing_is_no_image(tmp_path):
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": content(0, n), "path": None} for n in range(4)]
    images[2] = {"bytes": None, "path": None}
    parquet.write_table(pyarrow.table({"image": images, "label": list("abab")}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="sample 2"):
        load_images(str(tmp_path))
