"""Forecast weights: how they stand for differences of the stored values, and Taylor's formula."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

WINDOW = 3
"""A reused cell reads at most this many stored values."""

PLAIN = (1.0, 0.0, 0.0)
"""Weights of plain reuse: the newest stored value as it is."""

DIFFERENCES = np.array([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [1.0, -2.0, 1.0]])
"""Between weights and differences, either way: it is its own inverse.

Σ_i w_i·C_i = s·C + c₁·(C − C′) + c₂·(C − 2C′ + C″) with (s, c₁, c₂) = w @ DIFFERENCES, w = (s, c₁, c₂) @ DIFFERENCES.
"""

PACE = (0.05, 1.0, 1.0)
"""How far learning moves a forecast's scale and its first and second difference, relatively; the scale is stiff."""


def taylor_weights(step: int, computed: list[int], order: int) -> tuple[float, float, float]:
    """Weights of the last computed values in Taylor's forecast from backward differences (arXiv 2503.06923, eq. 3).

    F(k) ≈ F + a·F′ + a²/2·F″ with a the age, F′ = (F − F₁)/g₁ and F″ = (F′ − F′₁)/g₁, g the gaps between computed
    steps. The order is lower while fewer values are there.

    Args:
        step: The step that is forecast.
        computed: Steps computed before it, ascending; at least one.
        order: 0 to 2.
    """
    order = min(order, len(computed) - 1)
    age = step - computed[-1]
    gaps = [late - early for early, late in pairwise(computed)]
    slope = age / gaps[-1] if order >= 1 else 0.0
    bend = age**2 / (2 * gaps[-1]) if order >= 2 else 0.0
    near = bend / gaps[-1] if order >= 2 else 0.0
    far = bend / gaps[-2] if order >= 2 else 0.0
    return (1 + slope + near, 0.0 - slope - near - far, far)


def taylor_forecasts(rows: npt.NDArray[np.bool_], order: int, begins: Sequence[int] = (0,)) -> npt.NDArray[np.float64]:
    """Taylor's weights for every reused cell of a table whose first row is computed, shape (steps, blocks, 3).

    Args:
        rows: (steps, blocks), true = compute.
        order: 0 to 2.
        begins: Steps at which all is computed and nothing older is read from then on, ascending from 0.
    """
    kinds, kind_of = np.unique(rows, axis=1, return_inverse=True)  # most blocks are computed at the same steps
    weights = np.tile(PLAIN, (*kinds.shape, 1))
    for column, bits in enumerate(kinds.T):
        computed = np.flatnonzero(bits).tolist()
        for step in np.flatnonzero(~bits).tolist():
            begun = max(begin for begin in begins if begin <= step)
            weights[step, column] = taylor_weights(step, [at for at in computed if begun <= at < step], order)
    return weights[:, kind_of.ravel()]
