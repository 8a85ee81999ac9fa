"""A table carried over to another sequence of steps, matched along log-SNR."""

import numpy as np
import numpy.typing as npt

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
        Rows (new steps, blocks) and weights (new steps, blocks, 3).
    """
    nearest = np.abs(new[:, None] - old[None, :]).argmin(axis=1)
    old_rows, rows = rows, rows[nearest].copy()
    rows[0] = True
    weights = weights[nearest].copy()
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
    """Scale a forecast's first and second difference by the ratio of reaches and its square.

    Σ w_i C_i = s·C + c1·(C − C′) + c2·(C − 2C′ + C″) with s = Σ w_i, c2 = w_2 and c1 = −w_1 − 2·w_2.
    """
    ratio = new[0] / old[0] if old[0] else 0.0
    total, second = weights.sum(), weights[2] * ratio**2
    first = (-weights[1] - 2 * weights[2]) * ratio
    if new[1] < 3:
        second = 0.0
    if new[1] < 2:
        first = 0.0
    return np.array([total + first + second, 0.0 - first - 2 * second, second])
