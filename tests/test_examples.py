"""Every python block in README and docs is run, on the tiny pipeline in place of the zoo's to keep it quick; and
every script in examples/, as it is."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_the_examples_run(page: Path, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepmask.zoo.load", lambda source: pipe)
    names: dict[str, Any] = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.py")), ids=lambda script: script.name)
def test_the_example_scripts_run(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(script.read_text().splitlines()) < 60
    runpy.run_path(str(script))
    assert "schedule" in capsys.readouterr().out


def test_readme_has_examples() -> None:
    assert python_blocks(ROOT / "README.md")
