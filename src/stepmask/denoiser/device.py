"""Where a denoiser runs, and what torch has for a device of that kind."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from stepmask.executors.processes import local_rank, started

CPU = torch.device("cpu")


def device_of(denoiser: nn.Module) -> torch.device:
    """The device that a denoiser runs on: where its weights are, or where offloading brings them."""
    told = getattr(getattr(denoiser, "_hf_hook", None), "execution_device", None)
    if told is not None:
        return torch.device("cuda", told) if isinstance(told, int) else torch.device(told)
    held = chain(denoiser.parameters(), denoiser.buffers())
    found = next((tensor.device for tensor in held if not tensor.is_meta), CPU)
    return _brought_to(denoiser) or found if found == CPU else found


def _brought_to(denoiser: nn.Module) -> torch.device | None:
    """Where diffusers' group offloading brings weights before a call; `None` if there is none."""
    for module in denoiser.modules():
        registry = vars(module).get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            return _numbered(torch.device(hook.group.onload_device))
    return None


def _numbered(device: torch.device) -> torch.device:
    """The device as its tensors name it: with its number."""
    module = module_of(device)
    if device.index is not None or not hasattr(module, "current_device"):
        return device
    return torch.device(device.type, module.current_device())


def is_present(device: torch.device) -> bool:
    """Whether this machine has a device."""
    if device.type == "cpu":
        return True
    module = module_of(device)
    return hasattr(module, "device_count") and (device.index or 0) < module.device_count()


def own_device(device: torch.device) -> torch.device:
    """This process's part of what is asked for.

    Of several processes on a machine, as torchrun and Slurm start them, each takes an accelerator of its own, unless it
    is told which.
    """
    module = module_of(device)
    if module is None or device.index is not None or not started():
        return device
    return torch.device(device.type, local_rank() % max(module.device_count(), 1))


def module_of(device: torch.device) -> Any:
    """What torch has for an accelerator, as `torch.cuda`; `None` for the CPU, and where it has nothing."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def has_streams(device: torch.device) -> bool:
    """Whether copies to and from an accelerator may run beside its work."""
    module = module_of(device)
    return all(hasattr(module, name) for name in ("Stream", "stream", "current_stream"))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the CPU by way of pinned memory, so that the host does not wait for the copy."""
    if tensor.device == device or tensor.device.type != "cpu" or not has_streams(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def read_together(flags: Iterable[Tensor]) -> list[bool]:
    """The truth of scalars; an accelerator is waited for once for all of them."""
    held = list(flags)
    if not held:
        return []
    told: list[bool] = torch.stack([flag.to(held[0].device) for flag in held]).tolist()
    return told
