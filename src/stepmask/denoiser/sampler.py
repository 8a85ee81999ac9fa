"""The sampler's side: where a run starts, what it ends with, and the sequence of its steps.

A diffusers pipeline calls `scheduler.set_timesteps` once when a run starts and `scheduler.step` after every
evaluation. Both are watched on the scheduler instance and put back afterwards.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepmask.schedule.fingerprint import SamplerFingerprint


@contextmanager
def watched(scheduler: Any, method: str, after: Callable[..., None]) -> Iterator[None]:
    """Call `after(result, *args, **kwargs)` after every `scheduler.method(*args, **kwargs)` while the context lasts."""
    original, own = getattr(scheduler, method), vars(scheduler).get(method)

    @wraps(original)
    def watch(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        after(result, *args, **kwargs)
        return result

    setattr(scheduler, method, watch)
    try:
        yield
    finally:
        delattr(scheduler, method)
        if own is not None:
            setattr(scheduler, method, own)


def timestep_of(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep among the arguments of a call of `scheduler.step`: mostly the second, but not of all."""
    names = list(inspect.signature(type(scheduler).step).parameters)[1:]
    return float({**dict(zip(names, args, strict=False)), **kwargs}["timestep"])


def describe(scheduler: Any, branches: int = 1) -> SamplerFingerprint:
    """The fingerprint of a scheduler whose timesteps are set."""
    timesteps = tuple(float(t) for t in scheduler.timesteps.tolist())
    return SamplerFingerprint(type(scheduler).__name__, timesteps, log_snr(scheduler), branches)


def describe_steps(scheduler: Any, num_inference_steps: int, branches: int = 1) -> SamplerFingerprint:
    """The fingerprint that a scheduler will have at another number of steps; the scheduler is left as it is."""
    trial = copy.deepcopy(scheduler)
    vars(trial).pop("set_timesteps", None)
    trial.set_timesteps(num_inference_steps)
    return describe(trial, branches)


def log_snr(scheduler: Any) -> tuple[float, ...]:
    """log(α²/σ²) at each of the scheduler's timesteps; empty for a scheduler that tells neither ᾱ nor σ.

    Variance preserving: log ᾱ − log(1 − ᾱ). Flow matching, x = (1 − σ)·x₀ + σ·ε: 2·log((1 − σ)/σ). Variance
    exploding, x = x₀ + σ·ε, told by a σ above 1: −2·log σ.
    """
    timesteps = scheduler.timesteps.detach().cpu().double()
    if isinstance(bars := getattr(scheduler, "alphas_cumprod", None), Tensor):
        table = torch.log(bars.double().cpu()) - torch.log1p(-bars.double().cpu())
        values = np.interp(timesteps.numpy(), np.arange(len(table)), table.numpy())
    elif isinstance(sigmas := getattr(scheduler, "sigmas", None), Tensor) and len(sigmas) >= len(timesteps):
        sigma = sigmas[: len(timesteps)].detach().cpu().double().clamp_min(1e-6)
        alpha = torch.ones_like(sigma) if sigma.max() > 1 else (1 - sigma).clamp_min(1e-6)
        values = (2 * torch.log(alpha / sigma)).numpy()
    else:
        return ()
    return tuple(float(value) for value in values)
