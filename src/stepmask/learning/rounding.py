"""From scores back to bits: one threshold for the whole table, priced after rectification, and the revive rules."""

import numpy as np
import numpy.typing as npt

from stepmask.schedule.budget import Budget, too_small_a_share, too_small_a_store
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

Floats = npt.NDArray[np.float64]

BISECTIONS = 40
THRESHOLDS = 40
"""Tried above the one that meets the share, where its table's store is too large."""


def round_scores(scores: Floats, reference: MaskSchedule, budget: Budget, *, max_age: int) -> MaskSchedule:
    """The rectified table that computes the highest scores within a budget.

    One threshold serves the whole table, so that steps and blocks compete for the same budget. A score was learned for
    a value of the step before; the error of reusing an a-steps-old value grows like a², so a cell is computed where
    score · a² reaches the threshold. Where the store of that table is too large, the threshold rises until it is not.

    Args:
        scores: (steps, blocks) in [0, 1].
        reference: Any table of the denoiser and sampler.
        budget: Of the table after rectification.
        max_age: A value is reused for at most this many steps.

    Raises:
        InvalidBudget: Even with no bit but those that must be set the budget is exceeded, or every table that the share
            allows needs a larger store.
        NotTimed: The budget is in time, and the blocks were not timed.
    """
    ceiling = max_age**2 + 1.0
    lowest = _lowest_threshold(scores, reference, budget, max_age)
    peaks = []
    for threshold in np.linspace(lowest, ceiling, THRESHOLDS):
        table = _table(scores, threshold, reference, max_age)
        if budget.allows(plan := lower(table)):
            return rectify(table)
        if budget.covers(budget.spent(plan)):
            peaks.append(plan.peak_bytes)
    raise too_small_a_store(budget, min(peaks))


def _lowest_threshold(scores: Floats, reference: MaskSchedule, budget: Budget, max_age: int) -> float:
    """The lowest threshold whose table a budget's share covers, whatever its store."""
    low, high = 0.0, max_age**2 + 1.0  # no score · a² of a value that may still be reused reaches the latter
    least = budget.spent(lower(_table(scores, high, reference, max_age)))
    if not budget.covers(least):
        why = f"the least that reuse for at most {max_age} steps allows"
        raise too_small_a_share(budget, least, why=why, instead="allow a larger max_age")
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if budget.covers(budget.spent(lower(_table(scores, middle, reference, max_age)))):
            high = middle
        else:
            low = middle
    return high


def _table(scores: Floats, threshold: float, reference: MaskSchedule, max_age: int) -> MaskSchedule:
    """The table at a threshold: whole where a run begins, nothing reused for too long, nothing computed for nobody."""
    rows, age = np.ones(scores.shape, dtype=bool), np.zeros(scores.shape[1])
    for step, (row, row_scores) in enumerate(zip(rows, scores, strict=True)):
        if step in reference.sampler.begins:
            age[:] = 0
            continue
        age += 1
        row[:] = (row_scores * age**2 >= threshold) | (age > max_age)
        row &= row[-1]
        age[row] = 0
    return reference.with_rows(rows)
