"""What a regular table is worth before anything is learned: where it computes, what it forecasts, and how."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

import stepmask
from results import save
from setting import Setting, errors
from stepmask import MaskSchedule, Trajectory
from stepmask.learning.starts import groups, refreshed_interval
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.budget import Budget
from stepmask.schedule.forecasts import taylor_forecasts
from stepmask.schedule.rectify import lower

STEPS = 20


def of_rows(full: MaskSchedule, rows: Any, order: int) -> MaskSchedule:
    """Taylor forecasts wherever a table's rows reuse."""
    return full.with_rows(rows, taylor_forecasts(rows, order))


def at_steps(full: MaskSchedule, computed: Sequence[int], order: int, whole_before: int = 0) -> MaskSchedule:
    """Some steps computed; up to a step the others reuse the denoiser's output, after it its blocks'."""
    rows = np.zeros(full.rows.shape, dtype=bool)
    rows[whole_before:, -1] = True
    rows[list(computed)] = True
    return of_rows(full, rows, order)


def staggered(full: MaskSchedule, phases: Any, interval: int, order: int) -> MaskSchedule:
    """Every block at a fixed interval, blocks of different phases at different steps."""
    rows = np.arange(STEPS)[:, None] % interval == np.append(phases % interval, 0)
    rows[0], rows[:, -1] = True, True
    return of_rows(full, rows, order)


def curved(count: int, power: float) -> list[int]:
    """Steps that lie denser at the beginning (power above 1) or at the end."""
    return sorted({round(STEPS * (index / count) ** power) for index in range(count)})


def tables(full: MaskSchedule) -> dict[str, MaskSchedule]:
    columns, found = np.arange(len(full.graph) - 1), {}
    for order in (0, 1, 2):
        found[f"half, interval, order {order}"] = fixed_interval(full, 0.5, order=order)
        found[f"half, whole step, order {order}"] = whole_step(full, 0.5, order=order)
        found[f"half, attention and feed-forward in turns, order {order}"] = staggered(full, columns % 2, 2, order)
        found[f"half, first and second half in turns, order {order}"] = staggered(full, columns // 12, 2, order)
    for power in (0.7, 0.85, 1.2, 1.5):
        found[f"half, interval, order 2, steps to the power of {power}"] = at_steps(full, curved(10, power), 2)
    for before in (4, 8, 12, 16):
        found[f"quarter, whole steps before {before}, interval after, order 1"] = at_steps(
            full, curved(5, 1), 1, before
        )
    for share in (0.25, 0.35):
        found[f"{share}, interval, order 1"] = fixed_interval(full, share, order=1)
        found[f"{share}, whole step, order 1"] = whole_step(full, share, order=1)
        most, budget = int(share * STEPS), Budget(macs=share + 0.02)
        for name, members in groups(full.graph).items():
            refreshed = refreshed_interval(full, budget, members, most - 1, most, order=1)
            if refreshed is not None:
                found[f"{share} and .02 more, one whole step less, {name} refreshed, order 1"] = refreshed
    return found


def measured(held_out: Trajectory, table: MaskSchedule) -> dict[str, float]:
    return {"macs": lower(table).macs_share, **errors(held_out, table)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, default=32)
    asked = arguments.parse_args()
    setting = Setting("zoo:dit-emoji", STEPS)
    held_out = stepmask.record(setting.pipe, seed=1000, **setting.call(asked.samples, 1))
    found = {}
    for granularity in ("sublayer", "block"):
        graph = stepmask.trace(setting.pipe, held_out, granularity=granularity)
        full = MaskSchedule.all_compute(graph, held_out.denoiser, held_out.sampler)
        if granularity == "sublayer":
            found.update({name: measured(held_out, table) for name, table in tables(full).items()})
        else:
            for order in (0, 1, 2):
                found[f"half, interval, delta reuse of whole blocks, order {order}"] = measured(
                    held_out, fixed_interval(full, 0.5, order=order)
                )
    best = min(found[name]["error"] for name in found if name.startswith("half, interval, order"))
    irregular = [row["error"] for name, row in found.items() if "turns" in name or "power" in name]
    save(
        "regular_tables",
        {"what": f"zoo:dit-emoji, DDIM 20, guidance 4, {asked.samples} held-out samples", "tables": found},
        goal="whether an irregular table at half of the MACs beats the interval at its best order",
        met=min(irregular) < best,
    )


if __name__ == "__main__":
    main()
