"""`record`: run a pipeline as it is and keep what its denoiser was given; never its features."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepmask.denoiser.call import Call, parameters_of, timestep_of_call
from stepmask.denoiser.calls import Calls
from stepmask.denoiser.companions import companions_called
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import denoiser_of, fingerprint_of, scheduler_of
from stepmask.denoiser.modes import (
    Autocast,
    autocast_as,
    autocast_now,
    copied,
    is_mapped,
    uncompiled,
    usable,
    without_inference_mode,
)
from stepmask.denoiser.noise import Noise
from stepmask.denoiser.other_caches import refuse_other_caches
from stepmask.denoiser.recorded_course import Evaluated, course_of
from stepmask.denoiser.sampler import SetSteps, timestep_of, watched
from stepmask.denoiser.sampling import Sampled, Sampling
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.steps import (
    check_divides,
    check_one_pass,
    check_order,
    check_same_timestep,
    check_told,
    evaluations_counted,
    evaluations_of_a_loop,
)
from stepmask.denoiser.values import each, first, same_numbers, tensors
from stepmask.errors import LearningError, RunError, StepmaskError
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.schedule.course import Course
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint


@dataclass(frozen=True)
class Trajectory:
    """What the denoiser was given and said along one run, step by step. Latents, never features.

    Args:
        calls: Arguments of each evaluation, in order; branches of one step follow each other. An accelerator holds
            only those that calls share.
        outputs: What the denoiser answered.
        sampled: What the run ended with.
        sampling: How to run it again.
        denoiser: Fingerprint of the denoiser.
        sampler: Fingerprint of the sampler.
        networks: Which of the pipeline's networks each evaluation is of, by its place among them; empty = the only one.
    """

    calls: Sequence[Call]
    outputs: tuple[Any, ...]
    sampled: Sampled
    sampling: Sampling
    denoiser: DenoiserFingerprint
    sampler: SamplerFingerprint
    networks: tuple[int, ...] = ()

    def __repr__(self) -> str:
        branches = f" × {self.sampler.branches} branches" if self.sampler.branches > 1 else ""
        return f"Trajectory({self.steps} steps{branches} of {self.denoiser.class_name}, seed {self.sampling.seed})"

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

    def __getstate__(self) -> dict[str, Any]:
        """For another process: what lies on an accelerator goes by way of the CPU."""
        return self._mapped(_sent)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.sampling.pipe is not None:
            self.settle(self.sampling.denoiser)

    def settle(self, denoiser: nn.Module) -> None:
        """Bring what came from another process to the device that a denoiser is on here."""
        device = device_of(denoiser)
        vars(self).update(self._mapped(partial(_arrived, device)))
        if isinstance(self.calls, Calls):
            self.calls.settle(device)

    def _mapped(self, function: Callable[[Any], Any]) -> dict[str, Any]:
        """All that it holds, with a function done to the leaves of its outputs and of what it ended with."""
        sampled = Sampled(**{name: _mapped(function, value) for name, value in vars(self.sampled).items()})
        return {**vars(self), "outputs": _mapped(function, self.outputs), "sampled": sampled}

    def at(self, step: int) -> tuple[Sequence[Call], tuple[Any, ...]]:
        """Calls and outputs of one step, one each for every branch that it evaluates."""
        evaluations = [index for index, (at, _) in enumerate(self.sampler.evaluations) if at == step]
        where = slice(evaluations[0], evaluations[-1] + 1)
        return self.calls[where], self.outputs[where]

    def network_of(self, evaluation: int) -> nn.Module:
        """The network that an evaluation is of."""
        number = self.networks[evaluation] if self.networks else 0
        return self.sampling.denoisers[number]


def record(
    pipe: Any,
    *,
    seed: int | None = None,
    run: Callable[..., Tensor] | None = None,
    branches: int | None = None,
    **call: Any,
) -> Trajectory:
    """Run a pipeline once as it is and keep what its denoiser was given.

        trajectory = stepmask.record(pipe, class_labels=[207, 360], num_inference_steps=20)

    Under a schedule it is the masked run that is recorded: compare with it, but learn from another.
    Gradients and inference mode are as `record` needs them, whatever they are around it. Autocast is kept with the
    trajectory: the run is repeated under it, and the schedule learned for it.

    Args:
        pipe: A diffusers pipeline, or a plain denoiser together with `run`.
        seed: Of the generator handed to the pipeline, and of torch's own generator while the run lasts; `None` = 0.
        run: For a plain denoiser: a function that samples with it and returns the final latent. It is called with
            those of the arguments that it names, and with the seed if it names that and one is given.
        branches: Evaluations of a plain denoiser per step; `None` = as many as there are at each timestep, where one
            does not depend on the other's answer. A pipeline's are counted.
        **call: Arguments of the pipeline, or of `run`. A generator, or a list of them, is left untouched: every
            repetition draws what it would have drawn now.

    Raises:
        RunError: The run cannot be repeated exactly, was interrupted, samples in several passes, or its steps are not
            alike: in the number of evaluations, in their order, or in the shapes of what the denoiser is given and
            answers. Or the denoiser calls itself, is called in `torch.vmap`, or answers without a tensor.
        AlreadyApplied: Something else caches the denoiser.
        LearningError: The run gave latents that are not finite.
    """
    refuse_other_caches(pipe)
    noise = Noise.of(call.pop("generator", None))
    return record_sampling(
        Sampling(pipe, usable(call), seed, run, branches=branches, noise=noise, autocast=autocast_now())
    )


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
    jobs = [(seed, call, autocast_now()) for seed, call in calls.items()]
    runs = dict(executor.map(_recorded, executor.share(pipe), jobs, title="recording"))
    for run in runs.values():
        run.settle(denoiser_of(pipe))
    return [replace(runs[job], sampling=replace(runs[job].sampling, pipe=pipe)) for job in range(len(jobs))]


def _recorded(pipe: Any, job: tuple[int, Mapping[str, Any], Autocast]) -> Trajectory:
    """A trajectory without its pipeline, which is not for sending."""
    seed, call, autocast = job
    with autocast_as(autocast):
        run = record(pipe, seed=seed, **call)
    return replace(run, sampling=replace(run.sampling, pipe=None))


def record_sampling(sampling: Sampling) -> Trajectory:
    """Run a sampling once and keep what its denoiser was given. It may be masked: then that is what is recorded."""
    with without_inference_mode(), uncompiled(), companions_called():
        listener = _Listener()
        hooks = {denoiser: _OfNetwork(listener, number) for number, denoiser in enumerate(sampling.denoisers)}
        with _steps_seen(sampling, listener) as seen, attached(hooks):
            sampled = sampling()
        listener.check_answered()
        _check_finite(sampled.latent)
        sampler = _sampler(seen, listener, sampling)
        is_even = not sampler.course.present
        return Trajectory(
            calls=listener.calls,
            outputs=tuple(listener.outputs),
            sampled=sampled,
            sampling=replace(
                sampling, steps=len(seen.timesteps) or None, branches=sampler.branches if is_even else None
            ),
            denoiser=fingerprint_of(sampling.denoiser),
            sampler=sampler,
            networks=tuple(listener.networks) if any(listener.networks) else (),
        )


@dataclass
class _Seen:
    """What a run's scheduler did.

    Args:
        sequence: What it was like each time its timesteps were set.
        sets: How many steps had been taken then.
        timesteps: Of each step.
        evaluations: How many there had been at each step.
    """

    sequence: list[SamplerFingerprint] = field(default_factory=list)
    sets: list[int] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)


@contextmanager
def _steps_seen(sampling: Sampling, listener: "_Listener") -> Iterator[_Seen]:
    """Watch the scheduler while the context lasts; a plain denoiser has none."""
    seen = _Seen()
    scheduler = scheduler_of(sampling.pipe)

    def when_set(_: Any, *args: Any, **kwargs: Any) -> None:
        seen.sequence.append(SetSteps(scheduler, args, kwargs).now)
        seen.sets.append(len(seen.timesteps))

    def when_stepped(_: Any, *args: Any, **kwargs: Any) -> None:
        seen.timesteps.append(timestep_of(scheduler, args, kwargs))
        seen.evaluations.append(len(listener.calls))

    if scheduler is None or sampling.run is not None:
        yield seen
        return
    with watched(scheduler, "set_timesteps", when_set), watched(scheduler, "step", when_stepped):
        yield seen


def _check_finite(latent: Any) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors(latent)):
        raise LearningError(
            given="a run whose final latent is not finite",
            expected="finite latents",
            advice="Check the pipeline's dtype: half precision overflows on CPU",
        )


def _sampler(seen: _Seen, listener: "_Listener", sampling: Sampling) -> SamplerFingerprint:
    """The sampler's fingerprint with its branches counted; for a plain loop, the timesteps it handed over."""
    if not seen.sequence:
        return _loop(listener, sampling)
    sampler = seen.sequence[-1].part(seen.timesteps[0], len(seen.timesteps))
    check_one_pass(seen.sets, seen.timesteps, sampler)
    counts = evaluations_counted(seen.evaluations, len(listener.calls))
    check_told(sampling.branches, max(counts))
    return replace(sampler, branches=max(counts), course=_course(listener, sampling, counts))


def _loop(listener: "_Listener", sampling: Sampling) -> SamplerFingerprint:
    """A plain loop: told by the timesteps of its evaluations."""
    calls = list(listener.calls.as_they_lie())
    parameters = parameters_of(sampling.denoiser)
    if not calls:
        raise RunError(
            given="a run= that never called the denoiser",
            expected="evaluations of the module that is recorded",
            advice="Let the function call this very module",
        )
    if sampling.branches is None:
        timesteps = [timestep_of_call(call, index, parameters) for index, call in enumerate(calls)]
        counts = evaluations_of_a_loop(timesteps, lambda first, at: _depends(sampling, listener, first, at))
    else:
        check_divides(sampling.branches, len(calls))
        counts = [sampling.branches] * (len(calls) // sampling.branches)
    steps = [step for step, count in enumerate(counts) for _ in range(count)]
    timesteps = [timestep_of_call(call, step, parameters) for call, step in zip(calls, steps, strict=True)]
    check_same_timestep(timesteps, counts)
    firsts = [sum(counts[:step]) for step in range(len(counts))]
    course = _course(listener, sampling, counts)
    return SamplerFingerprint("", tuple(timesteps[first] for first in firsts), branches=max(counts), course=course)


def _course(listener: "_Listener", sampling: Sampling, counts: Sequence[int]) -> Course:
    """How the steps differ in what they evaluate; refused where the order of branches changes."""
    named = _named(sampling.denoiser, listener.calls)
    course = course_of(Evaluated(named, listener.outputs, listener.networks, counts))
    most = max(counts)
    full = [step for step, count in enumerate(counts) if count == most]
    firsts = [sum(counts[:step]) for step in range(len(counts))]
    check_order([given for step in full for given in named[firsts[step] : firsts[step] + most]], most, full)
    return course


def _named(denoiser: nn.Module, calls: Calls) -> list[dict[str, Any]]:
    """The arguments of each call by their names."""
    names = parameters_of(denoiser)
    most = max(len(call.args) for call in calls.kept)
    names += tuple(f"argument {place}" for place in range(len(names), most))  # of forward(x, *more)
    return [{**dict(zip(names, call.args, strict=False)), **call.kwargs} for call in calls.as_they_lie()]


def _depends(sampling: Sampling, listener: "_Listener", first_of_all: int, at: int) -> bool:
    """Whether an evaluation is given something that the answers from another one on made.

    Two evaluations of one latent do not depend on each other. Else the run is repeated up to there, without the
    denoiser: answered as it was recorded, but for the answers in question.
    """
    latents = [first(call.args, call.kwargs) for call in (listener.calls[first_of_all], listener.calls[at])]
    if _same(*latents):
        return False
    replay = _Replay(listener, first_of_all, at)
    with attached(dict.fromkeys(sampling.denoisers, replay)), suppress(_SeenEnough):
        sampling()
    return replay.differs


class _OfNetwork(Hook):
    """Stands in front of one of a pipeline's networks, and tells the listener which one evaluates.

    Args:
        listener: The listener.
        number: Which network it is.
    """

    def __init__(self, listener: "_Listener", number: int) -> None:
        self.listener = listener
        self.number = number

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self.listener(call, args, kwargs)
        self.listener.networks.append(self.number)
        return output


class _Listener(Hook):
    """Keeps what a pipeline's networks are given and say."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.outputs: list[Any] = []
        self.networks: list[int] = []
        self.inside: set[int] = set()  # threads in which the denoiser is being evaluated
        self.failure: Exception | None = None  # the first, which the run may have caught

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._listen(call, args, kwargs)
        except Exception as error:
            self.failure = self.failure or error
            raise

    def _listen(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        thread = get_ident()
        if thread in self.inside:
            raise _calls_itself(len(self.calls) - 1)
        if any(map(is_mapped, tensors((args, kwargs)))):
            raise _vmap_error()

        self.calls.keep(args, kwargs)
        self.inside.add(thread)
        try:
            output = call(*args, **kwargs)
        finally:
            self.inside.remove(thread)
        if next(tensors(output), None) is None:
            raise _without_tensor(output)
        self.outputs.append(each(copied, output))
        return output

    def check_answered(self) -> None:
        """Refuse a run that went on after an evaluation had failed.

        Raises:
            RunError: It did.
        """
        if isinstance(self.failure, StepmaskError):
            raise self.failure
        if self.failure is not None:
            raise RunError(
                given=f"a run that goes on after an evaluation of the denoiser has failed: {self.failure!r:.200}",
                expected="evaluations that all answer",
                advice="Record a run in which none fails, for example with a smaller batch",
            ) from self.failure


def _calls_itself(evaluation: int) -> RunError:
    return RunError(
        given=f"a denoiser that calls itself, in evaluation {evaluation}",
        expected="evaluations that end before the next one begins",
        advice="Let its forward call a method of its own, or a module inside it, instead of itself (to add a batch "
        "dimension, to wrap its arguments)",
    )


def _vmap_error() -> RunError:
    return RunError(
        given="an evaluation of the denoiser inside torch.vmap",
        expected="tensors whose samples lie in a batch dimension, for they are kept and compared",
        advice="Call the denoiser on the whole batch, outside of vmap",
    )


def _without_tensor(output: Any) -> RunError:
    return RunError(
        given=f"a denoiser that answers with a {type(output).__name__}, in which no tensor was found",
        expected="a tensor, or tensors in a tuple, a list, a dictionary or an output class of diffusers",
        advice="Return one of these, or make the class known: torch.utils._pytree.register_dataclass",
    )


class _Replay(Hook):
    """Stands in front of the denoiser and answers from a recording, but changes the answers from some place on.

    Args:
        listener: The recording.
        first: The first evaluation whose answer is changed.
        at: The one that is compared with what was recorded; there the run ends.
    """

    def __init__(self, listener: _Listener, first: int, at: int) -> None:
        self.listener = listener
        self.first = first
        self.at = at
        self.evaluation = 0
        self.differs = True

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.evaluation
        self.evaluation += 1
        if now == self.at:
            recorded = self.listener.calls[now]
            self.differs = not _same(list(tensors((args, kwargs))), list(tensors((recorded.args, recorded.kwargs))))
            raise _SeenEnough
        change = 1.0 if now >= self.first else 0.0
        return each(
            lambda tensor: tensor + change if tensor.is_floating_point() else tensor.clone(), self.listener.outputs[now]
        )


class _SeenEnough(BaseException):
    """The evaluation in question was reached."""


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(same_numbers, some, others))


@dataclass(frozen=True)
class _Sent:
    """A tensor of an accelerator on its way to another process.

    Args:
        tensor: On the CPU.
    """

    tensor: Tensor


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A value with a function done to its leaves; an output class is not made anew, for it may leave fields out."""
    if not isinstance(value, dict):
        nested = partial(_mapped, function)
        return pytree.tree_map(
            lambda leaf: nested(leaf) if isinstance(leaf, dict) else function(leaf),
            value,
            is_leaf=lambda part: isinstance(part, dict),
        )
    told = copy.copy(value)
    for name, part in value.items():
        told[name] = _mapped(function, part)
    return told


def _sent(leaf: Any) -> Any:
    return _Sent(leaf.cpu()) if isinstance(leaf, Tensor) and leaf.device.type != "cpu" else leaf


def _arrived(device: torch.device, leaf: Any) -> Any:
    return leaf.tensor.to(device) if isinstance(leaf, _Sent) else leaf
