"""`Unread`: what stands for a tensor that nobody reads, so that what would be made of it is not computed either."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepmask.denoiser.values import each, tensors
from stepmask.errors import RunError


def keeps_unread(operation: Any) -> bool:
    """Whether an operation's result is read by nobody if its argument is not: it is pointwise, a cast, or a view.

    Pointwise: each number of the result comes from one number of each argument, and no argument changes.
    """
    if operation in (torch.ops.aten._to_copy.default, torch.ops.prim.device.default) or operation.is_view:
        return True
    return torch.Tag.pointwise in operation.tags and not operation._schema.is_mutable


class Unread(Tensor):
    """A tensor's shape without its numbers; pointwise operations, casts and views compute nothing and give another.

    Raises:
        RunError: By every other operation.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # straight to the dispatch: half of the time

    @classmethod
    def of(cls, tensor: Tensor, shape: Sequence[int] | None = None) -> Any:
        """What stands for a tensor, or for one like it of another shape."""
        shape = tensor.shape if shape is None else shape
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, shape, dtype=tensor.dtype, device=tensor.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # of a class, and without keyword arguments too, as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """Answer for an operation."""
        if not keeps_unread(func):
            raise _read(str(func))
        if func.is_view:
            shaped = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
            return each(lambda view: cls.of(args[0], view.shape), func(shaped, *args[1:], **(kwargs or {})))
        operands = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        like = next(value for value in operands if isinstance(value, Unread))
        return cls.of(like, _broadcast([value.shape for value in operands]))


def refuse_unread(output: Any) -> None:
    """Refuse a denoiser's output that was made from what nobody was to read.

    Raises:
        RunError: It was.
    """
    if any(isinstance(tensor, Unread) for tensor in tensors(output)):
        raise _read("the denoiser's output")


def _read(by: str) -> RunError:
    return RunError(
        given=f"a value read by {by} that nothing but masked blocks read when the denoiser was traced",
        expected="the same operations as then",
        advice="The denoiser takes another path than when it was traced: trace and learn with these inputs",
    )


def _broadcast(shapes: list[torch.Size]) -> tuple[int, ...]:
    """The shape of shapes that fit; `torch.broadcast_shapes` takes ten times as long."""
    most = max(map(len, shapes))
    padded = [(1,) * (most - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*padded, strict=True))
