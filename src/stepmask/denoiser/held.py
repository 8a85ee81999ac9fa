"""What a run holds of a block's outputs: values that nobody else may change, and the proof that nobody did."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.batch import Batch
from stepmask.denoiser.modes import usable, without_inference_mode
from stepmask.denoiser.values import each, tensors
from stepmask.errors import RunError


@dataclass(frozen=True, slots=True)
class Held:
    """A stored value, with how often each of its tensors had been written to when it was stored.

    Args:
        value: As the store holds it.
        first: The first tensor in it, which is the only one of nearly every value.
        version: How often that had been written to.
        others: The other tensors in it, each with how often it had been written to.
        batch: What it was computed for.
    """

    value: Any
    first: Tensor
    version: int
    others: tuple[tuple[Tensor, int], ...]
    batch: Batch

    @classmethod
    def of(cls, value: Any, batch: Batch) -> "Held":
        """A value as it is now."""
        first, *others = tensors(value)
        return cls(value, first, first._version, tuple((other, other._version) for other in others), batch)

    @property
    def parts(self) -> list[Tensor]:
        """The tensors in it."""
        return [self.first, *(other for other, _ in self.others)]

    @property
    def bytes(self) -> int:
        """Its size."""
        return sum(part.nbytes for part in self.parts)

    def check(self, block: str) -> None:
        """Refuse a value that was written to since it was stored.

        Raises:
            RunError: It was.
        """
        is_changed = self.first._version != self.version
        if not is_changed and self.others:
            is_changed = any(other._version != version for other, version in self.others)
        if not is_changed:
            return
        raise RunError(
            given=f"a stored output of block {block!r} that was changed in place since",
            expected="outputs that stay as the block gave them, as they did when the denoiser was traced",
            advice="Look for code around the block that writes into what it answered (FreeU, an adapter, +=), and "
            "switch it off or let it make a new tensor",
        )


class Owner:
    """Makes what a block answers the run's own: it is copied where somebody else could write to it unseen.

    A block that answers in the same memory again and again (CUDA graphs, a preallocated buffer) never lets go of it. So
    the first output of a run is copied, and what became of its memory by the second tells whether all are.
    """

    def __init__(self) -> None:
        self.memory: weakref.ref[torch.UntypedStorage] | None = None  # of the first output
        self.lets_go: bool | None = None  # not known before the second output

    def own(self, value: Any) -> Any:
        """The value, or a copy that nobody else has."""
        parts = list(tensors(value))
        if self.lets_go is None and parts:
            self._watch(parts[0])
        if self.lets_go and not any(map(_is_part, parts)):
            return usable(value)
        return private_copy(value)

    def _watch(self, output: Tensor) -> None:
        """Learn from the memory of the first output whether the block lets go of it."""
        if self.memory is None:
            self.memory = weakref.ref(output.untyped_storage())
        else:
            self.lets_go = self.memory() is None


def private_copy(value: Any) -> Any:
    """A copy whose writes torch counts, as it does not for what is made in inference mode."""
    with without_inference_mode():
        return each(torch.clone, value)


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a part of more memory, which would be kept alive with it."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes
