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
from stepmask.learning.starts import families
from stepmask.schedule.budget import Budget
from stepmask.schedule.forecasts import DIFFERENCES, PLAIN, WINDOW
from stepmask.schedule.rectify import rectify
from stepmask.schedule.schedule import MaskSchedule

TRIED = 2
"""How many families of regular tables get a trial."""

PACE = (0.05, 1.0, 1.0)
"""Relative learning rates of a forecast's scale and its first and second difference; the scale is the stiff one."""


@dataclass(frozen=True)
class TrainedForecasts:
    """A regular table, and then better forecasts than Taylor's.

    The best regular tables start: of fixed intervals, of whole-step tables, of intervals with partial evaluations
    between the whole ones, and of intervals with one partial evaluation, the best by true runs; the two best kinds go
    on. The weights of every reused cell are then trained on masked runs, by the gradient of the final latent's distance
    to the reference through the pipeline's own sampler, with stored values held constant. Both are trained to the end
    of a short trial; the better goes on alone. Each iteration takes the next trajectory: several trajectories of a few
    samples cost no more per iteration than one, and overfit less.

    Args:
        iterations: Of Adam, the trial included; each costs about two masked runs of a trajectory, with gradients.
        trial: Iterations that both starts get.
        rate: Learning rate; it falls linearly to zero in the trial, and once more after it.
        window: How many stored values a forecast may read, 1 to 3: the memory of the store. Fewer are read where the
            budget's store has no room for as many.
    """

    iterations: int = 32
    trial: int = 10
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
        """The table with the smallest mean error on the calibration seeds; never worse there than the starts.

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
        trainings = [
            _Training(replace(self, window=window), start, trajectories, folder)
            for start, window in self._starts(trajectories, reference, budget)
        ]
        for training in trainings:
            training.run(self.trial)
        judge = partial(_Judged.of, trajectories)
        tried = [judge(training.table(training.tried), training) for training in trainings]
        started = [judge(training.start, training) for training in trainings]
        chosen = min(tried, key=lambda judged: judged.error).training
        chosen.run(self.iterations)
        best = min([*started, *tried, judge(chosen.table(chosen.weights()), chosen)], key=lambda judged: judged.error)
        provenance = {
            "table": f"trained forecasts on {best.training.start.provenance['table']}",
            "learner": repr(self),
            "budget": budget.to_plain(),
            "calibration_error": best.error,
            "start_error": min(judged.error for judged in started),
        }
        return rectify(best.table.with_rows(best.table.rows, best.table.forecasts, provenance=provenance))

    def _starts(
        self, trajectories: Sequence[Trajectory], reference: MaskSchedule, budget: Budget
    ) -> list[tuple[MaskSchedule, int]]:
        """The best table of each of the two best families, by true runs of the first trajectory, with its window."""
        judged = []
        for family in tqdm(families(reference, budget, self.window), "regular tables", disable=None):
            errors = [calibration_error(trajectories[:1], table) for table in family.tables]
            judged.append((min(errors), family.tables[int(np.argmin(errors))], family.window))
        judged.sort(key=lambda found: found[0])
        return [(table, window) for _, table, window in judged[:TRIED]]

    def rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        first, last = (0, self.trial) if iteration < self.trial else (self.trial, self.iterations)
        return self.rate * (1 - (iteration - first) / (last - first + 1))


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
        self.reading = start.with_rows(start.rows, np.where(readable.any(axis=2, keepdims=True), readable, PLAIN))
        self.moves = torch.tensor(readable) * torch.tensor(PACE)
        self.shared = torch.zeros(start.steps, 1, WINDOW, requires_grad=True)  # by all blocks of a step
        self.own = torch.zeros(*start.rows.shape, WINDOW, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.shared, self.own], betas=(0.8, 0.95))
        self.iteration = 0
        self.tried = self.weights()  # after the trial
        self.path = folder / f"training-{self._digest()}.pt" if folder else None
        if self.path and self.path.exists():
            self._load(self.path.read_bytes())

    def run(self, until: int) -> None:
        """Train up to an iteration."""
        with tqdm(total=until, initial=self.iteration, desc="training forecasts", disable=None) as bar:
            while self.iteration < until:
                self._step(self.trajectories[self.iteration % len(self.trajectories)])
                self.iteration += 1
                if self.iteration == self.learner.trial:
                    self.tried = self.weights()
                bar.update()
                if self.path:
                    write_whole(self.path, self._state())

    def _step(self, trajectory: Trajectory) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.learner.rate_at(self.iteration)
        weights = self._moved()
        _, gradient = loss_and_gradient(
            trajectory, self.reading, weights, lambda latent: _mean_distance(latent, trajectory), through_store=False
        )
        self.optimiser.zero_grad()
        weights.backward(gradient)
        self.optimiser.step()

    def _moved(self) -> Tensor:
        """The start's weights and what is trained, with gradients; shape (steps, blocks, 3)."""
        start = torch.tensor(self.start.forecasts, dtype=torch.float32)
        return start + ((self.shared + self.own) * self.moves) @ torch.tensor(DIFFERENCES, dtype=torch.float32)

    def weights(self) -> Tensor:
        """The weights as trained so far, shape (steps, blocks, 3)."""
        return self._moved().detach()

    def table(self, weights: Tensor) -> MaskSchedule:
        """The start's table with other weights."""
        trained: npt.NDArray[np.float64] = weights.double().numpy()
        return self.start.with_rows(self.start.rows, trained)

    def _state(self) -> bytes:
        buffer = io.BytesIO()
        moved = {"shared": self.shared.detach(), "own": self.own.detach(), "tried": self.tried}
        torch.save({**moved, "iteration": self.iteration, "optimiser": self.optimiser.state_dict()}, buffer)
        return buffer.getvalue()

    def _load(self, state: bytes) -> None:
        found = torch.load(io.BytesIO(state), weights_only=True)
        self.iteration, self.tried = found["iteration"], found["tried"]
        with torch.no_grad():
            self.shared.copy_(found["shared"])
            self.own.copy_(found["own"])
        self.optimiser.load_state_dict(found["optimiser"])

    def _digest(self) -> str:
        digest = sha256(f"{self.learner} {self.start.to_json()}".encode())
        for trajectory in self.trajectories:
            digest.update(trajectory.sampled.latent.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:24]


@dataclass(frozen=True)
class _Judged:
    """A table, where it comes from, and its error on the calibration seeds."""

    error: float
    table: MaskSchedule
    training: _Training

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], table: MaskSchedule, training: _Training) -> "_Judged":
        return cls(calibration_error(trajectories, table), table, training)


def _mean_distance(latent: Tensor, trajectory: Trajectory) -> Tensor:
    """Mean of ‖x_0 − x_0 ref‖ / ‖x_0 ref‖: not squared, so that no single hard sample decides."""
    return sample_errors(latent, trajectory.sampled.latent).clamp_min(1e-12).sqrt().mean()
