"""FSDP2 and DDP over two processes of a CPU: a step, early exit, saving, going on; all as one process does it."""

import pytest

from tests.processes import in_two_processes

RUN = """
import sys
from tests.distributed import run
run(sys.argv[1], {kinds})
"""


# Swin's stages are the harder case: units that run once a block, and whose merging runs behind them
@pytest.mark.timeout(600)  # several processes on a machine that may be busy
def test_sharded_and_replicated(tmp_path):
    in_two_processes(RUN.format(kinds=["swin"]), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_and_replicated_backbones(tmp_path):
    in_two_processes(RUN.format(kinds=["vit", "deit", "deit_plain"]), tmp_path)
