"""What a schedule was made for: the denoiser and the sampler, as plain data that can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepmask.errors import RunError, ScheduleMismatch


@dataclass(frozen=True)
class DenoiserFingerprint:
    """A denoiser's class and configuration.

    Args:
        class_name: Name of the module's class.
        config: Its configuration, as plain JSON values. Weights are not part of it: fine-tunes share schedules.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def check(self, given: "DenoiserFingerprint") -> None:
        """Refuse another denoiser. Only keys that both configurations have are compared, so newer keys do no harm.

        Raises:
            ScheduleMismatch: The class or a common configuration value differs.
        """
        if given.class_name != self.class_name:
            raise _mismatch(f"a denoiser of class {given.class_name}", self.class_name)
        for key in self.config.keys() & given.config.keys():
            if self.config[key] != given.config[key]:
                raise _mismatch(f"a denoiser with {key} = {given.config[key]!r}", f"{key} = {self.config[key]!r}")


@dataclass(frozen=True)
class SamplerFingerprint:
    """A sampler's class and the sequence in which it evaluates the denoiser.

    Args:
        class_name: Name of the scheduler's class; "" for a loop that has none.
        timesteps: What the denoiser is given at each step, noisiest first.
        log_snr: log(α²/σ²) at each step; empty where the sampler does not tell.
        branches: Denoiser calls per step; 1 where guidance is batched.
    """

    class_name: str
    timesteps: tuple[float, ...]
    log_snr: tuple[float, ...] = ()
    branches: int = 1

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

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
        return SamplerFingerprint(self.class_name, self.timesteps[where], self.log_snr[where], self.branches)

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
        if whole.class_name != self.class_name or not self._is_part_of(whole):
            self.check(whole)

    def check_first(self, timestep: float) -> None:
        """Refuse a run that begins elsewhere.

        Raises:
            ScheduleMismatch: It does.
        """
        if not _close(self.timesteps[0], timestep):
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
        advice="Use the schedule with its own denoiser and sampler, schedule.resample() it to other steps, "
        "or learn a new one",
    )
