"""`evaluate.evaluator` and `pipeline` take a highway as any image classifier: offline, and whatever the batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import f1_score
from transformers import ViTImageProcessor, pipeline

from lgvit_hf.evaluation.metric import HighwayMetric
from tests.tiny import IMAGE_SIZE, tiny_model

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["ant", "bee", "cat", "dog", "eel"]
LABELS = [index % len(NAMES) for index in range(24)]
KINDS = ("vit", "swin")


@pytest.fixture(scope="module")
def photos():
    """Noise under a colour of its own each, of a size that the model does not take."""
    generator = np.random.default_rng(0)
    colours, noise = generator.integers(0, 255, (24, 1, 1, 3)), generator.integers(-60, 60, (24, 20, 30, 3))
    return [Image.fromarray(pixels) for pixels in (colours + noise).clip(0, 255).astype(np.uint8)]


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


@pytest.fixture(scope="module")
def models(photos, processor):
    """Highways whose rows leave at several exits, each with its logits."""
    pixels, models = processor(photos, return_tensors="pt")["pixel_values"], {}
    for kind in KINDS:
        model = tiny_model(kind, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
        with torch.no_grad():
            scores = torch.stack(model(pixels, early_exit=False).exit_logits[:-1]).softmax(-1).amax(-1)
            model.set_exit_policy("confidence", threshold=scores.sort().values[:, 16:18].mean(-1).tolist())
            out = model(pixels)
        assert len(set(out.exit_index.tolist())) > 2
        models[kind] = model, out.logits
    return models


@pytest.fixture(scope="module")
def folders(models, processor, tmp_path_factory):
    """Where the models are saved."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, (model, _) in models.items():
        model.save_pretrained(folders[kind])
        processor.save_pretrained(folders[kind])
    return folders


def in_memory(photos, folder):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": photos, "label": LABELS}, features=features)


def image_folder(photos, folder):
    for index, (photo, label) in enumerate(zip(photos, LABELS, strict=True)):
        file = folder / "photos" / NAMES[label] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.save(file)
    # by class, no longer in the order of the photos
    return load_dataset("imagefolder", data_dir=str(folder / "photos"), split="train", cache_dir=str(folder / "cache"))


def assert_counted(results, logits):
    answers, labels = logits.argmax(-1).numpy(), np.array(LABELS)
    assert 0 < (answers == labels).sum() < len(labels) and len(set(answers)) > 2
    assert results["accuracy"] == pytest.approx((answers == labels).mean())
    assert results["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro"))


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("rows", [in_memory, image_folder], ids=["in-memory", "image-folder"])
def test_evaluator_of_a_saved_model(kind, rows, models, folders, photos, tmp_path):
    model, logits = models[kind]
    results = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=str(folders[kind]),
        data=rows(photos, tmp_path),
        metric=HighwayMetric(cache_dir=str(tmp_path)),
        label_mapping=model.config.label2id,
        device=-1,
    )
    assert_counted(results, logits)


@every_kind
def test_evaluator_of_a_model(kind, models, processor, photos, tmp_path):
    model, logits = models[kind]
    results = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=model,
        feature_extractor=processor,
        data=in_memory(photos, tmp_path),
        metric=HighwayMetric(cache_dir=str(tmp_path)),
        label_mapping=model.config.label2id,
        device=-1,
    )
    assert_counted(results, logits)


@pytest.mark.xfail(
    not hasattr(transformers, "TFPreTrainedModel"),
    raises=AttributeError,
    reason="evaluate 0.4.6 asks transformers for TFPreTrainedModel, which is gone in 5, when it is given a pipeline",
)
@every_kind
def test_evaluator_of_a_pipeline(kind, models, processor, photos, tmp_path):
    model, logits = models[kind]
    results = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=pipeline("image-classification", model=model, image_processor=processor, device="cpu"),
        data=in_memory(photos, tmp_path),
        metric=HighwayMetric(cache_dir=str(tmp_path)),
        label_mapping=model.config.label2id,
    )
    assert_counted(results, logits)


def test_evaluator_resamples(models, folders, photos, tmp_path):
    model, logits = models["vit"]
    results = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=str(folders["vit"]),
        data=in_memory(photos, tmp_path),
        metric=HighwayMetric(cache_dir=str(tmp_path), keep_in_memory=True),
        label_mapping=model.config.label2id,
        device=-1,
        strategy="bootstrap",
        n_resamples=20,
        random_state=0,
    )
    low, high = results["accuracy"]["confidence_interval"]
    assert low <= (logits.argmax(-1) == torch.tensor(LABELS)).float().mean().item() <= high and low < high


def test_metrics_are_combined(tmp_path):
    both = evaluate.combine({name: HighwayMetric(cache_dir=str(tmp_path / name)) for name in ("one", "two")})
    figures = both.compute(predictions=[0, 1], references=[0, 0])
    assert figures["one_accuracy"] == figures["two_accuracy"] == 0.5


@every_kind
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_pipeline_scores_do_not_depend_on_the_batch(kind, batch_size, models, processor, photos):
    model, logits = models[kind]
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    for answer, row in zip(classify(photos, batch_size=batch_size), logits.softmax(-1), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert [scores[name] for name in NAMES] == pytest.approx(row.tolist(), rel=1e-4, abs=1e-6)


FRESH = """
import json, sys
import lgvit_hf.evaluation.report
assert "evaluate" not in sys.modules
from pathlib import Path
from PIL import Image
from transformers import pipeline
photos, *folders = sys.argv[1:]
photos = [Image.open(file) for file in sorted(Path(photos).iterdir())]
answers = {}
for folder in folders:
    classify = pipeline("image-classification", model=folder, device="cpu")
    scores = [{entry["label"]: entry["score"] for entry in answer} for answer in classify(photos, batch_size=7)]
    answers[type(classify.model).__name__] = scores
print(json.dumps(answers))
"""


def test_pipeline_of_saved_models_in_a_fresh_process(models, folders, photos, tmp_path):
    for index, photo in enumerate(photos):
        photo.save(tmp_path / f"{index:02}.png")
    command = [sys.executable, "-c", FRESH, str(tmp_path), *map(str, folders.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert list(answers) == ["ViTHighway", "SwinHighway"]
    for scores, (_, logits) in zip(answers.values(), models.values(), strict=True):
        for answer, row in zip(scores, logits.softmax(-1), strict=True):
            assert [answer[name] for name in NAMES] == pytest.approx(row.tolist(), rel=1e-4, abs=1e-6)
