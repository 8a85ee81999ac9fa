"""The course of a recorded run: which branches, or parts of a batch, each step evaluates, and where it begins anew.

Guidance that ends part-way leaves calls that a step had before, or a part of the batch. Which one stays is told by what
the denoiser is given: the prompts of a step with all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.batch import Batch, rows_of
from stepmask.denoiser.values import same_arguments, tensors
from stepmask.errors import RunError
from stepmask.schedule.course import Course

Given = Mapping[str, Any]
"""The arguments of an evaluation by their names."""

Present = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Evaluated:
    """What a recorded run evaluated.

    Args:
        given: The arguments of each evaluation.
        outputs: What it answered.
        networks: Which of the pipeline's networks it was.
        counts: How many evaluations each step has.
    """

    given: Sequence[Given]
    outputs: Sequence[Any]
    networks: Sequence[int]
    counts: Sequence[int]

    @property
    def branches(self) -> int:
        """Evaluations of the fullest step."""
        return max(self.counts)

    def steps(self) -> list[list[int]]:
        """The evaluations of each step, by index."""
        ends = list(accumulate(self.counts))
        return [list(range(end - count, end)) for end, count in zip(ends, self.counts, strict=True)]


def course_of(run: Evaluated) -> Course:
    """How the steps of a run differ in what they evaluate.

    Raises:
        RunError: It cannot be told which branch, or which part of the batch, a step evaluates; or most steps are unlike
            the ones before them.
    """
    _check_rows(run)
    parts, present = _parts(run) if run.branches == 1 else (1, _branches(run))
    most = max(run.branches, parts)
    whole = tuple(range(most))
    starts = {step for step in range(1, len(present)) if not {*present[step]} <= {*present[step - 1]}}
    starts |= _unlike(run, present)
    if len(starts) > max(2, len(run.counts) // 2):
        raise RunError(
            given=f"a run of {len(run.counts)} steps, {len(starts)} of which are called in another form than the one "
            "before: with tensors of other shapes, another mode, or by another network",
            expected="steps that are mostly alike, for what is stored must fit later ones",
            advice="Pad what changes its length, and keep guidance and caches as they are for most of the run",
        )
    differs = any(step != whole for step in present)
    return Course(present if differs else (), parts, tuple(sorted(starts)))


def _check_rows(run: Evaluated) -> None:
    """Refuse a run with several evaluations a step, the batch of one of which changes.

    Raises:
        RunError: It does.
    """
    rows: dict[int, set[int]] = {}
    for evaluations in run.steps():
        if len(evaluations) == run.branches > 1:
            for branch, index in enumerate(evaluations):
                rows.setdefault(branch, set()).add(rows_of((), dict(run.given[index])))
    for branch, found in rows.items():
        if len(found) > 1:
            raise RunError(
                given=f"{run.branches} evaluations a step, and batches of {' and '.join(map(str, sorted(found)))} rows "
                f"in evaluation {branch} of them",
                expected="guidance in one batch, or in calls whose batches stay as they are",
                advice="Evaluate what ends part-way in a call of its own",
            )


def _branches(run: Evaluated) -> Present:
    """The branches that each step evaluates, where these are calls of their own."""
    steps = run.steps()
    full = next(evaluations for evaluations in steps if len(evaluations) == run.branches)
    units = [run.given[index] for index in full]
    return tuple(
        tuple(range(run.branches))
        if len(evaluations) == run.branches
        else _matched(units, [run.given[index] for index in evaluations], step)
        for step, evaluations in enumerate(steps)
    )


def _parts(run: Evaluated) -> tuple[int, Present]:
    """How many parts the batch has, and those that each step evaluates."""
    rows = [rows_of((), dict(given)) for given in run.given]
    if len(set(rows)) == 1:
        return 1, tuple((0,) for _ in rows)
    unit = gcd(*rows)
    parts = max(rows) // unit
    full = run.given[rows.index(max(rows))]
    units = _chunks(full, max(rows), parts)
    present = tuple(
        tuple(range(parts)) if count == max(rows) else _matched(units, _chunks(given, count, count // unit), step)
        for step, (given, count) in enumerate(zip(run.given, rows, strict=True))
    )
    return parts, present


def _chunks(given: Given, rows: int, count: int) -> list[dict[str, Any]]:
    """The arguments of a call as those of calls with a part of its batch each."""
    return [{name: _chunk(value, rows, count, place) for name, value in given.items()} for place in range(count)]


def _chunk(value: Any, rows: int, count: int, place: int) -> Any:
    if isinstance(value, list) and len(value) == rows:
        size = rows // count
        return value[place * size : (place + 1) * size]
    whole = Batch(rows, tuple(range(count)))
    return Batch(rows // count, (place,)).part_of(value, whole)


def _matched(full: Sequence[Given], here: Sequence[Given], step: int) -> tuple[int, ...]:
    """Which of the branches, or parts, of a full step those of another step are.

    Raises:
        RunError: Their arguments do not tell.
    """
    names = [name for name in full[0] if all(name in given for given in here)]
    found = [[[same_arguments(one[name], other[name]) for other in full] for one in here] for name in names]
    telling = [matches for matches in found if all(map(any, matches))]  # latents are no branch's of another step
    chosen: list[int] = []
    for place in range(len(here)):
        fits = [other for other in range(len(full)) if all(matches[place][other] for matches in telling)]
        fits = [other for other in fits if not chosen or other > chosen[-1]]
        if not telling or len(fits) != 1:
            raise RunError(
                given=f"step {step}, which evaluates {len(here)} of {len(full)} branches of guidance, and no argument "
                "that tells which" + (": they are given the same" if len(fits) > 1 else ""),
                expected="the prompts, labels or flags that these branches have at other steps, in their order",
                advice="Give each branch its own prompt at every step, or keep guidance on for the whole run",
            )
        chosen.append(fits[0])
    return tuple(chosen)


def _unlike(run: Evaluated, present: Present) -> set[int]:
    """Steps that are called in another form than the ones before them, or by another network."""
    last: dict[int, int] = {}
    starts = set()
    for step, evaluations in enumerate(run.steps()):
        branches = present[step] if run.branches > 1 else (0,)
        for branch, now in zip(branches, evaluations, strict=True):
            before = last.get(branch)
            if before is not None and _form_differs(run, before, now):
                starts.add(step)
            last[branch] = now
    return starts


def _form_differs(run: Evaluated, before: int, now: int) -> bool:
    """Whether an evaluation is in another form than one before: its network, a mode, or shapes but for the batch."""
    if run.networks[before] != run.networks[now]:
        return True
    one = {**run.given[before], "": run.outputs[before]}
    other = {**run.given[now], "": run.outputs[now]}
    rows = [rows_of((), dict(run.given[index])) for index in (before, now)]
    for name in {*one, *other}:
        if _mode(one.get(name)) != _mode(other.get(name)):
            return True
        first, second = _shapes(one.get(name), rows[0]), _shapes(other.get(name), rows[1])
        if first and second and first != second:  # what is given at some steps only has no other shape
            return True
    return False


def _mode(value: Any) -> Any:
    """What of an argument says how it is evaluated: text, and which object (a cache of keys and values) comes along."""
    if isinstance(value, str):
        return value
    is_plain = value is None or isinstance(value, bool | int | float | complex | Tensor)
    leaves = pytree.tree_leaves(value)
    return None if is_plain or len(leaves) != 1 or leaves[0] is not value else type(value)


def _shapes(value: Any, rows: int) -> Any:
    """The shapes of the tensors in a value but for the rows of its batch."""
    found = [tuple(tensor.shape) for tensor in tensors(value)]
    return [(shape[0] // rows, *shape[1:]) if shape and not shape[0] % rows else shape for shape in found]
