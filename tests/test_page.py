"""The report as a page: what it says, that it holds everything itself, and that it works in a browser."""

import base64
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepmask
from stepmask import MaskSchedule, Profile, Report
from stepmask.evaluation.card import card
from stepmask.evaluation.page import render
from stepmask.evaluation.plots import side_by_side
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower
from stepmask.text import is_plain

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def schedule(reference: MaskSchedule) -> MaskSchedule:
    """Two blocks answer from the store: at step 1 as it was, at step 3 by a forecast."""
    rows, weights = reference.rows.copy(), reference.forecasts.copy()
    rows[1, 0] = rows[3, 1] = False
    weights[3, 1] = (1.5, -0.5, 0)
    return reference.with_rows(rows, weights)


@pytest.fixture
def report(pipe: Any, schedule: MaskSchedule) -> Report:
    rivals = {"<b>interval</b>": fixed_interval(schedule, 0.6), "fewer": 3}
    return stepmask.evaluate(pipe, schedule, rivals=rivals, repeats=1, class_labels=[3, 4], num_inference_steps=5)


@pytest.fixture
def profile(pipe: Any, trajectory: stepmask.Trajectory, schedule: MaskSchedule) -> Profile:
    return stepmask.sweep(pipe, trajectory, graph=schedule.graph, probes=2)


def says(page: str) -> list[str]:
    return re.findall(r'data-says="([^"]*)"', page)


def test_every_cell_says_what_it_does(report: Report, schedule: MaskSchedule) -> None:
    said = says(render(report))
    names = [block.label for block in schedule.graph.blocks]
    assert len(said) == schedule.steps * (len(names) + 1)  # and each step its share of the MACs
    assert f"step 1, {names[0]}: reused at age 1" in said
    assert f"step 3, {names[1]}: forecast from values of age 1, 2: 1.5·v0 − 0.5·v1" in said
    assert f"step 2, {names[0]}: computed" in said


def test_dead_cells_say_so(pipe: Any, reference: MaskSchedule) -> None:
    rows = reference.rows.copy()
    rows[2, -1] = False  # the denoiser itself
    table = reference.with_rows(rows)
    report = stepmask.evaluate(pipe, table, repeats=1, class_labels=[3], num_inference_steps=5)
    assert sum(said.endswith("read by nobody") for said in says(render(report))) == len(reference.graph) - 1


def test_a_profile_tells_what_cells_and_other_budgets_cost(report: Report, profile: Profile) -> None:
    page = render(report, profile=profile)
    assert report.schedule is not None
    cost = profile.cell_errors(report.schedule)[1, 0]
    assert f"reused at age 1; alone it adds a predicted error of {cost:.1e}" in page
    assert "predicted by the profile" in page
    assert "predicted" not in render(report)


def test_cells_add_up_to_the_predicted_effects(profile: Profile, schedule: MaskSchedule) -> None:
    rows = profile.around.rows.copy()
    rows[1, 0] = False
    alone = profile.around.with_rows(rows)
    costs = profile.cell_errors(alone)
    assert costs[1, 0] == pytest.approx(np.square(profile.effects(alone)).mean())
    assert np.count_nonzero(costs) == 1


def test_the_numbers_are_the_report_s(report: Report, schedule: MaskSchedule) -> None:
    page = render(report, command="stepmask evaluate 'a b'")
    assert f"{lower(schedule).macs_share:.1%}" in page
    for row in report.rows:
        assert f"{row.latent_error:.2e}" in page
    assert "stepmask evaluate &#39;a b&#39;" in page
    assert "&lt;b&gt;interval&lt;/b&gt;" in page
    assert "<b>" not in page


ODD = ("$\\frac{$", "_hidden", "\\$5 & <b>", "\x1b]0;t\x07\ud800", "```\n| a")


def test_rivals_may_be_called_anything(pipe: Any, report: Report, schedule: MaskSchedule, tmp_path: Path) -> None:
    _, _, rival, fewer = report.rows
    rows = [*report.rows[:2], *(replace(rival, name=name) for name in ODD), fewer]
    shown = {**report.images, **dict.fromkeys(ODD, report.images["fewer"])}
    odd = replace(report, rows=rows, images=shown, setting={"\ud800": "\x9b"}, machine={"a": "b\n```\x9b"})
    page = odd.save(tmp_path / "report.html", command="\ud800").read_text(encoding="utf-8")
    for said in ("$\\frac{$", "_hidden", "\\$5 &amp; &lt;b&gt;", r"\x1b]0;t\x07\ud800", r"```\n| a"):
        assert re.findall(f"<text[^>]*>{re.escape(said)}</text>", page), said  # in a legend
        assert f"<td>{said}</td>" in page
    for suffix in ("txt", "json"):
        assert odd.save(tmp_path / f"report.{suffix}").stat().st_size
    assert side_by_side(shown, tmp_path / "grid.png").stat().st_size
    drawn = [text.get_text() for text in odd.plot().axes[0].get_legend().get_texts()]
    assert drawn == ["schedule", "$\\frac{$", "_hidden", "\\$5 & <b>", r"\x1b]0;t\x07\ud800", r"```\n| a", "fewer"]
    told = card(schedule, report=odd).body
    assert r"| ```\n\| a |" in told
    assert "| _hidden |" in told
    assert is_plain(told.replace("\n", " "))


def test_it_asks_nobody_for_anything(report: Report) -> None:
    page = render(report)
    linked = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert linked
    assert all(link.startswith(("data:", "#")) for link in linked)
    assert "@import" not in page


def test_errors_along_the_trajectory_end_with_the_sample_s(report: Report) -> None:
    for name in ("schedule", "<b>interval</b>"):
        assert report[name].path_errors[-1] == pytest.approx(report[name].latent_error)
        assert report[name].path_errors[0] == 0  # the first step is computed
    assert report["fewer"].path_errors == []


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
class TestInABrowser:
    @pytest.fixture
    def browser(self, report: Report, profile: Profile, tmp_path: Path) -> Iterator[Any]:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
            options.add_argument(f"--{flag}")
        options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        driver.get(report.save(tmp_path / "report.html", profile=profile).as_uri())
        yield driver
        driver.quit()

    def test_hover_slider_strips_and_print(self, browser: Any) -> None:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        tip = browser.find_element(By.ID, "tip")
        assert not tip.is_displayed()
        cell = browser.find_element(By.CSS_SELECTOR, "#map rect.forecast")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
        ActionChains(browser).move_to_element(cell).perform()
        assert tip.is_displayed()
        assert tip.text == cell.get_attribute("data-says")

        pair = browser.find_element(By.ID, "pair")
        browser.execute_script(
            "const cut = arguments[0]; cut.value = 80; cut.dispatchEvent(new Event('input'))",
            browser.find_element(By.ID, "cut"),
        )
        upper = pair.find_elements(By.TAG_NAME, "img")[1]
        assert upper.value_of_css_property("clip-path") == "inset(0px 0px 0px 80%)"
        pictures = browser.find_elements(By.CSS_SELECTOR, ".strip:first-of-type img")
        pictures[1].click()
        assert pair.find_element(By.TAG_NAME, "img").get_attribute("src") == pictures[1].get_attribute("src")

        assert base64.b64decode(browser.print_page()).startswith(b"%PDF")
        assert browser.get_log("browser") == []

    @pytest.mark.parametrize("width", [500, 1200])
    def test_the_page_is_no_wider_than_its_window(self, browser: Any, width: int) -> None:
        browser.set_window_size(width, 900)
        widths = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1]
