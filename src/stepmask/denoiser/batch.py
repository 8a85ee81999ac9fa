"""`Batch`: what a call's rows are, and which part of a value belongs to which of them."""

from collections.abc import Collection
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepmask.denoiser.values import each, tensors

Shapes = tuple[tuple[int, ...], ...]


class Batch(NamedTuple):
    """The rows of a call of the denoiser.

    Args:
        rows: How many it is given: samples, times the parts of a guided batch.
        present: Which parts of the batch these are, in order; of a call that is one branch, that branch.
    """

    rows: int
    present: tuple[int, ...]

    def part_of(self, value: Any, batch: "Batch", shared: Collection[int] = ()) -> Any:
        """What a value of a larger batch is for this one: it loses the rows of the parts that are not here.

        Args:
            value: Of a call with the larger batch.
            batch: The larger one; or this one, whose value is as it is.
            shared: Which of its tensors belong to all rows, by place: they stay.
        """
        if batch == self or batch.present == self.present:
            return value
        places = count()
        return each(lambda tensor: tensor if next(places) in shared else _part(batch, self.present, tensor), value)

    def whole_of(self, gradient: Tensor, batch: "Batch", *, is_shared: bool = False) -> Tensor:
        """A gradient of `part_of` as that of the larger batch's tensor: zero for the parts that are not here.

        Args:
            gradient: Of a tensor for this batch.
            batch: The larger one.
            is_shared: Whether the tensor belongs to all rows.
        """
        if batch == self or batch.present == self.present or is_shared or not gradient.ndim:
            return gradient
        size = len(gradient) // len(self.present)
        whole = gradient.new_zeros(size * len(batch.present), *gradient.shape[1:])
        for place, part in enumerate(self.present):
            start = batch.present.index(part) * size
            whole[start : start + size] = gradient[place * size : (place + 1) * size]
        return whole


def _part(batch: Batch, present: tuple[int, ...], tensor: Tensor) -> Tensor:
    if not tensor.ndim or not tensor.shape[0] or tensor.shape[0] % batch.rows:
        return tensor
    size = tensor.shape[0] // len(batch.present)
    places = [batch.present.index(part) for part in present]
    if places == list(range(places[0], places[0] + len(places))):
        return tensor.narrow(0, places[0] * size, len(places) * size)
    return torch.cat([tensor.narrow(0, place * size, size) for place in places])


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows a denoiser is given: the first dimension of its latent, or the number of latents in a list."""
    for value in (*args, *kwargs.values()):
        found = next((tensor for tensor in tensors(value) if tensor.ndim > 1), None)
        if found is not None:
            return len(value) if isinstance(value, list) else len(found)
    return 1
