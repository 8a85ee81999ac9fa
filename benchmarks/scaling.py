"""What a second worker of a Ray cluster is worth, and what handing out a job costs; workers of one CPU and thread."""

import argparse
import sys
import time
from typing import Any

import numpy as np

from results import alone, save
from setting import Setting
from stepmask import RayExecutor
from stepmask.denoiser.runtime import apply
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.schedule import MaskSchedule

PIPELINE, STEPS = "zoo:dit-emoji", 20
RUNS = 8
"""Sampling runs under a table, each a job of a second or more."""

EMPTY = 200
"""Jobs that do nothing."""


def nothing(_: Any, job: int) -> int:
    return job


def sampled(shared: tuple[Any, MaskSchedule], _: int) -> float:
    trajectory, table = shared
    with apply(trajectory.sampling.pipe, table):
        return float(np.abs(trajectory.sampling().latent.numpy()).sum())


def timed(workers: int, runs: int) -> tuple[float, float]:
    """Seconds that all sampling runs take, and an empty job; on a cluster of that many CPUs, workers warmed up."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    setting, executor = Setting(PIPELINE, STEPS), RayExecutor()
    trajectory = setting.record(4, 0)
    shared = executor.share((trajectory, fixed_interval(setting.full, 0.5)))
    list(executor.map(sampled, shared, range(2 * workers), title="warming up"))
    started = time.perf_counter()
    sums = dict(executor.map(sampled, shared, range(runs), title="sampling"))
    between = time.perf_counter()
    list(executor.map(nothing, shared, range(EMPTY), title="nothing"))
    assert len(set(sums.values())) == 1, "workers disagree"
    return between - started, (time.perf_counter() - between) / EMPTY


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("workers", nargs="?", type=int, help="measure this many alone, and print seconds")
    arguments.add_argument("--runs", type=int, default=RUNS)
    arguments.add_argument("--rounds", type=int, default=3)
    asked = arguments.parse_args()
    if asked.workers:
        print(*timed(asked.workers, asked.runs))
        return
    speeds, overheads = [], []
    for _ in range(asked.rounds):
        one, two = (
            [float(word) for word in alone(sys.argv[0], str(workers), "--runs", str(asked.runs)).split()]
            for workers in (1, 2)
        )
        speeds.append(one[0] / two[0])
        overheads += [1000 * one[1], 1000 * two[1]]
    save(
        "scaling",
        {
            "what": f"{asked.runs} masked runs of {PIPELINE}, {STEPS} steps, 4 guided samples; {EMPTY} empty jobs",
            "two_workers_over_one": speeds,
            "overhead_ms_per_job": overheads,
        },
        goal="two workers at least 1.7 times one, and less than 50 ms per job",
        met=min(speeds) >= 1.7 and max(overheads) < 50,
    )


if __name__ == "__main__":
    main()
