"""The hooks of a masked run: in front of each block, of what feeds blocks alone, and of the denoiser itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.batch import Batch, rows_of
from stepmask.denoiser.call import Call, given_timestep, timestep_of_call
from stepmask.denoiser.held import private_copy
from stepmask.denoiser.modes import beside_graphs, refuse_tracing, usable
from stepmask.denoiser.run import Run
from stepmask.denoiser.seam import SLOT, Hook, Slot
from stepmask.denoiser.split import MAKE_PLAIN, PLAIN_OUTPUT, is_split
from stepmask.denoiser.unread import refuse_unread
from stepmask.denoiser.values import (
    each,
    first,
    forecast,
    forecast_channels,
    on_channels,
    rebuilt,
    stream,
    tensors,
    to_output,
    to_stored_form,
    weights_dtype,
)
from stepmask.errors import RunError, RunNotStarted
from stepmask.schedule.channels import channel_axis, reads_of
from stepmask.schedule.graph import Block
from stepmask.schedule.rectify import Cell


class Values:
    """What one block answers with: what it computes, what the run has stored of it, or a blend of both."""

    def __init__(self, run: Run, column: int, block: Block) -> None:
        self.run = run
        self.column = column
        self.block = block
        self.computed: int | Fraction = 0  # whole batches
        self.vectors: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by plan and step, where the values are
        self.turn()

    def turn(self) -> None:
        """Turn to the run's plans, which have changed."""
        self.vectors.clear()
        self.may_be_dead = any(row[self.column].action == "dead" for plan in self.run.plans for row in plan.cells)

    def compute(self, cell: Cell, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer with what was computed, or a blend of it; store it, if a later step reads it."""
        run = self.run
        column = self.column
        refuse_unread(output, self.block.label)
        if type(output) is not Tensor:
            self._refuse_parts(output)
        self._stand_in(output)
        if not (cell.keeps or cell.weights):
            run.free(column, 0)
            return output

        value = to_stored_form(self.block.reuse, output, args, kwargs)
        if cell.weights:
            blend = forecast(cell.weights, [value, *run.newest(column, len(cell.weights) - 1)])
            output = to_output(self.block.reuse, blend, args, kwargs)
        self._store(cell, value)
        return output

    def _refuse_parts(self, output: Any) -> None:
        """Refuse an output that is split between processes.

        Raises:
            RunError: It is.
        """
        if any(map(is_split, tensors(output))):
            raise RunError(
                given=f"block {self.block.label!r}, which answers with a DTensor",
                expected=PLAIN_OUTPUT,
                advice=MAKE_PLAIN,
            )

    def keep(self, cell: Cell, value: Any) -> None:
        """Store what was computed inside a compiled region, if a later step reads it."""
        self.computed += self.run.share
        self._stand_in(value)
        self._store(cell, value)

    def _store(self, cell: Cell, value: Any) -> None:
        self.run.free(self.column, max(cell.keeps - 1, 0))
        if cell.keeps:
            self.run.put(self.column, self.own(value))

    def _stand_in(self, output: Any) -> None:
        """Make what stands for an output at steps at which nobody reads it, where there are any."""
        if self.may_be_dead and self.run.unread[self.run.branch][self.column] is None:
            self.run.unread[self.run.branch][self.column] = each(self.run.stand_in, output)

    def own(self, value: Any) -> Any:
        """A value that nobody else can write to unseen; what is added to the stream was made here."""
        return usable(value) if self.block.reuse == "delta" else self.run.owners[self.column].own(value)

    def reuse(self, cell: Cell, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer from the store; what is read for the last time leaves it."""
        if cell.vectors is None:
            answer = forecast(cell.weights, self.run.newest(self.column, len(cell.weights)))
        else:
            stored = self.run.newest(self.column, reads_of(cell.vectors))
            answer = forecast_channels(self.vectors_for(stored[0]), stored)
        self.run.free(self.column, cell.keeps)
        return to_output(self.block.reuse, answer, args, kwargs)

    def skip(self, cell: Cell) -> Any:
        """Answer with what nobody reads."""
        self.run.free(self.column, cell.keeps)
        return rebuilt(self.run.unread[self.run.branch][self.column])

    def vectors_for(self, value: Any) -> tuple[Tensor, ...]:
        """The vectors of this step; those of all steps are brought to the value when the first is needed."""
        key = self.run.plan, self.run.step
        like = next(tensors(value))
        held = self.vectors.get(key)
        if held is None or (held[0].device, held[0].dtype) != (like.device, weights_dtype(like)):
            self._check_channels(like)
            arrays = {
                (number, step): vectors
                for number, plan in enumerate(self.run.plans)
                for step, row in enumerate(plan.cells)
                if (vectors := row[self.column].vectors) is not None
            }
            self.vectors = dict(zip(arrays, on_channels(list(arrays.values()), like), strict=True))
        return self.vectors[key]

    def _check_channels(self, value: Tensor) -> None:
        """Refuse a value whose channels are not those of the schedule's graph.

        Raises:
            RunError: They are not.
        """
        traced = self.block.shapes[0]
        count = traced[channel_axis(len(traced))]
        if value.ndim == len(traced) and value.shape[channel_axis(value.ndim)] == count:
            return
        raise RunError(
            given=f"an output of block {self.block.label!r} of shape {tuple(value.shape)}",
            expected=f"{len(traced)} dimensions and {count} channels, for which the schedule has weights",
            advice="Use a schedule that was learned for this denoiser",
        )


class MaskedBlock(Values, Hook):
    """Stands in front of one block: computes, answers from the store, or answers with what nobody reads."""

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the block."""
        try:
            return self._answer(call, args, kwargs)
        except Exception as error:
            self.run.note_failure(self.column, error)
            raise

    def _answer(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cell = self.run.answer(self.column)
        if cell.action == "reuse":
            return self.reuse(cell, args, kwargs)
        if cell.action == "dead":
            return self.skip(cell)
        self.computed += self.run.share
        if self.block.reuse == "output" or not (cell.keeps or cell.weights):
            return self.compute(cell, call(*args, **kwargs), args, kwargs)

        given = stream(args, kwargs)
        written = None if given.is_inference() else given._version
        output = call(*args, **kwargs)
        if written != (None if given.is_inference() else given._version):
            raise RunError(
                given=f"block {self.block.label!r}, which changes its input in place at step {self.run.step}",
                expected="an input that stays as it is, for what is stored is the output without it",
                advice="Trace with these inputs, or reuse the block by its output: blocks={name: 'output'}",
            )
        self._check_delta(output, given)
        return self.compute(cell, output, args, kwargs)

    def _check_delta(self, output: Any, given: Tensor) -> None:
        """Refuse an output that is not its input and something on top, as it was in the trace.

        Raises:
            RunError: It has another shape.
        """
        if isinstance(output, Tensor) and output.shape == given.shape:
            return
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RunError(
            given=f"block {self.block.label!r}, which answers {shape} to an input of shape {tuple(given.shape)}",
            expected="an output of its input's shape, as when it was traced, for it is reused as what it adds to that",
            advice="If its layers are split between processes now, trace with blocks={name: 'output'}, or mask the "
            "module around the split ones",
        )


class MaskedFeeder(Hook):
    """Stands in front of a module that only blocks read: lets it be called where one of them is computed."""

    def __init__(self, run: Run, columns: Sequence[int]) -> None:
        self.run = run
        self.columns = columns
        self.unread: dict[int, tuple[Batch, Any]] = {}  # by branch: what stands for the output

    def turn(self) -> None:
        """Turn to the run's plans, which have changed."""
        self.unread.clear()

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the module."""
        run = self.run
        if run.row and not any(run.row[column].action == "compute" for column in self.columns):
            batch, unread = self.unread[run.branch]
            return rebuilt(run.batch.part_of(unread, batch))
        output = call(*args, **kwargs)
        if run.row and run.begins:  # where everything is computed
            self.unread[run.branch] = run.batch, each(run.stand_in, output)
        return output


@dataclass(eq=False)
class Door(Slot):
    """Whether a masked denoiser's `forward` is called by its hook, just now."""

    is_open: bool = False


def guarded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a masked denoiser, in place of its class's: for its hook alone.

    Raises:
        RunNotStarted: Its hook was gone past.
    """
    door = getattr(self, SLOT, None)
    if door is None or door.is_open:
        return type(self).forward(self, *args, **kwargs)
    raise _went_past(type(self).__name__)


guarded_forward.__name__ = "forward"  # pickle finds a module's methods by their names


@beside_graphs(
    "a denoiser was compiled, or its forward called, past its masks: masked.compile(), or compile before a run"
)
def _went_past(denoiser: str) -> RunNotStarted:
    return RunNotStarted(
        given=f"a call of a {denoiser} that goes past its masks",
        expected="calls of the module itself, as it was when the run began",
        advice="Compile it with masked.compile(), or before a run begins (apply, set_timesteps, masked.restart()); do "
        "not call its forward, nor a shallow copy",
    )


class MaskedDenoiser(Values, Hook):
    """Stands in front of the denoiser: turns to the next row, and answers a whole step from the store where told to.

    Args:
        run: The run.
        blocks: The hooks of its blocks, by column.
        own: The denoiser as the last block of its own graph.
        parameters: The names of the denoiser's arguments, in order.
        network: Which of the pipeline's networks it is.
    """

    def __init__(
        self,
        run: Run,
        blocks: Sequence[MaskedBlock],
        own: Block,
        parameters: Sequence[str],
        network: int = 0,
    ) -> None:
        super().__init__(run, len(blocks), own)
        self.blocks = blocks
        self.parameters = parameters
        self.network = network
        self.door = Door()
        self.region: Hook | None = None  # the denoiser as a compiled region
        self.was_called = False  # ever
        self.at_start: Callable[[], None] | None = None  # before the first evaluation of a run
        self.at_missing: Callable[[], None] | None = None  # where a block was not called

    def turn(self) -> None:
        """Turn to the run's plans, which have changed."""
        super().turn()
        self.compares_timesteps = not self.run.sampler.class_name and self.run.sampler.tells_timesteps

    @beside_graphs("a masked denoiser is in no graph around it: compile the denoiser, or leave out fullgraph")
    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the denoiser."""
        run = self.run
        self.was_called = True
        run.check_thread()
        refuse_tracing()
        try:
            if self.at_start is not None and run.running and run.evaluation == 0:
                self.at_start()
            latents = tuple(tuple(tensor.shape) for tensor in first(args, kwargs))
            run.begin(rows_of(args, kwargs), latents, self._timestep(args, kwargs), self.network)
            run.branch_order.check(run.step, run.branch, run.calls_of_step, args, kwargs)
            if run.part_order is not None:
                run.part_order.check(run.step, run.batch, args, kwargs)
            output = self._answer(run.row[-1], call, args, kwargs)
            if self.at_missing is not None and run.runs_forward and not all(run.answered[:-1]):
                self.at_missing()
            run.end()
        except BaseException:
            run.stop()
            raise
        return output

    def _answer(self, cell: Cell, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = None
        if self.run.runs_forward:
            self.computed += self.run.share
            self.door.is_open = True
            try:
                output = call(*args, **kwargs) if self.region is None else self.region(call, args, kwargs)
            finally:
                self.door.is_open = False
        else:
            for block, own in zip(self.blocks, self.run.row, strict=False):
                block.skip(own)  # not called: what nobody reads any more goes here

        if cell.action == "compute":
            return self.compute(cell, output, args, kwargs)
        return self.reuse(cell, args, kwargs)

    def own(self, value: Any) -> Any:
        """A copy: the sampler may write into what it was given, into a stored value it must not."""
        return private_copy(value)

    def reuse(self, cell: Cell, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer from the store, with a copy where the stored value itself would be handed out."""
        is_plain = cell.vectors is None and tuple(cell.weights) == (1.0,)
        output = super().reuse(cell, args, kwargs)
        return each(torch.clone, output) if is_plain else output

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The timestep of a plain loop's evaluation, where it is compared.

        To look at one on an accelerator, that is waited for: once a run.
        """
        if not self.compares_timesteps:
            return None
        call = Call(args, kwargs)
        given = given_timestep(call, self.parameters)
        if self.run.evaluation and isinstance(given, Tensor) and given.device.type != "cpu":
            return None
        step, _ = self.run.order[min(self.run.evaluation, self.run.evaluations - 1)]
        return timestep_of_call(call, step, self.parameters)
