"""`BranchOrder`: notices a run that evaluates the branches of a step in another order than at its first step."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.errors import RunError


class BranchOrder:
    """Knows the branches of a run by what each of them was given at the first step: a prompt, a flag, nothing.

    Stored values are kept by the order of evaluations, so a run that changes it would be answered with those of
    another prompt. Tensors are told by the memory that they lie in: to compare numbers is to wait for the device. So
    labels that are numbers, and prompts that a loop makes anew for each evaluation, are not told apart.

    Args:
        branches: Evaluations per step.
    """

    def __init__(self, branches: int) -> None:
        self.branches = branches
        self.first: list[list[Any]] = []  # of each branch, what the leaves of its arguments were told by at step 0
        self.now: list[list[Any]] = []  # the same, of the present step so far

    def check(self, step: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the next evaluation; the last one of a step shows whether their order has changed.

        Args:
            step: The step.
            branch: Which of its evaluations this is.
            args: What the denoiser is given.
            kwargs: What it is given by name.

        Raises:
            RunError: It has: an argument has the values of the first step, in another order.
        """
        if self.branches == 1:
            return
        self.now = [*self.now[:branch], list(map(_told_by, pytree.tree_leaves((args, kwargs))))]
        if step == 0:
            self.first = self.now
            return
        if branch < self.branches - 1:
            return
        for first, now in zip(zip(*self.first, strict=False), zip(*self.now, strict=False), strict=False):
            moved = [place for place, one in enumerate(now) if one != first[place]]
            if moved and all(first.count(one) == now.count(one) for one in now):
                raise order_error(
                    f"evaluations in changing order: evaluation {moved[0]} of step {step} is given what evaluation "
                    f"{first.index(now[moved[0]])} of the first step was"
                )


def order_error(given: str) -> RunError:
    """The error of a run whose branches change their order, recorded or masked."""
    return RunError(
        given=given,
        expected="one order at every step, for stored values are kept by it",
        advice="Evaluate the denoiser for the same prompt first at every step",
    )


def _told_by(leaf: Any) -> Any:
    """What an argument is known again by; nothing for numbers, which may change from step to step."""
    if isinstance(leaf, Tensor):
        return weakref.ref(leaf.untyped_storage()), leaf.storage_offset(), leaf.shape
    return leaf if isinstance(leaf, str | bool | None) else "a number"
