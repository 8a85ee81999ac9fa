"""`apply`: put a schedule on a pipeline, and take it off again."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import nn

from stepmask.denoiser.companions import beside
from stepmask.denoiser.families import companions_of, denoisers_of, fingerprint_of, scheduler_of
from stepmask.denoiser.other_caches import refuse_other_caches
from stepmask.denoiser.placement import networks_of
from stepmask.denoiser.refusals import (
    refuse_cuda_graphs,
    refuse_if_counted_otherwise,
    refuse_if_replaced,
    refuse_if_taken,
)
from stepmask.denoiser.regions import compile_repeated, unwrapped
from stepmask.denoiser.replay import Values
from stepmask.denoiser.run import Run
from stepmask.denoiser.sampler import SetSteps, timestep_of, watched
from stepmask.denoiser.store import Store
from stepmask.denoiser.tables import Given, Table, fitting, tables_of
from stepmask.denoiser.values import size
from stepmask.errors import RunError, ScheduleMismatch
from stepmask.schedule.rectify import Plan, lower
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.tiers import Tiers

log = logging.getLogger(__name__)


def apply(pipe: Any, schedule: Given, *, tier: str | None = None, store: Store | None = None) -> "Masked":
    """Put a schedule on a pipeline, or on a plain denoiser.

        with stepmask.apply(pipe, schedule):
            image = pipe(class_labels=[207], num_inference_steps=20).images[0]

        masked = stepmask.apply(pipe, schedule)    # or keep the handle
        masked.remove()

        masked = stepmask.apply(pipe, tiers, tier="fast")    # or one of several, to be switched between runs
        masked.switch("quality")

    A run starts when the pipeline sets its scheduler's timesteps; on a plain denoiser it starts here, and anew with
    `masked.restart()`. Weights, names and classes of the denoiser stay as they are; `remove` takes everything back, in
    any order with other schedules. Copies and pickles of the denoiser are bare.

    Args:
        pipe: A diffusers pipeline, or a plain denoiser.
        schedule: Made for this denoiser and sampler. It is rectified first, which changes no sample. Branches that are
            evaluated one after the other (guidance in two calls) share its rows; a sequence has one schedule for each,
            in the order of their calls. Of `Tiers` each run follows the table of its tier that fits the sampler.
        tier: Which of the tiers.
        store: Where stored values lie and in which dtype; `None` = as the blocks answered them.

    Raises:
        ScheduleMismatch: The schedule is for another denoiser, or names blocks that are not there; it was made with a
            ControlNet, and the pipeline has none; or several are not one for each branch, over the same blocks and
            sampler; or there is no such tier, or it has several tables where no scheduler tells which one a run needs.
        AlreadyApplied: The denoiser is masked, or cached by something else, already.
        RunError: The denoiser is compiled as a whole, and would need too many graphs; or something else has replaced
            the `forward` of a block inside a compiled region.
        InvalidStore: What the denoiser's device holds cannot be put into the store.
    """
    masked = Masked(pipe, schedule, store or Store(), tier=tier)
    for name in {*companions_of(pipe)} - {companion.name for companion in masked.beside}:
        log.warning("The schedule was made without the %s: it is not skipped at any step, and not counted.", name)
    return masked


class Masked:
    """A denoiser under a schedule: the handle that `apply` returns, and a context manager that removes itself.

    Leaving the context without an exception raises `RunError` if the last run ended early, unless the pipeline was
    told to interrupt it. It is logged as a warning if nothing was evaluated at all.
    """

    def __init__(
        self,
        pipe: Any,
        given: Given,
        store: Store,
        *,
        tier: str | None = None,
        plan: Callable[[MaskSchedule], Plan] = lower,
    ) -> None:
        self.pipe = pipe
        self.scheduler = scheduler_of(pipe)
        self.store = store
        denoisers = denoisers_of(pipe)
        refuse_other_caches(pipe)
        for denoiser in denoisers:
            refuse_if_taken(denoiser)
        self.tiers = given if isinstance(given, Tiers) else None
        self._plan = plan
        self.fingerprint = fingerprint_of(denoisers[0])  # all are alike
        self.tables = self._checked(tables_of(given, tier, plan))
        self._known = {} if tier is None else {tier: self.tables}
        self.table = self.tables[0]
        schedule = self.table.schedules[0]
        for device in {weight.device for part in denoisers for weight in part.parameters() if not weight.is_meta}:
            store.check(device)

        self.sampler = schedule.sampler
        self.plans = self.table.plans
        self.steps: SetSteps | None = None  # to which the scheduler was set for the present run
        self.run = Run(self.plans, self.sampler, store, is_stepped=self.scheduler is not None)
        self.networks = networks_of(denoisers, self.run, schedule.graph)
        self.beside = beside(pipe, self.run, schedule.graph)
        self._stack = self._put_on()
        self._is_on = True
        if self.scheduler is None:
            self.restart()

    @property
    def denoiser(self) -> nn.Module:
        """The masked network, the first of several."""
        return self.networks[0].denoiser

    @property
    def hooks(self) -> list[Values]:
        """What stands in front of blocks and of denoisers, of all networks."""
        return [hook for network in self.networks for hook in (*network.blocks, network.own)]

    def _checked(self, tables: list[Table]) -> list[Table]:
        """Tables that this denoiser can follow."""
        for table in tables:
            _check_branches(table.schedules)
            table.schedules[0].denoiser.check(self.fingerprint)
            _check_scheduler(table.schedules[0], self.scheduler)
        if self.scheduler is None and len(tables) > 1:
            raise ScheduleMismatch(
                given=f"a denoiser alone, and a tier with {len(tables)} tables",
                expected="one, for there is no scheduler to tell which one a run needs",
                advice="Make a tier of each table, and switch between them",
            )
        return tables

    def _put_on(self) -> ExitStack:
        """Attach the hooks, and watch the scheduler and the pipeline; what is returned takes it all back."""
        with ExitStack() as stack:
            for network in self.networks:
                stack.callback(network.placement.take_off)
                network.placement.put()
            for companion in self.beside:
                stack.callback(companion.take_off)
                companion.put()
            if self.scheduler is not None:
                stack.enter_context(watched(self.scheduler, "set_timesteps", self._start))
                stack.enter_context(watched(self.scheduler, "step", self._end_step))
            if hasattr(self.pipe, "maybe_free_model_hooks"):  # the last that diffusers' pipelines do in a call
                stack.enter_context(watched(self.pipe, "maybe_free_model_hooks", lambda *_, **__: self._end_call()))
            return stack.pop_all()

    def _start(self, _: Any, *args: Any, **kwargs: Any) -> None:
        """The pipeline has set its scheduler's timesteps."""
        self.run.stop()
        self._follow_denoisers()
        self.steps = SetSteps(self.scheduler, args, kwargs)
        self._follow(fitting(self.tables, self.steps))
        self.restart()

    def switch(self, to: str | MaskSchedule | Sequence[MaskSchedule]) -> None:
        """Follow another tier, or another schedule of the same denoiser and graph, from the next run on.

        Compiled regions stay compiled. Nothing of the table before stays stored.

        Args:
            to: The name of one of the tiers that were applied; or a schedule, or one for each branch.

        Raises:
            ScheduleMismatch: There is no such tier, or the schedule is of another denoiser, graph or scheduler.
            RunError: A run has begun and has not ended; or the schedule was taken off.
        """
        self._check_between_runs()
        tables = self._of_tier(to) if isinstance(to, str) else self._checked(tables_of(to, None, self._plan))
        for table in tables:
            _check_alike(table.schedules[0], self.table.schedules[0])
        self.tables = tables
        self.run.stop()
        self._follow(tables[0])
        if self.scheduler is None:
            self.restart()

    def _of_tier(self, tier: str) -> list[Table]:
        """The tables of a tier, whose plans are made once, however often it is switched to."""
        if tier not in self._known:
            given = self.table.schedules if self.tiers is None else self.tiers
            self._known[tier] = self._checked(tables_of(given, tier, self._plan))
        return self._known[tier]

    def _check_between_runs(self) -> None:
        if not self._is_on:
            raise RunError(
                given="a switch after the schedule was taken off",
                expected="a masked denoiser",
                advice="Apply the other schedule",
            )
        if self.run.running and (self.run.evaluation or self.run.row):
            raise RunError(
                given=f"a switch inside a run, after {self.run.evaluation} of {self.run.evaluations} evaluations",
                expected="one between two runs, for what is stored belongs to its table",
                advice="Let the run end; if it was cut short, call masked.stop() first",
            )

    def _follow(self, table: Table) -> None:
        """Turn to a table: that of the run that begins."""
        if table is self.table:
            return
        self.table = table
        self.sampler = table.sampler
        self.plans = table.plans
        self.run.follow(self.plans, self.sampler)
        for network in self.networks:
            network.placement.turn()

    def _follow_denoisers(self) -> None:
        """Turn to the compiled forms of the denoisers that somebody has put into the pipeline, if there are any.

        Raises:
            RunError: The pipeline has another denoiser.
        """
        now = denoisers_of(self.pipe)
        refuse_if_counted_otherwise(now, [network.denoiser for network in self.networks])
        for network, denoiser in zip(self.networks, now, strict=True):
            if denoiser is not network.denoiser:
                refuse_if_replaced(denoiser, network.denoiser)
                network.follow(denoiser)

    def _end_step(self, _: Any, *args: Any, **kwargs: Any) -> None:
        """The scheduler has made a step: it must be the schedule's."""
        try:
            self.run.end_step()
            if self.run.evaluation and self.run.step == 0:
                timestep = timestep_of(self.scheduler, args, kwargs)
                places = None if self.steps is None else self.steps.places(timestep, self.sampler.mu)
                self.sampler.check_first(timestep, places)
        except (RunError, ScheduleMismatch):
            self.run.stop()
            raise

    def _end_call(self) -> None:
        """The pipeline's call is over: what a cancelled run has stored is freed.

        Raises:
            RunError: The run has not called the denoiser.
        """
        if _is_interrupted(self.pipe):
            self.run.stop()
        if self.run.running and self.run.evaluation == 0:
            self.run.stop()
            raise RunError(
                given=f"a run of a {type(self.pipe).__name__} that did not call its {type(self.denoiser).__name__}",
                expected=f"{self.run.evaluations} evaluations, through the denoiser's own call",
                advice="Let the pipeline call the module itself, not its forward or a wrapper of it",
            )

    def restart(self) -> None:
        """Begin a new run at step 0 with an empty store. A pipeline's scheduler does this by itself.

        Raises:
            AlreadyApplied: Something else caches the denoiser by now.
            RunError: The denoiser was compiled as a whole, and would need too many graphs.
            ScheduleMismatch: A block is not there any more, or a network beside the denoiser.
        """
        self.run.stop()
        refuse_other_caches(self.pipe)
        for network in self.networks:
            network.placement.put()
        for companion in self.beside:
            companion.put()
        self.run.start()

    def stop(self) -> None:
        """End the run where it is, and free its store: after a call of the pipeline that an exception has left.

        The next run begins as ever. One in which the denoiser itself has failed is stopped already, and so is one that
        was told to interrupt.
        """
        self.run.stop()

    def compile(self, **options: Any) -> None:
        """Compile the repeated modules around masked blocks, and the blocks that lie in none. It outlasts `remove`.

            masked = stepmask.apply(pipe, schedule)
            masked.compile(fullgraph=True)

        Masks are traced with them: all layers of a class share a graph for each pattern of computed blocks and stored
        values that are read. A single layer of torch (a projection) stays as it is.

        Args:
            **options: Of `torch.compile`.

        Raises:
            RunError: The options ask for CUDA graphs, and the denoiser is on such a device; or all blocks are layers of
                torch itself.
        """
        for network in self.networks:
            refuse_cuda_graphs(network.denoiser, options)
        for network in self.networks:
            network.placement.take_off()
            try:
                compile_repeated(network.denoiser, [hook.block.name for hook in network.blocks], **options)
            finally:
                network.placement.put()

    def remove(self) -> None:
        """Take the schedule off and free the store. Doing it twice is fine."""
        self._stack.close()
        self._is_on = False
        self.run.stop()
        for network in self.networks:
            network.placement.turn()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RunError(
            given="a copy or a pickle of the handle of a masked denoiser",
            expected="one handle for each",
            advice="Copy the denoiser, which gives a bare one, and apply the schedule to the copy",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        evaluations = self.run.evaluation
        if kind is None and not any(network.own.was_called for network in self.networks):
            log.warning(
                "A %s was under a schedule that nothing used: it was not evaluated. If your loop calls a copy of it "
                "(an EMA, another pipeline), apply the schedule to that one.",
                type(unwrapped(self.denoiser)).__name__,
            )
        ended_early = self.run.running and evaluations > 0 and not _is_interrupted(self.pipe)
        self.remove()
        if ended_early and error is None:
            raise RunError(
                given=f"a run that ended after {evaluations} evaluations",
                expected=f"{self.run.evaluations}, as many as the schedule has",
                advice="Use a schedule learned for this number of steps (img2img: for this strength)",
            )

    @property
    def store_bytes(self) -> int:
        """What the store holds now."""
        return self.run.bytes

    @property
    def peak_store_bytes(self) -> int:
        """The most that the store has held since this schedule was applied, all branches together."""
        return self.run.peak_bytes

    @property
    def vector_bytes(self) -> int:
        """What the per-channel weights and biases hold now, besides the store; they stay until `remove`."""
        return sum(size(vectors) for hook in self.hooks for vectors in hook.vectors.values())

    @property
    def computed_macs(self) -> int:
        """MACs of the blocks that were really run since this schedule was applied, at the traced shape."""
        return round(sum(hook.computed * hook.block.macs for hook in self.hooks))


def _is_interrupted(pipe: Any) -> bool:
    """Whether a pipeline was told, in a callback, to let the rest of its run be."""
    return bool(getattr(pipe, "_interrupt", False))


def _check_branches(schedules: Sequence[MaskSchedule]) -> None:
    """Refuse several schedules that are not one for each branch of the same sampler, over the same blocks."""
    made_for = [(schedule.graph, schedule.denoiser, schedule.sampler) for schedule in schedules]
    alike = all(other == made_for[0] for other in made_for)
    if not schedules or not alike or len(schedules) not in (1, schedules[0].sampler.branches):
        raise ScheduleMismatch(
            given=f"{len(schedules)} schedules",
            expected="one, or as many as a step has branches, over the same graph, denoiser and sampler",
            advice="Pass a single schedule, or make them from one: schedule.with_rows(...)",
        )


def _check_alike(schedule: MaskSchedule, other: MaskSchedule) -> None:
    """Refuse a schedule over another graph than that of the masked denoiser, whose blocks have the hooks."""
    if not schedule.is_like(other):
        raise ScheduleMismatch(
            given=f"{schedule!r}, over another graph than the schedule before",
            expected="the same blocks, as they were traced",
            advice="Learn all schedules from one graph; or take this one off, and apply the other",
        )


def _check_scheduler(schedule: MaskSchedule, scheduler: Any) -> None:
    """Refuse a scheduler's schedule where no scheduler tells when a run starts, and at which timesteps."""
    if schedule.sampler.class_name and scheduler is None:
        raise ScheduleMismatch(
            given=f"a denoiser alone, and a schedule for steps of a {schedule.sampler.class_name}",
            expected="the pipeline, whose scheduler tells when a run starts and what its timesteps are",
            advice="Apply the schedule to the pipeline, or to any object with this denoiser and its scheduler as "
            "attributes; or learn one for the denoiser alone, with record(denoiser, run=...)",
        )
