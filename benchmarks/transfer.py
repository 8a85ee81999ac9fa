"""A table that is carried over, against one learned where it is used: to other steps, and to another resolution.

All spend the same MACs; errors are of held-out samples. What is finished lies in runs/transfer, so that a killed run
goes on where it stopped.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import stepmask
from results import kept, kept_table, save
from setting import Setting, errors, name_of
from stepmask import MaskSchedule
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower

LEARNED_AT = 20
RUNS = Path("runs") / "transfer"


def learned(setting: Setting, budget: float) -> MaskSchedule:
    """What the default learner makes of 64 samples."""
    return stepmask.learn(setting.pipe, setting.calibration(64), budget)


def at_home(pipeline: str, share: float) -> MaskSchedule:
    """The table that is carried over."""
    home = Setting(pipeline, LEARNED_AT)
    return learned(home, home.budget(share))


def carried(table: MaskSchedule, setting: Setting, samples: int) -> dict[str, Any]:
    """Errors of a table carried over to a setting, of one learned there, and of a fixed interval."""
    moved = table.resample(setting.full.sampler)
    moved = setting.full.with_rows(moved.rows, moved.forecasts)
    share, held_out = lower(moved).macs_share, setting.record(samples, 1, held_out=True)
    contenders = {
        "carried over": moved,
        "learned there": learned(setting, share),
        **{f"interval, order {order}": fixed_interval(setting.full, share, order=order) for order in (0, 1, 2)},
    }
    return {"macs": share, **{name: errors(held_out, contender) for name, contender in contenders.items()}}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipeline", default="zoo:ldm-emoji")
    arguments.add_argument("--share", type=float, default=0.5)
    arguments.add_argument("--steps", type=int, nargs="*", default=[30, 50])
    arguments.add_argument("--sizes", type=int, nargs="*", default=[96], help="in pixels; not every pipeline has them")
    arguments.add_argument("--samples", type=int, default=32)
    asked = arguments.parse_args()
    folder = RUNS / f"{name_of(asked.pipeline)}-{asked.share:g}"
    table = kept_table(folder, lambda: at_home(asked.pipeline, asked.share))
    elsewhere = {f"{steps} steps": Setting(asked.pipeline, steps) for steps in asked.steps}
    elsewhere |= {f"{size} pixels": Setting(asked.pipeline, LEARNED_AT, size=size) for size in asked.sizes}
    found: dict[str, Any] = {}
    for place, setting in elsewhere.items():
        path = folder / f"{place}, {asked.samples} samples.json"
        found[place] = kept(path, partial(carried, table, setting, asked.samples))
    over = {place: row["carried over"]["error"] / row["learned there"]["error"] for place, row in found.items()}
    save(
        "transfer",
        {
            "what": f"{asked.pipeline}, learned at {LEARNED_AT} steps, {asked.samples} held-out samples",
            "places": found,
            "carried_over_learned": over,
        },
        goal="as good as what is learned there",
        met=all(ratio <= 1 for ratio in over.values()),
    )


if __name__ == "__main__":
    main()
