"""`learn`: from a recorded run to a schedule within a budget."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.identity import claim_for, digest
from stepmask.denoiser.modes import autocast_as, own_modes, refuse_made_in_inference_mode
from stepmask.denoiser.refusals import refuse_split
from stepmask.denoiser.timing import time_blocks
from stepmask.denoiser.trace import trace
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import LearningError
from stepmask.executors.filed import Kind, finish
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.files import as_path
from stepmask.learning.task import Task
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.budget import Budget
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.schedule import MaskSchedule


class Learner(Protocol):
    """A way to find a table within a budget."""

    def learn(self, task: Task) -> MaskSchedule:
        """The table."""


@own_modes()
def learn(
    pipe: Any,
    trajectory: Trajectory | Sequence[Trajectory],
    budget: float | Budget = 0.5,
    *,
    graph: BlockGraph | None = None,
    learner: Learner | None = None,
    executor: Executor | None = None,
    folder: str | bytes | Path | None = None,
) -> MaskSchedule:
    """Learn a schedule for a pipeline.

        labels = [[207, 360], [1, 17], [88, 279]]
        trajectories = [stepmask.record(pipe, class_labels=few, num_inference_steps=20) for few in labels]
        schedule = stepmask.learn(pipe, trajectories, budget=0.5)

    Gradients are on, inference mode and autocast off, whatever they are around the call; runs are repeated under the
    autocast that they were recorded under.

    Args:
        pipe: The pipeline, or plain denoiser, that the trajectory was recorded from.
        trajectory: The calibration run, or several of the same sampler. The default learner takes one of them per
            iteration: many short ones are better than one long one.
        budget: Share of the reference's MACs that may be spent, in (0, 1]; or a `Budget`, of MACs or of measured time,
            with or without a limit to the store.
        graph: The blocks to mask; `None` = `trace(pipe, trajectory)`. For a budget in time the blocks are timed here
            and now, and the provenance says so, unless this graph has their times (`time_blocks`).
        learner: `None` = `TrainedForecasts()`. `PerTimestep()` is the paper's.
        executor: Where independent jobs run; `None` = `LocalExecutor()`.
        folder: Finished jobs are kept here, and a killed run goes on where it stopped; `None` = nowhere.

    Raises:
        InvalidBudget: The budget is outside (0, 1], or cannot be reached.
        InvalidRunFolder: The folder holds results of other weights, or damaged ones.
        ClusterError: The executor cannot hand out jobs.
        LearningError: A trajectory is from another pipeline or has one step only, they differ in their sampler, or the
            loss is not finite.
    """
    trajectories = [trajectory] if isinstance(trajectory, Trajectory) else list(trajectory)
    _check(pipe, trajectories)
    budget = Budget.of(budget)
    with autocast_as(trajectories[0].sampling.autocast):
        graph = graph or trace(pipe, trajectories[0])
    folder = as_path(folder) if folder else None
    if folder:
        claim_for(pipe, folder)
    executor = executor or LocalExecutor()
    timed_here = budget.time is not None and not graph.is_timed
    if timed_here:
        (graph,) = finish(TIMES, executor.share(trajectories[0]), [graph], executor, folder)
    reference = MaskSchedule.all_compute(graph, trajectories[0].denoiser, trajectories[0].sampler)
    task = Task(trajectories, reference, budget, executor, folder)
    schedule = (learner or TrainedForecasts()).learn(task)
    if not timed_here:
        return schedule
    times = {"timed_by": "stepmask.learn", "denoiser_ms": sum(block.ms for block in graph.blocks)}
    return replace(schedule, provenance={**schedule.provenance, "times": times})


def _timed(trajectory: Trajectory, graph: BlockGraph) -> BlockGraph:
    with autocast_as(trajectory.sampling.autocast):
        return time_blocks(trajectory.sampling.pipe, trajectory, graph)


TIMES = Kind[BlockGraph, BlockGraph](
    title="timing blocks",
    run=_timed,
    name=lambda graph: f"times-{digest(graph.to_plain())}.json",
    dump=lambda graph: json.dumps(graph.to_plain()),
    load=lambda content: BlockGraph.from_plain(json.loads(content)),
)
"""A job, so that a run that goes on, and all processes of one run, have the same times."""


def _check(pipe: Any, trajectories: Sequence[Trajectory]) -> None:
    if not trajectories:
        raise LearningError(
            given="no trajectory", expected="at least one", advice="Call stepmask.record(pipe, ...) first"
        )
    for trajectory in trajectories:
        trajectory.check_pipe(pipe)
    refuse_made_in_inference_mode(pipe)
    refuse_split(denoiser_of(pipe))
    if len({trajectory.sampler for trajectory in trajectories}) > 1:
        raise LearningError(
            given="trajectories of several samplers or step counts",
            expected="the same for all",
            advice="Record them with equal settings, and learn a schedule for each sampler",
        )
    if trajectories[0].steps < 2:
        raise LearningError(
            given="a run of one step", expected="at least two steps", advice="There is nothing to reuse in one step"
        )
