"""`Calls`: what a denoiser was called with along a run, kept without taking an accelerator's memory for all of it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
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


class KeptObject:
    """An object among the arguments, as it was when the call began: a cache of keys and values is filled by it.

    Args:
        value: A copy of it.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def there(self) -> Any:
        """One more copy, which an evaluation may fill."""
        return copy.deepcopy(self.value)

    def is_like(self, value: Any) -> bool:
        """Whether an object holds what this one does."""
        ours, theirs = list(_inside(self.value)), list(_inside(value))
        return type(self.value) is type(value) and len(ours) == len(theirs) and all(map(_is_same, ours, theirs))


class Calls(Sequence[Call]):
    """Calls of a denoiser, in order.

    A tensor that a call shares with the one before (conditioning) is kept once. What a call alone was given, a latent
    or the features of a ControlNet, goes from an accelerator to the CPU's memory as soon as the next call is kept, and
    comes back whenever its call is asked for. Objects that evaluations may fill are kept as they were in front of each.

    Args:
        kept: The calls, with a `Kept` in place of each tensor, and a `KeptObject` in that of an object.
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
        return (_filled(call, lambda kept: kept.tensor, lambda kept: kept.value) for call in self.kept)

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
        return _filled(self.kept[place], Kept.there, KeptObject.there)


def as_they_lie(calls: Sequence[Call]) -> Iterable[Call]:
    """Calls with their tensors wherever these are."""
    return calls.as_they_lie() if isinstance(calls, Calls) else calls


def _kept(leaf: Any, before: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return _kept_object(leaf, before)
    if isinstance(before, Kept) and same_numbers(before.tensor, leaf):
        return before
    return Kept(copied(leaf))


def _kept_object(leaf: Any, before: Any) -> Any:
    """An object that an evaluation may fill, as it is now; anything else as it is."""
    if not hasattr(leaf, "__dict__") or callable(leaf) or isinstance(leaf, nn.Module):
        return leaf
    if isinstance(before, KeptObject) and before.is_like(leaf):
        return before
    try:
        return KeptObject(copy.deepcopy(leaf))
    except (TypeError, RuntimeError):  # what cannot be copied cannot be told from what it was, either
        return leaf


def _inside(value: Any, depth: int = 8) -> Iterator[Any]:
    """What an object holds, down to tensors and plain values."""
    if isinstance(value, Tensor) or depth == 0:
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _inside(part, depth - 1)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _inside(part, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from _inside(vars(value), depth - 1)
    else:
        yield value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_numbers(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def _leaves(call: Call) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves((call.args, call.kwargs))
    return leaves


def _filled(call: Call, tensor_of: Callable[[Kept], Tensor], object_of: Callable[[KeptObject], Any]) -> Call:
    """A call with its tensors and objects in place of what is kept of them."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Kept):
            return tensor_of(leaf)
        return object_of(leaf) if isinstance(leaf, KeptObject) else leaf

    return Call(*pytree.tree_map(fill, (call.args, call.kwargs)))
