"""Fixtures: a tiny real pipeline, and torch on few threads so that parallel tests do not fight."""

from typing import Any

import hypothesis
import pytest
import torch

import stepmask

from toys import tiny_dit

torch.set_num_threads(1)
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile("slow", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture
def pipe() -> Any:
    """A DiTPipeline with random weights: 3 blocks, 8×8 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = DiTPipeline(transformer=tiny_dit(), vae=vae.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def trajectory(pipe: Any) -> stepmask.Trajectory:
    """Five guided DDIM steps of two samples."""
    return stepmask.record(pipe, class_labels=[1, 2], num_inference_steps=5)


@pytest.fixture
def reference(pipe: Any, trajectory: stepmask.Trajectory) -> stepmask.MaskSchedule:
    """The all-compute table of the tiny pipeline, sublayers."""
    graph = stepmask.trace(pipe, trajectory)
    return stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
