"""One training run: data, model, trainer for the stage, and a folder that holds the result and can be resumed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..evaluation.plots import plot_training
from ..files import add_files
from .arguments import HighwayTrainingArguments
from .avit_trainer import AViTTrainer
from .trainer import DistillationTrainer, HighwayTrainer

STAGES = {"backbone": HighwayTrainer, "1": HighwayTrainer, "2": DistillationTrainer, "avit": AViTTrainer}


def train(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    train_dataset: Dataset,
    output: str | Path,
    *,
    stage: str,
    eval_dataset: Dataset | None = None,
    test_dataset: Dataset | None = None,
    early_stopping_patience: int | None = None,
    adapters_only: bool = False,
    resume: bool | str | Path = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a model for one stage and save model and image processor to `output`, with `training.png` if it can draw.

    Args:
        model (`PreTrainedModel`): A highway, or an `AViT` for the stage of that name; trained in place.
        processor (`BaseImageProcessor`): Saved beside the model.
        train_dataset (`Dataset`): Items `pixel_values` and `labels`.
        output (`str` or `Path`): Folder for the model, and for the checkpoints of the run.
        stage (`str`):
            `"backbone"` (no exits), `"1"` (backbone and exits, `alternating_weighted` unless `strategy` is given),
            `"2"` (exits only, distilled from the frozen backbone) or `"avit"` (tokens that halt).
        eval_dataset (`Dataset`, *optional*): For `eval_strategy` and early stopping.
        test_dataset (`Dataset`, *optional*): Evaluated at the end, under `test` of what is returned.
        early_stopping_patience (`int`, *optional*):
            Stop after that many evaluations in which `metric_for_best_model` did not get better.
        adapters_only (`bool`, *optional*, defaults to `False`): Save LoRA adapters, exits and classifier alone.
        resume (`bool`, `str` or `Path`, *optional*, defaults to `False`):
            `True` or `"auto"`: go on from the newest complete checkpoint in `output`, from the start if there is none
            (what is skipped is warned of). A path: go on from that checkpoint.
        arguments: Of `HighwayTrainingArguments`.

    Returns:
        `steps`, `losses` and `evaluations` as logged and the mean `loss` of the whole run, the `seconds` of this call,
        the figures of the `test` samples, and whether this is the `main_process`.

    Raises:
        ValueError: Unknown stage or argument; a checkpoint that is incomplete, or of a run with other settings.
        OSError: A checkpoint or the model could not be written; those before are whole.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written; the second time at once.
    """
    args = arguments_for(stage, output, arguments)
    if not resume and any(Path(output).glob("checkpoint-*")):
        raise ValueError(f"{output} holds checkpoints of another run: resume it, or choose another output")
    trainer = STAGES[stage](model, args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    for plain in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(plain)
    progress = ProgressLines()
    trainer.add_callback(progress)
    if early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience))
    try:
        result = trainer.train(resume_from_checkpoint="auto" if resume is True else str(resume) if resume else None)
    finally:
        progress.close()
    if trainer.is_world_process_zero():
        save_trained(model, processor, Path(output), **({"adapters_only": True} if adapters_only else {}))
    losses = [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    known = [log for log in evaluations if "eval_accuracy" in log]
    if known and trainer.is_world_process_zero() and importlib.util.find_spec("matplotlib"):
        plot_training(Path(output) / "training.png", known)
    test = None
    if test_dataset is not None:
        figures = trainer.evaluate(test_dataset, metric_key_prefix="test")
        test = {name.removeprefix("test_"): value for name, value in figures.items()}
    return {
        "steps": result.global_step,
        "seconds": result.metrics["train_runtime"],
        "loss": _mean(losses) if losses else result.training_loss,
        "losses": losses,
        "evaluations": evaluations,
        "test": test,
        "main_process": trainer.is_world_process_zero(),
    }


def arguments_for(stage: str, output: str | Path, arguments: dict[str, Any]) -> HighwayTrainingArguments:
    """The training arguments of a stage, with its default strategy.

    Raises:
        ValueError: Unknown stage, argument or strategy.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: {stage!r} must be one of {', '.join(STAGES)}")
    strategy = arguments.get("strategy")
    if stage == "backbone":
        strategy = "backbone"
    elif stage == "1" and strategy is None:
        strategy = "alternating_weighted"
    try:
        return HighwayTrainingArguments(output_dir=str(output), **{**arguments, "strategy": strategy})
    except TypeError as error:
        raise ValueError(f"training arguments: {error}") from error


class ProgressLines(ProgressCallback):
    """A progress bar with the loss in it and a line per evaluation, instead of a printed dict per log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the newest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def close(self) -> None:
        """End the bar of a run that is left before its end, so that what is said next stands on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """One line: what every exit, and the policy, gets right; how deep the tokens of an A-ViT go."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is None or not metrics or "eval_accuracy" not in metrics:
            return
        if "eval_mean_token_depth" in metrics:
            self.training_bar.write(
                f"epoch {state.epoch:g}: {100 * metrics['eval_accuracy']:.1f} % right in validation, tokens run "
                f"{metrics['eval_mean_token_depth']:.2f} blocks"
            )
        else:
            self.training_bar.write(f"epoch {state.epoch:g}: % right in validation, {accuracies_line(metrics)}")


def accuracies_line(metrics: dict[str, float]) -> str:
    """The accuracy of each exit, by the blocks before it, and where there are several, that under the policy.

    Example:

        >>> accuracies_line({"eval_exit_2_accuracy": 0.5, "eval_exit_4_accuracy": 0.75, "eval_accuracy": 0.7,
        ...     "eval_mean_depth": 2.5})
        'after block 2: 50.0, 4: 75.0; by the policy 70.0 after 2.5 blocks'
    """
    found = {name: re.fullmatch(r"eval_exit_(\d+)_accuracy", name) for name in metrics}
    exits = [f"{match[1]}: {100 * metrics[name]:.1f}" for name, match in found.items() if match]
    line = f"after block {', '.join(exits)}"
    if len(exits) < 2:
        return line
    return f"{line}; by the policy {100 * metrics['eval_accuracy']:.1f} after {metrics['eval_mean_depth']:.1f} blocks"


def save_trained(model: PreTrainedModel, processor: BaseImageProcessor, output: Path, **saving: Any) -> None:
    """The trained model, as a whole or not at all; `saving` are arguments of its `save_pretrained`.

    Weights move last. Where what goes with them changes, the old ones are removed first: a run that is killed in
    between leaves the old model, the new one, or none (resume the run), but never weights under another config.
    """
    # what it says is of the model before
    (output / "training.json").unlink(missing_ok=True)
    for unfinished in output.glob(".writing-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with add_files(output) as weights:
            model.save_pretrained(weights, **saving)
            with add_files(output) as others:
                processor.save_pretrained(others)
                for file in [*weights.glob("*.json"), *weights.glob("*.py")]:
                    os.replace(file, others / file.name)
                if any(_content(output / file.name) != _content(file) for file in others.iterdir()):
                    for file in output.glob("*.safetensors"):
                        file.unlink()
    except (OSError, SafetensorError) as error:
        raise OSError(f"{output}: the model could not be written ({error}); resume the run to try again") from error


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _mean(losses: list[dict[str, float]]) -> float:
    """The mean over steps; a logged loss is that of the steps since the one before."""
    steps = [0, *(log["step"] for log in losses)]
    spans = (end - start for start, end in pairwise(steps))
    return sum(log["loss"] * span for log, span in zip(losses, spans, strict=True)) / steps[-1]
