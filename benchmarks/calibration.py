"""Held-out error against the number of calibration samples: trained forecasts, and one sweep with nothing trained.

What each costs is given in reference samplings of 16 samples.
"""

import argparse
import time
from collections.abc import Sequence
from statistics import fmean, geometric_mean
from typing import Any

import stepmask
from results import save
from stepmask import MaskSchedule, Profile, Trajectory, zoo
from stepmask.denoiser.families import example_call
from stepmask.denoiser.runtime import apply
from stepmask.evaluation.metrics import latent_errors
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower

STEPS = 20
ROWS = 32
"""Measurements of all sweeps together, at least: few samples get several probes each."""


def swept(pipe: Any, trajectories: Sequence[Trajectory], budget: float) -> MaskSchedule:
    """The table of one sweep over each trajectory."""
    samples = sum(len(trajectory.sampled.latent) for trajectory in trajectories)
    probes = max(1, ROWS // samples)
    return Profile.merge(*(stepmask.sweep(pipe, run, probes=probes, ages=9) for run in trajectories)).schedule(budget)


def measured(held_out: Trajectory, table: MaskSchedule) -> dict[str, float]:
    with apply(held_out.sampling.pipe, table):
        found = latent_errors(held_out.sampling().latent, held_out.sampled.latent)
    return {"error": fmean(found), "geometric_error": geometric_mean(found)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--share", type=float, default=0.35)
    arguments.add_argument("--held-out", type=int, default=32)
    asked = arguments.parse_args()
    pipe: Any = zoo.load("zoo:dit-emoji")
    pipe.set_progress_bar_config(disable=True)

    def record(count: int, seed: int) -> Trajectory:
        return stepmask.record(pipe, seed=seed, **example_call(pipe, count, seed), num_inference_steps=STEPS)

    held_out = record(asked.held_out, 1)
    started = time.perf_counter()
    record(16, 99)
    reference_s = time.perf_counter() - started
    full = MaskSchedule.all_compute(stepmask.trace(pipe, held_out), held_out.denoiser, held_out.sampler)
    budget = lower(fixed_interval(full, asked.share)).macs_share
    found: dict[str, dict[int, dict[str, float]]] = {"trained forecasts": {}, "one sweep": {}}
    for samples in (8, 16, 32, 64):
        runs = [record(4, seed) for seed in range(100, 100 + samples // 4)]
        for name, learn in (("trained forecasts", stepmask.learn), ("one sweep", swept)):
            started = time.perf_counter()
            table = learn(pipe, runs, budget)
            cost = (time.perf_counter() - started) / reference_s
            found[name][samples] = {**measured(held_out, table), "reference_samplings_of_16": cost}
    costs = [row["reference_samplings_of_16"] for row in found["trained forecasts"].values()]
    swept_costs = [row["reference_samplings_of_16"] for row in found["one sweep"].values()]
    save(
        "calibration",
        {
            "what": f"zoo:dit-emoji, DDIM {STEPS}, guidance 4, {budget:.3f} of MACs, {asked.held_out} held-out samples",
            "by_calibration_samples": found,
        },
        goal="at most 60 reference samplings of 16 samples to train, at most 10 for a sweep",
        met=max(costs) <= 60 and max(swept_costs) <= 10,
    )


if __name__ == "__main__":
    main()
