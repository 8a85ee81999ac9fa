"""From a profile to a table within a budget: exact shortest paths over ages, against the regular tables."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidBudget, InvalidSchedule
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.budget import Budget, too_small_a_share, too_small_a_store
from stepmask.schedule.forecasts import PLAIN
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule

if TYPE_CHECKING:
    from stepmask.learning.profile import Profile

BISECTIONS = 30
PRICES = (1e-14, 1e8)
"""Of computing the whole denoiser once, in relative squared error of the final sample: lowest and highest."""

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def allocate(profile: "Profile", budget: Budget) -> MaskSchedule:
    """The candidate within a budget whose predicted error is smallest.

    Candidates: shortest paths of every block on its own, of all blocks tied together, of each block whose reuse lets
    others die (the denoiser itself among them) alone, and the regular tables. Where the store is limited, the same
    paths with plain reuse too, which reads one stored value instead of two.

    Raises:
        InvalidBudget: No table with ages that the profile knows reaches the share, or all that do need a larger store.
        NotTimed: The budget is in time, and the blocks were not timed.
    """
    candidates = [*paths(profile, budget), *_regular(profile, budget)]
    if not candidates:
        why = f"the least that values up to {profile.ages} steps old allow"
        least = min(family.least for family in _families(profile, budget))
        raise too_small_a_share(budget, least, why=why, instead="sweep with more ages")
    stored = [candidate for candidate in candidates if budget.stores(lower(candidate[1]))]
    if not stored:
        raise too_small_a_store(budget, min(lower(table).peak_bytes for _, table in candidates))
    error, best = min(stored, key=lambda candidate: candidate[0])
    origin = {"sweep": dict(profile.provenance), "budget": budget.to_plain(), "predicted_error": error}
    return rectify(best.with_rows(best.rows, best.forecasts, provenance={**best.provenance, **origin}))


def paths(profile: "Profile", budget: Budget) -> list[tuple[float, MaskSchedule]]:
    """The tables of shortest paths that meet a budget's share, with their predicted errors, the smallest first.

    Raises:
        NotTimed: As `allocate`.
    """
    tables = [family.within(budget) for family in _families(profile, budget)]
    found = [(profile.predicted_error(table), table) for table in tables if table is not None]
    return sorted(found, key=lambda candidate: candidate[0])


@dataclass(frozen=True)
class CellErrors:
    """The error that each cell adds, were it alone, by the age of the value it reuses and the gap to the one before.

    Args:
        errors: (steps, columns, ages + 1, ages + 1), [age, gap]: mean of (offset + change)² − offset²; age 0 computes,
            gap 0 reuses the newest value as it is.
        kappas: As `errors`: the length of the forecast C + κ·(C − C′) that makes the error smallest.
    """

    errors: Floats
    kappas: Floats

    @classmethod
    def of(cls, changes: Floats, offset: Floats) -> "CellErrors":
        """In closed form: κ = −mean((s + offset)·d) / mean(d²) with s the change and d that of C − C′.

        Args:
            changes: (rows, steps, columns, ages + 1): change of each measurement when a cell answers with the value
                of an age.
            offset: (rows,).
        """
        ages = changes.shape[-1] - 1
        by_cell = changes.transpose(1, 2, 0, 3)  # (steps, columns, rows, ages + 1)
        second = by_cell.swapaxes(2, 3) @ by_cell / len(offset)  # (steps, columns, ages + 1, ages + 1)
        first = np.tensordot(by_cell, offset, axes=(2, 0)) / len(offset)  # (steps, columns, ages + 1)
        plain = np.einsum("kbaa->kba", second) + 2 * first
        errors, kappas = np.repeat(plain[..., None], ages + 1, axis=3), np.zeros(second.shape)
        for age in range(1, ages):
            for gap in range(1, ages - age + 1):
                old = age + gap
                energy = second[..., age, age] - 2 * second[..., age, old] + second[..., old, old]
                slope = second[..., age, age] - second[..., age, old] + first[..., age] - first[..., old]
                safe = np.where(energy > 1e-30, energy, np.inf)
                kappas[..., age, gap] = -slope / safe
                errors[..., age, gap] -= slope**2 / safe
        return cls(errors, kappas)

    @property
    def plain(self) -> "CellErrors":
        """The same with plain reuse alone: no forecast reads the value before the newest."""
        return CellErrors(np.broadcast_to(self.errors[..., :1], self.errors.shape), np.zeros_like(self.kappas))


def shortest_paths(errors: Floats, prices: Floats, begins: Sequence[int] = (0,)) -> Bools:
    """For every column the rows that minimise Σ error + price of each computation, exactly; shape (steps, columns).

    Dynamic programming over states (age of the newest value, gap to the value before), O(steps · ages²) a column.

    Args:
        errors: (steps, columns, ages + 1, ages + 1), as in `CellErrors`.
        prices: (steps, columns), of one computation; (columns,) where it is the same at all steps.
        begins: Steps at which a run begins, or begins anew: all is computed there, and nothing older is read later.
    """
    steps, columns, width, _ = errors.shape
    prices = np.broadcast_to(prices, (steps, columns))
    cost = np.full((columns, width, width), np.inf)
    cost[:, 0, 0] = prices[0]  # step 0 is computed
    came = np.zeros((steps, columns, width), dtype=np.int64)  # the gap from which an age was left to compute
    left = {}  # the state from which a run began anew, by step: (columns,), flat
    for step in range(1, steps):
        if step in begins:
            left[step] = cost.reshape(columns, -1).argmin(axis=1)
            best = cost.min(axis=(1, 2)) + prices[step]
            cost = np.full_like(cost, np.inf)
            cost[:, 0, 0] = best
            continue
        came[step] = cost.argmin(axis=2)
        leave = cost.min(axis=2) + errors[step, :, 0, :1] + prices[step][:, None]  # (columns, ages + 1)
        cost[:, 1:] = cost[:, :-1] + errors[step, :, 1:]
        cost[:, 0, 1:] = leave[:, :-1]
        cost[:, 0, 0] = leave[:, -1]  # the value before is too old for a forecast
    return _walk_back(cost, came, left)


def _walk_back(cost: Floats, came: Ints, left: Mapping[int, Ints]) -> Bools:
    steps, columns, width = came.shape
    each = np.arange(columns)
    age, gap = np.unravel_index(cost.reshape(columns, -1).argmin(axis=1), (width, width))
    rows = np.zeros((steps, columns), dtype=bool)
    for step in reversed(range(steps)):
        rows[step] = age == 0
        if step in left:
            age, gap = np.unravel_index(left[step], (width, width))
            continue
        before = np.where(gap == 0, width - 1, gap - 1)  # the age that was left to compute
        gap = np.where(age == 0, came[step, each, before], gap)
        age = np.where(age == 0, before, age - 1)
    return rows


@dataclass(frozen=True)
class _Family:
    """Tables made of shortest paths of some columns; everything else is computed.

    Args:
        reference: Any table of the denoiser and sampler.
        name: For the provenance.
        cells: By path.
        members: Path of each block, shape (blocks,); −1 = always computed.
        costs: (blocks,), of each block as a share of an evaluation, in the budget's currency.
        prices: (paths,), what a computation is taken to cost, as a share of an evaluation.
        saved: (paths,), the share that reusing a path saves at a step; `None` where savings do not add up.

    Where guidance has ended, a step costs less, and saves less.
    """

    reference: MaskSchedule
    name: str
    cells: CellErrors
    members: Ints
    costs: Floats
    prices: Floats
    saved: Floats | None

    def table(self, paths: Bools) -> MaskSchedule:
        """The table of some paths, shape (steps, paths)."""
        rows = np.ones(self.reference.rows.shape, dtype=bool)
        weights = np.tile(PLAIN, (*rows.shape, 1))
        blocks = np.flatnonzero(self.members >= 0)
        rows[:, blocks] = paths[:, self.members[blocks]]
        kappas, begins = self.cells.kappas, self.reference.sampler.begins
        weights[:, blocks] = _forecasts(paths, kappas, begins)[:, self.members[blocks]]
        return self.reference.with_rows(rows, weights, provenance={"table": self.name})

    def share(self, paths: Bools) -> float:
        """Share that the table of some paths computes after rectification."""
        if self.saved is None:
            return lower(self.table(paths)).share(self.costs)
        loads = self.reference.sampler.loads
        return float(1 - ((~paths * self.saved).sum(axis=1) * loads).sum() / loads.sum())

    def paths(self, price: float) -> Bools:
        """The shortest paths where computing everything at a whole step has a price, shape (steps, paths)."""
        sampler = self.reference.sampler
        return shortest_paths(self.cells.errors, price * sampler.loads[:, None] * self.prices, sampler.begins)

    @property
    def least(self) -> float:
        """The smallest share that any table of the family computes."""
        return self.share(self.paths(PRICES[1]))

    def within(self, budget: Budget) -> MaskSchedule | None:
        """The table at the lowest price that meets a budget; `None` where none does."""
        best, (low, high) = None, np.log(PRICES)
        for _ in range(BISECTIONS):
            price = high if best is None else (low + high) / 2
            paths = self.paths(float(np.exp(price)))
            if budget.covers(self.share(paths)):
                best, high = paths, price
            elif best is None:
                return None
            else:
                low = price
        return None if best is None else self.table(best)


def _families(profile: "Profile", budget: Budget) -> Iterator[_Family]:
    for family in _forecasting_families(profile, budget):
        yield family
        if budget.store_bytes is not None:
            yield replace(family, name=f"{family.name}, plain reuse", cells=family.cells.plain)


def _forecasting_families(profile: "Profile", budget: Budget) -> Iterator[_Family]:
    graph, columns = profile.graph, np.arange(len(profile.graph))
    offset = profile.offset.astype(float)
    blocks = CellErrors.of(_changes(profile, budget.share)[:, :, :-1], offset)  # the others are computed that often
    cells = CellErrors.of(_changes(profile, 1.0), offset)
    own = budget.costs(graph)
    saved = np.array([saves(graph, column, own) for column in range(len(graph))])
    adds_up = bool(np.allclose(own[:-1], saved[:-1]))
    alone, together = np.append(columns[:-1], -1), np.append(columns[:-1] * 0, -1)
    make = partial(_Family, profile.around, costs=own)
    yield make("sweep, a path per block", blocks, alone, prices=own[:-1], saved=own[:-1] if adds_up else None)
    if not adds_up:
        yield make("sweep, a path per block with what dies", blocks, alone, prices=saved[:-1], saved=None)
    tied = CellErrors.of(_changes(profile, 0.0)[:, :, :-1].sum(axis=2, keepdims=True), offset)
    total = own[:-1].sum(keepdims=True)
    yield make("sweep, one path for all blocks", tied, together, prices=np.ones(1), saved=total)
    for column in np.flatnonzero((saved > own + 1e-12) | (columns == len(graph) - 1)):
        lone = CellErrors(cells.errors[:, [column]], cells.kappas[:, [column]])
        name = f"sweep, a path for {graph.blocks[column].label}"
        yield make(name, lone, np.where(columns == column, 0, -1), prices=np.ones(1), saved=saved[[column]])


def _changes(profile: "Profile", share: float) -> Floats:
    """Change of each measurement when a cell answers with the value of an age, by the share computed downstream."""
    inner = profile.mixed(np.array([[share]]))
    changes: Floats = inner - (inner * profile.base).sum(axis=3, keepdims=True)
    return changes


def saves(graph: BlockGraph, column: int, costs: Floats) -> float:
    """The share of `costs`, (blocks,), that a step saves when one block is reused, with the blocks that die of it."""
    wanted = np.zeros(len(graph), dtype=bool)
    wanted[-1] = True
    for reader in reversed(range(len(graph))):
        if wanted[reader] and (reader != column or graph.blocks[reader].reuse == "delta"):
            wanted |= graph.reads[reader]
    wanted[column] = False
    return float(costs[~wanted].sum())


def _forecasts(rows: Bools, kappas: Floats, begins: Sequence[int]) -> Floats:
    """Weights (1 + κ, −κ, 0) of every reused cell, shape (steps, columns, 3)."""
    weights = np.tile(PLAIN, (*rows.shape, 1))
    newest, before = np.zeros(rows.shape[1], dtype=np.int64), np.full(rows.shape[1], -kappas.shape[2])
    each = np.arange(rows.shape[1])
    for step in range(1, len(rows)):
        if step in begins:
            newest[:], before[:] = step, -kappas.shape[2]
            continue
        age, gap = step - newest, newest - before
        known = ~rows[step] & (age + gap < kappas.shape[2])
        kappa = np.where(known, kappas[step, each, age * known, gap * known], 0.0)
        weights[step, :, 0], weights[step, :, 1] = 1 + kappa, -kappa
        before, newest = np.where(rows[step], newest, before), np.where(rows[step], step, newest)
    return weights


def _regular(profile: "Profile", budget: Budget) -> Iterator[tuple[float, MaskSchedule]]:
    """The baselines that fit a budget with their predicted errors, as far as the profile knows their ages."""
    glue = budget.costs(profile.graph)[-1]
    within_glue = (budget.share - glue) / max(1 - glue, 1e-9)  # fixed intervals compute the glue at every step
    for baseline, share in ((fixed_interval, within_glue), (whole_step, budget.share)):
        for order in range(3):
            with suppress(InvalidBudget, InvalidSchedule):
                table = baseline(profile.around, min(max(share, 1e-9), 1.0), order=order)
                yield profile.predicted_error(table), table
