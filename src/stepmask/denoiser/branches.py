"""`BranchOrder`: notices a run that evaluates the branches of a step in another order than at its first step."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.errors import RunError


class BranchOrder:
    """Knows the branches of a run by what each of them was given at the first step: a prompt, a flag, nothing.

    Stored values are kept by the order of evaluations, so a run that changes it would be answered with those of
    another prompt. Tensors are told by the memory that they lie in: to compare numbers is to wait for the device. So
    prompts that a loop makes anew for each evaluation are not told apart.
    """

    def __init__(self) -> None:
        self.first: list[list[Any]] = []  # of each branch, what the leaves of its arguments were told by at step 0

    def check(self, step: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the next evaluation.

        Args:
            step: The step.
            branch: Which of its evaluations this is.
            args: What the denoiser is given.
            kwargs: What it is given by name.

        Raises:
            RunError: Another branch was given one of them at the first step, and this one was not.
        """
        given = list(map(_told_by, pytree.tree_leaves((args, kwargs))))
        if step == 0:
            self.first = [*self.first[:branch], given]
            return
        for other, first in enumerate(self.first):
            if other != branch and _is_told(given, by=first, apart=self.first[branch]):
                raise RunError(
                    given=f"evaluations in changing order: evaluation {branch} of step {step} is given what evaluation "
                    f"{other} of the first step was",
                    expected="one order at every step, for stored values are kept by it",
                    advice="Evaluate the denoiser for the same prompt first at every step",
                )


def _told_by(leaf: Any) -> Any:
    """What an argument is known again by; `None` for numbers, which may change from step to step."""
    if isinstance(leaf, Tensor):
        return weakref.ref(leaf.untyped_storage()), leaf.storage_offset(), leaf.shape
    return (leaf,) if isinstance(leaf, str | bool | None) else None


def _is_told(given: Iterable[Any], *, by: Iterable[Any], apart: Iterable[Any]) -> bool:
    """Whether an argument is one that tells a branch, and does not tell the other."""
    return any(
        now is not None and now == first and now != own for now, first, own in zip(given, by, apart, strict=False)
    )
