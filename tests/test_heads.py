"""Each head against its formula: square and oblong grids, odd widths, with 0, 1 and 2 prefix tokens."""

import copy
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification

from lgvit_hf.heads import (
    HEADS,
    HeadShape,
    build_head,
    head_kind,
    is_head,
    known_heads,
    lgvit_heads,
    num_sparse_heads,
    register_head,
)
from lgvit_hf.segments import Tokens
from tests.seeds import generator
from tests.tiny import scrambled

pytestmark = pytest.mark.version_independent

GRIDS = [(4, 4), (5, 3), (1, 7)]
READERS = [(0, "mean"), (0, "cls"), (1, "cls"), (1, "mean"), (2, "cls"), (2, "mean")]
NUM_LABELS, BATCH = 5, 3


def make(name, width=12, num_prefix=1, pool="cls"):
    shape = HeadShape(
        width=width,
        num_prefix=num_prefix,
        num_labels=NUM_LABELS,
        num_attention_heads=2,
        intermediate_size=3 * width,
        layer_norm_eps=1e-5,
        pool=pool,
    )
    return scrambled(build_head(name, shape))


def random_tokens(grid, width=12, num_prefix=1, batch=BATCH):
    return Tokens(torch.randn(batch, grid[0] * grid[1], width), grid, torch.randn(batch, num_prefix, width))


# -- formulas by hand ------------------------------------------------------------------------------------------


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def batch_norm(image, norm):
    """In `eval()` mode, on `[B, D, h, w]`."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (image - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(query, key, value, num_heads):
    """One attention head after the other, on `[B, N, D]`."""
    heads = []
    for q, k, v in zip(*(x.chunk(num_heads, dim=-1) for x in (query, key, value)), strict=True):
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        heads.append(weights @ v)
    return torch.cat(heads, dim=-1)


def pointwise(image, conv):
    return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], image) + conv.bias[:, None, None]


def window_sum(image, conv, depthwise=False):
    """A 3x3 convolution with zeros around the image, one shift after the other."""
    padded = F.pad(image, (1, 1, 1, 1))
    height, width = image.shape[2:]
    total = conv.bias[:, None, None].expand(len(image), -1, height, width).clone()
    for row in range(3):
        for column in range(3):
            shifted, weight = padded[:, :, row : row + height, column : column + width], conv.weight[:, :, row, column]
            total += (
                weight.view(1, -1, 1, 1) * shifted if depthwise else torch.einsum("oi,bihw->bohw", weight, shifted)
            )
    return total


def to_image(patches, grid):
    return patches.reshape(len(patches), *grid, -1).permute(0, 3, 1, 2)


def to_patches(image):
    return image.permute(0, 2, 3, 1).reshape(len(image), -1, image.shape[1])


def mean_of_classifiers(head, vectors):
    """One classifier per vector."""
    assert len(head.classifiers) == len(vectors)
    return sum(linear(vector, classifier) for vector, classifier in zip(vectors, head.classifiers, strict=True)) / len(
        vectors
    )


class HeadTesterMixin:
    """A head says its name, its parameters at D=768 and C=100 on a ViT, and its formula."""

    name: str
    num_parameters: int
    kind: str | None

    def formula(self, head, tokens):
        """Logits and features."""
        raise NotImplementedError

    def every_case(self, width=12):
        for grid in GRIDS:
            for num_prefix, pool in READERS:
                yield grid, num_prefix, make(self.name, width, num_prefix, pool)

    @pytest.mark.parametrize("width", [12, 20])
    @torch.no_grad()
    def test_formula(self, width):
        for grid, num_prefix, head in self.every_case(width):
            tokens = random_tokens(grid, width, num_prefix)
            logits, features = head(tokens)
            expected_logits, expected_features = self.formula(head, tokens)
            torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-5)
            assert logits.shape == (BATCH, NUM_LABELS) and len(features) == BATCH

    @torch.no_grad()
    def test_answer_is_forward_without_features(self):
        for grid, num_prefix, head in self.every_case():
            tokens = random_tokens(grid, num_prefix=num_prefix)
            torch.testing.assert_close(head.answer(tokens), head(tokens)[0], rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_answer_is_forward_in_training(self):
        for grid, num_prefix, head in self.every_case():
            tokens = random_tokens(grid, num_prefix=num_prefix)
            head.train()
            other = copy.deepcopy(head)
            torch.testing.assert_close(head.answer(tokens), other(tokens)[0], rtol=1e-5, atol=1e-5)
            for (name, ours), theirs in zip(head.named_buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, msg=f"{name} is learned otherwise by answer")

    def test_every_parameter_gets_a_gradient(self):
        for grid, num_prefix, head in self.every_case():
            head.zero_grad()
            tokens = random_tokens(grid, num_prefix=num_prefix)
            (head(tokens)[0] ** 2).sum().backward()
            for name, parameter in head.named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                # softmax does not see what is added to every key
                if "key.bias" not in name:
                    assert parameter.grad.abs().max() > 0, name

    @torch.no_grad()
    def test_rows_do_not_see_each_other(self):
        for grid, num_prefix, head in self.every_case():
            tokens = random_tokens(grid, num_prefix=num_prefix)
            alone = [
                head.answer(Tokens(tokens.patches[row : row + 1], grid, tokens.prefix[row : row + 1]))
                for row in range(BATCH)
            ]
            torch.testing.assert_close(torch.cat(alone), head.answer(tokens), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_bfloat16(self):
        head = make(self.name).to(torch.bfloat16)
        tokens = random_tokens((4, 4))
        half = replace(tokens, patches=tokens.patches.bfloat16(), prefix=tokens.prefix.bfloat16())
        expected = copy.deepcopy(head).float()(
            replace(tokens, patches=half.patches.float(), prefix=half.prefix.float())
        )[0]
        for logits in (head(half)[0], head.answer(half)):
            assert logits.dtype == torch.bfloat16
            assert (logits.float() - expected).norm() < 0.1 * expected.norm()

    def test_number_of_parameters(self):
        shape = HeadShape(
            width=768,
            num_prefix=1,
            num_labels=100,
            num_attention_heads=12,
            intermediate_size=3072,
            layer_norm_eps=1e-12,
        )
        with torch.device("meta"):
            head = build_head(self.name, shape)
        assert sum(parameter.numel() for parameter in head.parameters()) == self.num_parameters

    def test_no_name_that_transformers_renames(self):
        renamed = ("output.dense", "intermediate.dense", "attention.", "mlp.fc")
        for _, _, head in self.every_case():
            for name in head.state_dict():
                assert not any(part in f"exits.0.{name}" for part in renamed), name

    def test_kind(self):
        assert head_kind(self.name) == self.kind
        assert is_head(self.name)


class MapHeadMixin(HeadTesterMixin):
    """Heads that make a map: its mean plus each prefix token is classified; normalised first where there is none."""

    def feature_map(self, body, patches, grid):
        raise NotImplementedError

    def formula(self, head, tokens):
        features = self.feature_map(head.body, tokens.patches, tokens.grid)
        num_prefix = tokens.prefix.shape[1]
        if num_prefix == 0:
            pooled = layer_norm(features, head.norm).mean(1)
        else:
            pooled = features.mean(1)
        vectors = [pooled]
        if num_prefix and head.pool == "cls":
            vectors = [pooled + tokens.prefix[:, index] for index in range(num_prefix)]
        return mean_of_classifiers(head, vectors), features


class TestLinear(HeadTesterMixin):
    name, num_parameters, kind = "linear", 667_492, None

    def formula(self, head, tokens):
        num_prefix = tokens.prefix.shape[1]
        if head.pool == "mean" or num_prefix == 0:
            pooled = layer_norm(torch.cat([tokens.prefix, tokens.patches], dim=1), head.norm).mean(1)
            return mean_of_classifiers(head, [pooled]), pooled
        if num_prefix == 1:
            pooled = torch.tanh(linear(tokens.prefix[:, 0], head.dense))
            return mean_of_classifiers(head, [pooled]), pooled
        normed = layer_norm(tokens.prefix, head.norm)
        return mean_of_classifiers(head, [normed[:, 0], normed[:, 1]]), normed


class TestAverage(HeadTesterMixin):
    name, kind = "average", None
    num_parameters = 2 * 768 + (768 * 100 + 100)

    def formula(self, head, tokens):
        num_prefix = tokens.prefix.shape[1]
        if head.pool == "mean" or num_prefix == 0:
            total = tokens.prefix.sum(1) + tokens.patches.sum(1)
            pooled = layer_norm(total / (num_prefix + tokens.patches.shape[1]), head.norm)
            return mean_of_classifiers(head, [pooled]), pooled
        average = tokens.patches.sum(1) / tokens.patches.shape[1]
        vectors = [layer_norm(average + tokens.prefix[:, index], head.norm) for index in range(num_prefix)]
        features = vectors[0] if num_prefix == 1 else torch.stack(vectors, dim=1)
        return mean_of_classifiers(head, vectors), features


class TestConcat(HeadTesterMixin):
    name, kind = "concat", None
    num_parameters = 2 * 768 + (2 * 768 * 100 + 100)

    def formula(self, head, tokens):
        num_prefix = tokens.prefix.shape[1]
        normed = layer_norm(torch.cat([tokens.prefix, tokens.patches], dim=1), head.norm)
        if head.pool == "cls" and num_prefix:
            vectors = [normed[:, index] for index in range(num_prefix)]
            vectors.append(normed[:, num_prefix:].sum(1) / tokens.patches.shape[1])
        else:
            vectors = [normed.sum(1) / normed.shape[1], normed.sort(1).values[:, -1]]
        joined = torch.cat(vectors, -1)
        return mean_of_classifiers(head, [joined]), joined


@torch.no_grad()
def test_concat_is_the_classifier_of_dinov2():
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    native = scrambled(Dinov2ForImageClassification(Dinov2Config(**sizes, num_labels=NUM_LABELS))).eval()
    head = make("concat")
    head.norm.load_state_dict(native.dinov2.layernorm.state_dict())
    head.norm.eps = native.config.layer_norm_eps
    head.classifiers[0].load_state_dict(native.classifier.state_dict())
    images, seen = torch.randn(BATCH, 3, 8, 8), []
    native.dinov2.layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    expected = native(images).logits
    tokens = Tokens(seen[0][:, 1:], (2, 2), seen[0][:, :1])
    torch.testing.assert_close(head.answer(tokens), expected)


class TestViT(TestLinear):
    name, num_parameters, kind = "vit", 7_755_364, None

    def formula(self, head, tokens):
        block, num_prefix = head.block, tokens.prefix.shape[1]
        x = torch.cat([tokens.prefix, tokens.patches], dim=1)
        normed, mix = layer_norm(x, block.norm_before), block.mix
        attended = attention(linear(normed, mix.query), linear(normed, mix.key), linear(normed, mix.value), 2)
        x = x + linear(attended, mix.proj)
        x = x + linear(gelu(linear(layer_norm(x, block.norm_after), block.widen)), block.narrow)
        return super().formula(head, Tokens(x[:, num_prefix:], tokens.grid, x[:, :num_prefix]))


class TestMLP(MapHeadMixin):
    name, kind = "mlp", "local"
    num_parameters = (768 * 10 + 10) + (10 * 768 + 768) + (768 * 100 + 100)

    def feature_map(self, body, patches, grid):
        return linear(linear(patches, body.widen).clamp(min=0), body.narrow)


class TestConvNormal(MapHeadMixin):
    name, num_parameters, kind = "conv_normal", 5_387_620, "local"

    def feature_map(self, body, patches, grid):
        return to_patches(batch_norm(gelu(window_sum(to_image(patches, grid), body.conv)), body.bn))


class TestConv1x1(MapHeadMixin):
    name, num_parameters, kind = "conv2_1", 1_261_156, "local"

    def feature_map(self, body, patches, grid):
        image = to_image(patches, grid)
        hidden = batch_norm(gelu(pointwise(image, body.expand)), body.expand_bn)
        return to_patches(image + batch_norm(pointwise(hidden, body.project), body.project_bn))


class TestConvDepthwise(MapHeadMixin):
    name, num_parameters, kind = "conv1_1", 1_270_372, "local"

    def feature_map(self, body, patches, grid):
        image = to_image(patches, grid)
        hidden = batch_norm(gelu(pointwise(image, body.expand)), body.expand_bn)
        hidden = batch_norm(gelu(window_sum(hidden, body.depthwise, depthwise=True)), body.depthwise_bn)
        return to_patches(image + batch_norm(pointwise(hidden, body.project), body.project_bn))


class TestSelfAttention(MapHeadMixin):
    name, num_parameters, kind = "self_attention", 2_439_268, "global"

    def feature_map(self, body, patches, grid):
        attended = attention(linear(patches, body.query), linear(patches, body.key), linear(patches, body.value), 2)
        return linear(attended, body.proj)


class TestAttentionR1(MapHeadMixin):
    name, num_parameters, kind, ratio = "attention_r1", 2_436_964, "global", 1

    def feature_map(self, body, patches, grid):
        image = to_image(patches, grid)
        patches = to_patches(image[:, :, :: self.ratio, :: self.ratio])
        width = patches.shape[-1]
        query, key, value = (patches @ weight.T for weight in body.qkv.weight.split(width))
        # 8 heads where they divide the width; 12 and 20 take 6 and 5
        num_heads = {12: 6, 20: 5, 32: 8}[width]
        return linear(attention(query, key, value, num_heads), body.proj)

    @torch.no_grad()
    def test_width_that_eight_divides(self):
        head, tokens = make(self.name, width=32), random_tokens((5, 3), width=32)
        torch.testing.assert_close(head(tokens)[0], self.formula(head, tokens)[0], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_map_is_subsampled(self):
        for grid in GRIDS:
            features = make(self.name)(random_tokens(grid))[1]
            assert features.shape == (BATCH, math.ceil(grid[0] / self.ratio) * math.ceil(grid[1] / self.ratio), 12)


class TestAttentionR2(TestAttentionR1):
    name, ratio = "attention_r2", 2

    @pytest.mark.parametrize("ratio", [3, 12])
    @torch.no_grad()
    def test_other_ratios(self, ratio):
        """Down to a single patch."""
        other = TestAttentionR1()
        other.name, other.ratio = f"attention_r{ratio}", ratio
        other.test_formula(12)
        other.test_map_is_subsampled()
        other.test_answer_is_forward_without_features()
        other.test_number_of_parameters()
        other.test_kind()


# -- what does not belong to one head --------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("name", sorted({*HEADS, "attention_r2"} - {"attention"}))
def test_what_a_head_needs_gives_its_answer_and_its_gradients(name, num_prefix, pool):
    numbers = generator(7)
    head = build_head(
        name, HeadShape(8, num_prefix, 3, num_attention_heads=2, intermediate_size=16, pool=pool)
    ).double()
    tokens = Tokens(
        torch.randn(5, 6, 8, generator=numbers, dtype=torch.float64),
        (2, 3),
        torch.randn(5, num_prefix, 8, generator=numbers, dtype=torch.float64),
    )
    reduced = head.reduce(tokens)
    assert (reduced is not None) == (name in ("linear", "average", "concat"))
    if reduced is None:
        return
    with torch.no_grad():
        # trained scales may be negative, and a channel's largest value is then that of its smallest
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
    again, expected = head.answer_reduced(head.reduce(tokens)), head(tokens)[0]
    torch.testing.assert_close(again, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn(5, 3, generator=numbers, dtype=torch.float64)
    found = torch.autograd.grad((again * weights).sum(), list(head.parameters()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(head.parameters()))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    # it does not depend on what is trained
    assert torch.equal(head.reduce(tokens), reduced)
    assert reduced.shape[1] <= max(3, num_prefix + 1)


def test_registry_is_covered():
    cases = [case for case in globals().values() if isinstance(case, type) and issubclass(case, HeadTesterMixin)]
    tested = {case.name.split("_r")[0] for case in cases if hasattr(case, "name")}
    assert tested == set(HEADS)


# conv1_1, conv2_1, attention_r2, attention_r3; published: 2, 4, 6 and 8 exits
LAYOUTS = {
    0: (0, 0, 0, 0),
    1: (1, 0, 0, 0),
    2: (1, 0, 1, 0),
    3: (1, 1, 1, 0),
    4: (1, 1, 1, 1),
    5: (2, 1, 1, 1),
    6: (1, 1, 2, 2),
    7: (2, 2, 2, 1),
    8: (2, 2, 2, 2),
    9: (3, 2, 2, 2),
    10: (3, 2, 3, 2),
    11: (3, 3, 3, 2),
    12: (3, 3, 3, 3),
    47: (12, 12, 12, 11),
}


def test_layouts():
    for num_exits, (wide, light, second, third) in LAYOUTS.items():
        local, far = ["conv1_1"] * wide + ["conv2_1"] * light, ["attention_r2"] * second + ["attention_r3"] * third
        assert lgvit_heads(num_exits) == local + far, num_exits


def test_published_layout_of_swin():
    swin = lgvit_heads(8, attention=("attention_r1", "attention_r2"))
    assert swin == "conv1_1 conv1_1 conv2_1 conv2_1 attention_r1 attention_r1 attention_r2 attention_r2".split()


def test_sparse_attention_has_eight_heads_or_the_largest_smaller_number_that_divides_the_width():
    widths = {768: 8, 32: 8, 72: 8, 18: 6, 63: 7, 20: 5, 36: 6, 9: 3, 10: 5, 11: 1, 1: 1}
    assert {width: num_sparse_heads(width) for width in widths} == widths


def test_a_shape_says_what_was_left_out():
    shape = HeadShape(width=8, num_prefix=1, num_labels=2)
    left_out = {"num_attention_heads": 1, "intermediate_size": 1, "layer_norm_eps": 1e-12, "dropout": 0.0}
    assert dataclasses.asdict(shape) == {
        **{"width": 8, "num_prefix": 1, "num_labels": 2, "hidden_act": "gelu", "pool": "cls"},
        **left_out,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.width = 9
    classifiers = {(n, pool): replace(shape, num_prefix=n, pool=pool) for n in (0, 1, 2) for pool in ("cls", "mean")}
    counts = {case: each.num_classifiers for case, each in classifiers.items()}
    assert counts.pop((2, "cls")) == 2 and set(counts.values()) == {1}


def test_known_heads():
    assert known_heads() == (
        "attention_r{n}, average, concat, conv1_1, conv2_1, conv_normal, linear, mlp, self_attention, vit"
    )


def test_unknown_head_lists_the_choices():
    near = ["attention", "attention_r0", "attention_r02", "attention_r-1", "attention_r", "conv", "Linear"]
    for name in (*near, "", None, 3, []):
        assert not is_head(name) and head_kind(name) is None
        with pytest.raises(ValueError) as error:
            build_head(name, HeadShape(width=8, num_prefix=1, num_labels=2))
        message = str(error.value)
        assert repr(name) in message
        assert all(known in message for known in ("conv1_1", "linear", "self_attention", "attention_r{n}"))


@pytest.fixture
def registry():
    """What a test registers is forgotten."""
    before = dict(HEADS)
    yield HEADS
    HEADS.clear()
    HEADS.update(before)


class Doubled(nn.Module):
    kind = "global"

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.full((shape.width,), 2.0))

    def forward(self, patches, grid):
        return patches * self.scale


def test_registered_head_is_built_by_name(registry):
    register_head("doubled")(Doubled)
    assert is_head("doubled") and head_kind("doubled") == "global"
    head = build_head("doubled", HeadShape(width=12, num_prefix=2, num_labels=NUM_LABELS))
    tokens = random_tokens((2, 3), num_prefix=2)
    logits, features = head(tokens)
    assert torch.equal(features, 2 * tokens.patches)
    pooled = 2 * tokens.patches.mean(1)
    expected = mean_of_classifiers(head, [pooled + tokens.prefix[:, 0], pooled + tokens.prefix[:, 1]])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(head.answer(tokens), expected)
    logits.sum().backward()
    assert head.body.scale.grad.abs().min() > 0


def test_a_body_may_be_made_by_a_function(registry):
    def doubled(shape):
        return Doubled(shape)

    register_head("doubled")(doubled)
    assert head_kind("doubled") is None
    head = build_head("doubled", HeadShape(width=12, num_prefix=1, num_labels=NUM_LABELS))
    tokens = random_tokens((2, 3))
    assert torch.equal(head(tokens)[1], 2 * tokens.patches)


def test_a_name_is_registered_once(registry):
    for name in ("linear", "conv1_1", "attention"):
        with pytest.raises(ValueError, match=f"already a head called '{name}'"):
            register_head(name)(Doubled)
    register_head("doubled")(Doubled)
    # a module that is imported again
    again = type("Doubled", (Doubled,), {})
    assert register_head("doubled")(again) is again and HEADS["doubled"] is again
