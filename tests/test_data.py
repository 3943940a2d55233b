"""Images from handwritten digits, folders and parquet files, as a `Trainer` takes them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from lgvit_hf.data import ProcessedImages, load_images, make_processor, stack
from tests.tiny import tiny_model

datasets = pytest.importorskip("datasets", reason='the datasets library comes with "lgvit-hf[train]"')


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels_of(split):
    return [np.asarray(image).tobytes() for image in split["image"]]


def picture(colour, mode="RGB", size=(6, 4)):
    return Image.new(mode, size, colour)


def write_folder(root, counts, splits=("",)):
    """`root/split/class/n.png`; the class decides the colour."""
    for split in splits:
        for index, (name, count) in enumerate(counts.items()):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture((50 * index, number, len(split))).save(root / split / name / f"{number}.png")
    return root


def write_parquet(file, labels, column="label", kind=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [picture((number % 256, number // 256, 7)) for number in range(len(labels))]
    features = datasets.Features({"img": datasets.Image(), column: kind or datasets.Value("string")})
    datasets.Dataset.from_dict({"img": images, column: labels}, features=features).to_parquet(file)


# -- digits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def test_digits_are_all_there_and_in_one_split_only(digits):
    from sklearn.datasets import load_digits

    splits = [digits.train, digits.validation, digits.test]
    assert [len(split) for split in splits] == [1221, 216, 360]
    together = sorted(pixels for split in splits for pixels in pixels_of(split))
    images = (load_digits().images * (255 / 16)).astype(np.uint8)
    assert together == sorted(image.tobytes() for image in images)
    assert digits.label_names == [str(number) for number in range(10)]


def test_digits_are_stratified(digits):
    whole = np.bincount(digits.train["label"]) + np.bincount(digits.validation["label"])
    whole = whole + np.bincount(digits.test["label"])
    for split in (digits.train, digits.validation, digits.test):
        expected = whole * len(split) / whole.sum()
        assert (abs(np.bincount(split["label"]) - expected) <= 2).all()


def test_digits_are_the_same_every_time(digits):
    again, other = load_images("digits"), load_images("digits", seed=1)
    for name in ("train", "validation", "test"):
        ours = getattr(digits, name)
        assert ours["label"] == getattr(again, name)["label"] and pixels_of(ours) == pixels_of(getattr(again, name))
    assert pixels_of(digits.test) != pixels_of(other.test)


# -- folders and files -----------------------------------------------------------------------------------------


def test_folder_of_images_without_splits(tmp_path):
    folder = write_folder(tmp_path / "pets", {"cat": 20, "dog": 40})
    splits = load_images(str(folder))
    assert splits.label_names == ["cat", "dog"]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (43, 8, 9)
    assert sum(len(set(pixels_of(split))) for split in (splits.train, splits.validation, splits.test)) == 60
    for split in (splits.train, splits.validation, splits.test):
        for image, label in zip(split["image"], split["label"], strict=True):
            assert image.getpixel((0, 0))[0] == 50 * label, "the label is that of the folder"
        assert np.bincount(split["label"])[1] == pytest.approx(len(split) * 2 / 3, abs=1)


@pytest.mark.parametrize("names", [("train", "test"), ("train", "validation"), ("train", "val", "test")])
def test_folder_of_images_with_splits(tmp_path, names):
    folder = write_folder(tmp_path / "pets", {"cat": 20, "dog": 20}, names)
    splits = load_images(str(folder))
    # the blue of a picture is the length of its split's name
    blue = {
        name: {image.getpixel((0, 0))[2] for image in getattr(splits, name)["image"]}
        for name in vars(splits)
        if name != "label_names"
    }
    reported = names[-1]
    assert blue["test"] == {len(reported)} and blue["train"] == {5}
    assert blue["validation"] == {5 if len(names) == 2 else 3}
    assert len(splits.test) == 40 and len(splits.train) == (34 if len(names) == 2 else 40)


@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "species"])
def test_parquet_columns_of_other_names(tmp_path, column):
    kind = datasets.ClassLabel(names=["a", "b"]) if column == "species" else None
    labels = [0, 1] * 20 if kind else ["a", "b"] * 20
    write_parquet(tmp_path / "train.parquet", labels, column, kind)
    splits = load_images(str(tmp_path / "train.parquet"))
    assert splits.train.column_names == ["image", "label"] and splits.label_names == ["a", "b"]


def test_every_shard_of_a_split_is_read(tmp_path):
    for shard in range(3):
        write_parquet(tmp_path / f"train-0000{shard}-of-00003.parquet", ["a", "b"] * 10)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ["a", "b"] * 4)
    splits = load_images(str(tmp_path))
    assert len(splits.train) + len(splits.validation) == 60 and len(splits.test) == 8


def test_labels_mean_the_same_in_every_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["ant", "bee", "cat"] * 10)
    write_parquet(tmp_path / "validation.parquet", ["ant", "bee", "cat"] * 2)
    write_parquet(tmp_path / "test.parquet", ["cat", "bee", "cat", "bee"])  # no ants
    splits = load_images(str(tmp_path))
    assert splits.label_names == ["ant", "bee", "cat"]
    assert [splits.label_names[label] for label in splits.test["label"]] == ["cat", "bee", "cat", "bee"]


def test_a_class_that_was_not_trained_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["ant", "bee"] * 10)
    write_parquet(tmp_path / "test.parquet", ["ant", "bee", "cat"])
    with pytest.raises(ValueError, match="cat"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("name", ["cifar10_jpeg", "fashion_mnist", "tiny_imagenet100_32"])
def test_real_parquet_files(shared, name):
    splits = load_images(str(shared / "data" / name))
    sizes = {"cifar10_jpeg": (50_000, 10_000, 10), "fashion_mnist": (30_000, 10_000, 10)}
    rows, tested, classes = sizes.get(name, (50_000, 5_000, 100))
    assert len(splits.train) + len(splits.validation) == rows and len(splits.test) == tested
    assert len(splits.label_names) == classes
    item = ProcessedImages(splits.test, make_processor(32))[0]
    assert item["pixel_values"].shape == (3, 32, 32) and 0 <= item["labels"] < classes


# -- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.parquet", "missing/folder", "missing.zip"])
def test_a_path_that_is_not_there(tmp_path, name):
    with pytest.raises((ValueError, OSError), match=name):
        load_images(str(tmp_path / name))


def test_an_empty_folder(tmp_path):
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        load_images(str(tmp_path))


def test_no_labels_and_no_images(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", ["x", "y"] * 5, "caption")
    with pytest.raises(ValueError, match="no column of labels.*caption"):
        load_images(str(tmp_path / "a"))
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column of images.*text"):
        load_images(str(tmp_path / "train.parquet"))


def test_no_training_split(tmp_path):
    write_parquet(tmp_path / "test.parquet", ["a", "b"] * 5)
    with pytest.raises(ValueError, match="no split called 'train'.*test"):
        load_images(str(tmp_path))


def test_one_class_is_not_enough(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a"] * 10)
    with pytest.raises(ValueError, match="1 class.*at least two"):
        load_images(str(tmp_path))


def test_too_few_rows_to_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b"])
    with pytest.raises(ValueError):
        load_images(str(tmp_path))


def test_few_rows_of_many_classes(tmp_path):
    write_parquet(tmp_path / "train.parquet", list("abcde") * 6)
    splits = load_images(str(tmp_path))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 30
    assert min(len(splits.validation), len(splits.test)) > 0


# -- tensors ---------------------------------------------------------------------------------------------------


def rows_of(images, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_processed_images_are_scaled_and_three_channels_wide():
    images = [picture((255, 0, 51)), picture(255, "L"), picture((255, 0, 0, 128), "RGBA"), picture(0, "L", (9, 2))]
    processed = ProcessedImages(rows_of(images, [0, 1, 0, 1]), make_processor(8))
    items = [processed[index] for index in range(len(processed))]
    for item, colour in zip(items, [(1, -1, -0.6), (1, 1, 1), (1, -1, -1), (-1, -1, -1)], strict=True):
        assert item["pixel_values"].dtype == torch.float32
        expected = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 8, 8)
        torch.testing.assert_close(item["pixel_values"], expected, atol=1e-5, rtol=0)
    batch = stack(items)
    assert batch["pixel_values"].shape == (4, 3, 8, 8) and batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["labels"].dtype == torch.int64


def test_kept_images_are_processed_once():
    calls = []

    def processor(image, return_tensors):
        calls.append(image)
        return {"pixel_values": torch.zeros(1, 3, 4, 4)}

    images = rows_of([picture(0, "L")] * 3, [0, 1, 0])
    for keep, expected in ((True, 3), (False, 6)):
        calls.clear()
        processed = ProcessedImages(images, processor, keep=keep)
        for _ in range(2):
            assert [processed[index]["labels"] for index in range(3)] == [0, 1, 0]
        assert len(calls) == expected


@pytest.mark.parametrize("collated", [False, True], ids=["default-collator", "stack"])
def test_plain_trainer_takes_them(digits, collated, tmp_path):
    images = ProcessedImages(digits.test, make_processor(16), keep=True)
    model = tiny_model("vit", num_labels=10)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(model, args, train_dataset=images, **({"data_collator": stack} if collated else {}))
    assert np.isfinite(trainer.train().training_loss)
    predictions = trainer.predict(torch.utils.data.Subset(images, range(30)))
    assert predictions.predictions.shape == (30, 10)
    assert predictions.label_ids.tolist() == digits.test["label"][:30]
