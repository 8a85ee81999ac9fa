"""Budgets of MACs, of measured time and of the store: by hand on toys, measured on toys and on a tiny real pipeline."""

import json
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stepmask
from stepmask import BlockGraph, Budget, MaskSchedule, Trajectory
from stepmask.denoiser import clock
from stepmask.denoiser.timing import _shared_out, time_blocks
from stepmask.errors import AlreadyApplied, InvalidBudget, InvalidSchedule, NoSuchBlock, NotTimed, RunError, TraceError
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.rounding import round_scores
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.graph import Block
from stepmask.schedule.rectify import lower
from stepmask.schedule.show import summary

from toys import Chain, Drift, Scale, bits, chain_graph, table, timed, unet_graph

QUICK = TrainedForecasts(passes=1.2)


def timed_unet() -> BlockGraph:
    """1 ms each but 2 for down1, 3 for mid and 2 for the glue: 10 together."""
    return timed(unet_graph(), 1, 2, 3, 1, 1, 2)


class TestBudget:
    def test_shares_by_hand(self) -> None:
        # mid is reused once in two steps: 1 of 10 MACs and 3 of 20 ms are saved, and 4 bytes are stored
        plan = lower(table(timed_unet(), "11111", "11011"))
        assert plan.time_share == pytest.approx(17 / 20)
        assert plan.macs_share == pytest.approx(9 / 10)
        assert Budget(time=0.85).allows(plan)
        assert not Budget(time=0.84).allows(plan)
        assert not Budget(macs=0.85).allows(plan)
        assert Budget(macs=0.9).allows(plan)

    def test_a_share_is_kept_to_rounding_and_no_further(self) -> None:
        assert Budget(0.3).covers(0.1 + 0.2)  # 0.30000000000000004
        assert not Budget(0.3).covers(0.3 + 1e-6)
        # half of the run's two million MACs, and one more
        block, glue = Block("a", (), "output", 999_999), Block("", ("a",), "output", 1)
        graph = BlockGraph((block, glue))
        assert Budget(0.5).allows(lower(table(graph, "11", "00")))
        assert not Budget(0.5).allows(lower(table(graph, "11", "01")))

    def test_the_store_is_limited_beside_the_share(self) -> None:
        plan = lower(table(timed_unet(), "11111", "11011"))
        assert Budget(time=0.85, store_bytes=4).allows(plan)
        assert not Budget(time=0.85, store_bytes=3).allows(plan)
        assert not Budget(time=0.84, store_bytes=4).allows(plan)

    def test_costs_are_in_its_own_currency(self) -> None:
        np.testing.assert_allclose(Budget(macs=0.5).costs(timed_unet()), [0.2, 0.2, 0.2, 0.2, 0.2, 0])
        np.testing.assert_allclose(Budget(time=0.5).costs(timed_unet()), [0.1, 0.2, 0.3, 0.1, 0.1, 0.2])

    def test_a_bare_share_is_one_of_macs(self) -> None:
        assert Budget.of(0.5) == Budget(macs=0.5)
        assert Budget.of(limits := Budget(time=0.5, store_bytes=9)) is limits
        assert limits.to_plain() == {"time": 0.5, "store_bytes": 9}
        assert (limits.share, Budget(0.25).share) == (0.5, 0.25)

    @pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), float("inf"), "half", True, [0.5]])
    def test_a_share_of_time_outside_its_range_is_refused(self, share: Any) -> None:
        with pytest.raises(InvalidBudget, match=r"\(0, 1\]"):
            Budget(time=share)

    def test_exactly_one_currency_is_spent(self) -> None:
        for given in ({}, {"macs": 0.5, "time": 0.5}, {"store_bytes": 100}):
            with pytest.raises(InvalidBudget, match="either macs or time"):
                Budget(**given)

    @pytest.mark.parametrize("size", [0, -4, 1.5, float("nan"), True, "1 MiB"])
    def test_a_store_of_no_size_is_refused(self, size: Any) -> None:
        with pytest.raises(InvalidBudget, match="positive whole number"):
            Budget(0.5, store_bytes=size)

    def test_time_needs_times(self) -> None:
        plan = lower(table(unet_graph(), "11111", "11011"))
        for ask in (lambda: Budget(time=0.5).allows(plan), lambda: plan.time_share, lambda: unet_graph().times):
            with pytest.raises(NotTimed, match="time_blocks"):
                ask()


class TestTimesInTheFile:
    def test_they_survive_it(self) -> None:
        schedule = table(timed(unet_graph(), 0.1, 1 / 3, 3, 1, 1, 2), "11111", "11011")
        again = MaskSchedule.from_json(schedule.to_json())
        assert again == schedule
        assert again.graph.is_timed
        assert "of the measured time" in summary(again)

    def test_a_file_without_them_is_not_timed(self) -> None:
        schedule = table(unet_graph(), "11111", "11011")
        data = json.loads(schedule.to_json())
        for block in data["blocks"]:
            del block["ms"]
        assert MaskSchedule.from_json(json.dumps(data)) == schedule
        assert not schedule.graph.is_timed
        assert "time" not in summary(schedule)

    @pytest.mark.parametrize("ms", [-1.0, float("nan"), float("inf")])
    def test_a_time_is_finite_and_not_negative(self, ms: float) -> None:
        with pytest.raises(InvalidSchedule, match="ms"):
            timed(chain_graph(1, "delta"), ms, 1)


class TestTables:
    def test_a_baseline_says_what_it_stores(self) -> None:
        reference = table(unet_graph(), *["11111"] * 8)
        small = Budget(0.5, store_bytes=4)
        assert lower(fixed_interval(reference, small)).peak_bytes == 4
        with pytest.raises(InvalidBudget, match="at least 8 bytes"):
            fixed_interval(reference, small, order=1)
        with pytest.raises(InvalidBudget, match="at least 12 bytes"):
            whole_step(reference, small, order=2)

    def test_rounding_spends_time_where_it_is_asked_to(self) -> None:
        # two steps of 3 + 1 ms; the second computes b0, which scores higher, only if 7 of 8 ms may be spent
        reference = table(timed(chain_graph(2, "delta"), 3, 1, 0), "11", "11")
        scores = np.array([[1.0, 1.0, 1.0], [0.6, 0.5, np.inf]])
        made = {budget: bits(round_scores(scores, reference, budget, max_age=9))[1]
                for budget in (Budget(macs=0.75), Budget(time=0.75), Budget(time=0.9))}  # fmt: skip
        assert list(made.values()) == ["10", "00", "10"]

    def test_rounding_raises_the_threshold_until_the_store_fits(self) -> None:
        # at three of four cells b1 is reused, of 400 bytes; above the denoiser's own score its 4 bytes are enough
        blocks = chain_graph(2, "delta").blocks
        graph = BlockGraph((*(replace(block, bytes=400) for block in blocks[:-1]), blocks[-1]))
        reference, scores = table(graph, "11", "11"), np.array([[1.0, 1.0, 1.0], [0.9, 0.5, 0.6]])
        free = round_scores(scores, reference, Budget(0.75), max_age=9)
        small = round_scores(scores, reference, Budget(0.75, store_bytes=399), max_age=9)
        assert (bits(free)[1], lower(free).peak_bytes) == ("10", 400)
        assert (bits(small)[1], lower(small).peak_bytes) == ("00", 4)
        with pytest.raises(InvalidBudget, match="at least 4 bytes"):
            round_scores(scores, reference, Budget(0.75, store_bytes=3), max_age=9)

    def test_a_time_that_cannot_be_reached_says_what_can(self) -> None:
        reference = table(timed(chain_graph(2, "delta"), 3, 1, 4), "11", "11")
        scores = np.array([[1.0, 1.0, 1.0], [0.6, 0.5, np.inf]])
        with pytest.raises(InvalidBudget, match=r"measured time.*at least 0\.7500"):
            round_scores(scores, reference, Budget(time=0.7), max_age=9)


class TestLearn:
    def test_trained_forecasts_read_as_many_values_as_the_store_holds(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        size = reference.graph.blocks[-1].bytes  # whole-step tables store values of the denoiser's output alone
        for values in (1, 2):
            budget = Budget(0.6, store_bytes=values * size)
            schedule = stepmask.learn(pipe, trajectory, budget, learner=QUICK)
            assert budget.allows(lower(schedule))
            assert schedule.windows.max() == values
            assert schedule.provenance["budget"] == {"macs": 0.6, "store_bytes": values * size}
        with pytest.raises(InvalidBudget, match=f"at least {size} bytes"):
            stepmask.learn(pipe, trajectory, Budget(0.6, store_bytes=size - 1), learner=QUICK)

    @pytest.mark.parametrize("learner", [QUICK, PerTimestep(iterations=2, rounds=1)], ids=lambda x: type(x).__name__)
    def test_a_budget_in_time_is_measured_and_met(self, pipe: Any, trajectory: Trajectory, learner: Any) -> None:
        schedule = stepmask.learn(pipe, trajectory, Budget(time=0.6), learner=learner)
        assert lower(schedule).time_share <= 0.6 + 1e-9
        assert schedule.provenance["budget"] == {"time": 0.6}
        assert schedule.provenance["times"]["timed_by"] == "stepmask.learn"
        total = sum(block.ms for block in schedule.graph.blocks)
        assert schedule.provenance["times"]["denoiser_ms"] == pytest.approx(total)

    def test_given_times_are_used_as_they_are(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        # all the time is the glue's, so that only whole steps save any: 3 of 5 are computed
        graph = timed(reference.graph, *[0] * (len(reference.graph) - 1), 1)
        schedule = stepmask.learn(pipe, trajectory, Budget(time=0.6), graph=graph, learner=QUICK)
        assert schedule.graph == graph
        assert schedule.rows[:, -1].sum() == 3
        assert "times" not in schedule.provenance

    def test_a_run_that_goes_on_keeps_its_times(self, pipe: Any, trajectory: Trajectory, tmp_path: Path) -> None:
        first, again = (stepmask.learn(pipe, trajectory, Budget(time=0.6), learner=QUICK, folder=tmp_path)
                        for _ in range(2))  # fmt: skip
        assert first == again
        assert len([*tmp_path.glob("times-*.json")]) == 1


class Slow(Scale):
    """Takes 20 ms."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


class SlowGlue(Chain):
    """Takes 20 ms, and as much in each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Slow(2.0), Slow(5.0)])

    def forward(self, x: Tensor, t: float) -> Tensor:
        time.sleep(0.02)
        return super().forward(x, t)


def slow_chain() -> tuple[Chain, Trajectory, BlockGraph]:
    """`Chain` with a second layer that takes long."""
    denoiser = Chain()
    denoiser.layers[1] = Slow(5.0)
    trajectory = stepmask.record(denoiser, run=lambda: denoiser(torch.ones(2, 3), 1.0))
    return denoiser, trajectory, stepmask.trace(denoiser, trajectory, blocks="layers.*")


class TestTimeBlocks:
    def test_the_block_that_sleeps_takes_the_time(self) -> None:
        denoiser, trajectory, graph = slow_chain()
        times = time_blocks(denoiser, trajectory, graph, repeats=5)
        assert times.blocks[1].ms >= 20
        assert times.times[1] > 0.8
        assert times.times.sum() == pytest.approx(1)
        assert [replace(block, ms=0.0) for block in times.blocks] == [*graph.blocks]
        assert [type(layer) for layer in denoiser.layers] == [Scale, Slow]

    def test_looking_at_the_clock_is_no_part_of_an_evaluation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = count()  # every look takes a second, and nothing else takes any time
        monkeypatch.setattr(clock, "perf_counter", lambda: float(next(looks)))
        denoiser = Chain()
        trajectory = stepmask.record(denoiser, run=lambda: denoiser(torch.ones(2, 3), 1.0))
        graph = stepmask.trace(denoiser, trajectory, blocks="layers.*")
        times = time_blocks(denoiser, trajectory, graph, repeats=3)
        assert sum(block.ms for block in times.blocks) == 1000

    def test_the_denoisers_own_is_a_step_that_reuses_all_blocks(self) -> None:
        denoiser = SlowGlue()
        trajectory = stepmask.record(denoiser, run=lambda: denoiser(torch.ones(2, 3), 1.0))
        graph = stepmask.trace(denoiser, trajectory, blocks="layers.*")
        times = time_blocks(denoiser, trajectory, graph, repeats=3)
        assert times.times == pytest.approx([1 / 3] * 3, abs=0.05)

    def test_forecasts_that_take_longer_than_blocks_leave_these_nothing(self) -> None:
        graph = chain_graph(2, "output")
        assert [block.ms for block in _shared_out(graph, [1, 3, 5], whole=9, reused=7).blocks] == [0.5, 1.5, 7]
        assert [block.ms for block in _shared_out(graph, [1, 2, 3], whole=6, reused=7).blocks] == [0, 0, 6]

    def test_what_cannot_be_timed_is_refused(self, reference: MaskSchedule) -> None:
        denoiser, trajectory, graph = slow_chain()
        with pytest.raises(RunError, match="repeats=0"):
            time_blocks(denoiser, trajectory, graph, repeats=0)
        with pytest.raises(RunError, match="recorded from this pipeline"):
            time_blocks(Chain(), trajectory, graph)
        with pytest.raises(NoSuchBlock, match=r"transformer_blocks\.0"):
            time_blocks(denoiser, trajectory, reference.graph)
        stray = BlockGraph((Block("layers"), *(replace(block, reads=()) for block in graph.blocks)))
        with pytest.raises(TraceError, match="'layers', which these evaluations did not call"):
            time_blocks(denoiser, trajectory, stray, repeats=1)

    def test_a_masked_denoiser_is_not_timed(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        with stepmask.apply(pipe, reference), pytest.raises(AlreadyApplied):
            time_blocks(pipe, trajectory, reference.graph)

    def test_timing_leaves_the_samples_alone(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=lambda: denoiser(torch.ones(1, 3), 2.0))
        graph = stepmask.trace(denoiser, trajectory, blocks={"still": "output", "moving": "output"})
        time_blocks(denoiser, trajectory, graph, repeats=1)
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
