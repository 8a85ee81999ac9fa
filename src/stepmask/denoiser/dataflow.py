"""What one evaluation shows of a denoiser: where the values that its blocks answer with go, operation by operation.

Every tensor is followed, inside blocks and outside of them, by what it was made from and by the memory it lies in. So
it shows, too, when a value goes past a block's arguments and answer: through the state of a module, a list that is
passed along, a Python number, or a write into memory that others read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from stepmask.denoiser.feeders import Feeders
from stepmask.denoiser.seam import Hook
from stepmask.denoiser.split import MAKE_PLAIN, PLAIN_OUTPUT, is_split
from stepmask.denoiser.unread import changed_by
from stepmask.denoiser.values import each, size, stream, tensors
from stepmask.errors import TraceError
from stepmask.schedule.graph import DENOISER, Block, BlockGraph, Reuse

Names = frozenset[str]

NOBODY: Names = frozenset()

NUMBERS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "_assert_async")
"""Operations whose answer is a Python number, or a shape, that depends on what a tensor holds."""


@dataclass
class Memory:
    """What is known of a piece of memory that tensors lie in.

    Args:
        block: Whose answer lies in it; "" for none.
        writers: The blocks whose values were written into it.
        is_new: Whether it was made in this evaluation.
        writer: The block that changed it although it is older than the evaluation; "" for none.
        written_inside: The blocks that wrote into it: what they wrote is not written when they are reused.
        users: Who touched it: blocks, and "" for the code around them.
        is_overwritten: Whether its writer had written all of it before anything of it was read.
    """

    block: str = ""
    writers: Names = NOBODY
    is_new: bool = False
    writer: str = ""
    written_inside: Names = NOBODY
    users: set[str] = field(default_factory=set)
    is_overwritten: bool = False


class Recorder:
    """What an evaluation has shown so far.

    Args:
        found: How each block is to be reused, by name; `None` = as the shapes of its stream and output allow.
        inputs: The tensors that the denoiser is given.
    """

    def __init__(self, found: dict[str, Reuse | None], inputs: list[Tensor]) -> None:
        self.found = found
        self.inputs = {_memory_of(tensor) for tensor in inputs}
        self.blocks: dict[str, Block] = {}
        self.read_by_denoiser: set[str] = set()  # whose numbers the code around the blocks looks at
        self.extra_reads: dict[str, set[str]] = {}  # past the arguments, by block
        self.inside = ""  # the block that is running
        self.argument_ids: set[int] = set()  # of the tensors that it was given
        self.flops = FlopCounterMode(display=False)
        self.feeders = Feeders()

        self.sources: dict[int, Names] = {}  # id of a tensor -> the blocks it was made from
        self.alive: list[Tensor] = []  # keeps ids, and addresses of memory, from being used again
        self.born: Any = WeakTensorKeyDictionary()  # tensor -> the block inside which it was made
        self.memory: dict[int, Memory] = {}  # of tensors outside of blocks, and what blocks share with others
        self.own_memory: set[int] = set()  # made inside the block that is running

    @property
    def macs(self) -> int:
        """Counted so far."""
        return self.flops.get_total_flops() // 2

    def read(self, value: Any) -> tuple[str, ...]:
        """The blocks that a value was made from, in call order."""
        sources = NOBODY.union(*map(self.sources_of, tensors(value)))
        return tuple(name for name in self.blocks if name in sources)

    def sources_of(self, tensor: Tensor) -> Names:
        """The blocks that a tensor was made from, or that were written into its memory."""
        memory = self.memory.get(_memory_of(tensor))
        written = NOBODY if memory is None else memory.writers
        return self.sources.get(id(tensor), NOBODY) | written

    def tag(self, tensor: Tensor, sources: Names) -> None:
        """Note what a tensor outside of blocks was made from."""
        self.alive.append(tensor)
        self.sources[id(tensor)] = sources

    def at(self, tensor: Tensor) -> Memory:
        """The memory that a tensor lies in."""
        return self.memory.setdefault(_memory_of(tensor), Memory())

    def follow(self, operation: Any, arguments: Any, output: Any, changed: list[Tensor]) -> None:
        """An operation of the code around the blocks."""
        self._refuse_noise(operation, "the code around the blocks")
        given = list(tensors(arguments))
        for tensor in given:
            self._refuse_hidden(tensor, "the code around the blocks")
            self.at(tensor).users.add("")
        sources = NOBODY.union(*map(self.sources_of, given))

        for tensor in changed:
            self._write_outside(operation, tensor, sources)
        for tensor in tensors(output):
            memory = self.at(tensor)
            memory.is_new = memory.is_new or not any(_memory_of(tensor) == _memory_of(other) for other in given)
            self.tag(tensor, sources | self.sources_of(tensor))
        if _tells_numbers(operation):
            self.read_by_denoiser |= sources
        self.feeders.follow(operation, arguments, output, changed)

    def _write_outside(self, operation: Any, tensor: Tensor, sources: Names) -> None:
        memory = self.at(tensor)
        if memory.block:
            raise TraceError(
                given=f"block {memory.block!r}, whose output the denoiser changes in place ({operation})",
                expected="outputs that stay as they are, for they may be stored",
                advice="Mask the module around it instead, or let the code around the blocks make a new tensor "
                "(h = h + …)",
            )
        if _memory_of(tensor) in self.inputs:
            raise _changes_input(f"the code around the blocks ({operation})")
        memory.writers |= sources
        self.read_by_denoiser |= sources  # the write is done whatever is computed

    def _refuse_hidden(self, tensor: Tensor, reader: str) -> None:
        """Refuse a tensor that was made or written to inside another block, and is not what that answered."""
        memory = self.memory.get(_memory_of(tensor))
        written_inside = NOBODY if memory is None else memory.written_inside
        sources = self.sources.get(id(tensor))
        makers = set(written_inside - (sources or NOBODY))
        if sources is None:
            makers.add(self.born.get(tensor, self.inside))
        for maker in makers - {self.inside}:
            raise TraceError(
                given=f"a tensor that block {maker!r} made or wrote to and did not return, read by {reader}",
                expected="values that leave a block in what it returns: others do not leave it when it is reused",
                advice="Return it from the block, or mask the module around both",
            )

    def follow_inside(self, operation: Any, arguments: Any, output: Any, changed: list[Tensor]) -> None:
        """An operation of a block."""
        self._refuse_noise(operation, f"block {self.inside!r}")
        if _tells_numbers(operation):
            self.read_by_denoiser.add(self.inside)  # a number may leave it unseen

        changed_ids = {id(tensor) for tensor in changed}
        given = list(tensors(arguments))
        overwrites = _overwrites(operation)
        for tensor in given:
            self._refuse_hidden(tensor, f"block {self.inside!r}")
            if not (overwrites and id(tensor) in changed_ids):
                self._read_inside(tensor)
        for tensor in changed:
            self._write_inside(operation, tensor, whole=overwrites and _is_whole(tensor))

        given_memory = {_memory_of(tensor) for tensor in given}
        given_ids = {id(tensor) for tensor in given}
        for tensor in tensors(output):
            if id(tensor) in given_ids:
                continue
            self.born[tensor] = self.inside
            if _memory_of(tensor) not in given_memory:
                self.own_memory.add(_memory_of(tensor))
                self.memory.pop(_memory_of(tensor), None)  # an address that is used again

    def _read_inside(self, tensor: Tensor) -> None:
        if _memory_of(tensor) in self.own_memory:
            return
        if id(tensor) not in self.argument_ids:
            self.extra_reads[self.inside] |= self.sources_of(tensor) - {self.inside}
            self.feeders.need(tensor)
        memory = self.at(tensor)
        memory.users.add(self.inside)
        self._check_state(memory)

    def _write_inside(self, operation: Any, tensor: Tensor, *, whole: bool) -> None:
        if _memory_of(tensor) in self.own_memory:
            return
        memory = self.at(tensor)
        memory.users.add(self.inside)
        if memory.block:
            raise TraceError(
                given=f"block {self.inside!r}, which changes in place what {memory.block!r} answered ({operation})",
                expected="outputs that stay as they are, for they may be stored",
                advice="Mask the module around both instead",
            )
        if _memory_of(tensor) in self.inputs:
            raise _changes_input(f"block {self.inside!r} ({operation})")
        memory.written_inside |= {self.inside}
        if memory.is_new:
            memory.writers |= {self.inside}  # whoever reads it from now on reads this block
            return
        if not memory.writer:
            memory.writer = self.inside
            memory.is_overwritten = whole and memory.users == {self.inside}
        self._check_state(memory)

    def _check_state(self, memory: Memory) -> None:
        """Refuse memory that outlives the evaluation, and says at the next one what a block wrote into it."""
        if memory.writer and not (memory.users <= {memory.writer} and memory.is_overwritten):
            raise _state_error(memory.writer)

    def _refuse_noise(self, operation: Any, who: str) -> None:
        is_attention = "scaled_dot_product" in str(operation) or "flash_attention" in str(operation)
        if torch.Tag.nondeterministic_seeded in operation.tags and not is_attention:
            raise TraceError(
                given=f"a denoiser whose {who.removeprefix('the ')} draws random numbers ({operation})",
                expected="the same answer to the same input: to leave one draw out would shift all later ones",
                advice="Call .eval() if it is dropout; draw noise in the sampler",
            )

    def enter(self, name: str, args: Any) -> None:
        """A block is called.

        Raises:
            TraceError: It was called before, or another block calls it, or it is given what another one hid.
        """
        if self.inside:
            raise TraceError(
                given=f"block {name!r}, which is called inside block {self.inside!r}",
                expected="blocks that do not contain each other",
                advice="Mask either the one or the other",
            )
        if name in self.blocks:
            raise TraceError(
                given=f"block {name!r}, which is called twice in one evaluation",
                expected="every block called once per evaluation",
                advice="Mask the module that calls it instead. Where a whole network is called twice, by a sampler or "
                "by guidance in a module around it, hand over that network as the denoiser: record(network, run=...)",
            )
        for tensor in tensors(args):
            self._refuse_hidden(tensor, f"block {name!r}")
        self.inside = name
        self.extra_reads[name] = set(self.read_by_denoiser)  # a number that was told may be in what it is given
        self.argument_ids = {id(tensor) for tensor in tensors(args)}
        self.own_memory = set()

    def leave(self, name: str, reads: tuple[str, ...], macs: int, output: Any, reuse: Reuse) -> Any:
        """A block has answered.

        Returns:
            Its answer in tensors of their own: who reads the block's very tensor found it in what the block left
            somewhere, and not in what it returned.
        """
        answer = each(torch.Tensor.detach, output)
        self.inside = ""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors(output))
        self.blocks[name] = Block(name, reads, reuse, macs, shapes, size(output))
        for original, tensor in zip(tensors(output), tensors(answer), strict=True):
            passed_on = self.sources_of(original) if id(original) in self.argument_ids else NOBODY
            self.tag(tensor, passed_on | {name})
            memory = self.at(tensor)
            memory.block = name
            if memory.writer == name:
                memory.users.clear()  # others may read what the block answered from its own memory
                memory.writer = ""
        if any(isinstance(leaf, int | float | complex) for leaf in pytree.tree_leaves(output)):
            self.read_by_denoiser.add(name)  # a number does not tell who reads it
        return answer

    def graph(self, output: Any) -> BlockGraph:
        """The blocks as this evaluation showed them, the denoiser last.

        Args:
            output: What the denoiser answered.

        Raises:
            TraceError: A block keeps state.
        """
        for memory in self.memory.values():
            self._check_state(memory)
        for tensor in tensors(output):
            self._refuse_hidden(tensor, "the denoiser's output")
        self.feeders.need(output)

        order = list(self.blocks)
        blocks = []
        for block in self.blocks.values():
            reads = {*block.reads, *self.extra_reads.get(block.name, set())}
            in_order = tuple(name for name in order if name in reads)
            blocks.append(replace(block, reads=in_order, feeders=self.feeders.of(block.name)))

        glue = self.macs - sum(block.macs for block in blocks)
        reads = {*self.read(output), *self.read_by_denoiser}
        in_order = tuple(name for name in order if name in reads)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors(output))
        own = Block(DENOISER, in_order, "output", glue, shapes, size(output), feeders=self.feeders.of_denoiser())
        return BlockGraph((*blocks, own))

    def writes_to(self, tensor: Tensor) -> bool:
        """Whether the block that has just run changed a tensor in place."""
        memory = self.memory.get(_memory_of(tensor))
        return memory is not None and self.inside in memory.writers


class TracedBlock(Hook):
    """Stands in front of one block and writes down its call."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block, and follow what it reads."""
        recorder = self.recorder
        reads = recorder.read((args, kwargs))
        before = recorder.macs
        recorder.enter(self.name, (args, kwargs))
        output = call(*args, **kwargs)
        _refuse_what_cannot_be_stored(self.name, output)

        reuse = self._reuse(output, args, kwargs)
        recorder.feeders.reach(self.name, (args, kwargs))
        if reuse == "delta":  # what is reused so reads its stream
            recorder.feeders.need((args, kwargs))
        return recorder.leave(self.name, reads, recorder.macs - before, output, reuse)

    def _reuse(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reuse:
        asked = self.recorder.found[self.name]
        if asked == "output" or not isinstance(output, Tensor) or output.shape != stream(args, kwargs).shape:
            if asked == "delta":
                raise _no_delta(self.name, "whose output has not the shape of its input")
            return "output"
        given = stream(args, kwargs)
        if self.recorder.writes_to(given) or output.dtype != given.dtype or not output.is_floating_point():
            if asked == "delta":
                raise _no_delta(self.name, "which changes its input in place, or answers in another dtype or in whole "
                                "numbers")  # fmt: skip
            return "output"
        return "delta"


class Flow(TorchDispatchMode):
    """Hands every operation to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and follow it."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        changed = changed_by(func, args, kwargs) if func._schema.is_mutable else []
        follow = self.recorder.follow_inside if self.recorder.inside else self.recorder.follow
        follow(func, (args, kwargs), output, changed)
        return output


def _refuse_what_cannot_be_stored(name: str, output: Any) -> None:
    """Refuse a block that answers with anything but plain tensors.

    Raises:
        TraceError: It does.
    """
    answers = list(tensors(output))
    if any(map(is_split, answers)):
        raise TraceError(given=f"block {name!r}, which returns a DTensor", expected=PLAIN_OUTPUT, advice=MAKE_PLAIN)
    unusual = [tensor for tensor in answers if tensor.is_nested or tensor.layout is not torch.strided]
    if answers and not unusual:
        return
    raise TraceError(
        given=f"block {name!r}, which returns {'nested or sparse tensors' if unusual else 'no tensor'}",
        expected="a dense tensor, or dense tensors in a tuple or output class",
        advice="Mask another module, or the one around it",
    )


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tells_numbers(operation: Any) -> bool:
    return str(operation).removeprefix("aten.").partition(".")[0] in NUMBERS


def _overwrites(operation: Any) -> bool:
    """Whether an operation that changes a tensor reads nothing of it first."""
    name, _, overload = str(operation).removeprefix("aten.").partition(".")
    return name in ("copy_", "fill_", "zero_") or overload == "out" or overload.endswith("_out")


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor takes up all of its memory."""
    return tensor.nbytes == tensor.untyped_storage().nbytes()


def _no_delta(name: str, why: str) -> TraceError:
    return TraceError(
        given=f"block {name!r}, {why}",
        expected="one tensor in, one new tensor of the same shape out, for reuse by delta",
        advice="Reuse it by its output",
    )


def _changes_input(who: str) -> TraceError:
    return TraceError(
        given=f"a denoiser whose input is changed in place by {who}",
        expected="inputs that stay as they are, for the sampler goes on with them",
        advice="Have it make a new tensor (x = x * 2, not x *= 2)",
    )


def _state_error(block: str) -> TraceError:
    return TraceError(
        given=f"block {block!r}, which keeps state in a tensor from one evaluation to the next",
        expected="blocks that answer the same to the same input, whichever were called before",
        advice="Mask other modules, or pass the state along as arguments and outputs",
    )
