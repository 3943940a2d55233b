"""What Performer attention costs: its error by features, time and memory by tokens beside softmax attention's.

    OMP_NUM_THREADS=1 python recipes/benchmarks/performer.py --output performer.json

Attention alone with the heads of DeiT-tiny (3 of 64), batch 1, random numbers, no gradients, then the whole model.

Error: root mean square over seeds of |estimate - softmax| / |softmax|, at 197 tokens, for normal queries and keys of
several sizes (`logits` is the standard deviation of what the softmax is taken of), with the exponent `p` of a fit
`features ** p`; a mean of independent features has -0.5.

Time: what is compared takes turns, and medians are printed, in ms. Memory: the most that PyTorch had allocated at a
time beyond the inputs, its kernels' own buffers counted. `sdpa` is PyTorch's fused softmax attention, `eager` the one
that holds all `N x N` weights. `slope` is the exponent of a fit `tokens ** slope`, from the first to the last row.
"""

import argparse
import json
import math
import statistics
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from lgvit_hf import DeiTHighway, DeiTHighwayConfig
from lgvit_hf.attention import orthogonal_gaussian, performer
from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.files import write_json
from lgvit_hf.policies import NeverPolicy
from lgvit_hf.segments import State

HEADS, HEAD_DIM = 3, 64


def eager(query, key, value):
    """Softmax attention as its formula says."""
    return (query @ key.mT * HEAD_DIM**-0.5).softmax(-1) @ value


def exponent(sizes, values):
    """The slope of a straight line through the logarithms."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().log()
    x = x - x.mean()
    return float((x @ y) / (x @ x))


def errors(features, scale, seeds, tokens=197):
    """Relative errors for normal queries and keys of standard deviation `scale`, one per number of features."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, HEADS, tokens, HEAD_DIM, generator=generator)
    query, key = scale * query, scale * key
    exact = scaled_dot_product_attention(query, key, value)

    def squared(number, seed):
        estimate = performer(query, key, value, orthogonal_gaussian(number, HEAD_DIM, seed))
        return float((estimate - exact).square().sum() / exact.square().sum())

    return [statistics.fmean(squared(number, seed) for seed in range(seeds)) ** 0.5 for number in features]


def peak_bytes(run):
    """The most that is allocated at a time while `run` runs."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocated = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def compared(tokens, features, repeats, eager_limit):
    """Median seconds and peak bytes of each attention at a number of tokens."""
    query, key, value = torch.randn(3, 1, HEADS, tokens, HEAD_DIM)
    directions = orthogonal_gaussian(features, HEAD_DIM, seed=0)
    runs = {
        "performer": partial(performer, query, key, value, directions),
        "sdpa": partial(scaled_dot_product_attention, query, key, value),
    }
    if tokens <= eager_limit:
        runs["eager"] = partial(eager, query, key, value)
    times = time_interleaved(runs, repeats=repeats)
    return {
        "tokens": tokens,
        "seconds": {name: statistics.median(times[name]) for name in runs},
        "bytes": {name: peak_bytes(run) for name, run in runs.items()},
    }


def crossover(rows, unit, other):
    """Tokens from which `performer` takes less than `other`; logarithms are interpolated between rows."""
    points = [
        (row["tokens"], math.log(row[unit]["performer"] / row[unit][other])) for row in rows if other in row[unit]
    ]
    if points[0][1] < 0:
        return f"from {points[0][0]} or fewer tokens on"
    for (left, above), (right, below) in pairwise(points):
        if above >= 0 > below:
            return f"from about {left * (right / left) ** (above / (above - below)):.0f} tokens on"
    return f"none up to {points[-1][0]} tokens"


def whole_model(features, repeats):
    """Median seconds of DeiT-tiny on one image of 224 x 224 pixels, by attention."""
    runs = {}
    for name, settings in (("performer", {"feature_map_dim": features}), ("sdpa", {"attn_implementation": "sdpa"})):
        sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        config = DeiTHighwayConfig(exit_positions=[], exit_types=[], num_labels=1000, **sizes, **settings)
        state = State({"pixel_values": torch.randn(1, 3, 224, 224)})
        runs[name] = partial(run_early, DeiTHighway(config).eval().segments(), state, NeverPolicy())
    times = time_interleaved(runs, repeats=repeats)
    return {name: statistics.median(times[name]) for name in runs}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features", nargs="+", type=int, default=[64, 128, 256, 512, 1024], help="for the error")
    add("--scales", nargs="+", type=float, default=[0.125, 0.25, 0.5, 1.0], help="of queries and keys")
    add("--seeds", type=int, default=16)
    add("--tokens", nargs="+", type=int, default=[197, 512, 1024, 2048, 4096, 8192, 16384])
    add("--timed-features", type=int, default=256)
    add("--eager-limit", type=int, default=4096, help="no eager attention beyond that many tokens")
    add("--repeats", type=int, default=7)
    add("--output", help="JSON file for the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")

    print(f"\nlogits  {'  '.join(f'{number:>6}' for number in options.features)}  exponent")
    by_scale = []
    for scale in options.scales:
        row = {"scale": scale, "logits": scale**2, "errors": errors(options.features, scale, options.seeds)}
        row["exponent"] = exponent(options.features, row["errors"])
        by_scale.append(row)
        cells = "  ".join(f"{error:6.3f}" for error in row["errors"])
        print(f"{row['logits']:6.3f}  {cells}  {row['exponent']:8.2f}", flush=True)

    names = ("performer", "sdpa", "eager")
    header = "  ".join(f"{name + unit:>15}" for unit in (", ms", ", MB") for name in names)
    print(f"\ntokens  {header}   ({options.timed_features} features)")
    rows = []
    for tokens in options.tokens:
        rows.append(row := compared(tokens, options.timed_features, options.repeats, options.eager_limit))
        cells = [
            f"{row[unit][name] * factor:15.2f}" if name in row[unit] else " " * 15
            for unit, factor in (("seconds", 1e3), ("bytes", 1e-6))
            for name in names
        ]
        print(f"{tokens:6}  {'  '.join(cells)}", flush=True)
    slopes, crossovers = {}, {}
    for unit in ("seconds", "bytes"):
        for name in names:
            measured = [row for row in rows if name in row[unit]]
            slopes[f"{name} {unit}"] = exponent(
                [row["tokens"] for row in measured], [row[unit][name] for row in measured]
            )
        for other in names[1:]:
            crossovers[f"{unit} against {other}"] = crossover(rows, unit, other)
    print(" slope  " + "  ".join(f"{slope:15.2f}" for slope in slopes.values()))
    for what, where in crossovers.items():
        print(f"performer takes less {what}: {where}")

    model = whole_model(options.timed_features, options.repeats)
    print("DeiT-tiny, 198 tokens: " + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in model.items()))
    if options.output:
        figures = {"errors": by_scale, "tokens": rows, "slopes": slopes, "crossovers": crossovers, "deit_tiny": model}
        write_json(options.output, {"features": options.features, "timed": options.timed_features, **figures})


if __name__ == "__main__":
    main()
