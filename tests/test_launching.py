"""What launchers ask of a strategy and of a wrapped module: what a step leaves out, compiling, several GPUs."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer

from lgvit_hf import DistillationTrainer, HighwayTrainer, HighwayWrapper
from lgvit_hf.training.arguments import STAGE_ONE, STAGE_TWO
from tests.seeds import seeded
from tests.test_training import MIXED, arguments
from tests.tiny import tiny_dataset, tiny_images, tiny_model

# of each kind of body
HEADS = ["conv1_1", "attention_r1", "linear", "vit", "mlp"]
POSITIONS = [1, 2, 3, 4, 5]


class Gradients(HighwayTrainer):
    """Notes the trained parameters that have no gradient after the backward of each step."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        self.without = getattr(self, "without", [])
        self.without.append(
            [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
        )
        return loss


class DistillationGradients(Gradients, DistillationTrainer):
    pass


CASES = [
    *((HighwayTrainer, {"strategy": strategy}) for strategy in STAGE_ONE if strategy != "mixed"),
    (HighwayTrainer, {**MIXED, "backbone_epochs": 2}),
    (HighwayTrainer, {}),
    (HighwayTrainer, {"strategy": "uniform", "backbone_share": 0.5}),
    *((DistillationTrainer, {"strategy": strategy}) for strategy in STAGE_TWO),
    (DistillationTrainer, {}),
]


@pytest.mark.version_independent
@pytest.mark.parametrize("kind", ["vit", "deit", "swin"])
@pytest.mark.parametrize(("stage", "settings"), CASES)
def test_unused_parameters_are_looked_for_where_a_step_leaves_some_out(stage, settings, kind, tmp_path):
    model = tiny_model(kind, exit_positions=POSITIONS, exit_types=HEADS)
    args = arguments(tmp_path, **settings, train_exit=1 if settings.get("strategy") == "single_exit" else None)
    trainer = DistillationGradients if stage is DistillationTrainer else Gradients
    trainer = trainer(model, args, train_dataset=tiny_dataset(16))
    trainer.train()
    assert len(trainer.without) == 2
    assert args.ddp_find_unused_parameters == any(trainer.without)
    left_out = {name.split(".")[0] for names in trainer.without for name in names}
    assert left_out in (set(), {"exits"})


def test_what_is_asked_for_is_kept(tmp_path):
    for asked in (True, False):
        for strategy in ("weighted", "alternating"):
            args = arguments(tmp_path, strategy=strategy, ddp_find_unused_parameters=asked)
            HighwayTrainer(wrapped(), args)
            assert args.ddp_find_unused_parameters is asked


# -- wrapped modules -------------------------------------------------------------------------------------------


class Skip(nn.Module):
    """Cut by its graph, with a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.patch, self.first, self.second = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.never = nn.Linear(8, 5), nn.Linear(8, 8)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + torch.relu(self.first(x))
        return self.head((x + torch.relu(self.second(x))).mean(1))


def chain():
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


def wrapped(module=Skip, after="first"):
    seeded()
    return HighwayWrapper(module().eval(), after=[after], example=tiny_images(1))


def test_a_wrapped_module_may_leave_anything_out(tmp_path):
    model, args = wrapped(), arguments(tmp_path, strategy="weighted")
    trainer = Gradients(model, args, train_dataset=tiny_dataset(16))
    trainer.train()
    assert trainer.without == [["wrapped.never.weight", "wrapped.never.bias"]] * 2
    assert args.ddp_find_unused_parameters


@pytest.mark.parametrize(
    ("module", "after", "trainer_class"), [(Skip, "first", HighwayTrainer), (chain, "1", Trainer)]
)
def test_a_wrapped_module_trains_the_same_when_compiled(module, after, trainer_class, tmp_path):
    """Captured as for any backend, then run as it is: needs no C++ compiler."""
    rows, losses, weights = tiny_dataset(16), [], []
    model = wrapped(module, after)
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.compiler.reset()
        twin = copy.deepcopy(model)
        trainer = trainer_class(twin, arguments(tmp_path, **settings), train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append(twin.state_dict())
    torch.compiler.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert any(not torch.equal(weights[0][name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_several_gpus_in_one_process_are_refused_for_a_wrapped_module(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match="torchrun or accelerate launch"):
        HighwayTrainer(wrapped(), args)
    HighwayTrainer(tiny_model("vit"), args)
    # what nn.DataParallel calls, in whatever Trainer
    with pytest.raises(ValueError, match="torchrun or accelerate launch"):
        wrapped()._replicate_for_data_parallel()
