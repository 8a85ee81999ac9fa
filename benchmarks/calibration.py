"""Held-out error against the number of calibration samples: trained forecasts, and one sweep with nothing trained.

What each costs is given in reference samplings of 16 samples.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import stepmask
from results import save
from setting import SAMPLES, Setting, errors, timed
from stepmask import MaskSchedule, Profile, Trajectory

STEPS = 20
ROWS = 32
"""Measurements of all sweeps together, at least: few samples get several probes each."""


def swept(pipe: Any, trajectories: Sequence[Trajectory], budget: float) -> MaskSchedule:
    """The table of one sweep over each trajectory."""
    probes = max(1, ROWS // (SAMPLES * len(trajectories)))
    return Profile.merge(*(stepmask.sweep(pipe, run, probes=probes, ages=9) for run in trajectories)).schedule(budget)


WAYS: dict[str, Callable[[Any, Sequence[Trajectory], float], MaskSchedule]] = {
    "trained forecasts": stepmask.learn,
    "one sweep": swept,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--share", type=float, default=0.35)
    arguments.add_argument("--held-out", type=int, default=32)
    arguments.add_argument("--samples", type=int, nargs="+", default=[8, 16, 32, 64])
    asked = arguments.parse_args()
    setting = Setting("zoo:dit-emoji", STEPS)
    held_out, budget = setting.record(asked.held_out, 1), setting.budget(asked.share)
    found: dict[str, dict[int, dict[str, float]]] = {way: {} for way in WAYS}
    for samples in asked.samples:
        runs = setting.calibration(samples)
        for way, learn in WAYS.items():
            table, seconds = timed(partial(learn, setting.pipe, runs, budget))
            cost = {"reference_samplings_of_16": seconds / setting.reference_s}
            found[way][samples] = {**errors(held_out, table), **cost}
    most = {way: max(row["reference_samplings_of_16"] for row in rows.values()) for way, rows in found.items()}
    save(
        "calibration",
        {
            "what": f"zoo:dit-emoji, DDIM {STEPS}, guidance 4, {budget:.3f} of MACs, {asked.held_out} held-out samples",
            "by_calibration_samples": found,
        },
        goal="at most 60 reference samplings of 16 samples to train, at most 10 for a sweep",
        met=most["trained forecasts"] <= 60 and most["one sweep"] <= 10,
    )


if __name__ == "__main__":
    main()
