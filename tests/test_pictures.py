"""What a person sees of a table: characters in a terminal, a notebook's SVG, matplotlib's figures."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stepmask
from stepmask import MaskSchedule, Report
from stepmask.cli import STYLES, _painted
from stepmask.drawing import COLOURS, save
from stepmask.evaluation import plots
from stepmask.evaluation.report import Row
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.picture import KINDS, TALL, WIDE
from stepmask.schedule.rectify import Kind, lower
from stepmask.schedule.show import MARKS, PER_CHANNEL, SAYS, show

from toys import table, unet_graph


def every_kind() -> MaskSchedule:
    """At step 2 up1 is a forecast; so mid is read by nobody, and up0 is blended. At step 1 mid is reused."""
    weights = {(2, "up1"): (2.0, -1.0), (2, "up0"): (0.5, 0.5)}
    return table(unet_graph(), "11111", "11011", "10001", weights=weights)


def drawn_rows(text: str) -> list[str]:
    """The marks of each step, parts of a folded table put together."""
    rows: dict[int, str] = {}
    for line in text.splitlines():
        if found := re.fullmatch(r" *(\d+) +\S+  (.*)  [ \d]{3}%", line):
            rows[int(found[1])] = rows.get(int(found[1]), "") + found[2]
    return [rows[step] for step in sorted(rows)]


class TestTerminal:
    def test_a_table_by_hand(self) -> None:
        assert drawn_rows(show(every_kind())) == ["██████", "██·███", "█  ~▓█"]
        assert "100%" in show(every_kind())

    def test_the_legend_names_what_is_there_and_nothing_else(self) -> None:
        legend = show(every_kind()).splitlines()[-1]
        assert all(says in legend for says in SAYS.values())
        assert show(table(unet_graph(), "11111", "11111")).splitlines()[-1] == "█ compute"

    @pytest.mark.parametrize("width", [40, 80, 200])
    def test_a_wide_table_is_cut_into_parts_that_fit(self, reference: MaskSchedule, width: int) -> None:
        schedule = fixed_interval(reference, 0.6, order=1)
        text = show(schedule, width)
        headers = ("blocks ",)  # names are as long as they are
        assert all(len(line) <= width for line in text.splitlines() if not line.startswith(headers))
        marks = {**MARKS, "forecast": "~"}
        assert drawn_rows(text) == ["".join(marks[cell.kind] for cell in row) for row in lower(schedule).cells]

    def test_colour_changes_no_character(self) -> None:
        text = show(every_kind())
        painted = _painted(text)
        assert painted.plain == text
        assert {span.style for span in painted.spans} == {STYLES[mark] for mark in "█▓·~"}
        assert set(STYLES) == {*MARKS.values(), PER_CHANNEL} - {" "}


class TestNotebook:
    def test_every_cell_is_drawn_in_the_colour_of_its_kind(self) -> None:
        schedule, drawn = every_kind(), Counter[Kind]()
        svg = schedule._repr_html_()
        names: dict[str, Kind] = {colour: kind for kind, colour in COLOURS.items()}  # type: ignore[misc]
        for width, height, colour in re.findall(r'width="(\d+)" height="(\d+)" fill="(#\w+)"', svg):
            assert int(height) == TALL - 1
            drawn[names[colour]] += (int(width) + 1) // WIDE
        assert drawn == Counter(cell.kind for row in lower(schedule).cells for cell in row)

    def test_names_are_escaped(self) -> None:
        schedule = every_kind()
        named = schedule.with_rows(schedule.rows, schedule.forecasts, provenance={"table": "<script>"})
        assert "<script>" not in named._repr_html_()
        report = Report([row("<b>", 1.0, 0.0)], {}, {})
        assert "&lt;b&gt;" in report._repr_html_()


def row(name: str, macs: float, error: float, ms: float = 10.0) -> Row:
    return Row(name, 2, macs, macs, [error], [], [], [ms], [ms], 0, None)


class TestFigures:
    def test_a_table_is_drawn_cell_by_cell(self, tmp_path: Path) -> None:
        schedule = every_kind()
        figure = schedule.plot()
        mesh = figure.axes[0].collections[0].get_array()
        kinds = [[KINDS.index(cell.kind) for cell in row] for row in lower(schedule).cells]
        assert np.asarray(mesh).reshape(schedule.rows.shape).tolist() == kinds
        with Image.open(save(figure, tmp_path / "map.png")) as heat:
            assert heat.width > 400
        assert b"<svg" in save(figure, tmp_path / "map.svg").read_bytes()

    def test_a_report_is_a_point_a_row(self) -> None:
        report = Report(
            [row("reference", 1.0, 0.0, 20.0), row("schedule", 0.5, 1e-3, 8.0), row("b", 0.4, 2e-3)], {}, {}
        )
        by_macs, by_speed = report.plot().axes
        assert [line.get_xydata().tolist() for line in by_macs.lines] == [[[0.5, 1e-3]], [[0.4, 2e-3]]]
        assert [line.get_xydata().tolist() for line in by_speed.lines] == [[[2.5, 1e-3]], [[2.0, 2e-3]]]

    def test_a_profile_shows_what_a_cell_costs_and_what_budgets_cost(self, pipe: Any) -> None:
        trajectory = stepmask.record(pipe, class_labels=[1], num_inference_steps=5)
        profile = stepmask.sweep(pipe, trajectory, probes=1, ages=4)
        cells, curve, _ = profile.plot().axes
        drawn = np.asarray(cells.collections[0].get_array())
        assert drawn.shape == (4, len(profile.graph) - 1)
        change = profile.inner[:, 2, 1, 1] - profile.inner[:, 2, 1, 0]
        assert drawn[1, 1] == pytest.approx(float(np.square(change).mean()))
        assert len(curve.lines[0].get_xydata()) == len(profile.pareto())

    def test_the_same_seeds_stand_below_each_other(self, tmp_path: Path) -> None:
        images = np.random.default_rng(0).random((3, 8, 8, 3)).astype(np.float32)
        with Image.open(plots.side_by_side({"reference": images, "schedule": images}, tmp_path / "grid.png")) as grid:
            assert grid.width > grid.height / 2

    def test_drawing_leaves_the_settings_of_others_alone(self) -> None:
        import matplotlib

        before = {name: str(value) for name, value in matplotlib.rcParams.items()}
        every_kind().plot()
        plots.line_chart({"a": [(1, 1.0), (2, 0.5)]}, "x", "y")
        assert {name: str(value) for name, value in matplotlib.rcParams.items()} == before
