"""An accelerator that is none: tensors say that they are on another device, and their numbers are computed on the CPU.

It refuses what CUDA refuses: other tensors beside its own (numbers of no dimension and indices excepted), `.numpy()`,
drivers of `lstsq` other than gels, generators of the CPU. It counts what makes the host wait, and what is copied to it
from memory that is not pinned. Copies that are asked not to block are done when somebody waits for their stream, and
until then there is garbage at their place. It keeps a time of its own: the host pays for each launch and each wait,
and kernels queue beside it.

Its name is "lazy": torch knows that device, has no kernels for it, and runs its gradients in the caller's thread.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "lazy"
PLACE = torch.device(NAME, 0)

aten: Any = torch.ops.aten

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operations whose answer, or its shape, the host must know."""

INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take indices from the host; they upload them."""

MOVES = (aten._to_copy.default, aten.copy_.default)


@dataclass
class Device:
    """What happened on the device since it was made, and what time it is.

    Args:
        launch: Seconds that the host pays for each operation.
        kernel: Seconds that each operation takes on the device.
        wait: Seconds that the host pays for each wait, on top of what it waits.
        waits: How often the host waited, by reason.
        uploads: How often something was copied from memory that is not pinned, so that the host waited.
        launches: How many operations there were.
        host: The time at the host, in seconds.
        busy: Until when the device has work.
    """

    launch: float = 10e-6
    kernel: float = 4e-6
    wait: float = 15e-6
    waits: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    launches: int = 0
    host: float = 0.0
    busy: float = 0.0

    def __post_init__(self) -> None:
        self.default = self.current = Stream(self)

    @property
    def waited(self) -> int:
        """How often the host waited, whatever for."""
        return self.waits.total()

    def hold_up(self, reason: str) -> None:
        """The host waits until the work is done."""
        self.waits[reason] += 1
        self.current.finish()
        self.host = max(self.host, self.busy) + self.wait

    def run(self, seconds: float | None = None) -> None:
        """One more operation."""
        self.launches += 1
        self.host += self.launch
        self.busy = max(self.busy, self.host) + (self.kernel if seconds is None else seconds)

    def forget(self) -> None:
        """Count from zero."""
        self.waits.clear()
        self.uploads = self.launches = 0

    def perf_counter(self) -> float:
        """The time at the host."""
        return self.host


class Stream:
    """Work that is done in order, when somebody waits for it."""

    def __init__(self, device: Any = None) -> None:
        self.device = device if isinstance(device, Device) else present()
        self.pending: list[Callable[[], None]] = []

    def finish(self) -> None:
        """Do what is left."""
        pending, self.pending = self.pending, []
        for work in pending:
            work()

    def wait_stream(self, other: "Stream") -> None:
        """What follows here comes after what was asked of the other."""
        other.finish()

    def wait_event(self, event: "Event") -> None:
        """What follows here comes after an event."""
        event.wait()

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Mark this moment."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits."""
        self.finish()
        self.device.hold_up("stream.synchronize")


class Event:
    """A moment on the device."""

    def __init__(self, device: Any = None, *, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.stream: Stream | None = None
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Now, behind the work that was asked for."""
        device = present()
        self.stream = stream or device.current
        self.at = max(device.host, device.busy)

    def wait(self, stream: Stream | None = None) -> None:
        """A stream comes after this moment."""
        if self.stream is not None:
            self.stream.finish()

    def query(self) -> bool:
        """Whether it has come."""
        return self.at <= present().host

    def synchronize(self) -> None:
        """The host waits for it."""
        self.wait()
        present().hold_up("event.synchronize")

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds between two moments, both of which have come."""
        if not (self.enable_timing and later.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.query() and later.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1000 * (later.at - self.at)


class OnDevice(Tensor):
    """A tensor on the device."""

    numbers: Tensor
    streams: set[int]
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        """Its wrapper, in the layout of its numbers."""
        make: Any = Tensor._make_wrapper_subclass
        told = {"storage_offset": numbers.storage_offset(), "dtype": numbers.dtype, "device": PLACE}
        tensor: OnDevice = make(cls, numbers.shape, strides=numbers.stride(), **told)
        tensor.numbers = numbers
        tensor.streams = {id(present().current)}
        return tensor

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]  # torch's own takes the contents
        return f"OnDevice(shape={tuple(self.shape)}, dtype={self.dtype})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        """The numbers, for which the host waits."""
        present().hold_up("tolist")
        return self.numbers.tolist()

    def record_stream(self, stream: Any) -> None:
        """Its memory is not given away before the stream is done."""
        self.streams.add(id(stream))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # of a class, and without keyword arguments too, as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation; another subclass of torch among the arguments answers for itself."""
        return NotImplemented if _others(args, kwargs) else _done(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what is asked without a tensor of the device: to make one, or to bring one there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _done(func, args, kwargs or {})


class _Maker(TorchFunctionMode):
    """Makes tensors of the device from numbers of Python, which no dispatch mode sees."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            asked = _place_asked(kwargs)
            if asked is not None and asked.type == NAME:
                return func(*args, **{**kwargs, "device": None}).to(PLACE)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs}).to(PLACE)
        return func(*args, **kwargs)


_PRESENT: list[Device] = []


def present() -> Device:
    """The device that is simulated now."""
    if not _PRESENT:
        raise RuntimeError("no accelerator is simulated here")
    return _PRESENT[-1]


@contextmanager
def simulated(**times: float) -> Iterator[Device]:
    """A new device, for as long as the context lasts: `tensor.to(PLACE)`, `module.to(PLACE)`, `zeros(device=PLACE)`."""
    device = Device.__new__(Device)
    _PRESENT.append(device)
    try:
        device.__init__(**times)  # type: ignore[misc]  # its streams ask for it
        with _Mode(), _Maker():  # type: ignore[no-untyped-call]  # torch leaves them without types
            yield device
    finally:
        _PRESENT.pop()


def _done(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [tensor for tensor in given if isinstance(tensor, OnDevice)]
    if _others(args, kwargs):
        return func(*args, **kwargs)
    if torch.is_inference_mode_enabled() and _is_composite(func):
        with _Mode():  # type: ignore[no-untyped-call]  # torch leaves it without types
            return func.decompose(*args, **kwargs)  # as it is by gradients' own key elsewhere
    asked = _place_asked(kwargs)
    if not own and not (asked is not None and asked.type == NAME):
        return _on_host(func, args, kwargs)
    device = present()
    if any(id(device.current) not in tensor.streams for tensor in own) and func is not aten.copy_.default:
        raise RuntimeError(f"a tensor of another stream that was not recorded for this one ({func})")
    if func in MOVES:
        return _moved(device, func, args, kwargs)
    _refuse(func, args, kwargs, given)
    _count(device, func, args, kwargs, own)
    return _computed(device, func, args, kwargs, asked)


def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _others(args: Any, kwargs: Any) -> bool:
    """Whether there is a tensor of another subclass, as fake tensors are."""
    known = (Tensor, OnDevice, torch.nn.Parameter, torch.nn.Buffer)
    return any(isinstance(leaf, Tensor) and type(leaf) not in known for leaf in tree_leaves((args, kwargs)))


def _place_asked(kwargs: dict[str, Any]) -> torch.device | None:
    asked = kwargs.get("device")
    return None if asked is None else torch.device(asked)


def _on_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU; there is pinned memory, as with an accelerator."""
    if func in (aten.is_pinned.default,):
        return getattr(args[0], "is_in_pinned_memory", False)
    if func in (aten._pin_memory.default,):
        return _pinned(args[0].clone())
    if kwargs.get("pin_memory"):
        return _pinned(func(*args, **{**kwargs, "pin_memory": False}))
    return func(*args, **kwargs)


def _pinned(tensor: Any) -> Any:
    tensor.is_in_pinned_memory = True
    return tensor


def _moved(device: Device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy from one side to the other, or on the device."""
    if func is aten.copy_.default:
        target, source = args[:2]
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        _copied(device, target, source, blocks=blocks)
        return target
    source = args[0]
    told = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    asked = _place_asked(kwargs) or source.device
    target = func(torch.empty_strided(source.shape, source.stride(), dtype=source.dtype), **told)
    target = OnDevice(target) if asked.type == NAME else target
    _copied(device, target, source, blocks=not kwargs.get("non_blocking", False))
    return target


def _copied(device: Device, target: Any, source: Any, *, blocks: bool) -> None:
    device.run()
    there, here = isinstance(target, OnDevice), not isinstance(source, OnDevice)
    pinned = getattr(source if here else target, "is_in_pinned_memory", False)
    stream = device.current

    def copy() -> None:
        lent = [tensor for tensor in (target, source) if isinstance(tensor, OnDevice)]
        if stream is not device.default and any(id(stream) not in tensor.streams for tensor in lent):
            _spoil(_numbers(target))  # the memory was given to somebody else meanwhile
        else:
            _numbers(target).copy_(_numbers(source))

    if there != here:  # both on the device
        copy() if stream is device.default else stream.pending.append(copy)
        return
    if blocks or not pinned:
        if there:
            device.uploads += 1
            stream.finish()
        else:
            device.hold_up("copy to the host")
        copy()
        return
    _spoil(_numbers(target))
    stream.pending.append(copy)
    if there and stream is device.default:
        stream.finish()


def _numbers(tensor: Any) -> Tensor:
    return tensor.numbers if isinstance(tensor, OnDevice) else tensor.data  # whose writes torch does not count


def _spoil(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> None:
    """Refuse what CUDA refuses."""
    name = func.overloadpacket.__name__
    foreign = [tensor for tensor in given if not isinstance(tensor, OnDevice)]
    if foreign and len(foreign) < len(given) and name not in INDEXED:
        is_pointwise = torch.Tag.pointwise in func.tags or name in ("lerp", "where", "addcmul", "fill_", "fill")
        if not is_pointwise or any(tensor.ndim for tensor in foreign) or foreign[0] is given[0] is _changed(func, args):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {PLACE} and cpu! "
                f"({func})"
            )
    if name == "linalg_lstsq" and (kwargs.get("driver") or "gels") != "gels":
        raise RuntimeError("torch.linalg.lstsq: parameter `driver` should be one of (gels)")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")


def _changed(func: Any, args: tuple[Any, ...]) -> Any:
    return args[0] if func._schema.is_mutable else None


def _count(device: Device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], own: list[Any]) -> None:
    name = func.overloadpacket.__name__
    if name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            device.hold_up("nonzero")
        device.uploads += sum(not isinstance(index, OnDevice) and index.ndim > 0 for index in indices)
    elif own and WAITS & set(func.tags) and kwargs.get("output_size") is None:
        device.hold_up(name)
    if not func.is_view:
        device.run()


def _computed(
    device: Device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], asked: torch.device | None
) -> Any:
    told = {**kwargs, **({} if asked is None else {"device": "cpu"})}
    told.pop("pin_memory", None)
    answer = func(*tree_map(_host, args), **tree_map(_host, told))
    if asked is not None and asked.type != NAME:
        return _pinned(answer) if kwargs.get("pin_memory") else answer
    wrapped = tree_map_only(Tensor, OnDevice, answer)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _host(value: Any) -> Any:
    return value.numbers if isinstance(value, OnDevice) else value


def _module() -> ModuleType:
    """What torch finds for the device's name: as `torch.cuda`."""
    module: Any = ModuleType(f"torch.{NAME}")
    module.Stream, module.Event = Stream, Event
    module.is_available = lambda: bool(_PRESENT)
    module.device_count = lambda: len(_PRESENT[-1:])
    module.current_device = lambda: 0
    module.current_stream = lambda device=None: present().current
    module.synchronize = lambda device=None: present().hold_up("synchronize")
    module.stream = _in_stream
    return module


@contextmanager
def _in_stream(stream: Stream) -> Iterator[None]:
    device = present()
    before, device.current = device.current, stream
    try:
        yield
    finally:
        device.current = before


if not hasattr(torch, NAME):
    torch._register_device_module(NAME, _module())
    sys.modules[f"torch.{NAME}"] = getattr(torch, NAME)
