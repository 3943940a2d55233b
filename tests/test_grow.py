"""`lgvit grow`: exits for plain checkpoints, from cached states; stopped and gone on with; chosen by cost."""

import itertools
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from lgvit_hf import ViTHighway, grow
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.evaluation import cost_table as cost_tables
from lgvit_hf.evaluation.calibration import calibrate
from lgvit_hf.evaluation.cost_table import measured_costs
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.evaluation.timing import PartTimes
from lgvit_hf.heads import HEADS, HeadShape, build_head
from lgvit_hf.losses import distillation_loss
from lgvit_hf.segments import Tokens
from lgvit_hf.training import cached_states as cached
from lgvit_hf.training import distill_exits as growth
from lgvit_hf.training.cached_states import HeadTraining, TokenShape, bytes_per_image, open_cache, token_shapes
from tests.seeds import seeded
from tests.tiny import IMAGE_SIZE, KINDS, NUM_LABELS, tiny_dataset, tiny_images, tiny_model, tiny_native

version_independent = pytest.mark.version_independent
# random backbones agree with nobody: any drop is allowed, so that exits are chosen
LENIENT = {"max_accuracy_drop": 1.0, "cost": "macs", "training": HeadTraining(epochs=2)}
SMALL = {**LENIENT, "exit_positions": [1, 2, 4], "exit_types": ["mlp", "conv1_1", "linear"]}


@pytest.fixture(scope="module")
def images():
    return [{"pixel_values": pixels} for pixels in tiny_images(160)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "plain"
    tiny_native("vit").save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(tiny_images(80).sigmoid()):
        Image.fromarray((255 * pixels.permute(1, 2, 0)).byte().numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def whole(plain, images, tmp_path_factory):
    """The folder of a run that nothing stops."""
    output = tmp_path_factory.mktemp("grown") / "whole"
    grow(plain, images, output, **SMALL)
    return output


# -- the whole way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_final_answers_are_the_plain_checkpoint_s(kind, images, tmp_path):
    tiny_native(kind).save_pretrained(tmp_path / "plain")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "plain")
    grown = grow(tmp_path / "plain", images, tmp_path / "out", **SMALL)
    # what it was made from, and the states, are gone or as they were
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "grow.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    native = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.exit_policy == grown.model.exit_policy
    pixels = tiny_images(9, seed=3)
    with torch.no_grad():
        expected = native(pixels).logits
        assert torch.equal(model(pixels, early_exit=False).logits, expected)
        early = model(pixels)
        model.set_exit_policy("never")
        assert torch.equal(model(pixels).logits, expected)
    assert set(early.exit_layer.tolist()) <= {*model.config.exit_positions, model.config.num_blocks}
    report = json.loads((tmp_path / "out" / "grow.json").read_text())
    assert report["images"] == {"trained": 128, "held_out": 32, "labels": False}
    assert [row["exit_layer"] for row in report["candidates"] if row["kept"]] == model.config.exit_positions


@pytest.mark.parametrize("kind", ["deit", "swin"])
def test_a_base_of_our_own_grows_too(kind, images, tmp_path):
    """What `lgvit train --stage backbone` saves: a highway without exits."""
    images = images[:60]
    base = tiny_model(kind, exit_positions=[], exit_types=[])
    base.save_pretrained(tmp_path / "base")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "base")
    pixels = tiny_images(9, seed=3)
    for start in (tmp_path / "base", base):
        model = grow(start, images, **SMALL).model
        with torch.no_grad():
            assert torch.equal(model(pixels, early_exit=False).logits, base(pixels).logits)
        assert model.exits and not base.exits
    with pytest.raises(ValueError, match="has exits already"):
        grow(model, images, **SMALL)


def test_heads_come_from_the_cache_and_the_backbone_is_not_touched(images):
    native = tiny_native("vit")
    before = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    model = grow(native, images, **SMALL).model
    for name, tensor in native.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(model.state_dict()[name], before[name])
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_exits_learn_from_the_full_model(images):
    """Which finds every image in the class that its colour, red or green, decides."""
    native = tiny_native("vit")
    colours = torch.tensor([[1.0, -1, 0], [-1, 1, 0]])[:, :, None, None]
    images = [{"pixel_values": colours[index % 2] + 0.01 * row["pixel_values"]} for index, row in enumerate(images)]
    with torch.no_grad():
        # the difference of the two answers decides, half-way between them
        hidden = native.vit(torch.stack([row["pixel_values"] for row in images])).last_hidden_state[:, 0]
        red, green = hidden[::2].mean(0), hidden[1::2].mean(0)
        direction = 8 * (red - green) / (red - green).square().sum()
        native.classifier.weight[:2] = torch.stack([direction, -direction])
        native.classifier.bias[:2] = torch.stack([-direction @ (red + green) / 2, direction @ (red + green) / 2])
        native.classifier.weight[2:], native.classifier.bias[2:] = 0.0, -9.0
    learnt = grow(native, images, **{**SMALL, "training": HeadTraining(epochs=15)}).report["candidates"]
    for row in learnt:
        assert row["agreement"] == 1.0, row


@version_independent
def test_labels_are_used_for_the_choice_alone(images):
    rows = tiny_dataset(160)
    with_labels = grow(tiny_native("vit"), rows, **SMALL)
    without = grow(tiny_native("vit"), rows, ignore_labels=True, **SMALL)
    assert with_labels.report["images"]["labels"] and not without.report["images"]["labels"]
    assert "accuracy" in with_labels.report["candidates"][0] and "agreement" in without.report["candidates"][0]
    # full model on its own answers
    assert without.report["overall"]["accuracy_full_model"] == 1.0
    assert with_labels.report["overall"]["accuracy_full_model"] < 1.0
    kept = [row["exit_layer"] for row in with_labels.report["candidates"] if row["kept"]]
    assert kept == with_labels.model.config.exit_positions


def test_labels_are_matched_by_name(plain, photos):
    native = tiny_native("vit", id2label={index: f"c{index}" for index in range(NUM_LABELS)})
    model = ViTHighway.from_backbone(native, exit_positions=[1], exit_types="mlp")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["c3", "c0"])}
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 200)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1]}, datasets.Features(features))
    items = growth.labelled_items(rows, model, make_processor(IMAGE_SIZE), False)
    assert [item["labels"] for item in (items[0], items[1])] == [3, 0]
    assert "labels" not in growth.labelled_items(rows, model, make_processor(IMAGE_SIZE), True)[0]
    strange = rows.cast_column("label", datasets.ClassLabel(names=["c3", "cat"]))
    with pytest.raises(ValueError, match="class 'cat' is none of the model's"):
        growth.labelled_items(strange, model, make_processor(IMAGE_SIZE), False)


# -- stopping and going on -----------------------------------------------------------------------------------------


class Stops(list):
    """Rows of which one stops the run, once."""

    at = None

    def __getitem__(self, index):
        if self.at is not None and index == self.at:
            self.at = None
            raise KeyboardInterrupt
        return super().__getitem__(index)


def stop_call(monkeypatch, module, name, number):
    """Make a function raise at its `number`-th call."""
    function, calls = getattr(module, name), itertools.count(1)

    def stopping(*arguments, **options):
        if next(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, stopping)


@version_independent
@pytest.mark.parametrize(
    "where", ["caching", "recording", "first exit", "last exit", "saving a head", "timing", "saving"]
)
def test_a_stopped_run_goes_on_to_the_same_model(where, whole, plain, images, tmp_path, monkeypatch):
    rows, said = Stops(images), []
    # the last row of the permutation's middle batch
    rows.at = (
        torch.randperm(160, generator=torch.Generator().manual_seed(0))[100].item() if where == "caching" else None
    )
    module, name, number = {
        "recording": (cached, "write_json", 3),
        "first exit": (cached, "train_head", 1),
        "last exit": (cached, "train_head", 3),
        "saving a head": (cached, "save_file", 2),
        "timing": (growth, "judge", 1),
        "saving": (growth, "write_json", 1),
    }.get(where, (None, None, None))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if module is not None:
            stop_call(patch, module, name, number)
        grow(plain, rows, tmp_path / "out", **SMALL, say=said.append)
    assert "the same command goes on" in said[-1] and not (tmp_path / "out").exists()

    batches, trained = [], []
    pack, train_head = TokenShape.pack, cached.train_head
    monkeypatch.setattr(TokenShape, "pack", lambda *given: batches.append(1) or pack(*given))
    monkeypatch.setattr(cached, "train_head", lambda *args: trained.append(1) or train_head(*args))
    grow(plain, rows, tmp_path / "out", **SMALL)
    # of three batches at three exits, and of three exits
    assert len(batches) == {"caching": 6, "recording": 6}.get(where, 0)
    assert len(trained) == {"last exit": 1, "saving a head": 2, "timing": 0, "saving": 0}.get(where, 3)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()
    assert not (tmp_path / ".out-states").exists()


@pytest.fixture
def stopped(plain, images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_call(patch, cached, "train_head", 3)
        grow(plain, images, tmp_path / "out", **SMALL)
    return tmp_path / ".out-states"


@version_independent
def test_states_of_another_run_are_not_mixed_in(stopped, plain, images, tmp_path):
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    for changes, message in (
        ({"exit_positions": [1, 2, 5]}, "other exit_positions"),
        ({"exit_types": "mlp"}, "other exit_types, shapes"),
        ({"seed": 1}, "other seed"),
        ({"limit": 100}, "other rows"),
    ):
        with pytest.raises(ValueError, match=message):
            grow(plain, images, tmp_path / "out", **{**SMALL, **changes})
        assert {file.name: file.read_bytes() for file in stopped.iterdir()} == before


@version_independent
def test_states_of_other_images_or_weights_are_not_mixed_in(stopped, plain, images, tmp_path):
    changed = [*images[:70], {"pixel_values": images[70]["pixel_values"] + 1e-3}, *images[71:]]
    with pytest.raises(ValueError, match="other images or labels"):
        grow(plain, changed, tmp_path / "out", **SMALL)
    with pytest.raises(ValueError, match="other images or labels"):
        grow(plain, [{**row, "labels": 0} for row in images], tmp_path / "out", **SMALL)
    with pytest.raises(ValueError, match="other checkpoint"):
        grow(tiny_native("vit", seed=1), images, tmp_path / "out", **SMALL)


@version_independent
def test_other_training_keeps_the_states(stopped, plain, images, tmp_path, monkeypatch):
    other = {**SMALL, "training": HeadTraining(epochs=3)}
    expected = grow(plain, images, **other).model.state_dict()
    monkeypatch.setattr(TokenShape, "pack", None)
    resumed = grow(plain, images, tmp_path / "out", **other).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_ctrl_c_in_the_command(plain, photos, tmp_path, monkeypatch, capsys):
    command = ["grow", plain, photos, tmp_path / "out", "--epochs", 1, "--max-accuracy-drop", 1, "--cost", "macs"]
    command = [str(word) for word in command]
    with monkeypatch.context() as patch:
        stop_call(patch, cached, "train_head", 2)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "64 images to train 3 exits on, 16 to choose on" in out and "layer speed-up" in out
    # a finished run is not overwritten
    assert main(command) == 2 and "exists and is not an empty folder" in capsys.readouterr().err


# -- the cache -----------------------------------------------------------------------------------------------------


@version_independent
def test_the_cache_stays_within_its_limit(plain, images, tmp_path, monkeypatch):
    sizes, train_exits, said = [], cached.train_exits, []

    class Measured(Exception):
        pass

    def measuring(model, cache, *arguments, **options):
        sizes.append(sum(file.stat().st_size for file in cache.folder.glob("*.npy")))
        if len(sizes) == 1:
            raise Measured
        return train_exits(model, cache, *arguments, **options)

    monkeypatch.setattr(cached, "train_exits", measuring)
    with pytest.raises(Measured):
        grow(plain, images, tmp_path / "out", **SMALL)
    limit = sizes[0] * 0.6 / 1e9
    report = grow(plain, images, tmp_path / "less", **SMALL, cache_limit=limit, say=said.append).report
    # each file has a header of 128 bytes
    assert sizes[1] - 5 * 128 <= limit * 1e9 < sizes[0]
    assert sum(report["images"][part] for part in ("trained", "held_out")) == pytest.approx(96, abs=2)
    assert "drawn at random, fit into the cache limit" in said[0]
    with pytest.raises(ValueError, match="cache_limit: 0.0001 GB hold the states of"):
        grow(plain, images, tmp_path / "none", **SMALL, cache_limit=1e-4)


@version_independent
def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cached.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    shapes = [TokenShape(1, (4, 4), 32)]
    with pytest.raises(OSError, match="the disk has 0.0 GB left"):
        open_cache(tmp_path / "states", shapes, 1000, 5, {})
    assert not (tmp_path / "states").exists()


@version_independent
def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "diary.txt").touch()
    with pytest.raises(ValueError, match="other files are there"):
        open_cache(tmp_path / "states", [], 10, 5, {})


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_head_reads_is_kept(kind):
    names = ["linear", "average", "concat", "mlp"]
    model = tiny_model(kind, exit_positions=[1, 2, 4, 5], exit_types=names)
    shapes = token_shapes(model, tiny_images(2))
    # Swin has no prefix token: a mean, and of concat the largest and the smallest value of each channel as well
    prefix = {"vit": 1, "deit": 2, "deit_plain": 1, "swin": 0}[kind]
    assert [shape.reduced for shape in shapes] == [prefix or 1, prefix or 1, prefix + 1 if prefix else 3, None]
    assert shapes[-1].of_sample[0] == prefix + shapes[-1].grid[0] * shapes[-1].grid[1]
    assert bytes_per_image(shapes, NUM_LABELS) == 2 * sum(np.prod(shape.of_sample) for shape in shapes) + 28


@version_independent
@pytest.mark.parametrize("name", sorted({*HEADS, "attention_r2"} - {"attention"}))
def test_half_precision_changes_no_answer(name):
    seeded()
    head = build_head(name, HeadShape(32, 1, 5, num_attention_heads=4, intermediate_size=64)).eval()
    tokens = Tokens(torch.randn(64, 16, 32), (4, 4), torch.randn(64, 1, 32))
    with torch.no_grad():
        reduced = head.reduce(tokens)
        shape = TokenShape(1, (4, 4), 32, None if reduced is None else reduced.shape[1])
        cached = shape.answer(head, shape.pack(head, tokens).float())
        torch.testing.assert_close(cached, head.answer(tokens), atol=3e-3, rtol=0)
        huge = shape.pack(head, Tokens(tokens.patches * 1e6, (4, 4), tokens.prefix))
    assert huge.isfinite().all()


@version_independent
def test_an_epoch_is_distillation_on_every_stretch():
    shape, states, teacher = TokenShape(1, (2, 2), 8), torch.randn(40, 5, 8).half(), torch.randn(40, 3)
    head, seen = build_head("mlp", HeadShape(8, 1, 3)), []

    def step():
        seen.append(head.body.widen.weight.grad.clone())
        head.zero_grad()

    seeded(1)
    cached.run_epoch(head, states, teacher, shape, 8, 2.0, step)
    seeded(1)
    stretches = list(cached.shuffled_slices(40, 8))
    assert len(seen) == len(stretches) == 4
    covered = sorted(row for stretch in stretches for row in range(stretch.start, stretch.stop))
    assert covered == list(range(covered[0], covered[0] + 32))
    for stretch, gradient in zip(stretches, seen, strict=True):
        patches, prefix = states[stretch, 1:].float(), states[stretch, :1].float()
        loss = distillation_loss(head(Tokens(patches, (2, 2), prefix))[0], teacher[stretch], 2.0)
        torch.testing.assert_close(torch.autograd.grad(loss, head.body.widen.weight)[0], gradient)


@version_independent
def test_every_epoch_begins_at_another_sample_and_in_another_order():
    epochs = [[stretch.start for stretch in cached.shuffled_slices(40, 8)] for _ in range(30)]
    assert len({min(starts) for starts in epochs}) > 1
    assert len({tuple(start - min(starts) for start in starts) for starts in epochs}) > 1


# -- the choice ----------------------------------------------------------------------------------------------------


def tables_of(monkeypatch):
    """What `grow` calibrates on, and what comes of it."""
    calls = []

    def recording(table, **wanted):
        calls.append((table, wanted, calibrate(table, **wanted)))
        return calls[-1][2]

    monkeypatch.setattr(growth, "calibrate", recording)
    return calls


@pytest.mark.parametrize("labelled", [True, False])
def test_the_model_answers_as_its_calibration_on_all_candidates(labelled, monkeypatch):
    calls, rows = tables_of(monkeypatch), tiny_dataset(120)
    grown = grow(tiny_native("vit"), rows, ignore_labels=not labelled, **SMALL)
    [(table, wanted, found)] = calls
    assert wanted["labels"] == (True if labelled else "expected") and wanted["policy"] == "auto"
    choice, config = grown.report["choice"], grown.model.config
    assert config.exit_positions == [SMALL["exit_positions"][index] for index in found.exits]
    assert choice["policy"] == grown.model.exit_policy.to_dict() == config.exit_policy
    assert (choice["cost"], choice["drop"]) == (found.mean_macs, found.full_accuracy - found.accuracy)
    assert choice["samples_tested"] == 12 and table.costs.backbone == pytest.approx(1)
    for rung, whole in zip(choice["ladder"], found.ladder, strict=True):
        restricted = table.with_exits(found.exits).replay(rung["policy"])
        assert torch.equal(restricted.exit_layer, table.replay(whole["policy"]).exit_layer)
    # the heads read cached states in half precision
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        segments = grown.model(pixels, early_exit=False).exit_logits
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[96:]
    torch.testing.assert_close(
        table.with_exits(found.exits).logits, torch.stack(segments)[:, order], atol=1e-2, rtol=0
    )


@version_independent
def test_no_exit_that_pays_is_an_error(images, monkeypatch):
    monkeypatch.setattr(growth, "model_macs", lambda model: Costs([1.0] * 4, [10.0, 10.0, 10.0, 0.0]))
    with pytest.raises(ValueError, match="no exit is cheaper than the full model within an accuracy drop of 1;"):
        grow(tiny_native("vit"), images, **SMALL)


def test_measured_costs_are_shares_of_the_full_model(monkeypatch):
    model, sizes = tiny_model("vit"), []

    def clock(segments, state, policy):
        """Every part takes as long as its number says, in two of three walks; of the large batch, twice the blocks."""
        sizes.append(state.batch_size)
        times = range(1, 6) if sizes.count(state.batch_size) % 3 else [99.0] * 5
        blocks = [[seconds * (1 if state.batch_size == 1 else 2)] for seconds in times]
        return PartTimes(blocks, [0.5 * seconds for seconds in times], [0.0] * 5)

    monkeypatch.setattr(cost_tables, "time_parts", clock)
    costs = measured_costs(model, tiny_images(8), repeats=3)
    assert set(sizes) == {1, 8}
    # five segments: blocks of 1, ..., 5 and a final classifier of 2.5, or blocks twice as long
    for index in range(5):
        assert costs.backbone_costs[index] == pytest.approx(((index + 1) / 17.5 + 2 * (index + 1) / 32.5) / 2)
        assert costs.heads[index] == pytest.approx((0.5 * (index + 1) / 17.5 + 0.5 * (index + 1) / 32.5) / 2)
    assert costs.backbone == pytest.approx(1)


# -- what cannot be grown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": []}, "0 images are too few"),
        ({"dataset": tiny_dataset(20)}, "20 images are too few"),
        ({"dataset": [{"pixel_values": torch.zeros(1, 16, 16)}] * 60}, "the model takes 3 channels"),
        ({"dataset": [{"pixel_values": torch.randn(3, 16, 16), "labels": 7}] * 60}, "7 is outside 0..4"),
        ({"checkpoint": tiny_model("vit")}, "has exits already"),
        ({"checkpoint": tiny_native("vit", num_labels=1)}, "answers with other numbers"),
        ({"exit_positions": []}, "must name at least one block"),
        ({"exit_positions": [9]}, r"exit_positions: \[9\]"),
        ({"exit_types": "conv9"}, "unknown head 'conv9'"),
        ({"cost": "euros"}, "cost: 'euros' must be"),
        ({"validation_share": 1.5}, "validation_share: 1.5"),
        ({"validation_share": 0.1}, "6 of 60 images are held out, and 8 are needed to choose on"),
        ({"max_accuracy_drop": -0.01}, "max_accuracy_drop: -0.01 must be from 0 to 1"),
        ({"max_accuracy_drop": 1.5}, "max_accuracy_drop: 1.5"),
        ({"max_accuracy_drop": float("nan")}, "max_accuracy_drop: nan"),
        ({"cache_limit": 0}, "cache_limit: 0 must be"),
        ({"limit": -5}, "limit: -5 images are too few"),
    ],
)
def test_bad_input(changes, message, tmp_path):
    given = {"checkpoint": tiny_native("vit"), "dataset": tiny_dataset(60), **LENIENT, **changes}
    with pytest.raises(ValueError, match=message):
        grow(**given)


@version_independent
def test_bad_training_settings():
    for name, value, message in (
        ("epochs", 0, "above 0"),
        ("epochs", 1.5, "a whole number"),
        ("learning_rate", -1e-3, "above 0"),
        ("learning_rate", float("inf"), "finite"),
        ("batch_size", 0, "above 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("temperature", float("nan"), "above 0"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {value} must be .*{message}"):
            HeadTraining(**{name: value})


@version_independent
@pytest.mark.parametrize("where", ["fill_cache", "train_exits", "calibrate", "judge"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_states_do_not_outlive_a_run_that_fails(where, error, plain, images, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error("no exit pays")

    monkeypatch.setattr(cached if hasattr(cached, where) else growth, where, fail)
    monkeypatch.setattr(growth.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for output in (None, tmp_path / "out"):
        with pytest.raises(error, match="no exit pays"):
            grow(plain, images, output, **SMALL)
    # a run that was stopped goes on, if it has a name
    left = [".out-states"] if error is KeyboardInterrupt else []
    assert [file.name for file in tmp_path.glob(".*")] == left
    assert not any((tmp_path / "temporary").glob("lgvit-*"))


@version_independent
def test_a_wrong_setting_leaves_the_states_of_a_stopped_run(stopped, plain, images, tmp_path):
    before = {file.name: file.read_bytes() for file in stopped.iterdir()}
    for changes in ({"max_accuracy_drop": -1}, {"exit_types": "conv9"}, {"exit_positions": []}):
        with pytest.raises(ValueError):
            grow(plain, images, tmp_path / "out", **{**SMALL, **changes})
        assert {file.name: file.read_bytes() for file in stopped.iterdir()} == before


def test_bad_input_of_the_command(plain, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty", "digits"], "no config.json there"),
        ([plain, tmp_path / "nowhere.parquet"], "no such folder, Parquet file or archive"),
        ([plain, tmp_path / "empty"], "empty"),
        ([plain, "digits"], "class '0' is none of the model's"),
        ([plain, "digits", "--limit", 10, "--ignore-labels"], "10 images are too few"),
    ):
        assert main([str(word) for word in ("grow", *arguments[:2], tmp_path / "out", *arguments[2:])]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lgvit: ") and message in error
    assert not (tmp_path / "out").exists()


# -- a real model --------------------------------------------------------------------------------------------------


@version_independent
def test_a_real_vit(shared, tmp_path):
    checkpoint, images = shared / "models" / "fashion_vit", shared / "data" / "fashion_mnist"
    if not (checkpoint.is_dir() and images.is_dir()):
        pytest.skip(f"no {checkpoint} or {images}")
    grown = grow(
        checkpoint,
        str(images),
        tmp_path / "out",
        limit=400,
        ignore_labels=True,
        exit_positions=[1, 3],
        max_accuracy_drop=0.03,
        cost="macs",
        training=HeadTraining(epochs=8),
    )
    assert grown.report["overall"]["accuracy"] > 0.8 and grown.report["overall"]["macs_speed_up"] > 1.2
    saved, plain = load_file(tmp_path / "out" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.items())
