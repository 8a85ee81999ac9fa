"""Against the packages of others: their pattern as data in our table gives their output, bit by bit."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import stepmask
from stepmask import MaskSchedule
from stepmask.denoiser.families import Granularity
from stepmask.errors import InvalidBudget, InvalidSchedule
from stepmask.schedule.baselines import deepcache, deepcache_within
from stepmask.schedule.budget import Budget
from stepmask.schedule.rectify import lower

from toys import bits, stepped_unet, tiny_stable_diffusion


def words() -> dict[str, Any]:
    drawn = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    return {"prompt_embeds": drawn[0], "negative_prompt_embeds": drawn[1], "output_type": "latent"}


def latents(pipe: Any) -> Any:
    return pipe(**words(), num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images


@cache
def all_compute(granularity: Granularity) -> tuple[MaskSchedule, torch.Tensor]:
    """The tiny pipeline's reference, and its latent: what every test would trace anew."""
    pipe = tiny_stable_diffusion()
    trajectory = stepmask.record(pipe, **words(), num_inference_steps=6)
    graph = stepmask.trace(pipe, trajectory, granularity=granularity)
    return MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler), trajectory.sampled.latent


def deepcache_package(interval: int, branch: int) -> Any:
    """The tiny pipeline with the DeepCache package on it."""
    from DeepCache.extension.deepcache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=tiny_stable_diffusion())
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    return helper.pipe


class TestDeepCache:
    def test_by_hand(self) -> None:
        # branch 0: the last resnet, and the way down to its skip; the upsampler under it is stored, the rest is dead
        table = deepcache(stepped_unet(5), 2)
        assert bits(table) == ["111111", "100001", "111111", "100001", "111111"]
        assert lower(table).macs_share == pytest.approx((3 * 6 + 2 * 2) / 30)
        assert lower(table).peak_bytes == 4

    def test_a_deeper_branch_computes_more_of_both_ways(self) -> None:
        assert bits(deepcache(stepped_unet(2), 2, branch=1))[1] == "110111"

    def test_whole_steps_at_a_fractional_interval(self) -> None:
        table = deepcache(stepped_unet(10), 2.5)
        assert np.flatnonzero(table.rows.all(axis=1)).tolist() == [0, 3, 5, 8]

    @pytest.mark.parametrize("steps", [20, 50, 97])
    def test_any_number_of_whole_steps_can_be_spread(self, steps: int) -> None:
        reference = stepped_unet(steps)
        for count in range(1, steps + 1):
            assert deepcache(reference, steps / count).rows.all(axis=1).sum() == count, count

    def test_a_forecast_reads_two_whole_steps(self) -> None:
        assert deepcache(stepped_unet(5), 2, order=1).forecasts[3, 4].tolist() == [1.5, -0.5, 0]

    def test_the_most_that_a_budget_covers(self) -> None:
        # a third of a step at branch 0: four whole steps of twelve are 20 of 36, five are 22, and one is 14
        assert deepcache_within(stepped_unet(12), 0.6) == deepcache(stepped_unet(12), 3)
        with pytest.raises(InvalidBudget, match=f"at least {14 / 36:.4f}"):
            deepcache_within(stepped_unet(12), 0.35)
        with pytest.raises(InvalidBudget, match="at least 4 bytes"):
            deepcache_within(stepped_unet(12), Budget(macs=0.6, store_bytes=3))

    @pytest.mark.parametrize(("interval", "branch", "order"), [(0.5, 0, 0), (2, 2, 0), (2, -1, 0), (2, 0, 3)])
    def test_refuses_what_is_not_there(self, interval: float, branch: int, order: int) -> None:
        with pytest.raises(InvalidSchedule):
            deepcache(stepped_unet(5), interval, branch=branch, order=order)

    def test_refuses_a_denoiser_without_a_way_up(self, reference: MaskSchedule) -> None:
        with pytest.raises(InvalidSchedule, match="DiTTransformer2DModel"):
            deepcache(reference, 2)

    @pytest.mark.parametrize("granularity", ["sublayer", "block"])
    @pytest.mark.parametrize(("interval", "branch"), [(2, 0), (3, 1), (3, 2), (2, 3), (3, 5)])
    def test_its_pattern_in_our_table_gives_its_output(
        self, granularity: Granularity, interval: int, branch: int
    ) -> None:
        pipe, (full, bare) = tiny_stable_diffusion(), all_compute(granularity)
        with stepmask.apply(pipe, deepcache(full, interval, branch=branch)):
            ours = latents(pipe)
        assert not torch.equal(ours, bare)
        assert torch.equal(ours, latents(deepcache_package(interval, branch)))

    @pytest.mark.parametrize("granularity", ["sublayer", "block"])
    def test_evaluated_as_a_rival_it_computes_and_misses_what_our_table_does(self, granularity: Granularity) -> None:
        pipe, (full, _) = tiny_stable_diffusion(), all_compute(granularity)
        rivals = {"package": deepcache_package(2, 1)}
        report = stepmask.evaluate(
            pipe, deepcache(full, 2, branch=1), rivals=rivals, repeats=1, **words(), num_inference_steps=6
        )
        ours, package = report["schedule"], report["package"]
        assert package.macs_executed == pytest.approx(ours.macs_executed) == pytest.approx(ours.macs_planned)
        assert package.latent_errors == ours.latent_errors != [0, 0]
        assert report["reference"].macs_executed == 1
