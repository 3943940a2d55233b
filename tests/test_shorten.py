"""`lgvit shorten`: the map against least squares of others, the shorter model against the full one, and bad input."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import nn
from transformers import AutoModelForImageClassification

from lgvit_hf import AViT, grow, shorten
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.training.cached_states import HeadTraining
from lgvit_hf.training.shorten import fit_linear_map
from tests.seeds import generator, rng
from tests.tiny import IMAGE_SIZE, KINDS, MODELS, NUM_LABELS, tiny_images, tiny_model, tiny_native

every_kind = pytest.mark.parametrize("kind", KINDS)
version_independent = pytest.mark.version_independent
FIT, HELD_OUT = 40, 50
EXITS = {"exit_positions": [2, 4], "exit_types": "linear", "exit_policy": "never"}


def items(num_images=FIT + HELD_OUT):
    return [
        {"pixel_values": pixels, "labels": index % NUM_LABELS} for index, pixels in enumerate(tiny_images(num_images))
    ]


def shortened(model, blocks=(3, 4), images=None, **settings):
    return shorten(model, images or items(), blocks=blocks, **{"fit_images": FIT, **settings})


def modules_of(model):
    return [block for blocks in model.block_lists() for block in blocks]


def logits_of(model, **settings):
    with torch.no_grad():
        return model(tiny_images(6, seed=1), **settings).logits


def fitted_indices(seed=0):
    order = torch.randperm(FIT + HELD_OUT, generator=torch.Generator().manual_seed(seed))
    return order[:FIT], order[FIT:]


def states_around(native, kind, blocks):
    """What the first block takes and the last gives of the images that the map is fitted on, from hooks alone."""
    model = MODELS[kind].from_backbone(native, exit_positions=[], exit_types=[], exit_policy="never")
    blocks, kept = [modules_of(model)[block - 1] for block in blocks], {}
    blocks[0].register_forward_pre_hook(lambda _, given: kept.update(before=given[0]))
    blocks[1].register_forward_hook(lambda _, given, made: kept.update(after=made[0] if type(made) is tuple else made))
    with torch.no_grad():
        model(tiny_images(FIT + HELD_OUT)[fitted_indices()[0]])
    return [kept[name].flatten(0, 1).double().numpy() for name in ("before", "after")]


# -- the fit -----------------------------------------------------------------------------------------------------


@version_independent
def test_the_map_is_that_of_scikit_learn():
    numbers = generator()
    inputs, noise = (torch.randn(3, 30, 7, generator=numbers) for _ in range(2))
    inputs += 50 * torch.randn(7, generator=numbers)
    outputs = inputs.pow(2)[..., :4] + noise[..., :4]
    weight, bias = fit_linear_map(zip(inputs, outputs, strict=True))
    other = LinearRegression().fit(inputs.flatten(0, 1).double(), outputs.flatten(0, 1).double())
    np.testing.assert_allclose(weight, other.coef_, atol=1e-4)
    np.testing.assert_allclose(bias, other.intercept_, atol=1e-4, rtol=1e-4)


@version_independent
def test_inputs_that_depend_on_each_other_get_the_smallest_map():
    inputs = rng().normal(size=(50, 3))
    inputs = np.concatenate([inputs, inputs[:, :1] + inputs[:, 1:2]], axis=1)
    outputs = rng(1).normal(size=(50, 2))
    weight, bias = fit_linear_map([(torch.from_numpy(inputs), torch.from_numpy(outputs))])
    expected = np.linalg.lstsq(np.c_[inputs, np.ones(50)], outputs, rcond=None)[0]
    np.testing.assert_allclose(np.c_[weight, bias], expected.T, atol=1e-6)


@every_kind
def test_the_map_is_least_squares_on_the_tokens_of_the_fitted_images(kind):
    native = tiny_native(kind)
    model = shortened(native).model
    place = modules_of(model)[2]
    before, after = states_around(native, kind, (3, 4))
    expected = np.linalg.lstsq(np.c_[before, np.ones(len(before))], after, rcond=None)[0]
    made = np.c_[place.weight.detach(), place.bias.detach()]
    np.testing.assert_allclose(made, expected.T, atol=1e-4)


@every_kind
def test_blocks_that_are_linear_are_found_again(kind):
    full = tiny_model(kind, exit_positions=[], exit_types=[], exit_policy="never")
    blocks = full.block_lists()[1 if kind == "swin" else 0]
    width = full.head_shape(3).width
    maps = [nn.Linear(width, width) for _ in range(2)]
    start = 0 if kind == "swin" else 2
    for index, linear in enumerate(maps, start):
        blocks[index] = AsBlock(linear, kind)
    model = shortened(full, images=items(200), fit_images=150).model
    torch.testing.assert_close(modules_of(model)[2].weight, maps[1].weight @ maps[0].weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(logits_of(model), logits_of(full), atol=1e-3, rtol=1e-3)


class AsBlock(nn.Module):
    """A map of each token, called as a block of transformers is."""

    def __init__(self, linear, kind):
        super().__init__()
        self.linear, self.kind = linear, kind

    def forward(self, hidden, *others):
        return (self.linear(hidden),) if self.kind == "swin" else self.linear(hidden)


# -- the model ---------------------------------------------------------------------------------------------------


@every_kind
def test_saved_and_loaded_it_answers_as_before(kind, tmp_path):
    native = tiny_native(kind)
    before = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    model, report = shortened(native, output=tmp_path / "out", processor=make_processor(IMAGE_SIZE))
    assert all(torch.equal(tensor, before[name]) for name, tensor in native.state_dict().items())
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert opened.config.linear_blocks == [3, 4]
    assert torch.equal(logits_of(opened), logits_of(model))
    assert json.loads((tmp_path / "out" / "shorten.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@every_kind
def test_the_report_says_what_both_models_answer_and_cost(kind):
    native = tiny_native(kind)
    model, report = shortened(native)
    held_out = fitted_indices()[1]
    with torch.no_grad():
        answers = [each(tiny_images(FIT + HELD_OUT)[held_out]).logits.argmax(-1) for each in (native, model)]
    right = [(each == held_out % NUM_LABELS).double().mean().item() for each in answers]
    assert report["accuracy"] == pytest.approx(dict(zip(("full", "shortened"), right, strict=True)))
    assert report["agreement"] == pytest.approx((answers[0] == answers[1]).double().mean().item())
    assert report["parameters"] == {
        "full": sum(each.numel() for each in native.parameters()),
        "shortened": sum(each.numel() for each in model.parameters()),
    }
    # each token meets the map once in the place of two blocks, each of which has more weights than the map
    assert report["macs"]["shortened"] < report["macs"]["full"]
    assert set(report["wall_clock"]) == {"1", "8"}
    assert shortened(native, images=[{"pixel_values": each} for each in tiny_images(90)]).report["accuracy"] is None
    assert shortened(native, ignore_labels=True).report["accuracy"] is None


@version_independent
def test_macs_are_those_of_the_blocks_that_are_left():
    macs = shortened(tiny_native("vit"), (2, 4)).report["macs"]
    tokens, width, inside = 17, 32, 64
    block = tokens * (4 * width**2 + 2 * width * inside) + 2 * tokens**2 * width
    assert macs["full"] - macs["shortened"] == 3 * block - tokens * width**2


@every_kind
def test_a_highway_keeps_exits_and_policy(kind):
    full = tiny_model(kind, **EXITS)
    model = shortened(full).model
    assert (model.config.exit_positions, model.config.exit_types) == ([2, 4], ["linear", "linear"])
    with torch.no_grad():
        outputs = [each(tiny_images(5), early_exit=False) for each in (full, model)]
    torch.testing.assert_close(outputs[0].exit_logits[0], outputs[1].exit_logits[0])
    assert not torch.equal(outputs[0].exit_logits[1], outputs[1].exit_logits[1])
    model.set_exit_policy("fixed", exit_index=1)
    assert model(tiny_images(3)).exit_layer.tolist() == [4, 4, 4]
    assert model.truncate(0).config.linear_blocks is None
    cut = model.truncate(1)
    assert cut.config.linear_blocks == [3, 4]
    torch.testing.assert_close(logits_of(cut), logits_of(model))


@every_kind
def test_hidden_states_are_kept_and_attentions_of_the_blocks_that_have_some(kind):
    model = shortened(tiny_native(kind, attn_implementation="eager")).model
    model.set_attn_implementation("eager")
    output = model(tiny_images(2), output_hidden_states=True, output_attentions=True, early_exit=False)
    full = tiny_native(kind)(tiny_images(2), output_hidden_states=True)
    assert [each.shape for each in output.hidden_states] == [each.shape for each in full.hidden_states]
    # the last of block 2 of Swin's second stage is replaced
    assert len(output.attentions) == (2 if kind == "swin" else 4)


@version_independent
def test_exits_grow_on_it_where_they_can_be():
    model = shortened(tiny_native("vit")).model
    grown = grow(model, items(), max_accuracy_drop=1.0, cost="macs", training=HeadTraining(epochs=1))
    assert [row["exit_layer"] for row in grown.report["candidates"]] == [1, 2, 4]
    assert grown.model.config.linear_blocks == [3, 4]
    with pytest.raises(ValueError, match=r"exit_positions: \[3\] lie between blocks 3 and 4"):
        grow(model, items(), exit_positions=[2, 3])


def test_exported_to_onnx_it_answers_the_same(tmp_path):
    pytest.importorskip("onnx")
    from lgvit_hf import ORTHighway, export_onnx

    model = shortened(tiny_model("swin", **EXITS)).model
    model.set_exit_policy("fixed", exit_index=1)
    export_onnx(model, tmp_path / "onnx", processor=make_processor(IMAGE_SIZE))
    exported = ORTHighway.from_pretrained(tmp_path / "onnx")
    torch.testing.assert_close(exported(tiny_images(6, seed=1)).logits, logits_of(model), atol=1e-4, rtol=1e-4)


def test_a_performer_and_a_split_highway_run(tmp_path):
    model = shortened(tiny_model("vit", **EXITS, attn_implementation="performer", feature_map_dim=16)).model
    model.save_pretrained(tmp_path / "performer")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "performer").eval()
    assert torch.equal(logits_of(opened), logits_of(model))
    parts = shortened(tiny_model("vit", **EXITS)).model.split(
        [4], tmp_path / "parts", processor=make_processor(IMAGE_SIZE)
    )
    assert len(parts) == 2


# -- the command, and bad input ----------------------------------------------------------------------------------


@version_independent
def test_the_command_saves_what_evaluate_takes(tmp_path, capsys):
    plain = tiny_native("vit", num_labels=10)
    plain.save_pretrained(tmp_path / "plain")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "plain")
    typed = ["shorten", str(tmp_path / "plain"), "digits", str(tmp_path / "out"), "--blocks", "2", "3"]
    few = ["--limit", "150", "--fit-images", "100"]
    assert main([*typed, *few]) == 0
    said = capsys.readouterr().out
    assert "blocks 2 to 3 of 6 are one linear map, fitted on 100 images; compared on 50 others" in said
    evaluate = ["evaluate", str(tmp_path / "out"), "--data", "digits", "--timed-batch-sizes", "1"]
    assert main(evaluate) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main([*evaluate, "--plots", str(tmp_path / "plots")]) == 2
    assert "it has none" in capsys.readouterr().err
    assert main([*typed, *few]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main([*typed[:3], str(tmp_path / "other"), *few]) == 2
    assert "lgvit shorten needs --blocks" in capsys.readouterr().err


@version_independent
@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("vit", {"blocks": [4, 3]}, r"linear_blocks: \[4, 3\] must be a first and a last block, in that order"),
        ("vit", {"blocks": [0, 2]}, r"from 1 to 6 \(the backbone has 6 blocks\)"),
        ("vit", {"blocks": [5, 7]}, r"from 1 to 6"),
        ("vit", {"blocks": [1, 6]}, "all blocks of the backbone; at least one must stay"),
        ("vit", {"blocks": [2]}, r"linear_blocks: \[2\] must be the first and the last block"),
        ("vit", {"blocks": "23"}, "linear_blocks: '23' must be the first and the last block"),
        ("vit", {"blocks": [2, 3.0]}, "must be the first and the last block"),
        ("swin", {"blocks": [2, 3]}, r"linear_blocks: \[2, 3\] lie in stages 1 and 2"),
        ("vit", {"fit_images": 0}, "fit_images: 0 must be at least 1"),
        ("vit", {"fit_images": 41}, "90 images are too few to fit on 41 and to compare on 50 others"),
        ("vit", {"limit": 60}, "60 images are too few"),
        ("vit", {"fit_images": 1}, "fit_images: their 17 tokens are fewer than the 33 unknowns"),
    ],
)
def test_bad_input_is_refused(kind, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        shortened(tiny_native(kind), output=tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


@version_independent
def test_models_of_another_kind_are_refused(tmp_path):
    plain = tiny_native("vit")
    with pytest.raises(ValueError, match="AViT is a 'avit'; blocks can be replaced in vit, deit, swin"):
        shortened(AViT.from_backbone(plain))
    model = shortened(plain).model
    with pytest.raises(ValueError, match=r"blocks \[3, 4\] are one linear map already"):
        shortened(model)
    with pytest.raises(ValueError, match="AViT takes 'vit' and 'deit' backbones"):
        AViT.from_backbone(model)
    with pytest.raises(ValueError, match=r"exit_positions: \[3\] lie between blocks 3 and 4"):
        shortened(tiny_model("vit", exit_positions=[2, 3, 4], exit_types="linear"))
    with pytest.raises(ValueError, match="answers with other numbers"):
        shortened(tiny_native("vit", problem_type="regression"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear_blocks: \[2, 3\] was asked for, but .* was saved with \[3, 4\]"):
        MODELS["vit"].from_pretrained(tmp_path, linear_blocks=[2, 3])
