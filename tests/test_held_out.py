"""What `lgvit train` says of its data, and that calibration takes samples that were held out of it."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from lgvit_hf import ViTHighway, load_images, train_recipe
from lgvit_hf.cli import inputs, main
from lgvit_hf.data.held_out import TrainingData, digest_of, load_known, read_training_data, write_training_data
from lgvit_hf.data.processing import make_processor
from lgvit_hf.training import distill_exits as growth
from lgvit_hf.training import run as training_run
from tests.tiny import tiny_model

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 1, "patch_size": 4}
FAST = {"max_eval_samples": 8, "batch_size": 4, "max_steps": 2, "disable_tqdm": True, "eval_strategy": "no"}
FAST |= {"save_strategy": "no", "warmup_steps": 0}
NEW = {"backbone": "vit", "image_size": 8, "model_settings": TINY}
EXITS = {"exit_positions": [1, 2], "exit_types": ["linear"]}
SPLIT = {"seed": 3, "validation_share": 0.3}
CALIBRATED = ["--max-accuracy-drop", 1, "--policy", "confidence"]
GROWN = ["--epochs", 1, "--max-accuracy-drop", 1, "--cost", "macs", "--exit-positions", 1, "--exit-types", "linear"]
CANNOT = "its training samples cannot be told apart"


def lgvit(*arguments):
    return main([str(argument) for argument in arguments])


def pixels(image):
    """What an image shows, be it decoded or not."""
    return np.asarray(Image.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image).tobytes()


def pictures(images):
    return set(map(pixels, images["image"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a backbone and of a highway, and the pictures of the digits that either was trained on."""
    home, seen = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        train = training_run.train

        def spy(model, processor, train_dataset, output, **settings):
            seen[Path(output).name] = pictures(train_dataset.images)
            return train(model, processor, train_dataset, output, **settings)

        patch.setattr(training_run, "train", spy)
        train_recipe(data="digits", stage="backbone", output=home / "backbone", **NEW, **FAST, **SPLIT)
        before = str(home / "backbone")
        train_recipe(data="digits", model=before, output=home / "highway", **EXITS, **FAST, **SPLIT)
    return home, seen


@pytest.fixture
def highway(trained, tmp_path):
    shutil.copytree(trained[0] / "highway", tmp_path / "highway")
    return tmp_path / "highway"


def spied(monkeypatch):
    """The images that the table of exits is made of."""
    used, collect = [], inputs.collect

    def spy(model, dataset, **settings):
        used.extend(dataset.images["image"][:])
        return collect(model, dataset, **settings)

    monkeypatch.setattr(inputs, "collect", spy)
    return used


def write_photos(folder, numbers, seed=0):
    rng = np.random.default_rng(seed)
    for name, count in numbers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


# -- what is written -----------------------------------------------------------------------------------------------


def test_training_says_what_it_was_trained_on(trained):
    home, seen = trained
    splits = load_images("digits", **SPLIT)
    for name in ("backbone", "highway"):
        (entry,) = json.loads((home / name / "training.json").read_text())["data"]
        assert entry["source"] == "digits" and entry["seed"] == 3 and entry["validation_share"] == 0.3
        assert entry["digest"] == digest_of(splits) and entry["used"] == ["train"]
        assert entry["samples"] == {part: len(getattr(splits, part)) for part in ("train", "validation", "test")}
        assert seen[name] == pictures(splits.train)


def test_a_chain_names_all_data(trained, tmp_path):
    """Other data, another split, and a model that does not say."""
    home, _ = trained
    folder = write_photos(tmp_path / "photos", dict.fromkeys(map(str, range(10)), 6))
    start = {"model": str(home / "highway"), "stage": "2", **FAST}
    data = train_recipe(data=str(folder), output=tmp_path / "other", **start)["data"]
    assert [entry["source"] for entry in data] == ["digits", str(folder)]
    assert load_known(str(folder), tmp_path / "other").doubt == "it was trained on digits too"
    data = train_recipe(data="digits", output=tmp_path / "split", seed=4, **start)["data"]
    assert [entry["seed"] for entry in data] == [3, 4]
    known = load_known("digits", tmp_path / "split")
    assert known.data.seed == 4 and "as it was split by seed 3" in known.warning("validation")
    shutil.copytree(home / "highway", tmp_path / "silent")
    (tmp_path / "silent" / "training.json").unlink()
    start["model"] = str(tmp_path / "silent")
    data = train_recipe(data="digits", output=tmp_path / "after", **start)["data"]
    assert [entry["source"] for entry in data] == [None, "digits"]
    assert "does not name all data" in load_known("digits", tmp_path / "after").warning("validation")


# -- calibrate -----------------------------------------------------------------------------------------------------


def test_calibration_takes_samples_that_were_held_out(highway, trained, tmp_path, monkeypatch, capsys):
    used = spied(monkeypatch)
    assert lgvit("calibrate", highway, "--data", "digits", *CALIBRATED, "--output", tmp_path / "copy") == 0
    ours = set(map(pixels, used))
    assert ours == pictures(load_images("digits", **SPLIT).validation) and not ours & trained[1]["highway"]
    said = capsys.readouterr()
    assert CANNOT not in said.err and "too optimistic" not in said.err
    assert "samples of digits, validation; split by seed 3 and validation share 0.3, as in the training" in said.out
    found = json.loads((tmp_path / "copy" / "calibration.json").read_text())
    assert found["data"] == "digits" and found["split"] == "validation" and found["samples"] == len(used)
    assert found["seed"] == 3 and found["validation_share"] == 0.3 and found["warning"] is None
    assert read_training_data(tmp_path / "copy") == read_training_data(highway)
    report = tmp_path / "results.json"
    assert lgvit("evaluate", highway, "--data", "digits", "--timed-batch-sizes", 4, "--output", report) == 0
    assert json.loads(report.read_text())["overall"]["samples"] == 360


def test_a_split_of_one_s_own(highway, caplog):
    """What is typed is done; what it means is said."""
    words = ["calibrate", highway, "--data", "digits", *CALIBRATED]
    for more, message in (
        (["--split", "test"], None),
        (["--seed", 3, "--validation-share", 0.3], None),
        (["--split", "train"], "the train split of digits was used in its training, so that calibration on it is too"),
        (["--seed", 1], "as it was split by seed 3 and validation share 0.3, which gives other samples now"),
    ):
        caplog.clear()
        assert lgvit(*words, *more) == 0
        told = [record.getMessage() for record in caplog.records if "optimistic" in record.getMessage()]
        assert len(told) == (message is not None) and (message is None or message in told[0])
        assert json.loads((highway / "calibration.json").read_text())["warning"] == (told[0] if told else None)


def test_what_is_not_known_is_said_once(highway, tmp_path, caplog):
    folder = write_photos(tmp_path / "photos", dict.fromkeys(map(str, range(10)), 20))
    assert lgvit("calibrate", highway, "--data", folder, *CALIBRATED) == 0
    (told,) = [record.getMessage() for record in caplog.records if CANNOT in record.getMessage()]
    assert "(it was trained on digits)" in told and "give images that were held out" in told
    (highway / "training.json").unlink()
    caplog.clear()
    assert lgvit("calibrate", highway, "--data", "digits", *CALIBRATED) == 0
    (told,) = [record.getMessage() for record in caplog.records if CANNOT in record.getMessage()]
    assert "there is no training.json with its data" in told and "\n" not in told


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "data must be a list"),
        ('{"data": {}}', "data must be a list"),
        ('{"data": [1]}', "1 must be a mapping with a source"),
        ('{"data": [{"source": 3}]}', "source: 3 must be text or null"),
        ('{"data": [{"source": "digits", "seed": "a"}]}', "seed: 'a' must be a whole number"),
        ('{"data": [{"source": "digits", "validation_share": 2.0}]}', "validation_share: 2.0 must be"),
        ('{"data": [{"source": "digits", "used": ["all"]}]}', "used: .* must be a list of train"),
        ('{"data": [{"source": "digits", "samples": [1]}]}', "samples: .* must be a mapping"),
    ],
)
def test_a_damaged_file(content, message, tmp_path):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_known("digits", tmp_path)
    assert "restore it, or remove it" in str(error.value)


@pytest.mark.version_independent
def test_files_of_other_versions_are_read(tmp_path):
    (tmp_path / "training.json").write_text('{"steps": 3}')
    assert read_training_data(tmp_path) == []
    (tmp_path / "training.json").write_text('{"data": [{"source": "digits", "colour": "grey"}]}')
    assert read_training_data(tmp_path) == [TrainingData("digits")]


@pytest.mark.version_independent
def test_data_are_known_again_where_they_were_moved_and_not_where_they_changed(tmp_path):
    folder = write_photos(tmp_path / "photos", {"cat": 20, "dog": 20})
    splits = load_images(str(folder), seed=5)
    write_training_data(tmp_path, [TrainingData.of(splits, str(folder), seed=5)])
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    known = load_known(str(moved), tmp_path)
    assert known.doubt is None and pictures(known.splits.validation) == pictures(splits.validation)
    write_photos(moved, {"cat": 21})
    known = load_known(str(moved), tmp_path)
    assert known.doubt == f"it was trained on {folder}" and known.data.seed == 0
    write_photos(folder, {"cat": 21})
    assert "which gives other samples now" in load_known(str(folder), tmp_path).doubt


@pytest.mark.version_independent
def test_the_digest_is_of_the_split(tmp_path):
    """Of samples that all look alike to it, too."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("RGB", (4, 4))] * 40, "label": [0] * 20 + [1] * 20}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    source = str(tmp_path / "train.parquet")
    digests = [digest_of(load_images(source, seed=seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert digest_of(load_images(source, validation_share=0.3)) not in digests


# -- grow ----------------------------------------------------------------------------------------------------------


def grown_images(monkeypatch):
    """The pictures of which states are kept, and how many of them are trained on."""
    seen, cached = {}, growth.cached_states
    fill, train = cached.fill_cache, cached.train_exits

    def filling(cache, model, items, indices, **settings):
        seen["all"] = [pixels(items.images[index]["image"]) for index in indices]
        return fill(cache, model, items, indices, **settings)

    def training(model, cache, num_trained, *rest, **settings):
        seen["number"] = num_trained
        return train(model, cache, num_trained, *rest, **settings)

    monkeypatch.setattr(cached, "fill_cache", filling)
    monkeypatch.setattr(cached, "train_exits", training)
    return seen


@pytest.mark.parametrize("more", [[], ["--limit", 100, "--ignore-labels"]])
def test_exits_are_chosen_on_what_the_backbone_has_not_seen(more, trained, tmp_path, monkeypatch, caplog, capsys):
    home, trained_on = trained
    seen = grown_images(monkeypatch)
    assert lgvit("grow", home / "backbone", "digits", tmp_path / "grown", *GROWN, *more) == 0
    splits = load_images("digits", **SPLIT)
    first, chosen_on = set(seen["all"][: seen["number"]]), set(seen["all"][seen["number"] :])
    assert first <= pictures(splits.train) and chosen_on <= pictures(splits.validation)
    assert chosen_on and not chosen_on & trained_on["backbone"]
    assert len(seen["all"]) == (100 if more else len(splits.train) + len(splits.validation))
    assert not [record for record in caplog.records if "optimistic" in record.getMessage()]
    said = capsys.readouterr().out
    assert "images of digits: train for the exits, validation for the choice; split by seed 3" in said
    report = json.loads((tmp_path / "grown" / "grow.json").read_text())
    assert report["samples"]["data"] == "digits" and report["samples"]["seed"] == 3
    assert report["images"]["held_out"] == len(seen["all"]) - seen["number"] and report["samples"]["warning"] is None
    # the exits were chosen on these
    known = load_known("digits", tmp_path / "grown")
    assert known.doubt is None and known.warning("test") is None
    assert "take --split test" in known.warning("validation")


def test_grow_says_where_it_cannot_know(trained, tmp_path, caplog):
    home, _ = trained
    shutil.copytree(home / "backbone", tmp_path / "silent")
    (tmp_path / "silent" / "training.json").unlink()
    assert lgvit("grow", tmp_path / "silent", "digits", tmp_path / "grown", *GROWN) == 0
    (told,) = [record.getMessage() for record in caplog.records if CANNOT in record.getMessage()]
    assert "there is no training.json" in told
    splits = load_images("digits", validation_share=0.2)
    report = json.loads((tmp_path / "grown" / "grow.json").read_text())
    assert report["images"]["held_out"] == len(splits.validation) and report["samples"]["warning"] == told
    assert [entry.source for entry in read_training_data(tmp_path / "grown")] == [None, "digits"]


def test_images_without_labels(trained, tmp_path, caplog):
    folder = write_photos(tmp_path / "flat", {"": 60})
    assert lgvit("grow", trained[0] / "backbone", folder, tmp_path / "grown", *GROWN) == 0
    (told,) = [record.getMessage() for record in caplog.records if CANNOT in record.getMessage()]
    assert "it was trained on digits" in told
    report = json.loads((tmp_path / "grown" / "grow.json").read_text())
    assert report["images"] == {"trained": 48, "held_out": 12, "labels": False} and report["samples"]["split"] is None
    assert [entry.digest is None for entry in read_training_data(tmp_path / "grown")] == [False, True]
    assert load_known("digits", tmp_path / "grown").doubt == f"it was trained on {folder} too"


# -- train ---------------------------------------------------------------------------------------------------------


def test_what_was_ignored_is_refused(trained, tmp_path, capsys):
    data = ["train", "--data", "digits", "--output", tmp_path / "out"]
    new = [*data, "--backbone", "vit", "--image-size", 8]
    assert lgvit(*new, "--epochs", 3, "--num_train_epochs", 5) == 2
    assert "num_train_epochs: 5.0 and epochs: 3.0 are the same option; give one" in capsys.readouterr().err
    assert lgvit(*new, "--batch-size", 3, "--per_device_train_batch_size", 5) == 2
    assert "per_device_train_batch_size: 5 and batch_size: 3 are the same option" in capsys.readouterr().err
    assert lgvit(*data, "--model", trained[0] / "backbone", "--image-size", 16) == 2
    assert "image_size: 16 is of a new --backbone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "epochs"), [({}, 10), ({"epochs": 3}, 3), ({"num_train_epochs": 5}, 5)])
def test_either_name_counts(options, epochs, tmp_path, capsys):
    assert train_recipe(data="digits", dry_run=True, output=tmp_path / "out", **NEW, **options) is None
    assert f"num_train_epochs: {epochs}" in capsys.readouterr().out


def test_a_model_saved_anew_says_nothing_of_the_one_before(tmp_path):
    """Until its own run is over."""
    write_training_data(tmp_path, [TrainingData("digits")])
    training_run.save_trained(tiny_model("vit"), make_processor(16), tmp_path)
    assert ViTHighway.from_pretrained(tmp_path) is not None and read_training_data(tmp_path) == []
