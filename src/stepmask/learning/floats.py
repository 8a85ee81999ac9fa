"""The numbers that learning looks at: floating tensors, their squares and products in float32 at least.

A block may also say integers or booleans (positions, masks). They are neither mixed nor measured, and have no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.values import each, tensors


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
