"""Pictures of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepmask.drawing import blank, inked, inline, literal, name_lines, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stepmask.evaluation.report import Report

Points = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) of each line."""


def frontier(report: "Report") -> "Figure":
    """Every row's latent error against its MACs, and against its measured speed."""
    figure = blank(10.0, 4.0)
    by_macs, by_speed = figure.subplots(1, 2, sharey=True)
    draw(by_macs, against_macs(report), "share of MACs", "latent error")
    draw(by_speed, against_speed(report), "speed-up of the denoiser", "")
    by_speed.get_legend().remove()
    return figure


def against_macs(report: "Report") -> dict[str, list[tuple[float, float]]]:
    """The share of MACs and the error of each row but the reference."""
    return {row.name: [(row.macs_executed, row.latent_error)] for row in report.rows[1:]}


def against_speed(report: "Report") -> dict[str, list[tuple[float, float]]]:
    """The denoiser's median speed-up and the error of each row but the reference."""
    return {row.name: [(report.speedup(row.name)[0], row.latent_error)] for row in report.rows[1:]}


def side_by_side(images: Mapping[str, npt.NDArray[np.float32]], path: str | Path, *, columns: int = 8) -> Path:
    """Draw the pictures of each row of a report, one row below the other, the same seeds in the same column."""
    shown = {name: pictures[:columns] for name, pictures in images.items()}
    across = max(len(pictures) for pictures in shown.values())
    figure = blank(1.1 * across + 1.4, 1.15 * len(shown))
    axes = figure.subplots(len(shown), across, squeeze=False)
    for line, (name, pictures) in zip(axes, shown.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(np.clip(picture, 0, 1))
        literal(line[0].text(-0.1, 0.5, "", transform=line[0].transAxes, ha="right", va="center", fontsize=9), name)
    return save(figure, path)


def line_chart(lines: Points, x: str, y: str) -> str:
    """Points, joined by name, as inline SVG for a page, text in the page's colour."""
    with inked():
        figure = blank(6.4, 3.6)
        draw(figure.subplots(), lines, x, y)
        return inline(figure)


def draw(axis: Any, lines: Points, x: str, y: str) -> None:
    """Draw points, joined by name, on an axis whose y is on a log scale; what is not positive is left out."""
    drawn = []
    for name, points in lines.items():
        if positive := [point for point in points if point[1] > 0]:
            axis.plot(*zip(*positive, strict=True), marker="o", markersize=6 if len(positive) == 1 else 3)
            drawn.append(name)
    axis.set(yscale="log", xlabel=x, ylabel=y)
    if all(isinstance(place, int) for points in lines.values() for place, _ in points):
        axis.xaxis.get_major_locator().set_params(integer=True)
    name_lines(axis, drawn, fontsize=8, frameon=False)
