"""Where a learner may start: tables that fit a budget, in families by how they spend it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidBudget
from stepmask.learning.allocate import paths
from stepmask.learning.placement import Bools, Floats, Refit, later
from stepmask.learning.profile import Profile
from stepmask.learning.whole_steps import WholeSteps
from stepmask.schedule.baselines import answer, branches, deepcache_within, fixed_interval, whole_step
from stepmask.schedule.budget import Budget, too_small_a_store
from stepmask.schedule.forecasts import PLAIN
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

HANDICAP = 1.5
"""Of whole-step tables and refreshed intervals: training takes that many times less off their error than off that of an
interval, whose every block has weights at every step between whole evaluations (measured: docs/experiments.md)."""

PATHS = 3
"""Of the tables that a sweep proposes, how many are tried."""

FEWER = (1, 2)
"""How many whole evaluations a refreshed interval gives up for partial ones."""


@dataclass(frozen=True)
class Family:
    """Tables that spend a budget in the same way, by Taylor order and detail.

    Args:
        tables: At least one.
        handicap: How many times less than an interval's error training takes off theirs.
        uneven: Whether a sweep proposed where they compute. Training takes more off these than their errors tell.
        refit: The forecasts of other rows; `None` = Taylor's of a table's order.
    """

    tables: Sequence[MaskSchedule]
    handicap: float = 1.0
    uneven: bool = False
    refit: Refit | None = None

    @property
    def window(self) -> int:
        """How many stored values a forecast may read; fewer where the budget's store has no room for more."""
        return max(int(table.windows.max()) for table in self.tables)


def families(
    reference: MaskSchedule,
    budget: Budget,
    window: int,
    profile: Profile | None = None,
    outputs: WholeSteps | None = None,
) -> list[Family]:
    """Fixed intervals, whole steps, refreshed and filled intervals, shallow steps of U-Nets: those that fit a budget.

    Args:
        reference: Any table of the denoiser and sampler.
        budget: What may be spent.
        window: How many stored values a forecast may read.
        profile: Of a sweep: its uneven tables are a family, too.
        outputs: Of a sweep: whole steps that lie and are forecast as it tells are a family, too.

    Raises:
        InvalidBudget: Not even one computed step fits, or the store is too small for every table.
        NotTimed: The budget is in time, and the blocks were not timed.
    """
    most = int(whole_step(reference, budget.share).rows.any(axis=1).sum())  # raises if not even one step fits
    whole = _regular(whole_step, reference, budget, window, most)
    kinds = [
        Family(_regular(fixed_interval, reference, budget, window, most)),
        Family([*_filled(reference, budget, window, most)]),
        Family(whole, HANDICAP),
        Family([*_refreshed(reference, budget, window, most)], HANDICAP),
        Family([*_shallow(reference, budget, window)]),
        Family([*_uneven(profile, budget, window)] if profile else [], uneven=True),
        Family(
            [*_fitted(outputs, whole)] if outputs else [],
            uneven=True,
            refit=partial(_refit, outputs) if outputs else None,
        ),
    ]
    found = [replace(kind, tables=[table for table in kind.tables if budget.stores(lower(table))]) for kind in kinds]
    if not any(family.tables for family in found):
        raise too_small_a_store(budget, min(lower(table).peak_bytes for kind in kinds for table in kind.tables))
    return [family for family in found if family.tables]


def _regular(
    make: Callable[..., MaskSchedule], reference: MaskSchedule, budget: Budget, window: int, most: int
) -> list[MaskSchedule]:
    """Tables of one kind with the most computed steps that fit, by Taylor order and last step; none if not one fits."""
    for count in range(most, len(reference.sampler.begins) - 1, -1):
        if budget.covers(budget.spent(lower(make(reference, count / reference.steps)))):
            tables = ((make(reference, count / reference.steps, order=order), order) for order in range(window))
            return [placed for table, order in tables for placed in (table, *later(table, order))]
    return []


def _refreshed(reference: MaskSchedule, budget: Budget, window: int, most: int) -> Iterator[MaskSchedule]:
    """Refreshed intervals, by the kind of block that is refreshed, whole evaluations, and Taylor order from 1."""
    for columns in groups(reference.graph).values():
        for full in (most - fewer for fewer in FEWER if most - fewer > 1):
            orders = range(1, window)
            tables = (refreshed_interval(reference, budget, columns, full, most, order=order) for order in orders)
            yield from (table for table in tables if table is not None)


def _shallow(reference: MaskSchedule, budget: Budget, window: int) -> Iterator[MaskSchedule]:
    """DeepCache's tables of a U-Net that fit, by branch and Taylor order from 1."""
    for branch in range(len(branches(reference.graph))):
        for order in range(1, window):
            with suppress(InvalidBudget):
                yield deepcache_within(reference, budget, branch=branch, order=order)


def _uneven(profile: Profile, budget: Budget, window: int) -> Iterator[MaskSchedule]:
    """A profile's best shortest paths, which compute where it counts most; with their own forecasts and Taylor's."""
    for _, table in paths(profile, budget)[:PATHS]:
        if table.windows.max() <= window:
            yield table
        for order in range(window):
            name = {"table": f"{table.provenance['table']}, {answer(order)}"}
            yield table.with_taylor(table.rows, order, provenance=name)


def _fitted(outputs: WholeSteps, whole: Sequence[MaskSchedule]) -> Iterator[MaskSchedule]:
    """As many whole steps as regular tables have, where they promise most, with fitted forecasts."""
    for table in whole[:1]:
        for steps in outputs.best(int(table.rows.all(axis=1).sum()))[:PATHS]:
            rows = np.zeros_like(table.rows)
            rows[steps] = True
            yield table.with_rows(rows, _refit(outputs, rows), provenance={"table": f"whole steps {steps}, fitted"})


def _refit(outputs: WholeSteps, rows: Bools) -> Floats:
    """Fitted forecasts of whole steps, shape (steps, blocks, 3): of the denoiser, who alone is read."""
    weights = np.tile(PLAIN, (*rows.shape, 1))
    weights[:, -1] = outputs.forecasts(np.flatnonzero(rows.all(axis=1)).tolist())
    return weights


def groups(graph: BlockGraph) -> dict[str, list[int]]:
    """Columns by what their blocks are called: "attn1" for every `transformer_blocks.*.attn1`; none if all are one."""
    found: dict[str, list[int]] = {}
    for column, name in enumerate(graph.names[:-1]):
        parts = [part for part in name.split(".") if not part.isdigit()]
        found.setdefault(parts[-1] if parts else name, []).append(column)
    return found if len(found) > 1 else {}


def refreshed_interval(
    reference: MaskSchedule, budget: Budget, columns: Sequence[int], full: int, most: int, *, order: int
) -> MaskSchedule | None:
    """Whole evaluations, and midway between them partial ones that compute some blocks alone.

    Midway between two whole evaluations the age of the values is largest; a partial one refreshes the blocks in
    `columns`, as many as the budget has left, the last blocks first.

    Args:
        reference: Any table of the denoiser and sampler.
        budget: Of the whole run, glue included.
        columns: Blocks of the partial evaluations.
        full: Whole evaluations, at least two.
        most: Whole evaluations of the fixed interval in whose place this comes: both span the same steps.
        order: Of Taylor's forecast.

    Returns:
        The table; `None` if the budget does not leave a whole partial evaluation.
    """
    costs, loads = budget.costs(reference.graph), reference.sampler.loads
    whole = np.rint(np.linspace(0, reference.steps * (1 - 1 / most), full)).astype(int)
    middles = np.rint((whole[1:] + whole[:-1]) / 2).astype(int)
    rows = np.zeros(reference.rows.shape, dtype=bool)
    rows[[*whole, *reference.sampler.begins]] = True
    rows[:, -1] = True
    left = _left(reference, budget, rows)
    if left < costs[list(columns)].sum():
        return None
    for step in middles:
        for column in sorted(columns, reverse=True):
            cost = costs[column] * loads[step]
            if not rows[step, column] and cost <= left:
                rows[step, column] = True
                left -= cost
    partial = int(rows[middles][:, :-1].any(axis=1).sum())
    what = f"{full} whole and {partial} partial evaluations of {len(columns)} blocks, Taylor {order}"
    return reference.with_taylor(rows, order, provenance={"table": what})


def _filled(reference: MaskSchedule, budget: Budget, window: int, most: int) -> Iterator[MaskSchedule]:
    """Filled intervals with the fewest steps that leave one partial, by that step, its blocks, and Taylor order."""
    counts = range(max(2, len(reference.sampler.begins)), most + 1)
    shares = (budget.spent(lower(fixed_interval(reference, count / reference.steps))) for count in counts)
    count = next((count for count, share in zip(counts, shares, strict=False) if not budget.covers(share)), 0)
    for place in sorted({1, count // 2, count - 1} & set(range(1, count))):
        for last_first in (True, False):
            for order in range(1, window):
                table = filled_interval(reference, budget, count, place, last_first=last_first, order=order)
                if table is not None:
                    yield table


def _left(reference: MaskSchedule, budget: Budget, rows: npt.NDArray[np.bool_]) -> float:
    """What a budget leaves beside a table, in whole evaluations, up to rounding."""
    loads = reference.sampler.loads
    costs = budget.costs(reference.graph)
    return float(budget.share * loads.sum() - ((rows * costs).sum(axis=1) * loads).sum()) + 1e-9


def filled_interval(
    reference: MaskSchedule, budget: Budget, count: int, partial: int, *, last_first: bool, order: int
) -> MaskSchedule | None:
    """A fixed interval one evaluation of which computes only as many blocks as the budget has left.

    A budget seldom ends with a whole evaluation: glue at every step alone may keep the last one out.

    Args:
        reference: Any table of the denoiser and sampler.
        budget: Of the whole run, glue included.
        count: Evaluations, the partial one included; at least two.
        partial: Which of them is partial, from 1.
        last_first: Whether the last blocks are computed there, or the first ones.
        order: Of Taylor's forecast.

    Returns:
        The table; `None` if the budget does not leave a single block.
    """
    interval, costs = fixed_interval(reference, count / reference.steps), budget.costs(reference.graph)
    rows = interval.rows.copy()
    step = int(np.flatnonzero(rows.all(axis=1))[partial])
    if step in reference.sampler.begins:
        return None
    rows[step, :-1] = False
    left = _left(reference, budget, rows)
    columns = range(len(costs) - 1)
    for column in reversed(columns) if last_first else columns:
        cost = costs[column] * reference.sampler.loads[step]
        if cost > left:
            break
        rows[step, column] = True
        left -= cost
    chosen = int(rows[step, :-1].sum())
    if not chosen:
        return None
    what = f"interval of {count} evaluations, {chosen} blocks at step {step}, Taylor {order}"
    return reference.with_taylor(rows, order, provenance={"table": what})
