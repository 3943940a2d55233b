"""Device, edge and cloud as three processes on loopback: the same answers, what is sent, and what a lost cloud does.

    python recipes/benchmarks/split_serving.py runs/stage2 --at 4 8 --data photos/ --threshold 0.7

A checkpoint is split at two exits and its parts are served, each by `lgvit serve`. Images of the test split are sent
to the device as PNG files:

1. every answer against that of the unsplit model, with states sent as float32 and as float16, and the bytes that a
   sample that goes on costs against those of its image;
2. the cloud is killed (kill -9) after a third of the requests and started again after two thirds: every request is
   answered, degraded answers are those of the edge's last exit, and the others are the model's;
3. malformed requests to all three: each gets a status of 400 to 499 with a reason, and the services go on.
"""

import argparse
import http.client
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor

from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import load_highway
from lgvit_hf.serving.device.info import PartInfo
from lgvit_hf.serving.device.message import CONTENT_TYPE, pack, unpack
from lgvit_hf.serving.split import split

NAMES = ("device", "edge", "cloud")
CLIENTS = 8


class Service:
    """One process of `lgvit serve`."""

    def __init__(self, folder, *options, port=0):
        command = [sys.executable, "-m", "lgvit_hf.cli", "serve", str(folder), "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        line = self.process.stdout.readline()
        self.port = int(line.rpartition(":")[2])
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.port}"

    def metric(self, name):
        _, text = request(self.port, "GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(name))

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def request(port, method, path, body=None, headers=None, timeout=60):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask(port, info, png):
    """One image's answers, as arrays."""
    status, reply = request(port, "POST", "/predict", png, {"accept": CONTENT_TYPE, "content-type": "image/png"})
    if status != 200:
        raise RuntimeError(f"status {status}: {reply[:200]}")
    return {name: array[0] for name, array in unpack(reply, info.answers).items()}


def ask_all(port, info, files):
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda png: ask(port, info, png), files))


def as_file(image, kind):
    stream = io.BytesIO()
    image.convert("RGB").save(stream, kind)
    return stream.getvalue()


def compared(found, expected):
    same = [answer["exit_index"] == index for answer, index in zip(found, expected.exit_index.tolist(), strict=True)]
    pairs = zip(found, expected.logits.numpy(), same, strict=True)
    return {
        "images": len(found),
        "left_elsewhere": same.count(False),
        "other_label": sum(
            int(answer["logits"].argmax() != logits.argmax())
            for answer, logits in zip(found, expected.logits.numpy(), strict=True)
        ),
        "largest_difference": max(
            float(np.abs(answer["logits"] - logits).max()) for answer, logits, ok in pairs if ok
        ),
        "degraded": sum(int(answer["degraded"]) for answer in found),
    }


def start(folder, dtype):
    cloud = Service(folder / "part2")
    edge = Service(folder / "part1", "--next", cloud.url, "--state-dtype", dtype)
    device = Service(folder / "part0", "--next", edge.url, "--state-dtype", dtype)
    return device, edge, cloud


def answers_equal(folder, info, files, expected):
    report = {}
    for dtype in ("float32", "float16"):
        services = start(folder, dtype)
        began = time.perf_counter()
        report[dtype] = compared(ask_all(services[0].port, info, files), expected)
        report[dtype]["seconds"] = time.perf_counter() - began
        for name, service in zip(NAMES, services[:2], strict=False):
            rows, sent = (service.metric(f"lgvit_sent_{what}_total") for what in ("rows", "bytes"))
            report[dtype][name] = {"sent": int(rows), "bytes_per_sample": sent / rows}
        report[dtype]["exit_codes"] = [service.stop() for service in services]
    return report


def cloud_killed(folder, info, files, expected, edge_logits, edge_index):
    device, edge, cloud = start(folder, "float32")
    third, done, lock, events = len(files) // 3, [0], threading.Lock(), {}
    cloud_port, restarted = cloud.port, []

    def one(number):
        with lock:
            done[0] += 1
            if done[0] == third:
                events["killed"] = time.perf_counter()
                cloud.process.send_signal(signal.SIGKILL)
            if done[0] == 2 * third:
                restarted.append(threading.Thread(target=back))
                restarted[0].start()
        # slow enough for the cloud to come back before the images run out
        time.sleep(0.02)
        began = time.perf_counter()
        answer = ask(device.port, info, files[number % len(files)])
        ended = time.perf_counter()
        return number % len(files), answer, ended, ended - began

    def back():
        again = Service(folder / "part2", port=cloud_port)
        events["back"] = time.perf_counter()
        services.append(again)

    services = [device, edge]
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(one, range(len(files))))
        restarted[0].join()
        # until the last part is asked again
        found += list(pool.map(one, range(len(files), 2 * len(files))))
    wrong, degraded = 0, 0
    for number, answer, _, _ in found:
        logits = expected.logits[number].numpy()
        if answer["degraded"]:
            degraded += 1
            logits = edge_logits[number].numpy()
            wrong += int(answer["exit_index"] != edge_index)
        wrong += int(np.abs(answer["logits"] - logits).max() > 1e-4)
    late = [ended for _, answer, ended, _ in found if answer["degraded"] and ended > events["back"]]
    seconds = [each for _, answer, _, each in found if answer["degraded"]]
    whole = [each for _, answer, _, each in found if not answer["degraded"]]
    for service in services:
        service.stop()
    return {
        "requests": len(found),
        "answered": len(found),
        "degraded": degraded,
        "wrong": wrong,
        "seconds_without_cloud": events["back"] - events["killed"],
        "seconds_to_recover": max((each - events["back"] for each in late), default=0.0),
        "median_ms_degraded": 1e3 * statistics.median(seconds) if seconds else None,
        "median_ms_others": 1e3 * statistics.median(whole),
        "slowest_ms_degraded": 1e3 * max(seconds, default=0.0),
    }


def malformed(info, png, rng):
    """One bad request: its kind, path, body and headers."""
    first = info.index == 0
    path = "/predict" if first else "/continue"
    good = {name: np.zeros((2, *array["shape"]), array["dtype"]) for name, array in info.takes.items()}
    name = next(iter(good))
    tensors = {"content-type": CONTENT_TYPE}

    def message(arrays=None, **words):
        return pack(good if arrays is None else arrays, {**info.words, **words})

    def with_header(change):
        body = message()
        size = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body[8 + size :]

    filled = np.zeros_like(good[name])
    filled.flat[rng.randrange(filled.size)] = rng.choice([np.nan, np.inf, -np.inf])
    wide = np.zeros((2, *(size + 1 for size in info.takes[name]["shape"])), np.float32)
    cases = {
        "empty": (path, b"", tensors),
        "text": (path, b"hello, is anybody there?", {"content-type": "text/plain"} if first else tensors),
        "noise": (path, rng.randbytes(rng.randrange(1, 2000)), tensors),
        "wrong shape": (path, message({**good, name: wide}), tensors),
        "nan": (path, message({**good, name: filled}), tensors),
        "no rows": (path, message({each: array[:0] for each, array in good.items()}), tensors),
        "other tensors": (path, message({"evil": good[name]}), tensors),
        "cut off": (path, message()[: rng.randrange(1, 200)], tensors),
        "huge header": (path, (1 << 60).to_bytes(8, "little") + b"{}", tensors),
        "huge shape": (path, with_header(lambda h: h[name].update(shape=[1 << 40, *h[name]["shape"][1:]])), tensors),
        "offsets": (path, with_header(lambda h: h[name].update(data_offsets=[0, 1 << 40])), tensors),
        "negative": (path, with_header(lambda h: h[name].update(shape=[-1, *h[name]["shape"][1:]])), tensors),
        "dtype": (path, with_header(lambda h: h[name].update(dtype="BF16")), tensors),
        "header types": (path, with_header(lambda h: h.update({name: rng.choice([None, 3, [], "x"])})), tensors),
        "nesting": (path, (100_00).to_bytes(8, "little") + b"[" * 100_00, tensors),
        "other path": (rng.choice(["/", "/predict/x", "/../etc/passwd", "/docs"]), b"x", tensors),
        "timeout": (path, message(), {**tensors, "x-lgvit-timeout": rng.choice(["x", "-1", "nan", "1e9"])}),
    }
    if first:
        damaged = bytearray(png)
        damaged[40:] = rng.randbytes(len(damaged) - 40)
        cases["damaged image"] = (path, bytes(damaged), {"content-type": "image/png"})
        cases["cut image"] = (path, png[: rng.randrange(1, len(png) // 2)], {"content-type": "image/png"})
        cases["not json"] = (path, b'{"image": ', {"content-type": "application/json"})
        cases["json"] = (
            path,
            json.dumps(
                rng.choice([{}, [], 3, {"image": 3}, {"images": []}, {"image": "%%%"}, {"image": "aGk="}])
            ).encode(),
            {"content-type": "application/json"},
        )
    else:
        cases["other version"] = (path, message(schema="2"), tensors)
        cases["other model"] = (path, message(model="0" * 64), tensors)
        cases["other part"] = (path, message(part=str(info.index + 1)), tensors)
        cases["image"] = (path, png, {"content-type": "image/png"})
    kind = rng.choice(list(cases))
    return kind, *cases[kind]


def bad_requests(folder, files, expected, number):
    services = start(folder, "float32")
    infos = [PartInfo.load(folder / f"part{index}") for index in range(3)]
    statuses, kinds, without_reason, others = Counter(), Counter(), 0, []

    def one(index):
        rng = random.Random(index)
        which = rng.randrange(3)
        if index % (number // 30 or 1) == 0:
            kind, path, body, headers = "50 MB", ("/predict", "/continue")[which > 0], bytes(50_000_000), {}
        else:
            kind, path, body, headers = malformed(infos[which], files[0], rng)
        status, reply = request(services[which].port, "POST", path, body, headers)
        try:
            reason = json.loads(reply)["error"]
        except (ValueError, KeyError):
            reason = None
        return kind, status, reason

    with ThreadPoolExecutor(CLIENTS) as pool:
        for kind, status, reason in pool.map(one, range(number)):
            statuses[status] += 1
            kinds[kind] += 1
            without_reason += int(not reason)
            if not 400 <= status < 500:
                others.append([kind, status, reason])
    after = compared(ask_all(services[0].port, infos[0], files[:50]), first_rows(expected, 50))
    alive = [service.process.poll() is None for service in services]
    for service in services:
        service.stop()
    return {
        "requests": number,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "kinds": dict(kinds),
        "without_reason": without_reason,
        "not_4xx": others[:20],
        "alive": alive,
        "answers_after": after,
    }


def first_rows(expected, rows):
    return argparse.Namespace(exit_index=expected.exit_index[:rows], logits=expected.logits[:rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--at", type=int, nargs=2, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threshold", type=float, help="of the confidence policy, instead of the saved policy")
    parser.add_argument("--format", choices=("safetensors", "onnx"), default="onnx")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--output", help="JSON file for the report")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

    model = load_highway(options.checkpoint)
    if options.threshold is not None:
        model.set_exit_policy("confidence", threshold=options.threshold)
    processor = AutoImageProcessor.from_pretrained(options.checkpoint)
    images = load_images(options.data).test
    images = images.select(sorted(np.random.default_rng(0).permutation(len(images))[: options.images]))
    files = [as_file(row["image"], "PNG") for row in images]
    prepared = ProcessedImages(images, processor)
    pixels = torch.stack([prepared[row]["pixel_values"] for row in range(len(images))])
    with torch.inference_mode():
        expected = model(pixels)
        every = model(pixels, early_exit=False)
    edge_index = model.config.exit_positions.index(options.at[1])

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "parts"
        infos = split(model, options.at, folder, options.format, processor=processor)
        report = {
            "checkpoint": options.checkpoint,
            "format": options.format,
            "at": options.at,
            "policy": model.exit_policy.to_dict(),
            "split": infos[0].checks,
            "bytes_of_an_image": {
                "jpeg": statistics.mean(len(as_file(row["image"], "JPEG")) for row in images),
                "png": statistics.mean(map(len, files)),
                "uint8": pixels[0].numel(),
                "float16": 2 * pixels[0].numel(),
                "float32": 4 * pixels[0].numel(),
            },
            "answers": answers_equal(folder, infos[0], files, expected),
        }
        print(json.dumps(report, indent=1), flush=True)
        report["cloud_killed"] = cloud_killed(
            folder, infos[0], files, expected, every.exit_logits[edge_index], edge_index
        )
        print(json.dumps(report["cloud_killed"], indent=1), flush=True)
        report["malformed"] = bad_requests(folder, files, expected, options.malformed)
        print(json.dumps(report["malformed"], indent=1))
    if options.output:
        write_json(options.output, report)


if __name__ == "__main__":
    main()
