"""Where a denoiser runs, and what torch has for a device of that kind."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def device_of(denoiser: nn.Module) -> torch.device:
    """The device that a denoiser runs on: where its weights are, or are brought to by accelerate's offloading."""
    told = getattr(getattr(denoiser, "_hf_hook", None), "execution_device", None)
    if told is not None:
        return torch.device("cuda", told) if isinstance(told, int) else torch.device(told)
    held = chain(denoiser.parameters(), denoiser.buffers())
    return next((tensor.device for tensor in held if not tensor.is_meta), CPU)


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
