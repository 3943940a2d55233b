"""Evaluation by two processes, as torchrun and accelerate start them: the table, the figures and the policy of one."""

import json
import shutil

import pytest
import torch

from lgvit_hf import ExitTable
from lgvit_hf.cli import inputs, main
from lgvit_hf.data.processing import ProcessedImages
from lgvit_hf.data.shares import share
from tests.processes import in_two_processes
from tests.test_evaluation_commands import checkpoint, copy  # noqa: F401

pytestmark = pytest.mark.version_independent


@pytest.mark.parametrize("count, num_processes", [(5, 2), (7, 3), (8, 4), (3, 3)])
def test_no_sample_twice_or_lost(count, num_processes):
    shares = [share(count, rank, num_processes) for rank in range(num_processes)]
    assert [number for numbers in shares for number in numbers] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_samples_than_processes():
    with pytest.raises(ValueError, match="2 samples for 3 processes: start at most 2"):
        share(2, 0, 3)


COMMANDS = """
import sys, torch.distributed as dist
from pathlib import Path
from tests.test_shares import run_commands

dist.init_process_group("gloo")
run_commands(Path(sys.argv[1]), "two")
"""


def run_commands(folder, name):
    """`evaluate` and `calibrate` on all digits but the last: shares differ in size, and last batches are not full."""
    kept, inputs.ProcessedImages = inputs.ProcessedImages, AllButTheLast
    model, policy = str(folder / "model"), ["--policy", "confidence", "--threshold", "0.3"]
    words = ["--data", "digits", "--batch-size", "50", "--timed-batch-sizes", "4", *policy]
    assert main(["evaluate", model, *words, "--output", str(folder / f"{name}.json")]) == 0
    words = ["--data", "digits", "--max-accuracy-drop", "0.1", "--policy", "confidence"]
    files = ["--table", str(folder / f"{name}.safetensors"), "--output", str(folder / name)]
    assert main(["calibrate", model, *words, *files]) == 0
    inputs.ProcessedImages = kept


class AllButTheLast(ProcessedImages):
    """The samples of a split, of which there is an odd number."""

    def __len__(self):
        return super().__len__() - 1


@pytest.mark.timeout(600)  # several processes on a machine that may be busy
def test_two_processes_find_what_one_finds(copy, tmp_path):  # noqa: F811
    shutil.copytree(copy, tmp_path / "model")
    run_commands(tmp_path, "one")
    in_two_processes(COMMANDS, tmp_path)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert sum(exit["samples"] for exit in two["exits"]) == 359
    for part in ("exits", "overall", "classes", "confusion"):
        assert numbers_of(two[part]) == pytest.approx(numbers_of(one[part]), abs=1e-5), part
    one, two = (ExitTable.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert two.labels.tolist() == one.labels.tolist() and len(two) % 2 and two.weights == one.weights
    torch.testing.assert_close(two.logits, one.logits, atol=1e-5, rtol=1e-5)
    one, two = (json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("one", "two"))
    assert two["samples_tested"] == one["samples_tested"] and two["policy"]["name"] == "confidence"


def numbers_of(found):
    """The numbers of a report, in order."""
    if isinstance(found, (dict, list)):
        each = found.values() if isinstance(found, dict) else found
        return [number for entry in each for number in numbers_of(entry)]
    return [found] if isinstance(found, (int, float)) else []
