"""`lgvit env`: the versions to paste in an issue, and what is known to go wrong with them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

PACKAGES = (
    "lgvit-hf torch transformers safetensors numpy pillow datasets evaluate accelerate huggingface-hub optimum "
    "optimum-onnx onnx onnxscript onnxruntime torchvision"
).split()
FIRST_SAFE_TRANSFORMERS = (5, 3)


def processor_name() -> str:
    """The processor as its maker calls it, where the system says so, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """Name and version of everything that matters; `-` for what is not installed.

    Example:

        >>> environment()["optimum"]
        '...'
    """
    versions = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "-"
    versions["cpus"] = str(os.cpu_count())
    versions["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "-")
    if versions["torch"] != "-":
        import torch

        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        versions["threads"] = str(torch.get_num_threads())
        versions["accelerators"] = ", ".join(devices) or "-"
    return versions


def warnings_for(versions: dict[str, str]) -> list[str]:
    """What is known about such an environment, a line each.

    Example:

        >>> warnings_for({"transformers": "4.57.6", "optimum-onnx": "0.1.0", "torchvision": "-"})
        ['transformers 4.57.6 is open to CVE-2026-4372 (a config.json can name code to run; mended in 5.3): ...']
    """
    lines = []
    transformers = versions["transformers"]
    if transformers != "-" and tuple(int(part) for part in transformers.split(".")[:2]) < FIRST_SAFE_TRANSFORMERS:
        lines.append(
            f"transformers {transformers} is open to CVE-2026-4372 (a config.json can name code to run; mended in "
            "5.3): highways ignore that key, load other models only from people you trust"
        )
        if versions["optimum-onnx"] == "-":
            lines[-1] += "; only the extra `optimum` needs a version below 4.58"
    elif versions["optimum-onnx"] != "-":
        lines.append(f"optimum-onnx needs transformers below 4.58, and {transformers} is installed")
    if versions["torchvision"] != "-":
        lines.append("torchvision is not needed; one that does not fit torch breaks transformers' image processors")
    return lines


def report() -> str:
    """Both, as text."""
    versions = environment()
    width = max(map(len, versions))
    lines = [f"{name:{width}}  {version}" for name, version in versions.items()]
    return "\n".join([*lines, *(f"note: {line}" for line in warnings_for(versions))])
