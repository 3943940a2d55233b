"""What other machines ask of the code: hooks that bring weights, several devices and dtypes, no float64, waiting."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.utils import FullyShardedDataParallelPlugin, send_to_device
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn

from lgvit_hf import AViT, AViTConfig
from lgvit_hf.data import batches, devices
from lgvit_hf.data.batches import in_batches, to_model
from lgvit_hf.engine import Answers, run_all, run_early
from lgvit_hf.evaluation.benchmark import benchmark
from lgvit_hf.evaluation.calibration import fit_temperature
from lgvit_hf.evaluation.exit_table import ExitTable, collect
from lgvit_hf.evaluation.image_scores import widest_spread
from lgvit_hf.evaluation.metrics import expected_calibration_error, per_class
from lgvit_hf.evaluation.profiling import peak_memory
from lgvit_hf.policies import build_policy
from lgvit_hf.segments import Segment, State, Tokens
from lgvit_hf.token_halting import token_macs
from tests.devices import FIRST, SECOND, Elsewhere, OtherDevices, here, moved, on
from tests.seeds import generator, seeded
from tests.test_modeling_common import assert_close_to_largest, widest_gap
from tests.tiny import KINDS, NUM_LABELS, scrambled, tiny_dataset, tiny_images, tiny_model
from tests.wrapped import wrapped

HEADS = ["conv1_1", "attention_r2", "linear", "average"]


@torch.no_grad()
def tiny_avit(backbone="vit"):
    """Random weights, and a gate at which some tokens halt early and others go through all blocks."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    for center in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
        seeded()
        model = scrambled(
            AViT(
                AViTConfig(
                    backbone=backbone,
                    image_size=16,
                    patch_size=4,
                    num_labels=NUM_LABELS,
                    gate_scale=1.0,
                    gate_center=center,
                    **sizes,
                )
            )
        ).eval()
        depth = model(tiny_images(4)).token_depth
        if depth.min() < 4 and (depth.amax(1) == 4).any():
            return model
    raise AssertionError("tokens halt all alike")


MODELS = {
    **{kind: lambda kind=kind: tiny_model(kind, exit_positions=[1, 2, 3, 4], exit_types=HEADS) for kind in KINDS},
    "truncated": lambda: tiny_model("swin").truncate(1),
    "no_exits": lambda: tiny_model("vit", exit_positions=[], exit_types=[]),
    "avit": tiny_avit,
    "avit_deit": lambda: tiny_avit("deit"),
    "wrapped": lambda: wrapped("vgg"),
    "wrapped_graph": lambda: wrapped("residual"),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
few_models = pytest.mark.parametrize("kind", ["vit", "deit", "swin"])


def separating(exit_logits):
    """A threshold for the first exits that some rows pass by far, and others do not."""
    scores = exit_logits[0].float().softmax(-1).amax(-1)
    return widest_gap(scores.tolist())


@torch.no_grad()
def exiting_in_parts(model, images):
    """The model with thresholds by which rows leave at several exits."""
    logits = model(images, early_exit=False).exit_logits
    thresholds = [separating([exit]) for exit in logits[:-1]]
    model.set_exit_policy("confidence", threshold=thresholds)
    return model


# -- units of FSDP and of device maps --------------------------------------------------------------------------


@every_model
def test_every_unit_is_there(make):
    model = make()
    names = set(model._no_split_modules)
    there = {type(module).__name__ for module in model.modules()}
    assert names <= there
    for head in getattr(model, "exits", []):
        assert type(head).__name__ in names
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    units = {type(module).__name__ for module in model.modules() if policy(module)}
    assert names <= units <= there
    plugin.set_auto_wrap_policy(model)
    classes = {get_module_class_from_name(model, name) for name in names}
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == classes and None not in classes


@every_model
def test_a_device_map_cuts_no_unit(make):
    model = make()
    total = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    names = model._no_split_modules
    for share in (0.3, 0.5, 0.7):
        budgets = {"cpu": int(share * total), "disk": 10 * total}
        places = infer_auto_device_map(model, budgets, no_split_module_classes=names)
        units = [name for name, module in model.named_modules() if type(module).__name__ in names]
        cut = [key for key in places for unit in units if key.startswith(f"{unit}.")]
        assert not cut and "disk" in places.values()


# -- hooks -----------------------------------------------------------------------------------------------------


def asked_at_every_exit(model):
    if hasattr(model, "set_exit_policy"):
        model.set_exit_policy("confidence", threshold=1 - 1e-7)


def ways_to_run(model, images):
    """Early exit (tokens removed), all exits, and both in training."""
    if isinstance(model, AViT):
        return [lambda: model.eval()(images), lambda: model.train()(images)]
    return [
        lambda: model.eval()(images),
        lambda: model.eval()(images, early_exit=False),
        lambda: model.train()(images, early_exit=False),
        lambda: model.train()(images, early_exit=True),
    ]


@pytest.mark.parametrize("kind", [*KINDS, "avit", "avit_deit", "wrapped"])
def test_hooks_of_all_modules_with_weights_run(kind):
    model = MODELS[kind]()
    asked_at_every_exit(model)
    images = tiny_images(4, size=32 if kind == "wrapped" else 16)
    heads = [module for head in getattr(model, "exits", []) for module in (head, getattr(head, "body", head))]
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    names = {module: name for name, module in model.named_modules()}
    # ViT's embeddings have weights of their own beside those of the modules inside
    expected = {names[module] for module in {*heads, *units, *owners}}
    ran = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.add(names.get(module)))
    for run in ways_to_run(model, images):
        ran.clear()
        run()
        assert expected <= ran, sorted(expected - ran)


def test_a_hook_on_a_head_body_sees_the_map():
    model = tiny_model("vit", exit_positions=[2], exit_types=["conv1_1"])
    model.set_exit_policy("fixed", exit_index=0)
    images, seen = tiny_images(3), []
    expected = model(images).logits
    model.exits[0].body.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-5, atol=1e-5)
    assert seen == [(3, 16, 32)]


@pytest.mark.parametrize("kind", [*KINDS, "avit"])
@torch.no_grad()
def test_weights_that_are_elsewhere_until_a_module_runs(kind):
    model, images = MODELS[kind](), tiny_images(12)
    if kind != "avit":
        exiting_in_parts(model, images)
    expected, plain = model(images), copy.deepcopy(model)
    cpu_offload(model, execution_device="cpu")
    assert all(weight.is_meta for weight in model.parameters())
    found = model(images)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.exit_layer, expected.exit_layer)
    if kind == "vit":
        table = collect(model, tiny_dataset(12))
        assert torch.equal(table.logits, collect(plain, tiny_dataset(12)).logits) and table.weights is None


# -- several devices -------------------------------------------------------------------------------------------


def spread(model):
    """Every other unit on the second device, where what it is given is sent, as accelerate's hooks do."""
    moved(model, FIRST)
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]

    def send(device, module, args, kwargs):
        return send_to_device((args, kwargs), device)

    for number, module in enumerate(units):
        device = SECOND if number % 2 else FIRST
        moved(module, device)
        module.register_forward_pre_hook(
            lambda *given, device=device: send(device, *given), with_kwargs=True, prepend=True
        )
    for module in model.modules():
        if module not in units and any(True for _ in module.parameters(recurse=False)) and not inside(module, units):
            module.register_forward_pre_hook(lambda *given: send(FIRST, *given), with_kwargs=True)
    return model


def inside(module, units):
    return any(module is each for unit in units for each in unit.modules())


@few_models
@torch.no_grad()
def test_answers_of_several_devices_come_to_one(kind):
    model, images, labels = MODELS[kind](), tiny_images(24), torch.arange(24) % NUM_LABELS
    exiting_in_parts(model, images)
    expected, everything = model(images, labels), model(images, labels, early_exit=False)
    assert len(expected.exit_index.unique()) > 1
    spread(model)
    with OtherDevices():
        found = model(on(images, FIRST), on(labels, FIRST))
        with_features = model(on(images, FIRST), on(labels, FIRST), early_exit=False)
        policy, segments, state = model.exit_policy, model.segments(), State({"pixel_values": on(images, FIRST)})
        logits = run_all(segments, state)
        answers = run_early(segments, state, policy)
    devices_of = {each.device for each in (*logits, *with_features.exit_features, *vars(answers).values(), found.loss)}
    assert devices_of == {FIRST}
    assert here(found.exit_index).tolist() == expected.exit_index.tolist() == here(answers.exit_index).tolist()
    assert_close_to_largest(here(found.logits), expected.logits)
    for ours, theirs in zip(with_features.exit_logits, everything.exit_logits, strict=True):
        assert_close_to_largest(here(ours), theirs)


def test_rows_are_selected_where_each_tensor_lies():
    with OtherDevices():
        state = State({"a": on(torch.arange(3.0), FIRST), "b": on(torch.arange(3), SECOND)})
        chosen = state.select(on(torch.tensor([2, 0]), FIRST))
    assert chosen["a"].device == FIRST == state.device and chosen["b"].device == SECOND
    assert here(chosen["b"]).tolist() == [2, 0]


def test_tokens_move_and_are_found():
    tokens = Tokens(torch.zeros(2, 6, 4), (2, 3), torch.zeros(2, 1, 4))
    half = tokens.to(torch.bfloat16)
    assert (half.patches.dtype, half.prefix.dtype, half.grid) == (torch.bfloat16, torch.bfloat16, (2, 3))
    with OtherDevices():
        there = send_to_device((tokens,), FIRST)[0]
    assert there.patches.device == there.prefix.device == FIRST
    doubled = torch.utils._pytree.tree_map(lambda tensor: tensor + 1, tokens)
    assert doubled.grid == (2, 3) and doubled.patches.eq(1).all() and doubled.prefix.eq(1).all()


# -- several dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.float64, torch.float16, torch.bfloat16),
    ],
)
def test_exits_of_different_dtypes(dtypes):
    numbers = generator()
    logits = [2 * torch.randn(64, 3, generator=numbers).to(dtype) for dtype in dtypes]
    segments = [
        Segment(depth, (), lambda state, each=each: each[state["row"]]) for depth, each in enumerate(logits, start=1)
    ]
    policy = build_policy({"name": "confidence", "threshold": 0.7}, 2)
    together = run_early(segments, State({"row": torch.arange(64)}), policy)
    alone = [run_early(segments, State({"row": torch.tensor([row])}), policy) for row in range(64)]
    assert together.exit_index.tolist() == [int(each.exit_index) for each in alone]
    assert len(together.exit_index.unique()) > 1
    # values are exact: the dtype holds those of all
    assert torch.equal(together.logits.double(), torch.cat([each.logits.double() for each in alone]))
    assert together.exit_score.dtype == torch.float32


@few_models
@torch.no_grad()
def test_heads_in_float32_on_a_backbone_in_bfloat16(kind):
    model, images = MODELS[kind](), tiny_images(32)
    model.bfloat16().exits.float()
    check_mixed_batch(model, images, [torch.float32] * 4 + [torch.bfloat16])


@few_models
@torch.no_grad()
def test_autocast(kind):
    model, images = MODELS[kind](), tiny_images(32)
    with torch.autocast("cpu", torch.bfloat16):
        check_mixed_batch(model, images, [torch.bfloat16] * 5)


def check_mixed_batch(model, images, dtypes):
    exit_logits = exiting_in_parts(model, images)(images, early_exit=False).exit_logits
    assert [each.dtype for each in exit_logits] == dtypes
    out = model(images)
    assert len(out.exit_index.unique()) > 1
    for row, index in enumerate(out.exit_index.tolist()):
        expected = exit_logits[index][row].float()
        assert (out.logits[row].float() - expected).abs().max() <= 0.1 * exit_logits[index].float().abs().max()


def test_training_under_autocast():
    model, images = MODELS["vit"]().train(), tiny_images(8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, torch.arange(8) % NUM_LABELS, early_exit=False).loss
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


# -- no float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "avit"])
@torch.no_grad()
def test_all_of_it_on_a_device_without_float64(kind):
    model, rows = MODELS[kind](), tiny_dataset(12)
    images = torch.stack([row["pixel_values"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    if kind != "avit":
        exiting_in_parts(model, images)
    expected = model(images)
    collected = None if kind == "avit" else collect(model, rows)
    moved(model, FIRST)
    with OtherDevices():
        out = model(on(images, FIRST))
        assert model.device == FIRST and isinstance(out.logits, Elsewhere)
        assert_close_to_largest(here(out.logits), expected.logits)
        assert here(out.exit_layer).tolist() == expected.exit_layer.tolist()
        if kind == "avit":
            assert torch.equal(
                token_macs(model.config, out.token_depth), token_macs(model.config, expected.token_depth)
            )
            assert widest_spread(out.token_depth, 3) == widest_spread(expected.token_depth, 3)
            losses = model(on(images, FIRST), on(labels, FIRST))
            assert here(losses.loss).isfinite()
            return
        names = [str(label) for label in range(NUM_LABELS)]
        answers = Answers(*(getattr(out, name) for name in ("logits", "exit_index", "exit_layer", "exit_score")))
        assert len(per_class(answers, on(labels, FIRST), 6, names)) == NUM_LABELS
        assert fit_temperature(out.logits, on(labels, FIRST)) > 0
        assert expected_calibration_error(out.logits, on(labels, FIRST)) >= 0
        table = collect(model, rows)
    assert table.logits.device.type == "cpu"
    assert_close_to_largest(table.logits, collected.logits)


def test_the_device_without_float64_refuses_it():
    with OtherDevices(), pytest.raises(AssertionError, match="mps:0 has no torch.float64"):
        on(torch.zeros(2), FIRST).double()
    with OtherDevices(), pytest.raises(AssertionError, match=r"tensors on \['cpu', 'mps:0'\]"):
        on(torch.zeros(2), FIRST) + torch.zeros(2)


# -- waiting ---------------------------------------------------------------------------------------------------


def pretend(monkeypatch, kind, held=None, count=1):
    """An accelerator of a type; the devices that are waited for."""
    waited = []
    backend = SimpleNamespace(device_count=lambda: count)
    if held is not None:
        backend.memory_allocated = held.__getitem__
    monkeypatch.setattr(torch, kind, backend)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    return waited


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("kind", "held", "count", "expected"),
    [("mps", None, 1, [0]), ("xpu", [0, 5], 2, [1]), ("cuda", [1, 0, 1], 3, [0, 2]), ("cuda", [0], 1, [])],
)
def test_timing_waits_for_accelerators_of_every_type(kind, held, count, expected, monkeypatch):
    waited = pretend(monkeypatch, kind, held, count)
    devices.wait_for_accelerators()
    assert devices.accelerator() == torch.device(kind) and waited == expected


@pytest.mark.version_independent
def test_every_timed_run_is_waited_for(monkeypatch):
    from lgvit_hf.evaluation.timing import time_interleaved

    waited = pretend(monkeypatch, "mps")
    order = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda index: order.append("wait"))
    time_interleaved({"a": lambda: order.append("run")}, repeats=2, warm_up=0)
    assert order == ["wait", "run", "wait"] * 2 and not waited


@pytest.mark.version_independent
def test_nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    devices.wait_for_accelerators()
    assert devices.accelerator() is None and devices.device_name(torch.device("cpu")) == "cpu"


# -- batches ---------------------------------------------------------------------------------------------------


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("kind", "rows", "workers", "pinned"),
    [(None, 100, 0, False), ("cuda", 100, 2, True), ("cuda", 12, 0, True), ("mps", 1000, 2, False)],
)
def test_workers_and_pinned_memory_where_there_is_an_accelerator(kind, rows, workers, pinned, monkeypatch):
    monkeypatch.setattr(batches, "accelerator", lambda: kind and torch.device(kind))
    monkeypatch.setattr(batches.os, "cpu_count", lambda: 2)
    loader = in_batches(range(rows), 10)
    assert (loader.num_workers, loader.pin_memory, len(loader)) == (workers, pinned, -(-rows // 10))
    assert in_batches(range(rows), 10, num_workers=3).num_workers == 3


def test_workers_bring_the_same_rows():
    model, rows = tiny_model("vit", exit_positions=[2], exit_types="linear"), tiny_dataset(20)
    alone, helped = collect(model, rows, batch_size=8), collect(model, rows, batch_size=8, num_workers=2)
    assert torch.equal(alone.logits, helped.logits) and torch.equal(alone.labels, helped.labels)


def test_pixels_go_where_the_model_is():
    model = nn.Linear(2, 2)
    model.device, model.dtype = torch.device("meta"), torch.bfloat16
    pixels = to_model(torch.zeros(1, 2), model)
    assert (pixels.device.type, pixels.dtype) == ("cpu", torch.bfloat16)


# -- one copy --------------------------------------------------------------------------------------------------


def test_a_table_is_there_once(tmp_path):
    labels = 400
    model, rows = (
        tiny_model("vit", exit_positions=[1, 2, 3], exit_types="linear", num_labels=labels),
        tiny_dataset(300),
    )
    found = {}
    peak = peak_memory(lambda: found.update(table=collect(model, rows, batch_size=16)), torch.device("cpu"))
    table = found["table"]
    with torch.no_grad():
        out = model(torch.stack([row["pixel_values"] for row in rows]), early_exit=False)
        for index, logits in enumerate(out.exit_logits):
            torch.testing.assert_close(table.logits[index], logits, rtol=1e-4, atol=1e-5)
    assert table.logits.nbytes < peak < 1.6 * table.logits.nbytes
    table.save(tmp_path / "table.safetensors")
    assert torch.equal(ExitTable.load(tmp_path / "table.safetensors").logits, table.logits)


def test_a_benchmark_on_another_device():
    model = moved(tiny_model("vit", exit_positions=[2], exit_types="linear"), FIRST)
    with OtherDevices():
        report = benchmark(model, tiny_images(4), batch_sizes=[2], repeats=1)
    assert report["cost_table"]["device"].startswith("mps")
