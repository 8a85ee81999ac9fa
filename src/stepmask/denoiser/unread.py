"""`Unread`: a poison value, which stands for a tensor that nobody is to read. What is made of it is not computed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.values import tensors
from stepmask.errors import RunError


def keeps_unread(operation: Any) -> bool:
    """Whether an operation is cheap to leave out with its argument: it is pointwise, a cast, or a view.

    Pointwise: each number of the result comes from one number of each argument, and no argument changes.
    """
    if operation in (torch.ops.aten._to_copy.default, torch.ops.prim.device.default) or operation.is_view:
        return True
    return torch.Tag.pointwise in operation.tags and not operation._schema.is_mutable


class Unread(Tensor):
    """A tensor's shape without its numbers: operations on it compute nothing and answer with another one.

    Raises:
        RunError: By an operation that tells its numbers, draws random ones, or writes them into a real tensor.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # straight to the dispatch: half of the time

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to tell the numbers."""
        raise _read("numpy")

    def tolist(self) -> Any:
        """Refuse to tell the numbers."""
        raise _read("tolist")

    def data_ptr(self) -> int:
        """Refuse to tell where the numbers are."""
        raise _read("data_ptr")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise _read("numpy")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise _read("dlpack")

    @classmethod
    def of(cls, tensor: Tensor) -> Any:
        """What stands for a tensor."""
        return _unread(_Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own takes the contents
        return f"Unread(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # of a class, and without keyword arguments too, as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for an operation."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return _written(func, args, kwargs)

        key: Any = (func, *map(_key, args), *((name, _key(value)) for name, value in kwargs.items()))
        try:
            layouts = _LAYOUTS.get(key)
        except TypeError:  # something among the arguments has no hash
            key = layouts = None
        if layouts is None:
            layouts = _layouts(func, args, kwargs)
        if key is not None and len(_LAYOUTS) < MOST_LAYOUTS:
            _LAYOUTS[key] = layouts
        return _unread(layouts) if isinstance(layouts, _Layout) else pytree.tree_map(_unread, layouts)


MOST_LAYOUTS = 10_000
"""The number of operations, with shapes and plain arguments, whose result's layout is kept for the next time."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """All that is known of a tensor but its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_LAYOUTS: dict[Any, Any] = {}


def _unread(layout: _Layout | None) -> Any:
    if layout is None:
        return None
    make: Any = Tensor._make_wrapper_subclass
    return make(Unread, layout.shape, strides=layout.stride, dtype=layout.dtype, device=layout.device)


def _key(value: Any) -> Any:
    """What the layout of a result depends on, of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _layouts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layout of each tensor that an operation answers with, by running it on tensors without numbers.

    Raises:
        RunError: The answer, or its shape, depends on the numbers.
    """
    draws = torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func)
    if draws:
        raise _read(str(func))
    device = torch.device(kwargs.get("device") or _device_of(args, kwargs))
    try:
        args, kwargs = pytree.tree_map_only(Tensor, _without_numbers, (args, kwargs))
        answer = func(*args, **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))
    except (NotImplementedError, RuntimeError) as error:
        raise _read(str(func)) from error
    if not all(isinstance(leaf, Tensor | None) for leaf in pytree.tree_leaves(answer)):
        raise _read(str(func))
    return pytree.tree_map_only(
        Tensor, lambda tensor: _Layout(tensor.shape, tensor.stride(), tensor.dtype, device), answer
    )


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    return next(tensor.device for tensor in tensors((args, kwargs)) if isinstance(tensor, Unread))


def _without_numbers(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer for an operation that changes its arguments: what nobody reads stays what it is.

    Raises:
        RunError: A real tensor is among what would change, or the change is one of shape.
    """
    changed = changed_by(func, args, kwargs)
    if torch.Tag.inplace_view in func.tags or not all(isinstance(tensor, Unread) for tensor in changed):
        raise _read(str(func))
    if not func._schema.returns:
        return None
    return changed[0] if len(func._schema.returns) == 1 else tuple(changed)


def changed_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes in place, `out=` and lists of tensors among them."""
    changed: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            changed += tensors(value)
    return changed


def refuse_unread(value: Any, by: str) -> None:
    """Refuse a value that was made from what nobody was to read.

    Raises:
        RunError: It was.
    """
    if isinstance(value, Unread) or any(isinstance(tensor, Unread) for tensor in tensors(value)):
        raise _read(by)


class _Refused(threading.local):
    """The last read of a value that nobody was to read, by thread."""

    error: RunError | None = None


_REFUSED = _Refused()


def forget_reads() -> None:
    """Begin anew to note reads of what nobody was to read."""
    _REFUSED.error = None


def last_read() -> RunError | None:
    """The last read of such a value since then, in this thread, whatever became of its error."""
    return _REFUSED.error


@contextmanager
def unnoted() -> Iterator[None]:
    """No reads are noted while the context lasts: what is evaluated is not the run."""
    before = _REFUSED.error
    try:
        yield
    finally:
        _REFUSED.error = before


def _read(by: str) -> RunError:
    _REFUSED.error = _read_error(by)
    return _REFUSED.error


def _read_error(by: str) -> RunError:
    return RunError(
        given=f"a value, read by {by}, that nothing but masked blocks read when the denoiser was traced",
        expected="the same operations as then",
        advice="The denoiser takes another path than when it was traced: trace and learn with these inputs. (Or a step "
        "is reused whole while a block is computed for later ones: compute that step)",
    )
