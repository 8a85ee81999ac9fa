"""`learn`: from a recorded run to a schedule within a budget."""

from pathlib import Path
from typing import Any, Protocol

from stepmask.denoiser.trace import trace
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import LearningError
from stepmask.learning.executors import Executor, LocalExecutor
from stepmask.learning.per_timestep import PerTimestep
from stepmask.schedule.budget import Budget
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.schedule import MaskSchedule


class Learner(Protocol):
    """A way to find a table within a budget."""

    def learn(
        self, trajectory: Trajectory, reference: MaskSchedule, budget: Budget, executor: Executor, folder: Path | None
    ) -> MaskSchedule:
        """The table."""


def learn(
    pipe: Any,
    trajectory: Trajectory,
    budget: float | Budget = 0.5,
    *,
    graph: BlockGraph | None = None,
    learner: Learner | None = None,
    executor: Executor | None = None,
    folder: str | Path | None = None,
) -> MaskSchedule:
    """Learn a schedule for a pipeline.

        trajectory = stepmask.record(pipe, class_labels=[207, 360], num_inference_steps=20)
        schedule = stepmask.learn(pipe, trajectory, budget=0.5)

    Args:
        pipe: The pipeline, or plain denoiser, that the trajectory was recorded from.
        trajectory: The calibration run.
        budget: Share of the reference's MACs that may be spent, in (0, 1].
        graph: The blocks to mask; `None` = `trace(pipe, trajectory)`.
        learner: `None` = `PerTimestep()`, the paper's.
        executor: Where independent jobs run; `None` = `LocalExecutor()`.
        folder: Finished jobs are kept here, and a killed run goes on where it stopped; `None` = nowhere.

    Raises:
        InvalidBudget: The budget is outside (0, 1], or cannot be reached.
        LearningError: The trajectory is from another pipeline or has one step only, or the loss is not finite.
    """
    if trajectory.sampling.pipe is not pipe:
        raise LearningError(
            given="a trajectory of another pipeline",
            expected="a trajectory recorded from this one",
            advice="Call stepmask.record(pipe, ...) first",
        )
    if trajectory.steps < 2:
        raise LearningError(
            given="a run of one step", expected="at least two steps", advice="There is nothing to reuse in one step"
        )
    budget = Budget.of(budget)
    graph = graph or trace(pipe, trajectory)
    reference = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    return (learner or PerTimestep()).learn(
        trajectory, reference, budget, executor or LocalExecutor(), Path(folder) if folder else None
    )
