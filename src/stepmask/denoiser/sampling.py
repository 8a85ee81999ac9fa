"""`Sampling`: one run of a sampler that can be repeated exactly."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepmask.denoiser.clock import Clock
from stepmask.denoiser.families import denoiser_of, denoisers_of, scheduler_of
from stepmask.denoiser.modes import (
    Autocast,
    autocast_as,
    copied,
    gradients_throughout,
    usable,
    without_inference_mode,
)
from stepmask.denoiser.noise import Noise
from stepmask.denoiser.sampler import handed_to_step, latent_of, watched
from stepmask.errors import RunError

NOT_REPEATED = (
    "Look for dropout (call .eval()), random numbers without a generator, a function that is bound late (lambda: "
    "sample(seed) in a loop), and what has changed since: arguments, weights, the scheduler"
)
"""What to do where a run is not what it was when it was recorded."""


@dataclass(frozen=True)
class Sampled:
    """What one run ended with.

    Args:
        latent: The sampler's last latent; the sample itself in pixel space.
        output: What the pipeline returned.
        handed: What the scheduler was handed at each step: the denoiser's outputs after guidance. Empty without one.
        latents: What came out of each step, the last latent included. Empty without a scheduler.
    """

    latent: Tensor
    output: Any
    handed: tuple[Tensor, ...] = ()
    latents: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """A sampling run that can be repeated exactly: a pipeline, its arguments and a seed.

    Args:
        pipe: A pipeline; or a plain denoiser, with `run`.
        call: Keyword arguments of the pipeline, without a generator; for `run` those that it names.
        seed: Of the generator, made anew for every run, and of torch's own, which is put back afterwards. `None` = 0,
            and what `run` has as its own default.
        run: For a plain denoiser: a function that samples and returns the final latent.
        steps: How often the scheduler steps; `None` = as often as it has timesteps. img2img skips some.
        branches: Evaluations per step; `None` = not known before the run.
        noise: Of the caller's own generators; `None` = one of the seed.
        autocast: Where autocast is on in the run; `None` = where it is around the caller.
    """

    pipe: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    run: Callable[..., Tensor] | None = None
    steps: int | None = None
    branches: int | None = None
    noise: Noise | None = None
    autocast: Autocast | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The network that the sampler calls, the first of several."""
        return denoiser_of(self.pipe)

    @property
    def denoisers(self) -> tuple[nn.Module, ...]:
        """All networks that the sampler calls."""
        return denoisers_of(self.pipe)

    def __call__(self) -> Sampled:
        """Run once, without gradients.

        Raises:
            RunError: A plain denoiser without `run`, arguments that `run` does not name, a generator among the
                arguments, a run without a step, one that was interrupted, or one that does not end with one tensor.
        """
        with self._repeated(), torch.no_grad():
            if self.run is not None:
                latent = usable(self._ran(self.run))
                return Sampled(latent, latent)
            latents: list[Tensor] = []
            handed: list[Tensor] = []

            scheduler: Any = scheduler_of(self.pipe)

            def keep(result: Any, *args: Any, **kwargs: Any) -> None:
                latents.append(usable(latent_of(scheduler, result).detach()))
                handed.append(copied(handed_to_step(scheduler, args, kwargs)))

            with watched(scheduler, "step", keep):
                output = self.pipe(**self.call, **self._generator())
        self._check_ended(len(latents))
        return Sampled(latents[-1], output, tuple(handed), tuple(latents))

    def seconds(self, clock: Clock) -> float:
        """How long a run takes with nothing in front of it but what a schedule has put there.

        Args:
            clock: Of the denoiser's device.

        Raises:
            RunError: As for a whole run.
        """
        with self._repeated(), torch.no_grad():
            generator = {} if self.run is not None else self._generator()
            started = clock.now()
            if self.run is not None:
                self.run(**self._told(self.run))
            else:
                self.pipe(**self.call, **generator)
            return clock.now() - started

    def latent(self) -> Tensor:
        """The final latent alone: what comes after the last step is not run.

        Where the caller has gradients on, they are on throughout the sampler, too, whatever its code says of itself.

        Raises:
            RunError: As for a whole run.
        """
        with self._repeated(), gradients_throughout():
            return self._latent_of_steps() if self.run is None else self._ran(self.run)

    def _ran(self, run: Callable[..., Tensor]) -> Tensor:
        """What `run` returns.

        Raises:
            RunError: It is not one tensor.
        """
        latent: Any = run(**self._told(run))
        if not isinstance(latent, Tensor):
            raise RunError(
                given=f"a run= that returns a {type(latent).__name__}",
                expected="the final latent as one tensor",
                advice="Return the latent alone: the tensor that the last step made",
            )
        return latent

    def _latent_of_steps(self) -> Tensor:
        scheduler: Any = scheduler_of(self.pipe)
        done: list[Tensor] = []

        def stop_after_the_last(result: Any, *_: Any, **__: Any) -> None:
            done.append(latent_of(scheduler, result))
            if len(done) == (self.steps or len(scheduler.timesteps)):
                raise _LastStep

        with watched(scheduler, "step", stop_after_the_last), suppress(_LastStep):
            self.pipe(**self.call, **self._generator())
            self._check_ended(len(done))
            raise _no_step(len(done))
        return done[-1]

    @contextmanager
    def _repeated(self) -> Iterator[None]:
        """The generators of torch, inference mode and autocast as in every other run of this sampling."""
        self._check_repeatable()
        with torch.random.fork_rng(), without_inference_mode(), autocast_as(self.autocast):
            torch.manual_seed(self.seed or 0)  # for what takes no generator
            yield

    def _check_repeatable(self) -> None:
        if self.run is None and isinstance(self.pipe, nn.Module):
            raise _not_repeatable("a plain module without run=")
        if "generator" in self.call:
            raise _not_repeatable("a generator")

    def _check_ended(self, steps: int) -> None:
        """Refuse a run that took no step, or that somebody stopped: diffusers' loops go on without evaluating."""
        if getattr(self.pipe, "_interrupt", False) is True:
            raise RunError(
                given=f"a run that was interrupted after {steps} steps (pipe._interrupt)",
                expected="a run to the end",
                advice="Do not interrupt it, or ask for fewer steps",
            )
        if not steps:
            raise _no_step(steps)

    def _generator(self) -> dict[str, Any]:
        """The generator, or generators, for a pipeline that takes one."""
        if self.noise is not None:
            return {"generator": self.noise.fresh()}
        if "generator" not in inspect.signature(self.pipe.__call__).parameters:
            return {}
        return {"generator": torch.Generator("cpu").manual_seed(self.seed or 0)}

    def _told(self, run: Callable[..., Tensor]) -> dict[str, Any]:
        """What `run` is called with: the arguments, and the seed if it names one.

        Raises:
            RunError: It does not name one of the arguments.
        """
        given = dict(self.call) if self.noise is None else {**self.call, "generator": self.noise.fresh()}
        parameters = inspect.signature(run).parameters
        named = {name for name, parameter in parameters.items() if parameter.kind in _BY_NAME}
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if not takes_any and (unknown := sorted(given.keys() - named)):
            raise RunError(
                given=f"{', '.join(unknown)} for a run= that does not name {'it' if len(unknown) == 1 else 'them'}",
                expected=f"arguments that it names: {', '.join(sorted(named)) or 'it has none'}",
                advice="Give the function such a parameter, or leave the argument out",
            )
        seed = self.seed
        if "seed" in named and seed is None and parameters["seed"].default is inspect.Parameter.empty:
            seed = 0
        bound = run.keywords if isinstance(run, partial) else {}
        return given if "seed" not in named or "seed" in bound or seed is None else {**given, "seed": seed}


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _LastStep(BaseException):
    """The last step is done."""


def _not_repeatable(given: str) -> RunError:
    return RunError(
        given=given,
        expected="a run that can be repeated exactly",
        advice="Pass run=function for a plain module, and seed= instead of a generator for a pipeline",
    )


def _no_step(steps: int) -> RunError:
    return RunError(
        given=f"a pipeline that took {steps or 'no'} steps with pipe.scheduler, and not its last one",
        expected="scheduler.step called once per timestep, on that scheduler and not on a copy of it",
        advice="Ask for more steps, and do not interrupt the run",
    )
