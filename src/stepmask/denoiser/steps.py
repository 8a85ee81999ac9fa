"""Which evaluations of a run are one step, and whether all steps are alike: what a recorded run must be like."""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from math import gcd
from typing import Any

from stepmask.denoiser.branches import order_error
from stepmask.denoiser.values import same_arguments
from stepmask.errors import RunError
from stepmask.schedule.fingerprint import SamplerFingerprint


def evaluations_counted(done: Sequence[int], total: int) -> list[int]:
    """Evaluations of each step of a run with a scheduler.

    Args:
        done: How many evaluations there had been when each step was taken.
        total: How many there were in the end.

    Raises:
        RunError: A step has none, or there are some after the last step.
    """
    counts = [later - before for before, later in pairwise([0, *done])]
    after = total - done[-1]
    if not all(counts) or after:
        told = _of_each_step(counts) + (f", and {after} after the last step" if after else "")
        raise RunError(
            given=f"{total} evaluations of the denoiser in {len(counts)} sampling steps: {told}",
            expected="at least one evaluation in front of every step of the scheduler, and none after the last",
            advice="Step the scheduler once for every evaluation, or every few that belong together",
        )
    return counts


def evaluations_of_a_loop(timesteps: Sequence[float], depends: Callable[[int, int], bool]) -> list[int]:
    """Evaluations of each step of a loop without a scheduler: those at one timestep that do not depend on each other.

    A second evaluation at the same timestep is a branch (guidance in two calls), unless it is given what became of the
    first one's answer: then it is a step of its own (Heun's method, a corrector).

    Args:
        timesteps: Of each evaluation.
        depends: Whether an evaluation is given something that depends on the answers from another one on, by index.
    """
    alone = [1] * len(timesteps)
    counts = [len(list(group)) for _, group in groupby(timesteps)]
    if len(counts) == 1 or max(counts) == 1:
        return alone
    starts = [0, *accumulate(counts)]
    several = next(place for place, count in enumerate(counts) if count > 1)
    if depends(starts[several], starts[several] + 1):
        return alone
    together = gcd(*counts)
    longer = next((place for place, count in enumerate(counts) if count > together), None)
    if together > 1 and longer is not None and depends(starts[longer], starts[longer] + together):
        return [together] * (len(timesteps) // together)
    return counts


def check_divides(branches: int, evaluations: int) -> None:
    """Refuse a number of branches into which a loop's evaluations cannot be divided.

    Raises:
        RunError: They cannot.
    """
    if branches < 1 or evaluations % branches:
        raise RunError(
            given=f"branches={branches} for {evaluations} evaluations",
            expected="a number that divides them into steps",
            advice="Leave branches out, or evaluate the denoiser equally often at every step",
        )


def check_same_timestep(timesteps: Sequence[float], counts: Sequence[int]) -> None:
    """Refuse steps of a loop whose evaluations are at several timesteps.

    Args:
        timesteps: Of each evaluation.
        counts: How many evaluations each step has.

    Raises:
        RunError: There is one.
    """
    start = 0
    for place, count in enumerate(counts):
        step = timesteps[start : start + count]
        start += count
        if len(set(step)) > 1:
            raise RunError(
                given=f"branches={count}, and timesteps {', '.join(f'{t:g}' for t in step)} at step {place}",
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
            given=f"branches={told}, and {counted} evaluations at the fullest step",
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


def check_order(calls: Sequence[dict[str, Any]], branches: int, steps: Sequence[int]) -> None:
    """Refuse a run that evaluates its branches in another order at some steps: each branch has a store of its own.

    It is seen by an argument that has the same values at every step, one for each branch (prompts, labels, flags).

    Args:
        calls: The arguments of each evaluation, by a name for each, of steps with all branches.
        branches: Evaluations per step.
        steps: Which steps they are of.

    Raises:
        RunError: The order changes.
    """
    for name in calls[0] if branches > 1 else ():
        orders = _orders([call.get(name) for call in calls], branches)
        for step, order in zip(steps, orders, strict=False):
            if order != orders[0]:
                moved = next(branch for branch in range(branches) if order[branch] != orders[0][branch])
                raise order_error(
                    f"{branches} evaluations a step in changing order: what evaluation {order[moved]} of step "
                    f"{steps[0]} is given as {name!r}, evaluation {moved} of step {step} is given"
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
    return [place for place, other in enumerate(among) if same_arguments(value, other)]


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
