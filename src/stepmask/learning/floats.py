"""The numbers that learning looks at: floating tensors, their squares and products in float32 at least.

A block may also say integers or booleans (positions, masks). They are neither mixed nor measured, and have no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.values import each, tensors

LIFT = 16.0
"""The largest number of a gradient that sets out through a network: of float16's range three orders of magnitude are
free above it, and eight below."""


def floats(value: Any) -> list[Tensor]:
    """The tensors in a value that can carry gradients."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def mixed(function: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """As `each`, of floating and complex tensors; integers, booleans and all other leaves are the value's."""

    def mix(own: Tensor, *more: Tensor) -> Tensor:
        return function(own, *more) if own.is_floating_point() or own.is_complex() else own

    return each(mix, value, *others)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that: squares of float16 overflow, sums in bfloat16 stand still."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def lifted(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient whose largest number is about `LIFT`, and how many times larger it is now.

    The gradient of a distance goes with one over the size of the latents, of which float16 leaves few digits or none.
    The factor is a power of two, so in float32 no digit changes; it stays on the gradient's device: nobody waits.
    """
    factor = power_of_two(LIFT / gradient.detach().abs().max().float().clamp_min(1e-18))
    return gradient * factor.to(gradient.dtype), factor


def power_of_two(number: Tensor) -> Tensor:
    """The largest power of two that is not above a positive number, exactly."""
    mantissa, _ = torch.frexp(number)  # in [0.5, 1)
    return number / (2 * mantissa)
