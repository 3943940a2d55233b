"""Scripts run in two processes by torchrun, over gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# a group that is still held when the interpreter ends now and then aborts it, after everything went well
ENDING = """
import gc, torch.distributed
gc.collect()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def in_two_processes(script, folder):
    """Run a script, whose argument is the folder, in two processes that end with this one; it may hold no trainer."""
    (folder / "run.py").write_text(script + ENDING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(folder / "run.py"), str(folder)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            _, error = process.communicate()
        finally:
            process.terminate()
    assert process.returncode == 0, error[-4000:]
