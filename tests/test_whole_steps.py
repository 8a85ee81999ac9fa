"""Which steps to evaluate, from one sweep: ridge regression by hand, samples left out, and places that are found."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import stepmask
from stepmask import MaskSchedule, Trajectory
from stepmask.learning.whole_steps import RIDGE, WholeSteps, output_alone
from stepmask.schedule.forecasts import DIFFERENCES, PACE, PLAIN

ROWS = 12


def products(said: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Inner products by age of what was said, (rows, steps), where the gradient is 1 everywhere."""
    rows, steps = said.shape
    inner = np.zeros((rows, steps, steps))
    for age in range(steps):
        inner[:, age:, age] = said[:, : steps - age]
    return inner


def random(steps: int, window: int = 3) -> WholeSteps:
    draw = np.random.default_rng(0)
    return WholeSteps(draw.normal(size=(ROWS, steps, steps)), window)


def effects(outputs: WholeSteps, evaluated: list[int], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What a table does to every row: Σ_k (Σ_i w_ki·⟨G_k, y(s_i)⟩ − ⟨G_k, y(k)⟩)."""
    total = np.zeros(len(outputs.inner))
    for step in sorted({*range(outputs.steps)} - {*evaluated}):
        values = [at for at in reversed(evaluated) if at < step][: outputs.window]
        read = sum(weights[step, place] * outputs.inner[:, step, step - at] for place, at in enumerate(values))
        total += read - outputs.inner[:, step, 0]
    return total


def regression(outputs: WholeSteps, evaluated: list[int]) -> tuple[Any, Any, list[Any]]:
    """Plain reuse's effects, and those of moving every weight that there is, on the way; written out in full."""
    plain = np.tile(np.array(PLAIN), (outputs.steps, 1))
    base, moves, features = effects(outputs, evaluated, plain), [], []
    for step in sorted({*range(outputs.steps)} - {*evaluated}):
        known = min(outputs.window, sum(at < step for at in evaluated))
        for order in range(known):
            move = np.zeros_like(plain)
            move[step] = PACE[order] * DIFFERENCES[order]
            moves.append(move)
            features.append(effects(outputs, evaluated, plain + move) - base)
    columns = np.stack(features, axis=1)
    size = np.sqrt(np.square(columns).mean())
    return base, columns / size, [move / size for move in moves]


class TestForecasts:
    @pytest.mark.parametrize("window", [1, 2, 3])
    def test_they_are_ridge_regression_from_plain_reuse(self, window: int) -> None:
        outputs, evaluated = random(7, window), [0, 1, 3, 4]
        base, features, moves = regression(outputs, evaluated)
        penalty = np.sqrt(RIDGE * ROWS) * np.eye(len(moves))
        fitted = np.linalg.lstsq(np.vstack([features, penalty]), np.append(-base, np.zeros(len(moves))), rcond=None)[0]
        expected = np.array(PLAIN) + sum(much * move for much, move in zip(fitted, moves, strict=True))
        np.testing.assert_allclose(outputs.forecasts(evaluated), expected)

    def test_where_nothing_changes_plain_reuse_stays(self) -> None:
        outputs = WholeSteps(products(np.ones((ROWS, 6))), 3)
        assert outputs.forecasts([0, 3]).tolist() == [list(PLAIN)] * 6
        assert outputs.error([0, 3]) == 0

    def test_a_difference_is_read_where_outputs_go_on_as_before(self) -> None:
        slopes = np.random.default_rng(1).normal(size=(ROWS, 1))
        outputs = WholeSteps(products(slopes * np.arange(4)), 2)
        scale, difference = outputs.forecasts([0, 1])[2] @ DIFFERENCES[:, :2]  # step 1's, and what it adds to step 0's
        assert 0.5 < difference < 1.5
        assert scale == pytest.approx(1, abs=0.02)


class TestError:
    def test_each_sample_is_forecast_by_the_others(self) -> None:
        outputs, evaluated = random(6), [0, 2, 3]
        base, features, moves = regression(outputs, evaluated)
        left = []
        for row in range(ROWS):
            others = np.arange(ROWS) != row
            penalty = np.sqrt(RIDGE * ROWS) * np.eye(len(moves))
            stacked = np.vstack([features[others], penalty])
            fitted = np.linalg.lstsq(stacked, np.append(-base[others], np.zeros(len(moves))), rcond=None)[0]
            left.append(base[row] + features[row] @ fitted)
        assert outputs.error(evaluated) == pytest.approx(np.abs(left).mean())

    def test_with_everything_evaluated_there_is_none(self) -> None:
        assert random(5).error(range(5)) == 0


class TestBest:
    def test_evaluations_lie_where_outputs_change(self) -> None:
        walk = np.random.default_rng(2).normal(size=(ROWS, 12))
        walk[:, 5:] = 0  # what is said from step 4 on stays
        outputs = WholeSteps(products(walk.cumsum(axis=1)), 3)
        assert outputs.best(5)[0] == [0, 1, 2, 3, 4]
        assert outputs.error([0, 1, 2, 3, 4]) == pytest.approx(0)

    @pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
    def test_as_many_as_asked_none_twice_and_no_worse_than_evenly_spread(self, count: int) -> None:
        outputs = random(8)
        found = outputs.best(count)
        assert len({tuple(steps) for steps in found}) == len(found)
        assert all(len({*steps}) == count and steps[0] == 0 for steps in found)
        errors = [outputs.error(steps) for steps in found]
        assert errors == sorted(errors)
        assert errors[0] <= min(outputs.error([round(x) for x in np.linspace(0, end, count)]) for end in (6, 7))

    def test_no_evaluation_lies_better_a_step_away(self) -> None:
        outputs = random(9)
        for chosen in outputs.best(4):
            for at in chosen[1:]:
                others = [other for other in chosen if other != at]
                moved = [sorted([*others, to]) for to in (at - 1, at + 1) if to not in chosen and to < 9]
                assert all(outputs.error(steps) >= outputs.error(chosen) for steps in moved)


def test_a_sweep_of_the_output_alone_finds_what_one_of_all_blocks_does(
    pipe: Any, trajectory: Trajectory, reference: MaskSchedule
) -> None:
    asked: dict[str, Any] = {"probes": 1, "ages": reference.steps - 1}
    alone = stepmask.sweep(pipe, trajectory, graph=output_alone(reference.graph), **asked)
    everything = stepmask.sweep(pipe, trajectory, graph=reference.graph, **asked)
    np.testing.assert_allclose(alone.inner[:, :, 0], everything.inner[:, :, -1], rtol=1e-4, atol=1e-6)
    outputs = WholeSteps.of(alone, 3)
    lengths = np.linalg.norm(outputs.inner[:, 1:, 1] - outputs.inner[:, 1:, 0], axis=1)
    np.testing.assert_allclose(lengths, 1)
