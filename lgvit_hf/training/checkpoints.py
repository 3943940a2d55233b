"""Checkpoints that a killed run can trust: complete or skipped, and going on gives what one long run gives."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..configuration_avit import HALTING_FIELDS
from ..serving.device.info import file_digest
from .model_init import FreshModelTrainer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# a checkpoint of the same step, until its successor is complete
EARLIER = "-earlier"

# beside our own training arguments, what changes the result of a run
SETTINGS = (
    *("seed", "data_seed", "world_size", "train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "lr_scheduler_type", "optim"),
    *("bf16", "fp16", "max_steps", "num_train_epochs"),
)
# of the model's config, where it has them
MODEL = ("model_type", "exit_positions", "exit_types", "exit_loss_weights", *HALTING_FIELDS)
# these learning rates do not depend on how long the run will be: it may be made longer
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")

# under torchrun without accelerators the devices are cpu:0, cpu:1, ..., of which torch.load knows nothing
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def write_manifest(folder: str | Path, **facts: Any) -> None:
    """Write `manifest.json`, which makes a checkpoint complete: each file's size and sha256, and `facts`.

    All files reach the disk before it, and it appears whole or not at all.

    Example:

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "optimizer.pt").write_text("state")
        ...     write_manifest(folder)
        ...     complete = damage(folder)
        ...     _ = (Path(folder) / "optimizer.pt").write_text("")
        ...     print(complete, damage(folder), sep=", ")
        None, optimizer.pt is 0 bytes, 5 were written
    """
    folder = Path(folder)
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "r+b") as stream:
            os.fsync(stream.fileno())
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": file_digest(file)}
    unfinished = folder / f".{MANIFEST}"
    with open(unfinished, "w", encoding="utf-8") as stream:
        json.dump({**facts, "files": files}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        OSError: There is no manifest.
        ValueError: It is not one.
    """
    manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{folder}: {MANIFEST} lists no files")
    return manifest


def damage(folder: str | Path) -> str | None:
    """What a checkpoint with a manifest lacks, or `None` where every file is as it was written."""
    folder = Path(folder)
    try:
        files = {name: (file["size"], file["sha256"]) for name, file in read_manifest(folder)["files"].items()}
    except FileNotFoundError:
        return f"no {MANIFEST}: cut short, or not written by this package"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (written, _) in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != written:
            return f"{name} is {size} bytes, {written} were written"
    changed = next((name for name, (_, sha256) in files.items() if file_digest(folder / name) != sha256), None)
    return changed and f"{changed} is not what was written"


def last_complete_checkpoint(output: str | Path) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint in a folder, or `None`; and a line for each newer one, why it was skipped."""
    skipped: list[str] = []
    for folder in _checkpoints(output):
        why = damage(folder)
        if why is None:
            return str(folder), skipped
        hint = "" if (folder / MANIFEST).exists() else f"; to go on from it anyway, name it: {folder}"
        skipped.append(f"{folder.name} skipped: {why}{hint}")
    return None, skipped


def checkpoint_to_resume(resume: bool | str | Path | None, output: str | Path) -> tuple[str | None, list[str]]:
    """The checkpoint that `resume` means, checked, and what to warn of.

    Args:
        resume (`bool` or `str`, *optional*):
            `True`: the newest complete one in `output`. `"auto"`: the same, or none. A path: that one. Else none.
        output (`str` or `Path`): The run's folder.

    Raises:
        ValueError: There is none, or the one that was named is incomplete.
    """
    if not resume:
        return None, []
    if resume is True or resume == "auto":
        checkpoint, skipped = last_complete_checkpoint(output)
        if checkpoint is None and resume is True:
            raise ValueError("; ".join([f"{output} holds no complete checkpoint", *skipped]))
        return checkpoint, skipped
    folder = Path(resume)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint")
    unchecked = not (folder / MANIFEST).exists()
    why = _plain_damage(folder) if unchecked else damage(folder)
    if why is not None:
        raise ValueError(f"{folder} is incomplete: {why}")
    return str(folder), [f"{folder} has no {MANIFEST}: whether it is complete cannot be known"] if unchecked else []


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What would give a resumed run other results, a line per setting.

    Example:

        >>> differences({"seed": 0, "lr_scheduler_type": "cosine"}, {"seed": 1, "lr_scheduler_type": "cosine"})
        ['seed: 0 then, 1 now']
        >>> differences({"lr_scheduler_type": "constant", "max_steps": 5}, {"max_steps": 9})
        []
    """
    has_phases = then.get("backbone_share") or then.get("strategy") == "mixed"
    endless = then.get("lr_scheduler_type") in ENDLESS_SCHEDULES and not has_phases
    free = ("max_steps", "num_train_epochs") if endless else ()
    changed = [name for name in then if name in now and name not in free and then[name] != now[name]]
    return [f"{name}: {then[name]} then, {now[name]} now" for name in changed]


class ResumableTrainer(FreshModelTrainer):
    """A `Trainer` whose checkpoints are complete or skipped, and which Ctrl-C stops after a checkpoint.

    A run that goes on from one gives the losses and weights of a run that was never stopped. Augmentation must follow
    from seed, epoch and index alone, as that of `ProcessedImages` does: one that draws from a global generator is
    repeated exactly only from the end of an epoch.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self._saving = Saving()
        self.add_callback(self._saving)
        self.add_callback(_TellEpoch(self.train_dataset))
        self._loss_since_log = torch.zeros(())
        self._carried_loss = None

    def train(self, resume_from_checkpoint: bool | str | None = None, *args: Any, **kwargs: Any):
        """Train; as `transformers.Trainer` does, but only complete checkpoints are resumed.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*):
                `True`: the newest complete checkpoint in `args.output_dir`; `"auto"`: the same, or from the start
                where there is none; a path: that one.
            args: See `transformers.Trainer.train`.
            kwargs: See `transformers.Trainer.train`.

        Raises:
            ValueError: No complete checkpoint, or, unless it is named, one of a run with other settings.
            KeyboardInterrupt: After Ctrl-C, once a checkpoint is written; at once where none are, or the second time.
        """
        checkpoint, remarks = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        self._carried_loss, self._saving.stopped_early = None, False
        if checkpoint is not None and (Path(checkpoint) / MANIFEST).exists():
            manifest = read_manifest(checkpoint)
            self._carried_loss, self._saving.stopped_early = manifest["loss"], manifest["stopped_early"]
            changed = differences(manifest["run"], self._run())
            if changed and resume_from_checkpoint in (True, "auto"):
                raise ValueError(f"{checkpoint} is of another run ({'; '.join(changed)}); name it to go on anyway")
            remarks += [f"{checkpoint} is of another run: {line}" for line in changed]
        if self.is_world_process_zero():
            for remark in remarks:
                logger.warning(remark)
        if checkpoint is not None:
            # early stopping counts on
            self.args.restore_callback_states_from_checkpoint = True
        with self._saving.before_exiting(self.args):
            return super().train(checkpoint, *args, **kwargs)

    def _run(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as they are read back from JSON."""
        dataset: Any = self.train_dataset
        model: Any = self.model
        config, upstreams = model.config.to_dict(), TrainingArguments.__dataclass_fields__
        ours = [field.name for field in fields(self.args) if field.name not in upstreams]
        run = {"trainer": type(self).__name__, "rows": len(dataset) if hasattr(dataset, "__len__") else None}
        run |= {name: getattr(self.args, name) for name in (*SETTINGS, *ours)}
        run |= {name: config[name] for name in MODEL if name in config}
        return json.loads(json.dumps(run))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        since_log = self.accelerator.gather(self._loss_since_log).mean().item()
        loss = {"since_step": self._globalstep_last_logged, "sum": since_log}
        # older checkpoints go when this one is complete, not before
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                _set_aside(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                stopped_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
                write_manifest(folder, run=self._run(), loss=loss, stopped_early=stopped_early)
                _rotate(folder, limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"{folder} could not be written: {error}") from error
        finally:
            self.args.save_total_limit = limit

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        # set to zero in place when it is logged
        self._loss_since_log = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        """The loss of one batch; with the first of a resumed run, what was not yet logged when it stopped."""
        loss = super().training_step(*args, **kwargs)
        if self._carried_loss is None:
            return loss
        carried, self._carried_loss = self._carried_loss, None
        self._globalstep_last_logged = carried["since_step"]
        return torch.tensor(carried["sum"], device=loss.device) + loss

    def get_batch_samples(self, *args, **kwargs):
        """The next batches; none for a run that was already finished."""
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args, **kwargs)


class Saving(TrainerCallback):
    """When to save: with the log of an epoch that ends, and before Ctrl-C stops the run."""

    def __init__(self):
        self.asked_to_stop = self.stopping = self.save_at_epoch_end = self.has_trained = self.stopped_early = False

    @contextmanager
    def before_exiting(self, args: Any) -> Iterator[None]:
        """Ctrl-C waits for a checkpoint inside this block, where there are checkpoints; the second one does not."""
        self.asked_to_stop = self.stopping = self.save_at_epoch_end = self.has_trained = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ours = args.save_strategy != "no" and in_main_thread and is_default
        if ours:
            signal.signal(signal.SIGINT, self._ask_to_stop)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked_to_stop:
            raise KeyboardInterrupt("stopped at the end of training")

    def _ask_to_stop(self, *_: Any) -> None:
        self.asked_to_stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """A run that is resumed after its last step takes no further one."""
        if self.stopped_early or state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The last step of an epoch is saved at the epoch's end, with what is logged there."""
        self.has_trained, self.stopping = True, self._everyone_stops(args)
        save = control.should_save or self.stopping
        epoch_ends = control.should_training_stop or control.should_epoch_stop or state.epoch % 1 == 0
        self.save_at_epoch_end = save and epoch_ends
        control.should_save = save and not epoch_ends

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Save what waited for it; nothing is new where no step was taken."""
        control.should_save = control.should_save or self.save_at_epoch_end
        if not self.has_trained:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args, state, control, **kwargs) -> None:
        """Stop, after the checkpoint."""
        self.save_at_epoch_end = False
        if self.stopping:
            raise KeyboardInterrupt(f"stopped; saved in {args.output_dir}/checkpoint-{state.global_step}")

    def _everyone_stops(self, args: Any) -> bool:
        """Whether any process was asked to: all must save at the same step."""
        if args.world_size > 1 and args.save_strategy != "no":
            from accelerate.utils import reduce

            asked = torch.tensor(float(self.asked_to_stop), device=args.device)
            return reduce(asked, "sum").item() > 0
        return self.asked_to_stop


class _TellEpoch(TrainerCallback):
    """Tells a dataset that augments its images which epoch it is, also where a run goes on."""

    def __init__(self, dataset: Any):
        self.set_epoch = getattr(dataset, "set_epoch", None)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if self.set_epoch is not None:
            # whole epochs are sums of fractions
            self.set_epoch(int(state.epoch + 1e-6))


def _checkpoints(output: str | Path) -> list[Path]:
    """The `checkpoint-N` folders, newest first."""
    names = re.compile(rf"checkpoint-(\d+)({EARLIER})?")
    found = [(names.fullmatch(folder.name), folder) for folder in Path(output).glob("checkpoint-*")]
    ordered = sorted((int(match[1]), match[2] is None, folder) for match, folder in found if match)
    return [folder for *_, folder in reversed(ordered)]


def _set_aside(folder: Path) -> None:
    """Move a checkpoint of the same step aside; a complete one is kept until its successor is."""
    earlier = folder.with_name(folder.name + EARLIER)
    if earlier.exists():
        # what was to replace it was never completed
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        os.replace(folder, earlier)


def _rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove what a complete checkpoint replaces: its own predecessor and, beyond `limit`, all but the last and best.

    Later steps go too: they are damaged, or of a run that was resumed before them.
    """
    shutil.rmtree(newest.with_name(newest.name + EARLIER), ignore_errors=True)
    if not limit or limit < 0:
        return
    folders = _checkpoints(newest.parent)
    keep = {newest.name} | ({Path(best).name} if best else set())
    for folder in folders[folders.index(newest) :]:
        if len(keep) < limit and (folder / MANIFEST).exists():
            keep.add(folder.name)
    for folder in folders:
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def _plain_damage(folder: Path) -> str | None:
    """What a checkpoint without a manifest visibly lacks, if anything."""
    for pattern in ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json"):
        if not any(file.stat().st_size for file in folder.glob(pattern)):
            return f"{pattern} is missing or empty"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return "trainer_state.json cannot be read"
    return None
