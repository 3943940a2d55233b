"""What the policy `gate` costs beside `confidence`: DeiT-tiny, 224 px, batch 1, eight exits, no sample exits early.

    python recipes/benchmarks/gate_cost.py --labels 1000 --rounds 300

Both policies and the plain model take turns, in PyTorch and, exported as one file, in ONNX Runtime, on one thread; the
difference is taken within a round and divided by that round's time of the plain model, and the medians over the rounds
are printed. One number of labels a run: what is measured second in a process costs more. The bounds are 5 % in PyTorch
and 2 % in ONNX Runtime. The numbers of the gate are random.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from lgvit_hf import DeiTHighway, DeiTHighwayConfig
from lgvit_hf.engine import run_early
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.export.onnx_export import export_onnx
from lgvit_hf.gate import num_features
from lgvit_hf.policies import build_policy
from lgvit_hf.runtimes.onnxruntime import ORTHighway
from lgvit_hf.segments import State

EXITS = 8
# below 1, which would skip the exits; random weights are never this sure
THRESHOLD = 0.9999999


def policies(num_labels):
    def numbers(*shape):
        return torch.rand(*shape, dtype=torch.float64).tolist()

    lengths = [num_features(place) for place in range(EXITS)]
    models = [
        {"mean": numbers(n), "scale": [1.0] * n, "weights": numbers(2, n), "bias": [-10.0, -10.0]} for n in lengths
    ]
    gate = {"name": "gate", "exits": list(range(EXITS)), "models": models, "num_labels": num_labels}
    return {
        "never": {"name": "never"},
        "confidence": {"name": "confidence", "threshold": THRESHOLD},
        "gate": {**gate, "threshold": THRESHOLD},
    }


def in_torch(model, image):
    segments, state = model.segments(), State({"pixel_values": image})
    return {
        name: partial(run_early, segments, state, build_policy(settings, EXITS))
        for name, settings in policies(model.config.num_labels).items()
    }


def in_onnxruntime(model, image, folder):
    runs = {}
    for name, settings in policies(model.config.num_labels).items():
        model.set_exit_policy(settings)
        export_onnx(model, folder / name)
        runs[name] = partial(ORTHighway.from_pretrained(folder / name, threads=1), image)
    return runs


@torch.inference_mode()
def measure(runs, rounds):
    """Milliseconds of each policy, and by how much the gate's are more than confidence's, in shares of the model's."""
    for name, run in runs.items():
        assert run().exit_index.item() == EXITS, f"{name}: the sample must not exit early"
    times = time_interleaved(runs, repeats=rounds, warm_up=10)
    more = [
        (gate - confidence) / never
        for never, confidence, gate in zip(times["never"], times["confidence"], times["gate"], strict=True)
    ]
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}, statistics.median(more)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("labels  runtime       never  confidence     gate, ms  gate over confidence", flush=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": options.labels}
    config = DeiTHighwayConfig(**sizes, exit_positions=list(range(4, 4 + EXITS)), exit_types="linear")
    model, image = DeiTHighway(config).eval(), torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        for runtime, runs in (
            ("PyTorch", in_torch(model, image)),
            ("ONNX Runtime", in_onnxruntime(model, image, Path(folder))),
        ):
            spent, more = measure(runs, options.rounds)
            each = "  ".join(f"{spent[name]:9.2f}" for name in spent)
            print(f"{options.labels:6}  {runtime:12} {each}  {more:19.2%}", flush=True)


if __name__ == "__main__":
    main()
