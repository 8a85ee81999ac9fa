"""Numbers: errors are wide whatever the latents' dtype, and what is no floating number is left alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stepmask
from promises import counted_macs
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.families import fingerprint_of
from stepmask.denoiser.values import same_numbers
from stepmask.errors import LearningError
from stepmask.evaluation.metrics import latent_errors
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.objective import relative_error, sample_errors
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.relax import Concrete, Relaxation, Sigmoid, StraightThrough
from stepmask.learning.sample_rows import SampleRows
from stepmask.learning.sweep import _Measure
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.rectify import lower

from toys import table

HALVES = [torch.float16, torch.bfloat16]


class TestDtypes:
    @pytest.mark.parametrize("dtype", HALVES)
    def test_errors_of_half_precision_by_hand(self, dtype: torch.dtype) -> None:
        # 2^16 times 4² is 2^20, more than float16 holds; off by ½ it is (½)² / 4², off by nothing 0
        reference = torch.full((2, 4, 128, 128), 4.0, dtype=dtype)
        latent = reference.clone()
        latent[0] += 0.5
        assert sample_errors(latent, reference).tolist() == [0.015625, 0.0]
        assert sample_errors(latent, reference).dtype == torch.float32
        assert float(relative_error(latent, reference)) == 0.015625 / 2

    def test_differences_are_taken_before_they_overflow(self) -> None:
        # −40000 and 40000 are 80000 apart, which float16 does not hold: 80000² / 40000² = 4
        far = torch.full((1, 3), 40000.0, dtype=torch.float16)
        assert float(relative_error(-far, far)) == 4.0
        assert sample_errors(-far, far).tolist() == [4.0]
        _, offset = _Measure(far, lambda latent: latent, np.zeros(1, np.int64), np.zeros(1, np.int64)).probe(-far, 0)
        assert np.isfinite(offset).all()

    def test_errors_of_float32_and_float64_are_what_they_were_to_the_bit(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.float32, torch.float64):
            a, b = torch.randn(2, 5, 7, 3, generator=generator, dtype=dtype)
            plain = (a - b).flatten(1).square().sum(1) / b.flatten(1).square().sum(1)
            assert torch.equal(sample_errors(a, b), plain)
            whole = (a - b).float().square().sum() / b.float().square().sum()
            assert torch.equal(relative_error(a, b), whole)

    def test_learning_on_latents_in_float16_tells_tables_apart(self) -> None:
        # as on an accelerator: latents in float16 whose energy float16 does not hold
        trajectory = recorded(Layers(), noise(1, 16, 128, 128).half())
        graph = reference_of(trajectory).graph
        schedule = stepmask.learn(
            trajectory.sampling.pipe, trajectory, 0.5, graph=graph, learner=TrainedForecasts(passes=1)
        )
        with stepmask.apply(trajectory.sampling.pipe, schedule):
            errors = latent_errors(trajectory.sampling().latent, trajectory.sampled.latent)
        assert 0 < errors[0] < 0.1
        assert schedule.provenance["calibration_error"] == pytest.approx(errors[0], rel=1e-3)


class Beside(nn.Module):
    """A layer that also says something that is no activation."""

    def __init__(self, beside: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.beside = nn.Linear(8, 8), beside

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        said = self.layer(x)
        return said, self.beside(said)


class Layers(nn.Module):
    """x ↦ x + Σ tanh(layer(x)), with or without what the layers say beside it; `read` is what is made of that."""

    def __init__(
        self,
        beside: Callable[[Tensor], Any] = lambda _: None,
        read: Callable[[Tensor, Any], Tensor] = lambda said, _: said,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.read = nn.ModuleList([Beside(beside) for _ in range(2)]), read

    def forward(self, x: Tensor, t: float) -> Tensor:
        h = x.float().reshape(-1, 8) + t
        for layer in self.layers:
            h = h + torch.tanh(self.read(*layer(h)))
        return h.reshape(x.shape).to(x.dtype)


BLOCKS: dict[str, Any] = {"layers.*": "output"}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def recorded(network: nn.Module, x: Tensor) -> Trajectory:
    """x ← x − 0.1·D(x, t) over six steps."""

    def run(x: Tensor = x) -> Tensor:
        for step in range(6):
            x = x - 0.1 * network(x, 1 - step / 6)
        return x

    return stepmask.record(network, run=run)


def reference_of(trajectory: Trajectory) -> MaskSchedule:
    graph = stepmask.trace(trajectory.sampling.pipe, trajectory, blocks=BLOCKS)
    return MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


BESIDE: dict[str, tuple[Any, Any]] = {
    "integers": (lambda said: said.argmax(-1), lambda said, most: said + 0.01 * most[..., None]),
    "booleans": (lambda said: said > 0, lambda said, positive: said * positive),
    "a number": (lambda said: said.mean(), lambda said, mean: said + mean),
    "nothing": (lambda _: None, lambda said, _: said),
}


@pytest.mark.parametrize("kind", BESIDE)
class TestBeside:
    """Whatever else a block says is neither mixed nor measured; nothing changes where nobody reads it."""

    def test_a_sweep_finds_what_it_finds_without(self, kind: str) -> None:
        bare, told = (recorded(Layers(beside), noise(2, 8)) for beside in (lambda _: None, BESIDE[kind][0]))
        profiles = [
            stepmask.sweep(run.sampling.pipe, run, graph=reference_of(run).graph, probes=2) for run in (bare, told)
        ]
        assert np.array_equal(profiles[0].inner, profiles[1].inner)
        assert np.array_equal(profiles[0].held, profiles[1].held)

    def test_gradients_of_blends_are_those_without(self, kind: str) -> None:
        found = []
        for beside in (lambda _: None, BESIDE[kind][0]):
            run = recorded(Layers(beside), noise(2, 8))
            full = reference_of(run)
            weights = full.forecasts.copy()
            weights[2:, 0] = (0.8, 0.3, 0.0)  # computed, and mixed with the value before
            weights[1:, 1] = (0.9, 0.0, 0.0)  # reused at nine tenths
            rows = full.rows.copy()
            rows[1:, 1] = False
            blended = full.with_rows(rows, weights)
            found.append(loss_and_gradients(run, blended, torch.tensor(weights, dtype=torch.float32), Tensor.sum))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][1].abs().max() > 0.01

    def test_scores_are_those_without(self, kind: str) -> None:
        learner = PerTimestep(iterations=3, rounds=1)
        bare, told = (recorded(Layers(beside), noise(2, 8)) for beside in (lambda _: None, BESIDE[kind][0]))
        tables = [
            stepmask.learn(run.sampling.pipe, run, 0.6, graph=reference_of(run).graph, learner=learner)
            for run in (bare, told)
        ]
        assert np.array_equal(tables[0].rows, tables[1].rows)
        assert tables[0].provenance["calibration_error"] == tables[1].provenance["calibration_error"]

    def test_it_is_learned_with_where_it_is_read(self, kind: str) -> None:
        run = recorded(Layers(*BESIDE[kind]), noise(1, 8))
        schedule = stepmask.learn(
            run.sampling.pipe, run, 0.5, graph=reference_of(run).graph, learner=TrainedForecasts(passes=1)
        )
        with stepmask.apply(run.sampling.pipe, schedule):
            errors = latent_errors(run.sampling().latent, run.sampled.latent)
        assert schedule.provenance["calibration_error"] == pytest.approx(errors[0], rel=1e-3)


class TestShared:
    def test_a_number_that_samples_share_is_no_samples_own(self) -> None:
        run = recorded(Layers(*BESIDE["a number"]), noise(2, 8))
        with pytest.raises(LearningError, match=r"a tensor of shape \(\)\. Expected: as many rows"):
            stepmask.sweep(run.sampling.pipe, run, graph=reference_of(run).graph)

    def test_products_of_several_rows_a_sample_by_hand(self) -> None:
        # two samples of two frames each, one below the other: 1·1 + 2·1 of the first, 3·1 + 4·1 of the second
        run = recorded(Layers(), noise(2, 8))
        rows, block = SampleRows(np.array([0, 1]), run), reference_of(run).graph.blocks[0]
        frames = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        assert rows.products(0, 0, block, [frames], [torch.ones(4, 1)]).tolist() == [3.0, 7.0]

    def test_what_one_sample_says_of_any_shape_is_its_own(self) -> None:
        run = recorded(Layers(), noise(1, 8))
        rows, block = SampleRows(np.array([0]), run), reference_of(run).graph.blocks[0]
        both = [torch.tensor(2.0), torch.tensor([[1.0], [2.0], [3.0]])]
        assert rows.products(0, 0, block, both, both).tolist() == [4.0 + 14.0]
        assert rows.products(0, 0, block, [], []).tolist() == [0.0]


class Glued(nn.Module):
    """Two layers between a wide projection and another, which are the denoiser's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor, t: float) -> Tensor:
        h = self.into(x + t)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        out: Tensor = self.out(h)
        return out


class TestMacs:
    """What torch counts is what the plan states, and what the runtime adds up: 512 a layer, and 512 of glue."""

    ROWS = ("111", "110", "011", "000", "101")

    def test_the_glue_runs_for_a_block_of_a_skipped_step(self) -> None:
        network = Glued()
        schedule = self.schedule(network)
        with stepmask.apply(network, schedule) as masked:
            counted = counted_macs(network, lambda: self.evaluate(network))
        # all; layer 0, which the skipped step refreshes for the next; layer 1; nothing; layer 0
        assert counted == 1536 + 1024 + 1024 + 0 + 1024
        assert lower(schedule).macs == counted
        assert lower(schedule).macs_share == pytest.approx(counted / (5 * 1536))
        assert masked.computed_macs == counted

    def test_branches_with_rows_of_their_own(self) -> None:
        network = Glued()
        one = self.schedule(network)
        masked_branch = replace(one, sampler=replace(one.sampler, branches=2))
        whole = masked_branch.with_rows(np.ones_like(one.rows))
        with stepmask.apply(network, [masked_branch, whole]) as masked:
            counted = counted_macs(network, lambda: self.evaluate(network, branches=2))
        assert counted == lower(masked_branch).macs + lower(whole).macs
        assert masked.computed_macs == counted

    def schedule(self, network: nn.Module) -> MaskSchedule:
        graph = stepmask.trace(network, (noise(2, 8), 0.0), blocks=BLOCKS)
        return table(graph, *self.ROWS, denoiser=fingerprint_of(network))

    def evaluate(self, network: nn.Module, branches: int = 1) -> None:
        for step in range(5):
            for _ in range(branches):
                network(noise(2, 8), float(4 - step))


class TestSameNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
    def test_nan_is_the_same_as_nan_in_its_place(self, dtype: torch.dtype) -> None:
        one = torch.tensor([1.0, torch.nan, 2.0]).to(dtype)
        assert same_numbers(one, one.clone())
        assert not same_numbers(one, torch.tensor([1.0, 2.0, torch.nan]).to(dtype))
        assert not same_numbers(one, torch.tensor([1.0, 0.0, 2.0]).to(dtype))
        assert not same_numbers(one, torch.tensor([1.5, torch.nan, 2.0]).to(dtype))

    def test_infinity_is_a_number_with_a_sign(self) -> None:
        one = torch.tensor([torch.inf, torch.nan])
        assert same_numbers(one, torch.tensor([torch.inf, torch.nan]))
        assert not same_numbers(one, torch.tensor([-torch.inf, torch.nan]))
        assert not same_numbers(one, torch.tensor([torch.finfo(torch.float32).max, torch.nan]))

    def test_another_shape_dtype_or_device_is_another_tensor(self) -> None:
        one = torch.ones(2)
        for other in (torch.ones(1, 2), one.double(), one.int(), one.to("meta")):
            assert not same_numbers(one, other)
        assert not same_numbers(torch.tensor([1, 2]), torch.tensor([1, 3]))
        assert same_numbers(torch.tensor([True]), torch.tensor([True]))


class Plain(nn.Module):
    """x ↦ x + Σ tanh(layer(x)), in the dtype that it has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x + t))
        return x


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TestDefaultDtype:
    """What learners make for themselves is of their own dtype, whatever torch's default is around them."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("relaxation", [None, Sigmoid(), StraightThrough(), Concrete()])
    def test_a_table_is_learned(
        self, double_by_default: None, relaxation: Relaxation | None, dtype: torch.dtype
    ) -> None:
        network = Plain().to(dtype)

        def run() -> Tensor:
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
            for step in range(4):
                x = x - 0.1 * network(x, torch.tensor(1 - step / 4, dtype=dtype))
            return x

        trajectory = stepmask.record(network, run=run)
        learner = TrainedForecasts(passes=1.5) if relaxation is None else PerTimestep(relaxation, iterations=2)
        schedule = stepmask.learn(network, trajectory, 0.8, learner=learner)
        assert schedule.steps == 4
        assert not schedule.rows.all()
