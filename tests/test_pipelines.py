"""Real pipelines and real samplers: the clock counts what is really evaluated, whatever their timesteps are."""

from typing import Any

import diffusers
import pytest
import torch

import stepmask
from pipelines import PIPELINES, STEPS, make, sd3, stable_diffusion
from promises import check_promises, random_table
from stepmask.denoiser.sampler import timestep_of
from stepmask.errors import RunError, ScheduleMismatch, TraceError
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.rectify import lower

TWICE = 2 * STEPS - 1  # a second evaluation at every step but the last
EVALUATIONS = {
    **dict.fromkeys(("Heun", "KDPM2", "KDPM2Ancestral"), TWICE), "PNDM": 12 + STEPS - 3,
    **dict.fromkeys(
        ("CMStochasticIterative", "CogVideoXDDIM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel",
         "DEISMultistep", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep",
         "EDMDPMSolverMultistep", "EDMEuler", "Euler", "EulerAncestral", "IPNDM", "LCM", "LMS", "SASolver", "TCD",
         "UniPCMultistep"), STEPS,
    ),
}  # fmt: skip
UNTOLD = {"IPNDM"}
"""Tell neither ᾱ nor σ, so that their schedules cannot be resampled."""

FLOW_EVALUATIONS = {"FlowMatchEuler": STEPS, "FlowMatchHeun": TWICE, "FlowMatchLCM": STEPS}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_recorded_masked_and_learned_for(name: str) -> None:
    pipe, call = make(name)
    trajectory = stepmask.record(pipe, **call)
    check_promises(pipe, trajectory)
    schedule = stepmask.learn(pipe, trajectory, budget=0.75, learner=TrainedForecasts(passes=1.2))
    report = stepmask.evaluate(pipe, schedule, repeats=1, **call)
    assert report.rows[1].macs_executed == pytest.approx(lower(schedule).macs_share)
    assert 0 < report.rows[1].latent_errors[0] < 1


def scheduler(name: str) -> Any:
    return next(getattr(diffusers, full) for full in (f"{name}Scheduler", f"{name}DiscreteScheduler")
                if hasattr(diffusers, full))()  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_sampler_is_counted(name: str) -> None:
    pipe, call = stable_diffusion(scheduler=scheduler(name))
    pipe.set_progress_bar_config(disable=True)
    trajectory = stepmask.record(pipe, **call, num_inference_steps=STEPS, output_type="latent")
    assert len(trajectory.calls) == trajectory.steps == EVALUATIONS[name]
    assert len(trajectory.sampler.log_snr) == (0 if name in UNTOLD else EVALUATIONS[name])
    check_promises(pipe, trajectory)


@pytest.mark.parametrize("name", FLOW_EVALUATIONS)
def test_a_flow_sampler_is_counted(name: str) -> None:
    pipe, call = sd3()
    pipe.scheduler = scheduler(name)
    pipe.set_progress_bar_config(disable=True)
    trajectory = stepmask.record(pipe, **call, num_inference_steps=STEPS, output_type="latent")
    assert len(trajectory.calls) == trajectory.steps == FLOW_EVALUATIONS[name]
    check_promises(pipe, trajectory)


def test_the_timestep_is_found_wherever_a_sampler_has_it() -> None:
    plain, other = diffusers.DDIMScheduler(), diffusers.CogVideoXDPMScheduler()
    assert timestep_of(plain, ("output", 7, "sample"), {}) == 7
    assert timestep_of(plain, ("output",), {"timestep": torch.tensor(7), "sample": "sample"}) == 7
    assert timestep_of(other, ("output", None, 7, 9, "sample"), {}) == 7


class TestPartsOfARun:
    """img2img begins in the middle."""

    def test_the_steps_that_are_run_are_the_schedule_s(self) -> None:
        pipe, call = make("StableDiffusionImg2ImgPipeline")
        trajectory = stepmask.record(pipe, **call)
        assert trajectory.steps == len(trajectory.calls) == 3  # 0.75 of 4
        whole = stepmask.record(pipe, **{**call, "strength": 1.0})
        assert whole.sampler.timesteps[1:] == trajectory.sampler.timesteps
        assert whole.sampler.log_snr[1:] == trajectory.sampler.log_snr

    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_another_strength_is_refused(self, strength: float) -> None:
        pipe, call = make("StableDiffusionImg2ImgPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        with stepmask.apply(pipe, schedule), pytest.raises(ScheduleMismatch, match="begins at timestep"):
            pipe(**{**call, "strength": strength})

    def test_a_whole_run_s_schedule_is_refused_for_a_part(self) -> None:
        pipe, call = make("StableDiffusionImg2ImgPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **{**call, "strength": 1.0}))
        with stepmask.apply(pipe, schedule), pytest.raises(ScheduleMismatch, match="begins at timestep"):
            pipe(**call)

    def test_a_run_that_stops_early_is_recorded_as_it_is(self) -> None:
        pipe, call = make("StableDiffusionXLPipeline")
        trajectory = stepmask.record(pipe, **call, denoising_end=0.5)
        assert trajectory.steps == len(trajectory.calls) == STEPS // 2
        check_promises(pipe, trajectory)


def test_the_user_s_own_timesteps() -> None:
    pipe, call = make("StableDiffusionPipeline")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    trajectory = stepmask.record(pipe, **call, timesteps=[900, 500, 100])
    assert trajectory.sampler.timesteps == (900, 500, 100)
    check_promises(pipe, trajectory)


def test_guidance_that_is_switched_off_is_refused_under_a_schedule_with_it() -> None:
    def off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    pipe, call = make("StableDiffusionPipeline")
    trajectory = stepmask.record(pipe, **call)
    call = {**call, "callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert stepmask.record(pipe, **call).sampler.course.present == ((0, 1), (0, 1), (1,), (1,))
    with stepmask.apply(pipe, random_table(pipe, trajectory)), pytest.raises(RunError, match="batch"):
        pipe(**call)


def test_an_extra_evaluation_that_skips_layers_is_refused() -> None:
    pipe, call = make("StableDiffusion3Pipeline")
    skipping = {**call, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.5}  # at step 1
    trajectory = stepmask.record(pipe, **skipping)
    with pytest.raises(TraceError, match=r"calls block 'transformer_blocks\.0\.attn' where the first one calls 'tran"):
        stepmask.trace(pipe, trajectory)
    with (
        stepmask.apply(pipe, random_table(pipe, stepmask.record(pipe, **call))),
        pytest.raises(RunError, match="evaluation 2 of the denoiser within step 1"),  # the conditional half alone
    ):
        pipe(**skipping)
