"""Rival schedules as data in the same table: what every learned table must beat at equal MACs."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidBudget, InvalidSchedule
from stepmask.schedule.budget import Budget, too_small_a_share, too_small_a_store
from stepmask.schedule.course import computed_before
from stepmask.schedule.forecasts import WINDOW
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.limits import is_number
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule
from stepmask.text import told


def fixed_interval(reference: MaskSchedule, budget: float | Budget, *, order: int = 0) -> MaskSchedule:
    """All blocks computed at evenly spaced steps and forecast by Taylor's formula in between.

    Order 0 is plain reuse (FORA, arXiv 2407.01425), order 1 and 2 are TaylorSeer (arXiv 2503.06923). The denoiser's
    own glue (embeddings, final layer) is computed at every step and comes on top of the budget.

    Args:
        reference: Any table of the denoiser and sampler; only its fingerprints are used.
        budget: Its share, of whatever, is that of the steps that are computed, rounded down.
        order: Of the forecast, 0 to 2.

    Raises:
        InvalidBudget: Not even one computed step fits, or the store is too small for the table.
        InvalidSchedule: The order is not 0, 1 or 2.
    """
    return _spread(reference, Budget.of(budget), order, skip_denoiser=False)


def whole_step(reference: MaskSchedule, budget: float | Budget, *, order: int = 0) -> MaskSchedule:
    """The denoiser evaluated at evenly spaced steps, its own output forecast in between.

    Args and errors as in `fixed_interval`.
    """
    return _spread(reference, Budget.of(budget), order, skip_denoiser=True)


def all_reused(reference: MaskSchedule, *, order: int = 0) -> MaskSchedule:
    """All blocks computed at the first steps, as many as the forecast reads, and then only the denoiser's glue.

    It shows what a step takes that reuses all blocks.

    Args:
        reference: Any table of the denoiser and sampler; only its graph and fingerprints are used.
        order: Of the forecast, 0 to 2.

    Raises:
        InvalidSchedule: The order is not 0, 1 or 2.
    """
    said = {"table": f"all reused, {answer(order)}"}
    computed = computed_before(np.ones_like(reference.rows), reference.sampler.begins)
    rows = computed <= order
    rows[:, -1] = True
    return reference.with_taylor(rows, order, provenance=said)


def deepcache(reference: MaskSchedule, interval: float, *, branch: int = 0, order: int = 0) -> MaskSchedule:
    """A U-Net computed whole at every `interval`-th step, and in between only near its output (arXiv 2312.00858).

    In between, the last `branch + 1` layers of the way up are computed, with what they read over their skips; what
    they read from below is forecast. A layer is a resnet and what follows it. Plain reuse at the branches that the
    DeepCache package counts likewise (three layers a block) is bitwise its output.

    Args:
        reference: Any table of the denoiser and sampler; only its graph and fingerprints are used.
        interval: Steps between two whole evaluations, at least 1; 2.5 means after two and three steps in turn.
        branch: Where the way up is entered: 0 = at its last layer.
        order: Of the forecast, 0 to 2.

    Raises:
        InvalidSchedule: The denoiser is no U-Net, it has no such branch, or the interval or the order is out of range.
    """
    said = answer(order)
    entries = branches(reference.graph)
    if branch not in range(len(entries)) or not is_number(interval) or interval < 1:
        raise InvalidSchedule(
            given=f"branch {told(branch)} and interval {told(interval)} for {reference.denoiser.class_name}",
            expected=f"one of its {len(entries)} branches, counted from 0, and an interval of at least 1",
            advice="Only U-Nets have branches: layers on the way up, counted from the output",
        )
    rows = np.tile(_shallow(reference.graph, entries[branch]), (reference.steps, 1))
    whole = np.arange(math.ceil(reference.steps / interval - 1e-9)) * interval
    rows[np.ceil(whole - 1e-9).astype(int)] = True
    provenance = {"table": f"DeepCache, interval {interval:g}, branch {branch}, {said}"}
    return reference.with_taylor(rows, order, provenance=provenance)


def deepcache_within(
    reference: MaskSchedule, budget: float | Budget, *, branch: int = 0, order: int = 0
) -> MaskSchedule:
    """DeepCache's table at a branch with the most whole evaluations that a budget's share covers, evenly spread.

    Args:
        reference: As in `deepcache`.
        budget: Of the whole run.
        branch: As in `deepcache`.
        order: As in `deepcache`.

    Raises:
        InvalidBudget: Not even one whole evaluation is covered, or the store is too small for the table.
        InvalidSchedule: As `deepcache`.
        NotTimed: The budget is in time, and the blocks were not timed.
    """
    budget = Budget.of(budget)
    for count in range(reference.steps, 0, -1):
        table = deepcache(reference, reference.steps / count, branch=branch, order=order)
        if budget.covers(spent := budget.spent(plan := lower(table))):
            if not budget.stores(plan):
                raise too_small_a_store(budget, plan.peak_bytes)
            return table
    raise too_small_a_share(budget, spent, why=f"one whole evaluation at branch {branch}", instead="enter nearer to 0")


def branches(graph: BlockGraph) -> list[int]:
    """Columns at which a U-Net's way up can be entered, from the output down; none of other denoisers."""
    return [column for column, name in enumerate(graph.names) if fnmatchcase(name, "up_blocks.*.resnets.*")][::-1]


def _shallow(graph: BlockGraph, first: int) -> npt.NDArray[np.bool_]:
    """A U-Net's row that computes from a column on, and what it reads of the way down."""
    down = np.array([name.startswith("down_blocks.") for name in graph.names])
    row: npt.NDArray[np.bool_] = np.arange(len(graph)) >= first
    for column in reversed(range(len(graph))):
        if row[column]:
            row |= graph.reads[column] & down
    return row


def _spread(reference: MaskSchedule, budget: Budget, order: int, *, skip_denoiser: bool) -> MaskSchedule:
    said = answer(order)
    count = math.floor(budget.share * reference.steps + 1e-9)
    kind = "whole-step" if skip_denoiser else "fixed-interval"
    begins = reference.sampler.begins
    if count < len(begins):
        raise InvalidBudget(
            given=f"{budget} for a {kind} table over {reference.steps} steps",
            expected=f"at least {len(begins) / reference.steps:g}, the share of the steps at which a run begins",
            advice="Spend more, or sample with more steps",
        )
    rows = np.zeros(reference.rows.shape, dtype=bool)
    rows[_spread_steps(reference.steps, count, begins)] = True
    if not skip_denoiser:
        rows[:, -1] = True
    table = reference.with_taylor(rows, order, provenance={"table": f"{kind}, {said}"})
    if not budget.stores(plan := lower(table)):
        raise too_small_a_store(budget, plan.peak_bytes)
    return table


def answer(order: int) -> str:
    """What reused cells answer with, in words; refuses orders that there are not."""
    if order not in range(WINDOW):
        raise InvalidSchedule(
            given=f"order {order}", expected="0 (reuse), 1 or 2", advice="Choose one of these Taylor orders"
        )
    return "reuse" if order == 0 else f"Taylor {order}"


def _spread_steps(steps: int, count: int, begins: Sequence[int]) -> list[int]:
    """As many steps as are allowed, those at which a run begins among them, the others spread evenly over all."""
    for evenly in range(count, 0, -1):
        spread = sorted({*_even_steps(steps, evenly), *begins})
        if len(spread) <= count:
            return spread
    return sorted(begins)


def _even_steps(steps: int, count: int) -> list[int]:
    """`count` steps spread evenly over `steps`, beginning with step 0."""
    return [index * steps // count for index in range(count)]
