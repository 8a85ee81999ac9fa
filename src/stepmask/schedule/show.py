"""A schedule for the terminal: the table in characters, and a summary in words."""

import numpy as np

from stepmask.schedule.rectify import Action, Cell, lower
from stepmask.schedule.schedule import MaskSchedule

MARKS: dict[Action, str] = {"compute": "█", "reuse": "·", "dead": " "}
FORECAST, PER_CHANNEL = "~", "≈"


def show(schedule: MaskSchedule) -> str:
    """The table, a line a step and a character a block, under a summary."""
    plan = lower(schedule)
    shares = (plan.computed * schedule.graph.costs).sum(1)
    lines = [
        f"{step:4d} {schedule.sampler.timesteps[step]:8g}  {''.join(map(_mark, row))}  {share:4.0%}"
        for step, (row, share) in enumerate(zip(plan.cells, shares, strict=True))
    ]
    legend = f"{MARKS['compute']} compute   {MARKS['reuse']} reuse   {FORECAST} forecast   "
    legend += f"{PER_CHANNEL} per channel   (blank) read by nobody" if schedule.channels else "(blank) read by nobody"
    return "\n".join([summary(schedule), "", "step timestep", *lines, "", legend])


def summary(schedule: MaskSchedule) -> str:
    """What a schedule is for, what it spends and what it stores, in words."""
    plan, graph = lower(schedule), schedule.graph
    reuses = {kind: sum(block.reuse == kind for block in graph.blocks[:-1]) for kind in ("output", "delta")}
    how = " and ".join(f"{count} by {kind}" for kind, count in reuses.items() if count)
    table = schedule.provenance.get("table", "a table")
    blends = sum(cell.is_blend for row in plan.cells for cell in row)
    blended = f", {blends} computed answers blended" if blends else ""
    vectors = f", and {plan.vector_bytes / 2**20:.2f} MiB of per-channel weights" if plan.vector_bytes else ""
    time = f"{plan.time_share:.1%} of the measured time, " if graph.is_timed else ""
    return (
        f"{table} for {schedule.denoiser.class_name} with {schedule.sampler.class_name or 'a plain loop'}, "
        f"{schedule.steps} steps\n"
        f"{len(graph) - 1} blocks, reused {how}\n"
        f"computes {plan.macs_share:.1%} of the MACs ({1 / plan.macs_share:.2f}× fewer), "
        f"{time}{np.mean(plan.computed[:, :-1]):.0%} of the cells{blended}\n"
        f"stores at most {plan.peak_bytes / 2**20:.2f} MiB at the traced batch size{vectors}"
    )


def _mark(cell: Cell) -> str:
    if cell.vectors is not None:
        return PER_CHANNEL
    return FORECAST if cell.is_forecast else MARKS[cell.action]
