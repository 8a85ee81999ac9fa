"""What stands for a value that nobody reads: `Unread` between compiled regions, numbers that are none inside them.

A graph cannot take an `Unread`, nor answer with one. So it is turned into a tensor on its way into a region; and what
the region makes of that is turned back on the way out, as it would be were the region not compiled.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from stepmask.denoiser.modes import uncompiled, without_inference_mode
from stepmask.denoiser.regions import unwrapped
from stepmask.denoiser.unread import Unread, unnoted
from stepmask.denoiser.values import tensors


def stand_in(tensor: Tensor) -> Tensor:
    """What stands for a tensor that nobody reads: not a number, in no memory to speak of."""
    with without_inference_mode():
        return torch.full((), _no_number(tensor), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _no_number(tensor: Tensor) -> float:
    return float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0


class StandIns:
    """Tensors that stand for `Unread` ones among a region's arguments; one for each place and layout, in its layout."""

    def __init__(self) -> None:
        self.held: dict[Any, Tensor] = {}

    def replace(self, leaves: list[Any]) -> list[Any]:
        """The arguments' leaves with such a tensor in the place of each that nobody reads."""
        return [self._of(place, leaf) if isinstance(leaf, Unread) else leaf for place, leaf in enumerate(leaves)]

    def _of(self, place: int, unread: Unread) -> Tensor:
        key = place, unread.shape, unread.stride(), unread.dtype, unread.device
        held = self.held.get(key)
        if held is None or held._version:  # a region has written into it
            with without_inference_mode():
                count = 1 + sum((size - 1) * step for size, step in zip(unread.shape, unread.stride(), strict=True))
                numbers = torch.full((max(count, 0),), _no_number(unread), dtype=unread.dtype, device=unread.device)
                held = numbers.as_strided(unread.shape, unread.stride())
            self.held[key] = held
        return held


def unread_outputs(
    region: nn.Module, prepare: Callable[[nn.Module], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, ...]:
    """Which tensors of a region's output nobody reads, by an evaluation of a copy on fake tensors.

    Args:
        region: The region.
        prepare: Masks the blocks of the copy.
        args: The region's arguments, `Unread` ones among them.
        kwargs: The same, by name.

    Returns:
        One truth for each tensor; none where fake tensors do not do.
    """
    with unnoted(), torch.no_grad(), torch.random.fork_rng(), uncompiled():
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            try:
                with FakeCopyMode(fake):
                    copied = copy.deepcopy(unwrapped(region))
                prepare(copied)
                args, kwargs = pytree.tree_map_only(
                    Tensor,
                    lambda tensor: tensor if isinstance(tensor, Unread) else fake.from_tensor(tensor),
                    (args, kwargs),
                )
                output = copied(*args, **kwargs)
            except Exception:  # whatever it is: what comes out is then taken for what it is, a tensor
                return ()
        return tuple(isinstance(leaf, Unread) for leaf in tensors(output))
