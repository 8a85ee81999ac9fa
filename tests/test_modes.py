"""A run that is differentiated keeps its gradients, whatever the sampler's code says of itself."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, UniPCMultistepScheduler
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from torch import Tensor, nn

import stepmask
from denoisers import tokens
from pipelines import make
from stepmask.denoiser.modes import as_told, gradients_throughout
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.rectify import lower

OFF = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}

every_switch = pytest.mark.parametrize("off", OFF.values(), ids=OFF)


def is_on() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class TestGradientsThroughout:
    @every_switch
    def test_a_switch_is_without_effect(self, off: Callable[[], AbstractContextManager[Any]]) -> None:
        before = dict(vars(torch.no_grad)), dict(vars(torch.inference_mode)), dict(vars(torch.set_grad_enabled))
        decorated = off()(is_on)
        assert not decorated()
        with gradients_throughout():
            assert decorated()
            with off():
                assert is_on()
                with torch.enable_grad(), off():
                    assert is_on()
            assert is_on()
        assert not decorated()
        after = dict(vars(torch.no_grad)), dict(vars(torch.inference_mode)), dict(vars(torch.set_grad_enabled))
        assert before == after

    @every_switch
    def test_what_runs_as_told_is_as_everywhere(self, off: Callable[[], AbstractContextManager[Any]]) -> None:
        with gradients_throughout(), off(), as_told():
            assert is_on()
            with off():
                assert not is_on()
                with gradients_throughout(), off():
                    assert not is_on()
                with torch.enable_grad():
                    assert torch.is_grad_enabled()
            assert is_on()

    def test_a_function_that_switches_them_off_for_good(self) -> None:
        with gradients_throughout():
            torch.set_grad_enabled(False)
            assert is_on()
            torch.set_grad_enabled(True)
        assert is_on()

    @every_switch
    def test_nothing_changes_where_they_are_off(self, off: Callable[[], AbstractContextManager[Any]]) -> None:
        with torch.no_grad(), gradients_throughout(), off():
            assert not is_on()

    @every_switch
    def test_other_threads_are_left_alone(self, off: Callable[[], AbstractContextManager[Any]]) -> None:
        found: list[bool] = []

        def elsewhere() -> None:
            with off():
                found.append(is_on())

        with gradients_throughout():
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            with off():
                found.append(is_on())
        assert found == [False, True]


class Network(nn.Module):
    """Two linear layers beside the stream; looks itself what mode it is in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            offset = t * self.layers[0].bias.norm()
        assert not offset.requires_grad
        for layer in self.layers:
            x = x + torch.tanh(layer(x) + offset)
        return x


def in_one(network: nn.Module, off: Callable[[], Any]) -> Callable[[], Tensor]:
    """A loop that is decorated as a whole."""

    @off()
    def run() -> Tensor:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        for step in range(4):
            x = x - 0.1 * network(x, 1 - step / 4)
        return x

    return run


def in_parts(network: nn.Module, off: Callable[[], Any]) -> Callable[[], Tensor]:
    """A loop whose steps are decorated, each, and write into the latent."""

    @off()
    def change(x: Tensor, step: int) -> None:
        x -= 0.1 * network(x, 1 - step / 4)

    def run() -> Tensor:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        for step in range(4):
            change(x, step)
        return x

    return run


def as_it_is() -> Callable[[Any], Any]:
    """In place of a decorator."""
    return lambda function: function


def trajectory(loop: Callable[..., Any], off: Callable[[], Any]) -> stepmask.Trajectory:
    network = Network().eval()
    return stepmask.record(network, run=loop(network, off))


@every_switch
@pytest.mark.parametrize("loop", [in_one, in_parts])
def test_a_decorated_loop_is_swept_as_any_other(loop: Callable[..., Any], off: Callable[[], Any]) -> None:
    runs = trajectory(in_one, as_it_is), trajectory(loop, off)
    plain, decorated = (stepmask.sweep(run.sampling.pipe, run, probes=1, ages=2).inner for run in runs)
    np.testing.assert_array_equal(plain, decorated)
    assert np.abs(plain).max() > 0


def test_a_decorated_loop_is_learned_from_as_any_other() -> None:
    runs = trajectory(in_one, as_it_is), trajectory(in_parts, torch.inference_mode)
    learner = TrainedForecasts(passes=1.2)
    plain, decorated = (stepmask.learn(run.sampling.pipe, run, 0.6, learner=learner) for run in runs)
    assert plain == decorated


def modular() -> tuple[Any, dict[str, Any]]:
    """Wan's denoising as blocks of Modular Diffusers, each under `no_grad`, with a guider that calls twice."""
    whole, _ = make("WanPipeline")
    pipe = WanCoreDenoiseStep().init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=4.0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe.update_components(transformer=whole.transformer, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    words = {"prompt_embeds": tokens(8), "negative_prompt_embeds": tokens(8)}
    sizes = {"height": 16, "width": 16, "num_frames": 5}
    return pipe, {**words, **sizes, "num_inference_steps": 3, "output": "latents"}


class TestModularDiffusers:
    @pytest.mark.parametrize("learner", [TrainedForecasts(passes=1.2), PerTimestep(iterations=2, rounds=1)])
    def test_a_schedule_is_learned(self, learner: Any) -> None:
        pipe, call = modular()
        trajectory = stepmask.record(pipe, **call)
        assert trajectory.sampler.branches == 2
        graph = stepmask.trace(pipe, trajectory, granularity="block", prove=False)
        schedule = stepmask.learn(pipe, trajectory, 0.7, graph=graph, learner=learner)
        assert lower(schedule).macs_share <= 0.7
        with stepmask.apply(pipe, schedule):
            assert torch.isfinite(trajectory.sampling().latent).all()

    def test_a_sweep_finds_what_it_finds_of_the_pipeline(self) -> None:
        """The two pipelines' loops are the same arithmetic; only their guidance is written in another order."""
        pipe, call = modular()
        whole, told = make("WanPipeline")
        whole.transformer, whole.scheduler = pipe.transformer, pipe.scheduler
        latents = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(3))
        words = {name: call[name][:1] for name in ("prompt_embeds", "negative_prompt_embeds")}
        runs = [
            stepmask.record(pipe, **{**call, **words, "latents": latents}),
            stepmask.record(
                whole, **{**told, **words, "num_inference_steps": 3, "latents": latents, "guidance_scale": 4.0}
            ),
        ]
        assert torch.allclose(runs[0].sampled.latent, runs[1].sampled.latent, atol=1e-5)
        found = [stepmask.sweep(run.sampling.pipe, run, probes=1, ages=2).inner for run in runs]
        np.testing.assert_allclose(*found, rtol=0, atol=1e-4 * np.abs(found[0]).max())
