"""Pictures of a schedule and of what it does, by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import MissingExtra
from stepmask.files import write_whole
from stepmask.schedule.rectify import Cell, lower
from stepmask.schedule.schedule import MaskSchedule

KINDS = ("compute", "reuse", "forecast", "dead")
INK = "#010203"
"""Stands for the page's own text colour while an inline drawing is made."""

COLOURS = ("#1f4e79", "#f2c879", "#e07b39", "#eeeeee")


def heat_map(schedule: MaskSchedule, path: str | Path) -> Path:
    """Draw the table: steps from top to bottom, blocks from left to right, and the MACs of each step beside it."""
    plot = _pyplot()
    plan = lower(schedule)
    kinds = np.array([[_kind(cell) for cell in row] for row in plan.cells])
    height = max(3.0, 0.16 * schedule.steps + 1.6)
    figure, (table, share) = plot.subplots(
        1, 2, figsize=(max(6.0, 0.22 * len(schedule.graph)), height), width_ratios=(5, 1), sharey=True, layout="tight"
    )
    colours = plot.matplotlib.colors.ListedColormap(COLOURS)
    table.pcolormesh(kinds, cmap=colours, vmin=-0.5, vmax=3.5, edgecolors="white", linewidth=0.4)
    table.invert_yaxis()
    every = range(0, schedule.steps, max(1, schedule.steps // 10))
    table.set_yticks([step + 0.5 for step in every], labels=[str(step) for step in every])
    table.set(xlabel="block, in call order (the last is the denoiser)", ylabel="step (0 = noisiest)")
    share.barh(np.arange(schedule.steps) + 0.5, (plan.computed * schedule.graph.costs).sum(1), color=COLOURS[0])
    share.set(xlim=(0, 1), xlabel="MACs")
    patches = [plot.matplotlib.patches.Patch(color=c, label=k) for k, c in zip(KINDS, COLOURS, strict=True)]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False)
    figure.suptitle(f"{plan.macs_share:.1%} of the MACs", fontsize=10, y=0.02)
    return _save(figure, path)


def side_by_side(images: Mapping[str, npt.NDArray[np.float32]], path: str | Path, *, columns: int = 8) -> Path:
    """Draw the pictures of each row of a report, one row below the other, the same seeds in the same column."""
    plot = _pyplot()
    shown = {name: pictures[:columns] for name, pictures in images.items()}
    across = max(len(pictures) for pictures in shown.values())
    figure, axes = plot.subplots(len(shown), across, figsize=(1.1 * across + 1.4, 1.15 * len(shown)), squeeze=False)
    for line, (name, pictures) in zip(axes, shown.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(np.clip(picture, 0, 1))
        line[0].text(-0.1, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    return _save(figure, path)


def line_chart(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """Draw points (x, y), joined by name, as inline SVG for a page: y on a log scale, text in the page's colour."""
    plot, buffer = _pyplot(), io.StringIO()
    inked = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with plot.rc_context({**inked, "svg.fonttype": "none", "svg.hashsalt": "stepmask"}):
        figure, axis = plot.subplots(figsize=(6.4, 3.6), layout="tight")
        for name, points in lines.items():
            if positive := [point for point in points if point[1] > 0]:
                axis.plot(
                    *zip(*positive, strict=True), marker="o", markersize=6 if len(positive) == 1 else 3, label=name
                )
        axis.set(yscale="log", xlabel=x, ylabel=y)
        if all(isinstance(place, int) for points in lines.values() for place, _ in points):
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plot.close(figure)
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :].replace(INK, "currentColor")


def _kind(cell: Cell) -> int:
    return KINDS.index("forecast" if cell.is_forecast else cell.action)


def _save(figure: Any, path: str | Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=150, bbox_inches="tight")
    _pyplot().close(figure)
    return write_whole(path, buffer.getvalue())


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtra(
            given="no matplotlib", expected="it, for pictures", advice="pip install 'stepmask[evaluate]'"
        ) from error
    return pyplot
