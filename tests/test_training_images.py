import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, TrainingArguments, ViTImageProcessor

from lgvit_hf import AViT, AViTConfig, AViTTrainer, HighwayTrainer, HighwayTrainingArguments, HighwayWrapper
from lgvit_hf.data.processing import make_processor
from lgvit_hf.training.images import with_pixels
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, MODELS, tiny_backbone_settings, tiny_dataset, tiny_model, tiny_native


@pytest.fixture(scope="module")
def photos():
    """Rows as `load_dataset("imagefolder", ...)` gives them."""
    pixels = rng().integers(0, 255, (8, 20, 30, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(photo) for photo in pixels], "label": [index % 5 for index in range(8)]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def expected(photos, processor):
    return processor(photos[3]["image"], return_tensors="pt")["pixel_values"][0]


def test_a_folder_of_images_trains_as_it_is(photos, tmp_path, caplog):
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    args = HighwayTrainingArguments(str(tmp_path), strategy="uniform", **quiet)
    trainer = HighwayTrainer(tiny_model("vit"), args, train_dataset=photos, eval_dataset={"some": photos})
    assert "no image processor is known" in caplog.text and f"{IMAGE_SIZE} pixels" in caplog.text
    assert torch.equal(trainer.train_dataset[3]["pixel_values"], expected(photos, make_processor(IMAGE_SIZE)))
    trainer.train()
    evaluated = trainer.evaluate()
    with torch.no_grad():
        answers = trainer.model.eval()(torch.stack([row["pixel_values"] for row in trainer.train_dataset])).logits
    right = (answers.argmax(-1) == torch.arange(8) % 5).float().mean()
    assert evaluated["eval_some_accuracy"] == pytest.approx(right.item())
    trainer.save_model()
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == IMAGE_SIZE


@pytest.mark.parametrize("kind", ["vit", "swin", "wrapped"])
def test_oblong_images_need_no_saved_processor(kind, photos, tmp_path):
    if kind == "wrapped":
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, stride=8), torch.nn.Flatten(), torch.nn.Linear(32, 5))
        model = HighwayWrapper(net.eval(), after=["0"], example=torch.zeros(1, 3, 16, 32))
    else:
        model = tiny_model(kind, image_size=(16, 32))
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    args = HighwayTrainingArguments(str(tmp_path), **quiet)
    trainer = HighwayTrainer(model, args, train_dataset=photos)
    pixels = trainer.train_dataset[3]["pixel_values"]
    oblong = ViTImageProcessor(size={"height": 16, "width": 32})
    assert pixels.shape == (3, 16, 32) and torch.equal(pixels, expected(photos, oblong))
    trainer.train()


def test_which_processor(photos, tmp_path):
    """The one that is given, that of the checkpoint, or that of the plain checkpoint it grew from."""
    sizes = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    stored, given = (ViTImageProcessor(size=sizes, image_mean=[mean] * 3) for mean in (0.1, 0.9))
    tiny_native("vit").save_pretrained(tmp_path / "plain")
    grown = MODELS["vit"].from_backbone(str(tmp_path / "plain"), exit_positions=[2])
    assert with_pixels(grown, {"train_dataset": tiny_dataset(2)}).keys() == {"train_dataset"}
    for folder in ("plain", "highway"):
        stored.save_pretrained(tmp_path / folder)
    grown.save_pretrained(tmp_path / "highway")
    opened = MODELS["vit"].from_pretrained(tmp_path / "highway")
    for model in (grown, opened):
        rows = with_pixels(model, {"train_dataset": photos})["train_dataset"]
        torch.testing.assert_close(rows[3]["pixel_values"], expected(photos, stored))
        rows = with_pixels(model, {"eval_dataset": photos, "processing_class": given})["eval_dataset"]
        torch.testing.assert_close(rows[3]["pixel_values"], expected(photos, given))


def test_a_transform_of_ones_own_is_left_alone(photos):
    ready = photos.with_transform(lambda rows: {"pixel_values": [torch.zeros(3, 16, 16)] * len(rows["image"])})
    arguments = {"train_dataset": ready, "eval_dataset": None}
    assert with_pixels(tiny_model("vit"), arguments) is arguments


# -- columns, streams, and datasets of `evaluate` and `predict` ------------------------------------------------

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}


def args_of(folder, **changes):
    settings = {**QUIET, "save_strategy": "no", "max_steps": 2, "strategy": "uniform", **changes}
    return HighwayTrainingArguments(str(folder), **settings)


def renamed(photos, image="image", label="label"):
    return photos.rename_columns({old: new for old, new in {"image": image, "label": label}.items() if old != new})


def pixels_and_labels(items):
    return torch.stack([item["pixel_values"] for item in items]), [item["labels"] for item in items]


@pytest.mark.parametrize("kind", ["dataset", "stream", "numpy"])
@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label"), ("photo", "labels")])
def test_columns_are_found_as_load_images_finds_them(photos, image, label, kind):
    model, named = tiny_model("vit"), renamed(photos, image, label)
    named = named.add_column("id", [-7] * 8)
    named = {"dataset": named, "stream": named.to_iterable_dataset(2), "numpy": named.with_format("numpy")}[kind]
    for name in ("train_dataset", "eval_dataset", "test_dataset"):
        pixels, labels = pixels_and_labels(with_pixels(model, {name: named})[name])
        expected_pixels, expected_labels = pixels_and_labels(with_pixels(model, {name: photos})[name])
        assert torch.equal(pixels, expected_pixels) and labels == expected_labels == [i % 5 for i in range(8)]


def test_transforms_of_ones_own_see_their_own_columns(photos):
    def flipped(rows):
        return {"img": [image.rotate(180) for image in rows["img"]], "fine_label": rows["fine_label"]}

    named = renamed(photos, "img", "fine_label").with_transform(flipped)
    pixels, labels = pixels_and_labels(with_pixels(tiny_model("vit"), {"train_dataset": named})["train_dataset"])
    processor = make_processor(IMAGE_SIZE)
    assert torch.equal(pixels[3], processor(photos[3]["image"].rotate(180), return_tensors="pt")["pixel_values"][0])
    assert labels == photos["label"][:]


def test_words_are_the_models_classes(photos):
    model = tiny_model("vit", id2label=dict(enumerate("abcde")))
    words = photos.remove_columns("label").add_column("label", [*"edcbaedc"])
    for rows in (words, words.to_iterable_dataset()):
        items = list(with_pixels(model, {"train_dataset": rows})["train_dataset"])
        assert [item["labels"] for item in items] == [4, 3, 2, 1, 0, 4, 3, 2]
    with pytest.raises(ValueError, match="label 'f' is none of the model's classes: a, b, c, d, e"):
        strange = words.remove_columns("label").add_column("label", [*"edcbaedf"])
        with_pixels(model, {"train_dataset": strange})


def test_a_stream_that_says_nothing_of_its_columns(photos):
    stream = datasets.IterableDataset.from_generator(lambda: ({"img": row["image"], "labels": 3} for row in photos))
    pixels, labels = pixels_and_labels(with_pixels(tiny_model("vit"), {"train_dataset": stream})["train_dataset"])
    assert labels == [3] * 8 and torch.equal(pixels[3], expected(photos, make_processor(IMAGE_SIZE)))
    ready = stream.map(lambda row: {"pixel_values": [0.0], "labels": 1}, remove_columns=["img"])
    assert with_pixels(tiny_model("vit"), {"train_dataset": ready})["train_dataset"] is ready


def test_classes_in_another_order_are_refused(photos):
    model = tiny_model("vit", id2label=dict(enumerate("abcde")))
    for names in (*("edcba", "abced"), "abcde", "fghij"):
        rows = photos.cast_column("label", datasets.ClassLabel(names=[*names]))
        for each in (rows, rows.to_iterable_dataset()):
            for name in ("train_dataset", "eval_dataset"):
                if names in ("abcde", "fghij"):
                    assert name in with_pixels(model, {name: each})
                    continue
                order = f"{name}: its classes are .*: {', '.join(names)}, the model's are a, b, c, d, e"
                with pytest.raises(ValueError, match=order):
                    with_pixels(model, {name: each})


def test_a_row_that_lacks_something_is_named(photos):
    for column, (name, row) in {"image": ("train_dataset", 5), "label": ("eval_dataset", 2)}.items():
        rows = photos.to_dict()
        rows[column][row] = None
        rows = datasets.Dataset.from_dict(rows, features=photos.features)
        with pytest.raises(ValueError, match=rf"{name}: sample {row} \(from 0\) has no {column}"):
            with_pixels(tiny_model("vit"), {name: rows})
        stream = with_pixels(tiny_model("vit"), {name: rows.to_iterable_dataset()})[name]
        with pytest.raises(ValueError, match=f"sample {row} of the stream has no {column}"):
            list(stream)


def test_rows_that_are_left_out_may_lack_anything(photos):
    rows = photos.to_dict()
    rows["image"][5] = None
    rows = datasets.Dataset.from_dict(rows, features=photos.features)
    chosen = rows.select([7, 6, 4, 1])
    items = with_pixels(tiny_model("vit"), {"train_dataset": chosen})["train_dataset"]
    assert [item["labels"] for item in items] == [2, 1, 4, 1]
    with pytest.raises(ValueError, match=r"train_dataset: sample 1 \(from 0\) has no image"):
        with_pixels(tiny_model("vit"), {"train_dataset": rows.select([7, 5])})


def test_all_splits_at_once_are_no_training_set(photos):
    with pytest.raises(ValueError, match="train_dataset: a dict of train, test; give one of them"):
        with_pixels(tiny_model("vit"), {"train_dataset": datasets.DatasetDict(train=photos, test=photos)})


def test_training_images_without_labels_are_refused(photos):
    unlabelled = renamed(photos, label="kind")
    for rows in (unlabelled, unlabelled.to_iterable_dataset()):
        with pytest.raises(ValueError, match="train_dataset: no column of labels; columns: image, kind"):
            with_pixels(tiny_model("vit"), {"train_dataset": rows})
        items = list(with_pixels(tiny_model("vit"), {"test_dataset": rows})["test_dataset"])
        assert items[0].keys() == {"pixel_values"}


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("kind", ["vit", "avit"])
def test_images_are_evaluated_and_predicted(photos, tmp_path, kind, streamed):
    if kind == "avit":
        model, settings = (
            AViT(AViTConfig(**tiny_backbone_settings("vit"))),
            {**QUIET, "max_steps": 2, "save_strategy": "no"},
        )
        trainer = AViTTrainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=photos)
    else:
        trainer = HighwayTrainer(tiny_model("vit"), args_of(tmp_path), train_dataset=tiny_dataset(4))
    named = renamed(photos, "img", "fine_label")
    ready = with_pixels(trainer.model, {"eval_dataset": photos})["eval_dataset"]
    named = named.to_iterable_dataset() if streamed else named
    expected_figures, figures = trainer.evaluate(ready), trainer.evaluate({"some": named, "ready": ready})
    for name in ("loss", "accuracy"):
        assert figures[f"eval_some_{name}"] == figures[f"eval_ready_{name}"] == expected_figures[f"eval_{name}"]
    answers, expected_answers = (trainer.predict(rows).predictions for rows in (named, ready))
    first, second = (rows[0] if isinstance(rows, tuple) else rows for rows in (answers, expected_answers))
    assert first.shape[0] == 8 and (first == second).all()
    hidden = photos.remove_columns("label").add_column("label", [-1] * 8)
    hidden = hidden.cast_column("label", datasets.ClassLabel(5))
    assert trainer.predict(hidden).label_ids is None


def test_a_stream_goes_on_where_it_stopped(photos, tmp_path):
    """As `Trainer` has it: what was seen is read again and dropped, and an epoch shuffles as it did."""

    def losses(folder, resume=None, **changes):
        stream = photos.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=4)
        settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "lr_scheduler_type": "constant"}
        trainer = HighwayTrainer(
            tiny_model("vit"), args_of(folder, **{**settings, "max_steps": 6, **changes}), train_dataset=stream
        )
        trainer.train(resume_from_checkpoint=resume)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    whole = losses(tmp_path / "whole")
    losses(tmp_path / "parts", max_steps=3)
    assert losses(tmp_path / "parts", resume=True) == whole
    assert len(set(whole)) == 6
