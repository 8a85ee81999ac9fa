"""A report as one self-contained HTML page: what was skipped, what it saved, and what it cost in pictures."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepmask.evaluation.pictures import png
from stepmask.evaluation.plots import Points, against_macs, against_speed, line_chart
from stepmask.evaluation.report import Report, Row
from stepmask.extras import extra
from stepmask.schedule.rectify import Cell, Plan, lower
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.show import summary
from stepmask.text import printable, printable_lines

if TYPE_CHECKING:
    from stepmask.learning.profile import Profile

SHOWN = 16
"""Samples of which pictures are shown, at most."""

AMPLIFIED = 4
"""Differences between pictures are shown that many times as large."""


def render(report: Report, *, profile: "Profile | None" = None, command: str = "") -> str:
    """The page, with everything that it shows inside it.

    Args:
        report: Of `evaluate`.
        profile: Of a sweep of the same pipeline: predicted errors of cells and of other budgets.
        command: The command line that made the report, to be shown.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
        ScheduleMismatch: The profile is of another pipeline.
        InvalidSchedule: The schedule reuses older values than the profile knows.
    """
    schedule = report.schedule
    page: str = _template().render(
        report=report,
        summary=summary(schedule).splitlines() if schedule else [],
        facts=[*_facts(report)],
        rows=[_measured(report, row) for row in report.rows],
        pictures=_pictures(report.images),
        table=_table(schedule, profile) if schedule else None,
        charts=[*_charts(report, profile)],
        command=command,
        amplified=AMPLIFIED,
    )
    return page


def _template() -> Any:
    with extra("evaluate", "jinja2", "HTML pages"):
        from jinja2 import Environment, StrictUndefined
    text = (files("stepmask.evaluation") / "page.html").read_text(encoding="utf-8")
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return page.from_string(text)


def _shown(value: Any) -> Any:
    """What a page shows of a value: nothing of a text that no file can hold. Drawings are markup, and ours."""
    return printable_lines(value) if type(value) is str else value


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """The few numbers that one looks for first."""
    row = report.rows[1]
    speed, low, high = report.speedup(row.name)
    yield f"{row.macs_executed:.1%}", "of the MACs"
    yield f"{speed:.2f}×", f"faster denoiser ({low:.2f}–{high:.2f})"
    yield f"{row.latent_error:.2g}", "latent error"
    if row.psnr_db:
        yield f"{fmean(row.psnr_db):.1f} dB", "PSNR to the reference"
    yield f"{row.store_bytes / 2**20:.1f} MiB", "largest store"


def _measured(report: Report, row: Row) -> dict[str, str]:
    speed, low, high = report.speedup(row.name)
    return {
        "name": printable(row.name),
        "MACs": f"{row.macs_executed:.3f}",
        "latent error": f"{row.latent_error:.2e}",
        "PSNR (dB)": f"{fmean(row.psnr_db):.1f}" if row.psnr_db else "–",
        "SSIM": f"{fmean(row.ssim):.3f}" if row.ssim else "–",
        "denoiser (ms)": f"{median(row.denoiser_ms):.0f}",
        "speed-up": f"{speed:.2f}× ({low:.2f}–{high:.2f})",
        "pipeline": f"{report.speedup(row.name, of='pipeline')[0]:.2f}×",
        "store (MiB)": f"{row.store_bytes / 2**20:.1f}",
    }


def _pictures(images: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, list[str]]:
    """Data URIs of the first samples of each row, and of the schedule's differences."""
    if not images:
        return {}
    shown = {name: pictures[:SHOWN] for name, pictures in images.items()}
    reference, *others = shown
    difference = np.abs(shown[others[0]] - shown[reference]) * AMPLIFIED
    shown = {reference: shown[reference], others[0]: shown[others[0]], "difference": difference, **shown}
    return {name: [_data_uri(picture) for picture in pictures] for name, pictures in shown.items()}


def _data_uri(picture: npt.NDArray[np.float32]) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _table(schedule: MaskSchedule, profile: "Profile | None") -> dict[str, Any]:
    """The heat map: a row per step with its share of the MACs, and a cell per block."""
    plan, costs = lower(schedule), None if profile is None else profile.cell_errors(schedule)
    return {
        "blocks": [block.label for block in schedule.graph.blocks],
        "steps": [
            {"timestep": timestep, "share": float(share), "cells": [*_cells(plan, step, costs)]}
            for step, (timestep, share) in enumerate(zip(schedule.sampler.timesteps, plan.shares, strict=True))
        ],
    }


def _cells(plan: Plan, step: int, costs: npt.NDArray[np.float64] | None) -> Iterator[dict[str, str]]:
    for column, cell in enumerate(plan.cells[step]):
        said = [_said(plan, step, column)]
        if costs is not None and cell.action != "dead":
            said.append(f"alone it adds a predicted error of {costs[step, column]:.1e}")
        yield {"kind": cell.kind, "says": "; ".join(said)}


def _said(plan: Plan, step: int, column: int) -> str:
    """What a cell does, in words."""
    cell = plan.cells[step][column]
    if cell.action == "dead":
        return "read by nobody"
    if cell.action == "compute":
        return f"computed, then blended: {_weights(cell)}" if cell.is_blend else "computed"
    computed = np.flatnonzero(plan.computed[:step, column])
    ages = ", ".join(str(age) for age in (step - computed[::-1])[: max(1, len(cell.weights))])
    if cell.vectors is not None:
        return f"forecast channel by channel from values of age {ages}"
    if cell.is_forecast:
        return f"forecast from values of age {ages}: {_weights(cell)}"
    return f"reused at age {ages}"


def _weights(cell: Cell) -> str:
    return " + ".join(f"{weight:.3g}·v{index}" for index, weight in enumerate(cell.weights)).replace("+ -", "− ")


def _charts(report: Report, profile: "Profile | None") -> Iterator[tuple[str, str]]:
    """Titles and inline SVG."""
    paths: Points = {row.name: list(enumerate(row.path_errors)) for row in report.rows[1:] if row.path_errors}
    if paths:
        yield "Error along the trajectory", line_chart(paths, "step", "latent error")
    by_macs: dict[str, Sequence[tuple[float, float]]] = {**against_macs(report)}
    if profile is not None:
        by_macs["predicted by the profile"] = [(lower(table).macs_share, error) for table, error in profile.pareto()]
    yield "Error against MACs", line_chart(by_macs, "share of MACs", "latent error")
    yield "Error against measured speed", line_chart(against_speed(report), "speed-up of the denoiser", "latent error")
