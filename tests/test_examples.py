"""Every python block in README and docs is run, on the tiny pipeline in place of the zoo's to keep it quick."""

import re
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


def test_readme_has_examples() -> None:
    assert python_blocks(ROOT / "README.md")
