"""Networks beside the denoiser under a masked run: a ControlNet is not called where nobody reads what it answers."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepmask.denoiser.families import companions_of
from stepmask.denoiser.run import Run
from stepmask.denoiser.seam import Hook, attach, detach
from stepmask.denoiser.values import each, rebuilt
from stepmask.errors import ScheduleMismatch
from stepmask.schedule.graph import BESIDE, BlockGraph


class MaskedCompanion(Hook):
    """Stands in front of a network that is called before the denoiser, and answers for it where nobody reads it.

    What it answers then is what stands for the network's outputs, as it does for those of a feeder. It is the network
    itself that answers outside of runs, and a call of another form than those before.

    Args:
        run: The run.
        columns: Of the blocks that read it; the denoiser's own where its glue does.
    """

    def __init__(self, run: Run, columns: Sequence[int]) -> None:
        self.run = run
        self.columns = columns
        self.unread: dict[Any, Any] = {}  # by the form of the call: what stands for the output

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the network."""
        form = (self.run.stand_in, *_form(args, kwargs))
        if form in self.unread and not _CALLING.always and not self.run.will_compute(self.columns):
            return rebuilt(self.unread[form])
        output = call(*args, **kwargs)
        if form not in self.unread:
            self.unread[form] = each(self.run.stand_in, output)
        return output


class Beside:
    """A network beside a masked denoiser, and where its hook is now.

    Args:
        pipe: The pipeline.
        name: Of its attribute.
        hook: What stands in front of the network.
    """

    def __init__(self, pipe: Any, name: str, hook: MaskedCompanion) -> None:
        self.pipe = pipe
        self.name = name
        self.hook = hook
        self.module: nn.Module | None = None

    def put(self) -> None:
        """Put the hook on the network that the pipeline has now: it may have been compiled, or replaced.

        Raises:
            ScheduleMismatch: It has none.
        """
        module = companions_of(self.pipe).get(self.name)
        if module is None:
            raise ScheduleMismatch(
                given=f"a {type(self.pipe).__name__} that calls no {self.name} of its own beside its denoiser",
                expected=f"a pipeline with a {self.name}, which the schedule was learned with and whose MACs it counts",
                advice="Learn a schedule for this pipeline",
            )
        if module is not self.module:
            self.take_off()
        attach(module, self.hook)
        self.module = module

    def take_off(self) -> None:
        """Take the hook off."""
        if self.module is not None:
            detach(self.module, self.hook)
            self.module = None


def beside(pipe: Any, run: Run, graph: BlockGraph) -> list[Beside]:
    """The networks beside a denoiser that a graph tells of, under a run."""
    return [Beside(pipe, name, MaskedCompanion(run, graph.fed[f"{BESIDE}{name}"])) for name in graph.companions]


@contextmanager
def companions_called() -> Iterator[None]:
    """Networks beside denoisers are called at every step while the context lasts, for somebody keeps their answers."""
    before = _CALLING.always
    _CALLING.always = True
    try:
        yield
    finally:
        _CALLING.always = before


class _Calling(threading.local):
    """Whether networks beside denoisers are called whatever is computed, by thread."""

    always = False


_CALLING = _Calling()


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the shapes of an answer may depend on, of the arguments of a call."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    return (str(structure), *map(_form_of, leaves))


def _form_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | str | None) else type(leaf)
