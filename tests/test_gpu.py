"""What the tests of the CPU cannot show, on an accelerator of any type: `make test PYTEST_ARGS="-m gpu"`."""

import copy

import pytest
import torch

from lgvit_hf.data.devices import accelerator, device_name
from lgvit_hf.evaluation.benchmark import benchmark
from lgvit_hf.evaluation.exit_table import collect
from tests.test_accelerators import MODELS, exiting_in_parts
from tests.test_compile import assert_same
from tests.test_modeling_common import assert_close_to_largest
from tests.tiny import KINDS, NUM_LABELS, tiny_dataset, tiny_images, tiny_model

DEVICE = accelerator()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="PyTorch finds no accelerator on this machine"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
# TF32 and other orders of summing
TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def pair(kind, num_images=32):
    """A model on the CPU whose samples leave at several exits, the same on the accelerator, and images."""
    images = tiny_images(num_images)
    model = exiting_in_parts(MODELS[kind](), images)
    return model, copy.deepcopy(model).to(DEVICE), images


@every_kind
@torch.no_grad()
def test_all_exits_answer_as_on_the_cpu(kind):
    model, there, images = pair(kind)
    expected, found = model(images, early_exit=False), there(images.to(DEVICE), early_exit=False)
    assert found.logits.device.type == DEVICE.type
    for ours, theirs in zip(found.exit_logits, expected.exit_logits, strict=True):
        assert_close_to_largest(ours.cpu(), theirs, TOLERANCE)


@every_kind
@torch.no_grad()
def test_a_mixed_batch_answers_as_its_rows_alone(kind):
    model, there, images = pair(kind)
    found = there(images.to(DEVICE))
    assert len(found.exit_index.unique()) > 1
    alone = [there(image[None].to(DEVICE)) for image in images]
    assert found.exit_index.tolist() == [int(out.exit_index) for out in alone]
    assert_close_to_largest(found.logits.cpu(), torch.cat([out.logits for out in alone]).cpu(), TOLERANCE)


@torch.no_grad()
def test_tokens_leave_as_on_the_cpu():
    model, images = MODELS["avit"](), tiny_images(9)
    expected, there = model(images), copy.deepcopy(model).to(DEVICE)
    found = there(images.to(DEVICE))
    assert_close_to_largest(found.logits.cpu(), expected.logits, 5e-2)
    assert (found.token_depth.cpu() == expected.token_depth).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(dtype):
    model, there, images = pair("vit")
    with torch.autocast(DEVICE.type, dtype):
        out = there(images.to(DEVICE))
        exit_logits = there(images.to(DEVICE), early_exit=False).exit_logits
    rows = zip(out.logits, out.exit_index.tolist(), strict=True)
    for row, (logits, index) in enumerate(rows):
        expected = exit_logits[index][row].float()
        assert (logits.float() - expected).abs().max() <= 0.1 * exit_logits[index].float().abs().max()
    assert out.exit_score.dtype == torch.float32


def test_a_training_step_as_on_the_cpu():
    model, there, images = pair("swin", 8)
    labels = torch.arange(8) % NUM_LABELS
    # in `eval()` mode nothing is dropped at random
    model(images, labels, early_exit=False).loss.backward()
    there(images.to(DEVICE), labels.to(DEVICE), early_exit=False).loss.backward()
    theirs = dict(model.named_parameters())
    for name, weight in there.named_parameters():
        assert_close_to_largest(weight.grad.cpu(), theirs[name].grad, 5e-2)


def test_collect_and_benchmark():
    model, there, _ = pair("vit")
    rows = tiny_dataset(64)
    expected, found = collect(model, rows), collect(there, rows, batch_size=8, num_workers=2)
    assert found.logits.device.type == "cpu" and found.weights == expected.weights
    assert_close_to_largest(found.logits, expected.logits, TOLERANCE)
    report = benchmark(there, tiny_images(16), batch_sizes=[1, 8], repeats=2)
    assert report["cost_table"]["device"] == device_name(there.device)
    assert all(batch["early_exit"]["mean_ms"] > 0 for batch in report["batches"])


def test_compiled_answers_are_the_same():
    model, there, images = pair("vit")
    with torch.no_grad():
        expected, found = there(images.to(DEVICE)), torch.compile(there, backend="aot_eager")(images.to(DEVICE))
    assert_same(found, expected)


def test_what_lies_on_two_devices():
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    model = tiny_model("vit", exit_positions=[2, 4], exit_types=["conv1_1", "attention_r2"])
    images = tiny_images(16)
    exiting_in_parts(model, images)
    with torch.no_grad():
        expected = model(images)
        # heads on the processor, whose weights are brought to the accelerator by hooks
        places = {name: "cpu" if name == "exits" else str(DEVICE) for name, _ in model.named_children()}
        found = dispatch_model(model, places, main_device=str(DEVICE))(images)
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    assert_close_to_largest(found.logits.cpu(), expected.logits, TOLERANCE)
