"""Where evaluations lie: tables by hand, and rows that change places until a run is exact."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stepmask
from stepmask import MaskSchedule
from stepmask.executors.local import LocalExecutor
from stepmask.learning.placement import apart, later, movable, order_of, swapped
from stepmask.learning.starts import Family
from stepmask.learning.task import Task
from stepmask.learning.trained import _moved, _placed, _Start, calibration_errors
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.budget import Budget
from stepmask.schedule.fingerprint import DenoiserFingerprint
from stepmask.schedule.forecasts import taylor_forecasts
from stepmask.schedule.rectify import lower

from toys import Drift, chain_graph, sampler


def full(steps: int) -> MaskSchedule:
    return MaskSchedule.all_compute(chain_graph(2, "output"), DenoiserFingerprint("Toy"), sampler(steps))


class TestLater:
    def test_the_last_evaluation_lies_at_every_step_after_its_own(self) -> None:
        tables = later(whole_step(full(9), 0.34, order=1), 1)  # steps 0, 3 and 6
        assert [np.flatnonzero(table.rows[:, -1]).tolist() for table in tables] == [[0, 4, 7], [0, 4, 8]]
        assert [table.provenance["table"] for table in tables] == [f"whole-step, Taylor 1, to step {s}" for s in (7, 8)]

    def test_the_denoiser_itself_stays_as_it_was(self) -> None:
        (table,) = later(fixed_interval(full(8), 0.5), 0)  # steps 0, 2, 4 and 6
        assert np.flatnonzero(table.rows[:, 0]).tolist() == [0, 2, 5, 7]
        assert table.rows[:, -1].all()

    @pytest.mark.parametrize("share", [0.125, 1.0])
    def test_a_single_evaluation_and_all_of_them_have_no_other_place(self, share: float) -> None:
        assert later(whole_step(full(8), share), 0) == []

    @given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 2))
    def test_they_cost_the_same(self, steps: int, count: int, order: int) -> None:
        table = whole_step(full(steps), min(count, steps) / steps, order=order)
        plan = lower(table)
        assert all(lower(other).macs_share == pytest.approx(plan.macs_share) for other in later(table, order))


class TestSwapped:
    def test_by_hand(self) -> None:
        table = whole_step(full(7), 0.43, order=1)  # steps 0, 2 and 4
        assert np.flatnonzero(table.rows[:, -1]).tolist() == [0, 2, 4]
        assert movable(table.rows) == [1, 2, 3, 4]
        taylor = partial(taylor_forecasts, order=1)
        moved = swapped(table, [1, 4], taylor)
        assert np.flatnonzero(moved.rows[:, -1]).tolist() == [0, 1, 5]
        assert moved.forecasts[6, -1].tolist() == [1.25, -0.25, 0]  # of steps 5 and 1
        assert (
            moved.provenance["table"]
            == swapped(moved, [2], taylor).provenance["table"]
            == "whole-step, Taylor 1, moved"
        )

    def test_the_first_named_of_two_that_touch_is_kept(self) -> None:
        assert apart([4, 3, 7, 6, 1, 5]) == [4, 7, 1]

    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_the_order_is_read_off_the_weights(self, order: int) -> None:
        assert order_of(fixed_interval(full(9), 0.34, order=order)) == order

    def test_other_weights_have_no_order(self) -> None:
        table = whole_step(full(8), 0.5)
        assert order_of(table.with_rows(table.rows, 0.9 * table.forecasts)) is None


@pytest.fixture(scope="module")
def late() -> tuple[_Start, Task]:
    """A start whose evaluations lie evenly, of a denoiser that changes late."""
    # D(1, t) = 3 + t, and t goes from 0 to 1 at step 6 of 8: what is computed at 4 is stale from there on, at 5 as well
    denoiser = Drift()

    def run() -> Tensor:
        return sum((denoiser(torch.ones(1, 3), float(step >= 6)) for step in range(8)), torch.zeros(1, 3))

    trajectory = stepmask.record(denoiser, run=run, branches=1)  # evaluations that do not depend on each other
    graph = stepmask.trace(denoiser, trajectory, blocks="*")
    reference = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    task = Task([trajectory], reference, Budget(macs=0.4), LocalExecutor(), None)
    table = whole_step(reference, 0.4)  # steps 0, 2 and 5
    return _Start(table, Family([table]), calibration_errors(task, [table], [0])[0]), task


def test_an_evaluation_moves_to_where_the_denoiser_changes(late: tuple[_Start, Task]) -> None:
    start, task = late
    moved = _moved(start, task)
    assert start.error > 0.001
    assert moved.error == 0
    assert np.flatnonzero(moved.table.rows[:, -1]).tolist() == [0, 2, 6]


def test_who_is_far_behind_the_best_start_stays_where_it_is(late: tuple[_Start, Task]) -> None:
    start, task = late
    [near], [far] = (_placed([start], best, task) for best in (0.6 * start.promise, 0.4 * start.promise))
    assert near.error == 0
    assert far is start
