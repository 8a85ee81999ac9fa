"""Modes of torch around a call, gradients, inference mode and autocast: what is recorded must not depend on them."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from stepmask.denoiser.families import denoiser_of, scheduler_of
from stepmask.denoiser.values import each, tensors
from stepmask.errors import LearningError, RunError

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

Autocast = tuple[tuple[str, torch.dtype], ...]
"""The devices on which autocast is on, with its dtype there."""

DEVICES = ("cpu", "cuda", "mps", "xpu")


def autocast_now() -> Autocast:
    """Where autocast is on around the caller."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in DEVICES if torch.is_autocast_enabled(device))


@contextmanager
def autocast_as(state: Autocast | None) -> Iterator[None]:
    """Autocast as it was when `autocast_now` said so; `None` = as it is around the caller."""
    wanted = dict(autocast_now() if state is None else state)
    present = dict(autocast_now())
    with ExitStack() as stack:
        for device in DEVICES:
            if wanted.get(device) != present.get(device):
                stack.enter_context(torch.autocast(device, dtype=wanted.get(device), enabled=device in wanted))
        yield


def in_this_autocast(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """The function under the autocast of now, whenever it is called: gradients come back when that has long ended."""
    state = autocast_now()

    @wraps(function)
    def under(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        with autocast_as(state):
            return function(*args, **kwargs)

    return under


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever they are around the caller."""
    with torch.inference_mode(False), torch.enable_grad(), autocast_as(()):
        yield


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """No inference mode, and gradients as they are around the caller."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):  # the first would switch them on
        yield


@contextmanager
def gradients_throughout() -> Iterator[None]:
    """Gradients stay on in this thread, whatever the code inside says: `no_grad`, `inference_mode`, `set_grad_enabled`.

    Pipelines and loops that sample say so of themselves, often of each part, and it is theirs that is differentiated.
    What runs inside `as_told` is not meant; and where gradients are off around the context, nothing changes.
    """
    if not torch.is_grad_enabled():
        yield
        return
    with _SWITCHES.held(), _thread_keeps(True):
        yield


@contextmanager
def as_told() -> Iterator[None]:
    """Gradients as the code inside says, also within `gradients_throughout`."""
    with _thread_keeps(False):
        yield


class _Thread(threading.local):
    """Whether this thread keeps gradients on."""

    keeps = False


_THREAD = _Thread()


@contextmanager
def _thread_keeps(gradients: bool) -> Iterator[None]:
    before, _THREAD.keeps = _THREAD.keeps, gradients
    try:
        yield
    finally:
        _THREAD.keeps = before


class _Switches:
    """torch's switches of gradients; while a thread holds them, those that keep gradients on find them without effect.

    What a switch puts back when its context ends is what it found, as ever.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders = 0
        self.own: dict[tuple[type, str], Callable[..., None]] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """As long as the context lasts, in any number of threads."""
        with self.lock:
            self.holders += 1
            if self.holders == 1:
                self._replace()
        try:
            yield
        finally:
            with self.lock:
                self.holders -= 1
                if self.holders == 0:
                    self._put_back()

    def _replace(self) -> None:
        for switch, method, instead in (
            (torch.no_grad, "__enter__", _then_on),
            (torch.set_grad_enabled, "__init__", _then_on),
            (torch.set_grad_enabled, "__enter__", _then_on),
            (torch.inference_mode, "__enter__", _without_inference),
        ):
            own = vars(switch)[method]
            self.own[switch, method] = own
            setattr(switch, method, _as_method(partial(instead, own)))

    def _put_back(self) -> None:
        for (switch, method), own in self.own.items():
            setattr(switch, method, own)
        self.own.clear()


_SWITCHES = _Switches()


def _as_method(function: Callable[..., None]) -> Callable[..., None]:
    def method(switch: Any, *args: Any, **kwargs: Any) -> None:
        function(switch, *args, **kwargs)

    return method


def _then_on(own: Callable[..., None], switch: Any, *args: Any, **kwargs: Any) -> None:
    """What the switch does, and gradients on again where this thread keeps them."""
    own(switch, *args, **kwargs)
    if _THREAD.keeps:
        torch._C._set_grad_enabled(True)


def _without_inference(own: Callable[..., None], switch: Any) -> None:
    """What `inference_mode` does, and where this thread keeps gradients what `inference_mode(False)` does."""
    told = switch.mode
    switch.mode = told and not _THREAD.keeps
    try:
        own(switch)
    finally:
        switch.mode = told


@contextmanager
def uncompiled() -> Iterator[None]:
    """What is compiled runs as it is written while the context lasts: to learn needs other hooks, and no speed."""
    with torch.compiler.set_stance("force_eager"):
        yield


def beside_graphs(reason: str) -> Callable[[Callable[Parameters, Answer]], Callable[Parameters, Answer]]:
    """A function that is in no graph: where one is made around its call, that breaks.

    Args:
        reason: What torch tells where a graph must not break.
    """

    def decorated(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
        disabled: list[Callable[Parameters, Answer]] = []

        @wraps(function)
        def beside(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
            if "torch._dynamo" not in sys.modules:  # it takes seconds to import
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function))
            return disabled[0](*args, **kwargs)

        vars(beside).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return beside

    return decorated


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention and encoder layers of torch as single operations, which can be counted, while the context lasts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def copied(tensor: Tensor) -> Tensor:
    """A detached copy that may take part in gradients, whatever mode the original was made in."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch.vmap`'s, which hides a dimension and cannot be looked at."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def usable(value: Any) -> Any:
    """The value, with copies of those of its tensors that were made in inference mode and can have no gradients."""
    if not any(tensor.is_inference() for tensor in tensors(value)):
        return value
    return each(lambda tensor: copied(tensor) if tensor.is_inference() else tensor, value)


def refuse_made_in_inference_mode(pipe: Any) -> None:
    """Refuse a pipeline that can have no gradients, for its weights or its sampler's tables were made without.

    Raises:
        LearningError: It was loaded in inference mode.
    """
    denoiser = denoiser_of(pipe)
    scheduler = scheduler_of(pipe)
    held = [*denoiser.parameters(), *denoiser.buffers(), *tensors({} if scheduler is None else dict(vars(scheduler)))]
    if any(tensor.is_inference() for tensor in held):
        raise LearningError(
            given=f"a {type(pipe).__name__} that was loaded under torch.inference_mode",
            expected="weights and a sampler that may take part in gradients",
            advice="Load the pipeline outside of it; sampling may be inside",
        )


def refuse_tracing() -> None:
    """Refuse that a masked denoiser is traced or exported: a graph has the operations of one step, and no masks.

    Raises:
        RunError: `torch.export`, `torch.jit.trace` or a conversion to ONNX is under way.
    """
    jit: Any = torch.jit
    if jit.is_tracing() or torch.compiler.is_compiling():
        raise RunError(
            given="a masked denoiser that is traced or exported (torch.export, torch.jit.trace, ONNX)",
            expected="calls that compute: a graph would be that of one step, whatever the others reuse",
            advice="Remove the schedule, and export the bare denoiser",
        )
