"""What a run holds of a block's outputs: values that nobody else may change, and the proof that nobody did."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.modes import usable, without_inference_mode
from stepmask.denoiser.values import each, tensors
from stepmask.errors import RunError


@dataclass(frozen=True, slots=True)
class Held:
    """A stored value, with how often each of its tensors had been written to when it was stored.

    Args:
        value: As the store holds it.
        parts: The tensors in it.
        versions: How often each of them had been written to.
        bytes: Its size.
    """

    value: Any
    parts: tuple[Tensor, ...]
    versions: list[int]
    bytes: int

    @classmethod
    def of(cls, value: Any) -> "Held":
        """A value as it is now."""
        parts = tuple(tensors(value))
        return cls(value, parts, [part._version for part in parts], sum(part.nbytes for part in parts))

    def check(self, block: str) -> None:
        """Refuse a value that was written to since it was stored.

        Raises:
            RunError: It was.
        """
        if [part._version for part in self.parts] != self.versions:
            raise RunError(
                given=f"a stored output of block {block!r} that was changed in place since",
                expected="outputs that stay as the block gave them, as they did when the denoiser was traced",
                advice="Look for code around the block that writes into what it answered (FreeU, an adapter, +=), "
                "and switch it off or let it make a new tensor",
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
        return copied(value)

    def _watch(self, output: Tensor) -> None:
        """Learn from the memory of the first output whether the block lets go of it."""
        if self.memory is None:
            self.memory = weakref.ref(output.untyped_storage())
        else:
            self.lets_go = self.memory() is None


def copied(value: Any) -> Any:
    """A copy whose writes torch counts, as it does not for what is made in inference mode."""
    with without_inference_mode():
        return each(torch.clone, value)


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a part of more memory, which would be kept alive with it."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes
