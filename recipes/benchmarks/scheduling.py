"""The scheduler between segments against batches that run to their end: requests at random times, in one process.

    python recipes/benchmarks/scheduling.py --output scheduling.json
    python recipes/benchmarks/scheduling.py --model grown/ --data cifar10/ --requests 10000

Requests of one image each; half of the images exit first, the others at the end. One thread computes.

1. Capacity of `batch`: a queue that never empties.
2. Poisson arrivals at `--load` of that, the same for both: latencies, samples of runs after the first exit, and every
   answer against the same image alone. Median latency of samples that exit first, over what that exit takes alone and
   half of `max_run_ms`.
3. The largest arrival rate at which the p99 of `segments` is not above that of `batch` in 2., by halving.

Without `--model`: a ViT of width 64 and random weights, on random images.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from lgvit_hf import ViTHighway, ViTHighwayConfig
from lgvit_hf.cli.inputs import open_highway
from lgvit_hf.data.processing import stack
from lgvit_hf.evaluation.environment import processor_name
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import load_highway
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.open_part import open_any
from lgvit_hf.serving.scheduling import SCHEDULERS, Scheduling

POOL, MARGIN = 256, 1e-5
# above every confidence: no sample exits
NEVER = 2.0


class Runs:
    """Samples of the runs of each segment; is told as `Metrics` is."""

    def __init__(self):
        self.batches, self.segments = [], {}

    def batch(self, ages, fill):
        self.batches.append(len(ages))

    def ran(self, segment, ages, fill, exits):
        if ages:
            self.segments.setdefault(segment, []).append(len(ages))

    def dropped(self, reason, samples):
        raise RuntimeError(f"{samples} samples {reason}")


def small_model(folder):
    """Saves it; gives images from coarse to fine, on which its first exit is sure to different degrees."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_labels": 10}
    model = ViTHighway(ViTHighwayConfig(exit_positions=[3, 6, 9], exit_types=["linear"] * 3, **settings)).eval()
    with torch.no_grad():
        for parameter in model.exits[0].parameters():
            parameter.mul_(20)
    model.save_pretrained(folder)
    sizes = torch.randint(1, 16, (POOL,)).tolist()
    images = [interpolate(torch.rand(1, 3, size, size), 224, mode="bilinear") for size in sizes]
    return 2 * torch.cat(images) - 1


def images_of(checkpoint, data):
    _, _, dataset, _ = open_highway(checkpoint, data, "test")
    return stack([dataset[number] for number in range(POOL)])["pixel_values"]


@torch.inference_mode()
def half_exit_first(checkpoint, pixels):
    """A policy by which half of the images exit first and half at the end; and those not close to its threshold."""
    model = load_highway(checkpoint).eval()
    logits = torch.cat([model(each, early_exit=False).exit_logits[0] for each in pixels.split(32)])
    scores = logits.softmax(-1).amax(-1)
    median = scores.median().item()
    exits = len(model.exits)
    policy = {"name": "confidence", "threshold": [median] + [NEVER] * (exits - 1)}
    return policy, pixels[(scores - median).abs() > MARGIN].numpy()


@contextmanager
def scheduler_of(checkpoint, policy, name, runs):
    torch.set_num_threads(1)
    scheduler = Scheduling(name).start(RemoteHighway(open_any(checkpoint, policy=policy, threads=1)), runs)
    try:
        yield scheduler
    finally:
        scheduler.close()


def capacity(scheduler, pixels, seconds):
    """Samples a second while many wait."""
    done, futures, began = 0, [], time.perf_counter()
    while time.perf_counter() < began + seconds:
        while len(futures) < 128:
            futures.append(scheduler.submit({"pixel_values": pixels[[(done + len(futures)) % len(pixels)]]}))
        futures.pop(0).result()
        done += 1
    for future in futures:
        future.result()
    return (done + len(futures)) / (time.perf_counter() - began)


def arrive(scheduler, pixels, rate, requests, seed=0):
    """Answers to requests at random times, and the seconds until each; whose image each is."""
    draw, taken, futures, seconds = random.Random(seed), [], [], [0.0] * requests
    due = time.perf_counter()
    for number in range(requests):
        due += draw.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        taken.append(draw.randrange(len(pixels)))
        asked = time.perf_counter()
        future = scheduler.submit({"pixel_values": pixels[taken[-1:]]})
        future.add_done_callback(partial(_ended, seconds, number, asked))
        futures.append(future)
    return [future.result() for future in futures], np.array(seconds), np.array(taken)


def _ended(seconds, number, asked, _):
    seconds[number] = time.perf_counter() - asked


def alone(checkpoint, policy, pixels):
    """The answer to each image by itself, and the median milliseconds of one that exits first."""
    part = open_any(checkpoint, policy=policy, max_batch_size=1, threads=1)
    highway, found, first = RemoteHighway(part), [], []
    for number in range(len(pixels)):
        began = time.perf_counter()
        found.append(highway({"pixel_values": pixels[[number]]}))
        if found[-1]["exit_index"][0] == 0:
            first.append(1e3 * (time.perf_counter() - began))
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}, statistics.median(first)


def others(answers, taken, wanted):
    """Answers that are not those of the image alone, and the largest difference of scores."""
    found = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    differ = (found["exit_index"] != wanted["exit_index"][taken]) | (
        found["logits"].argmax(-1) != wanted["logits"][taken].argmax(-1)
    )
    softmaxes = [torch.from_numpy(logits).softmax(-1) for logits in (found["logits"], wanted["logits"][taken])]
    return int(differ.sum()), float((softmaxes[0] - softmaxes[1]).abs().max())


def largest_rate(scheduler, pixels, p99, low, high, requests, steps=5):
    """Samples a second at which the p99 is at most so many seconds, between two rates."""
    for step in range(steps):
        rate = (low + high) / 2
        _, seconds, _ = arrive(scheduler, pixels, rate, requests, seed=step + 1)
        if np.percentile(seconds, 99) <= p99:
            low = rate
        else:
            high = rate
    return low


def measured(checkpoint, pixels, options):
    policy, pixels = half_exit_first(checkpoint, pixels)
    wanted, exit_ms = alone(checkpoint, policy, pixels)
    first = wanted["exit_index"] == 0
    report = {"first exit alone, ms": exit_ms, "share that exits first": float(first.mean())}
    with scheduler_of(checkpoint, policy, "batch", Runs()) as scheduler:
        capacity(scheduler, pixels, 2)
        report["capacity"] = capacity(scheduler, pixels, options.seconds)
    rate = options.load * report["capacity"]
    for name in SCHEDULERS[::-1]:  # batch first: the other is judged by it
        with scheduler_of(checkpoint, policy, name, runs := Runs()) as scheduler:
            capacity(scheduler, pixels, 2)
            runs.batches.clear()
            runs.segments.clear()
            answers, seconds, taken = arrive(scheduler, pixels, rate, options.requests)
            differ, difference = others(answers, taken, wanted)
            deeper = [samples for segment, each in runs.segments.items() if segment > 0 for samples in each]
            if name == "batch":
                deeper = [statistics.mean(runs.batches) * (1 - float(first[taken].mean()))]
            p50, p99 = np.percentile(seconds, [50, 99])
            report[name] = {
                "p50_ms": 1e3 * p50,
                "p99_ms": 1e3 * p99,
                "p50_ms of those that exit first": 1e3 * float(np.median(seconds[first[taken]])),
                "p50_ms of the others": 1e3 * float(np.median(seconds[~first[taken]])),
                "samples of a run after the first exit": statistics.mean(deeper),
                "answers that differ": differ,
                "largest difference of scores": difference,
            }
            if name == "segments":
                half = scheduler.max_run_ms / 2
                report["first exit over bound"] = report[name]["p50_ms of those that exit first"] / (exit_ms + half)
                bound = report["batch"]["p99_ms"] / 1e3
                span = (0.5 * rate, 2.5 * rate)
                found = largest_rate(scheduler, pixels, bound, *span, max(200, options.requests // 5))
                report["largest rate over batch's"] = found / rate
                report["capacity of segments"] = capacity(scheduler, pixels, options.seconds)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A highway.")
    parser.add_argument("--data", help="Its images.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--load", type=float, default=0.8, help="A share of the capacity of `batch`.")
    parser.add_argument("--seconds", type=float, default=20.0, help="Of each measurement of a capacity.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.model or folder
        pixels = images_of(checkpoint, options.data) if options.model else small_model(folder)
        report = {"processor": processor_name(), **measured(checkpoint, pixels, options)}
    print(json.dumps(report, indent=2))
    if options.output:
        write_json(options.output, report)


if __name__ == "__main__":
    main()
