"""`trace`: one evaluation, on fake tensors, tells a denoiser's blocks, their order, who reads whom, and their cost."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stepmask.denoiser.fakes import on_fakes
from stepmask.denoiser.families import Granularity, Patterns, denoiser_of, find_blocks
from stepmask.denoiser.feeders import Feeders
from stepmask.denoiser.refusals import refuse_if_taken
from stepmask.denoiser.seam import Behaviour, frozen, seated
from stepmask.denoiser.trajectory import Call, Trajectory
from stepmask.denoiser.values import size, stream, tensors
from stepmask.errors import TraceError
from stepmask.schedule.graph import DENOISER, Block, BlockGraph, Reuse


def trace(
    pipe: Any,
    example: Trajectory | Call | tuple[Any, ...] | Mapping[str, Any],
    *,
    granularity: Granularity = "sublayer",
    blocks: str | Patterns | None = None,
) -> BlockGraph:
    """Find a denoiser's blocks and how they hang together, without computing anything.

    Where fake tensors do not do, it is evaluated once for real: if weights are offloaded or cast layer by layer, or
    shapes depend on the values of a mask (Mochi, Lumina 2), or the denoiser cannot be copied.

        graph = stepmask.trace(pipe, trajectory)
        graph = stepmask.trace(network, (x, t), blocks="layers.*")

    Args:
        pipe: A pipeline, or the denoiser itself.
        example: What the denoiser is called with: a trajectory (its first call), positional or keyword arguments.
        granularity: "sublayer" masks attention and feed-forward modules, "block" whole transformer blocks; of a
            U-Net, "block" masks whole attentions where "sublayer" masks what is inside them. For known families.
        blocks: A name pattern, or patterns with the way of reuse. `None` = the family's own; of a class that has none,
            the elements of its module lists (at "sublayer" their attention and feed-forward modules), as far as this
            evaluation calls them.

    Returns:
        The graph, the denoiser itself as its last block. MACs are half of `torch.utils.flop_counter`'s FLOPs, with
        attention's two matrix products and both halves of a guided batch; element-wise work is not counted.

    Raises:
        NoSuchBlock: A pattern matches no module.
        AlreadyApplied: The denoiser is under a schedule.
        TraceError: A named block is not called; a block is called twice, without tensors, or changed in place by the
            code after it; or the denoiser uses flex attention.
    """
    denoiser = denoiser_of(pipe)
    refuse_if_taken(denoiser)
    found = find_blocks(denoiser, granularity, blocks)
    call = _first_call(example)
    try:
        watch = partial(_watch, found)
        seen, output = on_fakes(denoiser, call, watch) or watch(denoiser, call)
    except NotImplementedError as error:
        raise _not_followed(denoiser, error) from error
    if blocks is not None:
        seen.check_all_called()
    return seen.graph(output)


def _not_followed(denoiser: nn.Module, error: NotImplementedError) -> TraceError:
    what = str(error).split(" and mode")[0]
    return TraceError(
        given=f"a {type(denoiser).__name__} with an operation that cannot be followed ({what})",
        expected="operations that torch's dispatch modes see; flex attention is none outside torch.compile",
        advice="Choose another attention for the denoiser",
    )


def _watch(
    found: dict[str, tuple[nn.Module, Reuse | None]], denoiser: nn.Module, call: Call
) -> "tuple[_Recorder, Any]":
    """One evaluation: what it showed, and its output."""
    recorder = _Recorder(found)
    seats: dict[str, Behaviour] = {name: _Seat(recorder, name) for name in found}
    seats |= recorder.feeders.seats(denoiser, found)
    with ExitStack() as stack:
        for context in (torch.no_grad(), frozen(denoiser), seated(denoiser, seats), sdpa_kernel(SDPBackend.MATH)):
            stack.enter_context(context)
        stack.enter_context(recorder.flops)
        stack.enter_context(_Flow(recorder))
        output = denoiser(*call.args, **call.kwargs)
    return recorder, output


def _first_call(example: Trajectory | Call | tuple[Any, ...] | Mapping[str, Any]) -> Call:
    if isinstance(example, Trajectory):
        return example.calls[0]
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        return Call((), dict(example))
    return Call(tuple(example), {})


def _shapes(output: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors(output))


class _Recorder:
    """What the evaluation has shown so far."""

    def __init__(self, found: dict[str, tuple[nn.Module, Reuse | None]]) -> None:
        self.found = found
        self.blocks: dict[str, Block] = {}
        self.inside: str | None = None
        self.flops = FlopCounterMode(display=False)
        self.sources: dict[int, frozenset[str]] = {}  # id of a tensor -> the blocks it was made from
        self.storages: dict[int, str] = {}  # storage of a block's output -> the block
        self.written: dict[int, frozenset[str]] = {}  # storage -> the blocks of what was written into it
        self.alive: list[Tensor] = []  # keeps ids from being used again
        self.feeders = Feeders()

    def macs(self) -> int:
        return self.flops.get_total_flops() // 2

    def read(self, value: Any) -> tuple[str, ...]:
        sources = frozenset[str]().union(*map(self.sources_of, tensors(value)))
        return tuple(name for name in self.blocks if name in sources)

    def sources_of(self, tensor: Tensor) -> frozenset[str]:
        written = self.written.get(tensor.untyped_storage()._cdata, frozenset())
        return self.sources.get(id(tensor), frozenset()) | written

    def tag(self, tensor: Tensor, sources: frozenset[str]) -> None:
        self.alive.append(tensor)
        self.sources[id(tensor)] = sources

    def add(self, name: str, reads: tuple[str, ...], macs: int, output: Any, reuse: Reuse) -> None:
        self.blocks[name] = Block(name, reads, reuse, macs, _shapes(output), size(output))
        for tensor in tensors(output):
            self.tag(tensor, frozenset({name}))
            self.storages[tensor.untyped_storage()._cdata] = name

    def check_all_called(self) -> None:
        if missing := [name for name in self.found if name not in self.blocks]:
            raise TraceError(
                given=f"block {missing[0]!r}, which this evaluation did not call",
                expected="every block called once per evaluation",
                advice="Leave it out of the pattern, or trace with inputs that use it",
            )

    def graph(self, output: Any) -> BlockGraph:
        glue = self.macs() - sum(block.macs for block in self.blocks.values())
        self.feeders.need(output)
        reads = self.read(output)
        blocks = [replace(block, feeders=self.feeders.of(block.name)) for block in self.blocks.values()]
        return BlockGraph((*blocks, Block(DENOISER, reads, "output", glue, _shapes(output), size(output))))


class _Seat:
    """Stands in front of one block and writes down its call."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self.recorder
        if self.name in recorder.blocks:
            raise TraceError(
                given=f"block {self.name!r}, which is called twice in one evaluation",
                expected="every block called once per evaluation",
                advice="Mask the module that calls it instead",
            )
        reads, before = recorder.read((args, kwargs)), recorder.macs()
        recorder.inside = self.name
        output = call(*args, **kwargs)
        recorder.inside = None
        if not any(True for _ in tensors(output)):
            raise TraceError(
                given=f"block {self.name!r}, which returns no tensor",
                expected="a tensor, or tensors in a tuple or output class",
                advice="Mask another module",
            )
        reuse = self._reuse(output, args, kwargs)
        recorder.feeders.reach(self.name, (args, kwargs))
        if reuse == "delta":  # what is reused so reads its stream
            recorder.feeders.need((args, kwargs))
        recorder.add(self.name, reads, recorder.macs() - before, output, reuse)
        return output

    def _reuse(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reuse:
        asked = self.recorder.found[self.name][1]
        fits = isinstance(output, Tensor) and output.shape == stream(args, kwargs).shape
        if asked == "delta" and not fits:
            raise TraceError(
                given=f"block {self.name!r}, whose output has not the shape of its input",
                expected="one tensor in, one tensor of the same shape out, for reuse by delta",
                advice="Reuse it by its output",
            )
        return asked or ("delta" if fits else "output")


class _Flow(TorchDispatchMode):
    """Carries along, from operation to operation, which blocks a tensor was made from, and which feeders."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.recorder.inside is None:
            sources = frozenset(self.recorder.read((args, kwargs)))
            for tensor in self._written(func, args):
                self._check_in_place(func, tensor)
                storage = tensor.untyped_storage()._cdata
                self.recorder.written[storage] = self.recorder.written.get(storage, frozenset()) | sources
            for tensor in tensors(output):
                self.recorder.tag(tensor, sources | self.recorder.sources_of(tensor))
            self.recorder.feeders.follow(func, (args, kwargs), output)
        return output

    def _written(self, func: Any, args: tuple[Any, ...]) -> list[Tensor]:
        """What an operation changes in place; the tensors that it is a view of change with it."""
        return [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]

    def _check_in_place(self, func: Any, tensor: Tensor) -> None:
        if name := self.recorder.storages.get(tensor.untyped_storage()._cdata):
            raise TraceError(
                given=f"block {name!r}, whose output the denoiser changes in place ({func})",
                expected="outputs that stay as they are, for they may be stored",
                advice="Mask the module around it instead",
            )
