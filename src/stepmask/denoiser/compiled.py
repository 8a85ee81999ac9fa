"""Masks inside compiled regions: what the compiler traces in a block's place, and what is filled in around the region.

A compiled region (a transformer block after `compile_repeated_blocks`, a denoiser after `torch.compile`) runs no Python
of its own once the compiler has traced it. So a block inside one has a `forward` that reads nothing but a plain `Slot`:
what to do, stored values, and weights as tensors. The compiler guards what to do and how many values there are, and
takes the values and weights as inputs: blocks of a class share a graph for each pattern, and forecast, gate and
residual are fused. The region's hook fills the slots before the region runs, and takes out what was computed after it.

What nobody reads is left out by the compiler. A value that stands for it is not a number, for there is no error from
inside a graph.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepmask.denoiser.device import to_device
from stepmask.denoiser.modes import without_inference_mode
from stepmask.denoiser.replay import MaskedBlock
from stepmask.denoiser.run import Run, outside_error
from stepmask.denoiser.seam import SLOT, Hook, Slot, attach_traced
from stepmask.denoiser.stand_ins import StandIns, stand_in, unread_outputs
from stepmask.denoiser.unread import Unread
from stepmask.denoiser.values import each, rebuilt, tensors, to_output, to_stored_form, weights_dtype
from stepmask.errors import RunError
from stepmask.schedule.channels import reads_of
from stepmask.schedule.graph import Reuse
from stepmask.schedule.rectify import Action, Cell, Plan

Pattern = tuple[Any, ...]
"""What the compiler guards of a block: the action, how many stored values it reads, and in which way."""


@dataclass(eq=False)
class BlockSlot(Slot):
    """What a block inside a compiled region does at the next call, and what it has done.

    Args:
        name: The block's.
        reuse: What is stored of its output.
        action: What it does; `None` outside of an evaluation.
        stored: The stored values that it reads, newest first; of a dead block what it answers with.
        weights: Of the values that it answers with, newest first, along the first dimension.
        bias: Of a per-channel forecast.
        computed: What it has computed, as it is stored.
        calls: How often it was called.
        inside: Whether its own forward runs just now.
    """

    name: str
    reuse: Reuse
    action: Action | None = None
    stored: tuple[Any, ...] = ()
    weights: Tensor | None = None
    bias: Tensor | None = None
    computed: Any = None
    calls: int = 0
    inside: bool = False

    def clear(self) -> None:
        """Let go of everything."""
        self.action = None
        self.stored = ()
        self.weights = None
        self.bias = None
        self.computed = None
        self.calls = 0
        self.inside = False


_FORWARDS: WeakValueDictionary[Callable[..., Any], Callable[..., Any]] = WeakValueDictionary()


def masked_forward(bare: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of blocks inside compiled regions, in place of their own: one function for all of a class.

    Args:
        bare: Their own, unbound.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = getattr(self, SLOT, None)
        if slot is None or slot.inside:  # a copy; or the block's own forward calls itself
            return bare(self, *args, **kwargs)
        slot.calls += 1
        if slot.action is None:
            raise outside_error(slot.name)
        if slot.action == "dead":
            return each(_own_copy, slot.stored[0])  # what is written into it stays in the graph
        if slot.action == "reuse":
            return to_output(slot.reuse, mixed(slot.weights, slot.bias, slot.stored), args, kwargs)

        slot.inside = True
        output = bare(self, *args, **kwargs)
        slot.inside = False
        computed = to_stored_form(slot.reuse, output, args, kwargs)
        slot.computed = computed
        if slot.weights is None:
            return output
        return to_output(slot.reuse, mixed(slot.weights, slot.bias, (computed, *slot.stored)), args, kwargs)

    return _FORWARDS.setdefault(bare, forward)


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def mixed(weights: Tensor, bias: Tensor | None, values: Sequence[Any]) -> Any:
    """Σ_i weights[i] · values[i] + bias, newest first; of tensors that are not of floating point, the newest."""

    def mix(*parts: Tensor) -> Tensor:
        if not (parts[0].is_floating_point() or parts[0].is_complex()):
            return parts[0]
        total = weights[0] * parts[0]
        for index in range(1, len(parts)):
            total = total + weights[index] * parts[index]
        return (total if bias is None else total + bias).to(parts[0].dtype)

    return each(mix, *values)


class Weights:
    """The weights of all scalar forecasts of a run as tensors, moved to where the values are in one piece.

    Args:
        plans: The plans.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.cells = {
            (number, step, column): cell.weights
            for number, plan in enumerate(plans)
            for step, row in enumerate(plan.cells)
            for column, cell in enumerate(row)
            if cell.weights
        }
        self.moved: dict[tuple[torch.device, torch.dtype], dict[tuple[int, int, int], Tensor]] = {}

    def of(self, cell: tuple[int, int, int], like: Tensor) -> Tensor:
        """The weights of a cell, by plan, step and column, beside a value; float32, or float64 for such values."""
        dtype = weights_dtype(like).to_real()
        where = like.device, dtype
        if where not in self.moved:
            self.moved[where] = self._moved(*where)
        return self.moved[where][cell]

    def _moved(self, device: torch.device, dtype: torch.dtype) -> dict[tuple[int, int, int], Tensor]:
        rows = np.zeros((len(self.cells), 4))  # of 16 bytes at least: compiled code likes them aligned
        for row, weights in zip(rows, self.cells.values(), strict=True):
            row[: len(weights)] = weights
        with torch.inference_mode(False):
            matrix = to_device(torch.from_numpy(rows).to(dtype), device)
        return {
            cell: row[: len(weights)] for (cell, weights), row in zip(self.cells.items(), matrix.unbind(), strict=True)
        }


class InsideBlock:
    """A masked block inside a compiled region.

    Args:
        values: What it shares with its hook outside of regions: the run, the column, the counts.
        weights: Of all forecasts.
    """

    def __init__(self, values: MaskedBlock, weights: Weights) -> None:
        self.values = values
        self.slot = BlockSlot(values.block.label, values.block.reuse)
        self.channels: dict[int, tuple[Tensor, Tensor]] = {}  # id of a bias -> itself, and its weights in one tensor
        self.turn(weights)

    def turn(self, weights: Weights) -> None:
        """Turn to the run's plans, which have changed, and the weights of their forecasts."""
        self.weights = weights
        self.cell = Cell("compute", (), 0)
        self.channels.clear()

    def fill(self, given: Sequence[Any]) -> None:
        """Put the present row's action into the slot, and the stored values that it reads.

        Args:
            given: What the region is given; where no stored value is read, weights lie beside its first tensor.
        """
        values = self.values
        slot = self.slot
        run = values.run
        self.cell = run.answer(values.column)
        slot.clear()
        slot.action = self.cell.action
        if slot.action == "dead":
            slot.stored = (each(stand_in, run.unread[run.branch][values.column]),)
            return
        if self.cell.vectors is not None:
            slot.stored = tuple(run.newest(values.column, reads_of(self.cell.vectors)))
            slot.weights, slot.bias = self._channels(slot.stored[0])
            return
        if self.cell.weights:
            slot.stored = tuple(run.newest(values.column, len(self.cell.weights) - (slot.action == "compute")))
            like = next(tensors(slot.stored[0])) if slot.stored else next(tensors(given), torch.empty(0))
            slot.weights = self.weights.of((run.plan, run.step, values.column), like)

    def _channels(self, value: Any) -> tuple[Tensor, Tensor]:
        """Weights, (reads, channels, ...), and bias of a per-channel forecast, beside a value."""
        *weights, bias = self.values.vectors_for(value)
        held, stacked = self.channels.get(id(bias), (None, None))
        if held is not bias or stacked is None:
            stacked = torch.stack(weights)
            self.channels[id(bias)] = bias, stacked
        return stacked, bias

    @property
    def computes(self) -> bool:
        """Whether it computes, at the present row."""
        return self.cell.action == "compute"

    def skip(self) -> None:
        """Let go of what no later step reads, where the region is not called."""
        self.values.run.free(self.values.column, self.cell.keeps)

    def slot_between(self) -> BlockSlot:
        """A slot like this one, whose answer shows where nobody reads it."""
        slot = replace(self.slot)
        if slot.action == "dead":
            run = self.values.run
            slot.stored = (run.unread[run.branch][self.values.column],)
        return slot

    def collect(self) -> None:
        """Take out what was computed, and store it, if a later step reads it.

        Raises:
            RunError: The block was not called, or more than once.
        """
        values = self.values
        run = values.run
        if self.slot.calls != 1:
            raise RunError(
                given=f"block {self.slot.name!r}, which is called {self.slot.calls} times at step {run.step} inside a "
                "compiled region",
                expected="one call at every step, as when the denoiser was traced",
                advice="Trace and learn with these inputs",
            )
        if not self.computes:
            self.skip()
            return
        values.keep(self.cell, self.slot.computed)


class MaskedRegion(Hook):
    """Stands in front of a compiled region: fills the slots of its blocks, and empties them.

    Args:
        blocks: The blocks inside, in call order.
    """

    def __init__(self, blocks: Sequence[InsideBlock]) -> None:
        self.blocks = blocks

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the region."""
        try:
            for block in self.blocks:
                block.fill((args, kwargs))
            return self._answer(call, args, kwargs)
        except Exception as error:
            for block in self.blocks[:1]:
                block.values.run.note_failure(block.values.column, error)
            raise
        finally:
            for block in self.blocks:
                block.slot.clear()

    def _answer(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [_in_one_layout(value) for value in args]
        named = {name: _in_one_layout(value) for name, value in kwargs.items()}
        output = call(*given, **named)
        _write_back((*given, *named.values()), (*args, *kwargs.values()))
        for block in self.blocks:
            block.collect()
        return output


class RegionBetween(MaskedRegion):
    """Stands in front of a compiled region between what is not compiled, which leaves out what is made of `Unread`.

    So an `Unread` argument is turned into a tensor here, and an output that is made of it, or of a dead block, into an
    `Unread`. A region that computes no block and answers with nothing else is not called.

    Args:
        module: The region.
        name: Its name.
        blocks: The blocks inside, in call order.
        run: The run.
        known: Which outputs nobody reads, by what is dead among the blocks, and unread among the arguments.
    """

    def __init__(
        self, module: nn.Module, name: str, blocks: Sequence[InsideBlock], run: Run, known: dict[Any, Any]
    ) -> None:
        super().__init__(blocks)
        self.module = module
        self.name = name
        self.run = run
        self.known = known
        self.stand_ins = StandIns()
        self.unread: dict[Any, Any] = {}  # by branch and batch: what the region answers where nobody reads any of it

    def _answer(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        unread = tuple(isinstance(leaf, Unread) for leaf in leaves)
        dead = tuple(block.slot.action == "dead" for block in self.blocks)
        if not any(unread) and not any(dead):
            return super()._answer(call, args, kwargs)

        nobody_reads = self._outputs(dead, unread, args, kwargs)
        is_left_out = bool(nobody_reads) and all(nobody_reads)
        where = self.run.branch, self.run.batch
        if is_left_out and where in self.unread and not any(block.computes for block in self.blocks):
            for block in self.blocks:
                block.skip()
            return rebuilt(self.unread[where])

        args, kwargs = pytree.tree_unflatten(self.stand_ins.replace(leaves), form)
        output = super()._answer(call, args, kwargs)
        if any(nobody_reads):
            told = iter(nobody_reads)
            output = each(lambda tensor: Unread.of(tensor) if next(told, False) else tensor, output)
        if is_left_out:
            self.unread[where] = output
        return output

    def _outputs(
        self, dead: tuple[bool, ...], unread: tuple[bool, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, ...]:
        """Which tensors of the output nobody reads; found out once, by an evaluation on fake tensors."""
        key = dead, unread
        if key not in self.known:
            self.known[key] = unread_outputs(self.module, self._mask, args, kwargs)
        outputs: tuple[bool, ...] = self.known[key]
        return outputs

    def _mask(self, copied: nn.Module) -> None:
        """Mask the blocks of a copy of the region as those of the region are now."""
        for block in self.blocks:
            name = block.values.block.name[len(self.name) + 1 :]
            inside = copied.get_submodule(name)
            attach_traced(inside, masked_forward(type(inside).forward), block.slot_between())


def _in_one_layout(value: Any) -> Any:
    """Tokens in the layout of all layers: the first ones come transposed from the patches, and would need graphs."""
    if isinstance(value, Tensor) and value.ndim == 3 and not value.is_contiguous():
        with without_inference_mode():  # where writes are not counted
            return value.contiguous()
    return value


def _write_back(given: Iterable[Any], originals: Iterable[Any]) -> None:
    """Write what a region has written into its input also into that whose layout was changed for it."""
    for value, original in zip(given, originals, strict=True):
        if value is not original and value._version:
            original.copy_(value)


def pattern_of(cell: Cell) -> Pattern:
    """What the compiler guards of a cell."""
    if cell.vectors is not None:
        return cell.action, reads_of(cell.vectors), "channels"
    return cell.action, len(cell.weights), "scalar"


def patterns(plans: Iterable[Plan], columns: Sequence[int]) -> set[tuple[Pattern, ...]]:
    """The patterns of a region that holds the blocks of some columns, at all steps at which anything is computed."""
    return {
        tuple(pattern_of(row[column]) for column in columns)
        for plan in plans
        for row in plan.cells
        if any(cell.action == "compute" for cell in row)
    }
