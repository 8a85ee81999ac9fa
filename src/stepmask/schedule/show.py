"""A schedule for the terminal: the table in characters, and a summary in words."""

from collections.abc import Iterator
from textwrap import fill

import numpy as np

from stepmask.schedule.course import Course
from stepmask.schedule.rectify import Cell, Kind, Plan, lower
from stepmask.schedule.schedule import MaskSchedule
from stepmask.text import printable, shortened, told

MARKS: dict[Kind, str] = {"compute": "█", "blend": "▓", "reuse": "·", "forecast": "~", "dead": " "}
PER_CHANNEL = "≈"
SAYS: dict[Kind, str] = {
    "compute": "compute",
    "blend": "compute and blend",
    "reuse": "reuse",
    "forecast": "forecast",
    "dead": "read by nobody",
}
EDGE = 22
"""Columns beside the blocks of a line: step, timestep, share."""


def show(schedule: MaskSchedule, width: int = 80) -> str:
    """The table, a line a step and a character a block, under a summary.

    Args:
        schedule: The table.
        width: Columns of the terminal; where the blocks are more, the table is cut into parts, one below the other.
    """
    plan, wide = lower(schedule), max(10, width - EDGE)
    parts = [range(first, min(first + wide, len(plan.graph))) for first in range(0, len(plan.graph), wide)]
    drawn = ["\n".join(_part(schedule, plan, columns)) for columns in parts]
    told = "\n".join(fill(line, width, subsequent_indent="  ") for line in summary(schedule).splitlines())
    return "\n\n".join([told, *drawn, fill(_legend(plan), width)])


def summary(schedule: MaskSchedule) -> str:
    """What a schedule is for, what it spends and what it stores, in words."""
    plan, graph = lower(schedule), schedule.graph
    reuses = {kind: sum(block.reuse == kind for block in graph.blocks[:-1]) for kind in ("output", "delta")}
    how = " and ".join(f"{count} by {kind}" for kind, count in reuses.items() if count)
    blends = sum(cell.is_blend for row in plan.cells for cell in row)
    blended = f", {blends} computed answers blended" if blends else ""
    vectors = f", and {plan.vector_bytes / 2**20:.2f} MiB of per-channel weights" if plan.vector_bytes else ""
    time = f"{plan.time_share:.1%} of the measured time, " if graph.is_timed else ""
    counted = f"{plan.macs_share:.1%} of the MACs ({1 / plan.macs_share:.2f}× fewer), " if plan.macs_share else ""
    cells = plan.computed[:, :-1] if len(graph) > 1 else plan.computed
    course = f"\n{schedule.sampler.course}" if schedule.sampler.course != Course() else ""
    return (
        f"{_origin(schedule)} for {schedule.denoised_by} with {schedule.sampler.class_name or 'a plain loop'}, "
        f"{schedule.steps} steps{course}\n"
        f"{len(graph) - 1} blocks, reused {how}\n"
        f"computes {counted}{time}{np.mean(cells):.0%} of the cells{blended}\n"
        f"stores at most {plan.peak_bytes / 2**20:.2f} MiB at the traced batch size{vectors}"
    )


def _origin(schedule: MaskSchedule) -> str:
    """What the provenance calls the table, which may be anything."""
    table = schedule.provenance.get("table", "a table")
    return shortened(printable(table if isinstance(table, str) else told(table)))


def _part(schedule: MaskSchedule, plan: Plan, columns: range) -> Iterator[str]:
    first, last = plan.graph.blocks[columns[0]].label, plan.graph.blocks[columns[-1]].label
    yield f"blocks {columns[0]} to {columns[-1]}, {first} to {last}"
    yield f"step timestep  {_ruler(columns)}  MACs"
    for step, (timestep, share) in enumerate(zip(schedule.sampler.timesteps, plan.shares, strict=True)):
        row = "".join(_mark(plan.cells[step][column]) for column in columns)
        yield f"{step:4d} {timestep:8.6g}  {row}  {share:4.0%}"


def _ruler(columns: range) -> str:
    """Tens of the columns, as far as they fit: "0         10        20"."""
    tens = [str(column).ljust(10 - column % 10) for column in columns if column == columns[0] or column % 10 == 0]
    return "".join(tens)[: len(columns)].ljust(len(columns))


def _mark(cell: Cell) -> str:
    return PER_CHANNEL if cell.vectors is not None else MARKS[cell.kind]


def _legend(plan: Plan) -> str:
    """What the marks mean, of those that are there."""
    kinds = {cell.kind for row in plan.cells for cell in row}
    known = [f"{'(blank)' if kind == 'dead' else mark} {SAYS[kind]}" for kind, mark in MARKS.items() if kind in kinds]
    per_channel = any(cell.vectors is not None for row in plan.cells for cell in row)
    return "   ".join([*known, *([f"{PER_CHANNEL} forecast per channel"] if per_channel else [])])
