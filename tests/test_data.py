"""Images from handwritten digits, folders and parquet files, as a `Trainer` takes them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

from lgvit_hf.data import processing
from lgvit_hf.data.augmentation import Augmentation
from lgvit_hf.data.datasets import class_names, load_images, load_unlabelled
from lgvit_hf.data.processing import ProcessedImages, image_size, make_processor, stack, value_table
from lgvit_hf.serving.device.rgb import read_image
from tests.seeds import rng
from tests.tiny import tiny_model

version_independent = pytest.mark.version_independent
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


@version_independent
def test_digits_are_stratified(digits):
    whole = np.bincount(digits.train["label"]) + np.bincount(digits.validation["label"])
    whole = whole + np.bincount(digits.test["label"])
    for split in (digits.train, digits.validation, digits.test):
        expected = whole * len(split) / whole.sum()
        assert (abs(np.bincount(split["label"]) - expected) <= 2).all()


@version_independent
def test_digits_are_the_same_every_time(digits):
    again, other = load_images("digits"), load_images("digits", seed=1)
    for name in ("train", "validation", "test"):
        ours = getattr(digits, name)
        assert ours["label"] == getattr(again, name)["label"] and pixels_of(ours) == pixels_of(getattr(again, name))
    assert pixels_of(digits.test) != pixels_of(other.test)


# -- folders and files -----------------------------------------------------------------------------------------


@version_independent
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


@version_independent
@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "species"])
def test_parquet_columns_of_other_names(tmp_path, column):
    kind = datasets.ClassLabel(names=["a", "b"]) if column == "species" else None
    labels = [0, 1] * 20 if kind else ["a", "b"] * 20
    write_parquet(tmp_path / "train.parquet", labels, column, kind)
    splits = load_images(str(tmp_path / "train.parquet"))
    assert splits.train.column_names == ["image", "label"] and splits.label_names == ["a", "b"]


@version_independent
def test_every_shard_of_a_split_is_read(tmp_path):
    for shard in range(3):
        write_parquet(tmp_path / f"train-0000{shard}-of-00003.parquet", ["a", "b"] * 10)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ["a", "b"] * 4)
    splits = load_images(str(tmp_path))
    assert len(splits.train) + len(splits.validation) == 60 and len(splits.test) == 8


@version_independent
def test_labels_mean_the_same_in_every_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["ant", "bee", "cat"] * 10)
    write_parquet(tmp_path / "validation.parquet", ["ant", "bee", "cat"] * 2)
    write_parquet(tmp_path / "test.parquet", ["cat", "bee", "cat", "bee"])  # no ants
    splits = load_images(str(tmp_path))
    assert splits.label_names == ["ant", "bee", "cat"]
    assert [splits.label_names[label] for label in splits.test["label"]] == ["cat", "bee", "cat", "bee"]


@version_independent
def test_a_class_that_was_not_trained_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["ant", "bee"] * 10)
    write_parquet(tmp_path / "test.parquet", ["ant", "bee", "cat"])
    with pytest.raises(ValueError, match="cat"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "rows", "tested", "classes"),
    [("fashion_mnist", 30_000, 10_000, 10), ("tiny_imagenet100_32", 50_000, 5_000, 100)],
)
def test_real_parquet_files(shared, name, rows, tested, classes):
    splits = load_images(str(shared / "data" / name))
    assert len(splits.train) + len(splits.validation) == rows and len(splits.test) == tested
    assert len(splits.label_names) == classes
    item = ProcessedImages(splits.test, make_processor(32))[0]
    assert item["pixel_values"].shape == (3, 32, 32) and 0 <= item["labels"] < classes


# -- layouts of known datasets ---------------------------------------------------------------------------------


def write_rows(file, **columns):
    """`name=(feature, values)`; a number of images in place of values."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    rows = {
        name: [picture((number, 3, 7)) for number in range(values)] if isinstance(values, int) else values
        for name, (_, values) in columns.items()
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(names=["a", "b", "c", "d"])
COARSE = datasets.ClassLabel(names=["x", "y"])


@version_independent
def test_cifar100_has_its_fine_labels(tmp_path):
    fine, coarse = [0, 1, 2, 3] * 10, [0, 0, 1, 1] * 10
    for split in ("train", "test"):
        write_rows(
            tmp_path / f"{split}.parquet", img=(IMAGE, 40), fine_label=(CLASSES, fine), coarse_label=(COARSE, coarse)
        )
    splits = load_images(str(tmp_path))
    assert splits.label_names == ["a", "b", "c", "d"] and splits.test["label"][:] == fine
    assert splits.train.column_names == ["image", "label"]
    assert load_images(str(tmp_path), label_column="coarse_label").test["label"][:] == coarse


@version_independent
def test_columns_can_be_named(tmp_path):
    labels = [0, 1] * 10
    write_rows(
        tmp_path / "train.parquet",
        mask=(IMAGE, [picture(0, "L")] * 20),
        photo=(IMAGE, 20),
        label=(CLASSES, [3] * 20),
        kind=(datasets.Value("int64"), [5 + label for label in labels]),
    )
    splits = load_images(str(tmp_path), image_column="photo", label_column="kind")
    assert splits.label_names == ["5", "6"] and splits.train[0]["image"].mode == "RGB"
    assert class_names(splits.train) == ["5", "6"]
    with pytest.raises(ValueError, match="'fotos' is no column of images; columns: .*mask.*photo.*kind"):
        load_images(str(tmp_path), image_column="fotos")
    with pytest.raises(ValueError, match="'label' is no column of images"):
        load_images(str(tmp_path), image_column="label")
    for name in ("kinds", "photo"):
        with pytest.raises(ValueError, match=f"'{name}' is no column of labels; columns: .*mask.*photo.*kind"):
            load_images(str(tmp_path), label_column=name)


@version_independent
@pytest.mark.parametrize("second", ["valid", "validation"])
def test_food101_and_tiny_imagenet_report_on_their_validation_split(tmp_path, second):
    write_rows(tmp_path / "train-00000-of-00001.parquet", image=(IMAGE, 80), label=(CLASSES, [0, 1, 2, 3] * 20))
    write_rows(tmp_path / f"{second}-00000-of-00001.parquet", image=(IMAGE, 8), label=(CLASSES, [3, 2, 1, 0] * 2))
    splits = load_images(str(tmp_path))
    assert splits.test["label"][:] == [3, 2, 1, 0] * 2
    assert (len(splits.train), len(splits.validation)) == (68, 12)


@version_independent
@pytest.mark.parametrize("hidden", [-1, None])
def test_imagenet_does_not_report_on_hidden_labels(tmp_path, hidden):
    write_rows(tmp_path / "train.parquet", image=(IMAGE, 80), label=(CLASSES, [0, 1, 2, 3] * 20))
    write_rows(tmp_path / "validation.parquet", image=(IMAGE, 8), label=(CLASSES, [3, 2, 1, 0] * 2))
    write_rows(tmp_path / "test.parquet", image=(IMAGE, 12), label=(CLASSES, [hidden] * 12))
    splits = load_images(str(tmp_path))
    assert splits.test["label"][:] == [3, 2, 1, 0] * 2 and len(splits.train) + len(splits.validation) == 80


@version_independent
def test_training_rows_without_labels_are_refused(tmp_path):
    write_rows(tmp_path / "train.parquet", image=(IMAGE, 8), label=(CLASSES, [-1] * 8))
    with pytest.raises(ValueError, match="no split called 'train' that has labels"):
        load_images(str(tmp_path))


@version_independent
def test_nothing_is_decoded_while_loading(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", ["a", "b"] * 20)
    write_parquet(tmp_path / "test.parquet", ["a", "b"] * 4)

    def refuse(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    splits = load_images(str(tmp_path))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (34, 6, 8)
    assert len(load_unlabelled(str(tmp_path), limit=5)) == 5
    with pytest.raises(AssertionError, match="decoded"):
        splits.train[0]


# -- without labels --------------------------------------------------------------------------------------------


def write_flat(root, count):
    root.mkdir()
    for number in range(count):
        picture((number, 1, 2)).save(root / f"{number:03}.png")
    return root


def test_a_flat_folder_of_images(tmp_path):
    images = load_unlabelled(str(write_flat(tmp_path / "flat", 12)))
    assert images.column_names == ["image"] and class_names(images) is None
    assert sorted(image.getpixel((0, 0))[0] for image in images["image"]) == list(range(12))
    items = ProcessedImages(images, make_processor(8), augment=Augmentation())
    assert items[0].keys() == {"pixel_values"} and stack([items[0], items[1]]).keys() == {"pixel_values"}


@version_independent
def test_a_nested_folder_has_labels(tmp_path):
    images = load_unlabelled(str(write_folder(tmp_path / "pets", {"cat": 3, "dog": 4})))
    assert class_names(images) == ["cat", "dog"] and images["label"][:].count(1) == 4
    assert [image.getpixel((0, 0))[0] // 50 for image in images["image"]] == images["label"][:]


@version_independent
def test_parquet_with_and_without_labels(tmp_path):
    write_rows(tmp_path / "a" / "photos.parquet", photo=(IMAGE, 6))
    assert load_unlabelled(str(tmp_path / "a")).column_names == ["image"]
    assert len(load_unlabelled(str(tmp_path / "a" / "photos.parquet"))) == 6
    write_rows(tmp_path / "b" / "train.parquet", img=(IMAGE, 5), label=(CLASSES, [-1] * 5))
    write_rows(tmp_path / "b" / "test.parquet", img=(IMAGE, 7), label=(CLASSES, [-1] * 7))
    images = load_unlabelled(str(tmp_path / "b"))
    assert images.column_names == ["image"] and len(images) == 5, "hidden labels are none; the training split"
    write_parquet(tmp_path / "c.parquet", ["bee", "ant", "ant"])
    images = load_unlabelled(str(tmp_path / "c.parquet"))
    assert class_names(images) == ["ant", "bee"] and images["label"][:] == [1, 0, 0]
    write_rows(tmp_path / "d" / "left.parquet", img=(IMAGE, 5))
    write_rows(tmp_path / "d" / "right.parquet", img=(IMAGE, 5))
    with pytest.raises(ValueError, match="no split called 'train'; splits there: left, right"):
        load_unlabelled(str(tmp_path / "d"))


@version_independent
def test_a_limit_draws_rows_at_random(digits):
    whole = load_unlabelled("digits")
    some, again, other = (load_unlabelled("digits", limit=100, seed=seed) for seed in (0, 0, 1))
    assert len(some) == len(other) == 100 and pixels_of(some) == pixels_of(again) != pixels_of(other)
    assert set(pixels_of(some)) <= set(pixels_of(whole)) and pixels_of(some) != pixels_of(whole.select(range(100)))
    assert len(load_unlabelled("digits", limit=10**6)) == len(whole)
    with pytest.raises(ValueError, match="limit is 0"):
        load_unlabelled("digits", limit=0)


@version_independent
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_a_broken_file_is_named(tmp_path, nested, content):
    folder = write_folder(tmp_path / "pets", {"cat": 3, "dog": 3}) if nested else write_flat(tmp_path / "flat", 5)
    broken = (folder / "dog" if nested else folder) / "broken.png"
    if content == "cut":
        Image.effect_noise((64, 64), 50).save(broken)
        content = broken.read_bytes()[:1000]
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=f"{broken} is no readable image"):
        load_unlabelled(str(folder))


def test_a_file_that_ends_early_is_named_when_it_is_read(tmp_path):
    folder = write_flat(tmp_path / "flat", 3)
    Image.effect_noise((64, 64), 50).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:1500])
    items = ProcessedImages(load_unlabelled(str(folder)), make_processor(8))
    with pytest.raises(ValueError, match=f"{folder / 'cut.jpg'} is no readable image"):
        items.__getitems__(range(4))


# -- what is wrong ---------------------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize("name", ["missing.parquet", "missing/folder", "missing.zip"])
def test_a_path_that_is_not_there(tmp_path, name):
    with pytest.raises((ValueError, OSError), match=name):
        load_images(str(tmp_path / name))


@version_independent
def test_an_empty_folder(tmp_path):
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        load_images(str(tmp_path))


@version_independent
def test_a_folder_of_anything_but_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for load in (load_images, load_unlabelled):
        with pytest.raises(ValueError, match=f"{tmp_path}: no images there"):
            load(str(tmp_path))


@version_independent
def test_no_labels_and_no_images(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", ["x", "y"] * 5, "caption")
    with pytest.raises(ValueError, match="no column of labels.*caption"):
        load_images(str(tmp_path / "a"))
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column of images.*text"):
        load_images(str(tmp_path / "train.parquet"))


@version_independent
def test_no_training_split(tmp_path):
    write_parquet(tmp_path / "test.parquet", ["a", "b"] * 5)
    with pytest.raises(ValueError, match="no split called 'train'.*test"):
        load_images(str(tmp_path))


@version_independent
def test_one_class_is_not_enough(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a"] * 10)
    with pytest.raises(ValueError, match="1 class.*at least two"):
        load_images(str(tmp_path))


@version_independent
def test_too_few_rows_to_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b"])
    with pytest.raises(ValueError, match="validation_share 0.15 of 1 training samples leaves none to train on"):
        load_images(str(tmp_path))


def test_few_rows_of_many_classes(tmp_path):
    write_parquet(tmp_path / "train.parquet", list("abcde") * 6)
    splits = load_images(str(tmp_path))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 30
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (21, 4, 5)


# -- tensors ---------------------------------------------------------------------------------------------------


def opaque(image):
    """An image in RGB, laid over white where it is transparent."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def rows_of(images, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_processed_images_are_scaled_and_three_channels_wide():
    images = [picture((255, 0, 51)), picture(255, "L"), picture((255, 0, 0, 128), "RGBA"), picture(0, "L", (9, 2))]
    processed = ProcessedImages(rows_of(images, [0, 1, 0, 1]), make_processor(8))
    items = [processed[index] for index in range(len(processed))]
    for item, colour in zip(items, [(1, -1, -0.6), (1, 1, 1), (1, -1 / 255, -1 / 255), (-1, -1, -1)], strict=True):
        assert item["pixel_values"].dtype == torch.float32
        expected = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 8, 8)
        torch.testing.assert_close(item["pixel_values"], expected, atol=1e-5, rtol=0)
    batch = stack(items)
    assert batch["pixel_values"].shape == (4, 3, 8, 8) and batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["labels"].dtype == torch.int64


@version_independent
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


# -- processors ------------------------------------------------------------------------------------------------

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Standardised(ViTImageProcessor):
    """A processor that is not plain: what it makes of a value depends on the whole image."""

    def __call__(self, image, **settings):
        batch = super().__call__(image, **settings)
        batch["pixel_values"] = [pixels - pixels.mean() for pixels in batch["pixel_values"]]
        return batch


def size(height, width=None):
    return {"height": height, "width": width or height}


PROCESSORS = {
    "ours": (lambda: make_processor(12), (12, 12)),
    "imagenet": (lambda: ViTImageProcessor(size=size(12, 9), image_mean=MEAN, image_std=STD, resample=3), (12, 9)),
    "unscaled": (lambda: ViTImageProcessor(size=size(12), do_rescale=False, do_normalize=False), (12, 12)),
    "center-crop": (lambda: DeiTImageProcessor(size=size(14), crop_size=size(10)), (10, 10)),
    "shortest-edge": (lambda: ConvNextImageProcessor(size={"shortest_edge": 16}), (16, 16)),
    "shortest-edge-crop": (lambda: BitImageProcessor(size={"shortest_edge": 16}, crop_size=size(12, 8)), (12, 8)),
    "not-plain": (lambda: Standardised(size=size(12)), (12, 12)),
}


@pytest.fixture(scope="module")
def pictures():
    numbers = rng()

    def noise(height, width, *channels):
        return Image.fromarray(numbers.integers(0, 256, (height, width, *channels), dtype=np.uint8))

    return [noise(12, 12, 3), noise(12, 9, 3), noise(31, 17), noise(9, 40, 4), noise(20, 20, 3).convert("P")]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_is_the_processor_and_nothing_else(pictures, name, keep):
    processor = PROCESSORS[name][0]()
    items = ProcessedImages(rows_of(pictures, [0, 1, 0, 1, 0]), processor, keep=keep)
    for _ in range(2):
        batch = items.__getitems__(range(5)) if name == "ours" else [items[index] for index in range(5)]
        for item, image in zip(batch, pictures, strict=True):
            expected = processor(opaque(image), return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(item["pixel_values"], expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", PROCESSORS)
def test_training_is_the_augmentation_and_the_normalisation(pictures, name):
    make, expected_size = PROCESSORS[name]
    processor = make()
    assert image_size(processor) == expected_size
    assert (value_table(processor) is None) == (name == "not-plain")
    items = ProcessedImages(rows_of(pictures, [0, 1, 0, 1, 0]), processor, augment=Augmentation(), keep=True, seed=5)
    items.set_epoch(3)
    for index, image in enumerate(pictures):
        drawn = np.random.default_rng((5, 3, index))
        augmented = Augmentation()(opaque(image), expected_size, drawn)
        asis = {"do_resize": False} | ({"do_center_crop": False} if "crop" in name else {})
        expected = processor(augmented, return_tensors="pt", **asis)["pixel_values"][0]
        assert expected.shape == (3, *expected_size)
        torch.testing.assert_close(items[index]["pixel_values"], expected, atol=0, rtol=0)


def test_a_processor_without_a_size(pictures):
    with pytest.raises(ValueError, match="size of the processor is {}"):
        ProcessedImages(rows_of(pictures, [0] * 5), lambda image: image, augment=Augmentation())


# -- augmented -------------------------------------------------------------------------------------------------


def augmented(count=24, **settings):
    numbers = rng()
    images = [Image.fromarray(numbers.integers(0, 256, (10, 14, 3), dtype=np.uint8)) for _ in range(count)]
    return ProcessedImages(
        rows_of(images, [0, 1] * (count // 2)), make_processor(8), augment=Augmentation(), **settings
    )


def pixels_by(loader):
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_a_draw_depends_on_seed_epoch_and_index_alone():
    items = augmented()
    first = torch.stack([items[index]["pixel_values"] for index in range(24)])
    backwards = torch.stack([augmented(keep=True)[index]["pixel_values"] for index in reversed(range(24))]).flip(0)
    assert torch.equal(first, backwards) and torch.equal(items[-1]["pixel_values"], first[23])
    items.set_epoch(1)
    second = torch.stack([items[index]["pixel_values"] for index in range(24)])
    assert (first != second).flatten(1).any(1).all(), "every image is drawn anew"
    items.set_epoch(0)
    assert torch.equal(pixels_by(DataLoader(items, 5)), first)
    assert not torch.equal(pixels_by(DataLoader(augmented(seed=1), 24)), first)
    with pytest.raises(ValueError, match="seed is -1"):
        augmented(seed=-1)


@pytest.mark.parametrize("persistent", [False, True])
def test_dataloader_workers_draw_the_same_images(persistent):
    alone, shared = augmented(), augmented(keep=True)
    workers = DataLoader(shared, 5, num_workers=2, persistent_workers=persistent, collate_fn=stack)
    for epoch in (0, 1, 5):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        assert torch.equal(pixels_by(workers), pixels_by(DataLoader(alone, 24)))


@version_independent
def test_kept_images_are_small_and_decoded_once(monkeypatch):
    items, decoded = augmented(keep=True), []
    monkeypatch.setattr(processing, "read_image", lambda file: decoded.append(file) or read_image(file))
    for epoch in range(3):
        items.set_epoch(epoch)
        pixels_by(DataLoader(items, 7, shuffle=True))
    assert len(decoded) == len(set(decoded)) == 24
    assert all(image.dtype == np.uint8 and image.shape == (10, 14, 3) for image, _ in items._kept.values())


@version_independent
def test_items_end():
    assert len(list(augmented())) == 24
    with pytest.raises(IndexError):
        augmented()[24]
