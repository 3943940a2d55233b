"""A service under bounded load on loopback: throughput and latency against the model called directly, and a soak.

    python recipes/benchmarks/serving.py MODEL --data DATA [--seconds 20] [--output serving.json]
    python recipes/benchmarks/serving.py MODEL --data DATA --soak --requests 10000

`lgvit serve` runs on the first core of this machine with its decoding processes, this client on the last (`taskset`).

1. Closed loop: 1, 8 and 32 clients, one image per request, each asks again when it is answered; in turn with
   `Predictor.images` on the same files, decoding included, one thread, batch 1 and 8, on the same core. Shares are
   medians over `--rounds`, each of a round's own figures.
2. Poisson arrivals at 0.5 and 0.8 of what 32 clients reach, and bursts of 32 every second.
3. Both with `--max-batch-size 1`: one request at a time.
4. LitServe with the same model without early exit, where it is installed.

Images are mixed as they come; `--policy never` (all hard) and a low threshold (all easy) give the extremes.

`--soak` sends good, hostile, slow and cancelled requests at a rate below what it can answer, and
checks: no 5xx but 503 with Retry-After, none of them for a good client; memory at most 50 MB above its value
after a tenth of the requests; the p99 of another client's good requests within twice its value without the others;
of 256 requests whose clients leave at once three batches at most are computed. It ends with 1 where one fails.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import aiohttp
import numpy as np

from lgvit_hf.data.datasets import load_encoded
from lgvit_hf.files import write_json

IMAGES, BURST = 256, 32
SERVER_CORE, CLIENT_CORE = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
CLIENTS = (1, 8, 32)
EXTRA_MB, SLOWER = 50, 2.0
QUIET_SECONDS = 15
# requests whose clients leave at once; the samples of a batch
ABANDONED, BATCH = 256, 32
PIXEL_BOMB = b"P6 7000 7000 255\n"
HOSTILE = (
    (b"", {}),
    (b"hello", {}),
    (PIXEL_BOMB, {}),
    (b'{"images":[' + b"{}," * 200_000 + b"{}]}", {"content-type": "application/json"}),
    (b"[" * 100_000, {"content-type": "application/json"}),
    (bytes(100_000), {"content-type": "application/vnd.safetensors"}),
    (bytes(40_000_000), {}),
)


def on_server_core(*words):
    """A command of Python that runs on the server's core."""
    return ["taskset", "-c", str(SERVER_CORE), sys.executable, *words]


class Service:
    """`lgvit serve` on the first core."""

    def __init__(self, model, *options):
        words = ("-m", "lgvit_hf.cli", "serve", str(model), "--port", "0", "--threads", "1", *options)
        self.process = subprocess.Popen(on_server_core(*words), stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]

    def megabytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


async def ask(session, url, body, headers=None):
    """Status, seconds and whether a 503 says when to come again."""
    began = time.perf_counter()
    async with session.post(f"{url}/predict", data=body, headers=headers or {"content-type": "image/jpeg"}) as reply:
        await reply.read()
        return reply.status, time.perf_counter() - began, "retry-after" in reply.headers


class Connections:
    """HTTP/1.1 in a few lines: a client must not be slower than what it measures."""

    def __init__(self, url):
        self._host, self._free, self._all = url.removeprefix("http://"), [], []

    async def ask(self, body):
        """The status of the answer, and the seconds until it was there."""
        began = time.perf_counter()
        reader, writer = self._free.pop() if self._free else await self._opened()
        head = f"POST /predict HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: image/jpeg\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        took = time.perf_counter() - began
        self._free.append((reader, writer))
        return int(head.split(b" ", 2)[1]), took

    async def _opened(self):
        found = await asyncio.open_connection(*self._host.split(":"))
        self._all.append(found[1])
        return found

    def close(self):
        for writer in self._all:
            writer.close()


def summary(seconds, elapsed):
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3 if seconds else (None, None)
    return {"requests": len(seconds), "per_second": len(seconds) / elapsed, "p50_ms": p50, "p99_ms": p99}


async def loaded(url, files, seconds, clients=None, rate=None):
    """A closed loop of clients, Poisson arrivals at a rate, or bursts (`rate=None`, `clients=None`)."""
    done, statuses, draw, connections = [], Counter(), random.Random(0), Connections(url)

    async def once(number):
        status, took = await connections.ask(files[number % len(files)])
        statuses[status] += 1
        if status == 200:
            done.append(took)

    async def loop(client):
        number = client * 7
        while time.perf_counter() < end:
            await once(number)
            number += 1

    await asyncio.gather(*(once(number) for number in range(clients or 8)))  # warm
    done.clear()
    statuses.clear()
    began = time.perf_counter()
    end = began + seconds
    if clients:
        await asyncio.gather(*(loop(client) for client in range(clients)))
    else:
        tasks = []
        while time.perf_counter() < end:
            tasks += [asyncio.create_task(once(len(tasks) + each)) for each in range(1 if rate else BURST)]
            await asyncio.sleep(draw.expovariate(rate) if rate else 1.0)
        await asyncio.gather(*tasks)
    connections.close()
    return {**summary(done, time.perf_counter() - began), "statuses": dict(statuses)}


def directly(model, policy, folder, batch_size, seconds):
    """Images a second of `Predictor.images`, in a process of its own on the same core."""
    code = f"""
import sys, time
from pathlib import Path
from lgvit_hf import Predictor
files = [file.read_bytes() for file in sorted(Path(sys.argv[1]).iterdir())]
predictor = Predictor({str(model)!r}, {policy!r}, max_batch_size={batch_size}, threads=1)
predictor.images(files[:{batch_size}])
done, began = 0, time.perf_counter()
while time.perf_counter() < began + {seconds}:
    start = done % (len(files) - {batch_size} + 1)
    predictor.images(files[start:start + {batch_size}])
    done += {batch_size}
print(done / (time.perf_counter() - began))
"""
    done = subprocess.run(on_server_core("-c", code, folder), check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


class OtherClient:
    """Asks one good request after the other, in a process of its own: what others send must not delay its clock."""

    PAUSE = 0.02

    def __init__(self, url, files):
        self._folder = tempfile.TemporaryDirectory()
        for number, file in enumerate(files):
            Path(self._folder.name, f"{number:04}").write_bytes(file)
        code = f"""
import http.client, sys, threading, time
from pathlib import Path
files = [file.read_bytes() for file in sorted(Path(sys.argv[1]).iterdir())]
connection, over = http.client.HTTPConnection({url.removeprefix("http://")!r}, timeout=120), threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
number = 0
while not over.wait({self.PAUSE}):
    began = time.perf_counter()
    connection.request("POST", "/predict", files[number % len(files)], {{"content-type": "image/jpeg"}})
    reply = connection.getresponse()
    reply.read()
    print(reply.status, time.perf_counter() - began, flush=True)
    number += 1
"""
        words = (sys.executable, "-c", code, self._folder.name)
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self):
        """Its statuses and seconds."""
        said = [line.split() for line in self._process.communicate("over\n")[0].splitlines()]
        self._folder.cleanup()
        return [int(status) for status, _ in said], [float(took) for _, took in said]


def litserve(model, files, seconds):
    """LitServe with the model without early exit."""
    code = f"""
import litserve, socket
from lgvit_hf import Predictor
class Api(litserve.LitAPI):
    def setup(self, device): self.predictor = Predictor({str(model)!r}, "never", threads=1)
    async def decode_request(self, request): return await request.body()
    def predict(self, bodies): return self.predictor.images(bodies)["label"].tolist()
    def encode_response(self, output): return {{"label": output}}
    def batch(self, inputs): return inputs
    def unbatch(self, output): return output
if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=32, batch_timeout=0.002), accelerator="cpu")
    server.run(port=8765, generate_client_file=False)
"""
    process = subprocess.Popen(on_server_core("-c", code))
    try:
        time.sleep(20)
        return {n: asyncio.run(loaded("http://127.0.0.1:8765", files, seconds, clients=n)) for n in CLIENTS}
    finally:
        process.terminate()
        process.wait(60)


def measured(options, files):
    policy = ["--policy", options.policy] if options.policy else []
    policy += ["--scheduler", options.scheduler] if options.scheduler else []
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            Path(folder, f"{number:04}").write_bytes(file)
        direct = partial(directly, options.model, options.policy, folder, seconds=options.seconds)
        for name, more in (("batched", []), ("one at a time", ["--max-batch-size", "1"])):
            with Service(options.model, *policy, *more) as service:
                load = partial(loaded, service.url, files, options.seconds)
                rounds = [in_turn(direct, load) for _ in range(options.rounds)]
                rate = statistics.median(each["served"][CLIENTS[-1]]["per_second"] for each in rounds)
                report[name] = {
                    "share of direct": {n: statistics.median(share(each, n) for each in rounds) for n in CLIENTS},
                    "rounds": rounds,
                    **{f"poisson {part}": asyncio.run(load(rate=part * rate)) for part in (0.5, 0.8)},
                    "bursts": asyncio.run(load()),
                }
    if importlib.util.find_spec("litserve"):
        report["litserve"] = litserve(options.model, files, options.seconds)
    return report


def in_turn(direct, load):
    """Images a second of the model called directly, by batch size, and of a closed loop, by the number of clients."""
    return {
        "direct": {size: direct(batch_size=size) for size in (1, 8)},
        "served": {clients: asyncio.run(load(clients=clients)) for clients in CLIENTS},
    }


def share(turn, clients):
    return turn["served"][clients]["per_second"] / turn["direct"][1 if clients == 1 else 8]


async def abandoned(url, files, computed):
    """Requests that are computed of many whose clients all leave as soon as one is answered."""
    before = await computed()
    connections = Connections(url)
    tasks = [asyncio.create_task(connections.ask(files[number % len(files)])) for number in range(ABANDONED)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    connections.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    # until nothing is computed any more
    last = None
    while last != (now := await computed()):
        last = now
        await asyncio.sleep(2)
    return now - before


async def soak(service, files, requests, seconds, rate):
    """Mixed requests; what went wrong, as counts."""
    draw, statuses, wrong = random.Random(0), Counter(), Counter()
    free, timeout = asyncio.Semaphore(32), aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def one(kind):
            async with free:
                try:
                    if kind == "cancelled":
                        asked = ask(session, service.url, draw.choice(files))
                        status, _, _ = await asyncio.wait_for(asked, draw.uniform(0.0, 0.02))
                        statuses[f"cancelled too late {status}"] += 1
                        return
                    if kind == "slow":

                        async def trickle():
                            for _ in range(5):
                                yield b"x" * 1000
                                await asyncio.sleep(0.2)

                        body, headers = trickle(), {}
                    else:
                        body, headers = draw.choice(HOSTILE) if kind == "hostile" else (draw.choice(files), None)
                    status, _, again = await ask(session, service.url, body, headers)
                except (asyncio.TimeoutError, aiohttp.ClientError):
                    statuses[f"{kind} broken off"] += 1
                    return
                statuses[f"{kind} {status}"] += 1
                wrong["5xx"] += status >= 500 and not (status == 503 and again)
                wrong["good refused"] += kind == "good" and status != 200

        async def metrics():
            async with session.get(f"{service.url}/metrics") as reply:
                lines = [line for line in (await reply.text()).splitlines() if line[0] != "#"]
                return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

        async def computed():
            return (await metrics())["lgvit_queue_age_seconds_count"]

        began = time.perf_counter()
        other = OtherClient(service.url, files)
        await asyncio.sleep(QUIET_SECONDS)
        quiet, other = other.end(), OtherClient(service.url, files)
        # whoever sends much does not share a processor with the other client at equal terms
        os.nice(10)
        sent, first, tasks = 0, None, set()
        while sent < requests or time.perf_counter() < began + seconds:
            kind = draw.choices(("good", "hostile", "slow", "cancelled"), (70, 12, 3, 15))[0]
            task = asyncio.create_task(one(kind))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
            await asyncio.sleep(draw.expovariate(rate))
            while len(tasks) >= 64:
                await asyncio.sleep(0.005)
            if sent == max(1000, requests // 10):
                first = service.megabytes()
        await asyncio.gather(*tasks)
        beside = other.end()
        counted = await metrics()
        left = await abandoned(service.url, files, computed)
    await asyncio.sleep(5)
    more = service.megabytes() - (first or service.megabytes())
    (_, alone), (_, together) = quiet, beside
    wrong["good client refused"] += sum(status != 200 for status in (*quiet[0], *beside[0]))
    before, after = (float(np.percentile(seconds[1:], 99)) for seconds in (alone, together))
    dropped = {name: value for name, value in counted.items() if name.startswith("lgvit_samples_dropped")}
    wrong["memory"] += more > EXTRA_MB
    wrong["p99 of another client"] += after > SLOWER * before
    answered = sum(count for name, count in statuses.items() if name.endswith(" 200")) + len(alone) + len(together)
    # a batch that was answered, one that ran when the clients left, and one in which some were not known to have left
    wrong["computed for clients that left"] += left > 3 * BATCH
    shed = sum(count for name, count in statuses.items() if name.endswith(" 503")) / sent
    return {
        "requests": sent, "statuses": dict(statuses), "share shed": shed, "megabytes more": more,
        "p50_ms": [1e3 * float(np.median(seconds)) for seconds in (alone, together)],
        "p99_ms alone": 1e3 * before, "p99_ms beside": 1e3 * after,
        "requests computed": counted["lgvit_queue_age_seconds_count"],
        "requests answered": answered, **dropped, f"computed of {ABANDONED} that left": left,
        "wrong": {name: count for name, count in wrong.items() if count},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="A checkpoint with its image processor, or an exported folder.")
    parser.add_argument("--data", required=True, help="Images: a dataset as `lgvit predict` takes it.")
    parser.add_argument("--split", help="Of it.")
    parser.add_argument("--seconds", type=float, default=20.0, help="Of each measurement; of the soak, at least.")
    parser.add_argument("--rounds", type=int, default=3, help="Of closed loops and the model called directly.")
    parser.add_argument("--policy", help="Such as `never`, for hard images alone.")
    parser.add_argument("--scheduler", choices=("segments", "batch"), help="Of `lgvit serve`.")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=40.0, help="Requests a second of the soak, at random times.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dataset = load_encoded(options.data, options.split)
    files = [dataset[number]["image"]["bytes"] for number in range(min(IMAGES, len(dataset)))]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {CLIENT_CORE})
    if options.soak:
        with Service(options.model) as service:
            report = asyncio.run(soak(service, files, options.requests, options.seconds, options.rate))
    else:
        report = measured(options, files)
    print(json.dumps(report, indent=2))
    if options.output:
        write_json(options.output, report)
    sys.exit(1 if report.get("wrong") else 0)


if __name__ == "__main__":
    main()
