"""A table carried over to another sequence of steps, along log-SNR."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepmask.schedule.course import computed_before
from stepmask.schedule.forecasts import DIFFERENCES, PLAIN, WINDOW

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def rises(log_snr: Floats) -> bool:
    """Whether log-SNR never falls, to rounding, from one step to the next."""
    return bool((np.diff(log_snr) >= -1e-6).all())


def resample_table(rows: Bools, weights: Floats, old: Floats, new: Floats) -> tuple[Bools, Floats]:
    """A table for other steps: every block is computed at the same share of them, as densely where it was dense.

    Args:
        rows: (steps, blocks).
        weights: (steps, blocks, 3).
        old: log-SNR of the table's steps, shape (steps,), ascending.
        new: log-SNR of the other steps, shape (new steps,), ascending.

    Returns:
        Rows (new steps, blocks) and weights (new steps, blocks, 3); computed cells answer with what they compute.
    """
    places = np.interp(new, old, np.arange(len(old)))  # of the new steps among the old ones
    everywhere = np.ones(len(new), dtype=bool)
    whole = rows[:, -1]
    denoiser = everywhere if whole.all() else _spread(whole, places, everywhere)
    blocks = [
        denoiser if (column | ~whole).all() else _spread(column, places, denoiser) for column in rows.T[:-1]
    ]  # what is computed whenever the denoiser is, stays so
    spread = np.stack([*blocks, denoiser], axis=1)
    carried = np.tile(PLAIN, (*spread.shape, 1))
    for column in range(spread.shape[1]):
        carried[:, column] = _carried(rows[:, column], weights[:, column], places, spread[:, column])
    return spread, carried


def begun_anew(rows: Bools, weights: Floats, begins: Sequence[int]) -> tuple[Bools, Floats]:
    """A table with everything computed where a run begins anew, and no forecast that reads past there.

    Args:
        rows: (steps, blocks).
        weights: (steps, blocks, 3).
        begins: Steps at which a run begins, ascending from 0.
    """
    if len(begins) == 1:
        return rows, weights
    rows, weights = rows.copy(), weights.copy()
    rows[list(begins)] = True
    read = WINDOW - np.argmax((weights != 0)[..., ::-1], axis=2) - rows
    weights[read > computed_before(rows, begins)] = PLAIN
    return rows, weights


def _spread(computed: Bools, places: Floats, allowed: Bools) -> Bools:
    """Where a block is computed, shape (new steps,), given where it was, shape (steps,).

    Between two computed steps its count rises evenly by one, times the ratio of the numbers of steps; the block is
    computed at the steps nearest to where that passes an integer, the earlier one of two, or at the next that is
    allowed.
    """
    knots = [*np.flatnonzero(computed), len(computed)]
    counts = np.interp([*places, len(computed)], knots, np.arange(len(knots)), left=-1.0) * len(places) / len(computed)
    reached = (counts[1:] + counts[:-1]) / 2  # in the middle between a step and the next
    spread, due = np.zeros(len(places), dtype=bool), 0
    for step in np.flatnonzero(allowed):
        if reached[step] >= due:
            spread[step], due = True, due + 1
    return spread


def _carried(computed: Bools, weights: Floats, places: Floats, spread: Bools) -> Floats:
    """Weights of one block, shape (new steps, 3).

    A forecast s·C + c₁·(C − C′) + c₂·(C − 2C′ + C″) at age a over gap g is told by (s − 1)/a, c₁·g/a and c₂·(g/a)²,
    which are interpolated between the steps at which the block was reused.
    """
    (values, scales), (new_values, new_scales) = _histories(computed), _histories(spread)
    told, plain = weights @ DIFFERENCES, np.array(PLAIN) @ DIFFERENCES
    differences = np.tile(plain, (len(places), 1))
    for order in range(WINDOW):
        known, wanted = ~computed & (values > order), ~spread & (new_values > order)
        if known.any():
            rates = (told[known, order] - plain[order]) / scales[known, order]
            carried = np.interp(places[wanted], np.flatnonzero(known), rates)
            differences[wanted, order] += carried * new_scales[wanted, order]
    return np.asarray(differences @ DIFFERENCES + 0.0)


def _histories(computed: Bools) -> tuple[npt.NDArray[np.int64], Floats]:
    """Of a block at each step: how many values it has, shape (steps,); and what its differences go with, (steps, 3).

    The scale goes with the newest value's age as a share of the run, the first difference with that age over the gap
    between the newest two values, the second with the square of that.
    """
    values, scales = np.zeros(len(computed), dtype=np.int64), np.zeros((len(computed), WINDOW))
    for step in range(1, len(computed)):
        before = np.flatnonzero(computed[:step])
        values[step] = len(before)
        if len(before):
            scales[step, 0] = (step - before[-1]) / len(computed)
        if len(before) > 1:
            reach = (step - before[-1]) / (before[-1] - before[-2])
            scales[step, 1:] = reach, reach**2
    return values, scales
