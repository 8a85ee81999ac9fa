"""`Tape`: a run whose evaluations keep only their inputs, and are done again one at a time as gradients come back.

Between two steps a sampler's state is one latent. So each evaluation of the denoiser is one node of the autograd
graph: forward it runs without gradients, backward it is recomputed with them. The sampler's own arithmetic, its
multistep history and guidance differentiate themselves, and memory is one step's, however many there are.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from stepmask.denoiser.seam import Behaviour, seated
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import each, forecast, from_store, tensors, to_store
from stepmask.errors import LearningError
from stepmask.schedule.graph import Block, BlockGraph

Floats = npt.NDArray[np.float64]
Blocks = list[list[Tensor]]
"""Tensors by block; the last is the denoiser."""


class Reader(Protocol):
    """Who reads the gradients and values of every evaluation, last step first."""

    def __call__(self, step: int, branch: int, gradients: Blocks, held: Blocks, values: Blocks) -> None:
        """Take in one evaluation.

        Args:
            step: Which.
            branch: Which.
            gradients: Of what each block answered.
            held: The same, were all other blocks of the step to hold their answers whatever they are given.
            values: What each block says when computed, as it is stored.
        """


class Tape(Behaviour):
    """In front of the denoiser: runs a table without gradients, and gives gradients back by recomputing.

    Gradients flow through what is stored: a reused answer hands its gradient on to the evaluations whose values it
    was made from. Around all-compute nothing is stored; around another table the values that it reads again are kept
    for the whole run.

    Args:
        trajectory: The run that will be repeated; says how many steps and branches there are.
        graph: The blocks.
        answered: What each cell answers by age, shape (steps, blocks, ages + 1), as `answers` gives it.
        reader: Gets gradients and values.
        checkpoint_blocks: Whether each block is checkpointed inside the recomputation.
    """

    def __init__(
        self, trajectory: Trajectory, graph: BlockGraph, answered: Floats, reader: Reader, *, checkpoint_blocks: bool
    ) -> None:
        self.denoiser, self.branches = trajectory.sampling.denoiser, trajectory.sampler.branches
        self.answered, self.reader = answered, reader
        self.seats = [_Seat(block, checkpointed=checkpoint_blocks) for block in graph.blocks]
        self.anchor = torch.zeros((), requires_grad=True)
        self.evaluation = 0
        reused = np.argwhere(answered[..., 1:])
        self.read = {(int(step - age - 1), int(column)) for step, column, age in reused}  # cells that are read again
        self.stored: dict[tuple[int, int, int], Any] = {}  # by step, branch, column
        self.owed: dict[tuple[int, int, int], list[Tensor]] = {}  # gradients of what is stored

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One evaluation as a node of the autograd graph."""
        run, inputs = _as_function(call, args, kwargs)
        step, branch = divmod(self.evaluation, self.branches)
        self.evaluation += 1
        _check_finite(inputs, f"a latent at step {step}")
        if step and not any(tensor.requires_grad for tensor in inputs):
            raise detached(f"between the evaluations of step {step - 1} and step {step}")
        evaluation = _Evaluation(self, step, branch, run)
        outputs = iter(_Again.apply(evaluation, self.anchor, *inputs))  # type: ignore[no-untyped-call]
        return each(lambda tensor: next(outputs) if tensor.is_floating_point() else tensor, evaluation.output)

    def forward(self, evaluation: "_Evaluation", inputs: Sequence[Tensor]) -> Any:
        """One evaluation of the table, without gradients."""
        step, branch = evaluation.step, evaluation.branch
        self._tell(step, branch)
        output = None
        if self.seats[-1].told is None or (self.answered[step, :, 0] == 1).any():
            with self._seated():
                output = evaluation.run(inputs)
        output = self._finish(output)
        for column, seat in enumerate(self.seats):
            if (step, column) in self.read:
                self.stored[step, branch, column] = seat.value
        _check_finite(tensors(output), f"an output at step {step}")
        return output

    def backward(self, evaluation: "_Evaluation", inputs: Sequence[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """The evaluation once more, with gradients: those of its inputs; the reader gets the rest."""
        step, branch = evaluation.step, evaluation.branch
        self._tell(step, branch)
        with torch.enable_grad(), self._seated():
            self._finish(evaluation.run(inputs))
        ends, pulls = self._ends(step, branch, grads)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        said = [tensor for seat in self.seats[:-1] for tensor in floats(seat.said)]
        pulled = _pull(ends, [*wanted, *said], pulls)
        gradients = [*self._by_block(pulled[len(wanted) :]), grads]
        self._owe(step, branch, gradients)
        values = [[tensor.detach() for tensor in floats(seat.value)] for seat in self.seats]
        self.reader(step, branch, gradients, self._held(evaluation, inputs, grads), values)
        for seat in self.seats:
            seat.clear()
        return pulled[: len(wanted)]

    def _held(self, evaluation: "_Evaluation", inputs: Sequence[Tensor], grads: list[Tensor]) -> Blocks:
        """Gradients of the answers with all blocks holding them: only the denoiser's own glue is computed again."""
        skipped = self.seats[-1].told is not None
        for seat in self.seats[:-1]:
            seat.hold()
        with torch.enable_grad(), self._seated():
            output = evaluation.run([tensor.detach() for tensor in inputs])
        ends = [(end, grad) for end, grad in zip(floats(output), grads, strict=True) if end.requires_grad]
        said = [tensor for seat in self.seats[:-1] for tensor in floats(seat.said)]
        pulled = _pull([] if skipped else [end for end, _ in ends], said, [grad for _, grad in ends])
        return [*self._by_block(pulled), grads]

    def _by_block(self, gradients: Sequence[Tensor]) -> Blocks:
        """Gradients of all answers, sorted into blocks."""
        rest = iter(gradients)
        return [[next(rest) for _ in floats(seat.said)] for seat in self.seats[:-1]]

    def _tell(self, step: int, branch: int) -> None:
        """Give the seats of reused cells what they answer."""
        for column, seat in enumerate(self.seats):
            ages = np.flatnonzero(self.answered[step, column])
            seat.clear()
            if len(ages) and ages[0]:
                values = [self.stored[step - int(age), branch, column] for age in ages]
                seat.told = forecast(self.answered[step, column, ages].tolist(), values)

    def _seated(self) -> AbstractContextManager[None]:
        return seated(self.denoiser, {seat.block.name: seat for seat in self.seats[:-1]})

    def _finish(self, output: Any) -> Any:
        """What the evaluation answers: its output, or what the denoiser's own cell is told."""
        seat = self.seats[-1]
        seat.value = output
        return output if seat.told is None else seat.told

    def _ends(self, step: int, branch: int, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where gradients enter this evaluation: at its output, and at the values that later steps read."""
        pairs = [] if self.seats[-1].told is not None else list(zip(floats(self.seats[-1].value), grads, strict=True))
        for column, seat in enumerate(self.seats):
            if owed := self.owed.pop((step, branch, column), None):
                pairs += zip(floats(seat.value), owed, strict=True)
        pairs = [(end, pull) for end, pull in pairs if end.requires_grad]
        return [end for end, _ in pairs], [pull for _, pull in pairs]

    def _owe(self, step: int, branch: int, gradients: Blocks) -> None:
        """Hand the gradients of reused answers on to the steps whose values they were made from."""
        for column, (seat, answer) in enumerate(zip(self.seats, gradients, strict=True)):
            if seat.told is None:
                continue
            for age in np.flatnonzero(self.answered[step, column]):
                source = (step - int(age), branch, column)
                before = self.owed.get(source) or [torch.zeros_like(gradient) for gradient in answer]
                weight = float(self.answered[step, column, age])
                self.owed[source] = [torch.add(old, new, alpha=weight) for old, new in zip(before, answer, strict=True)]


@dataclass
class _Evaluation:
    """One evaluation of the denoiser as a function of the tensors it is given."""

    tape: Tape
    step: int
    branch: int
    run: Callable[[Sequence[Tensor]], Any]
    output: Any = None


def _as_function(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[Sequence[Tensor]], Any], list[Tensor]]:
    """A call as a function of its tensors alone, and those tensors."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def run(inputs: Sequence[Tensor]) -> Any:
        filled = list(others)
        for place, tensor in zip(places, inputs, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return call(*args, **kwargs)

    return run, [leaves[place] for place in places]


class _Again(torch.autograd.Function):
    """An evaluation as one node of the autograd graph. The anchor makes the first one part of it."""

    @staticmethod
    def forward(ctx: Any, evaluation: _Evaluation, anchor: Tensor, *inputs: Tensor) -> Any:
        ctx.evaluation = evaluation
        ctx.save_for_backward(*inputs)
        evaluation.output = evaluation.tape.forward(evaluation, inputs)
        return tuple(tensor.clone() for tensor in floats(evaluation.output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        gradients = iter(ctx.evaluation.tape.backward(ctx.evaluation, inputs, list(grads)))
        return None, torch.zeros(()), *(next(gradients) if need else None for need in needed)


class _Seat(Behaviour):
    """In front of one block: computes, or answers what it is told; with gradients, it computes in either case."""

    def __init__(self, block: Block, *, checkpointed: bool) -> None:
        self.block, self.checkpointed = block, checkpointed
        self.clear()

    def clear(self) -> None:
        self.told = self.value = self.said = None
        self.holds = False

    def hold(self) -> None:
        """From now on answer what was answered."""
        self.holds = True
        if self.told is None:
            self.told = each(torch.Tensor.detach, self.value)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = partial(call, *args, **kwargs)
        if self.told is None:
            output = checkpoint(run, use_reentrant=False) if self.checkpointed and torch.is_grad_enabled() else run()
            self.value = to_store(self.block.reuse, output, args, kwargs)
        else:
            if torch.is_grad_enabled() and not self.holds:
                with torch.no_grad():
                    self.value = to_store(self.block.reuse, run(), args, kwargs)
            output = from_store(self.block.reuse, self.told, args, kwargs)
        self.said = each(_apart, output) if torch.is_grad_enabled() else output
        return self.said


def _apart(tensor: Tensor) -> Tensor:
    """The tensor as a node of its own, so that its gradient is that of its readers and not of what is stored."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _pull(ends: list[Tensor], wanted: list[Tensor], pulls: list[Tensor]) -> Sequence[Tensor]:
    """Gradients of Σ ⟨end, pull⟩; zeros where nothing depends."""
    if not ends or not wanted:
        return [torch.zeros_like(tensor) for tensor in wanted]
    return torch.autograd.grad(ends, wanted, pulls, allow_unused=True, materialize_grads=True)


def floats(value: Any) -> list[Tensor]:
    """The tensors in a value that can carry gradients."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def _check_finite(values: Iterable[Tensor], what: str) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in values if tensor.is_floating_point()):
        raise not_finite(what)


def not_finite(what: str) -> LearningError:
    """The error for numbers that overflowed."""
    return LearningError(
        given=f"{what} that is not finite",
        expected="finite numbers throughout the run and its gradients",
        advice="Check the pipeline's dtype: half precision overflows",
    )


def detached(where: str) -> LearningError:
    """The error for a pipeline that cuts its own gradients."""
    return LearningError(
        given=f"a latent that loses its gradient {where}",
        expected="a pipeline and a sampler that carry the latent from step to step as a tensor",
        advice="Look there for .detach(), .data, torch.no_grad() or numpy in the pipeline's or the scheduler's code",
    )
