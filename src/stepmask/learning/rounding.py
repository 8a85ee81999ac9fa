"""From scores back to bits: one threshold for the whole table, priced after rectification, and the revive rules."""

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidBudget
from stepmask.schedule.budget import Budget
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

Floats = npt.NDArray[np.float64]

BISECTIONS = 40


def round_scores(scores: Floats, reference: MaskSchedule, budget: Budget, *, max_age: int) -> MaskSchedule:
    """The rectified table that computes the highest scores within a budget.

    One threshold serves the whole table, so that steps and blocks compete for the same MACs. A score was learned for
    a value of the step before; the error of reusing an a-steps-old value grows like a², so a cell is computed where
    score · a² reaches the threshold.

    Args:
        scores: (steps, blocks) in [0, 1].
        reference: Any table of the denoiser and sampler.
        budget: Share of MACs after rectification.
        max_age: A value is reused for at most this many steps.

    Raises:
        InvalidBudget: Even with no bit but those that must be set the budget is exceeded.
    """
    least = _table(scores, np.inf, reference, max_age)
    if not budget.allows(lower(least).macs_share):
        raise InvalidBudget(
            given=f"budget {budget.macs:g}",
            expected=f"at least {lower(least).macs_share:.4f}, the least that reuse for at most {max_age} steps allows",
            advice="Spend more, or allow a larger max_age",
        )
    best, low, high = least, 0.0, max_age**2 + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        table = _table(scores, middle, reference, max_age)
        if budget.allows(lower(table).macs_share):
            best, high = table, middle
        else:
            low = middle
    return rectify(best)


def _table(scores: Floats, threshold: float, reference: MaskSchedule, max_age: int) -> MaskSchedule:
    """The table at a threshold: first row computed, nothing reused for too long, nothing computed in a skipped step."""
    rows, age = np.ones(scores.shape, dtype=bool), np.zeros(scores.shape[1])
    for row, row_scores in zip(rows[1:], scores[1:], strict=True):
        age += 1
        row[:] = (row_scores * age**2 >= threshold) | (age > max_age)
        row &= row[-1]
        age[row] = 0
    return reference.with_rows(rows)
