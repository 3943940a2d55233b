"""Both stages: what each strategy trains and what it leaves alone, and that the launcher does not change the loss."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from lgvit_hf import DistillationTrainer, HighwayTrainer, HighwayTrainingArguments
from lgvit_hf.hub.lora import add_lora
from lgvit_hf.losses import lgvit_feature_losses
from lgvit_hf.training.arguments import STAGE_ONE, STAGE_TWO
from lgvit_hf.training.strategies import stage_one_loss, stage_two_loss
from tests.processes import in_two_processes
from tests.tiny import NUM_BLOCKS, NUM_LABELS, tiny_dataset, tiny_images, tiny_model

POSITIONS = [2, 3, 5]
DEPTHS = [*POSITIONS, NUM_BLOCKS]
flat_and_staged = pytest.mark.parametrize("kind", ["vit", "swin"])
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}


def arguments(folder, **changes):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
    }
    return HighwayTrainingArguments(str(folder), **{**QUIET, **settings, **changes})


def highway(kind="vit", **changes):
    return tiny_model(kind, **{"exit_positions": POSITIONS, **changes})


def deep_highway(kind, heads, **changes):
    """Ten blocks, with room for eight exits."""
    depth = {"depths": [2, 6, 2]} if kind == "swin" else {"num_hidden_layers": 10}
    positions = {1: [5], 2: [2, 7], 4: [2, 4, 6, 9], 8: [2, 3, 4, 5, 6, 7, 8, 9]}[len(heads)]
    return tiny_model(kind, exit_positions=positions, exit_types=heads, **depth, **changes)


def trained(model, trainer_class, folder, **changes):
    """Names of the parameters and buffers that training has changed."""
    before = copy.deepcopy(model.state_dict())
    result = trainer_class(model, arguments(folder, **changes), train_dataset=tiny_dataset(16)).train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def part_of(name):
    """`backbone`, `final`, `exits.0`, `exits.1` ..."""
    first, second = name.split(".")[:2]
    return f"exits.{second}" if first == "exits" else "final" if "classifier" in first else "backbone"


EXITS = {"exits.0", "exits.1", "exits.2"}
EVERYTHING = EXITS | {"backbone", "final"}
# after one step, and after two
TRAINED = {
    "uniform": (EVERYTHING, EVERYTHING),
    "weighted": (EVERYTHING, EVERYTHING),
    "alternating": ({"backbone", "final"}, EVERYTHING),
    "alternating_weighted": ({"backbone", "final"}, EVERYTHING),
    "distillation": (EVERYTHING, EVERYTHING),
    "single_exit": ({"exits.1"}, {"exits.1"}),
    "backbone": ({"backbone", "final"}, {"backbone", "final"}),
}
# the first epoch without exits, the second with the backbone frozen, then two with both
MIXED = {"strategy": "mixed", "backbone_epochs": 1, "head_epochs": 1, "num_train_epochs": 4}


def test_every_strategy_is_covered():
    assert {*TRAINED, "mixed"} == set(STAGE_ONE)


# names of parameters differ from backbone to backbone, what a strategy does with them does not
@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        *((strategy, "vit") for strategy in TRAINED),
        *((strategy, kind) for strategy in ("single_exit", "backbone") for kind in ("deit", "swin")),
        ("weighted", "swin"),
    ],
)
def test_stage_one_trains_what_it_should(strategy, kind, tmp_path):
    after_one, after_two = TRAINED[strategy]
    for steps, expected in enumerate([after_one] if after_one == after_two else [after_one, after_two], start=1):
        settings = {"strategy": strategy, "max_steps": steps, "train_exit": 1 if strategy == "single_exit" else None}
        names = trained(highway(kind, exit_types="conv1_1"), HighwayTrainer, tmp_path, **settings)
        assert {part_of(name) for name in names} == expected
        assert any("running_mean" in name for name in names) == bool(expected & EXITS)


@pytest.mark.parametrize(("steps", "expected"), [(2, {"backbone", "final"}), (3, EVERYTHING)])
def test_the_mixed_regime_trains_the_backbone_first(steps, expected, tmp_path):
    """Of four steps, the first half without exits; stopped after `steps`."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == steps

    model = highway(exit_types="conv1_1")
    before = copy.deepcopy(model.state_dict())
    args = arguments(tmp_path, strategy="uniform", backbone_share=0.5, max_steps=4)
    HighwayTrainer(model, args, train_dataset=tiny_dataset(32), callbacks=[Stop()]).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {part_of(name) for name in changed} == expected


@pytest.mark.parametrize("strategy", ["weighted", "alternating_weighted"])
def test_weights_of_ones_own(strategy, tmp_path):
    """ViT-Tactile's."""
    model = highway(exit_positions=[2, 4], exit_loss_weights=[0.3, 0.3, 1.0])
    pixels, labels = tiny_images(6), torch.arange(6) % NUM_LABELS
    args = arguments(tmp_path, strategy=strategy)
    ours = stage_one_loss(model, model.config, pixels, labels, args, step=1)
    first, second, last = (F.cross_entropy(z, labels) for z in model(pixels, early_exit=False).exit_logits)
    torch.testing.assert_close(ours, (0.3 * first + 0.3 * second + last) / 1.6)


@pytest.mark.parametrize(
    ("trainer_class", "kind"), [(HighwayTrainer, "vit"), (HighwayTrainer, "swin"), (DistillationTrainer, "deit")]
)
def test_gradient_checkpointing_gives_the_same_gradients(trainer_class, kind, tmp_path):
    # one step along the gradients themselves
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0}
    start, steps = highway(kind).state_dict(), []
    for checkpointing in (False, True):
        model = highway(kind)
        args = arguments(tmp_path, gradient_checkpointing=checkpointing, **step)
        trainer_class(model, args, train_dataset=tiny_dataset(8)).train()
        assert model.is_gradient_checkpointing == checkpointing
        steps.append({name: (tensor - start[name]).detach() for name, tensor in model.named_parameters()})
    trained = {name for name, tensor in steps[0].items() if tensor.abs().max() > 1e-4}
    assert {part_of(name) for name in trained} == (EVERYTHING if trainer_class is HighwayTrainer else EXITS)
    for name, tensor in steps[0].items():
        torch.testing.assert_close(steps[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_an_augmenting_dataset_is_told_the_epoch(tmp_path):
    class Rows(list):
        def set_epoch(self, epoch):
            self.epochs = [*getattr(self, "epochs", []), epoch]

    rows = Rows(tiny_dataset(12))
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=3, save_strategy="steps", save_steps=3)
    HighwayTrainer(highway(), args, train_dataset=rows).train()
    # by us, and by the data loader as well where its sampler takes no epoch
    assert list(dict.fromkeys(rows.epochs)) == [0, 1, 2] and rows.epochs == sorted(rows.epochs)
    rows.epochs = []
    HighwayTrainer(highway(), args, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # two steps each: it goes on in the middle of the second
    assert list(dict.fromkeys(rows.epochs)) == [1, 2] and rows.epochs == sorted(rows.epochs)


def test_both_strategies_of_stage_two_are_covered():
    assert set(STAGE_TWO) == {"distillation", "distillation_lgvit"}


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("distillation", "vit"), *(("distillation_lgvit", kind) for kind in ("vit", "deit", "swin"))],
)
def test_stage_two_trains_only_exits(strategy, kind, tmp_path):
    model = highway(kind, exit_types=["conv1_1", "attention_r1", "conv_normal"])
    names = trained(model, DistillationTrainer, tmp_path, strategy=strategy, max_steps=1)
    assert {part_of(name) for name in names} == EXITS
    assert any("running_var" in name for name in names)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("exits."), name


@pytest.mark.parametrize(
    ("trainer_class", "kind"),
    [
        *((DistillationTrainer, kind) for kind in ("vit", "deit", "swin")),
        *((HighwayTrainer, kind) for kind in ("vit", "swin")),
    ],
)
def test_frozen_modules_answer_as_in_use(trainer_class, kind, tmp_path):
    noise = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = highway(kind, exit_types="conv1_1", **noise, **({"drop_path_rate": 0.5} if kind == "swin" else {}))
    kept = model.exits[1] if trainer_class is HighwayTrainer else model.exits
    settings = {"strategy": "single_exit", "train_exit": 1} if trainer_class is HighwayTrainer else {}
    inside = set(kept.modules())
    modes = {True: set(), False: set()}
    answers = []
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda module, _: modes[module in inside].add(module.training))
    last_block = getattr(model, model.base_model_prefix).layernorm if kind != "swin" else model.swin.layernorm
    last_block.register_forward_pre_hook(lambda _, inputs: answers.append(inputs[0].detach()))
    rows = tiny_dataset(8)
    expected = []
    handle = last_block.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0].detach()))
    with torch.no_grad():
        model(torch.stack([row["pixel_values"] for row in rows]), early_exit=False)
    handle.remove(), answers.clear(), modes[True].clear(), modes[False].clear()

    trainer_class(model, arguments(tmp_path, max_steps=1, **settings), train_dataset=rows).train()
    assert modes == {True: {True}, False: {False}}
    assert len(answers) == (1 if trainer_class is DistillationTrainer else 0)
    if trainer_class is DistillationTrainer:
        # the same rows in another order: the teacher's answers, without dropout
        torch.testing.assert_close(answers[0].sum(0), expected[0].sum(0), rtol=1e-4, atol=1e-4)


MIXES = {
    "one": ["conv1_1"],
    "one-without-map": ["linear"],
    "two": ["conv1_1", "attention_r2"],
    "two-global": ["self_attention", "attention_r3"],
    "four": ["linear", "mlp", "vit", "attention_r1"],
    "eight": [
        "conv1_1",
        "conv1_1",
        "conv2_1",
        "conv2_1",
        "attention_r2",
        "attention_r2",
        "attention_r3",
        "attention_r3",
    ],
    "eight-mixed": [
        "attention_r2",
        "conv_normal",
        "linear",
        "mlp",
        "self_attention",
        "conv1_1",
        "vit",
        "attention_r1",
    ],
}


# the grids and widths of Swin's exits differ, ViT's and DeiT's are alike
@pytest.mark.parametrize(
    ("kind", "mix"),
    [
        *(("swin", mix) for mix in MIXES),
        *(("vit", mix) for mix in ("one-without-map", "eight-mixed")),
        *(("deit", mix) for mix in ("four", "eight")),
    ],
)
def test_stage_two_takes_any_exits(kind, mix, tmp_path):
    heads = MIXES[mix]
    names = trained(deep_highway(kind, heads), DistillationTrainer, tmp_path, max_steps=1)
    assert {part_of(name) for name in names} == {f"exits.{index}" for index in range(len(heads))}


# -- losses by hand --------------------------------------------------------------------------------------------


def parts(model, images, labels):
    """Cross-entropy of each exit and of the final classifier, and the exits' distillation losses at temperature 2."""
    out = model(images, early_exit=False)
    hard = [F.cross_entropy(logits, labels) for logits in out.exit_logits]
    teacher = (out.exit_logits[-1] / 2).log_softmax(-1)
    soft = []
    for logits in out.exit_logits[:-1]:
        student = (logits / 2).log_softmax(-1)
        soft.append((teacher.exp() * (teacher - student)).sum() * 4 / logits.numel())
    return out, [loss.item() for loss in hard], [loss.item() for loss in soft]


@flat_and_staged
@torch.no_grad()
def test_stage_one_losses(kind, tmp_path):
    model, images, labels = highway(kind), tiny_images(6), torch.arange(6) % NUM_LABELS
    _, hard, soft = parts(model, images, labels)
    uniform = sum(hard) / 4
    weighted = sum(depth * loss for depth, loss in zip(DEPTHS, hard, strict=True)) / sum(DEPTHS)
    expected = {
        "uniform": [uniform] * 4,
        "weighted": [weighted] * 4,
        "alternating": [hard[-1], uniform] * 2,
        "alternating_weighted": [hard[-1], weighted] * 2,
        "distillation": [0.6 * uniform + 0.4 * sum(soft) / 3] * 4,
        "single_exit": [hard[2]] * 4,
        "backbone": [hard[-1]] * 4,
    }
    expected["normal"] = expected["uniform"]  # the name in LGViT's scripts
    for strategy, values in expected.items():
        args = arguments(tmp_path, strategy=strategy, distillation_weight=0.4, train_exit=2)
        ours = [stage_one_loss(model, model.config, images, labels, args, step).item() for step in range(4)]
        assert ours == pytest.approx(values, rel=1e-5), strategy
    default = stage_one_loss(model, model.config, images, labels, arguments(tmp_path), 0)
    assert default.item() == pytest.approx(weighted, rel=1e-5)


@flat_and_staged
@torch.no_grad()
def test_stage_two_losses(kind, tmp_path):
    model = highway(kind, exit_types=["conv1_1", "linear", "attention_r1"])
    images, labels = tiny_images(6), torch.arange(6) % NUM_LABELS
    out, hard, soft = parts(model, images, labels)
    weighted = sum(depth * loss for depth, loss in zip(POSITIONS, hard, strict=False)) / sum(POSITIONS)
    args = arguments(tmp_path, strategy="distillation", distillation_weight=0.4)
    ours = stage_two_loss(model, model.config, images, labels, args)
    assert ours.item() == pytest.approx(0.6 * weighted + 0.4 * sum(soft) / 3, rel=1e-5)

    # grids behind blocks 2, 3, 5 and at the end
    grids = [(8, 8), (4, 4), (2, 2), (2, 2)] if kind == "swin" else [(4, 4)] * 4
    heterogeneous, homogeneous = lgvit_feature_losses(
        out.exit_features[:-1], grids[:-1], ["local", None, "global"], out.exit_features[-1], grids[-1]
    )
    predictions = 0.7 * sum(hard[:-1]) + 0.3 * sum(soft)
    for settings, weights in (
        ({}, (0.01, 0.01)),
        ({"heterogeneous_weight": 2.0, "homogeneous_weight": 0.5}, (2.0, 0.5)),
    ):
        args = arguments(tmp_path, strategy="distillation_lgvit", **settings)
        ours = stage_two_loss(model, model.config, images, labels, args).item()
        features = weights[0] * heterogeneous + weights[1] * homogeneous
        assert ours == pytest.approx(predictions + features.item(), rel=1e-5)


def test_what_is_not_trained_is_not_computed(tmp_path):
    model, calls = highway("vit"), []
    for index, head in enumerate(model.exits):
        head.register_forward_pre_hook(lambda *_, index=index: calls.append(f"exit {index}"))
        head.answer = lambda tokens, head=head, index=index: (
            calls.append(f"exit {index}") or type(head).answer(head, tokens)
        )
    layers = getattr(model.vit, "layers", None) or model.vit.encoder.layer
    for number, layer in enumerate(layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(f"block {number}"))
    for strategy, step, expected in (
        ("single_exit", 0, ["block 1", "block 2", "block 3", "exit 1"]),
        ("backbone", 0, [f"block {number}" for number in range(1, 7)]),
        ("alternating", 2, [f"block {number}" for number in range(1, 7)]),
    ):
        calls.clear()
        args = arguments(tmp_path, strategy=strategy, train_exit=1)
        stage_one_loss(model.train(), model.config, tiny_images(2), torch.tensor([0, 1]), args, step)
        assert calls == expected, strategy


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "alternate"}, "strategy: .*'alternate'.*alternating_weighted.*distillation_lgvit"),
        ({"strategy": ""}, "strategy: .*''.*alternating_weighted"),
        ({"strategy": 3}, "strategy: .*'3'.*alternating_weighted"),
        ({"strategy": "single_exit"}, "train_exit: None.*single_exit"),
        ({"strategy": "single_exit", "train_exit": -1}, "train_exit: -1"),
        ({"distillation_weight": 1.5}, "distillation_weight: 1.5.*0 to 1"),
        ({"heterogeneous_weight": -1.0}, "heterogeneous_weight: -1.0"),
        ({"homogeneous_weight": -1.0}, "homogeneous_weight: -1.0"),
        ({"temperature": 0.0}, "temperature: 0.0"),
    ],
)
def test_bad_arguments(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_strategy_of_the_other_stage(tmp_path):
    with pytest.raises(ValueError, match="strategy: 'distillation_lgvit'.*HighwayTrainer.*choices: uniform, weighted"):
        HighwayTrainer(highway(), arguments(tmp_path, strategy="distillation_lgvit"))
    for name in set(STAGE_ONE) - set(STAGE_TWO):
        settings = {"strategy": name, "train_exit": 0, "backbone_epochs": 0 if name == "mixed" else None}
        with pytest.raises(ValueError, match=f"strategy: '{name}'.*DistillationTrainer.*choices: distillation_lgvit"):
            DistillationTrainer(highway(), arguments(tmp_path, **settings))


def test_other_bad_trainers(tmp_path):
    with pytest.raises(ValueError, match=r"train_exit: 3 is outside 0\.\.2"):
        HighwayTrainer(highway(), arguments(tmp_path, strategy="single_exit", train_exit=3))
    with pytest.raises(ValueError, match="args: TrainingArguments must be HighwayTrainingArguments"):
        HighwayTrainer(highway(), TrainingArguments(str(tmp_path), **QUIET))


@pytest.mark.parametrize(("trainer_class", "label"), [(HighwayTrainer, NUM_LABELS), (DistillationTrainer, -1)])
def test_label_out_of_range(trainer_class, label, tmp_path):
    rows = [{**row, "labels": label} for row in tiny_dataset(4)]
    with pytest.raises(ValueError, match=rf"labels: {label} is outside 0\.\.4"):
        trainer_class(highway(), arguments(tmp_path), train_dataset=rows).train()


# -- evaluation ------------------------------------------------------------------------------------------------


def threshold_for(exit_logits):
    """In the widest gap between scores at which some samples exit first and others do not."""
    scores = torch.stack(exit_logits[:-1]).softmax(-1).amax(-1)
    ordered = scores[(scores >= scores[0].min()) & (scores <= scores[0].max())].sort().values
    widest = ordered.diff().argmax()
    return ((ordered[widest] + ordered[widest + 1]) / 2).item()


@pytest.mark.parametrize("trainer_class", [HighwayTrainer, DistillationTrainer])
def test_evaluation_is_the_models_own(trainer_class, tmp_path):
    model, rows = highway(), tiny_dataset(20)
    pixels = torch.stack([row["pixel_values"] for row in rows])
    trainer = trainer_class(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    model.eval()
    with torch.no_grad():
        threshold = threshold_for(model(pixels, early_exit=False).exit_logits)
        model.set_exit_policy("confidence", threshold=threshold)
        out = model(pixels)
    metrics, predictions = trainer.evaluate(), trainer.predict(rows).predictions
    labels = torch.tensor([row["labels"] for row in rows])
    assert len(set(out.exit_index.tolist())) > 1
    torch.testing.assert_close(torch.tensor(predictions), out.logits, rtol=1e-4, atol=1e-5)
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(out.logits, labels).item(), rel=1e-4)


# -- the same run, however it is launched ----------------------------------------------------------------------


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


STRATEGIES = {HighwayTrainer: "alternating_weighted", DistillationTrainer: "distillation_lgvit", Trainer: None}


@pytest.mark.parametrize(
    ("trainer_class", "kind"),
    [(HighwayTrainer, "vit"), (HighwayTrainer, "swin"), (DistillationTrainer, "deit"), (Trainer, "vit")],
)
def test_resuming_gives_the_identical_loss_log(trainer_class, kind, tmp_path):
    def start(folder):
        # dropout too must come out the same
        model = highway(kind, hidden_dropout_prob=0.2)
        settings = {"strategy": STRATEGIES[trainer_class], "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return trainer_class(model, arguments(folder, learning_rate=1e-3, **settings), train_dataset=tiny_dataset(40))

    whole = start(tmp_path)
    whole.train()
    resumed = start(tmp_path / "again")
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # everything comes from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(losses(whole)) == 6 and len(set(losses(whole))) > 3
    assert losses(resumed) == losses(whole)
    theirs = whole.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("trainer_class", "kind"), [(HighwayTrainer, "vit"), (DistillationTrainer, "swin"), (Trainer, "deit")]
)
def test_best_model_at_the_end(trainer_class, kind, tmp_path):
    rows, seen = tiny_dataset(16), []
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "order", "greater_is_better": True}
    args = arguments(tmp_path, strategy=STRATEGIES[trainer_class], **every_step, **best)

    def first_is_best(_):
        seen.append(None)
        return {"order": -float(len(seen))}

    model = highway(kind)
    trainer_class(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=first_is_best).train()
    expected = type(model).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_strategies_do_not_alternate_inside_a_step(tmp_path):
    model, early = highway(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: early.append(kwargs["early_exit"]), with_kwargs=True)
    settings = {"strategy": "alternating", "max_steps": 3, "gradient_accumulation_steps": 4}
    trainer = HighwayTrainer(
        model, arguments(tmp_path, per_device_train_batch_size=2, **settings), train_dataset=tiny_dataset(40)
    )
    trainer.train()
    # the final classifier alone, then all exits, then the final classifier alone: four times each
    assert early == [True] * 4 + [False] * 4 + [True] * 4


LAUNCHED = {
    "mixed": (HighwayTrainer, "mixed"),
    "lora": (HighwayTrainer, "weighted"),
    "plain": (Trainer, None),
    "weighted": (HighwayTrainer, "weighted"),
    "alternating_weighted": (HighwayTrainer, "alternating_weighted"),
    "distillation_lgvit": (DistillationTrainer, "distillation_lgvit"),
}
RUN = """
import json, sys, torch
from pathlib import Path
from tests.test_training import LAUNCHED, launched
folder = Path(sys.argv[1])
for name in LAUNCHED:
    trainer, log = launched(folder, name)
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(log))
    del trainer  # its model holds the group
"""


def launched(folder, name, accumulation=1):
    """Four steps of 32 samples with eight LGViT heads, batch norms among them, however many processes there are."""
    trainer_class, strategy = LAUNCHED[name]
    # variants of one image: eight of them have almost the statistics of all
    image = tiny_images(1, seed=1)[0]
    rows = [{**row, "pixel_values": image + 0.03 * row["pixel_values"]} for row in tiny_dataset(128)]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = {
        "per_device_train_batch_size": 32 // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    steps = {"max_steps": 4, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "strategy": strategy}
    steps |= MIXED if strategy == "mixed" else {}
    args = arguments(Path(folder) / name, **batch, **steps)
    model = deep_highway("vit", MIXES["eight"])
    if name == "lora":
        add_lora(model, 2)
    trainer = trainer_class(model, args, train_dataset=rows)
    trainer.train()
    # of a new model: running statistics count batches
    predictions = trainer_class(deep_highway("vit", MIXES["eight"]), args).predict(rows[:50]).predictions
    return trainer, {"losses": losses(trainer), "predictions": predictions.tolist()}


def assert_same_run(ours, expected):
    # batch norms see fewer samples at a time: that is all that differs
    assert len(expected["losses"]) == 4 and ours["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    assert len(set(expected["losses"])) > 1, "steps have other samples"
    assert len(expected["predictions"]) == 50
    torch.testing.assert_close(
        torch.tensor(ours["predictions"]), torch.tensor(expected["predictions"]), rtol=1e-4, atol=1e-4
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one process does, without accumulation, by name."""
    folder = tmp_path_factory.mktemp("expected")
    return {name: launched(folder, name)[1] for name in LAUNCHED}


@pytest.mark.parametrize("name", LAUNCHED)
def test_accumulating_four_times_gives_the_same_loss(name, expected, tmp_path):
    _, ours = launched(tmp_path, name, accumulation=4)
    assert_same_run(ours, expected[name])


@pytest.mark.version_independent
@pytest.mark.timeout(900)  # several processes on a machine that may be busy
def test_two_processes_give_the_same_loss(expected, tmp_path):
    in_two_processes(RUN, tmp_path)
    for name in LAUNCHED:
        assert_same_run(json.loads((tmp_path / f"{name}.json").read_text()), expected[name])


def test_a_fresh_run_does_not_mix_with_another(tmp_path):
    from lgvit_hf.training.run import train

    (tmp_path / "checkpoint-800").mkdir()
    with pytest.raises(ValueError, match="checkpoints of another run"):
        train(tiny_model("vit"), None, tiny_dataset(8), tmp_path, stage="1")


def test_exit_strategies_need_exits(tmp_path):
    with pytest.raises(ValueError, match="has none"):
        HighwayTrainer(tiny_model("vit", exit_positions=[], exit_types=[]), arguments(tmp_path, strategy="uniform"))
    with pytest.raises(ValueError, match="has none"):
        HighwayTrainer(tiny_model("vit").truncate(1), arguments(tmp_path, strategy="uniform"))


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor: 0.1"):
        arguments(tmp_path, label_smoothing_factor=0.1)


def test_evaluation_judges_what_the_strategy_trains(tmp_path):
    model, rows = tiny_model("vit"), tiny_dataset(8)
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    with torch.no_grad():
        exit_logits = model.eval()(pixels, early_exit=False).exit_logits
    for strategy, index in (({"strategy": "backbone"}, -1), ({"strategy": "single_exit", "train_exit": 1}, 1)):
        predictions = HighwayTrainer(model, arguments(tmp_path, **strategy)).predict(rows).predictions
        torch.testing.assert_close(torch.tensor(predictions), exit_logits[index], rtol=1e-4, atol=1e-5)
