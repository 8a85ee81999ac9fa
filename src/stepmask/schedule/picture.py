"""The table as a picture: by matplotlib, and as SVG for a notebook."""

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from stepmask.drawing import COLOURS, blank
from stepmask.schedule.rectify import Plan, lower
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.show import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = tuple(COLOURS)
WIDE, TALL = 9, 12
"""Of a cell in a notebook, in pixels."""


def heat_map(schedule: MaskSchedule) -> "Figure":
    """The table, steps from top to bottom, blocks from left to right, and the MACs of each step beside it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    plan = lower(schedule)
    figure = blank(max(6.0, 0.22 * len(schedule.graph)), max(3.0, 0.16 * schedule.steps + 1.6))
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    table, share = figure.subplots(1, 2, width_ratios=(5, 1), sharey=True)
    kinds = np.array([[KINDS.index(cell.kind) for cell in row] for row in plan.cells])
    colours = ListedColormap(list(COLOURS.values()))
    table.pcolormesh(kinds, cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, edgecolors="white", linewidth=0.4)
    table.invert_yaxis()
    every = range(0, schedule.steps, max(1, schedule.steps // 10))
    table.set_yticks([step + 0.5 for step in every], labels=[str(step) for step in every])
    table.set(xlabel="block, in call order (the last is the denoiser)", ylabel="step (0 = noisiest)")
    share.barh(np.arange(schedule.steps) + 0.5, plan.shares, color=COLOURS["compute"])
    share.set(xlim=(0, 1), xlabel="MACs")
    shown = [kind for kind in KINDS if KINDS.index(kind) in kinds]
    patches = [Patch(color=COLOURS[kind], label=kind) for kind in shown]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(KINDS), frameon=False)
    figure.suptitle(f"{plan.macs_share:.1%} of the MACs", fontsize=10, y=0.02)
    return figure


def html(schedule: MaskSchedule) -> str:
    """The summary and the table, as a notebook shows it."""
    plan = lower(schedule)
    rows = "".join(_row(plan, step) for step in range(schedule.steps))
    size = f'width="{WIDE * len(schedule.graph)}" height="{TALL * schedule.steps}"'
    lines = "<br>".join(map(escape, summary(schedule).splitlines()))
    names = " ".join(f'<span style="color:{colour}">■</span> {kind}' for kind, colour in COLOURS.items())
    return f"<p>{lines}</p><svg {size}>{rows}</svg><p>{names}</p>"


def _row(plan: Plan, step: int) -> str:
    """A rectangle for every run of cells that do the same."""
    rectangles, column = [], 0
    for kind, cells in groupby(plan.cells[step], key=lambda cell: cell.kind):
        count = len(list(cells))
        place = f'x="{WIDE * column}" y="{TALL * step}" width="{WIDE * count - 1}" height="{TALL - 1}"'
        rectangles.append(f'<rect {place} fill="{COLOURS[kind]}"/>')
        column += count
    return "".join(rectangles)
