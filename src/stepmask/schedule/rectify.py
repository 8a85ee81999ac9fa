"""Rectification: liveness over (step, block), and the plan that a runtime follows.

Unroll the schedule into a node per step and block. A computed value is read at its own step by the blocks downstream,
and at later steps through reuse. Walking backwards from the denoiser's outputs finds what nobody reads: computations
that are dead within their step (spatial) and values that are replaced before anyone reuses them (temporal). Dropping
them changes no sample. This is the "knowledge-guided mask rectification" of arXiv 2603.19939 as we read its abstract:
"prune redundant spatial-temporal dependencies".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import compress
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stepmask.schedule.channels import Vectors, bytes_of
from stepmask.schedule.forecasts import PLAIN
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.limits import MAX_BRANCHES
from stepmask.schedule.schedule import MaskSchedule

Action = Literal["compute", "reuse", "dead"]

Kind = Literal["compute", "blend", "reuse", "forecast", "dead"]
"""What a cell does, as a person is shown it."""


class Cell(NamedTuple):
    """What one block does at one step.

    Args:
        action: "compute" runs it, "reuse" answers from the store, "dead" answers with a placeholder nobody reads.
        weights: Of the values it answers with, newest first; none if it answers with what it computes.
        keeps: How many of its newest values the store holds after this step.
        vectors: Of a per-channel forecast, which has no weights: (reads + 1, channels), the biases last.
    """

    action: Action
    weights: tuple[float, ...]
    keeps: int
    vectors: Vectors | None = None

    @property
    def is_forecast(self) -> bool:
        """Whether it is reused, and answers with more than one stored value, or channel by channel."""
        return self.action == "reuse" and (len(self.weights) > 1 or self.vectors is not None)

    @property
    def is_blend(self) -> bool:
        """Whether it is computed, and answers with more than that."""
        return self.action == "compute" and bool(self.weights)

    @property
    def kind(self) -> Kind:
        """The action, forecasts and blends told apart."""
        return "forecast" if self.is_forecast else "blend" if self.is_blend else self.action


@dataclass(frozen=True)
class Plan:
    """A schedule lowered for the runtime.

    Args:
        graph: The blocks.
        cells: What each block does, by step and column.
        loads: What each step evaluates at most, as a share of the fullest, shape (steps,): where guidance has ended,
            a block costs less.
    """

    graph: BlockGraph
    cells: tuple[tuple[Cell, ...], ...]
    loads: npt.NDArray[np.float64]

    @cached_property
    def computed(self) -> npt.NDArray[np.bool_]:
        """What answers with what it computes, shape (steps, blocks)."""
        return np.array([[cell.action == "compute" for cell in row] for row in self.cells])

    @cached_property
    def paid(self) -> npt.NDArray[np.bool_]:
        """What is run, shape (steps, blocks); the denoiser's own glue counts also where it runs for a block alone."""
        paid = self.computed.copy()
        paid[:, -1] = self.computed.any(axis=1)
        return paid

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """MACs of each step over those of the fullest, all computed, shape (steps,)."""
        return np.asarray((self.paid * self.graph.costs).sum(axis=1) * self.loads)

    @property
    def macs(self) -> int:
        """MACs of the whole run at the traced shape, of one branch at each step."""
        macs = [block.macs for block in self.graph.blocks]
        total = Fraction()
        for load, row in zip(self.loads.tolist(), self.paid.tolist(), strict=True):
            total += Fraction(load).limit_denominator(MAX_BRANCHES) * sum(compress(macs, row))
        return round(total)

    @property
    def macs_share(self) -> float:
        """MACs of the run over those of the reference."""
        return self.share(self.graph.costs)

    @property
    def time_share(self) -> float:
        """Time of the run over that of the reference, as the graph's blocks were measured.

        Raises:
            NotTimed: The blocks' times were not measured.
        """
        return self.share(self.graph.times)

    def share(self, costs: npt.NDArray[np.float64]) -> float:
        """What the run computes over what the reference does.

        Args:
            costs: Of each block as a share of an evaluation, shape (blocks,).
        """
        return float((self.paid * costs * self.loads[:, None]).sum() / self.loads.sum())

    @cached_property
    def peak_bytes(self) -> int:
        """Largest size of the store during the run, per branch, at the traced shape and dtype."""
        return self.peak_of([block.bytes for block in self.graph.blocks])

    def peak_of(self, sizes: Sequence[int]) -> int:
        """Largest size of the store during the run, per branch.

        Args:
            sizes: Of one stored value of each block, in bytes.
        """
        size = peak = 0
        held = [0] * len(self.graph)
        for row in self.cells:
            for column, (bytes_each, cell) in enumerate(zip(sizes, row, strict=True)):
                size += (cell.keeps - held[column]) * bytes_each
                held[column] = cell.keeps
                peak = max(peak, size)
        return peak

    @cached_property
    def vector_bytes(self) -> int:
        """Size of all per-channel weights and biases; they come on top of the store.

        They are shared by the branches and stay for the whole run.
        """
        columns = zip(self.graph.blocks, zip(*self.cells, strict=True), strict=True)
        return sum(bytes_of(cell.vectors, block) for block, cells in columns for cell in cells
                   if cell.vectors is not None)  # fmt: skip


def rectify(schedule: MaskSchedule) -> MaskSchedule:
    """Drop the computations that nothing reads. Samples stay the same; no bit is added; where runs begin all stay."""
    live, _ = _liveness(schedule, _output_alone(schedule))
    weights = np.where(live[..., None], schedule.forecasts, PLAIN)
    channels = {cell: vectors for cell, vectors in schedule.channels.items() if live[cell]}
    return schedule.with_rows(schedule.rows & live, weights, channels=channels, provenance=schedule.provenance)


def lower(schedule: MaskSchedule) -> Plan:
    """The plan of a schedule after rectification."""
    return _plan(schedule, _output_alone(schedule))


def lower_whole(schedule: MaskSchedule) -> Plan:
    """The plan that drops nothing: it computes whatever a row says, read or not. To prove what `lower` drops."""
    return _plan(schedule, np.ones(len(schedule.graph), dtype=bool))


def _output_alone(schedule: MaskSchedule) -> npt.NDArray[np.bool_]:
    """The column of the denoiser, whose output the sampler reads, shape (blocks,)."""
    return np.array([*[False] * (len(schedule.graph) - 1), True])


def _plan(schedule: MaskSchedule, wanted: npt.NDArray[np.bool_]) -> Plan:
    live, keeps = _liveness(schedule, wanted)
    return Plan(
        schedule.graph,
        tuple(
            tuple(_cell(schedule, step, column, live, keeps) for column in range(len(schedule.graph)))
            for step in range(schedule.steps)
        ),
        schedule.sampler.loads,
    )


def _cell(
    schedule: MaskSchedule, step: int, column: int, live: npt.NDArray[np.bool_], keeps: npt.NDArray[np.int64]
) -> Cell:
    kept = int(keeps[step, column])
    if not live[step, column]:
        return Cell("dead", (), kept)
    if schedule.rows[step, column]:
        blended = tuple(schedule.forecasts[step, column]) != PLAIN
        window = schedule.windows[step, column] + 1 if blended else 0
        return Cell("compute", tuple(schedule.forecasts[step, column, :window].tolist()), kept)
    if (step, column) in schedule.channels:
        return Cell("reuse", (), kept, schedule.channels[step, column])
    window = schedule.windows[step, column]
    return Cell("reuse", tuple(schedule.forecasts[step, column, :window].tolist()), kept)


def _liveness(
    schedule: MaskSchedule, wanted: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """What is read at all, and how many stored values are still owed to later steps; both (steps, blocks).

    Args:
        schedule: The table.
        wanted: The columns that are read at every step, whatever else is, shape (blocks,).

    `owed[b]` counts the newest computations of block b that later cells read. Windows end at the newest value, so the
    largest demand contains the others, and a computation meets one unit of it.
    """
    live = np.zeros(schedule.rows.shape, dtype=bool)
    keeps = np.zeros(schedule.rows.shape, dtype=np.int64)
    owed = np.zeros(len(schedule.graph), dtype=np.int64)
    for step in reversed(range(schedule.steps)):
        keeps[step] = owed
        live[step] = _live_row(schedule, step, owed, wanted.copy())
    return live, keeps


def _live_row(
    schedule: MaskSchedule, step: int, owed: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Live cells of one step; updates `owed` from what later steps need to what this step and they need."""
    graph = schedule.graph
    row = schedule.rows[step]
    live = wanted.copy()
    begins = step in schedule.sampler.begins  # there all are computed, and show what stands for them later
    for column in reversed(range(len(graph))):
        live[column] = wanted[column] or (row[column] and (owed[column] > 0 or begins))
        if not live[column]:
            continue
        if row[column] or graph.blocks[column].reuse == "delta":
            wanted |= graph.reads[column]
        if row[column]:
            owed[column] = max(owed[column] - 1, 0)
        owed[column] = max(owed[column], schedule.windows[step, column])
    return live
