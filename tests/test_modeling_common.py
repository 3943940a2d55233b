"""What every backbone must do; `test_modeling_{vit,deit,swin}.py` say which."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)

from lgvit_hf.evaluation.exit_table import ExitTable
from lgvit_hf.policies import ConfidencePolicy
from tests.seeds import rng
from tests.tiny import (
    IMAGE_SIZE,
    KINDS,
    MODELS,
    NUM_BLOCKS,
    NUM_LABELS,
    scrambled,
    tiny_config,
    tiny_dataset,
    tiny_images,
    tiny_model,
    tiny_native,
)

POSITIONS = [2, 3, 5]
FINAL = len(POSITIONS)
# every head, each at one exit or another
MIXES = {
    "lgvit": "lgvit",
    "blocks": ["concat", "vit", "mlp"],
    "maps": ["conv_normal", "self_attention", "attention_r1"],
    "others": ["attention_r3", "average", "linear"],
}
every_head = pytest.mark.parametrize("heads", MIXES.values(), ids=MIXES)
UNREAD = ("relative_position_index", "num_batches_tracked")  # recomputed, or never looked at


def assert_close_to_largest(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same_answers(ours, expected):
    assert ours.exit_index.tolist() == expected.exit_index.tolist()
    assert ours.exit_layer.tolist() == expected.exit_layer.tolist()
    assert_close_to_largest(ours.logits, expected.logits)
    assert_close_to_largest(ours.exit_score, expected.exit_score)


def joined(answers):
    """The answers of single images as one batch."""
    fields = ("logits", "exit_layer", "exit_index", "exit_score")
    values = {field: torch.cat([getattr(answer, field) for answer in answers]) for field in fields}
    return type(answers[0])(**values)


def widest_gap(scores):
    """A threshold that rounding cannot cross: the middle of the widest gap in the inner part of the scores."""
    ordered = sorted(scores)
    inner = ordered[len(ordered) // 5 : 1 + 4 * len(ordered) // 5]
    gap, low = max((high - low, low) for low, high in zip(inner, inner[1:], strict=False))
    assert gap > 1e-4, "these scores cannot be told apart"
    return low + gap / 2


def policies_for(exit_logits):
    """Every policy, with thresholds that split the samples of these logits at each exit."""
    probs = [logits.double().softmax(-1) for logits in exit_logits[:-1]]
    confidence = [widest_gap(p.amax(-1).tolist()) for p in probs]
    entropy = [widest_gap((-(p * p.log()).sum(-1)).tolist()) for p in probs]
    # where every second exit is sure of all, half take the second; the others' streak starts there
    sure = [10.0 if index % 2 else threshold for index, threshold in enumerate(entropy)]
    margin = [widest_gap((p.topk(2).values[:, 0] - p.topk(2).values[:, 1]).tolist()) for p in probs]
    return [
        {"name": "confidence", "threshold": confidence},
        {"name": "entropy", "threshold": entropy},
        {"name": "margin", "threshold": margin},
        {"name": "confidence_entropy", "threshold": confidence, "entropy_threshold": entropy},
        {"name": "patience", "patience": 2},
        {"name": "patience_confidence", "threshold": sure, "patience": 2},
        {"name": "fixed", "exit_index": 1},
        {"name": "never"},
    ]


def images_without_ties(model, number):
    """Random images whose label rounding cannot change at any exit."""
    images = tiny_images(3 * number)
    with torch.no_grad():
        two = [logits.topk(2).values for logits in model(images, early_exit=False).exit_logits]
    images = images[torch.stack([best - second > 1e-3 for best, second in (t.unbind(-1) for t in two)]).all(0)]
    assert len(images) >= number
    return images[:number]


@torch.no_grad()
def moderate(model):
    """The model with logits about one apart at each exit: random weights may have probabilities that all are 1."""
    exit_logits = model(tiny_images(40, model.config.image_size), early_exit=False).exit_logits
    for head, logits in zip(model.exits, exit_logits[:-1], strict=True):
        spread = (logits.amax(-1) - logits.amin(-1)).mean()
        for classifier in head.classifiers:
            classifier.weight.div_(spread)
            classifier.bias.div_(spread)
    return model


def exit_in_gaps(model, images):
    """Set the confidence policy, with thresholds that rounding cannot cross on these images."""
    with torch.no_grad():
        exit_logits = model(images, early_exit=False).exit_logits
    thresholds = [widest_gap(logits.double().softmax(-1).amax(-1).tolist()) for logits in exit_logits[:-1]]
    model.set_exit_policy("confidence", threshold=thresholds)


def training_arguments(folder, **changes):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **{**settings, **quiet, **changes})


class AnyHighwayTesterMixin:
    """A backbone says its `kind` (see `tests/tiny.py`): what it answers, and how it is saved and cut."""

    kind: str

    def model(self, **changes):
        return tiny_model(self.kind, **{"exit_positions": POSITIONS, **changes})

    @pytest.fixture
    def saved(self, tmp_path):
        """A highway and the folder it is saved in."""
        model = self.model()
        model.save_pretrained(tmp_path / "highway")
        return model, tmp_path / "highway"

    def assert_backbone_of(self, native, highway):
        """All tensors of the backbone, whose names the plain model may begin as the highway does, or not at all."""
        prefix, theirs = f"{highway.base_model_prefix}.", native.state_dict()
        theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
        ours = highway.base_model.state_dict()
        assert ours and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        # what only models of images and texts have, and the classifiers
        others = {
            name
            for name in theirs.keys() - ours.keys()
            if not name.startswith(("head.", "post_layernorm.", "pooler."))
        }
        assert all("classifier" in name for name in others)

    def test_from_bare_backbone(self, tmp_path):
        bare = tiny_native(self.kind, bare=True)
        bare.save_pretrained(tmp_path)
        for source in (bare, tmp_path):
            with pytest.raises(ValueError, match="classifier.*num_labels"):
                MODELS[self.kind].from_backbone(source)
            highway, info = MODELS[self.kind].from_backbone(source, num_labels=4, output_loading_info=True)
            self.assert_backbone_of(bare, highway)
            new = {name.split(".")[0] for name in info["missing_keys"]}
            assert new <= {"exits", "classifier", "cls_classifier", "distillation_classifier"} and len(new) > 1
            assert highway(tiny_images(2)).logits.shape == (2, 4)

    # -- the law, saving, truncating -----------------------------------------------------------------------

    @every_head
    @torch.no_grad()
    def test_law(self, heads):
        model = moderate(self.model(exit_types=heads, num_labels=2))
        images = images_without_ties(model, 40)
        everything = model(images, early_exit=False)
        depths = [*POSITIONS, NUM_BLOCKS]
        table = ExitTable(torch.stack(everything.exit_logits), torch.zeros(40, dtype=torch.int64), depths)
        order = torch.randperm(40)
        for policy in policies_for(everything.exit_logits):
            model.set_exit_policy(policy)
            batch = model(images)
            assert_same_answers(batch, table.replay(policy))
            left = table.logits[batch.exit_index, torch.arange(40)]
            assert_close_to_largest(batch.logits, left)
            shuffled = model(images[order])
            for field in ("logits", "exit_layer", "exit_index", "exit_score"):
                shuffled[field] = shuffled[field][order.argsort()]
            assert_same_answers(shuffled, batch)
            if "threshold" in policy:
                assert len(set(batch.exit_index.tolist())) > 1, "the samples of this batch must take several exits"
            alone = joined([model(images[row : row + 1]) for row in range(8)])
            assert alone.exit_index.tolist() == batch.exit_index[:8].tolist()
            assert_close_to_largest(alone.logits, batch.logits[:8])
            assert_close_to_largest(alone.exit_score, batch.exit_score[:8])

    @torch.no_grad()
    def test_depths_and_indices(self):
        model, images = self.model(), tiny_images(3)
        everything = model(images, early_exit=False)
        assert len(everything.exit_logits) == len(everything.exit_features) == len(model.segments()) == FINAL + 1
        assert everything.exit_index.tolist() == [FINAL] * 3 and everything.exit_layer.tolist() == [NUM_BLOCKS] * 3
        for index, depth in enumerate([*POSITIONS, NUM_BLOCKS]):
            model.set_exit_policy("fixed", exit_index=index)
            out = model(images)
            assert out.exit_index.tolist() == [index] * 3 and out.exit_layer.tolist() == [depth] * 3
            assert out.exit_index.dtype == out.exit_layer.dtype == torch.int64
            assert_close_to_largest(out.logits, everything.exit_logits[index])
            assert model.segments()[index].depth == depth
            assert out.exit_logits is None and out.exit_features is None

    def assert_equal_models(self, ours, expected):
        """Equal tensors; the answers may differ by rounding, since kernels depend on where tensors lie in memory."""
        theirs = expected.state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
        ours.eval()
        assert ours.config.exit_policy == expected.config.exit_policy
        images, policy = tiny_images(8), expected.config.exit_policy
        exit_in_gaps(expected, images)
        ours.set_exit_policy(expected.config.exit_policy)
        with torch.no_grad():
            assert_same_answers(ours(images), expected(images))
            everything = [model(images, early_exit=False).exit_logits for model in (ours, expected)]
        expected.set_exit_policy(policy)
        for mine, other in zip(*everything, strict=True):
            assert_close_to_largest(mine, other, 1e-6)

    def test_save_and_load(self, saved):
        model, folder = saved
        again, info = MODELS[self.kind].from_pretrained(folder, output_loading_info=True)
        self.assert_equal_models(again, model)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert again.config.exit_positions == POSITIONS and again.config.exit_types == model.config.exit_types

    @pytest.mark.parametrize("heads", [MIXES["lgvit"], MIXES["blocks"]], ids=["lgvit", "blocks"])
    @torch.no_grad()
    def test_truncate(self, heads, tmp_path):
        model, images = self.model(exit_types=heads), tiny_images(4)
        exit_logits = model(images, early_exit=False).exit_logits
        sizes = []
        for index, depth in enumerate([*POSITIONS, NUM_BLOCKS]):
            small = model.truncate(index)
            assert type(small) is type(model) and not small.training
            small.save_pretrained(tmp_path / str(index))
            for static in (small, AutoModelForImageClassification.from_pretrained(tmp_path / str(index))):
                for early_exit in (True, False):
                    out = static(images, early_exit=early_exit)
                    assert_close_to_largest(out.logits, exit_logits[index])
                    assert out.exit_layer.tolist() == [depth] * 4 and out.exit_index.tolist() == [0] * 4
            sizes.append(sum(parameter.numel() for parameter in small.parameters()))
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.zero_()
        assert torch.equal(model(images, early_exit=False).exit_logits[-1], exit_logits[-1])
        assert sizes[:-1] == sorted(sizes[:-1]) and sizes[-1] < sum(
            parameter.numel() for parameter in model.parameters()
        )

    def test_loss_of_labels(self):
        each_own, labels = [0.3, 0.2, 0.5, 1.0], torch.tensor([0, 4, 2])
        for setting, weights in (("depth", [2, 3, 5, 6]), ("uniform", [1] * 4), (each_own, each_own)):
            model = self.model(exit_loss_weights=setting).train()
            out = model(tiny_images(3), labels=labels)
            each = [-logits.log_softmax(-1)[torch.arange(3), labels].mean() for logits in out.exit_logits]
            expected = sum(w * loss for w, loss in zip(weights, each, strict=True)) / sum(weights)
            torch.testing.assert_close(out.loss, expected)
            assert torch.equal(out.logits, out.exit_logits[-1])


class SomeHighwayTesterMixin(AnyHighwayTesterMixin):
    """And where it starts, of a backbone of which upstream has a classifier."""

    @pytest.fixture
    def plain(self, tmp_path):
        """A plain transformers model and the folder it is saved in."""
        native = tiny_native(self.kind)
        native.save_pretrained(tmp_path / "plain")
        return native, tmp_path / "plain"

    # -- warm start ----------------------------------------------------------------------------------------

    def assert_answers_as(self, native, highway):
        images = tiny_images(7).to(native.dtype)
        with torch.no_grad():
            expected = native(images).logits
            highway.set_exit_policy("never")
            assert torch.equal(highway(images).logits, expected)
            everything = highway(images, early_exit=False)
            assert torch.equal(everything.logits, expected) and torch.equal(everything.exit_logits[-1], expected)

    def test_from_backbone_answers_as_upstream_and_adds_only_exits(self, plain):
        for source in plain:
            highway, info = MODELS[self.kind].from_backbone(
                source, exit_positions=POSITIONS, exit_types="conv1_1", output_loading_info=True
            )
            self.assert_answers_as(plain[0], highway)
            exits = {name for name in highway.state_dict() if name.startswith("exits.") and not name.endswith(UNREAD)}
            assert exits and {name for name in info["missing_keys"] if not name.endswith(UNREAD)} == exits
            assert info["unexpected_keys"] == info["mismatched_keys"] == info["error_msgs"] == []
            assert highway.config.exit_positions == POSITIONS and not highway.training

    def test_new_exits_start_well(self, plain):
        start = {"running_var": 1.0, "running_mean": 0.0, "_bn.weight": 1.0, "_bn.bias": 0.0, "norm.weight": 1.0}
        for way in ("from_backbone", "from_pretrained"):
            load, seen = getattr(MODELS[self.kind], way), set()
            highway = load(plain[1], exit_positions=POSITIONS, exit_types=["conv1_1", "linear", "average"]).eval()
            for name, tensor in highway.exits.state_dict().items():
                assert tensor.isfinite().all() and tensor.abs().max() <= 1, name
                for end, value in start.items():
                    if name.endswith(end):
                        assert torch.equal(tensor, torch.full_like(tensor, value)), name
                        seen.add(end)
                if tensor.dim() > 1:
                    assert tensor.std() > 0, name
            assert seen == set(start)
            exit_logits = highway(tiny_images(2), early_exit=False).exit_logits
            assert all(logits.isfinite().all() for logits in exit_logits)

    def test_from_backbone_copies(self, plain):
        native, _ = plain
        before = {name: tensor.clone() for name, tensor in native.state_dict().items()}
        highway = MODELS[self.kind].from_backbone(native, exit_positions=POSITIONS)
        with torch.no_grad():
            for parameter in highway.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in native.state_dict().items())
        assert native.config.model_type != highway.config.model_type == f"{native.config.model_type}_highway"

    def test_from_backbone_with_another_number_of_labels(self, plain):
        native = plain[0]
        for source in plain:
            highway, info = MODELS[self.kind].from_backbone(
                source, exit_positions=[3], num_labels=9, output_loading_info=True
            )
            assert highway.config.num_labels == 9 and len(highway.config.id2label) == 9
            assert highway(tiny_images(2)).logits.shape == (2, 9)
            new = {name for name in info["missing_keys"] if not name.startswith("exits.")}
            assert new == {name for name in native.state_dict() if "classifier" in name} and new
            self.assert_backbone_of(native, highway)

    def test_from_backbone_keeps_labels_and_the_same_number_of_them(self, plain):
        native, _ = plain
        names = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}
        self.assert_answers_as(native, MODELS[self.kind].from_backbone(native, num_labels=NUM_LABELS))
        named = MODELS[self.kind].from_backbone(native, **names)
        self.assert_answers_as(native, named)
        assert named.config.id2label == names["id2label"] and named.config.label2id == names["label2id"]
        native.config.id2label, native.config.label2id = names["id2label"], names["label2id"]
        assert MODELS[self.kind].from_backbone(native).config.id2label == names["id2label"]

    def test_from_backbone_keeps_the_dtype(self):
        native = tiny_native(self.kind).to(torch.bfloat16)
        highway = MODELS[self.kind].from_backbone(native, exit_positions=[3])
        assert highway.dtype == torch.bfloat16
        self.assert_answers_as(native, highway)

    def test_from_backbone_misses_no_tensor_silently(self, plain):
        native, folder = plain
        tensors = load_file(folder / "model.safetensors")
        names = [name for name in sorted(tensors) if ".layer" in name and name.endswith("weight")]
        names = [name for name in names if ".head." not in name]  # of SigLIP, which no classifier reads
        for lost in (names[0], names[-1], next(name for name in sorted(tensors) if "classifier.weight" in name)):
            rest = {name: tensor for name, tensor in tensors.items() if name != lost}
            save_file(rest, folder / "model.safetensors", {"format": "pt"})
            for changes in ({}, {"num_labels": NUM_LABELS}):
                with pytest.raises(ValueError, match="tensor.*missing|no tensor"):
                    MODELS[self.kind].from_backbone(folder, **changes)
            with pytest.raises(ValueError, match="missing"):
                MODELS[self.kind].from_pretrained(folder, exit_positions=[3])

    def test_from_backbone_of_another_kind(self, tmp_path):
        others = [kind for kind in KINDS if MODELS[kind] is not MODELS[self.kind]]
        for kind in others:
            native = tiny_native(kind)
            native.save_pretrained(tmp_path / kind)
            for source in (native, tmp_path / kind):
                with pytest.raises(
                    (ValueError, TypeError), match=native.config.model_type + "|" + type(native).__name__
                ):
                    MODELS[self.kind].from_backbone(source, exit_positions=[3])

    def test_from_pretrained_of_a_plain_checkpoint_misses_only_exits(self, plain):
        native, folder = plain
        highway, info = MODELS[self.kind].from_pretrained(folder, exit_positions=POSITIONS, output_loading_info=True)
        assert info["missing_keys"] and all(name.startswith("exits.") for name in info["missing_keys"])
        self.assert_answers_as(native, highway.eval())


class HighwayTesterMixin(SomeHighwayTesterMixin):
    """A backbone also says its `pools`, and which sizes of images it takes."""

    pools = ("cls", "mean")
    image_sizes = ((24, 24), (16, 24), (32, 8))

    # -- saving and loading --------------------------------------------------------------------------------

    def test_a_copy_answers_alike(self, saved):
        self.assert_equal_models(copy.deepcopy(saved[0]), saved[0])

    def test_loading_with_another_policy(self, saved):
        policy = {"name": "fixed", "exit_index": 1}
        again = AutoModelForImageClassification.from_pretrained(saved[1], exit_policy=policy).eval()
        assert again(tiny_images(2)).exit_index.tolist() == [1, 1] and again.config.exit_policy == policy

    def test_loading_with_another_number_of_labels(self, saved):
        model, folder = saved
        again = MODELS[self.kind].from_pretrained(folder, num_labels=9, ignore_mismatched_sizes=True).eval()
        everything = again(tiny_images(2), early_exit=False)
        assert all(logits.shape == (2, 9) and logits.isfinite().all() for logits in everything.exit_logits)
        # only the classifiers are new
        theirs = model.state_dict()
        assert all(torch.equal(t, theirs[name]) for name, t in again.state_dict().items() if "classifier" not in name)
        with pytest.raises((ValueError, RuntimeError), match="mismatch"):
            MODELS[self.kind].from_pretrained(folder, num_labels=9)

    def test_exits_stay_where_they_were_trained(self, tmp_path):
        model = self.model(exit_types="conv1_1")
        model.save_pretrained(tmp_path)
        for changes in (
            {"exit_positions": [2, 4, 5], "exit_types": "conv1_1"},
            {"exit_positions": [2, 3], "exit_types": "conv1_1"},
            {"exit_types": "linear"},
            {"exit_types": ["conv1_1", "conv1_1", "conv2_1"]},
        ):
            with pytest.raises((ValueError, RuntimeError), match="exit_positions|exit_types|exits"):
                MODELS[self.kind].from_pretrained(tmp_path, **changes)
                pytest.fail(f"exits trained after {POSITIONS} were loaded as {changes}")
        same = {"exit_positions": POSITIONS, "exit_types": "conv1_1"}
        self.assert_equal_models(MODELS[self.kind].from_pretrained(tmp_path, **same), model)

    def test_auto_classes(self, saved):
        model, folder = saved
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is type(model.config)
        for auto in (AutoModelForImageClassification, AutoModel):
            again = auto.from_pretrained(folder)
            assert type(again) is MODELS[self.kind]
            self.assert_equal_models(again, model)
            assert type(auto.from_config(config)) is MODELS[self.kind]

    def test_a_highway_misses_no_tensor_silently(self, saved):
        model, folder = saved
        tensors = load_file(folder / "model.safetensors")
        names = [name for name in tensors if not name.endswith(UNREAD)]
        # one of each kind: blocks are alike, and so are the parts of a head
        chosen = {name.split(".")[-2] + name.split(".")[-1]: name for name in names}
        chosen |= {name.split(".")[0]: name for name in names}
        for name in chosen.values():
            rest = {key: value for key, value in tensors.items() if key != name}
            save_file(rest, folder / "model.safetensors", {"format": "pt"})
            with pytest.raises(ValueError, match="missing"):
                MODELS[self.kind].from_pretrained(folder)
                pytest.fail(f"loaded without {name}")

    def test_attention_implementations_agree(self, saved):
        model, folder = saved
        again = MODELS[self.kind].from_pretrained(folder, attn_implementation="eager").eval()
        assert again.config._attn_implementation == "eager" != model.config._attn_implementation
        with torch.no_grad():
            ours, expected = (m(tiny_images(3), early_exit=False).exit_logits for m in (again, model))
        for mine, theirs in zip(ours, expected, strict=True):
            assert_close_to_largest(mine, theirs)

    # -- the law -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_always_leaving(self):
        model = self.model()
        model.set_exit_policy("confidence", threshold=0.0)
        out = model(tiny_images(5))
        assert out.exit_index.tolist() == [0] * 5 and out.exit_layer.tolist() == [POSITIONS[0]] * 5
        probs = model(tiny_images(5), early_exit=False).exit_logits[0].softmax(-1)
        torch.testing.assert_close(out.exit_score, probs.amax(-1))

    @torch.no_grad()
    def test_max_depth_and_min_depth(self):
        model, images = self.model(), tiny_images(3)
        exit_logits = model(images, early_exit=False).exit_logits
        depths = [*POSITIONS, NUM_BLOCKS]
        for bound in range(POSITIONS[0], NUM_BLOCKS + 3):
            model.set_exit_policy("never")
            deepest = max(index for index, depth in enumerate(depths) if depth <= bound)
            out = model(images, max_depth=bound)
            assert out.exit_layer.tolist() == [depths[deepest]] * 3
            assert_close_to_largest(out.logits, exit_logits[deepest])
        model.set_exit_policy("confidence", threshold=0.0)
        for bound in range(NUM_BLOCKS + 1):
            shallowest = min(index for index, depth in enumerate(depths) if depth >= bound)
            assert model(images, min_depth=bound).exit_index.tolist() == [shallowest] * 3
        assert model(images, min_depth=4, max_depth=5).exit_layer.tolist() == [5] * 3
        with pytest.raises(ValueError, match=r"max_depth=1 .*\[2, 3, 5, 6\]"):
            model(images, max_depth=1)
        with pytest.raises(ValueError, match=r"min_depth=7 .*\[2, 3, 5, 6\]"):
            model(images, min_depth=7)
        for bounds in ({"max_depth": 3}, {"min_depth": 3}):
            with pytest.raises(ValueError, match="min_depth and max_depth"):
                model(images, early_exit=False, **bounds)

    @torch.no_grad()
    def test_an_image_of_nan_reaches_the_end_and_troubles_nobody(self):
        model, images = self.model(), tiny_images(4)
        model.set_exit_policy("confidence", threshold=0.0)
        expected = model(images)
        images[2, 0, 3, 3] = math.nan
        out = model(images)
        assert out.exit_index.tolist() == [0, 0, FINAL, 0]
        assert out.logits[2].isnan().all()
        others = torch.tensor([0, 1, 3])
        assert_close_to_largest(out.logits[others], expected.logits[others])

    @torch.no_grad()
    def test_bfloat16_is_scored_in_float32(self):
        model = self.model().to(torch.bfloat16)
        exit_logits = model(tiny_images(20), early_exit=False).exit_logits
        threshold = exit_logits[0].float().softmax(-1).amax(-1).median().item()
        model.set_exit_policy("confidence", threshold=threshold)
        out = model(tiny_images(20))
        assert out.logits.dtype == torch.bfloat16 and out.exit_score.dtype == torch.float32
        assert len(set(out.exit_index.tolist())) > 1
        torch.testing.assert_close(out.exit_score, out.logits.float().softmax(-1).amax(-1))

    @pytest.mark.parametrize("name", ["hidden_states", "attentions"])
    def test_hidden_states_and_attentions_are_those_of_upstream(self, name):
        native = tiny_native(self.kind, attn_implementation="eager")
        model = MODELS[self.kind].from_backbone(native, exit_positions=POSITIONS)
        images, wanted = tiny_images(3), {f"output_{name}": True}
        with torch.no_grad():
            theirs = native(images, **wanted)[name]
            outputs = [model(images, **wanted), model(images, early_exit=False, **wanted)]
            plain = model(images, early_exit=False)
        assert len(theirs) > 0
        for out in outputs:
            assert len(out[name]) == len(theirs)
            assert all(torch.equal(ours, other) for ours, other in zip(out[name], theirs, strict=True))
            assert torch.equal(out.logits, plain.logits) and len(out.exit_logits) == FINAL + 1
        assert getattr(plain, name) is None
        with pytest.raises(ValueError, match=f"output_{name}.*early_exit"):
            model(images, early_exit=True, **wanted)
        grads = model.train()(images, labels=torch.arange(3), **wanted)
        assert grads[name][0].requires_grad

    # -- policies on a model -------------------------------------------------------------------------------

    def test_exit_policy_is_saved(self, tmp_path):
        model = self.model()
        policy = {
            "name": "patience_confidence",
            "threshold": [0.2, 0.3, 0.4],
            "patience": 2,
            "temperature": [1, 2.0, 3],
        }
        model.set_exit_policy(policy.pop("name"), **policy)
        assert model.config.exit_policy == {"name": "patience_confidence", **policy}
        model.save_pretrained(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert again.config.exit_policy == model.config.exit_policy
        assert again.exit_policy.to_dict() == model.exit_policy.to_dict()

    def test_exit_policy_as_dict_object_or_function(self, caplog):
        model = self.model()
        model.set_exit_policy({"name": "margin", "threshold": 0.3})
        assert model.config.exit_policy == {"name": "margin", "threshold": 0.3}
        model.set_exit_policy(ConfidencePolicy(threshold=[0.1, 0.2, 0.3]))
        assert model.config.exit_policy["threshold"] == [0.1, 0.2, 0.3]
        stored = copy.deepcopy(model.config.exit_policy)
        model.set_exit_policy(lambda logits, memory: (torch.ones(len(logits), dtype=torch.bool), memory))
        assert model(tiny_images(2)).exit_index.tolist() == [0, 0]
        assert model.config.exit_policy == stored and "will not be saved" in caplog.text
        model.config.exit_policy = {"name": "fixed", "exit_index": 1}
        assert model(tiny_images(2)).exit_index.tolist() == [1, 1]

    def test_a_wrong_exit_policy_changes_nothing(self):
        model = self.model()
        model.set_exit_policy("fixed", exit_index=2)
        for policy, parameters in (
            ("confident", {}),
            ("confidence", {"threshold": [0.5]}),
            ("confidence", {"treshold": 0.5}),
            ({"name": "never"}, {"threshold": 0.5}),
        ):
            with pytest.raises(ValueError, match="exit_policy"):
                model.set_exit_policy(policy, **parameters)
        assert model(tiny_images(1)).exit_index.tolist() == [2]

    # -- smaller models ------------------------------------------------------------------------------------

    def test_truncated_model_trains(self):
        model = self.model().truncate(1).train()
        out = model(tiny_images(4), labels=torch.tensor([0, 1, 2, 3]))
        expected = F.cross_entropy(out.logits, torch.tensor([0, 1, 2, 3]))
        torch.testing.assert_close(out.loss, expected)
        out.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_truncate_at_an_exit_that_is_not_there(self):
        model = self.model()
        for exit_index in (-1, FINAL + 1, 1.0, "1", None):
            with pytest.raises(ValueError, match=f"exit_index={exit_index!r}.*{FINAL}"):
                model.truncate(exit_index)

    def test_a_highway_without_exits_is_the_backbone(self):
        model = self.model(exit_positions=[], exit_policy="never")
        out = model(tiny_images(2))
        assert out.exit_layer.tolist() == [NUM_BLOCKS] * 2 and out.exit_index.tolist() == [0] * 2
        assert torch.equal(out.logits, model(tiny_images(2), early_exit=False).logits)

    # -- images --------------------------------------------------------------------------------------------

    @every_head
    @torch.no_grad()
    def test_images_of_other_sizes(self, heads):
        native = tiny_native(self.kind)
        highway = MODELS[self.kind].from_backbone(native, exit_positions=POSITIONS, exit_types=heads)
        scrambled(highway.exits)
        for size in self.image_sizes:
            images = tiny_images(3, size)
            expected = native(images, interpolate_pos_encoding=True).logits
            everything = highway(images, early_exit=False, interpolate_pos_encoding=True)
            assert torch.equal(everything.logits, expected)
            highway.set_exit_policy("fixed", exit_index=1)
            out = highway(images, interpolate_pos_encoding=True)
            assert_close_to_largest(out.logits, everything.exit_logits[1])
            exits = zip(POSITIONS, highway.config.exit_types, everything.exit_features[:-1], strict=True)
            for position, head, features in exits:
                grid = highway.config.patch_grid(position, *size)
                if head in ("conv1_1", "conv2_1", "conv_normal", "mlp"):
                    assert features.shape[1] == grid[0] * grid[1], (size, position)

    @torch.no_grad()
    def test_pools(self):
        for pool in self.pools:
            for heads in MIXES.values():
                model = self.model(exit_types=heads, pool=pool)
                out = model(tiny_images(2), early_exit=False)
                assert all(logits.shape == (2, NUM_LABELS) and logits.isfinite().all() for logits in out.exit_logits)
        for pool in {"cls", "mean", "max"} - set(self.pools):
            with pytest.raises(ValueError, match=f"pool: '{pool}'.*" + "|".join(self.pools)):
                tiny_config(self.kind, pool=pool)

    def test_wrong_images(self):
        model = self.model()
        for pixels, message in (
            (None, "pixel_values"),
            (torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE), r"pixel_values: shape \(0, 3, 16, 16\).*empty batch"),
            (torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE), r"pixel_values: shape \(2, 1, 16, 16\).*3 channels"),
            (torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), r"pixel_values: shape \(3, 16, 16\)"),
        ):
            for early_exit in (True, False):
                with pytest.raises(ValueError, match=message):
                    model(pixels, early_exit=early_exit)

    def test_images_of_another_size(self):
        model, images = self.model(), tiny_images(2, size=(24, 16))
        assert model.takes_any_size == (self.kind == "swin")
        for early_exit in (True, False):
            if model.takes_any_size:
                assert model(images, early_exit=early_exit).logits.isfinite().all()
            else:
                with pytest.raises(ValueError, match="24 x 16 pixels, .* takes 16 x 16.*interpolate_pos_encoding"):
                    model(images, early_exit=early_exit)

    def test_label_out_of_range(self):
        model = self.model()
        for label in (NUM_LABELS, -1, 99):
            for early_exit in (True, False):
                with pytest.raises(ValueError, match=rf"labels: {label} is outside 0\.\.4.*num_labels=5"):
                    model(tiny_images(2), labels=torch.tensor([0, label]), early_exit=early_exit)

    # -- losses and training -------------------------------------------------------------------------------

    @torch.no_grad()
    def test_loss_in_evaluation(self):
        model, labels = self.model(), torch.tensor([0, 4, 2])
        model.set_exit_policy("fixed", exit_index=1)
        out = model(tiny_images(3), labels=labels)
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))

    def test_other_problem_types(self):
        several = (torch.rand(3, NUM_LABELS) < 0.5).float()
        model = self.model(problem_type="multi_label_classification", exit_loss_weights="uniform").train()
        out = model(tiny_images(3), labels=several)
        each = [F.binary_cross_entropy_with_logits(logits, several) for logits in out.exit_logits]
        torch.testing.assert_close(out.loss, sum(each) / 4)

        values = torch.randn(3)
        model = self.model(num_labels=1, problem_type="regression", exit_loss_weights="uniform").train()
        out = model(tiny_images(3), labels=values)
        torch.testing.assert_close(
            out.loss, sum(((logits[:, 0] - values) ** 2).mean() for logits in out.exit_logits) / 4
        )

    def test_tuples(self):
        model, labels = self.model(), torch.tensor([0, 1])
        for early_exit in (True, False):
            named = model(tiny_images(2), early_exit=early_exit)
            values = model(tiny_images(2), early_exit=early_exit, return_dict=False)
            assert isinstance(values, tuple) and len(values) == len(named.to_tuple())
            assert torch.equal(values[0], named.logits)
            loss, logits, *_ = model(tiny_images(2), labels, early_exit=early_exit, return_dict=False)
            assert loss.shape == () and torch.equal(logits, named.logits)

    @every_head
    def test_every_head_trains_a_step(self, heads):
        model = self.model(exit_types=heads).train()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model(tiny_images(8), labels=torch.arange(8) % NUM_LABELS).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if name.endswith("weight"):  # batch norm and softmax do not see some of the biases
                assert not torch.equal(parameter, before[name]), name

    def test_gradient_checkpointing_runs_blocks_again(self):
        model, runs = self.model().train(), []
        model.gradient_checkpointing_enable()
        for name, module in model.named_modules():
            if name.endswith("layernorm_before"):
                module.register_forward_hook(lambda *_, name=name: runs.append(name))
        model(tiny_images(2), labels=torch.arange(2)).loss.backward()
        assert len(runs) >= 2 * NUM_BLOCKS and min(map(runs.count, runs)) >= 2

    @torch.no_grad()
    def test_some_hidden_states(self):
        model, images = self.model(), tiny_images(2)
        everything = model(images, output_hidden_states=True).hidden_states
        some = model(images, output_hidden_states=[0, -1, 99]).hidden_states
        assert torch.equal(some[0], everything[0]) and torch.equal(some[-1], everything[-1])
        assert len(some) == len(everything) and not any(state is not None for state in some[1:-1])

    def test_who_asks_what_is_missing_is_told(self, tmp_path):
        model = self.model()
        model.base_model.save_pretrained(tmp_path)
        loaded, info = MODELS[self.kind].from_pretrained(tmp_path, exit_positions=POSITIONS, output_loading_info=True)
        ours = {name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix)}
        assert ours <= set(info["missing_keys"]) and all(p.isfinite().all() for p in loaded.parameters())

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        gradients = []
        for checkpointing in (False, True):
            model = self.model().train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(tiny_images(4), labels=torch.arange(4)).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for ours, expected in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_plain_trainer(self, tmp_path):
        model, rows = self.model(), tiny_dataset(12)

        def accuracy(prediction):
            assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.shape == (12, NUM_LABELS)
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        trainer = Trainer(
            model, training_arguments(tmp_path), train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy
        )
        before = copy.deepcopy(model.state_dict())
        assert math.isfinite(trainer.train().training_loss)
        changed = {
            name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
        }
        assert {"exits", model.base_model_prefix} < changed
        model.eval()
        images = torch.stack([row["pixel_values"] for row in rows])
        exit_in_gaps(model, images)
        metrics = trainer.evaluate()
        predictions = trainer.predict(rows).predictions
        assert isinstance(predictions, np.ndarray)
        with torch.no_grad():
            expected = model.eval()(images)
        assert len(set(expected.exit_index.tolist())) > 1
        np.testing.assert_allclose(predictions, expected.logits.numpy(), rtol=1e-4, atol=1e-5)
        labels = np.array([row["labels"] for row in rows])
        assert metrics["eval_accuracy"] == pytest.approx((predictions.argmax(-1) == labels).mean())

    def test_pipeline(self, tmp_path):
        model, folder = self.model(), tmp_path / "highway"
        processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        processor.save_pretrained(folder)
        squares = rng().integers(0, 255, (8, 2, 3, 3), dtype=np.uint8)
        photos = [Image.fromarray(photo) for photo in squares.repeat(10, axis=1).repeat(10, axis=2)]
        images = processor(photos, return_tensors="pt")["pixel_values"]
        exit_in_gaps(model, images)
        model.save_pretrained(folder)
        with torch.no_grad():
            expected = model(images).logits.softmax(-1)
        for batch_size in (1, 3):
            answers = pipeline("image-classification", model=str(folder), batch_size=batch_size)(photos, top_k=2)
            for row, answer in enumerate(answers):
                assert [entry["score"] for entry in answer] == pytest.approx(
                    expected[row].topk(2).values.tolist(), rel=1e-4
                )
                assert answer[0]["label"] == f"LABEL_{expected[row].argmax().item()}"
