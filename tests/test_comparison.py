"""The rules by which the benchmarks compare: what decides every published ratio, on numbers worked by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import equal_cost
import quality
from equal_cost import STEADY, at_cost, at_equal, cases, headlines, over_the_best, pace, read
from race import FEWER, OURS, PAPER, Tried, best
from results import FOLDER, read_rows, write_rows


def tried(*points: tuple[float, float]) -> list[Tried]:
    return [Tried(f"{cost:g}", cost, error, None) for cost, error in points]


def row(method: str, time: float, error: float) -> dict[str, Any]:
    return {"method": method, "setting": f"{time:g}", "time": time, "macs": time, "error": error}


class TestTuning:
    def test_a_setting_that_another_beats_in_cost_and_error_goes(self) -> None:
        assert [each.name for each in best(tried((0.5, 0.2), (0.6, 0.3), (0.7, 0.1)))] == ["0.5", "0.7"]

    def test_at_most_seven_stay_spread_over_their_costs(self) -> None:
        points = [(cost / 20, 1 / cost) for cost in range(1, 14)]
        assert [each.name for each in best(tried(*points))] == ["0.05", "0.15", "0.25", "0.35", "0.45", "0.55", "0.65"]

    def test_settings_far_above_all_shares_are_left_out_if_there_are_others(self) -> None:
        assert [each.name for each in best(tried((0.4, 0.2), (0.9, 0.1)))] == ["0.4"]
        assert [each.name for each in best(tried((0.9, 0.1)))] == ["0.9"]

    def test_what_skips_nothing_or_ends_in_nothing_finite_is_no_setting(self) -> None:
        assert best(tried((1.0, 1e-12), (0.5, float("nan")))) == []


class TestAtEqualCost:
    def test_between_two_settings_the_error_is_log_linear(self) -> None:
        assert at_cost([(0.4, 0.01), (0.6, 0.0001)], 0.5) == pytest.approx(0.001)

    def test_a_dearer_setting_with_a_larger_error_does_not_count(self) -> None:
        assert at_cost([(0.4, 0.01), (0.5, 0.09)], 0.5) == pytest.approx(0.01)

    def test_nobody_reaches_below_its_cheapest_setting_and_beyond_the_dearest_its_error_stays(self) -> None:
        assert at_cost([(0.4, 0.01)], 0.35) is None
        assert at_cost([(0.4, 0.01)], 0.6) == pytest.approx(0.01)

    def test_ours_over_the_best_of_all_others_but_the_papers_learner(self) -> None:
        found = [row(OURS, 0.3, 0.01), row("a", 0.3, 0.04), row("b", 0.5, 0.02), row(PAPER, 0.3, 0.001)]
        ratios = over_the_best(at_equal("time", found))
        assert ratios[0.6] == pytest.approx(0.5)
        assert ratios[0.3] == pytest.approx(0.25)
        assert 0.25 not in ratios


class TestPace:
    def test_the_median_of_what_fewer_steps_take_over_their_share(self) -> None:
        found = [row(FEWER, time, 0.1) | {"macs": 0.5} for time in (0.5, 0.6, 0.55)]
        assert pace([*found, row("a", 0.3, 0.1)]) == pytest.approx(1.1)

    @pytest.mark.parametrize("case", cases(), ids=lambda case: "{}-{}".format(*case))
    def test_no_published_run_was_disturbed(self, case: tuple[str, int]) -> None:
        assert pace(read(*case)) == pytest.approx(1, abs=STEADY)


def test_pictures_are_compared_at_the_best_setting_that_keeps_to_the_time() -> None:
    measured = [row("a", 0.3, 0.2), row("a", 0.505, 0.1), row("a", 0.6, 0.01), row("b", 0.7, 0.1)]
    assert quality.within(measured, 0.5) == [measured[1]]


def test_nearest_are_the_pictures_of_the_smallest_distance_but_for_those_left_out() -> None:
    drawn = {"reference": 0.0, OURS: 1.0, "a": 3.0, "b": 2.0}
    found = [{"share": 0.5, "method": name, "reference: distance": distance} for name, distance in drawn.items()]
    assert quality.nearest(found, 0.5)["method"] == OURS
    assert quality.nearest(found, 0.5, but=[OURS])["method"] == "b"


def test_rows_come_back_from_their_file_words_as_words_and_without_what_they_have_not(tmp_path: Path) -> None:
    rows = [row("fewer steps", 10, 0.1), {"method": "a", "setting": "b", "recall": 0.5}]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows


def test_the_readme_and_the_overviews_say_what_was_measured() -> None:
    assert headlines() in (FOLDER.parents[1] / "README.md").read_text()
    assert equal_cost.overview() == (FOLDER / "peers.md").read_text()
    assert quality.overview() == (FOLDER / "quality.md").read_text()
