"""Folders that are no exports: a clear error that names the file, and nothing outside the folder is read."""

import ctypes
import json
import os
import struct
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, NUM_LABELS, tiny_config

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from lgvit_hf.runtimes.manifest import Manifest  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402
from lgvit_hf.serving.device.info import file_digest  # noqa: E402

version_independent = pytest.mark.version_independent
OUTPUTS = {"logits": TensorProto.FLOAT, "exit_layer": TensorProto.INT64}
OUTPUTS |= {"exit_index": TensorProto.INT64, "exit_score": TensorProto.FLOAT}
NO_VALUES = (None, 0, "", [], {}, True, "..", ["x"], {"x": None}, -1.5)
# an empty note is a note
ALLOWED = {
    ("inputs", "{}"),
    ("ensemble", "None"),
    ("image", "None"),
    ("weights", "None"),
    ("versions", "{}"),
    ("checks", "{}"),
    ("versions", "{'x': None}"),
    ("checks", "{'x': None}"),
}


def one_file(outputs=OUTPUTS, weight=None, pixels=("batch", 3, IMAGE_SIZE, IMAGE_SIZE), within=False):
    """A graph with a single file's inputs and outputs, whose logits are a weight; `within` keeps that in an `If`."""
    weight = numpy_helper.from_array(np.zeros((1, NUM_LABELS), np.float32), "weight") if weight is None else weight
    numbers = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    score = helper.make_tensor("score", TensorProto.FLOAT, [1], [1.0])
    asked = helper.make_tensor("asked", TensorProto.BOOL, [], [True])
    source = {"logits": "weight", "exit_score": "score"}
    nodes, constants = [], [weight, numbers, score]
    if within:
        inside = [
            helper.make_graph(
                [helper.make_node("Identity", ["weight"], [f"{name}_logits"])],
                name,
                [],
                [helper.make_tensor_value_info(f"{name}_logits", TensorProto.FLOAT, None)],
                [weight],
            )
            for name in ("first", "second")
        ]
        nodes.append(helper.make_node("If", ["asked"], ["chosen"], then_branch=inside[0], else_branch=inside[1]))
        source["logits"], constants = "chosen", [numbers, score, asked]
    nodes += [helper.make_node("Identity", [source.get(name, "one")], [name]) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "highway",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, pixels)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def elsewhere(location):
    """A weight that stands in another file."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.dims.extend([1, NUM_LABELS])
    for key, value in (("location", location), ("offset", "0"), ("length", str(4 * NUM_LABELS))):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return weight


def write_folder(folder, content, **changes):
    """A folder whose manifest agrees with its file, whatever that holds."""
    folder.mkdir()
    tiny_config("vit", exit_positions=[2]).save_pretrained(folder)
    (folder / "model.onnx").write_bytes(content)
    settings = {
        "layout": "single",
        "precision": "float32",
        "files": {"model.onnx": file_digest(folder / "model.onnx")},
        "depths": [2, 6],
        "exits": [0, 1],
        "policy": {"name": "confidence", "threshold": 0.5},
        "macs": {"backbone_costs": [1.0, 2.0], "heads": [0.5, 0.5]},
        "versions": {},
        "checks": {},
    }
    Manifest(**{**settings, **changes}).save(folder)
    return folder


@contextmanager
def nobody_opens(*files):
    """Fails where a file is opened, by Python or by anything else in this process."""
    seen = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        watch = libc.inotify_init1(os.O_NONBLOCK)
        names = {libc.inotify_add_watch(watch, os.fsencode(file), 0x20 | 0x1): file for file in files}
        assert watch >= 0 and -1 not in names
    yield seen
    if sys.platform == "linux":
        try:
            events = os.read(watch, 4096)
            seen += [names[struct.unpack_from("i", events, place)[0]] for place in range(0, len(events), 16)]
        except BlockingIOError:
            pass
        os.close(watch)
    assert not seen, f"opened: {seen}"


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(np.arange(NUM_LABELS, dtype=np.float32).tobytes())
    return file


@version_independent
@pytest.mark.skipif(sys.platform != "linux", reason="watches files by inotify")
def test_the_watch_sees_what_onnxruntime_opens(tmp_path, secret):
    folder = write_folder(tmp_path / "onnx", one_file())
    with pytest.raises(AssertionError, match="opened: .*secret"), nobody_opens(secret):
        secret.read_bytes()
    with pytest.raises(AssertionError, match=r"opened: .*model\.onnx"), nobody_opens(folder / "model.onnx"):
        import onnxruntime

        onnxruntime.InferenceSession(folder / "model.onnx")


def test_a_good_folder_opens(tmp_path):
    write_folder(tmp_path / "onnx", one_file())
    for folder in (tmp_path / "onnx", str(tmp_path / "onnx")):
        output = ORTHighway.from_pretrained(folder)(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        assert output.logits.tolist() == [[0.0] * NUM_LABELS]


@version_independent
@pytest.mark.parametrize(
    ("location", "within"),
    [
        ("../secret", False),
        ("../secret", True),
        ("{absolute}", True),
        ("link", False),
        ("inside", True),
        ("/etc/passwd", False),
        ("../../etc/passwd", False),
    ],
)
def test_weights_in_other_files_are_not_read(location, within, tmp_path, secret, monkeypatch):
    weight = elsewhere(location.format(absolute=secret))
    folder = write_folder(tmp_path / "onnx", one_file(weight=weight, within=within))
    (folder / "link").symlink_to(secret)
    (folder / "inside").write_bytes(secret.read_bytes())
    watched = [secret, folder / "inside", Path("/etc/passwd")]
    for place in (tmp_path, folder):  # names are not taken from where one stands, either
        monkeypatch.chdir(place)
        with nobody_opens(*watched), pytest.raises(ValueError, match="weights in other files are not read") as error:
            ORTHighway.from_pretrained(folder)
        assert str(folder / "model.onnx") in str(error.value)


DAMAGED = {
    "empty": lambda content: b"",
    "one byte": lambda content: b"\x08",
    "half": lambda content: content[: len(content) // 2],
    "last byte lost": lambda content: content[:-1],
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    "zeros": lambda content: bytes(len(content)),
    "reversed": lambda content: content[::-1],
    "unknown operator": lambda content: content.replace(b"Identity", b"Idontity"),
    "opset of the future": lambda content: content.replace(b"\x10\x12", b"\x10\x7f"),
    "a size whose name is no text": lambda content: content.replace(b"batch", b"b\xfftch"),
}


@version_independent
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(damage, tmp_path):
    content = DAMAGED[damage](one_file())
    assert content != one_file()
    folder = write_folder(tmp_path / "onnx", content)
    with pytest.raises(ValueError, match="does not open in ONNX Runtime; export or split again") as error:
        ORTHighway.from_pretrained(folder)
    assert str(folder / "model.onnx") in str(error.value)


@version_independent
def test_any_cut_or_flipped_byte_is_a_clear_error_or_still_opens(tmp_path):
    content, generator = one_file(), rng()
    folder = write_folder(tmp_path / "onnx", content)
    settings = json.loads((folder / "manifest.json").read_text())
    refused = 0
    for place in generator.integers(0, len(content), 60).tolist():
        flipped = bytearray(content)
        flipped[place] ^= int(generator.integers(1, 256))
        for damaged in (bytes(flipped), content[:place]):
            (folder / "model.onnx").write_bytes(damaged)
            settings["files"]["model.onnx"] = file_digest(folder / "model.onnx")
            (folder / "manifest.json").write_text(json.dumps(settings))
            try:
                ORTHighway.from_pretrained(folder)
            except ValueError as error:
                assert str(folder) in str(error)
                refused += 1
    # every file that was cut, and of those with another byte a good part
    assert refused > 60


@version_independent
@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (one_file({"logits": TensorProto.FLOAT}), {}, "no 'single' highway: .*'exit_index', 'exit_layer', 'exit_sco"),
        (one_file(), {"layout": "all_exits"}, "no 'all_exits' highway: .*'exit_logits'"),
        (one_file(pixels=("batch", 3)), {}, r"pixel_values is not \(batch, channels, height, width\)"),
        (one_file(pixels=("batch", 3, "h", "w")), {}, r"pixel_values is not \(batch, channels, height, width\)"),
        (one_file(pixels=None), {}, r"pixel_values is not \(batch, channels, height, width\)"),
    ],
)
def test_files_that_are_no_highway(content, changes, message, tmp_path):
    folder = write_folder(tmp_path / "onnx", content, **changes)
    with pytest.raises(ValueError, match=message) as error:
        ORTHighway.from_pretrained(folder)
    assert str(folder / "model.onnx") in str(error.value)


@version_independent
def test_a_file_that_decides_otherwise_than_its_config(tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file(), policy={"name": "nobody's"})
    with pytest.raises(ValueError, match='this file decides by "nobody\'s"') as error:
        ORTHighway.from_pretrained(folder)
    assert str(folder) in str(error.value)


@version_independent
def test_segments_that_do_not_follow_each_other(tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file({"logits": TensorProto.FLOAT}))
    for name in ("segment_00.onnx", "segment_01.onnx"):
        (folder / name).write_bytes((folder / "model.onnx").read_bytes())
    settings = json.loads((folder / "manifest.json").read_text())
    digest = settings["files"]["model.onnx"]
    settings |= {"layout": "segments", "files": {"segment_00.onnx": digest, "segment_01.onnx": digest}}
    (folder / "manifest.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"segment_01\.onnx is no 'segments' highway: \['pixel_values'\] is missing"):
        ORTHighway.from_pretrained(folder)


FIELDS = list(Manifest.__dataclass_fields__)
# not in folders written before 0.2
NEW_FIELDS = ("thresholds", "inputs", "ensemble", "image", "weights")


@version_independent
@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_the_manifest(field, tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file())
    file = folder / "manifest.json"
    good = json.loads(file.read_text())
    without = {name: value for name, value in good.items() if name != field}
    bad = [] if field in NEW_FIELDS else [without]
    bad += [{**good, field: value} for value in NO_VALUES if (field, repr(value)) not in ALLOWED]
    for settings in bad:
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=field) as error:
            Manifest.load(folder)
        assert str(folder) in str(error.value)
    file.write_text(json.dumps(good))
    assert asdict(Manifest.load(folder))[field] == good[field]


@version_independent
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depths", [6, 2]),
        ("depths", [2, 2]),
        ("depths", [0, 6]),
        ("depths", [2.0, 6.0]),
        ("exits", [1, 0]),
        ("exits", [0, 2]),
        ("exits", [-1, 1]),
        ("policy", {"name": ["confidence"]}),
        ("macs", {"backbone_costs": [1.0], "heads": [1.0, 2.0]}),
        ("macs", {"backbone_costs": [1.0, "2"], "heads": [1.0, 2.0]}),
        ("files", {"model.onnx": "0" * 63}),
        ("files", {"model.onnx": 0}),
        ("layout", "segments"),
    ],
)
def test_values_that_cannot_be(field, value, tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file(), **{field: value})
    with pytest.raises(ValueError, match=r"manifest\.json is not what `lgvit export` writes \("):
        Manifest.load(folder)


@version_independent
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, '{"layout": "single"}', "\udcff"])
def test_manifests_that_are_none(text, tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file())
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"onnx/manifest\.json is not what"):
        Manifest.load(folder)


def test_files_that_are_not_those_exported(tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file())
    (folder / "model.onnx").write_bytes(one_file() + b"\x00")
    with pytest.raises(ValueError, match=r"onnx/model\.onnx is not the file that was written; export it again"):
        Manifest.load(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"onnx/model\.onnx is missing; export it again"):
        Manifest.load(folder)
    (folder / "model.onnx").mkdir()
    with pytest.raises(ValueError, match=r"onnx/model\.onnx is missing; export it again"):
        Manifest.load(folder)
    (folder / "manifest.json").unlink()
    for nothing in (folder, tmp_path / "nowhere", folder / "config.json"):
        with pytest.raises(OSError, match="not an exported highway"):
            Manifest.load(nothing)


@version_independent
@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "", "/etc/passwd", "sub/model.onnx", "..\\secret.onnx", "C:secret.onnx", "a\0.onnx"],
)
def test_names_that_lead_elsewhere(name, tmp_path, secret):
    folder = write_folder(tmp_path / "onnx", one_file(), files={name: file_digest(secret)})
    with nobody_opens(secret, "/etc/passwd"), pytest.raises(ValueError, match=r"manifest\.json is not .*files="):
        Manifest.load(folder)


@version_independent
@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_links_out_of_the_folder_are_not_followed(name, tmp_path):
    folder = write_folder(tmp_path / "onnx", one_file())
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with nobody_opens(outside), pytest.raises(ValueError, match=f"onnx/{name} is a link out of its folder"):
        Manifest.load(folder)


@version_independent
def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    blobs = tmp_path / "models--someone--model" / "blobs"
    blobs.mkdir()
    write_folder(snapshot, one_file())
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    ORTHighway.from_pretrained(snapshot)
    (snapshot / "model.onnx").unlink()
    (snapshot / "model.onnx").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(one_file())
    with pytest.raises(ValueError, match="is a link out of its folder"):
        ORTHighway.from_pretrained(snapshot)


@version_independent
def test_nothing_but_the_folder_is_opened(tmp_path):
    """What Python opens; ONNX Runtime's own reads are watched above."""
    folder, opened, listening = write_folder(tmp_path / "onnx", one_file()), [], [True]
    outside = tmp_path / "outside.json"
    outside.write_text("{}")

    def hook(event, arguments):
        if listening[0] and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            opened.append(os.path.realpath(os.fsdecode(arguments[0])))

    ORTHighway.from_pretrained(folder)  # what is imported is imported
    sys.addaudithook(hook)
    try:
        ORTHighway.from_pretrained(folder)
    finally:
        listening[0] = False
    ours = [file for file in opened if file.startswith(str(tmp_path))]
    assert ours and all(file.startswith(str(folder)) for file in ours)
    assert not [file for file in opened if not file.startswith(str(tmp_path)) and file.endswith((".json", ".onnx"))]
