"""`Predictor` and `lgvit predict`: the model's own answers, row by row, however often it was stopped."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgvit_hf import Predictor
from lgvit_hf.cli import main
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, make_processor
from lgvit_hf.serving import batch_predict as predict
from lgvit_hf.serving import image_sources
from lgvit_hf.serving.predictor import ANSWERS, open_image
from tests.clear import clear, clear_model
from tests.tiny import IMAGE_SIZE, NUM_LABELS, tiny_images, tiny_model

one_version = pytest.mark.version_independent

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = [1.5, 1.0, 0.8, 1.0, 2.0]


@pytest.fixture(scope="module")
def known():
    """A model, and ten images at each of its five exits."""
    return clear_model("vit", 10, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def model(known):
    return known[0]


@pytest.fixture(scope="module")
def images(known):
    return known[1]


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint)


def draw_photos(folder, model):
    """Twelve images that are clear to a model, in two folders."""
    drawn = (255 * tiny_images(60, (18, 20)).sigmoid()).byte().permute(0, 2, 3, 1).numpy()
    pixels = make_processor(IMAGE_SIZE)(list(drawn), return_tensors="pt")["pixel_values"]
    chosen = drawn[clear(model, pixels).numpy()][:12]
    assert len(chosen) == 12
    for number, image in enumerate(chosen):
        file = folder / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


@pytest.fixture(scope="module")
def photos(model, tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"), model)


def files_in(folder):
    return sorted(str(file) for file in folder.rglob("*.png"))


def assert_same(answers, expected):
    assert set(answers) == set(expected)
    for name in expected:
        if answers[name].dtype == np.float32:
            np.testing.assert_allclose(answers[name], expected[name], atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(answers[name], expected[name], err_msg=name)


@torch.no_grad()
def expected_of(model, pixels):
    output = model(pixels)
    answers = {name: output[name].numpy() for name in ANSWERS if name != "label"}
    return {**answers, "label": answers["logits"].argmax(-1)}


# -- Predictor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_answers_are_the_model_s(model, images, predictor, dtype):
    expected = expected_of(model, images)
    assert expected["exit_index"].tolist() == [0, 1, 2, 3, 4] * 10
    batch = images.numpy().astype(dtype)
    batch.setflags(write=False)
    answers = predictor({"pixel_values": batch})
    assert_same(answers, expected)
    assert [answers[name].dtype.kind for name in ANSWERS] == list("fiiif")
    assert [answers[name].shape for name in ANSWERS] == [(50, NUM_LABELS)] + [(50,)] * 4


@one_version
def test_large_batches_run_in_parts(predictor, checkpoint, images):
    in_parts, batch, sizes = Predictor(checkpoint, max_batch_size=7), {"pixel_values": images.numpy()}, []
    in_parts.model.register_forward_pre_hook(
        lambda model, _, given: sizes.append(len(given["pixel_values"])), with_kwargs=True
    )
    assert_same(in_parts(batch), predictor(batch))
    assert sizes == [7] * 7 + [1]


def test_another_policy(checkpoint):
    pixels = {"pixel_values": tiny_images(4).numpy()}
    assert Predictor(checkpoint, "never")(pixels)["exit_layer"].tolist() == [6] * 4
    fixed = Predictor(str(checkpoint), {"name": "fixed", "exit_index": 1})
    assert fixed(pixels)["exit_layer"].tolist() == [3] * 4
    with pytest.raises(ValueError, match="unknown policy name 'sometimes'"):
        Predictor(checkpoint, "sometimes")(pixels)


@one_version
def test_other_columns_are_handed_back_and_nothing_is_overwritten(predictor):
    pixels = tiny_images(3).numpy()
    answers = predictor({"pixel_values": pixels, "path": np.array(["a", "b", "c"])})
    assert sorted(answers) == sorted([*ANSWERS, "path"]) and answers["path"].tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="'label' is a column of the answers"):
        predictor({"pixel_values": pixels, "label": np.arange(3)})


@one_version
def test_probabilities_have_the_temperature_of_each_exit(predictor, images):
    answers = predictor({"pixel_values": images.numpy()})
    chances = predictor.probabilities(answers)
    assert len(set(answers["exit_index"])) == 5
    scaled = np.exp(answers["logits"] / np.array(TEMPERATURE)[answers["exit_index"]][:, None])
    np.testing.assert_allclose(chances, scaled / scaled.sum(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(chances.max(-1), answers["exit_score"], atol=1e-6)


@one_version
def test_an_empty_batch_has_empty_answers(predictor):
    for batch in ({"pixel_values": np.zeros((0, 3, IMAGE_SIZE, IMAGE_SIZE))}, {"image": np.zeros(0, dtype=object)}):
        answers = predictor(batch)
        assert [answers[name].shape for name in ANSWERS] == [(0, NUM_LABELS)] + [(0,)] * 4
        assert [answers[name].dtype.kind for name in ANSWERS] == list("fiiif")


def with_value(value):
    pixels = tiny_images(3).numpy()
    pixels[1, 2, 3, 4] = value
    return pixels


@one_version
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "one column 'pixel_values' or one column 'image'; it has none"),
        ({"pixels": np.zeros(3)}, r"it has \['pixels'\]"),
        ({"pixel_values": np.zeros(3), "image": np.zeros(3)}, "one column 'pixel_values' or one column 'image'"),
        ({"pixel_values": [[0.0]]}, "list must be a numpy array of floats"),
        (
            {"pixel_values": np.zeros((2, 3, 16, 16), np.uint8)},
            "uint8 must be .*raw images.*go into the column 'image'",
        ),
        ({"pixel_values": np.zeros((2, 3, 16, 16), np.int64)}, "int64 must be a numpy array of floats"),
        ({"pixel_values": np.zeros((2, 3, 16, 16), object)}, "object must be a numpy array of floats"),
        ({"pixel_values": np.zeros((3, 16, 16))}, r"shape \(3, 16, 16\) must be \(batch, channels, height, width\)"),
        ({"pixel_values": np.zeros((2, 16, 16, 3))}, r"\(2, 16, 16, 3\) must be \(batch, 3, height, width\)"),
        ({"pixel_values": np.zeros((2, 3, 8, 16))}, "8 x 16 pixels, but the model takes 16 x 16"),
        ({"pixel_values": with_value(np.nan)}, "sample 1 has values that are NaN or infinite"),
        ({"pixel_values": with_value(-np.inf)}, "sample 1 has values that are NaN or infinite"),
        ({"pixel_values": with_value(0).astype(np.float64) * 1e300}, "sample 0 has values that are NaN or infinite"),
        ({"image": np.zeros((2, 8, 8, 3), np.float32)}, "image 0: .*float32 must be .* uint8, values from 0 to 255"),
        ({"image": np.zeros((2, 8, 8, 4), np.uint8)}, r"image 0: an image of shape \(8, 8, 4\)"),
        ({"image": np.zeros((2, 0, 8, 3), np.uint8)}, "image 0: an image of shape"),
        ({"image": np.array(["/etc/passwd"])}, "'/etc/passwd' is a path; Predictor.images takes those"),
        (
            {"image": np.array([b"nothing"], dtype=object)},
            "image 0: no readable image: not an image, or none of PNG",
        ),
        ({"image": np.array([7], dtype=object)}, "image 0: no readable image"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_batches(batch, message, predictor):
    with pytest.raises(ValueError, match=message):
        predictor(batch)


@one_version
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_bad_batch_size(size):
    with pytest.raises(ValueError, match="max_batch_size=.* must be an integer of at least 1"):
        Predictor("anywhere", max_batch_size=size)


def test_what_is_no_highway(tmp_path, checkpoint):
    batch = {"pixel_values": tiny_images(1).numpy()}
    with pytest.raises(OSError, match="not a saved model"):
        Predictor(tmp_path)(batch)
    tiny_model("vit", num_labels=1).save_pretrained(tmp_path / "regression")
    with pytest.raises(ValueError, match=r"1 label\(s\).*does not choose one label"):
        Predictor(tmp_path / "regression")(batch)
    tiny_model("vit").save_pretrained(tmp_path / "bare")
    with pytest.raises(OSError, match="preprocessor"):
        Predictor(tmp_path / "bare").images([np.zeros((4, 4, 3), np.uint8)])


def test_images_in_any_form(model, checkpoint, photos):
    files = files_in(photos)
    opened = [Image.open(file) for file in files]
    datasets = pytest.importorskip("datasets")
    # as `lgvit evaluate` prepares them
    dataset = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    processed = ProcessedImages(dataset, make_processor(IMAGE_SIZE))
    expected = expected_of(model, torch.stack([item["pixel_values"] for item in processed]))
    predictor = Predictor(checkpoint, max_batch_size=5)
    arrays = [np.asarray(image) for image in opened]
    for sources in (files, list(map(Path, files)), opened, arrays, [Path(file).read_bytes() for file in files]):
        assert_same(predictor.images(sources), expected)
    column = np.empty(len(files), dtype=object)
    column[:] = [np.pad(arrays[0], [(0, 2), (0, 0), (0, 0)]), *arrays[1:]]
    assert_same(
        {name: rows[1:] for name, rows in predictor({"image": column}).items()},
        {n: e[1:] for n, e in expected.items()},
    )
    assert_same(predictor({"image": np.stack(arrays)}), expected)


@one_version
def test_images_are_upright_and_in_rgb(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    read = open_image(tmp_path / "turned.png")
    assert read.size == (4, 6) and read.mode == "RGB"
    assert np.array_equal(np.asarray(read)[..., 0], np.rot90(np.asarray(image), -1))
    assert np.array_equal(np.asarray(open_image(np.asarray(image)[..., None])), np.asarray(image.convert("RGB")))
    whole = (tmp_path / "turned.png").read_bytes()
    for damaged in (b"", whole[:50], whole[:-20], whole[:60] + b"\xff" + whole[61:]):
        with pytest.raises(ValueError, match="no readable image: "):
            open_image(damaged)
    with pytest.raises(ValueError, match="nowhere.png is no readable image: No such file"):
        open_image(tmp_path / "nowhere.png")


def test_it_travels_as_its_arguments(checkpoint, images, monkeypatch):
    """To another process, too: see `test_several_processes_answer_alike_and_may_die`."""
    policy = {"name": "fixed", "exit_index": 1}
    predictor, batch = Predictor(checkpoint, policy, max_batch_size=3), {"pixel_values": images[:8].numpy()}
    answers = predictor(batch)
    assert answers["exit_index"].tolist() == [1] * 8
    sent = pickle.dumps(predictor)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert there._opened is None and (there.path, there.policy, there.max_batch_size) == (checkpoint, policy, 3)
    assert_same(there(batch), answers)
    # a forked process has the object, but may not use the parent's model
    here = predictor.model
    assert predictor.model is here and there.model is not here
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert predictor.model is not here


@one_version
def test_an_exported_folder_answers_alike(tmp_path):
    pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    from lgvit_hf import export_onnx

    small = {"num_hidden_layers": 2, "exit_positions": [1], "exit_types": "linear"}
    model, images = clear_model("vit", 15, temperature=[1.5, 0.7], **small)
    checkpoint, photos = tmp_path / "checkpoint", tmp_path / "photos"
    photos.mkdir()
    draw_photos(photos, model)
    model.save_pretrained(checkpoint)
    make_processor(IMAGE_SIZE).save_pretrained(checkpoint)
    export_onnx(model, tmp_path / "onnx", processor=make_processor(IMAGE_SIZE))
    theirs, ours = Predictor(tmp_path / "onnx"), Predictor(checkpoint)
    batch = {"pixel_values": images.numpy()}
    assert ours(batch)["exit_index"].tolist() == [0, 1] * 15
    assert_same(theirs(batch), ours(batch))
    assert_same(theirs.images(files_in(photos)), ours.images(files_in(photos)))
    np.testing.assert_allclose(theirs.probabilities(theirs(batch)), ours.probabilities(ours(batch)), atol=1e-5)
    assert pickle.loads(pickle.dumps(theirs))._opened is None
    assert lgvit(tmp_path / "onnx", photos, "--output", tmp_path / "onnx.csv") == 0
    assert lgvit(checkpoint, photos, "--output", tmp_path / "ours.csv") == 0
    answers = [
        [(row["path"], row["label"], row["exit_index"]) for row in rows_of(tmp_path / name)]
        for name in ("onnx.csv", "ours.csv")
    ]
    assert len(answers[0]) == 12 and answers[0] == answers[1]


# -- lgvit predict -------------------------------------------------------------------------------------------------


def lgvit(*arguments):
    return main(["predict", *map(str, arguments)])


def rows_of(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream)) if file.suffix == ".csv" else list(map(json.loads, stream))


@one_version
def test_rows_are_the_predictor_s(predictor, checkpoint, photos, tmp_path, capsys):
    files = files_in(photos)
    answers = predictor.images(files)
    chances = predictor.probabilities(answers)
    more = ["--top-k", 2, "--probabilities", "--batch-size", 5]
    for suffix in (".jsonl", ".csv", ".parquet"):
        output = tmp_path / f"rows{suffix}"
        assert lgvit(checkpoint, photos, "--output", output, *more) == 0
        assert f"12 images in {output}: mean depth {answers['exit_layer'].mean():.2f} of 6" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.csv", "rows.jsonl", "rows.parquet"]
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row["path"] for row in rows] == files and all(row["error"] is None for row in rows)
    best = np.argsort(-answers["logits"])[:, :2]
    for number, row in enumerate(rows):
        label = answers["label"][number]
        assert row["label"] == f"LABEL_{label}" and row["top_labels"] == [f"LABEL_{each}" for each in best[number]]
        assert row["exit_layer"] == answers["exit_layer"][number]
        assert row["exit_index"] == answers["exit_index"][number]
        assert row["exit_score"] == pytest.approx(answers["exit_score"][number], abs=1e-5)
        assert row["probabilities"] == pytest.approx(chances[number], abs=1e-5)
        assert row["score"] == row["probabilities"][label] == row["top_scores"][0]
    # the other formats hold the same
    for row, other in zip(rows, rows_of(tmp_path / "rows.csv"), strict=True):
        read = {
            name: json.loads(value) if value[:1] in tuple("[0123456789") else value for name, value in other.items()
        }
        assert {**read, "error": None} == row
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names == list(rows[0])
    for row, other in zip(rows, table.to_pylist(), strict=True):
        assert {name: value for name, value in other.items() if isinstance(value, (str, int))} == {
            name: value for name, value in row.items() if isinstance(value, (str, int))
        }
        np.testing.assert_array_equal(np.float32(other["probabilities"]), np.float32(row["probabilities"]))


def test_what_cannot_be_read_is_a_row(checkpoint, photos, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    good = Path(files_in(photos)[0]).read_bytes()
    contents = {"a.png": good, "b.png": good[: len(good) // 2], "c.jpg": b"text", "d.png": b"", "e.PNG": good}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert lgvit(checkpoint, folder, "--output", tmp_path / "rows.csv") == 1
    assert "3 could not be read: the column 'error' says why" in capsys.readouterr().out
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "rows.csv")}
    assert [name for name, row in rows.items() if row["error"]] == ["b.png", "c.jpg", "d.png"]
    assert all(
        "is no readable image: " in rows[name]["error"] and not rows[name]["label"] for name in ("b.png", "c.jpg")
    )
    assert rows["a.png"]["label"] == rows["e.PNG"]["label"] != ""
    # if none can be read, that is no reason to stop either
    assert lgvit(checkpoint, folder / "c.jpg", folder / "d.png", "--output", tmp_path / "none.csv") == 1
    assert [row["label"] for row in rows_of(tmp_path / "none.csv")] == ["", ""]


@one_version
def test_folders_files_and_patterns(checkpoint, photos, tmp_path, monkeypatch):
    (tmp_path / "here" / "deep" / ".hidden").mkdir(parents=True)
    for name in ("one.png", "deep/two.png", "deep/three.tiff", "deep/._two.png", "deep/.hidden/four.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / "here" / name, format="PNG")
    (tmp_path / "here" / "linked").symlink_to(photos / "a")
    monkeypatch.chdir(tmp_path)

    def found(*paths):
        return image_sources.find_images(paths, None).files

    linked = [f"here/linked/{number:02}.png" for number in range(0, 12, 2)]
    assert found("here/*/t*") == ["here/deep/three.tiff", "here/deep/two.png"]
    assert found("here/**/[01]*.png") == linked
    (tmp_path / "here" / "deep" / "loop").symlink_to("..")
    assert found("here") == ["here/deep/three.tiff", "here/deep/two.png", *linked, "here/one.png"]
    assert found("here/one.png", "here/linked/", "here/one.png") == ["here/one.png", *linked]
    assert found("here/notes.txt") == ["here/notes.txt"]  # named, so tried
    (tmp_path / "here" / "odd[1].png").write_bytes(b"")
    assert found("here/odd[1].png") == ["here/odd[1].png"]


@one_version
def test_what_lies_beside_images_is_no_dataset_and_no_pipe_is_waited_for(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "deep" / "one.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    # predictions of an earlier run
    (tmp_path / "rows.parquet").write_bytes(b"")
    images = image_sources.find_images([str(tmp_path)], None)
    assert images.files == [str(tmp_path / "broken.png"), str(tmp_path / "deep" / "one.png")]


@one_version
def test_a_dataset(checkpoint, model, tmp_path, capsys):
    tiny_model("vit", num_labels=10).save_pretrained(tmp_path / "ten")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "ten")
    assert lgvit(tmp_path / "ten", "digits", "--output", tmp_path / "a.csv") == 2
    assert "digits: one of its splits must be named; splits there: train, test" in capsys.readouterr().err
    assert lgvit(tmp_path / "ten", "digits", "--split", "dev", "--output", tmp_path / "a.csv") == 2
    assert "digits: no split called 'dev'; splits there: train, test" in capsys.readouterr().err
    assert lgvit(tmp_path / "ten", "digits", "--split", "test", "--output", tmp_path / "a.csv") == 0
    rows, test = rows_of(tmp_path / "a.csv"), load_images("digits").test
    answers = Predictor(tmp_path / "ten").images([test[number]["image"] for number in range(len(test))])
    assert [row["path"] for row in rows] == [f"test/{number}" for number in range(360)]
    assert [row["label"] for row in rows] == [f"LABEL_{label}" for label in answers["label"]]
    # one file is one split, and needs no name
    test.cast_column("image", test.features["image"]).to_parquet(tmp_path / "test.parquet")
    assert lgvit(tmp_path / "ten", tmp_path / "test.parquet", "--output", tmp_path / "b.csv") == 0
    again = rows_of(tmp_path / "b.csv")
    assert [row["path"] for row in again[:2]] == ["0", "1"]
    assert [row["label"] for row in again] == [row["label"] for row in rows]


@one_version
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PHOTOS"], "lgvit predict needs --output"),
        (["PHOTOS", "--output", "out.txt"], "written as .parquet, .csv, .jsonl"),
        (["PHOTOS", "--output", "out"], "written as .parquet, .csv, .jsonl"),
        (
            ["PHOTOS", "--output", "OUT", "--workers", "0"],
            "argument --workers: '0' must be a whole number of at least 1",
        ),
        (
            ["PHOTOS", "--output", "OUT", "--batch-size", "0"],
            "argument --batch-size: '0' must be a whole number of at least 1",
        ),
        (["PHOTOS", "--output", "OUT", "--top-k", "6"], "top_k=6 must be from 1 to 5"),
        (["PHOTOS", "--output", "OUT", "--threshold", "0.5"], "--threshold goes with --policy"),
        (["PHOTOS", "--output", "OUT", "--split", "test"], "--split test goes with a dataset"),
        (["PHOTOS", "--output", "PHOTOS/a/00.png"], "written as .parquet"),
        (["./nowhere", "--output", "OUT"], "./nowhere: no such file or folder"),
        (["no*where", "--output", "OUT"], "no*where: no file matches"),
        (["EMPTY", "--output", "OUT"], "no images in this folder"),
        (["PHOTOS", "DATA.parquet", "--output", "OUT"], "DATA.parquet is a dataset; give it alone"),
        (["PHOTOS", "--output", "THERE.csv"], "is there already; choose another output, or delete it"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, checkpoint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    for name in ("DATA.parquet", "THERE.csv"):
        (tmp_path / name).write_text("precious")
    places = {"PHOTOS": photos, "OUT": "out.csv", "PHOTOS/a/00.png": photos / "a" / "00.png"}
    assert lgvit(checkpoint, *(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lgvit: ") and message in error
    assert (tmp_path / "THERE.csv").read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["DATA.parquet", "EMPTY", "THERE.csv"]


@one_version
def test_without_pyarrow(checkpoint, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert lgvit(checkpoint, photos, "--output", tmp_path / "a.parquet") == 2
    assert 'pip install "lgvit-hf[train]"; .csv and .jsonl need nothing' in capsys.readouterr().err
    assert lgvit(checkpoint, photos, "--output", tmp_path / "a.csv") == 0


@one_version
def test_options_from_a_file(checkpoint, photos, tmp_path):
    (tmp_path / "run.yaml").write_text(f"output: {tmp_path / 'a.csv'}\npolicy: never\ntop_k: 1\n")
    assert lgvit(checkpoint, photos, "--config", tmp_path / "run.yaml") == 0
    rows = rows_of(tmp_path / "a.csv")
    assert {row["exit_layer"] for row in rows} == {"6"} and json.loads(rows[0]["top_labels"]) == [rows[0]["label"]]


# -- stopped, killed, gone on with ---------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(predict, "SHARD", 4)


@pytest.fixture
def whole(checkpoint, photos, tmp_path, small_shards):
    """The command, without its output; and the file that it writes undisturbed."""
    (tmp_path / "broken.png").write_bytes(b"broken")
    command = [checkpoint, photos, tmp_path / "broken.png", "--batch-size", 4]
    assert lgvit(*command, "--output", tmp_path / "whole.csv") == 1
    return command, tmp_path / "whole.csv"


def stop_at(monkeypatch, shard, stop):
    calls, work = iter(range(100)), predict._Work.__call__

    def stopping(self, images):
        if next(calls) == shard:
            stop()
        return work(self, images)

    monkeypatch.setattr(predict._Work, "__call__", stopping)


def interrupt():
    raise KeyboardInterrupt


@one_version
def test_ctrl_c_keeps_what_is_done(whole, tmp_path, monkeypatch, capsys):
    command, undisturbed = whole
    output, parts = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    for done in (2, 3):
        with monkeypatch.context() as patched:
            stop_at(patched, 2 if done == 2 else 1, interrupt)
            assert lgvit(*command, "--output", output) == 130
        said = capsys.readouterr().err
        assert f"stopped; {4 * done} of 13 images are kept in {parts}; the same command goes on" in said
        assert not output.exists() and len(list(parts.glob("0*.jsonl"))) == done
    assert lgvit(*command, "--output", output) == 1
    assert "(12 were answered before)" in capsys.readouterr().out
    assert output.read_bytes() == undisturbed.read_bytes() and not parts.exists()


KILLED = """
import os, signal, sys
from lgvit_hf.cli import main
from lgvit_hf.serving import batch_predict as predict
from lgvit_hf.serving import image_sources

calls, work = iter(range(100)), predict._Work.__call__

def killed(self, images):
    if next(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(self, images)

predict.SHARD, predict._Work.__call__ = 4, killed
main(sys.argv[1:])
"""


@one_version
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_kill_9_keeps_what_is_done(whole, tmp_path):
    command, undisturbed = whole
    output = tmp_path / "out.csv"
    call = [sys.executable, "-c", KILLED, "predict", *map(str, command), "--output", str(output)]
    assert subprocess.run(call, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists() and len(list((tmp_path / "out.csv.parts").glob("0*.jsonl"))) == 2
    (tmp_path / "out.csv.parts" / ".000002.jsonl-x").write_text(
        "half a fi"
    )  # as a kill in the middle of writing leaves it
    assert lgvit(*command, "--output", output) == 1
    assert output.read_bytes() == undisturbed.read_bytes()
    assert not (tmp_path / "out.csv.parts").exists()


@one_version
def test_other_parts_are_refused(whole, checkpoint, photos, tmp_path, monkeypatch, capsys):
    command, _ = whole
    output, parts = tmp_path / "out.csv", tmp_path / "out.csv.parts"
    with monkeypatch.context() as patched:
        stop_at(patched, 1, interrupt)
        assert lgvit(*command, "--output", output) == 130
    tiny_model("vit", seed=1).save_pretrained(tmp_path / "other")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "other")
    sharper = tmp_path / "sharper"
    Predictor(checkpoint).model.save_pretrained(sharper)
    make_processor(IMAGE_SIZE).save_pretrained(sharper)
    processor = json.loads((sharper / "preprocessor_config.json").read_text())
    (sharper / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0.4] * 3}))
    before = {file: file.read_bytes() for file in parts.iterdir()}
    others = {
        "model": [tmp_path / "other", *command[1:]],
        "image processor": [sharper, *command[1:]],
        "policy": [*command, "--policy", "never"],
        "images": [checkpoint, photos / "a", *command[2:]],
        "batch_size": [*command[:-1], 2],
        "top_k": [*command, "--top-k", 1],
        "probabilities": [*command, "--probabilities"],
    }
    for name, other in others.items():
        capsys.readouterr()
        assert lgvit(*other, "--output", output) == 2
        assert f"out.csv.parts was begun with another {name}: " in capsys.readouterr().err
    (parts / "plan.json").write_text("{")
    assert lgvit(*command, "--output", output) == 2 and "is damaged" in capsys.readouterr().err
    (parts / "plan.json").unlink()
    assert lgvit(*command, "--output", output) == 2 and "not of lgvit predict" in capsys.readouterr().err
    assert not output.exists()
    assert {file: file.read_bytes() for file in parts.iterdir()} == {
        f: b for f, b in before.items() if f.name != "plan.json"
    }


class Dies(predict._Work):
    """Is killed at a broken image, as by a kernel that is short of memory."""

    def __call__(self, shard):
        if any(path.endswith("broken.png") for path, _ in shard):
            os._exit(9)
        return super().__call__(shard)


@one_version
def test_several_processes_answer_alike_and_may_die(whole, tmp_path, monkeypatch, capsys):
    command, undisturbed = whole
    output = tmp_path / "out.csv"
    with monkeypatch.context() as patched:
        patched.setattr(predict, "_Work", Dies)
        assert lgvit(*command, "--output", output, "--workers", 2) == 2
    assert "a worker process died, perhaps for want of memory; " in capsys.readouterr().err
    assert lgvit(*command, "--output", output, "--workers", 2) == 1
    theirs, ours = rows_of(output), rows_of(undisturbed)
    for name in ("path", "label", "exit_layer", "exit_index", "error"):
        assert [row[name] for row in theirs] == [row[name] for row in ours]
    scores = [[float(row["score"] or 0) for row in rows] for rows in (theirs, ours)]
    np.testing.assert_allclose(*scores, atol=1e-5)
