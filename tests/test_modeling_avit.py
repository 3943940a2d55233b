"""AViT against the published code, against itself with nothing removed, and as a model of transformers."""

import argparse
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)

from lgvit_hf import AViT, AViTConfig, AViTTrainer, token_macs
from lgvit_hf.cli import main
from lgvit_hf.hub.convert import convert_avit
from lgvit_hf.token_halting import halting_scores
from tests.conftest import SHARED
from tests.seeds import examples, generator, seeded
from tests.tiny import (
    IMAGE_SIZE,
    NUM_BLOCKS,
    NUM_LABELS,
    scrambled,
    tiny_backbone_settings,
    tiny_dataset,
    tiny_images,
    tiny_native,
)

KINDS = ("vit", "deit", "deit_plain")
every_kind = pytest.mark.parametrize("kind", KINDS)
CASES = json.loads((SHARED / "reference" / "avit.json").read_text()) if (SHARED / "reference").is_dir() else []
NUM_PATCHES = 16


@torch.no_grad()
def tiny_avit(kind="vit", seed=0, **changes):
    """Random weights, and a gate at which tokens halt all over the depth."""
    native = tiny_native(kind, seed)
    for center in (1.5, 0.5, 2.5, -0.5, 3.5):
        model = AViT.from_backbone(native, **{"gate_scale": 1.0, "gate_center": center, **changes})
        depth = model(tiny_images(9)).token_depth
        if depth.unique().numel() > 3 and 1.5 < depth.float().mean() < NUM_BLOCKS - 0.5:
            return model
    raise AssertionError("tokens halt all alike")


@torch.no_grad()
def clear_images(model, number):
    """Images none of whose tokens has a sum of scores at the bound, where rounding would decide; of mixed depths."""
    images, bound = tiny_images(3 * number), 1 - model.config.eps
    out = model(images, output_hidden_states=True)
    gate = model.config.gate_scale, model.config.gate_center
    live = torch.stack([out.token_depth > block for block in range(len(out.hidden_states) - 1)])
    sums = (torch.stack([halting_scores(hidden, *gate) for hidden in out.hidden_states[1:]]) * live).cumsum(0)
    near = (live & ((sums - bound).abs() < 1e-4)).any(0).any(1)
    assert (~near).sum() >= number
    depth = out.token_depth[~near].float().mean(1)
    return images[~near][(depth - model.config.num_hidden_layers / 2).abs().argsort()[:number]]


@torch.no_grad()
def planted_avit(cls_depth, kind="vit"):
    """Tokens that halt where their picture says: channel 0, which no block changes, holds each patch's first pixel."""
    native = tiny_native(kind)
    for name, parameter in native.named_parameters():
        if name.rpartition(".")[0].endswith(("attention.output.dense", "output.dense", "o_proj", "mlp.fc2")):
            parameter[0] = 0
    embeddings = native.base_model.embeddings
    embeddings.position_embeddings[..., 0] = 0
    embeddings.cls_token[..., 0] = channel_for(torch.tensor(cls_depth))
    if kind != "vit":
        embeddings.distillation_token[..., 0] = channel_for(torch.tensor(NUM_BLOCKS + 1 - cls_depth))
    projection = embeddings.patch_embeddings.projection
    projection.weight[0], projection.bias[0], projection.weight[0, 0, 0, 0] = 0, 0, 1
    return AViT.from_backbone(native, gate_scale=1.0, gate_center=0.0)


def channel_for(depth):
    """Scores of one part in `depth` add up to 1 behind that block."""
    return torch.logit(1 / depth.double(), eps=1e-4).float()


def planted_images(depths):
    """Images `[B, 3, 16, 16]` whose patches halt at `depths` `[B, 16]`."""
    images = tiny_images(len(depths))
    images[:, 0, ::4, ::4] = channel_for(depths).unflatten(1, (4, 4))
    return images


def assert_close_to_largest(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def training_arguments(folder, **changes):
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    sizes = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return TrainingArguments(str(folder), **{**quiet, **sizes, **changes})


# -- the published code ------------------------------------------------------------------------------------


class Reference:
    def __init__(self, case, folder):
        tensors = load_file(SHARED / "reference" / case["file"])
        state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
        source = folder / f"{case['name']}-{case['gate_scale']:g}-{case['gate_center']:g}.safetensors"
        save_file(state, source)
        convert_avit(source, folder / "ours", num_attention_heads=case["config"]["num_attention_heads"])
        self.case, self.tensors = case, tensors
        self.model = AViT.from_pretrained(folder / "ours", published_target=True).eval()
        self.pixels, self.labels = tensors["input.pixel_values"], tensors["input.labels"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case["name"])
def reference(request, tmp_path_factory):
    return Reference(request.param, tmp_path_factory.mktemp("reference"))


def test_reference_is_there(shared):
    assert len(CASES) == 3


@pytest.mark.parametrize("remove", [False, True], ids=["masked", "removed"])
@torch.no_grad()
def test_answers_and_depths_are_the_published_ones(reference, remove):
    out = reference.model(reference.pixels, remove_tokens=remove)
    assert_close_to_largest(out.logits, reference.tensors["logits"])
    assert_close_to_largest(out.ponder_cost, reference.tensors["rho_token"])
    assert torch.equal(out.token_depth, reference.tensors["counter_token"].long())
    assert torch.equal(out.exit_layer, out.token_depth.amax(1))
    assert out.ponder_cost.mean().item() == pytest.approx(reference.case["ponder_loss"], rel=1e-5)
    assert out.ponder_loss is None if remove else out.ponder_loss == out.ponder_cost.mean()


@torch.no_grad()
def test_losses_are_the_published_ones_put_right(reference):
    out = reference.model(reference.pixels, labels=reference.labels)
    scores = reference.tensors["halting_score_layer.corrected"]
    assert_close_to_largest(out.halting_scores.mean(0), scores)
    distribution = reference.case["distribution_loss_corrected"]
    assert out.distribution_loss.item() == pytest.approx(distribution, rel=1e-5)
    task = torch.nn.functional.cross_entropy(reference.tensors["logits"], reference.labels).item()
    assert out.loss.item() == pytest.approx(
        task + 5e-4 * reference.case["ponder_loss"] + 1e-3 * distribution, rel=1e-5
    )
    # the target that is a distribution
    reference.model.config.published_target = False
    proper = reference.model(reference.pixels, remove_tokens=False).distribution_loss.item()
    reference.model.config.published_target = True
    target = reference.tensors["distr_target"].double()
    target, spread = target / target.sum(), (scores / scores.sum()).double().clamp(0.01, 0.99)
    assert proper == pytest.approx((target * (target / spread).log()).sum().item() / 12, rel=1e-4)


# -- removed equals masked ---------------------------------------------------------------------------------


@settings(max_examples=examples(40))
@given(st.data())
def test_removed_equals_masked_wherever_tokens_halt(data):
    kind, cls_depth = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, NUM_BLOCKS))
    deepest = data.draw(st.integers(1, NUM_BLOCKS))
    batch_size, seed = data.draw(st.integers(1, 32)), data.draw(st.integers(0, 1000))
    depths = torch.randint(1, deepest + 1, (batch_size, NUM_PATCHES), generator=generator(seed))
    model, images = planted_avit(cls_depth, kind), planted_images(depths)
    with torch.no_grad():
        removed, masked = model(images), model(images, remove_tokens=False)
    assert torch.equal(removed.token_depth[:, -NUM_PATCHES:], depths)
    assert (removed.token_depth[:, 0] == cls_depth).all()
    assert torch.equal(removed.token_depth, masked.token_depth)
    assert torch.equal(removed.exit_layer, masked.exit_layer)
    assert_close_to_largest(removed.logits, masked.logits)
    assert_close_to_largest(removed.ponder_cost, masked.ponder_cost)


@every_kind
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(kind):
    model = tiny_avit(kind)
    images = clear_images(model, 9)
    together = model(images)
    assert together.token_depth.unique().numel() > 2, "tokens halt at many depths"
    for remove in (True, False):
        alone = [model(images[row : row + 1], remove_tokens=remove) for row in range(9)]
        assert torch.equal(torch.cat([out.token_depth for out in alone]), together.token_depth)
        assert_close_to_largest(torch.cat([out.logits for out in alone]), together.logits)
    again = model(images)
    assert torch.equal(again.logits, together.logits)


@torch.no_grad()
def test_blocks_run_on_live_tokens_and_not_once_all_have_halted():
    model = planted_avit(cls_depth=2)
    depths = torch.tensor([[1] * 10 + [3] * 6, [2] * 16])
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    out = model(planted_images(depths))
    assert seen == [34, 7 + 17, 6]
    assert out.exit_layer.tolist() == [3, 2]


@torch.no_grad()
def test_hooks_of_layers_see_the_live_tokens():
    model = planted_avit(cls_depth=2)
    depths = torch.tensor([[1] * 10 + [3] * 6, [2] * 16])
    seen = []
    for block, layer in enumerate(model.layers):
        for inner in layer.modules():
            if isinstance(inner, torch.nn.Linear | torch.nn.LayerNorm):
                inner.register_forward_hook(lambda _, given, found, block=block: seen.append((block, found.shape[1])))
    model(planted_images(depths))
    # query, key, value, output, two layers of the MLP, two norms
    assert seen == [(block, alive) for block, alive in enumerate([34, 7 + 17, 6]) for _ in range(8)]


@torch.no_grad()
@pytest.mark.parametrize("how", ["hook", "forward", "class"])
def test_a_layer_somebody_changed_is_run_as_it_is(how):
    class Negated(torch.nn.Linear):
        def forward(self, tokens):
            return -super().forward(tokens)

    model = tiny_avit()
    for layer in model.layers:
        changed = [inner for inner in layer.modules() if isinstance(inner, torch.nn.Linear)][-1]
        if how == "hook":
            changed.register_forward_hook(lambda layer, given, found: -found)
        elif how == "forward":
            changed.forward = lambda tokens, run=changed.forward: -run(tokens)
        else:
            changed.__class__ = Negated
    images = clear_images(model, 4)
    plain = tiny_avit()(images).logits
    removed, masked = model(images), model(images, remove_tokens=False)
    torch.testing.assert_close(removed.logits, masked.logits, atol=1e-5, rtol=0)
    assert not torch.allclose(removed.logits, plain, atol=1e-3)


def test_answers_without_gradients_are_tensors_like_others():
    model = tiny_avit()
    with torch.no_grad():
        out = model(tiny_images(3))
    assert not any(value.is_inference() for value in out.values() if isinstance(value, torch.Tensor))
    weight = torch.ones(NUM_LABELS, requires_grad=True)
    (out.logits.mul_(2) * weight).sum().backward()
    torch.testing.assert_close(weight.grad, out.logits.sum(0))


@every_kind
@torch.no_grad()
def test_macs_are_those_that_are_counted(kind):
    model, images = tiny_avit(kind), tiny_images(3)
    counted, depths = 0, []
    for row in range(3):
        # the counter knows the plain formula of attention, not the fused kernels of a processor
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            depths.append(model(images[row : row + 1]).token_depth)
        counted += counter.get_total_flops() / 2
    macs = token_macs(model.config, torch.cat(depths)).sum().item()
    # a second classifier is the only thing that the formula leaves out
    extra = 3 * model.config.hidden_size * NUM_LABELS if kind == "deit" else 0
    assert macs + extra == counted


@every_kind
@torch.no_grad()
def test_without_halting_it_is_the_plain_model(kind):
    native, images = tiny_native(kind), tiny_images(4)
    model = AViT.from_backbone(native, gate_scale=1.0, gate_center=1e4)
    for remove in (True, False):
        out = model(images, remove_tokens=remove)
        assert_close_to_largest(out.logits, native(images).logits, 1e-6)
        assert (out.token_depth == NUM_BLOCKS).all()


# -- training ----------------------------------------------------------------------------------------------


@every_kind
def test_gradient_is_that_of_tokens_that_are_not_there(kind):
    model, gradients = tiny_avit(kind), []
    images = clear_images(model, 3)
    for remove in (True, False):
        model.zero_grad()
        out = model(images, remove_tokens=remove)
        (out.logits.square().sum() + out.ponder_cost.mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    removed, masked = gradients
    # a block that no token reaches is not run at all
    assert removed.keys() <= masked.keys() and len(removed) > 50
    for name, gradient in masked.items():
        torch.testing.assert_close(removed.get(name, torch.zeros_like(gradient)), gradient, rtol=1e-3, atol=1e-4)


def test_ponder_and_distribution_reach_the_scores():
    model = tiny_avit().train()
    out = model(tiny_images(3), labels=torch.tensor([0, 1, 2]))
    projection = model.backbone.embeddings.patch_embeddings.projection.weight
    for loss in (out.ponder_loss, out.distribution_loss):
        gradient = torch.autograd.grad(loss, projection, retain_graph=True)[0]
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-6


def test_batch_of_one_trains():
    loss = tiny_avit().train()(tiny_images(1), labels=torch.tensor([1])).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_gradient_checkpointing_changes_nothing():
    gradients, runs = [], [0, 0]
    for checkpointing in (False, True):
        model = tiny_avit().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.layers:
            layer.layernorm_before.register_forward_pre_hook(
                lambda *_, which=int(checkpointing): runs.__setitem__(which, runs[which] + 1)
            )
        model(tiny_images(3), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append(model.backbone.embeddings.cls_token.grad)
    assert torch.equal(*gradients)
    assert runs == [NUM_BLOCKS, 2 * NUM_BLOCKS], "blocks are run again in the backward"


@every_kind
@torch.no_grad()
def test_attention_weights_and_states_of_live_tokens(kind):
    model = tiny_avit(kind)
    images = clear_images(model, 3)
    expected = model(images, output_hidden_states=True)
    model.set_attn_implementation("eager")
    out = model(images, output_hidden_states=True, output_attentions=True)
    assert_close_to_largest(out.logits, expected.logits)
    depth, blocks = out.token_depth, len(out.attentions)
    assert 1 < depth.float().mean() < blocks and len(out.hidden_states) == blocks + 1
    torch.testing.assert_close(out.hidden_states, expected.hidden_states)
    for block, weights in enumerate(out.attentions):
        live = depth > block
        of_halted = weights * ~live[:, None, None]
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        # where all have halted the class token stands for them
        assert of_halted[live.any(1)].sum() == 0
    with pytest.raises(ValueError, match="output_attentions needs every token in every block: remove_tokens=False"):
        model(images, remove_tokens=True, output_attentions=True)


def test_loss_in_the_removed_mode_leaves_the_distribution_out():
    model, images, labels = tiny_avit(), tiny_images(3), torch.tensor([0, 1, 2])
    out = model(images, labels=labels, remove_tokens=True)
    task = torch.nn.functional.cross_entropy(out.logits, labels)
    assert out.distribution_loss is None and out.halting_scores is None
    torch.testing.assert_close(out.loss, task + 5e-4 * out.ponder_cost.mean())


def test_tokens_are_not_removed_in_training():
    with pytest.raises(ValueError, match="remove_tokens.*eval"):
        tiny_avit().train()(tiny_images(1), remove_tokens=True)


def fitted_depth(folder, **weights):
    """Mean depth of the tokens after a few steps."""
    model = tiny_avit(**weights)
    args = training_arguments(folder, max_steps=25, learning_rate=1e-2, per_device_train_batch_size=8)
    trainer = AViTTrainer(model, args, train_dataset=tiny_dataset(8))
    trainer.train()
    return [log["mean_token_depth"] for log in trainer.state.log_history if "mean_token_depth" in log][-1]


@pytest.mark.version_independent
def test_ponder_weight_and_target_depth_steer_the_mean_depth(tmp_path):
    off = {"ponder_weight": 0.0, "distribution_weight": 0.0}
    # weights under which the task hardly counts
    assert fitted_depth(tmp_path, **{**off, "ponder_weight": 5.0}) < fitted_depth(tmp_path, **off) - 0.3
    shallow, deep = (
        fitted_depth(tmp_path, **{**off, "distribution_weight": 20.0}, target_depth=depth) for depth in (1, 5)
    )
    assert shallow < deep - 0.5


def test_plain_trainer_trains_and_evaluates(tmp_path):
    model = tiny_avit()
    before = model.classifiers[0].weight.clone()
    trainer = Trainer(model, training_arguments(tmp_path), train_dataset=tiny_dataset(8), eval_dataset=tiny_dataset(6))
    trainer.train()
    assert not torch.equal(model.classifiers[0].weight, before)
    images = clear_images(model.eval(), 6)
    predictions = trainer.predict([{"pixel_values": image, "labels": 0} for image in images]).predictions
    with torch.no_grad():
        removed = model.eval()(images).logits
    assert_close_to_largest(torch.from_numpy(predictions), removed)
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_avit_trainer_says_how_deep_tokens_go(tmp_path):
    model = tiny_avit()
    trainer = AViTTrainer(
        model,
        training_arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=tiny_dataset(16),
        eval_dataset=tiny_dataset(6),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert 1 <= log["mean_token_depth"] <= NUM_BLOCKS < NUM_BLOCKS + 1 > log["ponder_loss"] > 1
        assert log["distribution_loss"] > 0
    images = clear_images(model.eval(), 6)
    figures = trainer.evaluate([{"pixel_values": images[row], "labels": row % NUM_LABELS} for row in range(6)])
    with torch.no_grad():
        out = model.eval()(images)
    labels = torch.arange(6) % NUM_LABELS
    assert figures["eval_accuracy"] == pytest.approx((out.logits.argmax(-1) == labels).double().mean().item())
    assert figures["eval_mean_token_depth"] == pytest.approx(out.token_depth.double().mean().item())
    assert figures["eval_mean_exit_layer"] == pytest.approx(out.exit_layer.double().mean().item())
    assert figures["eval_macs"] == pytest.approx(token_macs(model.config, out.token_depth).mean().item())
    assert trainer.predict(tiny_dataset(6)).predictions.shape == (6, NUM_LABELS)


def test_metrics_of_ones_own_are_left_alone(tmp_path):
    shapes = []
    trainer = AViTTrainer(
        tiny_avit(),
        training_arguments(tmp_path),
        eval_dataset=tiny_dataset(6),
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.shape) or {"mine": 1.0},
    )
    assert trainer.evaluate()["eval_mine"] == 1.0 and shapes == [(6, NUM_LABELS)]


# -- nothing stays with the model --------------------------------------------------------------------------


def test_no_state_stays_on_the_modules():
    model = tiny_avit()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    model.train()(tiny_images(2), labels=torch.tensor([0, 1]))
    model.eval()(tiny_images(5))
    for name, module in model.named_modules():
        assert {key: id(value) for key, value in vars(module).items() if key != "training"} == {
            key: id(value) for key, value in before[name].items() if key != "training"
        }, name


@pytest.mark.version_independent
def test_two_threads_do_not_disturb_each_other():
    model = tiny_avit()
    batches = clear_images(model, 13).split([5, 8])
    with torch.no_grad():
        expected = [model(batch).logits for batch in batches]

    def wrong_answers(index):
        with torch.no_grad():
            answers = [model(batches[index], remove_tokens=bool(index)).logits for _ in range(20)]
        return sum(not torch.allclose(answer, expected[index], atol=1e-5) for answer in answers)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong_answers, range(2))) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("remove", [False, True], ids=["masked", "removed"])
@torch.no_grad()
def test_half_precision_is_finite_also_where_all_have_halted(dtype, remove):
    model = planted_avit(cls_depth=1).to(dtype)
    depths = torch.ones(4, NUM_PATCHES, dtype=torch.long)
    depths[0] = NUM_BLOCKS
    out = model(planted_images(depths), remove_tokens=remove)
    assert out.logits.dtype == dtype and torch.isfinite(out.logits).all()
    assert out.exit_layer.tolist() == [NUM_BLOCKS, 1, 1, 1]
    if not remove:
        assert torch.isfinite(out.distribution_loss)


def test_autocast_trains():
    model = tiny_avit().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tiny_images(3), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.backbone.embeddings.cls_token.grad).all()


# -- a model of transformers -------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_saved_and_loaded(kind, tmp_path):
    model, images = tiny_avit(kind, ponder_weight=0.25), tiny_images(3)
    model.save_pretrained(tmp_path)
    for auto in (AViT, AutoModel, AutoModelForImageClassification):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is AViT and not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is AViTConfig and (config.gate_center, config.ponder_weight) == (
        model.config.gate_center,
        0.25,
    )
    # names that transformers 4 gives, whichever version saves
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {
        "backbone.encoder.layer.0.attention.attention.query.weight",
        "backbone.encoder.layer.5.output.dense.bias",
        "classifiers.0.weight",
    } <= names


def test_a_run_is_resumed_under_the_names_of_files(tmp_path):
    model = tiny_avit()
    model.save_pretrained(tmp_path)
    other = AViT(model.config).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(tiny_images(2)).logits, model(tiny_images(2)).logits)


@every_kind
@torch.no_grad()
def test_from_a_folder_as_from_an_object(kind, tmp_path):
    native, images = tiny_native(kind), tiny_images(3)
    native.save_pretrained(tmp_path)
    of_folder = AViT.from_backbone(str(tmp_path), gate="student")
    of_object = AViT.from_backbone(native, gate="student")
    assert (of_folder.config.gate_scale, of_folder.config.gate_center) == (5.0, 10.0)
    assert of_folder.config.distilled == (kind == "deit") and of_folder.config.num_labels == NUM_LABELS
    assert torch.equal(of_folder(images).logits, of_object(images).logits)


def test_a_classifier_for_other_labels_is_new(caplog):
    model = AViT.from_backbone(tiny_native("vit"), num_labels=3)
    assert model(tiny_images(2)).logits.shape == (2, 3) and "classifier is new" in caplog.text
    bare = AViT.from_backbone(tiny_native("vit", bare=True), num_labels=3)
    assert bare(tiny_images(2)).logits.shape == (2, 3)


def test_bad_backbones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'swin'.*takes 'vit' and 'deit'"):
        AViT.from_backbone(tiny_native("swin"))
    with pytest.raises(ValueError, match="no classifier; give num_labels"):
        AViT.from_backbone(tiny_native("vit", bare=True))
    with pytest.raises(ValueError, match="'gate_centre' is no field"):
        AViT.from_backbone(tiny_native("vit"), gate_centre=3.0)
    tiny_native("vit").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="from_backbone"):
        AViT.from_pretrained(tmp_path / "plain")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(OSError, match="pickle"):
        AViT.from_pretrained(tmp_path / "pickle")


def test_attention_is_ours_and_the_users_choice_is_kept(tmp_path):
    native = tiny_native("vit")
    model = AViT.from_backbone(native)
    assert model.config._attn_implementation in ("sdpa", "eager")
    model.set_attn_implementation("eager")
    assert model(tiny_images(2)).logits.shape == (2, NUM_LABELS)
    with pytest.raises(ValueError, match='attn_implementation="performer"'):
        model.set_attn_implementation("performer")
    assert native.config._attn_implementation in ("sdpa", "eager")
    model.save_pretrained(tmp_path)
    assert "live_tokens" not in (tmp_path / "config.json").read_text()


def test_bad_batches_are_refused():
    model = tiny_avit()
    for pixels in (None, torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)):
        with pytest.raises(ValueError, match="pixel_values"):
            model(pixels)
    with pytest.raises(ValueError, match="labels: 5 is outside"):
        model(tiny_images(1), labels=torch.tensor([5]))
    with pytest.raises(ValueError):
        model(tiny_images(1, size=24))
    assert model(tiny_images(1, size=24), interpolate_pos_encoding=True).token_depth.shape == (1, 37)


def test_pipeline_answers():
    model, processor = tiny_avit(), ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    image = Image.new("RGB", (20, 20), (200, 30, 90))
    answer = pipeline("image-classification", model=model, image_processor=processor, device="cpu")(image, top_k=2)
    with torch.no_grad():
        expected = model(processor(image, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0].topk(2)
    assert [entry["score"] for entry in answer] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert [entry["label"] for entry in answer] == [f"LABEL_{label}" for label in expected.indices.tolist()]


# -- config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_positions": [2]}, "exit_positions.*does not go with halting"),
        ({"exits": []}, "exits.*does not go with halting"),
        ({"gate": "huge"}, "gate: 'huge' must be one of tiny, small, student"),
        ({"gate": "tiny", "gate_scale": 3.0}, "give either"),
        ({"gate_scale": 0}, "gate_scale: 0 must be a number above 0"),
        ({"gate_center": "30"}, "gate_center: '30' must be a number"),
        ({"eps": 1.0}, "eps: 1.0 must be a number above 0 and below 1"),
        ({"ponder_weight": -1}, "ponder_weight: -1 must be a number at least 0"),
        ({"target_depth": 12}, "target_depth: 12 must be a number above 0 and below 12"),
        ({"backbone": "swin"}, "backbone: 'swin' must be one of vit, deit"),
        ({"distilled": True}, "distilled: True needs"),
    ],
)
def test_bad_settings_fail_when_the_config_is_built(settings, message):
    with pytest.raises(ValueError, match=message):
        AViTConfig(**settings)


def test_presets_and_defaults():
    gates = {name: AViTConfig(gate=name) for name in ("tiny", "small", "student")}
    assert [(c.gate_scale, c.gate_center) for c in gates.values()] == [(10, 30), (10, 75), (5, 10)]
    config = AViTConfig()
    assert (config.gate_scale, config.gate_center, config.eps) == (10, 30, 0.01)
    assert (config.ponder_weight, config.distribution_weight, config.target_depth) == (5e-4, 1e-3, 8)
    assert AViTConfig(num_hidden_layers=6).target_depth == 4


def test_settings_survive_a_round_trip(tmp_path):
    config = AViTConfig(gate="student", target_depth=5.5, published_target=True, backbone="deit", distilled=True)
    config.save_pretrained(tmp_path)
    again = AViTConfig.from_pretrained(tmp_path)
    for name in ("gate_scale", "gate_center", "target_depth", "published_target", "backbone", "distilled"):
        assert getattr(again, name) == getattr(config, name)
    assert AViTConfig.from_pretrained(tmp_path, gate="small").gate_center == 75


# -- official checkpoints ----------------------------------------------------------------------------------


def original_state(distilled=False):
    """Timm's names, random values: 64 wide, one head, two blocks, 8 x 8 pixels."""
    prefix = 2 if distilled else 1
    shapes = {"cls_token": (1, 1, 64), "pos_embed": (1, 4 + prefix, 64), "patch_embed.proj": (64, 3, 4, 4)}
    for block in range(2):
        parts = {"norm1": (64,), "attn.qkv": (192, 64), "attn.proj": (64, 64), "norm2": (64,)}
        parts |= {"mlp.fc1": (96, 64), "mlp.fc2": (64, 96)}
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in parts.items()}
    shapes |= {"norm": (64,), "head": (3, 64)}
    if distilled:
        shapes |= {"dist_token": (1, 1, 64), "head_dist": (3, 64)}
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("token", "embed")):
            state[name] = torch.randn(shape)
        else:
            state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return state


@pytest.mark.parametrize("distilled", [False, True])
def test_training_checkpoint_is_read_without_running_it(tmp_path, distilled):
    content = {"model": original_state(distilled), "args": argparse.Namespace(lr=5e-4, data="x"), "epoch": 99}
    torch.save(content, tmp_path / "avit_tiny-10-30.pth")
    config = convert_avit(tmp_path / "avit_tiny-10-30.pth", tmp_path / "ours")
    assert (config.gate_scale, config.gate_center, config.distilled) == (10, 30, distilled)
    assert (config.hidden_size, config.num_hidden_layers, config.image_size, config.num_labels) == (64, 2, 8, 3)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("ran",))

    (tmp_path / "avit-10-30.pth").write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    with pytest.raises(OSError, match="is not run"):
        convert_avit(tmp_path / "avit-10-30.pth", tmp_path / "ours")


def test_all_of_a_checkpoint_is_understood_or_nothing_is_written(tmp_path):
    def convert(state, **settings):
        save_file(state, tmp_path / "weights.safetensors")
        return convert_avit(tmp_path / "weights.safetensors", tmp_path / "ours", **settings)

    gate = {"gate_scale": 10, "gate_center": 75}
    with pytest.raises(ValueError, match="give both --gate-scale and --gate-center"):
        convert(original_state(), gate_scale=10)
    with pytest.raises(ValueError, match=r"1 tensors have no place in the model \(extra.weight\)"):
        convert({**original_state(), "extra.weight": torch.zeros(1)}, **gate)
    state = original_state()
    del state["blocks.1.norm2.bias"]
    with pytest.raises(ValueError, match=r"weights.safetensors: 1 tensors are missing.*1.layernorm_after.bias"):
        convert(state, **gate)
    with pytest.raises(ValueError, match="not a checkpoint of A-ViT"):
        convert({"weight": torch.zeros(1)}, **gate)
    assert not (tmp_path / "ours").exists()
    (tmp_path / "config.json").write_text(json.dumps({**gate, "num_attention_heads": 2, "eps": 0.02}))
    config = convert(original_state())
    assert (config.gate_center, config.num_attention_heads, config.eps) == (75, 2, 0.02)


def test_scrambled_weights_are_kept(tmp_path):
    """A new model of random weights is a model, too."""
    seeded()
    model = scrambled(AViT(AViTConfig(**tiny_backbone_settings("vit"), gate_scale=1.0, gate_center=1.0)))
    assert model(tiny_images(2)).logits.shape == (2, NUM_LABELS)


def test_from_the_command_line(shared, tmp_path, capsys):
    """The reference checkpoint's own tensors, under the name of an official file."""
    stored = load_file(shared / "reference" / "avit_hard.safetensors")
    weights = {name.removeprefix("param."): tensor for name, tensor in stored.items() if name.startswith("param.")}
    save_file(weights, tmp_path / "tiny-10-12.safetensors")
    command = ["convert", "--from", "avit", str(tmp_path / "tiny-10-12.safetensors"), str(tmp_path / "out")]
    assert main([*command, "--num-attention-heads", "3"]) == 0
    assert "gate 10 and 12" in capsys.readouterr().out
    assert AViT.from_pretrained(tmp_path / "out").config.gate_center == 12
    command[2] = "lgvit"
    assert main([*command, "--gate-scale", "3"]) == 2
    assert "--gate-scale goes with --from avit" in capsys.readouterr().err


def test_no_onnx(tmp_path):
    pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    from lgvit_hf import export_onnx

    model = AViT(AViTConfig(hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ValueError, match="an AViT does not export to ONNX"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
