"""What a user may say of devices, numbers and labels when a saved model is loaded, for every model."""

import re

import pytest
import torch
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from tests.test_cross_version import tiny_avit
from tests.tiny import KINDS, tiny_images, tiny_model

EXITS = {"exit_positions": [2, 3, 5], "exit_types": ["conv1_1", "vit", "attention_r2"]}
ALL_KINDS = (*KINDS, "avit", "performer")
every_kind = pytest.mark.parametrize("kind", ALL_KINDS)


@pytest.fixture
def saved(kind, tmp_path):
    """A model and the folder it is saved in."""
    if kind == "avit":
        model = tiny_avit("deit")
    elif kind == "performer":
        model = tiny_model("vit", **EXITS, attn_implementation="performer", feature_map_dim=8)
    else:
        model = tiny_model(kind, **EXITS)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def load(folder, **arguments):
    return AutoModelForImageClassification.from_pretrained(folder, **arguments).eval()


def answers(model, images):
    """Logits of every exit, `[E, B, C]`; of an A-ViT, its own."""
    with torch.no_grad():
        if model.config.model_type == "avit":
            return model(images).logits[None]
        return torch.stack(model(images, early_exit=False).exit_logits)


# "auto" asks each model what must stay together
@pytest.mark.parametrize(
    ("kind", "device_map"), [*((kind, "auto") for kind in ALL_KINDS), ("vit", "cpu"), ("avit", {"": "cpu"})]
)
def test_device_map(saved, device_map):
    pytest.importorskip("accelerate", reason='pip install "lgvit-hf[train]"')
    model, folder = saved
    again = load(folder, device_map=device_map)
    assert not [name for name, tensor in again.state_dict().items() if tensor.is_meta]
    on_cpu = again.to("cpu")
    assert all(torch.equal(tensor, on_cpu.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(answers(on_cpu, tiny_images(3)), answers(model, tiny_images(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        *((kind, "dtype", torch.bfloat16) for kind in ALL_KINDS),
        *((kind, "torch_dtype", torch.float16) for kind in ("vit", "swin", "avit", "performer")),
    ],
)
def test_dtype(saved, name, dtype):
    model, folder = saved
    again = load(folder, **{name: dtype})
    assert again.dtype == dtype and {p.dtype for p in again.parameters()} == {dtype}
    expected = model.to(dtype).state_dict()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in again.named_parameters())
    # images may stay float32, as the image processor gives them
    logits = answers(again, tiny_images(3))
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("kind", ["vit", "swin", "avit"])
def test_dtype_of_the_file(saved, tmp_path):
    model, folder = saved
    model.to(torch.bfloat16).save_pretrained(folder)
    assert load(folder, dtype="auto").dtype == torch.bfloat16
    assert load(folder, dtype=torch.float32).dtype == torch.float32


@every_kind
def test_other_labels_make_new_classifiers_and_say_so(saved, caplog):
    model, folder = saved
    logging.enable_propagation()
    try:
        again, info = AutoModelForImageClassification.from_pretrained(
            folder, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
        )
    finally:
        logging.disable_propagation()
    classifiers = {name for name in model.state_dict() if "classifier" in name}
    assert len(classifiers) >= 2
    # names alone, or names with both shapes
    assert {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]} == classifiers
    assert not [name for name in info["missing_keys"] if name not in classifiers]
    assert re.search(r"classifier.*weight.*\n?.*(shape|size)", caplog.text) and "9" in caplog.text
    logits = answers(again.eval(), tiny_images(2))
    assert logits.shape[-1] == 9 and logits.isfinite().all()
    for name, tensor in again.state_dict().items():
        assert "classifier" in name or torch.equal(tensor, model.state_dict()[name])
    weights = [again.state_dict()[name] for name in classifiers if name.endswith("weight")]
    assert all(0 < weight.std() < 1 for weight in weights), "new ones start as others do"
    with pytest.raises((ValueError, RuntimeError), match="mismatch"):
        load(folder, num_labels=9)
