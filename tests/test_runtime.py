"""The laws of a masked run: on toys by hand, on real classes bitwise."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stepmask
from promises import counted_macs, without_feeders
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.families import fingerprint_of
from stepmask.denoiser.seam import hooks_of
from stepmask.errors import AlreadyApplied, RunError, RunNotStarted, ScheduleMismatch
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.graph import DENOISER, BlockGraph
from stepmask.schedule.rectify import lower, rectify

from toys import (
    Chain,
    Scale,
    Skips,
    bits,
    table,
    tiny_dit,
    tiny_pixart,
    tiny_pixel_unet,
    tiny_unet,
    unrectified,
    untimed,
)


def chain_table(denoiser: Chain, reuse: Any, *rows: str, **options: Any) -> MaskSchedule:
    graph = stepmask.trace(denoiser, (torch.zeros(2), 0.0), blocks={"layers.0": reuse, "layers.1": "output"})
    denoiser.layers[0].calls = 0
    return table(graph, *rows, denoiser=fingerprint_of(denoiser), **options)


def outputs(denoiser: nn.Module, *calls: tuple[Any, ...]) -> list[float]:
    return [denoiser(*call).flatten()[0].item() for call in calls]


ONE, TWO, FOUR = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 4.0)


class TestByHand:
    def test_output_reuse(self) -> None:
        # step 0: 1 + 2·1 = 3, ·5 = 15.  step 1 reuses layer 0's output 2: 2 + 2 = 4, ·5 + 1 = 21
        denoiser = Chain()
        with stepmask.apply(denoiser, chain_table(denoiser, "output", "11", "01")):
            assert outputs(denoiser, (ONE, 0.0), (TWO, 1.0)) == [15.0, 21.0]
        assert denoiser.layers[0].calls == 1

    def test_delta_reuse(self) -> None:
        # layer 0 maps 1 to 2: delta 1.  step 1: layer 0 answers 2 + 1 = 3, stream 2 + 3 = 5, ·5 = 25
        denoiser = Chain()
        with stepmask.apply(denoiser, chain_table(denoiser, "delta", "11", "01")):
            assert outputs(denoiser, (ONE, 0.0), (TWO, 0.0)) == [15.0, 25.0]

    def test_first_order_forecast(self) -> None:
        # layer 0 says 2, then 4; forecast 1.5·4 − 0.5·2 = 5; stream 4 + 5 = 9, ·5 = 45
        denoiser = Chain()
        schedule = chain_table(denoiser, "output", "11", "11", "01", weights={(2, "layers.0"): (1.5, -0.5)})
        with stepmask.apply(denoiser, schedule) as masked:
            assert outputs(denoiser, (ONE, 0.0), (TWO, 0.0), (FOUR, 0.0)) == [15.0, 30.0, 45.0]
            assert masked.peak_store_bytes == 2 * 8

    @pytest.mark.parametrize("weights", [(2.0, -1.5, 0.5), (1.0, 0.5, 0.25), (2.5,), (0.5, 0.25)])
    def test_any_weights(self, weights: tuple[float, ...]) -> None:
        # layer 0 says 2, 4, 8: newest first (8, 4, 2)
        denoiser = Chain()
        schedule = chain_table(denoiser, "output", "11", "11", "11", "01", weights={(3, "layers.0"): weights})
        with stepmask.apply(denoiser, schedule):
            said = outputs(denoiser, (ONE, 0.0), (TWO, 0.0), (FOUR, 0.0), (ONE, 0.0))[-1]
        assert said == pytest.approx((1 + np.dot(weights, (8, 4, 2)[: len(weights)])) * 5)

    def test_whole_step_reuse(self) -> None:
        # outputs 15 and 30; the forecast 2·30 − 15 = 45 needs no evaluation at all
        denoiser = Chain()
        schedule = chain_table(denoiser, "output", "111", "111", "110", weights={(2, DENOISER): (2.0, -1.0)})
        with stepmask.apply(denoiser, schedule):
            assert outputs(denoiser, (ONE, 0.0), (TWO, 0.0), (FOUR, 9.0)) == [15.0, 30.0, 45.0]
        assert denoiser.layers[0].calls == 2

    def test_a_skipped_step_that_refreshes_a_block(self) -> None:
        # step 1 answers 15 but computes layer 0 of 2 = 4; step 2 reuses that: (4 + 4)·5 = 40
        denoiser = Chain()
        with stepmask.apply(denoiser, chain_table(denoiser, "output", "111", "110", "011")):
            assert outputs(denoiser, (ONE, 0.0), (TWO, 0.0), (FOUR, 0.0)) == [15.0, 15.0, 40.0]

    @pytest.mark.parametrize("reuse", ["output", "delta"])
    def test_a_blend_of_what_is_computed_with_what_is_stored(self, reuse: Any) -> None:
        # layer 0 says 2·1 = 2 (a delta of 1), then 2·2 = 4 (2); half of each is 3 (1.5, so 2 + 1.5 = 3.5)
        denoiser = Chain()
        blended = chain_table(denoiser, reuse, "111", "111", weights={(1, "layers.0"): (0.5, 0.5)})
        with stepmask.apply(denoiser, blended) as masked:
            assert outputs(denoiser, (ONE, 0.0), (TWO, 0.0)) == [15.0, 5 * (2 + (3.0 if reuse == "output" else 3.5))]
            assert masked.store_bytes == 0

    def test_the_denoiser_blends_its_own_output(self) -> None:
        denoiser = Chain()
        blended = chain_table(denoiser, "output", "111", "111", "110", weights={(1, ""): (2, -1), (2, ""): (2, -1)})
        with stepmask.apply(denoiser, blended):
            # 15, then 2·30 − 15 = 45; what is stored is what was computed: 2·30 − 15 again
            assert outputs(denoiser, (ONE, 0.0), (TWO, 0.0), (FOUR, 0.0)) == [15.0, 45.0, 45.0]

    def test_dead_blocks_are_not_run(self) -> None:
        denoiser = Skips()
        graph = stepmask.trace(Skips(), (ONE,), blocks=dict.fromkeys(Skips.names, "output"))
        with stepmask.apply(denoiser, table(graph, "11111", "11101", denoiser=fingerprint_of(denoiser))):
            denoiser(ONE)
            # down0(2) = 4, up1 reused: 7·(5·6 + 6) = 252; up0: 11·(252 + 4)
            assert denoiser(TWO)[0] == 11 * (252 + 4)
        assert [getattr(denoiser, name).calls for name in Skips.names] == [2, 1, 1, 1, 2]


class Fed(nn.Module):
    """x ↦ x + 3·(2x + 1) + 5·2x: one module in front of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = Scale(2.0), nn.ModuleList([Scale(3.0), Scale(5.0)])
        self.reads_more = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = x + self.layers[0](h.view(-1) + 1) + self.layers[1](h)
        return y + h if self.reads_more else y


class TestFeeders:
    def fed(self) -> tuple[Fed, MaskSchedule]:
        graph = stepmask.trace(Fed(), (ONE,), blocks={"layers.*": "output"})
        return Fed(), table(graph, "11", "01", "00", "10", denoiser=fingerprint_of(Fed()))

    def test_they_are_called_where_a_block_needs_them(self) -> None:
        denoiser, schedule = self.fed()
        with stepmask.apply(denoiser, schedule):
            # layer 0 says 3·3 = 9, then 3·(2·4 + 1) = 27; layer 1 says 5·2 = 10, then 5·4 = 20
            assert outputs(denoiser, (ONE,), (TWO,), (FOUR,), (FOUR,)) == [1 + 9 + 10, 2 + 9 + 20, 4 + 9 + 20, 51]
        assert denoiser.norm.calls == 3
        assert outputs(denoiser, (ONE,)) == [20.0]

    def test_another_path_that_reads_them_is_refused(self) -> None:
        denoiser, schedule = self.fed()
        with stepmask.apply(denoiser, schedule):
            outputs(denoiser, (ONE,), (TWO,))
            denoiser.reads_more = True
            with pytest.raises(RunError, match="nothing but masked blocks read"):
                denoiser(FOUR)


def random_table(graph: BlockGraph, denoiser: nn.Module, steps: int, seed: int) -> MaskSchedule:
    generator = np.random.default_rng(seed)
    rows = generator.random((steps, len(graph))) < 0.5
    rows[:2] = True
    weights = np.tile((1.0, 0.0, 0.0), (*rows.shape, 1))
    weights[generator.random(rows.shape) < 0.5] = (1.5, -0.5, 0.0)  # forecasts, and blends where it computes
    weights[0] = (1.0, 0.0, 0.0)
    return MaskSchedule(graph, rows, fingerprint_of(denoiser), untimed(steps), weights)


UNET = (torch.zeros(2, 4, 8, 8), torch.tensor(7), torch.ones(2, 3, 8))
PIXEL = (torch.zeros(2, 3, 8, 8), torch.tensor(7))
DIT = (torch.zeros(2, 4, 8, 8), torch.tensor([7, 7]), torch.tensor([1, 2]))
PIXART = (
    torch.zeros(2, 4, 8, 8),
    torch.ones(2, 3, 8),
    torch.tensor([7, 7]),
    dict.fromkeys(("resolution", "aspect_ratio")),
)


def evaluations(denoiser: nn.Module, example: tuple[Any, ...], steps: int = 6) -> list[Tensor]:
    """What a denoiser says to a fixed sequence of inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [denoiser(torch.randn(example[0].shape, generator=generator), *example[1:]).sample for _ in range(steps)]


on_real_classes = pytest.mark.parametrize(
    ("make", "example", "granularity"),
    [
        (tiny_dit, DIT, "block"), (tiny_dit, DIT, "sublayer"), (tiny_unet, UNET, "block"),
        (tiny_unet, UNET, "sublayer"), (tiny_pixel_unet, PIXEL, "block"), (tiny_pixart, PIXART, "block"),
        (tiny_pixart, PIXART, "sublayer"),
    ],
)  # fmt: skip


@on_real_classes
class TestRealClasses:
    """The laws, on diffusers' own classes at tiny size."""

    def test_all_compute_is_bitwise_the_bare_denoiser(self, make: Any, example: Any, granularity: Any) -> None:
        denoiser = make()
        bare, keys = evaluations(denoiser, example), list(denoiser.state_dict())
        graph = stepmask.trace(denoiser, example, granularity=granularity)
        full = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(6))
        classes = [type(module) for module in denoiser.modules()]
        with stepmask.apply(denoiser, full) as masked:
            assert list(denoiser.state_dict()) == keys
            assert all(torch.equal(a, b) for a, b in zip(evaluations(denoiser, example), bare, strict=True))
            assert masked.peak_store_bytes == 0
        assert [type(module) for module in denoiser.modules()] == classes
        assert all(torch.equal(a, b) for a, b in zip(evaluations(denoiser, example), bare, strict=True))

    @pytest.mark.parametrize("seed", range(4))
    def test_a_random_table_obeys_its_plan_and_dead_values_reach_nothing(
        self, make: Any, example: Any, granularity: Any, seed: int
    ) -> None:
        denoiser = make()
        graph = stepmask.trace(denoiser, example, granularity=granularity)
        schedule = random_table(graph, denoiser, 6, seed)
        with stepmask.apply(denoiser, schedule) as masked:
            said = evaluations(denoiser, example)
            assert masked.peak_store_bytes == masked.plans[0].peak_bytes
            assert masked.store_bytes == 0
        with stepmask.apply(denoiser, without_feeders(schedule)) as masked:
            counted = counted_macs(denoiser, lambda: evaluations(denoiser, example))
            assert counted == masked.plans[0].macs == masked.computed_macs
        with stepmask.apply(denoiser, rectify(schedule)):
            assert all(torch.equal(a, b) for a, b in zip(evaluations(denoiser, example), said, strict=True))

    @pytest.mark.parametrize("seed", range(4))
    def test_rectification_changes_no_sample(self, make: Any, example: Any, granularity: Any, seed: int) -> None:
        denoiser = make()
        schedule = random_table(stepmask.trace(denoiser, example, granularity=granularity), denoiser, 6, seed)
        schedule = schedule.with_rows(schedule.rows | (np.arange(len(schedule.graph)) == len(schedule.graph) - 1))
        everything = unrectified(schedule)
        assert lower(everything).macs == (schedule.rows * [block.macs for block in schedule.graph.blocks]).sum()
        with stepmask.apply(denoiser, everything):
            said = evaluations(denoiser, example)
        with stepmask.apply(denoiser, rectify(schedule)):
            assert all(torch.equal(a, b) for a, b in zip(evaluations(denoiser, example), said, strict=True))

    def test_reuse_at_the_stored_input_is_what_would_be_computed(
        self, make: Any, example: Any, granularity: Any
    ) -> None:
        denoiser = make()
        graph = stepmask.trace(denoiser, example, granularity=granularity)
        rows = np.array([[True] * len(graph), [False] * (len(graph) - 1) + [True]])
        with stepmask.apply(denoiser, MaskSchedule(graph, rows, fingerprint_of(denoiser), untimed(2))), torch.no_grad():
            same = example[0] + 0.3
            first, second = denoiser(same, *example[1:]).sample, denoiser(same, *example[1:]).sample
        torch.testing.assert_close(first, second, atol=2e-6, rtol=1e-5)


class TestPipeline:
    def test_all_compute_is_bitwise_the_bare_pipeline(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        with stepmask.apply(pipe, reference):
            assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
        assert "set_timesteps" not in vars(pipe.scheduler)
        assert "step" not in vars(pipe.scheduler)

    @pytest.mark.parametrize("order", [0, 1, 2])
    @pytest.mark.parametrize("make", [fixed_interval, whole_step])
    def test_every_run_is_the_same_run(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule, make: Any, order: int
    ) -> None:
        schedule = make(reference, 0.6, order=order)
        with stepmask.apply(pipe, schedule) as masked:
            first, second = trajectory.sampling().latent, trajectory.sampling().latent
            assert masked.computed_macs == 2 * lower(schedule).macs
            assert masked.peak_store_bytes == lower(schedule).peak_bytes
        with stepmask.apply(pipe, without_feeders(schedule)):
            assert counted_macs(pipe, trajectory.sampling) == lower(schedule).macs
        assert torch.equal(first, second)
        assert not torch.equal(first, trajectory.sampled.latent)

    def test_an_aborted_run_does_not_shift_the_next(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        schedule = fixed_interval(reference, 0.6, order=1)
        with stepmask.apply(pipe, schedule):
            whole = trajectory.sampling().latent
        original, calls = pipe.transformer.pos_embed.forward, []

        def interrupt(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(x)

        with stepmask.apply(pipe, schedule) as masked:
            pipe.transformer.pos_embed.forward = interrupt
            with pytest.raises(KeyboardInterrupt):
                trajectory.sampling()
            assert masked.store_bytes == 0
            del pipe.transformer.pos_embed.forward
            assert torch.equal(trajectory.sampling().latent, whole)

    def test_an_error_between_steps_does_not_shift_the_next(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        schedule = fixed_interval(reference, 0.6, order=1)
        with stepmask.apply(pipe, schedule):
            whole = trajectory.sampling().latent
            with monkeypatch.context() as patch:
                patch.setattr(pipe.scheduler, "scale_model_input", self.failing_at_third_call(pipe))
                with pytest.raises(RuntimeError, match="callback"):
                    trajectory.sampling()
            assert torch.equal(trajectory.sampling().latent, whole)

    @staticmethod
    def failing_at_third_call(pipe: Any) -> Any:
        original, calls = pipe.scheduler.scale_model_input, []

        def scale(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("callback")
            return original(*args)

        return scale

    def test_a_failed_context_leaves_nothing_behind(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        classes = [type(module) for module in pipe.transformer.modules()]
        with pytest.raises(ZeroDivisionError), stepmask.apply(pipe, reference):
            raise ZeroDivisionError
        assert [type(module) for module in pipe.transformer.modules()] == classes
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)

    def test_the_handle_can_be_kept_and_removed_twice(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        masked = stepmask.apply(pipe, reference)
        trajectory.sampling()
        masked.remove()
        masked.remove()
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)

    def test_another_pipeline_of_the_class_is_untouched(self, pipe: Any, reference: MaskSchedule) -> None:
        from diffusers import DiTPipeline

        other = DiTPipeline(transformer=tiny_dit(), vae=pipe.vae, scheduler=type(pipe.scheduler)())
        with stepmask.apply(pipe, reference):
            assert hooks_of(pipe.transformer)
            assert not any(hooks_of(module) for module in other.transformer.modules())

    def test_a_run_that_ends_early_is_not_silent(self, pipe: Any, reference: MaskSchedule) -> None:
        masked = stepmask.apply(pipe, reference)
        pipe.scheduler.set_timesteps(5)
        pipe.transformer(*DIT)
        with pytest.raises(RunError, match="ended after 1 evaluations"):
            masked.__exit__(None, None, None)
        assert "set_timesteps" not in vars(pipe.scheduler)


class TestStrict:
    def test_another_denoiser(self, reference: MaskSchedule) -> None:
        with pytest.raises(ScheduleMismatch, match="num_layers = 2"):
            stepmask.apply(tiny_dit(layers=2), reference)
        with pytest.raises(ScheduleMismatch, match="UNet2DConditionModel"):
            stepmask.apply(tiny_unet(), reference)

    def test_a_refused_pipeline_stays_as_it_was(self, pipe: Any, reference: MaskSchedule) -> None:
        pipe.transformer.transformer_blocks[2].ff = nn.Identity()
        pipe.transformer.transformer_blocks[2].attn1 = nn.ModuleList()
        del pipe.transformer.transformer_blocks[2].ff
        with pytest.raises(ScheduleMismatch, match="ff"):
            stepmask.apply(pipe, reference)
        assert "set_timesteps" not in vars(pipe.scheduler)
        assert not any(hooks_of(module) for module in pipe.transformer.modules())

    def test_another_block_list(self) -> None:
        denoiser, other = nn.Sequential(Scale(1.0), Scale(2.0)), nn.Sequential(Scale(1.0))
        graph = stepmask.trace(denoiser, (ONE,), blocks="*")
        schedule = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), untimed(2))
        with pytest.raises(ScheduleMismatch, match="without '1'"):
            stepmask.apply(other, schedule)
        assert type(other[0]) is Scale

    def test_another_step_count(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        with stepmask.apply(pipe, reference):
            with pytest.raises(ScheduleMismatch, match=r"7 sampling steps.*5 sampling steps"):
                pipe(class_labels=[1], num_inference_steps=7)
            assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)

    def test_another_sampler(self, pipe: Any, reference: MaskSchedule) -> None:
        from diffusers import DPMSolverMultistepScheduler

        pipe.scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
        with stepmask.apply(pipe, reference), pytest.raises(ScheduleMismatch, match="DPMSolverMultistepScheduler"):
            pipe(class_labels=[1], num_inference_steps=5)

    def test_a_scheduler_replaced_behind_our_back(self, pipe: Any, reference: MaskSchedule) -> None:
        with stepmask.apply(pipe, reference):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            with pytest.raises(RunNotStarted, match="replace the scheduler"):
                pipe(class_labels=[1], num_inference_steps=5)

    def test_twice(self, pipe: Any, reference: MaskSchedule) -> None:
        with stepmask.apply(pipe, reference):
            with pytest.raises(AlreadyApplied, match="masked already"):
                stepmask.apply(pipe, reference)
            with pytest.raises(AlreadyApplied):
                stepmask.apply(pipe.transformer, reference)
            with pytest.raises(AlreadyApplied):
                stepmask.trace(pipe, DIT)

    def test_more_evaluations_than_steps(self) -> None:
        denoiser = Chain()
        with stepmask.apply(denoiser, chain_table(denoiser, "output", "11", "01")) as masked:
            outputs(denoiser, (ONE, 0.0), (TWO, 1.0))
            with pytest.raises(RunNotStarted, match="restart"):
                denoiser(ONE, 0.0)
            masked.restart()
            assert outputs(denoiser, (ONE, 0.0), (TWO, 1.0)) == [15.0, 21.0]

    def test_a_denoiser_that_takes_another_path(self) -> None:
        class Fickle(Chain):
            def forward(self, x: Tensor, t: float) -> Tensor:
                return super().forward(x, t) if t < 1 else self.layers[0](x)

        denoiser = Fickle()
        with stepmask.apply(denoiser, chain_table(denoiser, "output", "11", "01")):
            denoiser(ONE, 0.0)
            with pytest.raises(RunError, match=r"layers\.1.*not called at step 1"):
                denoiser(ONE, 1.0)


def test_branches_have_stores_of_their_own() -> None:
    # two calls a step: the conditional stream carries 1, the unconditional one 4; neither sees the other's values
    denoiser = Chain()
    one = chain_table(denoiser, "output", "11", "01")
    two = MaskSchedule(one.graph, one.rows, one.denoiser, untimed(2, branches=2))
    with stepmask.apply(denoiser, two):
        assert outputs(denoiser, (ONE, 0.0), (FOUR, 0.0), (ONE, 0.0), (FOUR, 0.0)) == [15.0, 60.0, 15.0, 60.0]
    assert bits(two) == ["11", "01"]


def test_branches_may_have_rows_of_their_own() -> None:
    # as above, but the second branch computes at step 1 too: 6 + 2·6 = 18, ·5 = 90; the first reuses 2: (3 + 2)·5 = 25
    denoiser = Chain()
    one = chain_table(denoiser, "output", "11", "01")
    two = MaskSchedule(one.graph, one.rows, one.denoiser, untimed(2, branches=2))
    full, three, six = two.with_rows(np.ones_like(two.rows)), torch.full((2,), 3.0), torch.full((2,), 6.0)
    with stepmask.apply(denoiser, [two, full]):
        assert outputs(denoiser, (ONE, 0.0), (FOUR, 0.0), (three, 0.0), (six, 0.0)) == [15.0, 60.0, 25.0, 90.0]
        assert denoiser.layers[0].calls == 3  # MACs are counted in test_numbers.py
    for wrong in ([], [one, one], [two, two, two], [two, chain_table(denoiser, "delta", "11", "01")]):
        with pytest.raises(ScheduleMismatch, match="as many as a step has branches"):
            stepmask.apply(denoiser, wrong)
