"""The reverse sweep: exact where theory says so, against finite differences on real samplers, and what it allocates."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stepmask
from stepmask import Budget, MaskSchedule, Profile, Trajectory
from stepmask.denoiser.seam import hooks_of
from stepmask.errors import (
    AlreadyApplied,
    InvalidBudget,
    InvalidProfile,
    InvalidSchedule,
    LearningError,
    NotTimed,
    ScheduleMismatch,
    TraceError,
)
from stepmask.learning.allocate import CellErrors, saves, shortest_paths
from stepmask.learning.guidance import samples_of
from stepmask.learning.sweep import FIRST_SEED
from stepmask.schedule.answers import answers
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower, rectify

from toys import bits, chain_graph, table, timed, tiny_unet, unet_graph


class Clock(nn.Module):
    """What a block says that reads the timestep alone: a vector that turns with it."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return torch.sin(torch.arange(6.0) * 0.3 + t).expand(x.shape)


class Linear(nn.Module):
    """(x, t) ↦ x + b·x, then + a·(1 + t/10)·(that), + the clock: linear in x, two matrices and a clock for blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.clock = Clock()

    def forward(self, x: Tensor, t: float) -> Tensor:
        clock = self.clock(x, t)
        x = x + self.first(x)
        return x + self.second(x * (1 + t / 10)) + clock


class Listed(nn.Module):
    """The linear denoiser for samples that come and go in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()

    def forward(self, x: list[Tensor], t: float) -> list[Tensor]:
        return list(self.inner(torch.stack(x), t))


BLOCKS: dict[str, Any] = {"first": "output", "second": "output", "clock": "output"}
STEPS = 6


def run_of(
    denoiser: Callable[[Tensor, float], Tensor],
    steps: int = STEPS,
    spoil: Callable[[int, Tensor], Tensor] = lambda _, x: x,
) -> Any:
    """x ← x − 0.1·D(x, t) from a fixed noise of two rows; `spoil` is what goes wrong after a step."""

    def run() -> Tensor:
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            x = spoil(step, x - 0.1 * denoiser(x, float(steps - 1 - step)))
        return x

    return run


@pytest.fixture
def linear() -> tuple[Linear, Trajectory, MaskSchedule]:
    """The linear denoiser, its reference run, and its all-compute table."""
    denoiser = Linear()
    trajectory = stepmask.record(denoiser, run=run_of(denoiser))
    graph = stepmask.trace(denoiser, trajectory, blocks=BLOCKS)
    return denoiser, trajectory, MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


def with_cells(
    reference: MaskSchedule, cells: dict[tuple[int, str], tuple[float, ...]], extra: MaskSchedule | None = None
) -> MaskSchedule:
    """The table with some cells reused by these weights."""
    start = extra or reference
    rows, weights = start.rows.copy(), start.forecasts.copy()
    for (step, name), cell in cells.items():
        rows[step, reference.graph.column(name)] = False
        weights[step, reference.graph.column(name)] = (*cell, *[0.0] * (3 - len(cell)))
    return reference.with_rows(rows, weights)


def true_effects(
    trajectory: Trajectory, schedule: MaskSchedule, probes: int, decode: Callable[[Tensor], Tensor] = lambda x: x
) -> np.ndarray[Any, Any]:
    """⟨v, x_0 − x_0 ref⟩ / ‖x_0 ref‖ per probe and row of a run that is really masked."""
    with stepmask.apply(trajectory.sampling.pipe, schedule) as masked, torch.no_grad():
        if trajectory.sampling.run is not None:
            masked.restart()
        latent = trajectory.sampling.latent()
    reference, latent = decode(trajectory.sampled.latent.detach()).flatten(1), decode(latent).flatten(1)
    rows = []
    for probe in range(probes):
        v = torch.randn(reference.shape, generator=torch.Generator().manual_seed(FIRST_SEED + probe))
        rows.append((v * (latent - reference)).sum(1) / reference.norm(dim=1))
    return torch.cat(rows).numpy()


class TestExact:
    """On a denoiser that is linear in the latent, first order is everything."""

    @pytest.mark.parametrize("step", [1, 2, 5])
    @pytest.mark.parametrize("name", ["first", "second", "clock", ""])
    def test_one_reused_cell(self, linear: Any, step: int, name: str) -> None:
        denoiser, trajectory, reference = linear
        profile = stepmask.sweep(denoiser, trajectory, graph=reference.graph, probes=3)
        weights = [(1.0,), (1.5, -0.5), (2.0, -1.5, 0.25)][min(step, 3) - 1]
        schedule = with_cells(reference, {(step, name): weights})
        expected = true_effects(trajectory, schedule, 3)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(profile.effects(schedule), expected, atol=1e-5)
        assert profile.predicted_error(schedule) == pytest.approx(np.square(expected).mean(), rel=1e-3)

    def test_many_cells_of_a_block_that_does_not_read_the_latent(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        profile = stepmask.sweep(denoiser, trajectory, graph=reference.graph, probes=3)
        cells = {1: (1.0,), 3: (2.0, -1.0), 4: (2.5, -1.5), 5: (0.5, 0.25)}
        schedule = with_cells(reference, {(step, "clock"): weights for step, weights in cells.items()})
        np.testing.assert_allclose(profile.effects(schedule), true_effects(trajectory, schedule, 3), atol=1e-5)

    @pytest.mark.parametrize("names", [("first", "second"), ("first", "second", "clock")])
    def test_several_cells_of_one_step(self, linear: Any, names: tuple[str, ...]) -> None:
        denoiser, trajectory, reference = linear
        profile = stepmask.sweep(denoiser, trajectory, graph=reference.graph, probes=3)
        schedule = with_cells(reference, {(3, name): (1.75, -0.75) for name in names})
        expected = true_effects(trajectory, schedule, 3)
        np.testing.assert_allclose(profile.effects(schedule), expected, atol=1e-5)
        naive = np.abs(profile.inner - profile.held)[:, 3, reference.graph.column("first")]
        assert naive.max() > 0.1  # the second does not react to the first when both are reused

    def test_the_mean_over_probes_is_the_relative_error(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        schedule = with_cells(reference, {(2, "second"): (1.0,)})
        profile = stepmask.sweep(denoiser, trajectory, graph=reference.graph, probes=150, ages=1)
        with stepmask.apply(denoiser, schedule), torch.no_grad():
            moved = (trajectory.sampling.latent() - trajectory.sampled.latent.detach()).square().sum(1)
        error = float((moved / trajectory.sampled.latent.detach().square().sum(1)).mean())
        assert profile.predicted_error(schedule) == pytest.approx(error, rel=0.25)  # 300 rows: spread 8 %

    def test_what_is_measured_after_decoding(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        decode = lambda latent: (3 * latent[:, ::2]).repeat(1, 2)  # noqa: E731
        profile = stepmask.sweep(denoiser, trajectory, graph=reference.graph, probes=2, decode=decode)
        schedule = with_cells(reference, {(3, "first"): (1.0,)})
        np.testing.assert_allclose(profile.effects(schedule), true_effects(trajectory, schedule, 2, decode), atol=1e-5)

    def test_samples_in_a_list_are_rows(self, linear: Any) -> None:
        trajectory, listed = linear[1], Listed()
        run = stepmask.record(listed, run=run_of(lambda x, t: torch.stack(listed(list(x), t))))
        blocks = {f"inner.{name}": reuse for name, reuse in BLOCKS.items()}
        first, second = (
            stepmask.sweep(of.sampling.pipe, of, graph=stepmask.trace(of.sampling.pipe, of, blocks=named), probes=2)
            for of, named in ((trajectory, BLOCKS), (run, blocks))
        )
        np.testing.assert_allclose(first.inner, second.inner, atol=1e-6)

    def test_the_reference_has_no_effect_and_dead_cells_have_none(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        profile = stepmask.sweep(denoiser, trajectory, graph=reference.graph)
        assert profile.predicted_error(reference) == 0
        skipped = with_cells(reference, {(2, ""): (1.0,)})
        with_blocks = with_cells(reference, {(2, "first"): (1.0,), (2, "clock"): (1.0,)}, skipped)
        assert profile.predicted_error(with_blocks) == profile.predicted_error(skipped) > 0


class TestAround:
    """The sweep of a masked run: gradients run through what is stored."""

    MASKED: ClassVar = {(1, "first"): (1.0,), (2, "first"): (1.0,), (3, "second"): (1.75, -0.75),
                        (4, "first"): (2.0, -1.0), (5, ""): (2.0, -1.0)}  # fmt: skip

    def test_it_knows_the_error_of_the_table_itself(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        around = with_cells(reference, self.MASKED)
        profile = stepmask.sweep(denoiser, trajectory, around=around, probes=3)
        expected = true_effects(trajectory, around, 3)
        np.testing.assert_allclose(profile.offset, expected, atol=1e-5)
        assert profile.predicted_error(around) == pytest.approx(np.square(expected).mean(), rel=1e-3)

    @pytest.mark.parametrize(
        "changes", [{(1, "clock"): (1.0,), (3, "clock"): (2.0, -1.0), (4, "clock"): (1.0,)}, {(5, ""): (1.5, -0.5)},
                    {(4, "first"): (1.0,)}, {(3, "second"): (1.0, 0.5)}, {(2, "second"): (1.0,)}],
    )  # fmt: skip
    def test_changes_of_one_block_are_exact_on_a_linear_denoiser(self, linear: Any, changes: Any) -> None:
        denoiser, trajectory, reference = linear
        around = with_cells(reference, self.MASKED)
        schedule = with_cells(reference, changes, around)
        profile = stepmask.sweep(denoiser, trajectory, around=around, probes=3)
        expected = true_effects(trajectory, schedule, 3)
        assert np.abs(expected - profile.offset).max() > 1e-4
        np.testing.assert_allclose(profile.offset + profile.effects(schedule), expected, atol=1e-5)

    @pytest.mark.parametrize("blended", [{(4, "")}, {(3, "first")}, {(2, "second"), (3, "first"), (4, "")}])
    def test_blends_are_exact_on_a_linear_denoiser(self, linear: Any, blended: set[tuple[int, str]]) -> None:
        denoiser, trajectory, reference = linear
        weights = reference.forecasts.copy()
        for step, name in blended:
            weights[step, reference.graph.column(name)] = (0.75, 0.5, -0.25)
        schedule = reference.with_rows(reference.rows, weights)
        around = reference if len(blended) == 1 else schedule  # one change alone is of first order
        profile = stepmask.sweep(denoiser, trajectory, around=around, probes=3)
        expected = true_effects(trajectory, schedule, 3)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(profile.offset + profile.effects(schedule), expected, atol=1e-5)

    def test_blocks_that_hold_their_answers_under_a_blend(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        weights = reference.forecasts.copy()
        weights[3, -1] = (0.5, 0.25, 0.0)
        around = reference.with_rows(reference.rows, weights)
        schedule = with_cells(reference, {(3, name): (1.75, -0.75) for name in ("first", "second", "clock")}, around)
        profile = stepmask.sweep(denoiser, trajectory, around=around, probes=3)
        expected = true_effects(trajectory, schedule, 3)
        assert np.abs(expected - profile.offset).max() > 1e-3
        np.testing.assert_allclose(profile.offset + profile.effects(schedule), expected, atol=1e-5)

    def test_a_reused_cell_that_is_computed_again(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        around = with_cells(reference, {(1, "first"): (1.0,), (4, "first"): (2.0, -1.0), (3, "second"): (1.0,)})
        schedule = with_cells(reference, {(1, "first"): (1.0,), (3, "second"): (1.0,)})
        profile = stepmask.sweep(denoiser, trajectory, around=around, probes=3)
        expected = true_effects(trajectory, schedule, 3)
        np.testing.assert_allclose(profile.offset + profile.effects(schedule), expected, atol=1e-5)

    def test_all_compute_is_the_reference(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        plain = stepmask.sweep(denoiser, trajectory, graph=reference.graph)
        np.testing.assert_array_equal(stepmask.sweep(denoiser, trajectory, around=reference).inner, plain.inner)


class Nudge:
    """In front of a block: at one evaluation it answers a little of what it said some evaluations earlier."""

    def __init__(self, evaluation: int, age: int, amount: float) -> None:
        self.evaluation, self.age, self.amount, self.said = evaluation, age, amount, list[Tensor]()

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.said.append(output := call(*args, **kwargs))
        if len(self.said) - 1 != self.evaluation:
            return output
        return torch.lerp(output, self.said[-1 - self.age], self.amount)


SAMPLERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"]


class TestGradients:
    @pytest.mark.parametrize("name", SAMPLERS)
    def test_against_finite_differences_on_a_guided_pipeline(self, pipe: Any, name: str) -> None:
        import diffusers

        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        pipe.to(torch.float64)
        trajectory = stepmask.record(pipe, class_labels=[1, 2], num_inference_steps=5, seed=4)
        profile = stepmask.sweep(pipe, trajectory, probes=1, ages=3)
        reference, size = trajectory.sampled.latent.double().flatten(1), 0.05
        v = torch.randn(reference.shape, generator=torch.Generator().manual_seed(FIRST_SEED)).double()
        for step, block, age in [(1, 0, 1), (2, 3, 1), (3, 4, 3), (4, 5, 2)]:
            module = pipe.transformer.get_submodule(profile.graph.names[block])
            ends = [self.nudged(trajectory, module, Nudge(step, age, amount)) for amount in (size, -size)]
            moved = (v * (ends[0] - ends[1]).flatten(1)).sum(1) / (2 * size)
            expected = [float(moved[s::2].sum() / reference[s::2].norm()) for s in (0, 1)]
            found = profile.inner[:, step, block, age] - profile.inner[:, step, block, 0]
            np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-6)

    def nudged(self, trajectory: Trajectory, module: nn.Module, nudge: Nudge) -> Tensor:
        from stepmask.denoiser.seam import attached

        with attached({module: nudge}), torch.no_grad():
            return trajectory.sampling.latent().double()

    def test_checkpointed_blocks_give_the_same(self, pipe: Any, trajectory: Trajectory) -> None:
        plain, again = (stepmask.sweep(pipe, trajectory, probes=1, checkpoint_blocks=kept) for kept in (False, True))
        np.testing.assert_allclose(plain.inner, again.inner, atol=1e-6)

    def test_rows_of_guidance_belong_to_their_sample(self, trajectory: Trajectory) -> None:
        latent_rows, output_rows = samples_of(trajectory)
        assert latent_rows.tolist() == output_rows.tolist() == [0, 1, 0, 1]  # both halves are the same two samples

    def test_two_calls_a_step_are_one_guided_step(self) -> None:
        one, two = (record_guided(calls) for calls in (1, 2))
        assert (one.sampler.branches, two.sampler.branches) == (1, 2)
        torch.testing.assert_close(one.sampled.latent, two.sampled.latent)
        first, second = (stepmask.sweep(run.sampling.pipe, run, probes=2) for run in (one, two))
        assert np.abs(first.inner).max() > 0.01
        np.testing.assert_allclose(first.inner, second.inner, atol=1e-5)

    def test_nothing_is_left_behind(self, pipe: Any, trajectory: Trajectory) -> None:
        stepmask.sweep(pipe, trajectory, probes=1)
        assert untouched(pipe.transformer)
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)


class Guided:
    """A pipeline that is guided by one call of twice the rows, or by two calls a step."""

    def __init__(self, calls: int) -> None:
        from diffusers import DDIMScheduler

        self.unet, self.scheduler, self.calls = tiny_unet().double(), DDIMScheduler(), calls

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=generator).double()
        words = torch.randn(2, 3, 8, generator=generator).double().repeat_interleave(2, 0)  # cond, cond, uncond, uncond
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            pairs = [(torch.cat([x, x]), words)] if self.calls == 1 else [(x, words[:2]), (x, words[2:])]
            said = torch.cat([self.unet(latent, t, encoder_hidden_states=word).sample for latent, word in pairs])
            x = self.scheduler.step(3 * said[:2] - 2 * said[2:], t, x, return_dict=False)[0]
        return x


def record_guided(calls: int) -> Trajectory:
    return stepmask.record(Guided(calls), num_inference_steps=3)


def untouched(module: nn.Module) -> bool:
    """Whether nothing stands in front of a denoiser, and its weights can be trained as before."""
    clean = not any(hooks_of(part) for part in module.modules())
    return clean and all(weight.requires_grad and weight.grad is None for weight in module.parameters())


def random_profile(
    graph: BlockGraph, steps: int, *, ages: int = 4, rows: int = 8, offset: float = 0.0, held: float = 1.0
) -> Profile:
    """A profile of made-up numbers, in which values drift apart as they age."""
    draw = np.random.default_rng(5)
    drift = draw.normal(size=(rows, steps, len(graph), ages + 1)) * draw.uniform(0.1, 1, size=(1, steps, len(graph), 1))
    around = MaskSchedule.all_compute(graph, table(graph, "").denoiser, table(graph, *[""] * steps).sampler)
    inner = np.cumsum(drift, axis=3)
    return Profile(around, inner, held * inner, offset * draw.normal(size=rows), np.arange(rows))


def cell_error(profile: Profile, step: int, column: int, age: int, gap: int) -> float:
    """Smallest mean of (offset + s + κ·d)² − offset² over κ, by least squares."""
    said = profile.inner[:, step, column].astype(float)
    residual = profile.offset + said[:, age] - said[:, 0]
    if gap and age + gap <= profile.ages:
        slope = (said[:, age] - said[:, age + gap])[:, None]
        residual = residual + slope @ np.linalg.lstsq(slope, -residual, rcond=None)[0]
    return float(np.square(residual).mean() - np.square(profile.offset).mean())


def changes(profile: Profile) -> Any:
    return profile.inner.astype(float) - profile.inner[..., :1]


class TestAllocation:
    @pytest.mark.parametrize("offset", [0.0, 0.7])
    def test_the_closed_form_of_a_forecast_is_least_squares(self, offset: float) -> None:
        profile = random_profile(chain_graph(3, "output"), 6, offset=offset)
        cells = CellErrors.of(changes(profile), profile.offset.astype(float))
        for step, column, age, gap in product((4, 5), range(4), (1, 2, 3), (0, 1, 2, 3)):
            expected = cell_error(profile, step, column, age, gap)
            assert cells.errors[step, column, age, gap] == pytest.approx(expected, rel=1e-5, abs=1e-9)
        said = changes(profile)[:, 4, 1]
        kappa = np.linalg.lstsq((said[:, 1] - said[:, 3])[:, None], -said[:, 1] - profile.offset, rcond=None)[0][0]
        assert cells.kappas[4, 1, 1, 2] == pytest.approx(kappa, rel=1e-5)

    @pytest.mark.parametrize("price", [0.01, 0.3, 1.0, 4.0])
    def test_the_shortest_path_against_all_tables(self, price: float) -> None:
        steps, blocks = 6, 3
        profile = random_profile(chain_graph(blocks, "output"), steps, ages=3)
        prices = price * np.array([1.0, 0.4, 2.0])
        totals = np.zeros((blocks, 2 ** (steps - 1)))  # of one block under each of its columns
        columns = [(True, *column) for column in product((True, False), repeat=steps - 1)]
        for block, (index, column) in product(range(blocks), enumerate(columns)):
            totals[block, index] = self.total(profile, block, column, prices[block])
        joint = totals[0][:, None, None] + totals[1][:, None] + totals[2]  # all 32³ tables
        cells = CellErrors.of(changes(profile), profile.offset.astype(float))
        paths = shortest_paths(cells.errors[:, :blocks], prices)
        found = [self.total(profile, block, tuple(paths[:, block]), prices[block]) for block in range(blocks)]
        assert sum(found) == pytest.approx(joint.min(), rel=1e-6)
        assert 0 < paths[1:].mean() < 1 or price in (0.01, 4.0)

    def total(self, profile: Profile, block: int, column: tuple[bool, ...], price: float) -> float:
        """Σ error + price · (times computed) of one block's column, from the definition."""
        total, computed = 0.0, list[int]()
        for step, computes in enumerate(column):
            if computes:
                computed.append(step)
                continue
            age = step - computed[-1]
            if age > profile.ages:
                return float("inf")
            total += cell_error(profile, step, block, age, computed[-1] - computed[-2] if len(computed) > 1 else 0)
        return total + price * len(computed)

    @pytest.mark.parametrize("graph", [chain_graph(4, "output"), chain_graph(4, "delta"), unet_graph()])
    @pytest.mark.parametrize("budget", [0.4, 0.6, 0.85])
    def test_a_schedule_is_rectified_within_its_budget_and_beats_the_regular_tables(
        self, graph: BlockGraph, budget: float
    ) -> None:
        profile = random_profile(graph, 10, ages=8)
        schedule = profile.schedule(budget)
        assert lower(schedule).macs_share <= budget + 1e-9
        assert rectify(schedule) == schedule
        assert schedule.provenance["predicted_error"] == pytest.approx(profile.predicted_error(schedule))
        for baseline, order in product((fixed_interval, whole_step), range(3)):
            rival = baseline(profile.around, budget, order=order)
            if lower(rival).macs_share <= budget:
                assert profile.predicted_error(schedule) <= profile.predicted_error(rival) + 1e-12

    def test_what_reuse_saves_counts_what_dies_of_it(self) -> None:
        # five equal blocks. up1 alone needs mid, and with it down1; up0 alone needs all others
        graph = unet_graph()
        assert [round(5 * saves(graph, column, graph.costs)) for column in range(6)] == [1, 1, 1, 3, 5, 5]
        deltas = chain_graph(4, "delta")
        assert [round(4 * saves(deltas, column, deltas.costs)) for column in range(5)] == [1, 1, 1, 1, 4]

    def test_a_cheap_block_that_silences_others_is_reused_for_it(self) -> None:
        # reusing up0 costs nothing and reusing anything else costs much: the budget is met by up0 alone
        graph = unet_graph()
        profile = random_profile(graph, 6, ages=5)
        inner = profile.inner * 100
        inner[:, :, graph.column("up0")] = 1.0
        schedule = replace(profile, inner=inner, held=inner).schedule(0.5)
        assert bits(schedule) == ["11111", *["00000"] * 5]
        assert schedule.rows[:, -1].all()

    def test_more_budget_is_never_worse(self) -> None:
        errors = [error for _, error in random_profile(unet_graph(), 10).pareto()]
        assert errors == sorted(errors, reverse=True)

    def test_a_budget_that_cannot_be_reached_says_what_can(self) -> None:
        # ages up to 4: the denoiser is computed at steps 0 and 5 of 10
        profile = random_profile(chain_graph(3, "output"), 10)
        with pytest.raises(InvalidBudget, match=r"at least 0\.2000"):
            profile.schedule(0.15)
        assert lower(profile.schedule(0.2)).macs_share == pytest.approx(0.2)

    def test_time_is_spent_like_macs_where_it_is_like_them(self) -> None:
        graph = unet_graph()
        like_macs = timed(graph, *graph.macs)
        by_macs = random_profile(graph, 10, ages=8).schedule(0.5)
        by_time = random_profile(like_macs, 10, ages=8).schedule(Budget(time=0.5))
        assert np.array_equal(by_macs.rows, by_time.rows)
        assert by_time.provenance["budget"] == {"time": 0.5}

    @pytest.mark.parametrize("graph", [chain_graph(4, "delta"), unet_graph()])
    def test_a_budget_in_time_is_met_in_time(self, graph: BlockGraph) -> None:
        profile = random_profile(timed(graph, 9, *[1] * (len(graph) - 1)), 10, ages=8)
        schedule = profile.schedule(Budget(time=0.5))
        assert lower(schedule).time_share <= 0.5 + 1e-9
        with pytest.raises(InvalidBudget, match=r"measured time") as refused:
            profile.schedule(Budget(time=0.12))
        least = float(str(refused.value).partition("at least ")[2][:6])
        assert lower(profile.schedule(Budget(time=least + 1e-4))).time_share == pytest.approx(least, abs=1e-4)

    def test_a_budget_in_time_needs_times(self) -> None:
        with pytest.raises(NotTimed, match="time_blocks"):
            random_profile(unet_graph(), 6).schedule(Budget(time=0.5))

    def test_a_small_store_forces_fewer_reads(self) -> None:
        profile = random_profile(unet_graph(), 10, ages=8)
        for size in (4, 8, 12):
            schedule = profile.schedule(Budget(0.5, store_bytes=size))
            assert lower(schedule).peak_bytes <= size
            assert schedule.windows.max() <= size // 4
        with pytest.raises(InvalidBudget, match="at least 4 bytes"):
            profile.schedule(Budget(0.5, store_bytes=3))

    def test_a_cell_counts_in_between_where_half_of_what_is_downstream_is_computed(self) -> None:
        # down1 reaches mid, up1 and up0. With mid and up1 reused, a third of them is computed, and down1 is dead
        profile = random_profile(unet_graph(), 3, held=0.25)
        share = profile.computed_downstream(answers(table(unet_graph(), "11111", "11001", "11111"), profile.ages))
        assert share[1].tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1, 1, 1])
        np.testing.assert_allclose(profile.mixed(share)[:, 1, 1], profile.inner[:, 1, 1] * 0.5, rtol=1e-6)


class TestProfile:
    def test_two_half_sweeps_are_the_whole(self, pipe: Any, trajectory: Trajectory) -> None:
        whole = stepmask.sweep(pipe, trajectory, probes=4)
        halves = [stepmask.sweep(pipe, trajectory, probes=2, seed=seed) for seed in (0, 2)]
        for merged in (Profile.merge(*halves), halves[0] + halves[1]):
            np.testing.assert_array_equal(merged.inner, whole.inner)
            np.testing.assert_array_equal(merged.offset, whole.offset)
            assert merged.samples.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
        assert whole.samples.tolist() == [0, 1] * 4

    def test_the_error_of_a_sample_is_the_mean_over_its_rows(self) -> None:
        profile = random_profile(unet_graph(), 6, rows=4, offset=0.1)
        counted = replace(profile, samples=np.array([0, 1, 1, 1]))
        schedule = fixed_interval(profile.around, 0.5)
        one, *three = np.square(profile.offset + profile.effects(schedule))
        assert counted.predicted_errors(schedule).tolist() == pytest.approx([one, np.mean(three)])
        assert counted.predicted_error(schedule) == pytest.approx((one + np.mean(three)) / 2)

    def test_what_does_not_belong_together_is_not_merged(self) -> None:
        profile = random_profile(unet_graph(), 6)
        others = {
            "ages": random_profile(unet_graph(), 6, ages=3),
            "blocks": random_profile(chain_graph(5, "output"), 6),
            "steps": random_profile(unet_graph(), 7),
            "tables": replace(profile, around=fixed_interval(profile.around, 0.5)),
        }
        for what, other in others.items():
            with pytest.raises(InvalidProfile, match=what):
                profile + other
        with pytest.raises(InvalidProfile, match="no profile"):
            Profile.merge()

    def test_saved_and_loaded_allocates_the_same(self, tmp_path: Path) -> None:
        profile = random_profile(unet_graph(), 8, offset=0.1)
        around, samples = fixed_interval(profile.around, 0.5, order=1), np.arange(8) // 2
        profile = replace(profile, around=around, samples=samples, provenance={"probes": 8})
        profile.save_pretrained(tmp_path)
        loaded = Profile.from_pretrained(tmp_path)
        assert profile.save_pretrained(os.fsencode(tmp_path)).parent == tmp_path
        assert Profile.from_pretrained(os.fsencode(tmp_path)).around == loaded.around
        assert loaded.provenance == {"probes": 8}
        assert loaded.around == profile.around
        assert loaded.samples.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        for (ours, error), (theirs, same) in zip(profile.pareto(), loaded.pareto(), strict=True):
            assert ours == theirs
            assert error == same

    @pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
    def test_a_damaged_file_is_one_clear_error(self, tmp_path: Path, name: str) -> None:
        random_profile(unet_graph(), 5).save_pretrained(tmp_path)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InvalidProfile, match=str(tmp_path)):
            Profile.from_pretrained(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(InvalidProfile, match=name):
            Profile.from_pretrained(tmp_path)

    def test_arrays_of_another_profile_are_noticed(self, tmp_path: Path) -> None:
        random_profile(unet_graph(), 5).save_pretrained(tmp_path)
        random_profile(unet_graph(), 5, rows=3).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "profile.safetensors").replace(tmp_path / "profile.safetensors")
        with pytest.raises(InvalidProfile, match="of another profile"):
            Profile.from_pretrained(tmp_path)

    def test_another_format_is_refused(self, tmp_path: Path) -> None:
        path = random_profile(unet_graph(), 5).save_pretrained(tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": "stepmask-profile/9"}))
        with pytest.raises(InvalidProfile, match="stepmask-profile/9"):
            Profile.from_pretrained(tmp_path)

    def test_numbers_that_make_no_profile_are_refused(self) -> None:
        profile = random_profile(unet_graph(), 5)
        inner, held, offset = profile.inner, profile.held, profile.offset
        for arrays in [
            (inner[:, 1:], held[:, 1:], offset), (inner, held[:, :, 1:], offset), (inner, held, offset[1:]),
            (inner * np.nan, held, offset), (inner[:0], held[:0], offset[:0]),
        ]:  # fmt: skip
            with pytest.raises(InvalidProfile):
                Profile(profile.around, *arrays, profile.samples)
        for samples in ([0, 1], [1] * 8, [0] * 7 + [2], [-1] * 8):
            with pytest.raises(InvalidProfile, match="a sample a row"):
                Profile(profile.around, inner, held, offset, np.array(samples))

    def test_a_schedule_that_the_profile_does_not_know_is_refused(self) -> None:
        profile = random_profile(unet_graph(), 8, ages=2)
        with pytest.raises(InvalidSchedule, match="3 steps old"):
            profile.predicted_error(fixed_interval(profile.around, 0.25))
        with pytest.raises(ScheduleMismatch, match="other blocks"):
            profile.predicted_error(random_profile(chain_graph(5, "output"), 8).around)
        with pytest.raises(ScheduleMismatch, match="sampling steps"):
            profile.predicted_error(random_profile(unet_graph(), 7).around)


class TestRefused:
    def test_another_pipelines_trajectory(self, pipe: Any, trajectory: Trajectory) -> None:
        with pytest.raises(LearningError, match="another pipeline"):
            stepmask.sweep(pipe.transformer, trajectory)

    def test_a_masked_denoiser(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        with stepmask.apply(pipe, reference), pytest.raises(AlreadyApplied):
            stepmask.sweep(pipe, trajectory)

    def test_nothing_to_measure(self, pipe: Any, trajectory: Trajectory) -> None:
        with pytest.raises(LearningError, match="0 probes"):
            stepmask.sweep(pipe, trajectory, probes=0)

    def test_a_graph_that_is_not_the_tables(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        whole_blocks = stepmask.trace(pipe, trajectory, granularity="block")
        with pytest.raises(ScheduleMismatch, match="not the same"):
            stepmask.sweep(pipe, trajectory, graph=whole_blocks, around=reference)

    def test_a_table_with_older_values_than_the_sweep(self, linear: Any) -> None:
        denoiser, trajectory, reference = linear
        with pytest.raises(InvalidSchedule, match="2 steps old"):
            stepmask.sweep(denoiser, trajectory, around=fixed_interval(reference, 1 / 3), ages=1)

    def test_another_run(self, pipe: Any, trajectory: Trajectory) -> None:
        from diffusers import DDIMScheduler

        graph = stepmask.trace(pipe, trajectory)
        pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        with pytest.raises(LearningError, match="away from the recorded"):
            stepmask.sweep(pipe, trajectory, graph=graph)
        with pytest.raises(TraceError, match="the scheduler"):
            stepmask.sweep(pipe, trajectory)
        assert untouched(pipe.transformer)

    def test_latents_that_are_not_finite(self, pipe: Any, trajectory: Trajectory) -> None:
        graph = stepmask.trace(pipe, trajectory)
        pipe.transformer.proj_out_2.bias.data[0] = torch.nan
        with pytest.raises(LearningError, match="output at step 0 that is not finite"):
            stepmask.sweep(pipe, trajectory, graph=graph)
        assert untouched(pipe.transformer)

    def test_gradients_that_are_not_finite(self) -> None:
        class Root(Linear):
            def forward(self, x: Tensor, t: float) -> Tensor:
                return super().forward(x, t) + (x * (t - 2)).abs().sqrt().sum() * 0  # ∞·0 at t = 2

        denoiser = Root()
        trajectory = stepmask.record(denoiser, run=run_of(denoiser))
        graph = stepmask.trace(denoiser, trajectory, blocks=BLOCKS)
        with pytest.raises(LearningError, match=r"gradient at step [23] that is not finite"):
            stepmask.sweep(denoiser, trajectory, graph=graph)
        assert untouched(denoiser)

    @pytest.mark.parametrize(("where", "said"), [(2, "step 2 and step 3"), (5, "after the last evaluation")])
    def test_a_loop_that_cuts_the_gradient(self, where: int, said: str) -> None:
        denoiser = Linear()
        run = run_of(denoiser, spoil=lambda step, x: x.detach() if step == where else x)
        trajectory = stepmask.record(denoiser, run=run)
        with pytest.raises(LearningError, match=said):
            stepmask.sweep(denoiser, trajectory, graph=stepmask.trace(denoiser, trajectory, blocks=BLOCKS))
        assert untouched(denoiser)

    def test_a_table_that_forecasts_channel_by_channel(self, pipe: Any, trajectory: Trajectory) -> None:
        graph = stepmask.trace(pipe, trajectory)
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        rows, channels = full.rows.copy(), graph.blocks[0].shapes[0][-1]
        rows[1, 0] = False
        vectors = np.ones((2, channels), np.float32)
        with pytest.raises(InvalidSchedule, match="per-channel"):
            answers(full.with_rows(rows, channels={(1, 0): vectors}), 3)
