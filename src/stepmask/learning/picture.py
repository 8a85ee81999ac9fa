"""A profile as a picture."""

from typing import TYPE_CHECKING

import numpy as np

from stepmask.drawing import COLOURS, blank
from stepmask.learning.profile import Profile
from stepmask.schedule.rectify import lower

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sensitivities(profile: Profile) -> "Figure":
    """Left, what answering a cell with its value of a step ago costs alone; right, the predicted error by budget.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = blank(max(9.0, 0.18 * len(profile.graph) + 5), max(3.5, 0.16 * profile.sampler.steps + 1.6))
    from matplotlib.colors import LogNorm

    cells, curve = figure.subplots(1, 2, width_ratios=(2, 1))
    alone = np.square(profile.inner[..., 1:, :-1, 1] - profile.inner[..., 1:, :-1, 0]).mean(axis=0)
    steps, blocks = alone.shape
    edges = np.arange(blocks + 1) - 0.5, np.arange(steps + 1) + 0.5  # step 0 has nothing to reuse
    drawn = cells.pcolormesh(*edges, alone, norm=LogNorm(*_range(alone)), cmap="magma_r")
    cells.invert_yaxis()
    cells.set(xlabel="block, in call order", ylabel="step (0 = noisiest)", title="error of reuse, one cell alone")
    figure.colorbar(drawn, ax=cells)
    points = [(lower(table).macs_share, error) for table, error in profile.pareto()]
    curve.plot(*zip(*points, strict=True), marker="o", color=COLOURS["compute"])
    curve.set(yscale="log", xlabel="share of MACs", title="predicted error")
    return figure


def _range(values: "np.ndarray[tuple[int, ...], np.dtype[np.floating]]") -> tuple[float, float]:
    """The largest value, and the smallest that a log scale of five decades shows."""
    largest = float(values.max()) or 1.0
    return 1e-5 * largest, largest
