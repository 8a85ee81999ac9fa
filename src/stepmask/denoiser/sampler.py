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


LEAST = 1e-6
"""Of α and of σ: no step is taken to be all noise or all signal, so that log-SNR lies within ±27.7."""


def log_snr(scheduler: Any) -> tuple[float, ...]:
    """log(α²/σ²) at each of the scheduler's timesteps; empty for a scheduler that tells neither ᾱ nor σ.

    Variance preserving: log ᾱ − log(1 − ᾱ). Flow matching, x = (1 − σ)·x₀ + σ·ε: 2·log((1 − σ)/σ). Variance
    exploding, x = x₀ + σ·ε, told by a σ above 1: −2·log σ. Neither α nor σ is taken to be less than `LEAST`: what is
    infinite can neither be saved nor interpolated.
    """
    timesteps = scheduler.timesteps.detach().cpu().double()
    sigmas, bars = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
    sigma = sigmas[: len(timesteps)].detach().cpu().double() if isinstance(sigmas, Tensor) else torch.zeros(0)
    if isinstance(bars, Tensor) and not _follows_a_flow(scheduler, sigma):
        bar = bars.double().cpu().clamp(LEAST**2, 1 - LEAST**2)
        table = torch.log(bar) - torch.log1p(-bar)
        values = np.interp(timesteps.numpy(), np.arange(len(table)), table.numpy())
    elif len(sigma) and len(sigma) == len(timesteps):
        sigma = sigma.clamp_min(LEAST)
        alpha = torch.ones_like(sigma) if sigma.max() > 1 else (1 - sigma).clamp_min(LEAST)
        values = (2 * torch.log(alpha / sigma)).numpy()
    else:
        return ()
    return tuple(float(value) for value in values)


def _follows_a_flow(scheduler: Any, sigma: Tensor) -> bool:
    """Whether a scheduler that has a table of ᾱ leaves it aside: its noise levels are a flow's, from 1 down."""
    config = getattr(scheduler, "config", None)
    told = getattr(config, "use_flow_sigmas", False) or getattr(config, "prediction_type", "") == "flow_prediction"
    return bool(told and len(sigma) and sigma.max() <= 1)
