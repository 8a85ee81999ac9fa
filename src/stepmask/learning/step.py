"""`learn_step`: the scores of one row, from one step's forward and backward passes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepmask.denoiser.call import Call
from stepmask.denoiser.calls import as_they_lie
from stepmask.denoiser.identity import digest
from stepmask.denoiser.values import each, tensors
from stepmask.errors import LearningError
from stepmask.learning.bench import Bench
from stepmask.learning.floats import power_of_two
from stepmask.learning.guidance import Guidance
from stepmask.learning.objective import Objective, expected_cost, relative_error
from stepmask.learning.relax import Relaxation
from stepmask.schedule.graph import BlockGraph


@dataclass(frozen=True)
class StepJob:
    """All that one row needs; nothing of it depends on another row that is being learned.

    Args:
        step: The step whose row is learned.
        calls: What the denoiser was given, by branch and then step, from the last fully computed step before this
            one up to this one; of the branches that this step has.
        networks: Which of the pipeline's networks evaluates each of these branches.
        present: Which parts of the batch each of these steps has.
        rows: The rows of the steps before this one in `calls`, shape (len(calls[0]) − 1, blocks): they fill the store.
        graph: The blocks.
        costs: Of each block, as a share of an evaluation, shape (blocks,).
        guidance: How the outputs of all branches become what the scheduler is handed: there fidelity is measured.
        objective: What the scores are trained for.
        relaxation: How bits become scores.
        share: Budget of this row, as a share of an evaluation's cost, for relaxations that have a hard one.
        whole_steps: Whether the denoiser itself may be reused; if not, its score stays 1.
        iterations: Training steps.
        seed: Of the relaxation's noise.
    """

    step: int
    calls: tuple[Sequence[Call], ...]
    networks: tuple[int, ...]
    present: tuple[tuple[int, ...], ...]
    rows: npt.NDArray[np.bool_]
    graph: BlockGraph
    costs: npt.NDArray[np.float64]
    guidance: Guidance
    objective: Objective
    relaxation: Relaxation
    share: float
    whole_steps: bool
    iterations: int
    seed: int

    def digest(self) -> str:
        """A name for the content of this job: equal jobs have equal names, on any machine."""
        settings = (
            self.step,
            self.networks,
            self.present,
            self.guidance.channels,
            self.objective,
            self.relaxation,
            self.share,
            self.whole_steps,
            self.iterations,
            self.seed,
            self.graph,
        )
        calls = [(call.args, call.kwargs) for branch in self.calls for call in as_they_lie(branch)]
        return digest(repr(settings), self.rows, self.costs, list(tensors([calls, self.guidance.weights])))


def learn_step(denoisers: Sequence[nn.Module], job: StepJob) -> npt.NDArray[np.float64]:
    """Train the scores of one row.

    A pure function of the job and the weights. Memory: one evaluation with gradients, however many steps there are.

    Args:
        denoisers: The pipeline's networks.
        job: The row.

    Returns:
        Scores, shape (blocks,), in [0, 1].

    Raises:
        LearningError: The loss is not finite.
    """
    generator = torch.Generator().manual_seed(job.seed)
    costs = torch.tensor(job.costs, dtype=torch.float32)
    parameter = job.relaxation.start(len(costs)).requires_grad_()
    optimiser = torch.optim.Adam([parameter], lr=job.relaxation.rate)
    branches = [
        _Branch(Bench(denoisers[network], job.graph), calls, job)
        for network, calls in zip(job.networks, job.calls, strict=True)
    ]
    target = job.guidance([branch.target for branch in branches])
    job = replace(job, guidance=job.guidance.to(target.device))  # for all iterations
    factor = _factor(job, target)
    for iteration in range(job.iterations):
        with torch.no_grad():
            job.relaxation.project(parameter, costs, job.share)
        with torch.enable_grad():
            scores = job.relaxation.sample(parameter, iteration / max(job.iterations - 1, 1), generator)
            loss = _loss(job, branches, target, scores)
        if not torch.isfinite(loss):
            raise _not_finite(job)
        (gradient,) = torch.autograd.grad(loss * factor, [parameter])
        if not torch.isfinite(gradient).all():
            raise _not_finite(job)
        parameter.grad = gradient / factor
        optimiser.step()
    with torch.no_grad():
        job.relaxation.project(parameter, costs, job.share)
    learned: npt.NDArray[np.float64] = job.relaxation.scores(parameter.detach()).double().numpy()
    return learned if job.whole_steps else np.append(learned[:-1], 1.0)


class _Branch:
    """One branch of the step: its store filled, its targets known."""

    def __init__(self, bench: Bench, calls: Sequence[Call], job: StepJob) -> None:
        self.bench, self.call = bench, calls[-1]
        with bench.attached():
            for call, present, row in zip(calls[:-1], job.present[:-1], job.rows, strict=True):
                bench.turn(call, present)
                bench.follow(call, row)
            bench.turn(self.call, job.present[-1])
            self.target = each(torch.clone, bench.observe(self.call))

    def blend(self, scores: Tensor) -> tuple[Any, list[Tensor]]:
        with self.bench.attached():
            return self.bench.blend(self.call, scores)


def _loss(job: StepJob, branches: Sequence[_Branch], target: Tensor, scores: Tensor) -> Tensor:
    if not job.whole_steps:
        scores = torch.cat([scores[:-1], scores.new_ones(1)])
    moved = scores.to(target.device)  # in one piece, and its gradient comes back in one
    pairs = [branch.blend(moved) for branch in branches]
    error = relative_error(job.guidance([output for output, _ in pairs]), target)
    cost = expected_cost(scores, job.graph, job.costs)
    return job.objective(error, [feature for _, features in pairs for feature in features], cost)


def _factor(job: StepJob, target: Tensor) -> float:
    """How many times larger gradients are made on their way through the denoiser, a power of two.

    An output's number has a gradient of 2·w·|difference| / ‖target‖²: of that float16 leaves few digits or none. Times
    √numbers · ‖target‖ / w it is twice the relative difference, where that is the same for all of them.
    """
    size = target.norm() * target.numel() ** 0.5 / max(job.objective.weight, 1e-20)
    return float(power_of_two(size.clamp(1e-18, 1e18)))


def _not_finite(job: StepJob) -> LearningError:
    return LearningError(
        given=f"a loss or a gradient at step {job.step} that is not finite",
        expected="finite outputs of the denoiser",
        advice="Check its dtype: float16 overflows at 65504; bfloat16 does not",
    )
