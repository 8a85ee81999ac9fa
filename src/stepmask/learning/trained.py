"""`TrainedForecasts`: the best regular table, its forecasts trained on the masked run itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from stepmask.denoiser.runtime import apply
from stepmask.denoiser.trajectory import Trajectory
from stepmask.learning.chain import loss_and_gradient
from stepmask.learning.executors import Executor
from stepmask.learning.objective import sample_errors
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.budget import Budget
from stepmask.schedule.forecasts import DIFFERENCES, WINDOW, widest
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

PACE = (0.05, 1.0, 1.0)
"""Relative learning rates of a forecast's scale and its first and second difference; the scale is the stiff one."""


@dataclass(frozen=True)
class TrainedForecasts:
    """A fixed interval or whole-step reuse, whichever Taylor order runs best, and then better forecasts than Taylor's.

    The weights of one step are moved together for all blocks: three numbers a step, so that a few samples suffice.
    The loss is the mean logarithm of the samples' relative errors at the end of the masked run, so that no single hard
    sample decides; its gradient goes through the pipeline's own sampler, with stored values held constant.

    Args:
        iterations: Of Adam; each costs about two sampling runs at the budget.
        rate: Learning rate, falling linearly.
        window: How many stored values a forecast may read, 2 or 3: the memory of the store.
    """

    iterations: int = 12
    rate: float = 0.04
    window: int = WINDOW

    def learn(
        self, trajectory: Trajectory, reference: MaskSchedule, budget: Budget, executor: Executor, folder: Path | None
    ) -> MaskSchedule:
        """The best table seen on the calibration run; never worse there than the regular table it started from.

        Args:
            trajectory: A reference run; its seeds are the calibration set.
            reference: The all-compute table.
            budget: Share of the MACs, the denoiser's glue at every step included.
            executor: Not used: one gradient step needs the one before it.
            folder: Not used.

        Raises:
            InvalidBudget: Not even one computed step fits.
        """
        counts = {make: _computed_steps(make, reference, budget) for make in (fixed_interval, whole_step)}
        tables = [
            make(reference, count / reference.steps, order=order)
            for make, count in counts.items()
            for order in range(self.window)
            if count
        ]
        losses = [self._loss(trajectory, table) for table in tqdm(tables, "regular tables", disable=None)]
        start = tables[int(np.argmin(losses))]
        weights, loss = self._train(trajectory, start, min(losses))
        table = start.provenance["table"]
        found = {"table": f"trained forecasts on {table}", "learner": repr(self), "budget": {"macs": budget.macs}}
        errors = {"calibration_error": float(np.exp(loss)), "start_error": float(np.exp(min(losses)))}
        return rectify(start.with_rows(start.rows, weights, provenance={**found, **errors}))

    @torch.no_grad()
    def _loss(self, trajectory: Trajectory, table: MaskSchedule) -> float:
        with apply(trajectory.sampling.pipe, table):
            return float(_mean_log_error(trajectory.sampling.latent(), trajectory))

    def _train(self, trajectory: Trajectory, start: MaskSchedule, loss: float) -> tuple[npt.NDArray[np.float64], float]:
        """The best weights, shape (steps, blocks, 3), and their loss; the start's own if none are better."""
        values = widest(start.rows, self.window)
        readable = np.arange(WINDOW) < values[..., None]
        reading = start.with_rows(start.rows, np.where(start.rows[..., None], 0.0, readable))
        basis = torch.tensor(DIFFERENCES, dtype=torch.float32)
        moves = torch.tensor(readable & ~start.rows[..., None]) * torch.tensor(PACE)
        shared = torch.zeros(start.steps, 1, WINDOW, requires_grad=True)
        optimiser = torch.optim.Adam([shared], lr=self.rate, betas=(0.8, 0.95))
        best = start.forecasts
        for iteration in tqdm(range(self.iterations), "training forecasts", disable=None):
            optimiser.param_groups[0]["lr"] = self.rate * (1 - iteration / (self.iterations + 1))
            weights = torch.tensor(start.forecasts, dtype=torch.float32) + (shared * moves) @ basis
            found, gradient = loss_and_gradient(
                trajectory.sampling, reading, weights, lambda latent: _mean_log_error(latent, trajectory)
            )
            if found < loss:
                best, loss = weights.detach().double().numpy(), found
            optimiser.zero_grad()
            weights.backward(gradient)
            optimiser.step()
        return best, loss


def _computed_steps(make: Callable[..., MaskSchedule], reference: MaskSchedule, budget: Budget) -> int:
    """The most steps that a regular table of this kind may compute within a budget; 0 if none."""
    whole = whole_step(reference, budget)  # raises if not even one step fits
    most = int(whole.rows.any(axis=1).sum())
    fits = (n for n in range(most, 0, -1) if budget.allows(lower(make(reference, n / reference.steps)).macs_share))
    return next(fits, 0)


def _mean_log_error(latent: Tensor, trajectory: Trajectory) -> Tensor:
    return sample_errors(latent, trajectory.sampled.latent).clamp_min(1e-12).log().mean()
