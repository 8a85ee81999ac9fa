"""Compiled blocks stay compiled: masks add no graph, whether they come before or after compiling."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import stepmask
from stepmask import MaskSchedule
from stepmask.denoiser.families import fingerprint_of
from stepmask.errors import RunError
from test_runtime import DIT, UNET, random_table

from toys import per_channel, tiny_dit, tiny_unet

STEPS = 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(denoiser: nn.Module, schedule: MaskSchedule) -> None:
    for block in map(denoiser.get_submodule, schedule.graph.names[:-1]):
        if not type(block).__module__.startswith("torch.nn."):  # the compiler skips a bare layer's forward
            block.compile(backend="eager", fullgraph=True)


def sample(denoiser: nn.Module, example: tuple[Any, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = [torch.randn(example[0].shape, generator=generator) for _ in range(STEPS)]
        return [denoiser(latent, *example[1:]).sample for latent in latents]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("form", [lambda scalar: scalar, per_channel], ids=["scalar", "per_channel"])
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize(("make", "example"), [(tiny_dit, DIT), (tiny_unet, UNET)])
def test_masks_add_no_graph(make: Any, example: tuple[Any, ...], granularity: Any, form: Any) -> None:
    denoiser = make()
    graph = stepmask.trace(denoiser, example, granularity=granularity)
    schedule = form(random_table(graph, denoiser, STEPS, seed=0))
    full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), schedule.sampler)
    with stepmask.apply(denoiser, schedule):
        eager = sample(denoiser, example)

    compile_blocks(denoiser, full)
    with stepmask.apply(denoiser, full):
        sample(denoiser, example)
    unmasked = graphs()
    assert unmasked > 0
    with stepmask.apply(denoiser, schedule), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = sample(denoiser, example)
    assert graphs() == unmasked
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize(("make", "example"), [(tiny_dit, DIT), (tiny_unet, UNET)])
def test_as_many_graphs_as_the_bare_denoiser(make: Any, example: tuple[Any, ...], granularity: Any) -> None:
    bare = make()
    graph = stepmask.trace(bare, example, granularity=granularity)
    full = MaskSchedule.all_compute(graph, fingerprint_of(bare), random_table(graph, bare, STEPS, seed=0).sampler)
    compile_blocks(bare, full)
    sample(bare, example)
    expected = graphs()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    denoiser = make()
    with stepmask.apply(denoiser, full) as masked:
        masked.compile(backend="eager", fullgraph=True)
        sample(denoiser, example)
    assert graphs() == expected > 0


class TestAsAWhole:
    def test_a_denoiser_compiled_before_is_refused(self) -> None:
        denoiser = tiny_dit()
        schedule = random_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        with pytest.raises(RunError, match=r"masked\.compile"):
            stepmask.apply(torch.compile(denoiser, backend="eager"), schedule)
        denoiser.compile(backend="eager")
        with pytest.raises(RunError, match=r"masked\.compile"):
            stepmask.apply(denoiser, schedule)

    def test_a_denoiser_compiled_after_is_refused(self) -> None:
        denoiser = tiny_dit()
        schedule = random_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        masked = stepmask.apply(denoiser, schedule)
        denoiser.compile(backend="eager")
        with pytest.raises(RunError, match=r"masked\.compile"):
            masked.restart()
