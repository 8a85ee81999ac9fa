"""Fixtures: a tiny real pipeline, and torch on one thread so that parallel tests do not fight."""

import os
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too; read when torch is imported

import hypothesis
import pytest
import torch
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

import stepmask

from toys import tiny_pipe

torch.set_num_threads(1)
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile("slow", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("unhurried")
# hypothesis mixes in constants of the modules that happen to be imported: without them, examples that are derandomized
# are the same in any order of tests and on any machine
pytest.MonkeyPatch().setattr(providers, "_get_local_constants", Constants)

LONG = ("test_executors.py", "test_examples.py")
"""Where single tests take long: they begin first, so that none is left to one worker at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


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
