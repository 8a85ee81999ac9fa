"""ControlNets beside their denoisers: called where their answers are read, counted where the denoiser runs, told."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import stepmask
from denoisers import BATCH, denoiser, stirred, tokens
from pipelines import GUIDED, LATENT, POOLED, autoencoder, control_net, stable_diffusion
from promises import without_feeders
from stepmask.denoiser.proof import check_against_record
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.unread import Unread
from stepmask.errors import RunError, ScheduleMismatch, TraceError
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.graph import BESIDE, Block, BlockGraph
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

STEPS = 5
PICTURE = torch.rand(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def of_stable_diffusion(**call: Any) -> Any:
    pipe, given = control_net()
    return pipe, {**given, **call}


def of_several() -> Any:
    pipe, call = control_net()
    other = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,))
    pipe.controlnet = diffusers.MultiControlNetModel([pipe.controlnet, stirred(other)])
    return pipe, {**call, "image": [PICTURE, 1 - PICTURE]}


def of_sd3() -> Any:
    coders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    transformer = denoiser("SD3Transformer2DModel")
    control = stirred(diffusers.SD3ControlNetModel.from_transformer(transformer, 1, num_extra_conditioning_channels=0))
    parts = (transformer, FlowMatchEulerDiscreteScheduler(), autoencoder())
    pipe = diffusers.StableDiffusion3ControlNetPipeline(*parts, **coders, controlnet=control)
    sizes = {"height": 8, "width": 8}
    return pipe, {**GUIDED, **POOLED, **sizes, "control_image": PICTURE}


def of_flux() -> Any:
    """With guidance in two calls of the transformer, which share one of the ControlNet."""
    coders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2")}
    transformer = denoiser("FluxTransformer2DModel")
    same = {name: transformer.config[name] for name in inspect.signature(diffusers.FluxControlNetModel).parameters
            if name in transformer.config}  # fmt: skip
    control = stirred(diffusers.FluxControlNetModel(**{**same, "num_layers": 1, "num_single_layers": 1}))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxControlNetPipeline(
        scheduler, autoencoder(1), transformer=transformer, controlnet=control, **coders
    )
    pooled = {what: torch.randn(BATCH, 8) for what in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    words = {"prompt_embeds": tokens(8), "negative_prompt_embeds": tokens(8), "true_cfg_scale": 2.0}
    image = torch.rand(BATCH, 3, 16, 16)
    return pipe, {**words, **pooled, "control_image": image, "height": 16, "width": 16}


KINDS: dict[str, Callable[[], Any]] = {
    "one": of_stable_diffusion,
    "guess mode": lambda: of_stable_diffusion(guess_mode=True),
    "that ends": lambda: of_stable_diffusion(control_guidance_end=0.5),
    "several": of_several,
    "SD3": of_sd3,
    "FLUX, two calls": of_flux,
}


@cache
def traced(kind: str) -> tuple[Any, dict[str, Any], MaskSchedule]:
    """A pipeline, its call, and the table that computes everything; proven for one of each kind of reader."""
    torch.manual_seed(0)
    pipe, call = KINDS[kind]()
    pipe.set_progress_bar_config(disable=True)
    call = {**call, **LATENT, "num_inference_steps": STEPS}
    trajectory = stepmask.record(pipe, **call)
    graph = stepmask.trace(pipe, trajectory, prove=kind in ("guess mode", "SD3", "FLUX, two calls"))
    return pipe, call, MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


def sample(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    latent: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    return latent


@contextmanager
def counted(module: nn.Module) -> Iterator[list[None]]:
    """The calls that are really made of a module."""
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def of_steps(reference: MaskSchedule, computed: set[int]) -> MaskSchedule:
    """Whole steps, computed or reused."""
    rows = np.array([[step in computed] * len(reference.graph) for step in range(reference.steps)])
    return reference.with_rows(rows)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_it_is_told(self, kind: str) -> None:
        _, _, reference = traced(kind)
        assert reference.graph.companions == ("controlnet",)
        assert "and its controlnet" in repr(reference)
        assert MaskSchedule.from_json(reference.to_json()) == reference

    def test_all_compute_is_bitwise_the_pipeline(self, kind: str) -> None:
        pipe, call, reference = traced(kind)
        expected = sample(pipe, call)
        with stepmask.apply(pipe, reference), counted(pipe.controlnet) as calls:
            assert torch.equal(sample(pipe, call), expected)
        assert len(calls) == STEPS
        assert torch.equal(sample(pipe, call), expected)

    def test_it_is_called_at_computed_steps_alone(self, kind: str) -> None:
        pipe, call, reference = traced(kind)
        table = of_steps(reference, {0, 2, 3})
        with stepmask.apply(pipe, table) as masked, counted(pipe.controlnet) as calls:
            given = sample(pipe, call)
        assert len(calls) == 3
        assert masked.computed_macs == reference.sampler.branches * lower(table).macs
        assert lower(table).macs_share == pytest.approx(3 / 5)

        called = without_feeders(reference).with_rows(table.rows)
        with stepmask.apply(pipe, called), counted(pipe.controlnet) as calls:
            assert torch.equal(sample(pipe, call), given)
        assert len(calls) == STEPS

    def test_tables_that_reuse_some_blocks_give_the_same_without_skipping(self, kind: str) -> None:
        pipe, call, reference = traced(kind)
        rows = np.random.default_rng(0).random(reference.rows.shape) < 0.4
        rows[0] = True
        rows[:, -1] = True
        rows[2, :-1] = False
        with stepmask.apply(pipe, reference.with_rows(rows)) as masked:
            given = sample(pipe, call)
        assert masked.computed_macs == reference.sampler.branches * lower(reference.with_rows(rows)).macs
        with stepmask.apply(pipe, without_feeders(reference).with_rows(rows)):
            assert torch.equal(sample(pipe, call), given)


class TestUNet:
    def test_blocks_on_the_way_up_read_it(self) -> None:
        _, _, reference = traced("one")
        graph = reference.graph
        readers = {graph.names[column] for column in graph.fed[".controlnet"]}
        skips = {name for name in graph.names if name.startswith("up_blocks") and ".resnets." in name}
        assert readers == skips

    def test_it_is_left_out_where_none_of_them_is_computed(self) -> None:
        pipe, call, reference = traced("one")
        with stepmask.apply(pipe, fixed_interval(reference, 0.4)), counted(pipe.controlnet) as calls:
            sample(pipe, call)
        assert len(calls) == 2

    def test_it_is_called_for_a_single_one(self) -> None:
        pipe, call, reference = traced("one")
        rows = of_steps(reference, {0}).rows.copy()
        rows[:, -1] = True
        rows[3, reference.graph.fed[".controlnet"][-1]] = True
        with stepmask.apply(pipe, reference.with_rows(rows)), counted(pipe.controlnet) as calls:
            sample(pipe, call)
        assert len(calls) == 2

    def test_a_graph_that_forgets_a_reader_is_refused(self) -> None:
        pipe, call, reference = traced("one")
        first, *others = without_feeders(reference).graph.blocks
        wrong = BlockGraph((replace(first, feeders=(*first.feeders, f"{BESIDE}controlnet")), *others))
        with pytest.raises(TraceError, match="that nothing but masked blocks read"):
            check_against_record(stepmask.record(pipe, **call), wrong)


class TestTransformer:
    def test_the_stream_carries_it_to_the_output(self) -> None:
        pipe, call, reference = traced("SD3")
        assert reference.graph.blocks[-1].feeders == (".controlnet",)
        with stepmask.apply(pipe, fixed_interval(reference, 0.4)), counted(pipe.controlnet) as calls:
            sample(pipe, call)
        assert len(calls) == STEPS

    def test_two_calls_share_it(self) -> None:
        """It is called where one of the two runs; half of its MACs count for each."""
        pipe, call, reference = traced("FLUX, two calls")
        tables = [of_steps(reference, {0, 1}), of_steps(reference, {0, 3})]
        with stepmask.apply(pipe, tables), counted(pipe.controlnet) as calls:
            sample(pipe, call)
        assert len(calls) == 3


class TestMacs:
    def test_they_are_those_of_its_layers(self) -> None:
        """A ControlNet of zero layers would count nothing: what it counts is what the pipeline without it lacks."""
        pipe, call, reference = traced("one")
        bare = diffusers.StableDiffusionPipeline(
            *(pipe.vae, None, None, pipe.unet, pipe.scheduler, None, None), requires_safety_checker=False
        )
        bare.set_progress_bar_config(disable=True)
        words = {name: value for name, value in call.items() if name != "image"}
        graph = stepmask.trace(bare, stepmask.record(bare, **words, height=8, width=8), prove=False)
        own = reference.graph.macs - graph.macs
        assert not own[:-1].any()

        down = [column for column, name in enumerate(graph.names) if name.startswith(("down_blocks", "mid_block"))]
        assert graph.macs[down].sum() < own[-1] < graph.macs.sum()  # a copy of the way down, and convolutions

    def test_what_is_executed_is_what_was_planned(self) -> None:
        pipe, call, reference = traced("one")
        intervals = {"interval": fixed_interval(reference, 0.5)}
        report = stepmask.evaluate(pipe, whole_step(reference, 0.5), rivals=intervals, repeats=1, **call)
        for row in report.rows:
            assert row.macs_executed == pytest.approx(row.macs_planned)
        assert report["schedule"].macs_executed == pytest.approx(2 / 5)
        assert report.setting["MACs"] == "of UNet2DConditionModel and its controlnet"

    def test_another_pipeline_is_counted_with_its_own(self) -> None:
        pipe, call, reference = traced("one")
        same, _ = KINDS["one"]()
        same.set_progress_bar_config(disable=True)
        report = stepmask.evaluate(pipe, whole_step(reference, 0.5), rivals={"same": same}, repeats=1, **call)
        assert report["same"].macs_executed == 1


class TestMismatches:
    def test_a_pipeline_without_one_is_refused(self) -> None:
        _, _, reference = traced("one")
        pipe, _ = stable_diffusion()
        with pytest.raises(ScheduleMismatch, match="calls no controlnet"):
            stepmask.apply(pipe, reference)
        stepmask.apply(pipe, without_feeders(reference)).remove()

    def test_a_table_made_without_it_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        pipe, call, reference = traced("one")
        with stepmask.apply(pipe, of_steps(without_feeders(reference), {0})), counted(pipe.controlnet) as calls:
            sample(pipe, call)
        assert len(calls) == STEPS
        assert "made without the controlnet" in caplog.text

    def test_another_one_put_into_the_pipeline_is_skipped_likewise(self) -> None:
        pipe, call, reference = traced("one")
        before = pipe.controlnet
        other = stirred(diffusers.ControlNetModel.from_config(before.config))
        with stepmask.apply(pipe, of_steps(reference, {0})), counted(other) as calls:
            sample(pipe, call)
            pipe.controlnet = other
            try:
                with counted(before) as others:
                    sample(pipe, call)
            finally:
                pipe.controlnet = before
        assert (len(calls), len(others)) == (1, 0)


class TestCalls:
    def test_outside_of_runs_it_answers_by_itself(self) -> None:
        pipe, call, reference = traced("one")
        given = stepmask.record(pipe, **call).calls[1].kwargs
        told = {"encoder_hidden_states": given["encoder_hidden_states"], "controlnet_cond": torch.cat([PICTURE] * 2)}
        latents = torch.randn(2 * BATCH, 4, 8, 8)
        with torch.no_grad():
            expected = pipe.controlnet(latents, 1, **told, return_dict=False)[1]
            with stepmask.apply(pipe, of_steps(reference, {0})):
                sample(pipe, call)
                assert torch.equal(pipe.controlnet(latents, 1, **told, return_dict=False)[1], expected)

    def test_what_is_skipped_cannot_be_read(self) -> None:
        """A loop that looks at the residuals is refused at a reused step."""
        pipe, call, reference = traced("one")
        seen: list[float] = []
        looks = attached({pipe.unet: _Looks(seen)})
        with pytest.raises(RunError, match="read by"), stepmask.apply(pipe, of_steps(reference, {0})), looks:
            sample(pipe, call)
        assert len(seen) == 1

    def test_a_masked_run_is_recorded_with_all_of_its_answers(self) -> None:
        pipe, call, reference = traced("one")
        with stepmask.apply(pipe, of_steps(reference, {0, 2})):
            trajectory = stepmask.record(pipe, **call)
        for evaluation in trajectory.calls:
            assert not any(isinstance(value, Unread) for value in evaluation.kwargs.values())
            assert not isinstance(evaluation.kwargs["mid_block_additional_residual"], Unread)

    def test_guidance_that_ends_takes_smaller_answers(self) -> None:
        """At the first step without guidance it is called, whether read or not, for its answers have another size."""
        pipe, call = of_stable_diffusion()
        pipe.set_progress_bar_config(disable=True)

        def end(pipe: Any, step: int, _: Any, held: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipe._guidance_scale = 1.0
                return {name: value.chunk(2)[1] for name, value in held.items()}
            return {}

        call = {**call, **LATENT, "image": PICTURE, "num_inference_steps": STEPS, "callback_on_step_end": end}
        call["callback_on_step_end_tensor_inputs"] = ["prompt_embeds", "image"]
        trajectory = stepmask.record(pipe, **call)
        graph = stepmask.trace(pipe, trajectory)
        reference = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        table = of_steps(reference, {0, 4})
        with stepmask.apply(pipe, table), counted(pipe.controlnet) as calls:
            sample(pipe, call)
        assert len(calls) == 3


def test_a_schedule_is_learned(caplog: pytest.LogCaptureFixture) -> None:
    pipe, call, reference = traced("SD3")
    caplog.set_level(logging.WARNING)
    trajectory = stepmask.record(pipe, **call)
    learner = TrainedForecasts(passes=1.2)
    schedule = stepmask.learn(pipe, trajectory, budget=0.7, learner=learner, graph=reference.graph)
    assert lower(schedule).macs_share <= 0.7
    with stepmask.apply(pipe, schedule), counted(pipe.controlnet) as calls:
        assert torch.isfinite(sample(pipe, call)).all()
    assert len(calls) <= STEPS
    assert "controlnet" not in caplog.text


def test_a_name_beside_the_denoiser_is_no_module_of_it() -> None:
    with pytest.raises(KeyError):
        nn.Module().add_module("", nn.Identity())
    graph = BlockGraph((Block("a"), Block("", ("a",), feeders=(f"{BESIDE}controlnet",))))
    assert graph.companions == ("controlnet",)
    assert graph.without_feeders().companions == ()


class _Looks(Hook):
    """Looks at the numbers of the middle residual, in front of the U-Net."""

    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append(float(kwargs["mid_block_additional_residual"].sum()))
        return call(*args, **kwargs)
