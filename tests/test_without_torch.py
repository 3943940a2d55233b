"""`lgvit predict` and `lgvit serve` of an exported single file import no PyTorch and answer as PyTorch does."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
pytest.importorskip("openvino", reason='pip install "lgvit-hf[openvino]"')

from lgvit_hf import Predictor, export_onnx  # noqa: E402
from lgvit_hf.cli import main  # noqa: E402
from lgvit_hf.data.processing import make_processor  # noqa: E402
from lgvit_hf.serving.exported_model import SingleFile  # noqa: E402
from lgvit_hf.serving.torch_model import TorchModel  # noqa: E402
from tests.clear import clear, clear_model  # noqa: E402
from tests.processes import ROOT  # noqa: E402
from tests.tiny import IMAGE_SIZE, tiny_images  # noqa: E402

pytestmark = pytest.mark.version_independent

# what a test runs in a process of its own: the last line says which libraries were imported
PREDICT = """
import sys
from lgvit_hf.cli import main
assert main(sys.argv[1:]) == 0
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
# a request as soon as the service is there; then the service is told to stop
SERVE = """
import os, signal, socket, sys, threading, time, urllib.request
from lgvit_hf.cli import main
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
def ask():
    url = f"http://127.0.0.1:{port}/predict"
    image = open(sys.argv[1], "rb").read()
    try:
        for _ in range(600):
            try:
                print(urllib.request.urlopen(url, image, timeout=30).read().decode())
                break
            except urllib.error.URLError:
                time.sleep(0.05)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=ask, daemon=True).start()
main(["serve", *sys.argv[2:], "--port", str(port)])
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, the folder that was exported of it, and photos of which no answer is close."""
    home, processor = tmp_path_factory.mktemp("folders"), make_processor(IMAGE_SIZE)
    model, _ = clear_model("vit", 3, temperature=1.5, num_hidden_layers=2, exit_positions=[1], exit_types="linear")
    drawn = (255 * tiny_images(60, (18, 20)).sigmoid()).byte().permute(0, 2, 3, 1).numpy()
    chosen = drawn[clear(model, processor(list(drawn), return_tensors="pt")["pixel_values"]).numpy()][:6]
    (home / "photos").mkdir()
    for number, image in enumerate(chosen):
        Image.fromarray(image).save(home / "photos" / f"{number}.png")
    model.save_pretrained(home / "checkpoint")
    processor.save_pretrained(home / "checkpoint")
    for layout in ("single", "segments"):
        export_onnx(model, home / layout, layout, processor=processor)
    return home


@pytest.fixture(scope="module")
def expected(folders):
    """What PyTorch answers to each photo."""
    return Predictor(folders / "checkpoint").images(photos_in(folders))


def photos_in(home):
    return sorted((home / "photos").iterdir())


def in_a_process(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *said, imported = done.stdout.splitlines()
    assert imported == "[]"
    return said


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_predict(folders, expected, runtime, tmp_path):
    output = tmp_path / "answers.csv"
    in_a_process(PREDICT, "predict", folders / "single", folders / "photos", "--output", output, "--runtime", runtime)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = Predictor(folders / "checkpoint").label_names
    assert [row["label"] for row in rows] == [labels[label] for label in expected["label"]]
    assert [int(row["exit_index"]) for row in rows] == expected["exit_index"].tolist()
    np.testing.assert_allclose([float(row["exit_score"]) for row in rows], expected["exit_score"], atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_serve(folders, expected, runtime):
    pytest.importorskip("uvicorn", reason='pip install "lgvit-hf[serve]"')
    said = in_a_process(SERVE, photos_in(folders)[0], folders / "single", "--runtime", runtime, "--threads", 1)
    (answer,) = json.loads(next(line for line in said if line.startswith("{")))["answers"]
    assert answer["exit_index"] == expected["exit_index"][0]
    assert answer["exit_score"] == pytest.approx(expected["exit_score"][0], abs=1e-5)


def test_other_numbers_of_the_policy_need_no_torch(folders, tmp_path):
    output = tmp_path / "answers.jsonl"
    policy = ("--policy", "confidence", "--threshold", 0.0)
    in_a_process(PREDICT, "predict", folders / "single", folders / "photos", "--output", output, *policy)
    assert {json.loads(line)["exit_index"] for line in output.read_text().splitlines()} == {0}


def test_a_policy_that_the_file_does_not_take_is_refused(folders, tmp_path, capsys):
    arguments = ["predict", folders / "single", folders / "photos", "--output", tmp_path / "answers.csv"]
    for policy, reason in (
        (("entropy", "--threshold", "0.5"), "this file decides by 'confidence', not by 'entropy'"),
        (("confidence", "--threshold", "0.5", "0.5"), "threshold has 2 values, but the model has 1 exits"),
    ):
        assert main([*map(str, arguments), "--policy", *policy]) == 2
        assert reason in capsys.readouterr().err


def test_what_is_set_on_the_model_counts(folders):
    predictor, pixels = Predictor(folders / "single"), {"pixel_values": tiny_images(4).numpy()}
    assert isinstance(predictor.opened, SingleFile)
    predictor.model.set_exit_policy("confidence", threshold=0.0)
    assert isinstance(predictor.opened, TorchModel) and predictor(pixels)["exit_index"].tolist() == [0] * 4


def test_other_layouts_decide_in_torch(folders, expected):
    predictor = Predictor(folders / "segments")
    assert isinstance(predictor.opened, TorchModel)
    assert predictor.images(photos_in(folders))["exit_index"].tolist() == expected["exit_index"].tolist()


@pytest.mark.parametrize("change", ["another mean", "no size", "no processor"])
def test_a_processor_that_was_changed_is_followed(folders, change, tmp_path):
    """What was tried when the folder was written is another one; transformers' own says what this one does."""
    folder, file = tmp_path / "onnx", "preprocessor_config.json"
    folder.mkdir()
    for name in ("config.json", "manifest.json", "model.onnx"):
        shutil.copyfile(folders / "single" / name, folder / name)
    if change != "no processor":
        size = {"do_resize": False} if change == "no size" else {"image_mean": [0.1] * 3}
        ViTImageProcessor(**{"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **size}).save_pretrained(folder)
    predictor = Predictor(folder)
    assert isinstance(predictor.opened, SingleFile)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 0, 0))
    if change == "no processor":
        assert not predictor.takes_images
        with pytest.raises(OSError, match=file):
            predictor.pixel_values(image)
    else:
        found = predictor.processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(Predictor(folder).pixel_values(np.asarray(image)), found, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id2label": {"0": "a", "7": "b"}}, "is not the config of a highway .KeyError"),
        ({"id2label": ["a", "b"]}, "is not the config of a highway"),
        ({"exit_positions": [1, 1]}, "answers at depths .1, 1, 2., the files beside it at .1, 2."),
        ({"model_type": "vit"}, "model type 'vit' is no highway"),
        ({"exit_policy": ["never"]}, "exit_policy"),
    ],
)
def test_a_config_of_something_else_is_refused(folders, change, reason, tmp_path):
    folder = shutil.copytree(folders / "single", tmp_path / "onnx")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=reason):
        Predictor(folder)({"pixel_values": tiny_images(2).numpy()})
