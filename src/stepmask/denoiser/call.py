"""`Call`: what a denoiser is called with, and the timestep in it."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepmask.denoiser.regions import unwrapped
from stepmask.denoiser.values import rebuilt

TIMESTEPS = (
    *("timestep", "timesteps", "t", "sigma"),
    *("time", "time_step", "time_steps", "timestep_ratio", "noise_level", "noise_labels"),
)
"""What denoisers call their timestep."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def evaluate(self, denoiser: nn.Module) -> Any:
        """What a denoiser answers; it gets lists and dictionaries of its own, and may pop from them."""
        return denoiser(*rebuilt(self.args), **rebuilt(self.kwargs))


def parameters_of(denoiser: nn.Module) -> tuple[str, ...]:
    """The names of what a denoiser is called with, in order."""
    if isinstance(denoiser, torch.jit.ScriptModule):
        forward: Any = denoiser.forward
        return tuple(argument.name for argument in forward.schema.arguments)[1:]
    return tuple(inspect.signature(type(unwrapped(denoiser)).forward).parameters)[1:]


def given_timestep(call: Call, parameters: Sequence[str] = ()) -> Any:
    """What is given as the timestep: by its name, else as the second argument; `None` if there is none.

    The second argument is one only if it is a number, or has one for each sample: else it is a prompt or a picture.

    Args:
        call: The call.
        parameters: The names of the denoiser's arguments, in order.
    """
    named = {**dict(zip(parameters, call.args, strict=False)), **call.kwargs}
    for name in TIMESTEPS:
        if named.get(name) is not None:
            return named[name]
    if len(call.args) < 2:
        return None
    latent, second = call.args[:2]
    return second if _is_one_per_sample(second, latent) else None


def timestep_of_call(call: Call, step: int, parameters: Sequence[str] = ()) -> float:
    """The timestep of a plain call as a number; the step's index where none is given.

    Args:
        call: The call.
        step: The step that it belongs to.
        parameters: The names of the denoiser's arguments, in order.
    """
    number = as_number(given_timestep(call, parameters))
    return float(step) if number is None else number


def as_number(timestep: Any) -> float | None:
    """A timestep as a number: Python's, numpy's or torch's; the largest where there are several; `None` if it is none.

    Of clean tokens or frames a timestep is 0, so that the largest is that of the others.
    """
    if isinstance(timestep, Real):
        return float(timestep)
    if isinstance(timestep, np.ndarray | np.generic):
        is_real = timestep.dtype.kind in "biuf"  # booleans, integers, floating point
        return float(timestep.max()) if is_real and timestep.size else None
    if isinstance(timestep, Tensor):
        return float(timestep.max()) if timestep.numel() and not timestep.is_complex() else None
    return None


def _is_one_per_sample(given: Any, latent: Any) -> bool:
    """Whether it is a number, or has one for each sample of a latent."""
    if not isinstance(given, Tensor | np.ndarray):
        return True
    if math.prod(given.shape) == 1:
        return True
    is_listed = isinstance(latent, Sequence) or (isinstance(latent, Tensor) and latent.ndim > 0)
    samples = len(latent) if is_listed else 1
    return math.prod(given.shape) == samples and given.shape[0] == samples
