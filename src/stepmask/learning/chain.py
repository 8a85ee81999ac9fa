"""A masked run under gradients: how the final latent of each sample depends on every forecast weight."""

from collections.abc import Callable
from math import isfinite

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.modes import uncompiled
from stepmask.denoiser.quantised import gradients_pass
from stepmask.denoiser.seam import frozen
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import LearningError
from stepmask.learning.floats import lifted, wide
from stepmask.learning.sample_rows import SampleRows
from stepmask.learning.tape import Moment, Tape, not_finite
from stepmask.schedule.answers import answers
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.schedule import MaskSchedule


def loss_and_gradients(
    trajectory: Trajectory,
    reading: MaskSchedule,
    weights: Tensor,
    loss: Callable[[Tensor], Tensor],
    rows: SampleRows | None = None,
) -> tuple[float, Tensor]:
    """The loss of a masked run's final latent, and its gradients in the forecast weights, sample by sample.

    A sample's gradient is what its rows contribute; the gradient of the loss is their sum. It is exact: what a weight
    changes in values that are stored after it counts too. Of an accelerator's numbers only the loss, whether all were
    finite, and in the end the gradients are read, however many blocks and steps there are.

    Args:
        trajectory: Its run is repeated under the table.
        reading: The table; its weights say how many values each reused cell reads.
        weights: What stands in for them, newest value first, shape (steps, blocks, 3).
        loss: Of the final latent, in float32 at least, a scalar.
        rows: Which sample each row belongs to; `None` = as the trajectory tells, for which a step's outputs are read
            at each step.

    Returns:
        The loss; gradients, shape (samples, steps, blocks, 3).

    Raises:
        LearningError: The loss is not finite, the pipeline's code detaches the latent, or a block's rows are not those
            of the denoiser's output.
    """
    weights = weights.detach()
    reads = answers(reading, reading.steps - 1) != 0
    moved = reads[..., 1:].any(axis=2)  # computed cells that blend nothing in have no weights to move
    answered = reads.astype(float)
    rows = rows or SampleRows.of(trajectory)
    gradients = _Gradients(reading.graph, rows, weights, moved)
    for step, column in np.argwhere(moved):
        ages = np.flatnonzero(reads[step, column])
        answered[step, column, ages] = weights[step, column, : len(ages)]
    tape = Tape(trajectory, reading.graph, answered, gradients, reads=reads)
    sampling = trajectory.sampling
    with (
        frozen(sampling.pipe),
        gradients_pass(*sampling.denoisers),
        tape.attached(),
        torch.enable_grad(),
        uncompiled(),
    ):
        latent = sampling.latent()
        leaf = wide(latent.detach()).requires_grad_()
        value = loss(leaf)
        told = _told(value, latent, tape)
        (pull,) = torch.autograd.grad(value, leaf)
        pull, factor = lifted(pull)
        torch.autograd.grad(latent, tape.anchor, pull.to(latent.dtype))
    rows.check()
    return told, (gradients.total / factor.to(gradients.total)).cpu()


class _Gradients:
    """⟨gradient of an answer, stored value⟩ for every sample and weight, added up over branches."""

    def __init__(self, graph: BlockGraph, rows: SampleRows, weights: Tensor, moved: npt.NDArray[np.bool_]) -> None:
        self.graph, self.rows, self.moved = graph, rows, moved
        self.total = torch.zeros(rows.count, *weights.shape, dtype=torch.float32, device=rows.device)

    def __call__(self, moment: Moment) -> None:
        """Take in one evaluation."""
        for column, gradient in enumerate(moment.gradients):
            block = self.graph.blocks[column]
            for index, value in enumerate(moment.read(column) if self.moved[moment.step, column] else []):
                products = self.rows.products(moment.step, moment.branch, block, gradient, value)
                self.total[:, moment.step, column, index] += products.to(self.total)


def _told(value: Tensor, latent: Tensor, tape: Tape) -> float:
    """The loss of a latent as a number, if all that led to it was one."""
    tape.check_finite()
    if not latent.requires_grad:
        raise LearningError(
            given="a final latent that does not depend on the forecast weights",
            expected="a sampling loop that carries the latent as a tensor, and a table that forecasts",
            advice="Look in the loop for .detach(), .data or numpy",
        )
    told = float(value.detach())
    if not isfinite(told):
        raise not_finite("a masked run's final latent")
    return told
