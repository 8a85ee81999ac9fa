"""Which tables a masked denoiser may follow, and which one of them fits a run."""

from collections.abc import Callable, Sequence
from functools import cached_property

from stepmask.denoiser.sampler import SetSteps
from stepmask.errors import ScheduleMismatch
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.rectify import Plan
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.tiers import Tiers

Given = MaskSchedule | Sequence[MaskSchedule] | Tiers
"""What `apply` takes: one schedule, one for each branch, or tiers of them."""


class Table:
    """What a run follows: one schedule for all branches, or one each.

    Args:
        schedules: The schedules.
        plan: What makes a plan of a schedule.
    """

    def __init__(self, schedules: Sequence[MaskSchedule], plan: Callable[[MaskSchedule], Plan]) -> None:
        self.schedules = schedules
        self._plan = plan

    @property
    def sampler(self) -> SamplerFingerprint:
        """The sampler that it is for."""
        return self.schedules[0].sampler

    @cached_property
    def plans(self) -> list[Plan]:
        """The plan of each schedule, made when it is first followed."""
        return [self._plan(schedule) for schedule in self.schedules]


def tables_of(given: Given, tier: str | None, plan: Callable[[MaskSchedule], Plan]) -> list[Table]:
    """The tables that runs may follow: of a tier each of its own, else the one that was given.

    Args:
        given: Schedules.
        tier: Which tier of them; `None` where they are no tiers.
        plan: What makes a plan of a schedule.

    Raises:
        ScheduleMismatch: There is no such tier, or none is named of several.
    """
    if isinstance(given, Tiers):
        if tier is None or tier not in given:
            raise ScheduleMismatch(
                given="tiers, and no word of which one" if tier is None else f"tier {tier!r}",
                expected=f"one of {', '.join(map(repr, given))}",
                advice=f"Name it: apply(pipe, tiers, tier={next(iter(given))!r}), or masked.switch(...)",
            )
        return [Table([schedule], plan) for schedule in given[tier]]
    if tier is not None:
        raise ScheduleMismatch(
            given=f"tier {tier!r}, and no tiers",
            expected="stepmask.Tiers, which has schedules by name",
            advice="Apply tiers, apply(pipe, stepmask.Tiers({name: schedule, ...}), tier=name), or leave tier= out",
        )
    return [Table(schedules_of(given), plan)]


def schedules_of(given: MaskSchedule | Sequence[MaskSchedule]) -> Sequence[MaskSchedule]:
    """One schedule, or one for each branch, as several.

    Raises:
        ScheduleMismatch: It is something else: a path, a profile, tiers.
    """
    schedules = [given] if isinstance(given, MaskSchedule) else given
    if isinstance(schedules, list | tuple) and all(isinstance(schedule, MaskSchedule) for schedule in schedules):
        return schedules
    raise ScheduleMismatch(
        given=f"a {type(given).__name__} where a schedule was expected",
        expected="a MaskSchedule, or one for each branch",
        advice="Read it first: MaskSchedule.from_pretrained(folder), or Tiers.from_pretrained(folder) of several; "
        "take one out of tiers by tiers[name][0], make one of a profile by profile.schedule(budget)",
    )


def fitting(tables: Sequence[Table], steps: SetSteps) -> Table:
    """The table for a run.

    Args:
        tables: Those that there are.
        steps: As the sampler is set, of which the run may leave some out; each table is compared at its own shift.

    Raises:
        ScheduleMismatch: None fits, or several fit parts of the run.
    """
    if len(tables) == 1:
        tables[0].sampler.check_whole(steps.at(tables[0].sampler.mu))
        return tables[0]
    fits = [table for table in tables if table.sampler.is_within(steps.at(table.sampler.mu))]
    if len(fits) == 1:
        return fits[0]
    raise ScheduleMismatch(
        given=f"a run of {_told(steps.now)}, "
        + ("parts of which several tables are for" if fits else "for which none is"),
        expected="a run that one of the tier's tables is for: "
        + "; ".join(_told(table.sampler) for table in (fits or tables)),
        advice="Put tables for parts of one sampler's steps into tiers of their own"
        if fits
        else "Sample with one of these, or give the tier a table for this run",
    )


def _told(sampler: SamplerFingerprint) -> str:
    first, last = sampler.timesteps[0], sampler.timesteps[-1]
    return f"{sampler.steps} steps of a {sampler.class_name or 'loop'} from timestep {first:g} to {last:g}"
