"""`TrainedForecasts`: the best regular table, its forecasts trained on the masked run itself."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

JUDGED = 2
"""How many trajectories every regular table is run on."""

TRAINED = 2
"""How many families of regular tables are trained."""

PACE = (0.05, 1.0, 1.0)
"""Relative learning rates of a forecast's scale and its first and second difference; the scale is the stiff one."""


@dataclass(frozen=True)
class TrainedForecasts:
    """A regular table, and then better forecasts than Taylor's.

    The best regular tables start: of fixed intervals, of whole-step tables, of intervals with partial evaluations
    between the whole ones, and of intervals with one partial evaluation, the best by true runs; the two best kinds go
    on. The weights of every reused cell are then trained on masked runs, by the gradient of the final latent's distance
    to the reference through the pipeline's own sampler and through the store, and with them how the denoiser's own
    output is blended with older ones where it is computed. The best in the end wins: what starts worse often ends
    better. Each iteration takes the next trajectory: many trajectories of a few samples cost less per iteration
    than few of many, and overfit less.

    Args:
        iterations: Of Adam, from each start; each costs about four masked runs of a trajectory.
        rate: Learning rate; it falls linearly to zero.
        window: How many stored values a forecast may read, 1 to 3: the memory of the store. Fewer are read where the
            budget's store has no room for as many.
    """

    iterations: int = 32
    rate: float = 0.03
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
        trainings = [
            _Training(replace(self, window=window), start, trajectories, budget, folder)
            for start, window in self._starts(trajectories, reference, budget)
        ]
        for training in trainings:
            training.run()
        errors = [calibration_error(trajectories, training.table()) for training in trainings]
        best = trainings[int(np.argmin(errors))]
        start_error = calibration_error(trajectories, best.start)
        table = best.start if start_error < min(errors) else best.table()
        provenance = {
            "table": f"trained forecasts on {best.start.provenance['table']}",
            "learner": repr(self),
            "budget": budget.to_plain(),
            "calibration_error": min(start_error, *errors),
            "start_error": start_error,
        }
        return rectify(table.with_rows(table.rows, table.forecasts, provenance=provenance))

    def _starts(
        self, trajectories: Sequence[Trajectory], reference: MaskSchedule, budget: Budget
    ) -> list[tuple[MaskSchedule, int]]:
        """The best table of each of the two best families, by a few true runs, with its window."""
        judged = []
        for family in tqdm(families(reference, budget, self.window), "regular tables", disable=None):
            errors = [calibration_error(trajectories[:JUDGED], table) for table in family.tables]
            judged.append((min(errors), family.tables[int(np.argmin(errors))], family.window))
        judged.sort(key=lambda found: found[0])
        return [(table, window) for _, table, window in judged[:TRAINED]]

    def rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return self.rate * (1 - iteration / self.iterations)


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
        self,
        learner: TrainedForecasts,
        start: MaskSchedule,
        trajectories: Sequence[Trajectory],
        budget: Budget,
        folder: Path | None,
    ) -> None:
        self.learner, self.start, self.trajectories = learner, start, trajectories
        readable = _readable(start, learner.window, blends=True)
        self.reading = _reading(start, readable)
        if not budget.stores(lower(self.reading)):
            readable = _readable(start, learner.window, blends=False)
            self.reading = _reading(start, readable)
        self.moves = torch.tensor(readable) * torch.tensor(PACE)
        self.shared = torch.zeros(start.steps, 1, WINDOW, requires_grad=True)  # by all blocks of a step
        self.own = torch.zeros(*start.rows.shape, WINDOW, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.shared, self.own], betas=(0.8, 0.95))
        self.iteration = 0
        self.path = folder / f"training-{self._digest()}.pt" if folder else None
        if self.path and self.path.exists():
            self._load(self.path.read_bytes())

    def run(self) -> None:
        """Train to the end."""
        last = self.learner.iterations
        with tqdm(total=last, initial=self.iteration, desc="training forecasts", disable=None) as bar:
            while self.iteration < last:
                self._step(self.trajectories[self.iteration % len(self.trajectories)])
                self.iteration += 1
                bar.update()
                if self.path:
                    write_whole(self.path, self._state())

    def _step(self, trajectory: Trajectory) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.learner.rate_at(self.iteration)
        weights = self._moved()
        _, gradient = loss_and_gradient(
            trajectory, self.reading, weights, lambda latent: _mean_distance(latent, trajectory)
        )
        self.optimiser.zero_grad()
        weights.backward(gradient)
        self.optimiser.step()

    def _moved(self) -> Tensor:
        """The start's weights and what is trained, with gradients; shape (steps, blocks, 3)."""
        start = torch.tensor(self.start.forecasts, dtype=torch.float32)
        return start + ((self.shared + self.own) * self.moves) @ torch.tensor(DIFFERENCES, dtype=torch.float32)

    def table(self) -> MaskSchedule:
        """The start's table with the weights as trained so far."""
        trained: npt.NDArray[np.float64] = self._moved().detach().double().numpy()
        return self.start.with_rows(self.start.rows, trained)

    def _state(self) -> bytes:
        buffer = io.BytesIO()
        moved = {"shared": self.shared.detach(), "own": self.own.detach()}
        torch.save({**moved, "iteration": self.iteration, "optimiser": self.optimiser.state_dict()}, buffer)
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


def _readable(start: MaskSchedule, window: int, *, blends: bool) -> npt.NDArray[np.bool_]:
    """The weights that may move, shape (steps, blocks, 3): of reused cells, and of the denoiser where it is computed.

    Blending what the denoiser says with what it said costs next to nothing: its output is the smallest value there is.
    """
    values = np.minimum(np.cumsum(start.rows, axis=0), window)  # stored ones, and the one just computed
    blended = values.shape[1] - blends  # from here on computed cells blend
    values[:, :blended][start.rows[:, :blended]] = 0
    values[0] = 0
    readable: npt.NDArray[np.bool_] = np.arange(WINDOW) < values[..., None]
    return readable


def _reading(start: MaskSchedule, readable: npt.NDArray[np.bool_]) -> MaskSchedule:
    """The start's table, reading all values whose weights may move."""
    return start.with_rows(start.rows, np.where(readable.any(axis=2, keepdims=True), readable, PLAIN))


def _mean_distance(latent: Tensor, trajectory: Trajectory) -> Tensor:
    """Mean of ‖x_0 − x_0 ref‖ / ‖x_0 ref‖: not squared, so that no single hard sample decides."""
    return sample_errors(latent, trajectory.sampled.latent).clamp_min(1e-12).sqrt().mean()
