"""Samplers that shift their steps by the picture's size: one schedule for all sizes, and other numbers of steps."""

import json
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import stepmask
from pipelines import make
from stepmask import MaskSchedule, Tiers
from stepmask.denoiser.sampler import SetSteps, describe_steps
from stepmask.errors import InvalidSchedule, RunError, ScheduleMismatch
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.fingerprint import SamplerFingerprint

from toys import chain_graph, sampler, table

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTING: dict[str, list[dict[str, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": [
        {}, {"time_shift_type": "linear"}, {"shift_terminal": 0.02}, {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"invert_sigmas": True},
    ],
    **{
        f"{name}Scheduler": [FLOW]
        for name in ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep")
    },
    "FlowMatchLCMScheduler": [{}],
}  # fmt: skip
KINDS = [(name, options) for name, kinds in SHIFTING.items() for options in kinds]


class TestScheduler:
    @pytest.mark.parametrize(("name", "options"), KINDS)
    def test_its_steps_at_another_shift_are_those_that_it_would_have_set(
        self, name: str, options: dict[str, Any]
    ) -> None:
        scheduler = getattr(diffusers, name)(use_dynamic_shifting=True, **options)
        scheduler.set_timesteps(6, mu=0.7)
        small = SetSteps(scheduler, (6,), {"mu": 0.7})
        scheduler.set_timesteps(6, mu=1.2)
        large = SetSteps(scheduler, (6,), {"mu": 1.2})
        assert small.now.timesteps != large.now.timesteps
        assert large.at(0.7) == small.now
        assert [large.places(t, 0.7) for t in large.now.timesteps] == [[t] for t in small.now.timesteps]
        assert tuple(scheduler.timesteps.tolist()) == large.now.timesteps

    def test_one_that_does_not_shift_is_as_it_is(self) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(6, mu=1.2)  # which it does not look at
        steps = SetSteps(scheduler, (6,), {"mu": 1.2})
        assert steps.now.mu is None
        assert steps.at(0.7) is steps.now

    def test_where_steps_share_a_timestep_any_of_them_may_be_meant(self) -> None:
        scheduler = diffusers.UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW)
        scheduler.set_timesteps(6, mu=7.0)  # 999, 999, 999, ...
        steps = SetSteps(scheduler, (6,), {"mu": 7.0})
        first, *others = steps.now.timesteps
        assert first == others[0]
        assert steps.places(first, 0.5)[:2] == list(steps.at(0.5).timesteps[:2])


class TestSaved:
    def test_the_shift_is_in_the_file(self) -> None:
        plain = table(chain_graph(1, "output"), "1", "0")
        shifted = replace(plain, sampler=replace(plain.sampler, mu=0.75))
        assert json.loads(shifted.to_json())["sampler"]["mu"] == 0.75
        assert MaskSchedule.from_json(shifted.to_json()) == shifted != plain
        assert "mu" not in json.loads(plain.to_json())["sampler"]
        assert MaskSchedule.from_json(plain.to_json()).sampler.mu is None

    @pytest.mark.parametrize("mu", [float("nan"), float("inf"), "large", True, 1e19])
    def test_it_is_a_number(self, mu: Any) -> None:
        plain = table(chain_graph(1, "output"), "1", "0")
        with pytest.raises(InvalidSchedule, match="mu"):
            replace(plain, sampler=replace(plain.sampler, mu=mu))


class Shifting:
    """FLUX as its checkpoints are configured, and a schedule made at one size."""

    def __init__(self) -> None:
        self.pipe, self.call = make("FluxPipeline")
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        self.schedule = self.made_at(height=16, width=16)

    def sampled(self, **call: Any) -> np.ndarray:
        return self.pipe(**{**self.call, **call}, generator=torch.Generator().manual_seed(0)).images.numpy()

    def made_at(self, **call: Any) -> MaskSchedule:
        trajectory = stepmask.record(self.pipe, **{**self.call, **call})
        graph = stepmask.trace(self.pipe, trajectory, prove=False)
        return fixed_interval(MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler), 0.6, order=1)


@pytest.fixture(scope="module")
def flux() -> Shifting:
    return Shifting()


class TestOtherSizes:
    @pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (32, 16), (32, 32)])
    def test_samples_are_those_of_the_table_made_there(self, flux: Shifting, height: int, width: int) -> None:
        there = flux.made_at(height=height, width=width)
        with stepmask.apply(flux.pipe, there):
            wanted = flux.sampled(height=height, width=width)
        with stepmask.apply(flux.pipe, flux.schedule) as masked:
            assert np.array_equal(flux.sampled(height=height, width=width), wanted)
            assert masked.computed_macs == masked.plans[0].macs  # at the traced size
        assert not np.array_equal(flux.sampled(height=height, width=width), wanted)

    def test_other_steps_are_told_apart_as_before(self, flux: Shifting) -> None:
        steps = len(flux.schedule.rows)
        for other in ({"num_inference_steps": steps + 1}, {"sigmas": np.linspace(1.0, 0.5, steps)}):
            for size in ({}, {"width": 32}):
                with stepmask.apply(flux.pipe, flux.schedule) as masked:
                    with pytest.raises(ScheduleMismatch):
                        flux.sampled(**other, **size)
                    assert masked.computed_macs == 0

    def test_a_file_from_before_holds_at_its_own_size(self, flux: Shifting) -> None:
        old = replace(flux.schedule, sampler=replace(flux.schedule.sampler, mu=None))
        with stepmask.apply(flux.pipe, old):
            flux.sampled()
            with pytest.raises(ScheduleMismatch, match="timestep"):
                flux.sampled(width=32)

    def test_a_sampler_that_does_not_shift_is_another(self, flux: Shifting) -> None:
        shifting, flux.pipe.scheduler = flux.pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)
        try:
            with stepmask.apply(flux.pipe, flux.schedule), pytest.raises(ScheduleMismatch, match="timestep"):
                flux.sampled()
        finally:
            flux.pipe.scheduler = shifting

    def test_it_is_evaluated_there(self, flux: Shifting) -> None:
        report = stepmask.evaluate(flux.pipe, flux.schedule, repeats=1, **{**flux.call, "width": 32})
        assert 0 < report.rows[1].latent_errors[0] < 1

    def test_a_part_of_the_steps(self, flux: Shifting) -> None:
        pipe = diffusers.FluxImg2ImgPipeline(**flux.pipe.components)
        pipe.set_progress_bar_config(disable=True)

        def call(size: int, strength: float) -> dict[str, Any]:
            picture = torch.zeros(2, 3, size, size)
            return {**flux.call, "image": picture, "height": size, "width": size, "strength": strength}

        trajectory = stepmask.record(pipe, **call(16, 0.5))
        graph = stepmask.trace(pipe, trajectory, prove=False)
        part = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        assert part.steps == 2
        with stepmask.apply(pipe, fixed_interval(part, 0.6)) as masked:
            pipe(**call(32, 0.5))
            for strength in (0.75, 1.0):
                with pytest.raises(ScheduleMismatch, match="begins at timestep"):
                    pipe(**call(32, strength))
            assert masked.run.evaluation == 1


class TestOtherSteps:
    @pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"])
    def test_a_table_is_carried_over(self, name: str) -> None:
        pipe, call = make(name)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        trajectory = stepmask.record(pipe, **call)
        graph = stepmask.trace(pipe, trajectory, prove=False)
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)

        sigmas = None if name == "StableDiffusion3Pipeline" else np.linspace(1.0, 1 / 6, 6)
        own = trajectory.sampler
        longer = describe_steps(pipe.scheduler, 6, own.branches, mu=own.mu, sigmas=sigmas)
        assert longer == stepmask.record(pipe, **{**call, "num_inference_steps": 6}).sampler
        tiers = Tiers({"all": [full, full.resample(longer)]})
        bare = {}
        for size, steps in ((call["height"], 6), (2 * call["height"], 6), (2 * call["height"], 4)):
            bare[size, steps] = pipe(**{**call, "height": size, "width": size, "num_inference_steps": steps},
                                     generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        with stepmask.apply(pipe, tiers, tier="all") as masked:
            for (size, steps), wanted in bare.items():
                said = pipe(**{**call, "height": size, "width": size, "num_inference_steps": steps},
                            generator=torch.Generator().manual_seed(0)).images  # fmt: skip
                assert torch.equal(said, wanted)
                assert masked.sampler.steps == steps

    def test_without_a_shift_it_says_what_to_do(self) -> None:
        for name in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            scheduler = getattr(diffusers, name)(use_dynamic_shifting=True, **(FLOW if name.startswith("DPM") else {}))
            with pytest.raises(RunError, match=r"no mu\..*mu=schedule\.sampler\.mu"):
                describe_steps(scheduler, 8)

    @pytest.mark.parametrize("options", [{"mu": 0.5}, {"sigmas": [1.0, 0.5]}])
    def test_what_a_scheduler_does_not_take_is_told(self, options: dict[str, Any]) -> None:
        with pytest.raises(RunError, match="8 steps of a DDIMScheduler"):
            describe_steps(diffusers.DDIMScheduler(), 8, **options)

    def test_another_number_of_branches_is_refused(self) -> None:
        plain = table(chain_graph(1, "output"), "1", "0")
        guided = replace(plain, sampler=replace(sampler(2), branches=2))
        with pytest.raises(ScheduleMismatch, match=r"branches=schedule\.sampler\.branches"):
            guided.resample(sampler(4))


def inverse(steps: int) -> SamplerFingerprint:
    return SamplerFingerprint("", tuple(map(float, range(steps))), tuple(-k * 6 / steps for k in range(steps)))


class TestInversion:
    def test_a_table_that_runs_from_signal_to_noise_is_carried_over_like_its_mirror(self) -> None:
        rows = ["1", "1", "1", "0", "0", "0"]
        forth = table(chain_graph(1, "output"), *rows)
        there = replace(forth, sampler=replace(inverse(6), log_snr=tuple(-k for k in inverse(6).log_snr)))
        back = replace(forth, sampler=inverse(6))
        wanted = there.resample(replace(inverse(9), log_snr=tuple(-k for k in inverse(9).log_snr)))
        again = back.resample(inverse(9))
        assert np.array_equal(again.rows, wanted.rows)
        assert np.array_equal(again.forecasts, wanted.forecasts)
        assert 0 < again.rows[:, 0].sum() < 9

    def test_nothing_is_carried_from_one_way_to_the_other(self) -> None:
        forth = replace(table(chain_graph(1, "output"), "1", "0"), sampler=sampler(2))
        by_turns = replace(inverse(3), log_snr=(0.0, 1.0, 0.5))
        for other in (inverse(4), by_turns):
            with pytest.raises(ScheduleMismatch, match="one way"):
                forth.resample(other)

    @pytest.mark.parametrize(
        "name", ["DDIMInverse", "DPMSolverMultistepInverse", "DDIM", "EulerDiscrete", "HeunDiscrete"]
    )
    def test_all_compute_stays_all_compute(self, name: str) -> None:
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        for steps, others in ((20, 50), (50, 20), (10, 11)):
            own = describe_steps(scheduler, steps)
            full = replace(table(chain_graph(2, "output"), *["11"] * own.steps), sampler=own)
            assert full.resample(describe_steps(scheduler, others)).rows.all()

    def test_a_block_that_is_computed_whenever_the_denoiser_is_stays_so(self) -> None:
        rows = ["111", "110", "111", "010", "111", "110"]
        uneven = tuple(np.linspace(0, 1, 14) ** 3 * 5)
        some = replace(table(chain_graph(2, "output"), *rows), sampler=sampler(6))
        again = some.resample(SamplerFingerprint("", tuple(map(float, range(14))), uneven))
        assert np.array_equal(again.rows[:, 1], again.rows[:, 2])
        assert not again.rows[:, 2].all()
