"""Devices that this machine does not have: tensors that say they lie there, mix with no other device, and compute."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("mps:0"), torch.device("xpu:1")
LEAVES = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item)


class Elsewhere(torch.Tensor):
    """Values of this machine under the name of another device, which has no float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return args[0].where
        if func is torch.Tensor.to:
            return _moved(*args, **kwargs)
        if func in LEAVES:
            return func(here(args[0]), *args[1:], **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # a number without dimensions may come from the CPU, as on real devices
        devices = {leaf.device for leaf in tensors if isinstance(leaf, Elsewhere) or leaf.dim()}
        if func is torch.Tensor.copy_:
            here(args[0]).copy_(here(args[1]))
            return args[0]
        assert len(devices) == 1, f"{func.__name__}: tensors on {sorted(map(str, devices))}"
        (device,) = devices
        if "device" in kwargs:
            assert torch.device(kwargs.pop("device")) == device
        result = func(*tree_map(here, args), **tree_map(here, kwargs))
        return tree_map(lambda leaf: on(leaf, device), result)


class OtherDevices(TorchFunctionMode):
    """Inside, `tensor.to(FIRST)` and `torch.zeros(3, device=FIRST)` work: PyTorch itself would look for a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return _moved(*args, **kwargs)
        device = kwargs.get("device")
        if (
            device is not None
            and torch.device(device).type != "cpu"
            and not any(map(_is_elsewhere, tree_leaves(args)))
        ):
            return on(func(*args, **{**kwargs, "device": "cpu"}), device)
        return func(*args, **kwargs)


def _is_elsewhere(leaf):
    return isinstance(leaf, Elsewhere)


def here(leaf):
    """The values themselves."""
    return _as(leaf, torch.Tensor) if _is_elsewhere(leaf) else leaf


def _as(tensor, kind):
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(kind)


def on(leaf, device):
    """A tensor as one of a device; anything else as it is."""
    device = torch.device(device)
    if not isinstance(leaf, torch.Tensor) or device.type == "cpu":
        return here(leaf)
    assert leaf.dtype not in (torch.float64, torch.complex128), f"{device} has no {leaf.dtype}"
    moved = _as(here(leaf), Elsewhere)
    moved.where = device
    return moved


def _moved(tensor, *args, non_blocking=False, **kwargs):
    device, dtype = kwargs.get("device") or tensor.device, kwargs.get("dtype") or tensor.dtype
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif arg is not None:
            device = torch.device(arg)
    if torch.device(device) == tensor.device and dtype == tensor.dtype:
        return tensor
    with torch._C.DisableTorchFunction():
        values = here(tensor).to(dtype)
    return on(values, device)


def moved(module, device):
    """A module, in place, whose weights say that they lie on a device."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                each._parameters[name] = torch.nn.Parameter(on(weight.detach(), device), requires_grad=False)
                each._parameters[name].where = torch.device(device)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = on(buffer, device)
    return module
