"""Parts of a highway, chained, answer as the whole; a part holds its own weights, and needs nobody else's code."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DeiTImageProcessor, ViTImageProcessor

from lgvit_hf import HighwayWrapper
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.engine import run_all
from lgvit_hf.export.segment_graphs import EXPORTABLE
from lgvit_hf.policies import POLICIES, ExitPolicy, build_policy, register_policy
from lgvit_hf.segments import State
from lgvit_hf.serving import split as splitting
from lgvit_hf.serving.device.info import PartInfo, file_digest
from lgvit_hf.serving.device.pixels import pixel_settings, prepare
from lgvit_hf.serving.device.rgb import read_image
from lgvit_hf.serving.open_part import open_part
from lgvit_hf.serving.split import run_chain
from tests.gates import typical_models
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, OTHER_KINDS, scrambled, tiny_images, tiny_model

version_independent = pytest.mark.version_independent
SMALL = {"num_hidden_layers": 4, "exit_positions": [1, 2, 3], "exit_types": "linear"}
ROWS, NAN_ROW = 40, 3
PATIENCE = {"name": "patience", "patience": 2}


def images_of(model):
    images = tiny_images(ROWS, model.config.image_size)
    images[NAN_ROW] = math.nan
    return images


def between(model, images, name, **settings):
    """Thresholds in the widest gap of the middle half of each exit's scores: rounding decides nothing."""
    exit_logits = run_all(model.segments(), State({"pixel_values": images}))
    judge, numbers = build_policy({"name": name, "threshold": 0.0, **settings}, len(model.exits)), []
    for index, logits in enumerate(exit_logits[:-1]):
        score = judge(logits, judge.start(len(logits), "cpu"), index)[1]["score"]
        ranked = np.sort(score[~score.isnan()].numpy())[ROWS // 4 : 3 * ROWS // 4]
        widest = int(np.diff(ranked).argmax())
        numbers.append(float(ranked[widest : widest + 2].mean()))
    return {"name": name, "threshold": numbers, **settings}


def drawn(settings_of, kind="vit", least=2, **changes):
    """A model with a policy, and images, one of them NaN, the others of which exit at `least` places or more."""
    for number in range(100):
        model = tiny_model(kind, number, **changes)
        images = images_of(model)
        with torch.no_grad():
            model.set_exit_policy(settings_of(model, images))
            taken = model(images).exit_index[torch.arange(ROWS) != NAN_ROW]
        if len(taken.unique()) >= least:
            return model, images
    raise AssertionError("no such model in 100")


def chained(folder, count, images):
    return run_chain(
        [open_part(folder / f"part{index}", threads=1) for index in range(count)], {"pixel_values": images}
    )


def assert_equal(found, expected):
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    assert found.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.exit_score, expected.exit_score, atol=1e-5, rtol=1e-5, equal_nan=True)


@version_independent
@torch.no_grad()
@pytest.mark.parametrize("name", EXPORTABLE)
def test_every_policy_travels_between_parts(name, tmp_path):
    def settings_of(model, images):
        cuts = between(model, images, "confidence")["threshold"]
        own = {
            "patience": {"name": name, "patience": 2},
            "patience_confidence": {**between(model, images, "entropy"), "name": name, "patience": 2},
            "fixed": {"name": name, "exit_index": 1},
            "never": {"name": name},
            "confidence_entropy": {
                **between(model, images, "confidence"),
                "name": name,
                "entropy_threshold": between(model, images, "entropy")["threshold"],
            },
            "gate": {
                "name": name,
                # the score of such a gate
                "threshold": [1 / (1 + math.exp(3 - 6 * cut)) for cut in cuts],
                "exits": [0, 1, 2],
                "models": typical_models(3),
                "num_labels": model.config.num_labels,
            },
            "calibrated_confidence": {
                **between(model, images, "confidence"),
                "name": name,
                "threshold": 0.5,
                "edges": [[cut] for cut in cuts],
                "accuracies": [[0.2, 0.8]] * 3,
            },
        }
        return own.get(name) or between(model, images, name, temperature=[0.8, 1.1, 0.9])

    problem = POLICIES[name].problem_type
    model, images = drawn(settings_of, least=1 if name in ("fixed", "never") else 2, problem_type=problem, **SMALL)
    infos = model.split([1, 3], tmp_path / "parts")
    expected = model(images)
    found = chained(tmp_path / "parts", 3, images.numpy())
    if name == "fixed":
        # a row whose logits are NaN answers there too, where the whole model would go on
        keep = torch.arange(ROWS) != NAN_ROW
        found = type(found)(*(tensor[keep] for tensor in vars(found).values()))
        expected = type(expected)(
            **{key: expected[key][keep] for key in ("logits", "exit_index", "exit_layer", "exit_score")}
        )
    assert_equal(found, expected)
    assert set(infos[0].gives) - {"hidden"} == {f"memory.{each}" for each in model.exit_policy.start(1, "cpu")}
    # the exit at the end of a part always answers, for want of a deeper one
    answers, rows, state = open_part(tmp_path / "parts" / "part0")({"pixel_values": images.numpy()})
    assert answers["exit_index"].tolist() == [0] * ROWS and np.isfinite(answers["logits"][0]).all()
    assert len(rows) == (len(state["hidden"]) if state else 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["deit", "swin", *OTHER_KINDS])
def test_every_backbone_splits_anywhere(kind, tmp_path):
    model, images = drawn(lambda *given: between(*given, "confidence"), kind, least=3)
    model.split([2, 3, 4], tmp_path / "parts")
    assert_equal(chained(tmp_path / "parts", 4, images.numpy()), model(images))


def test_a_performer_keeps_its_features(tmp_path):
    model = tiny_model("vit", **SMALL, attn_implementation="performer", feature_map_dim=16)
    model.set_exit_policy("never")
    model.split([2], tmp_path / "parts")
    images = tiny_images(3)
    with torch.no_grad():
        assert_equal(chained(tmp_path / "parts", 2, images.numpy()), model(images))


def test_a_part_holds_the_weights_that_it_uses(tmp_path):
    model = tiny_model("vit", **SMALL)
    model.split([2], tmp_path / "parts")
    first, last = (set(load_file(tmp_path / "parts" / f"part{index}" / "model.safetensors")) for index in range(2))
    assert not first & last
    assert any("patch_embeddings" in name for name in first) and any("classifier" in name for name in last)
    assert {name.split(".")[1] for name in first if name.startswith("exits.")} == {"0", "1"}
    assert {name.split(".")[1] for name in last if name.startswith("exits.")} == {"2"}
    everything = {name for name in model.state_dict() if not name.startswith("exits.")}
    assert len(first | last) == len(everything) + len([n for n in model.state_dict() if n.startswith("exits.")])
    part = open_part(tmp_path / "parts" / "part1")
    held = sum(parameter.numel() for parameter in part.model.parameters() if not parameter.is_meta)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert 0.3 * whole < held < 0.7 * whole


def test_parts_of_one_split_know_each_other(tmp_path):
    model = tiny_model("vit", **SMALL)
    digests = [{info.model for info in model.split([position], tmp_path / str(position))} for position in (1, 2)]
    model.set_exit_policy("confidence", threshold=0.7)
    digests.append({info.model for info in model.split([1], tmp_path / "policy")})
    assert [len(each) for each in digests] == [1, 1, 1] and len(set.union(*digests)) == 3


@version_independent
@pytest.mark.parametrize(
    "positions, format, message",
    [
        ([], "safetensors", "here at \\[1, 2, 3\\]"),
        ([4], "safetensors", "positions=\\[4\\].*\\[1, 2, 3\\]"),
        ([2, 1], "onnx", "ascending"),
        ([1, 1], "onnx", "ascending"),
        ([2], "pickle", "format='pickle' is none of onnx, safetensors"),
    ],
)
def test_bad_splits_say_what_is_possible(positions, format, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_model("vit", **SMALL).split(positions, tmp_path / "parts", format)
    assert list(tmp_path.iterdir()) == []


@version_independent
def test_a_policy_without_a_name_cannot_travel(tmp_path):
    model = tiny_model("vit", **SMALL)
    judge = build_policy({"name": "confidence", "threshold": 0.5}, 3)
    model.set_exit_policy(lambda logits, memory, exit_index: judge(logits, memory, exit_index))
    with pytest.raises(ValueError, match="cannot travel"):
        model.split([1], tmp_path / "parts")


@version_independent
@torch.no_grad()
def test_a_policy_of_ones_own_travels_by_its_name(tmp_path):
    @register_policy("twice_positive")
    @dataclass(frozen=True)
    class TwicePositivePolicy(ExitPolicy):
        least: float = 0.0

        def start(self, batch_size, device):
            return {"times": torch.zeros(batch_size, dtype=torch.int64, device=device)}

        def __call__(self, logits, memory, exit_index=0):
            times = memory["times"] + (logits[:, 0] > self.least)
            return times >= 2, {"times": times}

    try:
        model, images = drawn(lambda *_: {"name": "twice_positive", "least": 0.1}, **SMALL)
        model.split([1, 2], tmp_path / "parts")
        assert_equal(chained(tmp_path / "parts", 3, images.numpy()), model(images))
        with pytest.raises(ValueError, match="'twice_positive' cannot travel with format='onnx'"):
            model.split([1], tmp_path / "others", "onnx")
    finally:
        POLICIES.pop("twice_positive")


@version_independent
def test_parts_that_answer_otherwise_are_not_kept(tmp_path, monkeypatch):
    model = tiny_model("vit", **SMALL)
    whole = splitting.run_chain
    monkeypatch.setattr(
        splitting,
        "run_chain",
        lambda *given: type(found := whole(*given))(found.logits + 1, *list(vars(found).values())[1:]),
    )
    with pytest.raises(ValueError, match="do not answer as the model does.*nothing was written"):
        model.split([1], tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("part") / "parts"
    tiny_model("vit", **SMALL).split([2], folder)
    return folder / "part0"


@version_independent
@pytest.mark.parametrize(
    "change",
    [
        {"schema": 3},
        {"index": 2},
        {"format": "pickle"},
        {"takes": {}},
        {"takes": {"pixel_values": {"dtype": "object", "shape": [3]}}},
        {"exits": [{"index": 99, "leave": "policy", "grid": None}]},
        {"exits": [{"index": 0, "leave": "often", "grid": None}]},
        {"files": {"../model.safetensors": "0" * 64}},
        {"files": {"config.json": "0" * 64}},
        {"files": {"config.json": "0" * 64, "model.safetensors": "0" * 64}},
        {"files": {}},
        {"exits": []},
        {"exits": [{"index": 1, "leave": "policy", "grid": None}, {"index": 0, "leave": "policy", "grid": None}]},
        {"start": 1},
        {"labels": []},
        # of the right kinds, but of another model
        {"labels": ["a"]},
        {"takes": {"pixel_values": {"dtype": "float32", "shape": [1 << 40, 1 << 40]}}},
        {"takes": {"hidden": {"dtype": "float32", "shape": [3]}}},
        {"gives": {"pixels": {"dtype": "float32", "shape": [3]}}},
        {"memory": {"label": 0}},
        {"image": {}},
        {"model": "x"},
        {"depths": "12"},
        {"depths": [1 << 70] * 4},
        {"more": 1},
    ],
)
def test_a_damaged_description_is_refused(part, change, tmp_path):
    for file in part.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((part / "part.json").read_text())
    (tmp_path / "part.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        open_part(tmp_path)


@version_independent
def test_other_weights_are_refused(part, tmp_path):
    for file in part.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((part / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="is not the file that was written"):
        open_part(tmp_path)
    with pytest.raises(OSError, match="no part.json"):
        open_part(tmp_path / "nothing")


def test_only_what_another_version_computes_may_be_left_over(part, tmp_path):
    for name, fits in (("vit.x.relative_position_index", True), ("vit.x.weight", False)):
        for file in part.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file({**load_file(part / "model.safetensors"), name: torch.zeros(2)}, tmp_path / "model.safetensors")
        settings = json.loads((part / "part.json").read_text())
        settings["files"]["model.safetensors"] = file_digest(tmp_path / "model.safetensors")
        (tmp_path / "part.json").write_text(json.dumps(settings))
        if fits:
            assert open_part(tmp_path).info.index == 0
        else:
            with pytest.raises(ValueError, match="unknown tensor 'vit.x.weight'"):
                open_part(tmp_path)


def random_image(height, width, seed=0):
    return Image.fromarray(rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 20, "width": 12}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]),
        ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False, resample=3),
        DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 14}),
    ],
    ids=["oblong", "bicubic, not normalized", "cropped"],
)
def test_numpy_prepares_images_as_the_processor_does(processor):
    settings = json.loads(json.dumps(pixel_settings(processor.to_dict(), 3)))
    for size in ((7, 50), (200, 31), (16, 16)):
        image = random_image(*size)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(prepare(image, settings), expected, atol=1e-6)


def test_a_processor_that_does_something_else_is_said(tmp_path):
    model = tiny_model("vit", **SMALL)
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_resize=False)
    with pytest.warns(UserWarning, match="takes pixel_values, no images"):
        infos = model.split([1], tmp_path / "parts", processor=processor)
    assert infos[0].image is None
    with pytest.raises(ValueError, match="takes pixel_values, no images"):
        open_part(tmp_path / "parts" / "part0").pixels(random_image(9, 9))


@version_independent
def test_files_that_are_no_images_are_refused():
    for data in (b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a"):
        with pytest.raises(ValueError):
            read_image(data)


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "lgvit_hf", "onnx"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refuse())
sys.modules.pop("lgvit_hf", None)
import pickle
pickle.load = pickle.loads = pickle.Unpickler = None
import numpy as np
sys.path.insert(0, sys.argv[1] + "/part0")
from lgvit_part.part import Part
parts = [Part(f"{sys.argv[1]}/part{index}", threads=1) for index in range(3)]
answers, rows, state = parts[0]({"pixel_values": np.load(sys.argv[2])})
for part in parts[1:]:
    deeper, further, state = part(state)
    for name, array in deeper.items():
        answers[name][rows] = array
    rows = rows[further]
assert len(rows) == 0 and not any(name in sys.modules for name in ("torch", "transformers", "lgvit_hf"))
np.savez(sys.argv[3], **answers)
"""


SERVED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refuse())
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.open_part import open_any
from lgvit_hf.serving.server import make_app
make_app(RemoteHighway(open_any(sys.argv[1])))
"""


def twice_sure(model, images):
    return {**between(model, images, "entropy"), "name": "patience_confidence", "patience": 2}


@pytest.fixture(scope="module")
def stretches():
    """A model, and its stretches as ONNX; rounding changes no label, and patience lets samples exit at two places."""
    pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
    pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    for number in range(100):
        model = tiny_model("vit", number, num_hidden_layers=3, exit_positions=[1, 2], exit_types="linear")
        taken = []
        with torch.no_grad():
            best, second = (
                torch.stack(model(tiny_images(ROWS), early_exit=False).exit_logits).topk(2).values.unbind(-1)
            )
            for settings in (PATIENCE, twice_sure(model, images_of(model))):
                model.set_exit_policy(settings)
                taken.append(set(model(tiny_images(ROWS)).exit_index.tolist()))
        if taken == [{1, 2}, {1, 2}] and (best - second).min() > 1e-4:
            return model, splitting.export_parts(model, [0, 1, 2])
    raise AssertionError("no such model in 100")


@pytest.fixture
def exported(stretches, monkeypatch):
    """The model, whose stretches need not be exported again, which takes long."""
    model, parts = stretches
    monkeypatch.setattr(splitting, "export_parts", lambda other, exits: [parts[index] for index in exits])
    return model


@version_independent
@torch.no_grad()
@version_independent
@pytest.mark.parametrize(
    "policy",
    [
        PATIENCE,
        {"name": "fixed", "exit_index": 1},
        {"name": "confidence", "temperature": [0.5, 2.0, 3.0]},
    ],
    ids=lambda policy: policy["name"],
)
def test_policies_decide_in_onnx_as_in_pytorch(exported, policy, tmp_path):
    images = tiny_images(ROWS)
    if policy["name"] == "confidence":
        policy = between(exported, images, **policy)
    exported.set_exit_policy(policy)
    exported.split([1, 2], tmp_path / "parts", "onnx")
    expected = exported(images)
    assert len(expected.exit_index.unique()) >= {"fixed": 1}.get(policy["name"], 2)
    assert_equal(chained(tmp_path / "parts", 3, images.numpy()), expected)


@version_independent
@torch.no_grad()
def test_onnx_parts_run_on_onnxruntime_alone(exported, tmp_path):
    model = exported
    images = images_of(model)
    # at the second exit only those samples exit that the first one, in another part, was sure of too
    model.set_exit_policy(twice_sure(model, images))
    infos = model.split([1, 2], tmp_path / "parts", "onnx", processor=make_processor(IMAGE_SIZE))
    assert infos[0].checks["largest_difference"] < 1e-5 and set(infos[0].gives) == {"hidden", "memory.score"}
    expected = model(images)
    assert expected.exit_index.unique().tolist() == [1, 2]
    assert_equal(chained(tmp_path / "parts", 3, images.numpy()), expected)
    assert not [file for file in (tmp_path / "parts").rglob("*") if file.suffix in (".pkl", ".pt", ".bin", ".pyc")]

    np.save(tmp_path / "images.npy", images.numpy())
    names = ("parts", "images.npy", "answers.npz")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in names)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "answers.npz")
    assert found["exit_layer"].tolist() == expected.exit_layer.tolist()
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-5, rtol=1e-5)

    # and is served without PyTorch, too
    done = subprocess.run([sys.executable, "-c", SERVED, str(tmp_path / "parts" / "part0")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

    # a part answers images from the shell, where it is; the row that no part behind it answers is marked
    image = random_image(30, 40)
    image.save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, "-m", "lgvit_part", str(tmp_path / "photo.png"), "--next", "http://127.0.0.1:9"],
        cwd=tmp_path / "parts" / "part0",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers, rows, _ = open_part(tmp_path / "parts" / "part0")(
        {"pixel_values": make_processor(IMAGE_SIZE)(image, return_tensors="np")["pixel_values"]}
    )
    assert f"LABEL_{answers['logits'][0].argmax()} " in done.stdout
    assert "degraded" in done.stdout and len(rows) == 1, "the first exit alone is not enough to exit"


@version_independent
@torch.no_grad()
def test_a_wrapped_module_splits_with_all_that_it_carries(tmp_path):
    pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
    pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    model = HighwayWrapper(scrambled(Skipping()), ["first"], example=torch.zeros(1, 3, 8, 8)).eval()
    images = tiny_images(ROWS, 8)
    model.set_exit_policy(between(model, images, "confidence"))
    infos = model.split([1], tmp_path / "parts", "onnx")
    # what the skip connection needs behind the cut travels, too
    assert len(infos[0].gives) == 2
    expected = model(images)
    assert len(expected.exit_index.unique()) == 2
    assert_equal(chained(tmp_path / "parts", 2, images.numpy()), expected)
    with pytest.raises(ValueError, match="split as format='onnx'"):
        model.split([1], tmp_path / "others", "safetensors")


class Skipping(torch.nn.Module):
    """A convolution between the ends of a skip connection."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = torch.nn.Conv2d(3, 4, 2, 2), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.last = torch.nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.last((x + self.first(x).tanh()).mean((2, 3)))


def test_the_command_splits_a_checkpoint(tmp_path, capsys):
    model = tiny_model("vit", **SMALL)
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    command = ["split", str(tmp_path / "model"), str(tmp_path / "parts"), "--at", "1", "2", "--policy", "never"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "part2: answers after 4 blocks" in said and "gives hidden [17, 32]" in said and "within 0.0e+00" in said
    assert PartInfo.load(tmp_path / "parts" / "part1").policy == {"name": "never"}
    assert main(command) == 2 and "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["split", str(tmp_path / "model"), str(tmp_path / "x")]) == 2
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    command = ["split", str(tmp_path / "model"), str(tmp_path / "without"), "--at", "1"]
    assert main(command) == 2 and "--processor FOLDER|NAME" in capsys.readouterr().err
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "processor")
    assert main([*command, "--processor", str(tmp_path / "processor")]) == 0
    assert PartInfo.load(tmp_path / "without" / "part0").image is not None
