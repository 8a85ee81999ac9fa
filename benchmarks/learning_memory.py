"""Peak memory of each way to learn with 50 steps over that with 10 steps, each in a process of its own."""

import resource
import sys
from collections.abc import Callable
from typing import Any

import stepmask
from results import alone, save
from stepmask import Trajectory, zoo
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts

WAYS: dict[str, Callable[[Any, Trajectory], Any]] = {
    "per-timestep": lambda pipe, run: stepmask.learn(pipe, run, 0.5, learner=PerTimestep(iterations=2, rounds=2)),
    "sweep": lambda pipe, run: stepmask.sweep(pipe, run, probes=1),
    "trained forecasts": lambda pipe, run: stepmask.learn(pipe, run, 0.5, learner=TrainedForecasts(passes=1)),
}


def peak(way: str, steps: int) -> int:
    """Learn with few iterations; the process's peak memory in bytes."""
    pipe = zoo.load("zoo:dit-emoji")
    pipe.set_progress_bar_config(disable=True)
    WAYS[way](pipe, stepmask.record(pipe, class_labels=list(range(8)), num_inference_steps=steps))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    if len(sys.argv) > 1:
        print(peak(sys.argv[1], int(sys.argv[2])))
        return
    peaks = {way: {steps: int(alone(__file__, way, str(steps))) for steps in (10, 50)} for way in WAYS}
    ratios = {way: found[50] / found[10] for way, found in peaks.items()}
    save(
        "learning_memory",
        {"what": "zoo:dit-emoji, 8 guided samples", "peak_bytes": peaks, "ratios_50_to_10": ratios},
        goal="ratios at most 1.05",
        met=max(ratios.values()) <= 1.05,
    )


if __name__ == "__main__":
    main()
