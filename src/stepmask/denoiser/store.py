"""`Store`: where stored values lie between two steps, and in which dtype."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.aside import brought_back, put_aside
from stepmask.denoiser.values import each
from stepmask.errors import InvalidStore
from stepmask.schedule.graph import Block
from stepmask.schedule.rectify import Plan


class Kept(NamedTuple):
    """A tensor as a store holds it: it stands for data · scale, on a device and in a dtype."""

    data: Tensor
    scale: Tensor | None
    device: torch.device
    dtype: torch.dtype

    def taken(self) -> Tensor:
        """The tensor that it stands for."""
        data = brought_back(self.data, self.device)
        if self.scale is None:
            return data.to(self.dtype)
        return data.to(torch.float32).mul_(brought_back(self.scale, self.device)).to(self.dtype)


@dataclass(frozen=True)
class Store:
    """Where stored values lie, and in which dtype; they come back on the device and in the dtype of their block.

        with stepmask.apply(pipe, schedule, store=Store(dtype=torch.bfloat16)):
        with stepmask.apply(pipe, schedule, store=Store(device="cpu", dtype=torch.float8_e4m3fn)):

    Floating-point tensors are rounded to the dtype on the block's device, and then moved. From an accelerator to the
    CPU's memory they go by a stream of their own, to pinned memory: the host waits for no copy, the device for those
    that it reads. In a dtype of a smaller range than float32's, each row of a tensor's first dimension has a scale of 4
    bytes that makes its largest number the dtype's largest: nothing overflows, and no sample's rounding depends on
    another's.

    Args:
        device: `None` = where the block's output is.
        dtype: `None` = that of the block's output.

    Raises:
        InvalidStore: The dtype is none of floating point with signs, or the device is not there, or cannot hold it.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise self._invalid("it is no floating-point dtype of torch")
        self.check(torch.device("cpu"))

    def __str__(self) -> str:
        return " on ".join(str(part).removeprefix("torch.") for part in (self.dtype, self.device) if part is not None)

    def check(self, device: torch.device) -> None:
        """Refuse a device whose tensors cannot be held.

        Raises:
            InvalidStore: They cannot be cast there, or not be moved.
        """
        if self.is_plain:
            return
        try:
            there = torch.tensor([-1.0, 0.0, 1.0], device=device)
            back = self.take(self.put(there)).cpu().tolist()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise self._invalid(str(error).strip().partition("\n")[0].rstrip(".")) from error
        if back != [-1, 0, 1]:
            raise self._invalid(f"of -1, 0 and 1 it makes {', '.join(map(str, back))}")

    def put(self, value: Any) -> Any:
        """A value as it is held; itself, where neither device nor dtype is told."""
        if self.is_plain:
            return value
        return each(self._kept, value)

    def take(self, held: Any) -> Any:
        """The value that `put` was given, to rounding."""
        if self.is_plain:
            return held
        return pytree.tree_map(_taken, held, is_leaf=_is_kept)

    def bytes_of(self, block: Block) -> int:
        """Size of one value of a block as it is held, at the traced shape; all its tensors taken for floating-point."""
        if self.dtype is None:
            return block.bytes
        scale_bytes = 4 if self.is_scaled else 0
        return sum(prod(shape) * self.dtype.itemsize + scale_bytes * prod(shape[:1]) for shape in block.shapes)

    def peak_bytes(self, plan: Plan) -> int:
        """Largest size of the store under a plan, scales included, per branch, at the traced shape."""
        return plan.peak_of([self.bytes_of(block) for block in plan.graph.blocks])

    @property
    def is_plain(self) -> bool:
        """Whether values are held as they come."""
        return self.device is None and self.dtype is None

    @property
    def is_scaled(self) -> bool:
        """Whether the dtype's range is so much smaller than float32's that rows are scaled."""
        return self.dtype is not None and torch.finfo(self.dtype).max < 2.0**100

    def _kept(self, tensor: Tensor) -> Any:
        data, scale = tensor, None
        if self.dtype is not None and tensor.is_floating_point():
            scale = _scale(tensor, torch.finfo(self.dtype).max) if self.is_scaled else None
            data = (tensor if scale is None else tensor / scale).to(self.dtype)
        device = tensor.device if self.device is None else self.device
        moved = None if scale is None else put_aside(scale, device)
        return Kept(put_aside(data, device), moved, tensor.device, tensor.dtype)

    def _invalid(self, why: str) -> InvalidStore:
        return InvalidStore(
            given=f"a store of dtype {self.dtype} on device {self.device}: {why}",
            expected="a floating-point dtype that can be cast to and from, and a device that torch has here",
            advice="Try torch.bfloat16 or torch.float8_e4m3fn, on 'cpu', or leave them out",
        )


def _is_kept(leaf: Any) -> bool:
    return isinstance(leaf, Kept)


def _taken(leaf: Any) -> Any:
    return leaf.taken() if isinstance(leaf, Kept) else leaf


def _scale(tensor: Tensor, limit: float) -> Tensor:
    """What each row of the first dimension is divided by, so that its largest number becomes the limit."""
    inner = tuple(range(1, tensor.ndim))
    said = tensor.detach()
    largest = torch.linalg.vector_norm(said, torch.inf, inner, keepdim=True) if inner else said.abs()
    return (largest.float() / limit).clamp_min(torch.finfo(torch.float32).tiny)
