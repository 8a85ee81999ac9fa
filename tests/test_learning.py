"""Learning: each part by hand on toys, the whole on a tiny real pipeline."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, Never

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import stepmask
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.call import Call
from stepmask.denoiser.families import fingerprint_of
from stepmask.denoiser.seam import hooks_of
from stepmask.errors import InvalidBudget, LearningError, RunError, UnwritablePath
from stepmask.evaluation.metrics import latent_errors
from stepmask.executors.local import LocalExecutor
from stepmask.learning import trained
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.guidance import Guidance, guidance_of, samples_of
from stepmask.learning.objective import (
    MeasuredGain,
    Objective,
    Uniform,
    expected_cost,
    relative_error,
    step_changes,
)
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.relax import Concrete, Sigmoid, StraightThrough
from stepmask.learning.rounding import round_scores
from stepmask.learning.starts import Family
from stepmask.learning.step import StepJob, learn_step
from stepmask.learning.tape import Tape
from stepmask.learning.task import Task
from stepmask.learning.trained import TrainedForecasts, _leader, _racers, _readable, _Start
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.budget import Budget
from stepmask.schedule.rectify import lower, rectify

from toys import Drift, Scale, bits, chain_graph, sampler, table, unet_graph

QUICK = PerTimestep(iterations=3, rounds=2)


class TestObjective:
    def test_relative_error_by_hand(self) -> None:
        # (1 + 4) / (9 + 16)
        assert relative_error(torch.tensor([2.0, 2.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)

    def test_the_loss_by_hand(self) -> None:
        loss = Objective(weight=2.0, feature=0.5, price=3.0)
        # 2·(0.1 + 0.5·mean(0.2, 0.4)) + 3·0.25
        given_loss = loss(torch.tensor(0.1), [torch.tensor(0.2), torch.tensor(0.4)], torch.tensor(0.25))
        assert given_loss == pytest.approx(2 * (0.1 + 0.15) + 0.75)

    def test_the_cost_of_a_row_is_what_is_left_after_rectification(self) -> None:
        # up1 at 0.5 makes mid and down1 live by half: (1 + 0.5 + 0.5 + 0.5 + 1) / 5
        halved = torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 1.0])
        assert expected_cost(halved, unet_graph(), unet_graph().costs) == pytest.approx(3.5 / 5)

    @given(st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from(["unet", "chain"]))
    def test_the_cost_of_bits_is_that_of_the_plan(self, row: list[bool], kind: str) -> None:
        graph = unet_graph() if kind == "unet" else chain_graph(5, "delta")
        plan = lower(table(graph, "111111", "".join("01"[bit] for bit in row)))
        cost = expected_cost(torch.tensor(row, dtype=torch.float64), graph, graph.costs)
        assert float(cost) == pytest.approx((plan.computed[1] * graph.costs).sum())

    def test_guidance_is_read_off_the_run(self, pipe: Any) -> None:
        trajectory = stepmask.record(pipe, class_labels=[1, 2], guidance_scale=3.0, num_inference_steps=3)
        expected = torch.tensor([[3.0, 0, -2, 0], [0, 3, 0, -2], [3, 0, -2, 0], [0, 3, 0, -2]])
        torch.testing.assert_close(guidance_of(trajectory, 1).weights, expected, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("scale", [1.1, 1.5, 7.5])
    def test_rows_that_guidance_mixes_are_one_samples_however_little(self, pipe: Any, scale: float) -> None:
        # conditional rows 0 and 1 count by the scale, unconditional rows 2 and 3 by 1 − scale
        trajectory = stepmask.record(pipe, class_labels=[1, 2], guidance_scale=scale, num_inference_steps=3)
        latent_rows, output_rows = samples_of(trajectory)
        assert latent_rows.tolist() == [0, 1, 0, 1]
        assert output_rows.tolist() == [0, 1, 0, 1]

    def test_without_guidance_rows_pass_as_they_are(self, pipe: Any) -> None:
        trajectory = stepmask.record(pipe, class_labels=[1, 2], guidance_scale=1.0, num_inference_steps=3)
        torch.testing.assert_close(guidance_of(trajectory, 1).weights, torch.eye(2), atol=1e-3, rtol=0)


def loop(denoiser: Drift, steps: int, width: float) -> Callable[[], Tensor]:
    """x ← x − width·D(x, t) for t = steps − 1 … 0, from x = 1."""

    def run() -> Tensor:
        x = torch.ones(1, 3)
        for step in range(steps):
            x = x - width * denoiser(x, float(steps - 1 - step))
        return x

    return run


class TestGain:
    def test_the_measured_gain_of_a_linear_chain(self) -> None:
        # D(x, t) = (3 + t)·x, so a change Δ of the output at step k reaches the end as −h·Δ·Π_{j>k}(1 − h(3 + t_j))
        denoiser, steps, width = Drift(), 4, 0.1
        trajectory = stepmask.record(denoiser, run=loop(denoiser, steps, width))
        factors = 1 - width * (3 + np.arange(steps - 1, -1, -1.0))
        energy = [float(output.square().sum()) for output in trajectory.outputs]
        expected = [energy[k] * (width * np.prod(factors[k + 1 :])) ** 2 for k in range(1, steps)]
        np.testing.assert_allclose(MeasuredGain().measure(trajectory)[1:], expected, rtol=1e-3)

    def test_power_zero_is_uniform(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 3, 0.1))
        np.testing.assert_array_equal(MeasuredGain(power=0).measure(trajectory), Uniform().measure(trajectory))

    def test_measuring_leaves_the_denoiser_as_it_was(self, pipe: Any, trajectory: Trajectory) -> None:
        MeasuredGain().measure(trajectory)
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)

    def test_step_changes_by_hand(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 2, 0.1))
        # outputs 4 at t = 1; then x = 0.6, D = 1.8 at t = 0
        np.testing.assert_allclose(step_changes(trajectory), [0, (4 - 1.8) ** 2 / 1.8**2], rtol=1e-5)


class TestRelaxations:
    def test_straight_through_is_hard_forward_and_soft_backward(self) -> None:
        parameter = torch.tensor([-1.0, 2.0], requires_grad=True)
        scores = StraightThrough().sample(parameter, 0.0, torch.Generator())
        assert scores.tolist() == [0.0, 1.0]
        (gradient,) = torch.autograd.grad(scores.sum(), [parameter])
        soft = torch.sigmoid(parameter.detach())
        torch.testing.assert_close(gradient, soft * (1 - soft))

    def test_sigmoid_is_clamped(self) -> None:
        parameter = torch.tensor([-50.0, 50.0])
        Sigmoid(limit=8.0).project(parameter, torch.ones(2), 0.5)
        assert parameter.tolist() == [-8.0, 8.0]

    def test_the_projection_by_hand(self) -> None:
        # costs 1/4 each, share 1/2: Σ(s − v) = 2 with s = (1, 1, 0.8, 0.2): v = 0.2667 keeps the first three
        parameter = torch.tensor([1.0, 1.0, 0.8, 0.2])
        Concrete().project(parameter, torch.full((4,), 0.25), 0.5)
        torch.testing.assert_close(parameter, torch.tensor([0.7333, 0.7333, 0.5333, 0.0]), atol=1e-4, rtol=0)

    @given(st.lists(st.floats(-1, 3), min_size=1, max_size=9), st.floats(0, 1))
    def test_the_projection_meets_any_budget_and_moves_nothing_that_fits(self, s: list[float], share: float) -> None:
        parameter = torch.tensor(s)
        clipped, costs = parameter.clamp(0, 1), torch.full((len(s),), 1 / len(s))
        Concrete().project(parameter, costs, share)
        assert float(parameter @ costs) <= share + 1e-4
        assert ((parameter >= 0) & (parameter <= 1)).all()
        if float(clipped @ costs) <= share:
            torch.testing.assert_close(parameter, clipped)

    def test_concrete_grows_hard_as_it_cools(self) -> None:
        probability = torch.full((1000,), 0.3)
        soft, hard = (Concrete().sample(probability, at, torch.Generator().manual_seed(0)) for at in (0.0, 1.0))
        undecided = lambda scores: ((scores > 0.05) & (scores < 0.95)).float().mean()  # noqa: E731
        assert undecided(hard) < 0.2 < undecided(soft)
        assert float(hard.mean()) == pytest.approx(0.3, abs=0.05)


def drift_job(relaxation: Any = None, price: float = 0.05) -> tuple[tuple[Drift], StepJob]:
    """Step 1 of a run at t = 1, 2 on the same x: the still block's stored value is right, the moving one's is not."""
    denoiser, x = Drift(), torch.ones(2, 3)
    graph = stepmask.trace(denoiser, (x, 1.0), blocks={"still": "output", "moving": "output"})
    blocks = tuple(replace(block, macs=macs) for block, macs in zip(graph.blocks, (1, 1, 0), strict=True))
    job = StepJob(
        step=1,
        calls=((Call((x, 1.0), {}), Call((x, 2.0), {})),),
        networks=(0,),
        present=((0,), (0,)),
        rows=np.ones((1, 3), dtype=bool),
        graph=stepmask.BlockGraph(blocks),
        costs=np.array([0.5, 0.5, 0.0]),
        guidance=Guidance(torch.eye(2), 3),
        objective=Objective(1.0, 0.0, price),
        relaxation=relaxation or Sigmoid(rate=0.3),
        share=0.5,
        whole_steps=False,
        iterations=60,
        seed=0,
    )
    return (denoiser,), job


class TestLearnStep:
    @pytest.mark.parametrize("relaxation", [Sigmoid(rate=0.3), StraightThrough(rate=0.3), Concrete(rate=0.1)])
    def test_a_block_that_says_the_same_is_reused_and_one_that_changes_is_computed(self, relaxation: Any) -> None:
        scores = learn_step(*drift_job(relaxation))
        assert scores[0] < 0.5 < scores[1]
        assert scores[2] == 1.0

    def test_the_denoiser_itself_is_a_block_whose_reuse_saves_the_others(self) -> None:
        # the output moves from 4·x to 5·x: an error of 1/25, which is cheap at a price of 1 and dear at 0.001
        cheap, dear = (learn_step(denoiser, replace(job, whole_steps=True)) for denoiser, job in
                       (drift_job(price=1.0), drift_job(price=0.001)))  # fmt: skip
        assert cheap[-1] < 0.5 < dear[-1]

    def test_a_high_price_reuses_everything(self) -> None:
        assert (learn_step(*drift_job(price=10.0))[:2] < 0.5).all()

    def test_it_is_a_pure_function(self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule) -> None:
        jobs = QUICK._jobs(trajectory, reference, reference.graph.costs, np.ones(5), 1.0, np.ones(5))
        before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
        first, again = learn_step([pipe.transformer], jobs[2]), learn_step([pipe.transformer], jobs[2])
        np.testing.assert_array_equal(first, again)
        assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.transformer.parameters())
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)

    def test_jobs_are_named_by_their_content(self, trajectory: Trajectory, reference: MaskSchedule) -> None:
        jobs = QUICK._jobs(trajectory, reference, reference.graph.costs, np.ones(5), 1.0, np.ones(5))
        dearer = QUICK._jobs(trajectory, reference, reference.graph.costs, np.ones(5), 2.0, np.ones(5))
        again = QUICK._jobs(trajectory, reference, reference.graph.costs, np.ones(5), 1.0, np.ones(5))
        assert [job.digest() for job in jobs] == [job.digest() for job in again]
        assert len({job.digest() for job in [*jobs, *dearer]}) == 8

    def test_a_loss_that_is_not_finite_is_an_error(self) -> None:
        denoisers, job = drift_job()
        with pytest.raises(LearningError, match="step 1 that is not finite"):
            learn_step(denoisers, replace(job, calls=((job.calls[0][0], Call((torch.ones(2, 3), float("inf")), {})),)))
        assert type(denoisers[0].still) is Scale


class TestRounding:
    def test_the_threshold_meets_the_budget_and_keeps_the_best(self) -> None:
        # five equal blocks; up0 reads up1 and down0. Room for 5 + 2 cells of 10: up1 and up0 score highest
        reference = table(unet_graph(), "11111", "11111")
        scores = np.array([[1.0] * 6, [0.1, 0.2, 0.3, 0.8, 0.9, np.inf]])
        assert bits(round_scores(scores, reference, Budget(0.7), max_age=9)) == ["11111", "00011"]

    def test_a_score_counts_for_more_as_the_value_ages(self) -> None:
        # 0.3 at age 1 counts 0.3, at age 2 it counts 1.2: a threshold between the two computes every other step
        reference = table(unet_graph(), *["11111"] * 5)
        scores = np.full((5, 6), 0.3)
        scores[:, -1] = np.inf
        assert bits(round_scores(scores, reference, Budget(0.6), max_age=9)) == [
            "11111", "00000", "11111", "00000", "11111"]  # fmt: skip

    def test_no_value_is_reused_for_too_long(self) -> None:
        reference = table(unet_graph(), *["11111"] * 7)
        made = round_scores(np.zeros((7, 6)), reference, Budget(0.5), max_age=2)
        assert bits(made) == ["11111", "00000", "00000"] * 2 + ["11111"]

    def test_nothing_is_computed_in_a_step_that_is_skipped(self) -> None:
        reference = table(unet_graph(), "11111", "11111", "11111")
        scores = np.array([[1.0] * 6, [0.9] * 5 + [0.1], [0.9] * 6])
        made = round_scores(scores, reference, Budget(0.7), max_age=9)
        assert bits(made) == ["11111", "00000", "11111"]
        assert made.rows[:, -1].tolist() == [True, False, True]

    def test_a_budget_that_cannot_be_reached_says_what_can(self) -> None:
        reference = table(unet_graph(), *["11111"] * 4)
        with pytest.raises(InvalidBudget, match=r"at least 0\.5"):
            round_scores(np.zeros((4, 6)), reference, Budget(0.4), max_age=1)


class TestLearn:
    def test_a_learned_table_is_valid_rectified_and_within_its_budget(self, pipe: Any, trajectory: Trajectory) -> None:
        schedule = stepmask.learn(pipe, trajectory, 0.6, learner=QUICK)
        assert Budget(0.6).allows(lower(schedule))
        assert rectify(schedule) == schedule
        assert schedule.rows[0].all()
        assert schedule.provenance["budget"] == {"macs": 0.6}
        with stepmask.apply(pipe, schedule):
            trajectory.sampling()

    def test_half_learned_half_resumed_is_the_same_table(
        self, pipe: Any, trajectory: Trajectory, tmp_path: Path
    ) -> None:
        class Killed(Exception):
            pass

        class Dies(LocalExecutor):
            """Dies after two jobs of a call."""

            def map(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
                return (done if done[0] < 2 else self.die() for done in super().map(*args, **kwargs))

            def die(self) -> Never:
                raise Killed

        class Counts(LocalExecutor):
            """Counts jobs."""

            def map(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
                for done in super().map(*args, **kwargs):
                    counted.append(done)
                    yield done

        counted: list[tuple[int, Any]] = []
        unbroken = stepmask.learn(pipe, trajectory, 0.6, learner=QUICK)
        with pytest.raises(Killed):
            stepmask.learn(pipe, trajectory, 0.6, learner=QUICK, executor=Dies(), folder=tmp_path)
        assert len(list(tmp_path.glob("row-*.json"))) == 2
        resumed = stepmask.learn(pipe, trajectory, 0.6, learner=QUICK, executor=Counts(), folder=tmp_path)
        assert resumed == unbroken
        assert len(counted) == 8 - 2
        assert stepmask.learn(pipe, trajectory, 0.6, learner=QUICK, executor=Counts(), folder=tmp_path) == unbroken
        assert len(counted) == 8 - 2
        assert all(json.loads(path.read_text().splitlines()[0])["scores"] for path in tmp_path.glob("row-*.json"))

    def test_an_unwritable_folder_is_one_clear_error(self, pipe: Any, trajectory: Trajectory, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UnwritablePath):
            stepmask.learn(pipe, trajectory, 0.6, learner=QUICK, folder=tmp_path / "file")

    def test_what_cannot_be_learned_is_refused(self, pipe: Any, trajectory: Trajectory) -> None:
        with pytest.raises(InvalidBudget):
            stepmask.learn(pipe, trajectory, 1.5)
        with pytest.raises(InvalidBudget, match="at least"):
            stepmask.learn(pipe, trajectory, 0.05, learner=QUICK)
        with pytest.raises(LearningError, match="another pipeline"):
            stepmask.learn(pipe.transformer, trajectory)
        with pytest.raises(LearningError, match="one step"):
            stepmask.learn(pipe, stepmask.record(pipe, class_labels=[1], num_inference_steps=1))

    def test_a_plain_denoiser_learns_too(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 6, 0.05))
        graph = stepmask.trace(denoiser, trajectory, blocks={"still": "output", "moving": "output"})
        blocks = tuple(replace(block, macs=1) for block in graph.blocks)
        full = MaskSchedule.all_compute(stepmask.BlockGraph(blocks), trajectory.denoiser, trajectory.sampler)
        learner = PerTimestep(iterations=40, relaxation=Sigmoid(rate=0.3), rounds=1)
        schedule = stepmask.learn(denoiser, trajectory, 0.8, graph=full.graph, learner=learner)
        still, moving = schedule.rows[1:, 0].sum(), schedule.rows[1:, 1].sum()
        assert still < moving
        assert schedule.sampler == sampler(6).__class__("", (5.0, 4.0, 3.0, 2.0, 1.0, 0.0))
        assert schedule.denoiser == fingerprint_of(denoiser)


class TestRecord:
    def test_what_the_denoiser_was_given_is_kept_step_by_step(self, pipe: Any, trajectory: Trajectory) -> None:
        assert trajectory.steps == len(trajectory.calls) == 5
        assert trajectory.sampler.timesteps == (800.0, 600.0, 400.0, 200.0, 0.0)
        call, output = trajectory.at(2)[0][0], trajectory.at(2)[1][0]
        assert call.kwargs["class_labels"].tolist() == [1, 2, 1000, 1000]
        with torch.no_grad():
            assert torch.equal(pipe.transformer(*call.args, **call.kwargs).sample, output.sample)

    def test_conditioning_is_kept_once(self, trajectory: Trajectory) -> None:
        labels = {call.kwargs["class_labels"].data_ptr() for call in trajectory.calls}
        latents = {call.args[0].data_ptr() for call in trajectory.calls}
        assert (len(labels), len(latents)) == (1, 5)

    def test_what_cannot_be_repeated_is_refused(self, pipe: Any) -> None:
        with pytest.raises(RunError, match="without run="):
            stepmask.record(pipe.transformer)

    def test_latents_that_are_not_finite_are_refused(self, pipe: Any) -> None:
        pipe.transformer.proj_out_2.bias.data[0] = torch.nan
        with pytest.raises(LearningError, match="not finite"):
            stepmask.record(pipe, class_labels=[1], num_inference_steps=2, output_type="pt")
        assert not hooks_of(pipe.transformer)


class TestLatent:
    def test_the_latent_alone_is_that_of_the_whole_run(self, trajectory: Trajectory) -> None:
        with torch.no_grad():
            assert torch.equal(trajectory.sampling.latent(), trajectory.sampled.latent)

    def test_it_has_gradients_where_the_caller_asks_for_them(self, trajectory: Trajectory) -> None:
        trajectory.sampling.denoiser.requires_grad_(True)
        assert trajectory.sampling.latent().requires_grad


def half_table(trajectory: Trajectory, order: int) -> MaskSchedule:
    """Every other step of a `Drift` run forecast."""
    graph = stepmask.trace(trajectory.sampling.pipe, trajectory, blocks={"still": "output", "moving": "output"})
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    return fixed_interval(full, 0.5, order=order)


class TestChain:
    def test_the_gradient_agrees_with_finite_differences(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 6, 0.05))
        schedule, generator = half_table(trajectory, 1), torch.Generator().manual_seed(0)

        def loss(latent: Tensor) -> Tensor:
            return (latent - trajectory.sampled.latent).square().sum() * 1e3

        def at(weights: Tensor) -> tuple[float, Tensor]:
            value, gradients = loss_and_gradients(trajectory, schedule, weights, loss)
            return value, gradients.sum(0)

        # in all weights at once: what earlier ones change in values that are stored after them counts too
        weights = torch.tensor(schedule.forecasts, dtype=torch.float32)
        direction = 1e-2 * torch.randn(weights.shape, generator=generator) * (weights != 0)
        slope = (at(weights + direction)[0] - at(weights - direction)[0]) / 2
        assert float((at(weights)[1] * direction).sum()) == pytest.approx(slope, rel=0.02)

    def test_the_gradient_of_blends_agrees_with_finite_differences(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 6, 0.05))
        table, generator = half_table(trajectory, 1), torch.Generator().manual_seed(0)
        weights = torch.tensor(table.forecasts, dtype=torch.float32)
        weights[2, :] = weights[4, :] = torch.tensor([0.9, 0.2, 0.0])  # computed there
        blended = table.with_rows(table.rows, weights.numpy())

        def at(weights: Tensor) -> tuple[float, Tensor]:
            error = lambda latent: (latent - trajectory.sampled.latent).square().sum()  # noqa: E731
            value, gradients = loss_and_gradients(trajectory, blended, weights, error)
            return value, gradients.sum(0)

        direction = 1e-2 * torch.randn(weights.shape, generator=generator) * (weights != 0)
        direction[torch.tensor(blended.rows) & (weights[..., 1] == 0)] = 0
        slope = (at(weights + direction)[0] - at(weights - direction)[0]) / 2
        assert float((at(weights)[1] * direction).sum()) == pytest.approx(slope, rel=0.02)

    def test_a_sample_has_a_gradient_of_its_own(self, trajectory: Trajectory, reference: MaskSchedule) -> None:
        schedule, (rows, _) = fixed_interval(reference, 0.6, order=2), samples_of(trajectory)
        weights = torch.tensor(schedule.forecasts, dtype=torch.float32)
        _, gradients = loss_and_gradients(trajectory, schedule, weights, Tensor.sum)
        assert len(gradients) == 2
        for sample in (0, 1):
            own = torch.tensor(rows == sample)
            _, alone = loss_and_gradients(trajectory, schedule, weights, lambda latent, own=own: latent[own].sum())
            torch.testing.assert_close(alone[sample], gradients[sample], rtol=1e-4, atol=1e-6)
            assert alone[1 - sample].abs().max() < 1e-5 * alone[sample].abs().max()

    def test_a_weight_of_zero_has_a_gradient_where_its_value_is_read(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 6, 0.05))
        schedule = half_table(trajectory, 1)
        weights = torch.zeros(schedule.forecasts.shape)
        _, gradients = loss_and_gradients(trajectory, schedule, weights, Tensor.sum)
        assert np.array_equal(gradients[0] != 0, (schedule.forecasts != 0) & ~schedule.rows[..., None])

    @pytest.mark.parametrize("make", [fixed_interval, whole_step])
    def test_a_run_under_gradients_ends_where_a_masked_run_ends(
        self, pipe: Any, trajectory: Trajectory, reference: MaskSchedule, make: Any
    ) -> None:
        schedule = make(reference, 0.6, order=2)
        with stepmask.apply(pipe, schedule), torch.no_grad():
            masked = trajectory.sampling.latent()
        weights = torch.tensor(schedule.forecasts, dtype=torch.float32)
        distance, _ = loss_and_gradients(trajectory, schedule, weights, lambda latent: (latent - masked).abs().max())
        assert distance < 1e-4
        assert not any(hooks_of(module) for module in pipe.transformer.modules())

    def test_values_made_again_give_the_gradient_of_values_that_are_held(
        self, trajectory: Trajectory, reference: MaskSchedule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        schedule = fixed_interval(reference, 0.6, order=2)
        weights = torch.tensor(schedule.forecasts, dtype=torch.float32)
        _, made_again = loss_and_gradients(trajectory, schedule, weights, Tensor.sum)
        monkeypatch.setattr(Tape, "_drop", lambda *_: None)
        _, held = loss_and_gradients(trajectory, schedule, weights, Tensor.sum)
        assert torch.allclose(made_again, held, rtol=1e-4, atol=1e-6)
        assert held.abs().max() > 0.1

    @pytest.mark.parametrize("steps", [8, 24])
    def test_the_values_it_holds_do_not_grow_with_the_steps(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        denoiser, held = Drift(), list[int]()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, steps, 0.05))
        drop = Tape._drop

        def count(tape: Tape, branch: int, done: Any) -> None:
            held.append(len({step for step, _, _ in tape.stored}))
            drop(tape, branch, done)

        monkeypatch.setattr(Tape, "_drop", count)
        schedule = half_table(trajectory, 1)
        loss_and_gradients(trajectory, schedule, torch.tensor(schedule.forecasts, dtype=torch.float32), Tensor.sum)
        assert max(held) == 2
        assert len(held) == 2 * steps  # forwards, and again on the way back

    def test_a_loop_that_detaches_says_so(self) -> None:
        denoiser = Drift()
        run = loop(denoiser, 6, 0.05)
        trajectory = stepmask.record(denoiser, run=lambda: run().detach())
        schedule = half_table(trajectory, 1)
        weights = torch.tensor(schedule.forecasts, dtype=torch.float32)
        with pytest.raises(LearningError, match=r"Look in the loop for \.detach"):
            loss_and_gradients(trajectory, schedule, weights, Tensor.sum)
        assert type(denoiser.still) is Scale


class Killed(BaseException):
    pass


def drift_training() -> trained._Training:
    """The training of every other step of a `Drift` run, from its start."""
    denoiser = Drift()
    run = stepmask.record(denoiser, run=loop(denoiser, 4, 0.05))
    start = half_table(run, 1)
    task = Task([run], start, Budget(0.5), LocalExecutor(), None)
    return trained._Training(TrainedForecasts(), _Start(start, Family([start]), [torch.tensor([0.1])]), task)


class TestTrainedForecasts:
    def test_never_worse_than_the_regular_table_it_starts_from(self, pipe: Any, trajectory: Trajectory) -> None:
        schedule = stepmask.learn(pipe, trajectory, 0.6, learner=TrainedForecasts(passes=2.4))
        assert schedule.provenance["calibration_error"] <= schedule.provenance["start_error"]
        assert rectify(schedule) == schedule
        assert Budget(0.6).allows(lower(schedule))
        with stepmask.apply(pipe, schedule):
            errors = latent_errors(trajectory.sampling().latent, trajectory.sampled.latent)
        assert fmean(errors) == pytest.approx(schedule.provenance["calibration_error"])

    def test_training_that_goes_astray_is_thrown_away(self) -> None:
        # at a rate of 30 weights are thrown far from the start's
        denoiser = Drift()
        run = stepmask.record(denoiser, run=loop(denoiser, 8, 0.05))
        graph = half_table(run, 1).graph
        schedule = stepmask.learn(denoiser, run, 0.5, graph=graph, learner=TrainedForecasts(passes=4, rate=30))
        assert "trained" not in str(schedule.provenance["table"])
        assert schedule.provenance["calibration_error"] == schedule.provenance["start_error"]
        with stepmask.apply(denoiser, schedule):
            errors = latent_errors(run.sampling().latent, run.sampled.latent)
        assert fmean(errors) == pytest.approx(schedule.provenance["start_error"])

    def test_no_sample_leads_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # of gradients g, 2g and 100g the median is 2g, and none counts for more than three of it: g + 2g + 6g
        training = drift_training()
        own = torch.randn(training.start.table.forecasts.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(training._clipped(torch.stack([own, 2 * own, 100 * own])), 9 * own)
        torch.testing.assert_close(training._clipped(torch.stack([own, 2 * own, 3 * own])), 6 * own)

        # so four samples that agree outvote one that pulls a hundred times as hard the other way
        def after(*gradients: Tensor) -> MaskSchedule:
            monkeypatch.setattr(trained, "loss_and_gradients", lambda *_: (0.0, torch.stack(gradients)))
            return drift_training().run(1)

        alone, start = after(own).forecasts, training.start.table.forecasts
        np.testing.assert_allclose(after(own, own, own, own, -100 * own).forecasts, alone, atol=1e-4)
        assert np.abs(alone - start).max() > 1e-2

    def test_blocks_blend_after_two_reused_steps_alone_and_the_denoiser_wherever_it_has_an_older_value(
        self, pipe: Any
    ) -> None:
        run = stepmask.record(pipe, class_labels=[1, 2], num_inference_steps=8)
        full = MaskSchedule.all_compute(stepmask.trace(pipe, run), run.denoiser, run.sampler)
        start = fixed_interval(full, 0.4, order=1)  # steps 0, 2 and 5; the denoiser itself at every step
        blended = start.rows & _readable(start, 3, Budget(0.5)).any(axis=2)
        assert np.flatnonzero(blended[:, 0]).tolist() == [5]
        assert np.flatnonzero(blended[:, -1]).tolist() == [1, 2, 3, 4, 5, 6, 7]

    def test_two_values_are_all_it_reads_if_asked(self, pipe: Any, trajectory: Trajectory) -> None:
        learner = TrainedForecasts(passes=1.2, window=2)
        assert stepmask.learn(pipe, trajectory, 0.6, learner=learner).windows.max() <= 2

    def test_it_beats_taylor_on_a_chain_that_is_no_polynomial(self) -> None:
        denoiser = Drift()
        trajectory = stepmask.record(denoiser, run=loop(denoiser, 8, 0.05))
        learner = TrainedForecasts(passes=15, rate=0.003)
        schedule = stepmask.learn(denoiser, trajectory, 0.5, graph=half_table(trajectory, 1).graph, learner=learner)
        assert schedule.provenance["calibration_error"] < 0.2 * schedule.provenance["start_error"]

    def test_a_killed_run_goes_on_where_it_stopped(
        self, pipe: Any, trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        learner, runs, last = TrainedForecasts(passes=2.4), 0, 0
        trajectories = [trajectory, stepmask.record(pipe, seed=1, class_labels=[3, 4], num_inference_steps=5)]
        unbroken = stepmask.learn(pipe, trajectories, 0.6, learner=learner)

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == last:
                raise Killed
            return loss_and_gradients(*args, **kwargs)

        monkeypatch.setattr(trained, "loss_and_gradients", counting)
        for last in (2, 4, 5):  # on trial, before what is ahead goes on, and on its way
            runs, folder = 0, tmp_path / str(last)
            with pytest.raises(Killed):
                stepmask.learn(pipe, trajectories, 0.6, learner=learner, folder=folder)
            assert stepmask.learn(pipe, trajectories, 0.6, learner=learner, folder=folder) == unbroken
            assert runs == 3 + 3 + 1  # three on trial, the rest of one, and what was killed is run again

    @pytest.mark.parametrize(("trained", "leader"), [((0.05, 0.3), 0), ((0.15, 0.3), 1), ((0.15, 0.09), 1)])
    def test_a_start_that_a_trial_makes_worse_counts_as_it_was(self, trained: tuple[float, float], leader: int) -> None:
        denoiser = Drift()
        family = Family([half_table(stepmask.record(denoiser, run=loop(denoiser, 4, 0.05)), 1)])
        before, after = (
            [_Start(family.tables[0], family, [torch.tensor([error])]) for error in errors]
            for errors in ((0.2, 0.1), trained)
        )
        assert _leader(before, after) == leader

    def test_whoever_is_ahead_after_a_trial_or_was_before_it_goes_on(self, pipe: Any, trajectory: Trajectory) -> None:
        learner, graph = TrainedForecasts(passes=2.4), stepmask.trace(pipe, trajectory)
        reference = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        task = Task([trajectory], reference, Budget(0.6), LocalExecutor(), None)
        starts = learner._starts(task)
        promises = {}
        for start in starts:
            with stepmask.apply(pipe, trained._Training(learner, start, task).run(1)):
                latent = trajectory.sampling().latent
            error = geometric_mean(latent_errors(latent, trajectory.sampled.latent))
            promises[start.table.provenance["table"]] = min(error * start.family.handicap, start.promise)
        uneven = [start for start in starts if start.family.uneven]
        others = sorted((start for start in starts if start not in uneven), key=lambda start: start.promise)
        seated = [*uneven, *others[:1]]
        ahead = learner._ahead(_racers(starts), task).start
        assert len(uneven) == 2
        assert ahead in seated
        names = [start.table.provenance["table"] for start in seated]
        assert ahead.table.provenance["table"] == min(names, key=promises.__getitem__)

    def test_trajectories_of_different_samplers_are_refused(self, pipe: Any, trajectory: Trajectory) -> None:
        other = stepmask.record(pipe, class_labels=[1], num_inference_steps=4)
        with pytest.raises(LearningError, match="several samplers"):
            stepmask.learn(pipe, [trajectory, other])
        with pytest.raises(LearningError, match="no trajectory"):
            stepmask.learn(pipe, [])
        with pytest.raises(LearningError, match="2 trajectories"):
            stepmask.learn(pipe, [trajectory, trajectory], learner=QUICK)
