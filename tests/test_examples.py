"""What readers are told is true: every python block in READMEs and docs is run, on the tiny pipeline in place of the
zoo's and in eight steps instead of twenty to keep it quick; every command line is parsed; every script in examples/ is
run as it is. The default learner trains for a tenth of its time."""

import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

import stepmask
from stepmask import errors, zoo
from stepmask.cli import app
from stepmask.learning.trained import TrainedForecasts

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = sorted(ROOT.glob("examples/*.py"))
COMMANDS: Any = typer.main.get_command(app)

FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
CHECKED = {"python", "", "json", "console"}
"""Languages of blocks that are looked at here; a directive is in braces, and Sphinx looks at it."""


@pytest.fixture(autouse=True)
def quick_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples learn is not looked at here."""
    monkeypatch.setattr("stepmask.learning.learn.TrainedForecasts", partial(TrainedForecasts, passes=1.5))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "", "console")).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("stepmask ")]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_examples_run(page: Path, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load = zoo.load
    monkeypatch.setattr("stepmask.zoo.load", lambda source: pipe if "dit" in source else load(source))
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        quicker = block.replace("num_inference_steps=20", "num_inference_steps=8")
        exec(compile(quicker, page.name, "exec"), names)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_goes_unchecked(page: Path) -> None:
    languages = {language for language, _ in FENCE.findall(page.read_text())}
    assert not {language for language in languages if not language.startswith("{")} - CHECKED


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_command_lines_are_ones(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        _, command, *arguments = shlex.split(line, comments=True)
        COMMANDS.commands[command].make_context(command, arguments)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_example_scripts_run(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script.read_text()
    assert len(text.splitlines()) < (60 if "nn.Module" in text else 40)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    assert "schedule" in capsys.readouterr().out


def test_readme_has_examples() -> None:
    assert blocks(ROOT / "README.md", "python")
    assert commands(ROOT / "README.md")


def test_the_schedule_on_the_page_is_one() -> None:
    (text,) = blocks(ROOT / "docs/file_format.md", "json")
    assert stepmask.MaskSchedule.from_json(text).to_json() == text


def test_every_error_has_its_advice() -> None:
    kinds = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert set(re.findall(r"^#+ `(\w+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)) == kinds


def test_every_public_name_is_documented() -> None:
    documented = re.findall(r"^\.\. auto\w+:: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert {f"stepmask.{name}" for name in stepmask.__all__} <= set(documented)
