"""`SampleRows`: inner products of tensors that hold the rows of several samples, sample by sample."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import prediction
from stepmask.errors import LearningError
from stepmask.schedule.graph import Block


class SampleRows:
    """Which sample each row of an evaluation's tensors belongs to.

    Args:
        samples: Of each row of a step's outputs, all branches below each other, as `samples_of` gives it.
        trajectory: Says how many branches there are, and whether the denoiser gives its samples in a list.
    """

    def __init__(self, samples: npt.NDArray[np.int64], trajectory: Trajectory) -> None:
        self.samples = torch.from_numpy(samples).reshape(trajectory.sampler.branches, -1)
        self.count = int(self.samples.max()) + 1
        predicted = prediction(trajectory.outputs[0])
        self.listed = isinstance(predicted, list)
        self.device = predicted[0].device  # where a block without a floating tensor is zero

    def products(self, branch: int, block: Block, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Σ ⟨gradient, value⟩ over the floating tensors of one block, shape (samples,).

        A tensor with other rows than the denoiser's output, or with none, is shared by the samples: it counts where
        all rows are one sample's, and where nobody reads it, for then its gradient is zero.

        Args:
            branch: Of the evaluation.
            block: Whose tensors they are.
            left: Gradients.
            right: Values.

        Raises:
            LearningError: Samples share a tensor that is read.
        """
        samples = self.samples[branch]
        total = torch.zeros(self.count, dtype=torch.float32, device=left[0].device if left else self.device)
        if self.listed and not block.name:
            left, right = [torch.stack(list(left))], [torch.stack(list(right))]
        for a, b in zip(left, right, strict=True):
            if not a.ndim or len(a) % len(samples):
                total += self._shared(block, a, b, len(samples))
                continue
            rows = torch.linalg.vecdot(a.flatten(1).float(), b.flatten(1).float())
            total.index_add_(0, samples.repeat_interleave(len(rows) // len(samples)).to(rows.device), rows)
        return total

    def _shared(self, block: Block, left: Tensor, right: Tensor, expected: int) -> Tensor:
        """⟨left, right⟩ of one tensor whose rows are not samples'."""
        if self.count > 1 and left.any():
            raise _mixed_rows(block.label, tuple(left.shape), expected)
        product: Tensor = torch.linalg.vecdot(left.flatten().float(), right.flatten().float())
        return product


def _mixed_rows(label: str, shape: tuple[int, ...], expected: int) -> LearningError:
    return LearningError(
        given=f"block {label!r}, whose output has a tensor of shape {shape}",
        expected=f"as many rows as the denoiser's output has, {expected}, or a multiple of them",
        advice="Leave this block out of the graph",
    )
