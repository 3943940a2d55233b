"""DINOv2 as a plain ViT: the same hidden states, with layer scale folded and positions for the wanted size."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTForImageClassification

from lgvit_hf import AViT, ViTHighway
from lgvit_hf.cli import main
from lgvit_hf.hub.convert import convert_dinov2
from tests.tiny import tiny_images, tiny_native


@pytest.mark.parametrize("bare", [True, False])
@torch.no_grad()
def test_hidden_states_are_the_same(bare, tmp_path, capsys):
    native = tiny_native("dinov2", bare=bare)
    native.save_pretrained(tmp_path / "dinov2")
    for size in (None, (24, 32), (16, 16)):
        out = tmp_path / str(size)
        words = [] if size is None else ["--image-size", *map(str, size)]
        assert main(["convert", "--from", "dinov2", str(tmp_path / "dinov2"), str(out), *words]) == 0
        assert "the classifier is new" in capsys.readouterr().out
        plain, info = ViTForImageClassification.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        images = tiny_images(3, size or 16)
        ours = plain.eval().vit(images).last_hidden_state
        torch.testing.assert_close(ours, native.base_model(images).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert type(ViTHighway.from_backbone(out, exit_positions=[2])) is ViTHighway
    assert AViT.from_backbone(out).config.num_hidden_layers == 6
    assert plain.config.layer_norm_eps == native.config.layer_norm_eps
    assert AutoModelForImageClassification.from_pretrained(out).config.num_labels == native.config.num_labels


def test_what_a_vit_cannot_hold(tmp_path):
    for kind, changes, message in (
        ("dinov2_with_registers", {}, "register tokens.*Dinov2WithRegistersHighway"),
        ("dinov2", {"use_swiglu_ffn": True}, "SwiGLU.*Dinov2Highway"),
        ("vit", {}, "model_type 'vit' must be 'dinov2'"),
    ):
        tiny_native(kind, bare=True, **changes).save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=message):
            convert_dinov2(tmp_path / kind, tmp_path / "out")
    tiny_native("dinov2", bare=True).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="image_size: 18 x 16 pixels are not whole patches of 4 x 4"):
        convert_dinov2(tmp_path / "dinov2", tmp_path / "out", image_size=(18, 16))
    config = tmp_path / "dinov2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 7}))
    with pytest.raises(ValueError, match="tensors are missing"):
        convert_dinov2(tmp_path / "dinov2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
