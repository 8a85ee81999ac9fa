"""`Task`: what a learner is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepmask.denoiser.trajectory import Trajectory
from stepmask.executors.local import Executor
from stepmask.schedule.budget import Budget
from stepmask.schedule.schedule import MaskSchedule


@dataclass(frozen=True)
class Task:
    """Find a table within a budget.

    Args:
        trajectories: Reference runs of one sampler; their seeds are the calibration set.
        reference: The all-compute table.
        budget: Of the whole run, the denoiser's glue at every step included.
        executor: Where independent jobs run.
        folder: What is finished is kept here, to go on from; `None` = nowhere.
    """

    trajectories: Sequence[Trajectory]
    reference: MaskSchedule
    budget: Budget
    executor: Executor
    folder: Path | None

    @cached_property
    def shared(self) -> Any:
        """The trajectories, and the pipeline with them, where jobs run."""
        return self.executor.share(self.trajectories)
