"""`lgvit predict --engine ray`: the rows of the local engine, by actors of Ray Data, one of which may be killed."""

import importlib.util
import json
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.serving import batch_predict as predict
from lgvit_hf.serving.image_sources import find_images
from lgvit_hf.serving.ray_data import ShardAnswers
from tests.clear import clear_model
from tests.processes import ROOT
from tests.test_predict import draw_photos
from tests.tiny import IMAGE_SIZE

pytestmark = pytest.mark.version_independent
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='pip install "lgvit-hf[ray]"')


@pytest.fixture
def command(tmp_path, monkeypatch):
    """To answer a folder of photos and a broken file, in shards of four; and the rows of the local engine."""
    monkeypatch.setattr(predict, "SHARD", 4)
    model, _ = clear_model("vit", 10)
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    draw_photos(tmp_path / "photos", model)
    (tmp_path / "broken.png").write_bytes(b"broken")
    words = ["predict", tmp_path / "model", tmp_path / "photos", tmp_path / "broken.png", "--batch-size", 4]
    assert main([*map(str, words), "--output", str(tmp_path / "local.jsonl")]) == 1
    return [*map(str, words)], rows_of(tmp_path / "local.jsonl")


def rows_of(file):
    return list(map(json.loads, file.read_text().splitlines()))


def assert_same(found, expected):
    for name in ("path", "label", "exit_layer", "exit_index", "error"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    scores = [[row["score"] or 0 for row in rows] for rows in (found, expected)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_without_ray(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command[0], "--output", str(tmp_path / "out.jsonl"), "--engine", "ray"]) == 2
    assert "--engine ray needs Ray" in (said := capsys.readouterr().err) and 'pip install "lgvit-hf[ray]"' in said
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="engine='spark' is none of local, ray"):
        predict.run_predict("model", ["photos"], "out.csv", engine="spark")


def test_what_an_actor_does(command, tmp_path):
    """Its arguments travel; shards give the rows of the local engine, a dataset's images too."""
    (_, folder, photos, broken, *_), expected = command
    predictor = predict.Predictor(folder, max_batch_size=4)
    work = predict._Work(predictor, predictor.label_names, None, False)
    images = find_images([photos, broken], None)
    shards = [range(len(images))[start : start + 4] for start in range(0, len(images), 4)]
    answers = pickle.loads(pickle.dumps(ShardAnswers(work, images, shards)))
    found = answers({"shard": np.array([1, 0, *range(2, len(shards))])})
    parts = dict(zip(found["shard"].tolist(), map(json.loads, found["rows"]), strict=True))
    assert_same([{**dict.fromkeys(expected[0]), **row} for shard in sorted(parts) for row in parts[shard]], expected)
    stored = find_images(["digits"], "test")
    again = pickle.loads(pickle.dumps(stored))
    assert len(again) == len(stored) and again[3] == stored[3]


class DiesOnce(predict._Work):
    """Is killed at the first shard that any process begins, as by a kernel that is short of memory."""

    def __call__(self, shard):
        mark = Path(self.predictor.path).parent / "killed"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return super().__call__(shard)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def ray(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    yield ray
    ray.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_one_killed_and_a_resumed_run(command, ray, tmp_path, monkeypatch, capsys):
    words, expected = command
    output, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    words += ["--output", str(output), "--engine", "ray", "--workers", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "_Work", DiesOnce)
        assert main(words) == 1
    assert (tmp_path / "killed").exists() and not parts.exists()
    assert_same(rows_of(output), expected)

    output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_predictions", stop_at_the_third(predict.write_predictions))
        assert main(words) == 130
    kept = sum(len(rows_of(file)) for file in parts.glob("0*.jsonl"))
    assert 5 <= kept <= 8 and f"{kept} of 13 images are kept" in capsys.readouterr().err
    assert main(words) == 1 and f"({kept} were answered before)" in capsys.readouterr().out
    assert_same(rows_of(output), expected)

    output.unlink()
    assert main([*words[:-1], "3"]) == 2 and "workers=3 must be at most 2" in capsys.readouterr().err


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_exported_models(runtime, command, ray, tmp_path):
    words, expected = command
    _, folder, *photos, _, _ = words
    assert main(["export", folder, str(tmp_path / "onnx"), "--thresholds", "input"]) == 0
    output = tmp_path / "out.jsonl"
    words = ["predict", str(tmp_path / "onnx"), *photos, "--batch-size", "4", "--runtime", runtime]
    assert main([*words, "--output", str(output), "--engine", "ray", "--workers", "2"]) == 1
    assert_same(rows_of(output), expected)


def stop_at_the_third(write):
    calls = iter(range(100))

    def stopping(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    return stopping
