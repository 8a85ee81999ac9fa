"""What memory is in use: by the process, or by torch on an accelerator; and by the tensors that operations make."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepmask.denoiser.device import module_of
from stepmask.denoiser.values import tensors


class Peak:
    """Memory in use when watching began, and the most while it lasted; `None` where the system does not tell."""

    before: int | None = None
    bytes: int | None = None

    @property
    def grown(self) -> int | None:
        """The most that came on top of what was in use before."""
        return None if self.before is None or self.bytes is None else self.bytes - self.before


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch memory: allocated by torch on an accelerator, resident in the process on Linux (VmHWM, reset at entry).

    Args:
        device: Whose memory.
    """
    peak, resets = Peak(), Path("/proc/self/clear_refs")
    module = module_of(device)
    if hasattr(module, "max_memory_allocated"):
        module.reset_peak_memory_stats(device)
        peak.before = module.memory_allocated(device)
        yield peak
        peak.bytes = module.max_memory_allocated(device)
    elif device.type == "cpu" and os.access(resets, os.W_OK):
        resets.write_text("5")
        peak.before = _resident("VmRSS")
        yield peak
        peak.bytes = _resident("VmHWM")
    else:
        yield peak


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


class Alive(TorchDispatchMode):
    """Counts the bytes of what operations make, for as long as it is alive; of fake tensors, too.

    Args:
        there: Tensors that are not counted, for they were there before.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.known = {storage._cdata for storage in map(Tensor.untyped_storage, there)}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors(output):
            self.count(tensor.untyped_storage())
        return output

    def count(self, storage: torch.UntypedStorage) -> None:
        """Take in a storage, once, until it is freed."""
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes()).atexit = False

    def _freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.bytes -= size
