"""Performer attention: the estimate, its cost, and how a highway that has it is made, trained, saved and exported."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification

from lgvit_hf.attention import CHUNK, FeatureMap, orthogonal_gaussian, performer
from lgvit_hf.evaluation.costs import model_macs
from tests.seeds import generator
from tests.test_cross_version import elsewhere, other  # noqa: F401
from tests.test_modeling_common import exit_in_gaps
from tests.tiny import CONFIGS, MODELS, NUM_BLOCKS, tiny_config, tiny_images, tiny_model, tiny_native

PERFORMER = {"attn_implementation": "performer", "feature_map_dim": 32}
EXITS = {"exit_positions": [2, 4], "exit_types": "linear"}
HEAD_DIM = 8  # of the tiny models
independent = pytest.mark.version_independent
every_kind = pytest.mark.parametrize("kind", ["vit", "deit"])


def heads(tokens=50, scale=1.0, head_dim=16, seed=0, dtype=torch.float32):
    """Queries, keys and values `[2, 3, N, d]`; `scale` times a standard normal for queries and keys."""
    query, key, value = torch.randn(3, 2, 3, tokens, head_dim, generator=generator(seed))
    return (scale * query).to(dtype), (scale * key).to(dtype), value.to(dtype)


@torch.no_grad()
def exit_logits(model):
    return torch.stack(model.eval()(tiny_images(4), early_exit=False).exit_logits)


# -- the estimate ----------------------------------------------------------------------------------------------


@independent
def test_is_favor_plus_of_the_paper():
    """Numerator and denominator of Choromanski et al., equation 4 and lemma 1, as they stand there."""
    query, key, value = heads(tokens=2 * CHUNK + 90, dtype=torch.float64)
    w = orthogonal_gaussian(24, 16, seed=3).double()

    def features(x):
        x = x / 16**0.25
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / 24**0.5

    estimate = features(query) @ features(key).mT
    expected = estimate @ value / estimate.sum(-1, keepdim=True)
    torch.testing.assert_close(performer(query, key, value, w), expected, atol=1e-12, rtol=0)


@independent
def test_the_kernel_is_estimated_without_bias():
    """The mean over many draws of `f(q) f(k)` is `exp(q.k)`, with orthogonal directions too."""
    x, y = 0.3 * torch.linspace(-1.5, 1.5, 16)[None].cos(), 0.3 * torch.linspace(-2, 3, 16)[None].sin()
    w = torch.cat([orthogonal_gaussian(48, 16, seed) for seed in range(2000)])

    def features(x):
        return torch.exp(w @ x.T - x.square().sum() / 2)

    products = features(x) * features(y)
    deviation = products.std() / len(products) ** 0.5
    assert abs(products.mean() - torch.exp(x @ y.T)) < 4 * deviation and deviation < 0.02


@independent
def test_directions_are_orthogonal_in_blocks_and_normal():
    w = orthogonal_gaussian(150, 64, seed=0)
    for block in w.split(64):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-3, rtol=0)
    many = torch.cat([orthogonal_gaussian(64, 64, seed) for seed in range(40)])
    # 2,560 lengths of chi distributions, whose squares have mean 64 and variance 128
    assert many.square().sum(1).mean().item() == pytest.approx(64, abs=4 * (128 / 2560) ** 0.5)
    assert many.square().sum(1).var().item() == pytest.approx(128, rel=0.15)
    assert many.mean().abs() < 0.02 and many.var().item() == pytest.approx(1, rel=0.02)


@independent
def test_a_seed_says_it_all():
    expected = orthogonal_gaussian(40, 16, seed=7)
    torch.manual_seed(123)
    with torch.device("meta"):
        again = orthogonal_gaussian(40, 16, seed=7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        in_bfloat16 = orthogonal_gaussian(40, 16, seed=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.equal(expected) and in_bfloat16.equal(expected)
    assert not orthogonal_gaussian(40, 16, seed=8).isclose(expected).any()
    assert torch.random.initial_seed() == 123


@independent
def test_the_error_falls_as_one_over_the_root_of_the_features():
    numbers = [64, 128, 256, 512, 1024]
    query, key, value = heads(tokens=100, scale=0.25, head_dim=64)
    exact = scaled_dot_product_attention(query, key, value)
    squares = [
        sum(
            (performer(query, key, value, orthogonal_gaussian(m, 64, seed)) - exact).square().sum()
            for seed in range(8)
        )
        for m in numbers
    ]
    x = torch.tensor(numbers).log()
    x, y = x - x.mean(), torch.stack(squares).log() / 2
    assert (x @ y / (x @ x)).item() == pytest.approx(-0.5, abs=0.08)


@independent
def test_scaling_is_that_of_softmax_attention():
    query, key, value = heads(scale=0.3)
    w = orthogonal_gaussian(20000, 16, seed=0)
    for scaling in (None, 0.25, 0.5):
        exact = scaled_dot_product_attention(query, key, value, scale=scaling)
        torch.testing.assert_close(performer(query, key, value, w, scaling), exact, atol=0.05, rtol=0)


@independent
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
def test_nothing_overflows_or_vanishes(scale, dtype):
    """A weighted mean of the values, however large or small the logits."""
    query, key, value = heads(scale=scale, dtype=dtype)
    query, key = query.requires_grad_(), key.requires_grad_()
    answer = performer(query, key, value, orthogonal_gaussian(32, 16, seed=0))
    assert answer.dtype == dtype and answer.isfinite().all()
    assert (answer.amax(2) <= value.amax(2) + 1e-5).all() and (answer.amin(2) >= value.amin(2) - 1e-5).all()
    answer.float().sum().backward()
    assert query.grad.isfinite().all() and key.grad.isfinite().all()


@independent
def test_weights_sum_to_one():
    query, key, value = heads(scale=2.0)
    answer = performer(query, key, torch.ones_like(value), orthogonal_gaussian(32, 16, seed=0))
    torch.testing.assert_close(answer, torch.ones_like(value), atol=1e-5, rtol=0)


@independent
def test_gradients():
    query, key, value = (t[:1, :2].requires_grad_() for t in heads(tokens=5, head_dim=4, dtype=torch.float64))
    w = orthogonal_gaussian(6, 4, seed=0)
    assert torch.autograd.gradcheck(lambda *qkv: performer(*qkv, w), (query, key, value))
    assert torch.autograd.gradgradcheck(lambda *qkv: performer(*qkv, w), (query, key, value))


@independent
def test_bfloat16_and_autocast_lose_no_more_than_their_inputs():
    query, key, value = heads(scale=2.0, head_dim=32)
    w = orthogonal_gaussian(64, 32, seed=0)
    exact = performer(query, key, value, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert performer(query, key, value, w).equal(exact)
    rounded = [t.bfloat16() for t in (query, key, value, w)]
    from_rounded = performer(*(t.float() for t in rounded))
    torch.testing.assert_close(performer(*rounded), from_rounded.bfloat16(), atol=0, rtol=0)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@independent
def test_time_and_memory_are_linear_in_the_tokens():
    w, largest, flops = orthogonal_gaussian(32, 16, seed=0), [], []
    for tokens in (512, 1024):
        qkv = [t.requires_grad_() for t in heads(tokens=tokens)]
        with Largest() as seen:
            performer(*qkv, w).sum().backward()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            performer(*qkv, w)
        largest.append(seen.numel)
        flops.append(counter.get_total_flops())
    # nothing is larger than the features of a chunk, or the values: not 1024 * 1024
    assert largest == [2 * 3 * CHUNK * 32, max(2 * 3 * CHUNK * 32, 2 * 3 * 1024 * 16)]
    # 4 M N d multiply-accumulates a head
    assert flops == [2 * 6 * 4 * 32 * 512 * 16, 2 * 6 * 4 * 32 * 1024 * 16]


# -- a highway with it -----------------------------------------------------------------------------------------


@every_kind
def test_the_highway_comes_close_to_softmax_with_many_features(kind):
    def answers(**settings):
        model = tiny_model(kind, **EXITS, **settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # long queries and keys would be those of which the estimate varies most
                if name.split(".")[-2] in ("query", "key", "q_proj", "k_proj"):
                    parameter.mul_(0.3)
        return exit_logits(model)

    exact = answers()
    few, many = (answers(attn_implementation="performer", feature_map_dim=n) - exact for n in (16, 4096))
    # a sixteenth, of errors whose sizes vary
    assert many.norm() < few.norm() / 3


@every_kind
def test_from_a_plain_backbone(kind):
    native = tiny_native(kind)
    model, info = MODELS[kind].from_backbone(native, **EXITS, **PERFORMER, output_loading_info=True)
    assert all(name.startswith("exits.") for name in info["missing_keys"])
    assert model.config._attn_implementation == "performer"
    assert [len(each.random_features) for each in model.feature_maps] == [32] * NUM_BLOCKS
    softmax = MODELS[kind].from_backbone(native, **EXITS)
    assert not exit_logits(model)[-1].allclose(exit_logits(softmax)[-1], atol=1e-3)
    native_state = native.state_dict()
    ours = {name: t for name, t in model.state_dict().items() if not name.startswith(("exits.", "feature_maps."))}
    assert all(tensor.equal(native_state[name]) for name, tensor in ours.items())


def test_defaults_and_directions():
    model = tiny_model("vit", attn_implementation="performer")
    assert (model.config.feature_map_dim, model.config.feature_map_seed) == (256, 0)
    for block, feature_map in enumerate(model.feature_maps):
        assert feature_map.random_features.equal(orthogonal_gaussian(256, HEAD_DIM, seed=block))
    seeded = tiny_model("vit", **PERFORMER, feature_map_seed=5)
    assert seeded.feature_maps[1].random_features.equal(orthogonal_gaussian(32, HEAD_DIM, seed=6))
    assert not any("random_features" in name for name, _ in seeded.named_parameters())
    assert len(tiny_model("vit").feature_maps) == 0


@every_kind
def test_saved_and_loaded(kind, tmp_path):
    """The directions are those of the file, not drawn again: another torch may draw others."""
    model = tiny_model(kind, **EXITS, **PERFORMER)
    with torch.no_grad():
        model.feature_maps[1].random_features.mul_(1.1)
    model.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "random_features" in name]
    assert sorted(names) == [f"feature_maps.{block}.random_features" for block in range(NUM_BLOCKS)]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["feature_map_dim"] == 32 and not any("attn_implementation" in key for key in settings)
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation == "performer"
    for loader in (AutoModelForImageClassification, MODELS[kind]):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert loaded.config._attn_implementation == "performer"
        assert exit_logits(loaded).equal(exit_logits(model))


def test_saved_and_loaded_in_another_process(tmp_path):
    model = tiny_model("vit", **EXITS, **PERFORMER)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, lgvit_hf\n"
        "from transformers import AutoModelForImageClassification\n"
        "from tests.test_attention import exit_logits\n"
        "model = AutoModelForImageClassification.from_pretrained(sys.argv[1])\n"
        "torch.save(exit_logits(model), sys.argv[1] + '/logits.pt')\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=100)
    assert torch.load(tmp_path / "logits.pt", weights_only=True).equal(exit_logits(model))


@every_kind
def test_a_softmax_checkpoint_as_performer_and_back(kind, tmp_path, caplog):
    softmax = tiny_model(kind, **EXITS)
    softmax.save_pretrained(tmp_path / "softmax")
    expected = MODELS[kind](tiny_config(kind, **EXITS, **PERFORMER, feature_map_seed=4))
    expected.load_state_dict(softmax.state_dict(), strict=False)
    for loader in (AutoModelForImageClassification, MODELS[kind]):
        caplog.clear()
        model, info = loader.from_pretrained(
            tmp_path / "softmax", **PERFORMER, feature_map_seed=4, output_loading_info=True
        )
        assert not info["missing_keys"] and "newly initialized" not in caplog.text
        assert exit_logits(model).equal(exit_logits(expected))
    model.save_pretrained(tmp_path / "performer")
    for loader in (AutoModelForImageClassification, MODELS[kind]):
        again, info = loader.from_pretrained(
            tmp_path / "performer", attn_implementation="sdpa", output_loading_info=True
        )
        assert not info["unexpected_keys"] and len(again.feature_maps) == 0
        torch.testing.assert_close(exit_logits(again), exit_logits(softmax), atol=1e-5, rtol=0)
        again.save_pretrained(tmp_path / "again")
        config = AutoConfig.from_pretrained(tmp_path / "again")
        assert config.feature_map_dim is None and config._attn_implementation is None


def save_performers(folder):
    for kind in ("vit", "deit"):
        model = tiny_model(kind, seed=3, **EXITS, **PERFORMER)
        with torch.no_grad():
            model.feature_maps[0].random_features.mul_(1.1)
        model.save_pretrained(folder / kind)
        torch.save(exit_logits(model), folder / f"{kind}.pt")


def compare_performers(folder):
    for kind in ("vit", "deit"):
        model = AutoModelForImageClassification.from_pretrained(folder / kind)
        expected = torch.load(folder / f"{kind}.pt", weights_only=True)
        assert model.config._attn_implementation == "performer" and model.config.feature_map_dim == 32
        torch.testing.assert_close(exit_logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("saved", ["here", "elsewhere"])
def test_under_the_other_transformers(saved, other, tmp_path):  # noqa: F811
    code = "from tests import test_attention\ntest_attention.{}(Path(sys.argv[1]))"
    if saved == "here":
        save_performers(tmp_path)
        elsewhere(code.format("compare_performers"), tmp_path)
    else:
        elsewhere(code.format("save_performers"), tmp_path)
        compare_performers(tmp_path)


def test_the_attention_is_changed_in_place(tmp_path):
    model = tiny_model("vit", **EXITS)
    softmax = exit_logits(model)
    model.config.feature_map_dim = 16
    model.set_attn_implementation("performer")
    assert model.feature_maps[0].random_features.shape == (16, HEAD_DIM)
    changed = exit_logits(model)
    assert not changed.allclose(softmax, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert exit_logits(AutoModelForImageClassification.from_pretrained(tmp_path)).equal(changed)
    model.feature_maps[0].random_features.zero_()
    model.set_attn_implementation("performer")
    assert not model.feature_maps[0].random_features.any()
    model.set_attn_implementation("sdpa")
    assert exit_logits(model).equal(softmax) and not any("random" in name for name in model.state_dict())
    assert model.config.feature_map_dim is None


def test_directions_are_no_mask_for_another_attention():
    model = tiny_model("vit", **EXITS, **PERFORMER)
    model.config._attn_implementation = "sdpa"
    assert exit_logits(model).equal(exit_logits(tiny_model("vit", **EXITS)))


def test_truncated_and_copied():
    model = tiny_model("deit", **EXITS, **PERFORMER)
    with torch.no_grad():
        model.feature_maps[1].random_features.mul_(1.1)
    small = model.truncate(0)
    assert len(small.feature_maps) == 2 and exit_logits(small)[-1].equal(exit_logits(model)[0])
    assert exit_logits(model.truncate(2))[-1].equal(exit_logits(model)[-1])
    assert exit_logits(copy.deepcopy(model)).equal(exit_logits(model))


@every_kind
def test_a_sample_does_not_depend_on_its_batch(kind):
    model, images = tiny_model(kind, **EXITS, **PERFORMER), 5 * tiny_images(8)
    exit_in_gaps(model, images)
    with torch.no_grad():
        together, alone = model(images), [model(image[None]) for image in images]
    assert len(set(together.exit_layer.tolist())) > 1
    assert together.exit_layer.tolist() == [answer.exit_layer.item() for answer in alone]
    torch.testing.assert_close(together.logits, torch.cat([answer.logits for answer in alone]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains(checkpointing):
    model = tiny_model("vit", **EXITS, **PERFORMER).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = copy.deepcopy(model.feature_maps.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels, losses = tiny_images(8), torch.arange(8) % 5, []
    for _ in range(12):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "exits" not in name)
    assert all(tensor.equal(before[name]) for name, tensor in model.feature_maps.state_dict().items())


def test_bfloat16(tmp_path):
    model = tiny_model("vit", **EXITS, **PERFORMER)
    expected = exit_logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = exit_logits(model).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for rounded in (under_autocast, exit_logits(loaded).float(), exit_logits(model.bfloat16()).float()):
        assert (rounded - expected).norm() < 0.1 * expected.norm()


@independent
def test_macs_are_those_of_the_estimate():
    """17 tokens, 4 heads of 8: 4 M N d a head and block, where softmax attention takes 2 N^2 d."""
    softmax, estimate = (model_macs(tiny_model("vit", **EXITS, **settings)) for settings in ({}, PERFORMER))
    difference = NUM_BLOCKS * 4 * (4 * 32 * 17 * HEAD_DIM - 2 * 17 * 17 * HEAD_DIM)
    assert estimate.backbone - softmax.backbone == pytest.approx(difference)


@independent
def test_exported(tmp_path):
    pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    from lgvit_hf.export.onnx_export import export_onnx
    from lgvit_hf.runtimes.onnxruntime import ORTHighway

    small = {"num_hidden_layers": 2, "exit_positions": [1], "exit_types": "linear"}
    model, images = tiny_model("vit", **small, **PERFORMER), tiny_images(9)
    exit_in_gaps(model, images)
    export_onnx(model, tmp_path / "onnx")
    with torch.no_grad():
        expected = model(images)
    answer = ORTHighway.from_pretrained(tmp_path / "onnx")(images)
    assert len(set(expected.exit_layer.tolist())) > 1
    assert answer.exit_layer.tolist() == expected.exit_layer.tolist()
    torch.testing.assert_close(answer.logits, expected.logits, atol=1e-5, rtol=0)


# -- what cannot be ----------------------------------------------------------------------------------------------


def test_swin_says_no(tmp_path):
    with pytest.raises(ValueError, match="attn_implementation='performer' is not possible for swin_highway"):
        tiny_config("swin", attn_implementation="performer")
    model = tiny_model("swin")
    with pytest.raises(ValueError, match="not possible for swin_highway"):
        model.set_attn_implementation("performer")
    assert model.config._attn_implementation != "performer"
    with pytest.raises(ValueError, match="not possible for swin_highway"):
        MODELS["swin"].from_backbone(tiny_native("swin"), attn_implementation="performer")
    model.save_pretrained(tmp_path)
    assert "feature_map" not in (tmp_path / "config.json").read_text()
    for loader in (AutoModelForImageClassification, MODELS["swin"]):
        with pytest.raises(ValueError, match="not possible for swin_highway"):
            loader.from_pretrained(tmp_path, attn_implementation="performer")


@every_kind
def test_settings_that_cannot_take_effect(kind):
    for settings, message in (
        ({"feature_map_dim": 64, "attn_implementation": "sdpa"}, "feature_map_dim: 64 takes no effect with"),
        ({"feature_map_seed": 1}, "feature_map_seed: 1 takes no effect"),
        ({"feature_map_dim": 0}, "feature_map_dim: 0 must be an integer of at least 1"),
        ({"feature_map_dim": "256"}, "feature_map_dim: '256' must be an integer"),
        ({"feature_map_dim": 8, "feature_map_seed": -1}, "feature_map_seed: -1 must be an integer of at least 0"),
        ({**PERFORMER, "attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob: 0.1 takes no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(kind, **settings)


def test_features_alone_ask_for_performer():
    config = tiny_config("vit", feature_map_dim=8)
    assert config._attn_implementation == "performer"
    assert CONFIGS["vit"](**config.to_dict())._attn_implementation == "performer"


def test_other_features_than_saved(tmp_path):
    tiny_model("vit", **PERFORMER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="feature_map_seed: 1 was asked for, but .* was saved with 0"):
        MODELS["vit"].from_pretrained(tmp_path, feature_map_seed=1)
    with pytest.raises(RuntimeError, match="mismatch"):
        MODELS["vit"].from_pretrained(tmp_path, feature_map_dim=16)


def test_no_attention_weights(caplog):
    out = tiny_model("vit", **PERFORMER)(tiny_images(2), early_exit=False, output_attentions=True)
    assert out.attentions == () and 'attentions are only kept by attn_implementation="eager"' in caplog.text


def test_a_plain_model_has_no_features():
    native = tiny_native("vit", attn_implementation="performer")
    with pytest.raises(ValueError, match="was given no random features; ViTHighway and DeiTHighway have them"):
        native(tiny_images(1))


@independent
def test_reset_gives_what_the_seed_gives():
    feature_map = FeatureMap(12, 4, seed=2).to(torch.bfloat16)
    feature_map.random_features.zero_()
    feature_map.reset()
    assert feature_map.random_features.equal(orthogonal_gaussian(12, 4, seed=2).bfloat16())
