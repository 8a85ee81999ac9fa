"""The workbench of one row: every block under observation, its stored value beside it, its answer a blend of both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepmask.denoiser.batch import Batch, rows_of
from stepmask.denoiser.call import Call
from stepmask.denoiser.held import Owner
from stepmask.denoiser.modes import uncompiled
from stepmask.denoiser.seam import Hook, attached_by_name
from stepmask.denoiser.values import each, to_output, to_stored_form
from stepmask.learning.floats import mixed, wide
from stepmask.learning.objective import relative_error
from stepmask.schedule.graph import Block, BlockGraph


class Bench:
    """A denoiser with a seat in front of every block, for one branch of one row.

    Args:
        denoiser: The frozen network; its weights and flags are left alone.
        graph: The blocks; the last is the denoiser itself.
    """

    def __init__(self, denoiser: nn.Module, graph: BlockGraph) -> None:
        self.denoiser = denoiser
        self.seats = [_Seat(block) for block in graph.blocks[:-1]]
        self.own = graph.blocks[-1]
        self.stored: Any = None  # the denoiser's own output, as the seats store their blocks'
        self.batch = Batch(0, ())  # of what is stored

    @contextmanager
    def attached(self) -> Iterator["Bench"]:
        """The seats in place for as long as the context lasts."""
        with uncompiled(), attached_by_name(self.denoiser, {seat.block.name: seat for seat in self.seats}):
            yield self

    def turn(self, call: Call, present: tuple[int, ...]) -> None:
        """Take of what is stored the parts of the batch that the next call has."""
        batch = Batch(rows_of(call.args, call.kwargs), present)
        if self.batch.present not in ((), present):
            self.stored = batch.part_of(self.stored, self.batch, self.own.shared)
            for seat in self.seats:
                seat.stored = batch.part_of(seat.stored, self.batch, seat.block.shared)
        self.batch = batch

    @torch.no_grad()
    def follow(self, call: Call, row: npt.NDArray[np.bool_]) -> None:
        """Evaluate one step under a row; the seats' stores are what they are after it."""
        if not row.any():
            return
        for seat, computes in zip(self.seats, row[:-1], strict=True):
            seat.mode = _compute if computes else _reuse
        output = call.evaluate(self.denoiser)
        if row[-1]:
            self.stored = each(torch.clone, output)

    @torch.no_grad()
    def observe(self, call: Call) -> Any:
        """Evaluate one step in full, keep every block's value as the target, and return the denoiser's output."""
        for seat in self.seats:
            seat.mode = _observe
        return call.evaluate(self.denoiser)

    def blend(self, call: Call, scores: Tensor) -> tuple[Any, list[Tensor]]:
        """Evaluate one step with scores, shape (blocks,): the output, and each block's relative error."""
        for seat, score in zip(self.seats, scores[:-1], strict=True):
            seat.mode, seat.score = _blend, score
        output = _mix(self.stored, call.evaluate(self.denoiser), scores[-1])
        return output, [seat.error for seat in self.seats]


class _Seat(Hook):
    """In front of one block: what it stored, what it should say, and how much of it is computed."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.owner = Owner()
        self.mode: Callable[..., Any] = _compute
        self.stored: Any = None
        self.target: Any = None
        self.score = self.error = torch.zeros((), dtype=torch.float32)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.mode(self, call, args, kwargs)


def _compute(seat: _Seat, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output = call(*args, **kwargs)
    seat.stored = seat.owner.own(to_stored_form(seat.block.reuse, output, args, kwargs))
    return output


def _reuse(seat: _Seat, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return to_output(seat.block.reuse, seat.stored, args, kwargs)


def _observe(seat: _Seat, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    seat.target = call(*args, **kwargs)
    return seat.target


def _blend(seat: _Seat, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer s · F(h) + (1 − s) · C (after Learning-to-Cache, arXiv 2406.01733, eq. 8), in terms of stored values."""
    fresh = to_stored_form(seat.block.reuse, call(*args, **kwargs), args, kwargs)
    output = to_output(seat.block.reuse, _mix(seat.stored, fresh, seat.score), args, kwargs)
    seat.error = relative_error(output, seat.target)
    return output


def _mix(stored: Any, fresh: Any, score: Tensor) -> Any:
    """In float32 at least: a score's gradient is a sum over all numbers of a value, and float16 ends at 65504."""

    def blend(new: Tensor, old: Tensor) -> Tensor:
        there = wide(new)
        return torch.lerp(wide(old), there, score.to(there.dtype)).to(new.dtype)

    return mixed(blend, fresh, stored)
