"""Runs whose steps are not all alike: recorded, learned for, masked and measured as any others."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import stepmask
from denoisers import Inputs
from situations import SITUATIONS, make
from stepmask.denoiser.trajectory import Trajectory
from stepmask.learning.objective import relative_error
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower

EVERY = pytest.mark.parametrize("name", SITUATIONS)


@cache
def recorded(name: str) -> tuple[Any, Inputs, Trajectory, stepmask.MaskSchedule]:
    pipe, call = make(name)
    trajectory = stepmask.record(pipe, seed=0, **call)
    graph = stepmask.trace(pipe, trajectory)
    return pipe, call, trajectory, stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


def masked(name: str, table: stepmask.MaskSchedule) -> Tensor:
    pipe, _, trajectory, _ = recorded(name)
    with stepmask.apply(pipe, table):
        return trajectory.sampling().latent


@EVERY
class TestSituation:
    def test_all_computed_is_the_bare_run(self, name: str) -> None:
        _, _, trajectory, full = recorded(name)
        assert torch.equal(masked(name, full), trajectory.sampled.latent)

    @pytest.mark.parametrize("make_table", [fixed_interval, whole_step])
    def test_a_regular_table_saves_what_it_plans_and_stays_near(self, name: str, make_table: Any) -> None:
        pipe, _, trajectory, full = recorded(name)
        table = make_table(full, 0.7)
        planned = lower(table)
        with stepmask.apply(pipe, table) as handle:
            latent = trajectory.sampling().latent
            whole = sum(block.macs for block in full.graph.blocks) * full.sampler.loads.sum() * full.sampler.branches
            assert handle.computed_macs / whole == pytest.approx(planned.macs_share, abs=1e-6)
        error = float(relative_error(latent, trajectory.sampled.latent))
        assert 0 < error < 0.2

    def test_a_table_is_the_same_from_its_file(self, name: str, tmp_path: Any) -> None:
        *_, full = recorded(name)
        table = fixed_interval(full, 0.7, order=1)
        table.save_pretrained(tmp_path)
        assert stepmask.MaskSchedule.from_pretrained(tmp_path) == table

    def test_a_sweep_tells_what_reuse_does(self, name: str) -> None:
        pipe, _, trajectory, full = recorded(name)
        profile = stepmask.sweep(pipe, trajectory, graph=full.graph, probes=1)
        table = profile.schedule(0.7)
        error = float(relative_error(masked(name, table), trajectory.sampled.latent))
        assert lower(table).macs_share <= 0.7
        assert error < 0.2

    @pytest.mark.parametrize(
        "learner",
        [PerTimestep(iterations=2, rounds=1), TrainedForecasts(passes=1)],
        ids=["per-timestep", "trained"],
    )
    def test_a_table_is_learned(self, name: str, learner: Any) -> None:
        pipe, _, trajectory, full = recorded(name)
        table = stepmask.learn(pipe, trajectory, budget=0.7, learner=learner, graph=full.graph)
        error = float(relative_error(masked(name, table), trajectory.sampled.latent))
        assert lower(table).macs_share <= 0.7 + 1e-9
        assert error == pytest.approx(table.provenance["calibration_error"], rel=0.5)
