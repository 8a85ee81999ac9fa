"""What users do to a pipeline besides: masks keep their promises with it, or say why not."""

import copy
import pickle
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import stepmask
from pipelines import make
from promises import check_promises, random_table
from stepmask.errors import AlreadyApplied, LearningError, RunError, RunNotStarted

CPU = torch.device("cpu")


def adapt(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def offload_groups(kind: str) -> Callable[[Any], None]:
    told = {"offload_type": kind, **({"num_blocks_per_group": 1} if kind == "block_level" else {})}
    return lambda pipe: pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, **told)


def checkpoint(pipe: Any) -> None:
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()


BESIDES: dict[str, Callable[[Any], Any]] = {
    "LoRA": adapt,
    "fused QKV projections": lambda pipe: pipe.fuse_qkv_projections(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload, blocks": offload_groups("block_level"),
    "group offload, leaves": offload_groups("leaf_level"),
    "layerwise casting": lambda pipe: pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "gradient checkpointing": checkpoint,
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


def sample(pipe: Any, call: dict[str, Any]) -> Any:
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("what", BESIDES)
def test_before(what: str) -> None:
    pipe, call = make("StableDiffusionPipeline")
    BESIDES[what](pipe)
    check_promises(pipe, stepmask.record(pipe, **call))


@pytest.mark.parametrize("what", BESIDES)
def test_after_is_as_before(what: str) -> None:
    pipe, call = make("StableDiffusionPipeline")
    schedule = random_table(pipe, stepmask.record(pipe, **call))
    with stepmask.apply(pipe, schedule):
        BESIDES[what](pipe)
        after = sample(pipe, call)
    with stepmask.apply(pipe, schedule):
        assert torch.equal(sample(pipe, call), after)


def swept(what: str | None, *, checkpoint_blocks: bool = False) -> Any:
    """What one probe finds of a pipeline with something besides; `None` = nothing."""
    pipe, call = make("StableDiffusionPipeline")
    if what is not None:
        BESIDES[what](pipe)
    run = stepmask.record(pipe, **call)
    return stepmask.sweep(pipe, run, probes=1, ages=2, checkpoint_blocks=checkpoint_blocks).inner


@cache
def swept_bare() -> Any:
    return swept(None)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("what", sorted(BESIDES.keys() - {"LoRA", "layerwise casting"}))
def test_a_sweep_finds_the_same_with_it(what: str, checkpoint_blocks: bool) -> None:
    expected = swept_bare()
    size = np.abs(expected).max()
    np.testing.assert_allclose(swept(what, checkpoint_blocks=checkpoint_blocks), expected, rtol=0, atol=1e-5 * size)


def test_a_sweep_in_bfloat16_finds_the_same_to_rounding() -> None:
    pipe, call = make("StableDiffusionPipeline")
    run = stepmask.record(pipe.to(torch.bfloat16), **half(call))
    expected = swept_bare()
    plain, again = (stepmask.sweep(pipe, run, probes=1, ages=2, checkpoint_blocks=kept).inner for kept in (False, True))
    np.testing.assert_array_equal(plain, again)
    assert np.linalg.norm(plain - expected) < 0.1 * np.linalg.norm(expected)


def test_weights_that_are_cast_layer_by_layer_are_not_swept() -> None:
    with pytest.raises(LearningError, match="without enable_layerwise_casting"):
        swept("layerwise casting")


def half(call: dict[str, Any]) -> dict[str, Any]:
    return {key: value.bfloat16() if isinstance(value, torch.Tensor) else value for key, value in call.items()}


def test_a_pipeline_that_changes_its_dtype_and_its_batch_size_between_runs() -> None:
    pipe, call = make("StableDiffusionPipeline")
    schedule = random_table(pipe, stepmask.record(pipe, **call))
    single = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    with stepmask.apply(pipe, schedule):
        first = sample(pipe, call)
        assert sample(pipe, single).shape == (1, 4, 8, 8)
        assert sample(pipe, {**call, "height": 16}).shape == (2, 4, 16, 8)
        pipe.to(torch.bfloat16)
        assert sample(pipe, half(call)).dtype == torch.bfloat16
        pipe.to(torch.float32)
        assert sample(pipe, call).shape == first.shape


class TestOneDenoiserOneRun:
    """A store is one run's."""

    def test_two_pipelines_that_share_a_denoiser(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        other.set_progress_bar_config(disable=True)
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        with stepmask.apply(pipe, schedule):
            with pytest.raises(AlreadyApplied):
                stepmask.apply(other, schedule)
            with pytest.raises(RunNotStarted):
                sample(other, call)
        sample(other, call)

    def test_threads_with_pipelines_of_their_own(self) -> None:
        made = [make("StableDiffusionPipeline") for _ in range(2)]
        schedule = random_table(made[0][0], stepmask.record(made[0][0], **made[0][1]))
        found: list[Any] = []

        def run(pipe: Any, call: dict[str, Any]) -> None:
            with stepmask.apply(pipe, schedule):
                found.append(sample(pipe, call))

        threads = [threading.Thread(target=run, args=pair) for pair in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(*found)

    def test_a_thread_that_steps_into_another_s_run_is_refused(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        schedule = random_table(pipe, stepmask.record(pipe, **call))
        refused: list[Exception] = []

        def intrude() -> None:
            try:
                pipe.unet(torch.zeros(4, 4, 8, 8), 500, torch.zeros(4, 6, 8))
            except RunError as error:
                refused.append(error)

        def after_a_step(*told: Any) -> dict[str, Any]:
            if not refused:
                thread = threading.Thread(target=intrude)
                thread.start()
                thread.join()
            return {}

        with stepmask.apply(pipe, schedule):
            plain = sample(pipe, call)
            assert torch.equal(sample(pipe, {**call, "callback_on_step_end": after_a_step}), plain)
        assert "another thread" in str(refused[0])


@pytest.mark.parametrize("take", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_of_a_masked_denoiser_are_bare(take: Callable[[Any], Any]) -> None:
    pipe, call = make("StableDiffusionPipeline")
    bare = sample(pipe, call)
    with stepmask.apply(pipe, random_table(pipe, stepmask.record(pipe, **call))):
        copied = take(pipe.unet)
    pipe.unet = copied
    assert torch.equal(sample(pipe, call), bare)


def test_a_masked_pipeline_is_saved_as_if_it_were_bare(tmp_path: Path) -> None:
    pipe, call = make("DiTPipeline")
    with stepmask.apply(pipe, random_table(pipe, stepmask.record(pipe, **call))):
        pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert sample(loaded, call) == sample(pipe, call)


def test_a_cache_that_is_switched_on_later_is_refused() -> None:
    pipe, call = make("WanPipeline")
    with stepmask.apply(pipe, random_table(pipe, stepmask.record(pipe, **call))):
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(AlreadyApplied, match="disable_cache"):
            sample(pipe, call)


def test_free_u_writes_into_what_may_be_stored() -> None:
    pipe, call = make("StableDiffusionPipeline")
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2)
    with pytest.raises(stepmask.StepmaskError, match="changes in place"):
        stepmask.trace(pipe, stepmask.record(pipe, **call))


def test_a_server_that_runs_in_inference_mode_throughout() -> None:
    pipe, call = make("StableDiffusionPipeline")
    run = stepmask.record(pipe, **call)
    schedule = random_table(pipe, run)
    with stepmask.apply(pipe, schedule):
        expected = sample(pipe, call)
    swept = stepmask.sweep(pipe, run, graph=schedule.graph, probes=1, ages=2).inner
    with torch.inference_mode():
        inside = stepmask.record(pipe, **call)
        assert stepmask.trace(pipe, inside) == schedule.graph
        with stepmask.apply(pipe, schedule):
            assert torch.equal(sample(pipe, call), expected)
            assert torch.equal(sample(pipe, call), expected)
        report = stepmask.evaluate(pipe, schedule, seed=[1], repeats=1, **call)
        assert np.array_equal(stepmask.sweep(pipe, inside, graph=schedule.graph, probes=1, ages=2).inner, swept)
    again = stepmask.evaluate(pipe, schedule, seed=[1], repeats=1, **call)
    assert report["schedule"].latent_errors == again["schedule"].latent_errors
    with stepmask.apply(pipe, schedule):
        assert torch.equal(sample(pipe, call), expected)
