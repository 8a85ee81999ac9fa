"""Peak memory of learning with 50 steps over that with 10 steps, each in a process of its own."""

import resource
import subprocess
import sys

import stepmask
from results import save
from stepmask import zoo
from stepmask.learning.per_timestep import PerTimestep


def learn(steps: int) -> int:
    """Learn a table with few iterations; the process's peak memory in bytes."""
    pipe = zoo.load("zoo:dit-emoji")
    pipe.set_progress_bar_config(disable=True)
    trajectory = stepmask.record(pipe, class_labels=list(range(8)), num_inference_steps=steps)
    stepmask.learn(pipe, trajectory, 0.5, learner=PerTimestep(iterations=2, rounds=2))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    if len(sys.argv) > 1:
        print(learn(int(sys.argv[1])))
        return
    peaks = {
        steps: int(subprocess.check_output([sys.executable, __file__, str(steps)], text=True)) for steps in (10, 50)
    }
    ratio = peaks[50] / peaks[10]
    save(
        "learning_memory",
        {"what": "zoo:dit-emoji, 8 guided samples, two rounds", "peak_bytes": peaks, "ratio_50_to_10": ratio},
        goal="ratio at most 1.05",
        met=ratio <= 1.05,
    )


if __name__ == "__main__":
    main()
