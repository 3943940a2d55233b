"""`lgvit train --stage head`: the classifier's optimum, what stays as it was, labels, and a run that is stopped."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from lgvit_hf import train_recipe
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.hub.loading import load_highway
from lgvit_hf.training import linear_probe
from lgvit_hf.training.distill_exits import HeadTraining, grow
from lgvit_hf.training.linear_fit import fit_linear
from lgvit_hf.training.linear_probe import final_classifiers
from tests.seeds import generator
from tests.tiny import IMAGE_SIZE, tiny_dataset, tiny_model, tiny_native

FEW = {"max_train_samples": 120, "max_eval_samples": 60, "data": "digits", "stage": "head"}


@pytest.fixture
def saved(tmp_path):
    """Saves a model with its image processor."""

    def save(model, name="backbone"):
        model.save_pretrained(tmp_path / name)
        make_processor(IMAGE_SIZE).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_labels_are_a_certain_teacher():
    """The classifier is that of logistic regression on the standardised features."""
    numbers, penalty = generator(3), 1e-2
    standard, noise = torch.randn(2, 400, 5, generator=numbers, dtype=torch.float64)
    labels, features = (standard + noise)[:, :3].argmax(-1), standard * torch.tensor([0.1, 1.0, 5.0, 30.0, 1.0]) + 3
    certain = linear_probe.CERTAIN * F.one_hot(labels, 3).double()
    weight, bias = fit_linear(features, certain, 1.0, [penalty])
    inputs = ((features - features.mean(0)) / features.std(0)).numpy()
    oracle = LogisticRegression(C=1 / (2 * penalty * len(inputs)), tol=1e-10, max_iter=10_000).fit(inputs, labels)
    found = (features @ weight.T + bias).softmax(-1).numpy()
    np.testing.assert_allclose(found, oracle.predict_proba(inputs), atol=2e-3)


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "bare", "highway"])
def test_the_classifier_alone_is_trained(kind, saved, tmp_path):
    if kind == "highway":
        plain = tiny_model("vit", exit_positions=[], exit_types=[])
    else:
        plain = tiny_native("vit" if kind == "bare" else kind, bare=kind == "bare")
    result = train_recipe(model=saved(plain), output=str(tmp_path / "out"), **FEW)
    model = load_highway(str(tmp_path / "out"))
    assert model.config.num_labels == 10 and model.config.id2label[3] == "3" and not len(model.exits)
    assert len(final_classifiers(model)) == (2 if kind == "deit" else 1)
    before = (plain if kind == "bare" else plain.base_model).state_dict()
    after = model.base_model.state_dict()
    kept = [name for name in after if "pooler" not in name or kind == "swin"]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["test"] == result["test"] and 0 <= written["validation"]["accuracy"] <= 1 and written["data"]
    # random features of digits say more than chance; the states are gone
    assert result["test"]["accuracy"] > 0.3 and not list(tmp_path.glob(".*"))


def test_exits_grow_on_it(saved, tmp_path):
    train_recipe(model=saved(tiny_native("vit")), output=str(tmp_path / "out"), **FEW)
    grown = grow(
        str(tmp_path / "out"),
        tiny_dataset(60),
        training=HeadTraining(epochs=1),
        max_accuracy_drop=1.0,
        cost="macs",
        ignore_labels=True,
    )
    assert len(grown.model.exits)


def test_a_stopped_run_goes_on(saved, tmp_path, monkeypatch):
    source = saved(tiny_native("vit"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(linear_probe, "fit_linear", stop)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(model=source, output=str(tmp_path / "out"), **FEW)
    (states,) = tmp_path.glob(".out-states")
    written = (states / "states-0.npy").stat().st_mtime_ns
    counted = []
    monkeypatch.setattr(linear_probe.ClassifierInputs, "tokens", lambda *_: counted.append(1))
    train_recipe(model=source, output=str(tmp_path / "out"), **FEW)
    assert not counted and written and not states.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "3"], "epochs: 3.*stage head"),
        (["--learning-rate", "0.1"], "learning_rate: 0.1.*stage head"),
        (["--exit-positions", "2"], r"exit_positions: \[2\].*stage head"),
        (["--bf16", "true"], "training: .*bf16.*stage head"),
    ],
)
def test_what_a_fit_has_not_is_refused(words, message, saved, tmp_path, capsys):
    import re

    place = ["--model", saved(tiny_native("vit")), "--data", "digits", "--output", str(tmp_path / "out")]
    assert main(["train", "--stage", "head", *place, *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_bad_starts(saved, tmp_path):
    with pytest.raises(ValueError, match="--model CHECKPOINT"):
        train_recipe(backbone="vit", output=str(tmp_path / "out"), **FEW)
    with pytest.raises(ValueError, match="--model CHECKPOINT"):
        train_recipe(output=str(tmp_path / "out"), **FEW)
    with pytest.raises(ValueError, match=r"has exits after \[2, 3, 4, 5\].*lgvit grow"):
        train_recipe(model=saved(tiny_model("vit")), output=str(tmp_path / "out"), **FEW)


def test_too_few_images(saved, tmp_path):
    with pytest.raises(ValueError, match="15 images are too few to fit a classifier on; give 16"):
        few = {**FEW, "max_train_samples": 15}
        train_recipe(model=saved(tiny_native("vit")), output=str(tmp_path / "out"), **few)


def test_a_dry_run_writes_nothing(saved, tmp_path, capsys):
    train_recipe(model=saved(tiny_native("vit")), output=str(tmp_path / "out"), dry_run=True, **FEW)
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()
