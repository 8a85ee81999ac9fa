"""A masked run under gradients: how the final latent depends on every forecast weight."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.seam import attached
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import LearningError
from stepmask.learning.tape import Moment, Tape, not_finite
from stepmask.schedule.answers import answers
from stepmask.schedule.schedule import MaskSchedule


def loss_and_gradient(
    trajectory: Trajectory,
    reading: MaskSchedule,
    weights: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    through_store: bool = True,
) -> tuple[float, Tensor]:
    """The loss of a masked run's final latent, and its gradient in the forecast weights, shape (steps, blocks, 3).

    Args:
        trajectory: Its run is repeated under the table.
        reading: The table; its weights say how many values each reused cell reads.
        weights: What stands in for them, newest value first, shape (steps, blocks, 3).
        loss: Of the final latent, a scalar.
        through_store: Whether what a weight changes in values that are stored after it is part of the gradient. It then
            is exact, and follows the few most sensitive samples; without, stored values count as constants.

    Raises:
        LearningError: The loss is not finite, or the pipeline's code detaches the latent.
    """
    weights = weights.detach()
    reads = answers(reading, reading.steps - 1) != 0
    moved = reads[..., 1:].any(axis=2)  # computed cells that blend nothing in have no weights to move
    answered = reads.astype(float)
    gradient = _Gradient(weights, moved)
    for step, column in np.argwhere(moved):
        ages = np.flatnonzero(reads[step, column])
        answered[step, column, ages] = weights[step, column, : len(ages)]
    tape = Tape(trajectory, reading.graph, answered, gradient, reads=reads, through_store=through_store)
    with attached({trajectory.sampling.denoiser: tape}), torch.enable_grad():
        value = loss(trajectory.sampling.latent())
        _check(value)
        torch.autograd.grad(value, tape.anchor)
    return float(value.detach()), gradient.total


class _Gradient:
    """⟨gradient of an answer, stored value⟩ for every weight, added up over branches."""

    def __init__(self, weights: Tensor, moved: npt.NDArray[np.bool_]) -> None:
        self.total, self.moved = torch.zeros_like(weights), moved

    def __call__(self, moment: Moment) -> None:
        """Take in one evaluation."""
        for column, gradient in enumerate(moment.gradients):
            for index, value in enumerate(moment.read(column) if self.moved[moment.step, column] else []):
                products = (torch.sum(pull * said) for pull, said in zip(gradient, value, strict=True))
                self.total[moment.step, column, index] += sum(float(product) for product in products)


def _check(value: Tensor) -> None:
    if not value.requires_grad:
        raise LearningError(
            given="a final latent that does not depend on the forecast weights",
            expected="a sampling loop without torch.no_grad, and a table that forecasts",
            advice="Let the loop run in the caller's gradient mode",
        )
    if not torch.isfinite(value):
        raise not_finite("a masked run's final latent")
