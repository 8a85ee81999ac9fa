"""Copies from an accelerator to pinned memory and back, in a stream of their own beside its work: nobody waits."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.device import has_streams, module_of
from stepmask.denoiser.modes import without_inference_mode


def put_aside(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor in the memory of a device; from an accelerator to the CPU, the host does not wait for it.

    What lies in pinned memory is for `brought_back` alone, which comes after the copy.
    """
    if torch.device(device).type != "cpu" or not has_streams(tensor.device):
        return tensor.to(device)
    module = module_of(tensor.device)
    beside = _stream(tensor.device)
    with without_inference_mode():  # a copy of it, to count writes, would be made too early
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        beside.wait_stream(module.current_stream(tensor.device))
        with module.stream(beside):
            host.copy_(tensor, non_blocking=True)
    tensor.record_stream(beside)  # its memory is not given away before it is copied
    return host


def brought_back(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on its device again; what follows there comes after the copy."""
    if tensor.device.type != "cpu" or not has_streams(device):
        return tensor.to(device)
    module = module_of(device)
    beside = _stream(device)
    with module.stream(beside):
        there = torch.empty_like(tensor, device=device)
        there.copy_(tensor, non_blocking=True)
    here = module.current_stream(device)
    here.wait_stream(beside)
    there.record_stream(here)
    return there


@cache
def _stream(device: torch.device) -> Any:
    """The stream for copies of a device."""
    return module_of(device).Stream(device)
