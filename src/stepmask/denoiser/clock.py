"""The clock that everything here is timed with."""

import time

import torch


def now() -> float:
    """Seconds on a monotonic clock, once the accelerator has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
