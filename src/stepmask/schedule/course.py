"""`Course`: how the steps of a run differ in what they evaluate, and where the run begins anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule
from stepmask.schedule.limits import MAX_BRANCHES, is_whole
from stepmask.text import told

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Course:
    """How the steps of a run differ in what they evaluate; a plain one has steps that are all alike.

    Guidance that ends part-way leaves steps with fewer branches, or with a smaller batch. Where a branch comes back,
    where another network takes over, or where blocks answer in another shape than before, the run begins anew: every
    block is computed, and nothing is read from then on that was stored before.

    Args:
        present: Which branches each step evaluates, or which parts of its batch; empty = all at every step.
        parts: How many parts of the same size the batch of a call has at its fullest; 1 = branches are calls of their
            own.
        starts: Steps at which the run begins anew, besides the first.
    """

    present: tuple[tuple[int, ...], ...] = ()
    parts: int = 1
    starts: tuple[int, ...] = ()

    def validate(self, steps: int, branches: int) -> None:
        """Refuse what no run can be like.

        Args:
            steps: Of the run.
            branches: Calls of a step at its fullest.

        Raises:
            InvalidSchedule: A step has no branch, or one that there is not; a branch comes back where the run does not
                begin anew; batches have parts beside branches; or starts are no ascending steps after the first.
        """
        if not is_whole(self.parts, MAX_BRANCHES) or self.parts == 0 or (self.parts > 1 and branches > 1):
            raise _invalid(f"a batch of {told(self.parts)} parts in each of {branches} branches", "one of both")
        most = max(branches, self.parts)
        if len(self.present) not in (0, steps):
            raise _invalid(f"the branches of {len(self.present)} steps", f"those of all {steps} steps, or none")
        for step, present in enumerate(self.present):
            ascending = all(is_whole(branch, most - 1) for branch in present) and sorted({*present}) == [*present]
            if not present or not ascending:
                raise _invalid(f"the branches {told(present)} at step {step}", f"some of the {most}, in their order")
        seen = {*chain.from_iterable(self.present)}
        if self.present and len(seen) < most:
            raise _invalid(f"steps that evaluate {len(seen)} of {most} branches together", "each at some step")
        if not all(is_whole(step, steps - 1) and step for step in self.starts) or sorted({*self.starts}) != [
            *self.starts
        ]:
            raise _invalid(f"a run that begins anew at {told(self.starts)}", f"steps from 1 to {steps - 1}, ascending")
        for step in range(1, len(self.present)):
            if not {*self.present[step]} <= {*self.present[step - 1]} and step not in self.starts:
                raise _invalid(f"a branch that comes back at step {step}", "a run that begins anew there")

    def __str__(self) -> str:
        """In words: "part 0 and 1 at steps 0 to 3, part 1 at steps 4 to 7; begins anew at step 2"."""
        what = "part" if self.parts > 1 else "branch"
        told, first = [], 0
        for present, group in groupby(self.present):
            last = first + len(list(group)) - 1
            told.append(f"{what} {' and '.join(map(str, present))} at steps {first} to {last}")
            first = last + 1
        anew = f"begins anew at step {', '.join(map(str, self.starts))}" if self.starts else ""
        return "; ".join(filter(None, [", ".join(told), anew])) or "all steps alike"

    @property
    def begins(self) -> tuple[int, ...]:
        """All steps at which nothing is stored: the first, and those at which the run begins anew."""
        return (0, *self.starts)

    def at(self, step: int, branches: int) -> tuple[int, ...]:
        """Which branches a step evaluates, or which parts of its batch.

        Args:
            step: The step.
            branches: Calls of a step at its fullest.
        """
        return self.present[step] if self.present else tuple(range(max(branches, self.parts)))

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON values; nothing of a plain course."""
        plain: dict[str, Any] = {}
        if self.parts > 1:
            plain["parts"] = self.parts
        if self.present:
            plain["present"] = [list(present) for present in self.present]
        if self.starts:
            plain["starts"] = list(self.starts)
        return plain

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "Course":
        """From what `to_plain` gave, among other entries."""
        present, starts = data.get("present", []), data.get("starts", [])
        if not isinstance(present, list) or not isinstance(starts, list) or not all(map(_is_list, present)):
            raise TypeError(f"{told(present)} and {told(starts)} where lists of branches and of steps were expected")
        return cls(tuple(map(tuple, present)), data.get("parts", 1), tuple(starts))


def computed_before(rows: Bools, begins: Sequence[int]) -> npt.NDArray[np.int64]:
    """How often each block was computed before a step, since the run last began; shape (steps, blocks).

    Args:
        rows: (steps, blocks), true = compute.
        begins: Steps at which nothing is stored, ascending from 0.
    """
    ends = [*begins[1:], len(rows)]
    pieces = [rows[start:end] for start, end in zip(begins, ends, strict=True)]
    counts: list[npt.NDArray[np.int64]] = [np.cumsum(piece, axis=0) - piece for piece in pieces]
    return np.concatenate(counts)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _invalid(given: str, expected: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=given, expected=expected, advice="Take it from a recorded run: trajectory.sampler.course"
    )
