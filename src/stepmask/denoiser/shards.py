"""Denoisers that several processes share, each with a part of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from stepmask.denoiser.families import is_fsdp
from stepmask.denoiser.regions import modules_by_name
from stepmask.denoiser.seam import Hook, attached


@contextmanager
def gathered_unseen(denoiser: nn.Module) -> Iterator[None]:
    """While the context lasts, weights that FSDP has split are gathered where nobody follows operations.

    It gathers them in memory that outlives an evaluation, in hooks of the modules: taken for theirs, it would be state.
    """
    sharded = [module for module in modules_by_name(denoiser).values() if any(map(is_fsdp, type(module).__mro__))]
    with attached({module: _Gathering(module) for module in sharded}):
        yield


class _Gathering(Hook):
    """In front of a module: gathers its weights before the module's own hook does, which finds that done."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _disable_current_modes():
            self.module.unshard()
        return call(*args, **kwargs)
