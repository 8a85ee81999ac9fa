"""Relaxed masks: bits as scores in [0, 1] that gradients can move, and the ways back to bits."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Relaxation(Protocol):
    """How a row of bits is made trainable. The parameter is a vector, one entry per block."""

    @property
    def rate(self) -> float:
        """Learning rate of Adam."""

    def start(self, count: int) -> Tensor:
        """The parameter to begin with, shape (count,)."""

    def sample(self, parameter: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """Scores for one training step, differentiable in the parameter; progress runs from 0 to 1."""

    def project(self, parameter: Tensor, costs: Tensor, share: float) -> None:
        """Bring the parameter back into its domain, in place; `share` is the row's budget of Σ costs."""

    def scores(self, parameter: Tensor) -> Tensor:
        """The learned scores, without noise."""


@dataclass(frozen=True)
class Sigmoid:
    """s = σ(θ), θ clamped to ±limit: Learning-to-Cache (arXiv 2406.01733). The budget enters through the price alone.

    Args:
        rate: Learning rate of Adam.
        begin: θ at the start; positive = blocks begin computed.
        limit: Bound of the size of θ.
    """

    rate: float = 0.15
    begin: float = 1.0
    limit: float = 8.0

    def start(self, count: int) -> Tensor:
        """θ = begin."""
        return torch.full((count,), self.begin, dtype=torch.float32)

    def sample(self, parameter: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """σ(θ)."""
        return torch.sigmoid(parameter)

    def project(self, parameter: Tensor, costs: Tensor, share: float) -> None:
        """Clamp θ."""
        parameter.clamp_(-self.limit, self.limit)

    def scores(self, parameter: Tensor) -> Tensor:
        """σ(θ)."""
        return torch.sigmoid(parameter)


@dataclass(frozen=True)
class StraightThrough(Sigmoid):
    """Hard bits forward, the gradient of σ(θ) backward (arXiv 1308.3432). Arguments as of `Sigmoid`."""

    def sample(self, parameter: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """1 where θ > 0, with σ's gradient."""
        soft = torch.sigmoid(parameter)
        return (parameter > 0).to(soft) + soft - soft.detach()


@dataclass(frozen=True)
class Concrete:
    """Bernoulli probabilities s under a hard budget: the authors' earlier recipe (ProbMask, CVPR 2021).

    Training samples m = σ((log s − log(1 − s) + g₁ − g₀) / τ) with Gumbel noise g and a temperature τ that falls from 1
    to `coldest`; after each update s ← clip(s − v, 0, 1) with the smallest v ≥ 0 that meets Σ c_b·s_b ≤ share.

    Args:
        rate: Learning rate of Adam.
        coldest: Final temperature.
    """

    rate: float = 0.05
    coldest: float = 0.03

    def start(self, count: int) -> Tensor:
        """All probabilities 1; the first projection brings them to the budget."""
        return torch.ones(count, dtype=torch.float32)

    def sample(self, parameter: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """One binary Concrete sample (arXiv 1611.00712, eq. 4)."""
        probability = parameter.clamp(1e-4, 1 - 1e-4)
        uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
        noise = uniform.clamp(1e-6, 1 - 1e-6).logit()  # g₁ − g₀ is logistic
        temperature = (1 - progress) + self.coldest * progress
        return torch.sigmoid((probability.logit() + noise) / temperature)

    def project(self, parameter: Tensor, costs: Tensor, share: float) -> None:
        """S ← clip(s − v, 0, 1), v by bisection."""
        low, high = torch.zeros((), dtype=parameter.dtype), parameter.max().clamp_min(0.0)
        if float((parameter.clamp(0, 1) * costs).sum()) <= share:
            high = low
        for _ in range(40):
            middle = (low + high) / 2
            over = (parameter - middle).clamp(0, 1) @ costs > share
            low, high = (middle, high) if over else (low, middle)
        parameter.copy_((parameter - high).clamp(0, 1))

    def scores(self, parameter: Tensor) -> Tensor:
        """The probabilities."""
        return parameter.clone()
