"""`SampleRows`: inner products of tensors that hold the rows of several samples, sample by sample."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.device import read_together, to_device
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import prediction
from stepmask.errors import LearningError
from stepmask.learning.guidance import samples_of
from stepmask.schedule.graph import Block


class SampleRows:
    """Which sample each row of an evaluation's tensors belongs to.

    Args:
        samples: Of each row of a step's outputs, all branches below each other, as `samples_of` gives it.
        trajectory: Says how many branches there are, and whether the denoiser gives its samples in a list.
    """

    def __init__(self, samples: npt.NDArray[np.int64], trajectory: Trajectory) -> None:
        self.sampler = trajectory.sampler
        most = max(trajectory.sampler.branches, trajectory.sampler.course.parts)
        self.samples = torch.from_numpy(samples).reshape(most, -1)  # (branches or parts, rows of each)
        self.count = int(self.samples.max()) + 1
        predicted = prediction(trajectory.outputs[0])
        self.listed = isinstance(predicted, list)
        self.device = predicted[0].device  # where a block without a floating tensor is zero
        self.indices: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}
        self.mixed: dict[tuple[str, tuple[int, ...]], Tensor] = {}  # whether anybody reads what samples share

    @classmethod
    def of(cls, trajectory: Trajectory) -> "SampleRows":
        """As a trajectory tells by its guidance."""
        return cls(samples_of(trajectory)[1], trajectory)

    def products(self, step: int, branch: int, block: Block, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Σ ⟨gradient, value⟩ over the floating tensors of one block, shape (samples,).

        A tensor with other rows than the denoiser's output, or with none, is shared by the samples: it counts where
        all rows are one sample's, and where nobody reads it, for then its gradient is zero: `check` tells.

        Args:
            step: Of the evaluation whose gradients these are.
            branch: Of the evaluation.
            block: Whose tensors they are.
            left: Gradients.
            right: Values.
        """
        present = self.sampler.parts(step, branch)
        count = len(present) * self.samples.shape[1]  # rows of the output
        total = torch.zeros(self.count, dtype=torch.float32, device=left[0].device if left else self.device)
        if self.listed and not block.name:
            left, right = [torch.stack(list(left))], [torch.stack(list(right))]
        for a, b in zip(left, right, strict=True):
            if not a.ndim or len(a) % count:
                total += self._shared(block, a, b)
                continue
            rows = torch.linalg.vecdot(a.flatten(1).float(), b.flatten(1).float())
            total.index_add_(0, self._index(present, len(rows) // count, rows.device), rows)
        return total

    def check(self) -> None:
        """Refuse what was multiplied since the last time, if a tensor was among it that samples share.

        An accelerator is waited for once, however much was multiplied.

        Raises:
            LearningError: Samples share a tensor that is read.
        """
        kinds, self.mixed = self.mixed, {}
        for (label, shape), is_read in zip(kinds, read_together(kinds.values()), strict=True):
            if is_read:
                raise _mixed_rows(label, shape, self.samples.numel() // self.sampler.branches)

    def _index(self, present: tuple[int, ...], repeats: int, device: torch.device) -> Tensor:
        """Which sample each row of a tensor belongs to, each of the output's rows standing for several."""
        key = present, repeats, device
        if key not in self.indices:
            samples = self.samples[list(present)].flatten()
            self.indices[key] = to_device(samples.repeat_interleave(repeats), device)
        return self.indices[key]

    def _shared(self, block: Block, left: Tensor, right: Tensor) -> Tensor:
        """⟨left, right⟩ of one tensor whose rows are not samples'."""
        if self.count > 1:
            kind = block.label, tuple(left.shape)
            is_read = left.any()
            self.mixed[kind] = self.mixed[kind] | is_read if kind in self.mixed else is_read
        product: Tensor = torch.linalg.vecdot(left.flatten().float(), right.flatten().float())
        return product


def _mixed_rows(label: str, shape: tuple[int, ...], expected: int) -> LearningError:
    return LearningError(
        given=f"block {label!r}, whose output has a tensor of shape {shape}",
        expected=f"as many rows as the denoiser's output has, {expected}, or a multiple of them",
        advice="Leave this block out of the graph",
    )
