"""`PerTimestep`: the paper's learner (arXiv 2603.19939). Every row on its own, step-aware weights, rounds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stepmask.denoiser.call import Call
from stepmask.denoiser.calls import Calls
from stepmask.denoiser.device import device_of
from stepmask.denoiser.modes import autocast_as
from stepmask.denoiser.quantised import gradients_pass
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.seam import frozen
from stepmask.denoiser.trajectory import Trajectory, record_sampling
from stepmask.errors import LearningError
from stepmask.executors.filed import Kind, finish
from stepmask.learning.guidance import guidance_of
from stepmask.learning.objective import MeasuredGain, Objective, Scaling, relative_error, step_changes
from stepmask.learning.relax import Relaxation, Sigmoid
from stepmask.learning.rounding import round_scores
from stepmask.learning.step import StepJob, learn_step
from stepmask.learning.task import Task
from stepmask.schedule.budget import Budget
from stepmask.schedule.schedule import MaskSchedule

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PerTimestep:
    """Masks learned for each timestep independently.

    The first round is teacher-forced: latents and stored values are the reference's. Later rounds use the latents and
    the store of the run under the table learned so far, so that ages and drift are the true ones. The table with the
    smallest error on the calibration run is kept.

    Args:
        relaxation: `Sigmoid`, `StraightThrough` or `Concrete`.
        scaling: `MeasuredGain` or `Uniform`: what fidelity weighs at each step.
        feature: η of the objective, the weight of the blocks' own fidelity.
        price: λ of the objective, in units of the mean harm of reusing a whole step; later rounds adapt it so that
            scores settle near the budget.
        iterations: Training steps per row.
        rounds: The first included.
        max_age: A value is reused for at most this many steps.
        whole_steps: Whether the denoiser itself may be reused at a step, like any block.
        seed: Of the relaxations' noise.
    """

    relaxation: Relaxation = field(default_factory=Sigmoid)
    scaling: Scaling = field(default_factory=MeasuredGain)
    feature: float = 0.0
    price: float = 1.0
    iterations: int = 20
    rounds: int = 2
    max_age: int = 5
    whole_steps: bool = True
    seed: int = 0

    def learn(self, task: Task) -> MaskSchedule:
        """The best table of all rounds.

        Raises:
            LearningError: There are several trajectories, or a loss is not finite.
            InvalidBudget: The budget cannot be reached with `max_age`, or is in time and the graph was not timed.
        """
        trajectory, reference, budget = _only(task.trajectories), task.reference, task.budget
        weights, costs = self._weights(trajectory), budget.costs(reference.graph)
        shares = _shares(weights, trajectory, budget)
        under, table, price = trajectory, reference, self.price
        tried: list[tuple[float, MaskSchedule]] = []
        for _ in range(self.rounds):
            jobs = self._jobs(under, table, costs, weights, price, shares)
            scores = np.ones(reference.rows.shape)  # where a run begins all is computed
            for job, learned in zip(jobs, finish(ROW, task.shared, jobs, task.executor, task.folder), strict=True):
                scores[job.step] = learned
            if not self.whole_steps:
                scores[:, -1] = np.inf
            table = round_scores(scores, reference, budget, max_age=self.max_age)
            price *= float(np.clip(_natural_share(scores, costs) / budget.share, 0.25, 4.0))
            under = self._record_under(trajectory, table)
            tried.append((float(relative_error(under.sampled.latent, trajectory.sampled.latent)), table))
        error, best = min(tried, key=lambda pair: pair[0])
        return best.with_rows(best.rows, provenance=self._provenance(budget, error, [error for error, _ in tried]))

    def _weights(self, trajectory: Trajectory) -> Floats:
        """w_k, in units in which the mean harm of reusing a whole step is 1."""
        gains = self.scaling.measure(trajectory)
        harm = gains * step_changes(trajectory)
        return gains / max(float(harm[1:].mean()) if len(harm) > 1 else 1.0, 1e-20)

    def _jobs(
        self, under: Trajectory, table: MaskSchedule, costs: Floats, weights: Floats, price: float, shares: Floats
    ) -> list[StepJob]:
        whole = [int(step) for step in np.flatnonzero(table.rows.all(axis=1))]
        jobs, sampler = [], under.sampler
        for step in sorted({*range(under.steps)} - {*sampler.begins}):
            first = max(start for start in whole if start < step)
            branches = sampler.branches_at(step)
            places = [[sampler.evaluations.index((at, branch)) for at in range(first, step + 1)] for branch in branches]
            jobs.append(
                StepJob(
                    step=step,
                    calls=tuple(_picked(under.calls, window) for window in places),
                    networks=tuple(under.networks[window[-1]] if under.networks else 0 for window in places),
                    present=tuple(
                        sampler.present(at) if sampler.branches == 1 else () for at in range(first, step + 1)
                    ),
                    rows=table.rows[first:step],
                    graph=table.graph,
                    costs=costs,
                    guidance=guidance_of(under, step),
                    objective=Objective(float(weights[step]), self.feature, price),
                    relaxation=self.relaxation,
                    share=float(shares[step]),
                    whole_steps=self.whole_steps,
                    iterations=self.iterations,
                    seed=self.seed * 100_003 + step,
                )
            )
        return jobs

    def _record_under(self, trajectory: Trajectory, table: MaskSchedule) -> Trajectory:
        with apply(trajectory.sampling.pipe, table):
            return record_sampling(trajectory.sampling)

    def _provenance(self, budget: Budget, error: float, errors: list[float]) -> dict[str, object]:
        return {
            "table": "per-timestep",
            "learner": repr(self),
            "budget": budget.to_plain(),
            "calibration_error": error,
            "error_by_round": errors,
        }


def _picked(calls: Sequence[Call], places: Sequence[int]) -> Sequence[Call]:
    """Some calls, still where they lie."""
    if isinstance(calls, Calls):
        return Calls(calls.kept[place] for place in places)
    return [calls[place] for place in places]


def _learn_row(trajectories: Sequence[Trajectory], job: StepJob) -> Floats:
    sampling = trajectories[0].sampling
    for calls in job.calls:
        if isinstance(calls, Calls):
            calls.settle(device_of(sampling.denoiser))
    with autocast_as(sampling.autocast), frozen(sampling.pipe), gradients_pass(*sampling.denoisers):
        return learn_step(sampling.denoisers, job)


ROW = Kind[StepJob, Floats](
    title="learning rows",
    run=_learn_row,
    name=lambda job: f"row-{job.step:03d}-{job.digest()}.json",
    dump=lambda scores: json.dumps({"scores": scores.tolist()}),
    load=lambda content: np.array(json.loads(content)["scores"]),
)
"""Small enough to be read; the name says what was learned from."""


def _only(trajectories: Sequence[Trajectory]) -> Trajectory:
    if len(trajectories) > 1:
        raise LearningError(
            given=f"{len(trajectories)} trajectories",
            expected="one, whose samples are all of a row's batch",
            advice="Record one run with all samples",
        )
    return trajectories[0]


def _natural_share(scores: Floats, costs: Floats) -> float:
    """What the scores themselves would spend, cut at one half."""
    kept = (scores > 0.5) & (scores[:, -1:] > 0.5)
    return float((kept * costs).sum() / len(scores))


def _shares(weights: Floats, trajectory: Trajectory, budget: Budget) -> Floats:
    """Budget of each row for relaxations that have a hard one, shape (steps,); step 0 is computed whole.

    Reusing a share r of step k is taken to do harm h_k·r² (errors of one step add up coherently), h_k the harm of
    reusing all of it; minimising the sum at a fixed total gives r_k ∝ 1/h_k, clipped to 1.
    """
    harm = np.maximum((weights * step_changes(trajectory))[1:], 1e-12)
    steps = len(harm)
    reused = min(steps, (1 - budget.share) * (steps + 1))  # total of r over the steps after the first
    low, high = 0.0, float(harm.max() * steps)
    for _ in range(80):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level / harm, 1).sum() < reused else (low, level)
    return np.concatenate([[1.0], 1 - np.minimum(high / harm, 1)])
