"""Every number of the original LGViT code: one case in `tests/assets/reference`, all of `../shared/reference`."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lgvit_hf import DeiTHighway, SwinHighway, ViTHighway
from lgvit_hf.hub.convert import convert_lgvit
from lgvit_hf.training.arguments import HighwayTrainingArguments
from lgvit_hf.training.strategies import stage_one_loss, stage_two_loss
from tests.conftest import SHARED

MODELS = {"vit": ViTHighway, "deit": DeiTHighway, "swin": SwinHighway}
ASSETS = Path(__file__).parent / "assets" / "reference"


def cases_of(folder):
    files = [folder / f"{kind}.json" for kind in MODELS]
    return [(folder, case) for file in files if file.is_file() for case in json.loads(file.read_text())]


def name_of(folder_and_case):
    folder, case = folder_and_case
    name = case["file"].removesuffix(".safetensors")
    return f"asset_{name}" if folder == ASSETS else name


CASES = cases_of(ASSETS) + cases_of(SHARED / "reference")


class Reference:
    def __init__(self, place, case, folder):
        tensors = load_file(place / case["file"])
        source = folder / "original"
        source.mkdir()
        state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
        save_file(state, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(case["config"]))
        convert_lgvit(source, folder / "ours")
        self.case = case
        self.model = MODELS[case["kind"]].from_pretrained(folder / "ours")
        self.pixels, self.labels = tensors["input.pixel_values"], tensors["input.labels"]
        self.tensors = tensors

    def in_training(self):
        """A copy, whose batch statistics may change."""
        return copy.deepcopy(self.model).train()


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def reference(request, tmp_path_factory):
    return Reference(*request.param, tmp_path_factory.mktemp("reference"))


def test_the_asset_is_a_case_of_the_reference(shared):
    """Skipped where the other 26 cases are not there, and these alone are missed then."""
    found = {case["file"]: case for folder, case in CASES if folder != ASSETS}
    ours = [case for folder, case in CASES if folder == ASSETS]
    assert len(found) == 26 and len(ours) == 1
    assert ours[0] == found[ours[0]["file"]]
    kept, whole = (load_file(folder / ours[0]["file"]) for folder in (ASSETS, shared / "reference"))
    assert kept.keys() == whole.keys()
    for name, tensor in kept.items():
        rows = 2 if name.endswith(".features") else None
        assert torch.equal(tensor, whole[name][:rows] if rows else whole[name]), name


def assert_close_to_largest(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
def test_logits_and_features(reference):
    out = reference.model(reference.pixels, early_exit=False)
    names = [f"exit{p}" for p in reference.case["positions"]] + ["final"]
    assert len(out.exit_logits) == len(names)
    compared = 0
    for name, logits, features in zip(names, out.exit_logits, out.exit_features, strict=True):
        assert_close_to_largest(logits, reference.tensors[f"eval.{name}.logits"], 1e-5)
        theirs = reference.tensors.get(f"eval.{name}.features")
        if theirs is not None and theirs.shape[1:] == features.shape[1:]:
            # the asset has the features of some images only
            assert_close_to_largest(features[: len(theirs)], theirs, 1e-5)
            compared += 1
    # LGViT's Swin pools the maps of its convolution and attention heads before it returns them
    pooled_only = reference.case["kind"] == "swin" and reference.case["highway_type"] == "LGViT"
    assert compared == (0 if pooled_only else len(names) - 1)


def policy_of(strategy, threshold):
    if strategy == "patience":
        return {"name": strategy, "patience": threshold[0]}
    if strategy == "patient_and_confident":
        return {"name": strategy, "threshold": threshold[:-1], "patience": threshold[-1]}
    return {"name": strategy, "threshold": threshold}


@torch.no_grad()
def test_decisions(reference):
    decisions = reference.case["decisions"]
    assert {"confidence", "entropy"} <= set(decisions)
    for strategy, decision in decisions.items():
        reference.model.set_exit_policy(policy_of(strategy, decision["threshold"]))
        logits, layers = reference.tensors[f"decide.{strategy}.logits"], decision["exit_layer"]
        batch = reference.model(reference.pixels)
        assert batch.exit_layer.tolist() == layers, strategy
        assert_close_to_largest(batch.logits, logits, 1e-5)
        # one sample of each exit, alone
        for layer in sorted(set(layers)):
            row = slice(layers.index(layer), layers.index(layer) + 1)
            alone = reference.model(reference.pixels[row])
            assert alone.exit_layer.item() == layer, (strategy, row)
            assert_close_to_largest(alone.logits, logits[row], 1e-5)


def arguments(folder, strategy):
    return HighwayTrainingArguments(output_dir=str(folder), strategy=strategy.lower(), report_to=[])


@torch.no_grad()
def test_stage_one_losses(reference, tmp_path):
    assert {"normal", "weighted", "alternating", "alternating_weighted"} <= set(reference.case["stage1_loss"])
    model = reference.in_training()
    for strategy, expected in reference.case["stage1_loss"].items():
        for step, value in enumerate(expected):
            args = arguments(tmp_path, strategy)
            loss = stage_one_loss(model, model.config, reference.pixels, reference.labels, args, step)
            assert loss.item() == pytest.approx(value, rel=1e-4), (strategy, step)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def distillation_by_formula(exit_logits, labels, positions):
    """`(1 - c) sum p_i L_i / sum p_i + c mean KD_i`, for c = 0.3 and temperature 2."""
    *students, teacher = [logits.double().numpy() for logits in exit_logits]
    target, hard, soft = log_softmax(teacher / 2), [], []
    for student in students:
        hard.append(-log_softmax(student)[np.arange(len(labels)), labels].mean())
        soft.append((np.exp(target) * (target - log_softmax(student / 2))).sum() * 2**2 / student.size)
    return 0.7 * np.average(hard, weights=positions) + 0.3 * np.mean(soft)


@torch.no_grad()
def test_stage_two_losses(reference, tmp_path):
    """Against the formula, and against the number of the original code; for Swin it has none."""
    model, positions = reference.in_training(), reference.case["positions"]

    def ours(strategy):
        args = arguments(tmp_path, strategy)
        return stage_two_loss(model, model.config, reference.pixels, reference.labels, args).item()

    logits = model(reference.pixels, early_exit=False).exit_logits
    by_formula = distillation_by_formula(logits, reference.labels, positions)
    assert ours("distillation") == pytest.approx(by_formula, rel=1e-5)
    stored = reference.case.get("stage2_loss") or {}
    corrected = {name.split(".")[0]: stored[name] for name in stored if name.endswith(".corrected")}
    eight_mixed = reference.case["highway_type"] == "LGViT" and len(positions) == 8
    expected = ["distillation", "distillation_LGViT"] if eight_mixed else ["distillation"]
    assert sorted(corrected) == ([] if reference.case["kind"] == "swin" else expected)
    for strategy, value in corrected.items():
        assert ours(strategy) == pytest.approx(value, rel=1e-4), strategy
