"""`Run`: where a masked run is, which row it follows, and what it holds. Hooks read it and write to it."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from threading import get_ident
from typing import Any, NamedTuple

from torch import Tensor

from stepmask.denoiser.batch import Batch, Shapes
from stepmask.denoiser.branches import BranchOrder, PartOrder
from stepmask.denoiser.held import Held, Owner
from stepmask.denoiser.modes import usable
from stepmask.denoiser.store import Store
from stepmask.denoiser.unread import Unread, forget_reads, last_read
from stepmask.denoiser.values import rebuilt, tensors
from stepmask.errors import RunError, RunNotStarted, StepmaskError
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.rectify import Cell, Plan


class Run:
    """One run after the other of a masked denoiser.

    Args:
        plans: What each branch follows; one for all, or one each.
        sampler: How many steps and branches a run has, and at which timesteps.
        store: Where stored values lie.
        is_stepped: Whether a scheduler tells when a step ends.
    """

    def __init__(
        self, plans: Sequence[Plan], sampler: SamplerFingerprint, store: Store, *, is_stepped: bool = False
    ) -> None:
        self.store = store
        self.is_stepped = is_stepped
        self.names = [block.label for block in plans[0].graph.blocks]
        self.shared = [block.shared for block in plans[0].graph.blocks]
        self.stand_in: Callable[[Tensor], Tensor] = Unread.of  # makes what stands for a tensor that nobody reads

        # Where the run is.
        self.running = False
        self.evaluation = 0
        self.step = 0
        self.branch = 0
        self.since_step = 0  # evaluations since the scheduler's last step
        self.thread: int | None = None  # whose run it is

        # The present evaluation.
        self.row: tuple[Cell, ...] = ()  # empty between evaluations
        self.batch = Batch(0, ())
        self.share: int | Fraction = 1  # of a whole batch
        self.refused: StepmaskError | None = None  # what a block has refused, whoever caught it
        self.answered: list[bool] = []  # by column

        # What is held, by branch and column, and what is known of it.
        self.stored: list[list[list[Held]]] = []  # newest first
        self.unread: list[list[Any]] = []  # what stands for an output that nobody reads
        self.shapes: list[list[Any]] = []  # of the outputs, with their dtypes
        self.owners: list[Owner] = []  # by column
        self.calls: list[_LastCall | None] = []  # by branch
        self.bytes = 0
        self.peak_bytes = 0
        self.follow(plans, sampler)

    def follow(self, plans: Sequence[Plan], sampler: SamplerFingerprint) -> None:
        """Turn to other plans over the same blocks, from the next run on; nothing is held then."""
        self.plans = plans
        self.sampler = sampler
        self.branches = sampler.branches
        self.order = sampler.evaluations  # step and branch of each
        self.evaluations = len(self.order)
        self.branch_order = BranchOrder(self.branches)
        self.part_order = PartOrder() if sampler.course.parts > 1 else None
        self.forwards = [[any(cell.action == "compute" for cell in row) for row in plan.cells] for plan in plans]
        self.stop()

    def start(self) -> None:
        """Begin a new run at step 0 with an empty store."""
        self.clear()
        self.running = True
        self.evaluation = 0
        self.since_step = 0
        self.thread = None

    def stop(self) -> None:
        """End the run where it is, and free the store."""
        self.clear()
        self.running = False
        self.row = ()

    def clear(self) -> None:
        """Let go of all that is held."""
        columns = range(len(self.names))
        self.stored = [[[] for _ in columns] for _ in range(self.branches)]
        self.unread = [[None for _ in columns] for _ in range(self.branches)]
        self.shapes = [[None for _ in columns] for _ in range(self.branches)]
        self.owners = [Owner() for _ in columns]
        self.calls = [None] * self.branches
        self.bytes = 0

    def _clear_branch(self, branch: int) -> None:
        """Let go of all that is held of a branch."""
        columns = range(len(self.names))
        self.bytes -= sum(held.bytes for column in self.stored[branch] for held in column)
        self.stored[branch] = [[] for _ in columns]
        self.unread[branch] = [None for _ in columns]
        self.shapes[branch] = [None for _ in columns]
        self.owners = [Owner() for _ in columns]
        self.calls[branch] = None

    @property
    def plan(self) -> int:
        """Which of the plans the present branch follows."""
        return self.branch % len(self.plans)

    @property
    def begins(self) -> bool:
        """Whether the run begins at the present step, or begins anew: everything is computed."""
        return self.step in self.sampler.begins

    @property
    def runs_forward(self) -> bool:
        """Whether the present row computes anything at all."""
        return self.forwards[self.plan][self.step]

    def will_compute(self, columns: Sequence[int]) -> bool:
        """Whether what is left of a step, seen between evaluations, computes one of some blocks.

        The denoiser's own glue runs where any block is computed. Outside of runs, and inside evaluations, nothing is
        known that is not computed.

        Args:
            columns: Of the blocks.
        """
        if not self.running or self.row or self.thread not in (None, get_ident()):
            return True
        step, _ = self.order[self.evaluation]
        plans = {branch % len(self.plans) for at, branch in self.order[self.evaluation :] if at == step}
        if len(self.names) - 1 in columns:
            return any(self.forwards[plan][step] for plan in plans)
        return any(self.plans[plan].cells[step][column].action == "compute" for plan in plans for column in columns)

    def begin(self, rows: int, latents: Shapes, timestep: float | None, network: int = 0) -> None:
        """Turn to the row of the next evaluation.

        Args:
            rows: How many it is given.
            latents: Shapes of what it is given.
            timestep: Of this evaluation, where it is to be compared.
            network: Which of the pipeline's networks evaluates.

        Raises:
            RunNotStarted: There is no run, or it has had all its evaluations.
            RunError: Its latents have changed their shape where the schedule knows of no change, another network
                evaluates, the timestep is that of the first step, or the scheduler should have made a step before it.
            ScheduleMismatch: The timestep is not the schedule's.
        """
        if not self.running:
            raise RunNotStarted(
                given="an evaluation of the masked denoiser outside a run",
                expected=f"a run of {self.evaluations} evaluations that starts with the scheduler's set_timesteps, "
                "or with masked.restart()",
                advice="Call restart() before each run of a plain denoiser; apply the schedule again after you "
                "replace the scheduler",
            )
        self.thread = get_ident()
        step, branch = self.order[self.evaluation]
        if self.is_stepped and self.since_step and step != self.step:
            raise self._uneven(f"evaluation {self.since_step + 1} of the denoiser within step {self.step}")
        self.step = step
        self.branch = branch
        if timestep is not None:
            self._check_timestep(timestep)
        batch = Batch(rows, self.sampler.parts(step, branch))
        self._turn(_LastCall(batch, latents, network))
        self.row = self.plans[self.plan].cells[self.step]
        self.answered = [False] * len(self.row)
        self.refused = None
        forget_reads()

    def _turn(self, call: "_LastCall") -> None:
        """Turn to the batch of the next evaluation: what is held of other branches, or before a beginning, goes."""
        before = self.calls[self.branch]
        if self.begins:
            self._check_rows(call)
            self._clear_branch(self.branch)
        elif before is not None:
            self._check_call(before, call)
            if call.batch.present != before.batch.present:
                unread = zip(self.unread[self.branch], self.shared, strict=True)
                self.unread[self.branch] = [call.batch.part_of(value, before.batch, own) for value, own in unread]
                self.shapes[self.branch] = [None] * len(self.names)

        # Branches that are over.
        if self.branches > 1:
            for branch in {*range(self.branches)} - {*self.sampler.present(self.step)}:
                if self.calls[branch] is not None:
                    self._clear_branch(branch)

        self.batch = call.batch
        self.calls[self.branch] = call
        parts = self.sampler.course.parts
        self.share = 1 if parts == 1 else Fraction(len(call.batch.present), parts)

    def _check_rows(self, call: "_LastCall") -> None:
        """Refuse a call that begins the run anew with another batch than its parts have had."""
        before = next((last for last in self.calls if last is not None), None)
        if self.step == 0 or before is None or self.branches > 1:
            return
        rows = before.batch.rows * len(call.batch.present) // len(before.batch.present)
        if call.batch.rows != rows:
            raise RunError(
                given=f"{call.batch.rows} rows at step {self.step}, where guidance begins",
                expected=f"{rows}, as in the run that the schedule was learned from",
                advice="Begin guidance at the step at which it began there",
            )

    def _check_call(self, before: "_LastCall", call: "_LastCall") -> None:
        """Refuse a call that is not as the one of the step before, but for the parts that its batch has lost."""
        if call.network != before.network:
            raise RunError(
                given=f"another network than before at step {self.step}",
                expected="the network of the step before, whose values are stored",
                advice="Use a schedule that was recorded with networks that take turns at the same steps (Wan 2.2: "
                "the same boundary_ratio and number of steps)",
            )
        rows = before.batch.rows * len(call.batch.present) // len(before.batch.present)
        if call.batch.rows != rows or call.without_rows() != before.without_rows():
            raise RunError(
                given=f"a latent of shape {call.latents} at step {self.step}",
                expected=f"the shape that the step before had, {before.latents}, batch size included"
                if rows == before.batch.rows
                else f"{rows} rows of what the step before had, {before.latents}: there the schedule's guidance ends",
                advice="Keep guidance on or off as in the run that the schedule was learned from",
            )

    def _check_timestep(self, timestep: float) -> None:
        if self.step and self.sampler.is_at(0, timestep) and not self.sampler.is_at(self.step, timestep):
            raise RunError(
                given=f"timestep {timestep:g}, with which a run begins, at step {self.step} of one",
                expected=f"timestep {self.sampler.timesteps[self.step]:g}",
                advice="Call masked.restart() before each run of a plain denoiser, also after one that was cut short",
            )
        self.sampler.check_step(self.step, timestep)

    def check_thread(self) -> None:
        """Refuse an evaluation from another thread than the one that began the run, which goes on.

        Raises:
            RunError: It is.
        """
        if self.running and self.thread not in (None, get_ident()):
            raise RunError(
                given="an evaluation from another thread than the one that began the run",
                expected="one run at a time, for it has one store",
                advice="Give each thread a pipeline and a denoiser of its own, or let them take turns",
            )

    def end(self) -> None:
        """Go on to the next evaluation, if every block has answered where forward ran.

        Raises:
            RunError: One has not; or one has refused to, and the denoiser went on (`except RuntimeError`).
        """
        if refused := self.refused or last_read():
            raise refused
        if self.runs_forward and not all(self.answered[:-1]):
            missing = [name for name, answered in zip(self.names, self.answered[:-1], strict=False) if not answered]
            raise RunError(
                given=f"block {missing[0]!r}, which was not called at step {self.step}"
                + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
                expected=f"{len(self.row) - 1} blocks, each called once, as the plan has it",
                advice="The denoiser takes another path than when it was traced: trace and learn with these inputs",
            )
        self.row = ()
        self.evaluation += 1
        self.since_step += 1
        self.running = self.evaluation < self.evaluations

    def end_step(self) -> None:
        """Check that the scheduler's step comes after as many evaluations as a step has.

        Before the first evaluation of a run it may be the step of another pipeline that shares the scheduler.

        Raises:
            RunError: It comes after others.
        """
        is_ours = self.running and self.evaluation > 0
        if self.since_step != self.calls_of_step and (self.since_step or is_ours):
            raise self._uneven(f"a step of the scheduler after {self.since_step} evaluations of the denoiser")
        self.since_step = 0

    @property
    def calls_of_step(self) -> int:
        """How many calls of the denoiser the present step has."""
        return len(self.sampler.branches_at(self.step))

    def _uneven(self, given: str) -> RunError:
        varies = self.branches > 1 and bool(self.sampler.course.present)
        where = f"at step {self.step}" if varies else "at every step"
        return RunError(
            given=given,
            expected=f"{self.calls_of_step} {where}, as the schedule has it",
            advice="Switch guidance on or off as in the runs that the schedule was learned from",
        )

    def answer(self, column: int) -> Cell:
        """Note that a block is called, and tell what it does.

        Raises:
            RunError: It was called before in this evaluation, or outside of one.
        """
        if not self.row:
            raise outside_error(self.names[column])
        if self.answered[column]:
            raise RunError(
                given=f"block {self.names[column]!r}, which is called twice at step {self.step}",
                expected=f"{len(self.row) - 1} blocks, each called once, as the plan has it",
                advice="The denoiser takes another path than when it was traced: trace and learn with these inputs",
            )
        self.answered[column] = True
        return self.row[column]

    def note_failure(self, column: int, error: Exception) -> None:
        """Note that a block has failed, or refused: the denoiser may catch that and go on, the run may not.

        Args:
            column: The block's.
            error: What it raised; the first one of an evaluation is the reason.
        """
        if self.refused is not None:
            return
        if isinstance(error, StepmaskError):
            self.refused = error
            return
        self.refused = RunError(
            given=f"block {self.names[column]!r}, which failed at step {self.step} ({type(error).__name__}: {error}), "
            "and a denoiser that went on without it",
            expected="every block's answer, for it may be stored",
            advice="Mend the failure, or mask the module that catches it",
        )

    def put(self, column: int, value: Any) -> None:
        """Hold a block's newest value.

        Raises:
            RunError: It has other shapes than the block's values before.
        """
        self._check_shapes(column, value)
        held = Held.of(usable(self.store.put(rebuilt(value))), self.batch)
        self._check_memory(column, held)
        self.stored[self.branch][column].insert(0, held)
        self.bytes += held.bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _check_memory(self, column: int, new: Held) -> None:
        """Refuse a value in memory that a held one lies in: that was overwritten, counted by torch or not."""
        held = {part.untyped_storage()._cdata for value in self.stored[self.branch][column] for part in value.parts}
        if held and not held.isdisjoint(part.untyped_storage()._cdata for part in new.parts):
            raise RunError(
                given=f"block {self.names[column]!r}, which answers at step {self.step} in memory that it answered in "
                "before, and did not at the first steps of this run",
                expected="new memory for each output, or the same from the first on",
                advice="Warm up CUDA graphs before the run",
            )

    def _check_shapes(self, column: int, value: Any) -> None:
        shapes = tuple((*tensor.shape, tensor.dtype) for tensor in tensors(value))
        before = self.shapes[self.branch][column]
        if before is not None and shapes != before:
            raise RunError(
                given=f"block {self.names[column]!r}, which answers with shape and dtype {shapes} at step {self.step}",
                expected=f"those that it answered with before, {before}",
                advice="A prefix cache (use_kv_cache) makes the first step unlike the others: sample without it, or "
                "use a schedule of whole steps",
            )
        self.shapes[self.branch][column] = shapes

    def newest(self, column: int, count: int) -> list[Any]:
        """The newest stored values of a block, newest first.

        Raises:
            RunError: One was written to since it was stored, or the run has been restarted by somebody else.
        """
        held = self.stored[self.branch][column]
        if len(held) < count:
            raise RunError(
                given=f"block {self.names[column]!r} at step {self.step}, whose values are gone",
                expected="one run at a time, for it has one store",
                advice="Let runs take turns, and begin no other one inside a run",
            )
        values = []
        for value in held[:count]:
            value.check(self.names[column])
            taken = rebuilt(self.store.take(value.value))
            values.append(
                taken if value.batch == self.batch else self.batch.part_of(taken, value.batch, self.shared[column])
            )
        return values

    def free(self, column: int, keeps: int) -> None:
        """Let go of all but the newest `keeps` values of a block."""
        held = self.stored[self.branch][column]
        while len(held) > keeps:
            self.bytes -= held.pop().bytes

    def held_tensors(self) -> list[Tensor]:
        """All that is stored now."""
        return [part for branch in self.stored for column in branch for held in column for part in held.parts]


class _LastCall(NamedTuple):
    """The last call of a branch: what the next one is compared with.

    Args:
        batch: Its rows, and which parts of a guided batch they were.
        latents: Shapes of what it was given.
        network: Which of the pipeline's networks was called.
    """

    batch: Batch
    latents: Shapes
    network: int

    def without_rows(self) -> Shapes:
        """The shapes but for their rows; of latents in a list, no more than that they are in one."""
        if len(self.latents) == self.batch.rows > 1:
            return ()
        return tuple(shape[1:] for shape in self.latents)


def outside_error(block: str) -> RunNotStarted:
    """The error of a block that is called by somebody else than the masked denoiser."""
    return RunNotStarted(
        given=f"a call of block {block!r} outside an evaluation of the masked denoiser",
        expected="blocks that are called by the denoiser, in the thread that runs it",
        advice="Remove the schedule before you call blocks yourself, and let runs take turns",
    )
