"""What torch.compile (inductor) is worth: the eager highway, its compiled segments and the compiled plain backbone.

    OMP_NUM_THREADS=1 python recipes/benchmarks/compile.py --batch-sizes 1 8 --output compile.json

DeiT-tiny, random weights, two exits. Policies force every row to one exit, or rows of a batch to different ones, so
that all runs do the same work. They take turns, and what is printed are medians over the rounds, in ms. Compiling is
counted apart, in seconds: the first run of each case, with what earlier ones left to compile. Needs a C++ compiler.
"""

import argparse
import os
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from torch._inductor import config as inductor

from lgvit_hf import DeiTHighway, DeiTHighwayConfig
from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.files import write_json
from lgvit_hf.policies import ConfidencePolicy, FixedPolicy, NeverPolicy
from lgvit_hf.segments import State


@dataclass(frozen=True)
class ThirdsLeave(ConfidencePolicy):
    """Decides at the cost of the confidence policy, then lets a third of the samples exit at each exit."""

    def start(self, batch_size, device):
        return {"plan": torch.arange(batch_size, device=device) % 3}

    def __call__(self, logits, memory, exit_index=0):
        _, scored = super().__call__(logits, memory, exit_index)
        return memory["plan"] <= exit_index, {"plan": memory["plan"], **scored}


def compiled(segment):
    """The segment with its blocks as one graph, and its exit as one."""
    return replace(
        segment,
        blocks=(torch.compile(segment.advance, fullgraph=True),),
        answer=torch.compile(segment.answer, fullgraph=True),
    )


@torch.no_grad()
def measure(batch_size, repeats):
    """Median milliseconds and the seconds of the first run, by what is run and where its samples exit."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = DeiTHighway(
        DeiTHighwayConfig(
            hidden_size=192,
            num_attention_heads=3,
            intermediate_size=768,
            num_labels=100,
            exit_positions=[4, 8],
            exit_types=["conv1_1", "attention_r2"],
        )
    ).eval()
    eager, state = model.segments(), State({"pixel_values": torch.randn(batch_size, 3, 224, 224)})
    fast, plain = [compiled(segment) for segment in eager], model.truncate(2).eval().segments()
    policies = {
        "exit 1": FixedPolicy(0),
        "exit 2": FixedPolicy(1),
        "asked at each": ConfidencePolicy(threshold=0.9999),
    }
    if batch_size > 1:
        policies["thirds"] = ThirdsLeave(threshold=0.5)
    runs = {
        ("plain backbone", "eager"): partial(run_early, plain, state, NeverPolicy()),
        ("plain backbone", "compiled"): partial(run_early, [compiled(plain[0])], state, NeverPolicy()),
    }
    for name, policy in policies.items():
        runs[name, "eager"] = partial(run_early, eager, state, policy)
        runs[name, "compiled"] = partial(run_early, fast, state, policy)
    first = {}
    for name, run in runs.items():
        start = time.perf_counter()
        answers = run()
        first[name] = time.perf_counter() - start
        if name[1] == "compiled":
            expected = runs[name[0], "eager"]()
            assert answers.exit_index.equal(expected.exit_index)
            torch.testing.assert_close(answers.logits, expected.logits, atol=1e-4, rtol=0)
    times = time_interleaved(runs, repeats=repeats)
    return [
        {
            "batch_size": batch_size,
            "rows_leave": name,
            "eager_ms": 1e3 * statistics.median(times[name, "eager"]),
            "compiled_ms": 1e3 * statistics.median(times[name, "compiled"]),
            "speed_up": statistics.median(
                a / b for a, b in zip(times[name, "eager"], times[name, "compiled"], strict=True)
            ),
            "compile_seconds": first[name, "compiled"],
        }
        for name in ("plain backbone", *policies)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    # compiling is timed, not finding what an earlier run compiled
    inductor.force_disable_caches = True
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(map(shutil.which, filter(None, compilers))):
        parser.error("torch.compile's inductor needs a C++ compiler (g++ or clang++, or CXX): there is none here")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    print("batch  samples exit     eager, ms  compiled, ms  speed-up  compiling, s")
    results = []
    for batch_size in options.batch_sizes:
        for row in measure(batch_size, options.repeats):
            results.append(row)
            print(
                f"{batch_size:5}  {row['rows_leave']:14}  {row['eager_ms']:10.1f}  {row['compiled_ms']:12.1f}  "
                f"{row['speed_up']:7.2f}x  {row['compile_seconds']:12.1f}",
                flush=True,
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
