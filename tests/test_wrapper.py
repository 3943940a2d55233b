import copy
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from lgvit_hf import HighwayTrainer, HighwayTrainingArguments, HighwayWrapper, HighwayWrapperConfig, collect
from lgvit_hf.engine import run_all, run_early
from lgvit_hf.evaluation.benchmark import benchmark
from lgvit_hf.evaluation.calibration import calibrate
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.evaluation.exit_table import ExitTable
from lgvit_hf.feature_layout import reading_of
from lgvit_hf.graph_split import TracedPiece
from lgvit_hf.policies import FixedPolicy
from lgvit_hf.segments import State
from lgvit_hf.sequential_split import ChainPiece, logits_of
from tests.seeds import seeded
from tests.test_modeling_common import assert_close_to_largest, assert_same_answers, joined, policies_for
from tests.tiny import NUM_LABELS, scrambled, tiny_dataset, tiny_images
from tests.wrapped import BUILDERS, EXAMPLE, MLP, SIZE, ResidualNet, plain, vgg, wrapped

version_independent = pytest.mark.version_independent

# what each family's exits read: height and width of the map or the patches, and tokens before them
GRIDS = {
    "resnet": [(8, 8, 0), (8, 8, 0)],
    "convnext": [(8, 8, 0), (4, 4, 0)],
    "dinov2": [(4, 4, 1), (4, 4, 1)],
    "beit": [(4, 4, 1), (4, 4, 1)],
    "mobilevit": [(8, 8, 0), (2, 2, 0)],
    "vgg": [(32, 32, 0), (8, 8, 0), (4, 4, 0)],
    "residual": [(16, 16, 0), (8, 8, 0), (4, 4, 0)],
    "mlp": [(1, 1, 0), (1, 1, 0)],
}


def images(count, seed=0):
    return tiny_images(count, SIZE, seed)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=version_independent if name in ("mlp", "residual", "vgg") else ())
        for name in sorted(BUILDERS)
    ],
)
def family(request):
    """Its name, and one model of it for all tests that do not change it but for its policy."""
    return request.param, wrapped(request.param)


def assert_same_values(family, ours, expected):
    """Bit for bit; of BEiT but for rounding: transformers 5 gives its mask a row per image while it is traced."""
    if family == "beit":
        assert_close_to_largest(ours, expected, 1e-6)
    else:
        assert torch.equal(ours, expected)


# -- the laws --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_never_leaving_is_the_original_module(family):
    name, model = family
    module, _ = plain(name)
    model.set_exit_policy("never")
    expected = logits_of(module(images(7)))
    everything = model(images(7), early_exit=False)
    for logits in (model(images(7)).logits, everything.logits, everything.exit_logits[-1]):
        assert_same_values(name, logits, expected)
    assert expected.std(0).max() > 1e-3, "these images are all alike to the model"


@torch.no_grad()
def test_law(family):
    _, model = family
    pixels, depths = images(40), list(range(1, len(model.exits) + 2))
    everything = model(pixels, early_exit=False)
    table = ExitTable(torch.stack(everything.exit_logits), torch.zeros(40, dtype=torch.int64), depths)
    order = torch.randperm(40)
    for policy in policies_for(everything.exit_logits):
        model.set_exit_policy(policy)
        batch = model(pixels)
        assert_same_answers(batch, table.replay(policy))
        shuffled = model(pixels[order])
        for field in ("logits", "exit_layer", "exit_index", "exit_score"):
            shuffled[field] = shuffled[field][order.argsort()]
        assert_same_answers(shuffled, batch)
        if policy["name"] in ("confidence", "entropy", "margin"):
            assert len(set(batch.exit_index.tolist())) > 1, "the rows of this batch must leave at several exits"
        alone = joined([model(pixels[row : row + 1]) for row in range(4)])
        assert alone.exit_index.tolist() == batch.exit_index[:4].tolist()
        assert_close_to_largest(alone.logits, batch.logits[:4])


@torch.no_grad()
def outputs_of(module, name, pixels):
    """What a submodule gives, as it is then: what runs behind it may change it in place."""
    kept = []

    def keep(submodule, inputs, output):
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    hook = module.get_submodule(name).register_forward_hook(keep)
    module(pixels)
    hook.remove()
    return kept[0]


@torch.no_grad()
def test_exits_read_what_the_submodule_gives(family):
    name, model = family
    module, after = plain(name)
    kept = [outputs_of(module, place, images(3)) for place in after]
    assert len(kept) == len(GRIDS[name]) == len(model.exits)
    state = State({"pixel_values": images(3)})
    for segment, hidden, (rows, columns, prefix) in zip(model.segments(), kept, GRIDS[name], strict=False):
        state = segment.advance(state)
        assert_same_values(name, state["hidden"], hidden)
        assert all(len(tensor) == 3 for tensor in state.tensors.values())
        tokens = model.tokens(state)
        assert tokens.grid == (rows, columns) and tokens.prefix.shape[1] == prefix
        assert tokens.patches.shape == (3, rows * columns, tokens.prefix.shape[2])
        if hidden.dim() == 4:
            assert torch.equal(tokens.patches.transpose(1, 2).unflatten(2, (rows, columns)), state["hidden"])


def flops(run):
    # the counter sees the plain formula of attention, not the fused kernels
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@torch.no_grad()
def test_operations_that_are_saved_are_not_run(family):
    name, model = family
    module, _ = plain(name)
    costs, pixels = model_macs(model), images(10)
    assert 2 * costs.backbone == pytest.approx(flops(lambda: module(pixels[:1])))
    assert costs.backbone_costs[0] < costs.backbone
    segments, state = model.segments(), State({"pixel_values": pixels})
    assert all(backbone > 0 for backbone in costs.backbone_costs)
    for index in range(len(segments)):
        run = flops(lambda index=index: run_early(segments, state, FixedPolicy(index)))
        assert run == pytest.approx(2 * 10 * costs.of_exit(index, evaluated=[index])), "rows run on behind their exit"
    model.set_exit_policy(policies_for(model(pixels, early_exit=False).exit_logits)[0])
    left = model(pixels).exit_index
    assert len(set(left.tolist())) > 1
    expected = sum(2 * costs.of_exit(index) for index in left.tolist())
    assert flops(lambda: model(pixels)) == pytest.approx(expected)


def test_cut_points_are_places_that_can_be_cut():
    module, _ = plain("residual")
    names = HighwayWrapper.cut_points(module, EXAMPLE)
    assert {"stem", "layer1", "layer1.0", "layer2", "layer3.conv1", "layer3.downsample", "dropout"} <= set(names)
    # an activation that runs twice, the last child of a parent that is named itself, and the answer
    assert not {"layer1.0.relu", "layer1.1", "fc"} & set(names)
    model = HighwayWrapper(module, names, example=EXAMPLE)
    assert len(model(images(2), early_exit=False).exit_logits) == len(names) + 1


# -- how a module is cut ---------------------------------------------------------------------------------------


@version_independent
@torch.no_grad()
def test_a_chain_is_called_and_anything_else_is_traced():
    model = wrapped("vgg")
    called = []
    for name in ("0.3", "0.8", "2.3"):
        model.wrapped.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert all(isinstance(piece, ChainPiece) for piece in model.blocks())
    run_all(model.segments(), State({"pixel_values": images(2)}))
    assert called == ["0.3", "0.8", "2.3"]
    assert all(isinstance(piece, TracedPiece) for piece in wrapped("residual").blocks())

    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    module = Doubled(*vgg())
    model = HighwayWrapper(module.eval(), ["0"], example=EXAMPLE)
    assert isinstance(model.blocks()[0], TracedPiece)
    assert torch.equal(model(images(2), early_exit=False).logits, module(images(2)))


@version_independent
@torch.no_grad()
def test_skip_connections_travel_with_the_rows():
    model = wrapped("residual")
    state = State({"pixel_values": images(4)})
    names = []
    for segment in model.segments()[:-1]:
        state = segment.advance(state)
        names.append(len(state.tensors))
    # behind the first convolution of a block its input is needed too
    assert names == [1, 1, 2]
    skip = next(tensor for name, tensor in state.tensors.items() if name != "hidden")
    assert skip.shape == (4, 16, 8, 8)


class Positions(nn.Module):
    """Values that do not follow the images: a table, a mask written in place, numbers of rows and places."""

    def __init__(self):
        super().__init__()
        self.patch, self.first, self.second = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(1, 16, 8))
        self.answer = nn.Linear(8, NUM_LABELS)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        table = F.softmax(self.table, -1)
        mask = torch.ones(16, 1)
        mask[::2] = 0.5
        rows, places = torch.arange(x.shape[0]), torch.full((x.shape[0],), 3)
        tokens = self.first(tokens + table)
        tokens = self.second(tokens * mask + table)
        return self.answer(tokens[rows, places] + tokens.sum((1, 2)).view(x.shape[0], 1))


@version_independent
@torch.no_grad()
def test_what_does_not_follow_the_images_is_made_again():
    module = scrambled(Positions())
    model = HighwayWrapper(module, ["first"], example=EXAMPLE)
    state = model.segments()[0].advance(State({"pixel_values": images(5)}))
    assert list(state.tensors) == ["hidden"]
    rows = torch.tensor([4, 1])
    logits = model.segments()[1].advance(state.select(rows))["logits"]
    assert_close_to_largest(logits, module(images(5))[rows], 1e-6)


@version_independent
@pytest.mark.parametrize("family", ["vgg", "residual"])
def test_changes_in_place_stay_behind_the_cut(family):
    module, _ = plain(family)
    # in front of an activation that works in place
    place = {"vgg": "0.1", "residual": "layer2.1.bn1"}[family]
    model, pixels = HighwayWrapper(module, [place], example=EXAMPLE), images(3)
    expected = outputs_of(module, place, pixels)
    first, second = model.segments()
    state = first.advance(State({"pixel_values": pixels}))
    second.advance(state)
    assert torch.equal(state["hidden"], expected) and (expected < 0).any()
    assert torch.equal(pixels, images(3))
    # and gradients of both answers can be had
    exit_logits = model(pixels, early_exit=False).exit_logits
    sum(logits.square().sum() for logits in exit_logits).backward()


@version_independent
def test_a_trace_follows_mode_dtype_and_weights():
    model = wrapped("residual")
    with torch.no_grad():
        before = model(images(2), early_exit=False).logits
        model.wrapped.fc.bias += 1.0
        torch.testing.assert_close(model(images(2), early_exit=False).logits, before + 1.0)
        twin = copy.deepcopy(model)
        twin.wrapped.fc.weight.zero_()
        twin.wrapped.fc.bias.zero_()
        assert not twin(images(2), early_exit=False).logits.any() and model.wrapped.fc.weight.any()
        low = twin.to(torch.bfloat16)(images(2), early_exit=False)
        assert low.logits.dtype == torch.bfloat16 == low.exit_logits[0].dtype
        # a trace holds none of the modes that its first caller is in
        twin.to(torch.float64)
        with torch.inference_mode():
            assert twin(images(2), early_exit=False).logits.dtype == torch.float64
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(images(4), labels=torch.arange(4)).loss.backward()
        assert model(images(4), early_exit=False).logits.dtype == torch.float32
        model.eval()
        model.wrapped.load_state_dict(ResidualNet().state_dict())
        torch.testing.assert_close(model(images(2), early_exit=False).logits, model.wrapped(images(2)))


@version_independent
@torch.no_grad()
def test_a_submodule_in_the_place_of_another_is_seen():
    module = MLP().eval()
    model = HighwayWrapper(module, ["layers.0"], example=EXAMPLE)
    module.head, module.layers[1] = nn.Linear(24, NUM_LABELS).eval(), nn.Identity().eval()
    assert torch.equal(model(images(2), early_exit=False).logits, module(images(2))[0])
    # a copy's pieces are its own, and need not be made again
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images(2), early_exit=False).logits, module(images(2))[0])
    assert len(twin._pieces) == len(model._pieces)


class Cached(ResidualNet):
    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = torch.linspace(0, 1, x.shape[-1])
        self.last = x = x * self.table
        return super().forward(x)


@version_independent
@torch.no_grad()
def test_what_a_module_keeps_while_it_is_traced_is_forgotten():
    module = Cached().eval()
    assert "layer1" in HighwayWrapper.cut_points(module, EXAMPLE)
    assert not {"table", "last"} & set(vars(module))
    model = HighwayWrapper(module, ["layer1"], example=EXAMPLE)
    assert type(module(images(2))) is torch.Tensor is type(module.last)
    assert torch.equal(model(images(2), early_exit=False).logits, module(images(2)))


# -- places that cannot be cut ---------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("layer1", "after: 'layer1' must be a list"),
        ([], "after: .* must be a list"),
        (["layr1"], "no submodule 'layr1'; did you mean 'layer1'"),
        (["layer1", "layer1"], "'layer1' is named twice"),
        (["layer2", "layer1"], "'layer1' runs before 'layer2'"),
        (["layer1", "layer1.1"], "'layer1' and 'layer1.1' are one place"),
        (
            ["layer1.0.relu"],
            "'layer1.0.relu' cannot .* runs 2 times .* nearest places that can: 'layer1.0', 'layer1.1",
        ),
        (["fc"], "'fc' cannot .* nothing but the answer .* 'dropout'"),
    ],
)
def test_places_that_cannot_be_cut(after, message):
    module, _ = plain("residual")
    with pytest.raises(ValueError, match=message):
        HighwayWrapper(module, after, example=EXAMPLE)


@version_independent
def test_places_of_a_chain_that_cannot_be_cut():
    for after, message in (
        (["2.3"], "'2.3' cannot .* nothing but the answer .*'2.2'"),
        (["0.8", "0.2"], "'0.2' runs before '0.8'"),
        (["0.11", "0"], "'0.11' and '0' are one place"),
    ):
        with pytest.raises(ValueError, match=message):
            HighwayWrapper(vgg().eval(), after, example=EXAMPLE)


class TokensFirst(nn.Module):
    """`[N, B, D]` inside, as `nn.MultiheadAttention` has it by default; and, if asked, a batch size that is fixed."""

    def __init__(self, fixed=False):
        super().__init__()
        self.patch, self.inner, self.outer = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, NUM_LABELS)
        self.fixed = fixed

    def forward(self, x):
        tokens = self.inner(self.patch(x).flatten(2).permute(2, 0, 1))
        return self.outer(tokens.mean(0).view(len(x) if self.fixed else x.shape[0], 8))


@version_independent
def test_values_that_cannot_cross():
    with pytest.raises(ValueError) as error:
        HighwayWrapper(TokensFirst().eval(), ["inner"], example=EXAMPLE)
    assert "the result of 'linear' [16, 'batch', 8] in 'inner' goes on after it" in str(error.value)
    assert "first dimension is not the batch; the nearest places that can: 'patch'" in str(error.value)
    with pytest.raises(ValueError, match=r"TokensFirst cannot be traced .*batch .* as by len\(x\)"):
        HighwayWrapper(TokensFirst(fixed=True).eval(), ["patch"], example=EXAMPLE)


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


class Windows(nn.Module):
    def forward(self, maps):
        return maps.flatten(2).transpose(1, 2).reshape(-1, 4, 8)


class Joined(nn.Module):
    def forward(self, windows):
        return windows.reshape(-1, 16, 8).mean(1)


@version_independent
@torch.no_grad()
def test_a_chain_is_traced_where_no_single_tensor_with_rows_crosses():
    patches = [nn.Conv2d(3, 8, 8, 8), nn.Flatten(2)]
    module = nn.Sequential(*patches, nn.LSTM(16, 12, batch_first=True), Last(), nn.Linear(12, NUM_LABELS)).eval()
    model = HighwayWrapper(module, ["1", "2"], example=EXAMPLE)
    assert model.config.exit_shapes == [[8, 16], [8, 12]]
    assert torch.equal(model(images(3), early_exit=False).logits, module(images(3)))
    module = nn.Sequential(patches[0], Windows(), nn.Linear(8, 8), Joined(), nn.Linear(8, NUM_LABELS))
    with pytest.raises(ValueError, match=r"'linear' \['4\*batch', 4, 8\] .* not the batch; .* can: '0', '3'"):
        HighwayWrapper(module.eval(), ["2"], example=EXAMPLE)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.round()

    @staticmethod
    def backward(context, gradient):
        return gradient


class StraightThrough(MLP):
    def forward(self, x):
        return super().forward(Rounded.apply(x))


class Checkpointed(MLP):
    def forward(self, x):
        hidden = torch.tanh(self.layers[0](x.flatten(1)))
        return self.head(checkpoint(self.layers[1], hidden, use_reentrant=True)), hidden


@version_independent
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("module", "name"), [(StraightThrough, "Rounded"), (Checkpointed, "CheckpointFunction")])
def test_a_backward_that_a_trace_would_lose(module, name):
    model = HighwayWrapper(module().eval(), ["layers.0"], example=EXAMPLE)
    with torch.no_grad():
        assert torch.equal(model(images(2), early_exit=False).logits, model.wrapped(images(2))[0])
    with pytest.raises(ValueError, match=f"the backward of {name}, a torch.autograd.Function, would be lost"):
        model.train()(images(2), early_exit=False)
    x = torch.ones(2, requires_grad=True)
    Rounded.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2)), "refused only while a module is traced"


class Average(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return super().forward(x - self.average)


@version_independent
def test_a_buffer_that_a_trace_would_not_change():
    model = HighwayWrapper(Average().eval(), ["layers.0"], example=EXAMPLE).train()
    with pytest.raises(ValueError, match="the buffer 'average' is set anew, .* in place"):
        model(images(2), early_exit=False)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        # always so, for one image and for many, which a trace cannot know
        return self.inner(x) if x.sum() > -1e9 else x


@version_independent
def test_control_flow_that_depends_on_values():
    module = nn.Sequential(nn.Conv2d(3, 8, 32), nn.Flatten(), Branching(), nn.Linear(8, NUM_LABELS)).eval()
    with pytest.raises(
        ValueError, match="'2' cannot be traced by torch.export .*places that need no .*: '0', '1', '2'"
    ):
        HighwayWrapper(module, ["2.inner"], example=EXAMPLE)
    assert HighwayWrapper.cut_points(module, EXAMPLE) == ["0", "1", "2"]


class Unused(ResidualNet):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(24, NUM_LABELS)


class BatchMean(ResidualNet):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Logarithm(ResidualNet):
    def forward(self, x):
        return super().forward(x.log())


class NoLogits(ResidualNet):
    def forward(self, x):
        return self.layer1(self.stem(x))


@version_independent
@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Unused(), {"after": ["auxiliary"]}, "'auxiliary' cannot .* does not run.*places that can"),
        (BatchMean(), {}, "answers an image otherwise where it is alone"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *vgg()), {}, "alone"),
        (Logarithm(), {}, "answers NaN or infinity"),
        (NoLogits(), {}, "returns Tensor of shape .*logits"),
        (ResidualNet(), {"example": None}, "example: ResidualNet does not say"),
        (ResidualNet(), {"example": torch.zeros(3, 32, 32)}, "example: shape"),
        (ResidualNet(), {"example": torch.zeros(1, 1, 32, 32)}, "example: ResidualNet does not take"),
        (vgg(), {"heads": "conv9"}, "unknown head 'conv9'"),
        (vgg(), {"heads": ["linear"] * 2}, "heads: 2 must be as many as exits, 1"),
        (vgg(), {"heads": [nn.Linear(7, 5)]}, "heads: Linear at exit 0 does not take"),
        (vgg(), {"heads": [nn.Flatten()]}, "heads: Flatten at exit 0 gives .*not logits"),
        (vgg(), {"exit_polcy": "never"}, "'exit_polcy' is no field"),
        (vgg(), {"image_size": 7}, "image_size: it is told by the module"),
        (vgg(), {"id2label": {0: "a"}}, "id2label: 1 names for the 5 logits"),
        (vgg(), {"exit_policy": {"name": "confidence", "threshold": [0.1, 0.2]}}, "exit_policy"),
        ("resnet", {}, "module: str is no nn.Module"),
    ],
)
def test_what_cannot_be_wrapped(module, settings, message):
    settings = {"after": ["0" if isinstance(module, nn.Sequential) else "layer1"], "example": EXAMPLE, **settings}
    if isinstance(module, nn.Module):
        module.eval()
    with pytest.raises(ValueError, match=message):
        HighwayWrapper(module, **settings)


@version_independent
@pytest.mark.parametrize(
    ("shape", "image", "expected"),
    [
        ([64, 8, 8], (32, 32), ("map", 64, (8, 8), 0)),
        ([8, 8, 64], (32, 32), ("map_last", 64, (8, 8), 0)),
        ([8, 8, 8], (32, 32), ("map", 8, (8, 8), 0)),
        ([64, 4, 8], (32, 64), ("map", 64, (4, 8), 0)),
        ([4, 8, 64], (32, 64), ("map_last", 64, (4, 8), 0)),
        ([16, 48], (32, 32), ("sequence", 48, (4, 4), 0)),
        ([197, 192], (224, 224), ("sequence", 192, (14, 14), 1)),
        ([261, 32], (224, 224), ("sequence", 32, (16, 16), 5)),
        ([9, 32], (32, 64), ("sequence", 32, (2, 4), 1)),
        ([14, 32], (32, 64), ("sequence", 32, (2, 4), 6)),
        ([5, 32], (7, 11), ("sequence", 32, (1, 5), 0)),
        ([24], (32, 32), ("vector", 24, (1, 1), 0)),
    ],
)
def test_readings(shape, image, expected):
    reading = reading_of(shape, image)
    assert (reading.kind, reading.width, reading.grid, reading.num_prefix) == expected
    tokens = reading.tokens(torch.randn(2, *shape))
    height, width = reading.grid
    assert tokens.patches.shape == (2, height * width, reading.width)
    assert tokens.prefix.shape == (2, reading.num_prefix, reading.width)


@version_independent
def test_an_output_that_no_head_reads():
    with pytest.raises(ValueError, match="is no map, sequence or vector"):
        reading_of([2, 3, 4, 5], (32, 32))


@version_independent
@torch.no_grad()
@pytest.mark.parametrize("heads", ["average", "linear", "conv1_1", "attention_r2", "vit", "mlp"])
def test_heads_of_the_package(heads):
    for family in ("vgg", "mlp"):
        model = wrapped(family, heads)
        out = model(images(3), early_exit=False)
        assert model.config.exit_types == [heads] * (len(out.exit_logits) - 1)
        for logits in out.exit_logits:
            assert logits.shape == (3, NUM_LABELS) and logits.isfinite().all() and logits.std(0).min() > 0


@pytest.mark.parametrize(("family", "head"), [("vgg", "average"), ("convnext", "average"), ("dinov2", "concat")])
def test_the_head_of_a_sequence_of_tokens_and_of_a_map(family, head):
    assert set(wrapped(family).config.exit_types) == {head}


# -- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("residual", marks=version_independent),
        pytest.param("vgg", marks=version_independent),
        "convnext",
    ],
)
def test_training_is_that_of_the_module(family):
    """Dropout, drop path and batch statistics: the same draws, the same gradients, the same running averages."""
    module, _ = plain(family)
    model = wrapped(family).train()
    module.train()
    seeded(3)
    expected = logits_of(module(images(6)))
    F.cross_entropy(expected, torch.arange(6) % 5).backward()
    seeded(3)
    out = model(images(6), early_exit=False)
    assert torch.equal(out.logits, expected)
    F.cross_entropy(out.logits, torch.arange(6) % 5).backward()
    theirs = dict(module.named_parameters())
    for name, parameter in model.wrapped.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)
    state = module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.wrapped.state_dict().items())
    assert not torch.equal(expected, logits_of(module.eval()(images(6))))


def arguments(folder, **settings):
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return HighwayTrainingArguments(
        str(folder), **{"max_steps": 2, "per_device_train_batch_size": 4, **quiet, **settings}
    )


def rows(count):
    return [{**row, "pixel_values": image} for row, image in zip(tiny_dataset(count), images(count), strict=True)]


def test_one_exit_is_trained_and_all_else_stays(tmp_path):
    model, exit_index = wrapped("residual"), 1
    before = copy.deepcopy(model.state_dict())
    settings = {"strategy": "single_exit", "train_exit": exit_index, "learning_rate": 0.1}
    HighwayTrainer(model, arguments(tmp_path, **settings), train_dataset=rows(8)).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(f"exits.{exit_index}.") for name in changed)


@version_independent
def test_exits_and_module_are_trained_by_weights(tmp_path):
    weights = [0.0, 1.0, 0.0, 2.0]
    model = wrapped("vgg", exit_loss_weights=weights)
    out = model.train()(images(4), labels=torch.arange(4))
    each = [F.cross_entropy(logits, torch.arange(4)) for logits in out.exit_logits]
    torch.testing.assert_close(out.loss, (each[1] + 2 * each[3]) / 3)
    before = copy.deepcopy(model.state_dict())
    HighwayTrainer(model, arguments(tmp_path, learning_rate=0.01), train_dataset=rows(8)).train()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {"exits.1", "wrapped.0", "wrapped.2"} == {".".join(name.split(".")[:2]) for name in changed}


def test_distillation_of_maps_is_refused(tmp_path):
    from lgvit_hf import DistillationTrainer

    model = wrapped("vgg")
    with pytest.raises(ValueError, match="distillation_lgvit.*strategy='distillation'"):
        DistillationTrainer(model, arguments(tmp_path), train_dataset=rows(4)).train()
    before = copy.deepcopy(model.state_dict())
    DistillationTrainer(model, arguments(tmp_path, strategy="distillation"), train_dataset=rows(4)).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.exits.named_parameters("exits"))


# -- TARDIS ----------------------------------------------------------------------------------------------------


def tardis(**settings):
    parts = [nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 16, 2, 2)), nn.ReLU()]
    parts.append(nn.Sequential(nn.Flatten(), nn.Linear(256, NUM_LABELS)))
    widths = (8, 16, 16)
    exits = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_LABELS)) for width in widths]
    model = HighwayWrapper.from_sequential(parts, exits, example=EXAMPLE, **settings)
    return scrambled(model), parts, exits


@version_independent
@torch.no_grad()
def test_the_form_of_tardis():
    model, parts, exits = tardis()
    expected, x = [], images(6)
    for part, head in zip(parts, [*exits, nn.Identity()], strict=True):
        x = part(x.clone())
        expected.append(head(x))
    found = model(images(6), early_exit=False).exit_logits
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    # one exit chosen
    for index in range(4):
        model.set_exit_policy("fixed", exit_index=index)
        assert_close_to_largest(model(images(6)).logits, expected[index])
    # accuracy of each exit
    table = collect(model, rows(20))
    labels = torch.arange(20) % NUM_LABELS
    for index, accuracy in enumerate(table.accuracies()):
        alone = run_all(model.segments(), State({"pixel_values": images(20)}))[index]
        assert accuracy == pytest.approx((alone.argmax(-1) == labels).float().mean().item())

    # a confidence of one's own: the distance of the two largest logits, which half of the samples have at the first
    everything = torch.stack(model(images(40), early_exit=False).exit_logits)
    best, second = everything[0].topk(2).values.unbind(-1)
    least = (best - second).sort().values[19:21].mean()

    def sure(logits, memory):
        best, second = logits.topk(2).values.unbind(-1)
        return best - second > least, memory

    model.set_exit_policy(sure)
    out = model(images(40))
    first = [
        next((index for index in range(3) if sure(everything[index, row : row + 1], {})[0]), 3) for row in range(40)
    ]
    assert out.exit_index.tolist() == first and len(set(first)) > 1


@version_independent
def test_parts_and_exits_must_fit():
    parts = [nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(512, 5))]
    for exits in ([], [nn.Flatten(), nn.Flatten()]):
        with pytest.raises(ValueError, match="must be one less than the 2 parts"):
            HighwayWrapper.from_sequential(parts, exits, example=EXAMPLE)


# -- saving ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_equal_models(ours, expected):
    theirs = expected.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    mine, other = (model.eval()(images(3), early_exit=False).exit_logits for model in (ours, expected))
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_module_of_ones_own_is_given_when_it_is_loaded(tmp_path):
    model = wrapped("vgg", id2label=dict(enumerate("abcde")))
    model.set_exit_policy("entropy", threshold=[0.1, 0.2, 0.3])
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again, info = HighwayWrapper.from_pretrained(tmp_path, module=vgg(), output_loading_info=True)
    assert not info["missing_keys"] and not again.training and again.config.id2label[4] == "e"
    assert again.exit_policy.to_dict() == model.exit_policy.to_dict()
    assert_equal_models(again, model)
    fixed = {"name": "fixed", "exit_index": 1}
    assert HighwayWrapper.from_pretrained(tmp_path, vgg(), exit_policy=fixed).config.exit_policy == fixed
    with pytest.raises(ValueError, match="Sequential is no model of transformers; give a new one"):
        HighwayWrapper.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no submodule '0.2'"):
        HighwayWrapper.from_pretrained(tmp_path, module=MLP())
    with pytest.raises(ValueError, match="'exit_polcy'"):
        HighwayWrapper.from_pretrained(tmp_path, module=vgg(), exit_polcy="never")
    wider = vgg()
    wider[2][3] = nn.Linear(32, 7)
    with pytest.raises(ValueError, match="7 labels, but was .* 5 when it was saved"):
        HighwayWrapper.from_pretrained(tmp_path, module=wider)


class Tied(MLP):
    def __init__(self):
        super().__init__()
        self.layers[2].weight = self.layers[1].weight


def test_tied_weights_are_saved_once(tmp_path):
    model = HighwayWrapper(Tied().eval(), ["layers.0"], example=EXAMPLE)
    model.save_pretrained(tmp_path)
    tied = {"wrapped.layers.1.weight", "wrapped.layers.2.weight"}
    assert len(tied & set(load_file(tmp_path / "model.safetensors"))) == 1
    again = HighwayWrapper.from_pretrained(tmp_path, module=Tied())
    assert again.wrapped.layers[2].weight is again.wrapped.layers[1].weight
    assert_equal_models(again, model)


@version_independent
def test_no_tensor_is_missed_silently(tmp_path):
    model = wrapped("vgg")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("wrapped.0.1.running_mean", "exits.1.classifiers.0.bias"):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"no tensor '{name}'"):
            HighwayWrapper.from_pretrained(tmp_path, module=vgg())
    save_file({**tensors, "wrapped.more": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="unknown tensor 'wrapped.more'"):
        HighwayWrapper.from_pretrained(tmp_path, module=vgg())
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="a pickle"):
        HighwayWrapper.from_pretrained(tmp_path, module=vgg())


@version_independent
def test_heads_of_ones_own_are_given_when_they_are_loaded(tmp_path):
    model, parts, exits = tardis()
    model.save_pretrained(tmp_path)
    again = HighwayWrapper.from_pretrained(tmp_path, module=copy.deepcopy(model.wrapped), heads=copy.deepcopy(exits))
    assert_equal_models(again, model)
    with pytest.raises(ValueError, match="heads: 0 modules, but 3 of the exits"):
        HighwayWrapper.from_pretrained(tmp_path, module=nn.Sequential(*parts))


@pytest.mark.parametrize("family", ["beit", "resnet"], indirect=True)
def test_models_of_transformers_are_built_from_their_config(family, tmp_path):
    _, model = family
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is HighwayWrapper and type(again.wrapped) is type(model.wrapped)
    assert_equal_models(again, model)


def test_a_config_names_no_code(tmp_path):
    model = wrapped("resnet")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes in (
        {"module_class": "os.system"},
        {"module_class": "transformers.Trainer"},
        {"module_class": "transformers.ViTForImageClassification"},
        {"module_config": {**config["module_config"], "model_type": "nothing"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match="module: "):
            HighwayWrapper.from_pretrained(tmp_path)


@version_independent
@pytest.mark.parametrize(
    "changes",
    [
        {"after": "layer1"},
        {"after": [1, 2]},
        {"exit_shapes": [[8, 4, 4]]},
        {"exit_shapes": [[8, 4, 4], [0]]},
        {"exit_positions": [1, 3]},
        {"exit_types": ["linear", "linaer"]},
        {"exit_loss_weights": [1.0]},
        {"pool": "cls"},
    ],
)
def test_wrong_configs(changes):
    settings = {"after": ["layer1", "layer2"], "exit_shapes": [[8, 4, 4], [16, 2, 2]], **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        HighwayWrapperConfig(**settings)


@version_independent
def test_what_a_wrapped_module_does_not_do():
    model = wrapped("vgg")
    for run, message in (
        (lambda: model.truncate(0), "truncate: .*set_exit_policy"),
        (lambda: model(images(2), output_hidden_states=True), "output_hidden_states: a wrapped module"),
        (lambda: model(tiny_images(2, 16)), "16 x 16 pixels, but the model takes 32 x 32"),
        (lambda: model(tiny_images(2, 16), interpolate_pos_encoding=True), "cut for images of one size"),
    ):
        with pytest.raises(ValueError, match=message):
            run()


# -- the other rooms -------------------------------------------------------------------------------------------


@version_independent
def test_calibrated_and_benchmarked():
    model = wrapped("vgg")
    data = [{"pixel_values": image} for image in images(60)]
    # any drop is allowed: all samples exit at the first exit
    report = calibrate(collect(model, data), max_accuracy_drop=1.0)
    model.set_exit_policy(report.policy)
    assert report.mean_depth == 1 and set(model(images(9)).exit_layer.tolist()) == {1}
    found = benchmark(model, images(4), batch_sizes=[2], repeats=1)
    parameters = found["parameters"]
    assert parameters["total"] == model.num_parameters() == parameters["blocks"] + sum(parameters["heads"])
    assert [row["macs"] for row in found["profile"] if row["part"] == "block"] == model_macs(model).backbone_costs


def assert_exports(model, layout, folder):
    from lgvit_hf import ORTHighway, export_onnx

    model.set_exit_policy(policies_for(model(images(40), early_exit=False).exit_logits)[0])
    export_onnx(model, folder, layout)
    expected, found = model(images(40)), ORTHighway.from_pretrained(folder)(images(40))
    assert len(expected.exit_index.unique()) == 2
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@version_independent
@torch.no_grad()
def test_export_of_a_model_of_transformers(tmp_path):
    module, after = plain("dinov2")
    model = HighwayWrapper(module, after[:1], example=EXAMPLE)
    scrambled(model.exits)
    assert_exports(model, "segments", tmp_path / "onnx")


class TwoBranches(nn.Module):
    """A sum that crosses the cut, and one behind it."""

    def __init__(self):
        super().__init__()
        self.patch, self.first, self.second = nn.Conv2d(3, 8, 8, 8), nn.Linear(128, 8), nn.Linear(8, 8)
        self.third, self.answer = nn.Linear(8, 8), nn.Linear(8, NUM_LABELS)

    def forward(self, x):
        x = self.first(self.patch(x).flatten(1))
        x = x + self.second(x)
        return self.answer(x + self.third(x))


@version_independent
@torch.no_grad()
def test_export_of_a_sum_that_crosses_a_cut(tmp_path):
    model = HighwayWrapper(scrambled(TwoBranches()), ["third"], example=EXAMPLE)
    scrambled(model.exits)
    state = model.segments()[0].advance(State({"pixel_values": images(2)}))
    assert list(state.tensors) == ["hidden", "from_add"]
    assert_exports(model, "single", tmp_path / "onnx")


# -- the recipe ------------------------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_the_recipe_says_what_it_would_train(network, capsys):
    main = runpy.run_path(str(Path(__file__).resolve().parents[1] / "recipes" / "any_model.py"))["main"]
    main(["--network", network, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    macs = [float(line.split("MMACs")[0].split()[-1]) for line in lines if line.startswith("exit ")]
    assert len(macs) == 6 and macs == sorted(macs)
