"""The tree of exceptions. Every message says what was given, what was expected, and what to do.

* StepmaskError
    x InvalidBudget           a budget outside (0, 1], or one that cannot be reached
        + NotTimed            a budget in time for blocks that were never timed
    x InvalidSchedule         a table that contradicts itself or its graph
        + InvalidScheduleFile a file that is not a schedule, or only half of one
        + ReuseBeforeCompute  a cell that reads values which were never computed
    x InvalidProfile          a sweep's profile that is damaged, or profiles that do not belong together
    x ScheduleMismatch        a schedule for another denoiser, sampler, step count or block list
    x TraceError              a denoiser whose blocks cannot be masked as asked
        + NoSuchBlock         a pattern or a name that matches no block
    x InvalidConditioning     labels or prompts that a pipeline cannot be told
    x RunError                a sampling run that does not follow its plan
        + AlreadyApplied      a denoiser that is masked (or cached by something else) already
        + RunNotStarted       an evaluation outside a run
    x InvalidStore            a dtype or a device in which stored values cannot be held
    x LearningError           a learning run that cannot go on
    x InvalidPictures         sets of pictures, or of their features, that cannot be compared
        + TooFewSamples       fewer of them than a distance needs
    x InvalidRecipe           a recipe that is no TOML, or says what no recipe says
    x InvalidRunFolder        a folder with results of another run, or with damaged ones
    x ClusterError            a cluster, or other processes, that jobs cannot be handed to
    x UnwritablePath          a file or folder that cannot be written
    x HubError                a repository that the hub does not give, or does not take
    x InvalidReport           a file that is no report, or the report of another schedule
    x PipelineNotFound        a name that leads to no pipeline
    x InvalidLoading          options with which a pipeline cannot be loaded here
    x NoSuchSampler           a name that is no scheduler of diffusers, or options that it does not take
    x MissingExtra            an optional dependency that is not installed
"""

from typing import Any

from stepmask.text import printable_lines


class StepmaskError(Exception):
    """Root of everything that stepmask raises on purpose; what it quotes cannot steer a terminal."""

    def __init__(self, *, given: str, expected: str, advice: str) -> None:
        parts = {"given": given, "expected": expected, "advice": advice}
        self.parts = {name: printable_lines(part) for name, part in parts.items()}
        super().__init__("{given}. Expected: {expected}. {advice}.".format(**self.parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.parts)


def _rebuild(kind: type[StepmaskError], parts: dict[str, str]) -> StepmaskError:
    """Unpickle: an error made with keywords only crosses process borders like any other."""
    return kind(**parts)


class InvalidBudget(StepmaskError, ValueError):
    """A budget outside (0, 1], or one that no valid schedule reaches."""


class NotTimed(InvalidBudget):
    """A budget in time for blocks that were never timed."""


class InvalidSchedule(StepmaskError, ValueError):
    """A table that contradicts itself or its graph."""


class InvalidScheduleFile(InvalidSchedule):
    """A file that is not a schedule, or only half of one."""


class ReuseBeforeCompute(InvalidSchedule):
    """A reused cell that reads more stored values than were computed before it."""


class InvalidProfile(StepmaskError, ValueError):
    """A profile that is damaged, or profiles that do not belong together."""


class ScheduleMismatch(StepmaskError, ValueError):
    """A schedule learned for another denoiser, sampler, step count or block list."""


class TraceError(StepmaskError, ValueError):
    """A denoiser whose blocks cannot be masked as asked."""


class NoSuchBlock(TraceError):
    """A pattern or a name that matches no block."""


class InvalidConditioning(StepmaskError, ValueError):
    """Labels or prompts that a pipeline cannot be told."""


class RunError(StepmaskError, RuntimeError):
    """A sampling run that does not follow its plan."""


class AlreadyApplied(RunError):
    """A denoiser that is masked, or cached by something else, already."""


class RunNotStarted(RunError):
    """An evaluation of a masked denoiser outside a run."""


class InvalidStore(StepmaskError, ValueError):
    """A dtype or a device in which stored values cannot be held."""


class LearningError(StepmaskError, RuntimeError):
    """A learning run that cannot go on."""


class InvalidPictures(StepmaskError, ValueError):
    """Sets of pictures, or of their features, that cannot be compared."""


class TooFewSamples(InvalidPictures):
    """Fewer pictures than a distance between their features needs."""


class InvalidRecipe(StepmaskError, ValueError):
    """A recipe that is no TOML, or says what no recipe says."""


class InvalidRunFolder(StepmaskError, ValueError):
    """A folder of finished work that belongs to another run, or is damaged."""


class ClusterError(StepmaskError, RuntimeError):
    """A cluster, or other processes, that jobs cannot be handed to."""


class UnwritablePath(StepmaskError, OSError):
    """A file or folder that cannot be written."""


class HubError(StepmaskError, OSError):
    """A repository on the Hugging Face hub that cannot be read from or written to."""


class InvalidReport(StepmaskError, ValueError):
    """A file that is no report, or a report of another schedule."""


class PipelineNotFound(StepmaskError, ValueError):
    """A name that leads to no pipeline."""


class InvalidLoading(StepmaskError, ValueError):
    """A device, a dtype, or another option with which a pipeline cannot be loaded here."""


class NoSuchSampler(StepmaskError, ValueError):
    """A name that is no scheduler of diffusers, or options that it does not take."""


class MissingExtra(StepmaskError, ImportError):
    """An optional dependency that is not installed."""
