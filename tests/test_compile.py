"""Compiled regions: masks add as many graphs as there are patterns, whenever they come, and the samples stay."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from accelerate.utils import compile_regions
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import stepmask
from denoisers import denoiser as tiny
from pipelines import make
from promises import random_table
from stepmask import MaskSchedule
from stepmask.denoiser.families import denoiser_of, fingerprint_of
from stepmask.denoiser.regions import modules_by_name, repeated_regions, unwrapped
from stepmask.denoiser.timing import time_blocks
from stepmask.errors import RunError
from stepmask.schedule.graph import DENOISER
from stepmask.schedule.rectify import lower
from test_runtime import DIT, PIXART, UNET
from test_runtime import random_table as random_plain_table

from toys import Chain, Scale, per_channel, table, tiny_dit, tiny_pixart, tiny_unet, untimed

OPTIONS: dict[str, Any] = {"backend": "eager", "fullgraph": True}
STEPS = 4
COMPILED = ("DiTPipeline", "StableDiffusionPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "WanPipeline")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    limits = {name: getattr(torch._dynamo.config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with torch._dynamo.config.patch(limits):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


def patterns(schedule: MaskSchedule, region: str) -> set[Any]:
    """What the blocks of a region are told at the steps of a plan: bits, and how many values they read."""
    plan = lower(schedule)
    columns = [
        column
        for column, block in enumerate(schedule.graph.blocks[:-1])
        if not region or block.name.startswith(f"{region}.")
    ]
    rows = [row for row in plan.cells if any(cell.action == "compute" for cell in row)]
    cells = [[row[column] for column in columns] for row in rows]
    return {
        tuple((cell.action, len(cell.weights) if cell.vectors is None else len(cell.vectors)) for cell in row)
        for row in cells
    }


def expected_graphs(denoiser: nn.Module, schedule: MaskSchedule, regions: list[str]) -> int:
    """A graph for each pattern of each class of regions, and of each size of what its blocks answer."""
    modules = modules_by_name(denoiser)
    alike: dict[Any, set[Any]] = {}
    for region in regions:
        inside = [block for block in schedule.graph.blocks if block.name.startswith(f"{region}.")]
        kind = type(unwrapped(modules[region])), tuple(block.shapes for block in inside)
        alike.setdefault(kind, set()).update(patterns(schedule, region))
    return sum(map(len, alike.values()))


def with_masks_inside(schedule: MaskSchedule, regions: list[str]) -> list[str]:
    names = schedule.graph.names[:-1]
    return [region for region in regions if any(name.startswith(f"{region}.") for name in names)]


def compile_blocks(denoiser: Any) -> None:
    """As diffusers recommends it, or by hand where the class does not name its repeated blocks."""
    if denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks(**OPTIONS)
    else:
        for block in denoiser.transformer_blocks:
            block.compile(**OPTIONS)


def compiled_names(denoiser: nn.Module) -> list[str]:
    """What `compile_blocks` compiles."""
    repeated = getattr(denoiser, "_repeated_blocks", None)
    if not repeated:
        return [f"transformer_blocks.{layer}" for layer in range(len(denoiser.transformer_blocks))]
    return [name for name, part in denoiser.named_modules() if type(part).__name__ in repeated]


def graphs_of(pipe: Any, regions: list[str], call: Any) -> int:
    """How many graphs a bare pipeline has of some of its regions; the compiler is left as if it had none."""
    for region in regions:
        denoiser_of(pipe).get_submodule(region).compile(**OPTIONS)
    stepmask.record(pipe, **call).sampling()
    count = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return count


class TestPipelines:
    """On real pipelines, at both granularities, compiled before and after."""

    @pytest.mark.parametrize(
        ("name", "granularity", "after"),
        [
            *product(COMPILED, ["sublayer", "block"], [False]),
            # what comes first is a matter of the seam, whatever the class: both places of masks, both of compiling
            ("DiTPipeline", "sublayer", True),
            ("DiTPipeline", "block", True),
            ("StableDiffusionPipeline", "block", True),
        ],
    )
    def test_repeated_blocks(self, name: str, granularity: Any, after: bool) -> None:
        pipe, call = make(name)
        trajectory = stepmask.record(pipe, **call)
        schedule = random_table(pipe, trajectory, granularity)
        with stepmask.apply(pipe, schedule):
            eager = trajectory.sampling().latent

        # Regions that are blocks themselves have the graphs that they have without masks.
        regions = compiled_names(denoiser_of(pipe))
        inside = with_masks_inside(schedule, regions)
        bare, _ = make(name)
        alone = graphs_of(bare, [region for region in regions if region not in inside], call)

        if not after:
            compile_blocks(denoiser_of(pipe))
        with stepmask.apply(pipe, schedule):
            if after:
                compile_blocks(denoiser_of(pipe))
            torch.testing.assert_close(trajectory.sampling().latent, eager, rtol=1e-4, atol=1e-4)
            count = graphs()
            trajectory.sampling()
            assert graphs() == count > 0
        assert count <= expected_graphs(denoiser_of(pipe), schedule, inside) + alone
        assert not breaks()

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("how", ["accelerate", "wrapped", "in place"])
    def test_other_ways_to_compile(self, how: str, after: bool) -> None:
        pipe, call = make("DiTPipeline")
        trajectory = stepmask.record(pipe, **call)
        schedule = random_table(pipe, trajectory)
        with stepmask.apply(pipe, schedule):
            eager = trajectory.sampling().latent

        def compiled() -> None:
            if how == "accelerate":
                pipe.transformer = compile_regions(pipe.transformer, **OPTIONS)
            elif how == "wrapped":
                pipe.transformer = torch.compile(pipe.transformer, **OPTIONS)
            else:
                pipe.transformer.compile(**OPTIONS)

        if not after:
            compiled()
            assert stepmask.trace(pipe, trajectory).names == schedule.graph.names
        with stepmask.apply(pipe, schedule) as masked:
            if after:
                compiled()
            torch.testing.assert_close(trajectory.sampling().latent, eager, rtol=1e-4, atol=1e-4)
            count = graphs()
            trajectory.sampling()
            assert graphs() == count > 0
            assert masked.computed_macs == 2 * lower(schedule).macs * trajectory.sampler.branches
            if how != "accelerate":
                assert count <= len(patterns(schedule, ""))

    def test_what_was_compiled_can_be_recorded_and_learned_from(self) -> None:
        pipe, call = make("DiTPipeline")
        bare = stepmask.record(pipe, **call)
        compile_blocks(pipe.transformer)
        trajectory = stepmask.record(pipe, **call)
        assert torch.equal(trajectory.sampled.latent, bare.sampled.latent)
        assert stepmask.trace(pipe, trajectory) == stepmask.trace(pipe, bare)
        swept, expected = (stepmask.sweep(pipe, run, probes=1, ages=2).inner for run in (trajectory, bare))
        assert np.array_equal(swept, expected)
        assert graphs() == 0  # nothing of that needs speed
        trajectory.sampling()
        assert graphs() > 0

    def test_what_was_compiled_can_be_timed(self) -> None:
        pipe, call = make("DiTPipeline")
        compile_blocks(pipe.transformer)
        trajectory = stepmask.record(pipe, **call)
        timed = time_blocks(pipe, trajectory, stepmask.trace(pipe, trajectory), repeats=1)
        assert sum(block.ms for block in timed.blocks) > 0
        assert graphs() > 0


def sample(denoiser: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = [torch.randn(example[0].shape, generator=generator) for _ in range(STEPS)]
        return [denoiser(latent, *example[1:]).sample for latent in latents]


PLAIN = [(tiny_dit, DIT), (tiny_unet, UNET), (tiny_pixart, PIXART)]


FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 24, 32),
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
    "layers_per_block": 1,
}


class TestGraphs:
    """How many there are."""

    @pytest.mark.parametrize("form", [lambda scalar: scalar, per_channel], ids=["scalar", "per_channel"])
    @pytest.mark.parametrize(("make_denoiser", "example"), PLAIN, ids=["dit", "unet", "pixart"])
    def test_one_for_each_pattern_of_a_class(
        self, make_denoiser: Callable[[], nn.Module], example: tuple[Any, ...], form: Any
    ) -> None:
        denoiser = make_denoiser()
        graph = stepmask.trace(denoiser, example)
        schedule = form(random_plain_table(graph, denoiser, STEPS, seed=0))
        with stepmask.apply(denoiser, schedule):
            eager = sample(denoiser, example)

        # Resnets and the like have graphs of their own, with masks or without.
        regions = repeated_regions(denoiser, graph.names[:-1])
        inside = with_masks_inside(schedule, regions)
        bare = make_denoiser()
        for region in regions:
            if region not in inside:
                bare.get_submodule(region).compile(**OPTIONS)
        sample(bare, example)
        alone = graphs()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

        with stepmask.apply(denoiser, schedule) as masked:
            masked.compile(**OPTIONS)
            torch.testing.assert_close(sample(denoiser, example), eager)
            count = graphs()
            masked.restart()
            sample(denoiser, example)
            assert graphs() == count
        assert inside
        assert count <= expected_graphs(denoiser, schedule, inside) + alone
        assert not breaks()

    def test_as_many_for_twelve_layers_as_for_four(self) -> None:
        counts = []
        for layers in (4, 12):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            denoiser = tiny_dit(layers)
            graph = stepmask.trace(denoiser, DIT)
            rows = np.ones((STEPS, len(graph)), dtype=bool)
            rows[1::2, :-1] = [name.endswith("attn1") for name in graph.names[:-1]]
            rows[2::4, :-1] = False
            full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(STEPS))
            with stepmask.apply(denoiser, full.with_rows(rows)) as masked:
                masked.compile(**OPTIONS)
                sample(denoiser, DIT)
            counts.append(graphs())
        assert counts[0] == counts[1] == 3

    def test_as_many_as_a_class_has_sizes(self) -> None:
        denoiser = tiny("UNet2DModel", **FOUR_LEVELS)
        resnets = [part for part in denoiser.modules() if isinstance(part, ResnetBlock2D)]
        assert len({(part.in_channels, part.out_channels) for part in resnets}) > torch._dynamo.config.recompile_limit
        example = (torch.zeros(1, 3, 8, 8), torch.tensor(5))
        schedule = random_plain_table(stepmask.trace(denoiser, example), denoiser, STEPS, seed=0)
        with stepmask.apply(denoiser, schedule) as masked:
            eager = sample(denoiser, example)
            masked.compile(**OPTIONS)
            masked.restart()
            torch.testing.assert_close(sample(denoiser, example), eager)
        sample(denoiser, example)  # the bare one has its graphs by now
        assert not breaks()

    @torch._dynamo.config.patch(recompile_limit=3)
    def test_masked_runs_take_no_room_from_bare_ones(self) -> None:
        denoiser = tiny_dit()
        schedule = random_plain_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        bare = sample(denoiser, DIT)
        with stepmask.apply(denoiser, schedule) as masked:
            masked.compile(**OPTIONS)
            sample(denoiser, DIT)
        assert graphs() >= 3
        torch.testing.assert_close(sample(denoiser, DIT), bare)

    def test_none_more_for_another_table_of_the_same_patterns(self) -> None:
        denoiser = tiny_dit()
        graph = stepmask.trace(denoiser, DIT)
        full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(STEPS))
        rows = full.rows.copy()
        rows[3::2, :-1] = False
        weights = np.tile((1.0, 0.0, 0.0), (*rows.shape, 1))
        weights[~rows] = (1.5, -0.5, 0.0)
        one = full.with_rows(rows, weights)
        weights[~rows] = (1.25, -0.25, 0.0)
        other = full.with_rows(rows, weights)
        with stepmask.apply(denoiser, one) as masked:
            masked.compile(**OPTIONS)
            said = sample(denoiser, DIT)
        count = graphs()
        with stepmask.apply(denoiser, other), torch._dynamo.config.patch(error_on_recompile=True):
            again = sample(denoiser, DIT)
        assert graphs() == count
        assert torch.equal(said[2], again[2])
        assert not torch.equal(said[3], again[3])

    def test_the_bare_denoiser_keeps_its_own(self) -> None:
        denoiser = tiny_dit()
        schedule = random_plain_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        for block in denoiser.transformer_blocks:
            block.compile(**OPTIONS)
        bare = sample(denoiser, DIT)
        count = graphs()
        with stepmask.apply(denoiser, schedule):
            sample(denoiser, DIT)
        assert graphs() > count
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert all(map(torch.equal, sample(denoiser, DIT), bare))
        assert not any(key in vars(part) for part in denoiser.modules() for key in ("forward", "_stepmask_slot"))


def test_of_a_reused_block_the_compiler_sees_pointwise_operations_alone() -> None:
    seen: list[set[str]] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        module.graph.eliminate_dead_code()  # as every backend does
        called = {getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes
                  if node.op in ("call_function", "call_method")}  # fmt: skip
        seen.append(called)
        return module.forward

    denoiser = tiny_pixart()
    graph = stepmask.trace(denoiser, PIXART)
    full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(STEPS))
    rows = full.rows.copy()
    rows[2:, :-1] = False
    weights = np.tile((1.0, 0.0, 0.0), (*rows.shape, 1))
    weights[~rows] = (1.5, -0.5, 0.0)
    with stepmask.apply(denoiser, full.with_rows(rows, weights)) as masked:
        masked.compile(backend=keep, fullgraph=True)
        sample(denoiser, PIXART)

    computed, reused = seen
    costly = {"linear", "scaled_dot_product_attention", "layer_norm"}
    assert costly <= computed
    assert not costly & reused  # the norms in front of reused blocks are left out with them
    assert {"mul", "add"} <= reused


class WritingLayer(nn.Module):
    """Adds 3x to its input, where that lies, and tells nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scale(3.0)

    def forward(self, x: Tensor) -> None:
        x += self.inner(x)


class Writing(nn.Module):
    """x ↦ 16x in a transposed layout, by two layers that write into it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WritingLayer(), WritingLayer()])

    def forward(self, x: Tensor) -> Tensor:
        x = (x + 0).transpose(1, 2)
        for layer in self.layers:
            layer(x)
        return x


class TestInside:
    """What holds inside a region, too."""

    def test_by_hand(self) -> None:
        # layer 0 says 2, then 4: forecast 1.5·4 − 0.5·2 = 5; on the stream: (4 + 5)·5 = 45
        denoiser = Chain()
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "11", "01", denoiser=fingerprint_of(denoiser))
        weights = schedule.forecasts.copy()
        weights[2, 0] = (1.5, -0.5, 0.0)
        denoiser.compile(**OPTIONS)
        with stepmask.apply(denoiser, schedule.with_rows(schedule.rows, weights)) as masked:
            said = [denoiser(torch.full((2,), x), 0.0).tolist() for x in (1.0, 2.0, 4.0)]
            assert masked.peak_store_bytes == 2 * 2 * 4
            assert masked.store_bytes == 0
        assert said == [[15.0] * 2, [30.0] * 2, [45.0] * 2]

    def test_a_blend_with_one_weight_is_what_was_computed_times_it(self) -> None:
        # at x = 2, layer 0 says .75 · 4 = 3: (2 + 3)·5 = 25
        denoiser = Chain()
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "11", denoiser=fingerprint_of(denoiser))
        weights = schedule.forecasts.copy()
        weights[1, 0] = (0.75, 0.0, 0.0)
        blended = schedule.with_rows(schedule.rows, weights)
        said = []
        for _ in ("eager", "compiled"):
            with stepmask.apply(denoiser, blended):
                said.append([denoiser(torch.full((2,), x), 0.0).tolist() for x in (1.0, 2.0)])
            denoiser.compile(**OPTIONS)
        assert said == [[[15.0] * 2, [25.0] * 2]] * 2

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_what_a_region_writes_into_tokens_is_seen_outside(self, mode: Any) -> None:
        denoiser = Writing()
        x = torch.arange(12.0).reshape(2, 2, 3)
        graph = stepmask.trace(denoiser, (x,), blocks={"layers.*.inner": "output"})
        full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(2))
        with mode():
            bare = denoiser(x)
            for layer in denoiser.layers:
                layer.compile(**OPTIONS)
            with stepmask.apply(denoiser, full):
                assert torch.equal(denoiser(x), bare)
                assert torch.equal(denoiser(x), bare)

    def test_copies_are_bare_and_can_be_masked_themselves(self) -> None:
        denoiser = tiny_dit()
        schedule = random_plain_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        bare = sample(denoiser, DIT)
        with stepmask.apply(denoiser, schedule) as masked:
            masked.compile(**OPTIONS)
            said = sample(denoiser, DIT)
            copied = copy.deepcopy(denoiser)
            assert all(map(torch.equal, sample(copied, DIT), bare))
        torch.testing.assert_close(sample(denoiser, DIT), bare)
        with stepmask.apply(copied, schedule) as masked:
            masked.compile(**OPTIONS)
            torch.testing.assert_close(sample(copied, DIT), said)
        assert not any(key in vars(part) for part in copied.modules() for key in ("forward", "_stepmask_slot"))

    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks_on_a_block_are_refused(self, register: str) -> None:
        denoiser = Chain()
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "01", denoiser=fingerprint_of(denoiser))
        getattr(denoiser.layers[1], register)(lambda *_: None)
        stepmask.apply(denoiser, schedule).remove()
        denoiser.compile(**OPTIONS)
        with pytest.raises(RunError, match=r"'layers\.1', inside a compiled region, which has 1 forward hooks"):
            stepmask.apply(denoiser, schedule)

    def test_blocks_that_the_compiler_skips_are_refused(self) -> None:
        denoiser = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
        graph = stepmask.trace(denoiser, (torch.zeros(7, 3),), blocks={"0": "output", "1": "output"})
        schedule = table(graph, "11", "01", denoiser=fingerprint_of(denoiser))
        with (
            stepmask.apply(denoiser, schedule) as masked,
            pytest.raises(RunError, match="blocks are layers of torch itself"),
        ):
            masked.compile()

    def test_what_nobody_reads_is_not_a_number(self) -> None:
        class Reader(Chain):
            """Adds what layer 0 says to its answer when it is told to."""

            reads_too_much = False

            def forward(self, x: Tensor, t: float) -> Tensor:
                first = self.layers[0](x)
                return self.layers[1](x + first) + t + (first if self.reads_too_much else 0)

        denoiser = Reader()
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "10", denoiser=fingerprint_of(denoiser))
        denoiser.compile(**OPTIONS)
        with stepmask.apply(denoiser, schedule):
            denoiser(torch.ones(2), 0.0)
            assert denoiser(torch.ones(2), 1.0).tolist() == [16.0] * 2  # layer 1 says 15 again
        denoiser.reads_too_much = True
        with stepmask.apply(denoiser, schedule):
            denoiser(torch.ones(2), 0.0)
            assert denoiser(torch.ones(2), 1.0).isnan().all()

    def test_a_block_that_is_called_twice_is_refused(self) -> None:
        class Twice(Chain):
            """Calls layer 0 twice when it is told to."""

            twice = False

            def forward(self, x: Tensor, t: float) -> Tensor:
                return super().forward(self.layers[0](x) if self.twice else x, t)

        denoiser = Twice()
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        denoiser.compile(**OPTIONS)
        with stepmask.apply(denoiser, table(graph, "11", "11", denoiser=fingerprint_of(denoiser))):
            denoiser(torch.ones(2), 0.0)
            denoiser.twice = True
            with pytest.raises(RunError, match=r"'layers\.0', which is called 2 times at step 1"):
                denoiser(torch.ones(2), 0.0)
        assert not any("forward" in vars(part) for part in denoiser.modules())

    def test_a_block_may_call_its_own_forward(self) -> None:
        class Half(Scale):
            """Calls itself once, with half of its input."""

            def forward(self, x: Tensor, again: bool = True) -> Tensor:
                return self.forward(x / 2, again=False) if again else super().forward(x)

        denoiser = Chain()
        denoiser.layers[0] = Half(4.0)
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "01", "01", denoiser=fingerprint_of(denoiser))
        denoiser.compile(**OPTIONS)
        with stepmask.apply(denoiser, schedule):
            assert said(denoiser) == MASKED

    def test_a_shallow_copy_of_a_block_is_no_part_of_the_run(self) -> None:
        denoiser, schedule = halves()
        denoiser.compile(**OPTIONS)
        with stepmask.apply(denoiser, schedule):
            copied = copy.copy(denoiser.layers[0])
            with pytest.raises(RunError, match="outside an evaluation"):
                copied(torch.ones(2))
        assert copied(torch.ones(2)).tolist() == [2.0, 2.0]

    def test_nothing_of_a_class_is_kept(self) -> None:
        class Own(Scale):
            """A class that nobody else has."""

        denoiser = Chain()
        denoiser.layers[0] = Own(2.0)
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "01", "01", denoiser=fingerprint_of(denoiser))
        denoiser.compile(**OPTIONS)
        with stepmask.apply(denoiser, schedule):
            said(denoiser)
        kept = weakref.ref(Own)
        del denoiser, Own
        torch._dynamo.reset()
        gc.collect()
        assert kept() is None

    def test_what_nobody_reads_may_be_written_into(self) -> None:
        class Writer(nn.Module):
            """Layer 1 reads what layer 0 says, of which the denoiser scales a half before (as FreeU does)."""

            scaled = False

            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([Scale(2.0), Scale(5.0)])

            def forward(self, x: Tensor, t: float) -> Tensor:
                first = self.layers[0](x)
                if self.scaled:
                    first[:1] *= 3
                return self.layers[1](first) + t

        denoiser = Writer()
        graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
        schedule = table(graph, "11", "00", "00", denoiser=fingerprint_of(denoiser))
        denoiser.compile(**OPTIONS)
        denoiser.scaled = True
        with stepmask.apply(denoiser, schedule):
            assert [denoiser(x, 1.0 * step).tolist() for step, x in enumerate(STEPS_IN)] == [
                [30.0, 10.0],
                [31.0, 11.0],
                [32.0, 12.0],
            ]

    def test_an_own_forward_is_refused(self) -> None:
        denoiser = tiny_dit()
        schedule = random_plain_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        denoiser.transformer_blocks[0].compile(**OPTIONS)
        attention = denoiser.transformer_blocks[0].attn1
        attention.forward = attention.forward  # as hooks of accelerate and diffusers do
        with pytest.raises(RunError, match="whose forward is not that of its class"):
            stepmask.apply(denoiser, schedule)
        del attention.forward
        with stepmask.apply(denoiser, schedule):
            sample(denoiser, DIT)


def halves() -> tuple[Chain, MaskSchedule]:
    """A chain whose layer 0 computes at the first step alone: 3x·5 at x = 1, then (x + 2)·5."""
    denoiser = Chain()
    graph = stepmask.trace(denoiser, (torch.ones(2), 0.0), blocks={"layers.*": "output"})
    return denoiser, table(graph, "11", "01", "01", denoiser=fingerprint_of(denoiser))


STEPS_IN = [torch.full((2,), x) for x in (1.0, 2.0, 4.0)]
BARE = [15.0, 30.0, 60.0]
MASKED = [15.0, 20.0, 30.0]


def said(call: Callable[..., Tensor]) -> list[float]:
    return [call(x, 0.0)[0].item() for x in STEPS_IN]


class TestAround:
    """A function that is compiled around a masked denoiser, and what else goes past its hook."""

    @pytest.mark.parametrize("warm", [False, True], ids=["cold", "with graphs of the bare one"])
    def test_a_function_calls_the_masked_one(self, warm: bool) -> None:
        denoiser, schedule = halves()
        around = torch.compile(lambda x, t: denoiser(x, t) * 1, backend="eager")
        if warm:
            assert said(around) == BARE
        with stepmask.apply(denoiser, schedule):
            assert said(around) == MASKED
        assert said(around) == BARE
        assert "forward" not in vars(denoiser)

    def test_a_loop(self) -> None:
        denoiser, schedule = halves()
        loop = torch.compile(lambda: [denoiser(x, 0.0) for x in STEPS_IN], backend="eager")
        masked = stepmask.apply(denoiser, schedule)
        masked.compile(**OPTIONS)
        masked.restart()
        assert [output[0].item() for output in loop()] == MASKED

    def test_a_full_graph_is_refused(self) -> None:
        denoiser, schedule = halves()
        around = torch.compile(lambda x, t: denoiser(x, t) * 1, **OPTIONS)
        assert said(around) == BARE
        with (
            stepmask.apply(denoiser, schedule),
            pytest.raises(torch._dynamo.exc.Unsupported, match="a masked denoiser is in no graph around it"),
        ):
            said(around)

    @pytest.mark.parametrize("call", [lambda net: net.forward, copy.copy], ids=["forward", "shallow copy"])
    def test_what_goes_past_the_hook_is_refused(self, call: Any) -> None:
        denoiser, schedule = halves()
        with stepmask.apply(denoiser, schedule), pytest.raises(RunError, match="goes past its masks"):
            said(call(denoiser))

    def test_a_denoiser_that_is_compiled_by_hand_within_a_run_is_refused(self) -> None:
        denoiser, schedule = halves()
        stepmask.apply(denoiser, schedule)
        denoiser(STEPS_IN[0], 0.0)
        denoiser.compile(backend="eager")
        with pytest.raises(RunError, match=r"past its masks.*masked\.compile"):
            denoiser(STEPS_IN[1], 0.0)

    def test_a_block_that_is_compiled_by_hand_within_a_run_is_refused(self) -> None:
        denoiser, schedule = halves()
        stepmask.apply(denoiser, schedule)
        denoiser(STEPS_IN[0], 0.0)
        denoiser.layers[1].compile(backend="eager")
        with pytest.raises(RunError, match="compiled in the middle of a run"):
            denoiser(STEPS_IN[1], 0.0)

    @pytest.mark.parametrize(
        "export",
        [
            lambda net, *args: torch.export.export(net, args),
            lambda net, *args: torch.jit.trace(net, args),
        ],
        ids=["export", "jit"],
    )
    def test_exports_are_refused(self, export: Any) -> None:
        denoiser, schedule = halves()
        with stepmask.apply(denoiser, schedule), pytest.raises(RunError, match="traced or exported"):
            export(denoiser, torch.ones(2), torch.tensor(0.0))


class TestAsAWhole:
    def test_too_many_rows_are_refused(self) -> None:
        denoiser = tiny_dit()
        graph = stepmask.trace(denoiser, DIT)
        full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(40))
        rows = np.random.default_rng(0).random(full.rows.shape) < 0.5
        rows[0] = True
        rows[:, graph.column(DENOISER)] = True
        denoiser.compile(**OPTIONS)
        with pytest.raises(RunError, match=r"different rows, each a graph of its own.*masked\.compile"):
            stepmask.apply(denoiser, full.with_rows(rows))

    @pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
    def test_cuda_graphs_are_for_devices_that_have_them(self, options: dict[str, Any]) -> None:
        denoiser = tiny_dit()
        schedule = random_plain_table(stepmask.trace(denoiser, DIT), denoiser, STEPS, seed=0)
        with stepmask.apply(denoiser, schedule) as masked:
            masked.compile(**options)  # refused on CUDA alone
