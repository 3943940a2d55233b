"""Files of others: found, read without running anything, and named in the error where they cannot be."""

import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lgvit_hf.cli import main
from lgvit_hf.hub.reading import find_weights, read_weights


@pytest.mark.version_independent
def test_the_best_file_of_a_folder_is_taken(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        (tmp_path / "training_args.bin").touch()
        assert find_weights(tmp_path).name == name
        assert find_weights(tmp_path / "pytorch_model.bin").name == "pytorch_model.bin"


@pytest.mark.version_independent
def test_one_file_of_any_name(tmp_path):
    with pytest.raises(OSError, match="no weights there"):
        find_weights(tmp_path)
    (tmp_path / "swin_t.pth").touch()
    assert find_weights(str(tmp_path)).name == "swin_t.pth"
    (tmp_path / "swin_s.pt").touch()
    with pytest.raises(OSError, match=r"2 files of weights \(swin_s.pt, swin_t.pth\); name one"):
        find_weights(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OSError, match="notes.txt: not a file of weights"):
        find_weights(tmp_path / "notes.txt")


STATE = {"a": torch.arange(3.0), "b": torch.zeros(2, 2)}


OPTIONS = argparse.Namespace(lr=1e-3)


@pytest.mark.parametrize("content", [STATE, {"model": STATE, "args": OPTIONS}, {"state_dict": STATE, "epoch": 3}])
def test_a_pickle_of_tensors(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    state = read_weights(tmp_path / "x.pth")
    assert state.keys() == STATE.keys() and torch.equal(state["a"], STATE["a"])


class Code:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.version_independent
# every format with a file that would run code; what else may be in it is looked at before the format matters
@pytest.mark.parametrize(
    ("source_format", "content"),
    [(name, "code") for name in ("lgvit", "eevit", "avit", "timm", "torchvision")]
    + [("lgvit", "module"), ("eevit", "text"), ("timm", "truncated")],
)
def test_whatever_it_is_nothing_runs_and_one_line_says_why(source_format, content, tmp_path, capsys):
    file = tmp_path / "model-1-2.pth"
    if content == "code":
        file.write_bytes(pickle.dumps({"model": Code(tmp_path / "canary")}, protocol=2))
    elif content == "module":
        torch.save(torch.nn.Linear(2, 2), file)
    elif content == "truncated":
        torch.save(STATE, file)
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_text("weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run_args.yaml").write_text("model: {image_size: 16}")
    assert main(["convert", "--from", source_format, str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model-1-2.pth" in said
    assert "damaged, or a pickle that holds more than tensors and is not run" in said
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()


# -- weights in several files ------------------------------------------------------------------------------


def shards(folder, places=None, suffix=".safetensors"):
    save = save_file if suffix == ".safetensors" else torch.save
    folder.mkdir()
    for number, name in enumerate(STATE, 1):
        save({name: STATE[name]}, folder / f"part-{number}{suffix}")
    places = {name: f"part-{number}{suffix}" for number, name in enumerate(STATE, 1)} if places is None else places
    index = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    index = index.with_name(index.name + ".index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_and_its_files(suffix, tmp_path):
    folder = shards(tmp_path / "model", suffix=suffix)
    state = read_weights(find_weights(folder))
    assert state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            {"a": "../outside.safetensors"},
            "'../outside.safetensors' must be the name of a file",
        ),
        ({"a": "/etc/passwd"}, "'/etc/passwd' must be the name"),
        ({"a": "part-1.safetensors", "b": "sub/part-2.safetensors"}, "must be the name"),
        ({"a": "link.safetensors"}, "link.safetensors leads out of the folder"),
        ({"a": "part-3.safetensors"}, "part-3.safetensors is not there"),
        ({"a": "part-1.safetensors"}, None),
        (
            {"a": "part-1.safetensors", "c": "part-2.safetensors"},
            r"2 tensors are only in it or .* \(b, c\)",
        ),
        ({"a": "model.safetensors.index.json"}, "must be the name"),
        ({"a": 3}, "no 'weight_map'"),
        ({}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
    ],
)
def test_an_index_stays_in_its_folder(places, message, tmp_path):
    folder = shards(tmp_path / "model", places)
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    if message is None:
        assert read_weights(find_weights(folder)).keys() == {"a"}
        return
    with pytest.raises((ValueError, OSError), match=message) as error:
        read_weights(find_weights(folder))
    assert "model.safetensors.index.json" in str(error.value)


@pytest.mark.version_independent
def test_the_cache_of_the_hub_is_made_of_links(tmp_path):
    """`snapshots/<commit>` holds links to `blobs`."""
    folder = shards(tmp_path / "snapshots")
    (tmp_path / "models--x" / "snapshots" / "0a").mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    for file in folder.iterdir():
        blob = tmp_path / "models--x" / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (tmp_path / "models--x" / "snapshots" / "0a" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert read_weights(find_weights(tmp_path / "models--x" / "snapshots" / "0a")).keys() == STATE.keys()
