"""Scripts run in two processes as torchrun runs them, over gloo; both come of one that has imported everything."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# torchrun imports PyTorch a third time, which takes longer than what most scripts do.
# The store comes behind the forks, in which its thread would not live on.
START = """
import os, runpy, signal, sys, traceback
import torch.distributed
from lgvit_hf import HighwayTrainer
import tests.tiny

reader, writer = os.pipe()
children = []
for rank in "01":
    child = os.fork()
    if child:
        children.append(child)
        continue
    os.close(writer)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {**place, **agent, "MASTER_PORT": os.read(reader, 5).decode().strip()}
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.write(writer, b"%5d" % store.port * 2)
while children:
    child, status = os.wait()
    children.remove(child)
    if status:
        for other in children:
            os.kill(other, signal.SIGKILL)
        sys.exit(f"a process ended with status {status}")
"""

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
    command = [sys.executable, "-c", START, str(folder / "run.py"), str(folder)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            _, error = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, error[-4000:]
