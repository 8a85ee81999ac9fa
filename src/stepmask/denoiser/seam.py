"""The seam: hooks in front of a module's `__call__`, put on the instance and taken off again in any order.

`nn.Module.__call__` first looks for `_compiled_call_impl` on the instance, which `module.compile()` fills, and only
then runs the module's forward hooks and `forward`. A hook stands in that place. So it is in front of everything that
others put on a module (compiled calls, forward hooks, the replaced `forward` of accelerate, diffusers and peft), adds
no graph to a compiled block, and changes neither the class nor `forward`, parameters or names. torch leaves the place
out of copies and pickles: those are bare. Nothing else in this package changes a module.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any, Protocol

from torch import nn

_PLACE = "_compiled_call_impl"
SLOT = "_stepmask_slot"
"""Where a module inside a compiled region has what `attach_traced` gives it."""


class Hook(Protocol):
    """What stands in front of a module: gets the module's own call and its arguments, and answers for it."""

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the module."""


class _Hooked:
    """All hooks of one module, in the place that its `__call__` looks at first.

    Args:
        module: The module.
        bare: What the place held before: the module's compiled call, or `None`.
    """

    __slots__ = ("bare", "call", "hooks", "module", "outermost")

    def __init__(self, module: nn.Module, bare: Callable[..., Any] | None) -> None:
        self.module = module
        self.bare = bare
        self.hooks: list[Hook] = []  # outermost last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.outermost(self.call, args, kwargs)

    def line_up(self) -> None:
        """Have each hook call the one behind it, and the last the module's own call."""
        *behind, self.outermost = self.hooks
        self.call = self.bare or self.module._call_impl
        for hook in behind:
            self.call = partial(_pass_on, hook, self.call)


def _pass_on(hook: Hook, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return hook(call, args, kwargs)


def hooks_of(module: nn.Module) -> tuple[Hook, ...]:
    """The hooks in front of a module, outermost last."""
    hooked = _hooked(module)
    return () if hooked is None else tuple(hooked.hooks)


def attach(module: nn.Module, hook: Hook) -> None:
    """Put a hook in front of a module, outside of those that are there already; once, however often it is asked for.

    A module that was compiled since its hooks were attached has lost them, and keeps its compiled call behind the hook.
    """
    hooked = _hooked(module)
    if hooked is None:
        bare = vars(module).get(_PLACE)
        hooked = _Hooked(module, None if isinstance(bare, _Hooked) else bare)
    if any(own is hook for own in hooked.hooks):
        return
    hooked.hooks.append(hook)
    hooked.line_up()
    vars(module)[_PLACE] = hooked


def detach(module: nn.Module, hook: Hook) -> None:
    """Take a hook off a module, wherever it stands among others; one that is not there is no error."""
    hooked = _hooked(module)
    if hooked is None:
        return
    hooked.hooks = [own for own in hooked.hooks if own is not hook]
    if hooked.hooks:
        hooked.line_up()
    elif hooked.bare is None:
        del vars(module)[_PLACE]
    else:
        vars(module)[_PLACE] = hooked.bare


class Slot:
    """What a function reads that stands in the place of a module's `forward`; copies and pickles of it are `None`."""

    forward: Callable[..., Any] | None = None  # the function, as it was put there

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of a masked denoiser are bare."""

    def __reduce__(self) -> Any:
        """So are pickles."""
        return _nothing, ()


def _nothing() -> None:
    """What a pickle has in the place of a slot."""


def attach_traced(module: nn.Module, forward: Callable[..., Any], slot: Slot) -> None:
    """Put a function in the place of a module's `forward`, which reads a slot: `module._stepmask_slot`.

    Only where a module has a `forward` of its own does the compiler look for what stands in front of its call, in a
    function that is compiled around it; and graphs that it made before are not valid now.

    Args:
        module: The module.
        forward: Unbound, and the same object for all modules that are to share a graph.
        slot: What it reads.
    """
    vars(module)[SLOT] = slot
    vars(module)["forward"] = slot.forward = MethodType(forward, module)


def detach_traced(module: nn.Module, slot: Slot) -> None:
    """Take the function and its slot off a module; a `forward` that somebody else has put there since stays."""
    if vars(module).get(SLOT) is slot:
        del vars(module)[SLOT]
        if vars(module).get("forward") is slot.forward:
            del vars(module)["forward"]
        slot.forward = None


def has_other_forward(module: nn.Module, slot: Any) -> bool:
    """Whether somebody else than `attach_traced` with this slot has put a `forward` on a module.

    A copy of a module with a slot has none in its place, and the function beside it, which is its class's there.
    """
    held = vars(module).get(SLOT, module)
    return "forward" in vars(module) and held is not slot and held is not None


def own_compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """A module's compiled call, behind its hooks; `None` if it was not compiled on its own."""
    hooked = _hooked(module)
    if hooked is not None:
        return hooked.bare
    call: Callable[..., Any] | None = vars(module).get(_PLACE)
    return None if isinstance(call, _Hooked) else call


@contextmanager
def attached(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Put a hook in front of each module for as long as the context lasts."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            attach(module, hook)
            stack.callback(detach, module, hook)
        yield


@contextmanager
def attached_by_name(denoiser: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Put a hook in front of each module of a denoiser, by its fully qualified name, for as long as the context lasts.

    The denoiser's own name is "".
    """
    with attached({denoiser.get_submodule(name): hook for name, hook in hooks.items()}):
        yield


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """No gradients for any weight of a pipeline while the context lasts."""
    parts = (
        [pipe] if isinstance(pipe, nn.Module) else [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    )
    weights = [weight for part in parts for weight in part.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _hooked(module: nn.Module) -> _Hooked | None:
    """A module's own hooks; those in a copy of its dictionary (as accelerate makes one) are another module's."""
    place = vars(module).get(_PLACE)
    return place if isinstance(place, _Hooked) and place.module is module else None
