"""What a step of stage two costs beside the least it could: backbone forward without gradients, heads both ways.

    python recipes/benchmarks/stage_two.py --models deit-tiny swin-tiny --batch-size 8

Loss and backward of `DistillationTrainer` against the frozen backbone's forward plus forward and backward of the heads
alone, in turns; ratios are taken within a round and their median is printed. The optimizer is in neither.
"""

import argparse
import statistics
import tempfile

import torch
from engine import MODELS

from lgvit_hf import DistillationTrainer, HighwayTrainingArguments
from lgvit_hf.evaluation.timing import time_interleaved
from lgvit_hf.files import write_json
from lgvit_hf.segments import State


def measure(name, batch_size, repeats, folder):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    trainer = DistillationTrainer(model, HighwayTrainingArguments(folder, report_to=[], use_cpu=True))
    size = model.config.image_size
    batch = {"pixel_values": torch.randn(batch_size, 3, size, size), "labels": torch.arange(batch_size) % 100}

    gradients = []

    def step():
        trainer.compute_loss(model, dict(batch)).backward()
        model.zero_grad()

    def least():
        state, states = State({"pixel_values": batch["pixel_values"]}), []
        segments = model.segments()
        with torch.no_grad():
            for segment in segments:
                state = segment.advance(state)
                states.append(state)
            segments[-1].answer(state)
        outputs = [
            tensor
            for segment, state in zip(segments[:-1], states, strict=False)
            for tensor in segment.forward_with_features(state)
        ]
        # as real losses do, every exit's logits and map send a gradient of their own shape back
        if not gradients:
            gradients.extend(torch.randn_like(tensor) for tensor in outputs)
        torch.autograd.backward(outputs, gradients)
        model.zero_grad()

    times = time_interleaved({"step": step, "least": least}, repeats=repeats)
    ratio = statistics.median(a / b for a, b in zip(times["step"], times["least"], strict=True))
    seconds = {f"{key}_ms": 1e3 * statistics.median(values) for key, values in times.items()}
    return {"model": name, "batch_size": batch_size, "threads": torch.get_num_threads(), "ratio": ratio, **seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    print("model      batch  step over least  step, ms  least, ms")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            row = measure(name, options.batch_size, options.repeats, folder)
            results.append(row)
            print(
                f"{name:10} {row['batch_size']:5}  {row['ratio']:15.3f}  {row['step_ms']:8.0f}  {row['least_ms']:9.0f}"
            )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
