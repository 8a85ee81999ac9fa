"""Guidance, as the sampler sees it: how the denoiser's outputs of one step become what the scheduler is handed.

Guided pipelines evaluate several rows per sample (conditional, unconditional) and hand the scheduler a weighted sum, in
which a difference between the rows counts many times over. Fidelity must be measured there. The weights are read off
a recorded run, so that no pipeline has to be known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.device import to_device
from stepmask.denoiser.modes import autocast_as
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import prediction


@dataclass(frozen=True)
class Guidance:
    """The linear map from the rows of a step's outputs to what the scheduler is handed.

    Args:
        weights: (rows handed, rows of all branches together), in the CPU's memory.
        channels: How many of the output's channels are used; a learned variance is not handed over.
    """

    weights: Tensor
    channels: int

    def to(self, device: torch.device) -> "Guidance":
        """The same, with its weights where they are used again and again."""
        return replace(self, weights=to_device(self.weights, device))

    def __call__(self, outputs: Sequence[Any]) -> Tensor:
        """What the scheduler is handed for the outputs of all branches, shape (rows handed, elements)."""
        rows = _rows(outputs, self.channels)
        with autocast_as(()):  # differences between rows count many times over: no half precision
            return to_device(self.weights, rows.device).to(rows) @ rows


def guidance_of(trajectory: Trajectory, step: int) -> Guidance:
    """The weights at one step, by least squares on the recorded outputs; the identity where there is no scheduler.

    Exact for every guidance that is a weighted sum of rows; the best linear description of any other. Solved on the
    CPU: the rows may depend on each other, and accelerators have no driver for that.
    """
    _, outputs = trajectory.at(step)
    first = _first(outputs[0])
    if len(trajectory.sampled.handed) != trajectory.steps:
        identity = torch.eye(len(first) * len(outputs), dtype=torch.float32)
        return Guidance(identity, first.shape[1] if first.ndim > 1 else 1)
    handed = trajectory.sampled.handed[step]
    channels = handed.shape[1] if handed.ndim > 1 else 1
    rows = _rows(outputs, channels).cpu().double()
    solution = torch.linalg.lstsq(rows.T, handed.cpu().flatten(1).double().T, driver="gelsd").solution
    return Guidance(solution.T.float(), channels)


def _rows(outputs: Sequence[Any], channels: int) -> Tensor:
    """The outputs of all branches below each other, shape (rows, elements)."""
    firsts = [_first(output) for output in outputs]
    return torch.cat([first[:, :channels] if first.ndim > 1 else first for first in firsts]).flatten(1).float()


def _first(output: Any) -> Tensor:
    """What a denoiser predicts, a row per sample and guidance."""
    predicted = prediction(output)
    return torch.stack(predicted) if isinstance(predicted, list) else predicted


def samples_of(trajectory: Trajectory) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which sample each row belongs to: rows of the final latent, and rows of a whole step's outputs, all branches.

    Rows belong to one sample if what the scheduler is handed in one depends on the other: the connected parts of the
    guidance weights, the median over the steps. Where the final latent has other rows than the scheduler is handed,
    all rows are one sample.
    """
    whole = np.flatnonzero(trajectory.sampler.loads == 1)  # where guidance is on
    weights = np.median([guidance_of(trajectory, int(step)).weights.abs().numpy() for step in whole], 0)
    links = weights > 0.05 * weights.max()
    if len(trajectory.sampled.latent) != len(links):
        return np.zeros(len(trajectory.sampled.latent), dtype=np.int64), np.zeros(links.shape[1], dtype=np.int64)
    joined = links @ links.T | np.eye(len(links), dtype=bool)
    for _ in range(len(links).bit_length()):
        joined = joined @ joined
    _, latent_rows = np.unique(joined.argmax(axis=1), return_inverse=True)
    return latent_rows, latent_rows[links.argmax(axis=0)]
