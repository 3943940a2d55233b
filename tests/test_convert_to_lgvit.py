"""The way back: what is written is what LGViT's own code saves, tensor by tensor, and gives the same logits again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

from lgvit_hf import HighwayWrapper, ViTHighwayConfig
from lgvit_hf.cli import main
from lgvit_hf.hub.convert import convert_lgvit, export_lgvit, lgvit_config, lgvit_settings
from tests.conftest import SHARED
from tests.tiny import tiny_config, tiny_images, tiny_model

KINDS = ("vit", "deit", "swin")
# every head of ViT, every reader of the others; the rest is the same tables once more
QUICK = (
    "vit_LGViT_8 vit_linear_11 vit_vit_1 vit_conv_normal_3 vit_self_attention_2 deit_LGViT_2 deit_linear_11 deit_vit_1"
)
CASES = [
    pytest.param(
        case,
        id=case["file"].removesuffix(".safetensors"),
        marks=[] if kind == "swin" or case["file"].removesuffix(".safetensors") in QUICK.split() else pytest.mark.slow,
    )
    for kind in KINDS
    if (SHARED / "reference").is_dir()
    for case in json.loads((SHARED / "reference" / f"{kind}.json").read_text())
] or [pytest.param(None, marks=pytest.mark.skip(f"the reference numbers of LGViT are not at {SHARED / 'reference'}"))]


@pytest.mark.parametrize("case", CASES)
def test_the_reference_comes_back(case, tmp_path):
    """Names, shapes and values of LGViT's own state dict; only its pooler, which nothing reads, is made anew."""
    tensors = load_file(SHARED / "reference" / case["file"])
    original = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    (tmp_path / "original").mkdir()
    save_file(original, tmp_path / "original" / "model.safetensors")
    (tmp_path / "original" / "config.json").write_text(json.dumps(case["config"]))
    ours = convert_lgvit(tmp_path / "original", tmp_path / "ours")
    settings = export_lgvit(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in original.items()}
    kept = [name for name in back if not name.startswith("deit.pooler.")]
    assert len(kept) > 50 and all(torch.equal(back[name], original[name]) for name in kept)
    assert settings == json.loads((tmp_path / "back" / "config.json").read_text())
    same = ("position_exits", "highway_type", "exit_strategy", "num_early_exits", "backbone", "layer_norm_eps")
    for name in same:
        theirs = case["config"].get(name)
        assert theirs is None or str(settings[name]).replace(" ", "") == str(theirs).replace(" ", ""), name
    again = lgvit_config(settings).to_dict()
    assert {name: value for name, value in ours.to_dict().items() if name not in WRITTEN} == {
        name: value for name, value in again.items() if name not in WRITTEN
    }


# what a saved config says of its writing
WRITTEN = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map")
POSITIONS = {"vit": [2, 3, 4, 5], "deit": [1, 2, 4, 5], "swin": [2, 3, 5]}
TYPES = {"vit": "lgvit", "deit": "vit", "swin": "conv2_1"}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_there_and_back_on_the_command_line(kind, tmp_path, capsys):
    policy = {"name": "patience_confidence", "threshold": 0.4, "patience": 2}
    changes = {"exit_policy": policy, "exit_positions": POSITIONS[kind], "exit_types": TYPES[kind]}
    model = tiny_model(kind, **changes)
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    assert main(["convert", "--to", "lgvit", str(tmp_path / "ours"), str(tmp_path / "original")]) == 0
    said = capsys.readouterr().out
    assert "all tensors matched" in said and ("LGViT heads" in said) == (kind == "vit")
    assert main(["convert", "--from", "lgvit", str(tmp_path / "original"), str(tmp_path / "again")]) == 0
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    images = tiny_images(4)
    before, after = model(images, early_exit=False).exit_logits, again(images, early_exit=False).exit_logits
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert again.config.exit_policy == {**policy, "threshold": [0.4] * len(POSITIONS[kind])}
    assert (tmp_path / "again" / "preprocessor_config.json").is_file()


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("policy", "written"),
    [
        ({"name": "confidence", "threshold": [0.5, 0.6]}, ("confidence", [0.5, 0.6])),
        ({"name": "entropy", "threshold": 0.6}, ("entropy", 0.6)),
        ({"name": "patience", "patience": 2}, ("patience", [2])),
        ({"name": "confidence", "threshold": 0.5, "temperature": [1.0, 1.0]}, ("confidence", 0.5)),
    ],
)
def test_policies_by_lgvits_names(policy, written):
    settings = lgvit_settings(ViTHighwayConfig(exit_positions=[4, 8], exit_policy=policy))
    assert (settings["exit_strategy"], settings["threshold"]) == written


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("vit", {"exit_types": "mlp"}, "exit_types: 'mlp' after block 2 is no head of LGViT's vit"),
        ("swin", {"exit_types": "conv_normal"}, "exit_types: 'conv_normal'.*no head of LGViT's swin"),
        ("vit", {"exit_types": "attention_r12"}, "attention_r12.*a ratio below 10"),
        ("vit", {"hidden_size": 36, "exit_types": "attention_r2"}, "8 heads, which the width of 36"),
        ("vit", {"exit_types": ["conv1_1"] * 3 + ["linear"]}, "neither one head for all exits nor LGViT's layout"),
        ("vit", {"exit_positions": [2, 3, 4]}, "neither one head for all exits nor LGViT's layout"),
        ("swin", {}, "neither one head for all exits nor LGViT's layout, which it has for 8 exits of Swin-B"),
        ("vit", {"pool": "mean"}, "pool: 'mean'"),
        ("vit", {"exit_positions": []}, "exit_positions: LGViT has exits"),
        ("deit_plain", {}, "distilled: LGViT's DeiT always"),
        ("vit", {"exit_loss_weights": [1, 1, 1, 1, 2]}, "exit_loss_weights: .* 'depth' or 'uniform'"),
        ("vit", {"attn_implementation": "performer"}, "attn_implementation: 'performer'"),
        ("vit", {"exit_policy": {"name": "margin", "threshold": 0.5}}, "exit_policy: margin.*set_exit_policy"),
        ("vit", {"exit_policy": {"name": "confidence", "threshold": 0.5, "temperature": 2.0}}, "temperature"),
        ("vit", {"exit_policy": {"name": "patience", "patience": 1, "exits": [0, 2]}}, "exit_policy: exits"),
    ],
)
def test_what_lgvit_does_not_have(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        lgvit_settings(tiny_config(kind, **changes))


def test_a_model_that_is_no_highway(tmp_path, capsys):
    assert main(["convert", "--to", "lgvit", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no config.json there, not a saved model" in capsys.readouterr().err
    wrapped = HighwayWrapper(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), ["0"], example=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="model type 'wrapped_highway' is not in LGViT"):
        lgvit_settings(wrapped.config)
    model = tiny_model("vit").truncate(1)
    model.save_pretrained(tmp_path / "truncated")
    assert main(["convert", "--to", "lgvit", str(tmp_path / "truncated"), str(tmp_path / "out")]) == 2
    assert "LGViT has exits and a final classifier" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
