"""The scheduler between segments against batches that run to their end: requests at random times, in one process.

    python recipes/benchmarks/scheduling.py --output scheduling.json
    python recipes/benchmarks/scheduling.py --model grown/ --data cifar10/ --requests 10000

Requests of one image each; half of the images exit first, the others at the end. One thread computes.

1. Capacity of both: a queue that never empties.
2. Poisson arrivals at `--load` of that of `batch`: latencies, samples of runs after the first exit, and every answer
   against the same image alone. Median latency of samples that exit first, over what that exit takes alone and half of
   `max_run_ms`.
3. The largest of some arrival rates up to which the p99 of `segments` is not above that of `batch` in 2.

All take turns, `--rounds` times: each round goes by its own capacity of `batch`.

Without `--model`: a ViT of width 64 and random weights, on random images.
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from operator import truediv
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
# of `segments`, over that of `batch`
RATES = (0.6, 0.8, 1.0, 1.1, 1.2)


class Runs:
    """Samples of each batch and each run; is told as `Metrics` is."""

    def __init__(self):
        self.kept_batches, self.kept_runs = [], []
        self.clear()

    def clear(self):
        self._batches, self._runs = [], []

    def keep(self):
        """What was told since it was cleared."""
        self.kept_batches += self._batches
        self.kept_runs += self._runs

    def batch(self, ages, fill):
        self._batches.append(len(ages))

    def ran(self, segment, ages, fill, exits):
        if ages:
            self._runs.append((segment, len(ages)))

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
    """Samples a second while 128 wait."""
    places, ended, futures = threading.Semaphore(128), [], []

    def answered(_):
        ended.append(time.perf_counter())
        places.release()

    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        places.acquire()
        futures.append(scheduler.submit({"pixel_values": pixels[[len(futures) % len(pixels)]]}))
        futures[-1].add_done_callback(answered)
    until = time.perf_counter()
    for future in futures:
        future.result()
    return sum(each <= until for each in ended) / (until - began)


def arrive(scheduler, pixels, rate, requests, seed=0):
    """Answers to requests at random times, and the seconds until each; whose image each is."""
    draw, taken, futures, seconds = random.Random(seed), [], [], [0.0] * requests
    due = time.perf_counter()
    for number in range(requests):
        due += draw.expovariate(rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        taken.append(draw.randrange(len(pixels)))
        future = scheduler.submit({"pixel_values": pixels[taken[-1:]]})
        future.add_done_callback(partial(_ended, seconds, number, due))
        futures.append(future)
    answers = [future.result() for future in futures]
    while not all(seconds):  # who waits for a future is told before those it calls
        time.sleep(0.001)
    return answers, np.array(seconds), np.array(taken)


def _ended(seconds, number, due, _):
    seconds[number] = time.perf_counter() - due


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


def measured(checkpoint, pixels, options):
    policy, pixels = half_exit_first(checkpoint, pixels)
    wanted, exit_ms = alone(checkpoint, policy, pixels)
    runs = {name: Runs() for name in SCHEDULERS}
    capacities, loads = {name: [] for name in SCHEDULERS}, {load: [] for load in ("batch", *RATES)}
    requests = options.requests // options.rounds
    with ExitStack() as stack:
        schedulers = {name: stack.enter_context(scheduler_of(checkpoint, policy, name, runs[name])) for name in runs}
        max_run_ms = schedulers["segments"].max_run_ms
        for seed in range(options.rounds):
            turn = 1 if seed % 2 else -1
            for name, scheduler in list(schedulers.items())[::turn]:
                capacities[name].append(capacity(scheduler, pixels, options.seconds))
            rate = options.load * capacities["batch"][-1]
            for load in list(loads)[::turn]:
                for each in runs.values():
                    each.clear()
                scheduler, share = (schedulers["batch"], 1.0) if load == "batch" else (schedulers["segments"], load)
                loads[load].append(arrive(scheduler, pixels, share * rate, requests, seed))
                if load in ("batch", 1.0):
                    runs["batch" if load == "batch" else "segments"].keep()
    found = {load: summary(arrived, wanted) for load, arrived in loads.items()}
    first, bound = wanted["exit_index"] == 0, found["batch"]["p99_ms"]
    staying, sizes = 1 - float(first.mean()), runs["batch"].kept_batches
    deeper = {
        # a batch that none goes on from has no run
        "batch": staying * sum(sizes) / sum(1 - (1 - staying) ** size for size in sizes),
        "segments": statistics.mean(samples for segment, samples in runs["segments"].kept_runs if segment > 0),
    }
    return {
        "first exit alone, ms": exit_ms,
        "share that exits first": float(first.mean()),
        "capacity": {name: statistics.median(each) for name, each in capacities.items()},
        "capacity over batch's": statistics.median(map(truediv, capacities["segments"], capacities["batch"])),
        "batch": found["batch"],
        "segments at times that rate": {load: found[load] for load in RATES},
        "first exit over bound": found[1.0]["p50_ms of those that exit first"] / (exit_ms + max_run_ms / 2),
        "largest rate over batch's": max(takewhile(lambda load: found[load]["p99_ms"] <= bound, RATES), default=None),
        "samples of a run after the first exit": deeper,
    }


def summary(arrived, wanted):
    """Of several rounds of arrivals."""
    answers = [answer for round_answers, _, _ in arrived for answer in round_answers]
    seconds, taken = (np.concatenate([each[part] for each in arrived]) for part in (1, 2))
    first = wanted["exit_index"][taken] == 0
    differ, difference = others(answers, taken, wanted)
    p50, p99 = np.percentile(seconds, [50, 99])
    return {
        "p50_ms": 1e3 * p50,
        "p99_ms": 1e3 * p99,
        "p50_ms of those that exit first": 1e3 * float(np.median(seconds[first])),
        "p50_ms of the others": 1e3 * float(np.median(seconds[~first])),
        "answers that differ": differ,
        "largest difference of scores": difference,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A highway.")
    parser.add_argument("--data", help="Its images.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--load", type=float, default=0.8, help="A share of the capacity of `batch`.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each measurement of a capacity.")
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
