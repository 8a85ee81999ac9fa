"""Fixtures: a tiny real pipeline, and torch on few threads so that parallel tests do not fight."""

from typing import Any

import hypothesis
import pytest
import torch

import stepmask

from toys import tiny_pipe

torch.set_num_threads(1)
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile("slow", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture
def pipe() -> Any:
    """The tiny pipeline."""
    return tiny_pipe()


@pytest.fixture
def trajectory(pipe: Any) -> stepmask.Trajectory:
    """Five guided DDIM steps of two samples."""
    return stepmask.record(pipe, class_labels=[1, 2], num_inference_steps=5)


@pytest.fixture
def reference(pipe: Any, trajectory: stepmask.Trajectory) -> stepmask.MaskSchedule:
    """The all-compute table of the tiny pipeline, sublayers."""
    graph = stepmask.trace(pipe, trajectory, prove=False)  # that it holds has tests of its own
    return stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
