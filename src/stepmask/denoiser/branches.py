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
        self.step = -1
        self.first: list[list[Any]] = []  # of each branch, what its arguments were told by at the first whole step
        self.now: dict[int, list[Any]] = {}  # the same, of the present step so far

    def check(self, step: int, branch: int, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the next evaluation; the last one of a step shows whether their order has changed.

        Args:
            step: The step.
            branch: Which of its evaluations this is.
            count: How many the step has: fewer than there are branches where guidance has ended.
            args: What the denoiser is given.
            kwargs: What it is given by name.

        Raises:
            RunError: It has: an argument has the values of the first step, in another order.
        """
        if self.branches == 1:
            return
        if step != self.step or branch in self.now:
            self.now = {}
            self.step = step
        self.now[branch] = list(map(_told_by, pytree.tree_leaves((args, kwargs))))
        if step == 0:
            self.first = []  # of another run
        if count < self.branches:
            self._check_alone(step, branch)
        elif len(self.now) == count and self.first:
            self._check_whole(step)
        elif len(self.now) == count:
            self.first = [self.now[other] for other in range(self.branches)]

    def _check_whole(self, step: int) -> None:
        """Refuse a whole step whose branches are given what others were at the first."""
        told = [self.now[branch] for branch in range(self.branches)]
        for first, now in zip(zip(*self.first, strict=False), zip(*told, strict=False), strict=False):
            moved = [place for place, one in enumerate(now) if one != first[place]]
            if moved and all(first.count(one) == now.count(one) for one in now):
                raise _moved(moved[0], first.index(now[moved[0]]), step)

    def _check_alone(self, step: int, branch: int) -> None:
        """Refuse an evaluation that is given what another branch was, at a step that may have no others."""
        for first, now in zip(zip(*self.first, strict=False), self.now[branch], strict=False):
            others = [place for place, one in enumerate(first) if one == now]
            if others and branch not in others and len({*map(repr, first)}) == self.branches:
                raise _moved(branch, others[0], step)


def _moved(branch: int, other: int, step: int) -> RunError:
    return order_error(
        f"evaluations in changing order: evaluation {branch} of step {step} is given what evaluation {other} of the "
        "first step was"
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
