"""Original LGViT checkpoints: all of it is understood, or nothing is written."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from lgvit_hf.hub.convert import convert_lgvit, lgvit_config, parse_positions
from tests.tiny import tiny_backbone_settings, tiny_images, tiny_model

POSITIONS = {"vit": [2, 3, 4, 5], "deit": [2, 3, 4, 5], "swin": [2, 3, 5, 6]}
# our name inside an exit -> the original's, by kind of head
ORIGINAL_HEAD_NAMES = {
    "conv1_1": {
        "body.expand": "mlp.conv1.0",
        "body.expand_bn": "mlp.conv1.2",
        "body.depthwise": "mlp.proj",
        "body.depthwise_bn": "mlp.proj_bn",
        "body.project": "mlp.conv2.0",
        "body.project_bn": "mlp.conv2.1",
    },
    "conv2_1": {
        "body.expand": "mlp.conv1.0",
        "body.expand_bn": "mlp.conv1.2",
        "body.project": "mlp.conv2.0",
        "body.project_bn": "mlp.conv2.1",
    },
    "attention": {"body.qkv": "mlp.qkv", "body.proj": "mlp.proj"},
}
ORIGINAL_CLASSIFIERS = {
    "vit": {"classifiers.0": "classifier"},
    "deit": {"classifiers.0": "cls_classifier", "classifiers.1": "distillation_classifier"},
    "swin": {"classifiers.0": "classifier.classifier", "norm": "classifier.layernorm"},
}


def original_name(kind, config, name):
    if not name.startswith("exits."):
        return re.sub("^vit", "deit", name)
    _, index, rest = name.split(".", 2)
    exit = config.exits[int(index)]
    part, leaf = rest.rsplit(".", 1)
    part = {**ORIGINAL_HEAD_NAMES[exit.head.split("_r")[0]], **ORIGINAL_CLASSIFIERS[kind]}[part]
    if kind != "swin":
        return f"deit.encoder.highway.{index}.{part}.{leaf}"
    stage = config.stage_of(exit.after)
    inside = [other.after for other in config.exits if config.stage_of(other.after) == stage].index(exit.after)
    return f"swin.encoder.layers.{stage}.highway.{inside}.{part}.{leaf}"


class Original:
    """An original checkpoint made from one of ours, by the names that LGViT's code gives its tensors."""

    def __init__(self, kind, folder):
        # Swin's last position is the final classifier's; its exits end before
        self.positions = POSITIONS[kind][: 3 if kind == "swin" else 4]
        self.model = tiny_model(kind, exit_positions=self.positions)
        self.model.save_pretrained(folder / "ours")
        tensors = load_file(folder / "ours" / "model.safetensors")
        self.state = {original_name(kind, self.model.config, name): tensor for name, tensor in tensors.items()}
        positions = "[[2],[1],[1]]" if kind == "swin" else str(self.positions)
        self.config = {
            **tiny_backbone_settings(kind),
            "position_exits": positions,
            "highway_type": "LGViT",
            "exit_strategy": "confidence",
            "threshold": [0.5, 0.6, 0.7, 0.8][: len(self.positions)],
            "train_strategy": "alternating_weighted",
            "num_early_exits": len(self.positions),
            "loss_coefficient": 0.3,
            "layer_norm_eps": self.model.config.layer_norm_eps,
        }
        if kind != "swin":
            self.config["backbone"] = {"vit": "ViT", "deit": "DeiT"}[kind]
        self.folder = folder / "original"
        self.folder.mkdir()
        self.write()

    def write(self, state=None, suffix=".safetensors", **changes):
        for file in self.folder.iterdir():
            file.unlink()
        state = self.state if state is None else state
        if suffix == ".bin":
            torch.save(state, self.folder / "pytorch_model.bin")
        else:
            save_file(state, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text(json.dumps({**self.config, **changes}))


@pytest.fixture(params=["vit", "deit", "swin"])
def original(request, tmp_path):
    return Original(request.param, tmp_path)


@pytest.fixture
def vit(tmp_path):
    return Original("vit", tmp_path)


@pytest.fixture
def output(tmp_path):
    """Where to convert to; whatever happens, nothing else is left behind."""
    before = set(tmp_path.iterdir())
    yield tmp_path / "converted"
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "converted"}


def assert_refused(original, output, error, match):
    with pytest.raises(error, match=match):
        convert_lgvit(original.folder, output)
    assert not output.exists()


@torch.no_grad()
def test_same_logits_at_every_exit(original, output):
    # one of them as a pickle: reading comes before all that differs between backbones
    original.write(suffix=".bin" if type(original.model).__name__ == "DeiTHighway" else ".safetensors")
    config = convert_lgvit(original.folder, output)
    model, info = AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert type(model) is type(original.model) and not info["missing_keys"] and not info["unexpected_keys"]
    images = tiny_images(4)
    theirs = original.model(images, early_exit=False).exit_logits
    ours = model.eval()(images, early_exit=False).exit_logits
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()
    assert config.exit_positions == model.config.exit_positions == original.positions
    assert config.exit_policy == {"name": "confidence", "threshold": original.config["threshold"]}
    assert config.exit_loss_weights == "depth"


def test_weights_file_as_source(vit, output):
    convert_lgvit(str(vit.folder / "model.safetensors"), str(output))
    assert AutoModelForImageClassification.from_pretrained(output).config.exit_positions == vit.positions


def test_counters_of_batch_norms_may_be_absent_and_dead_tensors_are_left_out(original, output):
    state = {name: tensor for name, tensor in original.state.items() if "num_batches_tracked" not in name}
    dead = "layernorm" if "swin.layernorm.weight" in state else "deit.pooler.dense"
    state |= {f"{dead}.weight": torch.zeros(4, 4), f"{dead}.bias": torch.zeros(4)}
    original.write(state)
    convert_lgvit(original.folder, output)
    ours = load_file(original.folder.parent / "ours" / "model.safetensors")
    converted = load_file(output / "model.safetensors")
    assert {name for name in converted if "num_batches_tracked" not in name} == {
        name for name in ours if "num_batches_tracked" not in name
    }
    assert all(torch.equal(converted[name], ours[name]) for name in converted if "num_batches_tracked" not in name)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("unknown.weight", r"unknown\.weight"),
        ("deit.encoder.highway.0.mlp.extra", r"highway\.0\.mlp\.extra"),
        ("deit.encoder.highway.9.classifier.weight", r"(highway|exits)\.9\.classifier"),
        ("deit.encoder.layer.6.output.dense.weight", r"layers?\.6\."),
    ],
)
def test_a_tensor_without_a_place(vit, output, name, named):
    vit.write({**vit.state, name: torch.zeros(5, 32)})
    assert_refused(vit, output, ValueError, named)


def test_a_tensor_that_is_missing(original, output):
    names = [name for name in original.state if not name.endswith(("num_batches_tracked", "relative_position_index"))]
    chosen = {re.sub(r"\d+", "", name).split(".")[-2] + name.split(".")[-1]: name for name in names}
    assert len(chosen) > 20
    for name in chosen.values():
        original.write({key: tensor for key, tensor in original.state.items() if key != name})
        assert_refused(original, output, ValueError, "missing")


@pytest.mark.version_independent
def test_a_tensor_of_another_shape(vit, output):
    name = next(name for name in vit.state if name.endswith("mlp.qkv.weight"))
    vit.write({**vit.state, name: torch.zeros(3, 3)})
    assert_refused(vit, output, (ValueError, RuntimeError), "shape|size")


@pytest.mark.version_independent
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_that_is_cut_short(vit, output, suffix):
    vit.write(suffix=suffix)
    file = next(file for file in vit.folder.iterdir() if file.suffix == suffix)
    content = file.read_bytes()
    for kept in (0, 7, 200, len(content) // 2, len(content) - len(content) // 1000):
        file.write_bytes(content[:kept])
        assert_refused(vit, output, (OSError, ValueError), file.name)


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


@pytest.mark.version_independent
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "one-tensor"])
def test_a_pickle_that_runs_code_is_refused(vit, output, tmp_path, inside):
    canary = tmp_path / "canary"
    trap = Malicious(canary)
    vit.write({**vit.state, "trap": trap} if inside else trap, suffix=".bin")
    assert_refused(vit, output, (OSError, ValueError), r"pytorch_model\.bin")
    with open(vit.folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(trap, file)
    assert_refused(vit, output, (OSError, ValueError), r"pytorch_model\.bin")
    assert not canary.exists()


@pytest.mark.version_independent
def test_a_bin_that_is_no_state_dict(vit, output):
    for content in ([torch.zeros(2)], {"a": 3}, {}, {"model": {"a": 3}}, {"model": {}}, torch.zeros(2)):
        vit.write(content, suffix=".bin")
        assert_refused(vit, output, ValueError, r"pytorch_model\.bin: not a state dict")


@pytest.mark.version_independent
def test_a_config_that_is_no_object(vit, output):
    for content in ("", "{", "[1, 2]", "3", "\x00\x01"):
        (vit.folder / "config.json").write_text(content)
        assert_refused(vit, output, (OSError, ValueError), r"config\.json")


@pytest.mark.version_independent
def test_files_that_are_missing(vit, output, tmp_path):
    (vit.folder / "config.json").unlink()
    assert_refused(vit, output, OSError, "no config.json")
    vit.write()
    (vit.folder / "model.safetensors").unlink()
    assert_refused(vit, output, OSError, "no model.safetensors or pytorch_model.bin")
    with pytest.raises(OSError, match="nowhere"):
        convert_lgvit(tmp_path / "nowhere", output)


@pytest.mark.version_independent
def test_an_output_in_use_is_not_touched(vit, output):
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="converted"):
        convert_lgvit(vit.folder, output)
    assert [file.name for file in output.iterdir()] == ["thesis.txt"]
    (output / "thesis.txt").unlink()
    convert_lgvit(vit.folder, output)
    assert (output / "model.safetensors").is_file()


@pytest.mark.version_independent
def test_an_output_that_is_a_file_is_not_touched(vit, output):
    output.write_text("years of work")
    with pytest.raises(ValueError, match="converted"):
        convert_lgvit(vit.folder, output)
    assert output.read_text() == "years of work"


@pytest.mark.version_independent
def test_the_image_processor_goes_along(vit, output):
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (vit.folder / "preprocessor_config.json").write_text(json.dumps(settings))
    convert_lgvit(vit.folder, output)
    assert json.loads((output / "preprocessor_config.json").read_text()) == settings


# -- the config ------------------------------------------------------------------------------------------------


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("text", "positions"),
    [("[4,5,6]", [4, 5, 6]), (" [ 4 ] ", [4]), ([4, 5], [4, 5]), ("[[],[2],[3, 6],[1]]", [[], [2], [3, 6], [1]])],
)
def test_positions(text, positions):
    assert parse_positions(text) == positions


@pytest.mark.version_independent
def test_positions_that_are_none():
    texts = ["", "4", "[4", "4,5", "[4.0]", "['4']", "[true]", "[-1]", "[1e3]", "list([4])", "[[[4]]]"]
    code = ["[4]+[5]", "[4 for _ in [1]]", "[" * 500 + "]" * 500, "[" + "1" * 5000 + "]"]
    for text in (*texts, *code, None, 4, {"a": 4}, [4.0], ["4"], [True], [[["4"]]]):
        with pytest.raises(ValueError, match="position_exits: "):
            parse_positions(text)


def plain(**changes):
    return {"position_exits": "[4, 8]", "highway_type": "LGViT", "backbone": "ViT", **changes}


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_exits": "[0, 4]"}, "exit_positions"),
        ({"position_exits": "[4, 12]"}, "exit_positions"),
        ({"position_exits": "[8, 4]"}, "exit_positions"),
        ({"position_exits": "[[4], [8]]"}, "exit_positions|position_exits"),
        ({"highway_type": "conv9"}, "exit_types.*'conv9'.*conv1_1"),
        ({"backbone": "ResNet"}, "backbone: 'ResNet'.*ViT.*DeiT"),
        ({"exit_strategy": "gumbel_lte"}, "exit_strategy: 'gumbel_lte'.*confidence, entropy"),
        ({"exit_strategy": "confidence_and_entropy"}, "exit_strategy: 'confidence_and_entropy'"),
        ({"exit_strategy": "confidence", "threshold": [0.5]}, "exit_policy: threshold has 1 values.*2 exits"),
        ({"depths": [2, 2], "position_exits": "[4, 8]"}, "position_exits.*one list for each of the 2 stages"),
        ({"depths": [2, 2], "position_exits": "[[1]]"}, "position_exits.*one list for each of the 2 stages"),
    ],
)
def test_settings_that_cannot_be_understood(changes, message):
    with pytest.raises(ValueError, match=message):
        lgvit_config(plain(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"hidden_size": -4},
        {"num_attention_heads": 0},
        {"patch_size": 0},
        {"hidden_act": "swoosh"},
        {"id2label": 3},
        {"intermediate_size": 10**14},
    ],
    ids=str,
)
def test_settings_of_which_no_model_can_be_built(vit, output, changes):
    vit.write(**changes)
    assert_refused(vit, output, ValueError, r"config\.json: ")


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("strategy", "threshold", "policy"),
    [
        ("entropy", None, {"name": "entropy", "threshold": 0.6}),
        ("entropy", [0.1, 0.2], {"name": "entropy", "threshold": [0.1, 0.2]}),
        ("confidence", None, {"name": "confidence", "threshold": 0.865}),
        ("patience", None, {"name": "patience", "patience": 7}),
        ("patience", [3], {"name": "patience", "patience": 3}),
        ("patient_and_confident", None, {"name": "patience_confidence", "threshold": [0.5, 0.5], "patience": 2}),
        (
            "patient_and_confident",
            [0.1, 0.2, 3],
            {"name": "patience_confidence", "threshold": [0.1, 0.2], "patience": 3},
        ),
    ],
)
def test_policies_of_the_original(strategy, threshold, policy):
    assert lgvit_config(plain(exit_strategy=strategy, threshold=threshold)).exit_policy == policy


@pytest.mark.version_independent
def test_published_swin_config():
    config = lgvit_config(
        {"depths": [2, 2, 18, 2], "position_exits": "[[],[2],[3,6,9,12,15,18],[1]]", "highway_type": "LGViT"}
    )
    assert config.exit_positions == [4, 7, 10, 13, 16, 19, 22, 23]
    assert config.exit_types[4:] == ["attention_r1", "attention_r1", "attention_r2", "attention_r2"]
    assert config.exit_policy == {"name": "confidence", "threshold": 0.75}
