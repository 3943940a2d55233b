"""What broken clients and damaged images do to a service: its memory, its answers, and how fast it stays.

    python recipes/benchmarks/hostile.py MODEL

One `lgvit serve` is started, and sent:

1. uploads that are broken off: what the process holds after 500 of them, and after 5,000 more;
2. `GET /health` over one kept-alive connection: the median of 200;
3. 2,000 images of all formats that are read, in unusual modes and with odd profiles, cut short or with flipped bits:
   each is answered or refused with a sentence, the same by the service and by `Predictor`, which `lgvit predict` uses;
   the memory of the service before and after, once it has seen 200 of them.

Linux only: memory is read from `/proc`.
"""

import argparse
import http.client
import io
import json
import math
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from lgvit_hf import Predictor
from lgvit_hf.files import write_json
from lgvit_hf.serving.device.rgb import IMAGE_FORMATS

UPLOADS, WARM_UP = 5_000, 500
IMAGES, IMAGES_WARM_UP = 2_000, 200
HEALTH_CHECKS = 200
PIECE = bytes(256 * 1024)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")


class Service:
    """One process of `lgvit serve`."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "lgvit_hf.cli", "serve", str(folder), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def memory(self):
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def break_off(port, draw):
    """An upload of up to 4 MB that ends after a random part of it."""
    size = draw.randint(1, 4_000_000)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode())
        left = draw.randint(0, size - 1)
        while left > 0:
            left -= connection.send(PIECE[: min(left, len(PIECE))])


def broken_uploads(service, draw):
    def send(count):
        for _ in range(count):
            break_off(service.port, draw)
        time.sleep(5)
        return service.memory()

    before, after = send(WARM_UP), send(UPLOADS)
    return {"uploads": UPLOADS, "megabytes_before": before, "megabytes_after": after, "more": after - before}


def health(service):
    connection, seconds = service.connection(), []
    for _ in range(HEALTH_CHECKS):
        began = time.perf_counter()
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        seconds.append(time.perf_counter() - began)
    return {"median_ms": 1e3 * statistics.median(seconds), "p99_ms": 1e3 * sorted(seconds)[-HEALTH_CHECKS // 100]}


def picture(draw):
    """A random picture of a random mode, of 1 to 300 pixels per side."""
    mode, (width, height) = draw.choice(MODES), (draw.randint(1, 300), draw.randint(1, 300))
    pixels = np.random.default_rng(draw.getrandbits(32))
    if mode == "I;16":
        return Image.fromarray(pixels.integers(0, 65536, (height, width), np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(pixels.integers(-5, 70_000, (height, width)).astype(np.int32 if mode == "I" else "f4"))
    image = Image.fromarray(pixels.integers(0, 256, (height, width, 3), np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels.integers(0, 256, (height, width), np.uint8)))
    return image.convert(mode)


def encoded(draw):
    """A picture as the file of a random format, with a profile or an orientation now and then."""
    while True:
        image, kind, options = picture(draw), draw.choice(IMAGE_FORMATS), {}
        if draw.random() < 0.2:
            options["icc_profile"] = draw.choice(
                [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
            )
        if draw.random() < 0.2 and kind in ("PNG", "JPEG", "WEBP", "TIFF"):
            exif = Image.Exif()
            exif[0x0112] = draw.randint(0, 9)
            options["exif"] = exif.tobytes()
        stream = io.BytesIO()
        try:
            image.save(stream, kind, **options)
        except (OSError, KeyError, ValueError, TypeError):  # this format has no such mode
            continue
        return kind, stream.getvalue()


def damaged(file, draw):
    """The file as it is, cut short, or with up to 16 flipped bits."""
    how = draw.choice(("whole", "cut", "flipped"))
    if how == "cut":
        return how, file[: draw.randint(1, len(file))]
    if how == "flipped":
        changed = bytearray(file)
        for _ in range(draw.randint(1, 16)):
            # half of them in the header, where they change what the file says of itself
            place = draw.randrange(min(len(changed), 64)) if draw.random() < 0.5 else draw.randrange(len(changed))
            changed[place] ^= 1 << draw.randrange(8)
        return how, bytes(changed)
    return how, file


def asked(connection, file):
    """The service's answer to one image, as its label, exit and score, or its sentence."""
    connection.request("POST", "/predict", file, {"content-type": "application/octet-stream"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status == 200:
        answer = answer["answers"][0]
        return answer["label"], answer["exit_index"], answer["exit_score"]
    assert 400 <= response.status < 500, (response.status, answer)
    return (answer["error"],)


def predicted(predictor, file):
    try:
        answers = predictor.images([file])
    except ValueError as error:
        return (str(error),)
    return predictor.label_names[answers["label"][0]], int(answers["exit_index"][0]), float(answers["exit_score"][0])


def same(served, ours):
    """Equal sentences, or equal answers up to the last digits of the score."""
    return served[:2] == ours[:2] and (len(served) == 1 or math.isclose(served[2], ours[2], abs_tol=1e-4))


def fuzzed_images(service, predictor, draw):
    connection, counts, differ = service.connection(), Counter(), []
    for number in range(IMAGES_WARM_UP + IMAGES):
        if number == IMAGES_WARM_UP:
            before = service.memory()
        kind, file = encoded(draw)
        how, file = damaged(file, draw)
        served, ours = asked(connection, file), predicted(predictor, file)
        if number >= IMAGES_WARM_UP:
            counts[f"{how}, {'answered' if len(served) > 1 else 'refused'}"] += 1
            counts[kind] += 1
        if not same(served, ours):
            differ.append({"format": kind, "damage": how, "served": served, "predicted": ours})
    time.sleep(2)
    after = service.memory()
    memory = {"megabytes_before": before, "megabytes_after": after, "more": after - before}
    return {"images": IMAGES, **counts, "differ": len(differ), "differences": differ[:10], **memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="A checkpoint with its image processor, or an exported folder.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="A JSON file for what is printed.")
    options = parser.parse_args()
    draw, service = random.Random(options.seed), Service(options.model)
    report = {"model": options.model, "seed": options.seed}
    try:
        report["health_before"] = health(service)
        report["broken_uploads"] = broken_uploads(service, draw)
        report["fuzzed_images"] = fuzzed_images(service, Predictor(options.model), draw)
        report["health_after"] = health(service)
    finally:
        report["exit_code"] = service.stop()
    print(json.dumps(report, indent=2))
    if options.output:
        write_json(options.output, report)


if __name__ == "__main__":
    main()
