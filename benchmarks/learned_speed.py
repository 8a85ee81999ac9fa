"""Measured speed-up of the denoiser under every table that `frontier.py` has left in results/schedules.

Finished tables lie in runs/learned_speed, so that a killed run goes on where it stopped.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import stepmask
from frontier import SCHEDULES
from results import gain, kept, save
from setting import Setting
from stepmask import MaskSchedule
from stepmask.denoiser.identity import digest
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "learned_speed"

LEAST = 0.85
"""Of the speed-up that the MACs promise, at a half or more of them."""


def measured(samples: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Speed-ups by "PIPELINE, STEPS-SHARE"."""
    found = {}
    for folder in sorted(folder for folder in SCHEDULES.glob("*/*") if folder.name.count("-") == 1):  # STEPS-SHARE
        pipeline, table = folder.parent.name, MaskSchedule.from_pretrained(folder)
        path = RUNS / f"{pipeline}-{folder.name}-{digest(table.to_json(), samples, repeats)}.json"
        told = f"{pipeline}, {folder.name}"
        found[told] = kept(path, partial(speed, f"zoo:{pipeline}", table, samples, repeats))
    return found


def speed(pipeline: str, table: MaskSchedule, samples: int, repeats: int) -> dict[str, Any]:
    """Of one table, by turns with the reference: median, slowest and fastest."""
    setting = Setting(pipeline, table.steps)
    report = stepmask.evaluate(setting.pipe, table, repeats=repeats, **setting.call(samples, 1, held_out=True))
    where = {key: report.machine[key] for key in ("processor", "threads")}
    return {"macs_share": lower(table).macs_share, **gain(report, "schedule"), **where}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--samples", type=int, default=16, help="drawn at once")
    arguments.add_argument("--repeats", type=int, default=3)
    asked = arguments.parse_args()
    found: dict[str, Any] = measured(asked.samples, asked.repeats)
    save(
        "learned_speed",
        {"what": f"{asked.samples} samples at once, {asked.repeats} turns", "tables": found},
        goal=f"at a half of the MACs at least {LEAST} of the speed-up that they promise",
        met=all(row["over_promise"] >= LEAST for row in found.values() if row["macs_share"] > 0.45),
    )


if __name__ == "__main__":
    main()
