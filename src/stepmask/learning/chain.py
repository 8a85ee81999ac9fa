"""A masked run under gradients: how the final latent depends on every forecast weight.

The pipeline's own code runs with gradients, the denoiser under activation checkpointing, so that one evaluation's
activations are held at a time. Stored values are constants: what is learned is how to use them. On the way back they
are made again from the latents when a step needs them, so that memory does not grow with the number of steps.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.seam import Behaviour, attached, seated
from stepmask.denoiser.values import each, from_store, placeholder, to_store
from stepmask.errors import LearningError
from stepmask.learning.tape import not_finite
from stepmask.schedule.graph import Block
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule


def loss_and_gradient(
    sampling: Sampling, schedule: MaskSchedule, weights: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[float, Tensor]:
    """The loss of a masked run's final latent, and its gradient in the forecast weights, shape (steps, blocks, 3).

    Stored values count as constants: what a weight changes in values that are stored after it is left out.

    Args:
        sampling: The run.
        schedule: Its table; its weights say how many values each reused cell reads.
        weights: What stands in for them, newest value first, shape (steps, blocks, 3).
        loss: Of the final latent, a scalar.

    Raises:
        LearningError: The loss is not finite, or the pipeline's code detaches the latent.
    """
    weights = weights.detach().requires_grad_()
    chain = _Chain(schedule, weights)
    blocks = dict(zip(schedule.graph.names[:-1], chain.seats[:-1], strict=True))
    with ExitStack() as stack:  # the backward pass recomputes evaluations, so it runs under the seats too
        stack.enter_context(seated(sampling.denoiser, blocks))
        stack.enter_context(attached({sampling.denoiser: chain}))
        stack.enter_context(torch.enable_grad())
        value = loss(sampling.latent())
        _check(value)
        (gradient,) = torch.autograd.grad(value, [weights])
    return float(value.detach()), gradient


def _check(value: Tensor) -> None:
    if not value.requires_grad:
        raise LearningError(
            given="a final latent that does not depend on the forecast weights",
            expected="a sampling loop without torch.no_grad, and a table that forecasts",
            advice="Let the loop run in the caller's gradient mode",
        )
    if not torch.isfinite(value):
        raise not_finite("a masked run's final latent")


class _Chain(Behaviour):
    """In front of the denoiser: turns the clock, and checkpoints each evaluation together with its step."""

    def __init__(self, schedule: MaskSchedule, weights: Tensor) -> None:
        self.weights, self.plan = weights, lower(schedule)
        self.branches = schedule.sampler.branches
        self.evaluation = self.step = self.branch = 0
        self.ran: list[Callable[[], Any]] = []  # each evaluation so far, to be run again
        self.seats = [_Seat(self, column, block) for column, block in enumerate(schedule.graph.blocks)]

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, branch = divmod(self.evaluation, self.branches)
        self.evaluation += 1

        def evaluate(*tensors: Any, **named: Any) -> Any:
            self.step, self.branch = step, branch
            needed = any(cell.action == "compute" for cell in self.plan.cells[step])
            output = call(*tensors, **named) if needed else None
            return self.seats[-1](lambda *_, **__: output, tensors, named)

        def trimmed(*tensors: Any, **named: Any) -> Any:
            for seat in self.seats:
                seat.trim(step, branch)
            return evaluate(*tensors, **named)

        still = each(Tensor.detach, (args, kwargs))
        self.ran.append(lambda: evaluate(*still[0], **still[1]))
        return checkpoint(trimmed, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    @torch.no_grad()
    def run_again(self, step: int) -> None:
        """Evaluate an earlier step of the present branch, for the values that it stored."""
        present = self.step, self.branch
        self.ran[step * self.branches + self.branch]()
        self.step, self.branch = present


class _Seat(Behaviour):
    """In front of one block: keeps what it computes by step, and forecasts with weights that have gradients."""

    def __init__(self, chain: _Chain, column: int, block: Block) -> None:
        self.chain, self.column, self.block = chain, column, block
        self.computed = [step for step, row in enumerate(chain.plan.computed) if row[column]]
        self.values: dict[tuple[int, int], Any] = {}  # by branch and step
        self.like: Any = None

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cell = self.chain.plan.cells[self.chain.step][self.column]
        if cell.action == "compute":
            output = call(*args, **kwargs)
            if self.like is None:
                self.like = each(placeholder, output)
            if cell.keeps:
                value = to_store(self.block.reuse, output, args, kwargs)
                self.values[self.chain.branch, self.chain.step] = each(Tensor.detach, value)
            return output
        if cell.action == "dead":
            return self.like
        return from_store(self.block.reuse, self.forecast(len(cell.weights)), args, kwargs)

    def trim(self, step: int, branch: int) -> None:
        """Hold only what this step and later ones read of the values before it; older ones can be made again."""
        count = self.chain.plan.cells[step - 1][self.column].keeps if step else 0
        newest = self.newest(step, count)
        for held in [held for held in self.values if held[0] == branch and held[1] not in newest]:
            del self.values[held]

    def newest(self, before: int, count: int) -> list[int]:
        """The last `count` steps before one at which this block is computed, newest first."""
        return [step for step in reversed(self.computed) if step < before][:count]

    def forecast(self, window: int) -> Any:
        """Σ_i w_i · C_i over the newest `window` values before this step."""
        branch, weights = self.chain.branch, self.chain.weights[self.chain.step, self.column]
        steps = self.newest(self.chain.step, window)
        for step in reversed(steps):
            if (branch, step) not in self.values:
                self.chain.run_again(step)
        stored = [self.values[branch, step] for step in steps]
        return each(
            lambda *values: sum(weights[index].to(value.dtype) * value for index, value in enumerate(values)), *stored
        )
