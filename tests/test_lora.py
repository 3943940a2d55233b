"""LoRA adapters beside exits: what is trained, merged or apart, and how they are saved, pushed and loaded again."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification

from lgvit_hf import DeiTHighway, HighwayTrainer, SwinHighway, ViTHighway, train_recipe
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.hub.lora import add_lora, backbone_digest, has_lora, merged
from tests.seeds import generator
from tests.test_training import MIXED, arguments, losses
from tests.tiny import IMAGE_SIZE, tiny_dataset, tiny_images, tiny_native

pytest.importorskip("peft", reason='needs the extra "peft"')

CLASSES = {"vit": ViTHighway, "deit": DeiTHighway, "swin": SwinHighway}
EXITS = {"exit_positions": [2, 4], "exit_types": "conv1_1"}
FILES = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
IMAGES = tiny_images(6)


@pytest.fixture
def base(tmp_path):
    """Saves a plain model and says where."""

    def save(kind="vit", seed=0):
        folder = tmp_path / f"{kind}-{seed}"
        tiny_native(kind, seed=seed).save_pretrained(folder)
        make_processor(IMAGE_SIZE).save_pretrained(folder)
        return str(folder)

    return save


@torch.no_grad()
def adapted(kind, source, **lora):
    """A highway whose adapters do something, as after training."""
    model = CLASSES[kind].from_backbone(source, **EXITS, lora={"rank": 3, **lora})
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator(number)))
    return model


@torch.no_grad()
def answers(model):
    return torch.stack(model.eval()(IMAGES, early_exit=False).exit_logits)


@pytest.mark.parametrize("kind", CLASSES)
def test_merged_and_apart_answer_alike(kind, base, tmp_path):
    source = base(kind)
    model = adapted(kind, source)
    expected = answers(model)
    plain = CLASSES[kind].from_backbone(source, **EXITS)
    assert (answers(plain)[-1] - expected[-1]).abs().max() > 1e-2, "adapters do something"
    torch.testing.assert_close(answers(merged(model)), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert not has_lora(again) and not any("lora" in name for name in again.state_dict())
    torch.testing.assert_close(answers(again), expected, rtol=1e-5, atol=1e-5)
    # the model itself goes on with its adapters
    assert has_lora(model) and torch.equal(answers(model), expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_adapters_alone_are_loaded_again(kind, base, tmp_path):
    source, folder = base(kind), tmp_path / "adapters"
    model = adapted(kind, source)
    model.set_exit_policy("confidence", threshold=0.7)
    model.save_pretrained(folder, adapters_only=True)
    whole = (tmp_path / f"{kind}-0" / "model.safetensors").stat().st_size
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert (folder / "adapter_model.safetensors").stat().st_size < whole
    again = CLASSES[kind].from_backbone(source, lora=folder)
    assert torch.equal(answers(again), answers(model)) and again.config.exit_policy == model.config.exit_policy
    assert again.config.exit_positions == [2, 4] and again.config.id2label == model.config.id2label
    trained = {name for name, each in again.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in model.named_parameters() if each.requires_grad}
    # names as transformers 4 has them, whichever version wrote them
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "lora_A" in name]  # noqa: SIM118  (no mapping)
    where = {"swin": "swin.encoder.layers.0.blocks.0.attention.self"}.get(
        kind, f"{kind}.encoder.layer.0.attention.attention"
    )
    assert {f"{where}.query.lora_A.weight", f"{where}.value.lora_A.weight"} <= set(names)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["query", "value"] and settings["base_model_name_or_path"] == source


def test_adapters_of_another_backbone_are_refused(base, tmp_path):
    folder = tmp_path / "adapters"
    adapted("vit", base()).save_pretrained(folder, adapters_only=True)
    with pytest.raises(ValueError, match="trained on another backbone"):
        ViTHighway.from_backbone(base(seed=1), lora=folder)
    with pytest.raises(ValueError, match="exit_positions: .* comes with the adapters"):
        ViTHighway.from_backbone(base(), lora=folder, exit_positions=[1])
    with pytest.raises(ValueError, match="'vit_highway', which SwinHighway is not"):
        SwinHighway.from_backbone(base("swin"), lora=folder)
    # nothing leads from a folder to a model elsewhere
    with pytest.raises(ValueError, match="adapter_config.json names a base model.*from_backbone"):
        ViTHighway.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json was not saved with adapters_only=True"):
        ViTHighway.from_backbone(base(), lora=folder)


def test_adapters_alone_are_pushed(base, monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    from lgvit_hf.hub import lora as adapters
    from lgvit_hf.hub import push

    model, pushed = adapted("vit", base()), tmp_path / "hub"
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "me/lora"}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, folder_path, **_: shutil.copytree(folder_path, pushed))
    monkeypatch.setattr(push, "_own_card", lambda *_: None)
    model.push_to_hub("me/lora", adapters_only=True)
    assert sorted(file.name for file in pushed.iterdir()) == ["README.md", *FILES]
    assert "lora='me/lora'" in (pushed / "README.md").read_text()
    monkeypatch.setattr(adapters, "snapshot_download", lambda *_, **__: str(pushed))
    again = ViTHighway.from_backbone(base(), lora="me/lora")
    assert torch.equal(answers(again), answers(model))
    # merged, with a card
    shutil.rmtree(pushed)
    model.push_to_hub("me/lora")
    assert (pushed / "model.safetensors").exists() and not (pushed / "adapter_config.json").exists()


@pytest.mark.parametrize("settings", [{"strategy": "weighted", "max_steps": 2}, {**MIXED, "max_steps": -1}])
def test_training_leaves_the_backbone_as_it_is(settings, base, tmp_path):
    model = ViTHighway.from_backbone(base(), **EXITS, lora=2)
    frozen, before = backbone_digest(model), {name: each.clone() for name, each in model.state_dict().items()}
    HighwayTrainer(model, arguments(tmp_path / "run", **settings), train_dataset=tiny_dataset(16)).train()
    changed = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert backbone_digest(model) == frozen == model.lora_backbone
    for part in ("lora_B", "exits.0", "exits.1", "classifier"):
        assert any(part in name for name in changed), part


def test_going_on_is_exact(base, tmp_path):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}

    def start(folder):
        model = ViTHighway.from_backbone(base(), exit_positions=[2, 4], exit_types="linear", lora=2)
        return HighwayTrainer(model, arguments(folder, **steps), train_dataset=tiny_dataset(16))

    torch.manual_seed(0)
    whole = start(tmp_path / "whole")
    whole.train()
    again = start(tmp_path / "again")
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()  # everything comes from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    theirs = whole.model.state_dict()
    assert all(torch.equal(each, theirs[name]) for name, each in again.model.state_dict().items())


def test_lgvit_train_saves_merged(base, tmp_path, capsys):
    few = {"max_train_samples": 16, "max_eval_samples": 8, "epochs": 1, "batch_size": 8, "data": "digits"}
    out = tmp_path / "out"
    train_recipe(model=base(), lora=2, exit_positions=[2], exit_types="linear", output=str(out), **few)
    model = ViTHighway.from_pretrained(out)
    assert not has_lora(model) and model.config.num_labels == 10
    alone = {"lora": 2, "adapters_only": True, "output": str(tmp_path / "alone"), "exit_positions": [2]}
    train_recipe(model=base(), exit_types="linear", **alone, **few)
    assert not (tmp_path / "alone" / "model.safetensors").exists()
    again = ViTHighway.from_backbone(base(), lora=tmp_path / "alone")
    assert has_lora(again) and again.config.num_labels == 10
    place = ["--data", "digits", "--output", str(tmp_path / "other")]
    for words, message in (
        (["--model", base(), "--lora", "0"], "lora: rank 0 must be a whole number of at least 1"),
        (["--model", base(), "--lora", "2", "--stage", "2"], "lora: 2 is for stages backbone and 1, this is stage 2"),
        (["--model", base(), "--adapters-only"], "adapters_only: there are none without --lora RANK"),
        (["--backbone", "vit", "--lora", "2"], "lora: 2 adapts a trained backbone"),
        (
            ["--model", base(), "--lora", "{rank: 2, target_modules: [keys]}"],
            "target_modules.*'keys'.*choices: .*query",
        ),
    ):
        assert main(["train", *place, *words]) == 2

        assert re.search(message, capsys.readouterr().err), words


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (0, "lora: rank 0 must be"),
        (True, "lora: rank True must be"),
        (2.5, "lora: rank 2.5 must be"),
        ({"alpha": 2}, "must give a rank, and may give alpha, target_modules"),
        ({"rank": 2, "dropout": 0.1}, "must give a rank, and may give alpha, target_modules"),
        ({"rank": 2, "alpha": 0}, "lora: alpha 0 must be above 0"),
        ({"rank": 2, "target_modules": ["qkv"]}, r"target_modules \['qkv'\].*choices: .*key.*query"),
    ],
)
def test_bad_adapters(lora, message):
    with pytest.raises(ValueError, match=message):
        ViTHighway.from_backbone(tiny_native("vit"), **EXITS, lora=lora)


def test_adapters_that_cannot_go_alone(base, tmp_path):
    model = ViTHighway.from_backbone(base(), **EXITS)
    with pytest.raises(ValueError, match="adapters_only: the model has no adapters"):
        model.save_pretrained(tmp_path / "a", adapters_only=True)
    model = ViTHighway.from_backbone(tiny_native("vit"), **EXITS, lora=2)
    with pytest.raises(ValueError, match="not made from one by its name"):
        model.save_pretrained(tmp_path / "a", adapters_only=True)
    model = adapted("vit", base())
    with torch.no_grad():
        model.vit.layernorm.weight.add_(1.0)
    with pytest.raises(ValueError, match="weights beside the adapters have changed"):
        model.save_pretrained(tmp_path / "a", adapters_only=True)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, 2)
    assert not (tmp_path / "a").exists()


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lgvit-hf\[peft\]"'):
        ViTHighway.from_backbone(tiny_native("vit"), **EXITS, lora=2)


def test_a_layer_by_any_of_its_names(base):
    model = adapted("vit", base(), target_modules=["key"])
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in model.state_dict() if ".lora_" in name}
    assert layers in ({"key"}, {"k_proj"}) and model.lora.target_modules == ("key",)
