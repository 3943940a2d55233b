"""Runs that are killed, damaged, short of disk or interrupted go on to the log and the weights of one that was not."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from transformers import EarlyStoppingCallback, TrainerCallback, ViTImageProcessor

from lgvit_hf import DistillationTrainer, HighwayTrainer, HighwayTrainingArguments, ViTHighway
from lgvit_hf.cli import main
from lgvit_hf.training import run as training_run
from lgvit_hf.training.checkpoints import (
    MANIFEST,
    checkpoint_to_resume,
    damage,
    last_complete_checkpoint,
    read_manifest,
)
from tests.processes import in_two_processes
from tests.seeds import THOROUGH, rng
from tests.tiny import tiny_dataset, tiny_model

ROOT = Path(__file__).resolve().parents[1]
# three epochs of three steps; checkpoints behind steps 2, 4, ..., losses logged behind 3, 6 and 9
SETTINGS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 3,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
LAST = "checkpoint-9"


def make_trainer(folder, trainer_class=HighwayTrainer, callbacks=(), **changes):
    torch.set_num_threads(1)
    # dropout draws from the generator that a checkpoint must restore
    model = tiny_model("vit", exit_positions=[2, 4], hidden_dropout_prob=0.1)
    args = HighwayTrainingArguments(str(folder), **{**SETTINGS, **changes})
    datasets = {"train_dataset": tiny_dataset(24), "eval_dataset": tiny_dataset(8, seed=1)}
    return trainer_class(model, args, callbacks=list(callbacks), **datasets)


def losses(state):
    return [(log["step"], log["loss"], log["grad_norm"]) for log in state.log_history if "loss" in log]


def outcome(trainer):
    """What a resumed run must share with one that never stopped: the log, the weights, the optimizer."""
    digest = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        digest.update(state["exp_avg"].numpy().tobytes())
    return losses(trainer.state), digest.hexdigest()


def trained(folder, resume=None, **changes):
    trainer = make_trainer(folder, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a run that nothing disturbs, and its folder, which tests copy."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder), folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that folder after the checkpoint of step 4."""
    for step in (2, 4):
        shutil.copytree(whole[1] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def test_every_checkpoint_is_complete_and_the_trainer_is_none_the_worse(whole):
    for step in (2, 4, 6, 8, 9):
        folder = whole[1] / f"checkpoint-{step}"
        assert damage(folder) is None
        listed = set(read_manifest(folder)["files"])
        assert listed == {file.name for file in folder.iterdir()} - {MANIFEST}
        assert listed >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert last_complete_checkpoint(whole[1]) == (str(whole[1] / LAST), [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def go_on_from(steps, source, expected, tmp_path, **batch):
    for step in steps:
        shutil.copytree(source / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        assert trained(tmp_path / f"{step}", resume=True, **batch) == expected, step


def test_going_on_from_any_checkpoint_is_exact(whole, tmp_path):
    # 2 and 4 lie within an epoch and between logs
    go_on_from((2, 4, 6, 9), whole[1], whole[0], tmp_path)


def test_going_on_is_exact_where_gradients_are_accumulated(tmp_path):
    batch = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    go_on_from((4, 6), tmp_path / "whole", trained(tmp_path / "whole", **batch), tmp_path, **batch)


def test_epochs_that_are_logged_and_saved_as_they_end_are_exact(tmp_path):
    # steps 3, 6 and 9 are saved with the epoch's log, step 8 between
    changes = {"logging_strategy": "epoch", "save_steps": 1, "num_train_epochs": 2.5}
    expected = trained(tmp_path / "whole", **changes)
    assert [step for step, *_ in expected[0]] == [3, 6, 8]
    for step in (3, 5, 8):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        # 8 is the last one, in the middle of an epoch: nothing is left to do
        assert trained(tmp_path / f"{step}", resume=True, **changes) == expected


def test_the_second_stage_resumes_too(tmp_path):
    expected = trained(tmp_path / "whole", trainer_class=DistillationTrainer)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    assert trained(tmp_path / "run", resume=True, trainer_class=DistillationTrainer) == expected


# -- killed ---------------------------------------------------------------------------------------------------------


class AtStep(TrainerCallback):
    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


class Writes:
    """Counts what changes files from `start` on, and kills the process in the middle of the `last`-th such call.

    Of the copied modules of this package one stands for all.
    """

    def __init__(self, log, last):
        self.log, self.last, self.count, self.running = log, last, 0, False
        sys.addaudithook(self.hook)
        transformers.modeling_utils.safe_save_file = self.wrapped(safetensors.torch.save_file, place=1)
        torch.save = self.wrapped(torch.save, place=1)

    def start(self):
        self.running = True

    def at(self, what, file=None):
        if self.running and (not what.endswith(".py") or what.endswith("modeling_vit.py")):
            self.count += 1
            self.log.write_text(f"{self.count}: {what}")
            if self.count == self.last:
                if file is not None:
                    os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event, args):
        if event == "open" and isinstance(args[1], str) and "w" in args[1] and str(args[0]) != str(self.log):
            self.at(f"open {args[0]}")
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            self.at(f"{event} {args[0]}")

    def wrapped(self, write, place):
        def half(*args, **kwargs):
            running, self.running = self.running, False
            write(*args, **kwargs)
            self.running = running
            file = args[place] if len(args) > place else kwargs["filename"]
            self.at(f"half of {file}", file)

        return half


def killed(folder, log, last):
    """In a process of its own: train, and die in the `last`-th write from step 4 on, while its checkpoint is saved."""
    writes = Writes(log, last)
    trained(folder, callbacks=[AtStep(4, writes.start)], save_total_limit=1)


def forks(connection):
    """Run functions in copies of this process, and send how each has ended."""
    while (work := connection.recv()) is not None:
        child = os.fork()
        if child:
            connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            continue
        try:
            work[0](*work[1:])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


@pytest.fixture(scope="module")
def in_process():
    """A process that has imported everything and run nothing, whose copies run functions.

    It is no fork server of `multiprocessing`, of which there is one in a process: decoders may have started it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=forks, args=(theirs,), daemon=True)
    process.start()

    def call(function, *args):
        ours.send((function, *args))
        return ours.recv()

    yield call
    ours.send(None)
    process.join()


@pytest.mark.version_independent
@pytest.mark.timeout(900)  # several processes on a machine that may be busy
def test_killed_at_every_write(whole, tmp_path, in_process):
    log, calls, draws = tmp_path / "log", [], rng()
    for last in range(1, 100):
        folder = tmp_path / f"{last}"
        assert in_process(killed, folder, log, last) == -signal.SIGKILL
        calls.append(log.read_text().split(": ", 1)[1].replace(str(folder), ""))
        if "checkpoint-6" in calls[-1]:
            break
        complete, _ = last_complete_checkpoint(folder)
        # with a limit of one, too, a complete one is there at any moment
        assert complete is not None, calls[-1]
        # what is gone of the checkpoint before makes no difference once another is complete
        same = calls[-1] in calls[:-1] or all(call.startswith("os.remove") for call in calls[-2:])
        if same or not (THOROUGH or draws.random() < 0.3):
            shutil.rmtree(folder)
            continue
        assert trained(folder, resume=True, save_total_limit=1) == whole[0], calls[-1]
        # what the kill left behind is gone
        assert [entry.name for entry in folder.iterdir()] == [LAST]
        shutil.rmtree(folder)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert f"half of /checkpoint-4/{name}" in calls
    for name in ("config.json", "trainer_state.json", f".{MANIFEST}"):
        assert f"open /checkpoint-4/{name}" in calls
    assert f"os.rename /checkpoint-4/.{MANIFEST}" in calls
    # the one before, and not before
    assert calls.index("os.remove model.safetensors") > calls.index(f"os.rename /checkpoint-4/.{MANIFEST}")


@pytest.mark.version_independent
def test_a_step_that_is_saved_twice_is_complete_at_any_moment(run):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    # from 2 to 4 again: the old checkpoint-4 makes room, and is taken where the new one is cut short
    trainer = make_trainer(run, save_total_limit=1)
    trainer._save_optimizer_and_scheduler = lambda folder: stop()
    shutil.copytree(run / "checkpoint-4", run / "copy")
    with pytest.raises(Stop):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    complete, skipped = last_complete_checkpoint(run)
    assert complete == str(run / "checkpoint-4-earlier") and len(skipped) == 1
    shutil.rmtree(run / "copy")
    trainer = make_trainer(run, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert [entry.name for entry in run.iterdir()] == [LAST]


# -- damaged --------------------------------------------------------------------------------------------------------


def remove(file):
    file.unlink()


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip(file):
    content = bytearray(file.read_bytes())
    # of a manifest among the files, which come last
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)


REASONS = {
    remove: "{name} is missing",
    halve: "{name} is {half} bytes, {size} were written",
    empty: "{name} is 0 bytes, {size} were written",
    flip: "{name} is not what was written",
}


@pytest.mark.parametrize("harm", REASONS)
def test_a_damaged_checkpoint_is_skipped_and_said(harm, whole, run, caplog):
    names = [*read_manifest(run / "checkpoint-4")["files"], MANIFEST]
    intact = run / "intact"
    shutil.copytree(run / "checkpoint-4", intact)
    for name in names:
        shutil.rmtree(run / "checkpoint-4")
        shutil.copytree(intact, run / "checkpoint-4")
        size = (intact / name).stat().st_size
        harm(run / "checkpoint-4" / name)
        complete, skipped = last_complete_checkpoint(run)
        if name == MANIFEST and harm is flip:
            assert complete == str(run / "checkpoint-2")
            continue
        why = REASONS[harm].format(name=name, half=size // 2, size=size)
        if name == MANIFEST:
            why = "name it" if harm is remove else "cannot be read"
        assert complete == str(run / "checkpoint-2") and len(skipped) == 1
        assert skipped[0].startswith("checkpoint-4 skipped: ") and why in skipped[0]
        if name != MANIFEST:
            with pytest.raises(ValueError, match=f"checkpoint-4 is incomplete: {name}"):
                make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    shutil.rmtree(intact)
    harm(run / "checkpoint-4" / "optimizer.pt")
    # one write later the damaged one is replaced, and with a limit it does not take the place of a complete one
    with caplog.at_level(logging.WARNING):
        assert trained(run, resume=True, save_total_limit=2) == whole[0]
    assert sum("checkpoint-4 skipped" in record.message for record in caplog.records) == 1
    assert sorted(entry.name for entry in run.iterdir()) == ["checkpoint-8", LAST]


@pytest.mark.version_independent
def test_what_is_no_manifest(tmp_path):
    for text in ("[]", "{}", '{"files": 3}', '{"files": {"config.json": {}}}', '{"files": {"a": 1}}'):
        (tmp_path / MANIFEST).write_text(text)
        assert damage(tmp_path) == f"{MANIFEST} cannot be read", text


def test_a_run_with_nothing_complete(run, whole, caplog):
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint; checkpoint-4 skipped: .*; checkpoint-2 skipped"):
        trained(run, resume=True)
    with caplog.at_level(logging.WARNING):
        assert trained(run, resume="auto") == whole[0]
    assert "checkpoint-2 skipped: rng_state.pth is missing" in caplog.text
    assert checkpoint_to_resume("auto", run / "nowhere") == (None, [])
    with pytest.raises(ValueError, match="no such checkpoint"):
        trained(run, resume=str(run / "checkpoint-7"))


def test_a_checkpoint_of_plain_transformers_must_be_named(run, whole, caplog):
    shutil.rmtree(run / "checkpoint-2")
    folder = run / "checkpoint-4"
    (folder / MANIFEST).unlink()
    complete, skipped = last_complete_checkpoint(run)
    assert complete is None and skipped[0].endswith(f"name it: {folder}")
    with caplog.at_level(logging.WARNING):
        log, digest = trained(run, resume=str(folder))
    # the loss of step 4 was not logged, and plain transformers does not keep it
    assert digest == whole[0][1] and "cannot be known" in caplog.text
    for name, damaged in (("scheduler.pt", remove), ("optimizer.pt", empty), ("trainer_state.json", halve)):
        shutil.rmtree(folder)
        shutil.copytree(whole[1] / "checkpoint-4", folder)
        (folder / MANIFEST).unlink()
        damaged(folder / name)
        with pytest.raises(ValueError, match=f"is incomplete: {name}"):
            trained(run, resume=str(folder))


# -- another run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"per_device_train_batch_size": 4}, "train_batch_size: 8 then, 4 now"),
        ({"num_train_epochs": 4}, "num_train_epochs: 3 then, 4 now"),
        ({"learning_rate": 0.5, "strategy": "uniform"}, "learning_rate: 0.01 then, 0.5 now; strategy: None then"),
        ({"trainer_class": DistillationTrainer}, "trainer: HighwayTrainer then, DistillationTrainer now"),
    ],
)
def test_another_run_is_not_gone_on_with(changes, message, run, caplog):
    with pytest.raises(ValueError, match="checkpoint-4 is of another run") as error:
        trained(run, resume="auto", **changes)
    assert message in str(error.value)
    if "seed" in changes:
        with caplog.at_level(logging.WARNING):
            trained(run, resume=str(run / "checkpoint-4"), **changes)
        assert message in caplog.text


def test_a_constant_learning_rate_may_be_followed_for_longer(tmp_path):
    expected = trained(tmp_path / "long", lr_scheduler_type="constant", max_steps=8)
    trained(tmp_path / "short", lr_scheduler_type="constant", max_steps=4)
    assert trained(tmp_path / "short", resume=True, lr_scheduler_type="constant", max_steps=8) == expected


class NeverBetter(EarlyStoppingCallback):
    """As if every evaluation were worse than the one before."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, {**metrics, "eval_loss": 1e9}, **kwargs)


def test_early_stopping_counts_on(tmp_path):
    def run(folder, resume=None):
        changes = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 4}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
        trainer = make_trainer(folder, callbacks=[NeverBetter(2)], **changes, **best)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer)

    expected = run(tmp_path / "whole")
    # stopped one epoch before the end
    assert expected[0][-1][0] == 9
    for step in (3, 6, 9):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        assert run(tmp_path / f"{step}", resume=True) == expected


# -- the disk is full -----------------------------------------------------------------------------------------------


def limited(folder, report, size):
    """In a process of its own: no file may become larger than `size` from step 4 on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stop = AtStep(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))
    try:
        trained(folder, callbacks=[stop], save_total_limit=1)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.write_text(str(error))


@pytest.mark.version_independent
@pytest.mark.parametrize("name, share", [("model.safetensors", 0.5), ("optimizer.pt", 0.9), ("config.json", 0.5)])
def test_no_room_for_a_checkpoint(name, share, whole, tmp_path, in_process):
    size = int((whole[1] / "checkpoint-4" / name).stat().st_size * share)
    assert in_process(limited, tmp_path / "run", tmp_path / "report", size) == 0
    assert (tmp_path / "report").read_text().startswith(f"{tmp_path}/run/checkpoint-4 could not be written: ")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert trained(tmp_path / "run", resume=True, save_total_limit=1) == whole[0]


PHOTOS = ["--backbone", "vit", "--image-size", 16, "--batch-size", 8, "--warmup-steps", 0, "--augment", "pad"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / label).mkdir()
        for number in range(20):
            shade = tuple(min(255, value + 2 * number) for value in colour)
            Image.new("RGB", (20, 12), shade).save(folder / label / f"{number}.png")
    return folder


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["checkpoint", "model"])
def test_no_room_on_the_command_line(where, photos, tmp_path, monkeypatch, capsys):
    if where == "checkpoint":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(ViTImageProcessor, "save_pretrained", full)
    words = ["train", "--data", photos, "--output", tmp_path / "run", "--epochs", 1, *PHOTOS]
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err.rstrip("\n").rsplit("\n", 1)[-1]
    assert line.startswith(f"lgvit: {tmp_path}/run") and "could not be written" in line and "No space left" in line
    left = sorted(entry.name for entry in (tmp_path / "run").iterdir())
    assert left == ([] if where == "checkpoint" else [last_complete_checkpoint(tmp_path / "run")[0].rsplit("/", 1)[1]])


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 3, 4, 9])
def test_ctrl_c_leaves_behind_a_checkpoint(step, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=f"checkpoint-{step}"):
        trained(tmp_path, callbacks=[AtStep(step, interrupt)])
    assert last_complete_checkpoint(tmp_path)[0] == str(tmp_path / f"checkpoint-{step}")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert trained(tmp_path, resume=True) == whole[0]


def test_ctrl_c_twice_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[AtStep(3, interrupt), AtStep(3, interrupt)])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-2"]


def test_ctrl_c_without_checkpoints_and_a_handler_of_ones_own(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, save_strategy="no", callbacks=[AtStep(3, interrupt)])
    assert list(tmp_path.iterdir()) == []
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        trained(tmp_path, callbacks=[AtStep(3, interrupt)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [1] and (tmp_path / LAST).is_dir()


# Ctrl-C as soon as the first checkpoint is complete
INTERRUPTED = """
import os, signal, sys
from lgvit_hf.cli import main
from lgvit_hf.training import checkpoints

write = checkpoints.write_manifest

def write_and_interrupt(*args, **kwargs):
    checkpoints.write_manifest = write
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGINT)

checkpoints.write_manifest = write_and_interrupt
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_on_the_command_line(photos, tmp_path, capsys):
    def words(output):
        return [str(word) for word in ["train", "--data", photos, "--output", output, "--epochs", 3, *PHOTOS]]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERRUPTED, *words(tmp_path / "run")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 130 and "Traceback" not in process.stderr, process.stderr
    assert process.stderr.count("lgvit: ") == 1 and "lgvit: stopped" in process.stderr
    assert main(words(tmp_path / "whole")) == 0
    assert last_complete_checkpoint(tmp_path / "run")[0] and not (tmp_path / "run" / "model.safetensors").exists()
    assert main([*words(tmp_path / "run"), "--resume"]) == 0
    whole, resumed = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "run"))
    assert resumed["losses"] == whole["losses"] and resumed["loss"] == whole["loss"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# -- the final model ------------------------------------------------------------------------------------------------


def publish(output, log, last, num_labels):
    """In a process of its own: what `train` does at its end, and die in the `last`-th write of the final model."""
    model = tiny_model("vit", seed=last, exit_positions=[2, 4], num_labels=num_labels)
    processor, writes = ViTImageProcessor(), Writes(log, last)
    writes.start()
    training_run.save_trained(model, processor, output)


def same_weights(model, other):
    return all(
        torch.equal(*pair) for pair in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.version_independent
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_labels", [5, 7])
def test_killed_while_the_model_is_written(num_labels, tmp_path, in_process):
    assert in_process(publish, tmp_path / "old", tmp_path / "log", 0, 5) == 0
    old, left = ViTHighway.from_pretrained(tmp_path / "old"), []
    for last in range(1, 100):
        output = tmp_path / f"{last}"
        shutil.copytree(tmp_path / "old", output)
        code = in_process(publish, output, tmp_path / "log", last, num_labels)
        assert code in (-signal.SIGKILL, 0)
        try:
            model = ViTHighway.from_pretrained(output)
        except OSError as error:
            assert "no file named model.safetensors" in str(error)
            left.append("none")
        else:
            left.append("old" if model.num_labels == 5 and same_weights(model, old) else "new")
            assert model.num_labels == (5 if left[-1] == "old" else num_labels)
        if left[-1] == "new":
            ViTImageProcessor.from_pretrained(output)
        if code == 0:
            break
    # a change of config passes through no weights rather than the wrong ones
    assert list(dict.fromkeys(left)) == (["old", "new"] if num_labels == 5 else ["old", "none", "new"])
    assert not list(output.glob(".writing-*"))


# -- several processes ----------------------------------------------------------------------------------------------

LAUNCHED = """
import os, sys
import pytest
from tests.test_checkpoints import AtStep, interrupt, trained
two = {"ddp_backend": "gloo", "per_device_train_batch_size": 4}
expected = trained(sys.argv[1] + "/whole", **two)
try:
    # one process is told to stop, all do
    trained(sys.argv[1] + "/run", callbacks=[AtStep(4, interrupt)] if os.environ["RANK"] == "1" else [], **two)
except KeyboardInterrupt as stop:
    assert "checkpoint-4" in str(stop)
else:
    raise AssertionError
logs, digest = trained(sys.argv[1] + "/run", resume=True, **two)
# weights and optimizer to the last bit; the mean loss since the last log is summed in two parts, over two processes
assert digest == expected[1]
assert [each[0] for each in logs] == [each[0] for each in expected[0]]
for ours, theirs in zip(logs, expected[0]):
    assert ours == pytest.approx(theirs, rel=1e-6)
"""


@pytest.mark.timeout(900)  # several processes on a machine that may be busy
def test_two_processes_write_one_manifest_and_stop_together(tmp_path):
    in_two_processes(LAUNCHED, tmp_path)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(read_manifest(tmp_path / "run" / "checkpoint-4")["files"])
    with pytest.raises(ValueError, match="world_size: 2 then, 1 now"):
        trained(tmp_path / "run", resume=True, per_device_train_batch_size=4)
