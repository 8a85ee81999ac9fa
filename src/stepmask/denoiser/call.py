"""`Call`: what a denoiser is called with, and the timestep in it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stepmask.denoiser.regions import unwrapped

TIMESTEPS = ("timestep", "timesteps", "t", "sigma")
"""What denoisers call their timestep."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parameters_of(denoiser: nn.Module) -> tuple[str, ...]:
    """The names of what a denoiser is called with, in order."""
    return tuple(inspect.signature(type(unwrapped(denoiser)).forward).parameters)[1:]


def given_timestep(call: Call, parameters: Sequence[str] = ()) -> Any:
    """What is given as the timestep: by its name, else as the second argument; `None` if there is none.

    Args:
        call: The call.
        parameters: The names of the denoiser's arguments, in order.
    """
    named = {**dict(zip(parameters, call.args, strict=False)), **call.kwargs}
    for name in TIMESTEPS:
        if name in named:
            return named[name]
    return call.args[1] if len(call.args) > 1 else None


def timestep_of_call(call: Call, step: int, parameters: Sequence[str] = ()) -> float:
    """The timestep of a plain call as a number; the step's index where none is given.

    Args:
        call: The call.
        step: The step that it belongs to.
        parameters: The names of the denoiser's arguments, in order.
    """
    given = given_timestep(call, parameters)
    if isinstance(given, Tensor):
        return float(given.max())  # of clean tokens or frames it is 0
    return float(given) if isinstance(given, int | float) else float(step)
