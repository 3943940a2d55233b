"""Exit settings: presets, every kind of bad input, and files that want to run code."""

import copy
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageClassification

from lgvit_hf import ViTHighway, ViTHighwayConfig
from lgvit_hf.exit_settings import Exit, lgvit_positions
from lgvit_hf.hub.convert import convert_lgvit
from tests.seeds import examples
from tests.tiny import CONFIGS, KINDS, MODELS, NUM_BLOCKS, tiny_config, tiny_images, tiny_model, tiny_native

every_kind = pytest.mark.parametrize("kind", KINDS)
SWIN_LAYOUT = "conv1_1 conv1_1 conv2_1 conv2_1 attention_r1 attention_r1 attention_r2 attention_r2".split()
LAYOUTS = {
    2: "conv1_1 attention_r2",
    4: "conv1_1 conv2_1 attention_r2 attention_r3",
    6: "conv1_1 conv2_1 attention_r2 attention_r2 attention_r3 attention_r3",
    8: "conv1_1 conv1_1 conv2_1 conv2_1 attention_r2 attention_r2 attention_r3 attention_r3",
}


# -- presets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "deit", "deit_plain"])
def test_published_preset_of_twelve_blocks(kind):
    config = CONFIGS[kind]()
    assert config.exit_positions == [4, 5, 6, 7, 8, 9, 10, 11]
    assert config.exit_types == LAYOUTS[8].split()
    assert config.exits[0] == Exit(4, "conv1_1") and config.exits[-1] == Exit(11, "attention_r3")


def test_published_heads():
    for num_exits, layout in LAYOUTS.items():
        config = ViTHighwayConfig(exit_positions=list(range(4, 4 + num_exits)), exit_types="lgvit")
        assert config.exit_types == layout.split()


def test_published_preset_of_swin():
    config = CONFIGS["swin"](depths=[2, 2, 18, 2])
    assert config.num_blocks == 24
    assert config.exit_positions == [4, 7, 10, 13, 16, 19, 22, 23]
    assert config.exit_types == SWIN_LAYOUT


def test_general_rule():
    for num_blocks in range(2, 49):
        positions = lgvit_positions(num_blocks)
        # from a third of the depth to the last but one block, eight at most
        assert positions[0] == math.ceil(num_blocks / 3) and positions[-1] == num_blocks - 1
        assert len(positions) == min(8, num_blocks - math.ceil(num_blocks / 3))
        gaps = [b - a for a, b in zip(positions, positions[1:], strict=False)]
        assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)

        vit = ViTHighwayConfig(num_hidden_layers=num_blocks)
        swin = CONFIGS["swin"](depths=[1, num_blocks - 1], num_heads=[3, 6])
        assert swin.num_blocks == vit.num_blocks == num_blocks
        for config in (vit, swin):
            assert config.exit_positions == positions and len(config.exit_types) == len(positions)
            num_local = sum(head.startswith("conv") for head in config.exit_types)
            # the shallower half, but where six exits are published with two
            assert num_local == (2 if len(positions) == 6 else math.ceil(len(positions) / 2))
            assert all(head.startswith("conv") for head in config.exit_types[:num_local])


@every_kind
def test_one_head_for_all_and_one_for_each(kind):
    assert tiny_config(kind, exit_positions=[1, 4], exit_types="linear").exit_types == ["linear", "linear"]
    assert tiny_config(kind, exit_positions=[1, 4], exit_types=["mlp", "vit"]).exit_types == ["mlp", "vit"]


# -- bad settings ----------------------------------------------------------------------------------------------

HEAD_CHOICE, POLICY_CHOICE = "conv1_1", "patience_confidence"
# settings, and what the message must hold: the field, the value, a choice
BAD = [
    *[
        ({"exit_positions": value}, "exit_positions", repr(value), "1 to 5")
        for value in (
            [0, 3],
            [6],
            [2, 99],
            [-1],
            [4, 3],
            [3, 3],
            "[3, 4]",
            "3",
            [True, 3],
            [3.0],
            3,
            None,
            {"a": 1},
            [[3]],
        )
    ],
    ({"exit_positions": ["3", "4"]}, "exit_positions", "['3', '4']", "1 to 5"),
    ({"exit_positions": "lgvit8"}, "exit_positions", "'lgvit8'", "lgvit"),
    ({"exit_types": "conv9_9"}, "exit_types", "'conv9_9'", HEAD_CHOICE),
    ({"exit_types": ["linear", "attention"]}, "exit_types", "'attention'", "attention_r{n}"),
    ({"exit_types": ["linear"]}, "exit_types", "['linear']", "list of 2"),
    ({"exit_types": ["linear"] * 3}, "exit_types", "['linear', 'linear', 'linear']", "list of 2"),
    ({"exit_types": [1, "linear"]}, "exit_types", "1", HEAD_CHOICE),
    ({"exit_types": [["linear"], "linear"]}, "exit_types", "['linear']", HEAD_CHOICE),
    ({"exit_types": None}, "exit_types", "None", HEAD_CHOICE),
    ({"exit_types": 7}, "exit_types", "7", HEAD_CHOICE),
    ({"exit_policy": {"name": "confident"}}, "exit_policy", "'confident'", POLICY_CHOICE),
    ({"exit_policy": {"name": "gumbel_lte"}}, "exit_policy", "'gumbel_lte'", POLICY_CHOICE),
    ({"exit_policy": "confident"}, "exit_policy", "'confident'", POLICY_CHOICE),
    ({"exit_policy": {"threshold": 0.5}}, "exit_policy", "None", POLICY_CHOICE),
    ({"exit_policy": ["never"]}, "exit_policy", "['never']", "'name'"),
    ({"exit_policy": 0.5}, "exit_policy", "0.5", "'name'"),
    ({"exit_policy": {"name": "confidence", "threshold": [0.5] * 3}}, "exit_policy", "3 values", "2 exits"),
    ({"exit_policy": {"name": "confidence", "threshold": "0.5"}}, "exit_policy", "'0.5'", "number"),
    ({"exit_policy": {"name": "confidence"}}, "exit_policy", "'threshold'", "temperature"),
    ({"exit_policy": {"name": "entropy", "treshold": 1.0}}, "exit_policy", "'treshold'", "threshold"),
    ({"exit_policy": {"name": "patience", "patience": 0}}, "exit_policy", "0", "at least 1"),
    ({"exit_policy": {"name": "fixed", "exit_index": 3}}, "exit_policy", "3", "0..2"),
    ({"exit_loss_weights": "deep"}, "exit_loss_weights", "'deep'", "'depth', 'uniform'"),
    ({"exit_loss_weights": [1.0, 2.0]}, "exit_loss_weights", "[1.0, 2.0]", "3 numbers"),
    ({"exit_loss_weights": [0, 0, 0]}, "exit_loss_weights", "[0, 0, 0]", "3 numbers"),
    ({"exit_loss_weights": [-1, 1, 1]}, "exit_loss_weights", "[-1, 1, 1]", "3 numbers"),
    ({"exit_loss_weights": [math.inf, 1, 1]}, "exit_loss_weights", "[inf, 1, 1]", "3 numbers"),
    ({"exit_loss_weights": ["1", 1, 1]}, "exit_loss_weights", "['1', 1, 1]", "3 numbers"),
    ({"exit_loss_weights": None}, "exit_loss_weights", "None", "'depth', 'uniform'"),
    ({"pool": "max"}, "pool", "'max'", "'cls'"),
    ({"pool": 1}, "pool", "1", "'cls'"),
    ({"exit_position": [4]}, "'exit_position'", "did you mean 'exit_positions'", "exit_types"),
    ({"exit_type": "mlp"}, "'exit_type'", "did you mean 'exit_types'", "exit_policy"),
    ({"exits": [2, 4]}, "'exits'", "exit_positions", "exit_types"),
    ({"exit_threshold": 0.5}, "'exit_threshold'", "exit_policy", "exit_positions"),
]
bad = pytest.mark.parametrize(("changes", "field", "value", "choice"), BAD, ids=lambda value: str(value)[:40])
GOOD = {"exit_positions": [2, 4], "exit_types": ["linear", "mlp"]}


def assert_told(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@bad
def test_bad_setting(changes, field, value, choice, tmp_path):
    """When a config is made, in a dict, in a file, and in what is given while a good file is loaded."""
    config = tiny_config("vit", **GOOD)
    good, asked = config.to_dict(), {"exit_types": GOOD["exit_types"], **changes}
    config.save_pretrained(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps({**good, **changes}))
    for make in (
        lambda: tiny_config("vit", **{**GOOD, **changes}),
        lambda: ViTHighwayConfig.from_dict({**good, **changes}),
        lambda: ViTHighwayConfig.from_dict(good, **asked),
        lambda: AutoConfig.from_pretrained(tmp_path / "bad"),
        lambda: ViTHighwayConfig.from_pretrained(tmp_path / "bad"),
        lambda: ViTHighwayConfig.from_pretrained(tmp_path / "good", **asked),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert_told(error, field, value, choice)


@every_kind
def test_bad_setting_for_every_backbone(kind):
    for changes in (
        {"exit_positions": [0]},
        {"exit_positions": [NUM_BLOCKS]},
        {"exit_types": "conv"},
        {"exit_typs": "mlp"},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            tiny_config(kind, **changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            MODELS[kind].from_backbone(tiny_native(kind), **changes)


def test_bad_setting_while_loading_a_model(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    for load in (ViTHighway.from_pretrained, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=r"exit_positions: \[0\]"):
            load(tmp_path, exit_positions=[0])
        with pytest.raises(ValueError, match="did you mean 'exit_policy'"):
            load(tmp_path, exit_polcy="never")


def test_setting_made_bad_after_construction():
    config = tiny_config("vit")
    config.exit_positions = [0]
    with pytest.raises(ValueError, match=r"exit_positions: \[0\]"):
        ViTHighway(config)


# -- files -----------------------------------------------------------------------------------------------------

FULL = {
    "exit_positions": [1, 3, 5],
    "exit_types": ["linear", "conv1_1", "attention_r2"],
    "exit_policy": {"name": "confidence", "threshold": [0.8, 0.7, 0.6], "temperature": 1.5},
    "exit_loss_weights": [0.3, 0.3, 0.4, 1.0],
}


@every_kind
def test_round_trip(kind, tmp_path):
    config = tiny_config(kind, **FULL)
    config.save_pretrained(tmp_path)
    again = [
        CONFIGS[kind].from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        CONFIGS[kind].from_dict(config.to_dict()),
        CONFIGS[kind](**json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ]
    for other in again:
        assert type(other) is type(config)
        assert {name: getattr(other, name) for name in FULL} == FULL
        assert {**other.to_dict(), "_name_or_path": ""} == config.to_dict()


@every_kind
def test_file_holds_plain_json(kind, tmp_path):
    positions, heads = np.array([1, 3, 5]), ("linear", "conv1_1", "attention_r2")
    config = tiny_config(kind, **{**FULL, "exit_positions": tuple(positions), "exit_types": heads})
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert {name: on_disk[name] for name in FULL} == FULL
    assert all(type(position) is int for position in config.exit_positions)
    assert tiny_config(kind, exit_positions=range(2, 5)).exit_positions == [2, 3, 4]


def test_settings_are_copied():
    positions, heads = [2, 4], ["linear", "mlp"]
    config = tiny_config("vit", exit_positions=positions, exit_types=heads)
    positions.append(5), heads.append("vit")
    assert config.exit_positions == [2, 4] and config.exit_types == ["linear", "mlp"]


def test_other_positions_take_other_heads(tmp_path):
    tiny_config("vit", exit_positions=[2, 3, 4, 5]).save_pretrained(tmp_path)
    assert ViTHighwayConfig.from_pretrained(tmp_path, exit_positions=[2, 5]).exit_types == LAYOUTS[2].split()
    kept = ViTHighwayConfig.from_pretrained(tmp_path, exit_types="linear")
    assert kept.exit_positions == [2, 3, 4, 5] and kept.exit_types == ["linear"] * 4


def test_distilled_follows_the_architecture():
    config = CONFIGS["deit"]
    assert config().distilled
    assert config(architectures=["DeiTForImageClassificationWithTeacher"]).distilled
    assert not config(architectures=["DeiTForImageClassification"]).distilled
    assert config(architectures=["DeiTForImageClassification"], distilled=True).distilled


def test_folder_without_config_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for load in (
        ViTHighwayConfig.from_pretrained,
        ViTHighway.from_pretrained,
        ViTHighway.from_backbone,
        AutoModelForImageClassification.from_pretrained,
    ):
        with pytest.raises((OSError, ValueError), match=re.escape(str(tmp_path))):
            load(tmp_path)


# -- files that want to run code -------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path):
    """A file that only executed code would create."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file was executed"


def codes(canary):
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    return [touch, f"[{touch}]", f"[4, 5][{touch} or 0]", f"({touch}, [4, 5])[1]", f"f'{{{touch}}}'"]


def test_code_in_settings_is_not_run(canary, tmp_path):
    good = tiny_config("vit", **GOOD).to_dict()
    for code in codes(canary):
        for changes in (
            {"exit_positions": code},
            {"exit_positions": [code]},
            {"exit_types": code},
            {"exit_types": [code, "linear"]},
            {"exit_policy": code},
            {"exit_policy": {"name": code}},
            {"exit_policy": {"name": "confidence", "threshold": code}},
            {"exit_loss_weights": code},
            {"pool": code},
        ):
            with pytest.raises(ValueError):
                tiny_config("vit", **{**GOOD, **changes})
            (tmp_path / "config.json").write_text(json.dumps({**good, **changes}))
            with pytest.raises(ValueError):
                AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("swin", [False, True], ids=["vit", "swin"])
def test_code_in_the_positions_of_an_original_checkpoint_is_not_run(swin, canary, tmp_path):
    source = tmp_path / "original"
    source.mkdir()
    torch.save({"classifier.bias": torch.zeros(2)}, source / "pytorch_model.bin")
    for code in codes(canary):
        config = {
            "position_exits": code,
            "highway_type": "LGViT",
            **({"depths": [2, 2]} if swin else {"backbone": "ViT"}),
        }
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="position_exits"):
            convert_lgvit(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


@every_kind
def test_pickle_only_checkpoint_is_refused(kind, canary, tmp_path):
    for name, model in (("highway", tiny_model(kind)), ("plain", tiny_native(kind))):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        with open(tmp_path / name / "pytorch_model.bin", "wb") as file:
            pickle.dump(Malicious(canary), file)
    loads = [
        lambda: MODELS[kind].from_pretrained(tmp_path / "highway"),
        lambda: MODELS[kind].from_pretrained(str(tmp_path / "plain")),
        lambda: AutoModelForImageClassification.from_pretrained(tmp_path / "highway"),
        lambda: MODELS[kind].from_backbone(tmp_path / "plain"),
    ]
    for load in loads:
        with pytest.raises((OSError, ValueError), match=r"(?s)pytorch_model\.bin.*pickle.*safetensors"):
            load()
    with pytest.raises(ValueError, match="use_safetensors=False.*pickle"):
        MODELS[kind].from_pretrained(tmp_path / "highway", use_safetensors=False)


ATTENTION_KEYS = ("_attn_implementation_internal", "_attn_implementation", "attn_implementation")


@pytest.mark.parametrize(
    ("kind", "key"), [*(("vit", key) for key in ATTENTION_KEYS), *((kind, ATTENTION_KEYS[0]) for kind in KINDS[1:])]
)
def test_a_file_does_not_choose_the_attention_code(kind, key, tmp_path):
    """CVE-2026-4372: transformers before 5.3 fetches what such a key names, and runs it."""
    model, native = tiny_model(kind), tiny_native(kind)
    default = native.config._attn_implementation
    for name, saved in (("highway", model), ("plain", native)):
        saved.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: "somebody/attention"}))

    for load in (MODELS[kind].from_pretrained, AutoModelForImageClassification.from_pretrained):
        again = load(tmp_path / "highway").eval()
        assert again.config._attn_implementation == default
        torch.testing.assert_close(again(tiny_images(2)).logits, model(tiny_images(2)).logits)
    grown = MODELS[kind].from_backbone(tmp_path / "plain")
    assert grown.config._attn_implementation == default
    grown.set_exit_policy("never")
    torch.testing.assert_close(grown(tiny_images(2)).logits, native(tiny_images(2)).logits)


# -- anything at all -------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["lgvit", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("name"), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        "exit_positions",
        "exit_types",
        "exit_policy",
        "exit_loss_weights",
        "pool",
        "truncated",
        "distilled",
        "exit_x",
    ]
)


@settings(max_examples=examples(100))
@given(kind=st.sampled_from(KINDS), changes=st.dictionaries(fields, json_values, min_size=1, max_size=4))
def test_any_setting_gives_a_config_or_an_error_of_ours(kind, changes):
    try:
        config = tiny_config(kind, **changes)
    except (ValueError, TypeError):
        return
    # what was accepted makes a model, and travels
    assert len(MODELS[kind](config).segments()) == len(config.exit_positions) + (not config.truncated)
    again = CONFIGS[kind].from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.exit_positions == config.exit_positions and again.exit_types == config.exit_types


def test_configs_share_nothing():
    first, second = tiny_config("vit", exit_policy=None), tiny_config("vit", exit_policy=None)
    first.exit_policy["threshold"] = 0.1
    assert (
        second.exit_policy
        == tiny_config("swin", exit_policy=None).exit_policy
        == {
            "name": "confidence",
            "threshold": 0.8,
        }
    )


MULTI_LABEL = {"problem_type": "multi_label_classification"}
REGRESSION = {"problem_type": "regression"}


@every_kind
@pytest.mark.parametrize(
    ("answers", "policy"),
    [
        ({"num_labels": 3}, {"name": "confidence", "threshold": 0.8}),
        ({"num_labels": 1}, {"name": "never"}),
        ({"num_labels": 2, **REGRESSION}, {"name": "never"}),
        ({"num_labels": 3, **MULTI_LABEL}, {"name": "label_confidence", "threshold": 0.9}),
        ({"num_labels": 1, **MULTI_LABEL}, {"name": "label_confidence", "threshold": 0.9}),
    ],
)
def test_the_default_policy_suits_the_answers(kind, answers, policy):
    assert tiny_config(kind, exit_policy=None, **answers).exit_policy == policy


@pytest.mark.parametrize(
    ("policy", "answers", "choices"),
    [
        ("confidence", {"num_labels": 1}, "fixed, never"),
        ("entropy", {"num_labels": 2, **REGRESSION}, "fixed, never"),
        ("margin", {"num_labels": 1, **REGRESSION}, "fixed, never"),
        ("confidence", {"num_labels": 4, **MULTI_LABEL}, "fixed, label_confidence, never"),
        ("patience", {"num_labels": 4, **MULTI_LABEL}, "fixed, label_confidence, never"),
        ("label_confidence", {"num_labels": 4}, "calibrated_confidence, confidence, .*patience_confidence"),
        ("label_confidence", {"num_labels": 2, **REGRESSION}, "fixed, never"),
    ],
)
def test_a_policy_that_judges_other_answers_is_refused(policy, answers, choices, tmp_path):
    policy = {"name": policy, **({"patience": 2} if policy == "patience" else {"threshold": 0.95})}
    message = f"exit_policy: '{policy['name']}' is for .*num_labels={answers['num_labels']}.*choices: {choices}$"
    with pytest.raises(ValueError, match=message):
        tiny_config("vit", exit_policy=policy, **answers)
    model = tiny_model("vit", exit_policy="never", **answers)
    with pytest.raises(ValueError, match=message):
        model.set_exit_policy(policy)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path, exit_policy=policy)
    model.set_exit_policy("fixed", exit_index=0)
    assert set(model(tiny_images(2)).exit_index.tolist()) == {0}


def test_the_default_policy_follows_a_problem_that_is_set_later():
    """As transformers' own tests set it: on a config that is there already."""
    for answers, name in (
        ({"num_labels": 2, **REGRESSION}, "never"),
        ({"num_labels": 3, **MULTI_LABEL}, "label_confidence"),
    ):
        config = tiny_config("vit", exit_policy=None)
        for field, value in answers.items():
            setattr(config, field, value)
        model = MODELS["vit"](config).eval()
        assert model.exit_policy.name == model.config.exit_policy["name"] == name
        assert model(tiny_images(2)).logits.shape == (2, answers["num_labels"])


def test_another_problem_type_later_is_noticed():
    model = tiny_model("vit", exit_policy={"name": "confidence", "threshold": 0.9})
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="'confidence' is for single_label_classification"):
        model(tiny_images(2))


def test_an_index_stays_in_its_folder(tmp_path):
    model = tiny_model("vit")
    model.save_pretrained(tmp_path / "inside")
    (tmp_path / "inside" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = dict.fromkeys(model.state_dict(), "../outside.safetensors")
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names, "metadata": {}})
    )
    with pytest.raises(
        ValueError, match="outside.safetensors' must be the name of a .safetensors file in this folder"
    ):
        ViTHighway.from_pretrained(tmp_path / "inside")
