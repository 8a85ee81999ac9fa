"""`Tape`: a run whose evaluations keep only their inputs, and are done again one at a time as gradients come back.

Between two steps a sampler's state is one latent. So each evaluation of the denoiser is one node of the autograd
graph: forward it runs without gradients, backward it is recomputed with them. The sampler's own arithmetic, its
multistep history and guidance differentiate themselves, and memory is that of one step and of the values that it
reads, however many steps there are. Where computed answers are blended, what a step reads depends on all computed steps
before it: one set of stored values is held for each, rather than made again for every reader.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from stepmask.denoiser.batch import Batch, rows_of
from stepmask.denoiser.device import read_together
from stepmask.denoiser.families import casts_weights
from stepmask.denoiser.held import Owner
from stepmask.denoiser.modes import as_told, copied, in_this_autocast
from stepmask.denoiser.seam import Hook, attached, attached_by_name
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import each, forecast, tensors, to_output, to_stored_form
from stepmask.errors import LearningError
from stepmask.learning.floats import floats, mixed
from stepmask.schedule.graph import Block, BlockGraph

Floats = npt.NDArray[np.float64]
Blocks = list[list[Tensor]]
"""Tensors by block; the last is the denoiser."""


class Reader(Protocol):
    """Who reads the gradients and values of every evaluation, last step first."""

    def __call__(self, moment: "Moment") -> None:
        """Take in one evaluation."""


class Tape:
    """In front of the denoiser: runs a table without gradients, and gives gradients back by recomputing.

    Gradients flow through the store: a reused answer hands its gradient on to the evaluations whose values
    it was made from. Of stored values only those are held that the present step or later ones read; on the way back
    they are made again when they are needed.

    Args:
        trajectory: The run that will be repeated; says how many steps and branches there are.
        graph: The blocks.
        answered: What each cell answers by age, shape (steps, blocks, ages + 1), as `answers` gives it. A cell of
            zeros is read by nobody.
        reader: Gets gradients and values.
        reads: Which values each cell reads, shape as `answered`; `None` = those whose weight is not zero.
        checkpoint_blocks: Whether each block is checkpointed inside the recomputation.

    Raises:
        LearningError: Weights are cast layer by layer: where gradients come back, they are in another dtype again.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        graph: BlockGraph,
        answered: Floats,
        reader: Reader,
        *,
        reads: npt.NDArray[np.bool_] | None = None,
        checkpoint_blocks: bool = False,
    ) -> None:
        self.denoisers = trajectory.sampling.denoisers
        self.sampler = trajectory.sampler
        for denoiser in self.denoisers:
            _check_weights(denoiser)
        self.answered, self.reader = answered, reader
        self.reads = answered != 0 if reads is None else reads
        self.seats = [_Seat(block, checkpointed=checkpoint_blocks) for block in graph.blocks]
        self.anchor = torch.zeros((), dtype=torch.float32, requires_grad=True)
        self.evaluation = 0
        self.own: Any = WeakTensorKeyDictionary()  # input -> how often it had been written to, and a copy
        self.ran: dict[tuple[int, int], tuple[Evaluation, Sequence[Tensor]]] = {}  # by step and branch
        self.last = _last_readers(self.reads)
        self.stored: dict[tuple[int, int, int], Any] = {}  # by step, branch, column
        self.owed: dict[tuple[int, int, int], list[Tensor]] = {}  # gradients of what is stored
        self.finite: list[tuple[str, Tensor]] = []  # whether what was looked at is, not yet read

    def attached(self) -> AbstractContextManager[None]:
        """In front of the networks of the trajectory's pipeline for as long as the context lasts."""
        return attached({denoiser: _OfNetwork(self, denoiser) for denoiser in self.denoisers})

    def evaluate(
        self, denoiser: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One evaluation of a network as a node of the autograd graph."""
        run, given = as_function(in_this_autocast(call), args, kwargs)
        inputs = [self._own(tensor) for tensor in given]
        step, branch = self._next()
        self._look(inputs, f"a latent at step {step}")
        if step and not any(tensor.requires_grad for tensor in inputs):
            raise detached(f"between the evaluations of step {step - 1} and step {step}")
        evaluation = Evaluation(self, step, branch, run, denoiser, self._batch(step, branch, rows_of(args, kwargs)))
        self.ran[step, branch] = evaluation, [tensor.detach() for tensor in inputs]
        with as_told():  # the denoiser's own code is no sampler's
            taped = _Again.apply(evaluation, self.anchor, *inputs)  # type: ignore[no-untyped-call]  # untyped in torch
        outputs = iter(taped)
        return each(lambda tensor: next(outputs) if tensor.is_floating_point() else tensor, evaluation.output)

    def _next(self) -> tuple[int, int]:
        """The step and the branch of the next evaluation.

        Raises:
            LearningError: The recorded run had no more.
        """
        if self.evaluation == len(self.sampler.evaluations):
            raise LearningError(
                given=f"a run with more than the {self.evaluation} evaluations of the recorded one",
                expected="the recorded run",
                advice="Record again: the scheduler, the weights or the arguments have changed since",
            )
        self.evaluation += 1
        return self.sampler.evaluations[self.evaluation - 1]

    def _batch(self, step: int, branch: int, rows: int) -> Batch:
        return Batch(rows, self.sampler.parts(step, branch))

    def _own(self, given: Tensor) -> Tensor:
        """A copy of an input, which the sampler may write to before the evaluation is repeated; made once for several.

        What cannot be copied as it lies in memory is taken as it is: torch tells if it is written to.
        """
        if given.is_inference():
            return copied(given)
        version: int | None
        own: Tensor
        version, own = self.own.get(given, (None, given))
        if version != given._version:
            copy = given.clone()
            own = copy if copy.stride() == given.stride() else given
            self.own[given] = given._version, own
        tensor: Tensor = own
        return tensor

    def forward(self, evaluation: "Evaluation", inputs: Sequence[Tensor]) -> Any:
        """One evaluation of the table, without gradients."""
        output = self._run(evaluation, inputs)
        self._look(tensors(output), f"an output at step {evaluation.step}")
        self._drop(evaluation.branch, lambda step, column: self.last[step, column] <= evaluation.step)
        return output

    def backward(self, evaluation: "Evaluation", inputs: Sequence[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """The evaluation once more, with gradients: those of its inputs; the reader gets the rest."""
        step, branch = evaluation.step, evaluation.branch
        with torch.enable_grad():
            self._evaluate(evaluation, inputs)
        ends, pulls = self._ends(step, branch, grads)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        said = [tensor for seat in self.seats[:-1] for tensor in floats(seat.said)]
        with self._seated(evaluation):  # a denoiser that checkpoints itself calls its blocks again
            pulled = _pull(ends, [*wanted, *said], pulls)
        moment = Moment(self, evaluation, inputs, [*self._by_block(pulled[len(wanted) :]), grads])
        self._owe(evaluation, moment.gradients)
        self.reader(moment)
        for seat in self.seats:
            seat.clear()
        self._drop(branch, lambda stored, _: stored >= step)
        return pulled[: len(wanted)]

    def _look(self, values: Iterable[Tensor], what: str) -> None:
        """Have the device find out whether numbers are finite."""
        self.finite += [(what, torch.isfinite(tensor).all()) for tensor in values if tensor.is_floating_point()]

    def check_finite(self) -> None:
        """Refuse a run that was not finite throughout; an accelerator is waited for once.

        Raises:
            LearningError: A latent or an output was not.
        """
        looked, self.finite = self.finite, []
        for (what, _), is_finite in zip(looked, read_together(flag for _, flag in looked), strict=True):
            if not is_finite:
                raise not_finite(what)

    def held(self, moment: "Moment") -> Blocks:
        """Gradients of the answers with all blocks holding them: only the denoiser's own glue is computed again."""
        for seat in self.seats[:-1]:
            seat.hold()
        with torch.enable_grad(), self._seated(moment.evaluation):
            answer = self._finish(moment.evaluation.run([tensor.detach() for tensor in moment.inputs]))
            pairs = zip(floats(answer), moment.gradients[-1], strict=True)
            ends = [(end, grad) for end, grad in pairs if end.requires_grad]
            said = [tensor for seat in self.seats[:-1] for tensor in floats(seat.said)]
            pulled = _pull([end for end, _ in ends], said, [grad for _, grad in ends])
        return [*self._by_block(pulled), moment.gradients[-1]]

    def ages_read(self, step: int, column: int) -> list[int]:
        """Ages of the stored values that a cell answers from, newest first; none if it is dead, or just computed."""
        ages: list[int] = (1 + np.flatnonzero(self.reads[step, column, 1:])).tolist()
        return ages

    def _by_block(self, gradients: Sequence[Tensor]) -> Blocks:
        """Gradients of all answers, sorted into blocks."""
        rest = iter(gradients)
        return [[next(rest) for _ in floats(seat.said)] for seat in self.seats[:-1]]

    def _evaluate(self, evaluation: "Evaluation", inputs: Sequence[Tensor]) -> Any:
        """What the table's row answers; the denoiser does not run where it computes nothing."""
        self._tell(evaluation)
        with self._seated(evaluation):
            return self._finish(evaluation.run(inputs) if self.reads[evaluation.step, :, 0].any() else None)

    def _run(self, evaluation: "Evaluation", inputs: Sequence[Tensor]) -> Any:
        """Evaluate the table's row, and store what later steps read."""
        output, (step, branch) = self._evaluate(evaluation, inputs), (evaluation.step, evaluation.branch)
        for column, seat in enumerate(self.seats):
            if (step, column) in self.last:
                self.stored[step, branch, column] = seat.owner.own(seat.value)
        return output

    def _tell(self, evaluation: "Evaluation") -> None:
        """Give the seats what they answer, or what they mix into it."""
        step, branch = evaluation.step, evaluation.branch
        read = {column: self.ages_read(step, column) for column in range(len(self.seats))}
        self._make_again({step - age for ages in read.values() for age in ages}, step, branch)
        for column, seat in enumerate(self.seats):
            seat.clear()
            seat.batch = evaluation.batch
            seat.dead = not self.reads[step, column].any()
            weights, ages = self.answered[step, column], read[column]
            values = [self.value_for(evaluation, column, age) for age in ages]
            older = forecast(weights[ages].tolist(), values) if ages else None
            if not self.reads[step, column, 0]:
                seat.told = older
            elif ages or weights[0] != 1:
                seat.blend = partial(_blend, float(weights[0]), older)

    def value_for(self, evaluation: "Evaluation", column: int, age: int) -> Any:
        """What an evaluation reads of a stored value: the parts of the batch that it has itself."""
        source = evaluation.step - age
        stored = self.stored[source, evaluation.branch, column]
        batch = self.ran[source, evaluation.branch][0].batch
        return evaluation.batch.part_of(stored, batch, self.seats[column].block.shared)

    def _make_again(self, sources: set[int], step: int, branch: int) -> None:
        """Run earlier evaluations once more, if what they stored is not held."""
        for source in sorted(sources):
            wanted = [column for column in range(len(self.seats)) if step - source in self.ages_read(step, column)]
            if any((source, branch, column) not in self.stored for column in wanted):
                with torch.no_grad():
                    self._run(*self.ran[source, branch])

    def _drop(self, branch: int, done: Callable[[int, int], bool]) -> None:
        """Let go of a branch's stored values by step and column."""
        for key in [key for key in self.stored if key[1] == branch and done(key[0], key[2])]:
            del self.stored[key]

    def _seated(self, evaluation: "Evaluation") -> AbstractContextManager[None]:
        return attached_by_name(evaluation.denoiser, {seat.block.name: seat for seat in self.seats[:-1]})

    def _finish(self, output: Any) -> Any:
        """What the evaluation answers: its output, a blend of it, or what the denoiser's own cell is told."""
        seat = self.seats[-1]
        seat.value, seat.said = output, output if seat.told is None else seat.told
        if seat.blend is not None:
            seat.said = seat.blend(output)
        return seat.said

    def _ends(self, step: int, branch: int, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where gradients enter this evaluation: at its output, and at the values that later steps read."""
        pairs = list(zip(floats(self.seats[-1].said), grads, strict=True))
        for column, seat in enumerate(self.seats):
            if owed := self.owed.pop((step, branch, column), None):
                pairs += zip(floats(seat.value), owed, strict=True)
        pairs = [(end, pull) for end, pull in pairs if end.requires_grad]
        return [end for end, _ in pairs], [pull for _, pull in pairs]

    def _owe(self, evaluation: "Evaluation", gradients: Blocks) -> None:
        """Hand the gradients of reused answers on to the steps whose values they were made from."""
        step, branch = evaluation.step, evaluation.branch
        for column, answer in enumerate(gradients):
            for age in self.ages_read(step, column):
                source = (step - age, branch, column)
                batch = self.ran[step - age, branch][0].batch
                shared = self.seats[column].block.shared
                owed = [
                    evaluation.batch.whole_of(gradient, batch, is_shared=place in shared)
                    for place, gradient in enumerate(answer)
                ]
                before = self.owed.get(source) or [torch.zeros_like(gradient) for gradient in owed]
                weight = float(self.answered[step, column, age])
                self.owed[source] = [torch.add(old, new, alpha=weight) for old, new in zip(before, owed, strict=True)]


class _OfNetwork(Hook):
    """Stands in front of one of the pipeline's networks, and has the tape evaluate it."""

    def __init__(self, tape: Tape, denoiser: nn.Module) -> None:
        self.tape = tape
        self.denoiser = denoiser

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.tape.evaluate(self.denoiser, call, args, kwargs)


def _check_weights(denoiser: nn.Module) -> None:
    if casts_weights(denoiser):
        raise LearningError(
            given=f"a {type(denoiser).__name__} whose weights are cast layer by layer",
            expected="weights that are in one dtype when gradients come back, too",
            advice="Learn without enable_layerwise_casting, and enable it for sampling",
        )


def _last_readers(reads: npt.NDArray[np.bool_]) -> dict[tuple[int, int], int]:
    """The last step that reads a cell's value, by the cell's step and column, of those that are read later at all."""
    last: dict[tuple[int, int], int] = {}
    for step, column, age in np.argwhere(reads):  # steps ascend
        if age:
            last[int(step - age), int(column)] = int(step)
    return last


@dataclass
class Moment:
    """One evaluation while gradients come back to it.

    Args:
        gradients: Of what each block answered.
    """

    tape: Tape
    evaluation: "Evaluation"
    inputs: Sequence[Tensor]
    gradients: Blocks

    @property
    def step(self) -> int:
        """Which step."""
        return self.evaluation.step

    @property
    def branch(self) -> int:
        """Which branch."""
        return self.evaluation.branch

    def read(self, column: int) -> list[list[Tensor]]:
        """The values that a block answered from, newest first: what it computed, if it did, and stored ones."""
        own = [floats(self.tape.seats[column].value)] if self.tape.reads[self.step, column, 0] else []
        ages = self.tape.ages_read(self.step, column)
        return own + [floats(self.tape.value_for(self.evaluation, column, age)) for age in ages]

    def values(self) -> Blocks:
        """What each block says when computed, as it is stored; reused ones are computed for it."""
        return [[tensor.detach() for tensor in floats(seat.computed_value())] for seat in self.tape.seats]

    def held(self) -> Blocks:
        """The gradients, were all other blocks of the step to hold their answers whatever they are given."""
        return self.tape.held(self)


@dataclass
class Evaluation:
    """One evaluation of the denoiser as a function of the tensors it is given."""

    tape: Tape
    step: int
    branch: int
    run: Callable[[Sequence[Tensor]], Any]
    denoiser: nn.Module
    batch: Batch
    output: Any = None


def as_function(
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
    def forward(ctx: Any, evaluation: Evaluation, anchor: Tensor, *inputs: Tensor) -> Any:
        ctx.evaluation = evaluation
        ctx.save_for_backward(*inputs)
        evaluation.output = evaluation.tape.forward(evaluation, inputs)
        return tuple(tensor.clone() for tensor in floats(evaluation.output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        gradients = iter(ctx.evaluation.tape.backward(ctx.evaluation, inputs, list(grads)))
        return None, torch.zeros((), dtype=torch.float32), *(next(gradients) if need else None for need in needed)


class _Seat(Hook):
    """In front of one block: computes, with or without older values mixed in, or answers what it is told."""

    def __init__(self, block: Block, *, checkpointed: bool) -> None:
        self.block, self.checkpointed = block, checkpointed
        self.owner = Owner()
        self.likes: dict[Batch, Any] = {}  # zeros, for an output that nobody reads
        self.batch = Batch(0, ())
        self.clear()

    def clear(self) -> None:
        self.told = self.value = self.said = None
        self.again: Callable[[], Any] = lambda: self.value
        self.blend: Callable[[Any], Any] | None = None
        self.dead = False

    def hold(self) -> None:
        """From now on answer what was answered."""
        if self.told is None:
            answered = self.value if self.blend is None else self.blend(self.value)
            self.told = each(torch.Tensor.detach, answered)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = partial(call, *args, **kwargs)
        if self.dead:
            output = self._like()
        elif self.told is None:
            output = checkpoint(run, use_reentrant=False) if self.checkpointed and torch.is_grad_enabled() else run()
            if self.batch not in self.likes:
                self.likes[self.batch] = each(_zero, output)
            self.value = to_stored_form(self.block.reuse, output, args, kwargs)
            if self.blend is not None:
                output = to_output(self.block.reuse, self.blend(self.value), args, kwargs)
        else:
            if self.value is None:
                run = in_this_autocast(run)
                self.again = lambda: to_stored_form(self.block.reuse, run(), args, kwargs)
            output = to_output(self.block.reuse, self.told, args, kwargs)
        self.said = each(_apart, output) if torch.is_grad_enabled() else output
        return self.said

    def _like(self) -> Any:
        """Zeros for the present batch, made for it or for a larger one."""
        if self.batch not in self.likes:
            larger = next(batch for batch in reversed(self.likes) if {*self.batch.present} <= {*batch.present})
            self.likes[self.batch] = self.batch.part_of(self.likes[larger], larger, self.block.shared)
        return self.likes[self.batch]

    @torch.no_grad()
    def computed_value(self) -> Any:
        """What the block says to what it was given, as it is stored."""
        if self.value is None:
            self.value = self.again()
        return self.value


def _zero(tensor: Tensor) -> Tensor:
    """A zero of the tensor's shape that takes no memory: the answer that nobody reads."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _blend(own: float, older: Any, value: Any) -> Any:
    """Own · value + older; integers and booleans are the value's."""
    if older is None:
        return mixed(lambda new: own * new, value)
    return mixed(lambda new, old: torch.add(old, new, alpha=own), value, older)


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
        advice="Look there for .detach(), .data or numpy in the pipeline's or the scheduler's code",
    )
