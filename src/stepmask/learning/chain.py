"""A masked run under gradients: how the final latent depends on every forecast weight.

The pipeline's own code runs with gradients, the denoiser under activation checkpointing, so that one evaluation's
activations are held at a time. Stored values are constants: what is learned is how to use them. They are held for the
whole run, a block output per computed and reused cell, because the backward pass reads them again.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.seam import Behaviour, attached
from stepmask.denoiser.values import each, stream
from stepmask.errors import LearningError
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
    modules = [sampling.denoiser.get_submodule(name) for name in schedule.graph.names[:-1]]
    with ExitStack() as stack:  # the backward pass recomputes evaluations, so it runs under the seats too
        stack.enter_context(attached(dict(zip(modules, chain.seats[:-1], strict=True))))
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
        raise LearningError(
            given="a masked run whose final latent is not finite",
            expected="finite latents",
            advice="Check the denoiser's dtype: half precision overflows on CPU",
        )


class _Chain(Behaviour):
    """In front of the denoiser: turns the clock, and checkpoints each evaluation together with its step."""

    def __init__(self, schedule: MaskSchedule, weights: Tensor) -> None:
        self.weights, self.plan = weights, lower(schedule)
        self.branches = schedule.sampler.branches
        self.evaluation = self.step = self.branch = 0
        blocks = enumerate(schedule.graph.blocks)
        self.seats = [_Seat(self, column, block) for column, block in blocks]

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, branch = divmod(self.evaluation, self.branches)
        self.evaluation += 1
        own = self.seats[-1]

        def evaluate(*tensors: Any, **named: Any) -> Any:
            self.step, self.branch = step, branch
            row = self.plan.cells[step]
            needed = any(cell.action == "compute" for cell in row)
            output = call(*tensors, **named) if needed else None
            return own(lambda *_, **__: output, tensors, named)

        return checkpoint(evaluate, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _Seat(Behaviour):
    """In front of one block: keeps what it computes by step, and forecasts with weights that have gradients."""

    def __init__(self, chain: _Chain, column: int, block: Block) -> None:
        self.chain, self.column, self.block = chain, column, block
        self.values: dict[tuple[int, int], Any] = {}  # by branch and step
        self.like: Any = None

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cell = self.chain.plan.cells[self.chain.step][self.column]
        if cell.action == "compute":
            output = call(*args, **kwargs)
            value = output - stream(args, kwargs) if self.block.reuse == "delta" else output
            if cell.keeps:
                self.values[self.chain.branch, self.chain.step] = each(torch.Tensor.detach, value)
            if self.like is None:
                self.like = each(lambda tensor: tensor.new_zeros(()).expand(tensor.shape), output)
            return output
        if cell.action == "dead":
            return self.like
        answer = self.forecast(len(cell.weights))
        return stream(args, kwargs) + answer if self.block.reuse == "delta" else answer

    def forecast(self, window: int) -> Any:
        """Σ_i w_i · C_i over the newest `window` values before this step."""
        branch, step = self.chain.branch, self.chain.step
        newest = [s for b, s in sorted(self.values, reverse=True) if b == branch and s < step][:window]
        weights = self.chain.weights[step, self.column]
        return each(
            lambda *stored: sum(weights[index].to(value.dtype) * value for index, value in enumerate(stored)),
            *(self.values[branch, earlier] for earlier in newest),
        )
