"""Measured speed-up of the denoiser under every table that `frontier.py` has left in results/schedules."""

import argparse
from typing import Any

import stepmask
from frontier import SCHEDULES
from results import save
from setting import Setting
from stepmask import MaskSchedule
from stepmask.schedule.rectify import lower

LEAST = 0.85
"""Of the speed-up that the MACs promise, at a half or more of them."""


def measured(samples: int, repeats: int) -> dict[str, dict[str, float]]:
    """Speed-ups by "PIPELINE, STEPS-SHARE", by turns with the reference: median, slowest and fastest."""
    found = {}
    for folder in sorted(SCHEDULES.glob("*/*")):
        table = MaskSchedule.from_pretrained(folder)
        setting = Setting(f"zoo:{folder.parent.name}", table.steps)
        report = stepmask.evaluate(setting.pipe, table, repeats=repeats, **setting.call(samples, 1, held_out=True))
        speedup, slowest, fastest = report.speedup("schedule")
        share = lower(table).macs_share
        found[f"{folder.parent.name}, {folder.name}"] = {
            "macs_share": share,
            "speedup": speedup,
            "slowest": slowest,
            "fastest": fastest,
            "over_promise": speedup * share,
        }
    return found


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
