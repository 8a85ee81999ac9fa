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
        self.listed = isinstance(prediction(trajectory.outputs[0]), list)

    def products(self, branch: int, block: Block, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Σ ⟨left, right⟩ over the tensors of one block, shape (samples,).

        Raises:
            LearningError: The tensors' rows are not those of the denoiser's output, nor a multiple of them.
        """
        samples, total = self.samples[branch], torch.zeros(self.count, device=left[0].device)
        if self.listed and not block.name:
            left, right = [torch.stack(list(left))], [torch.stack(list(right))]
        for a, b in zip(left, right, strict=True):
            rows = torch.linalg.vecdot(a.flatten(1).float(), b.flatten(1).float())
            if len(rows) % len(samples):
                raise _mixed_rows(block.label, len(rows), len(samples))
            total.index_add_(0, samples.repeat_interleave(len(rows) // len(samples)).to(rows.device), rows)
        return total


def _mixed_rows(label: str, rows: int, expected: int) -> LearningError:
    return LearningError(
        given=f"block {label!r}, whose output has {rows} rows",
        expected=f"a multiple of {expected}, the rows of the denoiser's output",
        advice="Leave this block out of the graph",
    )
