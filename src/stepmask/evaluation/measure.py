"""Time and work of a run, as this machine gives them."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepmask.denoiser.clock import Clock
from stepmask.denoiser.device import CPU, module_of
from stepmask.denoiser.modes import unfused_attention
from stepmask.denoiser.quantised import quantised_counted
from stepmask.denoiser.seam import Hook


@dataclass(eq=False)
class Stopwatch(Hook):
    """Stands in front of the denoiser and adds up the time spent in it, the runtime's own work included.

    An accelerator is not waited for before the seconds are asked for.

    Args:
        clock: Of the denoiser's device.
        spans: Beginning and end of each call.
    """

    clock: Clock
    spans: list[tuple[Any, Any]] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Time one call."""
        started = self.clock.mark()
        output = call(*args, **kwargs)
        self.spans.append((started, self.clock.mark()))
        return output

    @property
    def calls(self) -> int:
        """How many there have been."""
        return len(self.spans)

    @property
    def seconds(self) -> float:
        """What they have taken, together."""
        return sum(self.clock.seconds(self.spans))


@dataclass(eq=False)
class MacCounter(Hook):
    """Stands in front of the denoiser and counts what it computes, whoever decides that.

    Args:
        denoiser: The denoiser.
        macs: So far, as `trace` counts them.
    """

    denoiser: nn.Module
    macs: int = 0

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count one call."""
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), unfused_attention(), quantised_counted(self.denoiser, counter), counter:
            output = call(*args, **kwargs)
        self.macs += counter.get_total_flops() // 2
        return output


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the numbers were measured on.

    Args:
        device: Where the denoiser was.
    """
    return {
        "processor": _processor(),
        "accelerator": _accelerator(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "diffusers", "stepmask")},
    }


def _accelerator(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    module = module_of(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
