"""Every number of the original LGViT code that `../shared/reference` holds, after conversion."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lgvit_hf import DeiTHighway, SwinHighway, ViTHighway
from lgvit_hf.hub.convert import convert_lgvit
from lgvit_hf.training.arguments import HighwayTrainingArguments
from lgvit_hf.training.strategies import stage_one_loss, stage_two_loss
from tests.conftest import SHARED

MODELS = {"vit": ViTHighway, "deit": DeiTHighway, "swin": SwinHighway}
CASES = [
    (kind, case)
    for kind in MODELS
    if (SHARED / "reference").is_dir()
    for case in json.loads((SHARED / "reference" / f"{kind}.json").read_text())
]
SEED_STRATEGIES = {"normal": "uniform"}


class Reference:
    def __init__(self, kind, case, folder):
        tensors = load_file(SHARED / "reference" / case["file"])
        source = folder / "original"
        source.mkdir()
        state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
        save_file(state, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(case["config"]))
        convert_lgvit(source, folder / "ours")
        self.case = case
        self.model = MODELS[kind].from_pretrained(folder / "ours")
        self.pixels, self.labels = tensors["input.pixel_values"], tensors["input.labels"]
        self.tensors = tensors


@pytest.fixture(scope="module", params=CASES, ids=lambda p: p[1]["file"].removesuffix(".safetensors"))
def reference(request, tmp_path_factory):
    return Reference(*request.param, tmp_path_factory.mktemp("reference"))


def test_reference_is_there(shared):
    assert len(CASES) == 26


def assert_close_to_largest(ours, theirs, tolerance):
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
        if theirs is not None and theirs.shape == features.shape:
            assert_close_to_largest(features, theirs, 1e-5)
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
    for strategy, decision in reference.case["decisions"].items():
        reference.model.set_exit_policy(policy_of(strategy, decision["threshold"]))
        batch = reference.model(reference.pixels)
        assert batch.exit_layer.tolist() == decision["exit_layer"], strategy
        assert_close_to_largest(batch.logits, reference.tensors[f"decide.{strategy}.logits"], 1e-5)
        for row in range(len(reference.pixels)):
            alone = reference.model(reference.pixels[row : row + 1])
            assert alone.exit_layer.item() == decision["exit_layer"][row], (strategy, row)
            assert_close_to_largest(alone.logits, reference.tensors[f"decide.{strategy}.logits"][row : row + 1], 1e-5)


def test_stage_one_losses(reference, tmp_path):
    for strategy, expected in reference.case["stage1_loss"].items():
        args = HighwayTrainingArguments(output_dir=str(tmp_path), strategy=strategy, report_to=[])
        for step, value in enumerate(expected):
            reference.model.train()
            loss = stage_one_loss(
                reference.model, reference.model.config, reference.pixels, reference.labels, args, step
            )
            assert loss.item() == pytest.approx(value, rel=1e-4), (strategy, step)
        reference.model.eval()


def test_stage_two_losses(reference, tmp_path):
    for name, value in (reference.case.get("stage2_loss") or {}).items():
        strategy, version = name.split(".")
        if version != "corrected" or value is None:
            continue
        args = HighwayTrainingArguments(output_dir=str(tmp_path), strategy=strategy.lower(), report_to=[])
        reference.model.train()
        loss = stage_two_loss(reference.model, reference.model.config, reference.pixels, reference.labels, args)
        assert loss.item() == pytest.approx(value, rel=1e-4), name
        reference.model.eval()
