"""A certified ladder in a real service: the load doubled for a minute.

    lgvit calibrate MODEL --data DATA --policy confidence --max-accuracy-drop 0.02 --delta 0.05 --output CALIBRATED
    python recipes/benchmarks/served_ladder.py CALIBRATED --data OTHERS --split test --max-queue-ms 400

`lgvit serve CALIBRATED --ladder CALIBRATED/calibration.json` runs on the first core of this machine, this client on
the last (`taskset`). A request holds so many images, ready for the model; they come at random times (Poisson).

1. What the safest rung can do: a closed loop on a service whose ladder is that rung alone; and how long a full batch
   takes that goes through the whole model.
2. Load: `--usual` of that for a while, twice as much for `--seconds`, and the usual again.
3. The doubled load once more, on the safest rung alone.

Checked: the p99 of all answers is below `--max-queue-ms` and one full batch; each answer is that of a certified rung,
and exits where that rung says (replayed on the table of all exits); the accuracy on the labels of what was answered is
within the promise. It ends with 1 where one fails.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import numpy as np
import torch
from serving import CLIENT_CORE, SERVER_CORE, Service

from lgvit_hf import Predictor
from lgvit_hf.cli.inputs import open_highway, table_of
from lgvit_hf.evaluation.predictions import replayed_exits
from lgvit_hf.files import write_json
from lgvit_hf.serving.device.message import CONTENT_TYPE, pack

# requests at once in the closed loop, and seconds of it, those before that it warms up
CLIENTS, MEASURED, WARM = 16, 6.0, 2.0
BATCH = 32


class Replay:
    """Images of known labels as requests, and what each rung answers them with."""

    def __init__(self, options, rungs):
        opened = open_highway(str(options.model), options.data, options.split, None, None)
        some = torch.randperm(len(opened.dataset), generator=torch.Generator().manual_seed(0))[: options.images]
        table = table_of(opened.model, opened.dataset, options.table).select(some)
        samples = [opened.dataset[number] for number in some.tolist()]
        self.labels, self.full = table.labels.numpy(), table.logits[-1].argmax(-1).numpy()
        self.names = [opened.model.config.id2label[index] for index in range(opened.model.config.num_labels)]
        self.exits = [replayed_exits(table, rung["policy"])[0].numpy() for rung in rungs]
        self.answers = [table.logits[exits, np.arange(len(samples))].argmax(-1).numpy() for exits in self.exits]
        pixels, size = np.stack([np.asarray(each["pixel_values"]) for each in samples]), options.per_request
        self.spans = [slice(start, start + size) for start in range(0, len(samples) - size + 1, size)]
        self.bodies = [pack({"pixel_values": pixels[span]}) for span in self.spans]
        self.full_batch_ms = self._timed(options.model, pixels[:BATCH])

    @staticmethod
    def _timed(model, pixels):
        """Milliseconds of a batch through the whole model, on the core of the service: the median of five."""
        home, seconds = os.sched_getaffinity(0), []
        os.sched_setaffinity(0, {SERVER_CORE})
        predictor = Predictor(model, "never", max_batch_size=len(pixels), threads=1)
        for _ in range(6):
            began = time.perf_counter()
            predictor({"pixel_values": pixels})
            seconds.append(time.perf_counter() - began)
        os.sched_setaffinity(0, home)
        return 1e3 * float(np.median(seconds[1:]))


class Sent:
    """What came of the requests of one phase."""

    def __init__(self):
        self.milliseconds, self.refused_after, self.answers, self.statuses = [], [], [], Counter()

    async def ask(self, session, url, replay, number):
        began, number = time.perf_counter(), number % len(replay.bodies)
        async with session.post(f"{url}/predict", data=replay.bodies[number]) as reply:
            said = await reply.json()
        took = 1e3 * (time.perf_counter() - began)
        self.statuses[reply.status] += 1
        if reply.status == 200:
            self.milliseconds.append(took)
            self.answers.append((number, said["answers"]))
        else:
            self.refused_after.append(took)

    def report(self, replay):
        rungs, wrong, right, full, label_wrong = Counter(), 0, 0, 0, 0
        for number, answers in self.answers:
            span = replay.spans[number]
            for sample, answer in zip(range(span.start, span.stop), answers, strict=True):
                rung = answer["rung"]
                rungs[rung] += 1
                wrong += int(answer["exit_index"] != replay.exits[rung][sample])
                label_wrong += answer["label"] != replay.names[replay.answers[rung][sample]]
                right += answer["label"] == replay.names[replay.labels[sample]]
                full += int(replay.full[sample] == replay.labels[sample])
        total = max(1, sum(rungs.values()))
        p50, p99 = np.percentile(self.milliseconds, [50, 99]) if self.milliseconds else (None, None)
        refused = sum(count for status, count in self.statuses.items() if status == 503)
        return {
            "requests": sum(self.statuses.values()), "statuses": dict(self.statuses),
            "share refused": refused / max(1, sum(self.statuses.values())),
            "refused after ms, p99": float(np.percentile(self.refused_after, 99)) if self.refused_after else None,
            "p50_ms": p50, "p99_ms": p99, "rungs": dict(sorted(rungs.items())),
            "other exits than the rung's": wrong, "other labels than the rung's": label_wrong,
            "accuracy": right / total, "accuracy of the full model": full / total,
        }  # fmt: skip


async def closed_loop(url, replay, seconds):
    """Requests a second of so many clients that each ask again when they are answered."""
    sent = Sent()
    async with session_of() as session:
        end = time.perf_counter() + seconds

        async def loop(client):
            number = 7 * client
            while time.perf_counter() < end:
                await sent.ask(session, url, replay, number)
                number += 1

        await asyncio.gather(*map(loop, range(CLIENTS)))
    return sent.statuses[200] / seconds


async def arrivals(url, replay, phases, seed=0):
    """What comes of phases of so many seconds and requests a second, one right after the other."""
    draw, tasks, found = random.Random(seed), [], []
    async with session_of() as session:
        due = time.perf_counter()
        for seconds, rate in phases:
            found.append(Sent())
            end = due + seconds
            while (due := due + draw.expovariate(rate)) < end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(found[-1].ask(session, url, replay, len(tasks))))
            due = end
        await asyncio.gather(*tasks)
    return found


def session_of():
    headers, timeout = {"content-type": CONTENT_TYPE}, aiohttp.ClientTimeout(total=120)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=headers)


def measured(options, report, replay):
    words = ["--max-queue-ms", str(options.max_queue_ms), "--max-batch-size", str(BATCH), "--decoders", "1"]
    words += [] if options.scheduler is None else ["--scheduler", options.scheduler]
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "safest.json")
        write_json(alone, {**report, "ladder": report["ladder"][:1]})
        with Service(options.model, "--ladder", str(alone), *words) as service:
            asyncio.run(closed_loop(service.url, replay, WARM))
            most = asyncio.run(closed_loop(service.url, replay, MEASURED))
        usual = options.usual * most
        print(f"the safest rung alone: {most:.1f} requests/s; usual load {usual:.1f}", flush=True)
        with Service(options.model, "--ladder", str(options.ladder), *words) as service:
            phases = [(options.seconds / 12, usual), (options.seconds, 2 * usual), (options.seconds / 12, usual)]
            before, doubled, after = asyncio.run(arrivals(service.url, replay, phases))
        with Service(options.model, "--ladder", str(alone), *words) as service:
            (safest,) = asyncio.run(arrivals(service.url, replay, [(options.seconds / 6, 2 * usual)]))
    found = {"usual": before, "doubled": doubled, "usual again": after, "doubled, safest rung alone": safest}
    return {
        "safest alone, requests a second": most,
        "full batch ms": replay.full_batch_ms,
        **{name: sent.report(replay) for name, sent in found.items()},
    }


def checked(found, report, options):
    """What does not hold of the doubled load."""
    doubled = found["doubled"]
    asked = report["max_accuracy_drop"]
    answered = sum(doubled["rungs"].values())
    drop = doubled["accuracy of the full model"] - doubled["accuracy"]
    holds = {
        "p99 below --max-queue-ms and a full batch": doubled["p99_ms"] < options.max_queue_ms + found["full batch ms"],
        "certified rungs alone": set(doubled["rungs"]) <= set(range(len(report["ladder"]))),
        # another batch adds up in another order: a score that is a threshold but for rounding may fall on either side
        "answers as their rung": doubled["other exits than the rung's"] <= 1e-3 * answered,
        f"accuracy at most {asked:g} below the full model's": drop <= asked,
        "nothing but 200 and 503": set(doubled["statuses"]) <= {200, 503},
    }
    for name, is_so in holds.items():
        print(f"{'holds' if is_so else 'FAILS'}: {name}")
    return [name for name, is_so in holds.items() if not is_so]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="calibrated with --delta")
    parser.add_argument("--data", required=True, help="images with labels that it was not calibrated on")
    parser.add_argument("--split", default="test", help="of them (test)")
    parser.add_argument("--ladder", type=Path, help="instead of calibration.json in the folder of the model")
    parser.add_argument("--table", help="file of their table of exits: read if it is there, otherwise written")
    parser.add_argument("--images", type=int, default=2000, help="that are sent again and again (2000)")
    parser.add_argument("--per-request", type=int, default=8, help="images of a request (8)")
    parser.add_argument("--max-queue-ms", type=float, default=400.0)
    parser.add_argument("--usual", type=float, default=0.7, help="load, of what the safest rung can do (0.7)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the doubled load (60)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--scheduler", choices=("segments", "batch"), help="of `lgvit serve`")
    options = parser.parse_args()
    options.ladder = options.ladder or options.model / "calibration.json"
    report = json.loads(options.ladder.read_text())
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {CLIENT_CORE, SERVER_CORE})
    replay = Replay(options, report["ladder"])
    os.sched_setaffinity(0, {CLIENT_CORE})
    found = measured(options, report, replay)
    print(json.dumps(found, indent=2))
    failed = checked(found, report, options)
    if options.output:
        write_json(options.output, {"max_queue_ms": options.max_queue_ms, **found, "failed": failed})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
