"""Plain ViT, DeiT and Swin of timm and torchvision: their own logits (`tests/assets/convert`), or a reason why not."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lgvit_hf import DeiTHighway, SwinHighway, ViTHighway
from lgvit_hf.cli import main
from lgvit_hf.hub.convert import convert_timm, convert_torchvision
from lgvit_hf.hub.timm_names import swin_sizes, vit_sizes
from tests.seeds import generator

ASSETS = Path(__file__).parent / "assets" / "convert"
HEADS = {"num_attention_heads": 2}
# file, what the weights do not say, and what it is
CASES = {
    "timm_vit": (HEADS, "vit", ViTHighway),
    "timm_vit_no_qkv_bias": ({**HEADS, "image_size": (16, 24)}, "vit", ViTHighway),
    "timm_deit_distilled": (HEADS, "deit", DeiTHighway),
    "timm_swin": ({}, "swin", SwinHighway),
    "torchvision_vit": (HEADS, "vit", ViTHighway),
    "torchvision_swin": ({}, "swin", SwinHighway),
}


class Golden:
    """A tiny model of the other library: its state dict, images and its own logits of them."""

    def __init__(self, name):
        tensors = load_file(ASSETS / f"{name}.safetensors")
        self.state = {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}
        self.images, self.logits = tensors["input"], tensors["logits"]
        self.given, self.kind, self.highway = CASES[name]
        self.convert = convert_timm if name.startswith("timm") else convert_torchvision

    def write(self, folder, state=None):
        folder.mkdir(exist_ok=True)
        save_file(self.state if state is None else state, folder / "model.safetensors")
        return folder

    def check(self, folder):
        model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            logits = model.eval()(self.images).logits
        assert (logits - self.logits).abs().max() <= 1e-5 * self.logits.abs().max()
        return model


@pytest.fixture(params=CASES)
def golden(request):
    return Golden(request.param)


@torch.no_grad()
def test_their_own_logits_and_those_of_a_highway(golden, tmp_path):
    config = golden.convert(golden.write(tmp_path / "theirs"), tmp_path / "ours", **golden.given)
    model = golden.check(tmp_path / "ours")
    assert model.config.model_type == config.model_type == golden.kind
    highway = golden.highway.from_backbone(tmp_path / "ours", exit_positions=[1], exit_types="conv1_1")
    never = highway(golden.images, early_exit=False).exit_logits[-1]
    assert (never - golden.logits).abs().max() <= 1e-5 * golden.logits.abs().max()


def test_with_exits_on_the_command_line(tmp_path, capsys):
    golden = Golden("timm_deit_distilled")
    source = golden.write(tmp_path / "theirs") / "model.safetensors"
    command = ["convert", "--from", "timm", str(source), str(tmp_path / "ours"), "--num-attention-heads", "2"]
    assert main([*command, "--exit-positions", "1", "--exit-types", "conv2_1"]) == 0
    said = capsys.readouterr().out
    assert "all tensors matched: deit_highway, exits after 1 conv2_1" in said and "no image processor" in said
    assert "the exits are new" in said
    model = DeiTHighway.from_pretrained(tmp_path / "ours").eval()
    assert model.config.distilled and len(model.exits) == 1
    with torch.no_grad():
        final = model(golden.images, early_exit=False).exit_logits[-1]
    assert (final - golden.logits).abs().max() <= 1e-5 * golden.logits.abs().max()
    command[4] = str(tmp_path / "plain")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "plain deit, 2 blocks, 2 heads, 16 x 16 pixels, 5 labels" in said and "lgvit grow" in said


def test_names_of_older_versions(tmp_path):
    """Swin's original and old timm: merging at the end of a stage, `head`, buffers; torchvision's old MLP."""
    golden = Golden("timm_swin")
    old = {
        re.sub(r"^layers\.1\.downsample", "layers.0.downsample", name).replace("head.fc.", "head."): tensor
        for name, tensor in golden.state.items()
    }
    assert "layers.0.downsample.reduction.weight" in old and "head.weight" in old
    index = "layers.0.blocks.1.attn.relative_position_index"
    old |= {index: torch.zeros(16, 16, dtype=torch.int64), "layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}
    torch.save({"model": old}, tmp_path / "swin.pth")
    convert_timm(tmp_path / "swin.pth", tmp_path / "swin")
    golden.check(tmp_path / "swin")

    golden = Golden("torchvision_vit")
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in golden.state.items()}
    assert old.keys() != golden.state.keys()
    convert_torchvision(golden.write(tmp_path / "old", old), tmp_path / "vit", **HEADS)
    golden.check(tmp_path / "vit")


def test_what_timms_config_says(tmp_path):
    golden = Golden("timm_vit_no_qkv_bias")
    about = {
        "architecture": "vit_tiny",
        "global_pool": "token",
        "label_names": ["a", "b", "c", "d", "e"],
        "pretrained_cfg": {
            "input_size": [3, 16, 24],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bicubic",
        },
    }
    folder = golden.write(tmp_path / "theirs")
    (folder / "config.json").write_text(json.dumps(about))
    config = convert_timm(folder, tmp_path / "ours", **HEADS)
    golden.check(tmp_path / "ours")
    assert config.id2label == dict(enumerate("abcde")) and list(config.image_size) == [16, 24]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert dict(processor.size) == {"height": 16, "width": 24} and processor.resample == 3
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    for changes, message in (
        ({"global_pool": "avg"}, "global_pool='avg' is not what transformers' vit computes, 'token' is"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "another GELU"),
    ):
        (folder / "config.json").write_text(json.dumps({**about, **changes}))
        with pytest.raises(ValueError, match=message):
            convert_timm(folder, tmp_path / "no", **HEADS)


def test_torchvisions_pixels_and_a_processor_beside_the_weights(tmp_path):
    golden = Golden("torchvision_swin")
    folder = golden.write(tmp_path / "theirs")
    convert_torchvision(folder, tmp_path / "ours")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and dict(processor.size) == {"height": 16, "width": 16}
    own = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    convert_torchvision(folder, tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "preprocessor_config.json").read_text()) == own


def test_half_precision_is_kept(tmp_path):
    golden = Golden("timm_vit")
    convert_timm(golden.write(tmp_path / "a", {n: t.half() for n, t in golden.state.items()}), tmp_path / "b", **HEADS)
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float16}


@torch.no_grad()
def test_layer_scale_and_positions_of_patches_alone(tmp_path):
    """As of DeiT III: the same model, written with factors after each branch and no position for the class token."""
    golden, numbers = Golden("timm_vit"), generator(0)
    state = {name: tensor.clone() for name, tensor in golden.state.items()}
    for block in range(len({name.split(".")[1] for name in state if name.startswith("blocks.")})):
        for name, layer in ((f"blocks.{block}.ls1.gamma", "attn.proj"), (f"blocks.{block}.gamma_2", "mlp.fc2")):
            state[name] = 0.1 + torch.rand(len(state["norm.bias"]), generator=numbers)
            state[f"blocks.{block}.{layer}.weight"] /= state[name][:, None]
            state[f"blocks.{block}.{layer}.bias"] /= state[name]
    state["cls_token"] += state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
    golden.convert(golden.write(tmp_path / "theirs", state), tmp_path / "ours", **golden.given)
    golden.check(tmp_path / "ours")


# -- what is refused ---------------------------------------------------------------------------------------


def changed(name, tensor=None, base="timm_vit"):
    state = {**Golden(base).state, name: tensor}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("reg_token", "register tokens"),
        ("fc_norm.weight", "averages the patches"),
        ("norm_pre.weight", "a norm before the first block"),
        ("attn_pool.q.weight", "attention pooling"),
        ("pre_logits.fc.weight", "a layer before the classifier"),
        ("layers.0.blocks.0.gamma_1", "layer scale"),
        ("blocks.1.attn.q_norm.weight", "norms inside attention"),
        ("blocks.1.mlp.w12.weight", "another MLP"),
        ("blocks.1.attn.q_bias", "BEiT's attention"),
        ("layers.0.blocks.0.attn.logit_scale", "Swin V2's attention"),
        ("patch_embed.backbone.stem.conv.weight", "hybrid"),
    ],
)
def test_what_transformers_does_not_compute(name, what, tmp_path, capsys):
    save_file(changed(name, torch.zeros(16)), tmp_path / "model.safetensors")
    command = ["convert", "--from", "timm", str(tmp_path), str(tmp_path / "out"), "--num-attention-heads", "2"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"model.safetensors: {name}: " in said and what in said
    assert not (tmp_path / "out").exists()


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed("blocks.0.norm1.bias"), r"1 tensors are missing \(vit\..*0.layernorm_before.bias\)"),
        (changed("blocks.7.norm1.bias", torch.zeros(16)), r"blocks.7.norm1.bias\); \d+ tensors are missing"),
        (changed("head.weight", torch.zeros(5, 9)), r"another shape \(head.weight: \[5, 9\], not \[5, 16\]"),
        (changed("colour", torch.zeros(1)), r"1 tensors have no place in the model \(colour\)"),
        (changed("cls_token"), "transformers has no ViT without class token"),
        (changed("head.weight"), "no tensor 'head.weight' there: not a ViT, DeiT or Swin with a classifier"),
        (changed("blocks.0.ls1.gamma", torch.ones(15)), "blocks.0.attn.proj.weight, which it scales, is not there"),
        (changed("pos_embed", torch.zeros(1, 18, 16)), "17 patches are no square; give --image-size"),
        (changed("patch_embed.proj.weight", torch.zeros(16, 3, 4, 2)), "patches of 4 x 2 pixels are not square"),
        (changed("blocks.0.attn.qkv.weight", torch.zeros(47, 16)), r"\[47, 16\] is not as many rows for each"),
        (
            {"conv1.weight": torch.zeros(8, 3, 7, 7), "bn1.weight": torch.zeros(8)},
            "found are .*bn1.weight, conv1.weight",
        ),
        ({"vit.embeddings.cls_token": torch.zeros(1, 1, 8)}, "transformers' names"),
        (Golden("torchvision_vit").state, "--from torchvision takes"),
        (Golden("torchvision_swin").state, "--from torchvision takes"),
    ],
)
def test_all_of_it_or_nothing(state, message, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        convert_timm(tmp_path, tmp_path / "out", **HEADS)
    assert "model.safetensors: " in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (Golden("timm_vit").state, "neither a ViT .* nor a Swin .* with torchvision's names"),
        (changed("conv_proj.conv_last.weight", torch.zeros(1), "torchvision_vit"), "several convolutions"),
        (changed("features.1.0.attn.logit_scale", torch.zeros(1), "torchvision_swin"), "Swin V2's attention"),
        (changed("heads.pre_logits.weight", torch.zeros(1), "torchvision_vit"), "a layer before the classifier"),
        (changed("features.9.0.norm1.bias", torch.zeros(1), "torchvision_swin"), "1 tensors have no place"),
        (changed("features.2.norm.bias", None, "torchvision_swin"), "1 tensors are missing"),
    ],
)
def test_torchvision_all_of_it_or_nothing(state, message, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_torchvision(tmp_path, tmp_path / "out", **({} if "features.0.0.weight" in state else HEADS))
    assert not (tmp_path / "out").exists()


@pytest.mark.version_independent
def test_options_that_do_not_fit(tmp_path, capsys):
    source = Golden("timm_vit").write(tmp_path / "theirs")
    out = str(tmp_path / "out")
    for arguments, message in (
        (
            ["--from", "lgvit", "--image-size", "16", "16"],
            "--image-size goes with --from dinov2 or timm or",
        ),
        (["--to", "lgvit", "--exit-positions", "1"], "--exit-positions goes with --from timm or torchvision"),
        (["--from", "timm", "--to", "lgvit"], "give either --from"),
        (["--from", "timm", "--exit-types", "linear"], "--exit-types goes with --exit-positions"),
        (["--from", "timm"], "a width of 16 is not so many times 64"),
        (["--from", "timm", "--num-attention-heads", "3"], "3 do not divide the width of 16"),
        (
            ["--from", "timm", "--num-attention-heads", "2", "--image-size", "16", "32"],
            "16 x 32 pixels are not the 16",
        ),
        (["--from", "timm", "--num-attention-heads", "2", "--exit-positions", "9"], "exit_positions.*9 is outside"),
    ):
        assert main(["convert", str(source), out, *arguments]) == 2
        assert re.search(message, capsys.readouterr().err), arguments
    swin = Golden("timm_swin").write(tmp_path / "swin")
    for arguments, message in (
        (["--num-attention-heads", "2"], "the weights of a Swin say .1, 2."),
        (["--image-size", "24", "24"], "must be a multiple of 16"),
        (["--image-size", "0", "0"], "must be a whole number of at least 1"),
        (["--image-size", "32", "64"], "32 x 64 pixels"),
    ):
        assert main(["convert", "--from", "timm", str(swin), out, *arguments]) == 2
        assert re.search(message, capsys.readouterr().err), arguments
    assert not (tmp_path / "out").exists()


@pytest.mark.version_independent
@pytest.mark.parametrize("name", CASES)
def test_any_damage_is_a_value_error(name, tmp_path):
    """Each kind of tensor of the first block, or outside the blocks, gone, a number, a row or empty."""
    golden = Golden(name)
    names = [key for key in golden.state if not re.search(r"(blocks\.|layer_|features\.\d\.)[1-9]|index", key)]
    assert len(names) > 15
    for number, key in enumerate(names):
        for shape in ((None, (3,)), ((), (0, 2)))[number % 2]:
            state = {**golden.state, key: None if shape is None else torch.zeros(shape)}
            folder = golden.write(tmp_path / "theirs", {k: t for k, t in state.items() if t is not None})
            with pytest.raises(ValueError, match="model.safetensors: "):
                golden.convert(folder, tmp_path / "out", **golden.given)
    assert not (tmp_path / "out").exists()


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.version_independent
def test_heads_of_published_widths():
    for width, heads in ((192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)):
        with torch.device("meta"):
            state = {
                "patch_embed.proj.weight": torch.zeros(width, 3, 14, 14),
                "cls_token": torch.zeros(1, 1, width),
                "pos_embed": torch.zeros(1, 257, width),
                "blocks.0.mlp.fc1.weight": torch.zeros(4 * width, width),
                "head.weight": torch.zeros(1000, width),
            }
        sizes = vit_sizes(state)
        assert (sizes["num_attention_heads"], sizes["image_size"], sizes["patch_size"]) == (heads, 224, 14)


@pytest.mark.version_independent
@pytest.mark.parametrize(("window", "image_size"), [(7, 224), (12, 384)])
def test_sizes_of_published_swins(window, image_size):
    depths, heads = [2, 2, 18, 2], [4, 8, 16, 32]
    with torch.device("meta"):
        state = {
            "patch_embed.proj.weight": torch.zeros(128, 3, 4, 4),
            "layers.0.blocks.0.mlp.fc1.weight": torch.zeros(512, 128),
            "head.fc.weight": torch.zeros(1000, 1024),
            **{
                f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table": torch.zeros(
                    (2 * window - 1) ** 2, heads[stage]
                )
                for stage, depth in enumerate(depths)
                for block in range(depth)
            },
        }
    sizes = swin_sizes(state)
    assert (sizes["depths"], sizes["num_heads"], sizes["window_size"]) == (depths, heads, window)
    assert (sizes["image_size"], sizes["mlp_ratio"], sizes["embed_dim"]) == (image_size, 4.0, 128)
    state["layers.3.blocks.0.attn.relative_position_bias_table"] = torch.zeros((2 * 2 - 1) ** 2, 32)
    with pytest.raises(ValueError, match=f"windows of 2, {window} patches"):
        swin_sizes(state)
