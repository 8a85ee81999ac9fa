"""Layers whose weights are quantised: what they count as, and whether gradients come through them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepmask.denoiser.regions import modules_by_name
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.values import tensors
from stepmask.errors import LearningError


def is_linear(module: nn.Module) -> bool:
    """Whether a module says of itself what a linear layer says, of whatever package it is."""
    return all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))


@contextmanager
def quantised_counted(denoiser: nn.Module, counter: FlopCounterMode) -> Iterator[None]:
    """While the context lasts, a counter also counts quantised layers, whose operations torch's counter does not know.

    They count as what they stand for: as many products as with whole weights.
    """
    with attached({layer: _Counted(counter, layer.in_features) for layer in _quantised(denoiser).values()}):
        yield


@contextmanager
def gradients_pass(*denoisers: nn.Module) -> Iterator[None]:
    """While the context lasts, quantised layers that cut gradients off are refused: what is before would not count.

    Raises:
        LearningError: There is one.
    """
    layers = [pair for denoiser in denoisers for pair in _quantised(denoiser).items()]
    with attached({layer: _Passing(name, layer) for name, layer in layers}):
        yield


class _Counted(Hook):
    """In front of a layer: counts its products, if the counter has seen none."""

    def __init__(self, counter: FlopCounterMode, inputs: Any) -> None:
        self.counter = counter
        self.inputs = inputs

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self.counter.get_total_flops()
        output = call(*args, **kwargs)
        if isinstance(output, Tensor) and self.counter.get_total_flops() == before:
            for module in set(self.counter.mod_tracker.parents):
                self.counter.flop_counts[module][torch.ops.aten.linear] += 2 * output.numel() * self.inputs
        return output


class _Passing(Hook):
    """In front of a layer: refuses an answer without a gradient to what has one."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name = name
        self.layer = type(layer).__name__

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        given = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
        if torch.is_grad_enabled() and given and not _is_differentiable(given, output):
            raise LearningError(
                given=f"quantised weights through which no gradient comes: {self.name!r}, a {self.layer}",
                expected="layers whose answers have a gradient",
                advice="Learn before you quantise: a schedule holds for quantised weights as well",
            )
        return output


def _is_differentiable(given: list[Tensor], output: Any) -> bool:
    """Whether a gradient comes back from an output; torch gives operations without a gradient a node that only warns."""
    before = {tensor.grad_fn for tensor in given}
    ahead = [part.grad_fn for part in tensors(output) if part.grad_fn is not None]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        if node.name().endswith("NotImplemented"):
            return False
        more = {other for other, _ in node.next_functions if other is not None} - seen - before
        seen |= more
        ahead += more
    return bool(seen)


def _quantised(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weights are no ordinary tensors of floating-point numbers."""
    layers = modules_by_name(denoiser).items()
    return {name: layer for name, layer in layers if is_linear(layer) and not _is_whole(layer)}


def _is_whole(layer: nn.Module) -> bool:
    weight: Any = getattr(layer, "weight", None)
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
