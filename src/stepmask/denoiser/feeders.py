"""`Feeders`: which modules outside all blocks answer for blocks alone, as one traced evaluation shows it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from stepmask.denoiser.regions import modules_by_name
from stepmask.denoiser.seam import Hook
from stepmask.denoiser.unread import keeps_unread
from stepmask.denoiser.values import tensors


@dataclass
class _Running:
    """A module that is running, and the memory that was made since it began."""

    name: str
    own_memory: set[int] = field(default_factory=set)


class Feeders:
    """Follows what modules outside all blocks answer, from operation to operation, to where its numbers are needed."""

    def __init__(self) -> None:
        self.reached: dict[str, set[str]] = {}  # module -> the blocks that its output reaches
        self.beside: set[str] = set()  # those of them whose outputs the denoiser is given
        self.elsewhere: set[str] = set()  # modules that do more than that, or are called twice
        self.makers: dict[int, frozenset[str]] = {}  # id of a tensor -> the modules that it was made from
        self.alive: list[Tensor] = []  # keeps ids from being used again
        self.running: list[_Running] = []
        self.born: Any = WeakTensorKeyDictionary()  # tensor -> the modules inside which it was made

    def hooks(self, denoiser: nn.Module, blocks: Collection[str]) -> dict[str, Hook]:
        """What stands in front of every module that has no part in a block, by name."""
        names = (name for name in modules_by_name(denoiser) if name)
        return {name: TracedFeeder(self, name) for name in names if not any(_related(name, block) for block in blocks)}

    def give(self, network: str, value: Any) -> None:
        """The denoiser is given what a network beside it has answered."""
        if next(tensors(value), None) is not None:
            self.beside.add(network)
            self.reached[network] = set()
            self._mark(value, frozenset({network}))

    def enter(self, module: str) -> None:
        """A module outside all blocks is called."""
        self.running.append(_Running(module))

    def answer(self, module: str, output: Any) -> None:
        """It answers."""
        self.running.pop()
        says_more = any(isinstance(leaf, int | float | complex) for leaf in pytree.tree_leaves(output))
        if module in self.reached or says_more:
            self.elsewhere.add(module)
        self.reached.setdefault(module, set())
        self._mark(output, frozenset({module}))

    def follow(self, operation: Any, arguments: Any, output: Any, changed: list[Tensor]) -> None:
        """An operation outside all blocks."""
        makers = self._made_from(arguments)
        if operation is torch.ops.aten.cat.default:  # of a skip connection: worth it only for a whole network
            self.elsewhere |= makers - self.beside
        elif not keeps_unread(operation):
            self.elsewhere |= makers
        self._need_hidden(arguments)
        self._note_writes(changed)

        if self.running:
            self._note_birth(arguments, output)
        self._mark(output, makers)

    def _note_birth(self, arguments: Any, output: Any) -> None:
        """What an operation makes, it makes inside the modules that are running."""
        given = {id(tensor) for tensor in tensors(arguments)}
        given_memory = {tensor.untyped_storage()._cdata for tensor in tensors(arguments)}
        running = frozenset(module.name for module in self.running)
        for tensor in tensors(output):
            if id(tensor) not in given:
                self.born[tensor] = running
            memory = tensor.untyped_storage()._cdata
            if memory not in given_memory:
                for module in self.running:
                    module.own_memory.add(memory)

    def _note_writes(self, changed: list[Tensor]) -> None:
        """A module that writes into older memory does more than to answer."""
        for module in self.running:
            if any(tensor.untyped_storage()._cdata not in module.own_memory for tensor in changed):
                self.elsewhere.add(module.name)

    def _need_hidden(self, value: Any) -> None:
        """Modules that made a tensor without returning it do more than to answer."""
        running = {module.name for module in self.running}
        for tensor in tensors(value):
            born_in: frozenset[str] = self.born.get(tensor, frozenset())
            self.elsewhere |= born_in - running - self.makers.get(id(tensor), frozenset())

    def reach(self, block: str, arguments: Any) -> None:
        """A block is called that answers from the store without a look at its arguments."""
        self._need_hidden(arguments)
        for module in self._made_from(arguments):
            self.reached[module].add(block)

    def need(self, value: Any) -> None:
        """The numbers of a value are needed, whatever is computed."""
        self._need_hidden(value)
        self.elsewhere |= self._made_from(value)

    def of(self, block: str) -> tuple[str, ...]:
        """The modules that feed a block: what they answer reaches nothing but blocks, and none lies in another one."""
        alone = [name for name, blocks in self.reached.items() if blocks and name not in self.elsewhere]
        return tuple(
            name
            for name in alone
            if block in self.reached[name] and not any(name.startswith(f"{other}.") for other in alone)
        )

    def of_denoiser(self) -> tuple[str, ...]:
        """The networks beside the denoiser that do not feed blocks alone."""
        return tuple(sorted(name for name in self.beside if name in self.elsewhere or not self.reached[name]))

    def _made_from(self, value: Any) -> frozenset[str]:
        return frozenset[str]().union(*(self.makers.get(id(tensor), frozenset()) for tensor in tensors(value)))

    def _mark(self, output: Any, makers: frozenset[str]) -> None:
        for tensor in tensors(output):
            self.alive.append(tensor)
            self.makers[id(tensor)] = self.makers.get(id(tensor), frozenset()) | makers


class TracedFeeder(Hook):
    """Stands in front of a module outside all blocks."""

    def __init__(self, feeders: Feeders, name: str) -> None:
        self.feeders = feeders
        self.name = name

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module, and note what it does."""
        self.feeders.enter(self.name)
        output = call(*args, **kwargs)
        self.feeders.answer(self.name, output)
        return output


def _related(name: str, block: str) -> bool:
    """Whether one is the other, or lies in it."""
    return name == block or name.startswith(f"{block}.") or block.startswith(f"{name}.")
