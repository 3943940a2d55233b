"""A plain checkpoint and data whose classes are in another order, or others."""

import logging

import pytest
import torch

from lgvit_hf.data.processing import make_processor
from lgvit_hf.hub.loading import class_order, open_avit, open_model
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, KINDS, tiny_images, tiny_native

NAMES = ["dog", "cat", "emu", "gnu", "ant"]


def saved(folder, kind, names=NAMES, **settings):
    named = (
        {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    )
    plain = tiny_native(kind, **named, **settings)
    plain.save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)
    return plain


def opened(folder, names, avit):
    model, _ = (open_avit if avit else open_model)(str(folder), label_names=names)
    if not avit:
        model.set_exit_policy("never")
    return model.eval()


def classifiers(model, avit=False):
    return model.classifiers if avit else [m for name, m in model.named_children() if "classifier" in name]


CASES = [(kind, False) for kind in KINDS] + [("vit", True), ("deit", True)]


@pytest.mark.parametrize(("kind", "avit"), CASES)
def test_the_same_classes_in_another_order(tmp_path, kind, avit, caplog):
    plain = saved(tmp_path, kind)
    order = rng().permutation(5)
    while (order == range(5)).all():
        order = rng(int(order.sum()) + 1).permutation(5)
    names = [NAMES[index] for index in order]
    with caplog.at_level(logging.WARNING):
        model = opened(tmp_path, names, avit)
    assert "the classifier is new" not in caplog.text
    assert [model.config.id2label[index] for index in range(5)] == names == list(model.config.label2id)
    heads, ours = classifiers(plain), classifiers(model, avit)
    assert len(heads) == len(ours) == (2 if kind == "deit" else 1)
    for theirs, mine in zip(heads, ours, strict=True):
        assert torch.equal(mine.weight, theirs.weight[order]) and torch.equal(mine.bias, theirs.bias[order])
    if not avit:
        images = tiny_images(4)
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, plain(images).logits[:, order])


@pytest.mark.parametrize("names", [NAMES, None], ids=["same", "generic"])
@pytest.mark.parametrize(("kind", "avit"), CASES)
def test_weights_stay_where_names_say_nothing_else(tmp_path, kind, avit, names, caplog):
    plain = saved(tmp_path, kind, names)
    with caplog.at_level(logging.WARNING):
        model = opened(tmp_path, NAMES, avit)
    assert "the classifier is new" not in caplog.text
    assert [model.config.id2label[index] for index in range(5)] == NAMES
    heads, ours = classifiers(plain), classifiers(model, avit)
    for theirs, mine in zip(heads, ours, strict=True):
        assert torch.equal(mine.weight, theirs.weight) and torch.equal(mine.bias, theirs.bias)


@pytest.mark.parametrize("data", [["plane", "ship", "frog", "car", "deer"], [*NAMES[:4], "bee"], ["dog", "cat"]])
@pytest.mark.parametrize(("kind", "avit"), CASES)
def test_other_classes_get_a_new_classifier(tmp_path, kind, avit, data, caplog):
    plain = saved(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        model = opened(tmp_path, data, avit)
    if len(data) == 5:
        index = next(i for i in range(5) if NAMES[i] != data[i])
        assert (
            f"class {index} is {NAMES[index]!r}, in the data it is {data[index]!r}: the classifier is new"
            in caplog.text
        )
    heads, ours = classifiers(plain), classifiers(model, avit)
    for theirs, mine in zip(heads, ours, strict=True):
        assert mine.weight.shape[0] == len(data) and not mine.bias.any()
        for row in mine.weight:
            assert not (row == theirs.weight).all(1).any(), "no row of the old one is left under another name"


@pytest.mark.version_independent
def test_classes_called_the_same_twice_have_no_order():
    """ImageNet's crane is a bird and a machine."""
    config = tiny_native("vit", id2label=dict(enumerate(["crane", "crane", "cat", "dog", "emu"]))).config
    assert class_order(config, ["crane", "crane2", "cat", "dog", "emu"]) is None
    assert class_order(config, ["cat", "dog", "emu", "crane", "crane"]) is None
