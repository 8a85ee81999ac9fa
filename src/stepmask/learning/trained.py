"""`TrainedForecasts`: the best table to start from, its forecasts trained on the masked run itself."""

import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepmask.denoiser.identity import digest
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.trajectory import Trajectory
from stepmask.executors.filed import Kind, finish, keep, kept
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.objective import sample_errors
from stepmask.learning.placement import Refit, apart, movable, order_of, swapped
from stepmask.learning.profile import Profile
from stepmask.learning.sample_rows import SampleRows
from stepmask.learning.starts import Family, families
from stepmask.learning.sweep import sweep
from stepmask.learning.task import Task
from stepmask.learning.whole_steps import WholeSteps, output_alone
from stepmask.progress import progress
from stepmask.schedule.answers import answers
from stepmask.schedule.budget import Budget
from stepmask.schedule.course import computed_before
from stepmask.schedule.forecasts import DIFFERENCES, PACE, PLAIN, WINDOW, taylor_forecasts
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

log = logging.getLogger(__name__)

LONGEST = 3
"""Of a sample's gradient, over the median of its batch: where errors are small one hard sample would lead alone, where
they are large the hard ones must be heard (measured: docs/experiments.md)."""

PROBES, LEAST_AGES = 2, 6
"""Of the sweep that proposes uneven tables."""

JUDGES = 4
"""Trajectories on which tables of different families are compared."""

MOVES = 4
"""How often a start's rows change places at most, before it is trained."""

NEAR = 2
"""Rows of a start change places if it promises at most that many times what the best one does: moves hardly ever halve
an error, and take a run for every pair of rows (measured: docs/experiments.md)."""

RACERS, TRIAL = 3, 1 / 6
"""How many starts are trained on trial, and for what share of the iterations: what training takes off an error differs
by more than starts do, and shows early (measured: docs/experiments.md)."""


@dataclass(frozen=True)
class TrainedForecasts:
    """A table whose evaluations lie well, and then better forecasts than Taylor's.

    Fixed intervals, whole-step tables, intervals with partial evaluations between the whole ones or with one
    partial evaluation, and uneven tables that sweeps propose are compared by true runs. Three of them go on: whole
    steps that lie and are forecast as a sweep of the denoiser's output tells (`WholeSteps`), the best other uneven
    table, and the best of the rest. Of those that are not far behind, single evaluations are moved a step earlier
    or later, as long as true runs come nearer by it. The weights of every reused cell, and of computed ones that
    may blend older values in, are then trained on masked runs, by the gradient of the final latent's distance to
    the reference through the pipeline's own sampler: of all three for a sixth of the way, and of the one that is
    then ahead to the end. Each iteration takes the next trajectory: several trajectories of a few samples cost no
    more per iteration than one, and overfit less.

    Args:
        passes: What is spent on the table that is ahead: as many iterations of Adam as have the MACs of this many
            all-compute ones, so twice as many at half of the MACs. An iteration costs six to seven masked runs of a
            trajectory.
        rate: Learning rate where the start's error is 1; it goes with the fourth root of that error, for the smaller
            it is, the nearer the start's weights are to the best ones. It falls linearly to zero.
        window: How many stored values a forecast may read, 1 to 3: the memory of the store. Fewer are read where the
            budget's store has no room for as many.
    """

    passes: float = 15
    rate: float = 0.1
    window: int = WINDOW

    def learn(self, task: Task) -> MaskSchedule:
        """The table with the smallest mean error on the calibration seeds; never worse there than the best start.

        The sweep and the runs that compare tables go through the executor. Training does not: one gradient step needs
        the one before it. Its state is kept after every iteration.

        Raises:
            InvalidBudget: Not even one computed step fits, the store is too small for every regular table, or the
                budget is in time and the graph was not timed.
            LearningError: A run is not finite, or the pipeline detaches its latents.
        """
        starts = self._starts(task)
        racers = _placed(_racers(starts), min(start.promise for start in starts), task)
        best, ahead = min([*starts, *racers], key=attrgetter("error")), self._ahead(racers, task)
        start = ahead.start
        regular = [start.table] if start is best else [start.table, best.table]
        tables = [*regular, ahead.run()]
        found = calibration_errors(task, tables, range(len(task.trajectories)))
        errors = [float(torch.cat(by_trajectory).mean()) for by_trajectory in found]
        chosen = tables[int(np.argmin(errors))]
        log.info("trained on %s: error %.3g", start.table.provenance["table"], errors[-1])
        provenance = {
            **chosen.provenance,
            "learner": repr(self),
            "budget": task.budget.to_plain(),
            "calibration_error": min(errors),
            "start_error": min(errors[:-1]),
        }
        return rectify(chosen.with_rows(chosen.rows, chosen.forecasts, provenance=provenance))

    def _starts(self, task: Task) -> list["_Start"]:
        """The best table of each family, by true runs of the last trajectory, as it does on the last few."""
        *others, last = _judges(task)
        found = families(task.reference, task.budget, self.window, _blocks(task), _outputs(task, self.window))
        entered = [(family, table) for family in found for table in family.tables]
        errors = calibration_errors(task, [table for _, table in entered], [last])
        tried = [_Start(table, family, own) for (family, table), own in zip(entered, errors, strict=True)]
        best = [
            min((start for start in tried if start.family is family), key=attrgetter("promise")) for family in found
        ]
        more = calibration_errors(task, [start.table for start in best], others)
        starts = [replace(start, errors=[*own, *start.errors]) for start, own in zip(best, more, strict=True)]
        for start in starts:
            name = start.table.provenance["table"]
            log.info("%s: error %.3g, typically %.3g", name, start.error, start.typical)
        return starts

    def _ahead(self, starts: Sequence["_Start"], task: Task) -> "_Training":
        """The training that is ahead after a trial; in a run that goes on, the one that has gone further."""
        racers = [_Training(self, start, task) for start in starts]
        if further := [racer for racer in racers if racer.iteration > racer.trial]:
            return further[0]
        tables = [racer.run(racer.trial) for racer in racers]
        found = calibration_errors(task, tables, _judges(task))
        after = [
            replace(racer.start, table=table, errors=own)
            for racer, table, own in zip(racers, tables, found, strict=True)
        ]
        for start in after:
            log.info("%s: typically %.3g after a trial", start.table.provenance["table"], start.typical)
        return racers[_leader(starts, after)]

    def rates(self, share: float, error: float) -> list[float]:
        """The learning rate of every iteration, given the share that may be spent and the start's error."""
        iterations = max(1, round(self.passes / share))
        return [self.rate * float(error**0.25) * (1 - done / iterations) for done in range(iterations)]


@dataclass(frozen=True)
class _Start:
    """A table, and the errors of its samples on some trajectories, a tensor each."""

    table: MaskSchedule
    family: Family
    errors: list[Tensor]

    @property
    def error(self) -> float:
        """The mean."""
        return float(torch.cat(self.errors).mean())

    @property
    def typical(self) -> float:
        """The geometric mean: one hard sample of a few makes a mean, and training takes most off hard samples."""
        return float(torch.cat(self.errors).clamp_min(1e-12).log().mean().exp())

    @property
    def promise(self) -> float:
        """What the error may come to, to compare starts by."""
        return self.typical * self.family.handicap


def _racers(starts: Sequence[_Start]) -> list[_Start]:
    """Who is trained on trial: the uneven tables, whatever they promise, and the most promising others.

    Where it computes little the rest is easily told from what is stored, which only training shows.
    """
    return sorted(starts, key=lambda start: (not start.family.uneven, start.promise))[:RACERS]


def _leader(before: Sequence[_Start], after: Sequence[_Start]) -> int:
    """Whose table promises most, before a trial or after it, by index.

    Who starts near the best weights may be further off after a few iterations, at the rate that they begin with.
    """
    return int(np.argmin([min(start.promise, later.promise) for start, later in zip(before, after, strict=True)]))


def _judges(task: Task) -> range:
    """Trajectories on which tables are compared, by their index."""
    return range(len(task.trajectories))[-JUDGES:]


def _placed(racers: Sequence[_Start], best: float, task: Task) -> list[_Start]:
    """Those that promise about as much as the best start, with their rows moved; the others as they are."""
    return [_moved(racer, task) if racer.promise <= NEAR * best else racer for racer in racers]


def _moved(start: _Start, task: Task) -> _Start:
    """The start with pairs of adjacent rows swapped, as long as true runs come nearer to the reference by it."""
    for _ in range(MOVES):
        nearer = min(_neighbours(start, task), key=attrgetter("promise"), default=start)
        if nearer.promise >= start.promise:
            break
        start = nearer
        log.info("%s: error %.3g, typically %.3g", start.table.provenance["table"], start.error, start.typical)
    return start


def _neighbours(start: _Start, task: Task) -> list[_Start]:
    """With the pair of rows swapped that helps most, and all pairs that help: by runs of the last trajectory.

    Their forecasts are fitted if the start's are, or Taylor's, of the start's order if it has one; their errors those
    on all trajectories that judge.
    """
    refit, judges = start.family.refit or _taylor(start), _judges(task)
    singles = {
        step: swapped(start.table, [step], refit) for step in movable(start.table.rows, start.table.sampler.begins)
    }
    singles = {step: table for step, table in singles.items() if task.budget.allows(lower(table))}
    errors = calibration_errors(task, list(singles.values()), judges[-1:])
    typical = {step: replace(start, errors=own).typical for step, own in zip(singles, errors, strict=True)}
    before = replace(start, errors=start.errors[-1:]).typical
    helping = apart(sorted((step for step in singles if typical[step] < before), key=typical.__getitem__))
    tables = [swapped(start.table, chosen, refit) for chosen in (helping[:1], helping) if chosen]
    tables = [table for table in tables if task.budget.allows(lower(table))]
    found = calibration_errors(task, tables, judges)
    return [replace(start, table=table, errors=own) for table, own in zip(tables, found, strict=True)]


def _taylor(start: _Start) -> Refit:
    order = order_of(start.table)
    order = min(1, start.family.window - 1) if order is None else order
    return partial(taylor_forecasts, order=order, begins=start.table.sampler.begins)


def _outputs(task: Task, window: int) -> WholeSteps:
    """What a sweep of all trajectories tells, of the denoiser's own output alone."""
    graph, ages = output_alone(task.reference.graph), task.reference.steps - 1
    return WholeSteps.of(_swept(task, task.trajectories, graph, probes=1, ages=ages), window)


def _blocks(task: Task) -> Profile:
    """A sweep of the first trajectory, of all blocks."""
    ages = min(task.reference.steps - 1, max(LEAST_AGES, math.ceil(1.5 / task.budget.share)))
    return _swept(task, task.trajectories[:1], task.reference.graph, probes=PROBES, ages=ages)


def _swept(task: Task, trajectories: Sequence[Trajectory], graph: BlockGraph, *, probes: int, ages: int) -> Profile:
    pipe, executor, folder = trajectories[0].sampling.pipe, task.executor, task.folder
    return sweep(pipe, trajectories, graph=graph, probes=probes, ages=ages, executor=executor, folder=folder)


@dataclass(frozen=True)
class _Trial:
    """A run of one trajectory, by its index, under a table."""

    table: MaskSchedule
    trajectory: int


def calibration_errors(task: Task, tables: Sequence[MaskSchedule], trajectories: Sequence[int]) -> list[list[Tensor]]:
    """Relative errors of the final latents, of each table: of the samples of each trajectory."""
    trials = [_Trial(table, index) for table in tables for index in trajectories]
    found = finish(_trials(task), task.shared, trials, task.executor, task.folder)
    count = len(trajectories)
    return [found[place * count : (place + 1) * count] for place in range(len(tables))]


def _trials(task: Task) -> Kind[_Trial, Tensor]:
    def name(trial: _Trial) -> str:
        latent = task.trajectories[trial.trajectory].sampled.latent
        return f"trial-{digest(trial.table.to_json(), latent)}.json"

    return Kind("comparing tables", _try, name, lambda errors: json.dumps(errors.tolist()), _read_errors)


@torch.no_grad()
def _try(trajectories: Sequence[Trajectory], trial: _Trial) -> Tensor:
    trajectory = trajectories[trial.trajectory]
    with apply(trajectory.sampling.pipe, trial.table):
        latent = trajectory.sampling.latent()
    return sample_errors(latent, trajectory.sampled.latent).float().cpu()


def _read_errors(content: bytes) -> Tensor:
    return torch.tensor(json.loads(content), dtype=torch.float32)


class _Training:
    """Adam on the forecast weights of one table, in differences of stored values, one trajectory an iteration."""

    def __init__(self, learner: TrainedForecasts, start: _Start, task: Task) -> None:
        self.start, self.trajectories = start, task.trajectories
        readable = _readable(start.table, start.family.window, task.budget)
        self.reading = _reading(start.table, readable)
        self.moves = torch.tensor(readable) * torch.tensor(PACE, dtype=torch.float32)
        shared = torch.zeros(start.table.steps, 1, WINDOW, dtype=torch.float32)  # by all blocks of a step
        own = torch.zeros(*readable.shape, dtype=torch.float32)
        self.shared = shared.requires_grad_()
        self.own = own.requires_grad_()
        self.optimiser = torch.optim.Adam([self.shared, self.own], betas=(0.8, 0.95))
        self.rates = learner.rates(task.budget.share, start.error)
        self.iteration = 0
        self.rows: dict[int, SampleRows] = {}
        self.path = task.folder / f"training-{self._name()}.pt" if task.folder else None
        if self.path and self.path.exists():
            kept(self.path, self._load)
            log.info("going on at iteration %d of %d: %s", self.iteration, len(self.rates), self.path)

    @property
    def trial(self) -> int:
        """How many iterations show what training gains."""
        return math.ceil(TRIAL * len(self.rates))

    def run(self, last: int | None = None) -> MaskSchedule:
        """Train until so many iterations are done, or to the end: the start's table with trained weights."""
        last = len(self.rates) if last is None else last
        for iteration in progress(
            range(self.iteration, last), "training forecasts", initial=self.iteration, total=last
        ):
            self._step(self.trajectories[iteration % len(self.trajectories)])
            self.iteration = iteration + 1
            if self.path:
                keep(self.path, self._state())
        start, trained = self.start.table, self._weights().detach().double().numpy()
        provenance = {"table": f"trained forecasts on {start.provenance['table']}"}
        return start.with_rows(start.rows, trained, provenance=provenance)

    def _step(self, trajectory: Trajectory) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rates[self.iteration]
        weights = self._weights()
        _, gradients = loss_and_gradients(
            trajectory,
            self.reading,
            weights,
            lambda latent: _mean_distance(latent, trajectory),
            self._rows(trajectory),
        )
        self.optimiser.zero_grad()
        weights.backward(self._clipped(gradients))
        self.optimiser.step()

    def _rows(self, trajectory: Trajectory) -> SampleRows:
        """Whose sample each row is; read off the trajectory once."""
        if id(trajectory) not in self.rows:
            self.rows[id(trajectory)] = SampleRows.of(trajectory)
        return self.rows[id(trajectory)]

    def _clipped(self, gradients: Tensor) -> Tensor:
        """The sum over samples, none of them longer than `LONGEST` median ones; lengths are in what is trained."""
        lengths = ((gradients @ _differences().T) * self.moves).flatten(1).norm(dim=1)
        factors = (LONGEST * lengths.median() / lengths.clamp_min(1e-30)).clamp(max=1)
        return torch.einsum("s,skbi->kbi", factors, gradients)

    def _weights(self) -> Tensor:
        """The start's weights and what is trained, with gradients; shape (steps, blocks, 3)."""
        start = torch.tensor(self.start.table.forecasts, dtype=torch.float32)
        return start + ((self.shared + self.own) * self.moves) @ _differences()

    def _state(self) -> bytes:
        buffer = io.BytesIO()
        moved = {"shared": self.shared.detach(), "own": self.own.detach()}
        torch.save({**moved, "iteration": self.iteration, "optimiser": self.optimiser.state_dict()}, buffer)
        return buffer.getvalue()

    def _name(self) -> str:
        latents = [trajectory.sampled.latent for trajectory in self.trajectories]
        return digest(self.rates, self.start.table.to_json(), self.moves, latents)

    def _load(self, state: bytes) -> None:
        found = torch.load(io.BytesIO(state), weights_only=True)
        self.iteration = found["iteration"]
        with torch.no_grad():
            self.shared.copy_(found["shared"])
            self.own.copy_(found["own"])
        self.optimiser.load_state_dict(found["optimiser"])


def _readable(start: MaskSchedule, window: int, budget: Budget) -> npt.NDArray[np.bool_]:
    """The weights that may move, shape (steps, blocks, 3).

    Those of reused cells; and, where the budget's store has room, of computed ones: of the denoiser, whose output is
    the smallest value there is, and of blocks after two reused steps or more, whose values are stored anyway.
    """
    stored = computed_before(start.rows, start.sampler.begins)  # values older than the step's own
    reads = answers(start, start.steps - 1) != 0
    reused = reads[..., 1:].any(axis=2)
    after_two = np.zeros_like(start.rows)
    after_two[2:] = reused[1:-1] & reused[:-2]
    is_denoiser = np.arange(len(start.graph)) == len(start.graph) - 1
    for blends in (after_two | is_denoiser, is_denoiser, np.zeros_like(is_denoiser)):
        own = start.rows & blends & (stored > 0)  # what the cell computes is one more value
        readable = _first(np.where(start.rows & ~own, 0, stored + own), window)
        if budget.stores(lower(_reading(start, readable))):
            break
    return readable


def _first(values: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.bool_]:
    """As many weights of each cell as it has values, up to the window; shape (steps, blocks, 3)."""
    readable: npt.NDArray[np.bool_] = np.arange(WINDOW) < np.minimum(values, window)[..., None]
    return readable


def _reading(start: MaskSchedule, readable: npt.NDArray[np.bool_]) -> MaskSchedule:
    """The start's table, reading all values whose weights may move."""
    return start.with_rows(start.rows, np.where(readable.any(axis=2, keepdims=True), readable, PLAIN))


def _differences() -> Tensor:
    return torch.tensor(DIFFERENCES, dtype=torch.float32)


def _mean_distance(latent: Tensor, trajectory: Trajectory) -> Tensor:
    """Mean of ‖x_0 − x_0 ref‖ / ‖x_0 ref‖: not squared, so that no single hard sample decides."""
    return sample_errors(latent, trajectory.sampled.latent).clamp_min(1e-12).sqrt().mean()
