"""`Calls`: what a denoiser was called with along a run, kept without taking an accelerator's memory for all of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.call import Call
from stepmask.denoiser.modes import copied
from stepmask.denoiser.values import same_numbers


class Kept:
    """A tensor among the arguments of one call, or of several that follow each other.

    Args:
        tensor: As it lies now, on its own device or in the CPU's memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.device: torch.device | None = tensor.device

    def put_aside(self) -> None:
        """To the CPU's memory: the next call is given another one."""
        self.tensor = self.tensor.cpu()

    def there(self) -> Tensor:
        """On its own device."""
        return self.tensor.to(self.device)

    def settle(self, device: torch.device) -> None:
        """Have a device, if it came from another process without one."""
        if self.device is None:
            self.device = device

    def __getstate__(self) -> dict[str, Any]:
        """For another process, whose accelerators are others."""
        here = self.device is not None and self.device.type == "cpu"
        return {"tensor": self.tensor.cpu(), "device": self.device if here else None}


class Calls(Sequence[Call]):
    """Calls of a denoiser, in order.

    A tensor that a call shares with the one before (conditioning) is kept once. What a call alone was given, a latent
    or the features of a ControlNet, goes from an accelerator to the CPU's memory as soon as the next call is kept, and
    comes back whenever its call is asked for.

    Args:
        kept: The calls, with a `Kept` in place of each tensor.
    """

    def __init__(self, kept: Iterable[Call] = ()) -> None:
        self.kept = list(kept)

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep one more call, in copies."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        before = _leaves(self.kept[-1]) if self.kept else []
        alike = len(before) == len(leaves)
        kept = [_kept(leaf, before[place] if alike else None) for place, leaf in enumerate(leaves)]
        shared = {id(leaf) for leaf in kept}
        for leaf in before:
            if isinstance(leaf, Kept) and id(leaf) not in shared:
                leaf.put_aside()
        self.kept.append(Call(*pytree.tree_unflatten(kept, structure)))

    def as_they_lie(self) -> Iterator[Call]:
        """The calls with their tensors wherever these are: for shapes, and for small numbers."""
        return (_with_tensors(call, lambda kept: kept.tensor) for call in self.kept)

    def settle(self, device: torch.device) -> None:
        """Have the accelerator's tensors of calls that came from another process on a device."""
        for call in self.kept:
            for leaf in _leaves(call):
                if isinstance(leaf, Kept):
                    leaf.settle(device)

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, place: int) -> Call: ...

    @overload
    def __getitem__(self, place: slice) -> Self: ...

    def __getitem__(self, place: int | slice) -> "Call | Self":
        if isinstance(place, slice):
            return type(self)(self.kept[place])
        return _with_tensors(self.kept[place], Kept.there)


def as_they_lie(calls: Sequence[Call]) -> Iterable[Call]:
    """Calls with their tensors wherever these are."""
    return calls.as_they_lie() if isinstance(calls, Calls) else calls


def _kept(leaf: Any, before: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if isinstance(before, Kept) and same_numbers(before.tensor, leaf):
        return before
    return Kept(copied(leaf))


def _leaves(call: Call) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves((call.args, call.kwargs))
    return leaves


def _with_tensors(call: Call, tensor_of: Callable[[Kept], Tensor]) -> Call:
    return Call(*pytree.tree_map_only(Kept, tensor_of, (call.args, call.kwargs)))
