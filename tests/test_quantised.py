"""Quantised weights: schedules hold for them, are learned from them, and the plan counts as with whole ones."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stepmask
from denoisers import build, sampler
from pipelines import make
from promises import half_of
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.families import denoiser_of, fingerprint_of
from stepmask.denoiser.identity import weights_digest
from stepmask.denoiser.seam import attached, frozen
from stepmask.errors import LearningError
from stepmask.evaluation.measure import MacCounter
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.per_timestep import PerTimestep
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def quanto(kind: str) -> Callable[[nn.Module], None]:
    def quantise(denoiser: nn.Module) -> None:
        import optimum.quanto

        optimum.quanto.quantize(denoiser, weights=getattr(optimum.quanto, kind))
        optimum.quanto.freeze(denoiser)

    return quantise


def torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(denoiser: nn.Module) -> None:
        package = pytest.importorskip("torchao.quantization")
        package.quantize_(denoiser, getattr(package, config)())

    return quantise


def gguf(denoiser: nn.Module) -> None:
    """As diffusers holds what it reads from a GGUF file; rows of fewer than 32 numbers stay whole, as there."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    for module in list(denoiser.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer.in_features % 32 == 0:
                told = (layer.in_features, layer.out_features, layer.bias is not None)
                held = GGUFLinear(*told, compute_dtype=torch.float32)
                packed = torch.from_numpy(quants.quantize(layer.weight.detach().numpy(), GGMLQuantizationType.Q8_0))
                held.weight = GGUFParameter(packed, quant_type=GGMLQuantizationType.Q8_0)
                held.bias = layer.bias
                setattr(module, name, held)


def dynamic(denoiser: nn.Module) -> None:
    """torch's own, which has no gradient."""
    torch.ao.quantization.quantize_dynamic(denoiser, {nn.Linear}, dtype=torch.qint8, inplace=True)


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "optimum-quanto, int8": quanto("qint8"),
    "optimum-quanto, float8": quanto("qfloat8"),
    "GGUF, Q8_0": gguf,
    "torchao, int8": torchao("Int8WeightOnlyConfig"),
    "torchao, dynamic int8": torchao("Int8DynamicActivationInt8WeightConfig"),
}

CASES = [
    *((name, "optimum-quanto, int8") for name in ("FluxPipeline", "StableDiffusionPipeline", "PixArt")),
    *(("FluxPipeline", kind) for kind in KINDS if kind != "optimum-quanto, int8"),
]


def given(name: str) -> tuple[Any, Callable[[], Trajectory]]:
    """A pipeline or a plain denoiser, and how to record it."""
    if name == "PixArt":
        denoiser, inputs = build("PixArtTransformer2DModel")
        return denoiser, lambda: stepmask.record(denoiser, run=sampler(denoiser, inputs, 3))
    pipe, call = make(name)
    return pipe, lambda: stepmask.record(pipe, **{**call, "num_inference_steps": 3})


@cache
def whole(name: str) -> tuple[MaskSchedule, Any, Any]:
    """With whole weights: the all-compute table, what a sweep finds, and a gradient of forecast weights."""
    pipe, record = given(name)
    run = record()
    full = MaskSchedule.all_compute(stepmask.trace(pipe, run, prove=False), run.denoiser, run.sampler)
    return full, stepmask.sweep(pipe, run, graph=full.graph, probes=1, ages=2).inner, gradients(run, full)


def gradients(run: Trajectory, full: MaskSchedule) -> Any:
    table = fixed_interval(full, 0.7)
    weights = torch.tensor(table.forecasts, dtype=torch.float32)
    return loss_and_gradients(run, table, weights, lambda latent: latent.square().sum())[1].numpy()


def is_near(found: Any, expected: Any) -> bool:
    """Whether gradients are those of nearly the same network."""
    return bool(np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_quantised_denoiser_is_as_a_whole_one(name: str, kind: str) -> None:
    full, swept, pulled = whole(name)
    pipe, record = given(name)
    KINDS[kind](denoiser_of(pipe))
    run = record()
    assert run.denoiser == full.denoiser

    graph = stepmask.trace(pipe, run)
    assert graph == full.graph
    with stepmask.apply(pipe, half_of(full)) as masked:
        latent = run.sampling().latent
        macs = masked.computed_macs
    assert torch.isfinite(latent).all()
    counter = MacCounter(run.sampling.denoiser)
    with frozen(run.sampling.denoiser), attached({run.sampling.denoiser: counter}):
        run.sampling()
    assert counter.macs == full.graph.macs.sum() * full.steps * full.sampler.branches
    assert macs < counter.macs

    assert is_near(stepmask.sweep(pipe, run, graph=graph, probes=1, ages=2).inner, swept)
    assert is_near(gradients(run, full), pulled)
    stepmask.learn(pipe, run, 0.7, graph=graph, learner=PerTimestep(iterations=1, rounds=1))


def test_a_schedule_is_evaluated_on_quantised_weights() -> None:
    full, *_ = whole("FluxPipeline")
    pipe, call = make("FluxPipeline")
    quanto("qint8")(pipe.transformer)
    report = stepmask.evaluate(pipe, half_of(full), seed=[1], repeats=1, **{**call, "num_inference_steps": 3})
    assert report["schedule"].macs_executed == pytest.approx(lower(half_of(full)).macs_share)


def test_weights_that_cut_gradients_off_are_not_learned_from() -> None:
    full, *_ = whole("FluxPipeline")
    pipe, record = given("FluxPipeline")
    dynamic(pipe.transformer)
    run = record()
    assert stepmask.trace(pipe, run) == full.graph
    with stepmask.apply(pipe, half_of(full)):
        assert torch.isfinite(run.sampling().latent).all()
    for learn in (
        lambda: stepmask.sweep(pipe, run, graph=full.graph, probes=1),
        lambda: stepmask.learn(pipe, run, 0.7, graph=full.graph, learner=PerTimestep(iterations=1, rounds=1)),
        lambda: gradients(run, full),
    ):
        with pytest.raises(LearningError, match="Learn before you quantise"):
            learn()


@pytest.mark.parametrize("quantise", [*KINDS.values(), dynamic], ids=[*KINDS, "torch, dynamic int8"])
def test_folders_and_plain_modules(quantise: Callable[[nn.Module], None]) -> None:
    """A folder tells quantised weights from each other; a plain module is known whatever its weights are held as."""
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    fingerprint = fingerprint_of(networks[0])
    bare = weights_digest(networks[0])
    for network in networks:
        quantise(network)
    one, same, other = map(weights_digest, networks)
    assert one == same
    assert len({bare, one, other}) == 3
    fingerprint.check(fingerprint_of(networks[0]))
    fingerprint_of(networks[0]).check(fingerprint)


def test_what_a_configuration_says_of_quantisation_is_no_part_of_a_schedule() -> None:
    denoiser, _ = build("PixArtTransformer2DModel")
    before = fingerprint_of(denoiser)
    from diffusers import GGUFQuantizationConfig

    denoiser.register_to_config(quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32))
    assert fingerprint_of(denoiser) == before
