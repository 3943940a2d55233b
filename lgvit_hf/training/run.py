"""One training run: data, model, trainer for the stage, and a folder that holds the result and can be resumed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..files import add_files
from .arguments import HighwayTrainingArguments
from .trainer import DistillationTrainer, HighwayTrainer

STAGES = ("backbone", "1", "2")


def train(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    train_dataset: Dataset,
    output: str | Path,
    *,
    stage: str,
    resume: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a highway for one stage and save model and image processor to `output`.

    Args:
        model (`PreTrainedModel`): A highway; trained in place.
        processor (`BaseImageProcessor`): Saved beside the model.
        train_dataset (`Dataset`): Items `pixel_values` and `labels`.
        output (`str` or `Path`): Folder for the model, and for the checkpoints of the run.
        stage (`str`):
            `"backbone"` (no exits), `"1"` (backbone and exits, `alternating_weighted` unless `strategy` is given) or
            `"2"` (exits only, distilled from the frozen backbone).
        resume (`bool`, *optional*, defaults to `False`): Go on from the last checkpoint in `output`, if there is one.
        arguments: Of `HighwayTrainingArguments`.

    Returns:
        `{"steps": ..., "seconds": ..., "loss": ..., "losses": [...]}`, of this run.

    Raises:
        ValueError: Unknown stage or argument.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: {stage!r} must be one of {', '.join(STAGES)}")
    if stage == "backbone":
        arguments["strategy"] = "backbone"
    elif stage == "1" and arguments.get("strategy") is None:
        arguments["strategy"] = "alternating_weighted"
    if not resume and any(Path(output).glob("checkpoint-*")):
        raise ValueError(f"{output} holds checkpoints of another run: resume it, or choose another output")
    trainer_class = DistillationTrainer if stage == "2" else HighwayTrainer
    try:
        args = HighwayTrainingArguments(output_dir=str(output), **arguments)
    except TypeError as error:
        raise ValueError(f"training arguments: {error}") from error
    trainer = trainer_class(model, args, train_dataset=train_dataset)
    for plain in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(plain)
    trainer.add_callback(LossBar)
    result = trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
    if trainer.is_world_process_zero():
        with add_files(output) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    losses = [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]
    return {
        "steps": result.global_step,
        "seconds": result.metrics["train_runtime"],
        "loss": result.training_loss,
        "losses": losses,
    }


class LossBar(ProgressCallback):
    """A progress bar with the loss in it, instead of a printed dict per log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the newest loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def last_checkpoint(output: str | Path) -> str | None:
    """The newest `checkpoint-N` in a folder that is whole, or `None`."""
    folders = [folder for folder in Path(output).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    # the trainer's state is the last file it writes
    whole = [folder for folder in folders if (folder / "trainer_state.json").is_file()]
    newest = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    return str(newest) if newest else None
