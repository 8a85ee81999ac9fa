"""The clock that everything here is timed with: moments at the host, and in the work of an accelerator."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from stepmask.denoiser.device import module_of


@dataclass(frozen=True)
class Clock:
    """Tells the time on a device.

    Args:
        device: Where the work is done that is timed.
    """

    device: torch.device

    def now(self) -> float:
        """Seconds on a monotonic clock, once the device has done what it was told."""
        module = module_of(self.device)
        if hasattr(module, "synchronize"):
            module.synchronize(*self._which(module))
        return perf_counter()

    def mark(self) -> Any:
        """This moment in the device's work. Nobody waits for it, unless the device has no events."""
        module = module_of(self.device)
        if not hasattr(module, "Event"):
            return self.now()
        event = module.Event(enable_timing=True)
        if hasattr(module, "current_stream"):
            event.record(module.current_stream(self.device))
        else:
            event.record()
        return event

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        """How long each span between two marks was; the device is waited for once."""
        if not spans or isinstance(spans[0][0], float):
            return [end - start for start, end in spans]
        self.now()
        return [start.elapsed_time(end) / 1000 for start, end in spans]

    def _which(self, module: Any) -> tuple[torch.device, ...]:
        """The device, for modules that have several."""
        return (self.device,) if hasattr(module, "current_stream") else ()
