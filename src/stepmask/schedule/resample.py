"""A table carried over to another sequence of steps, matched along log-SNR."""

import numpy as np
import numpy.typing as npt

from stepmask.schedule.forecasts import DIFFERENCES, PLAIN

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def resample_table(rows: Bools, weights: Floats, old: Floats, new: Floats) -> tuple[Bools, Floats]:
    """A table for other steps.

    Args:
        rows: (steps, blocks).
        weights: (steps, blocks, 3).
        old: log-SNR of the table's steps, shape (steps,).
        new: log-SNR of the other steps, shape (new steps,).

    Returns:
        Rows (new steps, blocks) and weights (new steps, blocks, 3); computed cells answer with what they compute.
    """
    nearest = np.abs(new[:, None] - old[None, :]).argmin(axis=1)
    old_rows, rows = rows, rows[nearest].copy()
    rows[0] = True
    weights = weights[nearest].copy()
    weights[rows] = PLAIN
    for step, column in np.argwhere(~rows):
        reach_old = _reach(old_rows[:, column], int(nearest[step]))
        reach_new = _reach(rows[:, column], int(step))
        weights[step, column] = _stretch(weights[step, column], reach_old, reach_new)
    return rows, weights


def _reach(computed: Bools, step: int) -> tuple[float, int]:
    """Age of the newest value over the gap between the newest two, and how many values there are."""
    before = np.flatnonzero(computed[:step])
    if len(before) < 2:
        return 0.0, len(before)
    return float((step - before[-1]) / (before[-1] - before[-2])), len(before)


def _stretch(weights: Floats, old: tuple[float, int], new: tuple[float, int]) -> Floats:
    """Scale a forecast's first and second difference by the ratio of reaches and its square."""
    ratio = new[0] / old[0] if old[0] else 0.0
    differences = weights @ DIFFERENCES * (1.0, ratio, ratio**2)
    differences[new[1] :] = 0.0
    stretched: Floats = differences @ DIFFERENCES + 0.0
    return stretched
