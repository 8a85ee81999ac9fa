"""Steps that differ in what they evaluate: by hand, on toys, and against a search through all tables."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stepmask
from stepmask.denoiser.batch import Batch
from stepmask.errors import InvalidBudget, InvalidSchedule, ReuseBeforeCompute, RunError, ScheduleMismatch
from stepmask.learning.allocate import shortest_paths
from stepmask.learning.objective import relative_error
from stepmask.schedule.baselines import all_reused, fixed_interval, whole_step
from stepmask.schedule.course import Course, computed_before
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.forecasts import taylor_forecasts
from stepmask.schedule.rectify import lower, rectify
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.show import summary

from toys import chain_graph

ENDS = Course(present=((0, 1), (0, 1), (0, 1), (1,), (1,), (1,)), parts=2)
ANEW = Course(starts=(3,))


def sampler(course: Course, branches: int = 1) -> SamplerFingerprint:
    return SamplerFingerprint("", tuple(float(6 - step) for step in range(6)), branches=branches, course=course)


def full(course: Course, branches: int = 1) -> MaskSchedule:
    return MaskSchedule.all_compute(chain_graph(3, "output"), DenoiserFingerprint("Chain"), sampler(course, branches))


class TestCourse:
    @pytest.mark.parametrize(
        ("course", "branches", "told"),
        [
            (Course(parts=2), 2, "a batch of 2 parts in each of 2 branches"),
            (Course(parts=0), 1, "a batch of 0 parts"),
            (Course(present=((0,),), parts=2), 1, "the branches of 1 steps"),
            (Course(present=((0, 1),) * 6, parts=3), 1, "steps that evaluate"),
            (Course(present=((0, 1),) * 5 + ((),), parts=2), 1, "the branches .* at step 5"),
            (Course(present=((0, 1),) * 5 + ((2,),), parts=2), 1, "the branches .* at step 5"),
            (Course(present=((0, 1),) * 5 + ((1, 0),), parts=2), 1, "the branches .* at step 5"),
            (Course(present=((0,),) + ((0, 1),) * 5, parts=2), 1, "a branch that comes back at step 1"),
            (Course(starts=(0,)), 1, "begins anew"),
            (Course(starts=(6,)), 1, "begins anew"),
            (Course(starts=(4, 2)), 1, "begins anew"),
        ],
    )
    def test_what_no_run_can_be_like_is_refused(self, course: Course, branches: int, told: str) -> None:
        with pytest.raises(InvalidSchedule, match=told):
            full(course, branches)

    def test_evaluations_in_order(self) -> None:
        ends = Course(present=((0, 1), (0, 1), (1,), (1,), (1,), (1,)))
        assert sampler(ends, 2).evaluations == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1))
        assert sampler(ENDS).evaluations == tuple((step, 0) for step in range(6))
        assert sampler(ENDS).loads.tolist() == [1, 1, 1, 0.5, 0.5, 0.5]

    @pytest.mark.parametrize("course", [Course(), ENDS, ANEW, Course(starts=(1, 4))])
    def test_a_schedule_is_the_same_from_its_text(self, course: Course) -> None:
        table = full(course)
        assert MaskSchedule.from_json(table.to_json()) == table
        assert ("starts" in table.to_json()) == bool(course.starts)

    def test_in_words(self) -> None:
        told = "part 0 and 1 at steps 0 to 2, part 1 at steps 3 to 5"
        assert str(ENDS) == told
        assert str(ANEW) == "begins anew at step 3"
        assert str(Course()) == "all steps alike"
        assert told in summary(full(ENDS))
        assert "all steps alike" not in summary(full(Course()))

    def test_a_step_with_half_the_batch_costs_half(self) -> None:
        rows = np.ones((6, 4), dtype=bool)
        rows[4:, 0] = False  # two of the steps with half the batch
        graph = full(ENDS).graph
        macs = [block.macs for block in graph.blocks]
        plan = lower(full(ENDS).with_rows(rows))
        assert plan.macs == round(4.5 * sum(macs) - macs[0])
        assert plan.macs_share == pytest.approx((4.5 * sum(macs) - macs[0]) / (4.5 * sum(macs)))


class TestTablesThatBeginAnew:
    def test_nothing_is_read_that_was_stored_before(self) -> None:
        rows = np.ones((6, 4), dtype=bool)
        rows[3, 1] = False
        with pytest.raises(ReuseBeforeCompute, match="since the run began anew at step 3"):
            full(ANEW).with_rows(rows)
        rows[3, 1], rows[4, 1] = True, False
        weights = np.tile((1.0, 0.0, 0.0), (6, 4, 1))
        weights[4, 1] = (2.0, -1.0, 0.0)
        with pytest.raises(ReuseBeforeCompute, match=r"reads 2 stored values at step 4, when 1 have been computed"):
            full(ANEW).with_rows(rows, weights)
        assert full(Course()).with_rows(rows, weights).steps == 6

    def test_by_hand(self) -> None:
        rows = np.array([[1], [0], [1], [1], [0], [1]], dtype=bool)
        assert computed_before(rows, (0, 3)).ravel().tolist() == [0, 1, 1, 0, 1, 1]
        assert taylor_forecasts(rows, 1, (0, 3))[[1, 4], 0].tolist() == [[1, 0, 0], [1, 0, 0]]
        assert taylor_forecasts(rows, 1)[4, 0].tolist() == [2, -1, 0]

    @pytest.mark.parametrize("order", [0, 1, 2])
    @pytest.mark.parametrize("make", [fixed_interval, whole_step])
    def test_regular_tables_compute_there_and_keep_to_their_share(self, make: Any, order: int) -> None:
        table = make(full(Course(starts=(1, 4))), 0.5, order=order)
        assert table.rows.all(axis=1).nonzero()[0].tolist() == [0, 1, 4]
        with pytest.raises(InvalidBudget, match=r"at least 0\.5"):
            make(full(Course(starts=(1, 4))), 0.4)

    def test_all_reused_computes_as_many_steps_each_time(self) -> None:
        assert all_reused(full(ANEW), order=1).rows[:, 0].tolist() == [True, True, False] * 2

    def test_rectified_tables_keep_whole_steps_there(self) -> None:
        rows = np.ones((6, 4), dtype=bool)
        rows[[1, 4], -1] = False
        assert rectify(full(ANEW).with_rows(rows)).rows[[0, 3]].all()

    def test_a_table_is_resampled_for_a_run_that_tells_its_own_course(self) -> None:
        told = SamplerFingerprint("DDIM", (5.0, 4.0, 3.0, 2.0), (-3.0, -1.0, 1.0, 3.0), course=Course(starts=(2,)))
        table = MaskSchedule.all_compute(chain_graph(3, "output"), DenoiserFingerprint("Chain"), told)
        other = SamplerFingerprint("DDIM", (5.0, 4.0, 3.0), (-3.0, 0.0, 3.0), course=Course(starts=(1,)))
        resampled = fixed_interval(table, 0.5, order=1).resample(other)
        assert resampled.rows[[0, 1]].all()
        with pytest.raises(ScheduleMismatch, match="steps differ in what they evaluate"):
            table.resample(SamplerFingerprint("DDIM", (5.0, 4.0, 3.0), (-3.0, 0.0, 3.0)))

    def test_shortest_paths_are_the_best_of_all(self) -> None:
        generator = np.random.default_rng(0)
        steps, ages = 6, 3
        for begins in ((0,), (0, 3), (0, 1, 4)):
            errors = generator.random((steps, 1, ages + 1, ages + 1))
            errors[:, :, 0] = 0.0
            errors[..., 0] = errors[..., 1:2].max(axis=-1) + errors[..., 0]
            prices = generator.random((steps, 1))
            found = shortest_paths(errors, prices, begins)[:, 0]
            costs = {
                bits: _cost(bits, errors[:, 0], prices[:, 0], begins)
                for bits in itertools.product((True, False), repeat=steps)
                if all(bits[begin] for begin in begins)
            }
            assert costs[tuple(found.tolist())] == pytest.approx(min(costs.values()))


def _cost(bits: tuple[bool, ...], errors: Any, prices: Any, begins: tuple[int, ...]) -> float:
    """The price of what is computed, and the errors of what is reused, by the age of the value and its gap."""
    ages = errors.shape[1] - 1
    total, computed = 0.0, []
    for step, computes in enumerate(bits):
        if step in begins:
            computed = []
        if computes:
            total += prices[step]
            computed.append(step)
            continue
        age = step - computed[-1]
        gap = computed[-1] - computed[-2] if len(computed) > 1 else 0
        if age > ages:
            return float("inf")
        total += errors[step, age, gap if gap <= ages else 0]
    return total


class TestBatch:
    @pytest.mark.parametrize("present", [(1,), (0,), (0, 2), (1, 2)])
    def test_the_gradient_of_a_part_is_that_of_the_whole(self, present: tuple[int, ...]) -> None:
        whole, part = Batch(6, (0, 1, 2)), Batch(2 * len(present), present)
        value = torch.randn(12, 3, requires_grad=True)  # two tokens folded into each row
        taken = part.part_of(value, whole)
        gradient = torch.randn_like(taken)
        (expected,) = torch.autograd.grad(taken, value, gradient)
        assert torch.equal(part.whole_of(gradient, whole), expected)

    def test_what_all_rows_share_stays(self) -> None:
        shared, rows = torch.ones(4, 2), torch.ones(4, 2)
        found = Batch(2, (1,)).part_of((shared, rows), Batch(4, (0, 1)), shared=(0,))
        assert found[0] is shared
        assert found[1].shape == (2, 2)


class Said(nn.Module):
    """x ↦ what it is told: a block whose output is the prompt's."""

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return 0 * x + told


class Prompted(nn.Module):
    """x + what each of two blocks says of the prompt, times the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Said(), Said()])
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: float, told: Tensor) -> Tensor:
        return x + self.weight * sum(layer(x, t * told) for layer in self.layers)


PROMPTS = torch.tensor([[1.0], [1.0], [10.0], [10.0]])  # two samples, unconditional and then conditional


def batched(network: nn.Module, until: int, kept: slice, since: int = 0) -> Any:
    """A loop whose guidance is one batch of four rows, from one step on and up to another."""

    def run() -> Tensor:
        x = torch.zeros(2, 1)
        for step in range(6):
            t = 1.0 - step / 6
            if since <= step < until:
                without, given = network(torch.cat([x, x]), t, PROMPTS).chunk(2)
                x = x - 0.1 * (without + 2 * (given - without))
            else:
                x = x - 0.1 * network(x, t, PROMPTS[kept])
        return x

    return run


def called_twice(network: nn.Module, until: int, since: int = 0) -> Any:
    """The same guidance in two calls."""

    def run() -> Tensor:
        x = torch.zeros(2, 1)
        for step in range(6):
            t = 1.0 - step / 6
            if since <= step < until:
                without = network(x, t, PROMPTS[:2])
                x = x - 0.1 * (without + 2 * (network(x, t, PROMPTS[2:]) - without))
            else:
                x = x - 0.1 * network(x, t, PROMPTS[2:])
        return x

    return run


def traced(network: nn.Module, run: Any) -> tuple[stepmask.Trajectory, MaskSchedule]:
    trajectory = stepmask.record(network, run=run)
    graph = stepmask.trace(network, trajectory, blocks={"layers.*": "output"})
    return trajectory, MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


class Scaled(nn.Module):
    """x + what a block says of the prompt, times a pair that a second block says to all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Said(), Pair()])
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: float, told: Tensor, strength: Tensor | None = None) -> Tensor:
        shift, scale = self.layers[1](x, t).unbind()  # (2, channels), whatever the batch
        return x + self.weight * (self.layers[0](x, t * told) * scale + shift)


class Pair(nn.Module):
    """(t, 1 + t) for each channel."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return torch.tensor([[t], [1 + t]]).expand(2, x.shape[1]).clone()


def of_samples(network: nn.Module, samples: int) -> Any:
    """Guidance in one batch for three of six steps; a strength that all rows share is given, too."""
    prompts = torch.tensor([[1.0]] * samples + [[10.0]] * samples)

    def run() -> Tensor:
        x = torch.zeros(samples, 1)
        for step in range(6):
            rows = 2 * samples if step < 3 else samples
            given = network(x.repeat(rows // samples, 1), 1 - step / 6, prompts[-rows:], torch.ones(1).expand(rows))
            x = x - 0.1 * (given[-samples:] if step >= 3 else 2 * given[samples:] - given[:samples])
        return x

    return run


class TestGuidanceInPartOfTheSteps:
    @pytest.mark.parametrize("samples", [1, 3])
    def test_what_all_rows_share_is_never_cut(self, samples: int) -> None:
        network = Scaled()
        trajectory = stepmask.record(network, run=of_samples(network, 2))
        graph = stepmask.trace(network, trajectory, blocks={"layers.*": "output"})
        assert [block.shared for block in graph.blocks] == [(0,), (), ()]  # in call order
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        rows = full.rows.copy()
        rows[3:, :-1] = False
        table = MaskSchedule.from_json(full.with_rows(rows).to_json())
        found = []
        for count in (2, samples):
            with stepmask.apply(network, table), torch.no_grad():
                found.append(float(of_samples(network, count)()[0]))
        assert found[0] == pytest.approx(found[1])

    def test_equal_prompts_do_not_tell_which_half_goes_on(self) -> None:
        network = Prompted()

        def run() -> Tensor:
            x = torch.zeros(2, 1)
            for step in range(4):
                x = x - 0.1 * network(x if step >= 2 else torch.cat([x, x]), 1 - step / 4, torch.ones(1, 1))[:2]
            return x

        with pytest.raises(RunError, match="no argument that tells which: they are given the same"):
            stepmask.record(network, run=run)

    def test_a_batch_that_shrinks_in_one_of_two_calls_is_refused(self) -> None:
        network = Prompted()

        def run() -> Tensor:
            x = torch.zeros(2, 1)
            for step in range(4):
                network(x, 1 - step / 4, PROMPTS[:2])
                doubled = network(
                    torch.cat([x, x])[: 4 if step < 2 else 2], 1 - step / 4, PROMPTS[: 4 if step < 2 else 2]
                )
                x = x - 0.1 * doubled[:2]
            return x

        with pytest.raises(RunError, match="batches of 2 and 4 rows in evaluation 1"):
            stepmask.record(network, run=run)

    def test_guidance_that_begins_later_than_recorded_is_refused(self) -> None:
        network = Prompted()
        _, table = traced(network, batched(network, 6, slice(2, 4), since=2))
        masked = stepmask.apply(network, fixed_interval(table, 0.7))
        with masked, torch.no_grad(), pytest.raises(RunError, match="2 rows at step 2, where guidance begins"):
            batched(network, 6, slice(2, 4), since=3)()

    @pytest.mark.parametrize(("kept", "part"), [(slice(2, 4), 1), (slice(0, 2), 0)])
    def test_the_half_that_goes_on_is_told_by_its_prompt(self, kept: slice, part: int) -> None:
        trajectory = stepmask.record(network := Prompted(), run=batched(network, 3, kept))
        assert trajectory.sampler.course == Course(((0, 1),) * 3 + ((part,),) * 3, parts=2)

    def test_reuse_takes_the_part_that_is_there(self) -> None:
        """From step 3 on the blocks answer what they said of the conditional prompt at step 2, where t was 2/3."""
        network = Prompted()
        _, table = traced(network, batched(network, 3, slice(2, 4)))
        rows = table.rows.copy()
        rows[3:, :-1] = False
        with stepmask.apply(network, table.with_rows(rows)) as masked, torch.no_grad():
            sample = batched(network, 3, slice(2, 4))()
            assert masked.store_bytes == 0

        x = 0.0
        for step in range(6):
            t = 1.0 - min(step, 2) / 6
            said = [x + 2 * t * prompt for prompt in (1.0, 10.0)]
            x = x - 0.1 * (said[0] + 2 * (said[1] - said[0]) if step < 3 else said[1])
        assert sample.flatten().tolist() == pytest.approx([x, x])

    def test_another_half_than_the_recorded_one_is_refused(self) -> None:
        network = Prompted()
        _, table = traced(network, batched(network, 3, slice(2, 4)))
        masked = stepmask.apply(network, fixed_interval(table, 0.7))
        with (
            masked,
            torch.no_grad(),
            pytest.raises(RunError, match=r"goes on with part 0 at step 3\. Expected: part 1"),
        ):
            batched(network, 3, slice(0, 2))()

    @pytest.mark.parametrize(("until", "since"), [(3, 0), (6, 2), (4, 1)])
    def test_one_batch_and_two_calls_are_the_same(self, until: int, since: int) -> None:
        network = Prompted()
        samples = []
        for run in (batched(network, until, slice(2, 4), since), called_twice(network, until, since)):
            _, table = traced(network, run)
            with stepmask.apply(network, fixed_interval(table, 0.7, order=1)), torch.no_grad():
                samples.append(run())
        torch.testing.assert_close(*samples)

    @pytest.mark.parametrize("make", [batched, called_twice])
    def test_another_step_is_refused(self, make: Any) -> None:
        network = Prompted()
        arguments = (slice(2, 4),) if make is batched else ()
        _, table = traced(network, make(network, 3, *arguments))
        with stepmask.apply(network, fixed_interval(table, 0.7)), torch.no_grad():
            for other in (2, 4):
                with pytest.raises((RunError, ScheduleMismatch)):
                    make(network, other, *arguments)()

    def test_gradients_go_to_the_part_that_was_read(self) -> None:
        network = Prompted()
        trajectory, table = traced(network, batched(network, 3, slice(2, 4)))
        profile = stepmask.sweep(network, trajectory, graph=table.graph, probes=8)
        predicted, real = [], []
        for step in (1, 2, 3, 4, 5):
            rows = table.rows.copy()
            rows[step, 0] = False
            alone = table.with_rows(rows)
            with stepmask.apply(network, alone):
                latent = trajectory.sampling().latent
            real.append(float(relative_error(latent, trajectory.sampled.latent)))
            predicted.append(profile.predicted_error(alone))
        ratios = np.array(predicted) / np.array(
            real
        )  # the network is linear: one direction, drawn with a random length
        assert ratios == pytest.approx([ratios[0]] * 5, rel=1e-3)
