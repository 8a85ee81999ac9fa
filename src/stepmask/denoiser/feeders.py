"""`Feeders`: which modules outside all blocks answer for blocks alone, as one traced evaluation shows it."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from stepmask.denoiser.seam import Behaviour
from stepmask.denoiser.unread import keeps_unread
from stepmask.denoiser.values import tensors


class Feeders:
    """Follows what modules outside all blocks answer, from operation to operation, to where its numbers are needed."""

    def __init__(self) -> None:
        self.reached: dict[str, set[str]] = {}  # module -> the blocks that its output reaches
        self.elsewhere: set[str] = set()  # modules whose numbers others need, or that are called twice
        self.makers: dict[int, frozenset[str]] = {}  # id of a tensor -> the modules that it was made from
        self.alive: list[Tensor] = []  # keeps ids from being used again

    def seats(self, denoiser: nn.Module, blocks: Collection[str]) -> dict[str, Behaviour]:
        """What stands in front of every module that has no part in a block, by name."""
        names = (name for name, _ in denoiser.named_modules() if name)
        return {name: _Seat(self, name) for name in names if not any(_related(name, block) for block in blocks)}

    def answer(self, module: str, output: Any) -> None:
        """A module outside all blocks answers."""
        if module in self.reached:
            self.elsewhere.add(module)
        self.reached.setdefault(module, set())
        self._mark(output, frozenset({module}))

    def follow(self, operation: Any, arguments: Any, output: Any) -> None:
        """An operation outside all blocks."""
        makers = self._made_from(arguments)
        if not keeps_unread(operation):
            self.elsewhere |= makers
        self._mark(output, makers)

    def reach(self, block: str, arguments: Any) -> None:
        """A block is called that answers from the store without a look at its arguments."""
        for module in self._made_from(arguments):
            self.reached[module].add(block)

    def need(self, value: Any) -> None:
        """The numbers of a value are needed, whatever is computed."""
        self.elsewhere |= self._made_from(value)

    def of(self, block: str) -> tuple[str, ...]:
        """The modules that feed a block: what they answer reaches nothing but blocks, and none lies in another one."""
        alone = [name for name, blocks in self.reached.items() if blocks and name not in self.elsewhere]
        return tuple(
            name
            for name in alone
            if block in self.reached[name] and not any(name.startswith(f"{other}.") for other in alone)
        )

    def _made_from(self, value: Any) -> frozenset[str]:
        return frozenset[str]().union(*(self.makers.get(id(tensor), frozenset()) for tensor in tensors(value)))

    def _mark(self, output: Any, makers: frozenset[str]) -> None:
        for tensor in tensors(output):
            self.alive.append(tensor)
            self.makers[id(tensor)] = self.makers.get(id(tensor), frozenset()) | makers


class _Seat(Behaviour):
    """Stands in front of a module outside all blocks."""

    def __init__(self, feeders: Feeders, name: str) -> None:
        self.feeders, self.name = feeders, name

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        self.feeders.answer(self.name, output)
        return output


def _related(name: str, block: str) -> bool:
    """Whether one is the other, or lies in it."""
    return name == block or name.startswith(f"{block}.") or block.startswith(f"{name}.")
