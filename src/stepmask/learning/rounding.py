"""From scores back to bits: one threshold for the whole table, priced after rectification, and the revive rules."""

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidBudget
from stepmask.schedule.budget import Budget
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def round_scores(scores: Floats, reference: MaskSchedule, budget: Budget, *, max_age: int) -> MaskSchedule:
    """The rectified table that computes the highest scores within a budget.

    Args:
        scores: (steps, blocks) in [0, 1].
        reference: Any table of the denoiser and sampler.
        budget: Share of MACs after rectification.
        max_age: A value is reused for at most this many steps.

    Raises:
        InvalidBudget: Even with no bit but those that must be set the budget is exceeded.
    """
    thresholds = np.unique(scores)
    low, high = 0, len(thresholds)  # index of the lowest threshold that fits lies in [low, high]
    best = _table(scores, np.inf, reference, max_age)
    if lower(best).macs_share > budget.macs:
        raise InvalidBudget(
            given=f"budget {budget.macs:g}",
            expected=f"at least {lower(best).macs_share:.4f}, the least that reuse for at most {max_age} steps allows",
            advice="Spend more, or allow a larger max_age",
        )
    while low < high:
        middle = (low + high) // 2
        table = _table(scores, float(thresholds[middle]), reference, max_age)
        if lower(table).macs_share <= budget.macs:
            best, high = table, middle
        else:
            low = middle + 1
    return rectify(best)


def _table(scores: Floats, threshold: float, reference: MaskSchedule, max_age: int) -> MaskSchedule:
    rows = revive(scores >= threshold, max_age)
    rows[:, -1] = True
    return reference.with_rows(rows)


def revive(rows: Bools, max_age: int) -> Bools:
    """Set the first row, and a bit wherever a value would be reused for more than `max_age` steps."""
    rows, age = rows.copy(), np.zeros(rows.shape[1], dtype=int)
    rows[0] = True
    for row in rows:
        age = np.where(row, 0, age + 1)
        row |= age > max_age
        age[row] = 0
    return rows
