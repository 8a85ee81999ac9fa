"""Published rules whose code is not a package, as tables in our format: SmoothCache's and Learning-to-Cache's."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.values import tensors
from stepmask.learning.guidance import guidance_of
from stepmask.learning.objective import Objective
from stepmask.learning.relax import Sigmoid
from stepmask.learning.starts import groups
from stepmask.learning.step import StepJob, learn_step
from stepmask.schedule.graph import BlockGraph

LOOKAHEAD = 3
"""Oldest value that SmoothCache reuses, in steps."""


class SmoothCache:
    """A kind of blocks is reused as long as its mean relative L1 change stays below a threshold (arXiv 2411.10510).

    Args:
        trajectory: Of the calibration samples, one evaluation per step; run once more to see what the blocks say.
        full: The all-compute table, of sublayers.
    """

    def __init__(self, trajectory: Trajectory, full: MaskSchedule) -> None:
        self.full, self.kinds = full, list(groups(full.graph).values())
        changes = _changes(trajectory, full.graph)
        self.changes = np.stack([changes[:, columns].mean(axis=1) for columns in self.kinds])  # (kinds, steps, ages)

    def table(self, threshold: float) -> MaskSchedule:
        """All blocks of a kind at once: reused while their change since the last computed step is below it."""
        rows = np.ones(self.full.rows.shape, dtype=bool)
        for columns, changes in zip(self.kinds, self.changes, strict=True):
            last = 0
            for step in range(1, len(rows)):
                if step - last <= LOOKAHEAD and changes[step, step - last - 1] < threshold:
                    rows[step, columns] = False
                else:
                    last = step
        return self.full.with_rows(rows)


def _changes(trajectory: Trajectory, graph: BlockGraph) -> npt.NDArray[np.float64]:
    """‖now − before‖₁ / ‖before‖₁ of each block and age, shape (steps, blocks − 1, ages); infinite before the first."""
    denoiser = trajectory.sampling.denoiser
    ears = [_Ear() for _ in graph.names[:-1]]
    with attached({denoiser.get_submodule(name): ear for name, ear in zip(graph.names, ears, strict=False)}):
        trajectory.sampling()
    return np.stack([np.array(ear.changes) for ear in ears], axis=1)


class _Ear(Hook):
    """Hears how far what a block says is from what it said up to `LOOKAHEAD` steps before."""

    def __init__(self) -> None:
        self.said: deque[Tensor] = deque(maxlen=LOOKAHEAD)
        self.changes: list[list[float]] = []

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        now = torch.cat([tensor.flatten() for tensor in tensors(output)])
        changes = [float((now - before).abs().sum() / before.abs().sum()) for before in self.said]
        self.changes.append(changes + [np.inf] * (LOOKAHEAD - len(changes)))
        self.said.appendleft(now)
        return output


def learning_to_cache(trajectory: Trajectory, full: MaskSchedule, price: float, iterations: int = 20) -> MaskSchedule:
    """Every other step whole; in between, sublayers whose learned score is above one half (arXiv 2406.01733).

    Args:
        trajectory: Of the calibration samples.
        full: The all-compute table, of sublayers.
        price: λ; the higher, the less is computed.
        iterations: Training steps of each row.
    """
    odd, rows = np.arange(1, full.steps, 2), np.ones(full.rows.shape, dtype=bool)
    jobs = [_after_a_whole_step(trajectory, full, int(step), price, iterations) for step in odd]
    rows[odd] = np.array([learn_step(trajectory.sampling.denoisers, job) for job in jobs]) > 0.5
    return full.with_rows(rows)


def _after_a_whole_step(
    trajectory: Trajectory, full: MaskSchedule, step: int, price: float, iterations: int
) -> StepJob:
    return StepJob(
        step=step,
        calls=tuple(zip(trajectory.at(step - 1)[0], trajectory.at(step)[0], strict=True)),
        networks=(0,) * trajectory.sampler.branches,
        present=((0,), (0,)),
        rows=full.rows[step - 1 : step],
        graph=full.graph,
        costs=full.graph.costs,
        guidance=guidance_of(trajectory, step),
        objective=Objective(1.0, 0.0, price),
        relaxation=Sigmoid(),
        share=1.0,
        whole_steps=False,
        iterations=iterations,
        seed=step,
    )
