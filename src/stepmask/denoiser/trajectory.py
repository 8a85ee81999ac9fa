"""`record`: run a pipeline as it is and keep what its denoiser was given; never its features."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepmask.denoiser.families import fingerprint_of, scheduler_of
from stepmask.denoiser.sampler import describe, timestep_of, watched
from stepmask.denoiser.sampling import Sampled, Sampling
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.values import each, tensors
from stepmask.errors import LearningError, RunError
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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

    def check_pipe(self, pipe: Any) -> None:
        """Refuse a trajectory that another pipeline was recorded for.

        Raises:
            LearningError: It is another pipeline's.
        """
        if self.sampling.pipe is not pipe:
            raise LearningError(
                given="a trajectory of another pipeline",
                expected="a trajectory recorded from this one",
                advice="Call stepmask.record(pipe, ...) first",
            )

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


def recorded(
    pipe: Any, calls: Mapping[int, Mapping[str, Any]], *, executor: Executor | None = None
) -> list[Trajectory]:
    """Several runs of a pipeline, as `record` keeps one.

        trajectories = recorded(pipe, {seed: {"class_labels": [seed] * 8} for seed in range(4)})

    Args:
        pipe: A diffusers pipeline.
        calls: Arguments of the pipeline by seed.
        executor: Where they run; `None` = `LocalExecutor()`.

    Raises:
        RunError: As `record`.
        LearningError: As `record`.
        ClusterError: The executor cannot hand out jobs.
    """
    executor = executor or LocalExecutor()
    jobs = list(calls.items())
    runs = dict(executor.map(_recorded, executor.share(pipe), jobs, title="recording"))
    return [replace(runs[job], sampling=replace(runs[job].sampling, pipe=pipe)) for job in range(len(jobs))]


def _recorded(pipe: Any, job: tuple[int, Mapping[str, Any]]) -> Trajectory:
    """A trajectory without its pipeline, which is not for sending."""
    seed, call = job
    run = record(pipe, seed=seed, **call)
    return replace(run, sampling=replace(run.sampling, pipe=None))


def record_sampling(sampling: Sampling) -> Trajectory:
    """Run a sampling once and keep what its denoiser was given. It may be masked: then that is what is recorded."""
    listener, sequence, stepped = _Listener(), list[SamplerFingerprint](), list[float]()
    scheduler = scheduler_of(sampling.pipe)
    with ExitStack() as stack:
        if scheduler is not None and sampling.run is None:
            stack.enter_context(
                watched(scheduler, "set_timesteps", lambda *_, **__: sequence.append(describe(scheduler)))
            )
            stack.enter_context(
                watched(
                    scheduler, "step", lambda _, *args, **kwargs: stepped.append(timestep_of(scheduler, args, kwargs))
                )
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
        sampling=replace(sampling, steps=len(stepped) or None),
        denoiser=fingerprint_of(sampling.denoiser),
        sampler=_sampler(sequence, stepped, listener.calls),
    )


def _sampler(sequence: list[SamplerFingerprint], stepped: list[float], calls: list[Call]) -> SamplerFingerprint:
    """The sampler's fingerprint with its branches counted; for a plain loop, the timesteps it handed over."""
    if not sequence:
        return SamplerFingerprint("", tuple(timestep_of_call(call, step) for step, call in enumerate(calls)))
    branches, rest = divmod(len(calls), len(stepped))
    if rest or not branches:
        raise RunError(
            given=f"{len(calls)} evaluations of the denoiser in {len(stepped)} sampling steps",
            expected="the same number of evaluations at every step",
            advice="Keep guidance on or off for the whole run",
        )
    return replace(sequence[-1].part(stepped[0], len(stepped)), branches=branches)


def timestep_of_call(call: Call, step: int) -> float:
    """The timestep of a plain call: `timestep`, `t` or `sigma`, else its second argument, else the step's index."""
    given = next((call.kwargs[name] for name in ("timestep", "t", "sigma") if name in call.kwargs), None)
    if given is None and len(call.args) > 1:
        given = call.args[1]
    if isinstance(given, Tensor):
        return float(given.max())  # of clean tokens or frames it is 0
    return float(given) if isinstance(given, int | float) else float(step)


class _Listener(Hook):
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
