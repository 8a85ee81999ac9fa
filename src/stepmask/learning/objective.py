"""What a row is trained for: fidelity of output and features, weighed by step, against a price per MAC."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.batch import Batch, rows_of
from stepmask.denoiser.calls import as_they_lie
from stepmask.denoiser.modes import uncompiled
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import each, tensors
from stepmask.errors import LearningError
from stepmask.learning.floats import floats, mixed, wide
from stepmask.learning.guidance import guidance_of
from stepmask.progress import progress
from stepmask.schedule.graph import BlockGraph

Floats = npt.NDArray[np.float64]


def relative_error(value: Any, target: Any) -> Tensor:
    """‖value − target‖² / ‖target‖² over all floating tensors in a value; a scalar with gradients."""
    pairs = list(zip(floats(value), floats(target), strict=True))
    difference = sum((wide(a) - wide(b)).float().square().sum() for a, b in pairs)
    energy = sum(b.float().square().sum() for _, b in pairs)
    return torch.as_tensor(difference) / torch.as_tensor(energy).clamp_min(1e-20)


def sample_errors(latent: Tensor, reference: Tensor) -> Tensor:
    """‖x_0 − x_0 ref‖² / ‖x_0 ref‖² of each sample, shape (rows,); in float32 at least, whatever the latents are."""
    target = wide(reference)
    difference = (wide(latent) - target).flatten(1).square().sum(1)
    return difference / target.flatten(1).square().sum(1).clamp_min(1e-20)


@dataclass(frozen=True)
class Objective:
    """w_k · (‖ε(s) − ε‖²/‖ε‖² + η · mean_b ‖y_b(s) − y_b‖²/‖y_b‖²) + λ · Σ_b c_b·s_b for the scores s of one row.

    Args:
        weight: w_k, of this step's fidelity, in units of the mean harm that reusing a whole step does.
        feature: η, of the blocks' own fidelity ("feature fidelity", arXiv 2603.19939).
        price: λ, of computing everything.
    """

    weight: float
    feature: float
    price: float

    def __call__(self, error: Tensor, feature_errors: Iterable[Tensor], cost: Tensor) -> Tensor:
        """The loss; all arguments are scalars."""
        features = list(feature_errors)
        fidelity = error + self.feature * torch.stack(features).mean() if features and self.feature else error
        return self.weight * fidelity + self.price * cost


def expected_cost(scores: Tensor, graph: BlockGraph, costs: Floats) -> Tensor:
    """Share of the denoiser's cost that a row of scores computes after rectification: Σ_b c_b · s_b · live_b.

    A block is live as far as someone reads it: live_b = max over its readers r of live_r · s_r, or of live_r where r is
    reused by delta and reads in any case; the denoiser is live. On bits this is the plan's cost of the row, so that a
    decision that lets other blocks die is rewarded for it (cf. DiP-GO, arXiv 2410.16942, whose costs count dependents).

    Args:
        scores: (blocks,), in [0, 1].
        graph: The blocks.
        costs: c, of each block as a share of an evaluation, shape (blocks,).
    """
    live: list[Tensor] = [torch.ones((), dtype=torch.float32)] * len(graph)
    for column in reversed(range(len(graph) - 1)):
        readers = np.flatnonzero(graph.reads[:, column])
        asks = [live[r] if graph.blocks[r].reuse == "delta" else live[r] * scores[r] for r in readers]
        live[column] = torch.stack(asks).max() if asks else torch.zeros((), dtype=torch.float32)
    return (torch.tensor(costs, dtype=scores.dtype) * scores * torch.stack(live)).sum()


class Scaling(Protocol):
    """Timestep-aware loss scaling: how much fidelity weighs at each step."""

    def measure(self, trajectory: Trajectory) -> Floats:
        """Weight of each step's relative output error, shape (steps,), up to a common factor."""


@dataclass(frozen=True)
class Uniform:
    """The same weight at every step."""

    def measure(self, trajectory: Trajectory) -> Floats:
        """Ones."""
        return np.ones(trajectory.steps)


@dataclass(frozen=True)
class MeasuredGain:
    """The gain of the sampling chain from each step, measured: (‖Δx_0‖² / (‖Δε_k‖²/‖ε_k‖²))^power.

    The denoiser's output at step k is moved a little towards its output a step earlier, the direction in which reuse
    moves it, and pushed through the remaining steps by the pipeline's own sampler. Steps before k are answered from
    the trajectory, so the cost is half a sampling run per step.

    Args:
        power: 1 weighs by the gain itself, 0 is uniform.
        fraction: How far towards the earlier output. All the way where anything is in half precision: there rounding
            alone moves a final latent by more than a small step does.
    """

    power: float = 1.0
    fraction: float = 0.1

    def measure(self, trajectory: Trajectory) -> Floats:
        """Gain per step, shape (steps,); step 0, which has no earlier output, takes step 1's.

        Raises:
            LearningError: A run is not finite.
        """
        steps = range(1, trajectory.steps)
        fraction = 1.0 if _in_half_precision(trajectory) else self.fraction
        gains = [self._gain(trajectory, step, fraction) for step in progress(steps, "measuring the gain per step")]
        return np.array(gains[:1] + gains or [1.0]) ** self.power

    def _gain(self, trajectory: Trajectory, step: int, fraction: float) -> float:
        nudge = _Nudge(trajectory, step, fraction)
        with attached(dict.fromkeys(trajectory.sampling.denoisers, nudge)), uncompiled():
            latent = trajectory.sampling().latent
        moved = float((wide(latent) - wide(trajectory.sampled.latent)).float().square().sum())
        if not np.isfinite(moved):
            raise LearningError(
                given=f"a run that is not finite after a nudge at step {step}",
                expected="finite latents",
                advice="Check the pipeline's dtype, or use a smaller fraction",
            )
        return moved / max(nudge.relative_move, 1e-20)


def _in_half_precision(trajectory: Trajectory) -> bool:
    """Whether a latent, an output, a weight or what autocast makes of them has fewer digits than float32."""
    sampling = trajectory.sampling
    looked = (trajectory.sampled.latent, *tensors(trajectory.outputs[0]), *sampling.denoiser.parameters())
    dtypes = {tensor.dtype for tensor in looked if tensor.is_floating_point()}
    cast = {dtype for _, dtype in sampling.autocast or ()}
    return any(torch.finfo(dtype).bits < torch.finfo(torch.float32).bits for dtype in dtypes | cast)


class _Nudge(Hook):
    """Answers from the trajectory before a step, moves the output at it, and stands aside afterwards."""

    def __init__(self, trajectory: Trajectory, step: int, fraction: float) -> None:
        self.trajectory, self.step, self.fraction = trajectory, step, fraction
        self.evaluation = 0
        self.moved: list[Any] = []

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sampler, now = self.trajectory.sampler, self.evaluation
        self.evaluation += 1
        step, branch = sampler.evaluations[now]
        if step > self.step:
            return call(*args, **kwargs)
        said = self.trajectory.outputs[now]
        if step < self.step:
            if sampler.course.starts and step in sampler.begins:  # there a cache is filled that later steps read
                return call(*args, **kwargs)
            return each(torch.clone, said)
        before = earlier_output(self.trajectory, step, branch)
        moved = mixed(lambda new, old: torch.lerp(new, old, self.fraction), said, before)
        self.moved.append(moved)
        return moved

    @property
    def relative_move(self) -> float:
        """‖Δε‖² / ‖ε‖² of what the scheduler was handed."""
        guidance = guidance_of(self.trajectory, self.step)
        return float(relative_error(guidance(self.moved), guidance(self.trajectory.at(self.step)[1])))


def step_changes(trajectory: Trajectory) -> Floats:
    """How wrong handing over the previous step's output would be, ‖ε_k − ε_{k−1}‖² / ‖ε_k‖² per step; 0 at step 0."""
    changes = [0.0]
    for step in range(1, trajectory.steps):
        guidance = guidance_of(trajectory, step)
        branches = trajectory.sampler.branches_at(step)
        before = guidance([earlier_output(trajectory, step, branch) for branch in branches])
        changes.append(float(relative_error(before, guidance(trajectory.at(step)[1]))))
    return np.array(changes)


def earlier_output(trajectory: Trajectory, step: int, branch: int) -> Any:
    """What the denoiser answered a step earlier for the same branch, and for the parts of the batch that a step has.

    Where there was no such branch, or the batch was another, it is what it answers at the step itself.
    """
    sampler = trajectory.sampler
    now = trajectory.outputs[sampler.evaluations.index((step, branch))]
    before, present = sampler.present(step - 1), sampler.present(step)
    if step in sampler.begins or not {*present} <= {*before}:
        return now
    output = trajectory.outputs[sampler.evaluations.index((step - 1, branch))]
    if sampler.branches > 1:
        return output
    call = next(iter(as_they_lie(trajectory.calls[step - 1 : step])))
    rows = rows_of(call.args, call.kwargs)
    return Batch(rows, present).part_of(output, Batch(rows, before))
