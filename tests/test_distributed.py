"""FSDP2 and DDP over two processes of a CPU: a step, early exit, saving, going on; all as one process does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def in_two_processes(folder, *kinds):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "tests.distributed", str(folder), *kinds]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            _, error = process.communicate()
        finally:
            process.terminate()
    assert process.returncode == 0, error[-4000:]


# Swin's stages are the harder case: units that run once a block, and whose merging runs behind them
@pytest.mark.timeout(600)  # several processes on a machine that may be busy
def test_sharded_and_replicated(tmp_path):
    in_two_processes(tmp_path, "swin")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_and_replicated_backbones(tmp_path):
    in_two_processes(tmp_path, "vit", "deit", "deit_plain")
