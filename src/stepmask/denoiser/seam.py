"""The seam: a behaviour in front of a module's `__call__`, put on the instance by a class swap and taken off again.

`nn.Module.__call__` is what chooses the compiled path, so a decision that stands in front of it adds no graph to
torch.compile, and `forward`, parameters, names and `isinstance` stay as they were. Nothing else in this package
changes a module.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Protocol

from torch import nn

from stepmask.errors import RunError


class Behaviour(Protocol):
    """What stands in front of a module: gets the module's own call and its arguments, and answers for it."""

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer for the module."""


@cache
def _seamed(cls: type[Any]) -> type[Any]:
    """`cls` with a behaviour before its call: one subclass per class, so that equal blocks share compiled graphs."""
    depth = getattr(cls, "_seam_depth", 0) + 1
    slot = f"_seam_{depth}"

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return self.__dict__[slot](partial(cls.__call__, self), args, kwargs)

    names = {"__call__": __call__, "__reduce_ex__": _refuse_to_copy, "_seam_depth": depth}
    return type(cls.__name__, (cls,), {**names, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _refuse_to_copy(module: nn.Module, protocol: int) -> Any:
    raise RunError(
        given=f"a copy or a pickle of a masked {type(module).__name__}",
        expected="a denoiser without a schedule",
        advice="Call .remove() first, and apply the schedule to the copy",
    )


def attach(module: nn.Module, behaviour: Behaviour) -> None:
    """Put a behaviour in front of a module, outside of those that are there already."""
    cls: Any = type(module)
    seamed = _seamed(cls)
    module.__dict__[f"_seam_{seamed._seam_depth}"] = behaviour
    module.__class__ = seamed


def detach(module: nn.Module, behaviour: Behaviour) -> None:
    """Take the outermost behaviour off a module.

    Raises:
        RunError: Another behaviour was attached later and is still there.
    """
    depth = getattr(type(module), "_seam_depth", 0)
    if module.__dict__.get(f"_seam_{depth}") is not behaviour:
        raise RunError(
            given=f"a {type(module).__name__} from which something else must be removed first",
            expected="removal in reverse order of attachment",
            advice="Remove what was applied last, then this",
        )
    del module.__dict__[f"_seam_{depth}"]
    module.__class__ = type(module).__mro__[1]


@contextmanager
def attached(behaviours: dict[nn.Module, Behaviour]) -> Iterator[None]:
    """Put a behaviour in front of each module for as long as the context lasts."""
    with ExitStack() as stack:
        for module, behaviour in behaviours.items():
            attach(module, behaviour)
            stack.callback(detach, module, behaviour)
        yield


@contextmanager
def seated(denoiser: nn.Module, behaviours: Mapping[str, Behaviour]) -> Iterator[None]:
    """Put a behaviour in front of each block, by its fully qualified name, for as long as the context lasts."""
    with attached({denoiser.get_submodule(name): behaviour for name, behaviour in behaviours.items()}):
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
