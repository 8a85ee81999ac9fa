"""Whether a run evaluates its branches in the order of its first step, and goes on with the part that it should."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.batch import Batch
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


class PartOrder:
    """Notices a run whose batch loses another part than the recorded run's did, where guidance ends.

    It is told by memory: prompts of which a part goes on are mostly a view of those before, or some of a list of them.
    Those that a loop makes anew are not told apart.
    """

    def __init__(self) -> None:
        self.batch = Batch(0, ())
        self.given: list[tuple[Any, ...]] = []  # of each argument at the step before, where its rows lie

    def check(self, step: int, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the next evaluation.

        Args:
            step: The step.
            batch: Its batch, as the schedule has it.
            args: What the denoiser is given.
            kwargs: What it is given by name.

        Raises:
            RunError: They are those of another part.
        """
        given = [_rows(value, batch.rows) for value in (*args, *kwargs.values())]
        before, self.given = self.given, given
        whole, self.batch = self.batch, batch
        if step == 0 or len(given) != len(before) or batch.present == whole.present:
            return
        size = whole.rows // max(len(whole.present), 1)
        for old, new in zip(before, given, strict=True):
            is_told = len(old) == whole.rows and all(old.index(row) == place for place, row in enumerate(old))
            lost = is_told and len(new) == batch.rows < whole.rows and all(row in old for row in new)
            places = [whole.present[old.index(row) // size] for row in new] if lost else []
            if lost and sorted({*places}) != [*batch.present]:
                raise RunError(
                    given=f"a batch that goes on with part {' and '.join(map(str, sorted({*places})))} at step {step}",
                    expected=f"part {' and '.join(map(str, batch.present))}, as in the run that the schedule is for",
                    advice="End guidance as in the recorded run, or record again",
                )


def _rows(value: Any, rows: int) -> tuple[Any, ...]:
    """Where each row of an argument lies; nothing for what has no rows."""
    if isinstance(value, list) and len(value) == rows:
        return tuple(map(_told_by, value))
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        memory, step = weakref.ref(value.untyped_storage()), value.stride(0)
        return tuple((memory, value.storage_offset() + row * step) for row in range(rows))
    return ()


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
