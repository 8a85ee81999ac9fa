"""Half precision: errors, sweeps and all learners find what they find in float32, at large models' latent sizes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from torch import Tensor, nn

import stepmask
from denoisers import denoiser, ones, tokens
from pipelines import autoencoder, make
from stepmask import BlockGraph, MaskSchedule, Trajectory
from stepmask.evaluation.metrics import latent_errors
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.floats import LIFT, lifted
from stepmask.learning.guidance import Guidance
from stepmask.learning.learn import Learner
from stepmask.learning.objective import MeasuredGain, relative_error, sample_errors, step_changes
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.relax import Concrete, StraightThrough
from stepmask.learning.trained import TrainedForecasts, _mean_distance
from stepmask.schedule.baselines import fixed_interval

LATENTS = {"SDXL": (1, 4, 128, 128), "SD3": (1, 16, 128, 128)}
HALVES = [torch.bfloat16, torch.float16]
AUTOCAST = "autocast"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
def test_errors_are_those_of_the_same_numbers_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    reference = (3 * noise(*shape)).to(dtype)
    latent = (reference.float() + 0.1 * noise(*shape, seed=1)).to(dtype)
    a, b = latent.double(), reference.double()
    expected = float((a - b).square().sum() / b.square().sum())
    for found in (sample_errors(latent, reference), relative_error(latent, reference)):
        assert float(found) == pytest.approx(expected, rel=1e-3)
    assert latent_errors(latent, reference) == [pytest.approx(expected, rel=1e-9)]


def within(dtype: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if dtype == AUTOCAST else nullcontext()


class Wide(nn.Module):
    """x ↦ x + Σ tanh(layer(x + t)), on eight numbers at a time, in the dtype that it has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, t: float) -> Tensor:
        h = x.reshape(len(x), -1, 8)
        for layer in self.layers:
            h = h + torch.tanh(layer(h + t))
        return h.reshape(x.shape)


@cache
def recorded(shape: tuple[int, ...], dtype: torch.dtype | str) -> Trajectory:
    """x ← x − 0.2·D(x, t) over six steps."""
    network, latent = Wide(), noise(*shape)
    if isinstance(dtype, torch.dtype):
        network, latent = network.to(dtype), latent.to(dtype)

    def run(x: Tensor = latent) -> Tensor:
        for step in range(6):
            x = x - 0.2 * network(x, 1 - step / 6)
        return x

    with within(dtype):
        return stepmask.record(network, run=run)


@cache
def graph_of(shape: tuple[int, ...]) -> BlockGraph:
    run = recorded(shape, torch.float32)
    return stepmask.trace(run.sampling.pipe, run, blocks={"layers.*": "output"}, prove=False)


@cache
def swept(shape: tuple[int, ...], dtype: torch.dtype | str) -> Any:
    run = recorded(shape, dtype)
    return stepmask.sweep(run.sampling.pipe, run, graph=graph_of(shape), probes=1, ages=2).inner


@cache
def rows_of(shape: tuple[int, ...], dtype: torch.dtype | str) -> Any:
    run, learner = recorded(shape, dtype), PerTimestep(iterations=4, rounds=1)
    return stepmask.learn(run.sampling.pipe, run, 0.5, graph=graph_of(shape), learner=learner).rows


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


CLOSE: dict[Any, float] = {torch.bfloat16: 0.05, torch.float16: 0.01, AUTOCAST: 0.05}
"""How far from float32's what is found may lie, relatively."""


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
class TestLargeLatents:
    """A gradient of a distance goes with one over 65,536 numbers or 262,144: float16 has no such number."""

    def test_gradients_of_forecasts(self, shape: tuple[int, ...], dtype: Any) -> None:
        exact, run = recorded(shape, torch.float32), recorded(shape, dtype)
        full = MaskSchedule.all_compute(graph_of(shape), exact.denoiser, exact.sampler)
        half = fixed_interval(full, 0.5, order=1)
        weights = torch.tensor(half.forecasts, dtype=torch.float32)

        def gradients(run: Trajectory) -> Tensor:
            return loss_and_gradients(run, half, weights, lambda latent: _mean_distance(latent, run))[1]

        assert relative(gradients(run), gradients(exact)) < CLOSE[dtype]

    def test_gradients_go_with_the_loss_however_small(self, shape: tuple[int, ...], dtype: Any) -> None:
        run = recorded(shape, dtype)
        half = fixed_interval(MaskSchedule.all_compute(graph_of(shape), run.denoiser, run.sampler), 0.5, order=1)
        weights = torch.tensor(half.forecasts, dtype=torch.float32)

        def gradients(factor: float) -> Tensor:
            return loss_and_gradients(run, half, weights, lambda latent: factor * _mean_distance(latent, run))[1]

        assert torch.equal(gradients(2.0**-12), gradients(1.0) / 2**12)

    def test_sweeps(self, shape: tuple[int, ...], dtype: Any) -> None:
        assert relative(swept(shape, dtype), swept(shape, torch.float32)) < CLOSE[dtype]

    def test_rows_of_scores(self, shape: tuple[int, ...], dtype: Any) -> None:
        assert (rows_of(shape, dtype) != rows_of(shape, torch.float32)).mean() <= 0.1


class TestLift:
    def test_its_factor_is_a_power_of_two_and_its_largest_number_about_the_lift(self) -> None:
        for size in (3e-9, 0.7, 1.0, 5e7):
            gradient = size * noise(100)
            larger, factor = lifted(gradient)
            assert float(torch.frexp(factor)[0]) == 0.5
            assert LIFT / 2 <= float(larger.abs().max()) <= LIFT
            assert torch.equal(larger / factor, gradient)

    def test_of_nothing_it_is_nothing(self) -> None:
        larger, factor = lifted(torch.zeros(3))
        assert larger.tolist() == [0, 0, 0]
        assert np.isfinite(float(factor))


def test_guidance_is_not_in_half_precision_under_autocast() -> None:
    # 4·1.01 − 3·1 is 1.04; in bfloat16 1.01 is 1.0078125
    guidance = Guidance(torch.tensor([[4.0, -3.0]]), channels=2)
    outputs = [torch.tensor([[1.01, 1.01]]), torch.tensor([[1.0, 1.0]])]
    with torch.autocast("cpu", torch.bfloat16):
        assert guidance(outputs).flatten().tolist() == pytest.approx([1.04, 1.04], abs=1e-6)


def halved(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A call with its floating tensors in a dtype."""

    def to(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: to(value) for name, value in call.items()}


def pixart() -> tuple[Any, dict[str, Any]]:
    transformer = denoiser("PixArtTransformer2DModel", num_layers=3)
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": DPMSolverMultistepScheduler()}
    pipe = PixArtAlphaPipeline(vae=autoencoder(), transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    words = {"prompt_embeds": tokens(8), "negative_prompt_embeds": tokens(8), "negative_prompt": None}
    masks = {"prompt_attention_mask": ones(), "negative_prompt_attention_mask": ones()}
    return pipe, {**words, **masks, "height": 8, "width": 8, "use_resolution_binning": False, "output_type": "latent"}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "DiT": lambda: make("DiTPipeline"),
    "PixArt": pixart,
    "U-Net": lambda: make("StableDiffusionPipeline"),
}
LEARNERS: dict[str, Learner] = {
    "trained": TrainedForecasts(passes=1),
    "per timestep": PerTimestep(iterations=2),
    "straight-through": PerTimestep(StraightThrough(), iterations=2, rounds=1),
    "concrete": PerTimestep(Concrete(), feature=0.1, iterations=2, rounds=1),
}


@cache
def sampled(name: str, dtype: Any) -> Trajectory:
    """Six steps of a pipeline in a dtype."""
    pipe, call = PIPELINES[name]()
    if isinstance(dtype, torch.dtype):
        pipe.to(dtype)
        call = halved(call, dtype)
    with within(dtype):
        return stepmask.record(pipe, seed=1, **{**call, "num_inference_steps": 6})


@cache
def traced(name: str) -> BlockGraph:
    run = sampled(name, torch.float32)
    return stepmask.trace(run.sampling.pipe, run, granularity="block", prove=False)


@cache
def error_of(name: str, learner: str, dtype: Any) -> float:
    """Of what is learned in a dtype, on the pipeline in float32."""
    run, exact = sampled(name, dtype), sampled(name, torch.float32)
    table = stepmask.learn(run.sampling.pipe, run, 0.35, graph=traced(name), learner=LEARNERS[learner])
    with stepmask.apply(exact.sampling.pipe, table):
        return fmean(latent_errors(exact.sampling().latent, exact.sampled.latent))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("name", "learner"), [*(("DiT", learner) for learner in LEARNERS), ("PixArt", "trained"), ("U-Net", "trained")]
)
def test_tables_are_as_good_as_those_learned_in_float32(name: str, learner: str, dtype: Any) -> None:
    assert 0 < error_of(name, learner, dtype) <= 1.2 * error_of(name, learner, torch.float32)


@cache
def swept_pipeline(name: str, dtype: Any) -> Any:
    run = sampled(name, dtype)
    return stepmask.sweep(run.sampling.pipe, run, graph=traced(name), probes=1, ages=2).inner


@cache
def measured(name: str, dtype: Any) -> Any:
    run = sampled(name, dtype)
    return MeasuredGain().measure(run) * step_changes(run)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_what_reuse_does_at_each_step_is_not_lost_in_rounding(name: str, dtype: Any) -> None:
    found, expected = measured(name, dtype), measured(name, torch.float32)
    assert np.abs(found - expected).sum() < 0.1 * expected.sum()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_sweeps_of_pipelines(name: str, dtype: Any) -> None:
    found, expected = swept_pipeline(name, dtype), swept_pipeline(name, torch.float32)
    assert relative(found, expected) < 2 * CLOSE[dtype]
