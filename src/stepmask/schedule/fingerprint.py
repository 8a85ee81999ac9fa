"""What a schedule was made for: the denoiser and the sampler, as plain data that can be compared."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule, RunError, ScheduleMismatch
from stepmask.schedule.course import Course
from stepmask.schedule.limits import MAX_BRANCHES, MAX_NUMBER, check_plain, is_class, is_number, is_whole
from stepmask.text import shortened, told


@dataclass(frozen=True)
class DenoiserFingerprint:
    """A denoiser's class and configuration.

    Args:
        class_name: Name of the module's class.
        config: Its configuration, as plain JSON values. Weights are not part of it: fine-tunes share schedules.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Refuse what is no fingerprint, whoever wrote it.

        Raises:
            InvalidSchedule: The class is no name of one, or the configuration is not made of plain JSON values.
        """
        if not is_class(self.class_name):
            raise _no_fingerprint(f"a denoiser of class {told(self.class_name)}", "the name of a class")
        check_plain("a denoiser's config", self.config)

    def check(self, given: "DenoiserFingerprint") -> None:
        """Refuse another denoiser. Only keys that both configurations have are compared, so newer keys do no harm.

        Raises:
            ScheduleMismatch: The class or a common configuration value differs.
        """
        if given.class_name != self.class_name:
            raise _mismatch(f"a denoiser of class {given.class_name}", self.class_name)
        for key in self._common(given):
            if self.config[key] != given.config[key]:
                theirs, ours = shortened(repr(given.config[key])), shortened(repr(self.config[key]))
                raise _mismatch(f"a denoiser with {key} = {theirs}", f"{key} = {ours}")

    def agrees(self, other: "DenoiserFingerprint") -> bool:
        """Whether another is of the same class and has the same values of all keys that both have."""
        same = all(self.config[key] == other.config[key] for key in self._common(other))
        return same and other.class_name == self.class_name

    def _common(self, other: "DenoiserFingerprint") -> set[str]:
        return self.config.keys() & other.config.keys()


@dataclass(frozen=True)
class SamplerFingerprint:
    """A sampler's class and the sequence in which it evaluates the denoiser.

    Args:
        class_name: Name of the scheduler's class; "" for a loop that has none.
        timesteps: What the denoiser is given at each step, noisiest first.
        log_snr: log(α²/σ²) at each step; empty where the sampler does not tell.
        branches: Denoiser calls per step; 1 where guidance is batched.
        mu: The shift for a resolution with which its timesteps were set, of a scheduler that shifts them
            (`use_dynamic_shifting`): they are compared at this shift, whatever a run's own is. `None` = by none.
        course: How steps differ in what they evaluate, where they do.
    """

    class_name: str
    timesteps: tuple[float, ...]
    log_snr: tuple[float, ...] = ()
    branches: int = 1
    mu: float | None = None
    course: Course = field(default_factory=Course)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    def validate(self) -> None:
        """Refuse what is no fingerprint, whoever wrote it.

        Raises:
            InvalidSchedule: The class is neither "" nor a name of one, a timestep or a log-SNR is no finite number,
                or their numbers differ, there are not from 1 to 64 branches, or mu is no number.
        """
        if self.class_name != "" and not is_class(self.class_name):
            raise _no_fingerprint(f"a sampler of class {told(self.class_name)}", "the name of a class, or ''")
        for name, numbers in (("timestep", self.timesteps), ("log-SNR", self.log_snr)):
            for number in numbers:
                if not is_number(number):
                    raise _no_fingerprint(f"a {name} of {told(number)}", f"finite numbers of at most {MAX_NUMBER:.0e}")
        if len(self.log_snr) not in (0, self.steps):
            raise _no_fingerprint(f"{len(self.log_snr)} log-SNRs of {self.steps} steps", "one a step, or none at all")
        if not is_whole(self.branches, MAX_BRANCHES) or self.branches == 0:
            raise _no_fingerprint(f"{told(self.branches)} branches", f"a whole number from 1 to {MAX_BRANCHES}")
        self.course.validate(self.steps, self.branches)
        if self.mu is not None and not is_number(self.mu):
            raise _no_fingerprint(f"a mu of {told(self.mu)}", f"a finite number of at most {MAX_NUMBER:.0e}, or none")

    def part(self, first: float, steps: int) -> "SamplerFingerprint":
        """The same sampler's run over some of its steps, from the one with a timestep on (img2img, `denoising_end`).

        Raises:
            RunError: No step has that timestep.
        """
        start = next((step for step, own in enumerate(self.timesteps) if _close(own, first)), None)
        if start is None:
            raise RunError(
                given=f"a run that begins at timestep {first:g}",
                expected=f"one of the sampler's timesteps, {', '.join(f'{own:g}' for own in self.timesteps)}",
                advice="Hand the scheduler's own timesteps to its step()",
            )
        where = slice(start, start + steps)
        return replace(self, timesteps=self.timesteps[where], log_snr=self.log_snr[where])

    @property
    def begins(self) -> tuple[int, ...]:
        """Steps at which nothing is stored: the first, and those at which the run begins anew."""
        return self.course.begins

    def present(self, step: int) -> tuple[int, ...]:
        """Which branches a step evaluates, or which parts of its batch."""
        return self.course.at(step, self.branches)

    def branches_at(self, step: int) -> tuple[int, ...]:
        """The branches that a step evaluates in calls of their own, in order; of guidance in one batch the only one."""
        return self.present(step) if self.branches > 1 else (0,)

    def parts(self, step: int, branch: int) -> tuple[int, ...]:
        """Which parts of the batch an evaluation has; of one that is a branch by itself, that branch."""
        return self.present(step) if self.branches == 1 else (branch,)

    @cached_property
    def evaluations(self) -> tuple[tuple[int, int], ...]:
        """The step and the branch of each evaluation of a run, in order."""
        return tuple((step, branch) for step in range(self.steps) for branch in self.branches_at(step))

    @cached_property
    def loads(self) -> npt.NDArray[np.float64]:
        """What each step evaluates, as a share of the fullest, shape (steps,)."""
        most = max(self.branches, self.course.parts)
        return np.array([len(self.present(step)) / most for step in range(self.steps)])

    def check(self, given: "SamplerFingerprint") -> None:
        """Refuse another sampler or another sequence of timesteps.

        Raises:
            ScheduleMismatch: The class, the number of steps or a timestep differs.
        """
        if given.class_name != self.class_name:
            raise _mismatch(f"sampler {given.class_name}", f"sampler {self.class_name}")
        if given.steps != self.steps:
            raise _mismatch(f"{given.steps} sampling steps", f"{self.steps} sampling steps")
        for step, (own, other) in enumerate(zip(self.timesteps, given.timesteps, strict=True)):
            if not _close(own, other):
                raise _mismatch(f"timestep {other:g} at step {step}", f"timestep {own:g}")

    def check_whole(self, whole: "SamplerFingerprint") -> None:
        """Refuse a sampler whose steps are neither ours nor have ours among them, one after the other.

        Raises:
            ScheduleMismatch: They have not.
        """
        if not self.is_within(whole):
            self.check(whole)

    def is_within(self, whole: "SamplerFingerprint") -> bool:
        """Whether a sampler's steps are ours, or have ours among them, one after the other."""
        return whole.class_name == self.class_name and self._is_part_of(whole)

    def check_first(self, timestep: float, as_made: Iterable[float] | None = None) -> None:
        """Refuse a run that begins elsewhere.

        Args:
            timestep: At which it begins.
            as_made: What that is at the shift that these timesteps were set with, where that is another than the run's;
                several where it cannot be told.

        Raises:
            ScheduleMismatch: It does.
        """
        if not any(_close(self.timesteps[0], own) for own in ([timestep] if as_made is None else as_made)):
            raise _mismatch(f"a run that begins at timestep {timestep:g}", f"one that begins at {self.timesteps[0]:g}")

    @property
    def tells_timesteps(self) -> bool:
        """Whether its timesteps can be compared: those of a loop whose denoiser is given none are all alike."""
        return len(set(self.timesteps)) > 1

    def check_step(self, step: int, timestep: float) -> None:
        """Refuse an evaluation at another timestep than the step's own.

        Raises:
            ScheduleMismatch: It is at another one.
        """
        if not _close(self.timesteps[step], timestep):
            raise _mismatch(f"timestep {timestep:g} at step {step}", f"timestep {self.timesteps[step]:g}")

    def is_at(self, step: int, timestep: float) -> bool:
        """Whether a step has that timestep."""
        return step < self.steps and _close(self.timesteps[step], timestep)

    def places_of(self, timestep: float) -> list[int]:
        """The steps that have a timestep."""
        return [step for step, own in enumerate(self.timesteps) if _close(own, timestep)]

    def _is_part_of(self, given: "SamplerFingerprint") -> bool:
        return any(
            all(map(_close, self.timesteps, given.timesteps[start : start + self.steps]))
            for start in range(given.steps - self.steps + 1)
        )


def _close(own: float, other: float) -> bool:
    return abs(own - other) <= 1e-4 * max(1.0, abs(own))


def _mismatch(given: str, expected: str) -> ScheduleMismatch:
    return ScheduleMismatch(
        given=given,
        expected=f"{expected}, for which the schedule was made",
        advice="Use the schedule with its own denoiser and sampler, or learn a new one; schedule.resample() carries "
        "one over to other steps, if its sampler tells its log-SNR",
    )


def _no_fingerprint(given: str, expected: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=given,
        expected=expected,
        advice="Take fingerprints from a trajectory: trajectory.denoiser, trajectory.sampler",
    )
