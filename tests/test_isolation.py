"""One sample, one client or one file never harms another: numbers, uploads, folders, outputs, commands."""

import asyncio
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from lgvit_hf import AViT, HighwayWrapper, ViTHighway
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.data.settings import parse_yaml
from lgvit_hf.files import locked
from lgvit_hf.serving import batch_predict as predict
from lgvit_hf.serving.answer_files import write_predictions
from lgvit_hf.serving.device.message import MessageError, pack, unpack
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.open_part import open_part
from lgvit_hf.serving.predictor import Predictor
from lgvit_hf.serving.whole_model import Whole
from tests.clear import clear_model
from tests.seeds import rng
from tests.test_split import SMALL
from tests.tiny import IMAGE_SIZE, tiny_model

one_version = pytest.mark.version_independent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint with its image processor, and its parts cut behind the exit after two blocks."""
    folder = tmp_path_factory.mktemp("isolation")
    model, images = clear_model("vit", 8, **SMALL)
    model.save_pretrained(folder / "model")
    make_processor(IMAGE_SIZE).save_pretrained(folder / "model")
    model.split([2], folder / "parts")
    return folder, model, images


@pytest.fixture
def copied(home, tmp_path):
    return shutil.copytree(home[0] / "model", tmp_path / "model")


# -- a sample and those beside it -------------------------------------------------------------------------------------


class Behind:
    """The way to the next part, without HTTP; a message is checked and answered as a service does."""

    url = "in-process"

    def __init__(self, part, change=lambda answers: answers):
        self.part, self.change, self.sizes = part, change, []

    def post(self, path, body, timeout=None):
        info = self.part.info
        inputs = unpack(body, info.takes, info.words)
        self.sizes.append(len(body))
        answers, _, _ = self.part(inputs)
        answers = {**answers, "degraded": np.zeros(len(answers["logits"]), np.uint8)}
        return pack(self.change(answers), {"schema": info.words["schema"], "model": info.model})


def chained(home, state_dtype, change=lambda answers: answers):
    first, second = (open_part(home[0] / "parts" / f"part{index}") for index in range(2))
    highway = RemoteHighway(first, state_dtype=state_dtype)
    highway.hop = Behind(second, change)
    return highway


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@one_version
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("evil", [1e6, 1e30, 3.4e38], ids="{:.0e}".format)
def test_numbers_of_one_sample_change_no_other(home, state_dtype, evil):
    """In a split, where samples of several clients travel in one message."""
    highway, images = chained(home, state_dtype), home[2].numpy()
    alone = [highway({"pixel_values": image[None]}) for image in images]
    bad = np.full_like(images[:1], evil) * rng().choice([-1, 1], images[:1].shape).astype(np.float32)
    beside = highway({"pixel_values": np.concatenate([images[:5], bad, images[5:]])})
    kept = {name: np.delete(array, 5, axis=0) for name, array in beside.items()}
    assert_same(kept, {name: np.concatenate([answer[name] for answer in alone]) for name in kept})
    assert not kept["degraded"].any()


@one_version
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_a_state_that_cannot_be_sent_stays_behind_alone(home, value):
    """NaN and infinity end as in the whole model; what float16 cannot hold travels as float32, apart."""
    highway = chained(home, "float16")
    images = home[2].numpy()
    answers, rows, state = highway.part({"pixel_values": images})
    assert len(rows) >= 4
    name = next(name for name, array in state.items() if array.dtype == np.float32 and array.ndim > 1)
    expected = highway.finish({n: a.copy() for n, a in answers.items()}, rows, state)
    changed = {n: a.copy() for n, a in state.items()}
    changed[name][1, 0, 0] = value
    found = highway.finish({n: a.copy() for n, a in answers.items()}, rows, changed)
    others = np.delete(np.arange(len(images)), rows[1])
    assert_same({n: a[others] for n, a in found.items()}, {n: a[others] for n, a in expected.items()})
    assert np.isnan(found["logits"][rows[1]]).all() == (not np.isfinite(value))


@one_version
@pytest.mark.parametrize(
    "change",
    [
        lambda answers: {**answers, "exit_layer": answers["exit_layer"] + 1},
        lambda answers: {
            **answers,
            "exit_index": answers["exit_index"] * 0,
            "exit_layer": answers["exit_layer"] * 0 + 1,
        },
        lambda answers: {**answers, "exit_index": answers["exit_index"] + 9},
        lambda answers: {**answers, "degraded": answers["degraded"] + 2},
    ],
    ids=["exit_layer", "an exit of this part", "no exit", "degraded"],
)
def test_answers_that_no_next_part_gives_are_not_taken(home, change):
    highway = chained(home, "float32", change)
    found = highway({"pixel_values": home[2].numpy()})
    _, rows, _ = highway.part({"pixel_values": home[2].numpy()})
    assert found["degraded"].nonzero()[0].tolist() == rows.tolist() and len(rows)


@one_version
def test_logits_that_are_none_are_one_sample_s_affair(home):
    def one_nan(answers):
        logits = answers["logits"].copy()
        logits[0] = np.nan
        return {**answers, "logits": logits}

    found = chained(home, "float32", one_nan)({"pixel_values": home[2].numpy()})
    assert np.isnan(found["logits"]).any(-1).sum() == 1 and not found["degraded"].any()


@pytest.mark.parametrize("evil", [np.nan, np.inf, 3e38])
@torch.no_grad()
def test_in_one_process_too(home, evil):
    model, images = home[1], home[2]
    mixed = images.clone()
    mixed[3] = evil
    found, expected = model(mixed), model(images)
    others = torch.arange(len(images)) != 3
    assert found.exit_index[others].tolist() == expected.exit_index[others].tolist()
    torch.testing.assert_close(found.logits[others], expected.logits[others])
    assert found.exit_layer[3] == model.config.num_blocks or found.logits[3].isfinite().all()


# -- a folder that changes under a service ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["overwritten", "cut", "removed"])
@torch.no_grad()
def test_an_opened_model_does_not_follow_its_file(copied, home, how):
    predictor = Predictor(copied)
    expected = predictor({"pixel_values": home[2].numpy()})
    weights = copied / "model.safetensors"
    if how == "overwritten":
        other = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
        save_file(other, copied / "other", {"format": "pt"})
        content = (copied / "other").read_bytes()
        with weights.open("r+b") as file:  # in place, as `cp` does
            file.write(content)
    elif how == "cut":
        os.truncate(weights, 0)
    else:
        shutil.rmtree(copied)
    assert_same(predictor({"pixel_values": home[2].numpy()}), expected)
    assert predictor.pixel_values(Image.new("RGB", (9, 9))).shape == (3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"size": {"height": 8, "width": 8}}, r"makes \[3, 8, 8\] of 37 x 53 pixels"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "its image processor does not run"),
        ("config.json", {"id2label": {str(n): f"\ud83d{n}" for n in range(5)}}, "no text that UTF-8 can write"),
    ],
    ids=["size", "mean", "label"],
)
def test_a_service_that_could_not_answer_does_not_start(copied, file, change, message, capsys):
    settings = {**json.loads((copied / file).read_text()), **change}
    if "id2label" in change:
        settings["label2id"] = {name: int(number) for number, name in change["id2label"].items()}
    (copied / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        Whole(copied)
    assert main(["serve", str(copied), "--port", "0"]) == 2
    # beside what transformers says of its progress
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lgvit: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


# -- the service ------------------------------------------------------------------------------------------------------


@one_version
def test_an_upload_that_is_broken_off_leaves_nothing():
    admission = pytest.importorskip("lgvit_hf.serving.admission", exc_type=ImportError)
    pieces = [b"x" * 1000] * 3

    class Request:
        headers = {}

        async def stream(self):
            for piece in pieces:
                yield piece
            raise admission.ClientDisconnect

    async def receive():
        async with bodies.body(Request()):
            pytest.fail("there is no body")

    bodies = admission.Admission(admission.Limits())
    with pytest.raises(admission.Gone) as gone:
        asyncio.run(receive())
    held, error = [], gone.value
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == admission.__file__:
                held += [each for each in trace.tb_frame.f_locals.values() if isinstance(each, (bytes, bytearray))]
            trace = trace.tb_next
        error = error.__context__
    assert sum(map(len, held)) <= len(pieces[0])  # the last piece at most


@one_version
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_compute_thread_is_said(home):
    pytest.importorskip("starlette")
    from starlette.testclient import TestClient

    from lgvit_hf.serving.server import make_app

    class Deadly:
        """A part whose answer ends the thread that asked for it."""

        info = open_part(home[0] / "parts" / "part0").info

        def __call__(self, inputs):
            raise SystemExit

        def pixels(self, image):
            return np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.float32)

    with TestClient(make_app(RemoteHighway(Deadly())), raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200
        image = pack({"pixel_values": np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)})
        headers = {"content-type": "application/vnd.safetensors"}
        assert client.post("/predict", content=image, headers=headers).status_code in (500, 503)
        health = client.get("/health")
        assert health.status_code == 503 and "start the service again" in health.json()["status"]
        answer = client.post("/predict", content=image, headers=headers)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert 'status="503"' in client.get("/metrics").text


@one_version
def test_a_fault_of_ours_is_counted_and_told_in_json(home, monkeypatch):
    server = pytest.importorskip("lgvit_hf.serving.server", exc_type=ImportError)
    from starlette.testclient import TestClient

    def broken(*arguments):
        raise RuntimeError("secret")

    monkeypatch.setattr(server, "_pixels", broken)
    with TestClient(server.make_app(RemoteHighway(open_part(home[0] / "parts" / "part0")))) as client:
        answer = client.post("/predict", content=b"P5 1 1 255 x")
        assert answer.status_code == 500 and "secret" not in answer.text and answer.json()["error"]
        assert 'lgvit_requests_total{path="/predict",status="500"} 1' in client.get("/metrics").text


# -- what a folder may do ---------------------------------------------------------------------------------------------


def with_code(folder, file, change):
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nfrom transformers import ViTConfig as Evil\n"
    )
    settings = {**json.loads((folder / file).read_text()), **change}
    (folder / file).write_text(json.dumps(settings))


EVIL_PROCESSOR = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
EVIL_CONFIG = {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}


@pytest.mark.parametrize("command", ["predict", "split", "export", "serve", "grow", "visualize", "evaluate"])
@pytest.mark.parametrize(
    ("file", "change"),
    [("preprocessor_config.json", EVIL_PROCESSOR), ("config.json", EVIL_CONFIG)],
    ids=["processor", "config"],
)
def test_code_of_a_folder_is_never_run(command, file, change, copied, tmp_path, monkeypatch, capsys):
    with_code(copied, file, change)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rest = {
        "predict": [tmp_path / "a.png", "--output", tmp_path / "out.csv"],
        "split": [tmp_path / "parts", "--at", "1"],
        "export": [tmp_path / "onnx"],
        "serve": ["--port", "0"],
        "grow": ["digits", tmp_path / "grown"],
        "visualize": ["--data", "digits", "--output", tmp_path / "pictures"],
        "evaluate": ["--data", "digits"],
    }[command]
    code = main([command, str(copied), *map(str, rest)])
    assert code == 2, capsys.readouterr()
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("loader", [ViTHighway, AViT, HighwayWrapper])
def test_weights_are_read_from_nowhere_else(loader, copied):
    settings = json.loads((copied / "config.json").read_text())
    for value in ("../model.safetensors", "weights.bin", "other.safetensors", "x.safetensors.index.json"):
        (copied / "config.json").write_text(json.dumps({**settings, "transformers_weights": value}))
        with pytest.raises(ValueError, match="transformers_weights in config.json: weights are read from"):
            loader.from_pretrained(copied)
    (copied / "config.json").write_text(json.dumps(settings))
    if loader is ViTHighway:
        with pytest.raises(ValueError, match="transformers_weights: weights are read from"):
            loader.from_pretrained(copied, transformers_weights="other.safetensors")
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ValueError, match="adapter_config.json names a base model elsewhere"):
        loader.from_pretrained(copied)


def test_a_folder_inside_a_folder_is_checked_too(copied, tmp_path):
    shutil.copytree(copied, copied / "inner")
    (copied / "inner" / "model.safetensors").rename(copied / "inner" / "model.bin")
    with pytest.raises(OSError, match="a pickle that could run code"):
        ViTHighway.from_pretrained(copied, subfolder="inner")


# -- YAML and numbers -------------------------------------------------------------------------------------------------


def bomb(inner, width=10, depth=9):
    lines = [f"a0: &a0 {inner}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines)


def merges(width=9, depth=9):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * width)}]}}" for n in range(1, depth)]
    return "\n".join(lines)


@one_version
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("[x, x, x]"), "more than 100,000 values"),
        (merges(), "more than 100,000 values"),
        ("a: &a [*a]", "nested too deep, or within itself"),
        ("[" * 3000, "nested too deep"),
        ("{a: " * 3000, "nested too deep"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
    ids=["aliases", "merges", "itself", "lists", "mappings", "broken", "code"],
)
def test_yaml_that_grows_is_refused_at_once(text, message):
    with pytest.raises(ValueError, match=f"here: {message}"):
        parse_yaml(text, "here")


@one_version
def test_yaml_with_aliases_is_read():
    text = "a: &a [1, 2]\nb: *a\nc: {<<: &d {x: 1}, y: 2}"
    assert parse_yaml(text, "here") == yaml.safe_load(text)


NUMBERS = [
    ("serve m", "--port", "99999"),
    ("serve m", "--port", "-1"),
    ("serve m", "--threads", "0"),
    ("serve m", "--max-body-mb", "inf"),
    ("serve m", "--max-wait-ms", "nan"),
    ("serve m", "--max-wait-ms", "1e400"),
    ("serve m", "--timeout", "nan"),
    ("serve m", "--max-batch-size", "2.9"),
    ("predict m a --output o.csv", "--batch-size", "0"),
    ("predict m a --output o.csv", "--workers", "inf"),
    ("evaluate m --data digits --policy confidence", "--threshold", "nan"),
    ("calibrate m --data digits", "--max-accuracy-drop", "inf"),
    ("calibrate m --data digits", "--delta", "1e400"),
    ("benchmark m --data digits", "--repeats", "2.5"),
    ("sweep m --data digits --output s", "--values", "nan"),
    ("grow m digits o", "--epochs", "-3"),
    ("train --data digits --backbone vit --output o", "--epochs", "nan"),
    ("train --data digits --backbone vit --output o", "--learning-rate", "inf"),
    ("train --data digits --backbone vit --output o", "--batch-size", "2.9"),
    ("train --data digits --backbone vit --output o", "--max-grad-norm", "nan"),
    ("demo", "--seed", "-1"),
]


@one_version
@pytest.mark.parametrize("way", ["typed", "file"])
@pytest.mark.parametrize(("words", "option", "value"), NUMBERS)
def test_numbers_that_cannot_be_are_refused_at_once(words, option, value, way, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no `m`
    given = [option, value]
    if way == "file":
        value = f".{value}" if value in ("inf", "nan") else value
        (tmp_path / "options.yaml").write_text(f"{option[2:]}: {value}\n")
        given = ["--config", "options.yaml"]
    try:
        code = main([*words.split(), *given])
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    name = option[2:]
    assert name in last or name.replace("-", "_") in last, last
    assert any(word in last for word in ("must be a whole number", "must be a finite number")), last
    assert [file.name for file in tmp_path.iterdir()] == (["options.yaml"] if way == "file" else [])


# -- one output, one run ----------------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from lgvit_hf.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def another(tmp_path):
    """Another process that holds `out`, and that may die."""
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process, output
    process.kill()
    process.wait()


@one_version
def test_an_output_is_held_and_let_go_by_a_dead_process(another):
    process, output = another
    with pytest.raises(ValueError, match="out is being written by another run"):
        with locked(output):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(output), locked(output):
        pass
    with locked(output):
        pass
    assert not output.exists()


@pytest.mark.parametrize("command", ["predict", "train", "grow", "export", "split"])
def test_every_command_that_writes_holds_its_output(command, home, another, tmp_path, capsys):
    _, output = another
    model = str(home[0] / "model")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    if command == "predict":  # whose output has a suffix
        process = subprocess.Popen([sys.executable, "-c", HOLDING, f"{output}.csv"], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
    words = {
        "predict": [model, str(tmp_path / "a.png"), "--output", f"{output}.csv"],
        "train": ["--data", "digits", "--backbone", "vit", "--stage", "backbone", "--output", str(output)],
        "grow": [plain_of(home), "digits", str(output), "--limit", "64"],
        "export": [model, str(output)],
        "split": [model, str(output), "--at", "2"],
    }[command]
    assert main([command, *words]) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert not output.exists()
    if command == "predict":
        process.kill()
        process.wait()


def plain_of(home):
    """The backbone of the checkpoint alone."""
    folder = home[0] / "plain"
    if not folder.exists():
        tiny_model("vit", exit_positions=[], exit_policy="never").save_pretrained(folder)
        make_processor(IMAGE_SIZE).save_pretrained(folder)
    return str(folder)


# -- predict: every input is answered or named ------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def begun(checkpoint, paths, output, monkeypatch):
    """A run that stopped after its first part."""
    monkeypatch.setattr(predict, "SHARD", 2)
    real, done = predict._Work.__call__, []

    def work(self, shard):
        if done:
            raise KeyboardInterrupt
        done.append(shard)
        return real(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(predict._Work, "__call__", work)
        with pytest.raises(KeyboardInterrupt):
            predict.run_predict(str(checkpoint), paths, str(output), batch_size=2)


def touch_again(file):
    Image.new("RGB", (9, 9), "red").save(file)
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 1_000_000))


def other_names(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["id2label"] = {key: f"new {name}" for key, name in settings["id2label"].items()}
    settings["label2id"] = {name: int(key) for key, name in settings["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("what", ["image", "names", "removed"])
def test_a_run_goes_on_with_the_same_inputs_only(what, copied, photos, tmp_path, monkeypatch):
    output = tmp_path / "out.csv"
    begun(copied, [str(photos)], output, monkeypatch)
    if what == "image":
        touch_again(photos / "5.png")
    elif what == "names":
        other_names(copied)
    else:
        (photos / "5.png").unlink()
        (photos / "5.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match="was begun with another " + ("class names" if what == "names" else "images")):
        predict.run_predict(str(copied), [str(photos)], str(output), batch_size=2)


def parquet(file, colours):
    datasets = pytest.importorskip("datasets")
    images = [None if colour is None else Image.new("RGB", (9, 9), colour) for colour in colours]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(str(file))


def test_another_parquet_file_of_as_many_images_is_noticed(copied, tmp_path, monkeypatch):
    file, output = tmp_path / "images.parquet", tmp_path / "out.csv"
    parquet(file, ["red", "green", "blue", "white"])
    begun(copied, [str(file)], output, monkeypatch)
    parquet(file, ["blue", "white", "red", "green"])
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 1_000_000))
    with pytest.raises(ValueError, match="was begun with another images"):
        predict.run_predict(str(copied), [str(file)], str(output), batch_size=2)


def test_every_input_is_answered_or_named(copied, photos, tmp_path, monkeypatch):
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "locked").mkdir()
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: refused(place) if str(place).endswith("locked") else real(place))
    report = predict.run_predict(str(copied), [str(photos)], str(tmp_path / "out.jsonl"))
    rows = {row["path"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert report["images"] == 8 and report["errors"] == 2
    assert "No such file" in rows[str(photos / "gone.png")]["error"]
    assert rows[str(photos / "locked")]["error"]
    assert all(rows[str(photos / f"{number}.png")]["error"] is None for number in range(6))


def refused(place):
    raise PermissionError(13, "Permission denied", str(place))


def test_an_image_that_a_dataset_lacks_is_named(copied, tmp_path):
    parquet(tmp_path / "images.parquet", ["red", None, "blue"])
    report = predict.run_predict(str(copied), [str(tmp_path / "images.parquet")], str(tmp_path / "out.jsonl"))
    rows = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    assert report["errors"] == 1 and "no image" in rows[1]["error"] and rows[0]["label"] and rows[2]["label"]


def test_answers_that_are_no_numbers_are_errors(copied, photos, tmp_path, monkeypatch):
    real = Predictor.__call__

    def sometimes(self, batch):
        answers = real(self, batch)
        answers["logits"][1] = np.nan
        return answers

    monkeypatch.setattr(Predictor, "__call__", sometimes)
    report = predict.run_predict(str(copied), [str(photos)], str(tmp_path / "out.jsonl"), probabilities=True)

    def none(word):
        raise AssertionError(f"{word} is no JSON")

    rows = [json.loads(line, parse_constant=none) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert report["errors"] == 1 and [row["error"] is None for row in rows] == [True, False, True, True, True, True]


@one_version
def test_cells_with_line_ends_are_read_back(tmp_path):
    rows = [{"path": f"a{end}b.png", "label": "x"} for end in ("\r", "\n", "\r\n", ",", '"', "")]
    write_predictions(tmp_path / "out.csv", rows, ["path", "label"], ".csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in rows]
    assert (tmp_path / "out.csv").read_bytes().count(b"\r") == 2


@one_version
def test_messages_still_refuse_what_is_no_number():
    body = pack({"x": np.array([[np.nan]], np.float32)})
    with pytest.raises(MessageError, match="NaN"):
        unpack(body, {"x": {"dtype": "float32", "shape": [1]}})
    assert np.isnan(unpack(body, {"x": {"dtype": "float32", "shape": [1]}}, finite=False)["x"]).all()
