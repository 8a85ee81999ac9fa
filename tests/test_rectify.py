"""Rectification is liveness: hand-worked tables, and the plan that follows from them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from stepmask import Budget, MaskSchedule
from stepmask.errors import InvalidBudget, InvalidSchedule
from stepmask.schedule.answers import answers
from stepmask.schedule.baselines import all_reused, fixed_interval, whole_step
from stepmask.schedule.forecasts import DIFFERENCES, taylor_weights
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.show import summary

from test_schedule import schedules
from toys import bits, chain_graph, table, timed, unet_graph


def test_output_reuse_kills_what_only_it_needed() -> None:
    assert bits(rectify(table(chain_graph(4, "output"), "1111", "1101"))) == ["1111", "0001"]


def test_delta_reuse_keeps_the_stream_alive() -> None:
    assert bits(rectify(table(chain_graph(4, "delta"), "1111", "1101"))) == ["1111", "1101"]


def test_reusing_one_up_block_is_deepcache() -> None:
    # up1 reused: mid and down1 feed nobody, down0 lives through its skip to up0
    assert bits(rectify(table(unet_graph(), "11111", "11101"))) == ["11111", "10001"]


def test_a_dead_block_that_a_later_step_reuses_is_still_computed_with_what_it_reads() -> None:
    schedule = table(unet_graph(), "11111", "11101", "10011")
    assert bits(rectify(schedule)) == ["11111", "11101", "10011"]


def test_a_value_replaced_before_anyone_reuses_it_is_dead() -> None:
    # up1 is reused at step 1, so mid's value of step 1 is read by nobody: step 2 computes it again
    assert bits(rectify(table(unet_graph(), "11111", "11101", "11111", "11011"))) == [
        "11111", "10001", "11111", "11011"]  # fmt: skip


def test_a_first_order_forecast_keeps_both_its_values_alive() -> None:
    # step 2 reads mid of steps 1 and 0; at step 1 mid feeds only the reused up1, but its value is owed
    plain = table(unet_graph(), "11111", "11101", "11011")
    ahead = table(unet_graph(), "11111", "11101", "11011", weights={(2, "mid"): (2.0, -1.0)})
    assert bits(rectify(plain)) == bits(rectify(ahead)) == ["11111", "11101", "11011"]
    mid = unet_graph().column("mid")
    assert [row[mid].keeps for row in lower(plain).cells] == [0, 1, 0]
    assert [row[mid].keeps for row in lower(ahead).cells] == [1, 2, 0]


def test_a_blend_keeps_the_value_before_alive() -> None:
    # mid answers at step 2 with what it computes there and the value of step 0; step 1 keeps that for it
    blended = table(unet_graph(), "11111", "11011", "11111", weights={(2, "mid"): (0.5, 0.5)})
    mid = unet_graph().column("mid")
    cells = [row[mid] for row in lower(blended).cells]
    assert [(cell.action, cell.weights, cell.keeps) for cell in cells] == [
        ("compute", (), 1), ("reuse", (1.0,), 1), ("compute", (0.5, 0.5), 0)]  # fmt: skip
    assert [(cell.is_forecast, cell.is_blend) for cell in cells] == [(False, False), (False, False), (False, True)]
    assert "1 computed answers blended" in summary(blended)
    assert answers(blended, 2)[2, mid].tolist() == [0.5, 0.0, 0.5]


def test_skipping_the_denoiser_kills_every_block() -> None:
    schedule = table(unet_graph(), "111111", "111110")
    assert bits(rectify(schedule)) == ["11111", "00000"]
    assert lower(schedule).macs_share == 0.5


def test_a_skipped_step_may_still_refresh_a_block() -> None:
    schedule = table(unet_graph(), "111111", "111110", "110111")
    assert bits(rectify(schedule)) == ["11111", "11100", "11011"]


def test_the_glue_is_paid_wherever_the_denoiser_runs() -> None:
    # five blocks of a MAC and a millisecond each, ten in the glue. The skipped step still computes three blocks, for
    # which the denoiser runs; a step that is skipped altogether costs nothing
    *blocks, glue = unet_graph().blocks
    graph = timed(BlockGraph((*blocks, replace(glue, macs=10))), 1, 1, 1, 1, 1, 10)
    plan = lower(table(graph, "111111", "111110", "110111", "111110"))
    assert bits(rectify(table(graph, "111111", "111110", "110111", "111110"))) == ["11111", "11100", "11011", "00000"]
    assert plan.macs == 15 + 13 + 14 + 0
    assert plan.shares.tolist() == pytest.approx([1, 13 / 15, 14 / 15, 0])
    assert plan.macs_share == plan.time_share == pytest.approx(42 / 60)
    assert Budget(0.7).allows(plan)
    assert not Budget(0.69).allows(plan)
    assert not Budget(time=0.69).allows(plan)


def test_the_plan_prices_and_sizes_the_store_by_hand() -> None:
    # step 0 stores mid (4 bytes); step 1 stores it again after letting the old one go; step 2 reads it
    plan = lower(table(unet_graph(), "11111", "11111", "11011", "11011"))
    assert plan.macs == 5 + 5 + 4 + 4
    assert plan.macs_share == pytest.approx(18 / 20)
    assert plan.peak_bytes == 4
    ahead = table(unet_graph(), "11111", "11111", "11011", weights={(2, "mid"): (1.5, -0.5)})
    assert lower(ahead).peak_bytes == 8
    assert lower(table(unet_graph(), "11111", "11111")).peak_bytes == 0


@given(schedules())
def test_rectification_is_idempotent_and_never_adds(schedule: MaskSchedule) -> None:
    once = rectify(schedule)
    assert rectify(once) == once
    assert not (once.rows & ~schedule.rows).any()
    assert lower(once).macs == lower(schedule).macs
    assert [[c.keeps for c in row] for row in lower(once).cells] == [
        [c.keeps for c in row] for row in lower(schedule).cells]  # fmt: skip


class TestBaselines:
    def reference(self, steps: int) -> MaskSchedule:
        return table(unet_graph(), *["11111"] * steps)

    def test_plain_interval_by_hand(self) -> None:
        assert bits(fixed_interval(self.reference(6), 0.5)) == ["11111", "00000"] * 3
        assert bits(fixed_interval(self.reference(5), 0.4)) == ["11111", "00000", "11111", "00000", "00000"]

    def test_first_order_is_a_line_through_the_last_two_values(self) -> None:
        # values f(0) = 1, f(2) = 5 (a line of slope 2); at 3 it is 7
        weights = taylor_weights(3, [0, 2], 1)
        assert weights == (1.5, -0.5, 0.0)
        assert np.dot(weights, (5, 1, 0)) == 7

    def test_second_order_is_taylors_formula(self) -> None:
        # F = 9, F' = (9 - 4)/2 = 2.5, F'' = ((9 - 4)/2 - (4 - 1)/2)/2 = 0.5; at age 1: 9 + 2.5 + 0.25 = 11.75
        assert np.dot(taylor_weights(5, [0, 2, 4], 2), (9, 4, 1)) == pytest.approx(11.75)

    def test_the_order_is_lower_while_values_are_few(self) -> None:
        assert taylor_weights(1, [0], 2) == (1.0, 0.0, 0.0)
        assert taylor_weights(3, [0, 2], 2) == taylor_weights(3, [0, 2], 1)

    def test_weights_and_differences_by_hand(self) -> None:
        # 1.5·C − 0.5·C′ = 1·C + 0.5·(C − C′)
        np.testing.assert_array_equal(np.array([1.5, -0.5, 0.0]) @ DIFFERENCES, (1.0, 0.5, 0.0))
        np.testing.assert_array_equal(DIFFERENCES @ DIFFERENCES, np.eye(3))

    def test_forecasts_cost_memory_and_no_macs(self) -> None:
        tables = [fixed_interval(self.reference(8), 0.5, order=order) for order in (0, 1, 2)]
        # up0 alone is read at a reused step: one, two or three of its values are held
        assert [lower(t).peak_bytes for t in tables] == [4, 8, 12]
        assert len({lower(t).macs for t in tables}) == 1

    def test_whole_steps_store_one_output(self) -> None:
        schedule = whole_step(self.reference(6), 0.5, order=1)
        assert lower(schedule).peak_bytes == 2 * 4
        assert lower(schedule).macs_share == 0.5

    def test_all_reused_computes_what_its_forecast_reads(self) -> None:
        # at the second step one value is there: plain reuse needs no other, Taylor 1 a second one
        assert bits(all_reused(self.reference(3))) == ["11111", "00000", "00000"]
        assert bits(all_reused(self.reference(3), order=1)) == ["11111", "11111", "00000"]
        assert all_reused(self.reference(3)).rows[:, -1].all()  # the glue is computed
        assert all_reused(self.reference(3), order=1).forecasts[2, 0].tolist() == [2, -1, 0]

    def test_what_cannot_be_is_refused(self) -> None:
        with pytest.raises(InvalidBudget, match=r"at least 0\.2"):
            fixed_interval(self.reference(5), 0.1)
        with pytest.raises(InvalidSchedule, match="order 3"):
            whole_step(self.reference(5), 0.5, order=3)
