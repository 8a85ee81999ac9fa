"""Which evaluations of a run are one step, and whether all steps are alike: what a recorded run must be like."""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from math import gcd
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.branches import order_error
from stepmask.denoiser.values import same_numbers, tensors
from stepmask.errors import RunError
from stepmask.schedule.fingerprint import SamplerFingerprint

EVEN = "the same number of evaluations at every step"


def branches_counted(done: Sequence[int], total: int) -> int:
    """Evaluations per step of a run with a scheduler.

    Args:
        done: How many evaluations there had been when each step was taken.
        total: How many there were in the end.

    Raises:
        RunError: They are not the same at every step.
    """
    counts = [later - before for before, later in pairwise([0, *done])]
    after = total - done[-1]
    if len(set(counts)) > 1 or not counts[0] or after:
        told = _of_each_step(counts) + (f", and {after} after the last step" if after else "")
        raise _uneven(f"{total} evaluations of the denoiser in {len(counts)} sampling steps: {told}")
    return counts[0]


def branches_of_a_loop(timesteps: Sequence[float], depends: Callable[[int, int], bool]) -> int:
    """Evaluations per step of a loop without a scheduler: those at one timestep that do not depend on each other.

    A second evaluation at the same timestep is a branch (guidance in two calls), unless it is given what became of the
    first one's answer: then it is a step of its own (Heun's method, a corrector).

    Args:
        timesteps: Of each evaluation.
        depends: Whether an evaluation is given something that depends on the answers from another one on, by index.

    Raises:
        RunError: They are not the same at every step.
    """
    counts = [len(list(group)) for _, group in groupby(timesteps)]
    if len(counts) == 1 or max(counts) == 1:
        return 1
    starts = [0, *accumulate(counts)]
    several = next(place for place, count in enumerate(counts) if count > 1)
    if depends(starts[several], starts[several] + 1):
        return 1
    if len(set(counts)) == 1:
        return counts[0]
    together = gcd(*counts)
    longer = next(place for place, count in enumerate(counts) if count > together)
    if together > 1 and depends(starts[longer], starts[longer] + together):
        return together
    raise _uneven(f"{len(timesteps)} evaluations at {len(counts)} timesteps: {_of_each_step(counts)}")


def check_branches(branches: int, timesteps: Sequence[float]) -> None:
    """Refuse a number of branches that a loop cannot have.

    Raises:
        RunError: Its evaluations do not divide into steps of as many, at one timestep each.
    """
    if branches < 1 or len(timesteps) % branches:
        raise RunError(
            given=f"branches={branches} for {len(timesteps)} evaluations",
            expected="a number that divides them into steps",
            advice="Leave branches out, or evaluate the denoiser equally often at every step",
        )
    for start in range(0, len(timesteps), branches):
        step = timesteps[start : start + branches]
        if len(set(step)) > 1:
            raise RunError(
                given=f"branches={branches}, and timesteps {', '.join(f'{t:g}' for t in step)} at step "
                f"{start // branches}",
                expected="one timestep for all evaluations of a step",
                advice="Leave branches out: evaluations at several timesteps are steps of their own",
            )


def check_told(told: int | None, counted: int) -> None:
    """Refuse a number of branches that is not the one that was counted.

    Raises:
        RunError: It is not.
    """
    if told is not None and told != counted:
        raise RunError(
            given=f"branches={told}, and {counted} evaluations at every step",
            expected=f"branches={counted}",
            advice="Leave branches out: a pipeline's are counted",
        )


def check_one_pass(sets: Sequence[int], stepped: Sequence[float], sampler: SamplerFingerprint) -> None:
    """Refuse a run that goes through its sampler's steps several times, or in another order.

    Args:
        sets: How many steps had been taken when the timesteps were set, each time.
        stepped: The timestep of each step.
        sampler: As it was when they were last set, from the first timestep of the run on.

    Raises:
        RunError: It does.
    """
    again = sorted({taken for taken in sets if 0 < taken < len(stepped)})
    if not again:
        again = [step for step, timestep in enumerate(stepped) if step and not sampler.is_at(step, timestep)]
        if again and not SamplerFingerprint("", (stepped[0],)).is_at(0, stepped[again[0]]):
            raise RunError(
                given=f"timestep {stepped[again[0]]:g} at step {again[0]}",
                expected="the timesteps that the scheduler has set, one after the other",
                advice="Hand the scheduler's own timesteps to its step(), in their order",
            )
    if again:
        raise RunError(
            given=f"a call that samples in several passes: after {again[0]} of its {len(stepped)} steps the sampler "
            "begins anew (FreeInit, videos in sections)",
            expected="one pass over the sampler's timesteps",
            advice="Record a call of one pass: a schedule that is learned from it works for each pass of the others",
        )


def check_shapes(calls: Sequence[dict[str, Any]], outputs: Sequence[Any], branches: int) -> None:
    """Refuse a run whose denoiser is given or answers tensors of other shapes at some steps.

    Args:
        calls: The arguments of each evaluation, by a name for each.
        outputs: What it answered.
        branches: Evaluations per step.

    Raises:
        RunError: Shapes change.
    """
    for now, (call, output) in enumerate(zip(calls, outputs, strict=True)):
        branch, step = now % branches, now // branches
        for name, value in call.items():
            _check_shape(f"{name!r}", step, calls[branch].get(name), value)
        _check_shape("an output", step, outputs[branch], output)


def _check_shape(what: str, step: int, first: Any, now: Any) -> None:
    before, after = _shapes(first), _shapes(now)
    if before and after and before != after:  # what is given at some steps only has no other shape
        raise RunError(
            given=f"{what} of shape {_told(after)} at step {step}",
            expected=f"the shape that it has at step 0, {_told(before)}, batch size included",
            advice="Keep guidance on or off for the whole run, and keys and values of a prompt or picture uncached",
        )


def check_order(calls: Sequence[dict[str, Any]], branches: int) -> None:
    """Refuse a run that evaluates its branches in another order at some steps: each branch has a store of its own.

    It is seen by an argument that has the same values at every step, one for each branch (prompts, labels, flags).

    Args:
        calls: The arguments of each evaluation, by a name for each.
        branches: Evaluations per step.

    Raises:
        RunError: The order changes.
    """
    for name in calls[0] if branches > 1 else ():
        orders = _orders([call.get(name) for call in calls], branches)
        for step, order in enumerate(orders):
            if order != orders[0]:
                moved = next(branch for branch in range(branches) if order[branch] != orders[0][branch])
                raise order_error(
                    f"{branches} evaluations a step in changing order: what evaluation {order[moved]} of step 0 "
                    f"is given as {name!r}, evaluation {moved} of step {step} is given"
                )


def _orders(values: Sequence[Any], branches: int) -> list[list[int]]:
    """For each step, whose value of step 0 each branch has; empty where the steps have not the same values."""
    first = values[:branches]
    orders: list[list[int]] = []
    for start in range(0, len(values), branches):
        found = [_places(value, first) for value in values[start : start + branches]]
        if not all(found):
            return []
        orders.append([places[0] for places in found])
        if sorted(orders[-1]) != sorted(orders[0]):
            return []
    return orders


def _places(value: Any, among: Sequence[Any]) -> list[int]:
    """Where a value stands among others."""
    return [place for place, other in enumerate(among) if _same(value, other)]


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same: tensors by their numbers, anything else as it says itself."""
    leaves, form = pytree.tree_flatten(one)
    others, other_form = pytree.tree_flatten(other)
    return form == other_form and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or same_numbers(one, other)
    plain = str | int | float | bool | None
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors(value)]


def _told(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))


def _of_each_step(counts: Sequence[int]) -> str:
    """Which steps had how many evaluations, neighbours with the same number together."""
    parts, step = [], 0
    for count, group in groupby(counts):
        last = step + len(list(group)) - 1
        where = f"step {step}" if last == step else f"steps {step} to {last}"
        parts.append(f"{count} at {where}")
        step = last + 1
    shown = parts if len(parts) <= 6 else [*parts[:5], "and so on"]
    return ", ".join(shown)


def _uneven(given: str) -> RunError:
    return RunError(given=given, expected=EVEN, advice="Keep guidance on or off for the whole run")
