"""What benchmarks run on: one pipeline of the zoo, one number of steps, one guidance."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from statistics import fmean, geometric_mean
from typing import Any, TypeVar

import stepmask
from stepmask import MaskSchedule, Trajectory, zoo
from stepmask.denoiser.conditioning import Conditioning
from stepmask.denoiser.runtime import apply
from stepmask.evaluation.metrics import latent_errors
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower

T = TypeVar("T")

SAMPLES = 8
"""Of each calibration run."""

FIRST_SEED = 100
"""Of the calibration runs."""


class Setting:
    """A pipeline with its sampler's settings.

    Args:
        pipeline: "zoo:NAME".
        steps: Of the sampler.
        guidance: Guidance scale; `None` = the pipeline's own.
        size: Of the pictures, in pixels; `None` = the pipeline's own.
    """

    def __init__(self, pipeline: str, steps: int, guidance: float | None = None, size: int | None = None) -> None:
        self.pipe: Any = zoo.load(pipeline)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps, self.guidance, self.size = steps, guidance, size
        self.learned_from, self.held_out = _split(Conditioning.of(self.pipe))

    def call(self, count: int, seed: int, *, held_out: bool = False) -> dict[str, Any]:
        """Arguments of the pipeline for `count` samples; of prompts, one half is held out from what learns."""
        told = (self.held_out if held_out else self.learned_from).call(count, seed)
        guided = {} if self.guidance is None else {"guidance_scale": self.guidance}
        sized = {} if self.size is None else {"height": self.size, "width": self.size}
        return {**told, **guided, **sized, "num_inference_steps": self.steps}

    def record(self, count: int, seed: int, *, held_out: bool = False) -> Trajectory:
        """A reference run of `count` samples."""
        return stepmask.record(self.pipe, seed=seed, **self.call(count, seed, held_out=held_out))

    def calibration(self, samples: int) -> list[Trajectory]:
        """Reference runs of `SAMPLES` each, to learn from."""
        return [self.record(SAMPLES, FIRST_SEED + run) for run in range(samples // SAMPLES)]

    @cached_property
    def reference_s(self) -> float:
        """Seconds that one reference sampling of 16 samples takes."""
        return timed(lambda: self.record(16, 99))[1]

    @cached_property
    def full(self) -> MaskSchedule:
        """The all-compute table, of 8 samples."""
        trajectory = self.record(8, 0)
        graph = stepmask.trace(self.pipe, trajectory)
        return MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)

    def budget(self, share: float) -> float:
        """What the fixed interval at a share of computed steps spends, glue included: every learner may as well."""
        return lower(fixed_interval(self.full, share)).macs_share


def name_of(pipeline: str) -> str:
    """What files of a pipeline's results are called."""
    return pipeline.removeprefix("zoo:").replace("/", "-")


def _split(told: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Every other prompt each; labels are too few to be held out, and what is drawn differs by the seed."""
    if told.argument != "prompt":
        return told, told
    return replace(told, choices=told.choices[::2]), replace(told, choices=told.choices[1::2])


def by_sample(run: Trajectory, table: MaskSchedule) -> list[float]:
    """A table's latent errors on the samples of a reference run."""
    with apply(run.sampling.pipe, table):
        return latent_errors(run.sampling().latent, run.sampled.latent)


def errors(held_out: Trajectory, table: MaskSchedule) -> dict[str, float]:
    """Mean and geometric mean of a table's latent errors on the samples of a reference run."""
    found = by_sample(held_out, table)
    return {"error": fmean(found), "geometric_error": geometric_mean(found)}


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the seconds that it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started
