"""The Ray cluster that work is sent to: the one there is, or one on this machine."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager

# what passes through Ray's store is small: images are read where they are answered
STORE_BYTES = 2**28


def check_ray(library: str) -> None:
    """Raise `ImportError` where a library of Ray, `data` or `serve`, is not installed."""
    try:
        importlib.import_module(f"ray.{library}")
    except ImportError as error:
        raise ImportError(f'--engine ray needs Ray ({error}): pip install "lgvit-hf[ray]"') from error


@contextmanager
def cluster(cpus: int) -> Generator[bool, None, None]:
    """The cluster this process is connected to, or that of `RAY_ADDRESS`, or one on this machine, which ends here.

    Gives whether it is the latter, which has so many CPUs.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for library in ("data", "serve"):
        logging.getLogger(f"ray.{library}").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS", "local")
    own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own if address == "local" else {}))
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def check_cpus(what: str, count: int, each: int = 1) -> None:
    """Raise `ValueError` where the cluster has too few CPUs for so many workers, which would wait for ever."""
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 0))
    if count * each > cpus:
        raise ValueError(f"{what}={count} must be at most {cpus // each}: Ray has {cpus} CPUs")
