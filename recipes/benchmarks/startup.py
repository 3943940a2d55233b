"""How long `lgvit predict` takes to answer one image in a new process, and how much memory, in each runtime.

    python recipes/benchmarks/startup.py runs/stage2 onnx/ photo.jpg --rounds 5

`onnx/` is what `lgvit export runs/stage2 onnx/` wrote. The runtimes take turns; printed are medians over the rounds:
seconds from the start of the process to its end, of which the processor was busy (`cpu_seconds`), and the largest
resident memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNTIMES = {"PyTorch": [], "ONNX Runtime": ["--runtime", "onnxruntime"], "OpenVINO": ["--runtime", "openvino"]}


def measure(command: list[str]) -> dict[str, float]:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - start
    # Linux counts kilobytes
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "mb": used.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("exported")
    parser.add_argument("image")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = {name: [] for name in RUNTIMES}
    with tempfile.TemporaryDirectory() as home:
        for number in range(options.rounds):
            for name, runtime in RUNTIMES.items():
                path = options.exported if runtime else options.checkpoint
                output = str(Path(home) / f"{number}-{name}.csv")
                command = ["predict", path, options.image, "--output", output, *runtime]
                found[name].append(measure([sys.executable, "-m", "lgvit_hf.cli", *command]))
    for name, rounds in found.items():
        medians = {each: round(statistics.median(row[each] for row in rounds), 2) for each in rounds[0]}
        print(json.dumps({"runtime": name, **medians}))


if __name__ == "__main__":
    main()
