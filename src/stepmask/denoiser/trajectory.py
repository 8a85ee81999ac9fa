"""`record`: run a pipeline as it is and keep what its denoiser was given; never its features."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepmask.denoiser.families import denoiser_of, fingerprint_of, scheduler_of
from stepmask.denoiser.sampler import describe, watched
from stepmask.denoiser.seam import Behaviour, attached
from stepmask.denoiser.values import each, tensors
from stepmask.errors import LearningError, RunError
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """What one run ended with.

    Args:
        latent: The sampler's last latent; the sample itself in pixel space.
        output: What the pipeline returned.
        handed: What the scheduler was handed at each step: the denoiser's outputs after guidance. Empty without one.
    """

    latent: Tensor
    output: Any
    handed: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """A sampling run that can be repeated exactly: a pipeline, its arguments and a seed.

    Args:
        pipe: A pipeline; or a plain denoiser, with `run`.
        call: Keyword arguments of the pipeline, without a generator.
        seed: Of the generator, made anew for every run.
        run: For a plain denoiser: a function without arguments that samples and returns the final latent.
    """

    pipe: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    run: Callable[[], Tensor] | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The network that the sampler calls."""
        return denoiser_of(self.pipe)

    def __call__(self) -> Sampled:
        """Run once.

        Raises:
            RunError: A plain denoiser without `run`, a generator among the arguments, or a run without a step.
        """
        if self.run is not None:
            return Sampled(latent := self.run(), latent)
        self._check_repeatable()
        latents: list[Tensor] = []
        handed: list[Tensor] = []

        def keep(result: Any, model_output: Tensor, *_: Any, **__: Any) -> None:
            latents[:] = [result[0].detach()]
            handed.append(model_output.detach().clone())

        with watched(scheduler_of(self.pipe), "step", keep), torch.random.fork_rng():
            torch.manual_seed(self.seed)  # for what takes no generator
            output = self.pipe(**self.call, **self._generator())
        if not latents:
            raise _no_step()
        return Sampled(latents[0], output, tuple(handed))

    def latent(self) -> Tensor:
        """The final latent alone, in the caller's gradient mode: what comes after the last step is not run.

        Raises:
            RunError: As for a whole run.
        """
        if self.run is not None:
            return self.run()
        self._check_repeatable()
        scheduler, undecorated = scheduler_of(self.pipe), inspect.unwrap(type(self.pipe).__call__)
        done: list[int] = []

        def stop_after_the_last(result: Any, *_: Any, **__: Any) -> None:
            done.append(1)
            if len(done) == len(scheduler.timesteps):
                raise _LastStep(result[0])

        with watched(scheduler, "step", stop_after_the_last), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                undecorated(self.pipe, **self.call, **self._generator())
            except _LastStep as reached:
                return reached.latent
        raise _no_step()

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


class _LastStep(BaseException):  # noqa: N818 - leaves a pipeline's code early, and no except clause may stop it
    """The last step is done."""

    def __init__(self, latent: Tensor) -> None:
        self.latent = latent


def _no_step() -> RunError:
    return RunError(
        given="a pipeline that did not reach its last step",
        expected="scheduler.step called once per timestep",
        advice="Ask for more steps, and do not interrupt the run",
    )


@dataclass(frozen=True)
class Trajectory:
    """What the denoiser was given and said along one run, step by step. Latents, never features.

    Args:
        calls: Arguments of each evaluation, in order; branches of one step follow each other.
        outputs: What the denoiser answered.
        sampled: What the run ended with.
        sampling: How to run it again.
        denoiser: Fingerprint of the denoiser.
        sampler: Fingerprint of the sampler.
    """

    calls: tuple[Call, ...]
    outputs: tuple[Any, ...]
    sampled: Sampled
    sampling: Sampling
    denoiser: DenoiserFingerprint
    sampler: SamplerFingerprint

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.sampler.steps

    def at(self, step: int) -> tuple[tuple[Call, ...], tuple[Any, ...]]:
        """Calls and outputs of one step, one each per branch."""
        where = slice(step * self.sampler.branches, (step + 1) * self.sampler.branches)
        return self.calls[where], self.outputs[where]


def record(pipe: Any, *, seed: int = 0, run: Callable[[], Tensor] | None = None, **call: Any) -> Trajectory:
    """Run a pipeline once as it is and keep what its denoiser was given.

        trajectory = stepmask.record(pipe, class_labels=[207, 360], num_inference_steps=20)

    Args:
        pipe: A diffusers pipeline, or a plain denoiser together with `run`.
        seed: Of the generator handed to the pipeline.
        run: For a plain denoiser: a function without arguments that samples with it and returns the final latent.
        **call: Arguments of the pipeline.

    Raises:
        RunError: The run cannot be repeated exactly, or its evaluations do not divide into steps.
        LearningError: The run gave latents that are not finite.
    """
    return record_sampling(Sampling(pipe, call, seed, run))


def record_sampling(sampling: Sampling) -> Trajectory:
    """Run a sampling once and keep what its denoiser was given. It may be masked: then that is what is recorded."""
    listener, sequence = _Listener(), list[SamplerFingerprint]()
    scheduler = scheduler_of(sampling.pipe)
    with ExitStack() as stack:
        if scheduler is not None and sampling.run is None:
            stack.enter_context(
                watched(scheduler, "set_timesteps", lambda *_, **__: sequence.append(describe(scheduler)))
            )
        stack.enter_context(attached({sampling.denoiser: listener}))
        sampled = sampling()
    if not all(torch.isfinite(tensor).all() for tensor in tensors(sampled.latent)):
        raise LearningError(
            given="a run whose final latent is not finite",
            expected="finite latents",
            advice="Check the pipeline's dtype: half precision overflows on CPU",
        )
    return Trajectory(
        calls=tuple(listener.calls),
        outputs=tuple(listener.outputs),
        sampled=sampled,
        sampling=sampling,
        denoiser=fingerprint_of(sampling.denoiser),
        sampler=_sampler(sequence, listener.calls),
    )


def _sampler(sequence: list[SamplerFingerprint], calls: list[Call]) -> SamplerFingerprint:
    """The sampler's fingerprint with its branches counted; for a plain loop, the timesteps it handed over."""
    if not sequence:
        return SamplerFingerprint("", tuple(_timestep(call, step) for step, call in enumerate(calls)))
    told = sequence[-1]
    branches, rest = divmod(len(calls), told.steps)
    if rest or not branches:
        raise RunError(
            given=f"{len(calls)} evaluations of the denoiser in {told.steps} sampling steps",
            expected="the same number of evaluations at every step",
            advice="Keep guidance on or off for the whole run, and img2img strength at 1",
        )
    return SamplerFingerprint(told.class_name, told.timesteps, told.log_snr, branches)


def _timestep(call: Call, step: int) -> float:
    """The timestep of a plain call: `timestep`, `t` or `sigma`, else its second argument, else the step's index."""
    given = next((call.kwargs[name] for name in ("timestep", "t", "sigma") if name in call.kwargs), None)
    if given is None:
        given = call.args[1] if len(call.args) > 1 else step
    return float(given.flatten()[0]) if isinstance(given, Tensor) else float(given)


class _Listener(Behaviour):
    """Stands in front of the denoiser and keeps what it is given and says."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs: list[Any] = []

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(self._kept(args, kwargs))
        output = call(*args, **kwargs)
        self.outputs.append(each(lambda tensor: tensor.detach().clone(), output))
        return output

    def _kept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A copy; a tensor equal to the one in its place a call ago (conditioning) is shared with it."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        before = pytree.tree_leaves((self.calls[-1].args, self.calls[-1].kwargs)) if self.calls else []
        if len(before) != len(leaves):
            before = [None] * len(leaves)
        kept = [_keep(leaf, old) for leaf, old in zip(leaves, before, strict=True)]
        return Call(*pytree.tree_unflatten(kept, spec))


def _keep(leaf: Any, old: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    same = isinstance(old, Tensor) and old.shape == leaf.shape and torch.equal(old, leaf)
    return old if same else leaf.detach().clone()
