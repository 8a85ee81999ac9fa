"""`apply`: run a denoiser under a schedule. Holds the clock, the store, and the check that the plan was followed."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import get_ident
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from stepmask.denoiser.families import denoiser_of, fingerprint_of, scheduler_of
from stepmask.denoiser.refusals import refuse_if_cached, refuse_if_compiled, refuse_if_taken
from stepmask.denoiser.sampler import describe, timestep_of, watched
from stepmask.denoiser.seam import Behaviour, attached, seated
from stepmask.denoiser.store import Store
from stepmask.denoiser.unread import Unread, refuse_unread
from stepmask.denoiser.values import (
    each,
    first,
    forecast,
    forecast_channels,
    from_store,
    on_channels,
    placeholder,
    size,
    tensors,
    to_store,
)
from stepmask.errors import RunError, RunNotStarted, ScheduleMismatch
from stepmask.schedule.channels import reads_of
from stepmask.schedule.graph import Block
from stepmask.schedule.rectify import Cell, lower
from stepmask.schedule.schedule import MaskSchedule


def apply(pipe: Any, schedule: MaskSchedule | Sequence[MaskSchedule], *, store: Store | None = None) -> "Masked":
    """Put a schedule on a pipeline, or on a plain denoiser.

        with stepmask.apply(pipe, schedule):
            image = pipe(class_labels=[207], num_inference_steps=20).images[0]

        masked = stepmask.apply(pipe, schedule)    # or keep the handle
        masked.remove()

    A run starts when the pipeline sets its scheduler's timesteps; on a plain denoiser it starts here, and anew with
    `masked.restart()`. Weights, names and classes of the denoiser stay as they are; `remove` takes everything back.

    Args:
        pipe: A diffusers pipeline, or a plain denoiser.
        schedule: Made for this denoiser and sampler. It is rectified first, which changes no sample. Branches that are
            evaluated one after the other (guidance in two calls) share its rows; a sequence has one schedule for each,
            in the order of their calls.
        store: Where stored values lie and in which dtype; `None` = as the blocks answered them.

    Raises:
        ScheduleMismatch: The schedule is for another denoiser, or names blocks that are not there; or several are not
            one for each branch, over the same blocks and sampler.
        AlreadyApplied: The denoiser is masked, or cached by diffusers, already.
        RunError: The denoiser is compiled as a whole.
        InvalidStore: What the denoiser's device holds cannot be put into the store.
    """
    return Masked(pipe, [schedule] if isinstance(schedule, MaskSchedule) else schedule, store or Store())


class Masked:
    """A denoiser under a schedule: the handle that `apply` returns, and a context manager that removes itself.

    Leaving the context without an exception raises `RunError` if the last run ended early.
    """

    def __init__(self, pipe: Any, schedules: Sequence[MaskSchedule], store: Store) -> None:
        self.denoiser, self.scheduler = denoiser_of(pipe), scheduler_of(pipe)
        refuse_if_taken(self.denoiser)
        refuse_if_compiled(self.denoiser)
        _check_branches(schedules)
        schedule = schedules[0]
        schedule.denoiser.check(fingerprint_of(self.denoiser))
        for device in {weight.device for weight in self.denoiser.parameters() if not weight.is_meta}:
            store.check(device)
        self.store = store
        self.pipe, self.sampler, self.plans = pipe, schedule.sampler, [lower(table) for table in schedules]
        self.clock = _Clock(self)
        self.seats = [_Seat(self.clock, column, block) for column, block in enumerate(schedule.graph.blocks)]
        self.feeders = {name: _Feeder(self.clock, columns) for name, columns in schedule.graph.fed.items()}
        self.modules = _modules(self.denoiser, schedule)
        with ExitStack() as stack:
            if self.scheduler is not None:
                stack.enter_context(watched(self.scheduler, "set_timesteps", lambda *_, **__: self._start()))
                stack.enter_context(watched(self.scheduler, "step", self._check_first))
            stack.enter_context(attached(dict(zip(self.modules, self.seats[:-1], strict=True))))
            stack.enter_context(seated(self.denoiser, self.feeders))
            stack.enter_context(attached({self.denoiser: _Evaluation(self)}))
            self._stack = stack.pop_all()
        if self.scheduler is None:
            self.restart()

    def _start(self) -> None:
        self.clock.stop()
        self.sampler.check_whole(describe(self.scheduler, self.sampler.branches))
        self.restart()

    def _check_first(self, _: Any, *args: Any, **kwargs: Any) -> None:
        """Once a run, after its first step: refuse one that begins elsewhere."""
        if self.clock.evaluation != self.sampler.branches:
            return
        try:
            self.sampler.check_first(timestep_of(self.scheduler, args, kwargs))
        except ScheduleMismatch:
            self.clock.stop()
            raise

    def restart(self) -> None:
        """Begin a new run at step 0 with an empty store. A pipeline's scheduler does this by itself.

        Raises:
            AlreadyApplied: diffusers caches the denoiser by now.
            RunError: The denoiser was compiled as a whole.
        """
        refuse_if_cached(self.denoiser)
        refuse_if_compiled(self.denoiser)
        self.clock.start()

    def compile(self, **options: Any) -> None:
        """Compile every block, with the options of `torch.compile`. Masks add no graph. It outlasts `remove`.

        A block that is a single layer of torch (a projection) stays as it is: the compiler skips its forward.
        """
        for module in self.modules:
            if not type(module).__module__.startswith("torch.nn."):
                module.compile(**options)

    def remove(self) -> None:
        """Take the schedule off and free the store. Doing it twice is fine."""
        self._stack.close()
        self.clock.stop()
        for seat in self.seats:
            seat.vectors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended_early = self.clock.running and self.clock.evaluation > 0
        evaluations = self.clock.evaluation
        self.remove()
        if ended_early and error is None:
            raise RunError(
                given=f"a run that ended after {evaluations} evaluations",
                expected=f"{self.clock.evaluations}, as many as the schedule has",
                advice="Use a schedule learned for this number of steps (img2img: for this strength)",
            )

    @property
    def store_bytes(self) -> int:
        """What the store holds now."""
        return sum(size(value) for seat in self.seats for held in seat.stored for value in held)

    @property
    def peak_store_bytes(self) -> int:
        """The most that the store has held since this schedule was applied, all branches together."""
        return self.clock.peak_bytes

    @property
    def vector_bytes(self) -> int:
        """What the per-channel weights and biases hold now, besides the store; they stay until `remove`."""
        return sum(size(vectors) for seat in self.seats for vectors in seat.vectors.values())

    @property
    def computed_macs(self) -> int:
        """MACs of the blocks that were really run since this schedule was applied, at the traced shape."""
        return sum(seat.computed * seat.block.macs for seat in self.seats)


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


def _modules(denoiser: nn.Module, schedule: MaskSchedule) -> list[nn.Module]:
    modules = dict(denoiser.named_modules())
    names = schedule.graph.names[:-1]
    if missing := [name for name in (*names, *schedule.graph.fed) if name not in modules]:
        raise ScheduleMismatch(
            given=f"a {type(denoiser).__name__} without {missing[0]!r}",
            expected=f"the {len(names)} blocks of the schedule, and the modules that feed them",
            advice="Apply the schedule to the denoiser it was made for, or learn a new one",
        )
    return [modules[name] for name in names]


class _Clock:
    """Which evaluation a run is at, and the row that it follows."""

    def __init__(self, masked: Masked) -> None:
        self.masked = masked
        self.branches = masked.sampler.branches
        self.evaluations = masked.sampler.steps * self.branches
        self.running = False
        self.evaluation = self.step = self.branch = 0
        self.thread: int | None = None  # whose run it is
        self.answered = 0  # blocks that have answered in this evaluation
        self.shapes: list[tuple[tuple[int, ...], ...]] = [()] * self.branches  # of this run's latents
        self.held_bytes = self.peak_bytes = 0
        self.row: tuple[Cell, ...] = ()

    def start(self) -> None:
        self.stop()
        self.running, self.evaluation, self.thread = True, 0, None

    def stop(self) -> None:
        self.running, self.held_bytes = False, 0
        for seat in self.masked.seats:
            seat.clear(self.branches)

    def begin(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Turn to the row of the next evaluation, of a latent of these shapes."""
        if not self.running or self.masked.scheduler is not scheduler_of(self.masked.pipe):
            raise RunNotStarted(
                given="an evaluation of the masked denoiser outside a run",
                expected=f"a run of {self.evaluations} evaluations that starts with the scheduler's set_timesteps, "
                "or with masked.restart()",
                advice="Call restart() before each run of a plain denoiser; apply the schedule again after you "
                "replace the scheduler",
            )
        self.thread = self.thread or get_ident()
        if self.thread != get_ident():
            raise RunError(
                given="an evaluation from another thread than the one that began the run",
                expected="one run at a time, for it has one store",
                advice="Give each thread a pipeline and a denoiser of its own, or let them take turns",
            )
        self.step, self.branch = divmod(self.evaluation, self.branches)
        if self.step and shapes != self.shapes[self.branch]:
            self.stop()
            raise RunError(
                given=f"a latent of shape {shapes} at step {self.step}",
                expected=f"the shape that the run began with, {self.shapes[self.branch]}, batch size included",
                advice="Keep guidance on or off for the whole run",
            )
        self.shapes[self.branch] = shapes
        self.row, self.answered = self.masked.plans[self.planned].cells[self.step], 0

    @property
    def planned(self) -> int:
        """Which of the plans this evaluation follows."""
        return self.branch % len(self.masked.plans)

    def end(self, *, forward_ran: bool) -> None:
        """Check that every block has answered, and go on to the next evaluation."""
        if forward_ran and self.answered != len(self.row) - 1:
            raise RunError(
                given=f"{self.answered} blocks called at step {self.step}",
                expected=f"{len(self.row) - 1} blocks, each once, as the plan has it",
                advice="The denoiser takes another path than when it was traced: trace and learn with these inputs",
            )
        self.evaluation += 1
        self.running = self.evaluation < self.evaluations

    def hold(self, change: int) -> None:
        """Count what enters and leaves the store."""
        self.held_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


class _Seat(Behaviour):
    """Stands in front of one block: computes, answers from the store, or answers with what nobody reads."""

    def __init__(self, clock: _Clock, column: int, block: Block) -> None:
        self.clock, self.column, self.block = clock, column, block
        self.computed = 0
        self.stored: list[list[Any]] = [[]]  # by branch, newest first, as the store holds them
        self.like: Any = None  # an expanded zero of the output's shape
        self.vectors: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by plan and step, where the values are

    def clear(self, branches: int) -> None:
        self.stored, self.like = [[] for _ in range(branches)], None

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cell = self.clock.row[self.column]
        self.clock.answered += 1
        if cell.action == "compute":
            return self.compute(cell, call(*args, **kwargs), args, kwargs)
        if cell.action == "dead":
            self.free(cell.keeps)
            return self.like
        return self.reuse(cell, args, kwargs)

    def compute(self, cell: Cell, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer with what was computed, or a blend of it; store it, if a later step reads it."""
        self.computed += 1
        if self.like is None:
            self.like = each(placeholder, output)
        value = to_store(self.block.reuse, output, args, kwargs) if cell.keeps or cell.weights else None
        if cell.weights:
            blend = forecast(cell.weights, [value, *self.newest(len(cell.weights) - 1)])
            output = from_store(self.block.reuse, blend, args, kwargs)
        self.free(max(cell.keeps - 1, 0))
        if cell.keeps:
            held = self.clock.masked.store.put(value)
            self.stored[self.clock.branch].insert(0, held)
            self.clock.hold(size(held))
        return output

    def reuse(self, cell: Cell, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer from the store; what is read for the last time leaves it."""
        if cell.vectors is None:
            answer = forecast(cell.weights, self.newest(len(cell.weights)))
        else:
            stored = self.newest(reads_of(cell.vectors))
            answer = forecast_channels(self.vectors_for(stored[0]), stored)
        self.free(cell.keeps)
        return from_store(self.block.reuse, answer, args, kwargs)

    def newest(self, count: int) -> list[Any]:
        """The newest stored values, newest first, as the block said them."""
        return [self.clock.masked.store.take(held) for held in self.stored[self.clock.branch][:count]]

    def vectors_for(self, value: Any) -> tuple[Tensor, ...]:
        """The vectors of this step; those of all steps are brought to the value when the first is needed."""
        key = self.clock.planned, self.clock.step
        like, held = next(tensors(value)), self.vectors.get(key)
        if held is None or (held[0].device, held[0].dtype) != (like.device, like.dtype):
            arrays = {
                (number, step): vectors
                for number, plan in enumerate(self.clock.masked.plans)
                for step, row in enumerate(plan.cells)
                if (vectors := row[self.column].vectors) is not None
            }
            self.vectors = dict(zip(arrays, on_channels(list(arrays.values()), like), strict=True))
        return self.vectors[key]

    def free(self, keeps: int) -> None:
        """Let go of all but the newest `keeps` values."""
        held = self.stored[self.clock.branch]
        while len(held) > keeps:
            self.clock.hold(-size(held.pop()))


class _Feeder(Behaviour):
    """Stands in front of a module that only blocks read: lets it be called where one of them is computed."""

    def __init__(self, clock: _Clock, columns: Sequence[int]) -> None:
        self.clock, self.columns = clock, columns
        self.unread: dict[int, Any] = {}  # by branch: what stands for the output

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        clock = self.clock
        if not any(clock.row[column].action == "compute" for column in self.columns):
            return self.unread[clock.branch]
        output = call(*args, **kwargs)
        if clock.step == 0:  # where everything is computed
            self.unread[clock.branch] = each(Unread.of, output)
        return output


class _Evaluation(Behaviour):
    """Stands in front of the denoiser: turns the clock, and answers the whole step from the store where told to."""

    def __init__(self, masked: Masked) -> None:
        self.masked = masked

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        clock, seat = self.masked.clock, self.masked.seats[-1]
        clock.begin(tuple(tuple(tensor.shape) for tensor in first(args, kwargs)))
        cell = clock.row[-1]
        needed = any(other.action == "compute" for other in clock.row)
        try:
            output = call(*args, **kwargs) if needed else None
            refuse_unread(output)
            if cell.action == "compute":
                output = seat.compute(cell, output, args, kwargs)
            else:
                self.free_dead(clock, needed)
                output = seat.reuse(cell, args, kwargs)
            clock.end(forward_ran=needed)
        except BaseException:
            clock.stop()
            raise
        return output

    def free_dead(self, clock: _Clock, forward_ran: bool) -> None:
        """Blocks that were not called let go of their values here."""
        if not forward_ran:
            for seat, cell in zip(self.masked.seats[:-1], clock.row, strict=False):
                seat.free(cell.keeps)
