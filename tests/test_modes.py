"""What looks at a model leaves it as it was: modes of every submodule, gradients, policy; also where it fails."""

import pytest
import torch

from lgvit_hf.evaluation.benchmark import benchmark, wall_clock_speed_up
from lgvit_hf.evaluation.cost_table import measure_cost_table
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.evaluation.exit_table import collect
from lgvit_hf.evaluation.report import answer_all, evaluate
from lgvit_hf.modes import evaluating
from lgvit_hf.training.distill_exits import HeadTraining, grow
from tests.tiny import tiny_dataset, tiny_images, tiny_model, tiny_native

pytestmark = pytest.mark.version_independent
LOOKS = {
    "evaluate": lambda model: evaluate(model, tiny_dataset(8), timed_batch_sizes=[4]),
    "answer_all": lambda model: answer_all(model, tiny_dataset(8)),
    "collect": lambda model: collect(model, tiny_dataset(8)),
    "model_macs": model_macs,
    "benchmark": lambda model: benchmark(model, tiny_images(4), batch_sizes=[2], repeats=1),
    "wall_clock_speed_up": lambda model: wall_clock_speed_up(model, [tiny_images(2)], repeats=1),
    "measure_cost_table": lambda model: measure_cost_table(model, tiny_images(2), [2], repeats=1),
    "truncate": lambda model: model.truncate(1),
}


def half_training():
    """A highway in `train()` mode, some parts of which are kept in `eval()` mode and frozen."""
    model = tiny_model("vit", exit_types="conv1_1", hidden_dropout_prob=0.5, exit_policy="never").train()
    model.exits[1].eval().requires_grad_(False)
    list(model.vit.modules())[7].eval()
    return model


def condition(model):
    """All that a look may not change."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()],
        model.config.to_dict(),
        model.exit_policy,
    )


def assert_as_before(model, before):
    after = condition(model)
    assert all(torch.equal(tensor, before[3][name]) for name, tensor in after[3].items())
    assert after[:3] == before[:3] and after[4:] == before[4:]


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_leaves_a_model_as_it_was(name):
    model = half_training()
    before = condition(model)
    assert len(set(before[0])) == 2 and len(set(before[1])) == 2
    LOOKS[name](model)
    assert_as_before(model, before)


@pytest.mark.parametrize("name", [name for name in LOOKS if name != "truncate"])
def test_so_does_one_that_fails(name):
    model = half_training()

    def fail(*_):
        raise RuntimeError("no more memory")

    # behind some blocks
    list(model.vit.modules())[-1].register_forward_pre_hook(fail)
    before = condition(model)
    with pytest.raises(RuntimeError, match="no more memory"):
        LOOKS[name](model)
    assert_as_before(model, before)


def test_a_model_that_exits_grow_on_stays_as_it_was():
    plain = tiny_native("vit").train()
    plain.vit.eval().requires_grad_(False)
    modes = [module.training for module in plain.modules()]
    frozen = [parameter.requires_grad for parameter in plain.parameters()]
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    settings = {"max_accuracy_drop": 0.9, "cost": "macs", "exit_positions": [1], "training": HeadTraining(epochs=1)}
    grow(plain, [{"pixel_values": image} for image in tiny_images(50)], **settings)
    assert [module.training for module in plain.modules()] == modes
    assert [parameter.requires_grad for parameter in plain.parameters()] == frozen
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.state_dict().items())


def test_evaluating_is_of_every_module():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()).eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]
