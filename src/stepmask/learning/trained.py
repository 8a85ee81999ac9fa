"""`TrainedForecasts`: the best regular table, its forecasts trained on the masked run itself."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from stepmask.denoiser.runtime import apply
from stepmask.denoiser.trajectory import Trajectory
from stepmask.files import write_whole
from stepmask.learning.chain import loss_and_gradient
from stepmask.learning.executors import Executor
from stepmask.learning.objective import sample_errors
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.budget import Budget, too_small_a_store
from stepmask.schedule.forecasts import DIFFERENCES, WINDOW
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

PACE = (0.05, 1.0, 1.0)
"""Relative learning rates of a forecast's scale and its first and second difference; the scale is the stiff one."""


@dataclass(frozen=True)
class TrainedForecasts:
    """A regular table, and then better forecasts than Taylor's.

    The best fixed interval and the best whole-step table within the budget, by Taylor order, both start. The weights
    of every reused cell are then trained on masked runs, by the gradient of the final latent's distance to the
    reference through the pipeline's own sampler, with stored values held constant. After `trial` iterations the better
    of the two goes on alone. Each iteration takes the next trajectory: several trajectories of a few samples cost no
    more per iteration than one, and overfit less.

    Args:
        iterations: Of Adam; each costs about two masked runs of one trajectory, with their gradients.
        trial: Iterations that both starts get.
        rate: Learning rate, falling linearly.
        window: How many stored values a forecast may read, 1 to 3: the memory of the store. Fewer are read where the
            budget's store has no room for as many.
    """

    iterations: int = 48
    trial: int = 8
    rate: float = 0.04
    window: int = WINDOW

    def learn(
        self,
        trajectories: Sequence[Trajectory],
        reference: MaskSchedule,
        budget: Budget,
        executor: Executor,
        folder: Path | None,
    ) -> MaskSchedule:
        """The table with the smallest mean error on the calibration seeds; never worse there than where it started.

        Args:
            trajectories: Reference runs; their seeds are the calibration set.
            reference: The all-compute table.
            budget: Of the whole run, the denoiser's glue at every step included.
            executor: Not used: one gradient step needs the one before it.
            folder: Training is kept here after every iteration, to go on from; `None` = nowhere.

        Raises:
            InvalidBudget: Not even one computed step fits, the store is too small for every regular table, or the
                budget is in time and the graph was not timed.
            LearningError: A run is not finite, or the pipeline detaches its latents.
        """
        trainings = []
        for tables in regular_tables(reference, budget, self.window):
            start = min(tables, key=partial(calibration_error, trajectories[:1]))
            trainings.append(_Training(replace(self, window=len(tables)), start, trajectories, folder))
        for training in trainings:
            training.run(self.trial if len(trainings) > 1 else self.iterations)
        chosen = min(trainings, key=lambda training: calibration_error(trajectories, training.table()))
        chosen.run(self.iterations)
        start_error, error = (calibration_error(trajectories, table) for table in (chosen.start, chosen.table()))
        best = chosen.table() if error < start_error else chosen.start
        provenance = {
            "table": f"trained forecasts on {chosen.start.provenance['table']}",
            "learner": repr(self),
            "budget": budget.to_plain(),
            "calibration_error": min(error, start_error),
            "start_error": start_error,
        }
        return rectify(best.with_rows(best.rows, best.forecasts, provenance=provenance))


def regular_tables(reference: MaskSchedule, budget: Budget, window: int) -> list[list[MaskSchedule]]:
    """Fixed intervals, and whole-step tables, with the most computed steps that fit a budget.

    Returns:
        For each of the two, unless not one fits, its tables by Taylor order from 0 to window − 1; fewer where the store
        has no room for the values that higher orders read.

    Raises:
        InvalidBudget: Not even one computed step fits, or the store is too small for every table.
        NotTimed: The budget is in time, and the blocks were not timed.
    """
    found, peaks = [], []
    most = int(whole_step(reference, budget.share).rows.any(axis=1).sum())  # raises if not even one step fits
    for make in (fixed_interval, whole_step):
        shares = [count / reference.steps for count in range(most, 0, -1)]
        covered = [share for share in shares if budget.covers(budget.spent(lower(make(reference, share))))][:1]
        tables = [make(reference, share, order=order) for share in covered for order in range(window)]
        found.append([table for table in tables if budget.stores(lower(table))])
        peaks += [lower(table).peak_bytes for table in tables]
    if not any(found):
        raise too_small_a_store(budget, min(peaks))
    return [tables for tables in found if tables]


@torch.no_grad()
def calibration_error(trajectories: Sequence[Trajectory], table: MaskSchedule) -> float:
    """Mean relative error of the final latents under a table, over all samples of all trajectories."""
    errors = []
    for trajectory in trajectories:
        with apply(trajectory.sampling.pipe, table):
            latent = trajectory.sampling.latent()
        errors.append(sample_errors(latent, trajectory.sampled.latent))
    return float(torch.cat(errors).mean())


class _Training:
    """Adam on the forecast weights of one table, in differences of stored values, one trajectory an iteration."""

    def __init__(
        self, learner: TrainedForecasts, start: MaskSchedule, trajectories: Sequence[Trajectory], folder: Path | None
    ) -> None:
        self.learner, self.start, self.trajectories = learner, start, trajectories
        before = np.minimum(np.cumsum(start.rows, axis=0) - start.rows, learner.window)
        readable = (np.arange(WINDOW) < before[..., None]) & ~start.rows[..., None]
        self.reading = start.with_rows(start.rows, readable.astype(float))
        self.moves = torch.tensor(readable) * torch.tensor(PACE)
        self.shared = torch.zeros(start.steps, 1, WINDOW, requires_grad=True)  # by all blocks of a step
        self.own = torch.zeros(*start.rows.shape, WINDOW, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.shared, self.own], betas=(0.8, 0.95))
        self.iteration = 0
        self.path = folder / f"training-{self._digest()}.pt" if folder else None
        if self.path and self.path.exists():
            self._load(self.path.read_bytes())

    def run(self, until: int) -> None:
        """Train up to an iteration."""
        with tqdm(total=until, initial=self.iteration, desc="training forecasts", disable=None) as bar:
            while self.iteration < until:
                self._step(self.trajectories[self.iteration % len(self.trajectories)])
                self.iteration += 1
                bar.update()
                if self.path:
                    write_whole(self.path, self._state())

    def _step(self, trajectory: Trajectory) -> None:
        remaining = 1 - self.iteration / (self.learner.iterations + 1)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learner.rate * remaining
        weights = self._weights()
        _, gradient = loss_and_gradient(
            trajectory.sampling, self.reading, weights, lambda latent: _mean_distance(latent, trajectory)
        )
        self.optimiser.zero_grad()
        weights.backward(gradient)
        self.optimiser.step()

    def _weights(self) -> Tensor:
        start = torch.tensor(self.start.forecasts, dtype=torch.float32)
        return start + ((self.shared + self.own) * self.moves) @ torch.tensor(DIFFERENCES, dtype=torch.float32)

    def table(self) -> MaskSchedule:
        """The table as trained so far."""
        trained: npt.NDArray[np.float64] = self._weights().detach().double().numpy()
        return self.start.with_rows(self.start.rows, trained)

    def _state(self) -> bytes:
        buffer = io.BytesIO()
        found = {"shared": self.shared.detach(), "own": self.own.detach(), "iteration": self.iteration}
        torch.save({**found, "optimiser": self.optimiser.state_dict()}, buffer)
        return buffer.getvalue()

    def _load(self, state: bytes) -> None:
        found = torch.load(io.BytesIO(state), weights_only=True)
        self.iteration = found["iteration"]
        with torch.no_grad():
            self.shared.copy_(found["shared"])
            self.own.copy_(found["own"])
        self.optimiser.load_state_dict(found["optimiser"])

    def _digest(self) -> str:
        digest = sha256(f"{self.learner} {self.start.to_json()}".encode())
        for trajectory in self.trajectories:
            digest.update(trajectory.sampled.latent.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:24]


def _mean_distance(latent: Tensor, trajectory: Trajectory) -> Tensor:
    """Mean of ‖x_0 − x_0 ref‖ / ‖x_0 ref‖: not squared, so that no single hard sample decides."""
    return sample_errors(latent, trajectory.sampled.latent).clamp_min(1e-12).sqrt().mean()
