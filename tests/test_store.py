"""The store's place and dtype: what comes back, what it takes, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stepmask
from pipelines import make
from stepmask import MaskSchedule, Store, Trajectory
from stepmask.denoiser.values import tensors
from stepmask.errors import InvalidStore
from stepmask.evaluation.metrics import latent_errors
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower

from toys import per_channel

FP8 = torch.float8_e4m3fn


def latent(pipe: Any, trajectory: Trajectory, schedule: MaskSchedule, store: Store | None = None) -> torch.Tensor:
    with stepmask.apply(pipe, schedule, store=store):
        return trajectory.sampling().latent


class TestValues:
    def test_told_nothing_it_is_the_value_itself(self) -> None:
        value = torch.randn(2, 3)
        assert Store().put(value) is value
        assert Store().take(value) is value

    def test_bfloat16_is_rounding(self) -> None:
        value = (torch.randn(2, 3), torch.arange(3))  # whole numbers stay as they are
        first, second = Store(dtype=torch.bfloat16).take(Store(dtype=torch.bfloat16).put(value))
        assert torch.equal(first, value[0].bfloat16().float())
        assert torch.equal(second, value[1])

    @given(st.floats(-30, 30), st.integers(0, 1000))
    def test_float8_is_within_a_sixteenth_of_each_number_at_any_size(self, exponent: float, seed: int) -> None:
        # three bits behind the point: half a unit of the last is 1/16; below 2⁻⁶ of 448 steps are even, 2⁻¹⁰/448
        value = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * 10**exponent
        back = Store(dtype=FP8).take(Store(dtype=FP8).put(value))
        floor = value.abs().amax(1, keepdim=True) * 2**-9 / 448
        assert ((back - value).abs() <= value.abs() / 16 + floor).all()

    def test_rows_do_not_share_a_scale(self) -> None:
        value = torch.tensor([[1.0, 0.5], [1e6, 1.0], [0.0, 0.0]])
        back = Store(dtype=FP8).take(Store(dtype=FP8).put(value))
        assert back.tolist() == [[1.0, 0.5], [1e6, 0.0], [0.0, 0.0]]

    def test_what_comes_back_has_its_own_dtype(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for store in (Store(dtype=FP8), Store(dtype=torch.bfloat16), Store(device="cpu")):
                assert store.take(store.put(torch.ones(2, dtype=dtype))).dtype == dtype


class TestRuns:
    def test_a_device_of_its_own_changes_nothing(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        schedule = fixed_interval(reference, 0.5, order=2)
        expected = latent(pipe, trajectory, schedule)
        assert torch.equal(latent(pipe, trajectory, schedule, Store(device="cpu")), expected)
        assert torch.equal(latent(pipe, trajectory, schedule, Store(dtype=torch.float32)), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8, torch.float8_e5m2])
    @pytest.mark.parametrize("granularity", ["sublayer", "block"])
    def test_its_real_peak_is_the_planned_one_and_samples_move_little(
        self, pipe: Any, trajectory: Trajectory, dtype: torch.dtype, granularity: Any
    ) -> None:
        graph = stepmask.trace(pipe, trajectory, granularity=granularity)
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        schedule, store = fixed_interval(full, 0.5, order=2), Store(dtype=dtype)
        expected = latent(pipe, trajectory, schedule)
        with stepmask.apply(pipe, schedule, store=store) as masked:
            found = trajectory.sampling().latent
            assert masked.peak_store_bytes == store.peak_bytes(lower(schedule)) < lower(schedule).peak_bytes
        assert 0 < max(latent_errors(found, expected)) < (1e-2 if dtype.itemsize == 1 else 1e-4)

    def test_channel_forecasts_and_blends_read_what_was_put(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule
    ) -> None:
        scalar = fixed_interval(reference, 0.6, order=1)
        blends = scalar.forecasts.copy()
        blends[3, -1] = (0.9, 0.1, 0.0)
        for schedule in (per_channel(scalar), scalar.with_rows(scalar.rows, blends)):
            expected = latent(pipe, trajectory, schedule)
            error = max(latent_errors(latent(pipe, trajectory, schedule, Store(dtype=torch.bfloat16)), expected))
            assert 0 < error < 1e-3

    def test_blocks_that_say_several_tensors(self) -> None:
        pipe, call = make("FluxPipeline")
        trajectory = stepmask.record(pipe, **call)
        graph = stepmask.trace(pipe, trajectory, granularity="block")
        assert max(len(block.shapes) for block in graph.blocks) > 1
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        schedule, store = fixed_interval(full, 0.5, order=1), Store(dtype=FP8)
        expected = latent(pipe, trajectory, schedule)
        with stepmask.apply(pipe, schedule, store=store) as masked:
            assert 0 < max(latent_errors(trajectory.sampling().latent, expected)) < 1e-2
            assert masked.peak_store_bytes == store.peak_bytes(lower(schedule))

    def test_a_whole_step_is_one_value(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        schedule = whole_step(reference, 0.5)
        output = next(tensors(trajectory.outputs[0]))
        assert Store(dtype=FP8).peak_bytes(lower(schedule)) == output.numel() + 4 * len(output)
        held = Store(dtype=FP8).put(output)
        assert held.data.nbytes + held.scale.nbytes == output.numel() + 4 * len(output)


class TestRefusals:
    @pytest.mark.parametrize(
        ("told", "why"),
        [
            ({"dtype": torch.int8}, "no floating-point dtype"),
            ({"dtype": "bfloat16"}, "no floating-point dtype"),
            ({"dtype": torch.float8_e8m0fnu}, "it makes"),  # has no sign
            ({"device": "cuda:7"}, "cuda"),
            ({"device": "moon"}, "moon"),
        ],
    )
    def test_what_cannot_hold_a_number_is_one_clear_error(self, told: dict[str, Any], why: str) -> None:
        with pytest.raises(InvalidStore, match=why):
            Store(**told)
