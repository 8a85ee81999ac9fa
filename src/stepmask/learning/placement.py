"""Where a table's evaluations lie: evenly up to a later step, and single ones a step earlier or later."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from stepmask.schedule.forecasts import WINDOW, taylor_forecasts
from stepmask.schedule.schedule import MaskSchedule

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

Refit = Callable[[Bools], Floats]
"""From the rows of a table, (steps, blocks), to its forecasts, (steps, blocks, 3)."""

MOVED = ", moved"
"""At the end of the names of tables whose rows have changed places."""


def later(table: MaskSchedule, order: int) -> list[MaskSchedule]:
    """A regular table's evaluations spread evenly again, so that the last one lies at each of the steps after its own.

    A regular table ends with as many reused steps as there are between two evaluations.

    Where a run begins anew on its way there are none.

    Args:
        table: Its evaluations are rows that compute everything, its other rows are alike.
        order: Of Taylor's forecast, 0 to 2.
    """
    whole = table.rows.all(axis=1)
    count, last = int(whole.sum()), int(np.flatnonzero(whole)[-1])
    if whole.all() or count == 1 or table.sampler.course.starts:
        return []
    found = []
    for end in range(last + 1, table.steps):
        rows = np.tile(table.rows[~whole][0], (table.steps, 1))
        rows[np.rint(np.linspace(0, end, count)).astype(int)] = True
        name = {"table": f"{table.provenance['table']}, to step {end}"}
        found.append(table.with_taylor(rows, order, provenance=name))
    return found


def movable(rows: Bools, begins: Sequence[int] = (0,)) -> list[int]:
    """Steps whose row differs from the next one's: these two can change places. Rows stay where a run begins.

    Args:
        rows: (steps, blocks), true = compute.
        begins: Steps at which a run begins, or begins anew.
    """
    differ = (rows[:-1] != rows[1:]).any(axis=1)
    return [int(step) for step in np.flatnonzero(differ) if not {int(step), int(step) + 1} & {*begins}]


def swapped(table: MaskSchedule, steps: Sequence[int], refit: Refit) -> MaskSchedule:
    """The rows of some steps, no two of them adjacent, and of the steps after them have changed places.

    Args:
        table: What is computed where.
        steps: As `movable` finds them.
        refit: The forecasts of the new rows.
    """
    places = np.arange(table.steps)
    for step in steps:
        places[[step, step + 1]] = step + 1, step
    rows = table.rows[places]
    name = {"table": f"{str(table.provenance['table']).removesuffix(MOVED)}{MOVED}"}
    return table.with_rows(rows, refit(rows), provenance=name)


def apart(steps: Sequence[int]) -> list[int]:
    """Of some steps those that are not adjacent to one that was named before."""
    kept: list[int] = []
    for step in steps:
        if all(abs(step - other) > 1 for other in kept):
            kept.append(step)
    return kept


def order_of(table: MaskSchedule) -> int | None:
    """Taylor's order of all forecasts of a table; `None` if they are no Taylor forecasts of one order."""
    orders = range(WINDOW)
    begins = table.sampler.begins
    return next((o for o in orders if np.array_equal(taylor_forecasts(table.rows, o, begins), table.forecasts)), None)
