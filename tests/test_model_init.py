"""`model_init`: what it makes, for every run anew, is checked, frozen and evaluated as a model that is given."""

import pytest
import torch
from transformers import TrainingArguments

from lgvit_hf import AViTTrainer, DistillationTrainer, HighwayTrainer
from tests.test_modeling_avit import tiny_avit
from tests.test_training import QUIET, arguments, highway
from tests.tiny import tiny_dataset


def makers(*models):
    """A `model_init` that gives these models one after the other, and what it gave."""
    left, given = list(models), []

    def model_init():
        given.append(left.pop(0))
        given[-1].before = {name: tensor.detach().clone() for name, tensor in given[-1].named_parameters()}
        return given[-1]

    return model_init, given


def moved(model):
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, model.before[name])}


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_second_stage_freezes_what_model_init_makes(kind, tmp_path):
    model_init, given = makers(*(highway(kind) for _ in range(3)))
    trainer = DistillationTrainer(None, arguments(tmp_path), train_dataset=tiny_dataset(16), model_init=model_init)
    for _ in range(2):
        trainer.train()
        assert trainer.model is given[-1]
        assert moved(trainer.model) and all(name.startswith("exits.") for name in moved(trainer.model))
    assert len(given) == 3


def test_a_model_init_that_is_set_later_counts(tmp_path):
    """As `hyperparameter_search` does."""
    model_init, given = makers(highway(), highway())
    args = arguments(tmp_path, strategy="single_exit", train_exit=1)
    trainer = HighwayTrainer(highway(), args, train_dataset=tiny_dataset(16))
    trainer.model_init = model_init
    trainer.train()
    assert moved(given[0]) and all(name.startswith("exits.1.") for name in moved(given[0]))
    args.train_exit = 2
    trainer.train()
    assert moved(given[1]) and all(name.startswith("exits.2.") for name in moved(given[1]))


def test_every_model_is_checked(tmp_path):
    model_init, _ = makers(highway(), highway(exit_positions=[], exit_types=[]))
    trainer = HighwayTrainer(None, arguments(tmp_path), train_dataset=tiny_dataset(8), model_init=model_init)
    with pytest.raises(ValueError, match="this model has none"):
        trainer.train()
    args = arguments(tmp_path, strategy="single_exit", train_exit=2)
    trainer = HighwayTrainer(highway(), args, train_dataset=tiny_dataset(8))
    trainer.model_init = lambda trial: highway(exit_positions=[2], exit_types=["linear"])
    with pytest.raises(ValueError, match=r"train_exit: 2 is outside 0\.\.0"):
        trainer.train()


def test_evaluation_counts_the_exits_of_the_newest_model(tmp_path):
    rows = tiny_dataset(8)
    model_init, _ = makers(highway(exit_positions=[2, 3]), highway(exit_positions=[1, 4]))
    trainer = HighwayTrainer(None, arguments(tmp_path), train_dataset=rows, eval_dataset=rows, model_init=model_init)
    assert {"eval_exit_2_accuracy", "eval_exit_3_accuracy"} <= set(trainer.evaluate())
    trainer.train()
    figures = trainer.evaluate()
    assert {"eval_exit_1_accuracy", "eval_exit_4_accuracy"} <= set(figures) and "eval_exit_2_accuracy" not in figures
    own = HighwayTrainer(
        None,
        arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        model_init=lambda: highway(),
        compute_metrics=lambda _: {"own": 1.0},
    )
    own.train()
    assert own.evaluate()["eval_own"] == 1.0


def test_tokens_that_halt(tmp_path):
    rows, args = tiny_dataset(8), TrainingArguments(str(tmp_path), max_steps=1, **QUIET)
    model_init, given = makers(*(tiny_avit("vit") for _ in range(2)))
    trainer = AViTTrainer(None, args, train_dataset=rows, eval_dataset=rows, model_init=model_init)
    trainer.train()
    assert trainer.model is given[1] and moved(given[1]) and not moved(given[0])
    assert trainer.evaluate()["eval_mean_token_depth"] > 0
    assert trainer.compute_metrics.config is given[1].config
    trainer.model_init = lambda: highway()
    with pytest.raises(ValueError, match="ViTHighway has no tokens that halt"):
        trainer.train()


@pytest.mark.parametrize("trainer_class", [HighwayTrainer, DistillationTrainer, AViTTrainer])
def test_neither_a_model_nor_a_model_init(trainer_class, tmp_path):
    with pytest.raises(ValueError, match="model: none was given"):
        trainer_class(None, arguments(tmp_path), train_dataset=tiny_dataset(8))
    optimizer = torch.optim.SGD(highway().parameters())
    with pytest.raises(ValueError, match="optimizers: "):
        trainer_class(None, arguments(tmp_path), model_init=highway, optimizers=(optimizer, None))
