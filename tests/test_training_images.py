import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor

from lgvit_hf import HighwayTrainer, HighwayTrainingArguments, HighwayWrapper
from lgvit_hf.processing import make_processor
from lgvit_hf.training.images import with_pixels
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, MODELS, tiny_dataset, tiny_model, tiny_native


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
