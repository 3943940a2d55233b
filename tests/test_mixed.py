"""Strategy `mixed`: its phases, the teacher of the last one, and that a run stopped anywhere goes on alike."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerCallback

from lgvit_hf import HighwayTrainer, ViTHighway
from lgvit_hf.training.mixed import TEACHER_FILE, phase_borders, phase_of
from lgvit_hf.training.strategies import stage_one_loss
from tests.test_training import DEPTHS, MIXED, arguments, highway, losses, part_of
from tests.tiny import NUM_LABELS, tiny_dataset, tiny_images

STEPS = {**MIXED, "max_steps": -1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}


class Snapshots(TrainerCallback):
    """The weights before the first step and after each."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append(copy.deepcopy(model.state_dict()))

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.weights.append(copy.deepcopy(model.state_dict()))
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def changed(self, first, last):
        before, after = self.weights[first], self.weights[last]
        return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def trainer(folder, kind="vit", callbacks=(), **changes):
    model = highway(kind, exit_types="conv1_1", hidden_dropout_prob=0.2)
    args = arguments(folder, **{**STEPS, **changes})
    datasets = {"train_dataset": tiny_dataset(16), "eval_dataset": tiny_dataset(8)}
    return HighwayTrainer(model, args, **datasets, callbacks=list(callbacks))


@pytest.mark.parametrize("kind", ["vit", "deit", "swin"])
def test_phases_train_what_they_should(kind, tmp_path):
    seen = Snapshots()
    trainer(tmp_path, kind, [seen], save_strategy="no").train()
    exits = {f"exits.{index}" for index in range(3)}
    for first, last, expected in (
        (0, 2, {"backbone", "final"}),
        (2, 4, exits),
        (4, 5, exits | {"backbone", "final"}),
    ):
        names = seen.changed(first, last)
        assert {part_of(name) for name in names} == expected
        assert any("running_mean" in name for name in names) == bool(expected & exits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps that was not stopped, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    return folder, losses(run), {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


# within each phase, and at both borders
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_going_on_from_any_phase_is_exact(step, whole, tmp_path):
    folder, expected, weights = whole
    assert len(expected) == 8 and len(set(expected)) == 8
    again = trainer(tmp_path)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()  # everything comes from the checkpoint
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert losses(again) == expected
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.model.parameters())


def test_the_teacher_is_the_model_before_exits_joined(whole):
    folder = whole[0]
    assert [(folder / f"checkpoint-{step}" / TEACHER_FILE).exists() for step in range(1, 9)] == [False] * 4 + [
        True
    ] * 4
    teacher = load_file(folder / "checkpoint-8" / TEACHER_FILE)
    before = ViTHighway.from_pretrained(folder / "checkpoint-4").state_dict()
    assert teacher.keys() == {name for name in before if not name.startswith("exits.")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.items())
    # a checkpoint is a model of its own
    assert ViTHighway.from_pretrained(folder / "checkpoint-8").exits


def test_a_checkpoint_without_its_teacher_is_refused(whole, tmp_path):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(whole[0] / "checkpoint-6", folder)
    for name in (TEACHER_FILE, "manifest.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{TEACHER_FILE}: the checkpoint of step 6 has none.*joined at step 4"):
        trainer(tmp_path / "again").train(resume_from_checkpoint=str(folder))


def test_each_phase_has_a_schedule_and_the_exits_a_rate(tmp_path):
    seen = Snapshots()
    rates = {"learning_rate": 0.01, "head_learning_rate": 0.1, "lr_scheduler_type": "linear"}
    trainer(tmp_path, callbacks=[seen], save_strategy="no", **rates).train()
    # of the step to come: two steps, two steps and four, each down to zero
    shares = [0.5, 1.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    # with and without weight decay
    for rates, share in zip(seen.rates, shares, strict=True):
        assert sorted(rates) == pytest.approx([0.01 * share] * 2 + [0.1 * share] * 2)


@torch.no_grad()
def test_the_loss_of_the_last_phase(tmp_path):
    model, images, labels = highway(), tiny_images(6), torch.arange(6) % NUM_LABELS
    args = arguments(tmp_path, **MIXED, distillation_weight=0.4)
    teacher = torch.randn(6, NUM_LABELS)
    exit_logits = model(images, early_exit=False).exit_logits
    hard = sum(d * F.cross_entropy(z, labels) for d, z in zip(DEPTHS, exit_logits, strict=True)) / sum(DEPTHS)
    soft, target = (exit_logits[-1] / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    kept = 4 * F.kl_div(soft, target, reduction="batchmean")
    ours = stage_one_loss(model, model.config, images, labels, args, teacher_logits=teacher)
    torch.testing.assert_close(ours, 0.6 * hard + 0.4 * kept)


def test_evaluation_answers_with_what_the_phase_trains(tmp_path):
    logs = []

    class Log(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            logs.append({name for name in metrics if name.startswith("eval_exit_")})

    trainer(tmp_path, callbacks=[Log()], save_strategy="no", eval_strategy="epoch").train()
    every = {f"eval_exit_{depth}_accuracy" for depth in DEPTHS}
    assert logs == [{f"eval_exit_{DEPTHS[-1]}_accuracy"}, every, every, every]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_epochs": None}, "backbone_epochs: None.*'mixed'"),
        ({"backbone_epochs": -1}, "backbone_epochs: -1"),
        ({"backbone_epochs": float("nan")}, "backbone_epochs: nan"),
        ({"backbone_epochs": 3}, "backbone_epochs: 3 and head_epochs: 1 leave nothing.*num_train_epochs: 4"),
        ({"backbone_epochs": 9}, "backbone_epochs: 9 and head_epochs: 1 leave nothing.*num_train_epochs: 4"),
        ({"head_epochs": 0}, "head_epochs: 0"),
        ({"head_learning_rate": 0.0}, "head_learning_rate: 0.0"),
        ({"backbone_share": 0.5}, "backbone_share: 0.5.*'mixed'"),
        ({"strategy": "weighted"}, "backbone_epochs: 1.*'weighted'.*'mixed'"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "load_best_model"),
    ],
)
def test_bad_arguments(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{**MIXED, **changes})


def test_bad_trainers(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_type: .*reduce_lr_on_plateau.*each phase"):
        trainer(
            tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps"
        ).create_optimizer_and_scheduler(8)
    model = highway()
    args = arguments(tmp_path, head_learning_rate=0.1)
    with pytest.raises(ValueError, match="head_learning_rate: the optimizers"):
        HighwayTrainer(model, args, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


def test_phases_are_shares_of_the_run(tmp_path):
    args = arguments(tmp_path, strategy="mixed", backbone_epochs=1.5, head_epochs=0.5, num_train_epochs=4)
    assert phase_borders(args, 80) == (30, 40)
    assert [phase_of(step, (0, 1)) for step in range(3)] == ["heads", "joint", "joint"]
