"""Rival schedules as data in the same table: what every learned table must beat at equal MACs."""

import math

import numpy as np

from stepmask.errors import InvalidBudget, InvalidSchedule
from stepmask.schedule.budget import Budget, too_small_a_store
from stepmask.schedule.forecasts import WINDOW, taylor_forecasts
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule


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


def _spread(reference: MaskSchedule, budget: Budget, order: int, *, skip_denoiser: bool) -> MaskSchedule:
    if order not in range(WINDOW):
        raise InvalidSchedule(
            given=f"order {order}", expected="0 (reuse), 1 or 2", advice="Choose one of these Taylor orders"
        )
    count = math.floor(budget.share * reference.steps + 1e-9)
    kind = "whole-step" if skip_denoiser else "fixed-interval"
    if count < 1:
        raise InvalidBudget(
            given=f"{budget} for a {kind} table over {reference.steps} steps",
            expected=f"at least {1 / reference.steps:g}, the share of one computed step",
            advice="Spend more, or sample with more steps",
        )
    rows = np.zeros(reference.rows.shape, dtype=bool)
    rows[_even_steps(reference.steps, count)] = True
    if not skip_denoiser:
        rows[:, -1] = True
    answer = "reuse" if order == 0 else f"Taylor {order}"
    table = reference.with_rows(rows, taylor_forecasts(rows, order), provenance={"table": f"{kind}, {answer}"})
    if not budget.stores(plan := lower(table)):
        raise too_small_a_store(budget, plan.peak_bytes)
    return table


def _even_steps(steps: int, count: int) -> list[int]:
    """`count` steps spread evenly over `steps`, beginning with step 0."""
    return [index * steps // count for index in range(count)]
