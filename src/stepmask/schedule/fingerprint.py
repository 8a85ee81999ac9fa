"""What a schedule was made for: the denoiser and the sampler, as plain data that can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepmask.errors import ScheduleMismatch


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

    def check(self, given: "SamplerFingerprint") -> None:
        """Refuse another sampler or another sequence of timesteps.

        Raises:
            ScheduleMismatch: The class, the number of steps or a timestep differs.
        """
        if given.class_name != self.class_name:
            raise _mismatch(f"sampler {given.class_name}", f"sampler {self.class_name}")
        if given.steps != self.steps:
            raise _mismatch(f"{given.steps} sampling steps", f"{self.steps} sampling steps")
        for step, (ours, theirs) in enumerate(zip(self.timesteps, given.timesteps, strict=True)):
            if abs(ours - theirs) > 1e-4 * max(1.0, abs(ours)):
                raise _mismatch(f"timestep {theirs:g} at step {step}", f"timestep {ours:g}")


def _mismatch(given: str, expected: str) -> ScheduleMismatch:
    return ScheduleMismatch(
        given=given,
        expected=f"{expected}, for which the schedule was made",
        advice="Use the schedule with its own denoiser and sampler, schedule.resample() it to other steps, "
        "or learn a new one",
    )
