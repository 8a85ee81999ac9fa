"""`Sampling`: one run of a sampler that can be repeated exactly."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepmask.denoiser.families import denoiser_of, scheduler_of
from stepmask.denoiser.sampler import watched
from stepmask.errors import RunError


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
        call: Keyword arguments of the pipeline, without a generator.
        seed: Of the generator, made anew for every run.
        run: For a plain denoiser: a function without arguments that samples and returns the final latent.
        steps: How often the scheduler steps; `None` = as often as it has timesteps. img2img skips some.
    """

    pipe: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    run: Callable[[], Tensor] | None = None
    steps: int | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The network that the sampler calls."""
        return denoiser_of(self.pipe)

    @torch.no_grad()
    def __call__(self) -> Sampled:
        """Run once, without gradients.

        Raises:
            RunError: A plain denoiser without `run`, a generator among the arguments, or a run without a step.
        """
        if self.run is not None:
            return Sampled(latent := self.run(), latent)
        self._check_repeatable()
        latents: list[Tensor] = []
        handed: list[Tensor] = []

        def keep(result: Any, model_output: Tensor, *_: Any, **__: Any) -> None:
            latents.append(result[0].detach())
            handed.append(model_output.detach().clone())

        with watched(scheduler_of(self.pipe), "step", keep), torch.random.fork_rng():
            torch.manual_seed(self.seed)  # for what takes no generator
            output = self.pipe(**self.call, **self._generator())
        if not latents:
            raise _no_step()
        return Sampled(latents[-1], output, tuple(handed), tuple(latents))

    def latent(self) -> Tensor:
        """The final latent alone, in the caller's gradient mode: what comes after the last step is not run.

        Raises:
            RunError: As for a whole run.
        """
        if self.run is not None:
            return self.run()
        self._check_repeatable()
        scheduler: Any = scheduler_of(self.pipe)
        undecorated = inspect.unwrap(type(self.pipe).__call__)
        done: list[Tensor] = []

        def stop_after_the_last(result: Any, *_: Any, **__: Any) -> None:
            done.append(result[0])
            if len(done) == (self.steps or len(scheduler.timesteps)):
                raise _LastStep

        with watched(scheduler, "step", stop_after_the_last), torch.random.fork_rng(), suppress(_LastStep):
            torch.manual_seed(self.seed)
            undecorated(self.pipe, **self.call, **self._generator())
            raise _no_step()
        return done[-1]

    def _check_repeatable(self) -> None:
        if isinstance(self.pipe, nn.Module) or "generator" in self.call:
            raise RunError(
                given="a plain module without run=" if isinstance(self.pipe, nn.Module) else "a generator",
                expected="a run that can be repeated exactly",
                advice="Pass run=function for a plain module, and seed= instead of a generator for a pipeline",
            )

    def _generator(self) -> dict[str, Any]:
        if "generator" not in inspect.signature(self.pipe.__call__).parameters:
            return {}
        return {"generator": torch.Generator("cpu").manual_seed(self.seed)}


class _LastStep(BaseException):
    """The last step is done."""


def _no_step() -> RunError:
    return RunError(
        given="a pipeline that did not reach its last step",
        expected="scheduler.step called once per timestep",
        advice="Ask for more steps, and do not interrupt the run",
    )
