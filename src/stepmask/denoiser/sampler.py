"""The sampler's side: where a run starts, what it ends with, and the sequence of its steps.

A diffusers pipeline calls `scheduler.set_timesteps` once when a run starts and `scheduler.step` after every
evaluation. Both are watched on the scheduler instance and put back afterwards.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stepmask.denoiser.call import TIMESTEPS, as_number
from stepmask.errors import RunError
from stepmask.schedule.fingerprint import SamplerFingerprint

_OWN_STATE = "__getstate__"
"""What `copy` and `pickle` ask an object for; on the instance it is found before the class's."""


@contextmanager
def watched(scheduler: Any, method: str, after: Callable[..., None]) -> Iterator[None]:
    """Call `after(result, *args, **kwargs)` after every `scheduler.method(*args, **kwargs)` while the context lasts.

    Any number of contexts may watch one scheduler, and end in any order. A copy or a pickle of a watched scheduler is
    watched by nobody.

    Raises:
        RunError: It has no such method, or takes no other in its place.
    """
    if not callable(getattr(scheduler, method, None)) or not hasattr(scheduler, "__dict__"):
        raise RunError(
            given=f"a pipeline with {_told(scheduler)}, on which there is no {method} to watch",
            expected="a scheduler with set_timesteps, timesteps and step, called once a run and once a step",
            advice="Give it these, as diffusers' schedulers have them, or pass the denoiser itself with run=function",
        )
    watch = _Watch.of(scheduler, method)
    listener = object()  # so that one function may listen twice
    watch.listeners[listener] = after
    try:
        yield
    finally:
        del watch.listeners[listener]
        if not watch.listeners:
            watch.leave()


def _told(scheduler: Any) -> str:
    return "no scheduler" if scheduler is None else f"a {type(scheduler).__name__} as its scheduler"


class _Watch:
    """Stands on a scheduler in place of one of its methods, and tells whoever listens of every call.

    Args:
        scheduler: The scheduler.
        method: The method's name.
    """

    def __init__(self, scheduler: Any, method: str) -> None:
        self.scheduler = scheduler
        self.method = method
        self.own = {name: value for name, value in vars(scheduler).items() if name == method}
        self.original = getattr(scheduler, method)
        self.listeners: dict[object, Callable[..., None]] = {}
        update_wrapper(self, self.original)  # pipelines look at the signature

    @classmethod
    def of(cls, scheduler: Any, method: str) -> "_Watch":
        """The watch that stands there already, or a new one."""
        there = vars(scheduler).get(method)
        if isinstance(there, cls) and there.scheduler is scheduler:
            return there
        watch = cls(scheduler, method)
        setattr(scheduler, method, watch)
        vars(scheduler).setdefault(_OWN_STATE, _Unwatched(scheduler))
        return watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        for after in tuple(self.listeners.values()):
            after(result, *args, **kwargs)
        return result

    def leave(self) -> None:
        """Put back what stood there. What somebody put in front meanwhile stays."""
        held = vars(self.scheduler)
        if held.get(self.method) is self:
            del held[self.method]
            held.update(self.own)
        last = not any(isinstance(value, _Watch) for value in held.values())
        if last and isinstance(held.get(_OWN_STATE), _Unwatched):
            del held[_OWN_STATE]


class _Unwatched:
    """Stands on a watched scheduler: a copy or a pickle is made of what it has besides its watches."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self) -> Any:
        kind: Any = type(self.scheduler)
        state = kind.__getstate__(self.scheduler)
        if not isinstance(state, dict):
            return state
        bare = {name: value for name, value in state.items() if not isinstance(value, _Watch | _Unwatched)}
        for value in state.values():
            if isinstance(value, _Watch):
                bare.update(value.own)
        return bare


def timestep_of(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The timestep among the arguments of a call of `scheduler.step`: mostly the second, but not of all.

    Raises:
        RunError: There is none, or it is no number.
    """
    given = _given_to(scheduler, "step", args, kwargs)
    named = next((given[name] for name in TIMESTEPS if name in given), None)
    second = next(iter([*given.values()][1:]), None)
    told = second if named is None else named
    known = _known(scheduler, told) if isinstance(told, Tensor) else None
    timestep = as_number(told) if known is None else known  # some hand over one per sample
    if timestep is None:
        raise RunError(
            given=f"a call of {type(scheduler).__name__}.step without a timestep",
            expected="step(model_output, timestep, sample), as diffusers' schedulers have it",
            advice="Hand it the timestep as its second argument, or by name",
        )
    return timestep


def handed_to_step(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a call of `scheduler.step` is handed of the denoiser: `model_output`, else the first argument.

    Raises:
        RunError: It is no tensor.
    """
    given = _given_to(scheduler, "step", args, kwargs)
    handed = given["model_output"] if "model_output" in given else next(iter(given.values()), None)
    if isinstance(handed, Tensor):
        return handed
    raise RunError(
        given=f"a call of {type(scheduler).__name__}.step with a {type(handed).__name__} as its first argument",
        expected="the denoiser's prediction, after guidance, as one tensor",
        advice="Hand it step(model_output, timestep, sample), as diffusers' schedulers have it",
    )


def latent_of(scheduler: Any, result: Any) -> Tensor:
    """The next latent in what `scheduler.step` returned: the tensor itself, its `prev_sample`, or the first in a tuple.

    Raises:
        RunError: There is no tensor at that place.
    """
    latent = getattr(result, "prev_sample", result)
    if isinstance(latent, Mapping):
        latent = latent.get("prev_sample")
    if isinstance(latent, tuple | list) and latent:
        latent = latent[0]
    if isinstance(latent, Tensor):
        return latent
    raise RunError(
        given=f"a {type(scheduler).__name__} whose step returns a {type(result).__name__} without a latent",
        expected="the next latent: a tensor, the first in a tuple, or an output's prev_sample",
        advice="Let its step return one of these",
    )


def _given_to(scheduler: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of a scheduler's methods by name, in the order of its parameters."""
    names = _parameters(scheduler, method)
    by_place = dict(zip(names, args, strict=False))
    by_name = {name: kwargs[name] for name in names if name in kwargs}
    return {**by_place, **by_name, **kwargs}


def _parameters(scheduler: Any, method: str) -> list[str]:
    """The names of the parameters of one of a scheduler's methods, in order."""
    function: Any = getattr(type(scheduler), method, None)
    if function is None:  # it is on the instance only
        return list(inspect.signature(getattr(scheduler, method)).parameters)
    return list(inspect.signature(function).parameters)[1:]


def _known(scheduler: Any, given: Tensor) -> float | None:
    """A timestep on an accelerator that is one of the scheduler's own, which were read before; `None` for others."""
    timesteps = getattr(scheduler, "timesteps", None)
    read = _READ.get(timesteps) if isinstance(timesteps, Tensor) else None
    if read is None or timesteps is None or given.ndim or given.dtype != timesteps.dtype or timesteps.ndim != 1:
        return None
    if read.version != timesteps._version or given.untyped_storage()._cdata != timesteps.untyped_storage()._cdata:
        return None
    place, rest = divmod(given.storage_offset() - timesteps.storage_offset(), timesteps.stride(0) or 1)
    return float(read.numbers[place]) if not rest and 0 <= place < len(timesteps) else None


class _Read(NamedTuple):
    """What a tensor held when it had been written to so many times."""

    version: int
    numbers: Tensor


_READ: Any = WeakTensorKeyDictionary()


def _numbers(tensor: Tensor) -> Tensor:
    """A sampler's table in the CPU's memory; an accelerator is waited for once for each."""
    if tensor.device.type == "cpu" or tensor.is_inference():
        return tensor.detach().cpu()
    read: _Read | None = _READ.get(tensor)
    if read is None or read.version != tensor._version:
        read = _READ[tensor] = _Read(tensor._version, tensor.detach().cpu())
    return read.numbers


def describe(scheduler: Any, branches: int = 1, mu: float | None = None) -> SamplerFingerprint:
    """The fingerprint of a scheduler whose timesteps are set.

    Args:
        scheduler: The scheduler.
        branches: Denoiser calls per step.
        mu: The shift for a resolution that they were set with, if there is one.

    Raises:
        RunError: It has none.
    """
    return SamplerFingerprint(type(scheduler).__name__, _timesteps(scheduler), log_snr(scheduler), branches, mu)


class SetSteps:
    """The steps to which a call of `set_timesteps` has set a scheduler, at its shift for a resolution and at others.

    A scheduler with `use_dynamic_shifting` moves all steps by a number that a pipeline makes of the picture's size,
    its `mu`. What the same call would have set at another `mu` a copy of the scheduler tells; so all that it does
    besides (a terminal, Karras' or the pipeline's own σ) is as it is.

    Args:
        scheduler: The scheduler.
        args: What its `set_timesteps` was called with.
        kwargs: The same, by name.
    """

    def __init__(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scheduler = scheduler
        self._given = _given_to(scheduler, "set_timesteps", args, kwargs) if _shifts(scheduler) else {}
        self.now = describe(scheduler, mu=as_number(self._given.get("mu")))
        self._others: dict[float, SamplerFingerprint] = {}  # by mu, made before the scheduler goes on

    def at(self, mu: float | None) -> SamplerFingerprint:
        """The fingerprint at another shift; the one that there is where there is nothing to shift."""
        if mu is None or self.now.mu in (None, mu):
            return self.now
        if mu not in self._others:
            self._others[mu] = self._shifted(mu)
        return self._others[mu]

    def places(self, timestep: float, mu: float | None) -> list[float] | None:
        """What one of these timesteps is at another shift; several where steps share a timestep; `None` = itself."""
        there = self.at(mu)
        if there is self.now:
            return None
        return [there.timesteps[step] for step in self.now.places_of(timestep)]

    def _shifted(self, mu: float) -> SamplerFingerprint:
        trial = _copy(self._scheduler)
        given = {**self._given, "mu": mu}
        if "device" in given:
            given["device"] = "cpu"  # there is nothing to wait for
        trial.set_timesteps(**given)
        return describe(trial, mu=mu)


def _shifts(scheduler: Any) -> bool:
    """Whether a scheduler shifts its steps by the picture's size."""
    return bool(getattr(getattr(scheduler, "config", None), "use_dynamic_shifting", False))


def _copy(scheduler: Any) -> Any:
    """A scheduler of which nobody hears."""
    copied = copy.deepcopy(scheduler)
    vars(copied).pop("set_timesteps", None)
    return copied


def _timesteps(scheduler: Any) -> tuple[float, ...]:
    """A scheduler's timesteps, which may be a tensor, an array or a list.

    Raises:
        RunError: It has none, or they are no numbers.
    """
    held = getattr(scheduler, "timesteps", None)
    held = _numbers(held) if isinstance(held, Tensor) else held
    try:
        return tuple(float(t) for t in (held.tolist() if hasattr(held, "tolist") else held))  # type: ignore[union-attr]  # anything else is refused below
    except (TypeError, ValueError) as error:
        raise RunError(
            given=f"a {type(scheduler).__name__} whose timesteps are {held!r:.60}",
            expected="numbers in scheduler.timesteps, one for each step, once set_timesteps was called",
            advice="Let its set_timesteps fill them in, as diffusers' schedulers do",
        ) from error


def describe_steps(
    scheduler: Any,
    num_inference_steps: int,
    branches: int = 1,
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> SamplerFingerprint:
    """The fingerprint that a scheduler will have at another number of steps; the scheduler is left as it is.

    It must be what the pipeline will set. Some hand their scheduler more than a number of steps: what they end up with,
    `record(pipe, ..., num_inference_steps=8).sampler` tells, for the price of one sampling.

    Args:
        scheduler: The scheduler.
        num_inference_steps: The number of steps.
        branches: Denoiser calls per step: a schedule's `schedule.sampler.branches`.
        mu: The shift for a resolution, of a scheduler with `use_dynamic_shifting`: a schedule's `schedule.sampler.mu`.
        sigmas: What the pipeline hands over, where it has σ of its own (FLUX, Qwen-Image: from 1 to 1/steps).

    Raises:
        RunError: The scheduler needs `mu`, or cannot be set so.
    """
    trial = _copy(scheduler)
    takes_mu = _shifts(trial) and "mu" in _parameters(trial, "set_timesteps")
    if takes_mu and mu is None:
        raise RunError(
            given=f"a {type(trial).__name__} that shifts its steps by the picture's size, and no mu",
            expected="the shift of one size, as the pipeline hands it to set_timesteps",
            advice="Give it that of the schedule, describe_steps(..., mu=schedule.sampler.mu), whose tables hold at "
            "every size; or take record(pipe, ..., num_inference_steps=...).sampler",
        )
    options = {"mu": mu, "sigmas": None if sigmas is None else [*map(float, sigmas)]}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        trial.set_timesteps(num_inference_steps, **given)
    except (TypeError, ValueError, AssertionError) as error:
        raise RunError(
            given=f"{num_inference_steps} steps of a {type(trial).__name__}"
            + "".join(f", {name}={value}" for name, value in given.items())
            + f" ({error})",
            expected="what its set_timesteps takes",
            advice="Take record(pipe, ..., num_inference_steps=...).sampler, which is what the pipeline sets",
        ) from error
    return describe(trial, branches, mu if takes_mu else None)


LEAST = 1e-6
"""Of α and of σ: no step is taken to be all noise or all signal, so that log-SNR lies within ±27.7."""


def log_snr(scheduler: Any) -> tuple[float, ...]:
    """log(α²/σ²) at each of the scheduler's timesteps; empty for a scheduler that tells neither ᾱ nor σ.

    Variance preserving: log ᾱ − log(1 − ᾱ). Flow matching, x = (1 − σ)·x₀ + σ·ε: 2·log((1 − σ)/σ). Variance
    exploding, x = x₀ + σ·ε, told by a σ above 1: −2·log σ. Neither α nor σ is taken to be less than `LEAST`: what is
    infinite can neither be saved nor interpolated.
    """
    timesteps = torch.tensor(_timesteps(scheduler), dtype=torch.float64)
    sigmas = getattr(scheduler, "sigmas", None)
    bars = getattr(scheduler, "alphas_cumprod", None)
    sigma = _numbers(sigmas)[: len(timesteps)].double() if isinstance(sigmas, Tensor) else torch.zeros(0)
    if isinstance(bars, Tensor) and not _follows_a_flow(scheduler, sigma):
        bar = _numbers(bars).double().clamp(LEAST**2, 1 - LEAST**2)
        table = torch.log(bar) - torch.log1p(-bar)
        values = np.interp(timesteps.numpy(), np.arange(len(table)), table.numpy())
    elif len(sigma) and len(sigma) == len(timesteps):
        sigma = sigma.clamp_min(LEAST)
        alpha = torch.ones_like(sigma) if sigma.max() > 1 else (1 - sigma).clamp_min(LEAST)
        values = (2 * torch.log(alpha / sigma)).numpy()
    else:
        return ()
    return tuple(float(value) for value in values)


def _follows_a_flow(scheduler: Any, sigma: Tensor) -> bool:
    """Whether a scheduler that has a table of ᾱ leaves it aside: its noise levels are a flow's, from 1 down."""
    config = getattr(scheduler, "config", None)
    told = getattr(config, "use_flow_sigmas", False) or getattr(config, "prediction_type", "") == "flow_prediction"
    return bool(told and len(sigma) and sigma.max() <= 1)
