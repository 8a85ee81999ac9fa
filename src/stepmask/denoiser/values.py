"""What a block says: a tensor, or tensors in a tuple or an output class; stored, mixed and forecast as one value."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.device import to_device
from stepmask.errors import TraceError
from stepmask.schedule.channels import Vectors, channel_axis
from stepmask.schedule.graph import Reuse


def each(function: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """The value made of `function(tensor, *other tensors)` for each tensor in it; other leaves stay as they are."""
    if isinstance(value, Tensor):
        return function(value, *others)
    return pytree.tree_map(lambda leaf, *more: function(leaf, *more) if isinstance(leaf, Tensor) else leaf,
                           value, *others)  # fmt: skip


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value."""
    if isinstance(value, Tensor):
        return iter((value,))
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def prediction(output: Any) -> Tensor | list[Tensor]:
    """What a denoiser predicts, first in its output: a tensor, or one per sample where samples come in a list."""
    leaves = pytree.tree_leaves(output, is_leaf=lambda value: isinstance(value, list))
    first: Tensor | list[Tensor] = next(leaf for leaf in leaves if isinstance(leaf, Tensor | list))
    return first


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one shape and dtype, on one device, and hold the same numbers; NaN is one of them."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    both_nan = one.isnan() & other.isnan()
    return bool(((one == other) | both_nan).all())


def same_arguments(one: Any, other: Any) -> bool:
    """Whether two arguments are the same: tensors by their numbers, anything else as it says itself."""
    leaves, form = pytree.tree_flatten(one)
    others, other_form = pytree.tree_flatten(other)
    return form == other_form and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or same_numbers(one, other)
    plain = str | int | float | bool | None
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)


def rebuilt(value: Any) -> Any:
    """The value in lists, tuples and dictionaries of its own: who pops from one takes nothing out of the other."""
    return value if isinstance(value, Tensor) else each(lambda tensor: tensor, value)


def size(value: Any) -> int:
    """Bytes of a value."""
    return sum(tensor.nbytes for tensor in tensors(value))


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments: `hidden_states`, else the first tensor.

    Raises:
        TraceError: No argument is a tensor.
    """
    named = kwargs.get("hidden_states")
    for candidate in (*args[:1], named, *args, *kwargs.values()):
        if isinstance(candidate, Tensor):
            return candidate
    raise TraceError(
        given="a block called without a tensor",
        expected="a residual stream as its first argument, for reuse by delta",
        advice="Reuse this block by its output",
    )


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors in the first argument that has any: a denoiser's latent, or latents."""
    return next(filter(None, (tuple(tensors(value)) for value in (*args, *kwargs.values()))), ())


def to_stored_form(reuse: Reuse, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is stored of a block's output: the output itself, or what it adds to the stream."""
    return output - stream(args, kwargs) if reuse == "delta" else output


def to_output(reuse: Reuse, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output that a stored value stands for, at the block's present input."""
    return stream(args, kwargs) + value if reuse == "delta" else value


def forecast(weights: Sequence[float], stored: Sequence[Any]) -> Any:
    """Σ_i weights[i] · stored[i], newest first; of tensors that are not of floating point, the newest.

    Plain reuse hands the stored value out as it is; a first-order forecast is one fused operation, a second-order
    one is two.
    """
    if len(weights) == 1 and weights[0] == 1:
        return stored[0]
    return each(lambda *values: _mix(weights, values), *stored[: len(weights)])


def _mix(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    if not (values[0].is_floating_point() or values[0].is_complex()):
        return values[0]

    total = sum(weights)
    if len(weights) == 1:
        return values[0] * weights[0]
    if abs(total - 1) < 1e-9 and len(weights) == 2:
        return torch.lerp(values[0], values[1], weights[1])

    older = weights[1] + sum(weights[2:])
    if abs(total - 1) < 1e-9 and abs(older) > 1e-9:
        return torch.lerp(values[1], values[2], weights[2] / older).lerp_(values[0], 1 - older)  # one new tensor
    mixed = values[0] * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=False):
        mixed.add_(value, alpha=weight)
    return mixed


def on_channels(arrays: Sequence[Vectors], like: Tensor) -> list[tuple[Tensor, ...]]:
    """Per-channel vectors where a stored tensor is, in shapes that meet its channels.

    They are of `weights_dtype`: weights that are rounded to half precision one by one do not sum to what they should.

    Args:
        arrays: Each (reads + 1, channels), the biases last.
        like: The tensor.

    Returns:
        For each array its rows, (channels,) or (channels, 1, 1): the weights of stored values, newest first, and the
        biases. They are moved in one piece.
    """
    after = like.ndim - 1 - channel_axis(like.ndim)
    with torch.inference_mode(False):  # a later run may need gradients through them
        moved = to_device(torch.from_numpy(np.concatenate(arrays)).to(weights_dtype(like)), like.device)
        rows = moved.reshape(*moved.shape, *[1] * after).unbind()
    ends = np.cumsum([len(array) for array in arrays]).tolist()
    return [rows[end - len(array) : end] for end, array in zip(ends, arrays, strict=True)]


def weights_dtype(value: Tensor) -> torch.dtype:
    """The dtype of weights of a value: its own, but not less precise than float32."""
    return torch.promote_types(value.dtype, torch.float32)


def forecast_channels(vectors: Sequence[Tensor], stored: Sequence[Any]) -> Any:
    """Σ_i weights[i] · stored[i] + bias, channel by channel, newest first: one fused pass per stored value.

    Args:
        vectors: The weights of each stored value that is read, then the bias; all broadcast over the values.
        stored: Values, newest first.
    """
    *weights, bias = vectors
    return each(lambda *values: _mix_channels(weights, bias, values), *stored[: len(weights)])


def _mix_channels(weights: Sequence[Tensor], bias: Tensor, values: Sequence[Tensor]) -> Tensor:
    mixed = torch.addcmul(bias, weights[0], values[0])
    for weight, value in zip(weights[1:], values[1:], strict=True):
        mixed.addcmul_(weight, value)
    return mixed.to(values[0].dtype)
