"""Accelerators of whatever type: which one there is, its name, and synchronisation with it."""

from __future__ import annotations

import torch


def accelerator() -> torch.device | None:
    """The type of this machine's accelerator, such as `cuda`, `mps` or `xpu`; `None` where there is none."""
    if not hasattr(torch, "accelerator"):  # before PyTorch 2.6
        return torch.device("cuda") if torch.cuda.is_available() else None
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def wait_for_accelerators() -> None:
    """Synchronise with the accelerators of whatever type, so that a clock measures what they ran."""
    found = accelerator()
    if found is None:
        return
    backend = getattr(torch, found.type)
    synchronize = getattr(torch, "accelerator", backend).synchronize
    for index in range(backend.device_count()):
        # one without memory in use runs nothing, and starting it takes memory
        if not hasattr(backend, "memory_allocated") or backend.memory_allocated(index):
            synchronize(index)


def device_name(device: torch.device) -> str:
    """The accelerator's name, where its maker gives it one; otherwise the device, such as `cpu`."""
    name = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return name(device) if name else str(device)
