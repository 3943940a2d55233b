"""Backbones without a classifier become classifiers and get exits; models of images and texts; wrong checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessor,
)

from lgvit_hf import (
    AutoHighway,
    AViT,
    CLIPHighway,
    Dinov2Highway,
    Dinov2WithRegistersHighway,
    SiglipHighway,
    ViTHighway,
    ViTMSNHighway,
)
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.hub.card import card
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.open_part import open_any
from lgvit_hf.serving.predictor import Predictor
from tests.clear import clear_model
from tests.seeds import seeded
from tests.tiny import (
    IMAGE_SIZE,
    MODELS,
    OTHER_KINDS,
    scrambled,
    tiny_backbone_settings,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_native,
)

TEXTS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 20,
}
WHOLE = {"clip": (CLIPHighway, CLIPModel, CLIPConfig), "siglip": (SiglipHighway, SiglipModel, SiglipConfig)}


def tiny_whole(kind):
    seeded(0)
    _, model, config = WHOLE[kind]
    vision = tiny_backbone_settings(kind)
    vision.pop("num_labels")
    return scrambled(model(config(text_config=TEXTS, vision_config=vision)))


@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_the_image_side_of_a_whole_checkpoint(kind, tmp_path, caplog):
    whole = tiny_whole(kind)
    whole.save_pretrained(tmp_path)
    features = whole.vision_model(tiny_images(3)).last_hidden_state
    expected = features.mean(1) if kind == "siglip" else features[:, 1:].mean(1)
    for source in (whole, tmp_path):
        highway = AutoHighway.from_backbone(source, num_labels=4, exit_positions=[2])
        assert type(highway) is WHOLE[kind][0] and "the classifier, for 4 labels" in caplog.text
        out = highway(tiny_images(3), early_exit=False)
        torch.testing.assert_close(out.logits, highway.classifier(expected))
        assert highway.config.hidden_size == 32 and not hasattr(highway.config, "text_config")
    with pytest.raises(ValueError, match="no tensor 'classifier.weight'; give num_labels"):
        AutoHighway.from_backbone(tmp_path)


def test_clip_with_projection(tmp_path):
    tower = CLIPVisionModelWithProjection(tiny_native("clip", bare=True).config)
    tower.save_pretrained(tmp_path)
    for source in (tower, tmp_path):
        highway = CLIPHighway.from_backbone(source, num_labels=3)
        ours = highway.vision_model.embeddings.patch_embedding.weight
        assert torch.equal(ours, tower.vision_model.embeddings.patch_embedding.weight)


def test_texts_alone_and_a_missing_tower(tmp_path):
    texts = CLIPTextModel(CLIPTextConfig(**TEXTS))
    texts.save_pretrained(tmp_path / "texts")
    for source in (texts, tmp_path / "texts"):
        with pytest.raises(ValueError, match="'clip_text_model'.*CLIPHighway takes 'clip' and 'clip_vision_model'"):
            CLIPHighway.from_backbone(source, num_labels=3)
        with pytest.raises(ValueError, match="'clip_text_model' must be one of .*clip_vision_model"):
            AutoHighway.from_backbone(source, num_labels=3)
    tiny_whole("clip").save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("vision_model.")}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no tensor of CLIPVisionModel.* there"):
        CLIPHighway.from_backbone(tmp_path / "whole", num_labels=3)


def test_another_family_is_told_which_class_fits():
    with pytest.raises(ValueError, match="'dinov2', but ViTHighway takes 'vit'; Dinov2Highway fits"):
        ViTHighway.from_backbone(tiny_native("dinov2"))
    with pytest.raises(ValueError, match="'siglip', but CLIPHighway takes 'clip'.*; SiglipHighway fits"):
        CLIPHighway.from_backbone(tiny_native("siglip"))


def test_another_family_in_a_folder_is_told_too(tmp_path):
    for kind, model in (("dinov2", tiny_native("dinov2")), ("beit", tiny_model("beit"))):
        model.save_pretrained(tmp_path / kind)
        fits = f"is not for ViTMSNHighway; {MODELS[kind].__name__} fits"
        with pytest.raises(ValueError, match=f"{kind}: model type '{model.config.model_type}' {fits}"):
            ViTMSNHighway.from_pretrained(tmp_path / kind)


def test_model_types_that_transformers_does_not_know(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "siglip_text_model_of_tomorrow"}')
    with pytest.raises(ValueError, match="'siglip_text_model_of_tomorrow' must be one of .*siglip_vision_model"):
        AutoHighway.from_backbone(tmp_path, num_labels=2)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": 3}')
    for highway in (AutoHighway, CLIPHighway):
        with pytest.raises(ValueError, match="vision_config: 3 in config.json must be a dict|no .*safetensors"):
            highway.from_backbone(tmp_path, num_labels=2)


def test_registers_that_do_not_match(tmp_path):
    for kind in ("dinov2_with_registers", "dinov3_vit"):
        with pytest.raises(ValueError, match="num_register_tokens: -1 must be a number from 0"):
            tiny_config(kind, num_register_tokens=-1)
    native = tiny_native("dinov2_with_registers")
    with pytest.raises(ValueError, match=r"register_tokens' is \(1, 3, 32\) there, and \(1, 4, 32\)"):
        Dinov2WithRegistersHighway.from_backbone(native, num_register_tokens=4)
    native.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_register_tokens": 5}))
    with pytest.raises(ValueError, match="register_tokens"):
        Dinov2WithRegistersHighway.from_backbone(tmp_path)


def test_sizes_that_upstream_refuses():
    for kind in ("siglip", "clip"):
        with pytest.raises(ValueError, match=r"image_size: \[16, 32\] must be one number.* interpolate_pos_encoding"):
            tiny_model(kind, image_size=[16, 32])
    for kind in ("dinov2", "dinov2_with_registers"):
        with pytest.raises(ValueError, match=r"image_size: \[16, 32\] must be one number.* taken as they are"):
            tiny_model(kind, image_size=[16, 32])
        assert tiny_config(kind, image_size=[16, 16]).image_size == 16
    for kind in ("dinov2", "siglip", "vit"):
        with pytest.raises(ValueError, match="embedding.* with the settings asked for"):
            MODELS[kind].from_backbone(tiny_native(kind), patch_size=8)
    with pytest.raises(ValueError, match="pixel_values: 2 x 16 pixels .* patch"):
        tiny_model("dinov2")(tiny_images(2, (2, 16)))
    with pytest.raises(ValueError, match="takes 16 x 16; .*interpolate_pos_encoding"):
        tiny_model("siglip")(tiny_images(2, 24))


@pytest.mark.parametrize("kind", [*OTHER_KINDS, "vit"])
def test_images_that_hold_no_patch(kind):
    for size in (0, -16):
        with pytest.raises(ValueError, match=f"image_size: {size} must be a positive number"):
            tiny_config(kind, image_size=size)
    with pytest.raises(ValueError, match="image_size: 1 is less than a patch of . pixels"):
        tiny_config(kind, image_size=1)
    with pytest.raises(ValueError, match="patch_size: 0 must be a positive number"):
        tiny_config(kind, patch_size=0)


@torch.no_grad()
def test_a_patch_that_does_not_divide_the_image():
    """As of SigLIP so400m, 384 pixels in patches of 14."""
    native = tiny_native("siglip", image_size=18)
    highway = SiglipHighway.from_backbone(native, exit_positions=[2, 4])
    out = highway(tiny_images(3, 18), early_exit=False)
    assert torch.equal(out.logits, native(tiny_images(3, 18)).logits) and out.exit_features[-1].shape == (3, 16, 32)


@torch.no_grad()
def test_made_for_another_size():
    for kind in ("dinov2", "vit", "siglip"):
        native, images = tiny_native(kind), tiny_images(3, 24)
        highway = AutoHighway.from_backbone(native, image_size=24, exit_positions=[2])
        expected = native(images, **({} if kind == "dinov2" else {"interpolate_pos_encoding": True})).logits
        torch.testing.assert_close(highway(images, early_exit=False).logits, expected)


def test_a_whole_config_chooses_no_attention_code(tmp_path):
    tiny_whole("siglip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["attn_implementation"] = config["attn_implementation"] = "somebody/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    highway = SiglipHighway.from_backbone(tmp_path, num_labels=2)
    assert highway.config._attn_implementation in ("sdpa", "eager")
    with pytest.raises(ValueError, match="vision_config: 3 must be a dict"):
        highway.config_class(vision_config=3)


def test_grow_with_a_new_classifier(tmp_path, capsys):
    tiny_native("dinov2", bare=True, image_size=32).save_pretrained(tmp_path / "backbone")
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor.save_pretrained(tmp_path / "backbone")
    command = ["grow", str(tmp_path / "backbone"), "digits", str(tmp_path / "out"), "--limit", "200"]
    assert main([*command, "--max-accuracy-drop", "1"]) == 2
    assert "--new-classifier" in capsys.readouterr().err
    command += ["--exit-positions", "2", "4", "--exit-types", "linear", "--epochs", "2", "--cost", "macs"]
    assert main([*command, "--max-accuracy-drop", "1", "--new-classifier"]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model) is Dinov2Highway and model.config.num_labels == 10 and len(model.exits) > 0
    assert model.config.image_size == IMAGE_SIZE, "what its image processor gives"
    assert [path.name for path in Path(tmp_path).iterdir() if path.name.startswith(".out")] in ([], [".out.lock"])


@torch.no_grad()
def test_tokens_halt_where_blocks_are_those_of_a_vit():
    msn, vit, images = tiny_native("vit_msn"), tiny_native("vit"), tiny_images(3)
    vit.load_state_dict(msn.state_dict())
    settings = {"gate_scale": 1.0, "gate_center": 1.0, "layer_norm_eps": 1e-6}
    ours, expected = (AViT.from_backbone(native, **settings) for native in (msn, vit))
    torch.testing.assert_close(ours(images).logits, expected(images).logits)
    for kind in ("beit", "dinov3_vit", "dinov2"):
        with pytest.raises(ValueError, match=f"'{kind}', but AViT takes .*lgvit convert"):
            AViT.from_backbone(tiny_native(kind))


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_goes_with_every_backbone(kind, tmp_path):
    """A card, MACs, a linear map in the place of blocks, adapters, and the random features of Performer."""
    sizes = {"num_hidden_layers": 3, "exit_positions": [1], "exit_types": "linear"}
    model = tiny_model(kind, **sizes)
    assert f"{type(model).__name__.removesuffix('Highway')} " in card(model.config, name="me/model").text
    assert model_macs(model).backbone > model_macs(model).of_exit(0) > 0
    shorter = tiny_model(kind, **{**sizes, "linear_blocks": [2, 3]})
    assert shorter(tiny_images(2), early_exit=False).logits.isfinite().all()
    if kind == "beit":
        with pytest.raises(ValueError, match="'performer' is not possible for beit_highway"):
            tiny_config(kind, attn_implementation="performer")
    else:
        performer = tiny_model(kind, attn_implementation="performer", feature_map_dim=8, **sizes)
        assert not torch.equal(performer(tiny_images(2)).logits, model(tiny_images(2)).logits)
    pytest.importorskip("peft")
    adapted = type(model).from_backbone(tiny_native(kind), num_labels=5, exit_positions=[2], lora=2)
    assert any("lora" in name for name, weight in adapted.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_every_backbone_predicts_and_serves(kind, tmp_path):
    model, images = clear_model(kind, 2, num_hidden_layers=2, exit_positions=[1], exit_types="linear")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)
    with torch.no_grad():
        expected = model(images)
    assert expected.exit_index.tolist() == [0, 1] * 2
    answers = Predictor(folder)({"pixel_values": images.numpy()})
    assert answers["exit_index"].tolist() == [0, 1] * 2
    torch.testing.assert_close(torch.from_numpy(answers["logits"]), expected.logits)
    testclient = pytest.importorskip("starlette.testclient", reason='pip install "lgvit-hf[serve]"')
    from lgvit_hf.serving.server import make_app

    pixels = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": list(images.shape),
        "data": images.flatten().tolist(),
    }
    with testclient.TestClient(make_app(RemoteHighway(open_any(folder)), workers=1)) as client:
        reply = client.post("/v2/models/model/infer", json={"inputs": [pixels]}).json()
    (logits,) = (torch.tensor(each["data"]) for each in reply["outputs"] if each["name"] == "logits")
    torch.testing.assert_close(logits.view(4, -1), expected.logits)
